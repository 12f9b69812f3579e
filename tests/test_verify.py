"""The verifier accepts what the compiler makes and refuses each kind of damage by name."""

import time
from dataclasses import replace

import pytest
import torch
from random_models import Recipe, build
from torch import fx

import onward
import onward.runtime.program  # registers the operators' kernels, which compiling calls
from onward.compiler import program_checks
from onward.compiler.driver import compile_model
from onward.compiler.graph_checks import perturbations
from onward.compiler.program import CompiledModel
from onward.compiler.task_graph import graphs, task_graph
from onward.compiler.verify import verify, verify_graph, verify_history
from onward.passes import ops
from onward.passes.errors import VerificationError
from onward.passes.graph import Output, Role, clone, finish, outputs, placeholders, set_outputs

_aten = torch.ops.aten

RECIPE = Recipe("tuple", (("linear", 0, 0), ("relu", 2, 0), ("frozen", 3, 0), ("transposed", 4, 0)), 2)


@pytest.fixture(scope="module")
def joint():
    model, inputs, _ = build(RECIPE)
    return compile_model(model, inputs, onward.LikelihoodRatio(copies=4, groups="joint"))


@pytest.fixture(scope="module")
def layerwise():
    model, inputs, _ = build(RECIPE)
    return compile_model(model, inputs, onward.LikelihoodRatio(copies=4, groups="layerwise", capture="stochastic"))


def edited(module, edit):
    """A clone of `module` after ``edit(clone)``."""
    module = clone(module)
    edit(module)
    return finish(module)


def first(module, target):
    return next(node for node in module.graph.nodes if node.target == target)


def with_gradient(compiled, index, edit):
    gradients = list(compiled.gradients)
    gradients[index] = replace(gradients[index], module=edited(gradients[index].module, edit))
    return replace(compiled, gradients=tuple(gradients))


def with_run(compiled, index, edit):
    runs = list(compiled.runs)
    runs[index] = replace(runs[index], module=edited(runs[index].module, edit))
    return replace(compiled, runs=tuple(runs))


def refuses(compiled, *patterns):
    with pytest.raises(VerificationError) as caught:
        verify(compiled)
    for pattern in ("invariant", "is broken in", *patterns):
        assert pattern in str(caught.value)


class TestAccepts:
    def test_whole_programs_and_every_pass(self, joint, layerwise):
        for compiled in (joint, layerwise):
            verify(compiled)
            verify_history(compiled)

    def test_every_setting_of_a_batch_normalised_network_in_training(self):
        model = onward.models.resnet5(num_classes=10, in_channels=1)
        estimators = (
            onward.LikelihoodRatio(copies=2, groups="joint"),
            onward.LikelihoodRatio(copies=2, capture="stochastic"),
            onward.LikelihoodRatio.feedback_learned(),
            onward.LikelihoodRatio.feedback_learned(correction="full"),
        )
        for estimator in estimators:
            verify_history(compile_model(model, (torch.randn(4, 1, 8, 8),), estimator))

    def test_it_is_cheap(self, layerwise):
        spent = []
        for _ in range(3):
            begun = time.perf_counter()
            verify(layerwise)
            spent.append(time.perf_counter() - begun)
        assert min(spent) < 0.05 * sum(record.seconds for record in layerwise.history)

    def test_compile_calls_it(self, monkeypatch):
        seen: list[CompiledModel] = []
        monkeypatch.setattr("onward.compiler.driver.verify", seen.append)
        model, inputs, _ = build(Recipe())
        assert seen == [compile_model(model, inputs, onward.LikelihoodRatio(copies=2))]

    def test_the_task_graph_names_what_flows(self, joint):
        dag = task_graph(joint)
        assert set(dag) == set(graphs(joint)) - {"the one-copy graph"}
        assert dag.edges["perturbed_0", "gradient_0"]["key"] == "runtime:weights"
        assert all(dag.out_degree(gradient.name) == 0 for gradient in joint.gradients)


