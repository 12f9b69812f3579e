"""Recorded steps, traces and pictures of them."""

import itertools
import json
import threading
import xml.etree.ElementTree as ElementTree

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import onward
from onward import LikelihoodRatio
from onward.runtime.plan import format_plan
from onward.runtime.schedule.picture import show_seconds, ticks, to_picture
from onward.runtime.schedule.timeline import Span, Timeline, record, to_chrome

STEP = Timeline(
    (
        Span("F0", 0, 0.0, 0.001),
        Span("E", 0, 0.001, 0.0015),
        Span("G0", 0, 0.0015, 0.0045),
        Span("P0.0", 1, 0.002, 0.004),
        Span("L0", 1, 0.004, 0.0042),
    ),
    0.005,
    2,
)
SVG = "{http://www.w3.org/2000/svg}"


def test_numbers_of_a_step():
    assert STEP.busy == pytest.approx(0.0067)
    assert STEP.efficiency == pytest.approx(0.67)
    assert STEP.overlap == pytest.approx(0.0022)
    assert [span.kind for span in STEP.spans] == [
        "clean forward", "losses", "gradient", "perturbed run", "feedback learns",
    ]  # fmt: skip
    assert Span("update", 0, 0.0, 1.0).kind == "other"
    assert (Timeline((), 0.0, 1).efficiency, Timeline((), 0.0, 1).overlap) == (1.0, 0.0)


def test_recording_a_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    inputs, target = torch.randn(6, 4), torch.randint(3, (6,))
    estimator = LikelihoodRatio(groups="layerwise", copies=4, chunk=2, sigma=0.1)
    program = onward.compile(model, (inputs,), loss=F.cross_entropy, estimator=estimator)
    found = record(program.executor, lambda: program.step(inputs, target))
    assert " ".join(span.name for span in found.spans) == format_plan(program.executor.plan)
    assert all(0 < first.end <= second.start for first, second in itertools.pairwise(found.spans))
    assert 0 < found.busy < found.seconds
    assert program.step_count == 1
    assert program.executor.record is None

    def fails(output, target):
        raise ArithmeticError

    program = onward.compile(model, (inputs,), loss=fails, estimator=estimator)
    with pytest.raises(ArithmeticError):
        record(program.executor, lambda: program.step(inputs, target))
    assert program.executor.record is None


def test_recording_threads():
    """Spans come from several threads at once and are sorted by when they began."""

    class Executor:
        record = None

    def step():
        threads = [
            threading.Thread(target=executor.record, args=(f"G{worker}", worker, 2.0 - worker, 3.0))
            for worker in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    executor = Executor()
    found = record(executor, step, 2)
    assert [(span.name, span.worker) for span in found.spans] == [("G1", 1), ("G0", 0)]
    assert found.workers == 2


def test_a_trace_in_chromes_format():
    trace = json.loads(to_chrome({"recorded": [STEP, STEP], "simulated": [STEP]}))
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    names = [(e["name"], e["pid"], e["tid"], e["args"]["name"]) for e in events if e["ph"] == "M"]
    assert names == [
        ("process_name", 1, 0, "recorded"), ("thread_name", 1, 0, "worker 0"), ("thread_name", 1, 1, "worker 1"),
        ("process_name", 2, 0, "simulated"), ("thread_name", 2, 0, "worker 0"), ("thread_name", 2, 1, "worker 1"),
    ]  # fmt: skip
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 3 * len(STEP.spans)
    assert all({"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"} == event.keys() for event in spans)
    perturbed = [event for event in spans if event["name"] == "P0.0"]
    assert [event["ts"] for event in perturbed] == pytest.approx([2000, 7000, 2000])  # the second step behind the first
    assert [event["args"]["step"] for event in perturbed] == [0, 1, 0]
    assert {event["tid"] for event in perturbed} == {1}
    assert all(event["dur"] == pytest.approx(2000) for event in perturbed)
    assert json.loads(to_chrome({}))["traceEvents"] == []


def boxes(picture):
    root = ElementTree.fromstring(picture)
    return root, [group for group in root.iter(f"{SVG}g") if group.get("class") == "span"]


def test_a_picture_has_a_box_for_every_task():
    root, found = boxes(to_picture({"recorded": STEP, "simulated": STEP}, "mlp"))
    assert len(found) == 2 * len(STEP.spans)
    by_name = {group.find(f"{SVG}title").text.split(" ")[0]: group.find(f"{SVG}rect") for group in found}
    width = {name: float(rect.get("width")) for name, rect in by_name.items()}
    assert width["P0.0"] == pytest.approx(2 * width["F0"], abs=0.1)
    top = {name: float(rect.get("y")) for name, rect in by_name.items()}
    assert top["F0"] == top["E"] == top["G0"] < top["P0.0"] == top["L0"]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    for shown in ("mlp", "worker 0", "worker 1", "clean forward", "perturbed run", "0 ms", "5 ms", "P0.0", "90 % busy"):
        assert shown in texts
    assert any(text.startswith("recorded: 5.00 ms, 2.20 ms of it side by side, 67 % busy") for text in texts)


def test_names_are_escaped_and_shown_where_they_fit():
    name = 'G<0> & "a very long name of a task that fits into no box"'
    step = Timeline((Span(name, 0, 0.0, 0.1), Span("G1", 0, 0.1, 10.0)), 10.0, 1)
    root, found = boxes(to_picture({"<b>&": step}, "a < b & c" * 20))
    assert found[0].find(f"{SVG}title").text.startswith(name)
    assert [group.find(f"{SVG}text") is None for group in found] == [True, False]
    assert float(root.get("width")) > 9 * len("a < b & c" * 20)
    assert name in to_chrome({"x": [step]}).replace('\\"', '"')


@given(st.floats(1e-6, 1e4))
def test_ticks_are_few_and_round(seconds):
    found = ticks(seconds)
    assert found[0] == 0
    assert 5 <= len(found) <= 11
    assert found[-1] <= seconds * (1 + 1e-9)
    step = f"{found[1]:e}"
    assert step[0] in "125"
    assert float(step) == pytest.approx(found[1])
    assert all(later - earlier == pytest.approx(found[1]) for earlier, later in itertools.pairwise(found))


def test_seconds_in_words():
    assert [show_seconds(value) for value in (0.0, 3.7e-5, 0.00241, 1.5)] == ["0 µs", "37 µs", "2.41 ms", "1.50 s"]
    assert ticks(0.0) == [0.0]
    boxes(to_picture({"nothing": Timeline((), 0.0, 1)}, ""))
    boxes(to_picture({}, ""))
