"""Bad input: each mistake has its own exception type and a message that names it, and nothing has changed after it."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward import LikelihoodRatio
from onward.compiler.program import CompiledModel
from onward.passes.errors import (
    BatchError,
    CaptureError,
    LossShapeError,
    ModeError,
    NonFiniteLossError,
    OnwardError,
    OptionError,
    UnknownNameError,
    UnreachedParameterError,
    UnsupportedModelError,
)

N = 4
EXAMPLE = torch.zeros(N, 5)
LABELS = torch.tensor([0, 2, 1, 2])


def batch() -> Tensor:
    return torch.randn(N, 5, generator=torch.Generator().manual_seed(0))


def raised(kind: type[OnwardError], call: Callable[[], Any]) -> str:
    """The message of the error that `call` raises, which has to be of exactly this type."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


# ---- options


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (
            {"noise": "gausian"},
            UnknownNameError,
            "unknown noise 'gausian'. Did you mean 'gaussian'? Known: gaussian, laplace, rademacher.",
        ),
        ({"noise": None}, UnknownNameError, "unknown noise None. Known: gaussian, laplace, rademacher."),
        ({"score": "sing"}, UnknownNameError, "unknown score 'sing'. Did you mean 'sign'? Known: exact, sign."),
        ({"capture": "stochastik"}, UnknownNameError, "unknown capture 'stochastik'. Did you mean 'stochastic'?"),
        (
            {"credit": "samples"},
            UnknownNameError,
            "unknown credit 'samples'. Did you mean 'sample'? Known: batch, sample.",
        ),
        (
            {"groups": "layer-wise"},
            UnknownNameError,
            "unknown grouping 'layer-wise'. Did you mean 'layerwise'? Known: joint, layerwise.",
        ),
        ({"copies": 0}, OptionError, "copies=0: at least one copy is needed."),
        ({"copies": -2}, OptionError, "copies=-2: at least one copy is needed."),
        ({"copies": 8.0}, OptionError, "copies=8.0: it has to be an integer."),
        ({"copies": True}, OptionError, "copies=True: it has to be an integer."),
        (
            {"copies": 7},
            OptionError,
            "copies=7 is odd, and antithetic copies come in pairs. Use 8, or antithetic=False.",
        ),
        ({"chunk": 0}, OptionError, "chunk=0: it must be positive, and even with antithetic=True."),
        ({"chunk": 3}, OptionError, "chunk=3: it must be positive, and even with antithetic=True."),
        ({"chunk": 2.5}, OptionError, "chunk=2.5: it has to be an integer."),
        ({"sigma": 0.0}, OptionError, "sigma=0.0: the noise needs a positive, finite standard deviation."),
        ({"sigma": -0.1}, OptionError, "sigma=-0.1: the noise needs"),
        ({"sigma": float("nan")}, OptionError, "sigma=nan: the noise needs"),
        ({"sigma": float("inf")}, OptionError, "sigma=inf: the noise needs"),
        ({"sigma": "0.1"}, UnknownNameError, "unknown sigma '0.1'. Known: auto."),
        ({"sigma": {"*": -1.0}}, OptionError, "sigma=-1.0: the noise needs"),
    ],
)
def test_settings(settings: dict[str, Any], kind: type[OnwardError], message: str) -> None:
    assert raised(kind, lambda: LikelihoodRatio(**settings)).startswith(message)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def compiled(model: Any, example: Any = EXAMPLE, loss: Any = F.cross_entropy, **settings: Any) -> onward.Program:
    estimator = LikelihoodRatio(**{"copies": 4, **settings})
    return onward.compile(model, example, loss=loss, estimator=estimator)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (
            {"groups": [["0"], ["0", "2"]]},
            OptionError,
            "groups: the site '0' is matched by '0' and '0'; every site belongs to exactly one group.",
        ),
        (
            {"groups": [["0"], ["*"]]},
            OptionError,
            "groups: the site '0' is matched by '0' and '*'; every site belongs to exactly one group.",
        ),
        ({"groups": [["0"]]}, OptionError, "groups: no group holds the site(s) 2; every site belongs to one group."),
        ({"groups": [["0"], ["first"]]}, UnknownNameError, "unknown site 'first'. Known: 0, 2."),
        ({"sigma": {"0": 0.1}}, OptionError, "sigma: no pattern covers the site(s) 2. Add '*' as the last pattern."),
        ({"sigma": {"0": 0.1, "2x": 0.1}}, UnknownNameError, "unknown site '2x'. Did you mean '2'? Known: 0, 2."),
    ],
)
def test_patterns_of_sites(settings: dict[str, Any], kind: type[OnwardError], message: str) -> None:
    assert raised(kind, lambda: compiled(small(), **settings)) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": torch.sin}, "model is builtin_function_or_method; it has to be a torch.nn.Module."),
        ({"loss": "cross_entropy"}, "loss is str; it has to be callable as loss(output, target)."),
        (
            {"estimator": 3},
            'estimator is int; it has to be an onward.LikelihoodRatio, an onward.Calibration or "auto".',
        ),
        ({"seed": 1.5}, "seed=1.5: it has to be an integer of 64 bits."),
        ({"seed": 2**63}, f"seed={2**63}: it has to be an integer of 64 bits."),
    ],
)
def test_arguments_of_compile(given: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": small(), "example_inputs": EXAMPLE, "loss": F.cross_entropy, **given}
    assert raised(OptionError, lambda: onward.compile(**arguments)) == message


# ---- the example


@pytest.mark.parametrize(
    ("example", "kind", "message"),
    [
        (
            torch.zeros(0, 5),
            BatchError,
            "the example inputs hold no tensor with a first (batch) dimension of at least one sample.",
        ),
        (3, BatchError, "the example inputs hold no tensor with"),
        (np.zeros((4, 5), np.float32), BatchError, "the example inputs hold no tensor with"),
        (torch.tensor(1.0), BatchError, "the example inputs hold no tensor with"),
        (
            (EXAMPLE, EXAMPLE),
            BatchError,
            "the example inputs do not fit Sequential.forward: too many positional arguments.",
        ),
        (
            {"x": EXAMPLE},
            BatchError,
            "the example inputs do not fit Sequential.forward: missing a required argument: 'input'.",
        ),
        (
            EXAMPLE.double(),
            CaptureError,
            "Sequential does not run on the example: mat1 and mat2 must have the same dtype",
        ),
        (torch.zeros(4, 6), CaptureError, "Sequential does not run on the example: "),
        (torch.zeros(4, 5, device="meta"), CaptureError, "Sequential does not run on the example: "),
    ],
)
def test_example_inputs(example: Any, kind: type[OnwardError], message: str) -> None:
    assert raised(kind, lambda: compiled(small(), example)).startswith(message)


# ---- models that cannot be trained


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 5), nn.Linear(5, 3)


