"""Images: where they come from, how they are read and resized, and their preprocessing."""
