"""Networks by name, their normalization, and files of weights."""
