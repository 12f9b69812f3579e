"""Capture of a model whose example is one sample without a batch dimension: a whole graph.

Its floating-point inputs get an axis of samples in front (`passes.add_sample_axis`), of which a step has one and a
perturbed run one a copy. All other inputs (edges, masks, numbers) are the graph itself: they are part of the program,
what depends on them alone is computed here, once, and every copy shares it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..passes.add_sample_axis import add_sample_axis
from ..passes.errors import BatchError, CaptureError, OnwardError, UnsupportedModelError
from ..passes.graph import Kind, Role, append_placeholder, clone, describe, finish, outputs, placeholders
from ..passes.key_random_operations import is_random
from .capture import CapturedModel, Signature, as_call, captured_model, check_arguments, check_runs, first_lines, quiet


def capture_whole(model: nn.Module, example_inputs: Any) -> CapturedModel:
    """Capture `model` on one sample, and give its graph a free number of samples.

    Raises:
        BatchError: no input is a floating-point tensor, or they do not fit the model's forward.
        CaptureError: ``torch.export`` cannot trace it.
        UnsupportedModelError: an operation has no rule for samples side by side; or as in `capture`.
    """
    args, kwargs = as_call(example_inputs)
    check_arguments(model, args, kwargs)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    at = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not at:
        raise BatchError("the example holds no floating-point tensor, which a whole graph's features have to be.")
    if empty := [index for index in at if not leaves[index].numel()]:
        raise BatchError(f"input {empty[0]} of the example is empty: a graph needs at least one node and one feature.")

    def forward(*given: Tensor) -> Any:
        values = list(leaves)
        for index, value in zip(at, given, strict=True):
            values[index] = value
        args, kwargs = pytree.tree_unflatten(values, spec)
        with _KnownValues():
            return original(*args, **kwargs)

    original = model.forward
    try:
        with _forward(model, forward), quiet(), torch.random.fork_rng(devices=[]):
            exported = torch.export.export(model, tuple(leaves[index] for index in at), strict=False)
    except Exception as error:  # whatever a tracer raises is the reason
        check_runs(model, args, kwargs)
        raise CaptureError(
            f"{type(model).__name__} could not be captured on one whole graph:\n  {first_lines(error)}\n"
            "Usual causes: a Python `if` or a loop on values that depend on the features (use torch.where, or masks)."
        ) from error
    described = tuple(
        ((1, *leaf.shape), leaf.dtype, leaf.device, True)
        if index in at
        else leaf.clone()
        if isinstance(leaf, Tensor)
        else leaf
        for index, leaf in enumerate(leaves)
    )
    try:
        alone = captured_model(exported, model, Signature(spec, described, 1, whole=True), "export")
    except RuntimeError as error:
        if isinstance(error, OnwardError):
            raise
        raise CaptureError(
            f"{type(model).__name__} could not be captured on one whole graph:\n  {first_lines(error)}\n"
            "Usual cause: it writes into a part of a fresh tensor (`out[index] += h`, `out[2:].add_(h)`); write "
            "`out = out.index_add(0, index, h)`."
        ) from error
    for node in placeholders(alone.module, Role.INPUT):
        node.meta["target"] = at[node.meta["target"]]
    module = add_sample_axis(alone.module)
    try:
        _compare(alone, module, model, leaves)
    except (IndexError, RuntimeError, ValueError):  # tracing sees no values: edges to nodes that are not there, say
        check_runs(model, args, kwargs)
        raise
    return _folded(replace(alone, module=module))


class _KnownValues(TorchFunctionMode):
    """Lets what depends on real tensors alone be computed while the rest is traced: the edges are real, so that a mask
    over them, or the largest node's number, is a number and no symbol. Random operations are traced.

    A fresh tensor (``torch.zeros``) is traced, since features may be written into it, and has a real twin for as long
    as nothing but real values is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.twins: dict[int, tuple[Tensor, Tensor]] = {}
        """By identity, traced tensors with what they hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = all(_is_real(leaf) or id(leaf) in self.twins for leaf in leaves)
        name = getattr(func, "__name__", "")
        writes = func is Tensor.__setitem__ or (name.endswith("_") and not name.endswith("__"))
        into_fresh = bool(leaves) and writes and id(leaves[0]) in self.twins
        if (known and leaves and not into_fresh) or func is torch.arange:
            with suppress(_DrawsError):
                return self._on_real(func, args, kwargs)
            return func(*args, **kwargs)
        if into_fresh:
            try:
                if known:
                    self._on_real(func, args, kwargs)
            except _DrawsError:
                known = False
            if not known:
                del self.twins[id(leaves[0])]
        if func is Tensor.__getitem__ or func is Tensor.__setitem__:  # a mask has a known number of places
            args = (args[0], self._places(args[1]), *args[2:])
        result = func(*args, **kwargs)
        if func in _FRESH:
            self.twins[id(result)] = (result, self._on_real(func, args, kwargs))
        return result

    def _on_real(self, func: Any, args: Any, kwargs: Any) -> Any:
        def real(leaf: Any) -> Any:
            return self.twins[id(leaf)][1] if isinstance(leaf, Tensor) and id(leaf) in self.twins else leaf

        args, kwargs = pytree.tree_map(real, (args, kwargs))
        with _disable_current_modes(), _NoDraws():  # type: ignore[no-untyped-call]
            return func(*args, **kwargs)

    def _places(self, index: Any) -> Any:
        """An index with the numbers of the places in the stead of a known mask."""
        if isinstance(index, (tuple, list)):
            found: list[Any] = []
            for each in index:
                places = self._places(each)
                found.extend(places if isinstance(places, tuple) and isinstance(each, Tensor) else [places])
            return tuple(found)
        if not isinstance(index, Tensor) or index.dtype != torch.bool:
            return index
        if not _is_real(index) and id(index) not in self.twins:
            return index
        return self._on_real(lambda mask: mask.nonzero(as_tuple=True), (index,), {})


class _DrawsError(Exception):
    """An operation draws random numbers: those of a step are its own, so that it has to be traced."""


class _NoDraws(TorchDispatchMode):
    """Raises `_DrawsError` before a random number is drawn."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _DrawsError
        return func(*args, **(kwargs or {}))


