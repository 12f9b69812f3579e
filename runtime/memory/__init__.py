"""How much memory a step takes: predicted, kept within a budget, and explained where it was not there."""
