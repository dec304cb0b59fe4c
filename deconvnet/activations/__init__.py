"""Activations of another network as what a deconvolutional network explains."""
