"""`onward compare`: races, tuning, what is counted, and the command from end to end."""

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from command_line import call
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset

from onward import models
from onward.evidence import comparison, comparison_report
from onward.evidence.baselines.backpropagation import Backpropagation
from onward.evidence.comparison import Candidate, Comparison, Entry, Task, compare, first_at, grid, mean_curve, tune
from onward.evidence.methods import METHODS, Method
from onward.evidence.race import NUM_MARKS, Curve, Point, marks, race
from onward.passes.errors import OptionError, UnknownNameError


@pytest.fixture(scope="module")
def dataset():
    """200 training and 100 test samples of digits."""
    digits = models.load("digits")
    train, test = (
        TensorDataset(*(tensor[:count] for tensor in split.tensors))
        for split, count in ((digits.train, 200), (digits.test, 100))
    )
    return replace(digits, train=train, test=test)


@pytest.fixture
def task(dataset):
    return make_task(dataset)


def make_task(dataset):
    return Task(
        dataset,
        lambda: models.build_for("mlp", dataset, hidden=(8,)),
        lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr),
        F.cross_entropy,
        50,
        0.01,
    )


def backpropagation(task, seed=0):
    torch.manual_seed(seed)
    return Backpropagation(task.make_model(), F.cross_entropy, seed)


def run(task, program, budget, uncounted=2.0, lr=0.01):
    optimizer = task.make_optimizer(program.model, lr)
    return race(program, uncounted, optimizer, task.dataset, task.batch_size, budget)


# --- a race -----------------------------------------------------------------------------------------------------------


def test_marks_are_geometric_and_end_at_the_budget():
    found = marks(80.0)
    assert len(found) == NUM_MARKS
    assert found[-1] == 80
    steps = [b / a for a, b in pairwise(found)]
    assert max(steps) == pytest.approx(min(steps))
    for budget in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(OptionError, match="must be positive"):
            marks(budget)


def test_a_race_spends_its_budget_and_no_more_than_a_step_beyond(task):
    program = backpropagation(task)
    curve = run(task, program, 12.0)
    forwards = [point.forwards for point in curve.points]
    assert forwards[0] == 0
    assert forwards == sorted(set(forwards))
    assert forwards[-1] == 12  # 3 forwards a sample and step: 4 epochs
    assert program.clean_forwards == 4 * 200
    assert curve.points[-1].accuracy > curve.points[0].accuracy
    assert all(a.seconds <= b.seconds for a, b in pairwise(curve.points))
    assert curve.ended == ""
    # marks that one step passes together are one point
    assert all(any(abs(forwards_ - k * 0.75) < 1e-9 for k in range(17)) for forwards_ in forwards)


