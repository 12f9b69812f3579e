"""The methods of others against their papers: formulas by hand, unbiasedness against autograd, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import onward
from onward import models
from onward.evidence.baselines.backpropagation import Backpropagation
from onward.evidence.baselines.direct_feedback_alignment import DirectFeedbackAlignment
from onward.evidence.baselines.fdfa import ForwardDirectFeedbackAlignment
from onward.evidence.baselines.forward_gradient import ActivityForwardGradient, WeightForwardGradient
from onward.evidence.baselines.mezo import MeZO
from onward.evidence.methods import METHODS, pulled_back
from onward.passes.errors import CheckpointError, LossShapeError, OptionError

CLASSES = (
    DirectFeedbackAlignment,
    ForwardDirectFeedbackAlignment,
    MeZO,
    WeightForwardGradient,
    ActivityForwardGradient,
)
SAMPLES, FEATURES, WIDTH, OUTPUTS = 8, 5, 6, 3


def make_net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, OUTPUTS)
    ).to(dtype)


def make_batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=dtype)
    return inputs, torch.randint(0, OUTPUTS, (SAMPLES,), generator=generator)


def flat_gradient(model: nn.Module) -> torch.Tensor:
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    for parameter in model.parameters():
        parameter.grad = None
    return gradient


def exact_gradient(model: nn.Module, inputs, target) -> torch.Tensor:
    F.cross_entropy(model(inputs), target).backward()
    return flat_gradient(model)


def make(kind, model, inputs, seed: int = 0, **settings):
    return kind(model, inputs, F.cross_entropy, seed, **settings)


# --- against the papers' formulas -------------------------------------------------------------------------------------


def test_dfa_is_the_papers_formula():
    """δa = (B e) ⊙ f'(a), δW = δa hᵀ, by hand (Nøkland, equation 7); the last layer gets e."""
    model, (inputs, target) = make_net(), make_batch()
    program = make(DirectFeedbackAlignment, model, inputs, seed=3)
    program.step(inputs, target)
    first, second, last = model[0], model[2], model[4]
    with torch.no_grad():
        h1 = torch.tanh(first(inputs))
        h2 = torch.tanh(second(h1))
        output = last(h2)
        error = (output.softmax(1) - F.one_hot(target, OUTPUTS)) / SAMPLES
        # what arrives where the second and the last layer read is the feedback of the layers before them
        delta1 = (error @ program.learned()["2"]) * (1 - h1**2)
        delta2 = (error @ program.learned()["4"]) * (1 - h2**2)
    for layer, delta, read in ((first, delta1, inputs), (second, delta2, h1), (last, error, h2)):
        torch.testing.assert_close(layer.weight.grad, delta.T @ read, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(layer.bias.grad, delta.sum(0), rtol=1e-6, atol=1e-9)


def test_dfa_feedback_is_fixed_random_and_of_the_seed():
    model, (inputs, target) = make_net(), make_batch()
    program = make(DirectFeedbackAlignment, model, inputs, seed=3)
    before = {name: matrix.clone() for name, matrix in program.learned().items()}
    assert {name: tuple(matrix.shape) for name, matrix in before.items()} == {"2": (3, 6), "4": (3, 6)}
    assert all(float(matrix.abs().max()) <= 1 / math.sqrt(OUTPUTS) for matrix in before.values())
    program.step(inputs, target)
    for name, matrix in program.learned().items():
        assert torch.equal(matrix, before[name])
        assert torch.equal(matrix, make(DirectFeedbackAlignment, model, inputs, seed=3).learned()[name])
        assert not torch.equal(matrix, make(DirectFeedbackAlignment, model, inputs, seed=4).learned()[name])


@pytest.mark.parametrize("kind", [DirectFeedbackAlignment, ForwardDirectFeedbackAlignment])
def test_with_the_true_feedback_a_linear_net_has_the_exact_gradient(kind):
    """In a linear net the Jacobian is one for all samples: with it as feedback, DFA and FDFA are backpropagation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUTPUTS)).double()
    inputs, target = make_batch()
    program = make(kind, model, inputs)
    program.feedback = {1: (model[2].weight @ model[1].weight).detach(), 2: model[2].weight.detach().clone()}
    program.step(inputs, target)
    torch.testing.assert_close(flat_gradient(model), exact_gradient(model, inputs, target))


def test_layers_include_normalisation_and_pooling():
    """Behind a convolution come normalisation, activation and pooling: B e arrives behind them, their vjp is taken."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )
    inputs, target = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    program = make(DirectFeedbackAlignment, model, inputs)
    before = model[1].running_mean.clone()
    program.step(inputs, target)
    assert not torch.equal(model[1].running_mean, before)
    got = flat_gradient(model)
    hidden = model[4](model[:4](inputs))
    output = model[5](hidden.detach())
    (error,) = torch.autograd.grad(F.cross_entropy(output, target), output, retain_graph=True)
    arriving = error @ program.learned()["5"]
    expected = torch.autograd.grad([hidden, output], list(model.parameters()), [arriving, error])
    torch.testing.assert_close(got, torch.cat([part.flatten() for part in expected]))


def test_fdfa_feedback_converges_to_the_jacobian_of_a_linear_net():
    """B is an exponential average of d uᵀ over the batch, whose mean is J: an entry of one sample's d uᵀ, both Gaussian
    with d = Σ J u, has variance ‖J_o‖² + J_oi², ‖J_o‖² over all that is moved. The average over steps with share α
    divides it by N (2 - α) / α. Largest of 36 z-scores below 4.5: wrongly above with probability 2.5e-4; without the
    momentum's bias, (1 - α)^steps = 5e-6. An error of a tenth of the largest entry would stand at z = 9 or more.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUTPUTS)).double()
    inputs, target = (tensor.repeat(128, *[1] * (tensor.dim() - 1)) for tensor in make_batch())
    alpha, steps = 0.02, 600
    program = make(ForwardDirectFeedbackAlignment, model, inputs, seed=1, alpha=alpha)
    for _ in range(steps):
        program.step(inputs, target)
        model.zero_grad()
    jacobians = {"1": (model[2].weight @ model[1].weight).detach(), "2": model[2].weight.detach()}
    length = sum(jacobian.square().sum(1, keepdim=True) for jacobian in jacobians.values())
    largest = 0.0
    for name, jacobian in jacobians.items():
        error = ((length + jacobian.square()) * alpha / ((2 - alpha) * len(inputs))).sqrt()
        z = (program.learned()[name] - jacobian) / error
        largest = max(largest, float(z.abs().max()))
        assert float(0.1 * jacobian.abs().max() / error.max()) > 9
    assert largest < 4.5


def test_fdfa_first_step_learns_but_moves_only_the_last_layer():
    model, (inputs, target) = make_net(), make_batch()
    program = make(ForwardDirectFeedbackAlignment, model, inputs)
    program.step(inputs, target)
    assert not model[0].weight.grad.any()
    assert not model[2].weight.grad.any()
    assert model[4].weight.grad.any()
    assert all(matrix.any() for matrix in program.learned().values())


# --- unbiased ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (MeZO, {"pairs": 2, "epsilon": 1e-4}),
        (WeightForwardGradient, {"directions": 2}),
        (ActivityForwardGradient, {"directions": 2}),
    ],
)
def test_estimates_are_unbiased(kind, settings):
    """The mean of n estimates along the true gradient, in its own length: 1, within 5 standard errors of that mean.

    Wrongly outside with probability 6e-7. The standard error is asserted to be below 0.1, so that an estimate that is
    twice or not at all the gradient is ten standard errors away and five from the bound. All coordinates together: the
    mean's squared distance to the gradient is, if unbiased, the sum of the coordinates' variances over n, with a
    standard deviation of at most sqrt(2) of it; asserted within a factor of 3.
    """
    model, (inputs, target) = make_net(), make_batch()
    truth = exact_gradient(model, inputs, target)
    program = make(kind, model, inputs, seed=2, **settings)
    estimates = []
    for _ in range(400):
        program.step(inputs, target)
        estimates.append(flat_gradient(model))
    found = torch.stack(estimates)
    along = found @ truth / truth.square().sum()
    error = float(along.std() / math.sqrt(len(along)))
    assert error < 0.1
    assert abs(float(along.mean()) - 1) < 5 * error
    distance = float((found.mean(0) - truth).square().sum())
    assert distance < 3 * float(found.var(0).sum()) / len(found)


def test_one_weight_direction_is_the_slope_times_the_direction():
    model, (inputs, target) = make_net(), make_batch()
    truth = exact_gradient(model, inputs, target)
    program = make(WeightForwardGradient, model, inputs)
    program.step(inputs, target)
    estimate = flat_gradient(model)
    # g = (∇ℓ·v) v: its length squared is (∇ℓ·v)² ‖v‖² and its product with ∇ℓ is (∇ℓ·v)², so v is known from g
    slope = (estimate @ truth).sqrt()
    direction = estimate / slope
    torch.testing.assert_close((direction @ truth).abs(), slope)


def test_mezo_is_the_central_difference_and_leaves_the_weights_to_the_bit():
    model, (inputs, target) = make_net(dtype=torch.float32), make_batch(torch.float32)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    program = make(MeZO, model, inputs, pairs=3, epsilon=0.1)
    program.step(inputs, target)
    assert all(torch.equal(parameter, kept) for parameter, kept in zip(model.parameters(), before, strict=True))
    other = make(MeZO, model, inputs, pairs=1, epsilon=0.1)
    generator = other.generator("pair 0")
    z = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    losses = []
    for sign in (1, -1):
        moved = {name: p + sign * 0.1 * part for (name, p), part in zip(model.named_parameters(), z, strict=True)}
        losses.append(F.cross_entropy(torch.func.functional_call(model, moved, inputs), target))
    model.zero_grad()
    other.step(inputs, target)
    slope = (losses[0] - losses[1]) / 0.2
    torch.testing.assert_close(
        flat_gradient(model), torch.cat([(slope * part).flatten() for part in z]), rtol=1e-3, atol=1e-6
    )


def test_mezo_restores_the_weights_when_the_loss_fails():
    model, (inputs, target) = make_net(), make_batch()
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def fails(output, target):
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        MeZO(model, inputs, fails, 0).step(inputs, target)
    assert all(torch.equal(parameter, kept) for parameter, kept in zip(model.parameters(), before, strict=True))


def test_mezo_needs_no_derivative_of_model_or_loss():
    model = models.sign_mlp(in_features=FEATURES, hidden=(8,), num_classes=OUTPUTS)
    inputs, target = make_batch(torch.float32)
    program = MeZO(model, inputs, lambda output, target: (output.argmax(1) != target).numpy(), 0, epsilon=0.5)
    program.step(inputs, target)
    assert model.fc1.weight.grad is not None


# --- as programs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_counts_of_forwards(kind):
    model, (inputs, target) = make_net(), make_batch()
    program = make(kind, model, inputs)
    program.step(inputs, target)
    expected = {DirectFeedbackAlignment: (0, SAMPLES), MeZO: (2 * SAMPLES, 0)}.get(kind, (SAMPLES, SAMPLES))
    assert (program.forwards, program.clean_forwards) == expected
    if kind is MeZO:
        program = make(kind, model, inputs, pairs=5)
        expected = (10 * SAMPLES, 0)
    elif kind in (WeightForwardGradient, ActivityForwardGradient):
        program = make(kind, model, inputs, directions=5)
        expected = (5 * SAMPLES, 5 * SAMPLES)
    program.forwards = program.clean_forwards = 0.0
    program.step(inputs, target)
    assert (program.forwards, program.clean_forwards) == expected


@pytest.mark.parametrize("kind", CLASSES)
def test_a_step_follows_from_seed_and_step_and_goes_on_from_a_checkpoint(kind, tmp_path):
    """Two runs with the same seed have the same bits whatever the global generator does, dropout included; a run that
    is stopped after one of two epochs and resumed by the trainer ends with the same bits."""

    def net():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Dropout(0.3), nn.Linear(WIDTH, OUTPUTS))

    inputs, target = make_batch(torch.float32)
    loader = [(inputs[:4], target[:4]), (inputs[4:], target[4:])]

    def train(name, epochs, resume=False, disturb=0, seed=7):
        model = net()
        program = make(kind, model, inputs, seed=seed)
        torch.manual_seed(disturb)
        trainer = onward.Trainer(
            program, torch.optim.Adam(model.parameters(), lr=0.01), directory=tmp_path / name, progress=False
        )
        trainer.fit(loader, epochs, resume=resume)
        return [parameter.detach().clone() for parameter in model.parameters()], program

    whole, program = train("whole", 3)
    train("cut", 1, disturb=3)
    resumed, other = train("cut", 3, resume=True, disturb=9)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert other.step_count == program.step_count == 6
    assert other.forwards == program.forwards
    different, _ = train("other", 3, seed=8)
    assert not all(torch.equal(a, b) for a, b in zip(whole, different, strict=True))
    with pytest.raises(CheckpointError, match="lacks 'step_count'"):
        program.load_state_dict({"seed": 1})


@pytest.mark.parametrize("kind", CLASSES)
def test_leaves_the_global_generator_alone_and_adds_to_gradients(kind):
    model, (inputs, target) = make_net(), make_batch()
    twins = [make(kind, model, inputs, seed=4) for _ in range(2)]
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    twins[0].step(inputs, target)
    assert torch.equal(torch.random.get_rng_state(), before)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    twins[1].step(inputs, target)
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    assert twins[0].trust() == {}


@pytest.mark.parametrize("kind", [*CLASSES, Backpropagation])
def test_trains_a_tiny_problem(kind):
    """Two Gaussian classes at ±2 along a random direction in 5 dimensions (best possible accuracy 0.977): above 0.9."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(256) % 2
    axis = F.normalize(torch.randn(FEATURES, generator=generator), dim=0)
    inputs = torch.randn(256, FEATURES, generator=generator) + (4 * target[:, None] - 2) * axis
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 2))
    program = Backpropagation(model, F.cross_entropy, 0) if kind is Backpropagation else make(kind, model, inputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(200):
        rows = slice(32 * (step % 8), 32 * (step % 8) + 32)
        program.step(inputs[rows], target[rows])
        optimizer.step()
        optimizer.zero_grad()
    assert float((model(inputs).argmax(1) == target).float().mean()) > 0.9


def test_frozen_parameters_get_no_gradient():
    for kind in CLASSES:
        model, (inputs, target) = make_net(), make_batch()
        model[2].weight.requires_grad_(False)
        make(kind, model, inputs).step(inputs, target)
        assert model[2].weight.grad is None
        assert model[2].bias.grad is not None


def test_work_on_a_network_with_shortcuts():
    dataset = models.load("digits")
    inputs, target = (tensor[:8] for tensor in dataset.train.tensors)
    for kind in CLASSES:
        torch.manual_seed(0)
        model = models.build_for("resnet5", dataset, width=4)
        make(kind, model, inputs).step(inputs, target)
        assert all(parameter.grad is not None for parameter in model.parameters())


# --- refusals ---------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, OUTPUTS)

    def forward(self, x):
        return self.head(self.inner(self.inner(x)))


class OwnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.scale = nn.Linear(FEATURES, OUTPUTS), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.head(self.scale * x)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.spare = nn.Linear(FEATURES, OUTPUTS), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(FEATURES, OUTPUTS)

    def forward(self, x):
        return self.head(x), x


LAYERED = (DirectFeedbackAlignment, ForwardDirectFeedbackAlignment, ActivityForwardGradient)
SIGN = models.sign_mlp(in_features=FEATURES, hidden=(8,), num_classes=OUTPUTS)
STEP = models.mlp(in_features=FEATURES, hidden=(8,), num_classes=OUTPUTS, activation="step")


@pytest.mark.parametrize(
    ("kinds", "model", "message"),
    [
        (LAYERED, Twice(), r"'inner' \(Linear\) ran 2 times"),
        (LAYERED, OwnParameter(), r"no rule for the parameter 'scale' of the model itself \(OwnParameter\)"),
        (LAYERED, Tied(), "'first' and 'second' share 'weight'"),
        ((DirectFeedbackAlignment,), Unused(), r"'spare' \(Linear\) ran 0 times"),
        ((WeightForwardGradient,), Unused(), "none behind spare.weight, spare.bias"),
        ((DirectFeedbackAlignment,), nn.Flatten(), "found no layer in Flatten"),
        (CLASSES, Pair(), "one tensor of floating-point numbers as output, not tuple"),
        ((*LAYERED, WeightForwardGradient), SIGN, r"none behind fc1.weight, fc1.bias: .*\(sign\)"),
        ((*LAYERED, WeightForwardGradient), STEP, "none behind fc1.weight, fc1.bias"),
    ],
)
def test_models_that_cannot_work_are_named(kinds, model, message):
    inputs, _ = make_batch(torch.float32)
    for kind in kinds:
        with pytest.raises(OptionError, match=message):
            make(kind, model, inputs)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (MeZO, {"pairs": 0}, "pairs=0: MeZO needs a whole number"),
        (MeZO, {"epsilon": 0.0}, "epsilon=0.0: the size of the perturbation"),
        (WeightForwardGradient, {"directions": 0}, "directions=0"),
        (ActivityForwardGradient, {"directions": 1.5}, "directions=1.5"),
        (ForwardDirectFeedbackAlignment, {"alpha": 0.0}, "alpha=0.0: the share"),
        (ForwardDirectFeedbackAlignment, {"alpha": 1.5}, "alpha=1.5"),
    ],
)
def test_options_that_cannot_work(kind, settings, message):
    with pytest.raises(OptionError, match=message):
        make(kind, make_net(), make_batch()[0], **settings)


