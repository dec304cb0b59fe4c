"""Applications of sparse maps: classification and restoration of images."""
