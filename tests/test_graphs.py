"""One sample without a batch: whole graphs, the loss of some of their nodes, and credit by reach."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward import LikelihoodRatio
from onward.compiler.whole import capture_whole
from onward.evidence.baselines.backpropagation import Backpropagation
from onward.models import DATASETS, build, load, loaders
from onward.passes.errors import BatchError, CaptureError, DataError, OptionError, UnsupportedModelError
from onward.runtime.training.evaluation import accuracy

EXACT = LikelihoodRatio.auto(reach=9, warmup=0)
"""A reach beyond the last site: backpropagation through the captured graph, so that its gradient is exact."""


def ring(nodes: int) -> Tensor:
    one = torch.arange(nodes)
    forth = torch.stack([one, (one + 1) % nodes])
    return torch.cat([forth, forth.flip(0)], 1)


def case(nodes: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features, edges of a ring, and classes of which a third is known."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(nodes, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 3, (nodes,), generator=generator)
    target[torch.arange(nodes) % 3 != 0] = -100
    return x, ring(nodes), target


def network(name: str = "gcn", seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build(name, **{"num_classes": 3, "in_features": 5, "dropout": 0.0, **options}).double()


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def by_autograd(model: nn.Module, inputs: Any, target: Any, loss: Callable[..., Tensor]) -> list[Tensor]:
    loss(model(*inputs), target).backward()
    return gradients(model)


# --- the captured graph ----------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """One of each kind of rule: products, lookups by mask and number, scatters, norms, reductions, views, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6)
        self.layer_norm = nn.LayerNorm(6)
        self.mix = nn.Parameter(torch.randn(2, 3))
        self.last = nn.Linear(6, 3)
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x: Tensor, edge_index: Tensor, scale: Tensor) -> dict[str, Tensor]:
        nodes = x.shape[0]
        loops = edge_index[0] == edge_index[1]
        source, target = edge_index[:, ~loops]  # a mask of known values
        degree = torch.zeros(nodes, dtype=x.dtype).scatter_add_(0, target, torch.ones(len(target), dtype=x.dtype))
        often = (degree > 1).nonzero().squeeze(1)
        h = self.norm(self.first(x)) + self.shift
        h = F.elu(self.layer_norm(h)).view(nodes, 2, 3)
        h = torch.einsum("nhf,hf->nhf", h, self.mix).transpose(1, 2).flatten(1)
        messages = h[source] * scale[:, None]
        sums = h.new_zeros(nodes, 6).index_add(0, target, messages) / degree.clamp(min=1)[:, None]
        largest = h.new_full((nodes, 6), -9.0).scatter_reduce(0, target[:, None].expand(-1, 6), messages, "amax")
        h = torch.stack([sums, largest, h.softmax(0)]).mean(0)
        h = torch.cat([h[:, :3], h[:, 3:].square().sqrt()], -1)
        h = h.index_put((often,), h[often] * 2.0)
        dense = torch.eye(nodes, dtype=x.dtype)[source].T @ torch.eye(nodes, dtype=x.dtype)[target]
        h = h + dense.T @ h / (1 + h.abs().max())
        return {"nodes": self.last(h), "graph": h.mean(0)}


def test_every_rule_gives_autograds_gradient_and_the_models_output() -> None:
    torch.manual_seed(0)
    model = Everything().double()
    edges = torch.cat([ring(7), torch.tensor([[0, 3], [0, 5]])], 1)
    scale = torch.rand(int((edges[0] != edges[1]).sum()), dtype=torch.float64) + 0.5
    inputs = torch.randn(7, 5, dtype=torch.float64), edges, scale

    def loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return F.cross_entropy(output["nodes"], target) + output["graph"].square().sum()

    twin = copy.deepcopy(model)
    target = torch.randint(0, 3, (7,))
    program = onward.compile(model, inputs, loss=loss, estimator=EXACT, unbatched=True)
    given = program.step(inputs, target)
    expected = by_autograd(twin, inputs, target, loss)
    torch.testing.assert_close(given, loss(copy.deepcopy(twin)(*inputs), target).detach())
    for found, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    assert isinstance(model.norm.running_mean, Tensor)
    torch.testing.assert_close(model.norm.running_mean, twin.norm.running_mean)
    torch.testing.assert_close(model.norm.running_var, twin.norm.running_var)


