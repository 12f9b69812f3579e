"""Every kernel beside its definition, as a table of calls to make on any device.

Run as a script, for what holds for a whole process: ``python kernel_cases.py interpret`` makes the calls on the CPU,
with ``TRITON_INTERPRET=1``, which must be set before Triton is imported; ``python kernel_cases.py compile`` compiles
them for a GPU that need not be there. Both print what went wrong in each as JSON.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import hypothesis
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import onward
from onward.compiler.driver import compile_model
from onward.compiler.program import CompiledModel
from onward.passes import ops
from onward.passes.graph import Layout
from onward.runtime.noise import kernels, packing
from onward.runtime.noise.distributions import NOISES
from onward.runtime.noise.kernels import proof
from onward.runtime.noise.rows import NoiseRows, Probe

SITE = 2
KEY, SMALL_KEY = torch.tensor([-(2**40) - 17, 2**31 + 5]), torch.tensor([-3, 5])
SIGMAS = torch.tensor([0.0, 1.0, 0.3])
BATCH = 3
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (sizes, dim, outer): elements of a sample and of the batch are no multiples of a tile, a block or a byte.
LAYOUTS = {
    "first": ([1, 37, 11], 0, 1),
    "second": ([3, 1, 211], 1, 1),
    "outer": ([2, 4, 67], 1, 2),
    "inner": ([6, 5], 0, 3),
    "none": ([3, 7, 61], -1, 1),
}
DENSE = {"bytes": ([1, 8, 131], 0, 1), "rows of bytes": ([3, 8, 49], 0, 1)}
"""Samples of whole bytes, first."""
ORDERS = {"pairs": [0, 2**31 + 3, -1, -(2**31) - 4], "mixed": [4, -1, 4, 0, -5], "one": [-12]}
ODD = [14972, ~40308]
"""Draws that were looked for: of `KEY` and `SITE` the first has two Gaussian zeros and one of Laplace from element 630
on, the other the cosine of a quarter turn at element 1088."""
FLAGS = (False, True)
SCORES, WEIGHTING = ("exact", "sign"), ("weighted_noise", "weighted_noise_sum")
SCALES = ("whole", "sample", "last")


class Case(NamedTuple):
    name: str
    kernel: str
    args: tuple[Any, ...]


def clean_shape(sizes: list[int], dim: int, copies: int = 1) -> list[int]:
    return [extent * BATCH * copies if axis == dim else extent for axis, extent in enumerate(sizes)]


def normal(shape: Iterable[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def noise_cases() -> Iterator[Case]:
    for noise, (where, layout), dtype in itertools.product(NOISES, LAYOUTS.items(), DTYPES):
        sizes, dim, _ = layout
        for order in ["one"] if where == "none" else ORDERS:
            copies = torch.tensor(ORDERS[order])
            named = f"{noise} {where} {order} {dtype}"
            for tiled, masked in itertools.product(FLAGS, FLAGS):
                z = normal(clean_shape(sizes, dim, len(copies) if tiled else 1), dtype=dtype)
                z.view(-1)[::7] = -0.0
                alive = normal(clean_shape(sizes, dim), 1) > 0 if masked else None
                args = (z, copies, KEY, SIGMAS, SITE, noise, *layout, tiled, alive)
                yield Case(f"perturb {named} {'tiled' * tiled} {'masked' * masked}", "perturb", args)
            for score, operator in itertools.product(SCORES, WEIGHTING):
                weights = normal([len(copies), BATCH], dtype=dtype)
                yield Case(f"{operator} {named} {score}", operator, (weights, copies, KEY, SITE, noise, score, *layout))


def sign_of_noise_cases() -> Iterator[Case]:
    """Where the sign of a number is not its lane's."""
    for noise, score, operator, dtype in itertools.product(("gaussian", "laplace"), SCORES, WEIGHTING, DTYPES):
        args = (normal([2, BATCH], dtype=dtype), torch.tensor(ODD), KEY, SITE, noise, score, *LAYOUTS["first"])
        yield Case(f"{operator} {noise} {score} {dtype} odd signs", operator, args)


