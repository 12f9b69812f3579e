"""The rules, by family. Importing this package fills the table `emit.RULES`."""

from . import convolution, indexing, integers, noise, pointwise, products, reductions, shapes  # noqa: F401
