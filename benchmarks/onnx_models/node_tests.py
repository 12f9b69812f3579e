"""Run the node tests that the package ``onnx`` ships against our reading, and count.

    python benchmarks/onnx_models/node_tests.py          # the counts by operator that has failures, and the total
    python benchmarks/onnx_models/node_tests.py Resize   # these operators only, with the reasons

A test counts as refused where the model raises `UnsupportedModelError`, and as wrong where it gives other numbers.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from onward.compiler.from_onnx import OPERATORS
from onward.compiler.from_onnx.file import ModelFile
from onward.compiler.from_onnx.model import OnnxModel
from onward.compiler.from_onnx.quantised import EXPANDED
from onward.compiler.from_onnx.values import to_array, to_tensor
from onward.passes.errors import ModelFileError, UnsupportedModelError


def check(case: Any) -> str:
    """``""`` if the case's model gives its outputs, else what happened, beginning with "refused" or "wrong"."""
    graph = case.model.graph
    file = ModelFile(
        Path(case.name), case.model, graph, {each.domain: each.version for each in case.model.opset_import}
    )
    try:
        for given, wanted in case.data_sets:
            arrays = {value.name: _array(array) for value, array in zip(graph.input, given, strict=False)}
            fixed = {name: array for name, array in arrays.items() if name in _static(graph)}
            model = OnnxModel(file, [each.name for each in graph.output], fixed)
            inputs = [to_tensor(arrays[each.name]) for each in model.inputs]
            with torch.no_grad():
                made = model(*inputs)
            for one, want in zip(made if isinstance(made, tuple) else (made,), wanted, strict=True):
                got, want = np.asarray(to_array(one), np.float64), np.asarray(_array(want), np.float64)
                if got.shape != want.shape:
                    return f"wrong: shape {got.shape}, not {want.shape}"
                if not np.allclose(got, want, case.rtol, max(case.atol, 1e-5), equal_nan=True):
                    return f"wrong: off by {np.nanmax(np.abs(got - want)):.3g}"
    except (UnsupportedModelError, ModelFileError) as error:
        return f"refused: {error}"
    return ""


def _array(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, (list, dict)) or value is None:
        raise UnsupportedModelError("a sequence, map or nothing.")
    return np.asarray(value)


def _static(graph: Any) -> set[str]:
    """Inputs of the graph whose values have to be known: shapes, axes."""
    names = set()
    for node in graph.node:
        row = OPERATORS.get(f"{node.domain}.{node.op_type}" if node.domain else node.op_type)
        names.update(name for k, name in enumerate(node.input) if row is not None and k in row.static)
    return names if len(names) < len(graph.input) else set(sorted(names)[1:])


def main(only: list[str]) -> None:
    """Run, print."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from onnx.backend.test.case.node import collect_testcases

    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for case in collect_testcases(None):
        kinds = {node.op_type if not node.domain else f"{node.domain}.{node.op_type}" for node in case.model.graph.node}
        kind = next(iter(kinds)) if len(kinds) == 1 else "(several)"
        if only and kind not in only:
            continue
        what = check(case)
        counts[kind][what.partition(":")[0] or "right"] += 1
        if only and what:
            print(case.name, what)
    total = sum(counts.values(), Counter[str]())
    for kind, one in sorted(counts.items()):
        if kind in OPERATORS and one["right"] != sum(one.values()):
            print(f"{kind}: {dict(one)}")
    read = sum((one for kind, one in counts.items() if kind in OPERATORS or kind in EXPANDED), Counter[str]())
    print(f"all {sum(total.values())}: {dict(total)}; of operators in the table {sum(read.values())}: {dict(read)}")


if __name__ == "__main__":
    main(sys.argv[1:])
