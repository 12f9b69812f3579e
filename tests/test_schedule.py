"""Tasks and schedules: properties over random graphs of tasks, and the tasks of real programs."""

import functools
import itertools
from random import Random

import networkx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import onward
from onward import LikelihoodRatio
from onward.compiler.cost import count_work, total_flops
from onward.compiler.driver import compile_model
from onward.compiler.program import CompiledModel, input_keys
from onward.runtime.plan import Forward, Gradient, Learn, Perturb, chunks, make_plan
from onward.runtime.schedule.bounds import critical_path, lower_bound, priorities, simulate
from onward.runtime.schedule.costs import estimated_costs, measured_costs
from onward.runtime.schedule.pipeline import RULES, make_pipeline, parameters_in_order, seconds_a_step
from onward.runtime.schedule.report import RECORDED, examine_schedule
from onward.runtime.schedule.tasks import Task, dependencies, make_tasks
from onward.runtime.schedule.timeline import Span, Timeline

# --- random tasks, whose costs are whole numbers so that sums are exact ----------------------------------------------


@st.composite
def problems(draw, most=12):
    """Tasks in an order they can run in, and their costs."""
    count = draw(st.integers(1, most))
    tasks = tuple(
        Task(Forward(position), tuple(sorted(draw(st.sets(st.integers(0, position - 1), max_size=4)))))
        if position
        else Task(Forward(0), ())
        for position in range(count)
    )
    costs = [float(draw(st.integers(0, 9))) for _ in tasks]
    return tasks, costs


def all_paths(tasks):
    """Every chain of tasks that wait for each other, by brute force."""
    waiting: dict[int, list[int]] = {position: [] for position in range(len(tasks))}
    for position, task in enumerate(tasks):
        for before in task.after:
            waiting[before].append(position)
    ends = [[position] for position in range(len(tasks))]
    while ends:
        path = ends.pop()
        yield path
        ends += [[*path, following] for following in waiting[path[-1]]]


@given(problems(), st.integers(1, 4), st.sampled_from([0.0, 0.5]))
def test_a_simulated_step_can_run(problem, workers, overhead):
    """Every task runs once, after what it waits for, on a worker of its own for the time."""
    tasks, costs = problem
    found = simulate(tasks, costs, workers, overhead=overhead)
    spans = {span.name: span for span in found.spans}
    assert len(found.spans) == len(tasks) == len(spans)
    for task, cost in zip(tasks, costs, strict=True):
        span = spans[task.name]
        assert span.seconds == cost
        assert 0 <= span.worker < workers
        assert all(span.start >= spans[tasks[before].name].end + overhead for before in task.after)
    for worker in range(workers):
        own = sorted((span for span in found.spans if span.worker == worker), key=lambda span: (span.start, span.end))
        assert all(before.end + overhead <= after.start for before, after in itertools.pairwise(own))
    assert found.seconds == max(span.end for span in found.spans)
    assert found == simulate(tasks, costs, workers, overhead=overhead)


@given(problems(), st.integers(1, 4))
def test_a_simulated_step_keeps_its_bounds(problem, workers):
    tasks, costs = problem
    least, found = lower_bound(tasks, costs, workers), simulate(tasks, costs, workers)
    assert least - 1e-9 <= found.seconds <= sum(costs)
    assert found.seconds <= (2 - 1 / workers) * least + 1e-9  # Graham 1969
    slow = simulate(tasks, costs, workers, overhead=0.5).seconds
    assert least - 1e-9 <= slow <= sum(costs) + 0.5 * len(tasks)
    assert 0 <= found.efficiency <= 1 + 1e-9
    assert found.busy == sum(costs)


@given(problems())
def test_one_worker_takes_one_task_after_the_other(problem):
    tasks, costs = problem
    found = simulate(tasks, costs, 1)
    assert found.seconds == sum(costs)
    assert found.overlap == 0
    order = [int(span.name[1:]) for span in found.spans]
    assert all(order.index(before) < order.index(after) for after, task in enumerate(tasks) for before in task.after)


