"""Exported training steps against the programs that they are of: losses, gradients, feedback and all that is kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from export_cases import CASES, SEED, pair_of, vectors
from onnx_session import Session
from torch.utils import _pytree as pytree

import onward
from onward.cli.recipes import recipe_for
from onward.models import build_for, load
from onward.runtime.export.step import fused, single
from onward.runtime.export.tasks import make_tasks
from onward.runtime.export.updates import described
from onward.runtime.training.update import update

SEVERAL = [
    "layerwise", "joint, one pair at a time", "captures of four bits, in chunks",
    "dropout, batch statistics", "feedback, corrected, gaussian", "feedback, segments, when it teaches",
    "feedback, shared weights, trust apart",
]  # fmt: skip
"""Cases whose tasks are run by themselves."""
PROBING = ["feedback, reach, every other step", "feedback, segments, when it teaches"]
BATCHES = (6, 4, 9)
"""Of the three steps: the traced size, a smaller and a larger one."""


def distance(mine: Any, theirs: Any) -> float:
    """The largest difference, of the largest entry."""
    theirs = np.asarray(theirs)
    assert mine.shape == theirs.shape
    return float(np.abs(mine - theirs).max(initial=0)) / (float(np.abs(theirs).max(initial=0)) + 1e-30)


@pytest.mark.parametrize("name", CASES)
def test_step_is_the_programs(name: str) -> None:
    case, pair = CASES[name], pair_of(name)
    begun = pair.program.step_count
    for number, samples in enumerate(BATCHES):
        found, loss = pair.step(samples, number)
        assert bool(found["finite"])
        assert float(found["loss"]) == pytest.approx(float(loss), rel=1e-6)
        assert int(found["new:optimizer:steps"]) == begun + number + 1
        for weight, parameter in pair.model.named_parameters():
            moment = pair.optimizer.state[parameter]["momentum_buffer"].numpy()
            where = f"{weight} in step {number}"
            assert distance(found[f"new:optimizer:{weight}.momentum_buffer"], moment) < case.tolerance, where
            assert distance(found[f"new:parameter:{weight}"], parameter.detach().numpy()) < case.tolerance, where
        for key, buffer in pair.model.named_buffers():
            if f"new:buffer:{key}" in found:
                assert distance(found[f"new:buffer:{key}"], buffer.numpy()) < case.tolerance, key
        feedback = pair.program.feedback
        if feedback is not None and feedback.jacobians:
            for site, jacobian in feedback.jacobians.items():
                assert distance(found[f"new:runtime:feedback.{site}"], jacobian.numpy()) < case.tolerance, site
            assert int(found["new:feedback:steps"]) == feedback.steps
            assert int(found["new:feedback:next_probe"]) == pair.program.next_probe
            assert float(found["new:feedback:overshoot"]) == pytest.approx(feedback.overshoot, rel=1e-5)
            assert float(found["new:feedback:explained_mean"]) == pytest.approx(feedback.explained_mean, rel=1e-4)
            slopes = [feedback.slopes.get(site, (0.0, 0.0)) for site in feedback.jacobians]
            assert distance(found["new:feedback:slopes"], slopes) < 1e-4


@pytest.mark.parametrize("name", SEVERAL)
def test_tasks_one_after_another_are_the_step(name: str) -> None:
    """Each a model of its own, that reads what those before it wrote."""
    case, pair = CASES[name], pair_of(name)
    x, y = case.data(5, 7, case.dtype)
    feeds = pair.feeds(x, y)
    step = max(pair.program.step_count, pair.program.next_probe)  # one with perturbed runs
    feeds["step"] = torch.tensor(step)
    values = {**feeds, "runtime:key": torch.tensor([SEED, step]), "runtime:step": feeds["step"]}
    values["runtime:lr"] = feeds["lr"]
    for task in pair.tasks.tasks:
        session = Session(single(task, pair.tasks, task.name))
        assert session.inputs <= set(values), task.name
        found = session(values)
        assert set(found) == set(task.writes)
        values.update(found)
    fused = pair.session(feeds)
    for key in pair.state:
        assert distance(values[pair.tasks.new[key]], fused[f"new:{key}"]) < case.tolerance / 10, key
    assert float(values["loss"]) == pytest.approx(float(fused["loss"]), rel=1e-6)


@pytest.mark.parametrize("name", PROBING)
def test_perturbed_runs_are_skipped_where_they_are_not_due(name: str, tmp_path: Path) -> None:
    """By what the runtime says that it executed."""
    pair = pair_of(name)
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    x, y = CASES[name].data(4, 3, CASES[name].dtype)
    ran = {}
    for due in (False, True):
        session = onnxruntime.InferenceSession(pair.onnx.SerializeToString(), options)
        feeds = {**pair.feeds(x, y), "feedback:steps": torch.tensor(pair.tasks.warmup)}
        feeds |= {"step": torch.tensor(10), "feedback:next_probe": torch.tensor(10 if due else 11)}
        read = {each.name for each in session.get_inputs()}
        arrays = {key: value if isinstance(value, np.ndarray) else value.numpy() for key, value in feeds.items()}
        session.run(None, {key: value for key, value in arrays.items() if key in read})
        events = json.loads(Path(session.end_profiling()).read_text())
        nodes = {event["name"].removesuffix("_kernel_time") for event in events if event.get("cat") == "Node"}
        ran[due] = {node.split("/")[0].split(".")[0] for node in nodes}
    assert {"P0", "L0", "N0"} <= ran[True]
    assert not {"P0", "L0", "N0"} & ran[False]
    assert {"F0", "E", "G0", "C", "T"} <= ran[False]


def test_what_is_not_due_stays_as_it_is() -> None:
    pair = pair_of("feedback, reach, every other step")
    x, y = vectors(4, 1, torch.float64)
    steps = torch.tensor(pair.tasks.warmup)
    feeds = {
        **pair.feeds(x, y),
        "feedback:next_probe": torch.tensor(99),
        "step": torch.tensor(10),
        "feedback:steps": steps,
    }
    found = pair.session(feeds)
    for key in pair.state:
        if key.startswith(("runtime:feedback", "feedback:")):
            np.testing.assert_array_equal(found[f"new:{key}"], np.asarray(feeds[key]))
    assert any(distance(found[f"new:{key}"], pair.state[key]) > 0 for key in pair.state if key.startswith("parameter:"))


def test_numbers_that_are_not_finite_are_told() -> None:
    pair = pair_of("joint, one pair at a time")
    x, y = vectors(4, 1, torch.float64)
    assert bool(pair.session(pair.feeds(x, y))["finite"])
    for value in (float("nan"), float("inf")):
        x[2, 3] = value
        assert not bool(pair.session(pair.feeds(x, y))["finite"])


def test_seed_and_step_make_the_noise() -> None:
    pair = pair_of("joint, one pair at a time")
    x, y = vectors(4, 1, torch.float64)
    key = "new:parameter:0.weight"
    plain = pair.session(pair.feeds(x, y))[key]
    np.testing.assert_array_equal(pair.session(pair.feeds(x, y))[key], plain)
    for name in ("seed", "step"):
        other = pair.session({**pair.feeds(x, y), name: torch.tensor(99)})[key]
        assert np.abs(other - plain).max() > 0


ZOO: dict[str, dict[str, Any]] = {
    "resnet5": {}, "integer_mlp": {}, "rnn_text": {}, "gcn": {}, "vit": {"depth": 1, "patch": 4}
}  # fmt: skip
"""A model of each kind, with options that make it small."""


@pytest.mark.parametrize("name", ZOO)
def test_models_of_the_zoo(name: str) -> None:
    """By its own recipe, a first step; benchmarks go through the rest."""
    recipe = recipe_for(name)
    data = load(recipe.data)
    torch.manual_seed(0)
    model = build_for(recipe.model, data, **{**recipe.model_options, **ZOO[name]})
    estimator = dataclasses.replace(recipe.estimator, sigma=0.25)
    if estimator.feedback == "learned":
        estimator = dataclasses.replace(estimator, warmup=0)
    x, y = data.batch(8)
    if name == "rnn_text":  # a graph of as many cells as a text has letters
        x = x[:, -3:]
    unbatched = getattr(data, "unbatched", False)
    program = onward.compile(model, x, loss=data.loss, estimator=estimator, seed=3, unbatched=unbatched)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0625, momentum=0.9)
    zeros = {f"{key}.momentum_buffer": torch.zeros_like(weight) for key, weight in model.named_parameters()}
    tasks = make_tasks(program, x, y, described(optimizer), zeros)[0]
    session = Session(fused(tasks, name))
    whole = program.compiled.captured.signature.whole
    inputs = {f"input:{place}": leaf[None] if whole and leaf.is_floating_point() else leaf
              for place, leaf in enumerate(pytree.tree_leaves(x))}  # fmt: skip
    targets = {f"target:{place}": leaf for place, leaf in enumerate(pytree.tree_leaves(y))}
    runtime = {"seed": torch.tensor(3), "step": torch.tensor(0), "lr": torch.tensor(0.0625)}
    found = session({**tasks.state, **inputs, **targets, **runtime})
    loss = program.step(x, y)
    gradients = {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}
    update(program, optimizer)
    assert float(found["loss"]) == pytest.approx(float(loss), rel=1e-5)
    for key, gradient in gradients.items():
        assert distance(found[f"new:optimizer:{key}.momentum_buffer"], gradient.numpy()) < 1e-5, key
        assert distance(found[f"new:parameter:{key}"], model.get_parameter(key).detach().numpy()) < 1e-5, key
