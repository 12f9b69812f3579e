"""What is wrong with a folder, a data file, a checkpoint or an option is said in one line, and nothing is left."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx_cases import CPU, change, copied, data_file, exported, settings_of, split_of, trainer_of

from onward.passes.errors import DataError, FolderError, OptionError
from onward.runtime.onnx import Device, Settings, Trainer, read_folder, read_splits
from onward.runtime.onnx.__main__ import main
from onward.runtime.onnx.folder import Form

CASE = "layerwise"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to damage."""
    return copied(CASE, tmp_path / "exported")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return data_file(CASE, tmp_path / "data.npz")


def train(folder: Path, data: Path, *options: object) -> int:
    given = ["train", folder, "--data", data, "--threads", "1", "--epochs", "1", *options]
    return main([str(each) for each in given])


def failing(capfd: pytest.CaptureFixture[str], folder: Path, data: Path, *options: object) -> str:
    """The one line that a run ends with; it writes nothing."""
    root = data.parent
    before = sorted(root.rglob("*"))
    assert train(folder, data, *options) == 1
    out, err = capfd.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert "epoch" not in out
    assert sorted(root.rglob("*")) == before
    return err


# --- the manifest -------------------------------------------------------------------------------------------------


def test_there_is_no_folder(tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "nothing", data):
        assert "manifest.json cannot be read" in failing(capfd, path, data)
    (tmp_path / "empty").mkdir()
    assert "`onward export` writes such a folder" in failing(capfd, tmp_path / "empty", data)
    assert main(["info", str(tmp_path / "empty")]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b'{"format": "onward-tr', "is damaged"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[]", "not the manifest"),
        (b"[" * 100_000, "is damaged"),
        (b'{"format": "onward-program", "version": 1}', "not the manifest of an exported training step"),
        (b'{"format": "onward-training", "version": 2}', "has version 2, and this Onward reads version 1"),
        (b'{"format": "onward-training"}', "has version None"),
        (b'{"format": "onward-training", "version": 1}', "is damaged: it lacks 'tasks'"),
    ],
)
def test_manifests_that_are_none(content: bytes, message: str, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(FolderError, match=message):
        read_folder(folder)


def test_every_entry_is_needed(folder: Path) -> None:
    """Without any of them, or with one of another type, the manifest is damaged, or still read, but nothing else."""
    whole = json.loads((folder / "manifest.json").read_text())
    needed = {"model", "whole", "inputs", "targets", "state", "parameters", "seed", "step", "optimizer", "probe",
              "least", "forwards", "tasks", "settings"}  # fmt: skip
    for key in whole:
        (folder / "manifest.json").write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        if key in needed:
            with pytest.raises(FolderError, match=f"it lacks '{key}'"):
                read_folder(folder)
        elif key not in ("format", "version"):
            read_folder(folder)
    for key in needed:
        wrong: Any
        for wrong in (None, 3, "text", [1], ["a"], [{}], {}, {"a": 1}, [None], 1e400):
            (folder / "manifest.json").write_text(json.dumps({**whole, key: wrong}))
            try:
                read_folder(folder)
            except FolderError as error:
                assert "is damaged" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["tasks"].reverse(), "no task before .* makes"),
        (lambda m: m["tasks"].pop(), "no task makes"),
        (lambda m: m["tasks"].pop(0), "no task before"),
        (lambda m: m["tasks"][0].pop("reads"), "it lacks 'reads'"),
        (lambda m: m["tasks"][0].update(file=3), "is damaged"),
        (lambda m: m["tasks"][0].update(file="a\0b"), "is damaged"),
        (lambda m: m["state"][0].update(shape=["a", None]), "is damaged"),
        (lambda m: m["state"][0].update(new="new:nothing"), "no task makes new:nothing"),
        (lambda m: m["optimizer"].pop("lr"), "it lacks 'lr'"),
        (lambda m: m["optimizer"].update(lr="fast"), "is damaged"),
        (lambda m: m["optimizer"].pop("name"), "it lacks 'name'"),
        (lambda m: m["probe"].update(always=False), "its state lacks feedback:steps or feedback:next_probe"),
        (lambda m: m["settings"].update(training={"epochs": "many"}), "is damaged"),
        (lambda m: m["tasks"][0].update(file="../outside.onnx"), "leads out of the folder"),
        (lambda m: m["tasks"][0].update(file="stages/../../outside.onnx"), "leads out of the folder"),
        (lambda m: m["tasks"][0].update(file="/etc/passwd"), "leads out of the folder"),
    ],
)
def test_manifests_that_do_not_fit_together(edit: Callable[[Any], Any], message: str, folder: Path) -> None:
    change(folder, edit)
    with pytest.raises(FolderError, match=message):
        read_folder(folder)


