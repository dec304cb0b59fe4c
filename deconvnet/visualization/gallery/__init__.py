"""The gallery: a web page that shows a network, layer by layer and map by map."""
