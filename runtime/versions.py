"""The software that a run depends on."""

from __future__ import annotations

import importlib.metadata
import platform

import numpy as np
import torch


def versions() -> dict[str, str]:
    """The versions that decide whether two runs can agree to the last bit."""
    try:
        onward = importlib.metadata.version("onward")
    except importlib.metadata.PackageNotFoundError:
        onward = "unknown"
    return {
        "onward": onward,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
