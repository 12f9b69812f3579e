"""A calibration: the settings that were chosen for a model, with the measurements behind them (method.md 7, 12).

`choose` measures and chooses; this is what comes out, to print, save, edit by hand and compile.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from ...compiler.driver import compile_model
from ...compiler.estimator import LikelihoodRatio
from ...compiler.files import write_whole
from ...compiler.program import CompiledModel
from ...compiler.report_text import describe_estimator
from ...compiler.site_options import resolve_sigmas
from ...passes.errors import CalibrationError, OptionError, UnknownNameError
from ..training.metrics import jsonable

VERSION = 2
"""Of the file."""


@dataclass(frozen=True)
class SiteCalibration:
    """What was measured at one site, and chosen. What is about noise is None where none is put on the site itself: its
    gradient is then predicted at a noise point further on."""

    site: str
    elements: int | None
    """Perturbed numbers a sample (a copy, where all samples share the noise of a weight)."""
    scale: float | None
    """Root mean square of the tensor that receives the noise."""
    sigma: float | None
    nonlinearity: float | None
    """Change of the response when σ is halved, relative to it; near 1 or above where there is no derivative."""
    response: float | None
    """Mean square of the response of a sample's loss per unit of noise."""
    share: float | None
    """FLOPs of the perturbed suffix as a share of a forward's."""
    trust: float | None
    """With feedback, `FeedbackState.trust` after the warm-up; None without."""
    variance: float | None
    """Of the gradient of the site's parameters from one pair (or copy), summed over their elements, for a batch of the
    size that was measured; with feedback that of ``correction="full"``. None where it was not measured."""
    bias: float | None = None
    """With feedback, ``|h - g|²``: the squared error of the predicted gradient, at least 0; None where not measured."""
    bias_error: float | None = None
    """Standard error of `bias`."""
    noise_on: str = "output"
    """What is perturbed (`LikelihoodRatio.noise_on`)."""
    correction: str = "none"
    group: int | None = None
    """Number of the run that perturbs it."""


@dataclass(frozen=True)
class Calibration:
    """Settings for one model, with the measurements behind them. `onward.compile` takes it for its estimator.

    Edit it by hand as JSON (`save`, `load`): what counts is ``estimator``; ``sites`` documents it and ties it to the
    model.
    """

    estimator: LikelihoodRatio
    sites: tuple[SiteCalibration, ...]
    explained: float | None
    """With feedback, the share of the outputs' response that it explained after the warm-up."""
    forwards: float
    """Perturbed forwards a sample that the calibration took."""

    def compile(self, model: nn.Module, example_inputs: Any, *, unbatched: bool = False) -> CompiledModel:
        """Compile `model` with these settings; CalibrationError if they were measured for another model."""
        try:
            compiled = compile_model(model, example_inputs, self.estimator, unbatched=unbatched)
            resolve_sigmas(self.estimator.sigma, compiled.sites)
        except (OptionError, UnknownNameError) as error:
            raise CalibrationError(f"the calibration does not fit this model: {error} Calibrate again.") from error
        mine = {site.site: site.elements for site in self.sites if site.elements is not None}
        perturbed = [compiled.sites[index] for run in compiled.runs for index in run.sites]
        theirs = {site.name: site.noise_layout.elements for site in perturbed}
        changes = [f"{name!r} is gone" for name in mine if name not in theirs]
        changes += [f"{name!r} is new" for name in theirs if name not in mine]
        changes += [
            f"{name!r} has {theirs[name]} elements a sample, not {mine[name]}"
            for name in mine
            if name in theirs and theirs[name] != mine[name]
        ]
        if changes:
            raise CalibrationError(
                f"the calibration is of another model or another placement of the noise: {'; '.join(changes)}. "
                "Calibrate again."
            )
        return compiled

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON-serialisable values."""
        return {
            "version": VERSION,
            "estimator": self.estimator.to_json(),
            "explained": self.explained,
            "forwards": self.forwards,
            "sites": jsonable([asdict(site) for site in self.sites]),
        }

    @classmethod
    def from_json(cls, data: Any) -> Calibration:
        """What `to_json` gave, edited or not.

        Raises:
            CalibrationError: it is no calibration, or of another version.
            OptionError, UnknownNameError: an edited setting cannot work.
        """
        try:
            if data["version"] != VERSION:
                raise CalibrationError(
                    f"the calibration has version {data['version']}; this Onward reads version {VERSION}. Calibrate "
                    "again."
                )
            sites = tuple(SiteCalibration(**site) for site in data["sites"])
            return cls(LikelihoodRatio(**data["estimator"]), sites, data["explained"], data["forwards"])
        except (KeyError, TypeError) as error:
            raise CalibrationError(f"this is not a calibration as `onward` writes it: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all; OutputError if that cannot be."""
        write_whole(Path(path), json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote; CalibrationError if it cannot be read."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CalibrationError(f"cannot read the calibration {path}: {error}") from error
        return cls.from_json(data)

    def __str__(self) -> str:
        console = Console(width=120, force_terminal=False, color_system=None)
        with console.capture() as captured:
            console.print(self.table(), highlight=False)
        return captured.get()

    def table(self) -> Table:
        """The measurements as a table."""
        learned = "" if self.explained is None else f", feedback explains {self.explained:.2f}"
        shown = Table(title=f"{describe_estimator(self.estimator.to_json())}{learned}", title_justify="left")
        shown.add_column("noise point", overflow="fold")
        for heading in ("noise on", "group", "elements", "sigma", "change", "variance", "bias²", "correction", "cost"):
            shown.add_column(heading, justify="right", no_wrap=True)
        shown.add_column("trust", justify="right", no_wrap=True)
        for site in self.sites:
            shown.add_row(
                site.site,
                "–" if site.elements is None else site.noise_on,
                _shown(site.group, "d"),
                _shown(site.elements, ",d"),
                _shown(site.sigma, ".3g"),
                _shown(site.nonlinearity, ".2f"),
                _shown(site.variance, ".2g"),
                _shown(site.bias, ".2g"),
                site.correction,
                _shown(site.share, ".0%"),
                _shown(site.trust, ".2f"),
            )
        return shown


def _shown(number: float | None, how: str) -> str:
    return "–" if number is None else format(number, how)
