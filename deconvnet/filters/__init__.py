"""Filter learning from sparse maps: sums over images, the update, and the care of its filters."""
