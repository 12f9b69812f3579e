"""The compiled operators, each beside its definition, and the trial that each has to pass before it is used.

Of each kind of call (operator, names, dtype) the first in a process makes a trial: a small call of that kind, both
ways. So what Numba compiled, now or long ago into its cache, is trusted only where it gives the definition's bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import operators as definitions
from .. import source as noise_source
from ..blocks import count_blocks
from ..distributions import MODEL_DISTRIBUTIONS, NOISES
from ..source import NUMPY_DTYPES
from . import operators

Kind = tuple[Any, ...]


@dataclass(frozen=True)
class CompiledOperator:
    """Called with an operator's arguments, it takes the compiled way where it can.

    Attributes:
        name: the operator's.
        definition: the NumPy code.
        launch: the compiled way.
        kind_of: what a call's trial depends on; None where only the definition serves.
        trial: the arguments of a small call of a kind.
    """

    name: str
    definition: Callable[..., Tensor]
    launch: Callable[..., Tensor]
    kind_of: Callable[..., Kind | None]
    trial: Callable[..., tuple[Any, ...]]
    verdicts: dict[Kind, bool] = field(default_factory=dict)

    def __call__(self, *args: Any, **named: Any) -> Tensor:
        kind = self.kind_of(*args, **named)
        if kind is None or not (self.verdicts.get(kind) or self._passes(kind)):
            return self.definition(*args, **named)
        return self.launch(*args, **named)

    def _passes(self, kind: Kind) -> bool:
        """The verdict on a kind of call; threads that ask at once find the same."""
        if kind not in self.verdicts:
            args = self.trial(*kind)
            try:
                wrong = "" if same_bits(self.definition(*args), self.launch(*args)) else "gives other numbers"
            except Exception as error:  # whatever a compiler raises: training goes on without it
                wrong = f"could not be run ({type(error).__name__}: {error})"
            self.verdicts[kind] = not wrong
            if wrong:
                described = ", ".join(str(part).removeprefix("torch.") for part in kind)
                warnings.warn(
                    f"The compiled '{self.name}' ({described}) {wrong}. NumPy does its work from now on, with the same "
                    "results. Numba's cache may be of another version of Onward: remove __pycache__ beside "
                    f"{operators.__file__}. ONWARD_KERNELS=0 leaves all compiled operators out.",
                    UserWarning,
                    stacklevel=3,
                )
        return self.verdicts[kind]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same form and numbers, zeros with their signs."""
    if (a.shape, a.dtype, a.stride()) != (b.shape, b.dtype, b.stride()):
        return False
    bits = torch.int32 if a.dtype == torch.float32 else torch.int64
    return torch.equal(a.view(bits), b.view(bits))


