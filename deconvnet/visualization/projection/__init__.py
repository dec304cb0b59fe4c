"""From activations back to pixels, for deconvolutional networks and any CNN."""
