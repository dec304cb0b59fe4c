"""Loading of networks by name, their normalisation, and weight files."""
