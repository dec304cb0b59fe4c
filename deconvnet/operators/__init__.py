"""Linear operators with exact adjoints: convolution, pooling, and their compositions."""
