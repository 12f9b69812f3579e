"""Records the tasks of a step: traces each, and knows what every key holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...compiler.program import input_keys
from ...compiler.to_onnx.trace import Described, Like, described, trace
from ...passes import ops
from ...passes.errors import ExportError
from ...passes.graph import outputs, placeholders
from ..program import Program
from .decompositions import DECOMPOSITIONS
from .learning import NAMES, Counters
from .task import Task
from .updates import Optimizer


class Recorder:
    """The tasks of one program's step, so far.

    Attributes:
        program, compiled, estimator, optimizer: what is exported.
        moments: what the optimizer keeps, by ``weight.state``.
        parameters, buffers, environment: of the model, by name, and by key.
        kinds: what each key holds.
        tasks: in their order.
        learns: whether feedback is learned.
        warmup: learning steps up to which the weights do not move.
        whole: whether a sample is a whole graph, so that the batch is one.
    """

    def __init__(
        self, program: Program, batch: Any, target: Any, optimizer: Optimizer, moments: dict[str, Tensor]
    ) -> None:
        self.program, self.compiled = program, program.compiled
        self.estimator, self.optimizer, self.moments = self.compiled.estimator, optimizer, moments
        given, self.parameters, self.buffers = program.bind(batch, target)
        self.environment, self.samples = given.environment, given.samples
        self.target_leaves, self.target_spec = pytree.tree_flatten(target)
        self.learns = self.estimator.feedback == "learned"
        self.warmup = self.estimator.warmup if program.feedback is not None and program.feedback.jacobians else 0
        self.whole = self.compiled.captured.signature.whole
        self.kinds: dict[str, Described] = {}
        self.tasks: list[Task] = []
        for index, leaf in enumerate(self.target_leaves):
            if not isinstance(leaf, Tensor):
                raise ExportError(f"the target holds {type(leaf).__name__}; ONNX takes tensors.")
            batched = leaf.dim() > 0 and leaf.shape[0] == self.samples
            self.kinds[f"target:{index}"] = Like(((1,), *leaf.shape[1:]) if batched else tuple(leaf.shape), leaf.dtype)

    def runtime_kinds(self) -> None:
        sigmas = self.environment["runtime:sigmas"]
        self.kinds["runtime:key"] = Like((2,), torch.int64)
        self.kinds["runtime:sigmas"] = Like(tuple(sigmas.shape), sigmas.dtype)
        self.kinds["runtime:step"] = Like((), torch.int64)
        self.kinds["runtime:lr"] = Like((), torch.float32)
        self.kinds |= {key: Like(tuple(value.shape), value.dtype) for key, value in self.learned().items()}

    def learned(self) -> dict[str, Tensor]:
        """What feedback has learned, by key."""
        feedback = self.program.feedback
        if feedback is None:
            return {}
        counters = Counters.of(feedback, self.program.next_probe).tensors()
        found = {f"runtime:feedback.{site}": jacobian for site, jacobian in feedback.jacobians.items()}
        return found | {f"feedback:{name}": value for name, value in zip(NAMES, counters, strict=True)}

    def state(self) -> dict[str, Tensor]:
        read = {key for task in self.tasks for key in task.reads}
        state = _distinct({f"parameter:{name}": value for name, value in self.parameters.items()}, read)
        state |= _distinct({f"buffer:{name}": value for name, value in self.buffers.items()}, read)
        state |= {f"optimizer:{name}": value for name, value in self.moments.items()}
        state["optimizer:steps"] = torch.tensor(self.optimizer.steps)
        return state | self.learned()

    def trace(self, function: Callable[..., Sequence[Any]], kinds: Sequence[Described], strict: bool) -> fx.GraphModule:
        """A whole graph is a batch of one."""
        return trace(function, kinds, DECOMPOSITIONS, strict=strict, batch=1 if self.whole else None)

    def function(
        self,
        name: str,
        function: Callable[..., Sequence[Any]],
        reads: Sequence[str],
        writes: Sequence[str],
        **more: Any,
    ) -> None:
        """A task from a function of what it reads; `more` are attributes of `Task`."""
        kinds = [self.kinds[key] for key in reads]
        self._record(name, self.trace(function, kinds, True), tuple(reads), tuple(writes), tuple(kinds), **more)

    def module(
        self,
        name: str,
        module: fx.GraphModule,
        copies: Mapping[str, tuple[int, ...]],
        renamed: Callable[[str], str] = str,
        written: Callable[[str], str] = str,
        **more: Any,
    ) -> None:
        """A task from a graph of the program; `renamed` and `written` give the keys in place of the graph's own."""
        constant = {key: Like((len(ids),), torch.int64) for key, ids in copies.items()}
        known = {**self.kinds, **constant}
        places = list(zip(input_keys(module), placeholders(module), strict=True))
        parts = {key: _parts(key, node) for key, node in places}
        kinds: dict[str, Described] = {}
        for key, node in places:
            for part, val in zip(parts[key], _flat(node.meta.get("val")), strict=True):
                own = renamed(part)
                given = known.get(own) if own != part or part.startswith("runtime:") else None
                kinds[part] = described(val, part) if given is None else given
        run = fx.Interpreter(module).run

        def flat(*values: Any) -> list[Any]:
            given = dict(zip(kinds, values, strict=True))
            packed = [tuple(given[p] for p in parts[key]) if _is_tuple(node) else given[key] for key, node in places]
            return [each for result in run(*packed) for each in _flat(result)]

        ends = [(f"{output.kind}:{output.name}", node) for output, node in outputs(module)]
        writes = tuple(written(part) for key, node in ends for part in _parts(key, node))
        reads = tuple(map(renamed, kinds))
        for key, kind in zip(reads, kinds.values(), strict=True):
            if key not in copies:
                self.kinds.setdefault(key, kind)
        used = {key: ids for key, ids in copies.items() if key in kinds}
        graph = self.trace(flat, list(kinds.values()), False)
        self._record(name, graph, reads, writes, tuple(kinds.values()), copies=used, **more)

    def _record(
        self,
        name: str,
        graph: fx.GraphModule,
        reads: tuple[str, ...],
        writes: tuple[str, ...],
        kinds: tuple[Described, ...],
        **more: Any,
    ) -> None:
        found = graph.graph.output_node().args[0]
        assert isinstance(found, (tuple, list))
        vals = [each.meta["val"] if isinstance(each, fx.Node) else each for each in found]
        results = tuple(val if isinstance(val, int) else described(val, k) for k, val in zip(writes, vals, strict=True))
        self.kinds.update(zip(writes, results, strict=True))
        self.tasks.append(
            Task(name, reads, writes, kinds, results, graph, noise=_noise(graph, more.get("run")), **more)
        )

    def leaves(self, prefix: str = "") -> list[str]:
        """Keys of the model's output."""
        return [f"{prefix}output:{index}" for index in range(self.compiled.captured.out_spec.num_leaves)]

    def target(self, leaves: Sequence[Any]) -> Any:
        return pytree.tree_unflatten(list(leaves), self.target_spec)


def _distinct(named: Mapping[str, Tensor], read: set[str]) -> dict[str, Tensor]:
    """Tensors by key, each once: of a tied one's names that which the graphs read."""
    own = {id(value): key for key, value in reversed(list(named.items()))}
    own |= {id(named[key]): key for key in named if key in read}
    return {key: value.detach() for key, value in named.items() if own[id(value)] == key}


def _is_tuple(node: Any) -> bool:
    """Whether a node's value is several tensors: what an operation with several results hands to a later stage."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), (tuple, list))


def _parts(key: str, node: Any) -> list[str]:
    """The keys of a node's value: its own, or one a tensor."""
    return [f"{key}.{place}" for place in range(len(node.meta["val"]))] if _is_tuple(node) else [key]


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _noise(graph: fx.GraphModule, run: int | None) -> tuple[str, ...]:
    """Keys of the random words that a graph reads."""
    found = [
        (node.args[4], node.args[5]) if node.target == ops.perturb else (node.args[3], node.args[4])
        for node in graph.graph.nodes
        if node.target in (ops.perturb, ops.weighted_noise, ops.weighted_noise_sum)
    ]
    return tuple(f"words:{run}.{site}.{noise}" for site, noise in dict.fromkeys(found))