@given(problems(most=8))
def test_the_critical_path_is_the_longest_of_all(problem):
    tasks, costs = problem
    lengths = {tuple(path): sum(costs[position] for position in path) for path in all_paths(tasks)}
    seconds, path = critical_path(tasks, costs)
    assert seconds == max(lengths.values()) == lengths[path]
    assert not any(path[-1] in task.after for task in tasks)
    for position, way in enumerate(priorities(tasks, costs)):
        assert way == max(length for path, length in lengths.items() if path[0] == position)
    assert lower_bound(tasks, costs, 10**9) == seconds
    assert lower_bound(tasks, costs, 1) == sum(costs)


def test_the_longest_way_goes_first():
    """Of three tasks that are ready the one that two others wait for starts, whatever the plan's order."""
    tasks = (Task(Forward(0), ()), Task(Forward(1), ()), Task(Forward(2), ()), Task(Forward(3), (2,)))
    found = simulate(tasks, [2.0, 2.0, 1.0, 3.0], 2)
    assert [(span.name, span.worker, span.start) for span in found.spans] == [
        ("F2", 0, 0.0), ("F0", 1, 0.0), ("F3", 0, 1.0), ("F1", 1, 2.0),
    ]  # fmt: skip
    assert found.seconds == 4
    assert found.overlap == 4
    assert (critical_path((), []), simulate((), [], 2).seconds) == ((0.0, ()), 0.0)


# --- the tasks of programs --------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A layer that is used twice: two sites with the same parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.fc(torch.relu(self.fc(x)))))


SETTINGS = {
    "layerwise in chunks": LikelihoodRatio(groups="layerwise", copies=4, chunk=2, sigma=0.1),
    "joint, captures of each copy": LikelihoodRatio(groups="joint", copies=4, chunk=2, sigma=0.1),
    "predicted": LikelihoodRatio.feedback_learned(copies=2),
    "corrected": LikelihoodRatio.feedback_learned(copies=2, correction="full"),
    "shrunk": LikelihoodRatio.feedback_learned(copies=4, correction="shrunk"),
}


@functools.cache
def compiled_shared(setting: str) -> CompiledModel:
    torch.manual_seed(0)
    return compile_model(Shared(), torch.randn(4, 6), SETTINGS[setting])


@pytest.fixture(params=SETTINGS)
def shared(request: pytest.FixtureRequest) -> CompiledModel:
    return compiled_shared(request.param)


def test_the_plan_is_one_order_of_its_tasks(shared):
    for perturbed, workers in itertools.product((True, False), (1, 2, 5)):
        plan = make_plan(shared, perturbed=perturbed)
        tasks = make_tasks(shared, plan, in_flight=workers)
        assert tuple(task.action for task in tasks) == plan
        assert all(before < position for position, task in enumerate(tasks) for before in task.after)
        dag = dependencies(tasks)
        assert [name for _, name in dag.nodes(data="name")] == [str(action) for action in plan]
        error = [str(action) for action in plan].index("E")
        for position, task in enumerate(tasks):
            if isinstance(task.action, (Perturb, Gradient)):
                assert networkx.has_path(dag, error, position)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_order_keeps_sums_and_memory(shared, workers):
    """In every order that the tasks allow, gradients of a parameter are summed in the plan's order, and no more than
    `workers` perturbed runs are begun of which a gradient has captures still to read."""
    tasks = make_tasks(shared, make_plan(shared), in_flight=workers)
    actions = [task.action for task in tasks]
    site = {gradient.site.index: gradient for gradient in shared.gradients}
    gradients = [position for position, action in enumerate(actions) if isinstance(action, Gradient)]
    summed = [
        (first, second)
        for first, second in itertools.combinations(gradients, 2)
        if {*site[actions[first].site].site.parameters} & {*site[actions[second].site].site.parameters}
    ]
    assert summed  # of the layer that is used twice
    runs = [position for position, action in enumerate(actions) if isinstance(action, Perturb)]
    readers = {
        run: {
            position
            for position in gradients
            if actions[position].chunk == actions[run].chunk and site[actions[position].site].run == actions[run].run
        }
        for run in runs
    }
    orders = list(networkx.all_topological_sorts(dependencies(tasks)))
    assert len(orders) > 1
    for order in orders:
        at = {position: when for when, position in enumerate(order)}
        assert at.keys() == set(range(len(tasks)))
        assert all(at[first] < at[second] for first, second in summed)
        for run in runs:
            begun = [other for other in runs if at[other] <= at[run]]
            alive = [other for other in begun if other == run or any(at[one] > at[run] for one in readers[other])]
            assert len(alive) <= workers


