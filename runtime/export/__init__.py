"""A program's training step as graphs: what `onward export` writes (`step`, `save`)."""
