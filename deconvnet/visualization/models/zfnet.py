"""The convolutional network of Zeiler and Fergus (2014), in a size for small images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ZFNet(nn.Module):
    """Scores (N, classes) of images (N, channels, size, size); layers conv1, relu1, pool1, ...

    As in the paper: five convolutions, the first of 7x7 filters with stride 2, ReLU after each,
    maxima of 3x3 places with stride 2 after the first, second and fifth, the first two then divided
    by the responses of neighbouring maps. Other than there: `width` maps in the first layer and 2,
    3, 3 and 2 times as many in the others (96, 256, 384, 384 and 256 in the paper); zeros around
    maps, so that a stride halves them; stride 1 in the second layer, since small images have no
    pixels to lose; one hidden layer of 8 `width` units instead of two; local response normalisation
    for contrast normalisation. Weights are drawn from torch's global generator, those of the first
    layer with the paper's deviation of 0.01, the others after He et al. (2015).
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 10,
        *,
        size: int = 64,
        width: int = 32,
        dropout: float = 0.5,
    ):
        super().__init__()
        self.arguments = {
            **{"channels": channels, "classes": classes},
            **{"size": size, "width": width, "dropout": dropout},
        }
        side = math.ceil(size / 16)  # of the maps of pool5
        self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(3, stride=2, padding=1)
        self.norm1 = nn.LocalResponseNorm(5, k=2)
        self.conv2 = nn.Conv2d(width, 2 * width, 5, padding=2)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(3, stride=2, padding=1)
        self.norm2 = nn.LocalResponseNorm(5, k=2)
        self.conv3 = nn.Conv2d(2 * width, 3 * width, 3, padding=1)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(3 * width, 3 * width, 3, padding=1)
        self.relu4 = nn.ReLU()
        self.conv5 = nn.Conv2d(3 * width, 2 * width, 3, padding=1)
        self.relu5 = nn.ReLU()
        self.pool5 = nn.MaxPool2d(3, stride=2, padding=1)
        self.flatten = nn.Flatten()
        self.fc6 = nn.Linear(2 * width * side * side, 8 * width)
        self.relu6 = nn.ReLU()
        self.drop6 = nn.Dropout(dropout)
        self.fc7 = nn.Linear(8 * width, classes)
        for layer in self.children():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        # Small images are smooth: where they have nothing to say, filters stay the noise they were,
        # which must then be weak beside what they learn.
        nn.init.normal_(self.conv1.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


@torch.no_grad()
def limit_filters(net: nn.Module, rms: float) -> None:
    """Filters of convolutions whose root mean square is above `rms` are scaled back to it.

    Zeiler and Fergus 2014, section 3: so that no filter of the first layer dominates the others
    (0.1 in the paper, for pixels from -128 to 128).
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            found = layer.weight.square().mean((1, 2, 3), keepdim=True).sqrt()
            layer.weight.mul_((rms / found).clamp(max=1))
