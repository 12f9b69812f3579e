"""The folder of an exported program: what it holds, what it leaves alone, and what is refused with which words."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from executor_cases import Normalised
from export_cases import Learned, Ratio, small, vectors
from onnx_session import Session
from torch import Tensor, nn

import onward
from onward.passes.errors import ExportError, OutputError
from onward.runtime.export import save
from onward.runtime.export.save import export, write_model
from onward.runtime.export.step import fused
from onward.runtime.export.tasks import make_tasks
from onward.runtime.export.updates import described
from onward.runtime.training.update import update

X, Y = vectors(6, 0, torch.float32)


def program_of(model: nn.Module, estimator: Ratio, loss: Any = F.cross_entropy, x: Tensor = X) -> onward.Program:
    return onward.compile(model, x, loss=loss, estimator=estimator, seed=1)


def optimizer_of(program: onward.Program, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(program.model.parameters(), lr=0.125, **more)


@pytest.fixture(scope="module")
def trained() -> tuple[onward.Program, torch.optim.Optimizer]:
    """A program with feedback, buffers and two steps behind it."""
    torch.manual_seed(0)
    program = program_of(Normalised(), Learned(copies=2, warmup=1))
    optimizer = optimizer_of(program)
    for _ in range(2):
        program.step(X, Y)
        update(program, optimizer)
    return program, optimizer


@pytest.fixture(scope="module")
def folder(trained: tuple[onward.Program, torch.optim.Optimizer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "deep" / "folder"
    program, optimizer = trained
    model = program.model
    before = copy.deepcopy((program.state_dict(), model.state_dict(), optimizer.state_dict(), list(program.sigmas)))
    random = torch.random.get_rng_state()
    made = export(program, optimizer, X, Y, path, name="net", settings={"batch_size": 6})
    after = (program.state_dict(), model.state_dict(), optimizer.state_dict(), list(program.sigmas))
    assert str(after) == str(before)
    for mine, theirs in zip(after[1].values(), before[1].values(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(random, torch.random.get_rng_state())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert made.files == sum(each.is_file() for each in path.rglob("*"))
    assert json.loads(json.dumps(made.manifest)) == json.loads((path / "manifest.json").read_text())
    return path


def test_manifest_says_what_is_there(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["model"]) == ("onward-training", 1, "net")
    assert (manifest["seed"], manifest["step"], manifest["settings"]) == (1, 2, {"batch_size": 6})
    assert manifest["optimizer"]["name"] == "adam"
    assert manifest["optimizer"]["lr"] == 0.125
    with np.load(folder / "state.npz") as state:
        assert {each["key"] for each in manifest["state"]} == set(state)
        for each in manifest["state"]:
            assert (str(state[each["key"]].dtype), list(state[each["key"]].shape)) == (each["dtype"], each["shape"])
    known = {each["key"] for each in manifest["state"] + manifest["inputs"] + manifest["targets"]}
    known |= {"runtime:key", "runtime:step", "runtime:lr"}
    for task in manifest["tasks"]:
        assert set(task["reads"]) <= known, task["name"]
        model = onnx.load(folder / task["file"])
        assert [each.name for each in model.graph.output] == task["writes"]
        assert {each.name for each in model.graph.input} <= set(task["reads"])
        known |= set(task["writes"])
    assert {each["new"] for each in manifest["state"]} <= known
    assert not [path for path in folder.rglob("*") if path.suffix not in (".onnx", ".json", ".npz") and path.is_file()]


def test_only_standard_operators(folder: Path) -> None:
    for path in folder.rglob("*.onnx"):
        model = onnx.load(path)
        assert [(each.domain, each.version) for each in model.opset_import] == [("", 20)]
        assert all(node.domain == "" for node in model.graph.node)
        assert len({node.name for node in model.graph.node}) == len(model.graph.node), "names are different"


def test_exported_step_goes_on_where_the_program_is(folder: Path, trained: Any) -> None:
    optimizer = trained[1]
    session = Session(onnx.load(folder / "training_step.onnx"))
    with np.load(folder / "state.npz") as state:
        feeds = {**state, "input:0": X, "target:0": Y, "seed": torch.tensor(1), "step": torch.tensor(2)}
    found = session({**feeds, "lr": torch.tensor(0.125)})
    model = trained[0].model
    held = copy.deepcopy((trained[0].state_dict(), model.state_dict(), optimizer.state_dict()))
    trained[0].step(X, Y)
    update(trained[0], optimizer)
    try:
        for name, parameter in model.named_parameters():
            if name == "first.bias":  # no gradient but rounding before a normalisation, which Adam makes a whole step
                continue
            np.testing.assert_allclose(found[f"new:parameter:{name}"], parameter.detach().numpy(), rtol=1e-4, atol=1e-5)
        for name, buffer in model.named_buffers():
            np.testing.assert_allclose(found[f"new:buffer:{name}"], buffer.numpy(), rtol=1e-5)
    finally:
        trained[0].load_state_dict(held[0])
        model.load_state_dict(held[1])
        optimizer.load_state_dict(held[2])


def test_inference_and_loss_are_the_models(folder: Path, trained: Any) -> None:
    program = trained[0]
    model = copy.deepcopy(program.model).eval()
    inference, loss = (Session(onnx.load(folder / f"{name}.onnx")) for name in ("inference", "loss"))
    for samples in (1, 4, 9):
        x, y = vectors(samples, samples, torch.float32)
        output = inference({"input:0": x})["output:0"]
        np.testing.assert_allclose(output, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)
        found = loss({"output:0": output, "target:0": y})["losses"]
        np.testing.assert_allclose(found, F.cross_entropy(model(x), y, reduction="none").detach(), rtol=1e-4, atol=1e-5)
    zeros = {f"parameter:{name}": torch.zeros_like(weight) for name, weight in model.named_parameters()}
    assert not inference({"input:0": X, **zeros})["output:0"].any()


# ------------------------------------------------------------------------------------------- whole, or not at all


def cheap() -> tuple[onward.Program, torch.optim.Optimizer]:
    program = program_of(nn.Sequential(nn.Linear(6, 3)), Ratio(copies=2))
    return program, optimizer_of(program)


def test_folders_are_replaced_only_when_asked(tmp_path: Path) -> None:
    program, optimizer = cheap()
    target = tmp_path / "out"
    export(program, optimizer, X, Y, target)
    (target / "stale.txt").write_text("old")
    with pytest.raises(OutputError, match="not empty"):
        export(program, optimizer, X, Y, target)
    assert (target / "stale.txt").exists()
    export(program, optimizer, X, Y, target, replace=True)
    assert not (target / "stale.txt").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="something else"):
        export(program, optimizer, X, Y, foreign, replace=True)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "out"]


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_failed_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    program, optimizer = cheap()
    written = []

    def failing(model: onnx.ModelProto, path: Path) -> None:
        written.append(path)
        write_model(model, path)
        if len(written) == 4:
            raise failure

    monkeypatch.setattr(save, "write_model", failing)
    with pytest.raises((ExportError, OutputError, KeyboardInterrupt)):
        export(program, optimizer, X, Y, tmp_path / "out")
    assert len(written) == 4
    assert not list(tmp_path.iterdir())


def test_large_models_keep_their_tensors_beside_them(tmp_path: Path) -> None:
    program, _ = cheap()
    zeros = {f"{name}.{key}": torch.zeros_like(weight) for name, weight in program.model.named_parameters()
             for key in ("exp_avg", "exp_avg_sq")}  # fmt: skip
    tasks = make_tasks(program, X, Y, described(optimizer_of(program)), zeros)[0]
    model = fused(tasks, "a step")
    large = onnx.numpy_helper.from_array(np.arange(4096, dtype=np.float32), "large")
    model.graph.initializer.append(large)
    plain = Session(model)
    write_model(model, tmp_path / "deep" / "step.onnx", limit=1000)
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["step.onnx", "step.onnx.data"]
    assert (tmp_path / "deep" / "step.onnx.data").stat().st_size >= 4 * 4096
    again = Session(onnx.load(tmp_path / "deep" / "step.onnx"))
    assert (again.inputs, again.outputs) == (plain.inputs, plain.outputs)


def test_models_that_the_checker_refuses_are_not_kept(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Add", ["x"], ["y"])
    value = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "wrong", [], [value]))
    with pytest.raises(ExportError, match=r"wrong\.onnx does not pass"):
        write_model(model, tmp_path / "wrong.onnx")


# ------------------------------------------------------------------------------------------------------ what is refused


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0(self.inner(x))


def counting(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) != target).float()


def small_batches(output: Tensor, target: Tensor) -> Tensor:
    losses = F.cross_entropy(output, target, reduction="none")
    return losses * 2 if output.shape[0] < 20 else losses


def labelled(output: Tensor, target: Any) -> Tensor:
    return F.cross_entropy(output, target[0], reduction="none") * target[1]


REFUSED: dict[str, tuple[Callable[[], nn.Module], Ratio, Any, Any, str]] = {
    "rank": (small, Learned(copies=2, rank=2), F.cross_entropy, Y, "rank=2: the basis .* feedback_memory"),
    "sampling": (small, Ratio(copies=2, sampling="error"), F.cross_entropy, Y, 'sampling="error"'),
    "probe": (small, Learned(copies=2, probe=0.5), F.cross_entropy, Y, "probe=0.5: .* probe=1 is exported"),
    "shrunk": (small, Learned(copies=4, correction="shrunk"), F.cross_entropy, Y, 'correction="shrunk"'),
    "noise on weights": (small, Ratio(copies=2, noise_on="weight"), F.cross_entropy, Y, "noise_on"),
    "no derivative": (small, Learned(copies=2), counting, Y, "the loss .*counting.* has no derivative"),
    "no rule": (Unknown, Ratio(copies=2), F.cross_entropy, Y, r"aten.*i0.* has no rule.*test_export_folder.py:\d+"),
    "batch size": (small, Ratio(copies=2), small_batches, Y, "batch size would have to be fixed"),
    "target": (small, Ratio(copies=2), labelled, [Y, 2.0], "the target holds float"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form_is_refused(name: str, tmp_path: Path) -> None:
    build, estimator, loss, target, message = REFUSED[name]
    program = program_of(build(), estimator, loss)
    with pytest.raises(ExportError, match=message):
        export(program, optimizer_of(program), X, target, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 3)).bfloat16()
    program = program_of(model, Ratio(copies=2), x=X.bfloat16())
    with pytest.raises(ExportError, match=r"bfloat16.*train in float32"):
        export(program, optimizer_of(program), X.bfloat16(), Y, tmp_path / "out")
    assert not list(tmp_path.iterdir())
