"""FLOPs and bytes of graphs, counted on fake tensors (nothing is computed); FLOPs by torch's own formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ..passes import ops
from ..passes.graph import Role

SAMPLES = 2
"""Batch size the counts are taken at, then divided by; 1 would meet special cases."""


@dataclass(frozen=True)
class Work:
    """What it takes to run a graph once."""

    flops: int
    """Of matrix products and convolutions, two a multiply-add."""
    bytes: int
    """Read and written by its operations, each from and to memory; views move none."""
    operations: int
    noises: int = 0
    """Of these, operations that draw noise, which is many in one."""


def count_work(module: fx.GraphModule, samples: int, copies: int = 1) -> Work:
    """The work of a graph on a batch of so many samples, with as many copies (or draws) of it."""
    counter = _Counter(module, samples, copies)
    return Work(sum(counter.flops.values()), counter.bytes, counter.operations, counter.noises)


def count_flops(module: fx.GraphModule) -> dict[str, int]:
    """FLOPs a sample (and copy) of every node with any: matrix products and convolutions, two a multiply-add."""
    return {name: flops // SAMPLES for name, flops in _Counter(module, SAMPLES, 1).flops.items()}


def total_flops(module: fx.GraphModule) -> int:
    """FLOPs a sample (and copy) of a whole graph."""
    return sum(count_flops(module).values())


def forward_share(run: fx.GraphModule, forward: fx.GraphModule) -> float:
    """FLOPs of a perturbed run's copy, noise on weights included, over those of a whole forward without noise.

    1 where there is nothing to count.
    """
    noise = {node.name for node in forward.graph.nodes if "noise_of" in node.meta}
    whole = sum(flops for name, flops in count_flops(forward).items() if name not in noise)
    return total_flops(run) / whole if whole else 1.0


class _Counter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, samples: int, copies: int) -> None:
        super().__init__(module)
        self.flops: dict[str, int] = {}
        self.bytes = self.operations = self.noises = 0
        self.counter = FlopCounterMode(display=False, custom_mapping={torch.ops.onward.perturb_weight: _weight_noise})
        with FakeTensorMode(allow_non_fake_inputs=True), self.counter:
            self.run(*[_concrete(node, samples, copies) for node in module.graph.nodes if node.op == "placeholder"])

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        spent = self.counter.get_total_flops() - before
        if spent:
            self.flops[n.name] = spent
        if n.op == "call_function":
            self.operations += 1
            self.noises += n.target in _NOISES
            if isinstance(n.target, torch._ops.OpOverload) and not n.target.is_view:
                self.bytes += self._moved(n, result)
        return result

    def _moved(self, node: fx.Node, result: Any) -> int:
        """Bytes of an operation's operands and results; of noise that is made again, the results for every draw."""
        read = sum(_bytes(self.env[source]) for source in node.all_input_nodes)
        drawn = self.env[node.all_input_nodes[1]].shape[0] if node.target in _SUMMING else 1
        return read + _bytes(result) * int(drawn)


_NOISES = {*ops.PERTURBING, *ops.REGENERATING, ops.keyed_random, ops.stochastic_sign, ops.pack_stochastic_signs}
_SUMMING = (ops.weighted_noise_sum, ops.weight_noise_sum)
"""What draws noise of every copy (second argument: the draws) for one result."""


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _weight_noise(*given: Any, out_shape: Any) -> int:
    """FLOPs of noise on a weight (`ops.perturb_weight`): those of the operation, or of a projection for each group.

    Antithetic twins share them where the activation is clean; they are counted for every copy all the same.
    """
    (on, operation, weight), groups = given[12:15], given[-1]
    channels = weight[1] if operation == "product" else weight[0]
    products: int = math.prod(out_shape) * math.prod(weight) // channels
    flops: int = 2 * (products if on != "rank-one" else products * groups // channels)
    return flops


def _concrete(node: fx.Node, samples: int, copies: int) -> Any:
    """A fake value for a placeholder, every batch symbol standing for `samples`."""
    name = str(node.meta["target"]).partition(".")[0]
    shapes = {"copies": (copies,), "draws": (copies,), "key": (2,), "sigmas": (1,), "weights": (copies, samples)}
    if node.meta["role"] == Role.RUNTIME and name in shapes:
        integer = name in ("copies", "draws", "key")
        return torch.empty(shapes[name], dtype=torch.int64 if integer else torch.float32)
    return pytree.tree_map(lambda leaf: with_samples(leaf, samples), node.meta["val"])


def with_samples(val: Any, samples: int) -> Any:
    """A new tensor like `val`, or its number, every symbol in it standing for `samples`."""
    if isinstance(val, torch.Tensor):
        return torch.empty([_size(extent, samples) for extent in val.shape], dtype=val.dtype, device=val.device)
    return _size(val, samples)


def _size(extent: Any, samples: int) -> int:
    if not isinstance(extent, torch.SymInt):
        return int(extent)
    expression = extent.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, samples)))
