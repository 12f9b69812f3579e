"""Each pass on its own: what its docstring says it rewrites, and what it declines."""

import operator

import pytest
import torch
import torch.nn.functional as F
from random_models import Recipe, build
from torch import nn

import onward
from onward.compiler.capture import capture
from onward.compiler.driver import compile_model
from onward.passes import infer_sign_domains as domains
from onward.passes import key_random_operations as randomness
from onward.passes import ops, rules
from onward.passes.errors import UnreachedParameterError, UnsupportedModelError
from onward.passes.find_sites import find_sites, sites
from onward.passes.graph import Kind, Layout, Output, Role, outputs, placeholders
from onward.passes.infer_sign_domains import infer_sign_domains
from onward.passes.insert_captures import captures_of, insert_captures
from onward.passes.insert_noise import insert_noise
from onward.passes.key_random_operations import key_random_operations
from onward.passes.locate_samples import batch_symbol, locate_samples, multiple_of_batch
from onward.passes.share_prefixes import clean_run, perturbed_nodes, perturbed_run
from onward.passes.split_stages import split_stages
from onward.passes.trace_gradients import trace_gradients

_aten = torch.ops.aten


class Unary(nn.Module):
    """``function(self, x)`` with the given members."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x):
        return self.function(self, x)


class Binary(Unary):
    """``function(self, x, y)`` with the given members."""

    def forward(self, x, y):  # type: ignore[override]
        return self.function(self, x, y)


def captured(function, *inputs, **members):
    model = (Binary if len(inputs) == 2 else Unary)(function, **members)
    return capture(model, inputs or (torch.randn(4, 6),)).module


def located(function, *inputs, **members):
    return locate_samples(key_random_operations(captured(function, *inputs, **members)))


def noisy(function, *inputs, noise="gaussian", **members):
    return insert_noise(find_sites(located(function, *inputs, **members)), noise=noise)


def targets(module):
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def node_of(module, target):
    return next(node for node in module.graph.nodes if node.target == target)


def linear(*shape):
    return nn.Linear(*(shape or (6, 5)))


def snapshot(module):
    """Everything of a graph that a pass might change."""
    return module.code, [
        (node.name, node.op, str(node.target), str(node.args), str(node.kwargs), sorted(node.meta), _facts(node))
        for node in module.graph.nodes
    ]


def _facts(node):
    return [repr(node.meta.get(name)) for name in ("role", "target", "kind", "layout", "site", "captures", "outputs")]


class TestEveryPass:
    @pytest.mark.parametrize(
        "recipe",
        [
            Recipe("tuple", (("batch_norm", 0, 0), ("relu", 2, 0), ("add", 3, 1), ("dropout", 4, 0)), 2, training=True),
            Recipe(
                "dict", (("weight_norm", 0, 0), ("transposed", 2, 0), ("layer_norm", 3, 0), ("rows_in_batch", 4, 0))
            ),
        ],
    )
    @pytest.mark.parametrize("capture_", ["exact", "stochastic"])
    def test_passes_are_pure_and_repeatable(self, recipe, capture_):
        model, inputs, _ = build(recipe)
        estimator = onward.LikelihoodRatio(copies=2, groups="joint", capture=capture_)
        compiled = compile_model(model, inputs, estimator)
        history = {record.name: record.module for record in compiled.history}
        vjps = trace_gradients(history["find_sites"], capture=capture_)
        groups = [run.sites for run in compiled.runs]
        passes = {
            "capture": key_random_operations,
            "key_random_operations": locate_samples,
            "locate_samples": lambda m: find_sites(m, join_statistics=capture_ == "exact"),
            "find_sites": lambda m: insert_noise(m, noise="rademacher"),
            "insert_noise": infer_sign_domains,
            "infer_sign_domains": lambda m: insert_captures(m, gradients=vjps, capture=capture_),
            "insert_captures": lambda m: perturbed_run(m, groups[0]),
        }
        for name, rewrite in passes.items():
            before = snapshot(history[name])
            first, second = rewrite(history[name]), rewrite(history[name])
            assert snapshot(history[name]) == before, name
            assert snapshot(first) == snapshot(second), name
            assert first is not history[name]
            assert not set(first.graph.nodes) & set(history[name].graph.nodes)
        before = snapshot(history["insert_captures"])
        clean_run(history["insert_captures"], [], [])
        split_stages(history["insert_captures"], [site.output for site in compiled.sites])
        assert snapshot(history["insert_captures"]) == before
        before = snapshot(history["find_sites"])
        trace_gradients(history["find_sites"], capture=capture_)
        assert snapshot(history["find_sites"]) == before

    @pytest.mark.parametrize("rewrite", [key_random_operations, locate_samples, infer_sign_domains, find_sites])
    def test_twice_is_once(self, rewrite):
        module = located(lambda self, x: self.drop(self.linear(x)).relu(), linear=linear(), drop=nn.Dropout(0.5))
        once = rewrite(module)
        assert snapshot(rewrite(once)) == snapshot(once)

    def test_passes_that_only_annotate_commute(self):
        module = located(lambda self, x: self.linear(x).relu(), linear=linear())
        assert snapshot(infer_sign_domains(find_sites(module))) == snapshot(find_sites(infer_sign_domains(module)))


class TestKeyRandomOperations:
    @pytest.mark.parametrize(
        "function",
        [
            lambda self, x: F.dropout(x, 0.3, True),
            lambda self, x: x + torch.rand(6),
            lambda self, x: x + torch.rand_like(x),
            lambda self, x: x + torch.randn(6),
            lambda self, x: x + torch.randn_like(x),
            lambda self, x: x * torch.bernoulli(x.sigmoid()),
            lambda self, x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], dropout_p=0.5),
        ],
    )
    def test_random_operations_get_the_steps_key(self, function):
        module = key_random_operations(captured(function))
        assert ops.keyed_random in targets(module)
        assert not any(randomness.is_random(node) for node in module.graph.nodes)
        assert [node.meta["target"] for node in placeholders(module, Role.RUNTIME)] == ["key"]
        assert all("val" in node.meta for node in module.graph.nodes if node.op == "call_function")

    def test_every_operation_has_its_own_numbers(self):
        module = key_random_operations(captured(lambda self, x: F.dropout(F.dropout(x, 0.3, True), 0.3, True)))
        drawn = [node.args[1] for node in module.graph.nodes if node.target == ops.keyed_random]
        assert drawn == [0, 1]

    @pytest.mark.parametrize("p", [0.25, 1.0])
    def test_dropout_keeps_the_expectation(self, p):
        module = key_random_operations(captured(lambda self, x: F.dropout(x, p, True)))
        (result,) = module(torch.ones(200, 6), torch.tensor([0, 0]))
        kept = result[result != 0]
        assert len(kept) / result.numel() == pytest.approx(1 - p, abs=0.06)  # 4 standard deviations of 1,200 coins
        assert torch.equal(kept, torch.full_like(kept, 1 / (1 - p) if p < 1 else 0.0))

    @pytest.mark.parametrize(
        "function",
        [
            lambda self, x: F.dropout(x, 0.3, False).relu(),
            lambda self, x: F.dropout(x, 0.0, True).relu(),
            lambda self, x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
        ],
    )
    def test_what_draws_nothing_needs_no_key(self, function):
        module = key_random_operations(captured(function))
        assert ops.keyed_random not in targets(module)
        assert not placeholders(module, Role.RUNTIME)
        assert _aten.dropout.default not in targets(module)

    def test_it_declines_what_it_cannot_repeat(self):
        with pytest.raises(UnsupportedModelError, match="draws random numbers"):
            key_random_operations(captured(lambda self, x: torch.multinomial(x.softmax(1), 2).float()))


class TestLocateSamples:
    def layout(self, function, *inputs):
        return outputs(located(function, *inputs))[0][1].meta.get("layout")

    @pytest.mark.parametrize(
        ("function", "layout"),
        [
            (lambda self, x: x.relu(), Layout((1, 6), 0)),
            (lambda self, x: x.t().relu(), Layout((6, 1), 1)),
            (lambda self, x: x.reshape(-1, 3).relu(), Layout((2, 3), 0)),
            (lambda self, x: x.reshape(-1).relu(), Layout((6,), 0)),
            (lambda self, x: x.sum().relu(), Layout((), -1)),
            (lambda self, x: x[:, None, :, None].relu(), Layout((1, 1, 6, 1), 0)),
        ],
    )
    def test_the_dimension_and_rows_of_the_samples(self, function, layout):
        assert self.layout(function) == layout

    @pytest.mark.parametrize("function", [lambda self, x: x @ x.t(), lambda self, x: torch.cat([x, x[:1]]).relu()])
    def test_it_declines_what_does_not_tell_its_samples_apart(self, function):
        assert self.layout(function) is None

    def test_sizes_are_read_from_an_input(self):
        module = located(lambda self, x: self.linear(x).reshape(-1, 5).view(2 * x.shape[0], -1), linear=linear(6, 10))
        inputs = set(placeholders(module, Role.INPUT))
        for node in module.graph.nodes:
            if node.target == _aten.sym_size.int:
                assert node.args[0] in inputs

    def test_multiples_of_the_batch(self):
        batch = batch_symbol(located(lambda self, x: x.relu()))
        size = placeholders(located(lambda self, x: x.relu()))[0].meta["val"].shape[0]
        assert [multiple_of_batch(extent, batch) for extent in (7, size, 3 * size, size * size, size + 1)] == [
            0, 1, 3, None, None,
        ]  # fmt: skip

    def test_the_probe_corrects_the_order_of_flattened_rows(self):
        model = Unary(
            lambda self, x: self.linear(x.transpose(0, 1).reshape(-1, 2)).view(3, -1, 2).sum(0), linear=linear(2, 2)
        )
        compiled = compile_model(model, (torch.randn(4, 3, 2),), onward.LikelihoodRatio(copies=2))
        assert compiled.sites[0].layout == Layout((3, 2), 0, outer=3)


class TestFindSites:
    def found(self, function, *inputs, **members):
        return sites(find_sites(located(function, *inputs, **members)))

    def test_an_operation_of_parameters_and_activations_is_a_site(self):
        a, b = self.found(lambda self, x: self.second(self.first(x).relu()), first=linear(), second=linear(5, 2))
        assert (a.name, a.operation, a.parameters) == ("first", "aten.linear", ("first.weight", "first.bias"))
        assert (b.index, b.name, b.layout) == (1, "second", Layout((1, 2), 0))
        assert "test_passes.py" in a.line or "linear.py" in a.line

    def test_an_expression_of_parameters_belongs_to_the_region(self):
        (site,) = self.found(
            lambda self, x: F.linear(x, self.w.exp() / self.w.norm()), w=nn.Parameter(torch.rand(5, 6))
        )
        assert site.parameters == ("w",)
        assert len(site.region) == 5  # the placeholder, exp, norm, division and the linear layer
        assert len(site.operands) == 1

    def test_a_parameter_at_two_sites_and_a_layer_called_twice(self):
        shared = linear(6, 6)
        first, second, tied = self.found(lambda self, x: F.linear(self.s(self.s(x)), self.s.weight.t()), s=shared)
        assert [first.name, second.name] == ["s", "s@2"]
        assert tied.parameters == ("s.weight",)

    def test_frozen_parameters_make_no_site(self):
        frozen = linear().requires_grad_(False)
        (site,) = self.found(lambda self, x: self.second(self.first(x)), first=frozen, second=linear(5, 2))
        assert site.name == "second"

    @pytest.mark.parametrize("join", [True, False])
    def test_batch_statistics_join_the_site_that_feeds_them(self, join):
        module = located(lambda self, x: self.norm(self.linear(x)), linear=linear(), norm=nn.BatchNorm1d(5))
        found = sites(find_sites(module, join_statistics=join))
        assert [site.parameters[-1] for site in found] == (["norm.bias"] if join else ["linear.bias", "norm.bias"])
        assert found[0].joined == join

    def test_they_do_not_join_where_something_else_reads_it(self):
        module = located(lambda self, x: self.norm(z := self.linear(x)) + z, linear=linear(), norm=nn.BatchNorm1d(5))
        assert len(sites(find_sites(module))) == 2

    def test_it_declines_an_unreached_parameter(self):
        with pytest.raises(UnreachedParameterError, match=r"'unused'.*never read"):
            self.found(lambda self, x: self.linear(x), linear=linear(), unused=nn.Parameter(torch.ones(2)))

    def test_it_declines_a_site_without_influence(self):
        def only_a_buffer(self, x):
            self.seen.copy_(self.dead(x).mean(0).detach())
            return self.linear(x)

        with pytest.raises(UnreachedParameterError, match=r"'dead\.weight'.*never reaches"):
            self.found(only_a_buffer, linear=linear(), dead=linear(), seen=nn.Buffer(torch.zeros(5)))

    def test_it_declines_a_result_that_is_not_floating(self):
        with pytest.raises(UnsupportedModelError, match="not a floating-point tensor"):
            self.found(lambda self, x: (x > self.threshold).float(), threshold=nn.Parameter(torch.ones(6)))

    def test_it_declines_a_result_whose_samples_cannot_be_told_apart(self):
        with pytest.raises(UnsupportedModelError, match="which element belongs"):
            self.found(lambda self, x: (x @ x.t()) * self.scale, scale=nn.Parameter(torch.ones(1)))


class TestTraceGradients:
    def vjp(self, function, *inputs, capture_="exact", **members):
        return trace_gradients(find_sites(located(function, *inputs, **members)), capture=capture_)[0]

    def test_a_linear_layer_leaves_the_weight_gradient_alone(self):
        vjp = self.vjp(lambda self, x: self.linear(x), linear=linear())
        assert targets(vjp).count(_aten.mm.default) == 1
        assert [output for output, _ in outputs(vjp)] == [Output("gradient", f"linear.{n}") for n in ("weight", "bias")]
        assert [node.meta["target"] for node in placeholders(vjp, Role.RUNTIME)] == ["cotangent"]
        assert not placeholders(vjp, Role.PARAMETER)  # the gradient of a linear layer does not read its weight

    def test_what_the_gradient_does_not_read_is_not_captured(self):
        vjp = self.vjp(lambda self, x: x + self.bias, bias=nn.Parameter(torch.ones(6)))
        assert [node.meta["target"] for node in placeholders(vjp)] == ["cotangent"]

    def test_it_equals_autograd_whatever_the_batch(self):
        layer = nn.Conv1d(2, 3, 2)
        vjp = self.vjp(lambda self, x: self.conv(x).relu(), torch.randn(4, 2, 5), conv=layer)
        for samples in (1, 4, 7):
            x, cotangent = torch.randn(samples, 2, 5), torch.randn(samples, 3, 4)
            expected = torch.autograd.grad(layer(x), list(layer.parameters()), cotangent)
            given = {"cotangent": cotangent} | {f"conv.{name}": p.detach() for name, p in layer.named_parameters()}
            results = vjp(*[given.get(node.meta["target"], x) for node in placeholders(vjp)])
            for a, b in zip(results, expected, strict=True):
                torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("capture_", ["exact", "stochastic"])
    def test_a_norm_layer_reads_the_normalised_activation_where_signs_are_asked_for(self, capture_):
        norm = nn.LayerNorm(6)
        vjp = self.vjp(lambda self, x: self.norm(x), norm=norm, capture_=capture_)
        assert (_aten.native_layer_norm_backward.default in targets(vjp)) == (capture_ == "exact")

    def test_it_declines_a_parameter_behind_an_operation_without_derivative(self):
        with pytest.raises(UnreachedParameterError, match="'w' has no local derivative"):
            self.vjp(lambda self, x: F.linear(x, self.w.sign()), w=nn.Parameter(torch.randn(5, 6)))


class TestInsertNoise:
    def test_every_reader_but_the_noise_reads_the_noise(self):
        module = noisy(lambda self, x: (z := self.linear(x)).relu() + z, linear=linear())
        (perturbed,) = [node for node in module.graph.nodes if node.target == ops.perturb]
        point = perturbed.args[0]
        assert set(point.users) == {perturbed}
        assert len(perturbed.users) == 2
        assert perturbed.args[4:] == (0, "gaussian", [1, 5], 0, 1, True)
        assert (perturbed.meta["noise_of"], perturbed.meta["layout"]) == (0, Layout((1, 5), 0))

    def test_it_holds_no_state_and_no_constant(self):
        module = noisy(lambda self, x: self.linear(x), linear=linear())
        assert [node.meta["target"] for node in placeholders(module, Role.RUNTIME)] == ["copies", "key", "sigmas"]
        assert not [node for node in module.graph.nodes if node.op == "get_attr"]

    def test_a_site_that_is_the_output_is_perturbed_too(self):
        module = noisy(lambda self, x: self.linear(x), linear=linear())
        assert outputs(module)[0][1].target == ops.perturb


class TestInferSignDomains:
    def domain(self, function, *inputs):
        module = infer_sign_domains(locate_samples(captured(function, *inputs)))
        return outputs(module)[0][1].meta["sign_domain"]

    @pytest.mark.parametrize(
        ("function", "domain"),
        [
            (lambda self, x: x + 0, "signed"),
            (lambda self, x: x.relu(), "nonnegative"),
            (lambda self, x: x.sigmoid().flatten(1), "nonnegative"),
            (lambda self, x: x.softmax(1) * x.relu(), "nonnegative"),
            (lambda self, x: x.relu() + 1, "nonnegative"),
            (lambda self, x: x.relu() + -1, "signed"),
            (lambda self, x: x.relu() * -2.0, "signed"),
            (lambda self, x: torch.add(x.relu(), x.exp(), alpha=-1), "signed"),
            (lambda self, x: x.relu() - x.exp(), "signed"),
            (lambda self, x: torch.cat([x.relu(), x], 1), "signed"),
            (lambda self, x: torch.cat([x.relu(), x.exp()], 1), "nonnegative"),
            (lambda self, x: x.relu() * (x > 0), "nonnegative"),
            (lambda self, x: F.max_pool1d(x.relu()[:, None], 2), "nonnegative"),
            (lambda self, x: x.relu().tanh().neg(), "signed"),
        ],
    )
    def test_the_domain_of(self, function, domain):
        assert self.domain(function) == domain

    def test_an_integer_may_be_negative(self):
        assert self.domain(lambda self, x, y: x.relu() * y, torch.randn(4, 6), -torch.ones(4, 6).long()) == "signed"

    def test_a_claim_of_nonnegative_holds_for_values(self):
        """Every operation that establishes or keeps the domain, where one tensor is all it takes."""
        x = torch.randn(3, 4, 4)
        for target in domains.NONNEGATIVE:
            arguments = (
                (x, -1) if target == _aten.softmax.int else (x, -1, False)[: 1 + 2 * ("_softmax" in str(target))]
            )
            given = tuple(a.abs() if target == _aten.sqrt.default and a is x else a for a in arguments)
            assert (target(*given) >= 0).all(), target


class TestInsertCaptures:
    def captures(self, function, *inputs, capture_="exact", **members):
        module = find_sites(located(function, *inputs, **members), join_statistics=capture_ == "exact")
        vjps = trace_gradients(module, capture=capture_)
        module = insert_captures(
            infer_sign_domains(insert_noise(module, noise="gaussian")), gradients=vjps, capture=capture_
        )
        return module, captures_of(module)

    def two(self, self_, x):
        return self_.second(self_.first(x).relu())

    @pytest.mark.parametrize(("capture_", "bytes_"), [("exact", (24, 36)), ("sign", (2, 2)), ("stochastic", (24, 6))])
    def test_bytes_a_sample_by_encoding_and_domain(self, capture_, bytes_):
        module, captures = self.captures(self.two, capture_=capture_, first=linear(6, 9), second=linear(9, 2))
        (first,), (second,) = captures[0], captures[1]
        assert (first.encoding, second.encoding) == ("exact" if capture_ == "stochastic" else capture_, capture_)
        assert (first.domain, second.domain) == ("signed", "nonnegative")
        assert (first.exact_bytes, second.exact_bytes) == (24, 36)
        assert (first.bytes, second.bytes) == bytes_
        kept = {output.name for output, _ in outputs(module) if output.kind == "capture"}
        scales = {second.scale} if capture_ == "stochastic" else set()
        assert kept == {first.name, second.name} | scales

    def test_the_activation_that_reaches_a_site_includes_the_noise_of_the_site_before(self):
        module, captures = self.captures(
            lambda self, x: self.second(self.first(x)), first=linear(), second=linear(5, 2)
        )
        (second,) = captures[1]
        assert next(n for n in module.graph.nodes if n.name == second.source).meta["noise_of"] == 0

    def test_sites_that_read_the_same_activation_share_a_capture(self):
        module, captures = self.captures(
            lambda self, x: self.a(y := x.relu()) + self.b(y), capture_="stochastic", a=linear(), b=linear()
        )
        assert captures[0][0].name == captures[1][0].name
        assert targets(module).count(ops.pack_stochastic_signs) == 1

    @pytest.mark.parametrize(
        ("made", "given"),
        [
            (lambda x: x, True),
            (lambda x: x.flatten(1).unsqueeze(1).transpose(1, 2).squeeze(2), True),
            (lambda x: x.float(), True),
            (lambda x: x.double().float(), False),  # a copy, of another memory
            (lambda x: x * 1, False),
        ],
    )
    def test_an_input_is_there_in_any_case(self, made, given):
        _, captures = self.captures(lambda self, x: self.a(made(x)), capture_="stochastic", a=linear())
        assert captures[0][0].encoding == ("exact" if given else "stochastic")
        _, captures = self.captures(lambda self, x: self.a(made(x)), capture_="sign", a=linear())
        assert captures[0][0].encoding == "sign"

    @pytest.mark.parametrize(
        ("function", "members"),
        [
            (lambda self, x: self.words(x.long()), {"words": nn.Embedding(9, 3)}),  # not linear in the index
            (lambda self, x: (x + self.w).relu() ** self.w, {"w": nn.Parameter(torch.ones(6))}),
            (lambda self, x: torch.einsum("ni,i,nj->nj", x, self.w, x), {"w": nn.Parameter(torch.ones(6))}),
        ],
    )
    def test_it_declines_to_encode_what_is_not_linear(self, function, members):
        _, captures = self.captures(function, torch.rand(4, 6), capture_="stochastic", **members)
        assert all(one.encoding == "exact" for one in captures[len(captures) - 1])

    def test_a_norm_layer_has_its_normalised_activation_captured(self):
        module, captures = self.captures(lambda self, x: self.norm(x), capture_="stochastic", norm=nn.LayerNorm(6))
        (one,) = captures[0]
        source = next(node for node in module.graph.nodes if node.name == one.source)
        assert (source.target, source.args[2:4]) == (_aten.layer_norm.default, (None, None))


class TestSharePrefixes:
    def module(self):
        return noisy(
            lambda self, x: self.third(self.second(self.first(x).relu()).view(x.shape[0], 5) + x[:, :5]),
            first=linear(), second=linear(5, 5), third=linear(5, 2),
        )  # fmt: skip

    def test_a_run_holds_what_its_noise_can_change(self):
        module = self.module()
        assert targets(perturbed_run(module, [2])) == [ops.perturb]
        assert targets(perturbed_run(module, [0])).count(_aten.linear.default) == 2
        assert perturbed_nodes(module, [2]) < perturbed_nodes(module, [1]) < perturbed_nodes(module, [0])

    def test_noise_branches_clean_values_are_tiled_and_sizes_scaled(self):
        run = perturbed_run(self.module(), [1])
        (noise,) = [node for node in run.graph.nodes if node.target == ops.perturb]
        assert noise.args[-1] is False  # the clean value goes in, its copies come out
        assert noise.args[0].op == "placeholder"
        assert targets(run).count(ops.tile) == 1  # x[:, :5], which the addition reads
        assert targets(run).count(operator.mul) == 1  # x.shape[0]
        results = run(*[_value(node, 3, 4) for node in placeholders(run)])
        assert results[0].shape == (12, 2)

    def test_in_a_joint_run_later_noise_meets_copies(self):
        run = perturbed_run(self.module(), [0, 1, 2])
        assert [n.args[-1] for n in run.graph.nodes if n.target == ops.perturb] == [False, True, True]

    def test_the_clean_run_is_the_model(self):
        clean = clean_run(self.module(), ["relu"], [])
        assert ops.perturb not in targets(clean)
        assert ops.tile not in targets(clean)
        assert [output.kind for output, _ in outputs(clean)] == ["output", "value"]

    def test_copies_see_the_clean_runs_statistics(self):
        module = noisy(lambda self, x: self.norm(self.linear(x).relu()).exp(), linear=linear(), norm=nn.BatchNorm1d(5))
        run = perturbed_run(module, [0])
        assert _aten._native_batch_norm_legit_no_training.default in targets(run)
        assert not any(rules.uses_batch_statistics(node) for node in run.graph.nodes)
        names = {node.meta["target"] for node in placeholders(run, Role.VALUE)}
        values = [name for name in names if "mean" in name or "rstd" in name or "getitem" in name]
        assert len(values) == 2
        assert [output.kind for output, _ in outputs(run)] == ["output"]  # no running statistics
        clean = clean_run(module, values, [])
        assert [output.kind for output, _ in outputs(clean)].count("mutation") == 3

    def test_it_declines_a_size_that_is_no_multiple_of_the_batch(self):
        module = noisy(
            lambda self, x: F.pad(self.linear(x).t(), (0, 1)).reshape(5, x.shape[0] + 1)[:, :-1].t(), linear=linear()
        )
        with pytest.raises(UnsupportedModelError, match="not a multiple"):
            perturbed_run(module, [0])


class TestSplitStages:
    def test_stages_run_one_after_the_other(self):
        module = captured(lambda self, x: ((z := x.relu()).exp() + z, z), torch.randn(4, 6))
        cuts = [node.name for node in module.graph.nodes if node.op == "call_function"]
        for cut, count in (([], 1), (cuts[:1], 2), (cuts, 3), (["nobody"], 1)):  # behind the last node nothing is left
            stages = split_stages(module, cut)
            assert len(stages) == count
            values: dict[object, torch.Tensor] = {}
            x = torch.randn(3, 6)
            for stage in stages:
                arguments = [
                    values[n.meta["target"]] if n.meta["role"] == Role.VALUE else x for n in placeholders(stage)
                ]
                for (output, _), value in zip(outputs(stage), stage(*arguments), strict=True):
                    values[output.name if output.kind == "value" else ("output", output.name)] = value
            assert torch.equal(values["output", "0"], x.relu().exp() + x.relu())
            assert torch.equal(values["output", "1"], x.relu())

    def test_nothing_else_lives_between_stages(self):
        module = captured(lambda self, x: x.relu().exp().sin().cos())
        nodes = [node.name for node in module.graph.nodes if node.op == "call_function"]
        stages = split_stages(module, [nodes[1]])
        assert [output for output, _ in outputs(stages[0])] == [Output("value", nodes[1])]
        assert [node.meta["target"] for node in placeholders(stages[1])] == [nodes[1]]

    def test_a_value_is_returned_once(self):
        module = captured(lambda self, x: x.relu().exp())
        relu = next(node for node in module.graph.nodes if node.target == _aten.relu.default)
        clean = clean_run(module, [relu.name], [])
        (first, _) = split_stages(clean, [relu.name])
        assert [output for output, _ in outputs(first)] == [Output("value", relu.name)]


class TestTables:
    def test_every_entry_is_an_operation_that_torch_has(self):
        listed = [*rules.RULES, *rules.BATCH_STATISTICS, *domains.NONNEGATIVE, *domains.PRESERVING]
        for target in [*listed, *randomness._RULES]:
            assert isinstance(target, torch._ops.OpOverload) or target is operator.getitem, target

    def test_an_unlisted_operation_has_the_default(self):
        assert rules.rule_for(_aten.addmv.default) is rules.GENERIC

    def test_the_support_matrix_shows_every_row(self):
        rows = rules.support_matrix()
        assert len(rows) == len(rules.RULES) + 1
        assert rows[-1][0] == "any other operation"

    @pytest.mark.parametrize("rule", sorted({rule.name for rule in rules.RULES.values()}))
    def test_a_bilinear_rule_is_linear_in_its_activation(self, rule):
        """An encodable operation has to be linear in the activation for fixed parameters, affine terms aside."""
        if rule != "bilinear":
            return
        cases = {
            _aten.linear.default: (torch.randn(3, 4), torch.randn(2, 4)),
            _aten.conv1d.default: (torch.randn(3, 2, 5), torch.randn(4, 2, 3)),
            _aten.matmul.default: (torch.randn(3, 4), torch.randn(4, 2)),
            _aten.mm.default: (torch.randn(3, 4), torch.randn(4, 2)),
            _aten.mul.Tensor: (torch.randn(3, 4), torch.randn(4)),
            _aten.bmm.default: (torch.randn(2, 3, 4), torch.randn(2, 4, 3)),
        }
        for target, (x, weight) in cases.items():
            assert rules.rule_for(target).encodable
            torch.testing.assert_close(target(2 * x, weight), 2 * target(x, weight))


def _value(node, samples, copies):
    """A value for a placeholder of a perturbed run."""
    match node.meta["role"]:
        case Role.RUNTIME:
            given = {"copies": torch.arange(copies), "key": torch.zeros(2, dtype=torch.int64), "sigmas": torch.ones(3)}
            return given[node.meta["target"]]
        case Role.VALUE | Role.INPUT | Role.PARAMETER:
            val = node.meta["val"]
            if not isinstance(val, torch.Tensor):
                return samples
            return torch.randn([extent if isinstance(extent, int) else samples for extent in val.shape])


def test_kinds_say_what_a_value_depends_on():
    module = find_sites(
        located(
            lambda self, x: (self.w * 2) * x + self.buffer * x.shape[0],
            w=nn.Parameter(torch.ones(6)),
            buffer=torch.ones(6),
        )
    )
    kinds = {str(node.target): node.meta["kind"] for node in module.graph.nodes if node.op == "call_function"}
    assert kinds["aten.sym_size.int"] == Kind.SIZE
    assert {Kind.PARAMETER, Kind.ACTIVATION, Kind.CONSTANT} <= {
        n.meta["kind"] for n in module.graph.nodes if "kind" in n.meta
    }