def test_tasks_that_wait_for_each_other_do_not_hang(tmp_path: Path) -> None:
    """A manifest that calls a task perturbed that every step needs."""
    folder = copied("auto", tmp_path / "exported")
    change(folder, lambda m: next(t for t in m["tasks"] if t["name"] == "E").update(perturbed=True))
    change(folder, lambda m: m["probe"].update(warmup=0))
    arrays = dict(np.load(folder / "state.npz"))
    arrays["feedback:next_probe"] = np.array(10**6)
    np.savez(folder / "state.npz", **arrays)
    trainer = Trainer(read_folder(folder), settings_of("auto", executor="tasks", workers=2), CPU)
    with pytest.raises(FolderError, match="the step's tasks wait for each other"):
        trainer.fit(split_of("auto"))


@pytest.mark.parametrize("name", ["training_step.onnx", "inference.onnx", "loss.onnx", "state.npz", "stages/F0.onnx"])
def test_links_that_lead_out_are_not_followed(name: str, folder: Path, data: Path, tmp_path: Path,
                                              capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    assert "leads out of the folder" in failing(capfd, folder, data, "-o", tmp_path / "out.onnx")
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    assert "error: " in failing(capfd, folder, data)


# --- the models ---------------------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "corrupt": lambda content: content[:20] + bytes(byte ^ 0x5A for byte in content[20:]),
    "text": lambda content: b"<html>not found</html>",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["training_step.onnx", "inference.onnx", "loss.onnx", "gradients/G1.onnx"])
