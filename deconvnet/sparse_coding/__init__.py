"""Sparse codes of images: the prior, the problem, and the algorithms that solve it."""
