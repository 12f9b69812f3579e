"""What an operator is to us: a row of the table `OPERATORS`, which the files of the families fill."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...passes.errors import UnsupportedModelError

ML = "ai.onnx.ml"
"""The domain of classical machine learning. That of every other operator is "" (also written ai.onnx)."""

Run = Callable[..., Any]
_R = TypeVar("_R", bound=Run)


@dataclass(frozen=True, eq=False)
class Node:
    """A node of the file's graph, as plain data.

    Attributes:
        op_type: Name of the operator.
        domain: Where it is defined.
        name: The node's own name, or the name of its first output where the file gives it none.
        inputs: Names of the values that it reads; "" is an optional one that is left out.
        outputs: Names of the values that it makes; "" is one that is not wanted.
        attributes: Name -> number, string, list of these, or NumPy array.
        opset: The version of its domain's operators that the file names.
        place: Its position in the graph's list of nodes.
        batch: The batch size that is written into the file; None where the file leaves it free.
    """

    op_type: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 0
    place: int = 0
    batch: int | None = None

    @property
    def kind(self) -> str:
        """Its key in `OPERATORS`."""
        return f"{self.domain}.{self.op_type}" if self.domain else self.op_type

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} (node {self.place} of the graph)"

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or `default` where the node does not have it."""
        return self.attributes.get(name, default)


@dataclass(frozen=True)
class Operator:
    """One row: how an operator is computed.

    Attributes:
        run: ``(node, *inputs) -> tensor or tuple of them``; inputs that are left out are None.
        static: Positions whose value has to be known without running the model (shapes, axes): `run` gets them as NumPy
            arrays, whose elements are numbers or, where they come from the batch size, symbols.
        trains: Positions at which a floating-point initializer is a weight.
        limits: What of the operator is not read, in words, for docs/onnx-import.md.
    """

    run: Run
    static: frozenset[int] = frozenset()
    trains: frozenset[int] = frozenset()
    limits: str = ""


OPERATORS: dict[str, Operator] = {}
"""Every operator that is read: ``Conv``, ``ai.onnx.ml.Scaler``."""


def operator(
    *names: str, static: Collection[int] = (), trains: Collection[int] = (), limits: str = ""
) -> Callable[[_R], _R]:
    """Put a function into `OPERATORS`, under one name or several."""

    def register(run: _R) -> _R:
        for name in names:
            assert name not in OPERATORS, name
            OPERATORS[name] = Operator(run, frozenset(static), frozenset(trains), limits)
        return run

    return register


def refuse(node: Node, what: str) -> UnsupportedModelError:
    """The error for a use of an operator that is not read; the caller's message names the node."""
    return UnsupportedModelError(f"{what} is not read by {node.kind}.")
