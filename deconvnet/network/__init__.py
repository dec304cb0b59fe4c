"""A deconvolutional network: layers, inference, codes and reconstruction."""
