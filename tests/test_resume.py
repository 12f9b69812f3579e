"""Killed and resumed, a run ends with the same bits as one that never stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from training_run import (
    BATCH,
    Points,
    digest,
    make_loader,
    make_program,
    make_trainer,
    make_validation,
    timeless,
)

from onward.passes.errors import CheckpointError, DataError, NonFiniteLossError
from onward.runtime.training import checkpoint as checkpoints

STEPS = 6  # an epoch of the run in training_run


def seed_everything() -> None:
    import random

    import numpy as np

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def script(mode: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the killing script in a process of its own; its report."""
    path = Path(__file__).with_name("training_run.py")
    command = [sys.executable, "-W", "error", str(path), mode, str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.slow
def test_sigkill_at_20_random_moments(tmp_path: Path) -> None:
    report = script("random", tmp_path, "30")
    assert report["kills"] == 20
    assert len(set(report["steps"])) > 5, "the kills did not spread over the run"


@pytest.mark.slow
def test_sigkill_inside_the_writing_of_checkpoints_and_metrics(tmp_path: Path) -> None:
    report = script("write", tmp_path, "3")
    assert report["points"] > 25


def stopped_after(steps: int, directory: Path, epochs: int, loader: Any, **options: Any) -> None:
    """Train in this process, and stop (as by Ctrl-C) once `steps` steps are done."""
    program = make_program()
    trainer = make_trainer(directory, program, **options)
    step = program.step

    def stopping(*batch: Any) -> torch.Tensor:
        loss = step(*batch)
        if program.step_count == steps:
            trainer.stop()
        return loss

    program.step = stopping  # type: ignore[method-assign]
    history = trainer.fit(loader, epochs, validation=[make_validation()])
    assert history.interrupted
    assert program.step_count == steps


@pytest.mark.parametrize("scheduler_step", ["epoch", "batch"])
@pytest.mark.parametrize("steps", [1, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS + 3])
def test_stopped_anywhere_and_resumed(tmp_path: Path, steps: int, scheduler_step: Any) -> None:
    seed_everything()
    whole = make_trainer(tmp_path / "whole", scheduler_step=scheduler_step)
    history = whole.fit(make_loader(), 3, validation=[make_validation()])
    assert history.records[-1].step == 3 * STEPS

    seed_everything()
    stopped_after(steps, tmp_path / "run", 3, make_loader(), scheduler_step=scheduler_step)
    torch.rand(17)  # whatever happens to the generators in between
    resumed = make_trainer(tmp_path / "run", scheduler_step=scheduler_step)
    again = resumed.fit(make_loader(), 3, validation=[make_validation()], resume=True)
    assert digest(resumed) == digest(whole)
    assert timeless(again) == timeless(history)
    assert not again.interrupted

    metrics = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "run")]
    records = [[{**json.loads(line), "seconds": 0} for line in lines] for lines in metrics]
    assert records[0] == records[1]
    assert [r["step"] for r in records[1] if r["kind"] == "step"] == list(range(1, 3 * STEPS + 1))


@pytest.mark.parametrize(
    "loader",
    [
        lambda: make_loader(own_generator=False),
        lambda: make_loader(workers=2),
        lambda: torch.utils.data.DataLoader(
            Points(), BATCH, sampler=torch.utils.data.WeightedRandomSampler(torch.ones(44).tolist(), 44)
        ),
        lambda: torch.utils.data.DataLoader(
            Points(),
            batch_sampler=torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(Points()), BATCH, False),
        ),
        lambda: torch.utils.data.DataLoader(
            Points(), BATCH, sampler=torch.utils.data.DistributedSampler(Points(), num_replicas=1, rank=0)
        ),
        lambda: [make_validation(), *((x[:9], y[:9]) for x, y in [make_validation()] * 5)],
    ],
    ids=["global-generator", "workers", "weighted", "batch-sampler", "distributed", "list"],
)
def test_every_kind_of_loader(tmp_path: Path, loader: Any) -> None:
    seed_everything()
    whole = make_trainer(tmp_path / "whole")
    history = whole.fit(loader(), 2)
    seed_everything()
    stopped_after(STEPS + 2, tmp_path / "run", 2, loader())
    resumed = make_trainer(tmp_path / "run")
    again = resumed.fit(loader(), 2, resume=True)
    assert digest(resumed) == digest(whole)
    assert [r.train_loss for r in again] == [r.train_loss for r in history]


def test_epochs_differ_in_order_and_depend_on_the_seed(tmp_path: Path) -> None:
    def orders(seed: int) -> list[list[int]]:
        program = make_program(seed)
        seen: list[list[int]] = []

        class Indices(torch.utils.data.Dataset[Any]):
            def __len__(self) -> int:
                return 16

            def __getitem__(self, index: int) -> Any:
                seen[-1].append(index) if len(seen) and len(seen[-1]) < 16 else seen.append([index])
                return torch.randn(6), torch.tensor(index % 3)

        loader = torch.utils.data.DataLoader(Indices(), 4, shuffle=True)
        make_trainer(None, program).fit(loader, 2)
        return seen

    first = orders(0)
    assert first == orders(0)
    assert first[0] != first[1]
    assert first != orders(1)


