"""Reading an ``.onnx`` file that need not be trusted, and writing it back with other weights.

Nothing of a file is run. What a tensor claims to hold is compared with the bytes that are there before anything of
that size is made, and external data are read only from regular files inside the model's own folder.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...passes.errors import ModelFileError, OptionError, OutputError, UnsupportedModelError
from ..files import fsync
from .classical import COEFFICIENTS
from .values import DTYPES, Array

OLDEST, CONVERTED_TO, NEWEST = 7, 13, 28
"""Opsets that are read as they are; an older file is converted first (`onnx.version_converter`)."""


def onnx_package() -> Any:
    """The package ``onnx``, which only this import needs.

    Raises:
        OptionError: It is not installed.
    """
    try:
        import onnx
        import onnx.checker
        import onnx.defs
        import onnx.inliner
        import onnx.numpy_helper
        import onnx.version_converter
    except ImportError as error:
        raise OptionError(
            f"reading .onnx files needs the package onnx: pip install 'onward[onnx]' ({error})."
        ) from error
    return onnx


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A file as it was read.

    Attributes:
        path: Where it lies.
        proto: The ``ModelProto`` as it is on the disk; external data are not in it.
        graph: The ``GraphProto`` to compute, with local functions inlined and old operators converted.
        opsets: Domain -> version, of `graph`.
    """

    path: Path
    proto: Any
    graph: Any
    opsets: Mapping[str, int]

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelFile:
        return self  # nobody changes it

    def array(self, tensor: Any) -> Array:
        """What a ``TensorProto`` of the file holds (`read_tensor`)."""
        return read_tensor(tensor, self.path)


def read_file(path: str | Path) -> ModelFile:
    """Read a file and check it.

    Raises:
        ModelFileError: It is missing, damaged, no ONNX file, or its external data are missing or outside its folder.
        UnsupportedModelError: Its opset is too new, or too old and cannot be converted.
    """
    onnx = onnx_package()
    from google.protobuf.message import DecodeError

    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path}: it cannot be read: {error.strerror or error}.") from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise ModelFileError(f"{path}: it is no ONNX file, or is damaged or cut off: {error}.") from error
    if not proto.ir_version or not proto.graph.node or not proto.opset_import:
        raise ModelFileError(f"{path}: it is no ONNX file: no version, operators or nodes are in it.")
    if not all(isinstance(name, str) for name in _names(proto.graph)):  # protobuf gives bytes where it cannot decode
        raise ModelFileError(f"{path}: it is damaged: a name in it is no text.")
    opsets = {_domain(each.domain): each.version for each in proto.opset_import}
    version = opsets.get("", CONVERTED_TO)
    if version > NEWEST:
        raise UnsupportedModelError(
            f"{path}: opset {version} is newer than what is read, {NEWEST}. Export the model with an opset of at most "
            f"{NEWEST}."
        )
    external = any(tensor.data_location == tensor.EXTERNAL for tensor in _tensors(proto.graph))
    executed = proto
    try:
        if not external:  # it would look for them in the working directory
            onnx.checker.check_model(proto)
        if proto.functions:
            executed = onnx.inliner.inline_local_functions(executed)
    except Exception as error:  # whatever its C++ raises
        raise ModelFileError(f"{path}: it breaks the rules of ONNX: {_first_line(error)}") from error
    if version < OLDEST:
        try:
            executed = onnx.version_converter.convert_version(executed, CONVERTED_TO)
        except Exception as error:  # whatever its C++ raises
            raise UnsupportedModelError(
                f"{path}: opset {version} is older than what is read, {OLDEST}, and onnx cannot convert it to "
                f"{CONVERTED_TO}: {_first_line(error)} Export the model anew with an opset from {OLDEST} to {NEWEST}."
            ) from error
        opsets[""] = CONVERTED_TO
    return ModelFile(path, proto, executed.graph, opsets)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


def _names(graph: Any) -> Iterator[Any]:
    """Every name in a graph, of any kind."""
    for each in _graphs(graph):
        for one in (*each.initializer, *each.input, *each.output):
            yield one.name
        for node in each.node:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            yield from (attribute.name for attribute in node.attribute)


def _tensors(graph: Any) -> Iterator[Any]:
    for each in _graphs(graph):
        yield from each.initializer


def slots(graph: Any) -> dict[str, Any]:
    """Everything of a graph that can hold weights, by name.

    Those are initializers, the tensors of ``Constant`` nodes by what they are called in the graph, and the coefficients
    of classical models as ``NODE.coefficients``.

    A name that stands for two (in the branches of an ``If``) is left out.
    """
    found: dict[str, Any] = {}
    twice = set()
    for each in _graphs(graph):
        held = [(tensor.name, tensor) for tensor in each.initializer]
        for node in each.node:
            if node.op_type == "Constant" and not node.domain:
                held += [(node.output[0], one.t) for one in node.attribute if one.name == "value"]
            wanted = COEFFICIENTS.get(f"{node.domain}.{node.op_type}", ())
            held += [(f"{node.name or node.output[0]}.{one.name}", one) for one in node.attribute if one.name in wanted]
        for name, holder in held:
            if name in found:
                twice.add(name)
            found[name] = holder
    return {name: holder for name, holder in found.items() if name not in twice}


_FIELDS = {
    1: "float_data", 2: "int32_data", 3: "int32_data", 4: "int32_data", 5: "int32_data", 6: "int32_data",
    7: "int64_data", 9: "int32_data", 10: "int32_data", 11: "double_data", 12: "uint64_data", 13: "uint64_data",
    16: "int32_data",
}  # fmt: skip
"""``TensorProto.DataType`` -> the field that holds the elements where ``raw_data`` does not."""

