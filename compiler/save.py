"""Writes a compiled program to a folder: every graph as Python, and a manifest that says how they fit together.

===========================  =========================================================================================
``passes/<n>_<pass>.py``     the one-copy graph after each pass
``stages/stage_<n>.py``      the clean run, cut behind every site
``runs/perturbed_<n>.py``    one perturbed run a group of sites
``gradients/gradient_<n>.py``  one gradient subgraph a site
``constants.safetensors``    constant tensors that the graphs refer to, if there are any
``report.txt``               what ``onward inspect`` says
``manifest.json``            format and version; sites, parameters, estimator, plan, versions; and for each file above
                             its function's inputs and outputs in order: the keys under which values pass between them
===========================  =========================================================================================

The folder appears whole or not at all: it is written beside its place under a temporary name, flushed, and renamed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, fx

from ..passes.errors import OutputError
from ..passes.graph import Role, placeholders
from ..passes.locate_samples import batch_symbol
from .driver import node_count
from .files import whole_folder
from .program import CompiledModel, input_keys, output_keys
from .report import examine
from .report_text import text
from .site_options import resolve_sigmas
from .source import extent, file_of

FORMAT = "onward-program"
VERSION = 1


def save_program(
    compiled: CompiledModel,
    folder: Path,
    *,
    name: str = "model",
    plan: str = "",
    versions: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Write `compiled` into `folder` and return its manifest.

    Args:
        compiled: what the compiler made.
        folder: made if missing. One that holds anything is refused, unless `replace` and an earlier call made it.
        name: what the files call the model.
        plan: the plan as text.
        versions: versions for the manifest.
        settings: whatever else the manifest shall hold, under ``"settings"``.
        replace: replace what an earlier call wrote. Folders of anything else are never touched.

    Raises:
        OutputError: the folder cannot be written, or holds something else. Nothing of it was changed.
    """
    check_folder(folder, replace=replace)
    with whole_folder(folder) as temporary:
        manifest = _write(compiled, temporary, name, plan)
        manifest |= {"versions": dict(versions or {}), "settings": dict(settings or {})}
        (temporary / "report.txt").write_text(text(examine(compiled, name=name, plan=plan)), encoding="utf-8")
        content = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (temporary / "manifest.json").write_text(content, encoding="utf-8")
    return manifest


def check_folder(folder: Path, *, replace: bool, format: str = FORMAT) -> None:
    """Raise `OutputError` if `save_program`, or what else writes manifests of a `format`, may not write `folder`."""
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise OutputError(f"{folder} is not a folder.")
        if not any(folder.iterdir()):
            return
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error}") from error
    if not replace:
        raise OutputError(
            f"{folder} is not empty. Choose another folder, or replace what the same command wrote there (--force)."
        )
    if not _is_program(folder, format):
        raise OutputError(
            f"{folder} holds something else than what this command writes, so it is not replaced. Choose another."
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that `save_program` wrote.

    Raises:
        OutputError: there is none, or it is damaged or of a newer version.
    """
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise OutputError(f"{path} is not the manifest of a compiled program.")
    if manifest.get("version") != VERSION:
        raise OutputError(f"{path} has version {manifest.get('version')}; this Onward reads version {VERSION}.")
    return manifest


def _is_program(folder: Path, format: str) -> bool:
    try:
        return bool(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["format"] == format)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(compiled: CompiledModel, folder: Path, name: str, plan: str) -> dict[str, Any]:
    batch = batch_symbol(compiled.captured.module)
    attributes: dict[str, Any] = {}

    def write(module: fx.GraphModule, path: str, function: str, about: str) -> dict[str, Any]:
        target = folder / path
        target.parent.mkdir(exist_ok=True)
        target.write_text(file_of({function: module}, about, batch), encoding="utf-8")
        held = {str(node.target): f"{path}:{node.target}" for node in module.graph.nodes if node.op == "get_attr"}
        attributes.update({key: getattr(module, attribute) for attribute, key in held.items()})
        entry = {
            "file": path,
            "function": function,
            "operations": node_count(module),
            "inputs": input_keys(module),
            "outputs": output_keys(module),
        }
        return entry | ({"attributes": held} if held else {})

    passes = [
        {
            "name": record.name,
            "seconds": record.seconds,
            **write(record.module, f"passes/{number}_{record.name}.py", record.name, f"{name} after {record.name}."),
        }
        for number, record in enumerate(compiled.history)
    ]
    stages = [
        write(stage, f"stages/stage_{number}.py", f"stage_{number}", f"{name}: stage {number} of the clean run.")
        for number, stage in enumerate(compiled.stages)
    ]
    runs = [
        {
            "sites": list(run.sites),
            "share": run.share,
            **write(run.module, f"runs/{run.name}.py", run.name, f"{name}: the perturbed run of group {run.index}."),
        }
        for run in compiled.runs
    ]
    gradients = [
        {
            "site": gradient.site.index,
            "run": gradient.run,
            "per_copy": gradient.per_copy,
            "captures": [asdict(one) | {"name": one.name} for one in gradient.captures],
            **write(
                gradient.module,
                f"gradients/{gradient.name}.py",
                gradient.name,
                f"{name}: the gradient of {gradient.site.name}.",
            ),
        }
        for gradient in compiled.gradients
    ]
    constants = {**compiled.captured.constants, **attributes}
    tensors = {key: value.detach().cpu().contiguous() for key, value in constants.items() if isinstance(value, Tensor)}
    if tensors:
        save_file(tensors, folder / "constants.safetensors")
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": name,
        "captured_by": compiled.captured.how,
        "inputs": [_input(leaf) for leaf in compiled.captured.signature.leaves],
        "parameters": _parameters(compiled, batch),
        "constants": sorted(tensors),
        "estimator": compiled.estimator.to_json(),
        "sites": [
            asdict(site) | {"sigma": sigma}
            for site, sigma in zip(
                compiled.sites, resolve_sigmas(compiled.estimator.sigma, compiled.sites), strict=True
            )
        ],
        "mixes_samples": compiled.mixes_samples,
        "sequential": compiled.sequential,
        "plan": plan.split(),
        "passes": passes,
        "stages": stages,
        "runs": runs,
        "gradients": gradients,
    }


def _input(leaf: Any) -> dict[str, Any]:
    if not isinstance(leaf, tuple):
        return {"value": repr(leaf)}
    shape, dtype, device, batched = leaf
    extents = ["N", *shape[1:]] if batched else list(shape)
    return {"shape": extents, "dtype": _dtype(dtype), "device": str(device)}


def _parameters(compiled: CompiledModel, batch: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": node.meta["target"],
            "shape": [int(extent(size, batch)) for size in node.meta["val"].shape],
            "dtype": _dtype(node.meta["val"].dtype),
            "trainable": node.meta["trainable"],
            "sites": [site.index for site in compiled.sites if node.meta["target"] in site.parameters],
        }
        for node in placeholders(compiled.graph, Role.PARAMETER)
    ]


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