def sign_cases() -> Iterator[Case]:
    for (where, layout), dtype, scaled in itertools.product((LAYOUTS | DENSE).items(), DTYPES, SCALES):
        sizes, dim, _ = layout
        ids = torch.tensor(ORDERS["one" if where == "none" else "mixed"])
        x = normal(clean_shape(sizes, dim, len(ids)), dtype=dtype)
        x.view(-1)[::5] = 0.0
        others = [axis for axis in range(x.dim()) if axis != dim]
        scales = {"whole": x.abs().amax(), "sample": x.abs().amax(others, True), "last": x.abs().amax(-1, True)}
        drawn = (x, scales[scaled], ids, SMALL_KEY, SITE)
        yield Case(f"stochastic_sign {where} {dtype} {scaled}", "stochastic_sign", (*drawn, *layout))
        for domain in ops.DOMAINS:
            named = f"pack_stochastic_signs {where} {dtype} {scaled} {domain}"
            yield Case(named, "pack_stochastic_signs", (*drawn, domain, *layout))


def packing_cases() -> Iterator[Case]:
    for domain, dim, dtype in itertools.product(ops.DOMAINS, [-1, 0, 1, 2], DTYPES):
        shape = [5, 31, 9]
        x = normal(shape, dtype=dtype)
        x.view(-1)[::3], x.view(-1)[1] = 0.0, torch.nan
        sizes = [7 if axis == dim else extent for axis, extent in enumerate(shape)]
        yield Case(f"pack_signs {domain} {dim} {dtype}", "pack_signs", (x, domain, dim))
        packed = packing.pack_signs(x, domain, dim)
        yield Case(f"unpack_signs {domain} {dim} {dtype}", "unpack_signs", (packed, domain, sizes, dim, dtype))


# (sizes of the noise, sizes of the signs) of a linear layer: samples in rows, with positions, as rows each
LINEAR = (
    ([1, 10], [1, 37]),
    ([1, 7, 64], [1, 7, 21]),
    ([5, 12], [5, 70]),
    ([1, 2, 3, 17], [1, 2, 3, 9]),
    ([1, 96], [1, 150]),
)
ODD_LINEAR = (([1, 407], [1, 9]), ([1, 408], [1, 9]))
# (sizes of the noise, sizes of the signs, window, stride, padding, dilation)
CONVOLUTIONS = (
    ([1, 5, 4, 4], [1, 3, 8, 8], [3, 3], [2, 2], [1, 1], [1, 1]),
    ([1, 16, 7, 7], [1, 16, 7, 7], [3, 3], [1, 1], [1, 1], [1, 1]),
    ([1, 70, 3, 7], [1, 8, 7, 5], [3, 2], [2, 1], [0, 3], [1, 4]),
    ([1, 6, 9], [1, 4, 20], [5], [2], [1], [1]),
    ([1, 33, 8, 8], [1, 17, 8, 8], [1, 1], [1, 1], [0, 0], [1, 1]),
)


def gradient_cases() -> Iterator[Case]:
    """Of weights, from packed signs, some of all combinations; every second without a bias."""
    forms = [("packed_linear_gradient", each) for each in LINEAR]
    forms += [("packed_convolution_gradient", each) for each in CONVOLUTIONS]  # type: ignore[misc]
    rows = itertools.product(NOISES, ORDERS, DTYPES, ops.DOMAINS, FLAGS, ("exact", "sign"), forms)
    for place, (noise, order, dtype, domain, scaled, score, (operator, (sizes, x_sizes, *rest))) in enumerate(
        thinned(rows, 29)
    ):
        copies = torch.tensor(ORDERS[order])
        x = normal(clean_shape(x_sizes, 0, len(copies)), place)
        x.view(-1)[::5] = 0.0
        scale = normal([len(x), *[1] * (x.dim() - 1)], 1, dtype).abs() if scaled else None
        weights = normal([len(copies), BATCH], 2, dtype)
        signs = (packing.pack_signs(x, domain, 0), scale, domain, x_sizes, 0)
        args: tuple[Any, ...] = (*signs, weights, copies, KEY, SITE, noise, score, sizes, 0, 1, dtype, place % 2 == 0)
        if rest:
            window, *described = rest
            args = (*args, torch.empty(sizes[1], x_sizes[1], *window, dtype=dtype), *described)
        named = f"{operator} {sizes} {x_sizes} {noise} {score} {order} {domain} {dtype} {'scaled' * scaled}"
        yield Case(named, operator, args)
    for noise, (sizes, x_sizes), dtype in itertools.product(("gaussian", "laplace"), ODD_LINEAR, DTYPES):
        packed = packing.pack_signs(normal(clean_shape(x_sizes, 0, 2)), "signed", 0)
        drawn = (normal([2, BATCH], dtype=dtype), torch.tensor(ODD), KEY, SITE, noise, "sign", sizes, 0, 1)
        args = (packed, None, "signed", x_sizes, 0, *drawn, dtype, True)
        yield Case(f"packed_linear_gradient {sizes} {noise} {dtype} odd signs", "packed_linear_gradient", args)


