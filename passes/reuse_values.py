"""Pass: let a gradient subgraph read what the clean run has already computed, in place of computing it again.

A traced vjp (`trace_gradients`) starts from a region's operands and so recomputes the region's own activations wherever
its derivative reads them: the values between a site and its frontier (method.md 13, 14). The clean run has the same
values. Here each becomes a placeholder, captured like any operand, and what only served to recompute it is removed:
the arithmetic of one forward through the region, for the memory of those activations until the step ends.

Returns a graph whose outputs are the gradients alone. Only for captures of the clean run: each copy has values of its
own, and signs stand for no value.
"""

from __future__ import annotations

from torch import fx

from .graph import Kind, Role, append_placeholder, clone, finish, outputs, placeholders, set_outputs


def reuse_values(vjp: fx.GraphModule) -> fx.GraphModule:
    """The same gradients, with no activation of the region recomputed that the clean run holds."""
    module = clone(vjp)
    read = {node.meta["target"]: node for node in placeholders(module, Role.VALUE)}
    gradients = [(output, node) for output, node in outputs(module) if output.kind == "gradient"]
    inside = [(output.name, node) for output, node in outputs(module) if output.kind == "value"]
    set_outputs(module, gradients)
    module.graph.eliminate_dead_code()
    for name, node in inside:
        if node.op == "placeholder" or not node.users:
            continue
        if name not in read:
            read[name] = append_placeholder(module.graph, name)
            read[name].meta.update(role=Role.VALUE, target=name, val=node.meta["val"], kind=Kind.ACTIVATION)
        node.replace_all_uses_with(read[name])
    module.graph.eliminate_dead_code()
    for node in placeholders(module):
        if not node.users and not str(node.meta["target"]).startswith("cotangent"):
            module.graph.erase_node(node)
    return finish(module)
