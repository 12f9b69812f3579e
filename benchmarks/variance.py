"""What was tried against the variance of plain likelihood ratio, at equal forwards, and σ learned by gradient descent.

    python benchmarks/variance.py --threads 1

A 64-128-64-10 perceptron on digits, written down here directly (all sites perturbed together, noise on every output,
the clean run's activations), so that each idea is a line and none is in the library's way. Judge is the exact gradient
by autograd. What helps is in the library: one-sided copies (``antithetic=False``) and ``sampling="error"``.

- *baseline*: what is subtracted from a perturbed loss;
- *noise*: independent or orthogonal directions (rows of a Hadamard matrix with random signs, or orthogonal Gaussians of
  independent length), or a scrambled Sobol sequence;
- *samples*: a quarter of the batch with four times the copies, drawn alike ("Bernoulli", the published form of FLOPS,
  arXiv 2410.05966), or by error or loss; or by error, as many as the errors' inequality says.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from common import announce
from rich.table import Table
from torch import Generator, Tensor, nn

from onward import models
from onward.runtime.sampling import inclusion

SIGMA, BATCH = 0.05, 64


@dataclass(frozen=True)
class Perceptron:
    """The weight layers of an `onward.models.mlp`, run by hand."""

    layers: Sequence[nn.Linear]

    @classmethod
    def of(cls, model: nn.Module) -> Perceptron:
        return cls([layer for layer in model.modules() if isinstance(layer, nn.Linear)])

    @property
    def widths(self) -> list[int]:
        """Numbers a sample that receive noise, by layer."""
        return [layer.out_features for layer in self.layers]

    @torch.no_grad()
    def __call__(self, x: Tensor, noise: Sequence[Tensor | float]) -> tuple[Tensor, list[Tensor]]:
        """Logits ``(…, N, classes)`` with noise ``(…, N, width)`` behind every layer, and the layers' inputs."""
        activation, inputs = x.flatten(1), []
        for number, (layer, added) in enumerate(zip(self.layers, noise, strict=True)):
            inputs.append(activation)
            activation = layer(activation) + added
            activation = activation.relu() if number < len(self.layers) - 1 else activation
        return activation, inputs

    def gradient(self, cotangents: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Of every weight and bias, from the layers' cotangents ``(N, width)``."""
        return [
            part
            for cotangent, x in zip(cotangents, inputs, strict=True)
            for part in (cotangent.T @ x, cotangent.sum(0))
        ]


def losses_of(logits: Tensor, target: Tensor) -> Tensor:
    """Of every copy and sample, ``(D, N)``."""
    flat = F.cross_entropy(logits.flatten(0, 1), target.repeat(len(logits)), reduction="none")
    return flat.view(len(logits), -1)


# --- noise ------------------------------------------------------------------------------------------------------------

Noise = Callable[[int, int, int, Generator], Tensor]
"""``(draws, samples, width, generator) -> (draws, samples, width)``, all layers' numbers side by side."""


def rademacher(draws: int, samples: int, width: int, generator: Generator) -> Tensor:
    return torch.randint(0, 2, (draws, samples, width), generator=generator).float() * 2 - 1


def gaussian(draws: int, samples: int, width: int, generator: Generator) -> Tensor:
    return torch.randn(draws, samples, width, generator=generator)


def hadamard(draws: int, samples: int, width: int, generator: Generator) -> Tensor:
    """Rows of a Hadamard matrix, its columns repeated over the width, times one random sign a number."""
    rows = torch.ones(1, 1)
    while len(rows) < draws:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    columns = rows[:draws, torch.arange(width) % rows.shape[1]]
    return columns[:, None] * rademacher(1, samples, width, generator)


def orthogonal(draws: int, samples: int, width: int, generator: Generator) -> Tensor:
    """Gaussian directions made orthogonal to each other, with lengths of independent Gaussians."""
    directions = torch.linalg.qr(torch.randn(samples, width, draws, generator=generator)).Q
    lengths = torch.randn(samples, width, draws, generator=generator).norm(dim=1, keepdim=True)
    return (directions * lengths).permute(2, 0, 1)


def sobol(draws: int, samples: int, width: int, generator: Generator) -> Tensor:
    """A scrambled Sobol sequence a sample, through the normal quantile function."""
    seeds = torch.randint(2**31, (samples,), generator=generator).tolist()
    uniform = torch.stack([torch.quasirandom.SobolEngine(width, True, seed).draw(draws) for seed in seeds], 1)
    return math.sqrt(2) * torch.erfinv(2 * uniform.clamp(1e-6, 1 - 1e-6) - 1)


# --- baselines and samples --------------------------------------------------------------------------------------------

BASELINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda perturbed, clean: perturbed,
    "clean loss": lambda perturbed, clean: perturbed - clean,
    "leave one out": lambda perturbed, clean: (perturbed - perturbed.mean(0)) * len(perturbed) / (len(perturbed) - 1),
    "batch mean": lambda perturbed, clean: perturbed - perturbed.mean(),
}
"""One-sided copies: ``(perturbed (D, N), clean (N,)) -> what multiplies the noise``."""

