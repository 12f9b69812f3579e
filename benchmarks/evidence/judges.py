"""How an experiment's numbers decide a claim: a function each. No number stands here that was not measured."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

from reading import (
    Results,
    best,
    cases,
    measured,
    ratio,
    runs,
    show,
    show_share,
    squared_errors,
    variance,
    whole,
)

from onward.evidence.fidelity_report import spread
from onward.evidence.methods import METHODS

HOLDS, PARTLY, FAILS = "holds", "in part", "does not hold"
RACES = {"digits": "digits", "mnist": "MNIST"}


@dataclass(frozen=True)
class Finding:
    """What came out."""

    verdict: str
    found: str


def _all(oks: list[bool]) -> str:
    return HOLDS if all(oks) else PARTLY if any(oks) else FAILS


def sign_encoding_is_unbiased(results: Results) -> Finding:
    sign = whole(results["encoding"], capture="sign", score="sign", copies=500)["bias"]
    exact = whole(results["encoding"], capture="exact", score="exact", copies=500)["bias"]
    linear, reference = (whole(results["linear"], capture=name, copies=512)["bias"] for name in ("sign", "exact"))
    unbiased = sign["low"] <= exact["high"] and linear["low"] <= reference["high"]
    return Finding(
        HOLDS if unbiased else FAILS,
        f"Bias of `alr` {show(sign)} of the gradient's length on `mlp`, of exact captures {show(exact)} (the "
        f"smoothing by σ); on a linear model {show(linear)} and {show(reference)}.",
    )


def sign_copies_help(results: Results) -> Finding:
    found = [whole(results["linear"], capture="sign", copies=count) for count in (8, 32, 128, 512)]
    gone = found[-1]["bias"]["high"] < found[0]["bias"]["low"]
    errors = ", ".join(f"{one['error']['value']:.2f}" for one in found)
    return Finding(
        FAILS if gone else HOLDS,
        f"On a linear model the error with 8, 32, 128, 512 copies is {errors}, the bias in it "
        f"{show(found[0]['bias'])} and in the end {show(found[-1]['bias'])}.",
    )


def quality_rises(results: Results) -> Finding:
    found = [
        whole(results["encoding"], capture="sign", score="sign", copies=count)["cosine"] for count in (100, 200, 500)
    ]
    rises = all(a["high"] < b["low"] for a, b in pairwise(found))
    floor = whole(results["encoding"], capture="sign", score="sign", copies=500)
    return Finding(
        HOLDS if rises else FAILS,
        f"Cosine of one step of `alr` with 100, 200, 500 copies: {', '.join(show(one) for one in found)}. "
        f"Its error is then {floor['error']['value']:.2f}, of which {floor['bias']['value']:.2f} stays.",
    )


def slopes_are_one_half(results: Results) -> Finding:
    inside, outside = [], []
    for key in ("noise", "places", "groups", "bits", "samples", "feedback"):
        for line in results[key].data["scaling"]:
            settings, slope = line["settings"], line["deviation"]
            if settings.get("capture") == "sign" or settings.get("correction") in ("none", "shrunk"):
                continue
            name = ", ".join(f"{name} {value}" for name, value in settings.items())
            (inside if abs(slope["value"] + 0.5) <= 0.05 else outside).append((name, slope["value"]))
    least, most = min(value for _, value in inside), max(value for _, value in inside)
    told = (
        f"Slope of log deviation on log copies between {least:.3f} and {most:.3f} for {len(inside)} unbiased settings"
    )
    if outside:
        told += "; not for " + "; ".join(f"{name} ({value:.2f})" for name, value in outside)
    return Finding(HOLDS if not outside else PARTLY, told + ".")


def biased_options_have_floors(results: Results) -> Finding:
    floors = {
        "sign capture": whole(results["bits"], capture="sign", copies=512)["bias"],
        "feedback alone": whole(results["feedback"], correction="none", copies=128)["bias"],
        "`shrunk`": whole(results["feedback"], correction="shrunk", copies=128)["bias"],
    }
    told = ", ".join(f"{name} {show(of)}" for name, of in floors.items())
    return Finding(_all([of["low"] > 0 for of in floors.values()]), f"Bias at the most copies: {told}.")


def correction_is_unbiased(results: Results) -> Finding:
    full, none = (whole(results["feedback"], correction=name, copies=128) for name in ("full", "none"))
    few = whole(results["feedback"], correction="full", copies=2)["deviation"]["value"]
    ok = full["bias"]["value"] < none["bias"]["value"] / 2 and full["deviation"]["value"] > none["deviation"]["value"]
    return Finding(
        HOLDS if ok else FAILS,
        f"Bias {show(none['bias'])} predicted and {show(full['bias'])} corrected with 128 copies; the "
        f"deviation that costs is {full['deviation']['value']:.2f} there and {few:.1f} with 2.",
    )


def signs_of_noise_lose_nothing(results: Results) -> Finding:
    def of(noise: str, score: str) -> float:
        return variance(whole(results["noise"], noise=noise, score=score, antithetic="true", copies=128))

    ratios = {noise: of(noise, "sign") / of(noise, "exact") for noise in ("laplace", "rademacher", "gaussian")}
    told = ", ".join(f"{noise} {value:.2f}" for noise, value in ratios.items())
    exact = abs(ratios["laplace"] - 1) < 1e-6 and abs(ratios["rademacher"] - 1) < 1e-6
    return Finding(
        PARTLY if exact else FAILS,
        f"Variance with the sign of the noise over that with the noise: {told} (theory for a Gaussian: "
        f"π/2 = {math.pi / 2:.2f}; for the others the sign is the score).",
    )


def one_sided_halves(results: Results) -> Finding:
    ratios = []
    for noise in ("gaussian", "rademacher"):
        one, pair = (
            variance(whole(results["noise"], noise=noise, score="exact", antithetic=way, copies=128))
            for way in ("false", "true")
        )
        ratios.append(one / pair)
    told = " and ".join(f"{value:.2f}" for value in ratios)
    return Finding(
        HOLDS if all(0.4 < value < 0.6 for value in ratios) else PARTLY,
        f"Variance over that of pairs with the same forwards: {told} (Gaussian, Rademacher).",
    )


def one_bit_loses_nothing(results: Results) -> Finding:
    lost = {name: best(results[key], "exact") - best(results[key], "sign") for key, name in RACES.items()}
    told = ", ".join(
        f"{name}: {best(results[key], 'sign'):.3f} against {best(results[key], 'exact'):.3f}"
        for key, name in RACES.items()
    )
    return Finding(
        _all([value <= 0.01 for value in lost.values()]), f"Best accuracy in the same budget, tuned; {told}."
    )


def stochastic_is_close(results: Results) -> Finding:
    parts, oks = [], []
    for copies in (8, 32, 128):
        last = {}
        for capture in ("exact", "stochastic", "sign"):
            (one,) = measured(results["convergence"], capture=capture, copies=copies)
            last[capture] = mean(run[-1] for run in one["trained"]["accuracies"])
        oks.append(last["exact"] - last["stochastic"] <= 0.01)
        parts.append(f"{copies}: {last['stochastic']:.3f} against {last['exact']:.3f} (sign {last['sign']:.3f})")
    return Finding(_all(oks), f"Accuracy after five epochs by copies, three seeds: {'; '.join(parts)}.")


def captures_are_small(results: Results) -> Finding:
    rows = [one for one in results["memory"].data["growth"] if one["chunk"] == one["copies"]]  # all side by side
    most = max(one["copies"] for one in rows)
    mib = {one["estimator"]: one["captures_mib"] for one in rows if one["copies"] == most}
    shares = {name: mib["exact"] / mib[name] for name in ("sign", "stochastic")}
    told = ", ".join(f"{name} 1/{value:.1f}" for name, value in shares.items())
    return Finding(_all([value >= 28 for value in shares.values()]), f"Of float32's with {most} copies: {told}.")


def bits_and_copies(results: Results) -> Finding:
    """At equal memory: copies times bits."""
    found = results["bits"]
    one = whole(found, capture="stochastic", copies=512)["error"]["value"]
    eight = whole(found, capture="stochastic-4", copies=128)["error"]["value"]
    thirty = whole(found, capture="exact", copies=8)["error"]["value"] * math.sqrt(8 / 16)
    best_ = min(one, eight, thirty)
    names = {one: "one bit of 512 copies", eight: "4 bits of 128", thirty: "32 bits of 16"}
    return Finding(
        HOLDS if best_ == one else FAILS,
        f"Error with 512 bits for each number: one bit of 512 copies {one:.2f}, 4 bits of 128 {eight:.2f}, "
        f"32 bits of 16 {thirty:.2f} (from 8 copies by the slope). Best: {names[best_]}. A copy is a forward, "
        "which memory does not count.",
    )


def forwards_to_sign(results: Results) -> Finding:
    return _times(results, "sign", 10)


def forwards_to_mezo(results: Results) -> Finding:
    return _times(results, "mezo", 30)


def forwards_to_fdfa(results: Results) -> Finding:
    return _times(results, "fdfa", 1)


def _times(results: Results, method: str, wanted: float) -> Finding:
    oks, parts = [], []
    for key, name in RACES.items():
        one, near = ratio(results[key], method), ratio(results[key], method, "near")
        oks.append(one["times"] is not None and one["times"] > wanted)
        its = "never" if one["subject_forwards"] is None else f"{one['subject_forwards']:.1f}"
        times = "" if one["times"] is None else f", {one['times']:.1f} times"
        close = "never" if near["times"] is None else f"{near['times']:.1f}"
        rising = ", still rising when the budget ended," if one["rising"] else ""
        parts.append(
            f"{name}: to {one['accuracy']:.3f}{rising} {METHODS[method].name} needs {one['forwards']:.1f} forwards a "
            f"training sample, `auto` {its}{times} (one point below: {close})"
        )
    return Finding(_all(oks), "; ".join(parts) + ".")


def fdfa_reaches_backpropagation(results: Results) -> Finding:
    lost = {name: best(results[key], "bp") - best(results[key], "fdfa") for key, name in RACES.items()}
    told = ", ".join(f"{name} {-value:+.3f}" for name, value in lost.items())
    return Finding(_all([value <= 0.01 for value in lost.values()]), f"Best accuracy beside backpropagation's: {told}.")


def activities_beat_weights(results: Results) -> Finding:
    pairs = {
        name: [best(results[key], f"fg-{form}") for form in ("activities", "weights")] for key, name in RACES.items()
    }
    weight, output = (variance(whole(results["places"], noise_on=on, copies=128)) for on in ("weight", "output"))
    told = ", ".join(f"{name} {a:.3f} against {b:.3f}" for name, (a, b) in pairs.items())
    return Finding(
        _all([a > b for a, b in pairs.values()] + [output < weight]),
        f"Forward gradients, best accuracy: {told}. Likelihood ratio: variance of noise on the weights "
        f"{weight / output:.1f} times that of noise on the outputs, 128 copies.",
    )


def flops_selection(results: Results) -> Finding:
    found = squared_errors(results["variance"], "15 epochs, 32 copies")
    alike, by_error = found["antithetic, a quarter, alike"], found["antithetic, by error"]
    return Finding(
        HOLDS if alike < 1 else FAILS,
        f"Mean squared error at equal forwards, over that of all samples: a quarter drawn alike {alike:.2f}, by error "
        f"(`sampling=error`) {by_error:.2f}, after 15 epochs.",
    )


def selection_is_unbiased(results: Results) -> Finding:
    base, picked = (
        whole(results["samples"], sampling=name, antithetic="true", copies=128) for name in ("all", "error")
    )
    cost, its = (
        next(measured(results["samples"], sampling=name, antithetic="true", copies=128))["forwards"]
        for name in ("all", "error")
    )
    return Finding(
        HOLDS if picked["bias"]["low"] <= base["bias"]["high"] else FAILS,
        f"Bias {show(picked['bias'])}, of all samples {show(base['bias'])} (the smoothing by σ); variance "
        f"{variance(picked) / variance(base):.2f} times theirs at {its / cost:.2f} of their forwards.",
    )


def structured_noise(results: Results) -> Finding:
    found = squared_errors(results["variance"], "15 epochs, 32 copies")
    names = ("antithetic, Hadamard", "antithetic, orthogonal Gaussian", "antithetic, Sobol")
    told = ", ".join(f"{name.removeprefix('antithetic, ')} {found[name]:.2f}" for name in names)
    helped = [found[name] < 0.9 for name in names]
    return Finding(_all(helped), f"Mean squared error over that of independent signs: {told}. Not in the library.")


def baselines(results: Results) -> Finding:
    found = squared_errors(results["variance"], "15 epochs, 32 copies")
    names = ("no baseline", "mean of the batch", "leave one out", "clean loss")
    values = {name: found[f"one-sided, {name}"] for name in names}
    told = ", ".join(f"{name} {show_share(value)}" for name, value in values.items())
    return Finding(
        HOLDS if values["clean loss"] == min(values.values()) else PARTLY,
        f"Mean squared error over that of antithetic pairs: {told}. In the library: the clean loss.",
    )


def learned_sigma(results: Results) -> Finding:
    by = {(one["start"], one["learned"]): [run[0] for run in one["runs"]] for one in results["variance"].data["sigmas"]}
    starts = sorted({start for start, _ in by})
    told = "; ".join(
        f"from {start:g}: fixed {spread(by[start, False])}, learned {spread(by[start, True])}" for start in starts
    )
    gains = [mean(by[start, True]) - mean(by[start, False]) for start in starts]
    return Finding(
        _all([gain > 0.01 for gain in gains]),
        f"Accuracy, 8 epochs, 3 seeds; {told}. Not in the library, which measures σ (`sigma='auto'`).",
    )


def near_backpropagation(results: Results) -> Finding:
    found = results["accuracy"]
    lost = {case: mean(runs(found, case, "bp")) - mean(runs(found, case, "auto")) for case in cases(found)}
    told = ", ".join(f"`{case}` {mean(runs(found, case, 'auto')):.3f} ({-value:+.3f})" for case, value in lost.items())
    return Finding(_all([value <= 0.005 for value in lost.values()]), f"Accuracy, and beside backpropagation: {told}.")


def few_forwards(results: Results) -> Finding:
    found = results["accuracy"]
    spent = {case: mean(runs(found, case, "auto", "perturbed_forwards")) for case in cases(found)}
    told = ", ".join(f"`{case}` {value:.2f}" for case, value in spent.items())
    return Finding(_all([value < 4 for value in spent.values()]), f"Perturbed forwards a sample and step: {told}.")


def time_beside_backpropagation(results: Results) -> Finding:
    found = results["accuracy"]
    times = {
        case: mean(runs(found, case, "auto", "seconds")) / mean(runs(found, case, "bp", "seconds"))
        for case in cases(found)
    }
    told = ", ".join(f"`{case}` {value:.1f}" for case, value in times.items())
    return Finding(_all([value > 1 for value in times.values()]), f"Seconds of a run over backpropagation's: {told}.")


def no_derivative(results: Results) -> Finding:
    found = {case: runs(results["accuracy"], case, "auto") for case in ("sign_mlp", "quantised_cnn")}
    told = ", ".join(f"`{case}` {spread(values)}" for case, values in found.items())
    return Finding(_all([mean(values) > 0.93 for values in found.values()]), f"Test accuracy: {told}.")


def without_backpropagation(results: Results) -> Finding:
    found = results["without"]
    lost = {case: mean(runs(found, case, "bp")) - mean(runs(found, case, "op, reach 0")) for case in ("mlp", "resnet5")}
    told = ", ".join(
        f"`{case}` {spread(runs(found, case, 'op, reach 0'))} ({-value:+.3f})" for case, value in lost.items()
    )
    return Finding(_all([value <= 0.01 for value in lost.values()]), f"Accuracy, and beside backpropagation: {told}.")


def paper_setting(results: Results) -> Finding:
    found = {row: runs(results["alr"], "mlp", row) for row in ("bp", "alr 32")}
    behind = mean(found["bp"]) - mean(found["alr 32"])
    return Finding(
        HOLDS if behind <= 0.01 else FAILS,
        f"`mlp`, 32 copies: {spread(found['alr 32'])} against {spread(found['bp'])}.",
    )


def variance_grows_with_depth(results: Results) -> Finding:
    cases = {
        kind: [whole(results["depth"], feedback=kind, depth=depth) for depth in (3, 6, 9, 12)]
        for kind in ("none", "learned")
    }
    plain = [variance(one) for one in cases["none"]]
    told = ", ".join(f"{value:.1f}" for value in plain)
    cosines = ", ".join(f"{one['cosine']['value']:.2f}" for one in cases["learned"])
    return Finding(
        HOLDS if all(a < b for a, b in pairwise(plain)) else PARTLY,
        f"Variance of 32 copies over the squared gradient, 3, 6, 9, 12 layers: {told}. Learned feedback with a "
        f"reach of 1 has a cosine of {cosines} there.",
    )


def noise_is_fast(results: Results) -> Finding:
    ratios = [one["ratio"]["NumPy"]["median"] for one in results["speed"].data["elements"]]
    ok = min(ratios) >= 1.3
    return Finding(HOLDS if ok else PARTLY, f"`perturb`, NumPy over compiled: {min(ratios):.1f} to {max(ratios):.1f}.")


def tests_pass(results: Results) -> Finding:
    found = re.search(r"(\d+) passed", results["tests"].output)
    failed = re.search(r"(\d+) failed", results["tests"].output)
    ok = found is not None and failed is None
    return Finding(HOLDS if ok else FAILS, f"{found.group(1) if found else 0} tests passed.")
