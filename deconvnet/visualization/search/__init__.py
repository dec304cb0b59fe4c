"""The images that activate a map most, their projections, and grids of these."""
