"""The estimator's settings: which noise, score, capture and grouping a program is compiled for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..passes.errors import OptionError, unknown_name

NOISES = ("gaussian", "laplace", "rademacher")
SCORES = ("exact", "sign")
CAPTURES = ("exact", "sign", "stochastic")
CREDITS = ("sample", "batch")
PLACEMENTS = ("operation", "alive")
FEEDBACKS = ("none", "learned")
CORRECTIONS = ("none", "full")


@dataclass(frozen=True)
class LikelihoodRatio:
    """Settings of the likelihood-ratio estimator (arXiv 2305.08960, 2403.12320; method.md 1-5).

    Attributes:
        noise: ``"gaussian"``, ``"laplace"`` or ``"rademacher"``, each of unit variance.
        score: ``"exact"`` weights by the score of the noise; ``"sign"`` by its sign, divided by its constant. For
            Gaussian noise the sign needs π/2 times the copies and is right to first order in σ only (a bias of order
            σ²); for Laplace and Rademacher noise the two are the same.
        capture: what a gradient subgraph keeps of an activation. ``"exact"``; ``"sign"``, one bit and **biased**: the
            magnitude is gone and more copies do not bring it back; ``"stochastic"``, the same bits and unbiased.
        groups: ``"joint"`` perturbs all sites in one run, ``"layerwise"`` one site at a time behind a shared clean
            prefix; or a partition of the sites, a sequence of sequences of site names (``*`` and ``?`` match).
        copies: perturbed copies of the batch a group and step; with `antithetic` they are ``copies / 2`` pairs.
        sigma: standard deviation of the noise, one for all sites or a mapping from site-name patterns (all must be
            covered; the first match counts).
        antithetic: run every noise with both signs.
        chunk: copies that run side by side; None runs all at once. Bounds memory, and does not change the noise.
        placement: where the noise goes. ``"operation"``: on every coordinate of every site's output, each copy with its
            own captures (1). ``"alive"``: sites that meet in a sum share its noise, coordinates that the next operation
            blocks get none (10), and all captures are the clean run's (9); needs ``capture="exact"``. Much less
            variance for an error of order σ².
        feedback: ``"none"``, or ``"learned"`` (12): each site learns the mean Jacobian of the outputs from the
            perturbed runs, and its gradient is predicted from the clean run alone. Needs ``placement="alive"`` and
            ``groups="joint"``; then 2 copies do for a small net.
        correction: with feedback, what the perturbed runs of the step itself add. ``"none"``: the prediction as it is;
            **biased** as long as, and wherever, the mean Jacobian is not the sample's. ``"full"``: what the prediction
            leaves unexplained, by likelihood ratio: unbiased (up to σ²) whatever was learned, and noisier.
        reach: with feedback, how many noise points on a gradient is read, and pulled back from exactly inside its own
            subgraph (14). 0 has no backpropagation at all; each hop more is one stretch of *local* backpropagation, up
            to operations without derivative; a reach beyond the last site is backpropagation itself.
        probe: with feedback, the share of the batch that is perturbed each step (its first samples).
        warmup: with feedback, the first steps, in which it is learned and all gradients are zero.
        trust: with feedback, whether each site's step is scaled by how well its predictions explain fresh copies
            (`Program.trust`; `Trainer` applies it).
        credit: ``"sample"`` attributes each sample's loss to its own noise. ``"batch"`` takes one loss for the whole
            batch, for losses or models that couple samples; its variance is higher by about the batch size.

    Raises:
        OptionError: a value cannot work (odd `copies` with `antithetic`, σ ≤ 0, …).
        UnknownNameError: an unknown name; the message shows the nearest.
    """

    noise: str = "rademacher"
    score: str = "exact"
    capture: str = "exact"
    groups: str | Sequence[Sequence[str]] = "layerwise"
    copies: int = 64
    sigma: float | Mapping[str, float] = 0.1
    antithetic: bool = True
    chunk: int | None = None
    credit: str = "sample"
    placement: str = "operation"
    feedback: str = "none"
    correction: str = "none"
    reach: int = 0
    probe: float = 1.0
    warmup: int = 20
    trust: bool = True

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("noise", self.noise, NOISES),
            ("score", self.score, SCORES),
            ("capture", self.capture, CAPTURES),
            ("credit", self.credit, CREDITS),
            ("placement", self.placement, PLACEMENTS),
            ("feedback", self.feedback, FEEDBACKS),
            ("correction", self.correction, CORRECTIONS),
        ):
            if value not in known:
                raise unknown_name(kind, value, known)
        if isinstance(self.groups, str) and self.groups not in ("joint", "layerwise"):
            raise unknown_name("grouping", self.groups, ("joint", "layerwise"))
        for name, number in (
            ("copies", self.copies), ("chunk", self.chunk), ("reach", self.reach), ("warmup", self.warmup)
        ):  # fmt: skip
            if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
                raise OptionError(f"{name}={number!r}: it has to be an integer.")
        if self.copies < 1:
            raise OptionError(f"copies={self.copies!r}: at least one copy is needed.")
        if self.antithetic and self.copies % 2:
            raise OptionError(
                f"copies={self.copies} is odd, and antithetic copies come in pairs. Use {self.copies + 1}, or "
                "antithetic=False."
            )
        if self.chunk is not None and (self.chunk < 1 or (self.antithetic and self.chunk % 2)):
            raise OptionError(f"chunk={self.chunk}: it must be positive, and even with antithetic=True.")
        for sigma in self.sigma.values() if isinstance(self.sigma, Mapping) else (self.sigma,):
            if not isinstance(sigma, (int, float)) or not (sigma > 0 and math.isfinite(sigma)):
                raise OptionError(f"sigma={sigma!r}: the noise needs a positive, finite standard deviation.")

        if self.placement == "alive" and self.capture != "exact":
            raise OptionError(
                f'placement="alive" keeps exact captures of the clean run; capture={self.capture!r} cannot.'
            )
        if self.feedback == "learned":
            self._check_feedback()
        else:
            unused: tuple[tuple[str, object], ...] = (("correction", "none"), ("reach", 0), ("probe", 1))
            for name, without in unused:
                if (value := getattr(self, name)) != without:
                    raise OptionError(f'{name}={value!r} is an option of feedback="learned", and feedback is "none".')

    def _check_feedback(self) -> None:
        wanted: tuple[tuple[str, object], ...] = (
            ("placement", "alive"), ("groups", "joint"), ("antithetic", True), ("credit", "sample"), ("score", "exact")
        )  # fmt: skip
        for name, value in wanted:
            if getattr(self, name) != value:
                raise OptionError(f'feedback="learned" needs {name}={value!r}, not {getattr(self, name)!r}.')
        if not 0 < self.probe <= 1:
            raise OptionError(f"probe={self.probe}: the share of the batch that is perturbed lies in (0, 1].")
        if self.correction == "full" and self.probe != 1:
            raise OptionError(f'correction="full" needs copies of every sample: probe=1, not {self.probe}.')
        if self.reach < 0:
            raise OptionError(f"reach={self.reach}: the number of hops cannot be negative.")
        if self.warmup < 0:
            raise OptionError(f"warmup={self.warmup}: the number of steps cannot be negative.")

    @classmethod
    def feedback_learned(cls, copies: int = 2, sigma: float = 0.1, **changes: Any) -> LikelihoodRatio:
        """Learned feedback (method.md 9, 10, 12): gradients from the clean run, 2 perturbed forwards a step."""
        settings: dict[str, Any] = {"placement": "alive", "groups": "joint", "feedback": "learned"}
        return cls(**{**settings, "copies": copies, "sigma": sigma, **changes})

    @classmethod
    def alr(cls, copies: int = 200, sigma: float = 0.1, **changes: Any) -> LikelihoodRatio:
        """The setting of "Approximated Likelihood Ratio" (arXiv 2403.12320), as we read it (method.md 2).

        The paper's text does not print the encoding's formula; we take it to be ``sign(x ε / σ) = sign(x) sign(ε)``:
        Gaussian noise, sign score, sign capture of every copy, all sites perturbed jointly. Biased.
        """
        settings: dict[str, Any] = {"noise": "gaussian", "score": "sign", "capture": "sign", "groups": "joint"}
        return cls(**{**settings, "copies": copies, "sigma": sigma, **changes})

    @property
    def draws(self) -> int:
        """Independent draws of noise a step: pairs, or copies."""
        return self.copies // 2 if self.antithetic else self.copies

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON-serialisable values."""
        values = asdict(self)
        if not isinstance(self.groups, str):
            values["groups"] = [list(group) for group in self.groups]
        values["sigma"] = dict(self.sigma) if isinstance(self.sigma, Mapping) else self.sigma
        return values