class NeverRead(Base):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.first(x))


class ThrownAway(NeverRead):
    def forward(self, x: Tensor) -> Any:
        (x * self.extra).sum()
        return super().forward(x)


class NoInput(NeverRead):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.extra * 2


class IntoBuffer(NeverRead):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x: Tensor) -> Any:
        self.get_buffer("seen").copy_((x * self.extra).mean(0))
        return super().forward(x)


@pytest.mark.parametrize("model", [NeverRead, ThrownAway, IntoBuffer])
def test_a_parameter_that_no_site_reaches_is_named(model: type[nn.Module]) -> None:
    message = raised(UnreachedParameterError, lambda: compiled(model()))
    assert message.startswith("no site reaches the trainable parameter(s) 'extra': ")
    assert message.endswith(
        "They would stay untrained. Freeze them (`parameter.requires_grad_(False)`) or use them in the model's output."
    )
    frozen = model()
    frozen.get_parameter("extra").requires_grad_(False)
    compiled(frozen).step(batch(), LABELS)


def test_a_parameter_that_is_returned_without_an_input() -> None:
    message = raised(UnsupportedModelError, lambda: compiled(NoInput()))
    assert message.startswith("the model returns aten.mul in the model's own forward (")
    assert "return super().forward(x), self.extra * 2" in message
    assert "Return it detached" in message


