"""Training: learning one layer, a run over all layers, and the state to resume it exactly."""
