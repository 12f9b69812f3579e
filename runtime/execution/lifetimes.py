"""How long a step keeps the values of its clean run: until the last action of its plan that reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ...compiler.program import CompiledModel, input_keys, output_keys
from ..plan import Action, Forward, Learn, Perturb, keys_read

NARROWED = "narrowed:"
"""Begins the key of what a perturbed run reads of a part of the batch, by the run's number (`narrow`)."""


@dataclass(frozen=True)
class Lifetimes:
    """Who reads what in one plan, in any order of its actions."""

    reads: dict[Action, tuple[str, ...]]
    """By action, the keys that it reads or writes, of those whose values can be let go in the course of a step."""
    readers: dict[str, int]
    """By key, how many actions that is: after so many of them nothing reads the value any more."""


def lifetimes(compiled: CompiledModel, plan: Sequence[Action]) -> Lifetimes:
    """Of values and captures of the clean run. What writes a value counts as its reader, so that one that nothing else
    reads (perturbed runs do, in steps that have them) goes at once; parameters and inputs are not the step's."""
    stages = [output_keys(stage) for stage in compiled.stages]
    ends = {key for keys in stages for key in keys if key.startswith(("value:", "capture:"))}
    reads = {}
    for action in plan:
        keys = keys_read(compiled, action)  # of outputs, which losses read, the step's result is made
        match action:
            case Forward(stage):
                keys += stages[stage]
            case Perturb(run, _, _):
                keys.append(f"{NARROWED}{run}")
            case Learn(run):  # reads the alive masks that the run itself read
                keys = [*input_keys(compiled.runs[run].module), f"{NARROWED}{run}"]
        reads[action] = tuple(dict.fromkeys(key for key in keys if key in ends or key.startswith(NARROWED)))
    return Lifetimes(reads, dict(Counter(key for keys in reads.values() for key in keys)))
