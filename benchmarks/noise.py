"""What noise costs on a CPU: the compiled operators beside NumPy's, beside torch's own generator, and beside memory.

    python benchmarks/noise.py

Per element of a perturbed tensor: `perturb`, compiled and as NumPy defines it, ``torch.add`` of a tensor of the
result's size to the same clean one (what adding noise costs that is there already), and ``torch.randn`` of as many
numbers. Then whole calls for small tensors, the first calls in a process, and two threads that make noise at once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import CLOCKS, Clock, Spread, interleave
from rich.console import Console
from rich.table import Table
from torch import Tensor

from onward.evidence.provenance import describe, machine
from onward.passes import ops
from onward.runtime.noise import cpu_kernels
from onward.runtime.noise import operators as definitions
from onward.runtime.noise.distributions import NOISES

KEY, SIGMAS, CPU = torch.tensor([2**40 + 17, 5]), torch.tensor([0.1]), torch.device("cpu")
PAIR = torch.tensor([0, -1])
SIZES = {"in the cache": 1 << 17, "in memory": 3 << 20}
"""Elements of a clean tensor. Two copies stay below 32 MB, from where malloc asks the system for every tensor anew and
each page's first touch costs more than the noise."""
CALLS = 200
"""Small calls that are timed together."""


def perturbing(perturb: Callable[..., Tensor], z: Tensor, copies: Tensor, noise: str) -> Callable[[], Tensor]:
    return lambda: perturb(z, copies, KEY, SIGMAS, 0, noise, [1, z.shape[1]], 0, 1, False)


