"""A task of a training step, and all of them, as data.

What goes from one task to the next has a name (a *key*), as in `runtime.execution`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from ...compiler.to_onnx import random
from ...compiler.to_onnx.emit import Emission, emit
from ...compiler.to_onnx.operators.noise import elements
from ...compiler.to_onnx.trace import Described, Like


@dataclass(frozen=True)
class Task:
    """A graph of a step.

    Attributes:
        name: as the plan calls it (`runtime.plan`), and beyond that ``N0`` the random words of run 0, ``T`` the rates,
            ``C`` the check for numbers that are not finite, ``U:weight`` an update.
        reads, writes: keys, in the order of the graph's placeholders and results.
        kinds, results: what each key that is read or written holds: a tensor's form, or a multiple of the batch size.
        graph: what it does, unless it is `words`.
        words: of ``N``, what it makes.
        copies: the ids of the copies or draws that it reads, by key.
        run: the perturbed run that it belongs to.
        noise: keys of the random words that it reads.
        perturbed: whether only steps with perturbed runs have it.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    kinds: tuple[Described, ...]
    results: tuple[Described, ...]
    graph: fx.GraphModule | None = None
    words: tuple[tuple[int, str, int, int], ...] = ()
    """By site: its number, the kind of noise, numbers of a sample, and whether they grow with the batch."""
    draws: tuple[int, ...] = ()
    copies: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    run: int | None = None
    noise: tuple[str, ...] = ()
    perturbed: bool = False

    def emit(
        self, emission: Emission, values: Mapping[str, str], noise: Mapping[str, tuple[str, Sequence[int]]]
    ) -> list[str]:
        """Add it to a builder: `values` of what it reads, `noise` the random words at hand, by their key."""
        if self.graph is None:
            return self._words(emission, values)
        values = {**values, **{key: emission.b.ints(ids) for key, ids in self.copies.items()}}
        emission.copies = {values[key]: ids for key, ids in self.copies.items()}
        emission.noise = {(int(key.split(".")[1]), key.split(".")[2]): noise[key] for key in self.noise}
        given = [values[key] for key in self.reads]
        return emit(emission, self.graph, given, self.name)[0]

    def _words(self, emission: Emission, values: Mapping[str, str]) -> list[str]:
        b = emission.b
        with b.scope(self.name):
            key, batch = (values[each] for each in self.reads)
            emission.sizes = {"N": b.op("Squeeze", b.op("Shape", batch, start=0, end=1), b.ints([0]))}
            streams = [
                random.Stream(site, elements(emission, [count], 0 if grows else -1)[0], noise == "rademacher")
                for site, noise, count, grows in self.words
            ]
            return random.words(b, key, self.draws, streams)


@dataclass(frozen=True)
class Tasks:
    """The tasks of a step, in an order that can be run.

    Attributes:
        tasks: all of them.
        state: keys of what a step starts from, with the tensors that the first one does.
        new: by key of the state, the key of its new value; its own where a step leaves it as it is.
        constants: keys of what no step changes.
        inputs: of the batch: ``input:i`` and ``target:i``, with their form.
        probes: whether some steps have no perturbed runs (`LikelihoodRatio.probe_every`).
        warmup: learning steps up to which every step has one.
    """

    tasks: tuple[Task, ...]
    state: dict[str, Tensor]
    new: dict[str, str]
    constants: dict[str, Tensor]
    inputs: dict[str, Like]
    probes: bool
    warmup: int
