"""The time and memory of a step beside the least it can cost, a naive implementation, and backpropagation.

    python benchmarks/step.py --threads 1
    python benchmarks/step.py --models resnet5 --copies 16 --profile --json step.json

The limit of a step is inference: the model in eval mode, under ``no_grad``, on as many samples as the step runs
forwards of (the clean batch, and the batch tiled as often as there are copies; a suffix counts by its share of the
FLOPs). All variants run in turn, A B C A B C …, and every ratio is formed within a round: medians and quartiles of
those are printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import CLOCKS, Clock, Spread, Stopwatch, interleave, peak_memory, synchronize
from naive import NaiveLikelihoodRatio
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from onward import LikelihoodRatio, Program, models
from onward import compile as compile_program
from onward.evidence.provenance import describe, machine
from onward.passes import ops
from onward.runtime.noise import cpu_kernels
from onward.runtime.plan import Forward

Step = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """An estimator, by the copies it is asked for."""

    estimator: Callable[[int], LikelihoodRatio]
    encode: str = "none"
    """What the naive implementation beside it does."""
    own_copies: int | None = None
    """The copies it takes whatever is asked for."""


SETTINGS: dict[str, Setting] = {
    "joint exact": Setting(lambda copies: LikelihoodRatio(groups="joint", copies=copies)),
    "joint alr": Setting(lambda copies: LikelihoodRatio.alr(copies=copies), encode="sign"),
    "joint stochastic": Setting(lambda copies: LikelihoodRatio(groups="joint", copies=copies, capture="stochastic")),
    "joint alive": Setting(lambda copies: LikelihoodRatio(groups="joint", copies=copies, placement="alive")),
    "layerwise exact": Setting(lambda copies: LikelihoodRatio(groups="layerwise", copies=copies)),
    "learned": Setting(lambda copies: LikelihoodRatio.feedback_learned(copies=copies), own_copies=2),
    "learned, reach 1": Setting(lambda copies: LikelihoodRatio.feedback_learned(copies=copies, reach=1), own_copies=2),
}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": models.mlp,
    "resnet5": lambda: models.resnet5(num_classes=10, in_channels=1),
}


@dataclass(frozen=True)
class Row:
    """What was measured of one setting."""

    model: str
    setting: str
    copies: int
    forwards: float
    """Forwards of a sample in a step, the clean one included."""
    step_ms: Spread
    limit_ms: Spread
    step_over_limit: Spread
    step_over_naive: Spread
    step_over_backpropagation: Spread
    peak_mib: float | None = None
    naive_peak_mib: float | None = None
    inference_peak_mib: float | None = None


# ---------------------------------------------------------------------------------------------------------- variants


def build(model: str, batch: int, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """The model and a batch shaped like the digits."""
    torch.manual_seed(0)
    return (
        MODELS[model]().to(device),
        torch.randn(batch, 1, 8, 8, device=device),
        torch.randint(0, 10, (batch,), device=device),
    )


def onward_program(model: str, setting: str, copies: int, batch: int, device: torch.device) -> tuple[Program, Step]:
    """The compiled program and its step."""
    net, inputs, target = build(model, batch, device)
    program = compile_program(net, (inputs,), loss=F.cross_entropy, estimator=SETTINGS[setting].estimator(copies))
    return program, lambda: program.step(inputs, target)


def prepare(kind: str, model: str, copies: int, batch: int, device: torch.device) -> Step:
    """One variant, ready to run: ``onward <setting>``, ``inference``, ``naive <encode>`` or ``backpropagation``."""
    net, inputs, target = build(model, batch, device)
    name, _, option = kind.partition(" ")
    if name == "onward":
        return onward_program(model, option, copies, batch, device)[1]
    if name == "inference":
        net.eval()
        tiled = inputs.repeat(copies, 1, 1, 1)
        return torch.no_grad()(lambda: net(tiled))
    if name == "naive":

        def losses(output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output, target, reduction="none")

        plain = NaiveLikelihoodRatio(net, losses, copies=copies, encode=option)
        return lambda: plain.step(inputs, target)
    assert name == "backpropagation"
    return lambda: F.cross_entropy(net(inputs), target).backward()


# --------------------------------------------------------------------------------------------------------- measuring


def measure(model: str, copies: list[int], options: argparse.Namespace, device: torch.device) -> list[Row]:
    """All settings of one model, timed in turn with what they are compared to."""
    cases = []
    for number in copies:
        for name, setting in SETTINGS.items():
            case = (name, setting.own_copies or number)
            if name in options.settings and case not in cases:
                cases.append(case)
    clock = CLOCKS[options.clock]
    where = (options.batch, device)
    variants: dict[str, Step] = {
        "backpropagation": prepare("backpropagation", model, 1, *where),
        "inference 1": prepare("inference", model, 1, *where),
    }
    programs = {}
    for name, count in cases:
        variants.setdefault(f"inference {count}", prepare("inference", model, count, *where))
        encode = SETTINGS[name].encode
        variants.setdefault(f"naive {encode} {count}", prepare(f"naive {encode}", model, count, *where))
        programs[name, count], variants[f"onward {name} {count}"] = onward_program(model, name, count, *where)
    times = interleave(variants, options.repeats, clock, device)
    rows = []
    for (name, count), program in programs.items():
        share = sum(run.share for run in program.compiled.runs)
        step, naive = times[f"onward {name} {count}"], times[f"naive {SETTINGS[name].encode} {count}"]
        clean, tiled = times["inference 1"], times[f"inference {count}"]
        limit = [one + share * all_copies for one, all_copies in zip(clean, tiled, strict=True)]
        memory = measure_memory(model, name, count, options, device)
        ratios = (ratio(step, limit), ratio(step, naive), ratio(step, times["backpropagation"]))
        rows.append(Row(model, name, count, 1 + share * count, in_ms(step), in_ms(limit), *ratios, *memory))
    return rows


def measure_memory(
    model: str, setting: str, copies: int, options: argparse.Namespace, device: torch.device
) -> tuple[float, ...]:
    """Peak MiB of the step, of the naive implementation and of inference; nothing if not wanted."""
    if not options.memory:
        return ()
    kinds = (f"onward {setting}", f"naive {SETTINGS[setting].encode}", "inference")
    return tuple(memory_of(kind, model, copies, options.batch, device) for kind in kinds)


_KNOWN: dict[tuple[Any, ...], float] = {}


def memory_of(kind: str, model: str, copies: int, batch: int, device: torch.device) -> float:
    """Each variant is measured once."""
    case = (kind, model, copies, batch, device)
    if case not in _KNOWN:
        _KNOWN[case] = peak_memory(prepare, *case)
    return _KNOWN[case]


def in_ms(seconds: list[float]) -> Spread:
    return Spread.of([1000 * value for value in seconds])


def ratio(ours: list[float], theirs: list[float]) -> Spread:
    """Round by round."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


