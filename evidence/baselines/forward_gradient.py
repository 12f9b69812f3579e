"""Forward gradients: the derivative of the loss along a random direction, by forward-mode differentiation, times it.

Weight form (Baydin et al. 2022, arXiv 2202.08587, Definition 1): ``g = (∇ℓ · v) v`` with v ~ N(0, I) as long as all
weights together, and ``∇ℓ · v`` from one forward with its derivative beside it.

Activity form (Ren et al. 2023, arXiv 2210.03310, section 3): the outputs z of all operations with parameters are moved
instead, each sample's by its own ``u ~ N(0, I)``: ``δz = (∇_z ℓ_n · u) u`` estimates a sample's derivative by z, and
the operation's own derivative by its parameters makes a gradient of it (for a linear layer, ``δz xᵀ``). That perturbs
fewer numbers than there are weights, and every sample gives a direction of its own. (The paper's local losses and
architecture are not here: the loss is the model's.)

Both are unbiased, where nothing couples the samples of a batch. The activity form leaves out what batch normalisation
in training mode carries from one sample to another.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ...compiler.capture import as_call
from ...passes.errors import OptionError
from ...runtime.loss import Loss
from .layers import (
    NORMALISATIONS,
    WEIGHTED,
    check_derivatives,
    cut,
    dual,
    find_layers,
    forward_mode,
    primal_and_tangent,
)
from .program import Baseline, add_gradients, normal_like, trainable


class _ForwardGradient(Baseline):
    """What both forms share: `directions` draws a step, each one forward with its derivative beside it."""

    name = "forward gradient"

    def __init__(self, model: nn.Module, example: Any, loss: Loss, seed: int, directions: int = 1) -> None:
        if type(directions) is not int or directions < 1:
            raise OptionError(f"directions={directions!r}: {self.name} needs a whole number of at least one a step.")
        super().__init__(model, loss, seed)
        check_derivatives(model, example, self.name)
        self.directions = directions

    def step(self, inputs: Any, target: Any, /) -> Tensor:
        """Add the mean estimate over the directions to every ``.grad``; returns the mean loss."""
        loss = torch.zeros(())
        for direction in range(self.directions):
            losses = self.add_estimate(inputs, target, self.generator(f"direction {direction}"))
            self.clean_forwards += len(losses)
            self.forwards += len(losses)
            loss = losses.detach().mean()
        self.step_count += 1
        return loss

    def add_estimate(self, inputs: Any, target: Any, generator: torch.Generator) -> Tensor:
        """Add one direction's share; returns the losses, ``(N,)``."""
        raise NotImplementedError


class WeightForwardGradient(_ForwardGradient):
    """The weight form.

    Args:
        model: with one tensor as output.
        example: inputs as for `onward.compile`.
        loss: ``(output, target) -> one loss a sample``, with a derivative.
        seed: of the directions.
        directions: draws a step.

    Raises:
        OptionError: `directions` is below 1, or an operation without derivative is on the way.
    """

    name = "forward gradient (weights)"

    @torch.no_grad()
    def add_estimate(self, inputs: Any, target: Any, generator: torch.Generator) -> Tensor:
        """Add ``(∇ℓ · v) v``."""
        named = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        directions = {name: normal_like(parameter, generator) for name, parameter in named.items()}
        args, kwargs = as_call(inputs)
        with forward_mode(), self.random_numbers():
            duals = {name: dual(p.detach(), directions[name]) for name, p in named.items()}
            output = torch.func.functional_call(self.model, duals, args, kwargs)
            losses, slopes = primal_and_tangent(self.differentiable_losses(output, target))
        slope = slopes.mean() / self.directions
        add_gradients(list(named.values()), [direction * slope for direction in directions.values()])
        return losses


class ActivityForwardGradient(_ForwardGradient):
    """The activity form.

    Args:
        model: parameters in linear layers, convolutions and normalisations, each of which runs once a forward; one
            tensor as output.
        example, loss, seed, directions: as for `WeightForwardGradient`.

    Raises:
        OptionError: as there, or the model is another one.
    """

    name = "forward gradient (activities)"

    def __init__(self, model: nn.Module, example: Any, loss: Loss, seed: int, directions: int = 1) -> None:
        super().__init__(model, example, loss, seed, directions)
        self.layers = [
            layer
            for layer in find_layers(model, example, WEIGHTED + NORMALISATIONS, self.name)
            if any(parameter.requires_grad for parameter in layer.module.parameters())
        ]

    def add_estimate(self, inputs: Any, target: Any, generator: torch.Generator) -> Tensor:
        """Add each operation's derivative of ``(∇_z ℓ_n · u) u``."""
        outputs: list[Tensor] = []
        moves: list[Tensor] = []

        def receive(index: int, value: Tensor) -> Tensor:
            primal, tangent = primal_and_tangent(value)
            return dual(primal.detach(), tangent)

        def move(_: nn.Module, args: object, value: Tensor) -> Tensor:
            primal, tangent = primal_and_tangent(value)
            outputs.append(primal)
            moves.append(normal_like(primal, generator))
            return dual(primal, tangent + moves[-1])

        with torch.enable_grad(), forward_mode(), contextlib.ExitStack() as stack:
            stack.enter_context(cut(self.layers, receive))
            for layer in self.layers:
                stack.callback(layer.module.register_forward_hook(move).remove)
            output = self.run_model(inputs)
            losses, slopes = primal_and_tangent(self.differentiable_losses(output, target))
            shares = slopes / (len(losses) * self.directions)  # (N,): each sample's slope, for the mean loss
            cotangents = [u * shares.reshape(-1, *[1] * (u.dim() - 1)) for u in moves]
            parameters = trainable(self.model)
            add_gradients(parameters, torch.autograd.grad(outputs, parameters, cotangents))
        return losses.detach()
