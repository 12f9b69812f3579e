"""Graphs as ONNX: their core ATen form, the table of operators, noise in integer arithmetic, and the files."""
