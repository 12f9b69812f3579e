"""From a file's graph to the steps that compute it: what is constant is computed now, what nobody needs is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...passes.errors import ModelFileError, UnsupportedModelError, unknown_name
from . import quantised
from .classical import COEFFICIENTS
from .file import ModelFile, slots
from .node import ML, OPERATORS, Node, Operator
from .steps import Input, Latent, Reading, Source, Step, compute
from .trainable import trainable
from .values import Array, dtype_of, to_array

CONTROL = {"Loop", "Scan", "If", "SequenceMap"}
BY_VALUES = {"NonZero", "Compress", "Unique", "NonMaxSuppression"}
LAST = {"Softmax", "LogSoftmax", "Sigmoid", f"{ML}.Normalizer", f"{ML}.ZipMap", "Identity"}
"""What turns scores into probabilities at the end of a classifier; ``logits=True`` leaves it out."""

_FAKE = Operator(quantised.fake_quantise)


def read_graph(file: ModelFile, outputs: Sequence[str] | None, fixed: Mapping[str, Array], logits: bool) -> Reading:
    """Read the graph of a file.

    Args:
        file: The file.
        outputs: Names of the values to return; None are the file's outputs, without whole numbers beside floats.
        fixed: Inputs that are constants from now on.
        logits: Leave out what turns scores into probabilities at the end.

    Raises:
        UnsupportedModelError: An operator, or a use of one, is not read; control flow depends on values.
        ModelFileError: The graph reads what nothing makes.
        UnknownNameError: No value has a name of `outputs`, or no input one of `fixed`.
    """
    return _Reader(file, fixed).reading(outputs, logits)


class _Reader:
    """The values of a graph while it is read."""

    def __init__(self, file: ModelFile, fixed: Mapping[str, Array]) -> None:
        self.file = file
        self.constants: dict[str, Array] = {}
        self.constant_names: set[str] = set()
        self.producers: dict[str, Node] = {}
        self.nodes: list[Node] = []
        self.folded: dict[str, Array] = {}
        held = {tensor.name for tensor in file.graph.initializer}
        declared = [each for each in file.graph.input if each.name not in held]
        for name in fixed:
            if name not in {each.name for each in declared}:
                raise unknown_name("input of the file", name, [each.name for each in declared])
        self.inputs = tuple(self._input(each) for each in declared if each.name not in fixed)
        for name, value in fixed.items():
            self._constant(name, np.asarray(value))
        sizes = {each.shape[0] for each in self.inputs if each.shape}
        self.batch = next((size for size in sizes if size is not None), None) if len(sizes) == 1 else None
        known = {each.name for each in self.inputs} | self.constant_names
        self._read(file.graph, known)

    def _input(self, value: Any) -> Input:
        where = f"{self.file.path}: input {value.name!r}"
        if not value.type.HasField("tensor_type"):
            kind = value.type.WhichOneof("value") or "of no type"
            raise UnsupportedModelError(f"{where} is {kind.replace('_type', '')}; only tensors are read.")
        tensor = value.type.tensor_type
        try:
            dtype = dtype_of(tensor.elem_type)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{where} is {error}") from error
        if not tensor.HasField("shape"):
            return Input(value.name, dtype, None)
        extents = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in tensor.shape.dim]
        return Input(value.name, dtype, tuple(extents))

    def _constant(self, name: str, value: Array) -> None:
        self.constants[name] = value
        self.constant_names.add(name)

    def _read(self, graph: Any, known: set[str]) -> None:
        """Add a graph's nodes, with the branch of an ``If`` in its place."""
        if graph.sparse_initializer:
            raise UnsupportedModelError(f"{self.file.path}: sparse initializers are not read.")
        for tensor in graph.initializer:
            self._constant(tensor.name, self.file.array(tensor))
            known.add(tensor.name)
        for place, proto in enumerate(graph.node):
            node = self._node(proto, place)
            for name in node.inputs:
                if name and name not in known:
                    raise ModelFileError(f"{self.file.path}: {node} reads {name!r}, which nothing before it makes.")
            known.update(name for name in node.outputs if name)
            if node.kind == "Constant":
                self._constant(node.outputs[0], self._value(node))
            elif node.kind == "If":
                self._branch(node, known)
            else:
                for each in quantised.expanded(node, lambda node, part: f"{node.outputs[0]}::{part}"):
                    self._add(self._with_coefficients(each))
                    known.update(each.outputs)

    def _node(self, proto: Any, place: int) -> Node:
        from onnx import helper

        domain = "" if proto.domain == "ai.onnx" else proto.domain
        attributes = {}
        for attribute in proto.attribute:
            if attribute.ref_attr_name:
                continue
            if attribute.type == attribute.TENSOR:
                attributes[attribute.name] = self.file.array(attribute.t)
                continue
            value = helper.get_attribute_value(attribute)
            if isinstance(value, bytes):
                value = value.decode(errors="replace")
            elif isinstance(value, list) and value and isinstance(value[0], bytes):
                value = [each.decode(errors="replace") for each in value]
            attributes[attribute.name] = value
        outputs = tuple(proto.output)
        name = proto.name or next((each for each in outputs if each), proto.op_type)
        version = self.file.opsets.get(domain, 0)
        return Node(proto.op_type, domain, name, tuple(proto.input), outputs, attributes, version, place, self.batch)

    def _value(self, node: Node) -> Array:
        for name, value in node.attributes.items():
            if name == "value":
                return np.asarray(value)
            if name in ("value_int", "value_ints"):
                return np.asarray(value, dtype=np.int64)
            if name in ("value_float", "value_floats"):
                return np.asarray(value, dtype=np.float32)
        raise UnsupportedModelError(f"{node}: it holds strings or a sparse tensor, which are not read.")

    def _branch(self, node: Node, known: set[str]) -> None:
        """The branch that a constant condition chooses."""
        condition = node.inputs[0]
        if condition not in self.constant_names:
            raise UnsupportedModelError(
                f"{self.file.path}: {node} chooses by {condition!r}, which depends on the model's input: there is no "
                "one graph to train. If an input alone decides, give it as a constant: load(path, fixed={...})."
            )
        graph = node.attributes["then_branch" if bool(self.evaluate(condition).ravel()[0]) else "else_branch"]
        self._read(graph, known)
        for inner, outer in zip(graph.output, node.outputs, strict=True):
            self._add(Node("Identity", "", f"{node.name}", (inner.name,), (outer,), {}, 1, node.place))

    def _with_coefficients(self, node: Node) -> Node:
        """A classical model's coefficients as constants that it reads."""
        names = COEFFICIENTS.get(node.kind, ())
        extra = []
        for name in names:
            held = f"{node.name}.{name}"
            if node.get(name):
                self._constant(held, np.asarray(node.get(name), dtype=np.float32))
                extra.append(held)
        return replace(node, inputs=(*node.inputs, *extra)) if extra else node

    def _add(self, node: Node) -> None:
        if node.kind in CONTROL:
            raise UnsupportedModelError(
                f"{self.file.path}: {node} is control flow at run time, which is not read: export the model with "
                "the loop written out."
            )
        if node.kind in BY_VALUES:
            raise UnsupportedModelError(
                f"{self.file.path}: {node} makes a result whose size depends on values, and would have to be the same "
                "for all samples: that is not read. Train an earlier value: load(path, outputs=...)."
            )
        if node.kind not in OPERATORS:
            known = sorted(OPERATORS)
            near = unknown_name("operator", node.kind, known).args[0].split(" Known:")[0]
            raise UnsupportedModelError(
                f"{self.file.path}: {node}: {near} docs/onnx-import.md lists those that are read."
            )
        self.nodes.append(node)
        self.producers.update((name, node) for name in node.outputs if name)
        if node.inputs and all(not name or name in self.constant_names for name in node.inputs):
            self.constant_names.update(name for name in node.outputs if name)

    def evaluate(self, name: str) -> Array:
        """The value of a constant; what it is made of is computed before it."""
        waiting = [name]
        while waiting:
            node = self.producers.get(waiting[-1])
            if waiting[-1] in self.constants or waiting[-1] in self.folded or node is None:
                waiting.pop()
            elif missing := [each for each in node.inputs if each and self._known(each) is None]:
                waiting += missing
            else:
                with torch.no_grad():
                    results = compute(node, OPERATORS[node.kind], [self._known(each) for each in node.inputs])
                for made, result in zip(node.outputs, results, strict=False):
                    self.folded[made] = to_array(result) if isinstance(result, Tensor) else result
        value = self._known(name)
        assert value is not None
        return value

    def _known(self, name: str) -> Array | None:
        return self.constants.get(name, self.folded.get(name))

    def reading(self, outputs: Sequence[str] | None, logits: bool) -> Reading:
        """The steps for the wanted outputs."""
        returned = self._outputs(outputs)
        if logits:
            returned = tuple(self._scores(name) for name in returned)
        needed = self._needed(returned)
        self.batch = self.batch if any(each.name in needed for each in self.inputs) else None
        nodes = [node for node in self.nodes if any(name in needed for name in node.outputs)]
        weights = trainable(
            nodes, self.constants, self.constant_names, self.producers, set(slots(self.file.proto.graph))
        )
        latents = self._latents(nodes, weights)
        weights = [name for name in weights if self.constants[name].dtype.kind not in "iu" or name in latents]
        varying = set(weights) | {each.name for each in self.inputs}
        steps: list[Step] = []
        for node in nodes:
            if any(name in varying for name in node.inputs):
                varying.update(name for name in node.outputs if name)
                steps.append(self._step(node, varying, set(weights), latents))
        steps = _wanted(steps, returned)
        for name in returned:
            if name not in varying:
                raise UnsupportedModelError(f"{self.file.path}: output {name!r} is a constant.")
        read = {source.constant for step in steps for source in step.sources if source.constant}
        parameters = {
            name: self._dequantised(latents[name]) if name in latents else self.constants[name] for name in weights
        }
        constants = {name: self.evaluate(name) for name in sorted(read)}
        used = {source.value for step in steps for source in step.sources}
        inputs = tuple(each for each in self.inputs if each.name in used or each.name in returned)
        return Reading(inputs, returned, tuple(steps), parameters, latents, constants, self.batch)

    def _outputs(self, outputs: Sequence[str] | None) -> tuple[str, ...]:
        if outputs is not None:
            known = [*self.producers, *self.constants, *(each.name for each in self.inputs)]
            for name in outputs:
                if name not in known:
                    raise unknown_name("value of the file", name, known)
            return tuple(outputs)
        declared = list(self.file.graph.output)
        floats = [each.name for each in declared if _is_float(each)]
        return tuple(floats or (each.name for each in declared))

    def _scores(self, name: str) -> str:
        """What the last softmax reads, or with it a normaliser; a classical model's own transformation goes too."""
        while (node := self.producers.get(name)) is not None and node.kind in LAST:
            name = node.inputs[0]
        if node is not None and node.kind in COEFFICIENTS and node.get("post_transform", "NONE") != "NONE":
            plain = replace(node, attributes={**node.attributes, "post_transform": "NONE"})
            self.nodes[self.nodes.index(node)] = plain
            self.producers.update(dict.fromkeys((each for each in node.outputs if each), plain))
        return name

    def _needed(self, outputs: Iterable[str]) -> set[str]:
        needed, queue = set(), list(outputs)
        while queue:
            name = queue.pop()
            if name and name not in needed:
                needed.add(name)
                node = self.producers.get(name)
                queue += node.inputs if node is not None else ()
        return needed

    def _latents(self, nodes: list[Node], weights: list[str]) -> dict[str, Latent]:
        """Whole numbers behind exactly one kind of ``DequantizeLinear`` with a constant scale."""
        found: dict[str, Latent] = {}
        for name in weights:
            array = self.constants[name]
            if array.dtype.kind not in "iu":
                continue
            readers = [node for node in nodes if name in node.inputs]
            first = readers[0]
            same = all(r.kind == "DequantizeLinear" and r.inputs[1:] == first.inputs[1:] for r in readers)
            if same and all(not each or each in self.constant_names for each in first.inputs[1:]):
                zero = self.evaluate(first.inputs[2]) if len(first.inputs) > 2 and first.inputs[2] else None
                dtype = dtype_of(_number_of(array.dtype))
                node = replace(first, attributes={**first.attributes, "onward.dtype": dtype})
                found[name] = Latent(node, self.evaluate(first.inputs[1]), zero, array.dtype)
        return found

    def _dequantised(self, latent: Latent) -> Array:
        given = [self.constants[latent.node.inputs[0]], latent.scale, latent.zero]
        return to_array(compute(latent.node, OPERATORS["DequantizeLinear"], given)[0])

    def _step(self, node: Node, varying: set[str], weights: set[str], latents: Mapping[str, Latent]) -> Step:
        operator, inputs = OPERATORS[node.kind], node.inputs
        if node.kind == "DequantizeLinear":
            behind = self.producers.get(node.inputs[0])
            if node.inputs[0] in latents:
                node, operator = latents[node.inputs[0]].node, _FAKE
            elif behind is not None and behind.kind == "QuantizeLinear" and node.outputs[0] in self.constant_names:
                dtype = dtype_of(behind.get("output_dtype", 0) or 2)
                attributes = {**behind.attributes, "onward.dtype": dtype}
                node = replace(node, inputs=behind.inputs, attributes=attributes)
                operator, inputs = _FAKE, behind.inputs
        sources = []
        for name in inputs:
            if not name:
                sources.append(Source())
            elif name in weights:
                sources.append(Source(parameter=name))
            elif name in varying:
                sources.append(Source(value=name))
            else:
                sources.append(Source(constant=name))
        return Step(node, operator, tuple(sources))


def _is_float(value: Any) -> bool:
    """Whether an output holds floats: a tensor of them, or what ``ZipMap`` makes of one."""
    if value.type.HasField("tensor_type"):
        number = value.type.tensor_type.elem_type
        return number not in range(17) or number in (0, 1, 10, 11, 16)
    return True


def _number_of(dtype: np.dtype[Any]) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(dtype))


def _wanted(steps: list[Step], outputs: Iterable[str]) -> list[Step]:
    """The steps that the outputs need, now that weights are read behind their quantisers."""
    needed, kept = set(outputs), []
    for step in reversed(steps):
        if needed.intersection(step.node.outputs):
            kept.append(step)
            needed.update(source.value for source in step.sources)
    return kept[::-1]
