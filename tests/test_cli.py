"""The command line: its options are frozen here, its results checked through typer's runner, one run as a process."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
import typer
from command_line import call

import onward
from onward.cli import app
from onward.cli.common import make_estimator, parse_blocks, parse_groups, parse_options, parse_sigma, set_up
from onward.cli.options import Common
from onward.cli.recipes import find_recipe, recipe_names
from onward.compiler.files import check_writable, write_whole
from onward.compiler.save import read_manifest
from onward.passes.errors import OptionError, OutputError

COMMON = {
    "--model-option", "--data", "--alr", "--noise", "--score", "--capture", "--groups", "--copies", "--sigma",
    "--antithetic", "--no-antithetic", "--chunk", "--credit", "--sampling", "--placement", "--noise-on", "--feedback",
    "--correction", "--reach", "--segments", "--probe", "--probe-every", "--blocks", "--rank", "--feedback-memory",
    "--calibration", "--recompute", "--warmup", "--trust", "--no-trust", "--seed", "--device", "--threads", "--debug",
    "--freeze",
}  # fmt: skip
TRAIN = {
    "--model", "--recipe", "--epochs", "--batch-size", "--lr", "--optimizer", "--compare-bp", "--directory", "--resume",
    "--workers", "--streams", "--cuda-graphs", "--inductor", "--memory", "--checkpoint-every", "--tensorboard",
    "--json", "--save-onnx", "--quiet", "-q",
}  # fmt: skip
FIDELITY = {
    "--sweep", "--replicates", "--learn", "--after", "--train", "--runs", "--batch-size", "--per-site", "--json",
    "--plot", "--quiet", "-q",
}  # fmt: skip
COMPARE = {
    "--data", "--model-option", "--budget", "--methods", "--seeds", "--lr-grid", "--optimizer", "--batch-size",
    "--json", "--plot", "--quiet", "-q", "--threads", "--debug",
}  # fmt: skip
OPTIONS = {
    "train": TRAIN | COMMON,
    "compile": {"--output", "-o", "--force"} | COMMON,
    "export": {
        "--format",
        "--output",
        "-o",
        "--data-file",
        "--epochs",
        "--batch-size",
        "--lr",
        "--optimizer",
        "--force",
    }
    | COMMON,
    "inspect": {
        "--pass",
        "--format",
        "-f",
        "-o",
        "--output",
        "--rules",
        "--calibrate",
        "--budget",
        "--choose",
        "--schedule",
        "--memory",
        "--workers",
    }
    | COMMON,
    "fidelity": FIDELITY | COMMON,
    "compare": COMPARE,
    "models": set(),
    "data": set(),
    "recipes": {"--markdown"},
}
TINY = (
    "--model", "mlp", "--model-option", "hidden=(16,)", "--copies", "8", "--reach", "0", "--batch-size", "64",
    "--epochs", "1",
)  # fmt: skip
FACTORIES = '''
"""Models of a user."""

import torch
from torch import nn


class Unused(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.fc, self.spare = nn.Linear(64, num_classes), nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x.flatten(1))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return self.fc(x.flatten(1))


def linear(num_classes, in_features):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_features, num_classes))
'''


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the working directory, under a name of its own."""
    name = f"nets_{os.getpid()}_{time.monotonic_ns()}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


# --- the frozen face --------------------------------------------------------------------------------------------------


