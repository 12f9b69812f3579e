"""What the benchmarks share: interleaved timing, exclusive timing, peak memory, tables."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console

from onward.evidence.provenance import describe, machine

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""``"cpu"`` is the time this process ran, waiting excluded: for one thread on a machine shared with others."""


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)

    def show(self, decimals: int = 2) -> str:
        """``median [first quartile, third quartile]``."""
        return f"{self.median:.{decimals}f} [{self.low:.{decimals}f}, {self.high:.{decimals}f}]"


def interleave(
    variants: Mapping[str, Callable[[], object]], rounds: int, clock: Clock, device: torch.device, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every variant in every round: A B C A B C …, so that what disturbs the machine disturbs all alike.

    The n-th times of all variants are of the same round: compare those. Every other round runs backwards. In each, a
    variant runs once uncounted first: as in training, where a step follows a step, it finds its own data in the caches.
    """
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for name in names if number % 2 == 0 else reversed(names):
            variants[name]()
            synchronize(device)
            begun = clock()
            variants[name]()
            synchronize(device)
            if number >= 0:
                times[name].append(clock() - begun)
    return times


def announce(threads: int | None, width: int = 120) -> tuple[Console, dict[str, Any]]:
    """Set torch's threads, if they are given, and print where a benchmark runs: a console that is so wide where it is
    no terminal, and `machine`."""
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(width=None if Console().is_terminal else width)
    found = machine(torch.device("cpu"))
    console.print(describe(found), highlight=False)
    return console, found


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Exclusive times by name: what a timed function spends in another timed function counts for that one only."""

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self.clock, self.device = clock, device
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def timing(self, name: str) -> Any:
        """Count the block for `name`."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def _switch(self) -> None:
        synchronize(self.device)
        now = self.clock()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time counted for `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timing(name):
                return function(*args, **kwargs)

        return timed


def peak_memory(prepare: Callable[..., Callable[[], object]], *args: Any) -> float:
    """MiB by which memory grows at most while ``prepare(*args)()`` runs again, in a fresh process.

    The second call counts, so what stays (gradients, caches) is not in it. On a CPU: the high-water mark of the
    resident set, NumPy's buffers included, above its level before the call (Linux resets the mark on request; elsewhere
    the growth of ``ru_maxrss``, which misses what fits below the peak of the compiler). On a GPU: torch's allocator.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["torch", "onward"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, torch.get_num_threads(), prepare, args))
    process.start()
    sender.close()
    try:
        grown: float = receiver.recv()
    except EOFError:
        raise RuntimeError(f"the process that measured the memory of {args} failed (see above).") from None
    finally:
        process.join()
    return grown


def _measure(sender: Any, threads: int, prepare: Callable[..., Callable[[], object]], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    run = prepare(*args)
    run()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        sender.send((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    _trim_heap()
    before = _reset_high_water()
    run()
    sender.send((_high_water() - before) / 2**10)


def _trim_heap() -> None:
    """Give freed memory back, or the step would use it again unnoticed."""
    import ctypes

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def _reset_high_water() -> int:
    """KiB that are resident now; the high-water mark starts anew from there, if the system can do that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") or _high_water()


def _high_water() -> int:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)
