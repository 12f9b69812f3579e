"""The kernels, each beside its definition."""

from __future__ import annotations

from .. import operators as definitions
from .. import packed_gradients, packing, rows
from . import gradients, noise, product, signs
from .proof import Kernel

_ROWS = (
    # With a scale of 0 the result is z, whatever the noise.
    Kernel(
        "perturb",
        definitions.perturb,
        noise.perturb,
        noise.perturb_fits,
        telling=lambda expected, z, copies, key, sigmas, site, *_: bool(sigmas[site] != 0),
    ),
    Kernel("weighted_noise", definitions.weighted_noise, noise.weighted_noise, noise.weighted_fits),
    Kernel(
        "weighted_noise_sum",
        definitions.weighted_noise_sum,
        noise.weighted_noise_sum,
        noise.sum_fits,
        reference=noise.reference_sum,
    ),
    Kernel("stochastic_sign", definitions.stochastic_sign, noise.stochastic_sign, noise.stochastic_fits),
    Kernel("pack_signs", packing.pack_signs, signs.pack_signs, signs.pack_fits),
    Kernel(
        "pack_stochastic_signs",
        packing.pack_stochastic_signs,
        signs.pack_stochastic_signs,
        signs.pack_stochastic_fits,
        variant=signs.is_dense,
    ),
    Kernel("unpack_signs", packing.unpack_signs, signs.unpack_signs, signs.unpack_fits),
    Kernel(
        "packed_linear_gradient",
        packed_gradients.packed_linear_gradient,
        gradients.packed_linear_gradient,
        gradients.linear_fits,
        reference=gradients.reference_linear,
        variant=lambda *given: gradients.linear_form(*given)[:3],
        excerpt=gradients.excerpt,
    ),
    Kernel(
        "packed_convolution_gradient",
        packed_gradients.packed_convolution_gradient,
        gradients.packed_convolution_gradient,
        gradients.convolution_fits,
        reference=gradients.reference_convolution,
        variant=lambda *given: gradients.convolution_form(*given)[:3],
        excerpt=gradients.excerpt,
    ),
    Kernel(
        "noise_product",
        rows.product_of_rows,
        product.noise_product,
        product.product_fits,
        reference=product.reference_product,
        variant=product.columns_of,
    ),
)

KERNELS = {row.name: row for row in _ROWS}
