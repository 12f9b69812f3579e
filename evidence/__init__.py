"""What the gradients and the training are measured against: fidelity, comparisons, and the methods of others.

Here, and nowhere else in the package, autograd is the judge.
"""
