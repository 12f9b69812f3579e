"""Compiler passes: one file a pass, each a pure function of an FX graph, and the operators and rules they speak of."""
