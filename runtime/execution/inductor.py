"""Graphs compiled by torch's inductor: a graph's operations as loops in C++ on a CPU, in Triton on a GPU.

A graph of a step is one of aten's operators already, so it goes to inductor as it is (``standalone_compile``), without
``torch.compile``'s tracing and guards, whose limits would leave it uncompiled silently. Noise stays what it is: the
operators of `passes.ops` are opaque, and called with the same arguments. The results are those of plain FX to rounding,
and the same from run to run (``deterministic``: no choice is timed).

A graph is compiled at its first call for tensors of a `Kind`: the same shapes, strides and dtypes, and the same numbers
beside them, which become constants. There are at most `MOST_KINDS` of a graph, usually those of an epoch's batches and
of its last. Calls of any other kind go the plain way, as do those with gradients enabled, under a mode that has to see
the operations (fake tensors, ``torch.func``, a FLOP counter), and of a graph that reads or returns something else, as a
stage does that hands on the several results of one operator.

**Proof before use, and after**: what a compiled graph returns is compared with plain FX on the same inputs at its first
call, when much may still be zero, and at every power of two after it. If it differs, or inductor cannot compile it, a
warning says so and that graph is plain FX from then on. A model with jumps (signs, rounding) may be refused without
being wrong: where rounding crosses a threshold its numbers differ by the whole jump.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._functorch import peek_interpreter_stack

from ...compiler.program import output_keys
from ...passes.errors import OptionError
from ...passes.graph import placeholders
from ..finite import alike, largest
from ..out_of_memory import is_out_of_memory
from .precision import autocast_dtypes

MOST_KINDS = 4
"""Kinds of inputs that a graph is compiled for."""

CROSSING = 1e-3
"""Share of a tensor of bits or whole numbers that may differ: as many are within rounding of a threshold."""

CANCELLED = 100
"""Units of rounding of a graph's largest output that any of its outputs may differ by: where a sum cancels, as the
gradient of a bias in front of batch normalisation does, all of it is rounding of what was added."""

Kind = tuple[Any, ...]
"""All that a compiled graph depends on, but for the numbers in its tensors."""

_COMPILING = threading.Lock()
"""Inductor's state is the process's."""

_IGNORED = ("`torch.jit.script_method` is deprecated", "TensorFloat32 tensor cores")
"""How warnings begin that importing inductor, and compiling, give the user for no fault of his."""


class Inductor:
    """Inductor as the graphs of one program use it.

    Attributes:
        compiled: how many graphs were compiled, each kind of their inputs counted.
        seconds: how long that took, the comparison included.
        refused: why, by the names of the graphs that went back to plain FX.
        paused: whether graphs are called the plain way.

    Raises:
        OptionError: what inductor compiles with is missing: a C++ compiler, or Triton on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        _demand_compiler(device)
        self.compiled, self.seconds = 0, 0.0
        self.refused: dict[str, str] = {}
        self.paused = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """For calls that are made too seldom to be worth a compilation."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def refuse(self, name: str, reason: str) -> None:
        """Of a graph, which goes back to plain FX."""
        self.refused[name] = reason
        warnings.warn(f"inductor: {name} {reason}. It runs in plain FX from now on.", stacklevel=2)


class InductorGraph:
    """A graph's function by inductor, beside `plain`, the one that defines it."""

    def __init__(self, inductor: Inductor, name: str, module: fx.GraphModule, plain: Callable[..., Any]) -> None:
        self.inductor, self.name, self.module, self.plain = inductor, name, module, plain
        self._known: dict[Kind, _Compiled] = {}
        self._plain = False
        """Whether it returns what a compiled graph cannot."""

    def __call__(self, *arguments: Any) -> Any:
        if self._plain or self.inductor.paused or self.name in self.inductor.refused or not _compilable():
            return self.plain(*arguments)
        kind = kind_of(arguments)
        if kind is None:
            return self.plain(*arguments)
        known = self._known.get(kind)
        if known is None:
            return self.plain(*arguments) if len(self._known) == MOST_KINDS else self._first(kind, arguments)
        known.calls += 1
        if known.calls & (known.calls - 1) or _waits_forbidden():
            return known(arguments)
        try:
            expected = self.plain(*arguments)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return known(arguments)  # there is no room for both now
        return self._proved(known, arguments, expected)

    def _first(self, kind: Kind, arguments: Sequence[Any]) -> Any:
        """Compile for this kind, if that is not one too many."""
        with _COMPILING:
            if kind not in self._known and len(self._known) < MOST_KINDS and not _waits_forbidden():
                expected = self.plain(*arguments)
                if kind_of(expected) is None:
                    self._plain = True
                    return expected
                begun = time.perf_counter()
                try:
                    made = _Compiled(self.module, arguments)
                except Exception as error:  # whatever inductor or a compiler says: training goes on without
                    self.inductor.refuse(self.name, f"could not be compiled ({_said(error)})")
                    return expected
                result = self._proved(made, arguments, expected)
                if self.name not in self.inductor.refused:
                    self._known[kind] = made
                self.inductor.compiled += 1
                self.inductor.seconds += time.perf_counter() - begun
                return result
        known = self._known.get(kind)  # another thread has compiled it meanwhile, or nobody
        return self.plain(*arguments) if known is None else known(arguments)

    def _proved(self, made: _Compiled, arguments: Sequence[Any], expected: Sequence[Any]) -> Any:
        """What a compiled graph returns, if that is what plain FX does; else that."""
        try:
            found = made(arguments)
            wrong = _difference(output_keys(self.module), found, expected, tolerance((*arguments, *expected)))
        except Exception as error:  # a kernel that fails, or too little memory for both
            self.inductor.refuse(self.name, f"could not be run once compiled ({_said(error)})")
            return expected
        if wrong:
            self.inductor.refuse(self.name, f"gives other numbers than plain FX for {wrong}")
            return expected
        return found


