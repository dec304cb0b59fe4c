"""Learning filters from codes: sums over images, the update, and care of unused filters."""