def test_damaged_models(name: str, damage: str, folder: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = folder / name
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert f"{name} " in failing(capfd, folder, data, "--executor", "tasks" if "/" in name else "fused")


@pytest.mark.parametrize("name", ["training_step.onnx", "inference.onnx", "loss.onnx", "updates/C.onnx"])
def test_missing_models(name: str, folder: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / name).unlink()
    message = failing(capfd, folder, data, "--executor", "tasks" if "/" in name else "fused")
    assert f"{name} is missing: the folder is not whole" in message


def test_operators_that_nobody_knows(folder: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(str(folder / "loss.onnx"))
    model.graph.node[0].domain = "com.elsewhere"
    model.opset_import.append(helper.make_opsetid("com.elsewhere", 1))
    (folder / "loss.onnx").write_bytes(model.SerializeToString())
    message = failing(capfd, folder, data)
    assert f"loss.onnx does not load in onnxruntime {ort.__version__}" in message
    assert "com.elsewhere" in message


def test_external_data_from_outside_is_not_read(folder: Path, data: Path, tmp_path: Path,
                                                capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Neither by a path that leads out nor by an absolute one nor by a link, of a model beside the manifest."""
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(1 << 12))
    original = (folder / "inference.onnx").read_bytes()
    for location in ("../secret.bin", str(secret), "link.bin"):
        if location == "link.bin":
            (folder / location).symlink_to(secret)
        model = onnx.load_from_string(original)
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", str(4 * int(np.prod(tensor.dims))))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        (folder / "inference.onnx").write_bytes(model.SerializeToString())
        message = failing(capfd, folder, data, "-o", tmp_path / "out.onnx")
        assert "inference.onnx" in message
        assert "xternal data" in message


def test_models_that_read_or_write_something_else(folder: Path) -> None:
    """Another export's step, and tasks that are another's."""
    other = exported("normalised").path
    (folder / "training_step.onnx").write_bytes((other / "training_step.onnx").read_bytes())
    with pytest.raises(FolderError, match=r"training_step.onnx reads .*, which the manifest does not say"):
        Trainer(read_folder(folder), settings_of(CASE), CPU)
    (folder / "gradients" / "G0.onnx").write_bytes((folder / "gradients" / "G1.onnx").read_bytes())
    with pytest.raises(FolderError, match=r"G0.onnx (reads|does not write)"):
        Trainer(read_folder(folder), settings_of(CASE, executor="tasks"), CPU)


# --- arrays -------------------------------------------------------------------------------------------------------


def damaged_archives(good: dict[str, Any]) -> dict[str, tuple[bytes, str]]:
    """Damaged ``.npz`` files of the arrays, and what is said of them."""

    def saved(**changed: Any) -> bytes:
        file = io.BytesIO()
        np.savez(file, **{k: v for k, v in {**good, **changed}.items() if v is not None})
        return file.getvalue()

    whole, name = saved(), next(iter(good))
    header = io.BytesIO()
    with zipfile.ZipFile(header, "w") as archive:
        for key in good:
            archive.writestr(f"{key}.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4'")
    array = io.BytesIO()
    np.save(array, good[name])
    return {
        "empty": (b"", "cannot be read"),
        "truncated": (whole[: len(whole) // 2], "cannot be read"),
        "text": (b"a,b\n1,2\n", "cannot be read"),
        "array": (array.getvalue(), "cannot be read"),
        "pickle": (pickle.dumps(good), "cannot be read"),
        "objects": (saved(**{name: np.array([{}, None], object)}), "cannot be read.*: Object arrays"),
        "headers": (header.getvalue(), "cannot be read"),
        "missing": (saved(**{name: None}), name),
        "shape": (saved(**{name: np.zeros((3, 3, 3), good[name].dtype)}), f"{name} has shape 3×3×3"),
        "number": (saved(**{name: np.array(1, good[name].dtype)}), rf"{name} has shape \(\)"),
        "dtype": (saved(**{name: good[name].astype(np.float64)}), f"{name} is float64, and float32 is wanted"),
    }


KINDS = ["empty", "truncated", "text", "array", "pickle", "objects", "headers", "missing", "shape", "number", "dtype"]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_states(kind: str, folder: Path) -> None:
    content, message = damaged_archives(dict(np.load(folder / "state.npz")))[kind]
    (folder / "state.npz").write_bytes(content)
    with pytest.raises(FolderError, match=message):
        Trainer(read_folder(folder), settings_of(CASE), CPU)


def test_a_state_may_be_missing_and_hold_more(folder: Path) -> None:
    np.savez(folder / "state.npz", **dict(np.load(folder / "state.npz")), more=np.zeros(3))
    Trainer(read_folder(folder), settings_of(CASE), CPU)
    (folder / "state.npz").unlink()
    with pytest.raises(FolderError, match=r"state.npz cannot be read: .*No such file"):
        Trainer(read_folder(folder), settings_of(CASE), CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_data(kind: str, tmp_path: Path) -> None:
    split = split_of(CASE)
    content, message = damaged_archives({"x": split.arrays["input:0"], "y": split.arrays["target:0"]})[kind]
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_splits(tmp_path / "data.npz", exported(CASE))


X, Y = split_of(CASE).arrays["input:0"], split_of(CASE).arrays["target:0"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": None}, "lacks 'x': float32 of shape N×6"),
        ({"y": None}, "lacks 'y': int64 of shape N"),
        ({"x_test": X}, "lacks 'y_test'"),
        ({"y_test": Y}, "lacks 'x_test'"),
        ({"images": X}, "holds 'images'; layerwise takes x, y, and x_test, y_test"),
        ({"x0": X}, "holds 'x0'"),
        ({"x": X[:50]}, "x and y have 50 and 100 samples"),
        ({"x_test": X, "y_test": Y[:5]}, "x_test and y_test have 100 and 5 samples"),
        ({"x": X[:0], "y": Y[:0]}, "holds no sample"),
        ({"x_test": X[:0], "y_test": Y[:0]}, "holds no sample"),
        ({"y": Y.astype(np.int32)}, "y is int32, and int64 is wanted"),
        ({"y": Y.astype(str)}, "y is <U21, and int64 is wanted"),
        ({"x": X[:, :5]}, "x has shape 100×5, and N×6 is wanted"),
        ({"x": X[:, None]}, "x has shape 100×1×6"),
        ({"x": X.astype(">f4")}, "x is >f4, and float32 is wanted"),
    ],
)
def test_data_that_do_not_fit(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_splits(data_file(CASE, tmp_path / "data.npz", **changed), exported(CASE))


def test_several_inputs_and_targets_are_numbered(tmp_path: Path) -> None:
    forms = [Form("input:0", "float32", ("N", 6)), Form("input:1", "int64", ("N",)), Form("target:0", "int64", ("N",))]
    folder = replace(exported(CASE), inputs=tuple(forms[:2]), targets=(forms[2], Form("target:1", "float32", ("N",))))
    z = Y.astype(np.float32)
    path = data_file(CASE, tmp_path / "data.npz", x=None, y=None, x0=X, x1=Y, y0=Y, y1=z)
    train, test = read_splits(path, folder)
    assert test is None
    assert [len(batch["input:1"]) for batch in train.batches(60)] == [60, 40]
    assert train.arrays["target:1"].tobytes() == z.tobytes()
    with pytest.raises(DataError, match="holds 'x'; layerwise takes x0, x1, y0, y1, and x0_test, x1_test"):
        read_splits(data_file(CASE, tmp_path / "data.npz", x0=X), folder)


@pytest.mark.parametrize("wrong", [3, 99, -1, -99])
def test_classes_that_the_model_does_not_have(wrong: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX would take -1 for the last one."""
    y = Y.copy()
    y[:40] = -100  # which torch's loss ignores
    y[40] = wrong
    data = data_file(CASE, tmp_path / "data.npz", y=y)
    message = failing(capfd, exported(CASE).path, data, "-o", tmp_path / "out.onnx")
    assert f"y holds class {wrong}, and classes are 0 to 2" in message


def test_numbers_that_are_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    x = X.copy()
    x[40, 3] = np.nan
    data = data_file(CASE, tmp_path / "data.npz", x=x)
    message = failing(capfd, exported(CASE).path, data, "-o", tmp_path / "out.onnx", "--executor", "tasks")
    assert "NaN or infinite" in message


def test_a_state_of_numbers_that_are_none(folder: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arrays = dict(np.load(folder / "state.npz"))
    arrays["parameter:0.weight"][0, 0] = np.nan
    np.savez(folder / "state.npz", **arrays)
    for executor in ("fused", "tasks"):
        message = failing(capfd, folder, data, "--executor", executor, "--checkpoint", data.parent / "run.npz")
        assert "step 0: a loss, a gradient, or what comes of it is NaN or infinite" in message


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"epochs": True}, "epochs=True"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"workers": 0, "executor": "tasks"}, "workers=0"),
        ({"workers": 2}, "workers=2: tasks run side by side with executor='tasks' only"),
        ({"threads": -1}, "threads=-1"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"lr": "fast"}, "lr='fast'"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"schedule": "cosin"}, "schedule='cosin': known are constant, cosine"),
        ({"executor": "threads"}, "executor='threads': known are fused, tasks"),
    ],
)
def test_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Settings(**{"epochs": 1, "batch_size": 1, "lr": 0.1, **given})


