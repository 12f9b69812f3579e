"""What is claimed, by whom, which experiments can tell, and the judge that does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import judges
from judges import Finding
from reading import Results


@dataclass(frozen=True)
class Claim:
    """A sentence that can be wrong."""

    text: str
    source: str
    experiments: tuple[str, ...]
    judge: Callable[[Results], Finding]


ALR, ULR, FLOPS = "arXiv 2403.12320", "arXiv 2305.08960", "arXiv 2410.05966"
README = "README"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "The sign encoding is unbiased.",
        f"summaries of {ALR}",
        ("encoding", "linear"),
        judges.sign_encoding_is_unbiased,
    ),
    Claim("More copies do not remove the bias of the sign encoding.", README, ("linear",), judges.sign_copies_help),
    Claim("Gradients get better from 100 to 500 copies.", ALR, ("encoding",), judges.quality_rises),
    Claim(
        "The variance of everything unbiased falls as 1/copies.",
        f"{ALR}, method.md",
        ("noise", "places", "groups", "bits", "samples", "feedback"),
        judges.slopes_are_one_half,
    ),
    Claim("Everything biased has a floor.", "method.md", ("bits", "feedback"), judges.biased_options_have_floors),
    Claim(
        "One bit of an activation, its sign, costs less than a point of accuracy.",
        ALR,
        ("digits", "mnist"),
        judges.one_bit_loses_nothing,
    ),
    Claim(
        "A stochastic bit is within a point of exact captures with the same copies.",
        "method.md",
        ("convergence",),
        judges.stochastic_is_close,
    ),
    Claim(
        "Captures of one bit take 1/28 of float32's memory, or less.", README, ("memory",), judges.captures_are_small
    ),
    Claim("At equal memory one bit of many copies beats more bits of fewer.", ALR, ("bits",), judges.bits_and_copies),
    Claim("One bit of the noise loses nothing.", ALR, ("noise",), judges.signs_of_noise_lose_nothing),
    Claim("The paper's setting trains to within a point of backpropagation.", ALR, ("alr",), judges.paper_setting),
    Claim(
        "To sign likelihood ratio's best accuracy `auto` needs a tenth of its forwards.",
        README,
        ("digits", "mnist"),
        judges.forwards_to_sign,
    ),
    Claim("To MeZO's best it needs a thirtieth.", README, ("digits", "mnist"), judges.forwards_to_mezo),
    Claim("To FDFA's best it needs fewer.", README, ("digits", "mnist"), judges.forwards_to_fdfa),
    Claim("`auto` is within half a point of backpropagation.", README, ("accuracy",), judges.near_backpropagation),
    Claim("It needs less than one to four perturbed forwards a step.", README, ("accuracy",), judges.few_forwards),
    Claim(
        "A step takes longer than backpropagation's on a CPU.",
        README,
        ("accuracy",),
        judges.time_beside_backpropagation,
    ),
    Claim("Models without derivative train.", README, ("accuracy",), judges.no_derivative),
    Claim(
        "With no backpropagation in any subgraph shallow nets are within a point.",
        README,
        ("without",),
        judges.without_backpropagation,
    ),
    Claim("`correction='full'` is unbiased, and noisier.", README, ("feedback",), judges.correction_is_unbiased),
    Claim("Plain likelihood ratio's variance grows with depth.", README, ("depth",), judges.variance_grows_with_depth),
    Claim("One-sided copies have half the variance of pairs.", "method.md", ("noise",), judges.one_sided_halves),
    Claim("The clean loss is the best baseline.", ULR, ("variance",), judges.baselines),
    Claim("Perturbing a random part of the samples is more efficient.", FLOPS, ("variance",), judges.flops_selection),
    Claim(
        "`sampling='error'` is unbiased, at fewer forwards.", "method.md", ("samples",), judges.selection_is_unbiased
    ),
    Claim("Learning σ by gradient descent pays.", ULR, ("variance",), judges.learned_sigma),
    Claim(
        "Orthogonal or quasi-random noise has less variance.", "common practice", ("variance",), judges.structured_noise
    ),
    Claim(
        "Perturbing activations is better than perturbing weights.",
        "arXiv 2210.03310",
        ("digits", "mnist", "places"),
        judges.activities_beat_weights,
    ),
    Claim(
        "Feedback learned by forward derivatives is near backpropagation.",
        "arXiv 2212.07282",
        ("digits", "mnist"),
        judges.fdfa_reaches_backpropagation,
    ),
    Claim("The extra `fast` makes noise 1.5 to 10 times faster.", README, ("speed",), judges.noise_is_fast),
    Claim(
        "The estimators' means are what method.md says; a step builds no autograd graph, and depends on nothing but "
        "parameters, batch, seed and number.",
        "method.md",
        ("tests",),
        judges.tests_pass,
    ),
)
