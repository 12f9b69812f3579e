"""A compiled model made ready to run: its plans, and its graphs as functions of the values that they name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import torch
from torch import Tensor

from ...compiler.program import CompiledModel
from ...passes.find_sites import Site
from ...passes.fuse_packed_gradients import fuse_packed_gradients
from ...passes.separate_outputs import returned
from ..feedback import FeedbackState
from ..finite import all_finite
from ..learning import learn
from ..noise import kernels
from ..noise.rows import Probe
from ..plan import Action, Gradient, chunks, make_plan, with_updates
from .bindings import BoundGraph
from .fusion import Fused, fuse, fuse_plan
from .inductor import Inductor
from .lifetimes import lifetimes
from .precision import outside_autocast


class BoundModel:
    """What the steps of a compiled model have in common, and know of whoever runs them.

    Attributes:
        sigmas: the program's own list, of the standard deviation of every site's noise.
        plan, clean_plan: the actions of a step with and without perturbed runs.
    """

    def __init__(self, compiled: CompiledModel, sigmas: list[float]) -> None:
        self.compiled = compiled
        self.sigmas = sigmas
        self.plan = make_plan(compiled)
        self.clean_plan = make_plan(compiled, perturbed=False)
        self.plans = {
            (perturbed, updated): with_updates(compiled, plan) if updated else plan
            for perturbed, plan in ((True, self.plan), (False, self.clean_plan))
            for updated in (True, False)
        }
        """Both plans, and how each begins with updates, by whether the step is perturbed and whether it does."""
        self.lifetimes = {perturbed: lifetimes(compiled, self.plans[perturbed, True]) for perturbed in (True, False)}
        """Of both plans, by whether the step is perturbed."""
        self.copies = [
            [torch.tensor(chunk, dtype=torch.int64) for chunk in chunks(compiled, run)] for run in compiled.runs
        ]
        self.draws = [torch.arange(compiled.estimator.draws(run.copies)) for run in compiled.runs]
        self.clean_copies = torch.zeros(1, dtype=torch.int64)
        self.stages = [BoundGraph(stage) for stage in compiled.stages]
        self.runs = [BoundGraph(run.module) for run in compiled.runs]
        learns = compiled.estimator.feedback == "learned"
        self.returned = [index for index, _ in returned(compiled.graph.graph)] if learns else []
        self.corrects = any(g.source == "corrected" for g in compiled.gradients)
        self.device = compiled.captured.signature.device
        with_kernels = kernels.serves(self.device)
        self.gradients = {
            g.site.index: (
                BoundGraph(fuse_packed_gradients(g.module) if with_kernels else g.module, outside_autocast),
                g,
            )
            for g in compiled.gradients
        }
        self.reached = {index: reach.to(self.device) for index, reach in compiled.reached.items()}
        self.readers = [
            {g.site.index for g in compiled.gradients if g.per_copy and g.run == run.index} for run in compiled.runs
        ]
        """By run, the sites whose gradients read captures of the copies' own."""
        self.together: dict[tuple[bool, Fused], BoundGraph] = {}
        """The graphs of fused actions, by whether the step is perturbed (they return what others read), once needed."""
        self._fused_plans: dict[bool, tuple[Action | Fused, ...]] = {}
        self.inductor: Inductor | None = None

    def use_inductor(self) -> None:
        """Have every graph compiled, each when it is first called (`execution.inductor`).

        Raises:
            OptionError: what inductor compiles with is missing.
        """
        self.inductor = Inductor(self.device)
        named = {f"F{number}": stage for number, stage in enumerate(self.stages)}
        named |= {f"P{number}": run for number, run in enumerate(self.runs)}
        named |= {f"G{site}": graph for site, (graph, _) in self.gradients.items()}
        for name, graph in named.items():
            graph.use_inductor(self.inductor, name)

    def uncompiled(self) -> AbstractContextManager[None]:
        """With graphs in plain FX, for calls that no step makes."""
        return nullcontext() if self.inductor is None else self.inductor.pause()

    def credited(self, weights: Tensor, site: int) -> Tensor:
        """Weights ``(draws, nodes)`` as those of a site's rows, each the sum over the nodes that it reaches; of the
        whole graph, ``(draws, 1)``, where the site has no reach of its own."""
        reach = self.reached.get(site)
        if reach is None:
            return weights.sum(1, keepdim=True)
        if weights.shape[1] != reach.shape[1]:  # the loss gives one number for the graph
            return weights.sum(1, keepdim=True).expand(-1, len(reach)).contiguous()
        return weights @ reach.T.to(weights.dtype)

    def fused(self, plan: Sequence[Action]) -> Sequence[Action | Fused]:
        """The plan as one worker does it."""
        perturbed = plan is self.plan
        if perturbed not in self._fused_plans:
            known = self.lifetimes[perturbed]
            self._fused_plans[perturbed] = fuse_plan(self.compiled, plan, known)
            for action in self._fused_plans[perturbed]:
                if isinstance(action, Fused):
                    around = outside_autocast if isinstance(action.actions[0], Gradient) else None
                    graph = BoundGraph(fuse(self.compiled, action, known), around)
                    if self.inductor is not None:
                        graph.use_inductor(self.inductor, f"{action}, {'' if perturbed else 'not '}perturbed")
                    self.together[perturbed, action] = graph
        return self._fused_plans[perturbed]

    def learn(self, state: FeedbackState, probe: Probe, sites: list[Site]) -> tuple[FeedbackState, Tensor]:
        """The feedback's learning step (`learning.learn`)."""
        return learn(state, probe, sites, self.sigmas, self.compiled.estimator.noise, self.reached)

    def demand_finite(self, values: Tensor, fail: Callable[[], NoReturn]) -> None:
        """Have `fail` raise unless all values are finite: here at once, and before a step ends in any case."""
        if not all_finite(values):
            fail()