def test_a_race_shows_the_trainers_batches(task):
    """The weights after a race are those of the trainer after the same epochs."""
    import onward

    raced = backpropagation(task)
    run(task, raced, 9.0)
    trained = backpropagation(task)
    loader, _ = models.loaders(task.dataset, task.batch_size, 0)
    onward.Trainer(trained, task.make_optimizer(trained.model, 0.01), progress=False).fit(loader, 3)
    for a, b in zip(raced.model.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("what", ["loss", "gradient", "weights"])
def test_a_run_that_diverges_ends_there_and_says_so(task, what):
    class Diverges(Backpropagation):
        steps = 0

        def step(self, inputs, target):
            loss = super().step(inputs, target)
            self.steps += 1
            if self.steps == 6 and what == "loss":
                return loss * math.nan
            if self.steps == 6 and what == "gradient":
                next(self.model.parameters()).grad.fill_(math.inf)
            if self.steps == 6 and what == "weights":
                with torch.no_grad():
                    next(self.model.parameters()).fill_(math.nan)
            return loss

    torch.manual_seed(0)
    curve = run(task, Diverges(task.make_model(), F.cross_entropy, 0), 60.0)
    assert {"loss": "the loss became NaN", "gradient": "gradient of", "weights": "became NaN or infinite"}[what] in (
        curve.ended
    )
    assert (what == "loss") == curve.ended.startswith("the loss")
    assert 0 < curve.points[-1].forwards < 6
    assert all(math.isfinite(point.accuracy) for point in curve.points)


# --- tuning -----------------------------------------------------------------------------------------------------------


def test_tuning_never_sees_the_test_data(dataset):
    """Without test data at all, and with the held-out samples taken from the training data alone."""
    blind = replace(dataset, test=None)
    seen = []

    def build(model, example, loss, seed, settings):
        seen.append((example, seed))
        return Backpropagation(model, loss, seed)

    found = tune(make_task(blind), Method("", "", "", build), 4.0, 5, (1.0, 3.0))
    assert len(found) == 2
    assert {seed for _, seed in seen} == {5}
    split = comparison.validation_split(blind, 5)
    rows = {tuple(row.flatten().tolist()) for row in dataset.train.tensors[0]}
    kept, held = ([tuple(row.flatten().tolist()) for row in part.tensors[0]] for part in (split.train, split.test))
    assert (len(kept), len(held)) == (160, 40)
    assert set(kept) | set(held) == rows
    assert not set(kept) & set(held)


def test_the_grid_is_of_one_size_and_the_best_is_chosen(task):
    sizes = {key: len(list(grid(method, 1e-3, comparison.LR_GRID))) for key, method in METHODS.items()}
    assert {key for key, size in sizes.items() if size == 3} == {"bp", "dfa"}
    assert all(size == 6 for key, size in sizes.items() if key not in ("bp", "dfa"))
    points = list(grid(METHODS["mezo"], 1e-3, (0.5, 2.0)))
    assert points == [(lr, {"pairs": pairs}) for lr in (5e-4, 2e-3) for pairs in (1, 8)]
    found = tune(task, METHODS["bp"], 24.0, 3, (1e-6, 1.0))  # a learning rate that does nothing, and one that does
    assert found[0].lr == 0.01
    assert found[0].accuracy > found[1].accuracy + 0.2


def test_where_a_run_settles_decides_and_not_a_lucky_mark(task, monkeypatch):
    runs = {
        0.01: Curve((Point(0, 0, 0.1), *(Point(k, k, 0.8) for k in range(1, 12)))),
        0.02: Curve((Point(0, 0, 0.1), Point(1, 1, 0.95), *(Point(k, k, 0.7) for k in range(2, 12)))),
        0.03: Curve((Point(0, 0, 0.1), Point(1, 1, 0.99)), "the loss became NaN"),
    }
    assert runs[0.01].settled == pytest.approx(0.8)
    assert runs[0.02].settled == pytest.approx(0.7)
    monkeypatch.setattr(comparison, "race", lambda program, uncounted, optimizer, *rest: runs[
        round(optimizer.param_groups[0]["lr"], 6)
    ])  # fmt: skip
    assert [one.lr for one in tune(task, METHODS["bp"], 24.0, 3, (3.0, 2.0, 1.0))] == [0.01, 0.02, 0.03]


def test_too_few_samples_to_hold_some_out(dataset):
    tiny = replace(dataset, train=TensorDataset(*(tensor[:2] for tensor in dataset.train.tensors)))
    with pytest.raises(OptionError, match="2 training samples: too few"):
        comparison.validation_split(tiny, 0)


# --- the comparison ---------------------------------------------------------------------------------------------------


def test_all_methods_of_a_seed_start_from_the_same_weights(task, monkeypatch):
    starts = []

    def watch(program, *args):
        starts.append((program.seed, [p.detach().clone() for p in program.model.parameters()]))
        return Curve((Point(0.0, 0.0, 0.1),))

    monkeypatch.setattr(comparison, "race", watch)
    found = compare(task, 1.0, ["bp", "dfa"], [0, 4], (1.0,))
    assert [seed for seed, _ in starts] == [5, 0, 4] * 2
    assert found.tuning_seed == 5
    for one, other in zip(starts[:3], starts[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def test_what_every_method_is_charged(task, monkeypatch):
    """Backpropagation 2 forwards a sample and step; ``auto`` what it pulls back, the head's share of the FLOPs here."""
    raced = {}

    def watch(program, uncounted, *args):
        curve = race(program, uncounted, *args)
        spent = program.forwards + program.clean_forwards * (1 + uncounted)
        assert curve.points[-1].forwards == pytest.approx(spent / len(args[1].train))
        raced[type(program).__name__] = uncounted
        return curve

    monkeypatch.setattr(comparison, "race", watch)
    compare(task, 4.0, ["bp", "auto", "mezo", "fdfa"], [0], (1.0,))
    assert raced["Backpropagation"] == 1
    assert raced["MeZO"] == raced["ForwardDirectFeedbackAlignment"] == 0
    assert raced["Program"] == pytest.approx(8 * 10 / (64 * 8 + 8 * 10), rel=0.1)


def test_what_was_tuned_is_what_runs(task, monkeypatch):
    ran = []

    def watch(program, uncounted, optimizer, *args):
        ran.append((program.pairs, optimizer.param_groups[0]["lr"]))
        return Curve((Point(0.0, 0.0, 0.1),))

    monkeypatch.setattr(comparison, "race", watch)
    monkeypatch.setattr(comparison, "tune", lambda *args: (Candidate(0.07, {"pairs": 8}, 0.5, 0.5, ""),))
    assert compare(task, 1.0, ["mezo"], [0, 1], (1.0,)).entries["mezo"].chosen.lr == 0.07
    assert ran == [(8, 0.07)] * 2


def test_a_method_that_fails_does_not_take_the_others_with_it(task, monkeypatch, tmp_path):
    def fails(program, *args):
        if type(program).__name__ == "MeZO":
            raise ZeroDivisionError("nobody foresaw it")
        return race(program, *args)

    monkeypatch.setattr(comparison, "race", fails)
    found = compare(task, 1.0, ["bp", "mezo", "dfa"], [0], (1.0,))
    assert list(found.entries) == ["bp", "dfa"]
    assert found.failed == {"mezo": "ZeroDivisionError: nobody foresaw it"}
    written = tmp_path / "result.json"
    result = call("compare", *TINY, "--methods", "mezo", "--methods", "bp", "--json", written, code=1)
    assert "MeZO ended with an error: ZeroDivisionError: nobody foresaw it" in result.stdout
    assert list(json.loads(written.read_text())["methods"]) == ["bp"]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 10)

    def forward(self, x):
        return self.head(self.lstm(x[:, 0])[0][:, -1])


def test_forward_derivatives_that_torch_lacks_are_told_before_the_race(dataset):
    recurrent = replace(make_task(dataset), make_model=Recurrent)
    found = compare(recurrent, 1.0, ["mezo", "fg-weights"], [0], (1.0,))
    assert list(found.entries) == ["mezo"]
    assert found.refused["fg-weights"].startswith("torch lacks what forward gradient (weights) needs of this model")
    attention = replace(make_task(dataset), make_model=lambda: models.vit(depth=1))
    assert list(compare(attention, 0.5, ["fg-weights"], [0], (1.0,)).entries) == ["fg-weights"]


def test_a_comparison_repeats_but_for_the_seconds(task):
    first, second = (compare(task, 4.0, ["fdfa", "mezo"], [0], (1.0,)) for _ in range(2))
    for key in ("fdfa", "mezo"):
        assert first.entries[key].chosen.settings == second.entries[key].chosen.settings
        one, other = first.entries[key].curves[0].points, second.entries[key].curves[0].points
        assert [(p.forwards, p.accuracy) for p in one] == [(p.forwards, p.accuracy) for p in other]


def test_ctrl_c_keeps_the_finished_methods(task):
    def stop(what, share):
        if what.startswith("DFA"):
            raise KeyboardInterrupt

    found = compare(task, 1.0, ["bp", "dfa"], [0], (1.0,), stop)
    assert found.interrupted
    assert list(found.entries) == ["bp"]


def test_a_method_that_cannot_is_left_out_and_named(dataset):
    sign = replace(make_task(dataset), make_model=lambda: models.build_for("sign_mlp", dataset, hidden=(8,)))
    found = compare(sign, 1.0, ["bp", "fdfa", "mezo"], [0], (1.0,))
    assert list(found.entries) == ["mezo"]
    assert set(found.refused) == {"bp", "fdfa"}
    assert "sign" in found.refused["fdfa"]
    with pytest.raises(OptionError, match="none of the methods can train this model"):
        compare(sign, 1.0, ["bp", "dfa"], [0], (1.0,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["fdaf"]}, "unknown method 'fdaf'. Did you mean 'fdfa'"),
        ({"methods": ["bp", "bp"]}, "each method once"),
        ({"methods": []}, "at least one method"),
        ({"seeds": [1, 1]}, "each seed once"),
        ({"seeds": [-1]}, "seed -1"),
        ({"lr_grid": [0.0]}, "0 as a factor of the learning rate"),
        ({"lr_grid": [1e300]}, "1e\\+300 as a factor of the learning rate"),
        ({"lr_grid": []}, "at least one factor"),
        ({"budget": 0.0}, "must be positive"),
    ],
)
def test_what_a_comparison_cannot_have(task, changes, message):
    given = {"budget": 1.0, "methods": ["bp"], "seeds": [0], "lr_grid": [1.0]} | changes
    with pytest.raises(OptionError, match=message) as caught:
        compare(task, **given)
    assert isinstance(caught.value, UnknownNameError) == ("unknown" in message)