_FRESH = (torch.zeros, torch.ones, torch.full, torch.tensor)


def _is_real(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and not isinstance(tensor, FakeTensor) and not torch._is_functional_tensor(tensor)


@contextmanager
def _forward(model: nn.Module, forward: Any) -> Iterator[None]:
    """`model` with another forward: its own modules keep their paths, which a wrapper around it would change."""
    before = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


class _Values(fx.Interpreter):
    """Runs a graph and keeps every result; random operations let their input through."""

    def __init__(self, module: fx.GraphModule, given: list[Any]) -> None:
        super().__init__(module)
        self.results: dict[str, Any] = {}
        with torch.no_grad():
            self.run(*given)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and is_random(n):
            args, _ = self.fetch_args_kwargs_from_env(n)
            like = args[0] if args and isinstance(args[0], Tensor) else None
            result = pytree.tree_map(lambda x: torch.full_like(x, 0.5) if like is None else like.to(x.dtype), result)
        if "empty" in str(n.target):  # else whatever lay there
            result = torch.zeros_like(result)
        self.results[n.meta.get("alone", n.name)] = result
        return result


def _compare(alone: CapturedModel, module: fx.GraphModule, model: nn.Module, leaves: list[Any]) -> None:
    """Run both graphs on two different samples, and compare all their values.

    Raises:
        UnsupportedModelError: the first that differs, by module and line.
    """
    generator = torch.Generator().manual_seed(0)

    def values(of: fx.GraphModule, number: int | None) -> list[Any]:
        given: list[Any] = []
        for node in placeholders(of):
            role, target = node.meta["role"], node.meta["target"]
            if role == Role.INPUT:
                given.append(torch.stack(samples[target]) if number is None else samples[target][number])
            elif role == Role.CONSTANT:
                given.append(alone.constants[target])
            else:
                value = model.get_parameter(target) if role == Role.PARAMETER else model.get_buffer(target)
                given.append(value.detach().clone())
        return given

    samples = {}
    for node in placeholders(alone.module, Role.INPUT):
        first = leaves[node.meta["target"]]
        other = first + 0.1 * torch.randn(first.shape, generator=generator).to(first)
        samples[node.meta["target"]] = [first, other]
    both = _Values(module, values(module, None)).results
    for number in range(2):
        one = _Values(alone.module, values(alone.module, number)).results
        _compare_with_model(alone, one, model, {index: pair[number] for index, pair in samples.items()}, leaves)
        for node in alone.module.graph.nodes:
            expected, found = one.get(node.name), both.get(node.name)
            if node.op != "call_function" or not isinstance(expected, Tensor) or not isinstance(found, Tensor):
                continue
            found = found[number] if found.dim() > expected.dim() else found
            if expected.is_floating_point():
                same = found.shape == expected.shape and torch.allclose(found, expected, 1e-3, 1e-5, equal_nan=True)
            else:
                same = torch.equal(found, expected)
            if not same:
                raise UnsupportedModelError(
                    f"{describe(node)} gives other values for a sample beside another one than alone, so copies of the "
                    "graph cannot stand side by side. Write it with operations on nodes: products, index_select, "
                    "scatter_add, pointwise ones."
                )


def _compare_with_model(
    alone: CapturedModel, results: dict[str, Any], model: nn.Module, sample: dict[int, Tensor], leaves: list[Any]
) -> None:
    """Compare what the captured graph returns for a sample with what the model does, if it draws no random numbers.

    Raises:
        CaptureError: they differ: some of what was taken for known depends on the features.
    """
    if any(node.op == "call_function" and is_random(node) for node in alone.module.graph.nodes):
        return
    args, kwargs = pytree.tree_unflatten([sample.get(i, leaf) for i, leaf in enumerate(leaves)], alone.signature.spec)
    try:
        twin = copy.deepcopy(model)  # a forward may move its buffers
    except Exception:  # nothing can be said then
        return
    with torch.no_grad(), quiet():
        expected = pytree.tree_leaves(twin(*args, **kwargs))
    returned = [node for output, node in outputs(alone.module) if output.kind == "output"]
    found = [results[node.name] if isinstance(node, fx.Node) else node for node in returned]
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, Tensor) and not torch.allclose(one.double(), other.double(), 1e-3, 1e-5, equal_nan=True):
            raise CaptureError(
                f"{type(model).__name__} returns other values than the graph that was captured of it. A value that "
                "decides sizes, masks or branches depends on the features; keep it a tensor (torch.where)."
            )


