"""Where a number comes from: machine and software."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..runtime.versions import versions


def machine(device: torch.device) -> dict[str, Any]:
    """What a measurement has to say about where it was made."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "load": round(os.getloadavg()[0], 2),
        "versions": versions(),
    }


def describe(found: Mapping[str, Any]) -> str:
    """`machine` in one line."""
    software = ", ".join(f"{name} {found['versions'][name]}" for name in ("onward", "torch", "numpy", "python"))
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads, device {found['device']}, "
        f"load average {found['load']}; {software}"
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"
