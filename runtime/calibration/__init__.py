"""Calibration: settings of an estimator, chosen from what a batch shows (method.md 7, 12)."""
