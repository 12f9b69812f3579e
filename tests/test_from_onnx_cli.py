"""ONNX files on the command line: trained, written back, compiled, shown, or refused where they do not fit the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import call

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_files as files  # noqa: E402
from onnx_files import blank  # noqa: E402

import onward  # noqa: E402


def test_train_writes_the_trained_file(tmp_path: Path) -> None:
    path, out = files.save(files.cnn(), tmp_path / "net.onnx"), tmp_path / "out" / "trained.onnx"
    call("train", "--model", path, "--epochs", 2, "--warmup", 2, "--lr", 5e-3, "--threads", 1, "-q", "--save-onnx", out,
         "--freeze", "norm", "--json", tmp_path / "r.json")  # fmt: skip
    data = onward.models.load("digits")
    images, target = data.test.tensors
    assert blank(onnx.load(path)) == blank(onnx.load(out))
    accuracy = (files.run(out, images.numpy())[0].argmax(1) == target.numpy()).mean()
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["test_accuracy"] == pytest.approx(accuracy, abs=0.003)
    assert accuracy > (files.run(path, images.numpy())[0].argmax(1) == target.numpy()).mean()


def test_compile_and_inspect_take_a_file(tmp_path: Path) -> None:
    path = files.save(files.cnn(), tmp_path / "net.onnx")
    assert "nodes.head/Gemm" in call("inspect", path).output
    call("compile", path, "-o", tmp_path / "compiled")
    assert (tmp_path / "compiled" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (files.cnn(classes=7), (), "gives 7 scores a sample; data set 'digits' has 10 classes."),
        (files.mlp(features=9), (), "input 'x' is float32 [batch, 9]; the batch is [2, 1, 8, 8]."),
        (files.cnn(), ("--data", "surnames"), "input 'image' is float32 [batch, 1, 8, 8], not int64."),
        (files.cnn(), ("--model-option", "width=3"), "unknown option of model"),
        (files.cnn(), ("--model-option", "outputs=r,logits"), "has 2 outputs (r, logits), and the loss of a data set"),
        (files.cnn(), ("--model-option", "outputs=nothing"), "unknown value of the file 'nothing'"),
    ],
)
def test_a_file_that_does_not_fit_the_data_is_refused(tmp_path: Path, model: Any, arguments: Any, message: str) -> None:
    path = files.save(model, tmp_path / "net.onnx")
    assert message in " ".join(call("train", "--model", path, *arguments, code=2).output.split())


def test_only_a_file_is_written_back(tmp_path: Path) -> None:
    out = call("train", "--model", "mlp", "--save-onnx", tmp_path / "x.onnx", code=2).output
    assert "--save-onnx writes back a model that was read from a file" in out
    assert not list(tmp_path.iterdir())