class _Compiled:
    """A graph compiled for one kind of arguments; the numbers among them are constants."""

    def __init__(self, module: fx.GraphModule, arguments: Sequence[Any]) -> None:
        self.tensors = [place for place, value in enumerate(arguments) if isinstance(value, Tensor)]
        self.all_tensors = len(self.tensors) == len(arguments)
        self.function = compile_graph(_of_tensors(module, arguments), [arguments[place] for place in self.tensors])
        self.calls = 1

    def __call__(self, arguments: Sequence[Any]) -> Any:
        if self.all_tensors:
            return self.function(*arguments)
        return self.function(*[arguments[place] for place in self.tensors])


def compile_graph(module: fx.GraphModule, tensors: Sequence[Tensor]) -> Callable[..., Any]:
    """By inductor, for tensors like these."""
    with _quiet(), torch.no_grad():
        from torch._inductor import standalone_compile

        return standalone_compile(
            module,
            list(tensors),
            dynamic_shapes="from_example_inputs",
            options={"config_patches": {"deterministic": True}},
        )


def kind_of(arguments: Sequence[Any]) -> Kind | None:
    """None if there is something among them that is neither a plain tensor nor a number."""
    found: list[Any] = [autocast_dtypes(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()]
    for value in arguments:
        if type(value) is Tensor and value.layout is torch.strided and not value.is_neg() and not value.is_conj():
            found.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, (bool, int, float)):
            found.append((type(value), value))
        else:
            return None
    return tuple(found)


def tolerance(values: Sequence[Any]) -> float:
    """Half of the digits of the narrowest of some tensors, or of what autocast makes of them: sums in another order
    lose a few."""
    dtypes = [value.dtype for value in values if _is_floating(value)] + [dtype for _, dtype in autocast_dtypes()]
    return math.sqrt(max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0))


def _difference(names: Sequence[str], found: Sequence[Any], expected: Sequence[Any], tolerance: float) -> str:
    """The name of the first output that differs; nothing."""
    pairs = zip(names, found, expected, strict=True)
    return next((name for name, mine, other in pairs if not _same(mine, other, expected, tolerance)), "")


def _same(found: Any, expected: Any, outputs: Sequence[Any], tolerance: float) -> bool:
    """Whether one of a graph's outputs is as expected."""
    if not isinstance(expected, Tensor):
        return bool(found == expected)
    if (found.shape, found.dtype, found.device) != (expected.shape, expected.dtype, expected.device):
        return False
    if not _is_floating(expected):
        return int((found != expected).sum()) <= CROSSING * expected.numel()
    if alike(found, expected, tolerance):
        return True
    scale = max(largest(value) for value in outputs if _is_floating(value))
    return float((found - expected).abs().max()) <= min(tolerance, CANCELLED * tolerance**2) * scale


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _of_tensors(module: fx.GraphModule, arguments: Sequence[Any]) -> fx.GraphModule:
    """A copy of a graph, for inductor to have: with the numbers it is given as constants, and of its notes none."""
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {
        node: graph.placeholder(node.name) if isinstance(value, Tensor) else value
        for node, value in zip(placeholders(module), arguments, strict=True)
    }
    graph.output(graph.graph_copy(module.graph, values))
    for node in graph.nodes:
        node.meta = {}
    return fx.GraphModule(module, graph)


def _compilable() -> bool:
    """Whether nothing is switched on that has to see the operations."""
    modes = torch._C._len_torch_dispatch_stack() > 0 or peek_interpreter_stack() is not None
    return not modes and not torch.is_grad_enabled()


def _waits_forbidden() -> bool:
    """Whether a CUDA graph is being captured, or what is to be captured is run before (`graphs.capture`)."""
    if not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode() > 1


def _demand_compiler(device: torch.device) -> None:
    if device.type == "cpu":
        with _quiet():
            from torch._inductor.cpp_builder import get_cpp_compiler
            from torch._inductor.exc import InvalidCxxCompiler
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise OptionError(
                f"inductor=True: on a CPU torch's inductor needs a C++ compiler, and there is none ({error}). Install "
                "one (g++, or name it in the environment variable CXX), or leave inductor out."
            ) from error
        return
    from torch.utils._triton import has_triton

    if not has_triton():
        raise OptionError(
            f"inductor=True: on a {device.type} device torch's inductor needs Triton, which is not installed or does "
            "not serve this one. Install it (pip install triton), or leave inductor out."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that are of inductor's own making."""
    with warnings.catch_warnings():
        for begins in _IGNORED:
            warnings.filterwarnings("ignore", begins)
        yield


def _said(error: Exception) -> str:
    """An error's kind and first line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
