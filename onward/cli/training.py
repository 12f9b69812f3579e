"""How a run trains, whatever computes its gradients: epochs, batches, optimizer, schedule, augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..models.augment import AUGMENTATIONS
from ..passes.errors import OptionError, unknown_name
from ..runtime.training.schedules import SCHEDULES

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


@dataclass(frozen=True)
class Training:
    """How both methods of a comparison train. The defaults are what works for a small model on small images.

    Attributes:
        epochs: Passes over the training data.
        batch_size: Samples a step.
        lr: Learning rate, at the start.
        optimizer: A name in `OPTIMIZERS`; "sgd" has momentum 0.9.
        weight_decay: As the optimizer takes it; None is the optimizer's own default.
        schedule: A name in `SCHEDULES`.
        augment: A name in `onward.models.augment.AUGMENTATIONS`, or "none".

    Raises:
        UnknownNameError: An unknown optimizer, schedule or augmentation.
        OptionError: A number that cannot work.
    """

    epochs: int = 15
    batch_size: int = 32
    lr: float = 2e-3
    optimizer: str = "adam"
    weight_decay: float | None = None
    schedule: str = "constant"
    augment: str = "none"

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("augmentation", self.augment, ("none", *AUGMENTATIONS)),
        ):
            if name not in known:
                raise unknown_name(kind, name, known)
        if self.epochs < 1:
            raise OptionError(f"epochs={self.epochs}: a run needs at least one epoch.")
        if self.batch_size < 1:
            raise OptionError(f"batch_size={self.batch_size}: a batch needs at least one sample.")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise OptionError(f"lr={self.lr:g}: the learning rate must be positive and finite.")
        if self.weight_decay is not None and not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise OptionError(f"weight_decay={self.weight_decay:g}: it must be finite, and not negative.")

    def __str__(self) -> str:
        decay = [] if self.weight_decay is None else [f"weight decay {self.weight_decay:g}"]
        schedule = [] if self.schedule == "constant" else [f"{self.schedule} schedule"]
        augment = [] if self.augment == "none" else [f"augmented by {self.augment}"]
        named = [self.optimizer, f"learning rate {self.lr:g}", *decay, *schedule]
        return ", ".join(
            [*named, f"batches of {self.batch_size}", *augment, f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"]
        )


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters."""
    options: dict[str, Any] = {"momentum": 0.9} if training.optimizer == "sgd" else {}
    if training.weight_decay is not None:
        options["weight_decay"] = training.weight_decay
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return OPTIMIZERS[training.optimizer](parameters, lr=training.lr, **options)


def make_scheduler(optimizer: torch.optim.Optimizer, training: Training, num_batches: int) -> LambdaLR | None:
    """The scheduler, to be stepped after each of an epoch's `num_batches`; None where the learning rate is constant.

    It computes from the steps that are done and the steps of the whole run, so a run that is resumed for more epochs
    follows the longer schedule.
    """
    if training.schedule == "constant":
        return None
    steps, factor = max(training.epochs * num_batches, 1), SCHEDULES[training.schedule]
    return LambdaLR(optimizer, lambda done: factor(done / steps))
