"""The estimator's settings: which noise, score, capture and grouping a program is compiled for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from ..passes.errors import OptionError, unknown_name
from ..passes.ops import LEVEL_BITS

Value = TypeVar("Value")

NOISES = ("gaussian", "laplace", "rademacher")
SCORES = ("exact", "sign")
CAPTURES = ("exact", "sign", "stochastic", *LEVEL_BITS)
CREDITS = ("sample", "batch")
PLACEMENTS = ("operation", "alive", "narrow")
FEEDBACKS = ("none", "learned")
NOISE_ON = ("output", "weight", "sample", "rank-one", "auto")
CORRECTIONS = ("none", "full", "shrunk")
SEGMENTS = ("op", "auto")
SAMPLINGS = ("all", "error")


@dataclass(frozen=True)
class LikelihoodRatio:
    """Settings of the likelihood-ratio estimator (arXiv 2305.08960, 2403.12320; method.md 1-5).

    Attributes:
        noise: ``"gaussian"``, ``"laplace"`` or ``"rademacher"``, each of unit variance.
        score: ``"exact"`` weights by the score of the noise; ``"sign"`` by its sign, divided by its constant. For
            Gaussian noise the sign needs π/2 times the copies and is right to first order in σ only (a bias of order
            σ²); for Laplace and Rademacher noise the two are the same.
        capture: what a gradient subgraph keeps of an activation. ``"exact"``; ``"sign"``, one bit and **biased**: the
            magnitude is gone and more copies do not bring it back; ``"stochastic"``, the same bits and unbiased;
            ``"stochastic-2"``, ``"stochastic-4"``, ``"stochastic-8"``, so many bits, unbiased and with less noise.
        groups: ``"joint"`` perturbs all sites in one run, ``"layerwise"`` one site at a time behind a shared clean
            prefix; or a partition of the sites, a sequence of sequences of site names (``*`` and ``?`` match).
        copies: perturbed copies of the batch a group and step; with `antithetic` they are ``copies / 2`` pairs. One
            number, or a mapping from site-name patterns (all must be covered; the first match counts; one number a
            group).
        sigma: standard deviation of the noise, one for all sites or a mapping from site-name patterns (all must be
            covered; the first match counts). ``"auto"``: measured for each site on the first batch and every 500 steps,
            the largest at which the loss still responds linearly (`runtime.linearity`).
        antithetic: run every noise with both signs.
        chunk: copies that run side by side; None runs all at once. Bounds memory, and does not change the noise.
        placement: where the noise goes. ``"operation"``: on every coordinate of every site's output, each copy with its
            own captures (1). ``"alive"``: sites that meet in a sum share its noise, coordinates that the next operation
            blocks get none (10), and all captures are the clean run's (9); needs ``capture="exact"``. Much less
            variance for an error of order σ². ``"narrow"``: the same, and behind pointwise operations and poolings that
            alone read a site, where that makes it narrower (10).
        noise_on: what of a site is perturbed (6, 11), one for all sites or a mapping from site-name patterns (the first
            match counts; sites that none covers have ``"output"``). ``"output"``. ``"weight"``: weight and bias, one
            draw a copy for all samples. ``"sample"``: a draw a sample and copy, for one more such operation each.
            ``"rank-one"``: the same with a draw of rank one, for one projection; needs ``noise="rademacher"``.
            ``"auto"``: ``"sample"`` where a channel's fan-in is smaller than its positions (convolutions of large
            maps), else ``"output"``: the estimate's variance grows with the numbers that are perturbed, channels ×
            fan-in or channels × positions. On the weight of linear layers and convolutions only; what else a pattern
            matches keeps ``"output"``. Such a site has no capture, no alive mask and no blocks. Needs
            ``feedback="none"``.
        feedback: ``"none"``, or ``"learned"`` (12): each site learns the mean Jacobian of the outputs from the
            perturbed runs, and its gradient is predicted from the clean run alone. Needs ``placement="alive"`` or
            ``"narrow"`` and ``groups="joint"``; then 2 copies do for a small net.
        correction: with feedback, what the perturbed runs of the step itself add. ``"none"``: the prediction as it is;
            **biased** as long as, and wherever, the mean Jacobian is not the sample's. ``"full"``: what the prediction
            leaves unexplained, by likelihood ratio: unbiased (up to σ²; with `blocks` for a block's mean gradient)
            whatever was learned, and noisier.
            ``"shrunk"``: that times α in [0, 1], a number a site, as far as two halves of the copies agree on it:
            **biased** towards the prediction, and less noisy; three times the gradient's time. One for all sites, or a
            mapping from site-name patterns (all must be covered; the first match counts).
        reach: with feedback, how many noise points on a gradient is read, and pulled back from exactly inside its own
            subgraph (14). 0 has no backpropagation at all; each hop more is one stretch of *local* backpropagation, up
            to operations without derivative; a reach beyond the last site is backpropagation itself. ``"auto"``: 1, or
            2 where segments are joined around products (`segments`).
        segments: with feedback, what one gradient subgraph covers (13). ``"op"``: one operation. A number N: the model
            in N stretches of about equal FLOPs, cut where tensors are narrow. ``"auto"``: one operation; but where
            values are multiplied with each other (attention, gates) whole stretches between residual sums, since a mean
            Jacobian cannot see a product. Or patterns of module names (``["blocks.*"]``), cut behind each module that
            matches. Inside a segment the gradient is pulled back by *local* backpropagation; operations without
            derivative are always cut.
        probe: with feedback, the share of the batch that is perturbed (its first samples).
        probe_every: with feedback, the steps from one perturbed run to the next; those between cost one clean forward
            and the gradients. ``"auto"``: ``1 / (1 - explained)``, at most 16, so that perturbed runs are spent while
            they teach something. During `warmup` every step has one.
        warmup: with feedback, the first steps, in which it is learned and all gradients are zero.
        blocks: positions, along every axis, that share a number of noise (12), one for all sites or a mapping from
            site-name patterns (the first match counts; sites that none covers have 1): 2 means 2 x 2 pixels of
            ``(N, C, H, W)``, 2 tokens of ``(N, T, C)``. ``"auto"``: for images a quarter of the largest map along each
            axis, at least 4, and 1 for other tensors. **Biased**: every coordinate receives its block's mean
            gradient. Less variance, and smaller Jacobians. Not with ``placement="operation"``.
        rank: with feedback, the directions of the outputs along which it is learned, those in which the recent errors
            are largest; **biased** by what lies outside them. All outputs if there are no more than that. None: all
            outputs if the Jacobians fit `feedback_memory`, else as many directions as do, 64 at most.
        feedback_memory: with feedback, MiB that the Jacobians may take; more is refused.
        recompute: what a gradient subgraph reads of the activations between its operands and its frontier (inside a
            segment or within its reach). False: the clean run's, captured. True: computed again from the operands, less
            memory for up to one more forward. With ``placement="operation"`` there is no choice.
        trust: with feedback, whether each site's step is scaled by how well its predictions explain fresh copies
            (`Program.trust`; `Trainer` applies it).
        credit: ``"sample"`` attributes each sample's loss to its own noise. ``"batch"`` takes one loss for the whole
            batch, for losses or models that couple samples; its variance is higher by about the batch size.
        sampling: which samples of a batch are perturbed (8). ``"all"``. ``"error"``: each with a probability that is
            proportional to its error, the size of the loss's gradient at its output, and counting the more the less
            probable it was: unbiased, about as noisy as all of them, and cheaper the fewer samples are still wrong. One
            more clean forward of the batch. Not with batch normalisation by the batch's statistics; needs
            ``feedback="none"`` and ``credit="sample"``.

    Raises:
        OptionError: a value cannot work (odd `copies` with `antithetic`, σ ≤ 0, …).
        UnknownNameError: an unknown name; the message shows the nearest.
    """

    noise: str = "rademacher"
    score: str = "exact"
    capture: str = "exact"
    groups: str | Sequence[Sequence[str]] = "layerwise"
    copies: int | Mapping[str, int] = 64
    sigma: float | str | Mapping[str, float] = 0.1
    antithetic: bool = True
    chunk: int | None = None
    credit: str = "sample"
    placement: str = "operation"
    noise_on: str | Mapping[str, str] = "output"
    feedback: str = "none"
    correction: str | Mapping[str, str] = "none"
    reach: int | str = 0
    segments: str | int | Sequence[str] = "op"
    probe: float = 1.0
    probe_every: int | str = 1
    warmup: int = 20
    trust: bool = True
    blocks: int | str | Mapping[str, int] = 1
    rank: int | None = None
    feedback_memory: int = 512
    recompute: bool = False
    sampling: str = "all"

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("noise", self.noise, NOISES),
            ("score", self.score, SCORES),
            ("capture", self.capture, CAPTURES),
            ("credit", self.credit, CREDITS),
            ("placement", self.placement, PLACEMENTS),
            ("feedback", self.feedback, FEEDBACKS),
            ("sampling", self.sampling, SAMPLINGS),
            *(("correction", value, CORRECTIONS) for value in _values(self.correction)),
            *(("place of the noise", value, NOISE_ON) for value in _values(self.noise_on)),
        ):
            if value not in known:
                raise unknown_name(kind, value, known)
        if isinstance(self.groups, str) and self.groups not in ("joint", "layerwise"):
            raise unknown_name("grouping", self.groups, ("joint", "layerwise"))
        for name, number in (
            *(("copies", count) for count in _values(self.copies)), ("chunk", self.chunk), ("warmup", self.warmup),
            ("rank", self.rank), ("feedback_memory", self.feedback_memory),
        ):  # fmt: skip
            if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
                raise OptionError(f"{name}={number!r}: it has to be an integer.")
        for count in _values(self.copies):
            if count < 1:
                raise OptionError(f"copies={count!r}: at least one copy is needed.")
            if self.antithetic and count % 2:
                raise OptionError(
                    f"copies={count} is odd, and antithetic copies come in pairs. Use {count + 1}, or antithetic=False."
                )
        if self.chunk is not None and (self.chunk < 1 or (self.antithetic and self.chunk % 2)):
            raise OptionError(f"chunk={self.chunk}: it must be positive, and even with antithetic=True.")
        if isinstance(self.sigma, str) and self.sigma != "auto":
            raise unknown_name("sigma", self.sigma, ("auto",))
        for sigma in _values(self.sigma) if self.sigma != "auto" else ():
            if not isinstance(sigma, (int, float)) or not (sigma > 0 and math.isfinite(sigma)):
                raise OptionError(f"sigma={sigma!r}: the noise needs a positive, finite standard deviation.")

        if self.placement != "operation" and self.capture != "exact":
            raise OptionError(
                f'placement="{self.placement}" keeps exact captures of the clean run; capture={self.capture!r} cannot.'
            )
        if self.recompute and self.placement == "operation":
            raise OptionError('recompute=True: with placement="operation" nothing is captured beyond the operands.')
        if "rank-one" in _values(self.noise_on) and self.noise != "rademacher":
            raise OptionError(f'noise_on="rank-one" multiplies signs: it needs noise="rademacher", not {self.noise!r}.')
        if self.sampling == "error" and (self.feedback, self.credit) != ("none", "sample"):
            raise OptionError(
                'sampling="error" weighs each sample\'s own losses: it needs feedback="none" and credit="sample", not '
                f"{self.feedback!r} and {self.credit!r}."
            )
        self._check_blocks()
        if self.feedback == "learned":
            self._check_feedback()
        else:
            unused: tuple[tuple[str, object], ...] = (
                ("correction", "none"), ("reach", 0), ("segments", "op"), ("probe", 1), ("probe_every", 1),
                ("rank", None), ("feedback_memory", 512),
                ("warmup", 20), ("trust", True),
            )  # fmt: skip
            for name, without in unused:
                if (value := getattr(self, name)) != without:
                    raise OptionError(f'{name}={value!r} is an option of feedback="learned", and feedback is "none".')

    def _check_blocks(self) -> None:
        if isinstance(self.blocks, str):
            if self.blocks != "auto":
                raise unknown_name("blocks", self.blocks, ("auto",))
            sizes: tuple[int, ...] = ()
        else:
            sizes = _values(self.blocks)
        for size in sizes:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise OptionError(f"blocks={size!r}: the positions of a block along each axis are a number from 1 on.")
        if self.blocks != 1 and self.placement == "operation":
            raise OptionError(
                f"blocks={self.blocks!r}: noise tied over blocks needs placement='alive' or 'narrow', with captures of "
                f"the clean run, not {self.placement!r}."
            )

    def _check_feedback(self) -> None:
        wanted: tuple[tuple[str, object], ...] = (
            ("groups", "joint"), ("antithetic", True), ("credit", "sample"), ("score", "exact"), ("noise_on", "output"),
        )  # fmt: skip
        if self.placement == "operation":
            raise OptionError('feedback="learned" needs placement="alive" or "narrow", not "operation".')
        for name, value in wanted:
            if getattr(self, name) != value:
                raise OptionError(f'feedback="learned" needs {name}={value!r}, not {getattr(self, name)!r}.')
        if not 0 < self.probe <= 1:
            raise OptionError(f"probe={self.probe}: the share of the batch that is perturbed lies in (0, 1].")
        corrected = [value for value in _values(self.correction) if value != "none"]
        if corrected and self.probe != 1:
            raise OptionError(f'correction="{corrected[0]}" needs copies of every sample: probe=1, not {self.probe}.')
        if isinstance(self.probe_every, str) and self.probe_every != "auto":
            raise unknown_name("probe_every", self.probe_every, ("auto",))
        if self.probe_every != "auto" and not (type(self.probe_every) is int and self.probe_every >= 1):
            raise OptionError(
                f"probe_every={self.probe_every!r}: the steps between perturbed runs are a number from 1 on."
            )
        if "shrunk" in corrected and min(self.draws(count) for count in _values(self.copies)) < 2:
            raise OptionError('correction="shrunk" compares two halves of the copies: it needs 4 copies or more.')
        if corrected and self.probe_every != 1:
            raise OptionError(
                f'correction="{corrected[0]}" needs copies every step: probe_every=1, not {self.probe_every!r}.'
            )
        if isinstance(self.reach, str) and self.reach != "auto":
            raise unknown_name("reach", self.reach, ("auto",))
        if self.reach != "auto" and not (type(self.reach) is int and self.reach >= 0):
            raise OptionError(f"reach={self.reach!r}: the hops are a whole number, not negative.")
        if isinstance(self.segments, str) and self.segments not in SEGMENTS:
            raise unknown_name("segmentation", self.segments, SEGMENTS)
        if isinstance(self.segments, bool) or (isinstance(self.segments, int) and self.segments < 1):
            raise OptionError(f"segments={self.segments!r}: the number of segments has to be at least 1.")
        if not isinstance(self.segments, (str, int)):
            listed = isinstance(self.segments, Sequence) and self.segments
            if not listed or not all(isinstance(pattern, str) for pattern in self.segments):
                raise OptionError(
                    f'segments={self.segments!r}: it has to be "op", "auto", a number, or a list of module names.'
                )
        if self.warmup < 0:
            raise OptionError(f"warmup={self.warmup}: the number of steps cannot be negative.")
        if self.rank is not None and self.rank < 1:
            raise OptionError(f"rank={self.rank}: at least one direction of the outputs is needed.")
        if self.feedback_memory < 1:
            raise OptionError(f"feedback_memory={self.feedback_memory}: at least 1 MiB is needed.")

    @classmethod
    def feedback_learned(cls, copies: int = 2, sigma: float = 0.1, **changes: Any) -> LikelihoodRatio:
        """Learned feedback (method.md 9, 10, 12): gradients from the clean run, 2 perturbed forwards a step."""
        settings: dict[str, Any] = {"placement": "alive", "groups": "joint", "feedback": "learned"}
        return cls(**{**settings, "copies": copies, "sigma": sigma, **changes})

    @classmethod
    def auto(cls, copies: int = 4, **changes: Any) -> LikelihoodRatio:
        """What ``estimator="auto"`` stands for: learned feedback that sets σ, its segments, the form of its Jacobians
        and the steps with a perturbed run by itself; `copies` bounds the perturbed forwards a step on average (what
        measuring σ takes apart).

        Within a segment, and over one or two hops, gradients are pulled back by local backpropagation (13, 14).
        """
        settings: dict[str, Any] = {
            "sigma": "auto",
            "segments": "auto",
            "reach": "auto",
            "probe_every": "auto",
            "blocks": "auto",
        }
        return cls.feedback_learned(copies, **{**settings, **changes})

    @classmethod
    def alr(cls, copies: int = 200, sigma: float = 0.1, **changes: Any) -> LikelihoodRatio:
        """The setting of "Approximated Likelihood Ratio" (arXiv 2403.12320), as we read it (method.md 2).

        The paper's text does not print the encoding's formula; we take it to be ``sign(x ε / σ) = sign(x) sign(ε)``:
        Gaussian noise, sign score, sign capture of every copy, all sites perturbed jointly. Biased.
        """
        settings: dict[str, Any] = {"noise": "gaussian", "score": "sign", "capture": "sign", "groups": "joint"}
        return cls(**{**settings, "copies": copies, "sigma": sigma, **changes})

    @property
    def step(self) -> int:
        """The least number of copies: a pair, or one."""
        return 2 if self.antithetic else 1

    def draws(self, copies: int) -> int:
        """Independent draws of noise among so many copies: pairs, or copies."""
        return copies // 2 if self.antithetic else copies

    def num_probed(self, samples: int) -> int:
        """Samples of a batch that are perturbed, in a step with a perturbed run."""
        return max(1, round(self.probe * samples))

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON-serialisable values."""
        values = asdict(self)
        if not isinstance(self.groups, str):
            values["groups"] = [list(group) for group in self.groups]
        if not isinstance(self.segments, (str, int)):
            values["segments"] = list(self.segments)
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def _values(setting: Value | Mapping[str, Value]) -> tuple[Value, ...]:
    """The values of a setting that is one for all sites, or a mapping from patterns."""
    return tuple(setting.values()) if isinstance(setting, Mapping) else (setting,)
