"""Writes a program's training step to a folder that ONNX Runtime trains from (`onward.runtime.onnx`).

===========================  =========================================================================================
``manifest.json``            format and version; inputs, targets and state with dtypes and shapes; the tasks with what
                             they read and write; optimizer, seed, sites, estimator, versions
``training_step.onnx``       the whole step as one model
``inference.onnx``           the model in evaluation mode, its weights as initializers that may be fed
``loss.onnx``                the loss of every sample
``state.npz``                what the first step starts from: weights, buffers, optimizer and feedback
``stages/``, ``noise/``, ``runs/``, ``learning/``, ``gradients/``, ``updates/``
                             one model a task of the step
===========================  =========================================================================================

Every model holds standard operators only. Files beyond the limit of protobuf keep their weights beside them as external
data. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import checker
from torch import Tensor

from ...compiler.files import whole_folder
from ...compiler.save import check_folder
from ...compiler.to_onnx.builder import IR_VERSION, OPSET
from ...passes.errors import ExportError
from ..onnx.folder import FORMAT, VERSION
from ..onnx.write import LIMIT, beyond
from ..program import Program
from ..training.update import check_optimizer
from ..versions import versions
from .inference import class_numbers, inference_model, loss_model, token_numbers
from .step import BATCH, extents, fused, single
from .task import Task, Tasks
from .tasks import make_tasks
from .updates import described, state_of

FOLDERS = {
    "F": "stages", "E": "stages", "N": "noise", "P": "runs", "L": "learning", "W": "learning", "T": "learning",
    "G": "gradients", "U": "updates", "C": "updates",
}  # fmt: skip
"""By the first letter of a task's name."""

RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
"""What Windows takes for a device, whatever stands behind the dot."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    manifest: dict[str, Any]
    files: int
    bytes: int


def export(
    program: Program,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    target: Any,
    folder: str | Path,
    *,
    name: str = "model",
    settings: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Exported:
    """Write a program's training step to `folder`; program, model and optimizer are not changed.

    Args:
        program: as `onward.compile` returned it, trained or not: the exported step goes on from where it is.
        optimizer: SGD, Adam or AdamW over the model's trainable parameters; its state goes along.
        batch, target: an example, as for `Program.step`. The batch size stays free. With ``sigma="auto"`` the scale of
            the noise is measured on it, if no step has measured it before, and stays what it is.
        folder: made if missing; one that holds anything is refused, unless `replace` and an earlier call made it.
        name: what the files call the model.
        settings: whatever else the manifest shall hold, under ``"settings"``.

    Raises:
        ExportError: a setting, an operation, the loss or the optimizer has no form in ONNX.
        OutputError: the folder cannot be written, or holds something else. Nothing of it was changed.
        OptionError: the optimizer lacks trainable parameters of the model, or holds another one's.
        BatchError, ModeError: as for `Program.step`.
    """
    folder = Path(folder)
    check_optimizer(program.model, optimizer)
    check_folder(folder, replace=replace, format=FORMAT)
    known = described(optimizer)
    model = program.model
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    moments = {f"{n}.{k}": v for n, p in named for k, v in state_of(optimizer, p, known.update).items()}
    with _sigmas(program, batch, target):
        tasks, recorder = make_tasks(program, batch, target, known, moments)
        sigmas = list(program.sigmas)
    state = {key: _array(key, value) for key, value in tasks.state.items()}
    about = f"{name}, compiled by Onward"
    with whole_folder(folder) as temporary:
        models = {
            "training_step.onnx": fused(tasks, f"{about}: a training step"),
            "inference.onnx": inference_model(recorder, model, batch, f"{about}: the model in evaluation mode"),
            "loss.onnx": loss_model(recorder, f"{about}: the loss of every sample"),
        }
        entries = []
        for task, path in zip(tasks.tasks, task_files([task.name for task in tasks.tasks]), strict=True):
            models[path] = single(task, tasks, f"{about}: {task.name}")
            entries.append(_entry(task, path, tasks))
        for path, made in models.items():
            write_model(made, temporary / path)
        np.savez(temporary / "state.npz", **state)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "model": name,
            "opset": OPSET,
            "ir_version": IR_VERSION,
            "batch": BATCH,
            "whole": recorder.whole,
            "least": 2 if program.needs_two else 1,
            "inputs": _described(tasks, "input:", token_numbers(program)),
            "targets": _described(tasks, "target:", class_numbers(program, batch, target)),
            "outputs": [output.name for output in models["inference.onnx"].graph.output],
            "state": [
                {"key": key, "new": tasks.new[key], "dtype": str(value.dtype), "shape": list(value.shape)}
                for key, value in state.items()
            ],
            "parameters": [name for name, _ in named],
            "seed": program.seed,
            "step": program.step_count,
            "optimizer": {"name": known.name, "lr": known.lr, **known.options},
            "probe": {"always": not tasks.probes, "warmup": tasks.warmup},
            "estimator": program.compiled.estimator.to_json(),
            "sites": [
                asdict(site) | {"sigma": sigma} for site, sigma in zip(program.compiled.sites, sigmas, strict=True)
            ],
            "forwards": program.compiled.forwards,
            "tasks": entries,
            "versions": versions() | {"onnx": onnx.__version__},
            "settings": dict(settings or {}),
        }
        content = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (temporary / "manifest.json").write_text(content, encoding="utf-8")
        written = [path for path in temporary.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in written)
    return Exported(folder, json.loads(content), len(written), size)


@contextmanager
def _sigmas(program: Program, batch: Any, target: Any) -> Iterator[None]:
    """With ``sigma="auto"``, before any step, the program with the scales that it would measure on the batch."""
    held = list(program.sigmas)
    if program.compiled.estimator.sigma == "auto" and not program.step_count:
        program.sigmas[:] = program.measured_sigmas(batch, target)
    try:
        yield
    finally:
        program.sigmas[:] = held


def write_model(model: onnx.ModelProto, path: Path, limit: int = LIMIT) -> None:
    """Check a model and write it; one of more than `limit` bytes keeps its tensors in ``<name>.data`` beside it.

    Raises:
        ExportError: the checker or shape inference finds it wrong, which is a bug of ours.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    large = beyond(model, limit)
    if large:
        onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data")
    else:
        path.write_bytes(model.SerializeToString())
    try:
        checker.check_model(str(path) if large else model, full_check=True)
    except (checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} does not pass ONNX's checker: {error}") from error


def _array(key: str, value: Tensor) -> Any:
    if value.dtype == torch.bfloat16:
        raise ExportError(f"{key} is bfloat16, which a NumPy file cannot hold; train in float32.")
    return value.detach().cpu().contiguous().numpy()


def task_files(tasks: Sequence[str]) -> list[str]:
    """The tasks' names as names of files, which every file system takes and tells apart."""
    taken: set[str] = set()
    paths = []
    for task in tasks:
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", task.removeprefix("U:").removeprefix("W:"))[:100]
        path = f"{FOLDERS[task[0]]}/{'_' if RESERVED.match(name) else ''}{name}"
        while path.lower() in taken:
            path += "_"
        taken.add(path.lower())
        paths.append(f"{path}.onnx")
    return paths


def _entry(task: Task, path: str, tasks: Tasks) -> dict[str, Any]:
    reads = [key for key in task.reads if key not in task.copies and key not in tasks.constants]
    return {
        "name": task.name,
        "file": path,
        "reads": list(dict.fromkeys([*reads, *task.noise])),
        "writes": list(task.writes),
        "perturbed": task.perturbed,
    }


def _described(tasks: Tasks, prefix: str, numbers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a batch holds under a prefix, with what is known of the whole numbers in it."""
    found = []
    for key, kind in tasks.inputs.items():
        if key.startswith(prefix):
            dtype, shape = extents(kind)
            entry = {"key": key, "dtype": str(dtype).removeprefix("torch."), "shape": shape}
            found.append(entry | dict(numbers.get(key, {})))
    return found
