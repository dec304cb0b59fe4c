"""The images that activate a map most, and their projections."""
