"""Direct feedback alignment (Nøkland 2016, arXiv 1609.01596): the output's error through fixed random matrices.

For layers ``a_i = W_i h_{i-1} + b_i``, ``h_i = f(a_i)`` and the error ``e = ∂ℓ/∂o`` at the output, backpropagation has
``δa_i = (W_{i+1}ᵀ δa_{i+1}) ⊙ f'(a_i)``. Here (equation 7 there) ``δa_i = (B_i e) ⊙ f'(a_i)``, with ``B_i`` random and
fixed; the last layer gets ``e`` itself. ``δW_i = -δa_i h_{i-1}ᵀ`` as usual.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.loss import Loss
from .layers import WEIGHTED, Layer, check_output, check_reached, cut, find_layers, forward_once
from .program import Baseline, add_gradients, trainable


class DirectFeedbackAlignment(Baseline):
    """Every layer's own derivative of ``B e``, which arrives where the next layer reads.

    A layer is a linear map or convolution with all that follows up to the next one: activation, pooling and
    normalisation are its f, and are differentiated as such. Where a value goes to several layers (a shortcut), each
    sends its own ``B e``.

    The matrices are uniform in ±1/√(outputs), so that ``B e`` has the size of e: the paper asks for no more than random
    ones, and Adam divides the scale out.

    Args:
        model: weights in linear layers and convolutions, each of which runs once a forward; one tensor as output.
        example: inputs as for `onward.compile`.
        loss: ``(output, target) -> one loss a sample``, with a derivative.
        seed: of the matrices.

    Raises:
        OptionError: the model is another one, or has an operation without derivative inside a layer.
    """

    name = "DFA"

    def __init__(self, model: nn.Module, example: Any, loss: Loss, seed: int) -> None:
        super().__init__(model, loss, seed)
        self.layers = find_layers(model, example, WEIGHTED, self.name)
        self.feedback = _make_feedback(self.layers, model, example, self.name)
        generator = torch.Generator().manual_seed(self.key("feedback"))
        for matrix in self.feedback.values():
            self.fill(matrix, generator)

    def fill(self, matrix: Tensor, generator: torch.Generator) -> None:
        """The matrix as it is at the start, ``(outputs, elements)``."""
        matrix.copy_(torch.rand(matrix.shape, generator=generator).mul_(2).sub_(1).div_(math.sqrt(len(matrix))))

    def step(self, inputs: Any, target: Any, /) -> Tensor:
        """Add the gradients to every ``.grad``; returns the mean loss."""
        ends: dict[int, Tensor] = {}

        def receive(index: int, value: Tensor) -> Tensor:
            ends[index] = value
            return value.detach()

        with torch.enable_grad(), cut(self.layers, receive):
            output = self.run_model(inputs)
        loss, error = self.output_error(output, target)
        self.pull_back(ends, output, error)
        self.clean_forwards += len(output)
        self.step_count += 1
        return loss

    def pull_back(self, ends: dict[int, Tensor], output: Tensor, error: Tensor) -> None:
        """Add each layer's derivative of what arrives at its end: ``B e`` where the next reads, e at the output."""
        parameters = trainable(self.model)
        arriving = [
            (error.flatten(1).to(matrix.dtype) @ matrix).reshape(ends[index].shape)
            for index, matrix in self.feedback.items()
        ]
        add_gradients(
            parameters,
            torch.autograd.grad([*(ends[index] for index in self.feedback), output], parameters, [*arriving, error]),
        )

    def learned(self) -> dict[str, Tensor]:
        """The matrices by the layer that reads where they arrive."""
        return {self.layers[index].name: matrix for index, matrix in self.feedback.items()}


def _make_feedback(layers: list[Layer], model: nn.Module, example: Any, method: str) -> dict[int, Tensor]:
    """Zeros ``(outputs, elements)`` for each layer whose input depends on weights, by its index."""
    ends: dict[int, Tensor] = {}

    def receive(index: int, value: Tensor) -> Tensor:
        if value.requires_grad:
            ends[index] = value
        return value.detach()

    with cut(layers, receive):
        output = forward_once(model, example, grad=True)
    check_output(output, method)
    check_reached(model, [*ends.values(), output], method)
    outputs = output[0].numel()
    return {
        index: torch.zeros(outputs, end[0].numel(), dtype=end.dtype, device=end.device) for index, end in ends.items()
    }
