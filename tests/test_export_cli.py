"""``onward export``: what it writes, which the trainer takes, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import call

from onward.runtime.onnx import read_folder
from onward.runtime.onnx.__main__ import main


def export(folder: Path, *options: object, model: str = "mlp", code: int = 0) -> str:
    """What ``onward export`` printed, on one line."""
    small = ("--model-option", "hidden=(8,)") if model == "mlp" else ()
    result = call("export", model, "-o", folder, *small, *options, code=code)
    return " ".join((result.output + (result.stderr if code else "")).split())


def test_what_it_writes_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the options as the trainer's defaults, in the order of the data file."""
    folder, data = tmp_path / "exports" / "mlp", tmp_path / "data" / "digits.npz"
    given = ("--epochs", 3, "--batch-size", 60, "--lr", 0.01, "--optimizer", "sgd", "--seed", 7, "--data", "digits")
    out = export(folder, *given, "--data-file", data)
    assert f"{folder}: " in out
    assert f"{data}: digits" in out
    found = read_folder(folder)
    assert (found.model, found.seed, found.step) == ("mlp", 7, 0)
    assert (found.optimizer["name"], found.optimizer["lr"], found.optimizer["momentum"]) == ("sgd", 0.01, 0.9)
    assert (found.training["epochs"], found.training["batch_size"]) == (3, 60)
    assert (found.targets[0].classes, found.targets[0].ignored) == (10, (-100,))
    with np.load(data) as arrays:
        assert set(arrays) == {"x", "y", "x_test", "y_test"}
        samples = len(arrays["x"])
    assert main(["info", str(folder)]) == 0
    assert "sgd: lr 0.01" in capsys.readouterr().out
    assert main(["train", str(folder), "--data", str(data), "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"{3 * -(-samples // 60)} steps in")
    assert "accuracy" in lines[-2]
    assert not list(tmp_path.rglob(".tmp-*"))


def test_only_an_export_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "mlp"
    export(folder, "--lr", 0.5)
    before = (folder / "manifest.json").read_bytes()
    assert "is not empty" in export(folder, code=2)
    assert (folder / "manifest.json").read_bytes() == before
    export(folder, "--force", "--lr", 0.25)
    assert read_folder(folder).optimizer["lr"] == 0.25
    for content in (None, b"{}", b"[]", b"\xff", json.dumps({"format": "onward-program"}).encode()):
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "precious").write_text("mine")
        if content is not None:
            (other / "manifest.json").write_bytes(content)
        message = export(other, "--force", code=2)
        assert "holds something else" in message
        assert (other / "precious").read_text() == "mine"
    assert "is not a folder" in export(other / "precious", "--force", code=2)
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "onx"), "unknown format 'onx'"),
        (("--optimizer", "adamm"), "unknown optimizer 'adamm'"),
        (("--lr", "0"), "lr=0"),
        (("--epochs", "0"), "epochs=0"),
        (("--batch-size", "0"), "batch_size=0"),
        (("--data", "digit"), "digit"),
        (("--sampling", "error"), "no form in ONNX: sampling"),
        (("--probe", "0.5"), "no form in ONNX: probe=0.5"),
    ],
)
def test_what_it_refuses(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert message in export(tmp_path / "out", *options, "--data-file", tmp_path / "data.npz", code=2)
    assert not list(tmp_path.iterdir())


def test_a_data_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    assert "it is a folder" in export(tmp_path / "out", "--data-file", tmp_path, code=2)
    assert not list(tmp_path.iterdir())


def test_an_unknown_model(tmp_path: Path) -> None:
    assert "mlpp" in export(tmp_path / "out", model="mlpp", code=2)
    assert not list(tmp_path.iterdir())


def test_its_help() -> None:
    out = " ".join(call("export", "--help").output.split())
    for words in ("Example", "onward export resnet5", "python -m onward.runtime.onnx train", "--data-file", "--force"):
        assert words in out


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_without_the_extra_it_says_so_before_the_work(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("onward.runtime.export", "onward.runtime.onnx"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert f"exporting needs {missing}: pip install 'onward[onnx]'" in export(tmp_path / "out", code=2)
    assert not list(tmp_path.iterdir())
