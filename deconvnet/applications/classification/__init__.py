"""Classifiers on sparse codes: words, spatial pyramids and linear SVMs."""
