"""Projection of activations to pixels, for deconvolutional networks and any CNN."""
