"""Steps and the optimizer's updates between them: an update behind its step, or among the tasks of the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .per_parameter import PendingUpdates, coupling
from .trainable import ChasingProgram, TrainableProgram
from .update import check_gradients, update


class Pipeline:
    """A program's steps and the optimizer's, in turn: `step`, `update`, `step`, … and `finish` before anything else
    looks at the weights."""

    def __init__(self, program: TrainableProgram, optimizer: torch.optim.Optimizer) -> None:
        self.program = program
        self.optimizer = optimizer
        self._chasing = program if isinstance(program, ChasingProgram) else None
        self._names = {id(parameter): name for name, parameter in program.model.named_parameters()}
        self._pending: PendingUpdates | None = None
        """What the optimizer has still to do after the last step."""

    def step(self, inputs: Any, target: Any) -> Tensor:
        """The program's step, on weights that are updated before it or in the course of it. Raises as that does, with
        weights and optimizer as after the step before."""
        if self._chasing is None or self._pending is None:
            return self.program.step(inputs, target)
        loss = self._chasing.step(inputs, target, updates=self._pending)
        self._pending = None
        return loss

    def update(self) -> None:
        """The optimizer's step (`update.update`), now or with the next step; raises `NonFiniteGradientError` now."""
        if self._chasing is None or self._chasing.waits() or coupling(self.optimizer):
            update(self.program, self.optimizer)
            return
        check_gradients(self.program.model, self.optimizer)
        self._pending = PendingUpdates(self.optimizer, self._names, self.program.trust())

    def finish(self) -> None:
        """Update what has not been yet."""
        if self._pending is not None:
            self._pending.finish()
            self._pending = None

    def describe(self) -> str:
        """As `Trainer.pipeline`."""
        if self._chasing is None:
            return "barrier: the program takes no updates"
        program, coupled = self._chasing, coupling(self.optimizer)
        perturbed, clean = (_in_words(program, kind, coupled) for kind in (True, False))
        return perturbed if perturbed == clean else f"{perturbed}; in steps without a perturbed run {clean}"


def _in_words(program: ChasingProgram, perturbed: bool, coupled: str) -> str:
    """How steps of a kind begin."""
    if why := program.waits(perturbed=perturbed) or coupled:
        return f"barrier: {why}"
    return "chase, while that is measured" if program.measures(perturbed=perturbed) else "chase"
