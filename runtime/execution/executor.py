"""The serial executor: one action after the other. Simple and exact, the reference for every other executor."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from ...compiler.program import CompiledModel
from ..plan import Action, Error, Forward
from .bound import BoundModel
from .fusion import Fused
from .step import HANDLERS, Step, StepInput, StepResult, Updates

Record = Callable[[str, int, float, float], None]
"""``(action, worker, start, end)``, the times being those of ``time.perf_counter``, in seconds."""


IN_A_ROW = "a step's tasks run one after the other"
"""Why a step waits for all updates."""


class SerialExecutor(BoundModel):
    """Runs the plan of a compiled model action by action, on whatever device its tensors are.

    Attributes:
        record: told of every action that was done, if not None.
    """

    def __init__(self, compiled: CompiledModel, sigmas: list[float]) -> None:
        super().__init__(compiled, sigmas)
        self.record: Record | None = None

    def threads(self) -> AbstractContextManager[None]:
        """With the intra-op threads of this executor's operations, for all that belongs to a step."""
        return nullcontext()

    def waits(self, *, perturbed: bool) -> str:
        """Why a step with or without a perturbed run waits for all updates after the one before; "" if its tasks wait
        only for those of the weights that they read."""
        return IN_A_ROW

    def measures(self, *, perturbed: bool) -> bool:
        """Whether it is still being measured if such a step had better wait."""
        return False

    def captures(self) -> bool:
        """Whether what is being done goes into a graph: nothing may wait for a number then."""
        return False

    def release(self) -> None:
        """Let go of memory that is kept for steps to come, before something that takes much."""

    def run(self, given: StepInput) -> StepResult:
        """One step; raises NonFiniteLossError, and whatever the loss raises."""
        step = Step(self, given)
        self.execute(step, self.plan if given.perturbed else self.clean_plan)
        return step.result

    def execute(self, step: Step, plan: Sequence[Action]) -> None:
        """Do the actions of a plan, in its order; small ones together, unless each is to be recorded."""
        if step.given.updates is not None:
            self.begin(step.given.updates)
        for action in plan if self.record is not None else self.fused(plan):
            self.do(step, action, 0)

    def begin(self, updates: Updates) -> None:
        """Update all weights before the first task."""
        updates.finish()

    def do(self, step: Step, action: Action | Fused, worker: int) -> None:
        """Do one action."""
        started = time.perf_counter()
        HANDLERS[type(action)](step, action)
        step.release(action)
        if self.record is not None:
            self.record(str(action), worker, started, time.perf_counter())

    def run_clean(self, given: StepInput) -> Step:
        """The clean run alone, with all its values, its losses checked; `given` stays as it is. Raises as `run`."""
        step = Step(self, replace(given, environment=dict(given.environment)))
        for stage in range(len(self.stages)):
            step.forward(Forward(stage))
        step.evaluate(Error())
        return step
