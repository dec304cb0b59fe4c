"""What sparse maps are good for once they are found."""