# --------------------------------------------------------------------------------------------------------- profiling

PARTS = ("noise", "signs", "forward graphs", "gradient graphs", "loss", "learning", "around the graphs")
"""Noise: the operators that make random numbers, addition and weighting included. Signs: packing and unpacking. Graphs:
the rest of the forward and gradient subgraphs, torch kernels and their dispatch. Around the graphs: the checks of the
batch and the model, the executor and the writing of ``.grad``."""

OPERATORS = {
    "perturb": "noise", "tile": "noise", "weighted_noise": "noise", "weighted_noise_sum": "noise",
    "stochastic_sign": "noise", "keyed_random": "noise", "pack_signs": "signs", "unpack_signs": "signs",
    "pack_stochastic_signs": "signs",
}  # fmt: skip


def profile(program: Program, step: Step, repeats: int, clock: Clock, device: torch.device) -> dict[str, float]:
    """Milliseconds a step by part, medians: the executor's callables and the operators in them, timed exclusively.

    A timed call costs a microsecond or two, which the part around it is charged for.
    """
    watch = Stopwatch(clock, device)
    executor = program.executor
    step()  # fuses small graphs
    for (_, fused), graph in executor.together.items():
        part = "forward graphs" if isinstance(fused.actions[0], Forward) else "gradient graphs"
        graph.forward = watch.wrap(part, graph.forward)
    for graph in (*executor.stages, *executor.runs):
        graph.forward = watch.wrap("forward graphs", graph.forward)
    for graph, _ in executor.gradients.values():
        graph.forward = watch.wrap("gradient graphs", graph.forward)
    program.loss.__class__ = _timed_class(program.loss, watch)
    if program._output_gradient is not None:
        program._output_gradient.__class__ = _timed_class(program._output_gradient, watch)
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    with _timed_operators(watch), _timed_learning(watch):
        for number in range(repeats + 2):
            watch.seconds.clear()
            synchronize(device)
            with watch.timing("around the graphs"):
                step()
            if number >= 2:
                for part in PARTS:
                    found[part].append(1000 * watch.seconds[part])
    return {part: Spread.of(values).median for part, values in found.items()}


def _timed_class(instance: Any, watch: Stopwatch) -> type:
    """A subclass whose calls are timed as the loss."""
    return type("Timed", (type(instance),), {"__call__": watch.wrap("loss", type(instance).__call__)})