def product_cases() -> Iterator[Case]:
    layouts = [Layout((1, 45), 0, 1), Layout((1, 3, 64), 0, 1), Layout((1, 1, 7), 1, 1), Layout((2, 5), 0, 1)]
    draws = torch.tensor([3, -2, 2**31 + 9, 0])
    shapes = [(3, 5), (33, 70), (9, 20)]
    for layout, (samples, outputs), masked, transposed in itertools.product(layouts, shapes, FLAGS, FLAGS):
        shape = [extent * samples if axis == layout.dim else extent for axis, extent in enumerate(layout.sizes)]
        alive = {SITE: normal(shape) > 0} if masked else {}
        site: Any = SimpleNamespace(index=SITE, blocks=(), layout=layout, grid=layout)
        probe = Probe(
            torch.empty(len(draws), samples, outputs), torch.empty(samples, outputs), dict(alive), draws, SMALL_KEY
        )
        rows = NoiseRows(site, probe, "rademacher", torch.ones(samples, 1))
        right = normal([samples * len(draws) if transposed else layout.elements, outputs], 1)
        named = f"noise_product {layout.sizes} {samples}x{outputs} {'masked' * masked} {'transposed' * transposed}"
        yield Case(named, "noise_product", (right, rows, transposed, rows.alive))


TABLES: tuple[tuple[Callable[[], Iterator[Case]], int, int], ...] = (
    (noise_cases, 29, 7),
    (sign_of_noise_cases, 5, 5),
    (sign_cases, 17, 5),
    (packing_cases, 5, 5),
    (gradient_cases, 7, 17),
    (product_cases, 5, 1),
)
"""And one in how many the interpreter takes, a tenth of a second a case, and of those that differ in more than sizes
the compiler, a second each."""


def all_cases() -> Iterator[Case]:
    yield from itertools.chain(*(cases() for cases, _, _ in TABLES))


def moved(value: Any, device: torch.device) -> Any:
    """A call's argument on a device; what the definitions read on the host stays there."""
    if isinstance(value, NoiseRows):
        probe = value.probe
        alive = {site: mask.to(device) for site, mask in probe.alive.items() if mask is not None}
        probe = replace(probe, response=probe.response.to(device), alive=alive, key=probe.key.to(device))
        return replace(value, probe=probe, amplitudes=value.amplitudes.to(device))
    moves = isinstance(value, Tensor) and (value.dtype != torch.int64 or is_key(value))
    return value.to(device) if moves else value


def is_key(value: Any) -> bool:
    return value is KEY or value is SMALL_KEY


@contextmanager
def unread(keys: list[Tensor]) -> Iterator[None]:
    """A launch must not read its key on the host: one that was captured in a graph makes the noise of other steps."""
    read, places = Tensor.tolist, {key.data_ptr() for key in keys}

    def tolist(self: Tensor) -> Any:
        assert self.data_ptr() not in places, "the key was read on the host"
        return read(self)

    with mock.patch.object(Tensor, "tolist", tolist):
        yield


