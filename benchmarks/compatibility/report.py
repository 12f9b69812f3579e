"""``docs/compatibility.md`` from what came of each model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from attempt import Outcome
from catalogue import LIBRARIES

INTRODUCTION = """# Compatibility

Which models of `timm`, `torchvision`, `transformers` and `torch_geometric` compile, as they are: built offline with
random weights, small, in training mode. *Compiles* means that `onward.compile(model, inputs, loss=…,
estimator="auto")` takes it and that two steps give every trainable parameter a finite gradient; not that it was trained
to an accuracy ([results.md](results.md) has those). *Exports* is `torch.export` alone, with a free batch size.

    {commands}

{machine}; {versions}. Seconds are those of compiling and two steps, with one torch thread on a shared machine.

## Summary

| library | tried | `torch.export` takes | compile and step | of what `torch.export` takes |
|---|---|---|---|---|
"""

FAILURES = """
## What does not compile, and why

The reason is Onward's own message, shortened to its first sentences, unless it says otherwise.

| model | exports | reason |
|---|---|---|
"""


def write(outcomes: Mapping[str, Outcome], path: Path, *, commands: Sequence[str], machine: str, versions: str) -> None:
    """Write the page; `outcomes` by name, as in `catalogue.LIBRARIES`."""
    text = INTRODUCTION.format(commands="\n    ".join(commands), machine=machine, versions=versions)
    groups = {key: [o for name, o in outcomes.items() if name.startswith(f"{key}/")] for key in LIBRARIES}
    text += "".join(_summary(LIBRARIES[key].title, group) for key, group in groups.items())
    text += _summary("all", list(outcomes.values()))
    failed = [outcome for outcome in outcomes.values() if not outcome.steps]
    if failed:
        text += FAILURES + "".join(f"| `{o.name}` | {_yes(o.exported)} | {_reason(o)} |\n" for o in failed)
    for key, group in groups.items():
        text += (
            f"\n## {LIBRARIES[key].title}\n\n| model | parameters | input | sites | seconds |\n|---|---|---|---|---|\n"
        )
        text += "".join(
            f"| `{o.name.partition('/')[2]}` | {o.parameters:,} | {o.shape} | {o.sites} | {o.seconds:.0f} |\n"
            for o in group
            if o.steps
        )
    path.write_text(text)


def _summary(title: str, group: Sequence[Outcome]) -> str:
    exported = [outcome for outcome in group if outcome.exported]
    both = sum(outcome.steps for outcome in exported)
    share = f"{both / len(exported):.0%}" if exported else "–"
    return f"| {title} | {len(group)} | {len(exported)} | {sum(o.steps for o in group)} | {share} |\n"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _reason(outcome: Outcome) -> str:
    text = re.sub(r"\s+", " ", outcome.reason).replace("|", "\\|")
    short = text if len(text) <= 400 else text[:400].rsplit(" ", 1)[0] + " …"
    return short if outcome.ours else f"(no message of Onward's) {short}"
