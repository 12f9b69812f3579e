"""The verifier: proves the invariants of a compiled program, a table of checks over graphs and over the whole.

====  ==========================================================================================================
no.   invariant
====  ==========================================================================================================
1     every trainable parameter is reached by a site and given by a gradient subgraph
2     no gradient subgraph reads what another computes, and every graph reads only what exists when it runs
3     only captures, constants, sizes, keys and loss weights cross into a gradient subgraph; noise is never stored
4     all noise comes from ``onward.perturb``: the clean run has none, a perturbed run exactly that of its group
5     every random number is keyed, and no graph writes into what it reads
====  ==========================================================================================================

Invariant 4's other half (σ = 0 computes the model's own forward, bit for bit) and 6 (no autograd graph) are about
values, so ``tests/test_invariants.py`` shows them.

A check is a generator of findings; the first one is raised. `verify_graph` runs the checks that make sense for one
graph (`graph_checks`), `verify` those and the checks of the program (`program_checks`).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from ..passes.errors import VerificationError
from ..passes.graph import describe
from .graph_checks import GRAPH_CHECKS, Finding
from .program import CompiledModel
from .program_checks import PROGRAM_CHECKS
from .task_graph import graphs


def verify(compiled: CompiledModel) -> None:
    """Prove the invariants of a whole program.

    Raises:
        VerificationError: the first that is broken, with the graph and the node. A bug in Onward or in a pass.
    """
    for name, module in graphs(compiled).items():
        verify_graph(module, name=name)
    for check in PROGRAM_CHECKS:
        _raise_first(check.invariant, check.run(compiled))


def verify_graph(module: fx.GraphModule, *, name: str = "the graph", keyed: bool = True) -> None:
    """Prove what holds for any one graph, as the passes' results do.

    Args:
        module: a graph in normal form (`passes.graph`).
        name: what messages call it.
        keyed: whether ``key_random_operations`` has run, so that no other random operation may be left.

    Raises:
        VerificationError: the first invariant that is broken.
    """
    for check in GRAPH_CHECKS:
        if keyed or not check.keyed:
            _raise_first(check.invariant, check.run(module), name)


def verify_history(compiled: CompiledModel) -> None:
    """Prove what holds after every pass.

    Raises:
        VerificationError: the first invariant that is broken, naming the pass.
    """
    for number, record in enumerate(compiled.history):
        verify_graph(record.module, name=f"the graph after {record.name}", keyed=number > 0)


def _raise_first(invariant: str, findings: Iterator[Finding], graph: str = "the program") -> None:
    for finding in findings:
        where = finding.graph or graph
        node = f", node %{finding.node.name} ({describe(finding.node)})" if finding.node is not None else ""
        raise VerificationError(
            f"invariant {invariant} is broken in {where}{node}: {finding.message}. This is a bug in Onward or in a "
            "pass; please report it with the model."
        )
