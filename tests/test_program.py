"""`Program.step` as a user of torch expects it: ``.grad``, buffers, counters, batch sizes, interruption, memory."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward import LikelihoodRatio
from onward.passes.errors import CheckpointError

N = 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(self.first(x)).relu())


def make_program(model: nn.Module | None = None, seed: int = 0, **settings: Any) -> onward.Program:
    estimator = LikelihoodRatio(**{"copies": 4, **settings})
    return onward.compile(model or Net(), torch.zeros(N, 5), loss=F.cross_entropy, estimator=estimator, seed=seed)


def batch(samples: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 5, generator=generator), torch.randint(0, 3, (samples,), generator=generator)


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(mine: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.fixture(scope="module")
def compiled() -> Any:
    return make_program().compiled


def fresh(compiled: Any, seed: int = 0) -> onward.Program:
    return onward.Program(Net(), compiled, F.cross_entropy, seed)


def test_gradients_accumulate_as_torchs_do(compiled: Any) -> None:
    program = fresh(compiled)
    program.step(*batch())
    first = grads(program.model)
    program.model.zero_grad()
    program.step(*batch())
    second = grads(program.model)
    assert not torch.equal(first["head.weight"], second["head.weight"])  # another step, other noise

    again = fresh(compiled)
    again.step(*batch())
    again.step(*batch())
    assert equal(grads(again.model), {name: first[name] + second[name] for name in first})
    for parameter in again.model.parameters():
        assert parameter.grad is not None
        assert (parameter.grad.shape, parameter.grad.dtype) == (parameter.shape, parameter.dtype)
        assert parameter.grad.is_leaf
        assert not parameter.grad.requires_grad


def test_gradients_are_not_views_of_what_a_later_step_writes(compiled: Any) -> None:
    program = fresh(compiled)
    program.step(*batch())
    kept = {name: p.grad for name, p in program.model.named_parameters() if p.grad is not None}
    values = grads(program.model)
    program.model.zero_grad(set_to_none=True)
    program.step(*batch(seed=1))
    assert equal(kept, values)


@pytest.mark.parametrize("samples", [2, 3, N, 17])
def test_any_batch_size(compiled: Any, samples: int) -> None:
    """A program compiled for N samples and one compiled for this many give the same step."""
    program = fresh(compiled)
    mean = program.step(*batch(samples))
    example = batch(samples, seed=9)[0]
    other = onward.compile(Net(), example, loss=F.cross_entropy, estimator=program.compiled.estimator)
    assert torch.equal(mean, other.step(*batch(samples)))
    assert equal(grads(program.model), grads(other.model))


def test_the_loss_returned_and_the_buffers_are_those_of_one_clean_forward(compiled: Any) -> None:
    program, beside = fresh(compiled), Net()
    inputs, target = batch()
    expected = F.cross_entropy(beside(inputs), target)
    loss = program.step(inputs, target)
    assert loss.shape == ()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    for name, value in beside.named_buffers():  # running statistics moved once, whatever the number of copies
        assert torch.equal(program.model.get_buffer(name), value)


def test_the_model_stays_the_users(compiled: Any) -> None:
    program = fresh(compiled)
    parameters = dict(program.model.named_parameters())
    before = copy.deepcopy(program.model.state_dict())
    program.step(*batch())
    after = program.model.state_dict()
    assert list(before) == list(after)
    for name, parameter in program.model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(before[name], after[name])  # step itself moves no weight
    torch.optim.SGD(program.model.parameters(), lr=0.1, momentum=0.9).step()
    assert not torch.equal(before["head.weight"], program.model.state_dict()["head.weight"])
    program.model.eval()
    program.model(batch()[0]).sum().backward()  # and autograd still works on it


def test_inputs_are_only_read(compiled: Any) -> None:
    inputs, target = batch()
    inputs.requires_grad_()
    strided = torch.randn(N, 10)[:, ::2]
    strided.copy_(inputs.detach())
    program, other = fresh(compiled), fresh(compiled)
    program.step(inputs, target)
    assert inputs.grad is None
    assert torch.equal(inputs.detach(), batch()[0])
    assert torch.equal(target, batch()[1])
    other.step(strided, target.repeat_interleave(2)[::2])
    assert equal(grads(program.model), grads(other.model))


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_grad_modes(compiled: Any, context: Any) -> None:
    program, other = fresh(compiled), fresh(compiled)
    program.step(*batch())
    with context():
        other.step(*batch())
    assert equal(grads(program.model), grads(other.model))
    torch.optim.Adam(other.model.parameters()).step()
    other.step(*batch())  # adds to what is there


def test_the_global_generator_is_left_alone(compiled: Any) -> None:
    program = fresh(compiled)
    state = torch.get_rng_state()
    program.step(*batch())
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_parameters_get_no_gradient() -> None:
    model = Net()
    model.first.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    make_program(model).step(*batch())
    assert set(grads(model)) == {"norm.weight", "head.weight", "head.bias"}


def test_a_replaced_parameter_of_the_same_form_is_trained(compiled: Any) -> None:
    program, other = fresh(compiled), fresh(compiled)
    head = program.model.get_submodule("head")
    old = head.get_parameter("weight")
    head.weight = nn.Parameter(old.detach().clone())
    program.step(*batch())
    other.step(*batch())
    assert old.grad is None
    assert equal(grads(program.model), grads(other.model))


def test_seed_and_state(compiled: Any) -> None:
    program, other = fresh(compiled, seed=0), fresh(compiled, seed=1)
    program.step(*batch())
    other.step(*batch())
    assert not torch.equal(grads(program.model)["head.weight"], grads(other.model)["head.weight"])
    assert program.step_count == 1
    assert program.clean_forwards == N
    assert program.forwards == pytest.approx(N * 4 * sum(run.share for run in compiled.runs))

    resumed = fresh(compiled, seed=7)
    resumed.model.load_state_dict(program.model.state_dict())
    resumed.load_state_dict(program.state_dict())
    program.model.zero_grad()
    program.step(*batch(seed=1))
    resumed.step(*batch(seed=1))
    assert equal(grads(program.model), grads(resumed.model))
    assert program.state_dict() == resumed.state_dict()
    with pytest.raises(CheckpointError, match="the program's state lacks 'estimator'"):
        resumed.load_state_dict({"seed": 0})
    with pytest.raises(CheckpointError, match="an estimator that cannot be read"):
        resumed.load_state_dict({"estimator": "{", "seed": 0})


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_extreme_seeds(compiled: Any, seed: int) -> None:
    assert torch.isfinite(fresh(compiled, seed).step(*batch()))


def test_interrupted_by_the_signal_itself(compiled: Any) -> None:
    """SIGINT while the loss runs: KeyboardInterrupt, nothing written, and the next step is an undisturbed one's."""
    interrupt = False

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if interrupt:
            os.kill(os.getpid(), signal.SIGINT)
        return F.cross_entropy(output, target, reduction="none")

    program, other = onward.Program(Net(), compiled, loss, 0), fresh(compiled)
    before = copy.deepcopy(program.model.state_dict())
    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        program.step(*batch())
    interrupt = False
    assert grads(program.model) == {}
    assert program.step_count == 0
    assert equal(before, program.model.state_dict())
    program.step(*batch())
    other.step(*batch())
    assert equal(grads(program.model), grads(other.model))
    assert equal(program.model.state_dict(), other.model.state_dict())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS and /proc")
