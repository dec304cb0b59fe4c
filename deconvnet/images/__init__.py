"""Images: sources, decoding, resizing and preprocessing."""
