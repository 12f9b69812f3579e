"""A graph that can be computed, as data: its inputs, its steps, and what each reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...passes.errors import UnsupportedModelError
from .node import Node, Operator
from .static_operators import LONGEST, STATIC
from .values import Array, objects, to_tensor


@dataclass(frozen=True)
class Input:
    """An input of the file.

    Attributes:
        name: What it is called.
        dtype: What it holds.
        shape: Its extents, the batch first; None where the file leaves one free. None as a whole: not said.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True)
class Source:
    """Where an input of a step comes from: one of these, or nothing (an optional input that is left out)."""

    value: str = ""
    parameter: str = ""
    constant: str = ""


@dataclass(frozen=True)
class Step:
    """One node to compute."""

    node: Node
    operator: Operator
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Latent:
    """Whole numbers of the file that a float parameter stands for, and what quantises it."""

    node: Node
    scale: Array
    zero: Array | None
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Reading:
    """A graph that can be computed.

    Attributes:
        inputs: What it reads.
        outputs: Names of the values that it returns.
        steps: In order.
        parameters: Name in the file -> what it holds, floats: dequantised where the file holds whole numbers.
        latents: Those of the parameters that are whole numbers in the file.
        constants: Name -> value, of every constant that a step reads.
        batch: The batch size that the file fixes; None where it leaves it free.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    parameters: dict[str, Array]
    latents: dict[str, Latent]
    constants: dict[str, Array]
    batch: int | None


def compute(node: Node, operator: Operator, given: Sequence[Any]) -> tuple[Any, ...]:
    """Compute a node from tensors and arrays: with arrays alone where `STATIC` can, else with tensors.

    Raises:
        UnsupportedModelError: It cannot be computed, or has to know the value of a tensor; the message names the node.
    """
    try:
        static = STATIC.get(node.kind)
        if static is not None and all(isinstance(each, np.ndarray) and each.size <= LONGEST for each in given):
            results = static(node, *given)
            if results is not NotImplemented:
                results = results if isinstance(results, tuple) else (results,)
                return tuple(each if isinstance(each, np.ndarray) else objects([each], ()) for each in results)
        results = operator.run(node, *(_as_wanted(operator, k, each) for k, each in enumerate(given)))
    except (UnsupportedModelError, RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(f"{node}: {error}") from error
    return results if isinstance(results, tuple) else (results,)


def _as_wanted(operator: Operator, position: int, value: Any) -> Any:
    if value is None:
        return None
    if position not in operator.static:
        return to_tensor(value) if isinstance(value, np.ndarray) else value
    if isinstance(value, Tensor):
        raise UnsupportedModelError(
            f"input {position} depends on values of the model's input, and with it the result's size or place: that is "
            "not read."
        )
    return value