@pytest.mark.parametrize("model", [nn.Flatten(), nn.Linear(5, 3).requires_grad_(False)], ids=["none", "frozen"])
def test_nothing_to_train(model: nn.Module) -> None:
    message = raised(UnreachedParameterError, lambda: compiled(model))
    assert message.startswith("the model has no trainable parameter: there is nothing to train.")
    assert "requires_grad_(True)" in message


class Binarised(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(F.linear(x, self.first.weight.sign(), self.first.bias))


class Rounded(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(F.linear(x, (self.first.weight * 8).round() / 8, self.first.bias))


class Detached(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(F.linear(x, self.first.weight.detach(), self.first.bias))


@pytest.mark.parametrize("model", [Binarised, Rounded])
def test_a_weight_behind_an_operation_without_derivative(model: type[nn.Module]) -> None:
    message = raised(UnreachedParameterError, lambda: compiled(model()))
    assert message.startswith(
        "the parameter 'first.weight' has no local derivative at aten.linear in the model's own forward"
    )
    assert "test_errors.py" in message
    assert "return self.head(F.linear(" in message
    assert "keep the operation without derivative on the activations" in message


class NothingToRead(nn.Module):
    """A layer for those of the positions that there are none of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.empty = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x).sum(1) + self.empty(x[:, 2:]).sum(1)
        return logits


def test_a_parameter_that_reads_no_element_is_named() -> None:
    message = raised(
        UnreachedParameterError,
        lambda: onward.compile(NothingToRead(), torch.randn(3, 2, 4), loss=F.cross_entropy),
    )
    assert "'empty.weight', 'empty.bias'" in message
    assert "has no elements" in message


def test_a_detached_weight() -> None:
    message = raised(UnreachedParameterError, lambda: compiled(Detached()))
    assert message.startswith("no site reaches the trainable parameter(s) 'first.weight': it is detached, or ")


class StraightThrough(Base):
    def forward(self, x: Tensor) -> Any:
        weight = self.first.weight
        return self.head(F.linear(x, weight + (weight.sign() - weight).detach(), self.first.bias))


def test_a_straight_through_weight_trains() -> None:
    model = StraightThrough()
    compiled(model).step(batch(), LABELS)
    assert model.first.weight.grad is not None
    assert model.first.weight.grad.any()


class Threshold(Base):
    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Any:
        return self.head((self.first(x) > self.threshold).float())


class ThresholdSubtracted(Threshold):
    def forward(self, x: Tensor) -> Any:
        return self.head(((self.first(x) - self.threshold) > 0).float())


def test_comparison_with_a_parameter() -> None:
    message = raised(UnsupportedModelError, lambda: compiled(Threshold()))
    assert message.startswith("aten.gt in the model's own forward (")
    assert "return self.head((self.first(x) > self.threshold).float())" in message
    assert "`(x - threshold) > 0` instead of `x > threshold`" in message
    model = ThresholdSubtracted()  # what the message asks for works
    compiled(model, sigma=1.0).step(batch(), LABELS)
    assert model.threshold.grad is not None


class SoftmaxOverSamples(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.first(x).softmax(0))


class CentredOverSamples(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        return self.head(h - h.mean(0))


@pytest.mark.parametrize(
    ("model", "operation", "code"),
    [
        (SoftmaxOverSamples, "aten.softmax", "return self.head(self.first(x).softmax(0))"),
        (CentredOverSamples, "aten.mean", "return self.head(h - h.mean(0))"),
    ],
)
@pytest.mark.parametrize("samples", [1, N])
def test_a_model_that_mixes_samples(model: type[nn.Module], operation: str, code: str, samples: int) -> None:
    message = raised(UnsupportedModelError, lambda: compiled(model(), EXAMPLE[:samples]))
    assert message.startswith(f"{operation} in the model's own forward (")
    assert code in message
    assert 'Use LikelihoodRatio(credit="batch")' in message
    network = model()
    compiled(network, credit="batch", loss=lambda o, y: F.cross_entropy(o, y)).step(batch(), LABELS)
    assert all(parameter.grad is not None for parameter in network.parameters())


class Branches(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        if h.sum() > 0:
            h = h * 2
        return self.head(h)


class FixesBatch(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.first(x).view(4, 5))


class Calls(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.missing(x))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (Branches, ["test_errors.py", "if h.sum() > 0:", "use torch.where"]),
        (FixesBatch, ["test_errors.py", "self.first(x).view(4, 5)", "a batch size", "use x.shape[0]"]),
        (Calls, ["has no attribute 'missing'"]),
    ],
)
def test_export_fails(
    model: type[nn.Module], parts: list[str], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        message = raised(CaptureError, lambda: compiled(model()))
    assert message.startswith(
        f"{model.__name__} could not be captured with a dynamic batch size. Tried:\n  torch.export: "
    )
    for part in parts:
        assert part in message
    assert "TORCH_LOGS" not in message
    out, err = capfd.readouterr()
    assert (out, err, caplog.messages) == ("", "", [])  # torch's own debugging output is kept from the user


class Item(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.first(x) * x.max().item())


class Nonzero(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.first(x))[x[:, 0].nonzero()[:, 0]]


@pytest.mark.parametrize(("model", "operation"), [(Item, "aten.item"), (Nonzero, "aten.nonzero")])
def test_sizes_and_numbers_from_values(model: type[nn.Module], operation: str) -> None:
    message = raised(UnsupportedModelError, lambda: compiled(model()))
    assert message.startswith(f"{operation} in the model's own forward (")
    assert "Keep it a tensor" in message


class WritesInput(Base):
    def forward(self, x: Tensor) -> Any:
        x.mul_(2)
        return self.head(self.first(x))


def test_a_model_that_writes_into_its_input() -> None:
    example = batch()
    message = raised(UnsupportedModelError, lambda: compiled(WritesInput(), example))
    assert message.startswith("the model writes into 'x'")
    assert message.endswith("Clone it before writing.")
    assert torch.equal(example, batch())


class Doubled(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        return self.head(torch.cat([h, h[:1]]))[:-1]


def test_a_batch_that_grows_inside() -> None:
    message = raised(UnsupportedModelError, lambda: compiled(Doubled()))
    assert message.startswith("aten.cat in the model's own forward (")
    message = raised(UnsupportedModelError, lambda: compiled(Doubled(), credit="batch"))
    assert message.startswith("aten.linear in module 'head' (")
    assert "Keep the batch in one dimension where parameters are used." in message


class DrawsIntegers(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.first(x) + torch.randint(0, 2, x.shape))


def test_random_numbers_that_cannot_be_repeated() -> None:
    message = raised(UnsupportedModelError, lambda: compiled(DrawsIntegers()))
    assert message.startswith("aten.randint in the model's own forward (")
    assert "Supported: dropout, " in message


# ---- a step: nothing changes


class WithBuffers(nn.Module):
    """Batch normalisation and dropout: running statistics that a failing step must not move."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop, self.head = (
            nn.Linear(5, 4),
            nn.BatchNorm1d(4),
            nn.Dropout(0.2),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Any:
        return self.head(self.drop(self.norm(self.first(x)).relu()))


@functools.cache
def compiled_once(**settings: Any) -> CompiledModel:
    return compiled(WithBuffers(), **settings).compiled


def with_buffers(loss: Any = F.cross_entropy, **settings: Any) -> onward.Program:
    """A program of a new model; models with the same settings share what was compiled."""
    return onward.Program(WithBuffers(), compiled_once(**settings), loss, seed=0)


def snapshot(program: onward.Program) -> dict[str, Any]:
    state: dict[str, Any] = {f"state {name}": value.clone() for name, value in program.model.state_dict().items()}
    for name, parameter in program.model.named_parameters():
        state[f"grad {name}"] = None if parameter.grad is None else parameter.grad.clone()
    return {**state, **program.state_dict()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else bool(x == y)

    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


@contextlib.contextmanager
def untouched(program: onward.Program) -> Iterator[None]:
    """Inside something fails: everything is bitwise as before, and the next step is that of an undisturbed program."""
    program.step(batch(), LABELS)  # some .grad to be damaged, and step 1 ahead
    model = copy.deepcopy(program.model)
    for name, parameter in program.model.named_parameters():
        model.get_parameter(name).grad = None if parameter.grad is None else parameter.grad.clone()
    beside = onward.Program(model, program.compiled, F.cross_entropy, program.seed)
    beside.load_state_dict(program.state_dict())
    before = snapshot(program)
    yield
    assert same(before, snapshot(program))
    program.step(batch(), LABELS)
    beside.step(batch(), LABELS)
    assert same(snapshot(beside), snapshot(program))


class Switched:
    """Cross entropy, until `then` is set: then that is called with the losses, in the call numbered `when`."""

    def __init__(self) -> None:
        self.then: Callable[[Tensor], Any] | None = None
        self.when = self.calls = self.calls_a_step = 0

    def __call__(self, output: Tensor, target: Tensor) -> Any:
        losses = F.cross_entropy(output, target, reduction="none")
        self.calls += 1
        if self.then is not None and self.calls - 1 == self.when:
            return self.then(losses)
        return losses

    def arm(self, then: Callable[[Tensor], Any] | None, when: int = 0) -> None:
        self.calls_a_step = self.calls_a_step or self.calls
        self.then, self.when, self.calls = then, when, 0


SETTINGS = [
    {"groups": "layerwise"},
    {"groups": "joint", "chunk": 2},
    {"groups": "joint", "noise": "gaussian", "score": "sign", "capture": "sign"},
]


def spoiled(position: int, value: float) -> Callable[[Tensor], Tensor]:
    def spoil(losses: Tensor) -> Tensor:
        losses = losses.clone()
        losses[position] = value
        return losses

    return spoil


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_loss(settings: dict[str, Any], value: float) -> None:
    loss = Switched()
    program = with_buffers(loss, **settings)
    with untouched(program):
        loss.arm(spoiled(2, value))
        message = raised(NonFiniteLossError, lambda: program.step(batch(), LABELS))
        assert message.startswith(f"the loss of sample 2 is {value} before any noise was added.")
        assert "Gradients, buffers and weights are as before the step." in message
        for when in range(1, loss.calls_a_step):  # in the first perturbed run, and in the last
            loss.arm(spoiled(N + 3, value), when)
            message = raised(NonFiniteLossError, lambda: program.step(batch(), LABELS))
            assert message.startswith("the loss of copy ")
            assert f", sample 3 is {value} with noise at " in message
            assert "A smaller sigma may help." in message
        loss.arm(None)


def test_non_finite_loss_says_which_copy() -> None:
    loss = Switched()
    program = compiled(small(), loss=loss, groups="joint", copies=6, chunk=2)
    for chunk, row, copy_id in ((0, 0, 0), (0, 1, ~0), (2, 0, 2), (2, 1, ~2)):
        loss.arm(spoiled(row * N + 3, float("nan")), when=1 + chunk)
        message = raised(NonFiniteLossError, lambda: program.step(batch(), LABELS))
        assert message.startswith(f"the loss of copy {copy_id}, sample 3 is nan with noise at 0, 2.")


def test_non_finite_loss_of_a_batch() -> None:
    values = iter([1.0, 1.0, float("nan"), 1.0, 1.0])
    program = compiled(small(), loss=lambda o, y: next(values), credit="batch", groups="joint")
    assert raised(NonFiniteLossError, lambda: program.step(batch(), LABELS)).startswith(
        "the loss of copy 1 is nan with"
    )


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("when", [0, 1])
def test_loss_of_the_wrong_shape(settings: dict[str, Any], when: int) -> None:
    loss = Switched()
    program = with_buffers(loss, **settings)
    with untouched(program):
        for then, shape in ((lambda losses: losses.mean(), "()"), (lambda losses: losses[:-1], "")):
            loss.arm(then, when)
            assert f"returned shape {shape}" in raised(LossShapeError, lambda: program.step(batch(), LABELS))
        loss.arm(None)


class BoomError(Exception):
    pass


def throw(error: BaseException) -> Callable[[Tensor], Any]:
    def then(losses: Tensor) -> Any:
        raise error

    return then


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "error", [BoomError("mine"), KeyboardInterrupt(), SystemExit(3), RuntimeError("mine")], ids=repr
)
@pytest.mark.parametrize("when", [0, 1])
def test_an_exception_inside_the_loss_comes_out_as_it_is(
    settings: dict[str, Any], error: BaseException, when: int
) -> None:
    loss = Switched()
    program = with_buffers(loss, **settings)
    with untouched(program):
        loss.arm(throw(error), when)
        with pytest.raises(type(error)) as caught:
            program.step(batch(), LABELS)
        assert caught.value is error
        loss.arm(None)


@pytest.mark.parametrize(
    ("inputs", "target", "message"),
    [
        (torch.zeros(0, 5), LABELS[:0], "the batch is empty: a step needs at least one sample."),
        (torch.zeros(N, 6), LABELS, "input 0 has shape (4, 6); the program was compiled for (N, 5)."),
        (torch.zeros(N, 5, 1), LABELS, "input 0 has shape (4, 5, 1); the program was compiled for (N, 5)."),
        (torch.zeros(5), LABELS, "input 0 has shape (5,); the program was compiled for (N, 5)."),
        (
            torch.zeros(N, 5).double(),
            LABELS,
            "input 0 has dtype torch.float64; the example has torch.float32. Convert it with .to(torch.float32).",
        ),
        (torch.zeros(N, 5, dtype=torch.int64), LABELS, "input 0 has dtype torch.int64; the example has torch.float32."),
        (torch.zeros(N, 5, device="meta"), LABELS, "input 0 is on meta; the program was compiled on cpu."),
        (np.zeros((N, 5), np.float32), LABELS, "input 0 is ndarray; the example has a tensor there."),
        ((EXAMPLE, EXAMPLE), LABELS, "the inputs have another structure than the example: expected (*,), got (*, *)."),
        (
            {"input": EXAMPLE},
            LABELS,
            "the inputs have another structure than the example: expected (*,), got {'input': *}.",
        ),
        ((), LABELS, "the inputs have another structure than the example: expected (*,), got ()."),
        (EXAMPLE, LABELS[:3], "the target's first dimension is 3 but the batch has 4 samples."),
        (EXAMPLE, torch.zeros(5, 4), "the target's first dimension is 5 but the batch has 4 samples."),
    ],
)
def test_batches_that_do_not_fit(inputs: Any, target: Any, message: str) -> None:
    program = with_buffers()
    with untouched(program):
        assert raised(BatchError, lambda: program.step(inputs, target)).startswith(message)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, more: Tensor, table: Tensor) -> Any:
        return self.head(x + more @ table)


def test_several_inputs_that_do_not_agree() -> None:
    program = compiled(TwoInputs(), (EXAMPLE, torch.zeros(N, 2), torch.zeros(2, 5)))
    wrong = (EXAMPLE, torch.zeros(3, 2), torch.zeros(2, 5))
    message = raised(BatchError, lambda: program.step(wrong, LABELS))
    assert message == "input 1 holds 3 samples, the inputs before it 4."
    message = raised(BatchError, lambda: program.step((EXAMPLE, torch.zeros(N, 2), torch.zeros(3, 5)), LABELS))
    assert message == "input 2 has shape (3, 5); the program was compiled for (2, 5)."


# ---- a model that is no longer what was compiled


def freeze(model: WithBuffers) -> None:
    model.head.bias.requires_grad_(False)


def replace(model: WithBuffers) -> None:
    model.head = nn.Linear(4, 7)


def convert(model: WithBuffers) -> None:
    model.double()


def remove(model: WithBuffers) -> None:
    model.head.register_parameter("bias", None)


def add(model: WithBuffers) -> None:
    model.extra = nn.Parameter(torch.zeros(3))


def remove_module(model: WithBuffers) -> None:
    del model.drop


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            nn.Module.eval,
            "module 'WithBuffers' is in eval mode; the program was compiled in train mode, which its graph holds. Call "
            ".train() on it before step, or compile again.",
        ),
        (lambda model: model.norm.eval(), "module 'norm' is in eval mode; the program was compiled in train mode"),
        (freeze, "the parameter 'head.bias' was frozen after the program was compiled. Compile again."),
        (
            replace,
            "the parameter 'head.weight' was changed from (3, 4) torch.float32 on cpu to (7, 4) torch.float32 on cpu "
            "after the program was compiled.",
        ),
        (
            convert,
            "the parameter 'first.weight' was changed from (4, 5) torch.float32 on cpu to (4, 5) torch.float64",
        ),
        (remove, "the parameter 'head.bias' was removed after the program was compiled."),
        (add, "the parameter 'extra' was added after the program was compiled."),
        (remove_module, "the module 'drop' was removed after the program was compiled. Compile again."),
    ],
)
def test_a_changed_model(change: Callable[[Any], Any], message: str) -> None:
    program = with_buffers()
    change(program.model)
    before = snapshot(program)
    assert raised(ModeError, lambda: program.step(batch(), LABELS)).startswith(message)
    assert same(before, snapshot(program))