def check(case: Case, device: torch.device) -> None:
    """The kernel's result on a device against the definition's on the CPU, as `proof` compares them."""
    from onward.runtime.noise.kernels.table import KERNELS

    kernel = KERNELS[case.kernel]
    there = [moved(value, device) for value in case.args]
    assert kernel.fits(*there), "the kernel does not cover this call"
    expected = kernel.definition(*case.args)
    assert kernel.telling(expected, *case.args)
    with unread([value for value, given in zip(there, case.args, strict=True) if is_key(given)]):
        actual = kernel.launch(*there)
    assert actual.is_contiguous()
    difference = proof._difference(kernel, expected, actual.cpu(), *case.args)
    assert difference is None, difference
    few = kernel.excerpt(*case.args)
    if few is not None:
        assert proof.kind_of(kernel, *few) == proof.kind_of(kernel, *case.args)
        assert kernel.fits(*few)


def check_scale_of_zero(dtype: torch.dtype, tiled: bool, device: torch.device) -> None:
    from onward.runtime.noise.kernels.noise import perturb

    z = torch.tensor([[-0.0, 0.0, 1.0, -torch.inf, torch.nan]], dtype=dtype)
    given = z.repeat(2, 1) if tiled else z
    arguments = (given.to(device), torch.tensor([0, -1]), KEY, SIGMAS.to(device))
    result = perturb(*arguments, 0, "gaussian", [1, 5], 0, 1, tiled).cpu()
    assert result.view(torch.uint8).tolist() == z.repeat(2, 1).view(torch.uint8).tolist()


def check_any_packing(device: torch.device) -> None:
    @hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @hypothesis.given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=4), data=st.data())
    def pack_and_unpack(shape: list[int], data: st.DataObject) -> None:
        dim = data.draw(st.integers(-1, len(shape) - 1))
        x = normal(shape)
        x.view(-1)[0] = 1.0
        check(Case("", "pack_signs", (x, "signed", dim)), device)
        packed = packing.pack_signs(x, "signed", dim)
        check(Case("", "unpack_signs", (packed, "signed", shape, dim, torch.float32)), device)

    pack_and_unpack()


def check_stretches_and_chains(device: torch.device) -> None:
    """A sum of one stretch and many chains, where it would be of many stretches; and the same bits a second time."""
    from onward.runtime.noise.kernels import gradients

    case = next(case for case in gradient_cases() if "[1, 17, 8, 8]" in case.name and "float32" in case.name)
    there = [moved(value, device) for value in case.args]
    assert gradients.convolution_form(*case.args).stretches > 1
    assert torch.equal(*(gradients.packed_convolution_gradient(*there) for _ in range(2)))
    with mock.patch.multiple(gradients, PROGRAMS=1, CHAIN=64):
        assert gradients.convolution_form(*case.args).stretches == 1
        check(case, device)


def other_checks() -> Iterator[tuple[str, Callable[[torch.device], None]]]:
    for dtype, tiled in itertools.product(DTYPES, FLAGS):
        yield f"a scale of zero {dtype} {tiled}", partial(check_scale_of_zero, dtype, tiled)
    yield "any packing", check_any_packing
    yield "stretches and chains", check_stretches_and_chains


def small_net(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """And a batch."""
    x, y = torch.rand(5, 1, 6, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1])
    torch.manual_seed(0)
    convolutions = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU()
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 3))
    return model.to(device), x.to(device), y.to(device)


def gradients(compiled: CompiledModel, device: torch.device) -> Tensor:
    """Of the second step of the small net."""
    model, x, y = small_net(device)
    program = onward.Program(model, compiled, F.cross_entropy, 0)
    for _ in range(2):
        model.zero_grad()
        program.step(x, y)
    return torch.cat([parameter.grad.flatten().cpu() for parameter in model.parameters()])


def steps() -> Iterator[tuple[str, onward.LikelihoodRatio, set[str]]]:
    """Estimators, and the kernels that a step takes with them."""
    learned = {"noise": "rademacher", "copies": 2, "warmup": 0, "reach": 0, "correction": "full"}
    used = {"perturb", "weighted_noise_sum", "noise_product"}
    yield "learned feedback", onward.LikelihoodRatio.feedback_learned(**learned), used
    signs = {"perturb", "weighted_noise_sum", "pack_signs", "unpack_signs"}
    drawn = {"stochastic_sign", "pack_stochastic_signs"}
    own = {"weighted_noise", "packed_linear_gradient", "packed_convolution_gradient"}  # captures of the copies' own
    stochastic = onward.LikelihoodRatio(noise="laplace", copies=2, capture="stochastic", groups="joint")
    yield "stochastic capture", stochastic, signs | drawn | own
    yield "ALR", onward.LikelihoodRatio.alr(copies=2), signs | own