def test_what_depends_on_the_edges_alone_is_computed_once() -> None:
    x, edges, _ = case()
    captured = capture_whole(network(), (x, edges))
    operations = [str(node.target) for node in captured.module.graph.nodes if node.op == "call_function"]
    assert sum("rsqrt" in name for name in operations) == 0  # degrees are constants
    assert sum("aten.linear" in name for name in operations) == 2  # as coarse as it was written
    assert {name.split(".")[0] for name in captured.constants if "folded" in name} == {"folded"}


def test_copies_do_not_mix_and_a_model_that_would_is_refused() -> None:
    class Sorts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(5, 3)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            h: Tensor = self.lin(x)
            return h[h[:, 0].argsort()]

    x, edges, _ = case()
    with pytest.raises(UnsupportedModelError, match=r"index that depends on.*floating-point inputs") as error:
        onward.compile(Sorts().double(), (x, edges), loss=F.cross_entropy, unbatched=True)
    assert "test_graphs.py" in str(error.value)


def test_an_operation_without_a_rule_is_named() -> None:
    class Decomposes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.inv_ex(self.lin(x)[:5].mT @ x[:5]).inverse

    with pytest.raises(UnsupportedModelError, match=r"inv_ex.*no rule.*add_sample_axis"):
        onward.compile(Decomposes().double(), (case()[0],), loss=F.cross_entropy, unbatched=True)


def test_a_branch_on_the_features_is_a_capture_error() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) if x.sum() > 0 else self.lin(-x)

    with pytest.raises(CaptureError, match="one whole graph"):
        onward.compile(Branches().double(), (case()[0],), loss=F.cross_entropy, unbatched=True)


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gcn", "gat"])
def test_a_step_is_exact_where_nothing_is_estimated(name: str) -> None:
    x, edges, target = case()
    model = network(name)
    program = onward.compile(model, (x, edges), loss=F.cross_entropy, estimator=EXACT, unbatched=True)
    loss = program.step((x, edges), target)
    found = gradients(model)
    torch.testing.assert_close(loss, F.cross_entropy(model(x, edges), target).detach())
    for given, wanted in zip(found, by_autograd(model, (x, edges), target, F.cross_entropy), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-8, atol=1e-12)
    assert program.clean_forwards == 1


def test_a_dictionary_of_arguments_and_dropout_and_chunks() -> None:
    x, edges, target = case()
    inputs = {"x": x, "edge_index": edges}
    found = []
    for chunk in (2, 8):
        model = network(dropout=0.5)
        estimator = LikelihoodRatio(groups="joint", copies=8, sigma=0.1, chunk=chunk)
        program = onward.compile(model, inputs, loss=F.cross_entropy, estimator=estimator, unbatched=True)
        losses = [float(program.step(inputs, target)) for _ in range(2)]
        assert losses[0] != losses[1]  # another mask of dropout
        found.append((losses, gradients(model)))
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("estimator", ["auto", LikelihoodRatio(copies=4)])
def test_the_loss_counts_known_nodes_only(estimator: Any) -> None:
    x, edges, target = case()
    runs = []
    for loss, given in (
        (nn.CrossEntropyLoss(), target),
        (lambda o, t: F.cross_entropy(o, t), target),  # one number for the graph
    ):
        model = network()
        program = onward.compile(model, (x, edges), loss=loss, estimator=estimator, unbatched=True)
        runs.append(float(program.step((x, edges), given)))
        assert program.per_sample_loss(model(x, edges), given).shape == (1,)
    expected = F.cross_entropy(network()(x, edges), target).item()
    assert runs == pytest.approx([expected] * 2, rel=1e-6)


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double(), label_smoothing=0.1),
     nn.KLDivLoss(reduction="batchmean")],
)  # fmt: skip
def test_torchs_own_means_are_the_graphs(loss: nn.Module) -> None:
    x, edges, target = case()
    classes = target if isinstance(loss, nn.CrossEntropyLoss) else F.one_hot(target.clamp(min=0), 3).double()
    model = network()
    program = onward.compile(model, (x, edges), loss=loss, estimator=EXACT, unbatched=True)
    program.step((x, edges), classes)
    for found, expected in zip(gradients(model), by_autograd(model, (x, edges), classes, loss), strict=True):
        torch.testing.assert_close(found, expected)


