"""Try every model of the catalogue and write ``docs/compatibility.md``.

    pip install -r benchmarks/compatibility/requirements.txt
    pip install --no-deps timm==1.0.31 torchvision==0.28.0
    python benchmarks/compatibility                     # all that build/compatibility does not hold yet
    python benchmarks/compatibility --anew 'timm/*'     # these again

Each model is a process of its own, with a time limit. Exit code 1 if less than nine tenths of what ``torch.export``
takes compiles and steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

from attempt import Outcome
from catalogue import LIBRARIES
from report import write
from rich.console import Console

from onward.evidence.provenance import machine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NAMES = [f"{key}/{name}" for key, library in LIBRARIES.items() for name in library.names]


def run(name: str, limit: float) -> Outcome:
    """Try a model in a process of its own."""
    command = [sys.executable, str(HERE / "attempt.py"), name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return Outcome(name, reason=f"not done after {limit:.0f} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        tail = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Outcome(name, reason=f"the process died: {tail}")
    return Outcome(**json.loads(lines[-1]))


def main(argv: list[str] | None = None) -> int:
    """Try, keep, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anew", nargs="+", default=[], metavar="PATTERN", help="try these again")
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "compatibility", help="folder of what was tried")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "compatibility.md", help="the page")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="models that are tried at a time")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="for one model")
    options = parser.parse_args(argv)
    console = Console(highlight=False)
    options.keep.mkdir(parents=True, exist_ok=True)
    kept = {name: options.keep / f"{name.replace('/', '-')}.json" for name in NAMES}

    def outcome(name: str) -> Outcome:
        if kept[name].exists() and not any(fnmatch(name, pattern) for pattern in options.anew):
            return Outcome(**json.loads(kept[name].read_text()))
        found = run(name, options.limit)
        kept[name].write_text(json.dumps(dataclasses.asdict(found)) + "\n")
        said = f"{found.sites} sites, {found.seconds:.0f} s" if found.steps else found.reason.splitlines()[0]
        console.print(f"{name}: {said}", style="dim", markup=False)
        return found

    with ThreadPoolExecutor(options.at_once) as pool:
        outcomes = dict(zip(NAMES, pool.map(outcome, NAMES), strict=True))
    cpu = machine_name()
    packages = ("torch", "timm", "torchvision", "transformers", "torch_geometric")
    write(
        outcomes,
        options.output,
        commands=["python benchmarks/compatibility"],
        machine=cpu,
        versions=", ".join(f"{package} {version(package)}" for package in packages),
    )
    exported = [o for o in outcomes.values() if o.exported]
    steps = sum(o.steps for o in exported)
    console.print(f"{steps} of {len(exported)} that torch.export takes compile and step; wrote {options.output}")
    return int(steps < 0.9 * len(exported))


def machine_name() -> str:
    """The processor and its cores."""
    import torch

    found = machine(torch.device("cpu"))
    return f"{found['cpu']}, {found['cores']} cores"


if __name__ == "__main__":
    sys.exit(main())
