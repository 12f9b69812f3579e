"""The training loop for those who want one: `Trainer(program, optimizer, …).fit(loader, epochs, …)`.

**Exact resume.** A run that is killed at any moment and continued with ``fit(…, resume=True)`` ends with the same bits
as one that never stopped, because everything that decides a step is either a function of (seed, step) or in the
checkpoint:

- noise: the program's, a function of (seed, step);
- the order of the data: at the start of every epoch the loader's generator (``loader.generator`` or its sampler's) is
  seeded from (program.seed, epoch), and a sampler with ``set_epoch`` is told the epoch. A loader without a generator
  of its own shuffles from torch's global generator, so then that one is seeded;
- augmentation and the like: the states of the global generators of torch, NumPy and Python are in the checkpoint. In
  loader workers they follow from the epoch's seed, except with ``persistent_workers=True``, whose generators run on
  from one epoch to the next: keep that off where a data set draws random numbers;
- weights, buffers, optimizer, scheduler and the program's own state: in the checkpoint.

Batches that were done before the checkpoint are skipped, without loading them where the loader runs in this process.

**Ctrl-C** (or SIGTERM) once: the step in progress is finished, a checkpoint is written, and `fit` *returns* its history
with ``interrupted=True``, as Keras and Lightning users expect of an early stop; no exception is raised. A second one
raises `KeyboardInterrupt` at once. From other threads, call `Trainer.stop`.

**Pipeline.** With several workers or streams the optimizer's updates after a step become tasks of the next one, whose
forward *chases* them: a stage waits for the updates of the weights that it reads, and for no other. No weight is stale,
the bits are those of ``optimizer.step()``, and a step that fails leaves weights and optimizer as after the step before.
All updates are done before the trainer tests, writes a checkpoint, steps a scheduler after an epoch, returns or raises.
What reads weights on its own between two steps, a data set or a loader for one, sees them before the last update. One
worker, an optimizer that may couple parameters, step hooks (where gradients are clipped), or a way that measures slower
is a barrier: the whole step at once, as in a loop by hand. `Trainer.pipeline` says which, and why.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ...passes.errors import CheckpointError, DataError, OptionError, unknown_name
from . import checkpoint as checkpoints
from .batches import batch_size, split_batch
from .data_order import count_batches, generators_of, start_epoch
from .evaluation import METRICS, Metric, accuracy, evaluate
from .history import EpochRecord, History, Position
from .metrics import JsonLines, ProgressBar, Sink, TensorBoard, require_tensorboard
from .pipeline import Pipeline
from .random_state import capture_rng, restore_rng
from .run_state import capture, restore
from .stop_request import StopRequest
from .trainable import TrainableProgram
from .update import check_optimizer, check_weights


class _StoppedError(Exception):
    """A stop was asked for during validation."""


class Trainer:
    """Trains a compiled program: epochs, validation, checkpoints, exact resume, metrics, Ctrl-C, pipelined steps.

    Args:
        program: what ``onward.compile`` returned. Its model is trained in place; the trainer does not touch the
            training mode of the modules except during `evaluate`, which restores it.
        optimizer: any torch optimizer over exactly the model's trainable parameters (frozen ones may be in it).
        scheduler: a torch learning-rate scheduler of that optimizer. `ReduceLROnPlateau` gets the validation loss, or
            the training loss without validation.
        scheduler_step: "epoch" or "batch": when it steps.
        directory: where checkpoints, ``metrics.jsonl`` and TensorBoard files go. None: nothing is written.
        checkpoint_every: optimizer steps between checkpoints. One is written in any case at the start, at the end of
            each epoch, and when interrupted.
        keep: how many checkpoints stay on the disk; None for all.
        metrics: "accuracy", or name → function of (output, target) that returns one number a sample (N,) or the
            batch's mean (0-d); or None. They are averaged over the samples of a loader.
        tensorboard: also write event files (needs ``onward[tensorboard]``) to ``directory/tensorboard``.
        progress: show a progress bar on standard error, if that is a terminal.

    Raises:
        OptionError: an option that cannot work, or an optimizer that lacks parameters or holds foreign ones.
    """

    def __init__(
        self,
        program: TrainableProgram,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: LRScheduler | None = None,
        scheduler_step: Literal["epoch", "batch"] = "epoch",
        directory: str | Path | None = None,
        checkpoint_every: int | None = None,
        keep: int | None = 3,
        metrics: str | Mapping[str, Metric] | None = "accuracy",
        tensorboard: bool = False,
        progress: bool = True,
    ) -> None:
        if scheduler_step not in ("epoch", "batch"):
            raise unknown_name("scheduler_step", scheduler_step, ("epoch", "batch"))
        if scheduler is not None and getattr(scheduler, "optimizer", optimizer) is not optimizer:
            raise OptionError("the scheduler belongs to another optimizer")
        if isinstance(scheduler, ReduceLROnPlateau) and scheduler_step == "batch":
            raise OptionError("ReduceLROnPlateau follows a loss over an epoch: use scheduler_step='epoch'")
        for name, value in (("checkpoint_every", checkpoint_every), ("keep", keep)):
            if value is not None and (type(value) is not int or value < 1):
                raise OptionError(f"{name} must be a whole number of at least 1, or None, not {value!r}")
        if directory is None and (checkpoint_every is not None or tensorboard):
            raise OptionError("checkpoint_every and tensorboard need a directory")
        if isinstance(metrics, str) and metrics not in METRICS:
            raise unknown_name("metric", metrics, METRICS)
        if tensorboard:
            require_tensorboard()
        check_optimizer(program.model, optimizer)
        self.program = program
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scheduler_step = scheduler_step
        self.directory = None if directory is None else Path(directory)
        self.checkpoint_every = checkpoint_every
        self.keep = keep
        self.metrics = {metrics: METRICS[metrics]} if isinstance(metrics, str) else dict(metrics or {})
        self.tensorboard = tensorboard
        self.progress = progress
        self._stop = StopRequest()
        self._pipeline = Pipeline(program, optimizer)

    # --- the public face ----------------------------------------------------------------------------------------------

    @property
    def pipeline(self) -> str:
        """How steps follow each other: "chase", or "barrier" and why all updates of the weights come before the next
        step (see the module's docstring); of both where steps with and without a perturbed run differ. The first steps
        measure which of them is faster."""
        return self._pipeline.describe()

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int,
        *,
        validation: Iterable[Any] | None = None,
        resume: bool = False,
    ) -> History:
        """Train until `epochs` epochs are done, counting those before a resume.

        Args:
            loader: batches ``(inputs…, target)``, the samples first in every tensor; iterated once an epoch.
            epochs: how many epochs the whole run has.
            validation: batches for `evaluate` after every epoch.
            resume: go on from the newest checkpoint in the directory that verifies (a damaged one is passed over with
                a warning); start from the beginning where there is none yet. ``metrics.jsonl`` is cut to that point.

        Returns:
            the records of all epochs; ``interrupted=True`` if the run was stopped early (see the module's docstring).

        Raises:
            CheckpointError: the directory cannot be written (before any training), holds another run's checkpoints,
                or only damaged ones; or there are checkpoints and `resume` is False.
            NonFiniteGradientError: a gradient is NaN or infinite (the weights are as before the step), or a weight is
                (at the end of an epoch and before a checkpoint: what is on the disk is from before).
            DataError: the loader gives no batch, or fewer than before the resume.
            OptionError: an option that cannot work.
            Whatever the program's step, the loss or the loader raises: the last checkpoint stays usable.
        """
        if type(epochs) is not int or epochs < 1:
            raise OptionError(f"epochs must be a whole number of at least 1, not {epochs!r}")
        for name, batches in (("loader", loader), ("validation", validation)):
            if isinstance(batches, Iterator):
                raise OptionError(f"the {name} can be iterated only once; pass a DataLoader or a list of batches")
        if resume and self.directory is None:
            raise OptionError("resume=True needs the directory of the run")
        self._stop.made = False
        with ExitStack() as stack:
            stack.enter_context(self._stop.on_signals())
            stack.callback(self._pipeline.finish)
            position = self._begin(loader, resume)
            sinks = self._open_sinks(stack, position)
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            bar = stack.enter_context(ProgressBar(self.progress, epochs, position.num_batches, position.step))
            history = position.history
            history.interrupted = False
            while position.epoch < epochs and not history.interrupted:
                history.interrupted = not self._run_epoch(loader, validation, position, sinks, bar)
        return history

    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """The mean "loss" over the samples of `loader`, and every metric, with the model in evaluation mode.

        Runs without gradients; afterwards each module's ``training`` flag is what it was. Raises `DataError` if the
        loader gives no batch.
        """
        return self._evaluate(loader, stoppable=False)

    def restore(self, path: str | Path | None = None) -> int:
        """Load a checkpoint folder (default: the newest that verifies) into program and optimizer; return its step.

        Raises `CheckpointError` if there is none, it is damaged, or it is of another model or optimizer.
        """
        if path is not None:
            found = checkpoints.read(Path(path))
        elif self.directory is None:
            raise OptionError("pass the folder of a checkpoint, or give the trainer a directory")
        elif (newest := checkpoints.latest(self.directory)) is not None:
            found = newest
        else:
            raise CheckpointError(f"there is no checkpoint in {self.directory}")
        self._pipeline.finish()
        restore(found, self.program, self.optimizer, self.scheduler)
        return found.step

    def stop(self) -> None:
        """End a running `fit` as Ctrl-C does: after the step in progress, with a checkpoint. Safe from any thread."""
        self._stop.made = True

    # --- the run ------------------------------------------------------------------------------------------------------

    def _begin(self, loader: Iterable[Any], resume: bool) -> Position:
        """The position to start from, with a usable checkpoint on disk."""
        num_batches = count_batches(loader)
        start = Position(num_batches=num_batches)
        if self.directory is None:
            return start
        checkpoints.clean(self.directory)
        if not resume and (existing := checkpoints.candidates(self.directory)):
            raise CheckpointError(
                f"{self.directory} already holds checkpoints (the newest is {existing[0].name}): "
                "pass resume=True to go on with that run, or use another directory"
            )
        found = checkpoints.latest(self.directory) if resume else None
        if found is None:
            self._write(loader, start)
            return start
        position = Position.from_dict(restore(found, self.program, self.optimizer, self.scheduler))
        if position.batch and position.num_batches != num_batches:
            raise CheckpointError(
                f"{found.path} was written after batch {position.batch} of an epoch of {position.num_batches} batches; "
                f"this loader has {num_batches}: resume with the same data and batch size"
            )
        position.num_batches = num_batches
        checkpoints.set_aside(self.directory, found.step)
        return position

    def _run_epoch(
        self,
        loader: Iterable[Any],
        validation: Iterable[Any] | None,
        position: Position,
        sinks: list[Sink],
        bar: ProgressBar,
    ) -> bool:
        """Train one epoch from `position` on and move it to the next; False if stopped before its end."""
        started = time.perf_counter() - position.seconds

        def interrupted() -> bool:
            position.seconds = time.perf_counter() - started
            bar.note("stopped")
            self._write(loader, position, sinks)
            return False

        batches = start_epoch(loader, self.program.seed, position)
        while True:
            if self._stop.made:
                return interrupted()
            try:
                batch = next(batches)
            except StopIteration:
                break
            except Exception:
                if self._stop.made:  # a worker process got the Ctrl-C too
                    return interrupted()
                raise
            self._train_on(batch, position, sinks, bar, validation is not None)
            if self.checkpoint_every is not None and position.step % self.checkpoint_every == 0:
                position.seconds = time.perf_counter() - started
                self._write(loader, position, sinks)
        if position.batch == 0:
            raise DataError(f"the loader gave no batch in epoch {position.epoch + 1}")

        self._pipeline.finish()
        check_weights(self.program.model)
        values: dict[str, float] = {}
        if validation is not None:
            rng = capture_rng()
            try:
                values = self._evaluate(validation, stoppable=True)
            except _StoppedError:
                restore_rng(rng)  # the next process validates anew, from here
                return interrupted()
            bar.validated(values)
        lr = self._learning_rates()
        train_loss = position.loss_sum / position.samples
        if self.scheduler_step == "epoch":
            self._schedule(values.get("loss", train_loss))
        record = EpochRecord(
            epoch=position.epoch + 1,
            step=position.step,
            train_loss=train_loss,
            validation=values,
            lr=lr,
            seconds=time.perf_counter() - started,
            forwards=self.program.forwards,
            clean_forwards=self.program.clean_forwards,
        )
        for sink in sinks:
            sink.log({"kind": "epoch", **asdict(record)})
        position.finish_epoch(record)
        self._write(loader, position, sinks)
        return True

    def _train_on(self, batch: Any, position: Position, sinks: list[Sink], bar: ProgressBar, validated: bool) -> None:
        inputs, target = self._split(batch)
        if (
            validated
            and accuracy in self.metrics.values()
            and isinstance(target, Tensor)
            and target.is_floating_point()
        ):
            raise OptionError(
                f"the metric 'accuracy' needs whole class numbers as target, not {target.dtype}: "
                "pass metrics=None or metrics={name: function}"
            )
        loss = float(self._pipeline.step(inputs, target))
        self._pipeline.update()
        lr = self._learning_rates()
        if self.scheduler is not None and self.scheduler_step == "batch":
            self.scheduler.step()
        count = batch_size(inputs, target)
        position.loss_sum += loss * count
        position.samples += count
        position.batch += 1
        position.step += 1
        record = {
            "kind": "step",
            "step": position.step,
            "epoch": position.epoch + 1,
            "loss": loss,
            "lr": lr,
            "forwards": self.program.forwards,
            "clean_forwards": self.program.clean_forwards,
        }
        for sink in sinks:
            sink.log(record)
        bar.step(position.step, position.epoch + 1, position.loss_sum / position.samples, self.program.forwards)

    def _schedule(self, loss: float) -> None:
        """The scheduler's step after an epoch that ended with `loss`."""
        with warnings.catch_warnings():
            # resumed after an epoch's last batch, torch misses the optimizer steps of the process before
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(loss)
            elif self.scheduler is not None:
                self.scheduler.step()

    # --- parts --------------------------------------------------------------------------------------------------------

    def _evaluate(self, loader: Iterable[Any], *, stoppable: bool) -> dict[str, float]:
        """As `evaluate`; raises `_StoppedError` if `stoppable` and stopped."""

        self._pipeline.finish()

        def batches() -> Iterator[tuple[Any, Any]]:
            for batch in loader:
                if stoppable and self._stop.made:
                    raise _StoppedError
                yield self._split(batch)

        return evaluate(self.program.model, self.program.per_sample_loss, self.metrics, batches())

    def _split(self, batch: Any) -> tuple[Any, Any]:
        """(inputs, target) on the model's device."""
        device = next((parameter.device for parameter in self.program.model.parameters()), torch.device("cpu"))
        return split_batch(batch, device)

    def _learning_rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups if "lr" in group]

    def _write(self, loader: Iterable[Any], position: Position, sinks: Sequence[Sink] = ()) -> None:
        """Write a checkpoint, if the run has a directory."""
        if self.directory is None:
            return
        self._pipeline.finish()
        check_weights(self.program.model)
        for sink in sinks:
            sink.flush()  # a checkpoint never knows steps that the metrics lack
        position.generators = [generator.get_state() for generator in generators_of(loader)]
        state = capture(self.program, self.optimizer, self.scheduler, position.to_dict())
        checkpoints.write(self.directory, position.step, state)
        checkpoints.prune(self.directory, self.keep)

    def _open_sinks(self, stack: ExitStack, position: Position) -> list[Sink]:
        sinks: list[Sink] = []
        if self.directory is not None:
            sinks.append(JsonLines(self.directory / "metrics.jsonl", step=position.step, epoch=position.epoch))
            stack.callback(sinks[-1].close)
            if self.tensorboard:
                sinks.append(TensorBoard(self.directory / "tensorboard", step=position.step))
                stack.callback(sinks[-1].close)
        return sinks
