"""Pass: add a noise node behind every site (method.md 1).

``z`` becomes ``onward.perturb(z, copies, key, sigmas, site, …) = z + sigmas[site] · ε`` for every reader of ``z``; or,
with noise on the weight (`perturb_weights`), ``onward.perturb_weight(z, …, x, …) = z + sigmas[site] · op(x; E)``. The
graph stays one run of one copy; with every σ = 0 it computes the model's own forward, bit for bit. The numbers are a
function of (seed, step, site, copy): a noise node holds no state and no constant, so common-subexpression and constant
folding passes have nothing to merge or freeze (each has its own ``site``).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx

from . import ops
from .graph import add_runtime_placeholder, clone, finish


def insert_noise(module: fx.GraphModule, *, noise: str, at: Collection[int] | None = None) -> fx.GraphModule:
    """Noise behind every site, or behind those whose index is in `at`."""
    module = clone(module)
    graph = module.graph
    noisy = [n for n in graph.nodes if "site" in n.meta and (at is None or n.meta["site"].index in at)]
    copies = add_runtime_placeholder(graph, "copies", None)
    key = add_runtime_placeholder(graph, "key", None)
    sigmas = add_runtime_placeholder(graph, "sigmas", None)
    for node in noisy:
        site = node.meta["site"]
        layout = site.layout
        where = (list(layout.sizes), layout.dim, layout.outer)
        given: dict[str, Any] = {"blocks": list(site.blocks)} if site.blocks else {}
        if site.weight_noise is not None:
            given = {"x": node.args[site.weight_noise.operand], "x_tiled": True, **site.weight_noise.arguments}
        with graph.inserting_after(node):
            perturbed = graph.create_node(
                "call_function",
                ops.perturb if site.weight_noise is None else ops.perturb_weight,
                (node, copies, key, sigmas, site.index, noise, *where, True),
                given,
                name=f"{node.name}_noisy",
            )
        kept = ("val", "kind", "layout", "nn_module_stack", "stack_trace")
        perturbed.meta.update({name: node.meta[name] for name in kept if name in node.meta})
        perturbed.meta["noise_of"] = site.index
        # what is returned of a noise point is so without its noise: `separate_outputs`
        node.replace_all_uses_with(
            perturbed, delete_user_cb=lambda user, new=perturbed: user is not new and "returned" not in user.meta
        )
    return finish(module)