def _folded(captured: CapturedModel) -> CapturedModel:
    """What depends on constants alone (degrees, normalised adjacency) is computed now and kept as a constant."""
    module = clone(captured.module)
    known: dict[fx.Node, Any] = {}
    constants = dict(captured.constants)
    for node in list(module.graph.nodes):
        if node.op == "placeholder" and node.meta["role"] == Role.CONSTANT:
            known[node] = constants[node.meta["target"]]
        elif node.op == "call_function" and all(source in known for source in node.all_input_nodes):
            if is_random(node):
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    left: set[fx.Node] = set()  # expanded again whenever it is read: a view costs nothing
    for node, value in reversed(known.items()):
        read = any(user not in known or user in left for user in node.users)
        if node.op == "placeholder" or not read or not isinstance(value, Tensor):
            continue
        if node.target == torch.ops.aten.expand.default and value.numel() > known[node.all_input_nodes[0]].numel():
            left.add(node)
            continue
        name = f"folded.{node.name}"
        place = append_placeholder(module.graph, name.replace(".", "_"))
        place.meta.update(role=Role.CONSTANT, target=name, val=node.meta["val"], kind=Kind.CONSTANT)
        constants[name] = value.contiguous()
        node.replace_all_uses_with(place)
    module.graph.eliminate_dead_code()
    for node in placeholders(module, Role.CONSTANT):
        if not node.users:
            constants.pop(node.meta["target"])
            module.graph.erase_node(node)
    return replace(captured, module=finish(module), constants=constants)


__all__ = ["capture_whole"]
