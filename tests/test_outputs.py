"""Learned feedback of models with several outputs, and the loss's error at them (DESIGN.md 12)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from feedback_cases import BOUND, assert_unbiased, exact, gradients, normal, program_for, random_jacobians
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import onward.losses
from onward.passes.errors import UnsupportedModelError
from onward.passes.separate_outputs import returned
from onward.runtime.loss import SampleLoss
from onward.runtime.output_gradient import BLACK_BOX_SIGMA, OutputGradient

# --- several outputs --------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """Hidden layers that are returned and read on, before and behind an activation, and leaves without a gradient."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.tanh, linear: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2), nn.Linear(3, 2)
        self.activation, self.linear = (nn.Identity() if linear else activation), linear

    def forward(self, x: Tensor) -> dict[str, Any]:
        z = self.a(x)
        h = self.activation(z)
        logits = self.b(h)
        y = self.c(h) + self.d(self.activation(logits))
        hidden = (z, h) if not self.linear else (z,)
        return {"logits": logits, "hidden": hidden, "class": logits.argmax(1), "y": y, "x": x}


def parts_loss(output: dict[str, Any], target: Any) -> Tensor:
    classes, values = target
    fit = F.cross_entropy(output["logits"], classes, reduction="none") + (output["y"] - values).square().sum(1)
    own = sum((leaf**3).mean(1) for leaf in output["hidden"])
    return fit + own + (output["x"] * output["hidden"][-1][:, :4]).mean(1) + 0 * output["class"]


X, Y = normal(8, 4), (torch.arange(8) % 3, normal(8, 2, seed=1))


@pytest.mark.parametrize("activation", [torch.tanh, torch.relu])
@pytest.mark.parametrize(
    "settings",
    [{"reach": 0}, {"reach": 1}, {"reach": 4}, {"segments": 2}, {"segments": 1}, {"segments": ["b"]}],
    ids=str,
)
def test_the_full_correction_is_unbiased(activation: Any, settings: dict[str, Any]) -> None:
    model = Parts(activation).double()
    program = program_for(model, X, parts_loss, correction="full", copies=64, sigma=1e-3, **settings)
    assert_unbiased(program, X, Y, exact(model, X, Y, parts_loss))
    backpropagates = settings in ({"reach": 4}, {"segments": 1})
    assert bool(program.compiled.runs) == (not backpropagates)


def test_with_the_true_jacobians_the_prediction_is_exact() -> None:
    """Of a linear net; z is returned, so that its Jacobian is that of the others, and e there comes on top."""
    model = Parts(linear=True).double()
    program = program_for(model, X, parts_loss)
    spans = {}
    for _, leaf in returned(program.compiled.graph.graph):
        (start,) = leaf.meta["offsets"]
        spans[start] = leaf.meta["layout"].elements
    assert spans == {0: 3, 3: 6, 9: 2}  # logits, z, y
    b, c, d = (layer.weight.detach() for layer in (model.b, model.c, model.d))
    assert program.feedback is not None
    known = {0: torch.cat([b.T, torch.zeros(6, 6), (c + d @ b).T], 1), 1: torch.cat([torch.zeros(3, 9), d.T], 1)}
    program.feedback = replace(program.feedback, jacobians=known)
    for _ in range(2):  # nothing is unexplained, so that nothing changes
        found = gradients(program, X, Y)
        torch.testing.assert_close(found, exact(model, X, Y, parts_loss), rtol=1e-9, atol=1e-12)
    assert program.feedback.explained == pytest.approx(1.0)


def test_it_learns_that_jacobian_and_resumes_bit_for_bit() -> None:
    model = Parts(linear=True).double()
    program = program_for(model, X, parts_loss, copies=8)
    for _ in range(200):  # d = 9 coordinates, N = 32: each step leaves less than 0.95 of the square error
        found = gradients(program, X, Y)
    torch.testing.assert_close(found, exact(model, X, Y, parts_loss), rtol=0, atol=100 * 0.95**100)
    resumed = program_for(Parts(linear=True).double(), X, parts_loss, copies=8)
    resumed.load_state_dict(program.state_dict())
    again = program_for(Parts(linear=True).double(), X, parts_loss, copies=8)
    again.load_state_dict(program.state_dict())
    for _ in range(2):
        found = gradients(program, X, Y)
        assert torch.equal(gradients(resumed, X, Y), found)
        assert torch.equal(gradients(again, X, Y), found)