def test_a_loss_of_another_shape_is_refused():
    model, (inputs, target) = make_net(), make_batch()
    program = DirectFeedbackAlignment(model, inputs, lambda output, target: F.cross_entropy(output, target), 0)
    with pytest.raises(LossShapeError, match=r"shape \(\) for 8 samples"):
        program.step(inputs, target)


# --- the table of methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", METHODS)
def test_every_method_of_the_table_makes_a_step(key):
    model, (inputs, target) = make_net(dtype=torch.float32), make_batch(torch.float32)
    method = METHODS[key]
    program = method.build(model, inputs, F.cross_entropy, 0, {k: v[0] for k, v in method.settings.items()})
    assert math.isfinite(float(program.step(inputs, target)))
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert method.uncounted(program) >= 0
    assert all(len(values) == 2 for values in method.settings.values())


def test_what_auto_pulls_back_is_counted_by_its_operations():
    """Reach 1 in a net of three linear layers: the first gradient is pulled back through the second layer, the second
    through the third; the third's is exact. FLOPs a sample: 5·6 + 6·6 + 6·3 multiply-adds forward, 6·6 + 6·3 back."""
    model, (inputs, _) = make_net(dtype=torch.float32), make_batch(torch.float32)

    def of(key):
        return pulled_back(METHODS[key].build(model, inputs, F.cross_entropy, 0, {"copies": 2}))

    assert of("auto") == pytest.approx((36 + 18) / (30 + 36 + 18))
    assert of("auto-op") == 0
    one = onward.LikelihoodRatio.auto(segments=1)  # all three in one segment: backpropagation, whatever it is called
    program = onward.compile(model, inputs, loss=F.cross_entropy, estimator=one)
    assert pulled_back(program) == pytest.approx((36 + 18) / (30 + 36 + 18))


def test_backpropagation_is_refused_where_there_is_no_derivative():
    with pytest.raises(OptionError, match=r"backpropagation needs derivatives, and there is none behind fc1.weight"):
        METHODS["bp"].build(SIGN, make_batch(torch.float32)[0], F.cross_entropy, 0, {})
