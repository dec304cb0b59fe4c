"""Deconvolutional networks: layers, inference, codes and reconstruction."""