Selection = Callable[[Tensor, Tensor], Tensor]
"""``(error (N, outputs), losses (N,)) -> probabilities (N,)``."""


def _of_share(size: Callable[[Tensor, Tensor], Tensor], share: float = 0.25) -> Selection:
    """Proportional to a size and a tenth of its mean, cut at 1, of a share of the batch on average."""

    def probabilities(error: Tensor, losses: Tensor) -> Tensor:
        sizes = size(error, losses)
        sizes = sizes + 0.1 * sizes.mean()
        low, high = 0.0, float(1 / sizes.min())
        for _ in range(50):
            scale = (low + high) / 2
            low, high = (scale, high) if float((scale * sizes).clamp_max(1).mean()) < share else (low, scale)
        return (high * sizes).clamp_max(1)

    return probabilities


SELECTIONS: dict[str, Selection] = {
    "a quarter, alike": _of_share(lambda error, losses: torch.ones_like(losses)),
    "a quarter, by loss": _of_share(lambda error, losses: losses),
    "a quarter, by error": _of_share(lambda error, losses: error.norm(dim=1)),
    "by error": lambda error, losses: inclusion(error).float(),
}


@dataclass(frozen=True)
class Variant:
    """One way to spend the forwards."""

    noise: Noise = rademacher
    baseline: str | None = None
    """Of one-sided copies; None: antithetic pairs."""
    samples: str | None = None


VARIANTS: dict[str, Variant] = {
    "antithetic": Variant(),
    "antithetic, Gaussian": Variant(gaussian),
    "one-sided, no baseline": Variant(baseline="none"),
    "one-sided, mean of the batch": Variant(baseline="batch mean"),
    "one-sided, leave one out": Variant(baseline="leave one out"),
    "one-sided, clean loss": Variant(baseline="clean loss"),
    "antithetic, Hadamard": Variant(hadamard),
    "antithetic, orthogonal Gaussian": Variant(orthogonal),
    "antithetic, Sobol": Variant(sobol),
    **{f"antithetic, {name}": Variant(samples=name) for name in SELECTIONS},
    "one-sided, clean loss, Hadamard": Variant(hadamard, "clean loss"),
    "one-sided, clean loss, by error": Variant(rademacher, "clean loss", "by error"),
}


def estimate(
    net: Perceptron, x: Tensor, y: Tensor, variant: Variant, copies: int, generator: Generator
) -> list[Tensor]:
    """The gradient of the mean loss, from `copies` perturbed forwards a sample of the batch on average."""
    logits, _ = net(x, [0.0] * len(net.layers))
    clean = losses_of(logits[None], y)[0]
    counts = torch.full_like(clean, 1 / len(x))
    if variant.samples is not None:
        error = logits.softmax(1) - F.one_hot(y, logits.shape[1])
        p = SELECTIONS[variant.samples](error, clean)
        kept = torch.rand(len(x), generator=generator) < p
        if not kept.any():
            return [torch.zeros_like(part) for layer in net.layers for part in (layer.weight, layer.bias)]
        copies = round(copies / float(p.mean()))
        x, y, clean, counts = x[kept], y[kept], clean[kept], (counts / p)[kept]
    draws = copies if variant.baseline is not None else max(1, copies // 2)
    noise = variant.noise(draws, len(x), sum(net.widths), generator).split(net.widths, 2)
    perturbed, _ = net(x, [SIGMA * part for part in noise])
    if variant.baseline is not None:
        credit = BASELINES[variant.baseline](losses_of(perturbed, y), clean) / SIGMA
    else:
        opposite, _ = net(x, [-SIGMA * part for part in noise])
        credit = (losses_of(perturbed, y) - losses_of(opposite, y)) / (2 * SIGMA)
    _, inputs = net(x, [0.0] * len(net.layers))
    return net.gradient([torch.einsum("dn,dnw,n->nw", credit, part, counts) / draws for part in noise], inputs)


def relative_errors(model: nn.Module, x: Tensor, y: Tensor, copies: int, repeats: int) -> dict[str, list[float]]:
    """``|ĝ - g|² / |g|²`` of every variant, in `repeats` independent estimates."""
    net = Perceptron.of(model)
    parameters = [part for layer in net.layers for part in (layer.weight, layer.bias)]
    exact = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    size = sum(float(part.square().sum()) for part in exact)
    found: dict[str, list[float]] = {}
    for name, variant in VARIANTS.items():
        generator = torch.Generator().manual_seed(1)
        found[name] = []
        for _ in range(repeats):
            parts = zip(estimate(net, x, y, variant, copies, generator), exact, strict=True)
            found[name].append(sum(float((one - other).square().sum()) for one, other in parts) / size)
    return found


# --- learned σ --------------------------------------------------------------------------------------------------------


def with_sigma(start: float, learned: bool, seed: int, epochs: int, copies: int = 32) -> tuple[float, list[float]]:
    """Train with Gaussian noise, one-sided; log σ of every layer by ``∂/∂log σ = E[ℓ Σ (ε² - 1)]`` (Jiang et al., arXiv
    2305.08960) if it is learned. Test accuracy, and every layer's σ at the end."""
    data = models.load("digits")
    torch.manual_seed(seed)
    model = models.mlp()
    net = Perceptron.of(model)
    weights = torch.optim.Adam(model.parameters(), lr=3e-3)
    log_sigma = torch.full((len(net.layers),), math.log(start))
    sigmas = torch.optim.Adam([log_sigma], lr=0.02)
    generator = torch.Generator().manual_seed(seed)
    batches, _ = models.loaders(data, 32, seed)
    for _ in range(epochs):
        for x, y in batches:
            sigma = log_sigma.exp()
            logits, inputs = net(x, [0.0] * len(net.layers))
            noise = gaussian(copies, len(x), sum(net.widths), generator).split(net.widths, 2)
            perturbed, _ = net(x, [s * part for s, part in zip(sigma, noise, strict=True)])
            credit = losses_of(perturbed, y) - losses_of(logits[None], y)
            cotangents = [
                torch.einsum("dn,dnw->nw", credit, part) / (copies * len(x) * s)
                for s, part in zip(sigma, noise, strict=True)
            ]
            for parameter, gradient in zip(model.parameters(), net.gradient(cotangents, inputs), strict=True):
                parameter.grad = gradient
            weights.step()
            if learned:
                log_sigma.grad = torch.stack([(credit * (part.square() - 1).sum(2)).mean() for part in noise])
                sigmas.step()
    images, labels = data.test.tensors
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean()), log_sigma.exp().tolist()


