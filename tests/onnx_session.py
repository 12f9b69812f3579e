"""Graphs as models that are checked and run by ONNX Runtime on one thread of the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnxruntime
from onnx import checker
from torch import Tensor, fx

from onward.compiler.to_onnx import operators  # noqa: F401  (fills the table)
from onward.compiler.to_onnx.builder import Builder
from onward.compiler.to_onnx.emit import Emission, emit
from onward.compiler.to_onnx.trace import Described, described
from onward.runtime.export.step import extents


class Session:
    """A model that passes the checker, by names."""

    def __init__(self, model: onnx.ModelProto) -> None:
        checker.check_model(model, full_check=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {each.name for each in self.session.get_inputs()}
        self.optional = {each.name for each in self.session.get_overridable_initializers()}
        self.outputs = [each.name for each in self.session.get_outputs()]

    def __call__(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Arrays by name; what the model does not read is left out."""
        arrays = {key: value.detach().numpy() if isinstance(value, Tensor) else value for key, value in feeds.items()}
        found = self.session.run(
            None, {key: value for key, value in arrays.items() if key in self.inputs | self.optional}
        )
        return dict(zip(self.outputs, found, strict=True))


def exported(
    graph: fx.GraphModule, given: Sequence[Described], copies: dict[int, tuple[int, ...]] | None = None
) -> Session:
    """A traced graph with inputs ``x0`` … and outputs ``y0`` …; `copies` are ids that stand for inputs, by place."""
    b, held = Builder("tested"), copies or {}
    inputs = [b.ints(held[place]) if place in held else b.input(f"x{place}", *extents(kind))
              for place, kind in enumerate(given)]  # fmt: skip
    emission = Emission(b, copies={inputs[place]: ids for place, ids in held.items()})
    found, vals = emit(emission, graph, inputs, "tested")
    for place, (value, val) in enumerate(zip(found, vals, strict=True)):
        b.output(f"y{place}", value, *extents(described(val, f"y{place}")))
    return Session(b.model(""))
