"""The compiled model as data: graphs and sites, nothing that runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from ..passes.find_sites import Site
from ..passes.graph import Role, outputs, placeholders
from ..passes.insert_captures import Capture
from .capture import CapturedModel
from .estimator import LikelihoodRatio


@dataclass(frozen=True)
class PassRecord:
    """A pass that ran: the graph after it, and how long it took."""

    name: str
    module: fx.GraphModule
    seconds: float


@dataclass(frozen=True)
class PerturbedRun:
    """The forward run that perturbs one group of sites, all copies of a chunk side by side."""

    index: int
    sites: tuple[int, ...]
    module: fx.GraphModule
    share: float
    """FLOPs of one copy as a share of a whole forward's."""
    copies: int
    """Perturbed copies of the batch a step."""
    alive: dict[int, str]
    """Names of the alive masks, of the sites that have one."""

    @property
    def name(self) -> str:
        return f"perturbed_{self.index}"


@dataclass(frozen=True)
class GradientSubgraph:
    """A standalone graph from captures, loss weights and noise keys to the gradients of one site's parameters."""

    site: Site
    run: int
    """Index of the perturbed run that gives its losses."""
    per_copy: bool
    """Whether every copy has its own captures; otherwise they are the clean run's and shared by all copies."""
    captures: tuple[Capture, ...]
    module: fx.GraphModule
    source: str = "noise"
    """Where the cotangent comes from: ``"noise"``, ``"feedback"`` or ``"corrected"`` (`passes.complete_gradients`)."""
    shrunk: bool = False
    """Whether the correction counts only as far as two halves of the copies agree on it."""

    @property
    def name(self) -> str:
        return f"gradient_{self.site.index}"

    @property
    def from_clean(self) -> bool:
        """Whether the gradient needs nothing but the clean run, ``e`` and what feedback has learned."""
        return self.source == "feedback"


@dataclass(frozen=True)
class CompiledModel:
    """Everything the compiler knows: what ``inspect`` shows, the verifier checks and an executor runs."""

    captured: CapturedModel
    estimator: LikelihoodRatio
    history: tuple[PassRecord, ...]
    sites: tuple[Site, ...]
    stages: tuple[fx.GraphModule, ...]
    """The clean run, cut behind every site."""
    runs: tuple[PerturbedRun, ...]
    gradients: tuple[GradientSubgraph, ...]
    mixes_samples: str
    """The first operation that mixes samples, or ``""``."""
    sequential: bool
    """Whether copies must run one at a time, because tiling them into the batch would let them mix."""
    rank: int | None = None
    """With learned feedback, the directions of the outputs that it keeps; None for all outputs."""
    reach: int = 0
    """With learned feedback, over how many hops gradients are pulled back."""
    reached: Mapping[int, Tensor] = field(default_factory=dict)
    """Of one whole graph, by site, which nodes' outputs its rows can reach: bool ``(rows, nodes)`` (`node_reach`)."""

    @property
    def credits_nodes(self) -> bool:
        """Whether losses come one a node, for noise to be weighted by those that it reaches."""
        return self.captured.signature.whole and self.estimator.feedback == "none"

    @property
    def forwards(self) -> float:
        """Perturbed forwards of a sample in a step with perturbed runs; a suffix counts by its share of the FLOPs."""
        return sum(run.copies * run.share for run in self.runs)

    @property
    def graph(self) -> fx.GraphModule:
        """The one-copy graph after the last pass: the model with noise and captures."""
        return self.history[-1].module


def input_keys(module: fx.GraphModule) -> list[str]:
    """What a graph reads, in the order of its placeholders: ``role:target``."""
    return [binding_key(node) for node in placeholders(module)]


def output_keys(module: fx.GraphModule) -> list[str]:
    """What a graph returns: ``kind:name``."""
    return [f"{output.kind}:{output.name}" for output, _ in outputs(module)]


def binding_key(node: fx.Node) -> str:
    """The name that a placeholder's value has in a step's environment."""
    role = node.meta["role"]
    if role == Role.VALUE and "capture" in node.meta:
        return f"capture:{node.meta['target']}"
    return f"{role}:{node.meta['target']}"