def _covers(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype in NUMPY_DTYPES and noise_source.on_host(device)


def _perturb_kind(
    z: Tensor, copies: Tensor, key: Tensor, sigmas: Tensor, site: int, noise: str, sizes: Sequence[int], dim: int,
    outer: int, tiled: bool, alive: Tensor | None = None, blocks: Sequence[int] | None = None,
) -> Kind | None:  # fmt: skip
    """All that are valid."""
    fits = _covers(z.dtype, z.device) and noise in NOISES and (dim >= 0 or (len(copies) == 1 and not blocks))
    return (noise, z.dtype, bool(blocks)) if fits else None


def _count_kind(
    like: Tensor, alive: Tensor | None, sizes: Sequence[int], dim: int, outer: int, blocks: Sequence[int]
) -> Kind | None:
    """Of a mask: without one the counts are constants."""
    return (like.dtype,) if alive is not None and dim >= 0 and _covers(like.dtype, like.device) else None


def _sum_kind(
    weights: Tensor, draws: Tensor, key: Tensor, site: int, noise: str, score: str, sizes: Sequence[int], dim: int,
    outer: int,
) -> Kind | None:  # fmt: skip
    fits = _covers(weights.dtype, weights.device) and noise in NOISES and score in NOISES[noise].scores
    return (noise, score, weights.dtype) if fits else None


def _weighted_kind(
    weights: Tensor, copies: Tensor, key: Tensor, site: int, noise: str, score: str, sizes: Sequence[int], dim: int,
    outer: int,
) -> Kind | None:  # fmt: skip
    fits = dim >= 0 or len(copies) == 1
    return _sum_kind(weights, copies, key, site, noise, score, sizes, dim, outer) if fits else None


def _stochastic_kind(
    x: Tensor, scale: Tensor, copies: Tensor, key: Tensor, site: int, sizes: Sequence[int], dim: int, outer: int
) -> Kind | None:
    return (x.dtype,) if _covers(x.dtype, x.device) and (dim >= 0 or len(copies) == 1) else None


def _random_kind(
    key: Tensor, op: int, distribution: str, size: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Kind | None:
    return (distribution, dtype) if _covers(dtype, device) and distribution in MODEL_DISTRIBUTIONS else None


# A trial is longer than a chunk of the loops, and has rows, samples and a twin.
_LAYOUT = ([2, 4, 131], 1, 2)
_COPIES, _KEY = torch.tensor([3, -1, -4]), torch.tensor([2**40 + 17, 5])
_SAMPLES = 3


def _values(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.linspace(-2.0, 2.0, torch.Size(shape).numel(), dtype=dtype).view(shape)


_BLOCKS = (2, 1, 1, 5)


def _perturb_trial(noise: str, dtype: torch.dtype, tied: bool) -> tuple[Any, ...]:
    z = _values(dtype, 2, 4 * _SAMPLES, 131)
    blocks = _BLOCKS if tied else None
    return z, _COPIES, _KEY, torch.tensor([0.3], dtype=dtype), 0, noise, *_LAYOUT, False, z.sin() > 0, blocks


def _count_trial(dtype: torch.dtype) -> tuple[Any, ...]:
    alive = (1000 * _values(torch.float32, 2, 4 * _SAMPLES, 131)).sin() > 0
    return torch.empty(1, 4 * _SAMPLES, 27, dtype=dtype), alive, *_LAYOUT, _BLOCKS


def _weighted_trial(noise: str, score: str, dtype: torch.dtype) -> tuple[Any, ...]:
    return _values(dtype, len(_COPIES), _SAMPLES), _COPIES, _KEY, 0, noise, score, *_LAYOUT


def _stochastic_trial(dtype: torch.dtype) -> tuple[Any, ...]:
    x = _values(dtype, 2, 4 * _SAMPLES * len(_COPIES), 131)
    return x, x.abs().amax((0, 2), True), _COPIES, _KEY, 0, *_LAYOUT


def _random_trial(distribution: str, dtype: torch.dtype) -> tuple[Any, ...]:
    return _KEY, 0, distribution, [3, 1001], dtype, torch.device("cpu")


_ROWS = (
    CompiledOperator("perturb", definitions.perturb, operators.perturb, _perturb_kind, _perturb_trial),
    CompiledOperator(
        "weighted_noise", definitions.weighted_noise, operators.weighted_noise, _weighted_kind, _weighted_trial
    ),
    CompiledOperator(
        "weighted_noise_sum",
        definitions.weighted_noise_sum,
        operators.weighted_noise_sum,
        _sum_kind,
        _weighted_trial,
    ),
    CompiledOperator(
        "stochastic_sign", definitions.stochastic_sign, operators.stochastic_sign, _stochastic_kind, _stochastic_trial
    ),
    CompiledOperator("count_blocks", count_blocks, operators.count_blocks, _count_kind, _count_trial),
    CompiledOperator("keyed_random", definitions.keyed_random, operators.keyed_random, _random_kind, _random_trial),
)

KERNELS = {row.name: row for row in _ROWS}