# --- what is made of it -----------------------------------------------------------------------------------------------


def make_entry(key, *curves):
    chosen = Candidate(0.01, {}, 0.9, 0.5, "")
    return Entry(key, (chosen,), chosen, dict(enumerate(curves)), 0.1)


def line(*points, ended=""):
    return Curve(tuple(Point(forwards, forwards / 10, accuracy) for forwards, accuracy in points), ended)


def test_means_hold_what_ended_and_take_the_first_point_behind_a_mark():
    entry = make_entry(
        "bp", line((0, 0.1), (50, 0.5), (100, 0.9)), line((0, 0.3), (50, 0.7), ended="the loss became NaN")
    )
    means = mean_curve(entry, 100.0)
    assert [(m.forwards, round(m.accuracy, 6), m.low, m.high) for m in means] == [
        (0, 0.2, 0.1, 0.3),
        (50, 0.6, 0.5, 0.7),
        (75, 0.8, 0.7, 0.9),
    ]
    assert first_at(means, 0.6) == means[1]
    assert first_at(means, 0.81) is None


def test_ratios_of_forwards():
    found = Comparison(100.0, (0,), (1.0,))
    found.entries["sign"] = make_entry("sign", line((0, 0.1), (50, 0.595), (100, 0.6)))
    found.entries["mezo"] = make_entry("mezo", line((0, 0.1), (100, 0.95)))
    found.entries["auto"] = make_entry("auto", line((0, 0.1), (5, 0.7), (100, 0.9)))
    told = {
        (one.method, one.goal): (one.forwards, one.subject_forwards, one.times)
        for one in comparison_report.ratios(comparison_report.curves(found))
    }
    assert told == {
        ("sign", "best"): (100, 5, 20),
        ("sign", "near"): (50, 5, 10),
        ("mezo", "best"): (100, None, None),
        ("mezo", "near"): (100, None, None),
    }


