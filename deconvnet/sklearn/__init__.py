"""Estimators for scikit-learn: networks of images, and dictionaries of signals."""

from deconvnet.sklearn.signal_dictionary import SignalDictionary
from deconvnet.sklearn.transformer import DeconvNetTransformer

__all__ = ["DeconvNetTransformer", "SignalDictionary"]
