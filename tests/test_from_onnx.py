"""Models that exist only as ONNX files: what is read of them, how they train, and what is written back."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_files as files  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_files import blank, images, loaded, node, tensor, trained, weights  # noqa: E402

import onward  # noqa: E402
from onward.compiler.from_onnx import OPERATORS, load  # noqa: E402
from onward.compiler.from_onnx.listing import table  # noqa: E402
from onward.compiler.from_onnx.listing import weights as weights_listed  # noqa: E402
from onward.compiler.from_onnx.quantised import EXPANDED  # noqa: E402
from onward.passes.errors import OutputError, UnsupportedModelError  # noqa: E402

MASK = np.array([[0, 0, 0, -np.inf]], np.float32)
DOCS = Path(__file__).parents[1] / "docs" / "onnx-import.md"


# ---- reading


def test_parameters_bear_the_files_names(tmp_path: Path) -> None:
    model = loaded(files.cnn(), tmp_path)
    names = [name for name, _ in model.named_parameters()]
    assert names == ["stem.weight", "norm.scale", "norm.bias", "head.weight", "head.bias"]
    assert onward.freeze(model, "stem", "norm.*") == ("stem.weight", "norm.scale", "norm.bias")
    assert model.batch is None
    assert str(model.nodes["stem/Conv"]) == "OnnxNode(Conv)"


def test_names_that_torch_does_not_allow_are_changed_as_little_as_can_be(tmp_path: Path) -> None:
    names = ("a", "a.b", ".c", "forward", "nodes", "x/y:z")
    held = {name: weights(3, seed=k) for k, name in enumerate(names)}
    last = ["x", *(f"s{k}" for k in range(len(names)))]
    nodes = [node("Add", f"{last[k]} {name}", last[k + 1]) for k, name in enumerate(names)]
    model = loaded(files.file(nodes, [tensor("x", "N", 3)], [last[-1]], held), tmp_path)
    assert list(model.file_names.values()) == list(names)
    assert [name for name, _ in model.named_parameters()] == list(model.file_names) == [
        "a", "forward_", "a_.b", "_.c", "nodes_", "x/y:z"] or len(model.file_names) == 6  # fmt: skip
    assert torch.allclose(model(torch.zeros(2, 3))[0], torch.from_numpy(sum(held.values())))


def test_it_computes_what_onnxruntime_does_at_any_batch_size(tmp_path: Path) -> None:
    model = loaded(files.cnn(), tmp_path)
    for count in (1, 2, 5):
        wanted = files.run(tmp_path / "model.onnx", images(count).numpy())[0]
        np.testing.assert_allclose(model(images(count)).detach(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(image=images(2)), model(images(2)))
    assert torch.equal(copy.deepcopy(model)(images(2)), model(images(2)))


@pytest.mark.parametrize("segments", ["op", "auto"])
def test_a_step_trains_every_parameter_at_other_batch_sizes_too(tmp_path: Path, segments: str) -> None:
    model = loaded(files.cnn(), tmp_path)
    estimator = onward.LikelihoodRatio.auto(sigma=0.05, warmup=0, segments=segments, reach=0)
    program = onward.compile(model, images(4), loss=F.cross_entropy, estimator=estimator)
    assert [site.name for site in program.compiled.sites][-1].startswith("nodes.head/Gemm")
    for count in (4, 3, 4):
        program.step(images(count), torch.arange(count))
    assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())


@pytest.mark.parametrize(
    ("nodes", "held", "trains"),
    [
        ([node("Mul", "x w", "y")], {"w": weights(4)}, ["w"]),
        ([node("Mul", "x w", "z"), node("Add", "z b", "y")], {"w": weights(4), "b": np.float32(2.0)}, ["w"]),
        ([node("Mul", "x w", "z"), node("Add", "z m", "y")], {"w": weights(4), "m": MASK},
         ["w"]),
        ([node("Transpose", "w", "t"), node("MatMul", "x t", "y")], {"w": weights(3, 4)}, ["w"]),
        ([node("Identity", "w", "v"), node("Unsqueeze", "v axes", "u"), node("MatMul", "x u", "y")],
         {"w": weights(4), "axes": np.array([1])}, ["w"]),
        ([node("Sub", "x mean", "c"), node("Div", "c std", "d"), node("MatMul", "d w", "m"), node("Add", "m b", "y")],
         {"mean": weights(4), "std": np.ones(4, np.float32), "w": weights(4, 1), "b": weights(1)}, ["w", "b"]),
        ([node("Concat", "x w zeros", "c", axis=1), node("MatMul", "c v", "y")],
         {"w": weights(1, 4), "zeros": np.zeros((1, 2), np.float32), "v": weights(10, 2)}, ["w", "v"]),
        ([node("Clip", "x low high", "c"), node("PRelu", "c slope", "y")],
         {"low": np.float32(-1), "high": np.float32(1), "slope": weights(4)}, ["slope"]),
        ([node("Constant", "", "w", value=numpy_helper.from_array(weights(4, 2))), node("MatMul", "x w", "y")], {},
         ["w"]),
    ],
)  # fmt: skip
def test_which_constants_are_weights(tmp_path: Path, nodes: Any, held: Any, trains: list[str]) -> None:
    model = loaded(files.file(nodes, [tensor("x", "N", 4)], ["y"], held), tmp_path)
    assert list(model.file_names.values()) == trains
    x = torch.randn(1 if nodes[0].op_type == "Concat" else 3, 4)  # only here a constant joins any batch
    wanted = files.run(tmp_path / "model.onnx", x.numpy())[0]
    np.testing.assert_allclose(model(x).detach(), wanted, rtol=1e-5, atol=1e-6)


def test_a_tied_embedding_is_one_parameter(tmp_path: Path) -> None:
    nodes = [
        node("Gather", "table tokens", "e"),
        node("ReduceMean", "e", "m", axes=[1], keepdims=0),
        node("Transpose", "table", "t"),
        node("MatMul", "m t", "logits"),
    ]
    given = [tensor("tokens", "N", 5, kind=TensorProto.INT64)]
    model = loaded(files.file(nodes, given, ["logits"], {"table": weights(7, 4)}), tmp_path)
    tokens = torch.arange(30).reshape(6, 5) % 7
    assert [name for name, _ in model.named_parameters()] == ["table"]
    first, last = trained(model, tokens, torch.arange(6), steps=30, lr=5e-2)
    assert last < 0.7 * first


def test_shape_arithmetic_knows_the_batch(tmp_path: Path) -> None:
    """Range, ConstantOfShape, Expand, Slice, a division, floats and a position table, as transformers are exported."""
    held = {"table": weights(9, 4), "w": weights(4, 4), "one": np.array(1), "two": np.array([2]), "zero": np.array(0),
            "step": np.array(1), "axes": np.array([0]), "first": np.array([1]), "last": np.array([3]),
            "half": np.float32(0.5)}  # fmt: skip
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s one", "length"),
        node("Range", "zero length step", "places"),
        node("Gather", "table places", "position"),
        node("Add", "x position", "h"),
        node("Slice", "s first last", "tail"),
        node("ReduceProd", "tail", "features", keepdims=1),
        node("Gather", "s axes", "batch"),
        node("Concat", "batch features", "flat", axis=0),
        node("MatMul", "h w", "m"),
        node("Reshape", "m flat", "f"),
        node("ConstantOfShape", "flat", "filled", value=numpy_helper.from_array(np.array([2.0], np.float32))),
        node("Cast", "features", "count", to=TensorProto.FLOAT),
        node("Sqrt", "count", "root"),
        node("Add", "f filled", "g"),
        node("Div", "g root", "y"),
    ]
    model = loaded(files.file(nodes, [tensor("x", "N", 3, 4)], ["y"], held), tmp_path)
    x = torch.randn(5, 3, 4)
    np.testing.assert_allclose(
        model(x).detach(), files.run(tmp_path / "model.onnx", x.numpy())[0], rtol=1e-5, atol=1e-6
    )
    exported = torch.export.export(model, (x,), dynamic_shapes={"inputs": ({0: torch.export.Dim("n")},)}).module()
    torch.testing.assert_close(exported(x[:2]), model(x[:2]))
    assert list(model.file_names.values()) == ["table", "w"]


@pytest.mark.parametrize("shape", [[1, 4], [1, -1]])
def test_a_batch_size_of_one_is_freed(tmp_path: Path, shape: list[int]) -> None:
    nodes = [node("MatMul", "x w", "m"), node("Reshape", "m shape", "r"), node("Concat", "token r", "y", axis=1)]
    held = {"w": weights(4, 2), "shape": np.array(shape), "token": weights(1, 2)}
    model = loaded(files.file(nodes, [tensor("x", 1, 2, 4)], ["y"], held), tmp_path)
    assert model.batch == 1
    x = torch.randn(3, 2, 4)
    one = [files.run(tmp_path / "model.onnx", each[None].numpy())[0] for each in x]
    np.testing.assert_allclose(model(x).detach(), np.concatenate(one), rtol=1e-5, atol=1e-6)


def test_an_if_of_a_constant_is_its_branch_and_its_weights_train(tmp_path: Path) -> None:
    def branch(name: str) -> Any:
        held = [numpy_helper.from_array(weights(4, 2, seed=len(name)), f"{name}.w")]
        return helper.make_graph(
            [node("MatMul", f"x {name}.w", f"{name}.y")], name, [], [tensor(f"{name}.y", "N", 2)], held
        )

    choose = node("If", "flag", "y", then_branch=branch("yes"), else_branch=branch("no"), name="choice")
    given = [tensor("x", "N", 4), helper.make_tensor_value_info("flag", TensorProto.BOOL, [])]
    for flag, name in ((True, "yes.w"), (False, "no.w")):
        model = loaded(files.file([choose], given, ["y"], {}), tmp_path, fixed={"flag": flag})
        assert list(model.file_names.values()) == [name]
        with torch.no_grad():
            model.get_parameter(name).mul_(2)
        model.save(tmp_path / "back.onnx")
        x = torch.randn(3, 4)
        wanted = files.run(tmp_path / "back.onnx", x.numpy(), np.array(flag))[0]
        np.testing.assert_allclose(model(x).detach(), wanted, rtol=1e-5, atol=1e-6)


def test_functions_of_the_file_are_read(tmp_path: Path) -> None:
    double = helper.make_function(
        "own", "Double", ["a"], ["b"], [node("Add", "a a", "b")], [helper.make_opsetid("", 17)]
    )
    nodes = [node("MatMul", "x w", "m"), node("Double", "m", "y", domain="own")]
    model = files.file(nodes, [tensor("x", "N", 4)], [tensor("y", "N", 2)], {"w": weights(4, 2)}, functions=[double])
    read = loaded(model, tmp_path)
    x = torch.randn(2, 4)
    assert torch.allclose(read(x), 2 * x @ read.get_parameter("w"))


def test_an_old_opset_is_converted_and_written_back_as_it_was(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "m"), node("Add", "m b", "y", broadcast=1, axis=1)]
    model = files.file(nodes, [tensor("x", 1, 4)], [tensor("y", 1, 2)], {"w": weights(4, 2), "b": weights(2)}, opset=6)
    model.ir_version = 3
    model.graph.input.extend([tensor("w", 4, 2), tensor("b", 2)])  # as files of that time have it
    read = loaded(model, tmp_path)
    with torch.no_grad():
        read.get_parameter("w").mul_(2)
    read.save(tmp_path / "back.onnx")
    assert onnx.load(tmp_path / "back.onnx").opset_import[0].version == 6
    torch.testing.assert_close(load(tmp_path / "back.onnx")(torch.ones(2, 4)), read(torch.ones(2, 4)))


# ---- outputs


def test_scores_before_the_softmax_and_inner_values(tmp_path: Path) -> None:
    model = files.mlp()
    x = torch.randn(4, 6)
    plain = loaded(model, tmp_path)(x)
    assert torch.allclose(loaded(model, tmp_path, logits=True)(x).softmax(1), plain)
    assert loaded(model, tmp_path, outputs=["c", "scores"])(x)[0].shape == (4, 8)
    np.testing.assert_allclose(plain.detach(), files.run(tmp_path / "model.onnx", x.numpy())[0], rtol=1e-5, atol=1e-6)


def classifier() -> Any:
    """As skl2onnx writes a logistic regression: label, and a map of probabilities."""
    ml = "ai.onnx.ml"
    nodes = [
        node("Scaler", "x", "scaled", domain=ml, offset=[0.5] * 4, scale=[2.0] * 4),
        node("LinearClassifier", "scaled", "label raw", domain=ml, name="classifier", classlabels_ints=[0, 1, 2],
             coefficients=weights(12).tolist(), intercepts=weights(3).tolist(), multi_class=1,
             post_transform="SOFTMAX"),
        node("Normalizer", "raw", "normal", domain=ml, norm="L1"),
        node("ZipMap", "normal", "probabilities", domain=ml, classlabels_int64s=[0, 1, 2]),
    ]  # fmt: skip
    maps = helper.make_sequence_type_proto(helper.make_map_type_proto(7, helper.make_tensor_type_proto(1, [])))
    returned = [tensor("label", "N", kind=7), helper.make_value_info("probabilities", maps)]
    model = files.file(nodes, [tensor("x", "N", 4)], [], {})
    model.graph.output.extend(returned)
    return model


def test_coefficients_of_a_classical_model_train_and_go_back(tmp_path: Path) -> None:
    model = loaded(classifier(), tmp_path, logits=True)
    assert list(model.file_names.values()) == ["classifier.coefficients", "classifier.intercepts"]
    x = torch.randn(30, 4)
    target = x[:, :3].argmax(1)
    first, last = trained(model, x, target, steps=40, lr=5e-2)
    assert last < 0.6 * first
    model.save(tmp_path / "back.onnx")
    label, probabilities = files.run(tmp_path / "back.onnx", x.numpy())
    wanted = model(x).softmax(1)
    np.testing.assert_allclose(
        [[each[k] for k in range(3)] for each in probabilities], wanted.detach(), rtol=1e-4, atol=1e-5
    )
    assert (label == wanted.argmax(1).numpy()).all()
    assert loaded(classifier(), tmp_path, outputs=["label"]).outputs == ("label",)


# ---- writing back


def test_the_trained_file_is_the_file_with_other_weights(tmp_path: Path) -> None:
    model = loaded(files.cnn(), tmp_path)
    model.save(tmp_path / "same.onnx")
    assert (tmp_path / "same.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()
    first, last = trained(model, images(), torch.arange(6))
    assert last < 0.7 * first
    model.save(tmp_path / "trained.onnx")
    before, after = onnx.load(tmp_path / "model.onnx"), onnx.load(tmp_path / "trained.onnx")
    onnx.checker.check_model(after)
    changed = {
        old.name
        for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True)
        if not np.array_equal(numpy_helper.to_array(old), numpy_helper.to_array(new))
    }
    assert changed == set(model.file_names.values())
    assert blank(before) == blank(after)
    wanted = files.run(tmp_path / "trained.onnx", images().numpy())[0]
    np.testing.assert_allclose(model(images()).detach(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(load(tmp_path / "trained.onnx")(images()), model(images()))


def external(folder: Path) -> Path:
    """The small net with its weights in a file of its own, two to a file."""
    path = folder / "net.onnx"
    folder.mkdir(exist_ok=True)
    onnx.save(files.cnn(), path, save_as_external_data=True, location="net.bin", size_threshold=64)
    return path


def test_external_data_keep_their_layout(tmp_path: Path) -> None:
    path = external(tmp_path / "here")
    before = onnx.load(path, load_external_data=False)
    assert any(each.external_data for each in before.graph.initializer)
    model = load(path)
    wanted = model(images())
    with torch.no_grad():
        model.get_parameter("head.weight").mul_(2)
    for target in (tmp_path / "there" / "net.onnx", path):
        model.save(target)
        after = onnx.load(target, load_external_data=False)
        assert blank(before) == blank(after)
        assert torch.allclose(load(target)(images()), 2 * wanted, atol=1e-5)
        assert sorted(each.name for each in target.parent.iterdir()) == ["net.bin", "net.onnx"]


def test_a_write_that_fails_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = external(tmp_path)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    model = load(path)
    with torch.no_grad():
        model.get_parameter("head.weight").mul_(2)

    def broken(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OutputError, match=r"cannot write .*net\.onnx: .*No space left"):
        model.save(path)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before
    monkeypatch.undo()
    with pytest.raises(OutputError, match="it is a folder"):
        model.save(tmp_path)


# ---- the page


def test_the_page_lists_the_operators() -> None:
    text = DOCS.read_text()
    for part in (weights_listed(), table()):
        assert part in text, "python -m onward.compiler.from_onnx.listing prints the tables of docs/onnx-import.md"
    assert f"{len(OPERATORS) + len(EXPANDED)} operators" in text


def test_loading_needs_no_gradient_of_what_is_no_weight(tmp_path: Path) -> None:
    model = loaded(files.cnn(), tmp_path)
    assert all(not buffer.requires_grad for buffer in model.buffers())
    with pytest.raises(UnsupportedModelError, match="no constant of the file is a weight"):
        loaded(files.file([node("Relu", "x", "y")], [tensor("x", "N", 3)], ["y"], {}), tmp_path)