def test_edges_to_nodes_that_are_not_there_are_an_error() -> None:
    x, edges, _ = case()
    with pytest.raises(CaptureError, match="GraphNetwork does not run on the example: index out of range"):
        onward.compile(network(), (x, edges + len(x)), loss=F.cross_entropy, unbatched=True)


def test_a_mask_that_leaves_no_node_is_an_error() -> None:
    x, edges, target = case()
    model = network()
    program = onward.compile(model, (x, edges), loss=F.cross_entropy, unbatched=True)
    with pytest.raises(BatchError, match=r"leaves no node: all 12 are -100.*mask of the split empty"):
        program.step((x, edges), torch.full_like(target, -100))

    def masked(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        classes, mask = target
        return F.cross_entropy(output, classes, reduction="none") * mask

    program = onward.compile(model, (x, edges), loss=masked, unbatched=True)
    known = target != -100
    classes = target.clamp(min=0)
    program.step((x, edges), (classes, known))
    with pytest.raises(BatchError, match=r"mask of shape.*selects no node"):
        program.step((x, edges), (classes, torch.zeros_like(known)))
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_inputs_that_do_not_fit_are_named() -> None:
    x, edges, target = case()
    model = network()
    program = onward.compile(model, (x, edges), loss=F.cross_entropy, unbatched=True)
    with pytest.raises(BatchError, match=r"input 1 is not the example's.*Compile a program for each graph"):
        program.step((x, edges.flip(1)), target)
    with pytest.raises(BatchError, match="input 0 has shape"):
        program.step((x[:-1], edges), target[:-1])
    with pytest.raises(BatchError, match="floating-point"):
        onward.compile(model, (x.long(), edges), loss=F.cross_entropy, unbatched=True)
    with pytest.raises(BatchError, match="at least one node"):
        onward.compile(model, (x[:0], edges), loss=F.cross_entropy, unbatched=True)
    with pytest.raises(OptionError, match="one sample"):
        onward.compile(
            model, (x, edges), loss=F.cross_entropy, estimator=LikelihoodRatio(credit="batch"), unbatched=True
        )


# --- credit by reach -------------------------------------------------------------------------------------------------


def test_reach_is_that_of_the_edges_and_names_are_the_models_own() -> None:
    x, edges, target = case(16)
    hops = (torch.arange(16)[:, None] - torch.arange(16)).abs()
    hops = torch.minimum(hops, 16 - hops)
    within = {"layers.0.lin": 2, "layers.0:einsum": 2, "layers.0:einsum@2": 1, "layers.0:add": 1,
              "layers.1.lin": 1, "layers.1:einsum": 1, "layers.1:einsum@2": 0, "layers.1:add": 0}  # fmt: skip
    program = onward.compile(network("gat"), (x, edges), loss=F.cross_entropy, unbatched=True)
    found = {program.compiled.sites[index].name: reach for index, reach in program.compiled.reached.items()}
    assert found.keys() == within.keys()
    for site, most in within.items():
        assert torch.equal(found[site], hops <= most), site
    assert all("graph.py" in site.line or "linear.py" in site.line for site in program.compiled.sites)
    program.model.eval()
    with pytest.raises(onward.errors.ModeError, match="GraphNetwork"):
        program.step((x, edges), target)


def test_a_comparison_hides_the_reach_and_the_whole_graph_counts() -> None:
    class Hard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            h = (self.one(x) > 0).to(x.dtype)
            return self.two(torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]]))

    x, edges, target = case()
    program = onward.compile(Hard().double(), (x, edges), loss=F.cross_entropy, unbatched=True)
    assert list(program.compiled.reached) == [1]
    program.step((x, edges), target)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in program.model.parameters())


