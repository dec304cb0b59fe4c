"""File formats (checkpoints, networks, arrays) and the record of files that we may replace."""
