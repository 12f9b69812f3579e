"""The paper's method, written the way one would from reading it (Zhang et al. 2024, arXiv 2403.12320).

Forward hooks on every ``nn.Linear`` and ``nn.Conv2d`` add noise to the output, for all sites in one run (joint
perturbation) and for all copies of the batch at once. The input and the noise of every copy are kept as floats; the
gradients follow site after site. This is what Onward is measured against, so it is as fast as so plain a program gets:
torch's own generator, one batched forward, torch's own weight-gradient kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Noise = Callable[[str, int, torch.Size], Tensor]
"""``(site, draws, shape of the site's output for one copy of the batch) -> (draws, *shape)``, of unit variance."""


class NaiveLikelihoodRatio:
    """Gradients by likelihood ratio for the linear and convolution layers of a model; nothing else is trained.

    Args:
        model: its linear and 2-d convolution layers are the sites, each called once a forward.
        loss: ``(output, target) -> one loss a sample``.
        copies: perturbed copies of the batch a step; even, because they are pairs with opposite noise.
        sigma: standard deviation of the noise.
        encode: ``"none"``, or ``"sign"`` for the paper's one-bit form ``sign(x) sign(ε)``, which keeps the values as
            floats all the same.
        noise: what draws the noise; Gaussian numbers of torch's global generator by default.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        copies: int,
        sigma: float = 0.1,
        encode: str = "none",
        noise: Noise | None = None,
    ) -> None:
        if copies < 2 or copies % 2:
            raise ValueError(f"copies={copies}: antithetic copies come in pairs.")
        if encode not in ("none", "sign"):
            raise ValueError(f"encode={encode!r}: known are 'none' and 'sign'.")
        self.model, self.loss = model, loss
        self.copies, self.sigma, self.encode = copies, sigma, encode
        self.noise = noise
        self.sites = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        self.captures: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Add the estimated gradient of the mean loss to ``.grad`` of every site; return the clean mean loss."""
        clean = self.loss(self.model(inputs), target)
        handles = [site.register_forward_hook(partial(self._perturb, name)) for name, site in self.sites.items()]
        try:
            output = self.model(inputs.repeat(self.copies, *[1] * (inputs.dim() - 1)))
        finally:
            for handle in handles:
                handle.remove()
        losses = self.loss(output, target.repeat(self.copies)).reshape(self.copies, -1)
        weights = ((losses - clean) / (self.sigma * losses.numel())).flatten()
        for name, site in self.sites.items():
            x, noise = self.captures[name]
            self._add_gradient(site, x, noise, weights)
        self.captures.clear()
        return clean.mean()

    def _perturb(self, name: str, site: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        draws = self.copies // 2
        shape = torch.Size([output.shape[0] // self.copies, *output.shape[1:]])
        if self.noise is None:
            half = torch.randn((draws, *shape), dtype=output.dtype, device=output.device)
        else:
            half = self.noise(name, draws, shape)
        noise = torch.cat([half, -half]).reshape(output.shape)
        self.captures[name] = (inputs[0], noise)
        return output + self.sigma * noise

    def _add_gradient(self, site: nn.Module, x: Tensor, noise: Tensor, weights: Tensor) -> None:
        if self.encode == "sign":
            x, noise = x.sign(), noise.sign() * math.sqrt(math.pi / 2)
        cotangent = noise * weights.reshape(-1, *[1] * (noise.dim() - 1))
        if isinstance(site, nn.Linear):
            add_to_grad(site.weight, torch.einsum("bo,bi->oi", cotangent, x))
            summed = cotangent.sum(0)
        else:
            assert isinstance(site, nn.Conv2d)
            assert isinstance(site.padding, tuple), "padding by name"
            where: dict[str, Any] = {name: getattr(site, name) for name in ("stride", "padding", "dilation", "groups")}
            add_to_grad(site.weight, torch.nn.grad.conv2d_weight(x, site.weight.shape, cotangent, **where))
            summed = cotangent.sum((0, 2, 3))
        if site.bias is not None:
            add_to_grad(site.bias, summed)


def add_to_grad(parameter: nn.Parameter, gradient: Tensor) -> None:
    """As ``backward`` does it."""
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
