"""The evolution of the features of a network during training."""
