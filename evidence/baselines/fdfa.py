"""Forward direct feedback alignment (Bacho & Chu 2022, arXiv 2212.07282): feedback matrices from forward derivatives.

Every hidden layer's output is moved by ``u_i ~ N(0, I)``, all at once, one draw a sample. Forward-mode differentiation
carries that to the output beside the values: ``d_i = f'(a_i) ⊙ (W_i d_{i-1}) + u_i``, and at the output
``d = Σ_i J_i u_i``. As ``E[d u_iᵀ] = J_i``, the feedback matrices follow it with momentum,

    B_i ← (1 - α) B_i + α mean over the batch of d u_iᵀ,

from zero, and the weights are trained as by direct feedback alignment with the matrices of the moment. The authors'
code (github.com/Florian-BACHO/FDFA) moves the outputs of activations and starts from zero, as here; it lets Adam make
the step of the matrices, where the paper has the average above.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...passes.errors import OptionError
from ...runtime.loss import Loss
from .direct_feedback_alignment import DirectFeedbackAlignment
from .layers import check_derivatives, cut, dual, forward_mode, primal_and_tangent
from .program import normal_like


class ForwardDirectFeedbackAlignment(DirectFeedbackAlignment):
    """Direct feedback alignment whose matrices are learned; a step is one forward with its derivative beside it.

    Args:
        model, example, loss, seed: as for `DirectFeedbackAlignment`.
        alpha: the share of a step's estimate in the average, in (0, 1].

    Raises:
        OptionError: as there; `alpha` is not such a share; or no derivative leads to the output.
    """

    name = "FDFA"

    def __init__(self, model: nn.Module, example: Any, loss: Loss, seed: int, alpha: float = 0.01) -> None:
        if not 0 < alpha <= 1:
            raise OptionError(f"alpha={alpha!r}: the share of a step in the feedback's average is in (0, 1].")
        super().__init__(model, example, loss, seed)
        check_derivatives(model, example, self.name)
        self.alpha = alpha

    def fill(self, matrix: Tensor, generator: torch.Generator) -> None:
        """Zero: nothing is known."""

    def step(self, inputs: Any, target: Any, /) -> Tensor:
        """Add the gradients to every ``.grad``, then learn the feedback; returns the mean loss."""
        generator = self.generator("perturbation")
        ends: dict[int, Tensor] = {}
        moves: dict[int, Tensor] = {}

        def receive(index: int, value: Tensor) -> Tensor:
            primal, tangent = primal_and_tangent(value)
            if index in self.feedback:
                ends[index] = primal
                moves[index] = normal_like(primal, generator)
                tangent = tangent + moves[index]
            return dual(primal.detach(), tangent)

        with torch.enable_grad(), forward_mode():
            with cut(self.layers, receive):
                both = self.run_model(inputs)
            output, moved = primal_and_tangent(both)
            loss, error = self.output_error(output, target)
            self.pull_back(ends, output, error)
        for index, matrix in self.feedback.items():
            matrix.lerp_(moved.flatten(1).T.to(matrix.dtype) @ moves[index].flatten(1) / len(output), self.alpha)
        self.clean_forwards += len(output)
        self.forwards += len(output)
        self.step_count += 1
        return loss
