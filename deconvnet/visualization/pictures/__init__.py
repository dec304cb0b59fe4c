"""Arrays of pixels: features, parts, grids and charts."""