def test_commands_and_options_are_frozen():
    group = typer.main.get_command(app)
    commands = group.commands  # type: ignore[attr-defined]
    assert commands.keys() == OPTIONS.keys()
    for name, command in commands.items():
        found = {
            option
            for parameter in command.params
            if parameter.param_type_name == "option"
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert found - {"--help", "-h"} == OPTIONS[name]


@pytest.mark.parametrize("command", [(), *((name,) for name in OPTIONS)])
def test_help_is_there_and_says_what_every_option_does(command):
    text = call(*command, "--help").output
    assert "Usage" in text
    if command:
        for option in OPTIONS[command[0]]:
            assert option in text
    group = typer.main.get_command(app)
    for one in [group, *group.commands.values()]:  # type: ignore[attr-defined]
        assert all(parameter.help for parameter in one.params)


def test_lists_and_version():
    models = call("models").output
    assert all(name in models for name in onward.models.MODELS)
    assert all(name in call("data").output for name in onward.models.DATASETS)
    assert torch.__version__ in call("--version").output
    assert set(onward.models.MODELS) <= set(recipe_names())


# --- options ----------------------------------------------------------------------------------------------------------


def test_a_recipe_changes_auto_and_a_model_without_derivative_has_its_twin_beside_it():
    recipe = find_recipe("binarised_cnn")
    setup = set_up(recipe, Common(model_option=["width=2"]))
    assert setup.estimator == onward.LikelihoodRatio.auto(blocks=1) == recipe.estimator
    assert make_estimator(Common(blocks=["2"]), recipe.estimator).blocks == 2
    assert make_estimator(Common(groups="layerwise"), recipe.estimator) == make_estimator(Common(groups="layerwise"))
    twin = setup.twin()
    assert [getattr(module, "straight_through", None) for module in (setup.model.act1, twin.act1)] == [False, True]
    assert all(torch.equal(one, two) for one, two in zip(setup.model.parameters(), twin.parameters(), strict=True))


def test_estimator_from_options():
    assert make_estimator(Common()) == onward.LikelihoodRatio.auto()
    given = Common(
        noise="laplace", score="sign", capture="stochastic", copies=4, sigma=["0.2"], antithetic=False, chunk=3
    )
    expected = onward.LikelihoodRatio(
        noise="laplace", score="sign", capture="stochastic", copies=4, sigma=0.2, antithetic=False, chunk=3
    )
    assert make_estimator(given) == expected
    assert make_estimator(Common(alr=True)) == onward.LikelihoodRatio.alr()
    assert make_estimator(Common(alr=True, copies=10)) == onward.LikelihoodRatio.alr(copies=10)
    smaller = make_estimator(Common(blocks=["stem=4", "2"], rank=3, feedback_memory=7))
    assert (smaller.blocks, smaller.rank, smaller.feedback_memory) == ({"stem": 4, "*": 2}, 3, 7)
    partition = make_estimator(Common(groups="stem,block.*; head"))
    assert partition.groups == [["stem", "block.*"], ["head"]]
    full = make_estimator(Common(correction="full"))
    assert (full.correction, full.probe_every) == ("full", 1)
    words = make_estimator(Common(reach="auto", segments="blocks.*,head", probe_every="3", sigma=["auto"]))
    assert (words.reach, words.segments, words.probe_every, words.sigma) == ("auto", ["blocks.*", "head"], 3, "auto")
    assert make_estimator(Common(segments="4", reach="2")).segments == 4


def test_parsing():
    assert parse_groups("joint") == "joint"
    assert parse_groups("*") == [["*"]]
    assert parse_sigma(["0.5"]) == 0.5
    assert parse_sigma(["a.*=0.5", "0.1"]) == {"a.*": 0.5, "*": 0.1}
    with pytest.raises(OptionError, match="PATTERN=NUMBER"):
        parse_sigma(["a=b"])
    assert parse_blocks(["2"]) == 2
    assert parse_blocks(["stem=4", "2"]) == {"stem": 4, "*": 2}
    with pytest.raises(OptionError, match=r"--blocks '1\.5': expected a whole number"):
        parse_blocks(["1.5"])
    options = parse_options(["hidden=(128, 64)", "norm=batch", "bias=false", "x=none", "width=3", "path=a=b"])
    assert options == {"hidden": (128, 64), "norm": "batch", "bias": False, "x": None, "width": 3, "path": "a=b"}
    for wrong in ("width", "=3", "a b=3"):
        with pytest.raises(OptionError, match="KEY=VALUE"):
            parse_options([wrong])


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "deep" / "file.json"
    check_writable(path)
    assert not path.exists()
    write_whole(path, "one")
    write_whole(path, "two")
    assert path.read_text() == "two"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]
    for bad in (path / "below", tmp_path):
        with pytest.raises(OutputError, match="cannot write"):
            write_whole(bad, "")


# --- train ------------------------------------------------------------------------------------------------------------