class TestGraphs:
    """Damage to one graph, found by `verify_graph` (after a pass) and hence by `verify`."""

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda m: placeholders(m)[0].meta.pop("role"), "no role"),
            (lambda m: placeholders(m)[0].meta.update(role=Role.RUNTIME, target="mood"), "'mood'"),
            (lambda m: placeholders(m)[1].meta.update(placeholders(m)[0].meta), "bound to"),
            (lambda m: m.graph.output_node().meta.update(outputs=[]), "0 outputs are described"),
            (lambda m: set_outputs(m, [*outputs(m), outputs(m)[0]]), "returned 2 times"),
            (lambda m: set_outputs(m, [(Output("fruit", "0"), n) for _, n in outputs(m)]), "unknown kind 'fruit'"),
            (
                lambda m: setattr(first(m, _aten.relu.default), "target", _aten.relu_.default),
                "writes into its argument",
            ),
            (lambda m: setattr(first(m, _aten.relu.default), "target", torch.relu), "no registered operator"),
            (lambda m: setattr(first(m, _aten.relu.default), "target", _aten.rand_like.default), "torch's generator"),
            (lambda m: _set_argument(perturbations(m)[1], 4, 0), "site 0 already"),
            (lambda m: _set_argument(perturbations(m)[0], 4, 7), "marked as 0"),
            (lambda m: _set_argument(perturbations(m)[0], 2, perturbations(m)[0].args[1]), "key is not the step's"),
            (lambda m: _set_argument(perturbations(m)[0], 6, [1, 5]), "its layout"),
            (lambda m: _bypass(m), "past the noise"),
            (lambda m: _change_site(m, output="relu"), "has its noise at %relu"),
            (lambda m: _change_site(m, operands=("nobody",)), "%nobody"),
            (lambda m: _change_site(m, parameters=()), "not all trainable"),
            (lambda m: _change_site(m, index=1), "numbered"),
            (lambda m: _change_layout(m, sizes=(1, 5)), "dimension 1 is 4"),
            (lambda m: _change_layout(m, sizes=(2, 4)), "dimension 0"),
            (lambda m: _change_layout(m, sizes=(1, 4), dim=1), "dimension"),
            (lambda m: _change_layout(m, sizes=(1, 4, 1)), "does not fit"),
            (lambda m: _change_layout(m, outer=2), "do not divide"),
        ],
    )
    def test_damage_is_named(self, joint, damage, message):
        broken = edited(joint.graph, lambda module: None)
        damage(broken)
        with pytest.raises(VerificationError, match="after my_pass") as caught:
            verify_graph(broken, name="the graph after my_pass")
        assert message in str(caught.value)
        assert "report it" in str(caught.value)

    def test_a_call_of_a_module_is_no_normal_form(self):
        traced = fx.symbolic_trace(torch.nn.Sequential(torch.nn.ReLU()))
        placeholders(traced)[0].meta.update(role=Role.INPUT, target=0)
        traced.graph.output_node().args = ((traced.graph.output_node().args[0],),)
        traced.graph.output_node().meta["outputs"] = [Output("output", "0")]
        with pytest.raises(VerificationError, match="call_module"):
            verify_graph(traced)

    def test_torch_randomness_is_allowed_until_it_is_keyed(self):
        model, inputs, _ = build(Recipe("tensor", (("dropout", 0, 0),), training=True))
        compiled = compile_model(model, inputs, onward.LikelihoodRatio(copies=2))
        verify_graph(compiled.captured.module, keyed=False)
        with pytest.raises(VerificationError, match="generator"):
            verify_graph(compiled.captured.module)

    def test_two_captures_with_the_same_numbers(self):
        layers = [torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3)]
        estimator = onward.LikelihoodRatio(copies=2, capture="stochastic")
        module = compile_model(torch.nn.Sequential(*layers), torch.ones(2, 3), estimator).graph
        verify_graph(module)
        drawn = [node for node in module.graph.nodes if node.target == ops.pack_stochastic_signs]
        assert len(drawn) == 2
        _set_argument(drawn[0], 4, drawn[1].args[4])
        with pytest.raises(VerificationError, match="same numbers"):
            verify_graph(module)

    def test_two_random_operations_with_the_same_numbers(self):
        model, inputs, _ = build(Recipe("tensor", (("dropout", 0, 0), ("dropout", 1, 0)), training=True))
        module = compile_model(model, inputs, onward.LikelihoodRatio(copies=2)).graph
        for node in module.graph.nodes:
            if node.target == ops.keyed_random:
                _set_argument(node, 1, 0)
        with pytest.raises(VerificationError, match="same numbers"):
            verify_graph(module)


