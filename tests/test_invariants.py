"""The invariants of DESIGN.md on random models: `compiler.verify` proves 1-3, values show 4-6.

Everything runs in double precision, so that a tolerance of 1e-9 tells a wrong number from rounding; where two sides
compute the same thing in the same order, they have to be equal bit for bit.
"""

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from random_models import Recipe, build, call, loss, recipes
from torch import fx, nn
from torch.utils import _pytree as pytree

import onward
from onward.compiler.driver import compile_model
from onward.compiler.program import binding_key, output_keys
from onward.compiler.verify import verify_history
from onward.passes import ops
from onward.passes.graph import outputs, placeholders
from onward.runtime.program import Program


def examples(count):
    """`count` random models; each takes half a second to compile: too slow to shrink a failure for minutes."""
    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    return settings(max_examples=count, phases=phases, suppress_health_check=[HealthCheck.too_slow])


SIGMA = 0.125
"""A power of two: the same number in single precision, in which the operators take it."""
GROUPS = st.sampled_from(["joint", "layerwise"])
NOISES = st.sampled_from(["gaussian", "laplace", "rademacher"])
CHOICES = st.sampled_from(
    [{"groups": groups, **rest} for groups in ("joint", "layerwise") for rest in (
        {}, {"capture": "sign"}, {"capture": "stochastic"}, {"placement": "alive"}
    )]
)  # fmt: skip
"""What decides the shape of a program's graphs."""

EVERYTHING = (
    Recipe("tuple", (("weight_norm", 1, 0), ("linear", 0, 0), ("transposed", 3, 0), ("tied", 4, 0), ("add", 5, 2)), 2),
    Recipe(
        "dict", (("conv", 0, 0), ("group_norm", 2, 0), ("sign", 3, 0), ("concatenate", 4, 1), ("position", 5, 0)), 1
    ),
    Recipe("tensor", (("batch_norm", 0, 0), ("relu", 1, 0), ("attention", 2, 0), ("dropout", 3, 0)), 1, training=True),
    Recipe("tensor", (("rows_in_batch", 0, 0), ("linear", 1, 0), ("linear", 2, 0), ("layer_norm", 3, 0)), 1),
)

SITE_BEHIND_SITE = Recipe("tensor", (("linear", 0, 0), ("rows", 1, 0), ("layer_norm", 2, 0), ("position", 3, 0)))
"""The activation that reaches a site is another's noise point."""


def compiled_program(recipe, **settings_):
    model, inputs, target = build(recipe)
    estimator = onward.LikelihoodRatio(**{"copies": 4, "sigma": SIGMA, **settings_})
    return onward.compile(model, inputs, loss=loss, estimator=estimator, seed=5), inputs, target


def environment_of(program, inputs, sigma):
    """Everything a graph may read, with every σ = `sigma`."""
    environment = {f"parameter:{name}": value.detach() for name, value in program.model.named_parameters()}
    environment |= {f"buffer:{name}": value for name, value in program.model.named_buffers()}
    environment |= {f"constant:{name}": value for name, value in program.compiled.captured.constants.items()}
    environment |= {f"input:{index}": leaf for index, leaf in enumerate(pytree.tree_leaves(inputs))}
    environment["runtime:key"] = torch.tensor([program.seed, program.step_count])
    environment["runtime:sigmas"] = torch.full((len(program.compiled.sites),), sigma)
    environment["runtime:copies"] = torch.zeros(1, dtype=torch.int64)
    return environment


@torch.no_grad()
def run_graph(module, environment):
    results = module(*[environment[binding_key(node)] for node in placeholders(module)])
    return dict(zip(output_keys(module), results, strict=True))


def model_outputs(results):
    return [value for key, value in results.items() if key.startswith("output:")]


def run_clean(program, environment):
    environment = dict(environment)
    for stage in program.compiled.stages:
        environment |= run_graph(stage, environment)
    return environment


def gradients(program):
    return {name: parameter.grad for name, parameter in program.model.named_parameters() if parameter.grad is not None}


def assert_bitwise(first, second):
    for a, b in _pairs(first, second):
        assert torch.equal(a, b), (a - b).abs().max()


def assert_close(first, second, scale=1.0):
    for a, b in _pairs(first, second):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * scale)


def _pairs(first, second):
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        return [(first[name], second[name]) for name in first]
    return list(zip(first, second, strict=True))