def test_train_beside_backpropagation(tmp_path):
    file = tmp_path / "result.json"
    output = call("train", *TINY, "--epochs", 2, "--compare-bp", "--json", file, "--seed", 3).output
    for word in (
        "mlp",
        "digits",
        "rademacher",
        "forward-only",
        "backpropagation",
        "test accuracy",
        "seconds",
        "forwards",
    ):
        assert word in output
    result = json.loads(file.read_text())
    assert {
        "test_accuracy",
        "seconds",
        "forwards",
        "seed",
        "versions",
        "bp",
        "history",
        "settings",
        "model",
    } <= result.keys()
    assert {"python", "torch", "onward", "platform", "machine"} <= result["versions"].keys()
    assert result["seed"] == 3
    assert 0.5 < result["test_accuracy"] <= 1
    assert 0.5 < result["bp"]["test_accuracy"] <= 1
    assert result["seconds"] > 0
    assert result["bp"]["seconds"] > 0
    assert result["interrupted"] is False
    assert len(result["history"]) == len(result["bp"]["history"]) == result["settings"]["epochs"] == 2
    assert result["settings"]["estimator"]["copies"] == 8
    samples = 2 * 1437
    assert result["bp"]["forwards"] == samples
    assert samples * 1 < result["forwards"] < samples * (1 + 2 * 8)
    assert result["forwards_per_sample_and_step"] == pytest.approx(result["forwards"] / samples)


def test_backpropagation_starts_from_the_same_weights_and_sees_the_same_batches(tmp_path):
    """With a vanishing learning rate both only measure: the losses of every epoch are those of the same start."""
    file = tmp_path / "result.json"
    call("train", *TINY, "--lr", 1e-12, "--optimizer", "sgd", "--compare-bp", "--quiet", "--json", file)
    result = json.loads(file.read_text())
    ours, reference = result["history"][0], result["bp"]["history"][0]
    assert ours["train_loss"] == pytest.approx(reference["train_loss"], rel=1e-5)
    assert ours["validation"]["loss"] == pytest.approx(reference["validation"]["loss"], rel=1e-5)


