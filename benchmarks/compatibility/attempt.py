"""Try one model: does torch.export take it, does Onward compile it, do two steps train every parameter?

    python benchmarks/compatibility/attempt.py timm/resnet18

Prints one line of JSON. In a process of its own, so that a crash or a slow model takes nothing else along.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from catalogue import CLASSES, LIBRARIES, Built, declare_torchvision_operators
from torch import Tensor
from torch.utils import _pytree as pytree

import onward
from onward.compiler.capture import as_call


@dataclass(frozen=True)
class Outcome:
    """What came of a model."""

    name: str
    parameters: int = 0
    shape: str = ""
    """Of the first input."""
    exported: bool = False
    """Whether ``torch.export`` takes it with a free batch size."""
    steps: bool = False
    """Whether it compiled and two steps gave every trainable parameter a finite gradient."""
    sites: int = 0
    """Gradient subgraphs under ``auto``."""
    operations: int = 0
    """The same with ``reach=0, segments="op"``: every operation by itself; 0 if not tried, or failed."""
    unused: tuple[str, ...] = ()
    """Trainable parameters that its forward never uses: Onward names them, and goes on once they are frozen."""
    reason: str = ""
    """Where it stopped, if it did."""
    ours: bool = False
    """Whether the reason is one of Onward's own errors, and not a crash."""
    seconds: float = 0.0
    """To compile and take two steps under ``auto``."""


def attempt(name: str) -> Outcome:
    """Build, export, compile, step."""
    library, _, model_name = name.partition("/")
    torch.manual_seed(0)
    try:
        built = LIBRARIES[library].build(model_name)
    except Exception as error:  # somebody else's code
        return Outcome(name, reason=f"cannot be built here: {_first_line(error)}")
    leaf = next(leaf for leaf in pytree.tree_leaves(built.inputs) if isinstance(leaf, Tensor))
    found = Outcome(
        name,
        parameters=sum(parameter.numel() for parameter in built.model.parameters()),
        shape="×".join(map(str, leaf.shape)),
        exported=_exports(built),
    )
    started = time.perf_counter()
    try:
        sites, unused = _train(built)
        found = dataclasses.replace(found, steps=True, sites=sites, unused=unused)
        found = dataclasses.replace(found, seconds=time.perf_counter() - started)
        if not LIBRARIES[library].operations:
            return found
        operations, _ = _train(built, reach=0, segments="op")
    except Exception as error:  # what is looked for
        ours = isinstance(error, onward.errors.OnwardError)
        return dataclasses.replace(found, reason=str(error) if ours else _first_line(error), ours=ours)
    return dataclasses.replace(found, operations=operations)


def _exports(built: Built) -> bool:
    args, kwargs = as_call(built.inputs)
    free = {} if built.unbatched else {0: torch.export.Dim("batch")}
    given = inspect.signature(built.model.forward).bind(*[free] * len(args), **dict.fromkeys(kwargs, free)).arguments
    try:
        torch.export.export(built.model, args, kwargs, dynamic_shapes=dict(given), strict=False)
    except Exception:  # a tracer's reasons are of any kind
        return False
    return True


def _train(built: Built, **settings: Any) -> tuple[int, tuple[str, ...]]:
    """Compile and take two steps: the number of sites, and what had to be frozen because the model does not use it.

    σ is given: measuring it costs time and tells nothing here.
    """
    estimator = onward.LikelihoodRatio.auto(sigma=0.05, warmup=0, **settings)
    options: dict[str, Any] = {"unbatched": True} if built.unbatched else {}
    unused: tuple[str, ...] = ()
    try:
        program = onward.compile(built.model, built.inputs, loss=_loss, estimator=estimator, **options)
    except onward.errors.UnreachedParameterError as error:
        unused = tuple(error.parameters)
        [built.model.get_parameter(n).requires_grad_(False) for n in unused]
        program = onward.compile(built.model, built.inputs, loss=_loss, estimator=estimator, **options)
    rows = next(leaf.shape[0] for leaf in pytree.tree_leaves(built.inputs) if isinstance(leaf, Tensor))
    target = torch.arange(rows) % CLASSES
    for _ in range(2):
        program.step(built.inputs, target)
    for name, parameter in built.model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all()):
            raise AssertionError(f"{name} has no finite gradient")
    return len(program.compiled.sites), unused


def _loss(output: Any, target: Tensor) -> Tensor:
    if isinstance(output, dict):
        output = output["logits"]
    logits = output[0] if isinstance(output, (tuple, list)) else output
    return F.cross_entropy(logits, target, reduction="none")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torchvision_operators = declare_torchvision_operators()
    print(json.dumps(dataclasses.asdict(attempt(sys.argv[1]))))