class TestForward:
    """Invariants 1-3 by the verifier, after every pass and for the whole; 4 by value."""

    @examples(6)
    @example(EVERYTHING[0], {"groups": "joint"}, "gaussian")
    @example(EVERYTHING[1], {"capture": "stochastic"}, "rademacher")
    @example(EVERYTHING[2], {"groups": "joint", "placement": "alive"}, "rademacher")
    @example(EVERYTHING[3], {"groups": "joint", "capture": "sign"}, "laplace")
    @given(recipes(), CHOICES, NOISES)
    def test_without_noise_every_graph_computes_the_models_own_forward(self, recipe, choice, noise):
        program, inputs, _ = compiled_program(recipe, **choice, noise=noise)
        compiled = program.compiled
        verify_history(compiled)
        silent = environment_of(program, inputs, 0.0)
        noisy = environment_of(program, inputs, 0.1)
        clean = run_clean(program, silent)

        if not (recipe.training and "dropout" in recipe.has):
            with torch.no_grad():
                eager = pytree.tree_leaves(call(copy.deepcopy(program.model), inputs))
            assert_bitwise(model_outputs(run_graph(compiled.captured.module, silent)), eager)
            assert_bitwise(model_outputs(clean), eager)

        keyed = [record for record in compiled.history if record.name == "key_random_operations"]
        expected = run_graph(keyed[0].module, silent)
        for record in compiled.history[1:]:
            results = run_graph(record.module, silent)
            assert_bitwise({key: results[key] for key in expected}, expected)
        assert_bitwise(
            {key: run_clean(program, noisy)[key] for key in expected}, expected
        )  # σ does not touch the clean run

        normalizes = recipe.training and "batch_norm" in recipe.has  # x̂ from given statistics rounds differently
        for run in compiled.runs:
            one = {**clean, "runtime:copies": torch.tensor([1])}
            (assert_close if normalizes else assert_bitwise)(
                model_outputs(run_graph(run.module, one)), model_outputs(clean)
            )
            three = {**clean, "runtime:copies": torch.tensor([0, 1, ~1])}
            tiled = [output.repeat(3, *[1] * (output.dim() - 1)) for output in model_outputs(clean)]
            assert_close(model_outputs(run_graph(run.module, three)), tiled)

    def test_the_noise_of_a_group_moves_the_output_and_its_twin_moves_it_back(self):
        program, inputs, _ = compiled_program(Recipe("tensor", (("linear", 0, 0),)), groups="joint")
        clean = run_clean(program, environment_of(program, inputs, 0.1))
        (run,) = program.compiled.runs
        copies = {**clean, "runtime:copies": torch.tensor([0, ~0, 1])}
        (output,) = model_outputs(run_graph(run.module, copies))
        plus, minus, other = output.chunk(3)
        (base,) = model_outputs(clean)
        assert not torch.equal(plus, base)
        assert not torch.equal(plus, other)
        torch.testing.assert_close((plus + minus) / 2, base)  # the model is linear

    def test_a_graph_with_no_pass_computes_what_eager_does_in_float32_too(self):
        model = onward.models.resnet5(num_classes=10, in_channels=1)
        images = torch.randn(4, 1, 8, 8)
        program = onward.compile(model, (images,), loss=F.cross_entropy, estimator=onward.LikelihoodRatio(copies=2))
        silent = environment_of(program, (images,), 0.0)
        with torch.no_grad():
            expected = copy.deepcopy(model)(images)
        for module in (program.compiled.captured.module, program.compiled.graph):
            assert_bitwise(model_outputs(run_graph(module, silent)), [expected])


class TestReach:
    """Invariant 1: a trainable parameter that no site reaches is an error that names it."""

    @examples(5)
    @given(recipes(without=("attention",)), st.sampled_from(["unread", "unused result", "behind a detach", "no input"]))
    def test_a_parameter_without_a_site_is_named(self, recipe, how):
        model, inputs, _ = build(recipe)
        model.orphan = nn.Parameter(torch.ones(3, dtype=torch.float64))
        forward = model.forward

        def with_orphan(x, other=None):
            output = forward(x, other)
            if how == "unread":
                return output
            if how == "unused result":
                _ = x.flatten(1)[:, :3] * model.orphan
                return output
            if how == "no input":
                model.orphan.exp().sum()
                return output
            return pytree.tree_map(lambda leaf: leaf + model.orphan.sign(), output)

        model.forward = with_orphan
        with pytest.raises(onward.errors.UnreachedParameterError, match="'orphan'"):
            compile_model(model, inputs, onward.LikelihoodRatio(copies=2))


