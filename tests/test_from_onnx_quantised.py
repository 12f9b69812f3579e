"""Int8 ONNX models: their forward is onnxruntime's, their weights train behind their quantisers and go back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_files as files  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from onnx_files import images, loaded, node, tensor, trained  # noqa: E402

import onward  # noqa: E402
from onward.compiler.from_onnx import load  # noqa: E402
from onward.compiler.from_onnx.quantised import fake_quantise  # noqa: E402
from onward.compiler.from_onnx.values import to_tensor  # noqa: E402


def test_a_qdq_model_runs_its_quantised_forward(tmp_path: Path) -> None:
    model = loaded(files.qdq(), tmp_path)
    assert list(model.file_names.values()) == ["w_q", "b_q", "v", "bias"]
    assert model.get_parameter("w_q").dtype == torch.float32
    made, wanted = model(images(20)).detach().numpy(), files.run(tmp_path / "model.onnx", images(20).numpy())[0]
    np.testing.assert_allclose(made, wanted, atol=0.05 * 0.01 * 127 * 1.01)  # one step of one activation
    assert np.median(np.abs(made - wanted)) < 1e-6
    model.save(tmp_path / "same.onnx")
    assert (tmp_path / "same.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()


def test_a_quantised_weight_has_the_derivative_of_a_clamp_and_goes_back_as_whole_numbers(tmp_path: Path) -> None:
    model = loaded(files.qdq(), tmp_path)
    weight = model.get_parameter("w_q")
    with torch.no_grad():
        weight[0, 0, 0, 0] = 1.0  # far beyond 127 steps of 0.003
        weight[1, 0, 0, 0] = 0.0509  # 25.45 steps of 0.002
    latent = model.latents["w_q"]
    assert latent.zero is not None
    hard = fake_quantise(latent.node, weight, to_tensor(latent.scale), to_tensor(latent.zero))
    hard.sum().backward()
    assert hard[0, 0, 0, 0].item() == pytest.approx(127 * 0.003)
    assert hard[1, 0, 0, 0].item() == pytest.approx(25 * 0.002)
    assert weight.grad is not None
    assert weight.grad[0, 0, 0, 0] == 0
    assert (weight.grad.flatten()[1:] == 1).all()
    model.save(tmp_path / "back.onnx")
    held = {each.name: numpy_helper.to_array(each) for each in onnx.load(tmp_path / "back.onnx").graph.initializer}
    assert held["w_q"].dtype == np.int8
    assert (held["w_q"][0, 0, 0, 0], held["w_q"][1, 0, 0, 0]) == (127, 25)
    assert torch.equal(load(tmp_path / "back.onnx")(images()), model(images()))


def test_a_qdq_model_trains_where_autograd_gives_nothing(tmp_path: Path) -> None:
    model = loaded(files.qdq(), tmp_path)
    F.cross_entropy(model(images()), torch.arange(6)).backward()
    assert model.get_parameter("w_q").grad is None
    model.zero_grad()
    onward.freeze(model, "v", "bias", "b_q")
    first, last = trained(model, images(), torch.arange(6), steps=60)
    assert last < 0.9 * first
    model.save(tmp_path / "back.onnx")
    before, after = onnx.load(tmp_path / "model.onnx"), onnx.load(tmp_path / "back.onnx")
    changed = {
        old.name for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True) if old != new
    }
    assert changed == {"w_q"}
    np.testing.assert_allclose(
        files.run(tmp_path / "back.onnx", images().numpy())[0], model(images()).detach(), atol=0.05 * 0.01 * 127 * 1.01
    )


def test_weights_of_quantised_operators_train(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    held: dict[str, Any] = {
        "s": np.float32(0.05), "z": np.uint8(100), "w": rng.integers(-99, 99, (10, 1, 8, 8)).astype(np.int8),
        "ws": np.float32(0.004), "wz": np.int8(0), "b": np.zeros(10, np.int32), "ys": np.float32(0.1),
        "yz": np.uint8(128), "shape": np.array([0, -1]),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("QLinearConv", "q s z w ws wz ys yz b", "c"),
        node("DequantizeLinear", "c ys yz", "d"),
        node("Reshape", "d shape", "y"),
    ]
    model = loaded(files.file(nodes, [tensor("x", "N", 1, 8, 8)], ["y"], held), tmp_path)
    assert list(model.file_names.values()) == ["w", "b"]
    wanted = files.run(tmp_path / "model.onnx", images().numpy())[0]
    np.testing.assert_allclose(model(images()).detach(), wanted, atol=0.101)
    first, last = trained(model, images(), torch.arange(6), steps=30)
    assert last < first
