"""Checkpoints on disk: every kind of value comes back to the bit; damage is seen; a foreign one is refused."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_run import StandIn, make_model

from onward.passes.errors import CheckpointError
from onward.runtime.training import checkpoint as checkpoints
from onward.runtime.training import random_state, run_state


def equal(a: Any, b: Any) -> bool:
    """Same types, same bits (NaN equals NaN)."""
    if isinstance(a, Tensor):
        same = isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
        raw = [x.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)] if same else []
        return same and torch.equal(*raw)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple | deque):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def test_every_kind_of_value_comes_back_to_the_bit(tmp_path: Path) -> None:
    base = torch.randn(6, 5)
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    tree = {
        "tensors": {str(dtype): (torch.randn(3, 4) * 3).abs().to(dtype) for dtype in dtypes},
        "odd": [torch.tensor(float("nan")), torch.empty(0, 3), torch.tensor([1e-45, -0.0]), torch.tensor(7)],
        "complex": (torch.randn(2, dtype=torch.complex64), torch.randn(2, dtype=torch.complex128).conj()),
        "shared": [base, base, base[1:3], base.t(), base[:, ::2]],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "numbers": [0.1, 1e300, float("inf"), float("nan"), -0.0, 2**80, True, None, "ü\n"],
        "keys": {0: "int", (1, "a"): 2.5, None: 3, "!": 4, "a.b": torch.ones(1)},
        "a.b": torch.zeros(1),
        "a": {"b": torch.full((1,), 2.0)},
        "containers": [(), (1, [2]), Counter({3: 2}), deque([1, 2], maxlen=5), {}],
        "others": [torch.float16, torch.device("cpu"), np.arange(4, dtype=np.uint32)],
    }
    checkpoints.write(tmp_path, 5, tree)
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert found.step == 5
    assert found.path == tmp_path / "step-000000005"
    assert equal(found.state, tree)
    assert found.state["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert type(found.state["containers"][2]) is Counter
    assert found.state["containers"][3].maxlen == 5
    assert sorted(p.name for p in found.path.iterdir()) == ["state.json", "state.safetensors"]
    assert "tensors.torch.float32" in load_file(found.path / "state.safetensors")


@pytest.mark.parametrize(
    ("value", "message"),
    [(lambda: 0, "'optimizer.hook'.*function"), (torch.eye(2).to_sparse(), "sparse"), ({1, 2}, "builtins.set")],
)
def test_what_cannot_be_stored_is_named(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoints.write(tmp_path, 1, {"optimizer": {"hook": value}})
    assert list(tmp_path.iterdir()) == []


def optimizers() -> dict[str, Any]:
    return {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
        "adamw": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), weight_decay=0.1),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.5),
        "rprop": lambda p: torch.optim.Rprop(p),
        "adafactor": lambda p: torch.optim.Adafactor(p),
        "nested": Nested,
    }


class Nested(torch.optim.Optimizer):
    """Keeps state of every kind, some in another dtype than its parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "window": (1, 2), "mode": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(
                        name="x", exact=p.double(), nested={"history": [0, (p.half(), None)]}, count=0, last=None
                    )
                state["count"] += 1
                state["exact"] -= group["lr"] * p.grad.double()
                state["nested"]["history"][0] += 0.5
                p.copy_(state["exact"])


@pytest.mark.parametrize("name", list(optimizers()))
def test_optimizer_state_round_trips_to_the_bit(tmp_path: Path, name: str) -> None:
    make = optimizers()[name]

    def fresh() -> tuple[StandIn, torch.optim.Optimizer]:
        program = StandIn(make_model())
        names = [n for n, _ in program.model.named_parameters()]
        groups = [[p for n, p in program.model.named_parameters() if n in part] for part in (names[:2], names[2:])]
        return program, make([{"params": group} for group in groups])

    def advance(program: StandIn, optimizer: torch.optim.Optimizer) -> None:
        batch = (
            torch.randn(4, 6, generator=torch.Generator().manual_seed(program.step_count)),
            torch.tensor([0, 1, 2, 0]),
        )
        program.step(*batch)
        optimizer.step()
        optimizer.zero_grad()

    program, optimizer = fresh()
    for _ in range(3):
        advance(program, optimizer)
    checkpoints.write(tmp_path, 3, run_state.capture(program, optimizer, None, {"batch": 3}))
    state = optimizer.state_dict()

    other, other_optimizer = fresh()
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert run_state.restore(found, other, other_optimizer, None) == {"batch": 3}
    assert equal(other_optimizer.state_dict(), state)
    for _ in range(2):
        advance(program, optimizer)
        advance(other, other_optimizer)
    assert equal(dict(other.model.state_dict()), dict(program.model.state_dict()))
    assert equal(other_optimizer.state_dict(), optimizer.state_dict())
    assert equal(other.state_dict(), program.state_dict())


