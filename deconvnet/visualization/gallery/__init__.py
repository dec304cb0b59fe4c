"""The web page that shows a network."""
