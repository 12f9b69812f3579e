"""A model as layers in the order they run, cut so that no derivative passes from one to another.

What the methods share that send something to every layer: which modules hold weights, a forward whose graph ends at
each of their inputs, and the refusals of models for which that cannot work.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...compiler.capture import as_call
from ...passes.errors import OptionError

WEIGHTED: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules that a layer begins with."""

NORMALISATIONS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
"""Modules with parameters that belong to the layer before them, as activations and poolings do."""

_FLAT = ("Sign", "Sgn", "Round", "Floor", "Ceil", "Trunc")
"""Operations whose derivative is zero wherever it exists, as autograd names their nodes (``SignBackward0``)."""


@dataclass(frozen=True)
class Layer:
    """A module with weights, by its name in the model."""

    name: str
    module: nn.Module


def find_layers(model: nn.Module, example: Any, kinds: tuple[type[nn.Module], ...], method: str) -> list[Layer]:
    """The modules of these `kinds` in the order in which they run on `example`.

    Raises:
        OptionError: a parameter is in a module of another kind than `WEIGHTED` and `NORMALISATIONS`, or in two modules;
            one of `kinds` runs more than once a forward, or never; there is none. `method` is named in the message.
    """
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, WEIGHTED + NORMALISATIONS):
                known = ", ".join(kind.__name__ for kind in WEIGHTED + NORMALISATIONS)
                raise OptionError(
                    f"{method} has no rule for the parameter {own!r} of {_named(name, module)}: it knows parameters of "
                    f"{known}. Leave this method out for this model."
                )
            if owners.setdefault(id(parameter), name) != name:
                raise OptionError(
                    f"{method} needs each parameter in one module: {owners[id(parameter)]!r} and {name!r} share "
                    f"{own!r}. Leave this method out for this model."
                )
    named = {module: name for name, module in model.named_modules() if isinstance(module, kinds)}
    order: list[nn.Module] = []
    with contextlib.ExitStack() as stack:
        for module in named:
            stack.callback(module.register_forward_pre_hook(lambda module, _: order.append(module)).remove)
        forward_once(model, example)
    for module, name in named.items():
        if order.count(module) != 1:
            raise OptionError(
                f"{method} needs every layer to run once a forward; {_named(name, module)} ran {order.count(module)} "
                "times. Leave this method out for this model."
            )
    if not order:
        raise OptionError(f"{method} found no layer in {type(model).__name__}: it has nothing to train.")
    return [Layer(named[module], module) for module in order]


@contextlib.contextmanager
def cut(layers: list[Layer], receive: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """While it holds, layer i computes with ``receive(i, x)`` where it would have computed with its input x."""
    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):

            def hook(_: nn.Module, args: tuple[Any, ...], index: int = index) -> tuple[Any, ...]:
                return (receive(index, args[0]), *args[1:])

            stack.callback(layer.module.register_forward_pre_hook(hook).remove)
        yield


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Forward-mode differentiation, one level of it.

    torch 2.13 differentiates a linear layer with a bias in Python, 0.3 ms a call on a CPU: that is in the seconds of
    the methods that use it.
    """
    _load_rules()
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
        yield


@functools.cache
def _load_rules() -> None:
    """What torch loads at the first dual number, without the warning that its own code gives then."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*torch.jit.script.*")
        from torch._decomp import decompositions_for_jvp  # noqa: F401


def dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """A dual number with these parts."""
    made: Tensor = forward_ad.make_dual(primal, tangent)
    return made


def primal_and_tangent(value: Tensor) -> tuple[Tensor, Tensor]:
    """Both parts of a dual number of forward-mode differentiation; the tangent is zero where it has none."""
    primal, tangent = forward_ad.unpack_dual(value)
    return primal, torch.zeros_like(primal) if tangent is None else tangent.detach()


def check_output(output: Any, method: str) -> None:
    """Raise `OptionError` unless the model's output is one floating-point tensor."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise OptionError(
            f"{method} needs a model with one tensor of floating-point numbers as output, not "
            f"{output.dtype if isinstance(output, Tensor) else type(output).__name__}. Leave it out for this model."
        )


def check_derivatives(model: nn.Module, example: Any, method: str) -> None:
    """Raise `OptionError` if a trainable parameter has no derivative at the output, or that is no tensor."""
    output = forward_once(model, example, grad=True)
    check_output(output, method)
    check_reached(model, [output], method)


def check_reached(model: nn.Module, ends: list[Tensor], method: str) -> None:
    """Raise `OptionError` unless every trainable parameter has a derivative at one of the tensors `ends`."""
    reached: set[int] = set()
    flat: set[str] = set()
    seen: set[Any] = set()
    pending: list[Any] = [end.grad_fn for end in ends]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (operation := node.name().partition("Backward")[0]) in _FLAT:
            flat.add(operation.lower())
            continue
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        pending.extend(before for before, _ in node.next_functions)
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached]
    if missing:
        blocked = f" ({', '.join(sorted(flat))})" if flat else ""
        raise OptionError(
            f"{method} needs derivatives, and there is none behind {', '.join(missing)}: an operation without one"
            f"{blocked} is on the way, or the output does not depend on it. Leave this method out for this model."
        )


def forward_once(model: nn.Module, example: Any, grad: bool = False) -> Any:
    """The model's output for the example; buffers and the global generator are as before."""
    args, kwargs = as_call(example)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(gpus_of(model)), torch.set_grad_enabled(grad):
        output = model(*args, **kwargs)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    return output


def gpus_of(model: nn.Module) -> list[torch.device]:
    """Those that hold parameters; their generators are beside the CPU's what a run of the model may draw from."""
    return [device for device in {parameter.device for parameter in model.parameters()} if device.type == "cuda"]


def _named(name: str, module: nn.Module) -> str:
    return f"{name!r} ({type(module).__name__})" if name else f"the model itself ({type(module).__name__})"
