"""Pass: put an axis of samples in front of a graph that was captured for one sample alone.

A model of one whole graph (nodes, features) has no batch. What Onward does with copies, pairs and chunks, it does along
an axis of samples; this pass adds it, operation by operation, so that the graph stays as coarse as the user wrote it
(``torch.vmap`` under ``torch.export`` fixes the size of the axis at the first ``gather`` or ``scatter``).

A value is *led* if it depends on an input: its first dimension is the samples', the rest are its own. The others
(parameters, buffers, constants, and what they make) stay as they are and are shared. By operation:

1. pointwise: as it is; a led operand with fewer dimensions than the result gets ones behind the samples
2. views: a ``reshape`` to the samples and the result's own shape
3. arguments named ``dim``: counted one further; a reduction over everything is one over all but the samples
4. products, lookups and scatters: the table `_RULES`
5. fresh tensors that only take their shape from a led one: a constant

Declines (UnsupportedModelError with module and line): any other operation, and an index that depends on an input.
`compiler.whole` runs both graphs and compares all values (``meta["alone"]`` is a value's name in the graph of one
sample), so that a rule that does not hold is an error too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from .errors import UnsupportedModelError
from .graph import Output, Role, describe, finish, outputs, set_outputs

_aten = torch.ops.aten


def add_sample_axis(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with a free number of samples in front of every input and of all that depends on one.

    Args:
        module: a graph in normal form with static shapes, whose inputs are one sample's.
    """
    build = _Builder(module)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            build.place(node)
        elif node.op == "call_function":
            build.translate(node)
    items = [(output, build.final(output, node)) for output, node in outputs(module)]
    build.graph.output(tuple(value for _, value in items))
    result = fx.GraphModule({}, build.graph)
    set_outputs(result, items)
    result.graph.eliminate_dead_code()
    return finish(result)


