"""Pictures of a network: features, decompositions of images, and evolution."""
