"""The graphs of a compiled model by the pass that made them, and as Python source."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from torch import fx

from ..passes.errors import unknown_name
from ..passes.locate_samples import batch_symbol
from .columns import NO_BREAK, duration
from .program import CompiledModel
from .report import pass_reports
from .report_text import describe_change
from .source import file_of, function_of

PARTS = {
    "share_prefixes": "one perturbed run a group of sites, behind the clean prefix that all copies share",
    "split_stages": "the stages of the clean run",
    "complete_gradients": "one standalone gradient subgraph a site",
}
"""Passes whose result is several graphs; they follow the passes over the one-copy graph."""


def pass_names(compiled: CompiledModel) -> list[str]:
    """The names that `graphs_after` knows: the passes in order, then `PARTS`."""
    return [*(record.name for record in compiled.history), *PARTS]


def graphs_after(compiled: CompiledModel, name: str) -> dict[str, fx.GraphModule]:
    """The graph after a pass, by a name that can stand in a file; several for `PARTS`.

    Raises:
        UnknownNameError: no pass has this name; the message shows the nearest.
    """
    if name == "share_prefixes":
        return {run.name: run.module for run in compiled.runs}
    if name == "split_stages":
        return {f"stage_{index}": stage for index, stage in enumerate(compiled.stages)}
    if name == "complete_gradients":
        return {gradient.name: gradient.module for gradient in compiled.gradients}
    for record in compiled.history:
        if record.name == name:
            return {f"after_{name}": record.module}
    raise unknown_name("pass", name, pass_names(compiled))


def all_graphs(compiled: CompiledModel) -> dict[str, fx.GraphModule]:
    """Every graph there is: after each pass, then the stages, perturbed runs and gradient subgraphs."""
    return {key: module for name in pass_names(compiled) for key, module in graphs_after(compiled, name).items()}


def python(compiled: CompiledModel, name: str | None = None, *, model: str = "model") -> str:
    """A Python file with the graphs before and after the pass `name`, or with all graphs."""
    batch = batch_symbol(compiled.captured.module)
    if name is None:
        return file_of(all_graphs(compiled), f"{model}: the graph after every pass, and what is run.", batch)
    modules = graphs_after(compiled, name)
    if name in PARTS:
        return file_of(modules, f"{model}, {name}: {PARTS[name]}.", batch)
    previous = _before(compiled, name)
    if previous is not None:
        modules = {f"before_{name}": previous, **modules}
    return file_of(modules, f"{model} before and after {name}.", batch)


def sources(compiled: CompiledModel, graphs: Mapping[str, fx.GraphModule]) -> dict[str, str]:
    """Each graph as a Python function, by name."""
    batch = batch_symbol(compiled.captured.module)
    return {name: function_of(module, name, batch) for name, module in graphs.items()}


def _before(compiled: CompiledModel, name: str) -> fx.GraphModule | None:
    position = [record.name for record in compiled.history].index(name)
    return compiled.history[position - 1].module if position else None


def pass_text(compiled: CompiledModel, name: str, *, model: str = "model") -> str:
    """What a pass did: its time, the operations it added and removed, and the graph after it with changed lines marked.

    ``+`` marks a line that the pass added, ``-`` one that it removed.
    """
    batch = batch_symbol(compiled.captured.module)
    modules = graphs_after(compiled, name)
    if name in PARTS:
        return "\n\n".join([f"{model}, {name}: {PARTS[name]}.\n", *sources(compiled, modules).values()])
    (module,) = modules.values()
    report = next(one for one in pass_reports(compiled) if one.name == name)
    change = describe_change(report.change).replace(NO_BREAK, " ")
    lines = [f"{model}, {name}: {report.operations} operations ({change}), {duration(report.seconds)}", ""]
    after = function_of(module, f"after_{name}", batch).splitlines()
    previous = _before(compiled, name)
    if previous is None:
        return "\n".join([*lines, *after]) + "\n"
    before = function_of(previous, f"after_{name}", batch).splitlines()
    if before == after:
        lines[1:] = [_unchanged(name), ""]
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(a=before, b=after, autojunk=False).get_opcodes():
        if tag == "equal":
            lines += [f"  {line}" for line in after[j1:j2]]
        else:
            lines += [f"- {line}" for line in before[i1:i2]] + [f"+ {line}" for line in after[j1:j2]]
    return "\n".join(lines) + "\n"


def _unchanged(name: str) -> str:
    if name == "trace_gradients":
        return "It leaves this graph as it is; the subgraphs it traced are completed: --pass complete_gradients."
    return "It writes facts on the nodes and leaves the operations as they are."
