"""Classification of images by the maps of a network: visual words, spatial pyramids, an SVM."""
