"""MeZO (Malladi et al. 2023, arXiv 2305.17333): SPSA on the weights, with noise that is made again from its seed.

Algorithm 1 there: for z ~ N(0, I) as long as all weights together, ``g = (ℓ(θ + ε z) - ℓ(θ - ε z)) / 2ε`` on the same
batch, and the step goes along ``g z``. z is never stored: each of its uses draws it again from its seed, tensor by
tensor. The mean over several pairs is the paper's n-SPSA (Definition 1).

Two things differ. The paper steps by ``-η g z`` itself (SGD); here ``g z`` goes into ``.grad``, so that every method
has the same optimizer. And the paper restores the weights by adding ``ε z`` once more, which leaves an error of
rounding each step; here they are perturbed in place from a copy and restored from it, to the bit. That costs the memory
of the weights, which this comparison does not measure.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...passes.errors import OptionError
from ...runtime.loss import Loss
from .layers import check_output, forward_once
from .program import Baseline, add_gradients, normal_like, trainable


class MeZO(Baseline):
    """Two forwards a pair and step, and no derivative of anything: the loss may be a black box.

    The model's own random numbers (dropout) are the same in both runs of a pair. The running statistics of batch
    normalisation move in each.

    Args:
        model: with one tensor as output.
        example: inputs as for `onward.compile`.
        loss: ``(output, target) -> one loss a sample``.
        seed: of z.
        pairs: pairs a step.
        epsilon: ε; the paper's 1e-3.

    Raises:
        OptionError: `pairs` is below 1, `epsilon` is not positive, or the output is another one.
    """

    name = "MeZO"

    def __init__(
        self, model: nn.Module, example: Any, loss: Loss, seed: int, pairs: int = 1, epsilon: float = 1e-3
    ) -> None:
        if type(pairs) is not int or pairs < 1:
            raise OptionError(f"pairs={pairs!r}: {self.name} needs a whole number of at least one pair a step.")
        if not epsilon > 0:
            raise OptionError(f"epsilon={epsilon!r}: the size of the perturbation must be positive.")
        super().__init__(model, loss, seed)
        check_output(forward_once(model, example), self.name)
        self.pairs, self.epsilon = pairs, epsilon

    @torch.no_grad()
    def step(self, inputs: Any, target: Any, /) -> Tensor:
        """Add the estimate to every ``.grad``; returns the mean loss of the perturbed runs. Weights are as before."""
        parameters = trainable(self.model)
        before = [parameter.clone() for parameter in parameters]
        losses: list[Tensor] = []
        slopes: list[Tensor] = []
        try:
            for pair in range(self.pairs):
                above, below = (
                    self._perturbed_loss(inputs, target, parameters, before, pair, epsilon)
                    for epsilon in (self.epsilon, -self.epsilon)
                )
                losses.append((above + below) / 2)
                slopes.append((above - below) / (2 * self.epsilon))
        finally:
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        for pair, slope in enumerate(slopes):
            generator = self.generator(f"pair {pair}")
            for parameter in parameters:  # one tensor's z at a time
                z = normal_like(parameter, generator)
                add_gradients([parameter], [z.mul_(slope.to(z.dtype) / self.pairs)])
        self.step_count += 1
        return torch.stack(losses).mean().float()

    def _perturbed_loss(
        self,
        inputs: Any,
        target: Any,
        parameters: list[nn.Parameter],
        before: list[Tensor],
        pair: int,
        epsilon: float,
    ) -> Tensor:
        """The mean loss at θ + ε z, in double precision: the two of a pair differ in their last digits."""
        generator = self.generator(f"pair {pair}")
        for parameter, value in zip(parameters, before, strict=True):
            torch.add(value, normal_like(parameter, generator), alpha=epsilon, out=parameter)
        output = self.run_model(inputs)
        self.forwards += len(output)
        return self.per_sample_loss(output, target).double().mean()
