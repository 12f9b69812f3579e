"""The optimizer's update of the weights, and what must hold before and after: its parameters, finite numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...passes.errors import NonFiniteGradientError, OptionError
from ..finite import all_finite
from .trainable import TrainableProgram


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise `OptionError` unless the optimizer holds every trainable parameter of the model, and no foreign one."""
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


def update(program: TrainableProgram, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's step, each parameter's part of it scaled by the program's trust (method.md 12); clears ``.grad``.

    Scaling the step itself, not the gradient, is a scaled learning rate for every optimizer, Adam included. Raises
    `NonFiniteGradientError`, with the weights as before and all gradients cleared, if a gradient of the optimizer's
    parameters holds a NaN or an infinity.
    """
    model = program.model
    check_gradients(model, optimizer)
    doubted = [(model.get_parameter(name), trust) for name, trust in program.trust().items() if trust < 1]
    scaled(optimizer.step, doubted)
    optimizer.zero_grad(set_to_none=True)


def scaled(step: Callable[[], object], doubted: Sequence[tuple[Tensor, float]]) -> None:
    """Take an optimizer's step, of which the parameters in `doubted` keep their shares."""
    before = [weight.detach().clone() for weight, _ in doubted]
    step()
    with torch.no_grad():
        for (weight, trust), old in zip(doubted, before, strict=True):
            weight.copy_(torch.lerp(old, weight, trust))


def check_weights(model: nn.Module) -> None:
    """Raise `NonFiniteGradientError` if a parameter holds a NaN or an infinity."""
    bad = _not_finite(list(model.named_parameters()))
    if bad:
        raise NonFiniteGradientError(
            f"{', '.join(bad)} became NaN or infinite by the optimizer's step. "
            "The last checkpoint is from before. Try a smaller learning rate."
        )


def check_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise `NonFiniteGradientError`, all gradients cleared, unless those of the optimizer's parameters are finite."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if all_finite(*gradients):
        return
    bad = _not_finite([(name, p.grad) for name, p in model.named_parameters() if p.grad is not None])
    optimizer.zero_grad(set_to_none=True)
    raise NonFiniteGradientError(
        f"the gradient of {', '.join(bad)} is NaN or infinite. The weights are as before this step. "
        "Try a smaller learning rate or another sigma."
    )


def _not_finite(named: list[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold a NaN or an infinity."""
    return [name for name, tensor in named if not all_finite(tensor)]
