"""How far a run is and what came of it: `History`, a record an epoch, and the `Position` that checkpoints hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


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
class Position:
    """How far a run is, and the sums of the epoch in progress."""

    epoch: int = 0
    """The epoch in progress, from 0: as many are finished."""
    batch: int = 0
    """Batches done in it."""
    step: int = 0
    """Optimizer steps done in the run."""
    loss_sum: float = 0.0
    """Over the samples of the epoch."""
    samples: int = 0
    seconds: float = 0.0
    """Spent in the epoch, up to the last checkpoint."""
    num_batches: int | None = None
    """Of an epoch, where the loader knows."""
    history: History = field(default_factory=History)
    generators: list[Tensor] = field(default_factory=list)
    """States of the loader's generators at the last checkpoint."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values and tensors for a checkpoint."""
        return asdict(self)

    def finish_epoch(self, record: EpochRecord) -> None:
        """Move on to the first batch of the next epoch."""
        self.history.records.append(record)
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss_sum, self.samples, self.seconds = 0.0, 0, 0.0

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Position:
        """The inverse of `to_dict`."""
        return Position(**{**value, "history": History.from_dict(value["history"])})