class _Builder:
    """The new graph, its fake tensors, and which of its values are led."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.graph = fx.Graph()
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        self.samples = self.mode.from_tensor(torch.empty(2), symbolic_context=dynamic).shape[0]
        self.made: dict[fx.Node, Any] = {}
        self.led: set[fx.Node] = set()
        self.old = next(iter(module.graph.nodes))
        self.source: fx.Node | None = None
        self.count: fx.Node | None = None

    def place(self, node: fx.Node) -> None:
        new = self.graph.placeholder(node.name)
        new.meta = dict(node.meta)
        val, leads = node.meta["val"], node.meta["role"] == Role.INPUT
        if isinstance(val, Tensor):
            shape = (self.samples, *val.shape) if leads else val.shape
            with self.mode:
                new.meta["val"] = torch.empty(shape, dtype=val.dtype, device=val.device)
        self.made[node] = new
        if leads:
            self.led.add(new)
            self.source = self.source or new

    def translate(self, node: fx.Node) -> None:
        self.old = node
        args: Any
        kwargs: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.made.__getitem__)
        if node.target is operator.getitem:
            self.made[node] = self._item(*args)
            return
        if node.target == _aten._assert_tensor_metadata.default:  # torch.export's own; reads a value, gives none
            return
        if not any(source in self.led for source in _nodes((args, kwargs))):
            self.made[node] = self.call(node.target, *args, name=node.name, **kwargs)
            return
        rule = _RULES.get(node.target) or _rule_by_schema(node.target)
        if rule is None:
            raise UnsupportedModelError(
                f"{describe(node)} has no rule for copies of a whole graph side by side (passes/add_sample_axis.py). "
                "Write it with operations of torch that act on nodes: products, index_select, scatter_add, pointwise "
                "ones; or give the model a batch dimension of its own."
            )
        self.made[node] = made = rule(self, args, kwargs)
        if isinstance(made, fx.Node):
            made.meta["alone"] = node.name

    def _item(self, source: Any, index: int) -> Any:
        if isinstance(source, (tuple, list)):  # made by several operations
            return source[index]
        new = self.call(operator.getitem, source, index, name=self.old.name)
        new.meta["alone"] = self.old.name
        return new

    def call(self, target: Any, *args: Any, name: str | None = None, leads: bool | None = None, **kwargs: Any) -> Any:
        """Add a call; it is led where an argument is, unless `leads` says otherwise."""
        new = self.graph.create_node("call_function", target, args, kwargs, name)
        new.meta.update({key: self.old.meta[key] for key in _ORIGIN if key in self.old.meta})
        with self.mode:
            given, named = fx.map_arg((args, kwargs), lambda source: source.meta["val"])
            new.meta["val"] = target(*given, **named)
        if any(source in self.led for source in _nodes((args, kwargs))) if leads is None else leads:
            self.led.add(new)
        return new

    def final(self, output: Output, node: Any) -> Any:
        """What the graph returns for a value; of a buffer's new value the first sample's, which of one graph is all."""
        value = fx.map_arg(node, self.made.__getitem__)
        if output.kind == "mutation" and value in self.led:
            self.old = node
            return self.call(_aten.select.int, value, 0, 0, leads=False)
        return value

    # --- what rules are made of --------------------------------------------------------------------------------------

    @property
    def val(self) -> Tensor:
        """The result of the operation at hand, of one sample."""
        val: Tensor = self.old.meta["val"]
        return val

    @property
    def schema(self) -> Any:
        """The arguments of the operation at hand."""
        return self.old.target._schema

    def rank(self, value: fx.Node) -> int:
        """Dimensions of a value, without the samples'."""
        return int(value.meta["val"].dim()) - (value in self.led)

    def size(self) -> fx.Node:
        """The number of samples, read once."""
        if self.count is None:
            self.count = self.call(_aten.sym_size.int, self.source, 0, leads=False)
        return self.count

    def aligned(self, value: Any, rank: int) -> Any:
        """A led value with ones behind the samples, up to a rank; anything else as it is."""
        if isinstance(value, fx.Node) and value in self.led:
            for _ in range(rank - self.rank(value)):
                value = self.call(_aten.unsqueeze.default, value, 1)
        return value

    def lead(self, value: Any) -> Any:
        """A tensor with the samples in front, shared by all of them if it had none."""
        if not isinstance(value, fx.Node) or value in self.led or not isinstance(value.meta["val"], Tensor):
            return value
        shape = [int(extent) for extent in value.meta["val"].shape]
        return self.call(_aten.expand.default, value, [self.size(), *shape], leads=True)

    def reshape(self, value: fx.Node, shape: Sequence[int]) -> fx.Node:
        """A led value with another shape of its own."""
        node: fx.Node = self.call(_aten.reshape.default, value, [self.size(), *map(int, shape)])
        return node

    def shared(self, value: Any) -> None:
        """Refuse an index that depends on an input."""
        for leaf in _nodes(value):
            if leaf in self.led:
                raise UnsupportedModelError(
                    f"{describe(self.old)} looks up by an index that depends on the model's floating-point inputs; in "
                    "a whole graph only the integer inputs may say who is whose neighbour."
                )


_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack", "from_node")
_Rule = Callable[[_Builder, tuple[Any, ...], dict[str, Any]], Any]


def _nodes(value: Any) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node)]


