"""Training: the order of events in a run, one layer's learning, and what resuming needs."""
