"""The methods that `onward compare` races, in one table: what each is, how it is made, and what it is tuned over.

**What counts as a forward.** Of one sample, in one unit for all:

- a forward of the whole model is 1; a perturbed suffix its share of the FLOPs, as `Program.forwards` counts it;
- a forward with its forward-mode derivative is 2, the value and the tangent: each goes through every operation once;
- a derivative pulled back through the model's activations costs what the forward through the same operations does:
  backpropagation's is 1, and ``auto``'s, which pulls back over short stretches, is counted by its FLOPs (on `mlp` 0.52
  a sample and step; `pulled_back`);
- the gradient of the weights from what arrives at an operation is about 1 a step. Every method but MeZO and the weight
  form of forward gradients needs it, and no method is charged for it: so backpropagation's step is 2 here, and not the
  3 that it costs with it. Joint likelihood ratio with its captures of every copy needs it once a copy: left out in its
  favour;
- making noise, learning feedback, and the optimizer are no forwards.

What is not charged shows in the seconds.

**What each is tuned over.** The same three factors of the recipe's learning rate for all, times two values of the one
further setting that the method has: 6 points, or 3 where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import nn

from ..compiler.cost import count_flops
from ..compiler.driver import compile_model
from ..compiler.estimator import LikelihoodRatio
from ..passes.graph import Kind
from ..runtime.loss import Loss
from ..runtime.program import Program
from ..runtime.training.trainable import TrainableProgram
from .baselines.backpropagation import Backpropagation
from .baselines.direct_feedback_alignment import DirectFeedbackAlignment
from .baselines.fdfa import ForwardDirectFeedbackAlignment
from .baselines.forward_gradient import ActivityForwardGradient, WeightForwardGradient
from .baselines.layers import check_derivatives
from .baselines.mezo import MeZO

CONVENTION = (
    "A forward of the model is 1, a perturbed suffix its share of the FLOPs, a forward-mode derivative 1 more, a "
    "derivative pulled back through activations what their forward costs. Gradients of weights, noise and the "
    "optimizer are not counted, of no method: backpropagation's step is 2."
)
"""What counts as a forward, in short."""

Build: TypeAlias = Callable[[nn.Module, Any, Loss, int, Mapping[str, Any]], TrainableProgram]
"""(model, example inputs, loss, seed, settings) → a program that trains the model in place."""


def _nothing(program: TrainableProgram) -> float:
    return 0.0


@dataclass(frozen=True)
class Method:
    """One of the contestants."""

    name: str
    about: str
    """What it is, in a line."""
    paper: str
    """Where it is from."""
    build: Build
    settings: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Values of its further settings that it is tuned over, by name."""
    uncounted: Callable[[TrainableProgram], float] = _nothing
    """Forwards for every clean forward that the program does not count itself."""


def pulled_back(program: TrainableProgram) -> float:
    """Forwards that a sample's gradients are pulled back over in a step: FLOPs of the operations that its gradients go
    back through (behind a site, and inside a segment all that read its own activations), over those of a forward; an
    operation counts for every gradient that does."""
    assert isinstance(program, Program)
    flops = count_flops(program.compiled.captured.module)
    nodes = {node.name: node for node in program.compiled.graph.graph.nodes}
    back = 0.0
    for gradient in program.compiled.gradients:
        inside = {name for name in gradient.site.region if nodes[name].meta.get("kind") == Kind.ACTIVATION}
        through = [name for name in inside if any(source.name in inside for source in nodes[name].all_input_nodes)]
        back += sum(flops.get(name, 0) for name in (*through, *gradient.site.beyond))
    return back / sum(flops.values()) if back else 0.0


def _likelihood_ratio(make: Callable[..., LikelihoodRatio], **fixed: Any) -> Build:
    def build(model: nn.Module, example: Any, loss: Loss, seed: int, settings: Mapping[str, Any]) -> TrainableProgram:
        return Program(model, compile_model(model, example, make(**fixed, **settings)), loss, seed)

    return build


def _baseline(kind: Callable[..., TrainableProgram]) -> Build:
    def build(model: nn.Module, example: Any, loss: Loss, seed: int, settings: Mapping[str, Any]) -> TrainableProgram:
        return kind(model, example, loss, seed, **settings)

    return build


def _backpropagation(
    model: nn.Module, example: Any, loss: Loss, seed: int, settings: Mapping[str, Any]
) -> TrainableProgram:
    check_derivatives(model, example, "backpropagation")
    return Backpropagation(model, loss, seed)


_COPIES = {"copies": (8, 32)}

METHODS: dict[str, Method] = {
    "bp": Method(
        "backpropagation", "the reference", "Rumelhart et al. 1986", _backpropagation, uncounted=lambda program: 1.0
    ),
    "exact": Method(
        "exact LR",
        "joint likelihood ratio: the noise itself times the activation itself",
        "arXiv 2305.08960; method.md 1",
        _likelihood_ratio(LikelihoodRatio.alr, score="exact", capture="exact"),
        _COPIES,
    ),
    "sign": Method(
        "sign LR",
        "one bit of both, the sign of the noise times that of the activation",
        "arXiv 2403.12320, as we read it; method.md 2",
        _likelihood_ratio(LikelihoodRatio.alr),
        _COPIES,
    ),
    "stochastic": Method(
        "stochastic LR",
        "one bit of both, the activation's drawn so that its mean is the activation",
        "method.md 3",
        _likelihood_ratio(LikelihoodRatio.alr, capture="stochastic"),
        _COPIES,
    ),
    "auto": Method(
        "auto",
        "learned feedback that sets itself, pulled back over short stretches",
        "method.md 12-14",
        _likelihood_ratio(LikelihoodRatio.auto),
        {"copies": (2, 4)},
        uncounted=pulled_back,
    ),
    "auto-op": Method(
        "auto, reach 0",
        "the same without any local backpropagation: reach=0, segments='op'",
        "method.md 12",
        _likelihood_ratio(LikelihoodRatio.auto, reach=0, segments="op"),
        {"copies": (2, 4)},
        uncounted=pulled_back,
    ),
    "fdfa": Method(
        "FDFA",
        "feedback matrices from forward-mode derivatives",
        "Bacho & Chu 2022, arXiv 2212.07282",
        _baseline(ForwardDirectFeedbackAlignment),
        {"alpha": (0.001, 0.01)},
    ),
    "dfa": Method(
        "DFA", "random feedback matrices", "Nøkland 2016, arXiv 1609.01596", _baseline(DirectFeedbackAlignment)
    ),
    "mezo": Method(
        "MeZO",
        "SPSA on the weights, noise made again from its seed",
        "Malladi et al. 2023, arXiv 2305.17333",
        _baseline(MeZO),
        {"pairs": (1, 8)},
    ),
    "fg-weights": Method(
        "forward gradient (weights)",
        "forward-mode derivative along a random direction of the weights",
        "Baydin et al. 2022, arXiv 2202.08587",
        _baseline(WeightForwardGradient),
        {"directions": (1, 8)},
    ),
    "fg-activities": Method(
        "forward gradient (activities)",
        "the same of the activations, each sample its own",
        "Ren et al. 2023, arXiv 2210.03310",
        _baseline(ActivityForwardGradient),
        {"directions": (1, 8)},
    ),
}
"""The methods by what ``onward compare --methods`` calls them."""
