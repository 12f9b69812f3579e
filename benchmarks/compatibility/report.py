"""``docs/compatibility.md`` from what came of each model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from attempt import Outcome
from catalogue import LIBRARIES

INTRODUCTION = """# Compatibility

Which models of `timm`, `torchvision`, `transformers` and `torch_geometric` compile, as they are: built offline with
random weights, small, in training mode.

    {commands}

- *Exports*: `torch.export` alone takes it, with a free batch size.
- *Compiles*: `onward.compile(model, inputs, loss=…, estimator="auto")` takes it, and two steps give every trainable
  parameter a finite gradient. Not that it was trained to an accuracy: [results.md](results.md) has those.
- *Sites*: its gradient subgraphs under `auto`, which pulls gradients back locally, in a shallow transformer most of the
  way. *Operations*: those with `reach=0, segments="op"`, where nothing is pulled back and every operation is by itself
  (tried with `transformers` and `torch_geometric`).
- *Unused*: parameters that its forward never reads. Onward names them, and they were frozen (`onward.freeze`), as its
  message asks.

{machine}; {versions}. Seconds are those of compiling and two steps under `auto`, one thread, on a busy machine.

## Summary

| library | tried | exports | compiles | of what exports | compiles by operations |
|---|---|---|---|---|---|
"""

FAILURES = """
## What does not compile, and why

The reason is Onward's own message, shortened, unless it says otherwise. A model that compiles and stands here does so
under `auto`, and not with every operation by itself.

| model | exports | compiles | reason |
|---|---|---|---|
"""

MODELS = """
## {title}

| model | parameters | input | sites | operations | unused | seconds |
|---|---|---|---|---|---|---|
"""


def write(outcomes: Mapping[str, Outcome], path: Path, *, commands: Sequence[str], machine: str, versions: str) -> None:
    """Write the page; `outcomes` by name, as in `catalogue.LIBRARIES`."""
    groups = {key: [o for name, o in outcomes.items() if name.startswith(f"{key}/")] for key in LIBRARIES}
    parts = [INTRODUCTION.format(commands="\n    ".join(commands), machine=machine, versions=versions)]
    parts += [_summary(LIBRARIES[key].title, group, LIBRARIES[key].operations) for key, group in groups.items()]
    parts.append(_summary("all", list(outcomes.values()), False))
    failed = [outcome for outcome in outcomes.values() if outcome.reason]
    parts += [FAILURES, *map(_failure, failed)] if failed else []
    for key, group in groups.items():
        parts += [MODELS.format(title=LIBRARIES[key].title), *(_row(outcome) for outcome in group if outcome.steps)]
    path.write_text("".join(parts))


def _summary(title: str, group: Sequence[Outcome], by_operations: bool) -> str:
    exported = [outcome for outcome in group if outcome.exported]
    both = sum(outcome.steps for outcome in exported)
    share = f"{both / len(exported):.0%}" if exported else "–"
    steps, operations = sum(o.steps for o in group), sum(o.operations > 0 for o in group) if by_operations else "–"
    return f"| {title} | {len(group)} | {len(exported)} | {steps} | {share} | {operations} |\n"


def _row(outcome: Outcome) -> str:
    name, operations, unused = outcome.name.partition("/")[2], outcome.operations or "–", len(outcome.unused) or ""
    return (
        f"| `{name}` | {outcome.parameters:,} | {outcome.shape} | {outcome.sites} | {operations} | {unused} "
        f"| {outcome.seconds:.0f} |\n"
    )


def _failure(outcome: Outcome) -> str:
    text = re.sub(r"\s+", " ", outcome.reason).replace("|", "\\|")
    text = re.sub(r"/\S*/site-packages/", "", text)
    short = text if len(text) <= 400 else text[:400].rsplit(" ", 1)[0] + " …"
    whose = "" if outcome.ours else "(no message of Onward's) "
    return f"| `{outcome.name}` | {_yes(outcome.exported)} | {_yes(outcome.steps)} | {whose}{short} |\n"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
