"""A model that exists only as ``model.onnx``, as a module that trains and goes back into the file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...passes.errors import BatchError, UnsupportedModelError
from . import quantised
from .file import ModelFile, read_file, write_file
from .graph import read_graph
from .steps import Input, Latent, Source, Step, compute
from .values import Array, to_array, to_tensor


class OnnxNode(nn.Module):
    """One node of the file: a module, so that sites and messages bear its name."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, *given: Any) -> tuple[Any, ...]:
        """What the node makes of its inputs, tensors and arrays of known numbers."""
        return compute(self.step.node, self.step.operator, given)

    def extra_repr(self) -> str:
        return str(self.step.node.kind)


class OnnxModel(nn.Module):
    """What `load` makes of a file.

    Its parameters bear the names that they have in the file, a dot being a module around them as in PyTorch. `forward`
    computes the file's nodes one after the other with torch's functions, in the form of inference in either mode:
    nothing is dropped, and batch normalisation goes by the file's statistics.

    Attributes:
        inputs: What it reads, in order (`steps.Input`).
        outputs: Names of the values that it returns.
        file_names: Name of each parameter here -> its name in the file.
        batch: The batch size that is written into the file, which is free here; None where it is free there too.
    """

    def __init__(
        self, file: ModelFile, outputs: Sequence[str] | None = None, fixed: Mapping[str, Array] | None = None,
        logits: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        reading = read_graph(file, outputs, fixed or {}, logits)
        self.file = file
        self.inputs: tuple[Input, ...] = reading.inputs
        self.outputs = reading.outputs
        self.batch = reading.batch
        self.latents: dict[str, Latent] = reading.latents
        self.file_names: dict[str, str] = {}
        self.nodes = nn.ModuleDict()
        self._constants: dict[str, Array] = reading.constants
        self._places: dict[str, str] = {}
        for step in reading.steps:
            self.nodes[_key(step.node.name, self.nodes)] = OnnxNode(step)
        for name, array in reading.parameters.items():
            place = _place(self, name)
            parent = _parent(self, place)
            parent.register_parameter(place.rpartition(".")[2], nn.Parameter(to_tensor(array)))
            self.file_names[place] = name
            self._places[name] = place
        self._register_constants(reading.steps)
        self._first = {place: parameter.detach().clone() for place, parameter in self.named_parameters()}

    def _register_constants(self, steps: Iterable[Step]) -> None:
        """Constants that tensors meet are buffers, so that they move with the model."""
        static = {"Shape", "Size"}
        arrays: set[str] = set()
        for step in steps:
            inputs = [source for source in step.sources if source != Source()]
            if step.node.kind in static or all(source.constant or source.value in arrays for source in inputs):
                arrays.update(step.node.outputs)
                continue
            for position, source in enumerate(step.sources):
                if source.constant and position not in step.operator.static and source.constant not in self._places:
                    name = f"constant{len(self._places)}"
                    self.register_buffer(name, to_tensor(self._constants[source.constant]), persistent=False)
                    self._places[source.constant] = name

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """The outputs: a tensor, or a tuple of them where there are several.

        Args:
            *inputs: In the file's order, batch first; one whose samples have as many numbers in another shape
                (flattened, or with axes of one) is reshaped.
            **named: Or by their names.

        Raises:
            BatchError: There are more or fewer than the file has, or a shape does not fit.
            UnsupportedModelError: A node cannot be computed; the message names it.
        """
        values: dict[str, Any] = {}
        for position, each in enumerate(self.inputs):
            given = inputs[position] if position < len(inputs) else named.get(each.name)
            if given is None:
                raise BatchError(f"the model reads {_listed(self.inputs)}; {each.name!r} is not given.")
            values[each.name] = fitted(each, given)
        if len(inputs) + len(named) > len(self.inputs):
            given_names = [f"{len(inputs)} tensors", *named]
            raise BatchError(f"the model reads {_listed(self.inputs)}, not {', '.join(given_names)}.")
        for node in self.nodes.values():
            assert isinstance(node, OnnxNode)
            results = node(*self._arguments(node.step, values))
            values.update((name, result) for name, result in zip(node.step.node.outputs, results, strict=False) if name)
        made = tuple(value if isinstance(value := values[name], Tensor) else to_tensor(value) for name in self.outputs)
        return made[0] if len(made) == 1 else made

    def _arguments(self, step: Step, values: Mapping[str, Any]) -> list[Any]:
        """A constant is an array where its value has to be known, or where nothing but arrays is read."""
        given = [values[source.value] if source.value else None for source in step.sources]
        tensors = any(isinstance(each, Tensor) for each in given) or any(source.parameter for source in step.sources)
        for position, source in enumerate(step.sources):
            if source.parameter:
                given[position] = self.get_parameter(self._places[source.parameter])
            elif source.constant:
                place = self._places.get(source.constant)
                known = position in step.operator.static or not tensors or place is None
                given[position] = self._constants[source.constant] if known else self.get_buffer(str(place))
        return given

    def save(self, path: str | Path) -> None:
        """Write the file with the weights that the model has now.

        Everything else is as it was read: names, metadata, opset, doc strings, the layout of external data. A weight
        that the file holds as whole numbers is rounded to the nearest with the file's scale; one that did not change
        keeps its bits.

        Raises:
            OutputError: It cannot be written. What was there stays.
        """
        replaced = {}
        for place, name in self.file_names.items():
            parameter = self.get_parameter(place).detach().cpu()
            if not torch.equal(parameter, self._first[place].cpu()):
                replaced[name] = self._written(name, parameter)
        write_file(self.file, path, replaced)

    def _written(self, name: str, parameter: Tensor) -> Array:
        if name not in self.latents:
            return np.ascontiguousarray(to_array(parameter))
        latent = self.latents[name]
        zero = None if latent.zero is None else to_tensor(latent.zero)
        dtype = latent.node.get("onward.dtype")
        whole = quantised.quantise(latent.node, parameter.double(), to_tensor(latent.scale).double(), zero, dtype)
        return np.ascontiguousarray(whole.numpy().astype(latent.dtype))


def load(
    path: str | Path, *, outputs: Sequence[str] | None = None, fixed: Mapping[str, Any] | None = None,
    logits: bool = False,
) -> OnnxModel:  # fmt: skip
    """Read ``model.onnx`` as a module that `onward.compile` takes like any other.

    Args:
        path: The file. It need not be trusted: nothing of it is run.
        outputs: Names of the values to return, also of inner ones; None are the file's own outputs. Whole numbers, such
            as a classifier's label, are left out of those where there are floats.
        fixed: Name -> value of inputs that are constants from now on, such as a sampling rate that an ``If`` asks for.
        logits: Leave out the softmax (or sigmoid, or normaliser) that the outputs end with, as a loss like
            cross-entropy wants it. The file that is written keeps it.

    Returns:
        The model; `OnnxModel.save` writes it back.

    Raises:
        OptionError: The package ``onnx`` is not installed.
        ModelFileError: The file is missing, damaged, no ONNX file, or its external data are not there.
        UnsupportedModelError: It holds what is not read: an operator, control flow, a type, an opset; the message names
            the node. Or nothing in it could be trained, or its batch size cannot be freed.
        UnknownNameError: It has no such output, or no such input.
    """
    arrays = {name: np.asarray(value) for name, value in (fixed or {}).items()}
    model = OnnxModel(read_file(path), outputs, arrays, logits)
    if not model.file_names:
        raise UnsupportedModelError(
            f"{path}: no constant of the file is a weight that could be trained; docs/onnx-import.md says what is one."
        )
    if model.batch is not None:
        _check_free(model)
    return model


def fitted(wanted: Input, given: Tensor) -> Tensor:
    """An input in the shape that the file declares, if its samples have as many numbers.

    Raises:
        BatchError: They do not, or are not of the declared kind.
    """
    floats = wanted.dtype.is_floating_point
    if floats != given.is_floating_point():
        raise BatchError(
            f"input {wanted.name!r} is {_described(wanted)}, not {str(given.dtype).removeprefix('torch.')}."
        )
    if given.dtype != wanted.dtype and not floats:
        given = given.to(wanted.dtype)
    if not wanted.shape:
        return given
    sample, shape = wanted.shape[1:], tuple(given.shape)
    if len(shape) == len(wanted.shape) and all(w is None or w == g for w, g in zip(sample, shape[1:], strict=True)):
        return given
    known = [each for each in sample if each is not None]
    extents = [each for each in shape[1:] if each != 1]
    squeezed = len(known) == len(sample) and [each for each in known if each != 1] == extents
    flat = len(sample) == 1 and sample[0] in (None, math.prod(shape[1:]))
    if len(shape) > 1 and squeezed:
        return given.reshape(shape[0], *known)
    if len(shape) > 1 and flat:
        return given.flatten(1)
    raise BatchError(f"input {wanted.name!r} is {_described(wanted)}; the batch is {list(shape)}.")


def _described(one: Input) -> str:
    shape = "of any shape" if one.shape is None else ["batch", *("any" if e is None else e for e in one.shape[1:])]
    return f"{str(one.dtype).removeprefix('torch.')} {str(shape).replace(chr(39), '')}"


def _listed(inputs: Iterable[Input]) -> str:
    return ", ".join(f"{each.name!r}: {_described(each)}" for each in inputs) or "nothing"


def _check_free(model: OnnxModel) -> None:
    """Whether samples do not notice each other once the file's batch size is free.

    Raises:
        UnsupportedModelError: They do, or another size does not run.
    """
    size = model.batch
    assert size is not None
    generator = torch.Generator().manual_seed(0)

    def batch(one: Input) -> Tensor:
        shape = [2 * size, *(extent or 2 for extent in (one.shape or ())[1:])]
        if one.dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(one.dtype)
        return torch.randint(0, 2, shape, generator=generator).to(one.dtype)

    why = ""
    try:
        with torch.no_grad():
            both = [batch(each) for each in model.inputs]
            together, first, last = (
                _as_tuple(model(*(each[rows] for each in both)))
                for rows in (slice(None), slice(0, size), slice(size, None))
            )
        for name, joint, *alone in zip(model.outputs, together, first, last, strict=True):
            apart = torch.cat(alone) if alone[0].dim() else alone[0]
            if joint.shape != apart.shape or not torch.allclose(joint, apart, 1e-3, 1e-4, equal_nan=True):
                why = f"output {name!r} of a sample depends on how many there are"
    except (UnsupportedModelError, RuntimeError) as error:
        why = str(error)
    if why:
        raise UnsupportedModelError(
            f"{model.file.path}: the batch size {size} is written into the file, and cannot be freed: {why}. Export "
            "the model with a dynamic batch axis."
        )


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _key(name: str, taken: nn.ModuleDict) -> str:
    """A node's name as that of a module: without dots, and like no other."""
    plain = name.strip("/").replace(".", "/") or "node"
    if hasattr(nn.ModuleDict, plain):
        plain += "_"
    key, number = plain, 2
    while key in taken:
        key, number = f"{plain}@{number}", number + 1
    return key


def _place(model: nn.Module, name: str) -> str:
    """Where a parameter of this name goes: its own name, with what torch does not allow replaced by underscores."""
    parts = [part or "_" for part in name.split(".")]
    parent: nn.Module = model
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        child = parent._modules.get(part)
        if not last and type(child) is nn.Module:
            parent = child
            continue
        while hasattr(parent, part) or part == "nodes":
            part += "_"
        parts[index] = part
        if last:
            break
        following = nn.Module()
        parent.add_module(part, following)
        parent = following
    return ".".join(parts)


def _parent(model: nn.Module, place: str) -> nn.Module:
    return model.get_submodule(place.rpartition(".")[0])