@pytest.mark.parametrize("hidden", ["feature", "weight", "random", "order", "sign"])
def test_what_hides_a_nan_or_selects_otherwise_in_another_step_has_no_reach(hidden: str) -> None:
    """Nodes reach their neighbours only where a mask that another step has otherwise says so, or in a sorted order."""
    hide: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "feature": lambda x, h: torch.where(x[:, :1] > 100, h, 0),
        "weight": lambda x, h: h.masked_fill(model.one.bias.detach()[:1] < 100, 0),
        "random": lambda x, h: torch.where(torch.rand_like(h) > 0.5, h, 0),
        "order": lambda x, h: h.sort(0)[0][:1],
        "sign": lambda x, h: torch.sgn(h) * h.mean().sgn(),
    }

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            h = self.one(x)
            return self.two(h + hide[hidden](x, torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]])))

    x, edges, _ = case()
    model = Masked().double()
    program = onward.compile(model, (x, edges), loss=F.cross_entropy, unbatched=True)
    assert list(program.compiled.reached) == [1]


@pytest.mark.parametrize("couples", [False, True])
def test_a_loss_that_couples_the_nodes_counts_as_a_whole(couples: bool) -> None:
    """One number a node, but of others' outputs too (here a contrast with all): the sum alone is unbiased."""
    nodes = 16

    def contrast(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output @ output.T if couples else output, target, reduction="none")

    x, edges, _ = case(nodes)
    target = torch.arange(nodes) if couples else torch.arange(nodes) % 3
    model = network()
    expected = torch.cat(
        [each.flatten() for each in by_autograd(model, (x, edges), target, lambda *a: contrast(*a).mean())]
    )
    estimator = LikelihoodRatio(groups="layerwise", copies=4096, sigma=1e-3)
    program = onward.compile(model, (x, edges), loss=contrast, estimator=estimator, unbatched=True)
    program.step((x, edges), target)
    found = torch.cat([each.flatten() for each in gradients(model)])
    assert program.compiled.reached
    assert float((found - expected).norm() / expected.norm()) < 0.3  # credited node by node, 0.9 where it couples


def test_random_numbers_of_known_shape_are_drawn_in_every_step() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(5, 3)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            kept = torch.bernoulli(torch.full((len(x), 1), 0.5, dtype=x.dtype))
            return self.lin(x * kept) * F.dropout(torch.ones(len(x), 1, dtype=x.dtype), 0.5, self.training)

    x, edges, target = case()
    program = onward.compile(Random().double(), (x, edges), loss=F.cross_entropy, unbatched=True)
    losses = {float(program.step((x, edges), target)) for _ in range(4)}
    assert len(losses) == 4


