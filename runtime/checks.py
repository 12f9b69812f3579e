"""What a step is given, checked against what the program was compiled for: the batch and the model."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..compiler.capture import Signature, as_call
from ..compiler.program import CompiledModel
from ..passes.errors import BatchError, ModeError
from ..passes.graph import Role, describe, placeholders
from ..passes.rules import uses_batch_statistics


def check_batch(inputs: Any, expected: Signature, needs_two: str) -> tuple[list[Any], int]:
    """The leaves of `inputs` and the number of samples; `needs_two` names an operation that needs more than one.

    Raises:
        BatchError: the batch is empty or does not fit the example.
    """
    args, kwargs = as_call(inputs)
    leaves, spec = list(args), _spec_of_tensors(len(args))
    if kwargs or not all(isinstance(leaf, Tensor) for leaf in leaves):
        names = expected.spec.child(1).context
        if kwargs.keys() == set(names):
            kwargs = {name: kwargs[name] for name in names}
        leaves, spec = pytree.tree_flatten((args, kwargs))
    if spec != expected.spec:
        raise BatchError(
            f"the inputs have another structure than the example: expected {_structure(expected.spec)}, got "
            f"{_structure(spec)}. Pass a tensor, a tuple of positional arguments or a dict of keyword arguments, "
            "as in the example."
        )
    samples: int | None = None
    leaves = expected.lead(leaves)
    for position, (leaf, described) in enumerate(zip(leaves, expected.leaves, strict=True)):
        if isinstance(described, Tensor):
            _check_same(position, leaf, described)
            continue
        if not isinstance(described, tuple):
            if isinstance(leaf, Tensor) or leaf != described:
                raise BatchError(f"input {position} is {leaf!r}; the program was compiled for {described!r}.")
            continue
        samples = _check_leaf(position, leaf, described, samples)
    if not samples:
        raise BatchError("the batch is empty: a step needs at least one sample.")
    if samples == 1 and needs_two:
        raise BatchError(
            f"the batch has one sample, and {needs_two} normalises by statistics that need more than one "
            "value a channel. If it is the last of an epoch, use drop_last=True in the DataLoader."
        )
    return leaves, samples


@lru_cache(maxsize=64)
def _spec_of_tensors(count: int) -> pytree.TreeSpec:
    """The structure of so many positional arguments."""
    return pytree.tree_structure((tuple([0] * count), {}))


class ModelCheck:
    """Finds a model's parameters and buffers, and whether they are still those that it was compiled with."""

    def __init__(self, model: nn.Module, compiled: CompiledModel) -> None:
        everything = placeholders(compiled.captured.module)
        self.model = model
        self.training = compiled.captured.training
        self.parameters = {
            n.meta["target"]: (n.meta["trainable"], n.meta["val"])
            for n in everything
            if n.meta["role"] == Role.PARAMETER
        }
        """Whether each parameter that the graph reads is trainable, and its value as a fake tensor, by name."""
        canonical = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names = {name: canonical[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        self._modules: list[nn.Module] = []
        self._seen: list[Any] = []
        self._found: tuple[dict[str, nn.Parameter], dict[str, Tensor]] = {}, {}

    def __call__(self) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
        """The model's parameters and buffers under all their names; a walk over its modules where anything is new.

        Raises:
            ModeError: its mode or its parameters are not those that it was compiled with.
        """
        if not self._modules or _everything(self._modules) != self._seen:
            self._found = self._walk()
            self._modules = list(self.model.modules())
            self._seen = _everything(self._modules)
        return self._found

    def _walk(self) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name, training in self.training.items():
            if name not in modules:
                raise ModeError(f"the module {name!r} was removed after the program was compiled. Compile again.")
            if modules[name].training != training:
                mode, wanted = ("eval", "train") if training else ("train", "eval")
                raise ModeError(
                    f"module {name or type(self.model).__name__!r} is in {mode} mode; the program was compiled in "
                    f"{wanted} mode, which its graph holds. Call .{wanted}() on it before step, or compile again."
                )
        found: dict[str, nn.Parameter] = {}
        buffers: dict[str, Tensor] = {}
        for path, module in modules.items():
            prefix = f"{path}." if path else ""
            found.update((prefix + name, p) for name, p in module._parameters.items() if p is not None)
            buffers.update((prefix + name, b) for name, b in module._buffers.items() if b is not None)
        for name, canonical in self._names.items():
            if (change := self._change(found, name, canonical)) is not None:
                raise ModeError(f"the parameter {name!r} {change} after the program was compiled. Compile again.")
        if len(found) > len(self._names):
            (name, *_) = found.keys() - self._names.keys()
            raise ModeError(f"the parameter {name!r} was added after the program was compiled. Compile again.")
        return found, buffers

    def _change(self, found: dict[str, nn.Parameter], name: str, canonical: str) -> str | None:
        """What happened to a parameter since the program was compiled."""
        if name not in found or canonical not in found:
            return "was removed"
        parameter = found[name]
        if parameter is not found[canonical]:
            return f"was separated from {canonical!r}, to which it was tied,"
        if canonical not in self.parameters:
            return None
        trainable, val = self.parameters[canonical]
        if parameter.requires_grad != trainable:
            return "was frozen" if trainable else "was made trainable"
        if (parameter.shape, parameter.dtype, parameter.device) != (val.shape, val.dtype, val.device):
            was, now = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (val, parameter))
            return f"was changed from {was} to {now}"
        return None


def _everything(modules: list[nn.Module]) -> list[Any]:
    """All that a walk over these modules would find, for a comparison that costs a fraction of it. What the identities
    belong to is kept alive by whoever keeps the list."""
    found: list[Any] = []
    for module in modules:
        found += (module.training, *module._modules, *module._buffers, *module._parameters)
        found += (*map(id, module._modules.values()), *map(id, module._buffers.values()))
        for parameter in module._parameters.values():
            if parameter is not None:
                described = parameter.requires_grad, parameter.shape, parameter.dtype, parameter.device
                found += (id(parameter), described)
    return found


def first_without_statistics_of_one(module: fx.GraphModule) -> str:
    """The first batch normalisation that sees one value a sample and channel, or ``""``: of one sample its variance is
    zero and the unbiased one, which goes into the running statistics, not a number."""
    for node in module.graph.nodes:
        if node.op == "call_function" and uses_batch_statistics(node):
            source = node.args[0]
            layout, val = source.meta.get("layout"), source.meta["val"]
            if layout is not None and layout.batched and layout.elements == val.shape[1]:
                return describe(node)
    return ""


class _Leaf:
    def __repr__(self) -> str:
        return "*"


def _structure(spec: pytree.TreeSpec) -> str:
    """Arguments of forward with ``*`` for every leaf."""
    args, kwargs = pytree.tree_unflatten([_Leaf()] * spec.num_leaves, spec)
    return repr(kwargs or args)


def _check_same(position: int, leaf: Any, known: Tensor) -> None:
    """An input that is part of the program has to be the example's."""
    same = isinstance(leaf, Tensor) and leaf.shape == known.shape and leaf.dtype == known.dtype
    if not same or leaf.device != known.device or not bool((leaf == known).all()):
        raise BatchError(
            f"input {position} is not the example's: of a program of one whole graph (unbatched=True) every input but "
            "the floating-point tensors is part of it, its edges for one. Compile a program for each graph."
        )


def _check_leaf(position: int, leaf: Any, described: tuple[Any, ...], samples: int | None) -> int | None:
    shape, dtype, device, batched = described
    if not isinstance(leaf, Tensor):
        raise BatchError(f"input {position} is {type(leaf).__name__}; the example has a tensor there.")
    if leaf.dtype != dtype:
        raise BatchError(
            f"input {position} has dtype {leaf.dtype}; the example has {dtype}. Convert it with .to({dtype})."
        )
    if leaf.device != device:
        raise BatchError(f"input {position} is on {leaf.device}; the program was compiled on {device}.")
    free = 1 if batched else 0
    if leaf.dim() != len(shape) or tuple(leaf.shape[free:]) != tuple(shape[free:]):
        wanted = ("N", *shape[1:]) if batched else shape
        raise BatchError(
            f"input {position} has shape {tuple(leaf.shape)}; the program was compiled for "
            f"({', '.join(map(str, wanted))})."
        )
    if not batched:
        return samples
    if samples is not None and leaf.shape[0] != samples:
        raise BatchError(f"input {position} holds {leaf.shape[0]} samples, the inputs before it {samples}.")
    return int(leaf.shape[0])
