"""The trainer, and what it keeps: checkpoints, random states, metrics, the position in the data."""