SCHEDULERS: dict[str, Any] = {
    "multi_step": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [2],
    ),
}


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_schedulers_round_trip(tmp_path: Path, name: str) -> None:
    def fresh() -> tuple[StandIn, torch.optim.Optimizer, Any]:
        program = StandIn(make_model())
        optimizer = torch.optim.SGD(program.model.parameters(), lr=0.1, momentum=0.9)
        return program, optimizer, SCHEDULERS[name](optimizer)

    def advance(optimizer: torch.optim.Optimizer, scheduler: Any) -> float:
        optimizer.step()
        scheduler.step(1.0) if name == "plateau" else scheduler.step()
        return float(optimizer.param_groups[0]["lr"])

    program, optimizer, scheduler = fresh()
    for _ in range(2):
        advance(optimizer, scheduler)
    checkpoints.write(tmp_path, 2, run_state.capture(program, optimizer, scheduler, None))
    other = fresh()
    found = checkpoints.latest(tmp_path)
    assert found is not None
    run_state.restore(found, *other)
    assert [advance(*other[1:]) for _ in range(5)] == [advance(optimizer, scheduler) for _ in range(5)]


class Awkward(nn.Module):
    """Tied weights, a buffer that its state_dict leaves out, and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.note: dict[str, Any] = {"seen": 0}

    def get_extra_state(self) -> dict[str, Any]:
        return self.note

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.note = state


def test_tied_weights_hidden_buffers_and_extra_state(tmp_path: Path) -> None:
    model = Awkward()
    model.hidden.add_(3)  # type: ignore[operator]
    model.note["seen"] = 4
    optimizer = torch.optim.SGD(model.parameters())
    checkpoints.write(tmp_path, 0, run_state.capture(StandIn(model), optimizer, None, None))
    other = Awkward()
    weight = other.a.weight
    found = checkpoints.latest(tmp_path)
    assert found is not None
    run_state.restore(found, StandIn(other), torch.optim.SGD(other.parameters()), None)
    assert other.a.weight is weight
    assert other.b.weight is weight
    assert torch.equal(weight, model.a.weight)
    assert torch.equal(other.hidden, torch.full((2,), 3.0))  # type: ignore[arg-type]
    assert other.note == {"seen": 4}


def test_global_generators_come_back() -> None:
    import random

    state = random_state.capture_rng()

    def draw() -> list[float]:
        return [float(torch.rand(())), float(np.random.randn()), random.random(), random.gauss(0, 1)]

    numbers = draw()
    assert draw() != numbers
    random_state.restore_rng(state)
    assert draw() == numbers


# --- damage -----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


def alter(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 20', '"step": 21'))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.safetensors", truncate),
        ("state.safetensors", flip),
        ("state.safetensors", empty),
        ("state.safetensors", Path.unlink),
        ("state.json", truncate),
        ("state.json", flip),
        ("state.json", alter),
        ("state.json", empty),
        ("state.json", Path.unlink),
        ("state.json", lambda path: path.write_text("[1]")),
    ],
)
def test_damage_is_seen_and_the_one_before_is_used(tmp_path: Path, file: str, damage: Any) -> None:
    for step in (10, 20):
        checkpoints.write(tmp_path, step, {"weight": torch.full((50,), float(step)), "step": step})
    damage(tmp_path / "step-000000020" / file)
    with pytest.warns(UserWarning, match="step-000000020.*Using .*step-000000010 instead"):
        found = checkpoints.latest(tmp_path)
    assert found is not None
    assert found.state["step"] == 10
    damage(tmp_path / "step-000000010" / file)
    if damage is not alter:
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used.*step-000000020.*step-000000010"):
            checkpoints.latest(tmp_path)


def test_every_flipped_bit_of_the_json_is_seen(tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path, 1, {"weight": torch.ones(2), "n": 12, "x": 0.5})
    file = path / "state.json"
    whole, state = file.read_bytes(), checkpoints.read(path).state
    for bit in range(0, len(whole) * 8, 3):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        try:
            found = checkpoints.read(path)
        except CheckpointError:
            continue
        assert found.step == 1  # white space may change: the content is the same
        assert equal(found.state, state)


def test_another_format_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.write(tmp_path, 1, {})
    monkeypatch.setattr(checkpoints, "FORMAT", 2)
    checkpoints.write(tmp_path, 2, {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 2, this version of Onward reads format 1"):
        checkpoints.latest(tmp_path)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path) is None
    assert checkpoints.latest(tmp_path / "missing") is None
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-000000001.damaged").mkdir()
    assert checkpoints.latest(tmp_path) is None


def test_replacing_a_checkpoint_never_leaves_none(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, 3, {"n": 1})
    checkpoints.write(tmp_path, 3, {"n": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000003"]
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert found.state == {"n": 2}
    found.path.rename(tmp_path / "step-000000003.old")  # as a kill between the two renames leaves it
    (tmp_path / ".tmp-step-000000003-1").mkdir()
    checkpoints.clean(tmp_path)
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert found.state == {"n": 2}
    checkpoints.write(tmp_path, 3, {"n": 3})
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000003"]


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10, 1_000_000_000):
        checkpoints.write(tmp_path, step, {})
    checkpoints.prune(tmp_path, None)
    assert len(checkpoints.candidates(tmp_path)) == 4
    checkpoints.prune(tmp_path, 2)
    assert [p.name for p in checkpoints.candidates(tmp_path)] == ["step-1000000000", "step-000000010"]
    checkpoints.set_aside(tmp_path, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000010", "step-1000000000.damaged"]


@pytest.mark.parametrize("where", ["file/below", "/proc/onward"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    directory = tmp_path / where
    with pytest.raises(CheckpointError, match=f"cannot write.*{where}"):
        checkpoints.write(directory, 1, {})
    with pytest.raises(CheckpointError, match=f"cannot write.*{where}"):
        checkpoints.clean(directory)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.write(tmp_path, 1, {"x": torch.ones(1)})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step-000000002.*No space left"):
        checkpoints.write(tmp_path, 2, {"x": torch.ones(1)})
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


# --- whose checkpoint -------------------------------------------------------------------------------------------------


def test_a_foreign_checkpoint_says_what_differs_and_changes_nothing(tmp_path: Path) -> None:
    program = StandIn(make_model())
    optimizer = torch.optim.Adam(program.model.parameters())
    checkpoints.write(tmp_path, 1, run_state.capture(program, optimizer, None, None))
    found = checkpoints.latest(tmp_path)
    assert found is not None

    def refused(
        model: nn.Module, message: str, make: Any = torch.optim.Adam, seed: int = 0, scheduler: Any = None
    ) -> None:
        other = make(model.parameters(), lr=0.5)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            run_state.restore(found, StandIn(model, seed), other, scheduler and scheduler(other))
        assert equal(before, dict(model.state_dict()))

    wide = make_model()
    wide[3] = nn.Linear(8, 5)
    refused(wide, r"'3.weight' is torch.float32 \[3, 8\], trainable in the checkpoint and torch.float32 \[5, 8\]")
    refused(make_model().double(), "'0.weight' is torch.float32.*torch.float64")
    refused(nn.Sequential(*make_model()[:3]), "'3.weight' .* is not in the model")
    refused(nn.Sequential(*make_model(), nn.PReLU()), "model's '4.weight' .* is not in the checkpoint")
    refused(make_model(), "optimizer was torch.optim.adam.Adam and is torch.optim.adamw.AdamW", torch.optim.AdamW)
    refused(make_model(), "seed was 0 and is 7", seed=7)
    refused(make_model(), "scheduler was None and is .*CosineAnnealingLR", scheduler=SCHEDULERS["cosine"])
    frozen = make_model()
    frozen[0].weight.requires_grad_(False)
    refused(frozen, "'0.weight'")
    refused(
        make_model(),
        "parameter groups",
        lambda parameters, lr: torch.optim.Adam(list(parameters)[::-1], lr=lr),
    )


def test_another_torch_version_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = StandIn(make_model())
    optimizer = torch.optim.Adam(program.model.parameters())
    monkeypatch.setattr(checkpoints, "versions", lambda: {"torch": "1.0"})
    checkpoints.write(tmp_path, 1, run_state.capture(program, optimizer, None, None))
    monkeypatch.undo()
    found = checkpoints.latest(tmp_path)
    assert found is not None
    with pytest.warns(UserWarning, match="written with torch 1.0"):
        run_state.restore(found, program, optimizer, None)


def test_the_json_is_plain(tmp_path: Path) -> None:
    program = StandIn(make_model())
    state = run_state.capture(program, torch.optim.Adam(program.model.parameters()), None, OrderedDict(batch=2))
    path = checkpoints.write(tmp_path, 7, state)
    document = json.loads((path / "state.json").read_text())
    assert document["step"] == 7
    assert document["versions"]["torch"] == torch.__version__
    assert document["state"]["seed"] == 0
    assert document["state"]["position"] == {"batch": 2}
    tensors = load_file(path / "state.safetensors")
    assert torch.equal(tensors["model.0.weight"], program.model.state_dict()["0.weight"])
