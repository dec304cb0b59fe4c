"""The convolutional network of Zeiler and Fergus (2014), sized for small images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ZFNet(nn.Module):
    """Scores (N, classes) of images (N, channels, size, size); layers conv1, relu1, pool1, ...

    As in the paper, there are five convolutions, each followed by a ReLU; the first has 7x7 filters
    and stride 2. Max pooling over 3x3 positions with stride 2 follows the first, second and fifth,
    and normalisation over neighbouring maps the first two.

    The differences to the paper: the layers have 1, 2, 3, 3 and 2 times `width` maps (there 96,
    256, 384, 384 and 256); maps are zero-padded, so that a stride of 2 halves them; the second
    layer has stride 1, because small images have no pixels to lose; there is one hidden layer of
    8 `width` units instead of two; local response normalisation replaces contrast normalisation.
    Weights come from torch's global generator, in the first layer with the paper's standard
    deviation of 0.01, elsewhere after He et al. (2015).
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
        # Small images are smooth: filters keep their initial noise at frequencies that do not
        # occur, so the noise must be weak compared to what they learn.
        nn.init.normal_(self.conv1.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


@torch.no_grad()
def limit_filters(net: nn.Module, rms: float) -> None:
    """Scale filters of convolutions whose root mean square exceeds `rms` back to it, in place.

    This keeps filters of the first layer from dominating the others (Zeiler and Fergus 2014,
    section 3; 0.1 there, for pixels from -128 to 128).
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            actual = layer.weight.square().mean((1, 2, 3), keepdim=True).sqrt()
            layer.weight.mul_((rms / actual).clamp(max=1))