def test_credit_by_reach_is_unbiased_and_has_the_variance_that_theory_says() -> None:
    """The bias of the last layer, whose noise reaches its own node only, by Rademacher pairs one site at a time.

    Let g be the gradient at its noise point, (n, c). A pair's estimate is ``Σ_i ε_ic Σ_j' g_j' ε_j'``, j' over all
    numbers of the graph, or over those of node i. Its variance is then ``n |g|² + (Σ_i g_ic)² − 2 Σ_i g_ic²``, or
    ``Σ_i Σ_{c' ≠ c} g_ic'²``. Means of 32 pairs are nearly normal, so the variance over T steps has the relative
    standard deviation ``sqrt(2 / T)``; five of them are allowed.
    """
    nodes, pairs, steps = 40, 32, 100
    x, edges, _ = case(nodes)
    target = torch.randint(0, 3, (nodes,), generator=torch.Generator().manual_seed(1))
    model = network()
    output = model(x, edges)
    F.cross_entropy(leaf := output.detach().requires_grad_(), target).backward()
    assert leaf.grad is not None
    squares = leaf.grad.square()
    whole = nodes * squares.sum() + leaf.grad.sum(0).square() - 2 * squares.sum(0)
    near = squares.sum() - squares.sum(0)
    expected = by_autograd(model, (x, edges), target, F.cross_entropy)
    estimator = LikelihoodRatio(groups="layerwise", noise="rademacher", copies=2 * pairs, sigma=1e-4)
    measured = {}
    for name, loss in (("near", F.cross_entropy), ("whole", lambda o, t: F.cross_entropy(o, t))):
        program = onward.compile(model, (x, edges), loss=loss, estimator=estimator, unbatched=True)
        found: list[list[Tensor]] = []
        for _ in range(steps):
            program.step((x, edges), target)
            found.append(gradients(model))
        samples = [torch.stack(each) for each in zip(*found, strict=True)]
        for each, wanted in zip(samples, expected, strict=True):  # unbiased: χ² with as many degrees of freedom
            error = (each.mean(0) - wanted).square() / (each.var(0) / steps)
            assert float(error.mean()) < 1 + 6 * (2 / error.numel()) ** 0.5
        measured[name] = [float(each.var(0).sum()) for each in samples]
        last = samples[-1].var(0).sum() * pairs
        theory = (near if name == "near" else whole).sum()
        assert float(last / theory) == pytest.approx(1, abs=5 * (2 / steps) ** 0.5)
    assert float(whole.sum() / near.sum()) > 50
    ratios = [w / n for w, n in zip(measured["whole"], measured["near"], strict=True)]
    assert min(ratios) > 40 / 3 / 2  # a hidden node reaches 3 of 40 outputs


def test_feedback_learns_within_reach_only_and_the_better_for_it() -> None:
    x, edges, target = case(40)
    model = network()
    estimator = LikelihoodRatio.auto(reach=0, segments="op", warmup=0, probe_every=1)
    program = onward.compile(model, (x, edges), loss=F.cross_entropy, estimator=estimator, unbatched=True)
    for _ in range(60):
        program.step((x, edges), target)
        model.zero_grad()
    assert program.feedback is not None
    (site,) = program.feedback.jacobians
    jacobian = program.feedback.jacobians[site].reshape(40, 16, 40, 3)
    outside = ~program.compiled.reached[site][:, None, :, None].expand_as(jacobian)
    assert not jacobian[outside].any()
    hidden = model.layers[0](x, edges).detach()  # type: ignore[index, operator]
    exact = torch.func.jacrev(lambda h: model.layers[1](h.relu(), edges))(hidden)  # type: ignore[index, operator]
    exact = exact.detach().permute(2, 3, 0, 1)
    assert float(F.cosine_similarity(jacobian.flatten(), exact.flatten(), 0)) > 0.9


# --- data, training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "nodes", "known", "classes"), [("karate", 34, 4, 2), ("sbm", 240, 40, 4)])
def test_graph_data_are_whole_and_their_splits_disjoint(name: str, nodes: int, known: int, classes: int) -> None:
    dataset = load(name)
    (x, train), (same, test) = dataset.train.tensors, dataset.test.tensors
    assert x is same
    assert x.shape == (nodes, *dataset.input_shape)
    assert int((train >= 0).sum()) == known
    assert int((test >= 0).sum()) == nodes - known
    assert not bool(((train >= 0) & (test >= 0)).any())
    assert set(train.tolist()) == {-100, *range(classes)}
    edges = dataset.edge_index
    assert edges is not None
    assert set(map(tuple, edges.T.tolist())) == set(map(tuple, edges.flip(0).T.tolist()))
    assert torch.equal(load(name).train.tensors[1], train)
    assert not torch.equal(load(name, seed=1).train.tensors[1], train)
    ((features, given, target),), _ = loaders(dataset, 7, 0)
    assert features is x
    assert given is edges
    assert target is train