class TestPrograms:
    """Damage between graphs."""

    def test_an_unreached_parameter(self, joint):
        sites = (replace(joint.sites[0], parameters=("another",)), *joint.sites[1:])
        refuses(replace(joint, sites=sites), "invariant 1", "no site reaches", "blocks.0.linear.bias")

    def test_a_missing_gradient(self, joint):
        def drop(module):
            set_outputs(module, outputs(module)[:1])

        refuses(with_gradient(joint, -1, drop), "invariant 1", "no gradient subgraph gives", "heads.1.bias")

    def test_a_frozen_parameter_with_a_gradient(self, joint):
        def rename(module):
            set_outputs(module, [*outputs(module), (Output("gradient", "blocks.2.frozen.bias"), outputs(module)[0][1])])

        refuses(with_gradient(joint, 0, rename), "frozen parameter 'blocks.2.frozen.bias'", "gradient_0")

    def test_a_gradient_of_another_shape(self, joint):
        def swap(module):
            (a, x), (b, y) = outputs(module)
            set_outputs(module, [(a, y), (b, x)])

        refuses(with_gradient(joint, 0, swap), "invariant 1", "has shape")

    def test_a_site_perturbed_twice_or_never(self, joint):
        run = joint.runs[0]
        refuses(replace(joint, runs=(replace(run, sites=run.sites[1:]),)), "invariant 1", "once")
        refuses(replace(joint, gradients=joint.gradients[1:]), "invariant 1")

    def test_losses_of_a_run_that_does_not_perturb_the_site(self, layerwise):
        gradients = (replace(layerwise.gradients[0], run=1), *layerwise.gradients[1:])
        refuses(replace(layerwise, gradients=gradients), "gradient_0", "does not perturb it")

    def test_a_gradient_that_reads_another(self, joint, monkeypatch):
        def read(module):
            node = placeholders(module)[0]
            node.meta.update(role=Role.VALUE, target="blocks.0.linear.weight")
            node.meta.pop("capture", None)

        broken = with_gradient(joint, 1, read)
        refuses(broken, "invariant 2", "gradient_1", "neither a binding nor computed")

        monkeypatch.setattr(program_checks, "task_graph", lambda compiled: _chained(task_graph(compiled)))
        refuses(joint, "invariant 2", "waits for another gradient subgraph: gradient_0 -> gradient_1")

    def test_tasks_that_wait_for_each_other(self, joint, monkeypatch):
        monkeypatch.setattr(program_checks, "task_graph", lambda compiled: _chained(task_graph(compiled), back=True))
        refuses(joint, "invariant 2", "wait for each other")

    def test_stages_out_of_order(self, joint):
        refuses(replace(joint, stages=joint.stages[::-1]), "invariant 2", "clean_0")

    def test_a_missing_or_doubled_stage(self, joint):
        refuses(replace(joint, stages=joint.stages[:-1]), "invariant 2")
        refuses(replace(joint, stages=(*joint.stages, joint.stages[0])), "computed before")

    def test_a_run_without_an_output(self, joint):
        broken = with_run(joint, 0, lambda m: set_outputs(m, [item for item in outputs(m) if item[0].name != "1"]))
        refuses(broken, "invariant 2", "perturbed_0", "it gives the outputs ['0']")

    @pytest.mark.parametrize(
        ("role", "target", "message"),
        [
            (Role.RUNTIME, "sigmas", "the runtime value 'sigmas' crosses"),
            (Role.INPUT, 0, "an input crosses"),
            (Role.VALUE, "linear", "neither a capture nor a constant"),
        ],
    )
    def test_what_may_not_cross(self, layerwise, role, target, message):
        def add(module):
            with module.graph.inserting_before(placeholders(module)[0]):
                node = module.graph.placeholder("crossing")
            node.meta.update(role=role, target=target)

        refuses(with_gradient(layerwise, 0, add), "invariant 3", "gradient_0", "%crossing", message)

    def test_stored_noise(self, joint):
        gradient = joint.gradients[0]
        noisy = next(node for node in perturbations(joint.graph) if node.args[4] == 0)
        captures = (replace(gradient.captures[0], source=noisy.name), *gradient.captures[1:])
        broken = (replace(gradient, captures=captures), *joint.gradients[1:])
        refuses(replace(joint, gradients=broken), "invariant 3", "the site's own noise", noisy.name)

    def test_noise_of_another_site_in_the_gradient(self, joint):
        def other_site(module):
            node = next(n for n in module.graph.nodes if n.target in (ops.weighted_noise, ops.weighted_noise_sum))
            _set_argument(node, 3, 1)

        refuses(with_gradient(joint, 0, other_site), "invariant 3", "gradient_0", "its cotangent")

    def test_noise_in_the_clean_run(self, joint):
        refuses(replace(joint, stages=tuple(_noisy_stage(stage) for stage in joint.stages)), "invariant 4", "clean_")

    def test_noise_of_another_group(self, layerwise):
        runs = tuple(replace(run, module=layerwise.runs[-1].module) for run in layerwise.runs)
        refuses(replace(layerwise, runs=runs), "invariant 4", "perturbed_0")


def _set_argument(node, position, value):
    node.args = (*node.args[:position], value, *node.args[position + 1 :])


def _site_node(module):
    return next(node for node in module.graph.nodes if "site" in node.meta)


def _change_site(module, **changes):
    node = _site_node(module)
    node.meta["site"] = replace(node.meta["site"], **changes)


def _change_layout(module, **changes):
    node = _site_node(module)
    node.meta["site"] = replace(node.meta["site"], layout=replace(node.meta["site"].layout, **changes))


def _bypass(module):
    noise = perturbations(module)[0]
    user = next(iter(noise.users))
    (point, *_) = noise.all_input_nodes
    user.replace_input_with(noise, point)


def _chained(dag, back=False):
    dag.add_edge("gradient_0", "gradient_1", key="gradient:x")
    if back:
        dag.add_edge("gradient_1", "gradient_0", key="gradient:y")
    return dag


def _noisy_stage(stage):
    def add(module):
        values = [node for node in module.graph.nodes if node.target == _aten.linear.default]
        for z in values[:1]:
            key, sigmas, copies = (_runtime(module, name) for name in ("key", "sigmas", "copies"))
            with module.graph.inserting_after(z):
                arguments = (z, copies, key, sigmas, 0, "gaussian", [1, 4], 0, 1, True)
                noisy = module.graph.call_function(ops.perturb, arguments)
            noisy.meta["noise_of"] = 0
            z.replace_all_uses_with(noisy, delete_user_cb=lambda user, new=noisy: user is not new)

    return edited(stage, add)


def _runtime(module, name):
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        node = module.graph.placeholder(f"the_{name}")
    node.meta.update(role=Role.RUNTIME, target=name)
    return node