# --- tables -----------------------------------------------------------------------------------------------------------


def trained(epochs: int, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A model after so many epochs of backpropagation, and a batch."""
    data = models.load("digits")
    torch.manual_seed(seed)
    model = models.mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batches, _ = models.loaders(data, 32, seed)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    images, labels = data.train.tensors
    return model, images[:BATCH], labels[:BATCH]


def variance_table(
    epochs: Sequence[int], copies: Sequence[int], repeats: int, seed: int
) -> tuple[Table, dict[str, Any]]:
    """Every variant's mean squared error over that of antithetic pairs with the same forwards."""
    columns = [(number, count) for number in epochs for count in copies]
    found = {}
    for number in epochs:
        model, x, y = trained(number, seed)
        found.update({(number, count): relative_errors(model, x, y, count, repeats) for count in copies})
    table = Table(title=f"mean squared error ÷ that of antithetic pairs, {repeats} estimates", title_justify="left")
    table.add_column("variant")
    for number, count in columns:
        table.add_column(f"{number} epochs, {count} forwards", justify="right")
    for name in VARIANTS:
        cells = [mean(found[column][name]) / mean(found[column]["antithetic"]) for column in columns]
        table.add_row(name, *(f"{cell:.2f}" if cell < 100 else f"{cell:.0f}" for cell in cells))
    return table, {f"{number} epochs, {count} copies": found[number, count] for number, count in columns}


def sigma_table(starts: Sequence[float], seeds: Sequence[int], epochs: int) -> tuple[Table, list[dict[str, Any]]]:
    """Accuracies with σ fixed, and learned."""
    table = Table(title=f"σ fixed and learned, {epochs} epochs, {len(seeds)} seeds", title_justify="left")
    for heading in ("σ at first", "fixed", "learned", "σ in the end, by layer"):
        table.add_column(heading, justify="right" if heading != "σ at first" else "left")
    rows: list[dict[str, Any]] = []
    for start in starts:
        cells = {}
        for learned in (False, True):
            runs = [with_sigma(start, learned, seed, epochs) for seed in seeds]
            cells[learned] = f"{mean(run[0] for run in runs):.4f} ± {stdev(run[0] for run in runs):.4f}"
            ends = [mean(run[1][layer] for run in runs) for layer in range(len(runs[0][1]))]
            rows.append({"start": start, "learned": learned, "runs": runs})
        table.add_row(f"{start:g}", cells[False], cells[True], ", ".join(f"{end:.3f}" for end in ends))
    return table, rows


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", nargs="+", type=int, default=[0, 1, 15], help="of training before the measurement")
    parser.add_argument("--copies", nargs="+", type=int, default=[32, 128], help="forwards a sample")
    parser.add_argument("--repeats", type=int, default=40, help="estimates a variant")
    parser.add_argument("--sigmas", nargs="*", type=float, default=[0.01, 0.1, 1.0], help="where learned σ begins")
    parser.add_argument("--sigma-epochs", type=int, default=8)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    options = parser.parse_args(argv)
    if len(options.seeds) < 2:
        parser.error("--seeds: at least two, for their scatter.")
    console, where = announce(options.threads, 140)
    table, errors = variance_table(options.epochs, options.copies, options.repeats, options.seeds[0])
    console.print(table)
    sigmas: list[dict[str, Any]] = []
    if options.sigmas:
        table, sigmas = sigma_table(options.sigmas, options.seeds, options.sigma_epochs)
        console.print(table)
    if options.json is not None:
        written = {"machine": where, "seeds": options.seeds, "errors": errors, "sigmas": sigmas}
        options.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
