"""The states of the global random generators, taken and put back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def capture_rng() -> dict[str, Any]:
    """The states of the global generators of torch (CPU and, where in use, CUDA), NumPy and Python."""
    version, numbers, gauss = random.getstate()
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    cuda = torch.cuda.get_rng_state_all() if in_use else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": np.random.get_state(legacy=False),
        "python": {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss},
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put the global generators back to what `capture_rng` saw."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    python = state["python"]
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
