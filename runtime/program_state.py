"""What a program needs beyond its model's state to continue exactly, as a dictionary of tensors, numbers and text."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor

from ..compiler.estimator import LikelihoodRatio
from ..compiler.program import CompiledModel
from ..passes.errors import CheckpointError
from .feedback import FeedbackState

_FREE = ("chunk", "recompute", "feedback_memory")
"""Settings of the estimator that a run may be resumed with others of; the memory only if it did not set the rank."""


class Progressing(Protocol):
    """A program, as far as it changes from step to step."""

    compiled: CompiledModel
    seed: int
    step_count: int
    forwards: float
    clean_forwards: float
    sigmas: list[float]
    next_calibration: int
    next_probe: int
    feedback: FeedbackState | None


def saved(program: Progressing) -> dict[str, Tensor | int | float | str]:
    """The state; seed and step count key all noise to come."""
    state: dict[str, Tensor | int | float | str] = {
        "estimator": json.dumps(program.compiled.estimator.to_json(), sort_keys=True),
        "seed": program.seed,
        "step_count": program.step_count,
        "forwards": program.forwards,
        "clean_forwards": program.clean_forwards,
    }
    if program.compiled.estimator.sigma == "auto":
        state["sigmas"] = torch.tensor(program.sigmas, dtype=torch.float64)
        state["next_calibration"] = program.next_calibration
    if program.feedback is not None:
        state["next_probe"] = program.next_probe
        state.update(program.feedback.state_dict())
    return state


def restore(program: Progressing, state: dict[str, Any]) -> None:
    """Put a saved state into a program.

    Raises:
        CheckpointError: a value is missing, or another estimator saved it; the program is as it was.
    """
    try:
        _check_estimator(program, json.loads(state["estimator"]))
        seed, step_count = int(state["seed"]), int(state["step_count"])
        forwards, clean_forwards = float(state["forwards"]), float(state["clean_forwards"])
        sigmas, next_calibration, next_probe = program.sigmas, program.next_calibration, program.next_probe
        if program.compiled.estimator.sigma == "auto":
            sigmas, next_calibration = state["sigmas"].tolist(), int(state["next_calibration"])
        if len(sigmas) != len(program.sigmas):
            raise CheckpointError(f"the state has σ of {len(sigmas)} sites; this model has {len(program.sigmas)}.")
        feedback = program.feedback
        if feedback is not None:
            next_probe, feedback = int(state["next_probe"]), feedback.loaded(state)
    except KeyError as error:
        raise CheckpointError(f"the program's state lacks {error}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"the program's state has an estimator that cannot be read: {error}") from error
    program.seed, program.step_count = seed, step_count  # all of it, or nothing
    program.forwards, program.clean_forwards = forwards, clean_forwards
    program.sigmas[:] = sigmas
    program.next_calibration, program.next_probe, program.feedback = next_calibration, next_probe, feedback


def _check_estimator(program: Progressing, before: dict[str, Any]) -> None:
    mine = json.loads(json.dumps(program.compiled.estimator.to_json()))
    sets_rank = program.compiled.rank is not None and program.compiled.estimator.rank is None
    free = _FREE[:-1] if sets_rank else _FREE
    fixed = {key: value for key, value in mine.items() if key not in free}
    known = {field.name: field.default for field in fields(LikelihoodRatio)} | before  # an option that came later
    differing = [f"{key}={known[key]!r}, now {value!r}" for key, value in fixed.items() if known[key] != value]
    if differing:
        raise CheckpointError(
            f"the saved run used another estimator: {'; '.join(differing)}. Resume with the same settings, or "
            "start a new run from the model's weights."
        )
