"""The training loop on ONNX Runtime: epochs, evaluation, checkpoints, exact resume, Ctrl-C."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...compiler.files import replacing
from ...passes.errors import BatchError, CheckpointError, NonFiniteLossError, OptionError
from ..training.schedules import SCHEDULES
from ..training.stop_request import StopRequest
from .data import Judge, Score, Split
from .folder import Folder, loaded, read_arrays
from .fused import FusedSteps, StepInput
from .pipeline import TaskSteps
from .session import Device, Value

EXECUTORS = ("fused", "tasks")


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        epochs, batch_size, lr, schedule: as in the export, if not given.
        seed: of the order of the samples; that of the noise is the export's.
        executor: "fused", one model a step, or "tasks", one a task, on `workers` threads in pipeline order.
        threads: of one call of a model; 0 for all cores, or for one where several workers share them.
        checkpoint_every: steps from one checkpoint to the next, beside one at the end of each epoch; 0 for none.

    Raises:
        OptionError: a value that cannot work.
    """

    epochs: int
    batch_size: int
    lr: float
    schedule: str = "constant"
    seed: int = 0
    executor: str = "fused"
    workers: int = 1
    threads: int = 0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("workers", 1), ("threads", 0), ("checkpoint_every", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise OptionError(f"{name}={value!r}: it has to be a whole number of at least {least}.")
        if type(self.seed) is not int:
            raise OptionError(f"seed={self.seed!r}: it has to be a whole number.")
        if self.workers > 1 and self.executor != "tasks":
            raise OptionError(f"workers={self.workers}: tasks run side by side with executor='tasks' only.")
        if not (isinstance(self.lr, int | float) and self.lr > 0 and math.isfinite(self.lr)):
            raise OptionError(f"lr={self.lr!r}: the learning rate must be positive and finite.")
        for name, known in (("schedule", tuple(SCHEDULES)), ("executor", EXECUTORS)):
            if getattr(self, name) not in known:
                raise OptionError(f"{name}={getattr(self, name)!r}: known are {', '.join(known)}.")


@dataclass(frozen=True)
class Record:
    """An epoch: its number, from 1, the steps so far, the mean loss of its samples as they were trained on, the score
    on the test samples (NaN without), seconds."""

    epoch: int
    step: int
    train_loss: float
    loss: float
    accuracy: float
    seconds: float


class Trainer:
    """Trains an exported folder. One thread calls it; `stop` may come from any.

    Args:
        folder: as `read_folder` returned it.
        settings: how.
        device: where, as `Device.find` returned it.

    Raises:
        FolderError: a file of the folder is missing, damaged, or does not fit the manifest.

    Attributes:
        state: weights, buffers, optimizer and feedback, on the device.
        step: steps taken, those before the export included; it keys the noise.
        records: the epochs so far.
    """

    def __init__(self, folder: Folder, settings: Settings, device: Device) -> None:
        self.folder, self.settings, self.device = folder, settings, device
        workers, threads = settings.workers, settings.threads
        self.steps: FusedSteps | TaskSteps = (
            FusedSteps(folder, device, threads)
            if settings.executor == "fused"
            else TaskSteps(folder, device, workers, threads)
        )
        self.judge = Judge(folder, device, threads)
        arrays = read_arrays(folder.file("state.npz"), folder.state)
        self.state: dict[str, Value] = {key: device.value(array) for key, array in arrays.items()}
        self.step = folder.step
        self.records: list[Record] = []
        self._done = 0
        self._loss_sum = 0.0
        self._samples: int | None = None
        self._stop = StopRequest()

    def fit(
        self,
        train: Split,
        test: Split | None = None,
        *,
        checkpoint: Path | None = None,
        report: Callable[[Record], None] = lambda record: None,
    ) -> bool:
        """Train up to the settings' epochs, from where the state is; False if it was stopped before.

        Ctrl-C, SIGTERM and `stop` end it behind the step in progress, with a checkpoint; a second Ctrl-C raises
        KeyboardInterrupt at once. Another call goes on.

        Args:
            train, test: samples; without `test` nothing is evaluated.
            checkpoint: a file that holds the run's state, written whole or not at all.
            report: told of every epoch.

        Raises:
            BatchError: a batch would have fewer samples than the model takes.
            NonFiniteLossError: a loss, a gradient, a weight or a buffer is NaN or infinite. The state is that before.
            CheckpointError: it goes on within an epoch, and has other samples than before.
            FolderError: a model fails on a batch. The state is that before the step.
            OutputError: the checkpoint cannot be written. What was there stays.
        """
        settings = self.settings
        batches = 1 if train.whole else -(-train.samples // settings.batch_size)
        if self._done and self._samples != train.samples:
            raise CheckpointError(
                f"{self._done} steps of this epoch were made on {self._samples} samples, and now there are "
                f"{train.samples}: go on with the same data."
            )
        self._check_batches(train)
        self._samples, self._stop.made = train.samples, False
        with self._stop.on_signals():
            while len(self.records) < settings.epochs and not self._stop.made:
                started, epoch = time.perf_counter(), len(self.records)
                self._steps(train, batches, checkpoint)
                if self._done < batches:
                    return False
                score = self.judge(self.state, test, settings.batch_size) if test else Score(math.nan, math.nan)
                seconds = time.perf_counter() - started
                self.records.append(
                    Record(epoch + 1, self.step, self._loss_sum / train.samples, score.loss, score.accuracy, seconds)
                )
                self._done, self._loss_sum = 0, 0.0
                if checkpoint is not None:
                    self.save(checkpoint)
                report(self.records[-1])
        return len(self.records) >= settings.epochs

    def _check_batches(self, train: Split) -> None:
        """Raise BatchError if a batch of the epoch has fewer samples than a step takes."""
        least, size = self.folder.least, self.settings.batch_size
        last = train.samples % size or size
        if not train.whole and min(size, last) < least:
            raise BatchError(
                f"{train.samples} samples in batches of {size} leave a batch of {min(size, last)}, which has no "
                f"statistics for {self.folder.model} to normalise by (it takes {least} samples). Choose another batch "
                "size."
            )

    def stop(self) -> None:
        """End a running `fit` behind the step in progress. Safe from any thread."""
        self._stop.made = True

    def _steps(self, train: Split, batches: int, checkpoint: Path | None) -> None:
        """What is left of an epoch, unless it is stopped."""
        every, size = self.settings.checkpoint_every, self.settings.batch_size
        given = self._inputs(train, len(self.records), batches)
        with closing(self.steps.run(self.state, given, self.folder.seed)) as results:
            for result in results:
                if not result.finite:
                    raise NonFiniteLossError(
                        f"step {self.step}: a loss, a gradient, or what comes of it is NaN or infinite (the loss is "
                        f"{result.loss}). "
                        "Weights and checkpoint are as before the step. Check the data, or lower the learning rate."
                    )
                self.state = result.state
                self._loss_sum += result.loss * min(size, train.samples - self._done * size)
                self.step, self._done = self.step + 1, self._done + 1
                if checkpoint is not None and (self._stop.made or (every and self._done % every == 0)):
                    self.save(checkpoint)

    def _inputs(self, train: Split, epoch: int, batches: int) -> Iterator[StepInput]:
        """What is left of an epoch: the order of its samples is a function of seed and epoch."""
        settings = self.settings
        key = np.array([settings.seed % 2**64, epoch], np.uint64)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(train.samples)
        done, first = self._done, self.step - self._done
        for place, batch in enumerate(train.batches(settings.batch_size, order)):
            if self._stop.made:
                return
            if place >= done:
                share = (epoch * batches + place) / (settings.epochs * batches)
                yield StepInput(batch, first + place, settings.lr * SCHEDULES[settings.schedule](share))

    def save(self, path: Path) -> None:
        """Write all that a run needs to go on, in one rename. Raises OutputError."""
        progress = {
            "model": self.folder.model,
            "noise_seed": self.folder.seed,
            "program": self.folder.digest(),
            "step": self.step,
            "done": self._done,
            "samples": self._samples,
            "loss_sum": self._loss_sum,
            "records": [asdict(record) for record in self.records],
            "settings": _fixed(self.settings),
        }
        arrays: dict[str, Any] = {key: value.numpy() for key, value in self.state.items()}
        arrays["progress"] = np.array(json.dumps(progress))
        with replacing(path) as file:
            np.savez(file, **arrays)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            CheckpointError: the file is damaged, of another model, or of a run with other settings.
        """
        try:
            arrays = loaded(path)
            progress = json.loads(str(arrays.pop("progress")))
            records = [Record(**record) for record in progress["records"]]
            settings, step, done = dict(progress["settings"]), int(progress["step"]), int(progress["done"])
            loss_sum, samples = float(progress["loss_sum"]), progress["samples"]
            model, noise_seed, digest = progress["model"], progress["noise_seed"], progress["program"]
        except Exception as error:  # whatever a damaged file makes NumPy, zipfile or json raise
            raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        if misfit := self._misfit(model, noise_seed, digest, arrays):
            raise CheckpointError(f"{path} is of another model: {misfit}.")
        changed = {key: value for key, value in _fixed(self.settings).items() if settings.get(key) != value}
        differing = [f"{key}={settings.get(key)!r}, now {value!r}" for key, value in changed.items()]
        if differing:
            raise CheckpointError(f"{path} is of a run with other settings: {'; '.join(differing)}.")
        self.state = {key: self.device.value(array) for key, array in arrays.items()}
        self.step, self._done, self._loss_sum, self.records = step, done, loss_sum, records
        self._samples = samples

    def _misfit(self, model: Any, noise_seed: Any, digest: Any, arrays: dict[str, Any]) -> str:
        """Why a checkpoint is not of this folder; empty if it is."""
        folder = self.folder
        if (model, noise_seed) != (folder.model, folder.seed):
            return f"{model!r} exported with seed {noise_seed}, and this is {folder.model!r} with seed {folder.seed}"
        for form in folder.state:
            why = form.misfit(arrays[form.key]) if form.key in arrays else "is missing"
            if why:
                return f"{form.key} {why}"
        return "" if digest == folder.digest() else "it was compiled with other settings, or for another optimizer"


def _fixed(settings: Settings) -> dict[str, Any]:
    """The settings that a run cannot go on with others of."""
    kept = ["batch_size", "lr", "schedule", "seed"]
    if settings.schedule != "constant":
        kept.append("epochs")  # a part of the schedule
    return {key: value for key, value in asdict(settings).items() if key in kept}