def test_gradients_wait_for_each_other_only_where_they_must(shared):
    """No path from one gradient to another that is not of a shared parameter, a shrunk correction, or memory."""
    plan = make_plan(shared)
    dag = dependencies(make_tasks(shared, plan, in_flight=len(plan)))  # memory holds nothing back
    sites = {gradient.site.index: gradient for gradient in shared.gradients}
    positions = [position for position, action in enumerate(plan) if isinstance(action, Gradient)]
    for first, second in itertools.combinations(positions, 2):
        one, other = (sites[plan[position].site] for position in (first, second))
        must = set(one.site.parameters) & set(other.site.parameters) or (one.shrunk and other.shrunk)
        assert networkx.has_path(dag, first, second) == bool(must)


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
def test_work_is_counted_at_the_size_of_the_batch(setting):
    compiled = compiled_shared(setting)
    for module in [*compiled.stages, *(g.module for g in compiled.gradients if not g.per_copy)]:
        one, two = count_work(module, 4), count_work(module, 8)
        assert one.flops == 4 * total_flops(module)
        assert two.flops == 2 * one.flops
        assert one.bytes < two.bytes <= 2 * one.bytes
        assert two.operations == one.operations == sum(node.op == "call_function" for node in module.graph.nodes)
    for run in compiled.runs:
        one, two = count_work(run.module, 4, 2), count_work(run.module, 4, 4)
        assert two.flops == 2 * one.flops
        assert one.noises == two.noises == len(run.sites)


def test_work_is_counted_where_a_stage_reads_a_tuple():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    estimator = LikelihoodRatio(groups="joint", copies=4, placement="operation")
    compiled = compile_model(model, torch.randn(6, 8), estimator)
    values = [node.meta["val"] for stage in compiled.stages for node in stage.graph.nodes if node.op == "placeholder"]
    assert any(isinstance(value, tuple) for value in values)
    assert sum(count_work(stage, 6).flops for stage in compiled.stages) == 6 * 2 * (64 + 32)


def test_modelled_costs_order_tasks_by_their_size():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    compiled = compile_model(model, torch.randn(4, 8), LikelihoodRatio(groups="layerwise", copies=4, chunk=2))
    tasks = make_tasks(compiled, make_plan(compiled))
    found = dict(zip((task.name for task in tasks), estimated_costs(compiled, tasks, 64), strict=True))
    assert all(cost > 0 for cost in found.values())
    assert found["F2"] > 4 * found["F1"] > 4 * found["F0"] / 2
    assert found["P0.0"] == found["P0.1"] > found["P2.0"]
    assert found["G2"] > 4 * found["G0"]
    assert estimated_costs(compiled, tasks, 128)[2] > 1.5 * found["F2"]


def test_every_kind_of_task_has_a_modelled_cost(shared):
    tasks = make_tasks(shared, make_plan(shared))
    assert all(0 < cost < 0.1 for cost in estimated_costs(shared, tasks, 8))


