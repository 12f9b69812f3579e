"""Trainers whose programs run in a row, on threads or on streams, with optimizers of every kind."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executor_cases import compiled_for, data_of, model_for
from torch import Tensor, nn
from training_run import digest

import onward
from onward.runtime.execution.executor import SerialExecutor
from onward.runtime.execution.step import Step
from onward.runtime.execution.streams import StreamedExecutor
from onward.runtime.execution.threads import ThreadedExecutor
from onward.runtime.plan import Action
from onward.runtime.training.per_parameter import PendingUpdates
from onward.runtime.training.trainer import Trainer

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "Adam, a rate in a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.02), foreach=False),
    "AdamW": lambda p: torch.optim.AdamW([{"params": p[:2], "lr": 0.01}, {"params": p[2:], "weight_decay": 0.1}]),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=0.02, foreach=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.02),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05, t0=5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


def trainer_of(case: str, make: Make, ways: str, loss: Any = F.cross_entropy, **options: Any) -> Trainer:
    """A trainer with a schedule by the batch, of a program that runs "serial", on "threads" or on "streams"."""
    compiled = compiled_for(case)
    program = onward.Program(model_for(case), compiled, loss, 3, workers=3 if ways == "threads" else 1)
    if isinstance(program.executor, ThreadedExecutor):
        program.executor.concurrent = True
    if ways == "streams":
        program.executor = executor = StreamedExecutor(compiled, program.sigmas, 3)
        executor.chases = True
    optimizer = make(list(program.model.parameters()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 0.9**done)
    options = {"metrics": None, "progress": False, **options}
    return Trainer(program, optimizer, scheduler=scheduler, scheduler_step="batch", **options)


def batches(case: str, count: int) -> list[tuple[Tensor, Tensor]]:
    x, y = data_of(case)
    return [(x + 0.1 * number, y) for number in range(count)]


def delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every task of threads held up at random before and after, some for as long as several others take."""
    delays, do = random.Random(5), SerialExecutor.do

    def late(self: SerialExecutor, step: Step, action: Action, worker: int) -> None:
        time.sleep(delays.random() ** 8 * 0.002)
        do(self, step, action, worker)
        time.sleep(delays.random() ** 8 * 0.002)

    monkeypatch.setattr(ThreadedExecutor, "do", late)


def note_updates(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the updates that were tasks, as they began."""
    seen: list[str] = []
    apply = PendingUpdates.apply

    def noted(self: PendingUpdates, parameter: str) -> None:
        seen.append(parameter)
        apply(self, parameter)

    monkeypatch.setattr(PendingUpdates, "apply", noted)
    return seen


def after(steps: int, case: str = "auto", make: Make = OPTIMIZERS["momentum"]) -> str:
    """The digest of a barrier run of so many steps."""
    trainer = trainer_of(case, make, "serial")
    if steps:
        trainer.fit(batches(case, steps), 1)
    return digest(trainer)
