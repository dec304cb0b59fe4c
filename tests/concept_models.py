"""A tiny CNN with a dictionary over the activations of one of its layers, for tests."""

import torch
from torch import nn

from deconvnet import DeconvNet, LayerSettings, PreprocessingSettings
from deconvnet.visualization.models.concept_model import ConceptModel

CHANNELS, MAPS = 4, 6


def network():
    torch.manual_seed(0)
    low = [nn.Conv2d(3, CHANNELS, 3), nn.ReLU(), nn.MaxPool2d(2)]
    high = [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 3)]
    return nn.Sequential(*low, *high, *head).eval()


def concept_model(filter_size=3, **options):
    settings = LayerSettings(MAPS, filter_size, lam=20.0, non_negative=True, **options)
    arrays = PreprocessingSettings(color="none", steps=[], channels=CHANNELS)
    dictionary = DeconvNet([settings], arrays)
    dictionary.preprocessing.scale.fill_(0.5)
    return ConceptModel(network(), "4", dictionary)
