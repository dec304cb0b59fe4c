"""Training: learning one layer, a run over all layers, and what it needs to resume exactly."""