def test_a_model_unfrozen_or_untied() -> None:
    model = small()
    model[0].requires_grad_(False)
    program = compiled(model)
    model[0].weight.requires_grad_(True)
    message = raised(ModeError, lambda: program.step(batch(), LABELS))
    assert message == "the parameter '0.weight' was made trainable after the program was compiled. Compile again."

    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    program = compiled(model)
    model[2].weight = nn.Parameter(torch.zeros(5, 5))
    message = raised(ModeError, lambda: program.step(batch(), LABELS))
    assert message.startswith("the parameter '2.weight' was separated from '0.weight', to which it was tied, after")


def test_eval_and_back() -> None:
    program = with_buffers()
    model = program.model
    with untouched(program):
        model.eval()
        model(batch())
        raised(ModeError, lambda: program.step(batch(), LABELS))
        model.train()


def test_one_sample_has_no_batch_statistics() -> None:
    program = compiled(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)))
    with untouched(program):
        message = raised(BatchError, lambda: program.step(EXAMPLE[:1], LABELS[:1]))
    assert message.startswith("the batch has one sample, and ")
    pixels = compiled(nn.Sequential(nn.Unflatten(1, (1, 5)), nn.BatchNorm1d(1), nn.Flatten()))
    pixels.step(EXAMPLE[:1], LABELS[:1])  # five values a channel


def test_a_model_that_does_not_run_on_the_example() -> None:
    message = raised(CaptureError, lambda: compiled(nn.Linear(6, 3)))
    assert message.startswith("Linear does not run on the example: mat1 and mat2 shapes cannot be")


@pytest.mark.parametrize("settings", [{"reach": 1}, {"correction": "full"}, {"probe": 0.5}])
def test_options_of_feedback_without_feedback(settings: dict[str, Any]) -> None:
    message = raised(OptionError, lambda: LikelihoodRatio(**settings))
    assert message.endswith('is an option of feedback="learned", and feedback is "none".')