def _same(b: _Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return b.call(b.old.target, *args, name=b.old.name, **kwargs)


def _pointwise(b: _Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rank = b.val.dim()
    args, kwargs = pytree.tree_map(lambda leaf: b.aligned(leaf, rank), (args, kwargs))
    return _same(b, args, kwargs)


def _reshaped(b: _Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return b.reshape(args[0], b.val.shape)


def _expanded(b: _Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shape = [int(extent) for extent in b.val.shape]
    if args[0] not in b.led:  # shaped like a led value, and no more
        return b.call(_aten.expand.default, args[0], shape)
    return b.call(_aten.expand.default, b.aligned(args[0], len(shape)), [b.size(), *shape])


def _repeated(b: _Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return b.call(_aten.repeat.default, b.aligned(args[0], len(args[1])), [1, *args[1]])


def _permuted(b: _Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rank = b.rank(args[0])
    order = args[1] if len(args) > 1 else range(rank - 1, -1, -1)
    return b.call(_aten.permute.default, args[0], [0, *(dim % rank + 1 for dim in order)])


def _fresh(value: float | None) -> _Rule:
    """A tensor of one number: all of its samples are the same."""

    def rule(b: _Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = args[-1] if value is None else value
        shape, (dtype, device) = [int(extent) for extent in b.val.shape], (b.val.dtype, b.val.device)
        return b.call(_aten.full.default, shape, number, dtype=dtype, device=device)

    return rule


def _shifted(b: _Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dimensions one further; every tensor but an index gets the samples."""
    rank = max(b.rank(value) for value in _nodes((args, kwargs)) if value in b.led)
    given: dict[str, Any] = {}
    for place, argument in enumerate(b.schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        value = args[place] if place < len(args) else kwargs.get(argument.name, default)
        if argument.name in _DIMS:
            if value is None or value == []:
                value = list(range(rank)) if "List" in str(argument.type) else None
            value = pytree.tree_map(lambda dim: dim + 1 if isinstance(dim, int) and dim >= 0 else dim, value)
        elif argument.name == "index" and b.old.target in _ROWS:
            b.shared(value)
        else:
            value = pytree.tree_map(b.lead, value)
        given[argument.name] = value
    positional = [a.name for a in b.schema.arguments if not a.kwarg_only]
    named = {name: value for name, value in given.items() if name not in positional}
    return b.call(b.old.target, *(given[name] for name in positional), name=b.old.name, **named)


_DIMS = ("dim", "dims", "dim0", "dim1", "source", "destination")
_ROWS = (_aten.index_select.default, _aten.index_add.default, _aten.index_copy.default, _aten.index_fill.int_Scalar)


def _whole(target: Any) -> _Rule:
    """A reduction over everything by one that is told its dimensions."""

    def rule(b: _Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return b.call(target, args[0], list(range(1, b.rank(args[0]) + 1)), **kwargs)

    return rule


def _indexed(b: _Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x[:, indices]``, and the same assigned to."""
    b.shared(args[1])
    target = b.lead(args[0])
    return b.call(b.old.target, target, [None, *args[1]], *args[2:], name=b.old.name, **kwargs)


def _product(b: _Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _matmul(b, args[-2], args[-1])


def _matmul(b: _Builder, left: fx.Node, right: fx.Node) -> Any:
    rank = max(b.rank(left), b.rank(right), 2)
    if right in b.led and b.rank(right) == 1:
        right = b.call(_aten.unsqueeze.default, right, -1)
    left, right = b.aligned(left, rank), b.aligned(right, rank)
    result = b.call(_aten.matmul.default, left, right)
    return b.reshape(result, b.val.shape) if result.meta["val"].dim() != b.val.dim() + 1 else result


def _biased_product(b: _Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs:
        raise UnsupportedModelError(f"{describe(b.old)}: write alpha and beta out.")
    return b.call(_aten.add.Tensor, _matmul(b, args[1], args[2]), b.aligned(args[0], b.val.dim()))


def _einsum(b: _Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    terms, arrow, result = args[0].replace(" ", "").partition("->")
    letter = next(each for each in "zyxwvutsrqpZYXWVUTSRQP" if each not in args[0])
    if not arrow or "." in args[0]:
        raise UnsupportedModelError(f"{describe(b.old)}: write the equation with -> and without an ellipsis.")
    led = [letter + term if value in b.led else term for term, value in zip(terms.split(","), args[1], strict=True)]
    return b.call(_aten.einsum.default, f"{','.join(led)}->{letter}{result}", args[1])


def _batch_norm(b: _Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Statistics over the nodes of each sample, by the formula; running statistics as torch keeps them."""
    x, weight, bias, running_mean, running_var, training, momentum, eps = args
    if not training:
        raise UnsupportedModelError(f"{describe(b.old)} with running statistics is not written for whole graphs.")
    rank = b.rank(x)
    dims = [dim for dim in range(1, rank + 1) if dim != 2]
    count = 1
    for dim in dims:
        count *= int(x.meta["val"].shape[dim])
    mean = b.call(_aten.mean.dim, x, dims, True)
    centred = b.call(_aten.sub.Tensor, x, mean)
    variance = b.call(_aten.mean.dim, b.call(_aten.mul.Tensor, centred, centred), dims, True)
    rstd = b.call(_aten.rsqrt.default, b.call(_aten.add.Tensor, variance, eps))
    result = b.call(_aten.mul.Tensor, centred, rstd)
    channel = [-1, *[1] * (rank - 2)]
    if weight is not None:
        result = b.call(_aten.mul.Tensor, result, b.call(_aten.reshape.default, weight, channel))
    if bias is not None:
        result = b.call(_aten.add.Tensor, result, b.call(_aten.reshape.default, bias, channel))

    def moved(running: Any, now: Any, scale: float) -> Any:
        new = b.call(_aten.mul.Tensor, b.reshape(now, running.meta["val"].shape), momentum * scale)
        return b.call(_aten.add.Tensor, new, b.call(_aten.mul.Tensor, running, 1 - momentum))

    statistics = [b.reshape(each, [x.meta["val"].shape[2]]) for each in (mean, rstd)]
    if running_mean is None:
        return result, *statistics
    return result, *statistics, moved(running_mean, mean, 1.0), moved(running_var, variance, count / max(count - 1, 1))


def _folded(b: _Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Samples and nodes as one dimension, for an operation that treats all rows alike."""
    rows = b.call(_aten.flatten.using_ints, args[0], 0, 1)
    return b.reshape(b.call(b.old.target, rows, *args[1:], **kwargs), b.val.shape)


_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(
        (_aten.linear.default, _aten.layer_norm.default, _aten.dropout.default, _aten.native_dropout.default,
         _aten._to_copy.default, _aten.detach.default, _aten.alias.default, _aten.lift_fresh_copy.default,
         _aten.rand_like.default, _aten.randn_like.default, _aten.bernoulli.default, _aten.bernoulli.p,
         _aten.scaled_dot_product_attention.default, _aten.log_sigmoid.default, _aten.contiguous.default,
         _aten.to.dtype, _aten.rms_norm.default), _same),
    **dict.fromkeys(
        (_aten.prelu.default, _aten.masked_fill.Tensor, _aten.copy.default, _aten.hardswish.default,
         _aten.where.ScalarOther, _aten.where.ScalarSelf, _aten.where.Scalar), _pointwise),
    **dict.fromkeys(
        (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.flatten.using_ints,
         _aten.unflatten.int, _aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.unsqueeze.default,
         _aten.view_as.default, _aten.reshape_as.default), _reshaped),
    **dict.fromkeys((_aten.expand.default, _aten.expand_as.default, _aten.broadcast_to.default), _expanded),
    _aten.repeat.default: _repeated,
    **dict.fromkeys((_aten.permute.default, _aten.t.default, _aten.numpy_T.default), _permuted),
    **dict.fromkeys((_aten.new_zeros.default, _aten.zeros_like.default, _aten.new_empty.default,
                     _aten.empty_like.default), _fresh(0)),
    **dict.fromkeys((_aten.new_ones.default, _aten.ones_like.default), _fresh(1)),
    **dict.fromkeys((_aten.new_full.default, _aten.full_like.default), _fresh(None)),
    _aten.sum.default: _whole(_aten.sum.dim_IntList),
    _aten.mean.default: _whole(_aten.mean.dim),
    _aten.max.default: _whole(_aten.amax.default),
    _aten.min.default: _whole(_aten.amin.default),
    **dict.fromkeys((_aten.index.Tensor, _aten.index_put.default), _indexed),
    **dict.fromkeys((_aten.mm.default, _aten.bmm.default, _aten.matmul.default, _aten.mv.default, _aten.dot.default),
                    _product),
    **dict.fromkeys((_aten.addmm.default, _aten.addmv.default, _aten.baddbmm.default), _biased_product),
    _aten.einsum.default: _einsum,
    _aten._native_batch_norm_legit_functional.default: _batch_norm,
    _aten._native_batch_norm_legit.no_stats: lambda b, args, kwargs: _batch_norm(
        b, (*args[:3], None, None, *args[3:]), kwargs
    ),
    **dict.fromkeys((_aten.batch_norm.default, _aten._native_batch_norm_legit_no_training.default), _folded),
}  # fmt: skip


def _rule_by_schema(target: Any) -> _Rule | None:
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if torch.Tag.pointwise in target.tags:
        return _pointwise
    return _shifted if any(argument.name in _DIMS for argument in target._schema.arguments) else None


__all__ = ["add_sample_axis"]
