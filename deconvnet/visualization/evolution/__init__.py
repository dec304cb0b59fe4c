"""How the features of a network develop while it is trained."""