def check_step(estimator: onward.LikelihoodRatio, used: set[str], device: torch.device) -> None:
    """Training steps with kernels in the place of the definitions: those that should be used are, and all hold."""
    compiled = compile_model(*small_net(device)[:2], estimator)
    with mock.patch.object(proof, "proved", lambda kernel, *args: kernel.definition(*args)):
        expected = gradients(compiled, device)
    proof._verdicts.clear()
    actual = gradients(compiled, device)
    assert {kind[0] for kind in proof._verdicts} == used, proof._verdicts
    assert all(proof._verdicts.values()), proof._verdicts
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def thinned(cases: Iterable[Any], stride: int) -> list[Any]:
    """Every so-and-so-many case. A stride that shares no factor with the number of values of any column leaves every
    value of each with every value of any other."""
    return list(itertools.islice(cases, 0, None, stride))


def cut_to_tf32() -> None:
    """Have Triton's interpreter, which multiplies in float32, cut off what a matrix unit does not read of tf32."""
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, total: Any, precision: Any, *rest: Any) -> Any:
        if precision == ir.INPUT_PRECISION.TF32:
            a, b = (TensorHandle((x.data.view("u4") & 0xFFFFE000).view("f4"), x.dtype) for x in (a, b))
        return multiply(self, a, b, total, precision, *rest)

    InterpreterBuilder.create_dot = create_dot


def interpreted() -> Iterator[tuple[str, Callable[[], None]]]:
    cut_to_tf32()
    for case in itertools.chain.from_iterable(thinned(cases(), stride) for cases, stride, _ in TABLES):
        yield case.name, partial(check, case, CPU)
    for name, other in other_checks():
        yield name, partial(other, CPU)
    kernels.register("CPU")  # from here on the operators run kernels
    for name, estimator, used in steps():
        yield f"a step of {name}", partial(check_step, estimator, used, CPU)


def compiled() -> Iterator[tuple[str, Callable[[], None]]]:
    """Each kernel as a call compiles it for an H100, down to machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda _: 0
    )
    triton.runtime.driver.set_active(driver)
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        result = run(self, *args, grid=grid, warmup=True, **options)
        assert "cubin" in result.asm
        fused = re.findall(r"\b(?:fma|mad)\.\w*\.?f32|approx|ftz", result.asm["ptx"])
        assert not fused or self.fn.__module__.endswith("product"), f"not the definition's rounding: {fused}"
        on_matrix_units = re.search(r"\bw?g?mma\.\S+\.tf32\.tf32", result.asm["ptx"])
        assert on_matrix_units or not self.fn.__module__.endswith("gradients")

    JITFunction.run = compile_only
    from onward.runtime.noise.kernels.table import KERNELS

    for cases, _, stride in TABLES:
        for case in thinned(distinct(cases()), stride):
            yield case.name, partial(KERNELS[case.kernel].launch, *case.args)


def distinct(cases: Iterator[Case]) -> Iterator[Case]:
    """Those that differ in dtypes, noise, score or domain."""
    seen = set()
    for case in cases:
        names = [value for value in case.args if isinstance(value, (str, torch.dtype))]
        kind = (case.kernel, case.args[0].dtype, *names, "transposed" in case.name)
        if kind not in seen:
            seen.add(kind)
            yield case


if __name__ == "__main__":
    warnings.simplefilter("error")
    outcomes = {}
    for case_name, run_case in {"interpret": interpreted, "compile": compiled}[sys.argv[1]]():
        try:
            run_case()
            outcomes[case_name] = ""
        except Exception:
            outcomes[case_name] = traceback.format_exc()
    json.dump(outcomes, sys.stdout)