class _Patched:
    """Attributes replaced for the length of a ``with`` block."""

    def __init__(self, *replacements: tuple[Any, str, Any]) -> None:
        self.replacements = replacements
        self.before = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]

    def __enter__(self) -> None:
        for owner, name, value in self.replacements:
            setattr(owner, name, value)

    def __exit__(self, *_: object) -> None:
        for owner, name, value in self.before:
            setattr(owner, name, value)


def _timed_operators(watch: Stopwatch) -> _Patched:
    """Graphs reach an operator as ``torch.ops.onward.<name>.default``, the runtime as ``ops.<name>``, and both what is
    compiled for a CPU by ``cpu_kernels.call(name, …)``."""
    replacements: list[tuple[Any, str, Any]] = []
    for name, part in OPERATORS.items():
        packet = getattr(torch.ops.onward, name)
        timed = watch.wrap(part, packet.default)
        replacements += [(packet, "default", timed), (ops, name, timed)]
    call = cpu_kernels.call

    def compiled(name: str, *args: Any, **named: Any) -> Tensor:
        with watch.timing(OPERATORS.get(name, "noise")):
            return call(name, *args, **named)

    return _Patched(*replacements, (cpu_kernels, "call", compiled))


def _timed_learning(watch: Stopwatch) -> _Patched:
    from onward.runtime.execution import bound

    return _Patched((bound, "learn", watch.wrap("learning", vars(bound)["learn"])))


# ---------------------------------------------------------------------------------------------------------- printing


def time_table(model: str, batch: int, rows: list[Row]) -> Table:
    """What was measured of one model."""
    table = Table(title=f"{model}, batch of {batch}: time of a step (medians, quartiles)", title_justify="left")
    table.add_column("setting")
    for heading in ("copies", "forwards", "step, ms", "limit, ms", "÷ limit", "÷ naive", "÷ backprop."):
        table.add_column(heading, justify="right")
    with_memory = any(row.peak_mib is not None for row in rows)
    if with_memory:
        for heading in ("peak, MiB", "naive", "inference"):
            table.add_column(heading, justify="right")
    for row in rows:
        cells = [row.setting, str(row.copies), f"{row.forwards:.1f}", f"{row.step_ms.median:.2f}"]
        cells += [f"{row.limit_ms.median:.2f}", row.step_over_limit.show(), row.step_over_naive.show()]
        cells.append(row.step_over_backpropagation.show(1))
        memory = (row.peak_mib, row.naive_peak_mib, row.inference_peak_mib)
        table.add_row(*cells, *[f"{value:.1f}" for value in memory if value is not None])
    return table


def profile_table(model: str, found: dict[tuple[str, int], dict[str, float]], rows: list[Row]) -> Table:
    """What stands between a step and its limit."""
    table = Table(title=f"{model}: where a step's time goes, ms (share)", title_justify="left")
    table.add_column("setting")
    for heading in ("copies", *PARTS, "sum", "limit"):
        table.add_column(heading, justify="right")
    limits = {(row.setting, row.copies): row.limit_ms.median for row in rows}
    for (setting, copies), parts in found.items():
        total = sum(parts.values())
        cells = [f"{parts[part]:.2f} ({parts[part] / total:.0%})" for part in PARTS]
        table.add_row(setting, str(copies), *cells, f"{total:.2f}", f"{limits[setting, copies]:.2f}")
    return table


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--copies", nargs="+", type=int, default=[16, 64], metavar="K")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--batch", type=int, default=64, metavar="N")
    parser.add_argument("--repeats", type=int, default=15, help="rounds, after one of warm-up")
    parser.add_argument("--threads", type=int, help="torch's threads; with 1, others on the machine disturb least")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: waiting not counted")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true", help="also show where a step's time goes")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the peak memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    options = arguments(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    console = Console(width=None if Console().is_terminal else 200)
    result: dict[str, Any] = {"machine": machine(device), "batch": options.batch, "clock": options.clock}
    console.print(describe(result["machine"]), highlight=False)
    rows: list[Row] = []
    profiles = []
    for model in options.models:
        measured = measure(model, options.copies, options, device)
        rows += measured
        console.print(time_table(model, options.batch, measured))
        if options.memory:
            backpropagation = memory_of("backpropagation", model, 1, options.batch, device)
            result.setdefault("backpropagation_peak_mib", {})[model] = backpropagation
            console.print(f"peak of backpropagation: {backpropagation:.1f} MiB", highlight=False)
        if options.profile:
            parts = {}
            for row in measured:
                case = onward_program(model, row.setting, row.copies, options.batch, device)
                found = profile(*case, options.repeats, CLOCKS[options.clock], device)
                parts[row.setting, row.copies] = found
                profiles.append({"model": model, "setting": row.setting, "copies": row.copies, "ms": found})
            console.print(profile_table(model, parts, measured))
    result |= {"rows": [asdict(row) for row in rows], "profiles": profiles, "load_after": machine(device)["load"]}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
