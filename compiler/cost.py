"""FLOPs of graphs, counted by torch's own formulas on fake tensors (nothing is computed)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..passes import ops as _declarations  # noqa: F401  (declares what is counted here)
from ..passes.graph import Role

SAMPLES = 2
"""Batch size the counts are taken at, then divided by; 1 would meet special cases."""


def count_flops(module: fx.GraphModule) -> dict[str, int]:
    """FLOPs a sample (and copy) of every node with any: matrix products and convolutions, two a multiply-add."""
    counter = _Counter(module)
    return counter.flops


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
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.flops: dict[str, int] = {}
        self.counter = FlopCounterMode(display=False, custom_mapping={torch.ops.onward.perturb_weight: _weight_noise})
        with FakeTensorMode(allow_non_fake_inputs=True), self.counter:
            self.run(*[_concrete(node) for node in module.graph.nodes if node.op == "placeholder"])

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        spent = self.counter.get_total_flops() - before
        if spent:
            self.flops[n.name] = spent // SAMPLES
        return result


def _weight_noise(*given: Any, out_shape: Any) -> int:
    """FLOPs of noise on a weight (`ops.perturb_weight`): those of the operation, or of a projection for each group.

    Antithetic twins share them where the activation is clean; they are counted for every copy all the same.
    """
    (on, operation, weight), groups = given[12:15], given[-1]
    channels = weight[1] if operation == "product" else weight[0]
    products: int = math.prod(out_shape) * math.prod(weight) // channels
    flops: int = 2 * (products if on != "rank-one" else products * groups // channels)
    return flops


_RUNTIME_SHAPES = {"copies": (1,), "draws": (1,), "key": (2,), "sigmas": (1,), "weights": (1, SAMPLES)}


def _concrete(node: fx.Node) -> Any:
    """A fake value for a placeholder, every batch symbol standing for `SAMPLES` samples."""
    name = str(node.meta["target"]).partition(".")[0]
    if node.meta["role"] == Role.RUNTIME and name in _RUNTIME_SHAPES:
        integer = name in ("copies", "draws", "key")
        return torch.empty(_RUNTIME_SHAPES[name], dtype=torch.int64 if integer else torch.float32)
    val = node.meta["val"]
    if isinstance(val, torch.Tensor):
        return torch.empty([_size(extent) for extent in val.shape], dtype=val.dtype, device=val.device)
    return _size(val)


def _size(extent: Any) -> int:
    if not isinstance(extent, torch.SymInt):
        return int(extent)
    expression = extent.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, SAMPLES)))
