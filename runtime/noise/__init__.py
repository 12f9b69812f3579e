"""Keyed noise and packed signs: the operators that passes insert, defined in NumPy and torch; kernels beside."""
