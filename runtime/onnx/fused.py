"""Steps by the one model that holds the whole of one."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .folder import Array, Folder
from .session import Device, Model, Value, number

State = dict[str, Value]


@dataclass(frozen=True)
class StepInput:
    """What a step is given beside its state: the batch by key, the step's number and its learning rate."""

    batch: Mapping[str, Array]
    number: int
    lr: float


@dataclass(frozen=True)
class StepResult:
    """A step's end: the state after it, its mean loss, and whether all that it computed were numbers. If not, `state`
    is that before it."""

    state: State
    loss: float
    finite: bool


class FusedSteps:
    """Runs ``training_step.onnx``, step after step."""

    def __init__(self, folder: Folder, device: Device, threads: int = 0) -> None:
        self.folder, self.device = folder, device
        self.model = Model(folder.file("training_step.onnx"), device, threads)
        keys = [form.key for form in folder.state]
        batch = [form.key for form in (*folder.inputs, *folder.targets)]
        self.model.check([*keys, *batch, "seed", "step", "lr"], [*(f"new:{key}" for key in keys), "loss", "finite"])

    def run(self, state: State, inputs: Iterable[StepInput], seed: int) -> Generator[StepResult, None, None]:
        """The result of each step, the first from `state`; ends behind one that is not finite."""
        for given in inputs:
            values = dict(state)
            values.update({key: self.device.value(array) for key, array in given.batch.items()})
            values["seed"] = self.device.value(np.array(seed, np.int64))
            values["step"] = self.device.value(np.array(given.number, np.int64))
            values["lr"] = self.device.value(np.array(given.lr, np.float32))
            found = self.model(values)
            finite = bool(number(found["finite"]))
            if finite:
                state = {key: found[f"new:{key}"] for key in state}
            yield StepResult(state, float(number(found["loss"])), finite)
            if not finite:
                return
