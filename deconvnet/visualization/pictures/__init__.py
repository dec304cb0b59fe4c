"""Pictures as tensors: features, image decompositions, grids and charts."""
