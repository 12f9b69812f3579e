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
"""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset

from ..passes.errors import (
    BatchError,
    CheckpointError,
    DataError,
    NonFiniteGradientError,
    OptionError,
    unknown_name,
)
from . import checkpoint as checkpoints
from .metrics import JsonLines, ProgressBar, Sink, TensorBoard, require_tensorboard

Metric: TypeAlias = Callable[[Any, Any], Tensor]


class TrainableProgram(Protocol):
    """What the trainer needs of a compiled program."""

    model: nn.Module
    seed: int
    forwards: float
    """Perturbed forwards spent so far, in samples × copies."""
    clean_forwards: float
    """Unperturbed forwards spent so far, in samples."""

    def step(self, inputs: Any, target: Any, /) -> Tensor:
        """Add to ``.grad`` of every trainable parameter; return the mean loss, 0-d."""
        ...

    def per_sample_loss(self, output: Any, target: Any, /) -> Tensor:
        """The loss of each sample, (N,), or of the batch, 0-d."""
        ...

    def trust(self) -> dict[str, float]:
        """The share of its step that each parameter named takes; parameters not named take all of it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything beyond the model's own state, step count and forwards included."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Take over what `state_dict` gave."""
        ...


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch."""

    epoch: int
    """Its number, from 1."""
    step: int
    """Optimizer steps done in the run at its end."""
    train_loss: float
    """Mean loss over the samples of the epoch, each as it was when its batch was trained on."""
    validation: dict[str, float]
    """"loss" and the metrics after the epoch; empty without a validation loader."""
    lr: list[float]
    """Learning rate of each parameter group in the epoch's last step."""
    seconds: float
    """Wall time of the epoch, validation included, without work that a killed process lost."""
    forwards: float
    """Perturbed forwards the program has spent so far, in samples × copies."""
    clean_forwards: float
    """Unperturbed forwards it has spent so far, in samples."""


@dataclass
class History:
    """What `Trainer.fit` returns: a record of every finished epoch, those before a resume included."""

    records: list[EpochRecord] = field(default_factory=list)
    interrupted: bool = False
    """Whether the run was stopped before its last epoch ended (Ctrl-C, SIGTERM, `Trainer.stop`)."""

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[EpochRecord]:
        return iter(self.records)

    def __getitem__(self, index: int) -> EpochRecord:
        return self.records[index]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> History:
        """The inverse of `to_dict`."""
        return History([EpochRecord(**record) for record in value["records"]], bool(value["interrupted"]))