@pytest.mark.parametrize("settings", ["groups='joint', capture='sign', score='sign', noise='gaussian'"])
def test_out_of_memory_suggests_a_chunk_that_fits(settings: str) -> None:
    """With room for about 35 of 160 copies; the suggested chunk then works under the same limit."""
    script = f"""
        import re, resource, torch, onward
        from torch import nn
        torch.set_num_threads(1)
        model = nn.Sequential(nn.Linear(16, 4096), nn.ReLU(), nn.Linear(4096, 10))
        inputs, target = torch.randn(256, 16), torch.randint(0, 10, (256,))

        def make(chunk):
            estimator = onward.LikelihoodRatio(copies=160, chunk=chunk, {settings})
            return onward.compile(model, inputs, loss=torch.nn.functional.cross_entropy, estimator=estimator)

        make(2)  # imports everything that compiling needs
        program = make(None)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        before = [parameter.grad.clone() for parameter in model.parameters()]
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
        try:
            program.step(inputs, target)
        except onward.errors.OutOfMemoryError as error:
            print(error)
            chunk = int(re.search(r"chunk=([0-9]+) fits", str(error))[1])
            assert isinstance(error, MemoryError)
        assert all(map(torch.equal, before, [parameter.grad for parameter in model.parameters()]))
        assert program.step_count == 0
        make(chunk).step(inputs, target)
        print("chunk", chunk)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    message, chunk = done.stdout.splitlines()
    assert message.startswith("a step of 256 samples ran out of memory with 160 copies side by side: it takes about ")
    assert message.endswith("Gradients, buffers and weights are as before the step.")
    assert 4 <= int(chunk.split()[1]) <= 40


def test_a_saved_state_is_refused_by_another_estimator() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    programs = [
        onward.compile(model, x, loss=F.mse_loss, estimator=onward.LikelihoodRatio(copies=copies, chunk=chunk))
        for copies, chunk in ((4, None), (8, None), (4, 2))
    ]
    state = programs[0].state_dict()
    with pytest.raises(onward.errors.CheckpointError, match="copies=4, now 8"):
        programs[1].load_state_dict(state)
    programs[2].load_state_dict(state)  # a chunk does not change the noise