class TestStep:
    """Invariants 5 and 6, and relations between steps."""

    @examples(6)
    @example(EVERYTHING[2], {"groups": "joint"}, "gaussian", True)
    @given(recipes(), CHOICES, NOISES, st.booleans())
    def test_a_step_is_a_function_of_parameters_batch_seed_and_step(self, recipe, choice, noise, antithetic):
        program, inputs, target = compiled_program(recipe, **choice, noise=noise, antithetic=antithetic)
        fresh = copy.deepcopy(program.model.state_dict())
        with no_autograd_graph():
            program.step(inputs, target)
        first = {name: gradient.clone() for name, gradient in gradients(program).items()}
        trainable = {name for name, parameter in program.model.named_parameters() if parameter.requires_grad}
        assert set(first) == trainable
        assert all(gradient.grad_fn is None and not gradient.requires_grad for gradient in first.values())
        buffers = {name: buffer.clone() for name, buffer in program.model.named_buffers()}

        def again(*, estimator=None, seed=5, step=0, threads=1):
            """The gradients of a new program around the same model, everything else put back."""
            program.model.load_state_dict(fresh)
            program.model.zero_grad()
            compiled = replace(program.compiled, estimator=estimator or program.compiled.estimator)
            other = Program(program.model, compiled, loss, seed)
            other.step_count = step
            with intra_op_threads(threads):
                other.step(inputs, target)
            return gradients(other)

        torch.manual_seed(1234)
        assert_bitwise(again(), first)
        assert_close(again(threads=2), first, scale_of(first))  # torch's own mm rounds by its number of threads
        assert_bitwise(dict(program.model.named_buffers()), buffers)
        for chunk in (2, 3) if not antithetic else (2,):
            assert_close(again(estimator=replace(program.compiled.estimator, chunk=chunk)), first, scale_of(first))
        if "sign" not in recipe.has | {"argmax", "step"} and any(gradient.any() for gradient in first.values()):
            assert any(not torch.equal(a, first[name]) for name, a in again(seed=6).items())
            assert any(not torch.equal(a, first[name]) for name, a in again(step=1).items())

    @examples(3)
    @given(recipes(), NOISES)
    def test_compiling_again_in_another_order_of_groups_changes_nothing(self, recipe, noise):
        program, inputs, target = compiled_program(recipe, noise=noise)
        program.step(inputs, target)
        names = [site.name for site in program.compiled.sites]
        partition = [[name.replace("[", "[[]")] for name in reversed(names)]
        other, inputs, target = compiled_program(recipe, noise=noise, groups=partition)
        other.step(inputs, target)
        readers = [name for site in program.compiled.sites for name in site.parameters]
        twice = {name for name in readers if readers.count(name) > 2}  # three terms round by their order
        for name, gradient in gradients(program).items():
            (assert_close if name in twice else assert_bitwise)(gradients(other)[name], gradient)

    @examples(3)
    @given(recipes(), GROUPS)
    def test_a_scaled_loss_scales_the_gradients_bit_for_bit(self, recipe, groups):
        program, inputs, target = compiled_program(recipe, groups=groups)
        fresh = copy.deepcopy(program.model.state_dict())
        program.step(inputs, target)
        first = {name: gradient.clone() for name, gradient in gradients(program).items()}
        program.model.load_state_dict(fresh)
        program.model.zero_grad()
        scaled = Program(program.model, program.compiled, lambda o, t: 8 * loss(o, t), seed=5)
        scaled.step(inputs, target)
        assert_bitwise(gradients(scaled), {name: 8 * gradient for name, gradient in first.items()})

    @examples(4)
    @given(recipes(without=("batch_norm", "transpose"), training=False), GROUPS, NOISES)
    def test_samples_whose_loss_is_constant_drop_out(self, recipe, groups, noise):
        """The noise of a sample does not depend on the samples behind it, nor on the batch size."""
        program, inputs, target = compiled_program(recipe, groups=groups, noise=noise)
        program.loss.loss = lambda o, t: torch.where(t.isnan().any(1), 1.0, loss(o, t.nan_to_num()))
        hidden = target.clone()
        hidden[2] = torch.nan
        program.step(inputs, hidden)
        three = {name: gradient.clone() for name, gradient in gradients(program).items()}
        program.model.zero_grad()
        program.step_count = 0
        program.step(pytree.tree_map(lambda leaf: leaf[:2], inputs), target[:2])
        assert_close(gradients(program), {name: gradient * 1.5 for name, gradient in three.items()}, scale_of(three))

    @pytest.mark.parametrize("groups", ["joint", "layerwise"])
    def test_an_inert_extra_layer_changes_nothing(self, groups):
        class Inert(nn.Module):
            def __init__(self):
                super().__init__()
                self.one = nn.Parameter(torch.tensor(1.0, dtype=torch.float64), requires_grad=False)

            def forward(self, x):
                return x * self.one

        def train(*between):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), *between, nn.Linear(4, 3)).double()
            inputs, target = torch.randn(6, 5).double(), torch.randn(6, 3).double()
            estimator = onward.LikelihoodRatio(copies=4, groups=groups)
            program = onward.compile(model, inputs, loss=loss, estimator=estimator)
            program.step(inputs, target)
            return list(gradients(program).values())

        assert_bitwise(train(Inert()), train())

    def test_compiling_twice_gives_the_same_graphs(self):
        first, second = (compiled_program(EVERYTHING[0], groups="joint")[0].compiled for _ in range(2))
        assert first.sites == second.sites
        for a, b in zip(
            (*first.stages, *(x.module for x in (*first.runs, *first.gradients))),
            (*second.stages, *(x.module for x in (*second.runs, *second.gradients))),
            strict=True,
        ):
            assert a.code == b.code

    def test_operations_without_derivative_and_a_black_box_loss_have_gradients(self):
        recipe = Recipe("tensor", (("linear", 0, 0), ("sign", 1, 0), ("linear", 2, 0), ("step", 3, 0)))
        program, inputs, _ = compiled_program(recipe, copies=64, sigma=1.0)
        program.loss.loss = lambda output, target: (output.numpy().argmax(1) != target.numpy()).astype("float32")
        with no_autograd_graph():
            program.step(inputs, torch.tensor([0, 1, 2]))
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(program).values())