def test_options_of_the_command_line(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = exported(CASE).path
    assert "--resume needs --checkpoint" in failing(capfd, path, data, "--resume")
    assert "--checkpoint-every needs --checkpoint" in failing(capfd, path, data, "--checkpoint-every", "3")
    assert "have to be several files" in failing(capfd, path, data, "-o", data)
    assert "have to be several files" in failing(
        capfd, path, data, "-o", tmp_path / "a", "--checkpoint", tmp_path / "a"
    )
    assert "workers=2: tasks run" in failing(capfd, path, data, "--workers", "2")
    assert "lr=-1.0" in failing(capfd, path, data, "--lr", "-1")
    assert "cannot be read" in failing(capfd, path, tmp_path / "nothing.npz")
    for wrong in (["--device", "tpu"], ["--schedule", "x"], ["--executor", "x"], ["--epochs", "x"]):
        with pytest.raises(SystemExit) as caught:
            train(path, data, *wrong)
        assert caught.value.code == 2
        assert wrong[0] in capfd.readouterr().err


def test_outputs_that_cannot_be_written_are_refused_before_the_work(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = exported(CASE).path
    for option in ("--output", "--checkpoint"):
        assert "it is a folder" in failing(capfd, path, data, option, tmp_path)
        assert "cannot write" in failing(capfd, path, data, option, data / "below-a-file.onnx")
        assert "no ordinary file" in failing(capfd, path, data, option, "/dev/null")
    if os.geteuid():  # root may write everywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "cannot write" in failing(capfd, path, data, "--output", tmp_path / "closed" / "out.onnx")


def test_without_onnx_no_model_is_written(data: Path, capfd: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "onnx", None)
    message = failing(capfd, exported(CASE).path, data, "-o", data.parent / "out.onnx")
    assert "needs the package onnx: pip install 'onward[onnx]'" in message


# --- devices ------------------------------------------------------------------------------------------------------


def test_a_gpu_that_is_not_there_is_named(data: Path, capfd: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Neither where onnxruntime has no provider for one nor where it has, but finds none."""
    for providers in (["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]):
        monkeypatch.setattr(ort, "get_available_providers", lambda providers=providers: providers)
        assert train(exported(CASE).path, data, "--device", "cuda") == 0
        out, err = capfd.readouterr()
        assert "running on the CPU: onnxruntime finds no GPU here" in out
        assert "onward[gpu]" in out
        assert not err
        assert Device.find("auto").note() == Device.find("cpu").note() == "running on the CPU"
    with pytest.raises(OptionError, match="device 'tpu': known are auto, cpu and cuda"):
        Device.find("tpu")


# --- checkpoints --------------------------------------------------------------------------------------------------


def test_checkpoints_of_something_else(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, run = exported(CASE).path, tmp_path / "run.npz"
    assert train(path, data, "--checkpoint", run) == 0
    capfd.readouterr()
    before = run.read_bytes()
    assert "exists: --resume goes on with it" in failing(capfd, path, data, "--checkpoint", run)
    given = ("--checkpoint", run, "--resume")
    message = failing(capfd, path, data, *given, "--lr", "0.1", "--seed", "3", "--epochs", "2")
    assert "other settings: lr=0.05, now 0.1; seed=0, now 3" in message
    assert "batch_size=16, now 8" in failing(capfd, path, data, *given, "--batch-size", "8")
    other = data_file("normalised", tmp_path / "other.npz")
    assert "is of another model: 'layerwise'" in failing(capfd, exported("normalised").path, other, *given)
    assert run.read_bytes() == before
    assert train(path, data, *given, "--epochs", "2") == 0
    assert "epoch 2" in capfd.readouterr().out


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "array"])
def test_damaged_checkpoints(kind: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.npz"
    trainer_of(CASE).save(run)
    held = {k: v for k, v in np.load(run).items() if k.startswith("parameter:")}
    rest = {k: v for k, v in np.load(run).items() if k not in held}
    run.write_bytes(damaged_archives({**held, **rest})[kind][0])
    before = run.read_bytes()
    message = failing(capfd, exported(CASE).path, data, "--checkpoint", run, "--resume")
    assert "run.npz cannot be read" in message or "run.npz is of another model" in message
    assert run.read_bytes() == before


@pytest.mark.parametrize("progress", ["", "{", "[]", "{}", '{"records": 3}', "null"])
def test_checkpoints_whose_progress_is_damaged(progress: str, data: Path, tmp_path: Path,
                                               capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    run = tmp_path / "run.npz"
    trainer_of(CASE).save(run)
    np.savez(run, **{**np.load(run), "progress": np.array(progress)})
    assert "cannot be read" in failing(capfd, exported(CASE).path, data, "--checkpoint", run, "--resume")