def test_measured_costs_are_medians():
    tasks = (Task(Forward(0), ()), Task(Forward(1), (0,)))
    steps = [
        Timeline((Span("F1", 1, 1.0, 1.0 + second), Span("F0", 0, 0.0, first)), 2.0, 2)
        for first, second in ((1.0, 0.5), (3.0, 0.25), (2.0, 9.0))
    ]
    assert measured_costs(tasks, steps) == [2.0, 0.5]


# --- a program's schedule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "kinds"), [("layerwise in chunks", 1), ("predicted", 2)])
def test_a_schedule_is_recorded(setting, kinds):
    torch.manual_seed(0)
    model, inputs, target = Shared(), torch.randn(8, 6), torch.randint(3, (8,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    compiled = compile_model(model, inputs, SETTINGS[setting])
    report = examine_schedule(model, compiled, F.cross_entropy, inputs, target, workers=3)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (report.samples, report.asked, len(report.steps)) == (8, 3, kinds)
    for step in report.steps:
        plan = make_plan(compiled, perturbed=step.perturbed)
        assert [task.name for task in step.tasks] == [str(action) for action in plan]
        assert [task.name for task in step.tasks if task.critical] == list(step.critical_path)
        assert step.critical_seconds <= step.total == pytest.approx(sum(task.measured for task in step.tasks))
        assert [one.workers for one in step.workers] == [1, 2, 3, 4, 8]
        for one in step.workers:
            assert step.critical_seconds * 0.999 <= one.lower_bound or one.workers > 3  # with more runs in memory
            assert one.lower_bound <= one.simulated
            assert 0 < one.simulated_efficiency <= 1
            assert (one.recorded is None) == (one.workers not in (1, 3))
        assert list(step.timelines) == ["recorded on 1 worker", "recorded on 3 workers", "simulated on 3 workers"]
        assert [len(steps) for steps in step.timelines.values()] == [RECORDED, RECORDED, 1]
        for timelines in step.timelines.values():
            for timeline in timelines:
                assert sorted(span.name for span in timeline.spans) == sorted(map(str, plan))
                assert all(0 <= span.start <= span.end <= timeline.seconds for span in timeline.spans)
    waits = {task.name: task for task in report.steps[0].tasks}
    assert waits["F1"].waits_for == ("F0",)
    assert set(waits["E"].waits_for) <= set(waits["E"].after)
    run = compiled.runs[0]
    assert waits["P0.0"].does == f"perturbed_0, {len(chunks(compiled, run)[0])} copies"


def test_the_zoo_is_recorded_too():
    torch.manual_seed(0)
    data = onward.models.load("digits")
    inputs, target = (tensor[:8] for tensor in data.train.tensors)
    model = onward.models.resnet5(num_classes=10, in_channels=1, width=4)
    compiled = compile_model(model, inputs, LikelihoodRatio.auto())
    report = examine_schedule(model, compiled, F.cross_entropy, inputs, target, workers=1)
    assert [step.perturbed for step in report.steps] == [True, False]
    assert list(report.steps[0].timelines) == ["recorded on 1 worker", "simulated on 1 worker"]


def test_examining_leaves_the_model_as_it_was_and_counts_the_samples_of_any_target() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    x, target = torch.randn(5, 4), {"class": torch.arange(5) % 3, "weight": torch.ones(5)}

    def loss(output: torch.Tensor, target: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(output, target["class"], reduction="none") * target["weight"]

    estimator = onward.LikelihoodRatio.feedback_learned(copies=2)
    compiled = onward.compile(model, x, loss=loss, estimator=estimator).compiled
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = examine_schedule(model, compiled, loss, x, target, workers=2)
    assert report.samples == 5
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- several steps ----------------------------------------------------------------------------------------------------


def pipelines(compiled):
    """By rule, the tasks of three steps of a program, by name, and its parameters."""
    tasks = make_tasks(compiled, make_plan(compiled), in_flight=2)
    found = {rule: make_pipeline(compiled, tasks, rule, 3) for rule in RULES}
    return tasks, found, parameters_in_order(compiled)


def ancestors(tasks):
    """By name, the names of all tasks that have to be done before."""
    known: dict[str, set[str]] = {}
    for task in tasks:
        direct = [tasks[before].name for before in task.after]
        known[task.name] = set(direct).union(*(known[name] for name in direct))
    return known


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_weight_is_stale_and_none_moves_under_its_readers(setting):
    """In every rule: a parameter moves after its gradients and after all that read it in the step, and whatever reads
    it in the next step comes after that. Each step's tasks wait for each other as they do in one."""
    compiled = compiled_shared(setting)
    tasks, found, parameters = pipelines(compiled)
    trained = {name for gradient in compiled.gradients for name in gradient.site.parameters}
    assert set(parameters) == trained
    modules = {f"F{n}": stage for n, stage in enumerate(compiled.stages)}
    modules |= {f"G{g.site.index}": g.module for g in compiled.gradients}
    modules |= {f"P{run.index}": run.module for run in compiled.runs}
    read = {task.name: set(input_keys(modules[task.name.split(".")[0]])) for task in tasks
            if task.name.split(".")[0] in modules}  # fmt: skip
    for pipeline in found.values():
        before = ancestors(pipeline)
        assert len(before) == len(pipeline) == 3 * (len(tasks) + len(parameters))
        for step in range(3):
            for task in tasks:
                own = {f"{tasks[each].name}@{step}" for each in task.after}
                assert own <= before[f"{task.name}@{step}"]
                for name in parameters:
                    if f"parameter:{name}" not in read.get(task.name, ()):
                        continue
                    assert f"{task.name}@{step}" in before[f"U:{name}@{step}"]
                    assert step == 0 or f"U:{name}@{step - 1}" in before[f"{task.name}@{step}"]
            for gradient in compiled.gradients:
                for name in gradient.site.parameters:
                    mine = {task.name for task in tasks if task.name.split(".")[0] == f"G{gradient.site.index}"}
                    assert {f"{each}@{step}" for each in mine} <= before[f"U:{name}@{step}"]


def test_what_the_rules_allow():
    """A barrier: nothing of a step before all updates of the last. Chasing: no update before the step is done, so that
    one that fails changes no weight. At once: the first layer's update does not wait for the last gradient."""
    tasks, found, parameters = pipelines(compiled_shared("predicted"))
    names = {f"{task.name}@0" for task in tasks}
    before = {rule: ancestors(pipeline) for rule, pipeline in found.items()}
    updates = {f"U:{name}@0" for name in parameters}
    assert all(updates <= before["barrier"][f"{task.name}@1"] for task in tasks)
    assert all(names <= before[rule][update] for rule in ("barrier", "chase") for update in updates)
    assert not updates <= before["chase"]["F0@1"]
    last = tasks[-1].name
    assert isinstance(tasks[-1].action, Learn)
    assert f"{last}@0" not in before["at once"][f"U:{parameters[0]}@0"]
    assert f"{last}@0" in before["at once"][f"{last}@1"]  # what is learned is learned in order


@pytest.mark.parametrize("setting", SETTINGS)
def test_fewer_waits_never_make_the_bound_longer(setting):
    compiled = compiled_shared(setting)
    tasks, found, parameters = pipelines(compiled)
    random = Random(0)
    for workers in (1, 2, 3) * 5:
        costs = [random.randint(1, 9) for _ in tasks]
        updates = [random.randint(1, 9) for _ in parameters]
        bound = {rule: lower_bound(pipeline, [*costs, *updates] * 3, workers) for rule, pipeline in found.items()}
        assert bound["at once"] <= bound["chase"] <= bound["barrier"]
        if workers == 1:  # which gains nothing
            seconds = seconds_a_step(compiled, tasks, costs, updates, 1, 0.0)
            assert seconds == dict.fromkeys(RULES, sum(costs) + sum(updates))
