"""The schedule of a step: its tasks, what they cost, when they run, and what was recorded of it."""