def test_done_batches_are_not_loaded_again(tmp_path: Path) -> None:
    stopped_after(4, tmp_path, 1, make_loader())
    loader = make_loader()
    loaded: list[int] = []
    get = Points.__getitem__

    class Watched(Points):
        def __getitem__(self, index: int) -> Any:
            loaded.append(index)
            return get(self, index)

    loader.dataset.__class__ = Watched
    make_trainer(tmp_path).fit(loader, 1, resume=True)
    assert len(loaded) == 44 - 4 * BATCH


def test_resume_of_a_finished_run_trains_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    history = trainer.fit(make_loader(), 2)
    again = make_trainer(tmp_path)
    assert again.fit(make_loader(), 2, resume=True).to_dict() == history.to_dict()
    assert digest(again) == digest(trainer)
    longer = make_trainer(tmp_path).fit(make_loader(), 3, resume=True)
    assert longer.to_dict()["records"][:2] == history.to_dict()["records"]
    assert len(longer) == 3


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path: Path) -> None:
    assert len(make_trainer(tmp_path / "new").fit(make_loader(), 1, resume=True)) == 1


def test_a_damaged_newest_checkpoint_costs_only_time(tmp_path: Path) -> None:
    seed_everything()
    whole = make_trainer(tmp_path / "whole")
    whole.fit(make_loader(), 2)
    seed_everything()
    stopped_after(9, tmp_path / "run", 2, make_loader())
    newest = checkpoints.candidates(tmp_path / "run")[0]
    assert newest.name == "step-000000009"
    (newest / "state.safetensors").write_bytes(b"x")
    resumed = make_trainer(tmp_path / "run", keep=1)
    with pytest.warns(UserWarning, match="step-000000009.*is damaged"):
        resumed.fit(make_loader(), 2, resume=True)
    assert digest(resumed) == digest(whole)
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["metrics.jsonl", "step-000000009.damaged", "step-000000012"]


def test_only_damaged_checkpoints(tmp_path: Path) -> None:
    stopped_after(2, tmp_path, 1, make_loader())
    for path in checkpoints.candidates(tmp_path):
        (path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used"):
        make_trainer(tmp_path).fit(make_loader(), 1, resume=True)


def test_resume_with_other_things(tmp_path: Path) -> None:
    stopped_after(STEPS + 3, tmp_path, 2, make_loader())
    program = make_program()
    program.model[3] = torch.nn.Linear(8, 4)  # type: ignore[index]
    with pytest.raises(
        CheckpointError, match=r"another run: '3.weight' is .*\[3, 8\].* in the checkpoint and .*\[4, 8\]"
    ):
        make_trainer(tmp_path, program).fit(make_loader(), 2, resume=True)
    with pytest.raises(CheckpointError, match="the seed was 0 and is 1"):
        make_trainer(tmp_path, make_program(1)).fit(make_loader(), 2, resume=True)
    short = torch.utils.data.DataLoader(Points(), 22, shuffle=True, generator=torch.Generator())
    with pytest.raises(CheckpointError, match="after batch 3 of an epoch of 6 batches; this loader has 2"):
        make_trainer(tmp_path).fit(short, 2, resume=True)


def test_a_stream_that_became_shorter(tmp_path: Path) -> None:
    class Stream:
        def __init__(self, length: int) -> None:
            self.length = length

        def __iter__(self) -> Any:
            return (make_validation() for _ in range(self.length))

    stopped_after(3, tmp_path, 1, Stream(5))
    with pytest.raises(DataError, match="only 2 batches in epoch 1; 3 were done"):
        make_trainer(tmp_path).fit(Stream(2), 1, resume=True)


def test_an_error_in_the_run_leaves_the_checkpoint_usable(tmp_path: Path) -> None:
    seed_everything()
    whole = make_trainer(tmp_path / "whole")
    whole.fit(make_loader(), 2)
    seed_everything()
    program = make_program()
    step = program.step

    def failing(*batch: Any) -> torch.Tensor:
        if program.step_count == 10:
            raise NonFiniteLossError("the loss of sample 3 is NaN")
        return step(*batch)

    program.step = failing  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLossError):
        make_trainer(tmp_path / "run", program).fit(make_loader(), 2)
    resumed = make_trainer(tmp_path / "run")
    resumed.fit(make_loader(), 2, resume=True)
    assert digest(resumed) == digest(whole)


def test_a_run_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    make_trainer(tmp_path).fit(make_loader(), 1)
    with pytest.raises(CheckpointError, match=r"already holds checkpoints .*step-000000006.*resume=True"):
        make_trainer(tmp_path).fit(make_loader(), 1)


def test_resuming_after_the_last_batch_warns_of_nothing(tmp_path: Path) -> None:
    stopped_after(STEPS, tmp_path, 2, make_loader())
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from training_run import *\n"
        "make_trainer(Path(sys.argv[1])).fit(make_loader(), 2, validation=[make_validation()], resume=True)"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path), os.path.dirname(__file__)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_torn_and_late_lines_of_the_metrics_are_cut(tmp_path: Path) -> None:
    stopped_after(4, tmp_path, 1, make_loader())
    file = tmp_path / "metrics.jsonl"
    before = file.read_text().splitlines()
    with file.open("a") as stream:
        stream.write('{"kind": "step", "step": 5, "epoch": 1}\n{"kind": "epoch", "epoch": 1, "step": 6}\n{"kind": "st')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(tmp_path).fit(make_loader(), 1, resume=True)
    lines = file.read_text().splitlines()
    assert lines[:4] == before
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6]