def test_train_is_repeatable_and_resumes_exactly(tmp_path):
    files = [tmp_path / f"{number}.json" for number in range(3)]
    run = tmp_path / "run"
    call("train", *TINY, "--epochs", 2, "--quiet", "--json", files[0])
    call("train", *TINY, "--epochs", 1, "--quiet", "--json", files[1], "--directory", run, "--checkpoint-every", 5)
    call("train", *TINY, "--epochs", 2, "--quiet", "--json", files[2], "--directory", run, "--resume")
    whole, half, resumed = (json.loads(file.read_text()) for file in files)
    for key in ("test_loss", "forwards"):
        assert whole[key] == resumed[key]
    assert half["history"][0]["train_loss"] == whole["history"][0]["train_loss"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2 * 23 + 2
    error = call("train", *TINY, "--quiet", "--directory", run, code=2).stderr
    assert "resume" in error


def test_train_alr_and_own_model(factories):
    options = ("--alr", "--copies", 4, "--epochs", 1, "--workers", 2, "--quiet")
    output = call("train", "--model", f"{factories}:linear", *options).output
    assert "forward-only" in output
    assert "alr" not in output
    assert "updates and the next step:" in output


# --- compile ----------------------------------------------------------------------------------------------------------


def test_compile_writes_a_program(tmp_path):
    folder = tmp_path / "program"
    output = call("compile", "resnet5", "--model-option", "width=4", "-o", folder).output
    assert "4 gradients" in output
    manifest = read_manifest(folder)
    assert manifest["model"] == "resnet5"
    assert manifest["settings"] == {"data": "digits", "model_options": ["width=4"], "freeze": [], "seed": 0}
    assert {"python", "torch", "onward"} <= manifest["versions"].keys()
    for part in ("passes", "stages", "runs", "gradients"):
        for entry in manifest[part]:
            ast.parse((folder / entry["file"]).read_text(encoding="utf-8"))
    assert "not empty" in call("compile", "mlp", "-o", folder, code=2).stderr
    call("compile", "mlp", "-o", folder, "--force")
    assert read_manifest(folder)["model"] == "mlp"


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_text():
    output = call("inspect", "mlp").output
    assert max(map(len, output.splitlines())) <= 100
    for word in ("Passes", "Sites", "Gradient subgraphs", "Plan of a step", "insert_noise", "fc1", "head"):
        assert word in output
    assert "def " not in output


def test_inspect_formats(tmp_path):
    ast.parse(call("inspect", "mlp", "--format", "python").stdout)
    ast.parse(call("inspect", "mlp", "-f", "python", "--pass", "insert_captures").stdout)
    data = json.loads(call("inspect", "mlp", "-f", "json").stdout)
    assert data["supported"] is True
    assert {"sites", "subgraphs", "passes", "runs", "graphs", "plan"} <= data.keys()
    for text in data["graphs"].values():
        ast.parse(text)
    assert call("inspect", "mlp", "-f", "dot").stdout.startswith("digraph")
    file = tmp_path / "graph.svg"
    assert call("inspect", "mlp", "-f", "svg", "--pass", "share_prefixes", "-o", file).stdout == ""
    assert ElementTree.fromstring(file.read_text()).tag.endswith("svg")


@pytest.mark.parametrize("options", [(), ("--correction", "full"), ("--correction", "full", "--reach", 1)])
def test_inspect_shows_feedback(options):
    output = call("inspect", "resnet5", "--model-option", "width=4", *options).output
    assert "learned feedback" in output
    assert "L0" in output.split("Plan of a step")[1]


def test_inspect_pass_and_rules():
    output = call("inspect", "mlp", "--groups", "layerwise", "--pass", "insert_noise").output
    assert len(re.findall(r"^\+ .*ops\.perturb", output, re.MULTILINE)) == 3
    assert "any other operation" in call("inspect", "--rules").output


def test_inspect_schedule(tmp_path):
    tiny = ("inspect", "mlp", "--model-option", "hidden=(16,16)", "--schedule")
    output = call(*tiny, "--workers", 3).stdout
    assert max(map(len, output.splitlines())) <= 100
    for word in ("with a perturbed run", "waits for", "critical path", "lower bound", "simulated", "F0 → F1"):
        assert word in output
    exact = call("inspect", "mlp", "--model-option", "hidden=(16,)", "--schedule").stdout  # has nothing to perturb
    assert "P0.0" not in exact
    assert "G1" in exact
    data = json.loads(call(*tiny, "-f", "json", "--groups", "layerwise", "--copies", 2).stdout)
    assert data["model"] == "mlp"
    (step,) = data["steps"]
    assert [task["name"] for task in step["tasks"]] == ["F0", "F1", "F2", "E"] + [
        name for site in range(3) for name in (f"P{site}.0", f"G{site}")
    ]
    assert step["tasks"][3]["after"] == ["F0", "F1", "F2"]
    assert step["critical_seconds"] <= step["total"]
    assert [one["workers"] for one in step["workers"]] == [1, 2, 4, 8]
    file = tmp_path / "step"
    assert call(*tiny, "-f", "svg", "-o", file).stdout == ""
    assert ElementTree.fromstring(file.read_text()).tag.endswith("svg")
    assert call(*tiny, "-f", "chrome", "-o", file).stdout == ""
    events = json.loads(file.read_text())["traceEvents"]
    assert {"F0", "P0.0", "worker 1", "without a perturbed run, simulated on 2 workers"} <= {
        name for event in events for name in (event["name"], event["args"].get("name"))
    }


def test_inspect_memory_shows_what_train_chooses_from(tmp_path):
    tiny = ("mlp", "--model-option", "hidden=(16,16)", "--copies", 8, "--groups", "layerwise")
    output = call("inspect", *tiny, "--memory").stdout
    assert max(map(len, output.splitlines())) <= 100
    for word in ("8 copies side by side takes", "captures", "P2.0", "commit", "With other chunks"):
        assert word in output
    data = json.loads(call("inspect", *tiny, "--memory", "-f", "json").stdout)
    assert data["peak"] == max(action["peak"] for action in data["actions"]) == sum(data["parts"].values())
    assert list(data["chunks"]) == ["2", "4", "8"]
    file = tmp_path / "run.json"
    call("train", "--model", *tiny, "--epochs", 1, "-q", "--memory", f"{data['chunks']['4']} B", "--json", file)
    assert json.loads(file.read_text())["settings"]["estimator"]["chunk"] is None  # what was asked for


@pytest.mark.parametrize(("factory", "word"), [("Unused", "spare.weight"), ("Branching", "if x.sum() > 0")])
def test_inspect_says_why_a_model_does_not_compile(factories, factory, word):
    result = call("inspect", f"{factories}:{factory}", code=1)
    assert "does not compile" in result.stdout
    assert word in result.stdout
    assert f"{factories}:{factory}" in result.stdout
    assert result.stderr == ""
    data = json.loads(call("inspect", f"{factories}:{factory}", "-f", "json", code=1).stdout)
    assert data["supported"] is False
    assert word in data["reason"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--model", "mpl"), "unknown model 'mpl'. Did you mean 'mlp'?"),
        (("train", "--model", "mlp", "--data", "digit"), "Did you mean 'digits'?"),
        (("train", "--noise", "gausian"), "Did you mean 'gaussian'?"),
        (("train", "--groups", "layerwize"), "Did you mean 'layerwise'?"),
        (("train", "--optimizer", "adm"), "Did you mean 'adam'?"),
        (("train", "--copies", "3"), "copies=3 is odd"),
        (("train", "--sigma", "0"), "sigma=0.0"),
        (("train", "--lr", "0"), "learning rate must be positive"),
        (("train", "--model", "mlp", "--epochs", "0"), "epochs"),
        (("train", "--batch-size", "0"), "batch_size=0"),
        (("train", "--threads", "0"), "--threads 0"),
        (("train", "--device", "tpu"), "--device 'tpu'"),
        (("train", "--resume"), "--directory"),
        (("train", "--model", "mlp", "--checkpoint-every", "5"), "directory"),
        (("train", "--model-option", "depth=3"), "depth"),
        (("train", "--freeze", "stm"), "Did you mean 'stem'?"),
        (("inspect", "mlp", "--freeze", "*"), "nothing to train"),
        (("train", "--model", "mlp", "--json", "/dev/null/result.json"), "cannot write /dev/null/result.json"),
        (("train", "--directory", "/dev/null/run", "--model", "mlp"), "/dev/null/run"),
        (("compile", "mlp", "-o", "/dev/null/program"), "/dev/null/program"),
        (("inspect", "mlp", "--pass", "insert_nois"), "Did you mean 'insert_noise'?"),
        (("inspect", "mlp", "--format", "pyton"), "Did you mean 'python'?"),
        (("inspect", "mlp", "-o", "/dev/null/x"), "cannot write /dev/null/x"),
        (("inspect", "mlp", "--workers", "2"), "is of --schedule"),
        (("inspect", "mlp", "--schedule", "--workers", "0"), "at least one worker"),
        (("inspect", "mlp", "--schedule", "--calibrate"), "--calibrate is another question"),
        (("inspect", "mlp", "--schedule", "--pass", "capture"), "--pass capture is another question"),
        (("inspect", "mlp", "--schedule", "--format", "dot"), "one of text, svg, json, chrome"),
        (("inspect", "mlp", "--format", "chrome"), "needs --schedule"),
        (("inspect", "mlp", "--memory", "--schedule"), "--schedule is another question"),
        (("inspect", "mlp", "--memory", "--format", "svg"), "one of text, json"),
        (("train", "--memory", "2XiB"), "expected a number with a unit"),
        (("train", "--memory", "10KiB"), "is too little"),
        (("train", "--memory", "1GiB", "--chunk", "2"), "both say how many copies"),
        (("train", "--model", "mlp", "--model-option", "hidden=abc"), "cannot be built with num_classes=10"),
        (
            ("train", "--model", "mlp", "--model-option", "num_classes=3"),
            "float32 [32, 3], with its targets, int64 [32]",
        ),
        (("train", "--model", "gcn", "--data", "digits"), "The model's own recipe is on 'karate'"),
        (("train", "--model", "vit", "--data", "karate"), "inputs are float32 [34, 34] and int64 [2, 156]"),
        (("compile", "mlp", "--data", "python-docs", "-o", "unused"), "The model's own recipe is on 'digits'"),
        (("inspect",), "needs a model"),
        (("inspect", "no_such_module:factory"), "cannot be imported"),
    ],
)
def test_mistakes_are_one_clean_message(arguments, message):
    result = call(*arguments, code=2)
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    assert result.stdout == "" or arguments[0] == "train"


def test_debug_shows_the_traceback():
    with pytest.raises(onward.errors.UnknownNameError):
        call("train", "--model", "mpl", "--debug")


def test_usage_errors_are_clicks_own():
    assert "No such option" in call("train", "--epoch-count", 3, code=2).stderr


# --- as a process -----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error::SyntaxWarning", "-c", "from onward.cli import main; main()", *arguments]


def test_interrupt_ends_cleanly_and_resumes(tmp_path):
    """Ctrl-C in a real process: a checkpoint, a hint, exit code 130; --resume goes on from there."""
    run = tmp_path / "run"
    arguments = ("train", *TINY, "--epochs", "1000", "--directory", str(run), "--json", str(tmp_path / "a.json"))
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        metrics = run / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert json.loads((tmp_path / "a.json").read_text())["interrupted"] is True
    steps = len(metrics.read_text().splitlines())
    assert steps
    epochs = steps // 23 + 2
    call("train", *TINY, "--epochs", epochs, "--directory", run, "--resume", "--quiet", "--json", tmp_path / "b.json")
    assert len(json.loads((tmp_path / "b.json").read_text())["history"]) == epochs
