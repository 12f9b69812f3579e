"""A small training run for the trainer's tests, and the script that kills it.

``python training_run.py random DIRECTORY`` and ``… write DIRECTORY`` train in forked processes that end by SIGKILL, at
random moments or inside the writing of files, and print a JSON report. Forking from one process that has already
imported torch is what makes dozens of real kills cheap; each child starts from the same untrained state.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import onward
from onward.compiler.program import CompiledModel
from onward.runtime.training import checkpoint as checkpoints
from onward.runtime.training.trainer import Trainer

FEATURES, CLASSES, BATCH = 6, 3, 8


class StandIn:
    """A program in miniature, with a tensor in its state: simultaneous perturbation, keyed by (seed, step)."""

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self.model, self.seed = model, seed
        self.step_count = 0
        self.forwards = 0.0
        self.clean_forwards = 0.0
        self.feedback = torch.zeros(3, dtype=torch.float64)

    def per_sample_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none")

    @torch.no_grad()
    def step(self, inputs: Tensor, target: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step_count)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        clean = [p.clone() for p in parameters]
        signs = [torch.randint(0, 2, p.shape, generator=generator).to(p.dtype) * 2 - 1 for p in parameters]
        losses = []
        for sigma in (0.05, -0.05):
            for p, weight, sign in zip(parameters, clean, signs, strict=True):
                p.copy_(weight + sigma * sign)
            losses.append(self.per_sample_loss(self.model(inputs), target).mean())
        slope = (losses[0] - losses[1]) / 0.1
        for p, weight, sign in zip(parameters, clean, signs, strict=True):
            p.copy_(weight)
            p.grad = slope * sign if p.grad is None else p.grad + slope * sign
        self.feedback.mul_(0.9)[self.step_count % 3] += slope.double()
        self.step_count += 1
        self.forwards += 2 * len(target)
        return (losses[0] + losses[1]) / 2

    def trust(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        names = ("step_count", "forwards", "clean_forwards", "feedback")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Three classes of points, moved about by all three global generators whenever one is loaded."""

    def __init__(self, samples: int = 44, augment: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        self.target = torch.randint(0, CLASSES, (samples,), generator=generator)
        means = torch.randn(CLASSES, FEATURES, generator=generator)
        self.points = means[self.target] + 0.3 * torch.randn(samples, FEATURES, generator=generator)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        point = self.points[index]
        if self.augment:
            point = point + 0.1 * torch.randn(FEATURES) + 0.1 * np.random.rand() + 0.1 * random.random()
        return point, self.target[index]


class Net(nn.Sequential):
    """Layers one after the other, with a batch norm's buffers among them."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def make_model() -> Net:
    torch.manual_seed(0)
    return Net(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))


@functools.cache
def _compiled() -> CompiledModel:
    estimator = onward.LikelihoodRatio(copies=2, groups="joint")
    return onward.compile(make_model(), (torch.zeros(4, FEATURES),), loss=F.cross_entropy, estimator=estimator).compiled


def make_program(seed: int = 0) -> onward.Program:
    """The same untrained program each time; the graphs, which are data, are compiled once."""
    return onward.Program(make_model(), _compiled(), F.cross_entropy, seed)


def make_loader(*, workers: int = 0, own_generator: bool = True, augment: bool = True) -> DataLoader[Any]:
    generator = torch.Generator() if own_generator else None
    return DataLoader(Points(augment=augment), BATCH, shuffle=True, generator=generator, num_workers=workers)


def make_trainer(directory: Path | None, program: Any = None, **options: Any) -> Trainer:
    program = program or make_program()
    optimizer = torch.optim.Adam(program.model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    if directory is not None:
        options = {"checkpoint_every": 4, "keep": 2, **options}
    return Trainer(program, optimizer, scheduler=scheduler, directory=directory, progress=False, **options)


def digest(trainer: Trainer) -> str:
    """A hash over every bit that training changes."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in value:
                sha.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif isinstance(value, Tensor):
            sha.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            sha.update(repr(value).encode())

    add([trainer.program.model.state_dict(), trainer.optimizer.state_dict(), trainer.program.state_dict()])
    if trainer.scheduler is not None:
        add(trainer.scheduler.state_dict())
    return sha.hexdigest()


def timeless(history: Any) -> list[dict[str, Any]]:
    """The history's records without the wall times."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history.to_dict()["records"]]


# --- the killing script -----------------------------------------------------------------------------------------------


def _forked(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Run `work` in a forked process, kill it after `kill_after` seconds; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _train(trainer: Trainer, directory: Path, epochs: int, result: Path) -> None:
    random.seed(0)  # Python seeds it anew in every forked process
    trainer.directory = directory
    history = trainer.fit(make_loader(), epochs, validation=[make_validation()], resume=True)
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    result.write_text(json.dumps({"digest": digest(trainer), "history": timeless(history), "metrics": records}))


def make_validation() -> tuple[Tensor, Tensor]:
    points = Points(augment=False)
    return points.points, points.target


def kill_at_random(folder: Path, kills: int, epochs: int) -> dict[str, Any]:
    """Kill a run at `kills` random moments (several runs, if one ends in between); compare with an unkilled one."""
    trainer, result = make_trainer(folder / "unused"), folder / "result.json"
    started = time.perf_counter()
    assert _forked(lambda: _train(trainer, folder / "reference", epochs, result)) == 0
    seconds = time.perf_counter() - started
    reference = json.loads(result.read_text())
    delays = random.Random(0)
    done, runs, steps = 0, 0, []
    while done < kills or runs == 0:
        run = folder / f"run{runs}"
        while True:
            delay = delays.uniform(0, seconds / 10) if done < kills else None
            status = _forked(lambda run=run: _train(trainer, run, epochs, result), delay)  # type: ignore[misc]
            if status != -signal.SIGKILL:
                break
            done += 1
            newest = checkpoints.candidates(run)[:1]
            steps.append(int(newest[0].name[5:14]) if newest else -1)
        assert status == 0
        assert json.loads(result.read_text()) == reference
        runs += 1
    return {"kills": done, "runs": runs, "seconds": seconds, "steps": steps}


class _Trap:
    """Kills this process at the `at`-th call that touches the disk; for a file of tensors, half written."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def arm(self) -> None:
        self._wrap(os, "fsync", "rename", "replace", "mkdir")
        self._wrap(shutil, "rmtree")
        self._wrap(checkpoints, "save_file")

    def _wrap(self, owner: Any, *names: str) -> None:
        for name in names:
            setattr(owner, name, functools.partial(self._call, getattr(owner, name), name))

    def _call(self, function: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            if name == "save_file":
                function(*args)
                with open(args[1], "r+b") as file:
                    file.truncate(os.path.getsize(args[1]) // 2)
            elif name == "rmtree":
                for file_name in sorted(os.listdir(args[0]))[:1] if os.path.isdir(args[0]) else []:
                    os.unlink(os.path.join(args[0], file_name))
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)


def kill_in_writes(folder: Path, epochs: int, every: int) -> dict[str, Any]:
    """Kill a run at its 1st, (1+every)th, … call that touches the disk, each time resuming to the end."""
    trainer, result = make_trainer(folder / "unused", keep=1, checkpoint_every=3), folder / "result.json"
    assert _forked(lambda: _train(trainer, folder / "reference", epochs, result)) == 0
    reference = json.loads(result.read_text())
    at, points = 1, 0
    while True:
        run = folder / f"run{at}"

        def killed(run: Path = run, at: int = at) -> None:
            _Trap(at).arm()
            _train(trainer, run, epochs, result)

        status = _forked(killed)
        if status == 0:
            return {"points": points, "last": at}
        assert status == -signal.SIGKILL, status
        assert _forked(lambda run=run: _train(trainer, run, epochs, result)) == 0, at  # type: ignore[misc]
        assert json.loads(result.read_text()) == reference, at
        assert sorted(p.name for p in run.iterdir()) == ["metrics.jsonl", f"step-{epochs * 6:09d}"], at
        points, at = points + 1, at + every


if __name__ == "__main__":
    torch.set_num_threads(1)  # no thread pool yet, so forking is safe
    mode, path = sys.argv[1], Path(sys.argv[2])
    make_program().step(*make_validation())  # compiles, and warms up what the children share
    if mode == "random":
        report = kill_at_random(path, kills=20, epochs=int(sys.argv[3]))
    else:
        report = kill_in_writes(path, epochs=2, every=int(sys.argv[3]))
    print(json.dumps(report))
