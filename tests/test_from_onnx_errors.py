"""ONNX files that are damaged, hostile, or hold what is not read: each is refused, with its reason."""

from __future__ import annotations

import builtins
import contextlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_files as files  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_files import node, tensor, weights  # noqa: E402

from onward.compiler.from_onnx import load  # noqa: E402
from onward.passes.errors import BatchError, ModelFileError, OnwardError, OptionError, UnsupportedModelError  # noqa: E402


def refused(kind: type[OnwardError], path: Path, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load(path, **options)
    assert type(caught.value) is kind
    return str(caught.value)


def net(*nodes: Any, inputs: Any = None, held: Any = None, outputs: Any = ("y",), opset: int = 17) -> Any:
    held = {"w": weights(4, 4)} if held is None else held
    return files.file(list(nodes), inputs or [tensor("x", "N", 4)], list(outputs), held, opset)


# ---- the file itself


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "it is no ONNX file, or is damaged or cut off"),
        (lambda content: b"", "it is no ONNX file: no version, operators or nodes are in it."),
        (lambda content: b"# Not a model\n" * 20, "it is no ONNX file"),
        (lambda content: b"PK\x03\x04" + bytes(200), "it is no ONNX file"),
        (lambda content: content[:40] + bytes(60) + content[100:], "it"),
    ],
)
def test_what_is_no_whole_file(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(damage(files.cnn().SerializeToString()))
    assert message in refused(ModelFileError, path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "no.onnx: it cannot be read: No such file" in refused(ModelFileError, tmp_path / "no.onnx")
    assert "it cannot be read" in refused(ModelFileError, tmp_path)


def test_random_damage_raises_nothing_else(tmp_path: Path) -> None:
    """Bytes changed and cut at random: what comes is a model or an error of ours, never another exception."""
    content = files.cnn().SerializeToString()
    rng = np.random.default_rng(0)
    for _ in range(150):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 6)):
            changed[place] = rng.integers(256)
        (tmp_path / "net.onnx").write_bytes(bytes(changed[: rng.integers(len(content) // 2, len(content) + 1)]))
        with contextlib.suppress(OnwardError):
            load(tmp_path / "net.onnx")


@pytest.mark.parametrize("claimed", [[10**6, 10**6], [2**62], [64, 11]])
def test_a_tensor_that_claims_more_than_it_holds_allocates_nothing(tmp_path: Path, claimed: list[int]) -> None:
    model = files.cnn()
    (head,) = (each for each in model.graph.initializer if each.name == "head.weight")
    del head.dims[:]
    head.dims.extend(claimed)
    path = files.save(model, tmp_path / "net.onnx")
    tracemalloc.start()
    try:
        text = refused(ModelFileError, path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "head.weight" in text
    assert peak < 2**24


@pytest.mark.parametrize(
    "nodes",
    [
        [node("ConstantOfShape", "big", "z"), node("Add", "z w", "a"), node("MatMul", "x a", "y")],
        [node("Expand", "w big", "a"), node("MatMul", "x a", "y")],
        [node("Range", "zero much one", "r"), node("Cast", "r", "a", to=TensorProto.FLOAT), node("Add", "x a", "y")],
        [node("Tile", "x big", "a"), node("MatMul", "a w", "y")],
    ],
)
def test_a_shape_in_the_file_does_not_fill_the_memory(tmp_path: Path, nodes: Any) -> None:
    held = {"w": weights(4, 4), "big": np.array([2**20, 2**20]), "zero": np.array(0), "one": np.array(1),
            "much": np.array(2**40)}  # fmt: skip
    graph = helper.make_graph(nodes, "net", [tensor("x", 1, 4)], [tensor("y", 1, 4)],
                              [numpy_helper.from_array(array, name) for name, array in held.items()])  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = files.save(model, tmp_path / "net.onnx")
    text = refused(UnsupportedModelError, path)
    assert "would make a tensor of shape" in text
    assert nodes[0].op_type in text


# ---- external data


def external(folder: Path, **entries: Any) -> Path:
    path = folder / "net.onnx"
    onnx.save(files.cnn(), path, save_as_external_data=True, location="net.bin", size_threshold=64)
    model = onnx.load(path, load_external_data=False)
    for each in model.graph.initializer:
        for entry in each.external_data:
            if entry.key in entries:
                entry.value = str(entries[entry.key])
    return files.save(model, path)


def test_external_data_that_are_missing_or_too_short(tmp_path: Path) -> None:
    path = external(tmp_path)
    content = (tmp_path / "net.bin").read_bytes()
    (tmp_path / "net.bin").write_bytes(content[:100])
    assert "bytes from byte" in refused(ModelFileError, path)
    (tmp_path / "net.bin").unlink()
    assert "are missing: no file" in refused(ModelFileError, path)


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "../secret.bin"},
        {"location": "/etc/passwd"},
        {"location": "inner/../../secret.bin"},
        {"location": "..\\secret.bin"},
        {"location": "link.bin"},
        {"location": "linked/secret.bin"},
        {"location": ""},
    ],
)
def test_external_data_outside_the_folder_are_refused(tmp_path: Path, entries: dict[str, str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(10**5))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "linked").symlink_to(tmp_path)
    assert refused(ModelFileError, external(folder, **entries)).endswith("refused.")


@pytest.mark.parametrize(
    "entries", [{"offset": -4}, {"offset": 2**70}, {"length": 3}, {"offset": "x"}, {"length": 2**50}]
)
def test_places_in_external_data_that_cannot_be(tmp_path: Path, entries: dict[str, Any]) -> None:
    assert "of tensor" in refused(ModelFileError, external(tmp_path, **entries)).replace(": tensor", " of tensor")


# ---- what is not read


def test_an_opset_that_is_too_new_or_too_old(tmp_path: Path) -> None:
    model = files.mlp()
    model.opset_import[0].version = 999
    path = files.save(model, tmp_path / "net.onnx")
    assert "opset 999 is newer than what is read, 28." in refused(UnsupportedModelError, path)
    old = net(node("MatMul", "x w", "m"), node("Upsample", "m", "y", height_scale=1.0, width_scale=1.0), opset=1)
    with pytest.raises(OnwardError) as caught:
        load(files.save(old, tmp_path / "old.onnx"))
    assert "old.onnx" in str(caught.value)


def branch(op: str) -> Any:
    return helper.make_graph([node(op, "x w", f"{op}.y")], op, [], [tensor(f"{op}.y", "N", 4)])


def body() -> Any:
    given = [tensor("i", kind=TensorProto.INT64), tensor("c", kind=TensorProto.BOOL), tensor("state", "N", 4)]
    nodes = [node("Identity", "c", "c2"), node("MatMul", "state w", "next")]
    return helper.make_graph(nodes, "body", given, [tensor("c2", kind=TensorProto.BOOL), tensor("next", "N", 4)])


STRINGS = [tensor("x", "N", 4), tensor("words", "N", kind=TensorProto.STRING)]
SEQUENCE = helper.make_tensor_sequence_value_info("x", 1, ["N", 4])

CROP = "tf_crop_and_resize"
UNREAD = {
    "operator": (
        net(node("MatMul", "x w", "m"), node("StringNormalizer", "words", "s"), node("Add", "m w", "y"),
            inputs=STRINGS), "input 'words' is a tensor of type string, which is not read."),
    "unknown": (
        net(node("MatMul", "x w", "m"), node("RandomUniformLike", "m", "y", name="noise")),
        "RandomUniformLike 'noise' (node 1 of the graph): unknown operator 'RandomUniformLike'."),
    "domain": (
        net(node("MatMul", "x w", "m"), node("FusedGelu", "m", "y", domain="own", name="special")),
        "own.FusedGelu 'special' (node 1 of the graph): unknown operator 'own.FusedGelu'."),
    "condition": (
        net(node("ReduceSum", "x", "s", keepdims=0), node("Greater", "s zero", "c"),
            node("If", "c", "y", then_branch=branch("MatMul"), else_branch=branch("Add"), name="either"),
            held={"w": weights(4, 4), "zero": np.float32(0)}),
        "If 'either' (node 2 of the graph) chooses by 'c', which depends on the model's input"),
    "loop": (
        net(node("Loop", "n go x", "y", body=body(), name="again"),
            held={"w": weights(4, 4), "n": np.array(3), "go": np.array(True)}),
        "Loop 'again' (node 0 of the graph) is control flow at run time"),
    "values": (
        net(node("MatMul", "x w", "m"), node("NonZero", "m", "y", name="where")),
        "NonZero 'where' (node 1 of the graph) makes a result whose size depends on values"),
    "shape": (
        net(node("MatMul", "x w", "m"), node("Cast", "m", "i", to=7), node("Reshape", "m i", "y", name="odd"),
            inputs=[tensor("x", 1, 4)]),
        "Reshape 'odd' (node 2 of the graph): input 1 depends on values of the model's input"),
    "mode": (
        net(node("Resize", "x _ s", "r", mode="nearest", coordinate_transformation_mode=CROP, name="crop"),
            node("MatMul", "r w", "y"), inputs=[tensor("x", 1, 4)],
            held={"w": weights(4, 4), "s": np.ones(2, np.float32)}),
        f"Resize 'crop' (node 0 of the graph): coordinate_transformation_mode '{CROP}' is not read by Resize."),
    "lengths": (
        net(node("LSTM", "x a b _ n", "y", hidden_size=4, name="rnn"), inputs=[tensor("x", 3, 1, 4)],
            held={"a": weights(1, 16, 4), "b": weights(1, 16, 4), "n": np.array([2], np.int32)}),
        "LSTM 'rnn' (node 0 of the graph): sequences of different lengths is not read by LSTM."),
    "type": (
        net(node("MatMul", "x w", "y"), held={"w": weights(4, 4).astype(np.complex64)}, inputs=[tensor("x", "N", 4)]),
        "tensor 'w' is of type COMPLEX64, which is not read."),
    "weights": (net(node("Relu", "x", "y"), held={}), "no constant of the file is a weight that could be trained"),
    "constant": (net(node("MatMul", "x w", "m"), node("Identity", "w", "y"), held={"w": weights(4, 4)}),
                 "output 'y' is a constant."),
    "batch": (net(node("MatMul", "x w", "m"), node("ReduceSum", "m", "y", keepdims=1), inputs=[tensor("x", 2, 4)]),
              "the batch size 2 is written into the file, and cannot be freed: output 'y'"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREAD)
def test_what_is_not_read_is_named(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, message = UNREAD[case]
    monkeypatch.setattr(onnx.checker, "check_model", lambda *_: None)  # our own checks have to do
    text = refused(UnsupportedModelError, files.save(model, tmp_path / "net.onnx"))
    assert message in text
    assert "net.onnx" in text or text.startswith(message[:8])


def test_a_long_chain_of_constants_is_read(tmp_path: Path) -> None:
    chain = [node("Identity", f"c{k}" if k else "w", f"c{k + 1}") for k in range(2000)]
    model = load(files.save(net(*chain, node("MatMul", "x c2000", "y")), tmp_path / "net.onnx"))
    assert list(model.file_names.values()) == ["w"]


def test_sequences_are_refused(tmp_path: Path) -> None:
    model = net(node("ConcatFromSequence", "x", "c", axis=0), node("MatMul", "c w", "y"), inputs=[SEQUENCE])
    assert "input 'x' is sequence; only tensors are read." in refused(
        UnsupportedModelError, files.save(model, tmp_path / "net.onnx")
    )


def test_a_graph_that_reads_what_nothing_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = files.mlp()
    model.graph.node[2].input[0] = "nowhere"
    path = files.save(model, tmp_path / "net.onnx")
    assert "it breaks the rules of ONNX" in refused(ModelFileError, path)
    monkeypatch.setattr(onnx.checker, "check_model", lambda *_: None)
    assert "reads 'nowhere', which nothing before it makes." in refused(ModelFileError, path)


def test_unknown_names(tmp_path: Path) -> None:
    path = files.save(files.mlp(), tmp_path / "net.onnx")
    for options, message in (
        ({"outputs": ["score"]}, "unknown value of the file 'score'. Did you mean 'scores'?"),
        ({"fixed": {"X": 1.0}}, "unknown input of the file 'X'."),
    ):
        with pytest.raises(OptionError) as caught:
            load(path, **options)
        assert str(caught.value).startswith(message)


def test_batches_that_do_not_fit(tmp_path: Path) -> None:
    model = load(files.save(files.cnn(), tmp_path / "net.onnx"))
    for given, message in (
        ((torch.zeros(2, 1, 8, 9),), "input 'image' is float32 [batch, 1, 8, 8]; the batch is [2, 1, 8, 9]."),
        ((torch.zeros(2, 1, 8, 8, dtype=torch.int64),), "input 'image' is float32 [batch, 1, 8, 8], not int64."),
        ((), "the model reads 'image': float32 [batch, 1, 8, 8]; 'image' is not given."),
        ((torch.zeros(2, 1, 8, 8),) * 2, "the model reads 'image': float32 [batch, 1, 8, 8], not 2 tensors."),
    ):
        with pytest.raises(BatchError) as caught:
            model(*given)
        assert str(caught.value) == message


def test_without_the_package_onnx_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_import = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "onnx":
            raise ImportError("No module named 'onnx'")
        return true_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'onward[onnx]'" in refused(OptionError, tmp_path / "net.onnx")