@dataclass
class _Position:
    """How far a run is, and the sums of the epoch in progress."""

    epoch: int = 0  # the epoch in progress, from 0: as many are finished
    batch: int = 0  # batches done in it
    step: int = 0  # optimizer steps done in the run
    loss_sum: float = 0.0  # over the samples of the epoch
    samples: int = 0
    seconds: float = 0.0  # spent in the epoch
    num_batches: int | None = None  # of an epoch, where the loader knows
    history: History = field(default_factory=History)

    def to_dict(self, loader: Iterable[Any]) -> dict[str, Any]:
        generators = [generator.get_state() for generator in _generators(loader)]
        return {**asdict(self), "generators": generators}

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> tuple[_Position, list[Tensor]]:
        """The position, and the states that the loader's generators had."""
        fields = {key: item for key, item in value.items() if key != "generators"}
        return _Position(**{**fields, "history": History.from_dict(value["history"])}), value["generators"]


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of right answers of each sample, (N,): class scores (N, C, …) against class numbers (N, …)."""
    if target.is_floating_point() or output.dim() < 2 or output.shape[:1] + output.shape[2:] != target.shape:
        raise OptionError(
            "the metric 'accuracy' compares class scores (N, C, …) with whole class numbers (N, …), not "
            f"{output.dtype} {list(output.shape)} with {target.dtype} {list(target.shape)}. "
            "Pass metrics=None or metrics={name: function}."
        )
    return (output.argmax(1) == target).double().reshape(target.shape[0], -1).mean(1)


METRICS: dict[str, Metric] = {"accuracy": accuracy}


class Trainer:
    """Trains a compiled program: epochs, validation, checkpoints, exact resume, metrics, Ctrl-C.

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
        _check_optimizer(program.model, optimizer)
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
        self._stop = False

    # --- the public face ----------------------------------------------------------------------------------------------

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
        self._stop = False
        with ExitStack() as stack:
            stack.enter_context(self._signals())
            position, generators = self._begin(loader, resume)
            sinks = self._open_sinks(stack, position)
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            bar = stack.enter_context(ProgressBar(self.progress, epochs, position.num_batches, position.step))
            history = position.history
            history.interrupted = False
            while position.epoch < epochs:
                if not self._run_epoch(loader, validation, position, generators, sinks, bar):
                    history.interrupted = True
                    break
                generators = None
        return history

    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """The mean "loss" over the samples of `loader`, and every metric, with the model in evaluation mode.

        Runs without gradients; afterwards each module's ``training`` flag is what it was. Raises `DataError` if the
        loader gives no batch.
        """
        result = self._evaluate(loader, stoppable=False)
        assert result is not None
        return result

    def restore(self, path: str | Path | None = None) -> int:
        """Load a checkpoint folder (default: the newest that verifies) into program and optimizer; return its step.

        Raises `CheckpointError` if there is none, it is damaged, or it is of another model or optimizer.
        """
        if path is None and self.directory is None:
            raise OptionError("pass the folder of a checkpoint, or give the trainer a directory")
        found = (
            checkpoints.latest(self.directory)
            if path is None and self.directory
            else checkpoints.read(Path(path or ""))
        )
        if found is None:
            raise CheckpointError(f"there is no checkpoint in {self.directory}")
        checkpoints.restore(found, self.program, self.optimizer, self.scheduler)
        return found.step

    def stop(self) -> None:
        """End a running `fit` as Ctrl-C does: after the step in progress, with a checkpoint. Safe from any thread."""
        self._stop = True

    # --- the run ------------------------------------------------------------------------------------------------------

    def _begin(self, loader: Iterable[Any], resume: bool) -> tuple[_Position, list[Tensor] | None]:
        """The position to start from (and the loader's generator states there), with a usable checkpoint on disk."""
        num_batches = _length(loader)
        start = _Position(num_batches=num_batches)
        if self.directory is None:
            return start, None
        checkpoints.clean(self.directory)
        if not resume and (existing := checkpoints.candidates(self.directory)):
            raise CheckpointError(
                f"{self.directory} already holds checkpoints (the newest is {existing[0].name}): "
                "pass resume=True to go on with that run, or use another directory"
            )
        found = checkpoints.latest(self.directory) if resume else None
        if found is None:
            self._write(loader, start)
            return start, None
        position, generators = _Position.from_dict(
            checkpoints.restore(found, self.program, self.optimizer, self.scheduler)
        )
        if position.batch and position.num_batches != num_batches:
            raise CheckpointError(
                f"{found.path} was written after batch {position.batch} of an epoch of {position.num_batches} batches; "
                f"this loader has {num_batches}: resume with the same data and batch size"
            )
        position.num_batches = num_batches
        checkpoints.set_aside(self.directory, found.step)
        return position, generators if position.batch else None

    def _run_epoch(
        self,
        loader: Iterable[Any],
        validation: Iterable[Any] | None,
        position: _Position,
        generators: list[Tensor] | None,
        sinks: list[Sink],
        bar: ProgressBar,
    ) -> bool:
        """Train one epoch from `position` on and move it to the next; False if stopped before its end."""
        started = time.perf_counter() - position.seconds
        rng = None if generators is None else checkpoints.capture_rng()
        batches = _start_epoch(loader, self.program.seed, position)
        if rng is not None and generators is not None:
            checkpoints.restore_rng(rng)
            for generator, state in zip(_generators(loader), generators, strict=True):
                generator.set_state(state)

        def interrupted() -> bool:
            position.seconds = time.perf_counter() - started
            bar.note("stopped")
            if self.directory is not None:
                self._write(loader, position, sinks)
            return False

        while True:
            if self._stop:
                return interrupted()
            try:
                batch = next(batches)
            except StopIteration:
                break
            except Exception:
                if self._stop:  # a worker process got the Ctrl-C too
                    return interrupted()
                raise
            self._train_on(batch, position, sinks, bar, validation is not None)
            if self.checkpoint_every is not None and position.step % self.checkpoint_every == 0:
                position.seconds = time.perf_counter() - started
                self._write(loader, position, sinks)
        if position.batch == 0:
            raise DataError(f"the loader gave no batch in epoch {position.epoch + 1}")

        self._check_weights()
        values: dict[str, float] = {}
        if validation is not None:
            rng = checkpoints.capture_rng()
            outcome = self._evaluate(validation, stoppable=True)
            if outcome is None:
                checkpoints.restore_rng(rng)  # the next process validates anew, from here
                return interrupted()
            values = outcome
            bar.validated(values)
        lr = self._learning_rates()
        train_loss = position.loss_sum / position.samples
        if self.scheduler is not None and self.scheduler_step == "epoch":
            with warnings.catch_warnings():
                # resumed after an epoch's last batch, torch misses the optimizer steps of the process before
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                if isinstance(self.scheduler, ReduceLROnPlateau):
                    self.scheduler.step(values.get("loss", train_loss))
                else:
                    self.scheduler.step()
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
        position.history.records.append(record)
        for sink in sinks:
            sink.log({"kind": "epoch", **asdict(record)})
        position.epoch, position.batch = position.epoch + 1, 0
        position.loss_sum, position.samples, position.seconds = 0.0, 0, 0.0
        if self.directory is not None:
            self._write(loader, position, sinks)
        return True

    def _step_with_trust(self) -> None:
        """The optimizer's step, each parameter's part of it scaled by the program's trust (DESIGN.md 12).

        Scaling the step itself, not the gradient, is a scaled learning rate for every optimizer, Adam included.
        """
        doubted = {name: trust for name, trust in self.program.trust().items() if trust < 1}
        before = {name: self.program.model.get_parameter(name).detach().clone() for name in doubted}
        self.optimizer.step()
        with torch.no_grad():
            for name, trust in doubted.items():
                weight = self.program.model.get_parameter(name)
                weight.copy_(torch.lerp(before[name], weight, trust))

    def _train_on(self, batch: Any, position: _Position, sinks: list[Sink], bar: ProgressBar, validated: bool) -> None:
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
        loss = float(self.program.step(inputs, target))
        self._check_gradients()
        self._step_with_trust()
        self.optimizer.zero_grad(set_to_none=True)
        lr = self._learning_rates()
        if self.scheduler is not None and self.scheduler_step == "batch":
            self.scheduler.step()
        count = _batch_size(inputs, target)
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

    def _evaluate(self, loader: Iterable[Any], *, stoppable: bool) -> dict[str, float] | None:
        """As `evaluate`; None if `stoppable` and stopped."""
        model = self.program.model
        modes = [(module, module.training) for module in model.modules()]
        sums: dict[str, float] = dict.fromkeys(("loss", *self.metrics), 0.0)
        samples = 0
        try:
            model.eval()
            with torch.no_grad():
                for batch in loader:
                    if stoppable and self._stop:
                        return None
                    inputs, target = self._split(batch)
                    output = _forward(model, inputs)
                    count = _batch_size(inputs, target)
                    sums["loss"] += float(self.program.per_sample_loss(output, target).double().mean()) * count
                    for name, metric in self.metrics.items():
                        sums[name] += float(torch.as_tensor(metric(output, target)).double().mean()) * count
                    samples += count
        finally:
            for module, mode in modes:
                module.training = mode
        if samples == 0:
            raise DataError("the loader to evaluate on gave no batch")
        return {name: value / samples for name, value in sums.items()}

    # --- parts --------------------------------------------------------------------------------------------------------

    def _split(self, batch: Any) -> tuple[Any, Any]:
        """(inputs, target) on the model's device; the inputs as a tuple where the batch has several."""
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise BatchError(
                f"a batch must be a tuple (inputs…, target), not a {type(batch).__name__}"
                + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
                + "; a collate_fn of the loader can bring it into that form"
            )
        device = next((parameter.device for parameter in self.program.model.parameters()), torch.device("cpu"))
        *inputs, target = (_to_device(item, device) for item in batch)
        return inputs[0] if len(inputs) == 1 else tuple(inputs), target

    def _learning_rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups if "lr" in group]

    def _check_gradients(self) -> None:
        named = [(name, p.grad) for name, p in self.program.model.named_parameters() if p.grad is not None]
        bad = _not_finite(named)
        if bad:
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteGradientError(
                f"the gradient of {', '.join(bad)} is NaN or infinite. The weights are as before this step. "
                "Try a smaller learning rate or another sigma."
            )

    def _check_weights(self) -> None:
        bad = _not_finite([(name, parameter.detach()) for name, parameter in self.program.model.named_parameters()])
        if bad:
            raise NonFiniteGradientError(
                f"{', '.join(bad)} became NaN or infinite by the optimizer's step. "
                "The last checkpoint is from before. Try a smaller learning rate."
            )

    def _write(self, loader: Iterable[Any], position: _Position, sinks: list[Sink] | None = None) -> None:
        assert self.directory is not None
        self._check_weights()
        for sink in sinks or []:
            sink.flush()  # a checkpoint never knows steps that the metrics lack
        state = checkpoints.capture(self.program, self.optimizer, self.scheduler, position.to_dict(loader))
        checkpoints.write(self.directory, position.step, state)
        checkpoints.prune(self.directory, self.keep)

    def _open_sinks(self, stack: ExitStack, position: _Position) -> list[Sink]:
        sinks: list[Sink] = []
        if self.directory is not None:
            sinks.append(JsonLines(self.directory / "metrics.jsonl", step=position.step, epoch=position.epoch))
            stack.callback(sinks[-1].close)
            if self.tensorboard:
                sinks.append(TensorBoard(self.directory / "tensorboard", step=position.step))
                stack.callback(sinks[-1].close)
        return sinks

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a stop, the second one raises; the handlers before come back afterwards."""
        before: dict[signal.Signals, Any] = {}

        def handle(number: int, frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                current = signal.getsignal(number)
                if current not in (None, signal.SIG_IGN):  # set by C code: could not be put back; ignored: stays so
                    before[number] = current
                    signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = {id(parameter) for parameter in model.parameters()}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise OptionError(f"the optimizer does not hold the trainable parameters {', '.join(missing)} of the model")
    foreign = [
        f"number {index} {list(p.shape)} of group {number}"
        for number, group in enumerate(optimizer.param_groups)
        for index, p in enumerate(group["params"])
        if id(p) not in own
    ]
    if foreign:
        raise OptionError(f"the optimizer holds parameters that are not the model's: {', '.join(foreign)}")


def _not_finite(named: list[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold a NaN or an infinity."""
    named = [(name, t.coalesce().values() if t.is_sparse else t) for name, t in named]
    tensors = [tensor for _, tensor in named if tensor.numel()]
    if not tensors or bool(torch.nn.utils.get_total_norm(tensors, norm_type=math.inf).isfinite()):
        return []  # the maximum norm cannot overflow, and keeps a NaN
    return [name for name, tensor in named if not bool(tensor.isfinite().all())]


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if type(value) in (list, tuple):
        return type(value)(_to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    return value


def _forward(model: nn.Module, inputs: Any) -> Any:
    """The model's output for inputs as `Program.step` takes them: a tensor, positional or keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, list | tuple) else model(inputs)


def _batch_size(*values: Any) -> int:
    """Length of the first dimension of the first tensor in `values` that has one."""
    pending = list(values)
    while pending:
        value = pending.pop(0)
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
        if isinstance(value, list | tuple):
            pending[:0] = value
        elif isinstance(value, dict):
            pending[:0] = value.values()
    raise BatchError("the batch holds no tensor with a first dimension to count samples by")


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader over an iterable data set
        return None


def _samplers(loader: Iterable[Any]) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def _generators(loader: Iterable[Any]) -> list[torch.Generator]:
    """The generators of the loader itself and of its samplers, each once."""
    found = [getattr(source, "generator", None) for source in (loader, *_samplers(loader))]
    return list({id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values())


def _start_epoch(loader: Iterable[Any], seed: int, position: _Position) -> Iterator[Any]:
    """Seed the data order of the epoch, start the loader and skip the batches that are done."""
    digest = hashlib.sha256(f"onward data order {seed} {position.epoch}".encode()).digest()
    epoch_seed = int.from_bytes(digest[:7], "little")
    generators = _generators(loader)
    for generator in generators:
        generator.manual_seed(epoch_seed)
    if not generators:
        torch.manual_seed(epoch_seed)
    for sampler in _samplers(loader):
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(position.epoch)
    batches = iter(loader)
    skip: Callable[[], object] = batches.__next__
    if isinstance(loader, DataLoader) and loader.num_workers == 0 and not isinstance(loader.dataset, IterableDataset):
        skip = getattr(batches, "_next_index", skip)  # draws the next batch's indices, loads nothing
    for done in range(position.batch):
        try:
            skip()
        except StopIteration:
            raise DataError(
                f"the loader gave only {done} batches in epoch {position.epoch + 1}; "
                f"{position.batch} were done before the checkpoint"
            ) from None
    return batches
