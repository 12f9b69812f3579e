"""A step's tasks as ONNX models: one a task, and all of them as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

from ...compiler.to_onnx.builder import Builder
from ...compiler.to_onnx.emit import Emission
from ...compiler.to_onnx.trace import Described, Like
from .task import Task, Tasks

BATCH = "N"
"""What the batch size is called in the models."""


def extents(kind: Described, key: str = "") -> tuple[torch.dtype, list[int | str]]:
    """Dtype and shape of what a key holds, the batch size by name, and by the key what is of any size (-1)."""
    if not isinstance(kind, Like):
        return torch.int64, []
    return kind.dtype, [_named(size, key) for size in kind.shape]


def _named(size: int | tuple[int], key: str) -> int | str:
    if isinstance(size, int):
        return size if size >= 0 else f"length of {key}"
    return BATCH if size[0] == 1 else f"{size[0]}*{BATCH}"


def held(b: Builder, value: Tensor) -> str:
    """A tensor as a constant of the model."""
    return b.constant(value.detach().cpu().numpy())


def fused(tasks: Tasks, about: str) -> onnx.ModelProto:
    """The whole step as one model.

    Inputs: everything of `Tasks.state` by its key, the batch, ``seed``, ``step`` and ``lr``. Outputs: ``new:`` and the
    key, ``loss``, and ``finite``: whether losses and gradients are numbers. If not, what is new is worthless.
    """
    b = Builder("training_step")
    values: dict[str, str] = {}
    for key, value in tasks.state.items():
        values[key] = b.input(key, value.dtype, list(value.shape))
    for key, kind in tasks.inputs.items():
        values[key] = b.input(key, *extents(kind))
    seed, step = b.input("seed", torch.int64, []), b.input("step", torch.int64, [])
    values["runtime:lr"] = b.input("lr", torch.float32, [])
    values["runtime:step"] = step
    zero = b.ints([0])
    values["runtime:key"] = b.op("Concat", b.op("Unsqueeze", seed, zero), b.op("Unsqueeze", step, zero), axis=0)
    for key, value in tasks.constants.items():
        values[key] = held(b, value)
    before = [task for task in tasks.tasks if not task.perturbed]
    perturbed = [task for task in tasks.tasks if task.perturbed]
    if not tasks.probes:
        _run(b, tasks.tasks, values)
    else:
        learned = [key for task in perturbed for key in task.writes if key.startswith("new:")]
        later = _behind(before, set(learned))
        _run(b, [task for task in before if task not in later], values)
        values |= _branches(b, perturbed, learned, values, tasks)
        _run(b, later, values)
    for key, value in tasks.state.items():
        b.output(f"new:{key}", values[tasks.new[key]], value.dtype, list(value.shape))
    b.output("loss", values["loss"], torch.float32, [])
    b.output("finite", values["finite"], torch.bool, [])
    return b.model(about)


def _behind(tasks: Sequence[Task], keys: set[str]) -> list[Task]:
    """Those of `tasks` that read one of the keys, or what another such task writes."""
    found = []
    for task in tasks:
        if keys & set(task.reads):
            found.append(task)
            keys = keys | set(task.writes)
    return found


def _run(b: Builder, tasks: Sequence[Task], values: dict[str, str]) -> None:
    """Emit tasks in their order; `values` gains what they write."""
    noise: dict[str, tuple[str, Sequence[int]]] = {}
    for task in tasks:
        results = task.emit(Emission(b), values, noise)
        values.update(zip(task.writes, results, strict=True))
        if task.words:
            noise.update((key, (value, task.draws)) for key, value in zip(task.writes, results, strict=True))


def _branches(
    b: Builder, perturbed: Sequence[Task], learned: Sequence[str], values: Mapping[str, str], tasks: Tasks
) -> dict[str, str]:
    """The perturbed runs and what they teach, in an ``If``: where they are not due, what is known stays."""
    warmup = tasks.warmup
    with b.scope("due"):
        warming = b.op("Less", values["feedback:steps"], b.constant(warmup, np.int64))
        reached = b.op("GreaterOrEqual", values["runtime:step"], values["feedback:next_probe"])
        due = b.op("Or", warming, reached)
    inside, outside = Builder("perturbed", b), Builder("not_perturbed", b)
    own = dict(values)
    _run(inside, perturbed, own)
    for key in learned:
        old = tasks.state[key.removeprefix("new:")]
        inside.output(f"perturbed/{key}", own[key], old.dtype, list(old.shape))
        outside.output(f"not_perturbed/{key}", values[key.removeprefix("new:")], old.dtype, list(old.shape))
    names = [b.fresh(f"after/{key}") for key in learned]
    b.nodes.append(
        helper.make_node(
            "If", [due], names, name="perturbed_runs", then_branch=inside.graph(), else_branch=outside.graph()
        )
    )
    return dict(zip(learned, names, strict=True))


def single(task: Task, tasks: Tasks, about: str) -> onnx.ModelProto:
    """One task as a model: inputs and outputs are what it reads and writes, by their keys; constants are within."""
    b = Builder(task.name)
    values: dict[str, str] = {}
    for key, kind in zip(task.reads, task.kinds, strict=True):
        if key in tasks.constants:
            values[key] = held(b, tasks.constants[key])
        elif key not in task.copies and key not in values:
            values[key] = b.input(key, *extents(kind))
    noise: dict[str, tuple[str, Sequence[int]]] = {}
    makers = {key: (maker, kind) for maker in tasks.tasks if maker.words
              for key, kind in zip(maker.writes, maker.results, strict=True)}  # fmt: skip
    for key in task.noise:
        maker, kind = makers[key]
        noise[key] = b.input(key, *extents(kind, key)), maker.draws
    results = task.emit(Emission(b), values, noise)
    for key, value, kind in zip(task.writes, results, task.results, strict=True):
        b.output(key, value, *extents(kind, key))
    return b.model(about)