_WIDTHS = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}


def read_tensor(tensor: Any, path: Path) -> Array:
    """A ``TensorProto`` as an array, after its size was compared with what is there.

    Raises:
        ModelFileError: It holds fewer or more bytes than its shape needs; or its external data cannot be read.
        UnsupportedModelError: Its type is not read.
    """
    onnx = onnx_package()
    where = f"{path}: tensor {tensor.name!r}"
    if tensor.data_type not in DTYPES:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type) if tensor.data_type in range(30) else tensor.data_type
        raise UnsupportedModelError(f"{where} is of type {kind}, which is not read.")
    dims = list(tensor.dims)
    if any(extent < 0 for extent in dims):
        raise ModelFileError(f"{where} has the shape {dims}.")
    count, width = math.prod(dims), _WIDTHS[tensor.data_type]
    if tensor.data_location == tensor.EXTERNAL:
        raw = _external(tensor, path, count * width)
        array: Array = np.frombuffer(raw, dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        return array.reshape(dims)
    if tensor.HasField("raw_data"):
        held = len(tensor.raw_data) / width
    else:
        held = len(getattr(tensor, _FIELDS[tensor.data_type]))
    if held != count:
        raise ModelFileError(
            f"{where} has the shape {dims}, {count} elements, and holds {held:g}: the file is damaged."
        )
    held_here: Array = onnx.numpy_helper.to_array(tensor)
    return held_here


def external_place(tensor: Any, path: Path) -> tuple[Path, int, int | None]:
    """The file of a tensor's external data, where in it they begin, and how many bytes they have, if that is said.

    Raises:
        ModelFileError: The file is missing or is not a regular file in the model's folder.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    where = f"{path}: the external data of tensor {tensor.name!r}"
    folder = path.resolve().parent
    pieces = Path(location.replace("\\", "/")).parts
    if not location or Path(location).is_absolute() or ".." in pieces or "\\" in location:
        raise ModelFileError(f"{where} are at {location!r}, which is no path inside the model's folder: refused.")
    place = folder.joinpath(*pieces)
    linked = any(folder.joinpath(*pieces[:end]).is_symlink() for end in range(1, len(pieces) + 1))
    if linked or not place.resolve().is_relative_to(folder):
        raise ModelFileError(f"{where} are at {location!r}, a link that leads elsewhere: refused.")
    if not place.is_file():
        raise ModelFileError(f"{where} are missing: no file {place}. It belongs beside the model.")
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries["length"]) if "length" in entries else None
    except ValueError as error:
        raise ModelFileError(f"{where} have no readable place: {error}.") from error
    return place, offset, length


def _external(tensor: Any, path: Path, needed: int) -> bytes:
    place, offset, length = external_place(tensor, path)
    there = place.stat().st_size
    if offset < 0 or (length is not None and length != needed) or offset + needed > there:
        said = "" if length is None else f", {length} of them by what the model says"
        raise ModelFileError(
            f"{path}: tensor {tensor.name!r} needs {needed} bytes from byte {offset} of {place.name}{said}; the "
            f"file has {there}."
        )
    with place.open("rb") as file:
        file.seek(offset)
        return file.read(needed)


def write_file(file: ModelFile, path: str | Path, replaced: Mapping[str, Array]) -> None:
    """Write the model as it was read, but for the arrays of some `slots`.

    External data go to files of the same names beside `path`. Every file is written whole under another name and takes
    its place by one rename, the model's own last.

    Raises:
        OutputError: It cannot be written. What was there stays.
    """
    target = Path(os.path.abspath(path))
    proto = type(file.proto)()
    proto.CopyFrom(file.proto)
    holders = slots(proto.graph)
    patches: dict[Path, list[tuple[int, bytes]]] = {}
    for tensor in _tensors(proto.graph):  # all, so that a file goes along whose tensors are as they were
        if tensor.data_location == tensor.EXTERNAL:
            patches.setdefault(external_place(tensor, file.path)[0], [])
    for name, array in replaced.items():
        holder = holders[name]
        if hasattr(holder, "floats"):
            del holder.floats[:]
            holder.floats.extend(array.ravel().tolist())
        elif holder.data_location == holder.EXTERNAL:
            place, offset, _ = external_place(holder, file.path)
            patches[place].append((offset, array.tobytes()))
        else:
            for field in set(_FIELDS.values()):
                holder.ClearField(field)
            holder.raw_data = array.tobytes()
    folder = file.path.resolve().parent
    renames: list[tuple[str, Path]] = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder.")
        for place, changes in patches.items():
            beside = target.parent / place.relative_to(folder)
            beside.parent.mkdir(parents=True, exist_ok=True)
            with _temporary(beside, renames) as out, place.open("rb") as old:
                shutil.copyfileobj(old, out)
                for offset, content in changes:
                    out.seek(offset)
                    out.write(content)
        with _temporary(target, renames) as out:
            out.write(proto.SerializeToString())
        while renames:
            temporary, final = renames[0]
            os.replace(temporary, final)
            renames.pop(0)
    except (OSError, ValueError) as error:  # protobuf: more than 2 GB
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        for temporary, _ in renames:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def _temporary(final: Path, renames: list[tuple[str, Path]]) -> Iterator[Any]:
    """A file beside `final` to write into, added to `renames`; on the disk when the block ends."""
    descriptor, name = tempfile.mkstemp(prefix=f".tmp-{final.name}-", dir=final.parent)
    renames.append((name, final))
    with os.fdopen(descriptor, "wb") as out:
        yield out
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(name, 0o666 & ~mask)
    fsync(Path(name))