def test_a_best_at_the_end_of_the_budget_is_marked():
    found = Comparison(100.0, (0,), (1.0,))
    found.entries["mezo"] = make_entry("mezo", line((0, 0.1), (50, 0.5), (90, 0.5), (100, 0.6)))
    found.entries["fdfa"] = make_entry("fdfa", line((0, 0.1), (5, 0.9), (90, 0.9), (100, 0.9)))
    found.entries["auto"] = make_entry("auto", line((0, 0.1), (5, 0.7), (100, 0.9)))
    rising = {one.method: one.rising for one in comparison_report.ratios(comparison_report.curves(found))}
    assert rising == {"mezo": True, "fdfa": False}
    shown = Console(width=160)
    with shown.capture() as caught:
        shown.print(comparison_report.ratios_table(found, "auto"))
    assert "100.0+" in caught.get()
    assert "still rising when the budget ended" in caught.get()


# --- the command ------------------------------------------------------------------------------------------------------


TINY = ("mlp", "--model-option", "hidden=(8,)", "--budget", "2", "--seeds", "0", "--lr-grid", "1")


def test_the_command_from_end_to_end(tmp_path):
    json_file, svg_file = tmp_path / "a" / "result.json", tmp_path / "result.svg"
    result = call(
        "compare", *TINY, "--seeds", "3", "--methods", "bp", "--methods", "mezo", "--methods", "auto", "--methods",
        "fdfa", "--json", json_file, "--plot", svg_file, "--optimizer", "adamw", "--batch-size", "64",
    )  # fmt: skip
    for text in (
        "mlp on digits: 4 methods",
        "backpropagation",
        "MeZO",
        "FDFA",
        "Forwards to a method's best",
        "auto's",
    ):
        assert text in result.stdout
    told = json.loads(json_file.read_text())
    assert (told["kind"], told["version"], told["seeds"], told["budget"]) == ("onward comparison", 1, [0, 3], 2.0)
    assert (told["task"]["optimizer"], told["task"]["batch_size"], told["task"]["lr"]) == ("adamw", 64, 3e-3)
    assert told["tuning"]["seed"] == 4
    assert {"cpu", "threads", "versions"} <= told["machine"].keys()
    assert list(told["methods"]) == ["bp", "mezo", "auto", "fdfa"]
    for key, method in told["methods"].items():
        assert len(method["candidates"]) == (1 if key == "bp" else 2)
        assert method["runs"].keys() == {"0", "3"}
        for one in method["runs"].values():
            assert one["points"][-1]["forwards"] >= 2
            assert 0 <= one["points"][-1]["accuracy"] <= 1
    assert {(one["method"], one["subject"]) for one in told["ratios"]} == {
        (key, "auto") for key in ("bp", "mezo", "fdfa")
    }
    root = ElementTree.fromstring(svg_file.read_text())
    assert root.tag.endswith("svg")
    text = svg_file.read_text()
    for label in ("mlp, digits: by forwards", "forwards a training sample", "seconds of training", "FDFA", "MeZO"):
        assert label in text