@pytest.mark.parametrize("settings", [{"rank": 4}, {"probe": 0.5, "rank": None}], ids=str)
def test_several_outputs_with_a_rank_or_a_probe(settings: dict[str, Any]) -> None:
    model = Parts().double()
    program = program_for(model, X, parts_loss, copies=16, **settings)
    for _ in range(100):
        found = gradients(program, X, Y)
    assert float(F.cosine_similarity(found, exact(model, X, Y, parts_loss), dim=0)) > 0.9


class Returns(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.form = nn.Linear(4, 5), nn.Linear(5, 3), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.head(torch.tanh(self.first(x))))


@dataclass
class Answer:
    z: Tensor
    twice: Tensor


torch.export.register_dataclass(Answer)


def squares(output: Any, target: Tensor) -> Tensor:
    total = sum(
        (i + 1) * (leaf.double() - 1).square().reshape(len(leaf), -1).sum(1) for i, leaf in enumerate(leaves_of(output))
    )
    assert isinstance(total, Tensor)
    return total


def leaves_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "one": lambda z: [z],
    "twice the same": lambda z: (z, z),
    "dataclass": lambda z: Answer(z, z * 2),
    "nested": lambda z: {"a": [z, {"b": z.exp()}], "none": None, "name": "x", "mask": z > 0},
    "of two dtypes": lambda z: (z.float(), z),
    "one number a sample": lambda z: (z.sum(1), z.unsqueeze(1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_structure_is_an_output(form: str) -> None:
    model = Returns(FORMS[form]).double()
    program = program_for(model, X, squares, correction="full", copies=64, sigma=1e-3 if "dtypes" not in form else 0.05)
    wrong = random_jacobians(program)
    rows = []
    for _ in range(40):
        program.feedback = wrong
        rows.append(gradients(program, X, torch.zeros(8)))
    found, expected = torch.stack(rows), exact(model, X, torch.zeros(8), squares)
    error = found.std(0) / len(rows) ** 0.5
    rounding = 1e-5 if "dtypes" not in form else 0.02 * float(expected.abs().max())  # of σ², at a σ that float32 allows
    assert bool(((found.mean(0) - expected).abs() <= BOUND * error + rounding).all())
    if form in ("one", "twice the same"):  # nothing follows on the last layer, whose gradient is exact then
        torch.testing.assert_close(found[0][-18:], expected[-18:])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda z: {"z": z, "t": z.t()}, r"samples first; output\['t'\] has the shape \(3, "),
        (lambda z: (z.argmax(1), [z > 0]), r"floating-point output.*of output\[0\], output\[1\]\[0\] none is"),
    ],
)
def test_outputs_that_cannot_work(form: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        program_for(Returns(form).double(), X, squares)


class Hard(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.a(x), self.b(x).argmax(1)


def test_a_site_that_only_leaves_without_gradient_depend_on_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"site 'b' in module 'b'.*b\.weight, b\.bias would stay untrained"):
        program_for(Hard(), X.float(), squares)


def test_a_returned_argmax_does_not_end_the_reach() -> None:
    model = Returns(lambda z: (z, z.argmax(1))).double()
    program = program_for(model, X, squares, reach=1)
    assert not program.compiled.runs
    torch.testing.assert_close(gradients(program, X, torch.zeros(8)), exact(model, X, torch.zeros(8), squares))


# --- the error at several outputs, and structured targets -------------------------------------------------------------


def structured(output: Any, target: Any) -> Tensor:
    z, y = output["z"], output["y"]
    classes = target["part"][0] if isinstance(target, dict) else target
    scale = target.get("scale", 1.0) if isinstance(target, dict) else 1.0
    own = F.cross_entropy(z, classes, reduction="none") + 0 * output["n"].sum(1)
    return own + (scale * y**2).flatten(1).mean(1) * (target["part"][1] if isinstance(target, dict) else 1.0)


def output_of(samples: int) -> dict[str, Tensor]:
    values = {
        "z": normal(samples, 5),
        "n": torch.ones(samples, 2, dtype=torch.int64),
        "y": normal(samples, 2, 3, seed=1),
    }
    return {**values, "unread": normal(samples, 2)}


@pytest.mark.parametrize("kind", ["tensor", "dict", "with a number"])
def test_the_error_is_the_losss_gradient_at_every_leaf(kind: str) -> None:
    function, known = OutputGradient(SampleLoss(structured)), []
    for samples in (4, 1, 4, 7, 4, 3):
        output, classes = output_of(samples), torch.arange(samples) % 5
        target: Any = classes
        if kind != "tensor":
            target = {"part": (classes, normal(samples)), "none": None, "scale": torch.tensor(0.3)}
        losses, error = function(output, target, torch.tensor([0, 0]))
        assert error.shape == (samples, 5 + 6 + 2)
        assert not bool(error[:, -2:].any())
        leaves = {key: value.clone().requires_grad_() for key, value in output.items() if key in ("z", "y")}
        expected = structured({**output, **leaves}, target)
        torch.testing.assert_close(losses, expected.detach())
        wanted = torch.autograd.grad(expected.mean(), list(leaves.values()))
        torch.testing.assert_close(error[:, :11], torch.cat([each.flatten(1) for each in wanted], 1))
        known.append(dict(function._graphs))
    assert [[*graphs] for graphs in known] == [[4], [4, 1], [4, 1], [None], [None], [None]]
    assert known[1] == known[2]
    assert known[3] == known[4] == known[5]
    assert known[3][None] is not None


def cubes(output: Any, target: Any, opaque: bool = True) -> Tensor:
    first, second = (leaf.detach() if opaque else leaf for leaf in (output[0], output[2]))
    return (first**3).sum(1) + (second**3).sum((1, 2)) + 0 * output[1]


OTHER_TARGETS = [{"a": torch.zeros(2), "name": "x"}, [1, 2], [torch.zeros(3), torch.zeros(4)]]


@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_a_loss_with_other_targets_is_differentiated_in_every_step(target: Any) -> None:
    """It cannot be traced, but autograd goes through its code; nor can one that reads the values (`ctc`, below)."""
    function = OutputGradient(SampleLoss(lambda o, t: cubes(o, t, opaque=False)), [0, 2])
    output = (normal(2, 3), torch.ones(2), 0.1 * normal(2, 1, 2, seed=1))
    for _ in range(2):
        losses, error = function(output, target, torch.tensor([3, 0]))
        torch.testing.assert_close(losses, cubes(output, target))
        torch.testing.assert_close(error, torch.cat([3 * each.flatten(1) ** 2 / 2 for each in output[::2]], 1))
    assert function._graphs == {}


@pytest.mark.parametrize("form", ["padded", "lists"])
def test_a_loss_that_reads_values_has_its_exact_error(form: str) -> None:
    scores, labels = normal(3, 5, 4), torch.tensor([[1, 2, 2], [3, -1, -1], [1, 3, -1]])
    target = labels if form == "padded" else [[1, 2, 2], [3], [1, 3]]
    leaf = scores.clone().requires_grad_()
    log, lengths = leaf.log_softmax(2).transpose(0, 1), torch.tensor([3, 1, 2])
    F.ctc_loss(log, labels.clamp(min=0), torch.full((3,), 5), lengths).backward()
    losses, error = OutputGradient(SampleLoss(onward.losses.ctc))(scores, target, torch.tensor([0, 0]))
    torch.testing.assert_close(error, leaf.grad.flatten(1))
    assert losses.shape == (3,)


@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_other_targets_are_a_black_box_with_several_outputs(target: Any) -> None:
    """The gradient of ``E Σ (o + σ ε)³`` for Gaussian noise is ``3 o² + 3 σ²``, each leaf's in its own units."""
    function = OutputGradient(SampleLoss(cubes), [0, 2])
    output = (normal(2, 3), torch.ones(2), 0.1 * normal(2, 1, 2, seed=1))
    rows = torch.stack([function(output, target, torch.tensor([3, step]))[1] for step in range(300)])
    sigmas = [BLACK_BOX_SIGMA * float(leaf.std(correction=0)) for leaf in (output[0], output[2])]
    wanted = [3 * (leaf**2 + s**2).flatten(1) / 2 for leaf, s in zip((output[0], output[2]), sigmas, strict=True)]
    error = rows.std(0) / 300**0.5
    assert bool(((rows.mean(0) - torch.cat(wanted, 1)).abs() < BOUND * error).all())
    assert float(error[:, :3].max()) < 0.1 * float(wanted[0].max())