class TestEstimate:
    """A step's gradients are the estimator's definition, DESIGN (1), computed copy by copy with autograd."""

    @examples(4)
    @example(EVERYTHING[0], "joint", "gaussian", True)
    @example(SITE_BEHIND_SITE, "joint", "gaussian", False)
    @example(EVERYTHING[3], "layerwise", "laplace", False)
    @given(recipes(without=("batch_norm",)), GROUPS, NOISES, st.booleans())
    def test_a_step_is_its_definition(self, recipe, groups, noise, antithetic):
        program, inputs, target = compiled_program(recipe, groups=groups, noise=noise, antithetic=antithetic)
        expected = defined_gradients(program, inputs, target)
        program.step(inputs, target)
        assert_close(gradients(program), expected, scale_of(expected))


class _Detached(fx.Interpreter):
    """The one-copy graph with autograd inside each site alone: behind the noise nothing has a gradient."""

    def __init__(self, module):
        super().__init__(module)
        self.results = {}

    def run_node(self, n):
        self.results[n.name] = super().run_node(n)
        return self.results[n.name].detach() if "noise_of" in n.meta else self.results[n.name]


def defined_gradients(program, inputs, target):
    """Equation (1), written down as it stands: the mean over copies of each site's local vjp of (ℓ − b) s(ε) / σ."""
    compiled, estimator = program.compiled, program.compiled.estimator
    environment = environment_of(program, inputs, 0.0)
    clean = loss(
        pytree.tree_unflatten(model_outputs(run_clean(program, environment)), compiled.captured.out_spec), target
    )
    parameters = {site: program.model.get_parameter(site) for each in compiled.sites for site in each.parameters}
    environment |= {f"parameter:{name}": parameter for name, parameter in parameters.items()}
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    draws = range(estimator.draws(estimator.copies))
    for run in compiled.runs:
        environment["runtime:sigmas"] = torch.tensor([SIGMA * (site.index in run.sites) for site in compiled.sites])
        for copy_id in [*draws, *(~d for d in draws)] if estimator.antithetic else draws:
            environment["runtime:copies"] = ids = torch.tensor([copy_id])
            interpreter = _Detached(compiled.graph)
            interpreter.run(*[environment[binding_key(node)] for node in placeholders(compiled.graph)])
            results = [
                interpreter.results[node.name] for output, node in outputs(compiled.graph) if output.kind == "output"
            ]
            losses = loss(pytree.tree_unflatten(results, compiled.captured.out_spec), target).detach()
            weights = (losses - clean)[None] / (SIGMA * estimator.copies * len(target))
            for index in run.sites:
                site = compiled.sites[index]
                settings_ = (index, estimator.noise, estimator.score, list(site.layout.sizes))
                cotangent = ops.weighted_noise(
                    weights, ids, environment["runtime:key"], *settings_, site.layout.dim, site.layout.outer
                )
                leaves = [parameters[name] for name in site.parameters]
                z = interpreter.results[site.output]
                for name, gradient in zip(
                    site.parameters, torch.autograd.grad(z, leaves, cotangent, True), strict=True
                ):
                    total[name] += gradient
    return total


def scale_of(values):
    return 1.0 + max((float(value.abs().max()) for value in values.values()), default=0.0)


@contextlib.contextmanager
def intra_op_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def no_autograd_graph():
    """Fail if anything is saved for a backward pass, or one is run."""

    def refuse(*_):
        raise AssertionError("an autograd graph was built")

    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "backward", refuse)
        patch.setattr(torch.autograd, "grad", refuse)
        patch.setattr(torch.Tensor, "backward", refuse)
        yield


def test_the_guard_sees_an_autograd_graph():
    weight = torch.ones(2, requires_grad=True)
    with no_autograd_graph(), pytest.raises(AssertionError, match="autograd graph"):
        (weight * weight).sum()