def per_element(rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """Nanoseconds an element of the result, and ratios within a round."""
    rows = []
    for where, elements in SIZES.items():
        z = torch.randn(elements // 1024, 1024)
        for noise in NOISES:
            for copies in (torch.tensor([0]), PAIR):
                count = elements * len(copies)
                other = torch.randn(len(copies), *z.shape)
                times = interleave(
                    {
                        "compiled": perturbing(ops.perturb, z, copies, noise),
                        "NumPy": perturbing(definitions.perturb, z, copies, noise),
                        "torch.add": lambda z=z, other=other: torch.add(z, other),
                        "torch.randn": lambda count=count: torch.randn(count),
                    },
                    rounds,
                    clock,
                    CPU,
                )
                row: dict[str, Any] = {"where": where, "noise": noise, "copies": len(copies)}
                row["ns"] = {name: Spread.of([1e9 * t / count for t in each]).median for name, each in times.items()}
                row["ratio"] = {
                    name: Spread.of([t / ours for t, ours in zip(times[name], times["compiled"], strict=True)])
                    for name in ("NumPy", "torch.add", "torch.randn")
                }
                rows.append(row)
    return rows


def per_call(rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """Microseconds of a call for 32 samples of 64 elements and two copies, from Python through torch's dispatcher."""
    z, weights, tiled = torch.randn(32, 64), torch.randn(2, 32), torch.randn(64, 64)
    layout = ([1, 64], 0, 1)
    calls: dict[str, tuple[str, tuple[Any, ...]]] = {
        f"perturb, {noise}": ("perturb", (z, PAIR, KEY, SIGMAS, 0, noise, *layout, False)) for noise in NOISES
    }
    for name in ("weighted_noise", "weighted_noise_sum"):
        calls[name] = (name, (weights, PAIR, KEY, 0, "rademacher", "exact", *layout))
    calls["stochastic_sign"] = ("stochastic_sign", (tiled, tiled.abs().amax(1, True), PAIR, KEY, 0, *layout))
    calls["keyed_random"] = ("keyed_random", (KEY, 0, "uniform", [32, 64], torch.float32, CPU))
    rows = []
    for title, (name, args) in calls.items():

        def many(function: Callable[..., Tensor], args: tuple[Any, ...] = args) -> None:
            with torch.inference_mode():
                for _ in range(CALLS):
                    function(*args)

        ways = {"compiled": getattr(torch.ops.onward, name).default, "NumPy": getattr(definitions, name)}
        times = interleave({way: partial(many, function) for way, function in ways.items()}, rounds, clock, CPU)
        medians = {kind: Spread.of([1e6 * t / CALLS for t in each]).median for kind, each in times.items()}
        rows.append({"call": title, "us": medians})
    return rows


FIRST = """
import sys, time, torch
from onward.passes import ops
from onward.runtime.noise import operators
begun = time.perf_counter()
import numba
imported = time.perf_counter()
z, copies, key = torch.ones(4, 8), torch.tensor([0, -1]), torch.tensor([1, 2])
ops.perturb(z, copies, key, torch.tensor([0.1]), 0, "rademacher", [1, 8], 0, 1, False)
perturbed = time.perf_counter()
ops.weighted_noise_sum(torch.ones(2, 4), copies, key, 0, "rademacher", "exact", [1, 8], 0, 1)
print(imported - begun, perturbed - imported, time.perf_counter() - perturbed)
"""


def first_calls() -> dict[str, list[float]]:
    """Seconds to import Numba, of the first `perturb` and of the first `weighted_noise_sum`, in fresh processes."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for title in ("compiled", "from Numba's cache"):
            done = subprocess.run(
                [sys.executable, "-c", FIRST],
                env=os.environ | {"NUMBA_CACHE_DIR": folder},
                check=True,
                capture_output=True,
                text=True,
            )
            found[title] = [float(value) for value in done.stdout.split()]
    return found


def overlap(rounds: int) -> dict[str, Spread]:
    """Of two equal calls the time one after the other ÷ the time in two threads: 2 where they overlap wholly."""
    ratios = {}
    z = torch.randn(128, 1024)
    for noise in NOISES:
        call = perturbing(ops.perturb, z, PAIR, noise)
        repeated = lambda call=call: [call() for _ in range(20)]  # noqa: E731
        with ThreadPoolExecutor(2) as pool:
            times = interleave(
                {
                    "in turn": lambda repeated=repeated: (repeated(), repeated()),
                    "at once": lambda repeated=repeated, pool=pool: list(pool.map(lambda _: repeated(), range(2))),
                },
                rounds,
                CLOCKS["wall"],
                CPU,
            )
        ratios[noise] = Spread.of([a / b for a, b in zip(times["in turn"], times["at once"], strict=True)])
    return ratios


def element_table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="Nanoseconds an element of the result (medians; ratios with quartiles)", title_justify="left")
    for heading in ("", "noise", "copies", "compiled", "NumPy", "torch.add", "torch.randn"):
        shown.add_column(heading, justify="left" if heading in ("", "noise") else "right")
    for heading in ("NumPy ÷", "torch.add ÷", "torch.randn ÷"):
        shown.add_column(heading, justify="right")
    for row in rows:
        times = (f"{row['ns'][name]:.3f}" for name in ("compiled", "NumPy", "torch.add", "torch.randn"))
        ratios = (row["ratio"][name].show() for name in ("NumPy", "torch.add", "torch.randn"))
        shown.add_row(row["where"], row["noise"], str(row["copies"]), *times, *ratios)
    return shown


def call_table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="Microseconds a call, 32 × 64 elements, two copies (medians)", title_justify="left")
    for heading in ("call", "compiled", "NumPy"):
        shown.add_column(heading, justify="left" if heading == "call" else "right")
    for row in rows:
        shown.add_row(row["call"], f"{row['us']['compiled']:.1f}", f"{row['us']['NumPy']:.1f}")
    return shown


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="torch's, for torch.add and torch.randn")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="'cpu' on a machine shared with others")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if not cpu_kernels.registered:
        parser.error("the compiled operators are left out: install Numba (pip install 'onward[fast]').")
    console = Console(width=None if Console().is_terminal else 140)
    found = machine(CPU)
    console.print(describe(found), highlight=False)
    clock = CLOCKS[options.clock]
    elements, calls = per_element(options.rounds, clock), per_call(options.rounds, clock)
    console.print(element_table(elements))
    console.print(call_table(calls))
    first, threads = first_calls(), overlap(options.rounds)
    for title, (imported, perturbed, summed) in first.items():
        console.print(
            f"First calls, {title}: import of Numba {imported:.2f} s, perturb {perturbed:.2f} s, "
            f"weighted_noise_sum {summed:.2f} s",
            highlight=False,
        )
    shown = ", ".join(f"{noise} {spread.show()}" for noise, spread in threads.items())
    console.print(f"Two threads, time in turn ÷ at once: {shown}", highlight=False)
    if options.json is not None:
        result = {"machine": found, "elements": elements, "calls": calls, "first": first, "threads": threads}
        options.json.write_text(json.dumps(result, indent=2, default=vars) + "\n")


if __name__ == "__main__":
    main()