def test_cora_is_read_from_planetoids_files(tmp_path: Path) -> None:
    pytest.importorskip("torch_geometric")
    sparse = pytest.importorskip("scipy.sparse")
    raw = tmp_path / "Cora" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    words, classes = random.integers(0, 2, (2708, 9)).astype(np.float32), np.eye(7)[np.arange(2708) % 7]
    parts = {"x": words[:140], "y": classes[:140], "allx": words[:1708], "ally": classes[:1708],
             "tx": words[1708:], "ty": classes[1708:]}  # fmt: skip
    for part, value in parts.items():
        (raw / f"ind.cora.{part}").write_bytes(pickle.dumps(sparse.csr_matrix(value) if "x" in part else value))
    (raw / "ind.cora.graph").write_bytes(pickle.dumps({n: [(n + 1) % 2708, (n - 1) % 2708] for n in range(2708)}))
    (raw / "ind.cora.test.index").write_text("".join(f"{node}\n" for node in range(1708, 2708)))
    dataset = load("cora", root=tmp_path)
    assert (dataset.input_shape, dataset.num_classes) == ((9,), 7)
    assert int((dataset.train.tensors[1] >= 0).sum()) == 140
    assert int((dataset.test.tensors[1] >= 0).sum()) == 1000
    sums = dataset.train.tensors[0].sum(1)
    torch.testing.assert_close(sums[sums > 0], torch.ones(int((sums > 0).sum())))


def test_cora_without_a_network_names_the_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torch_geometric.datasets")

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(datasets, "Planetoid", offline)
    with pytest.raises(DataError, match=r"Name or service not known.*'karate' ships with networkx"):
        load("cora", root=tmp_path)


def test_accuracy_leaves_out_ignored_targets() -> None:
    output = torch.eye(4)
    assert accuracy(output, torch.tensor([0, -100, 3, -100])).tolist() == [1.0, 0.0]
    assert accuracy(output, torch.full((4,), -100)).numel() == 0
    dense = torch.eye(2).reshape(1, 2, 2)
    assert accuracy(dense, torch.tensor([[0, -100]])).tolist() == [1.0]


def test_the_trainer_trains_validates_and_resumes_a_graph(tmp_path: Path) -> None:
    dataset = load("karate")
    train, test = loaders(dataset, 1, 0)

    def run(epochs: int, directory: Path, resume: bool = False) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = build("gcn")
        inputs, _ = dataset.batch(1)
        program = onward.compile(
            model, inputs, loss=F.cross_entropy, estimator=LikelihoodRatio.auto(reach=0, segments="op"), unbatched=True
        )
        trainer = onward.Trainer(
            program, torch.optim.Adam(model.parameters(), lr=1e-2), directory=directory, progress=False
        )
        return model, trainer.fit(train, epochs, validation=test, resume=resume)

    whole, history = run(12, tmp_path / "a")
    run(5, tmp_path / "b")
    resumed, _ = run(12, tmp_path / "b", resume=True)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert history[-1].train_loss < history[0].train_loss
    assert 0 <= history[-1].validation["accuracy"] <= 1
    twin = Backpropagation(build("gcn"), F.cross_entropy, 0, unbatched=True)
    onward.Trainer(twin, torch.optim.Adam(twin.model.parameters()), progress=False).fit(train, 2, validation=test)
    assert twin.clean_forwards == 2


def test_every_data_set_says_whether_it_is_one_graph() -> None:
    assert {"karate", "sbm", "cora"} <= DATASETS.keys()
    assert load("karate").unbatched
    assert not load("linear").unbatched
    assert re.search("Zachary", load("karate").source)


class PartOfFresh(nn.Module):
    """Writes into a part of a fresh tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out = torch.zeros(len(x), 3)
        out[2:].add_(self.layer(x)[2:])
        return out


class OtherWhileExported(nn.Module):
    """Computes something else while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        logits: Tensor = self.layer(x)
        return logits if torch.compiler.is_exporting() else 2 * logits


@pytest.mark.parametrize(
    ("model", "message"),
    [(PartOfFresh, r"writes into a part of a fresh tensor"), (OtherWhileExported, r"returns other values than")],
)
def test_what_the_captured_graph_does_not_compute_is_an_error(model: type[nn.Module], message: str) -> None:
    example = torch.randn(6, 5), torch.tensor([[0, 1, 2], [1, 2, 3]])
    with pytest.raises(CaptureError, match=message):
        onward.compile(model(), example, loss=F.cross_entropy, unbatched=True)