def test_the_command_when_interrupted(tmp_path, monkeypatch):
    def interrupted(task, budget, methods, seeds, lr_grid, advance):
        return Comparison(budget, tuple(seeds), tuple(lr_grid), interrupted=True)

    monkeypatch.setattr("onward.cli.compare.compare", interrupted)
    result = call("compare", *TINY, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.svg", code=130)
    assert "interrupted before the last method was finished" in result.stderr
    assert json.loads((tmp_path / "a.json").read_text())["interrupted"] is True
    assert not (tmp_path / "a.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "fdaf"), "Did you mean 'fdfa'"),
        (("--budget", "0"), "must be positive"),
        (("--seeds", "0"), "each seed once"),
        (("--optimizer", "adm"), "unknown optimizer 'adm'"),
        (("--batch-size", "0"), "at least one sample"),
        (("--threads", "0"), "at least one thread"),
        (("--model-option", "width"), "expected KEY=VALUE"),
        (("--data", "digit"), "Did you mean 'digits'"),
        (("--json", "/dev/null/x"), "cannot write /dev/null/x"),
        (("--plot", "/dev/null/x.svg"), "cannot write /dev/null/x.svg"),
        (("--plot", "x.png"), "--plot x.png: the plot is SVG; name it x.svg"),
        (("--model-option", "num_classes=5"), "'digits' has 10 classes"),
        (("--data", "linear", "--model-option", "in_features=32"), "does not run on 'linear', whose inputs are (64,)"),
    ],
)
def test_mistakes_are_one_clean_message(arguments, message):
    result = call("compare", *TINY, *arguments, code=2)
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stdout == ""


def test_matplotlib_is_asked_for_before_the_work(monkeypatch, tmp_path):
    def missing():
        raise OptionError("plots need matplotlib")

    monkeypatch.setattr("onward.evidence.plots.require_matplotlib", missing)
    assert "plots need matplotlib" in call("compare", *TINY, "--plot", tmp_path / "a.svg", code=2).stderr


def test_debug_shows_the_traceback():
    with pytest.raises(UnknownNameError):
        call("compare", "mpl", "--debug")
