"""Training a network on images with holes."""

import pytest
import torch
from helpers import assert_same_network
from torch.testing import assert_close

from deconvnet import (
    DeconvNet,
    LayerSettings,
    LearningSettings,
    PreprocessingSettings,
    SolverSettings,
)
from deconvnet.network.metrics import snr
from deconvnet.operators.convolution import deconvolve
from deconvnet.training.loop import train
from deconvnet.training.session import Limits
from deconvnet.training.training_set import ImageSource


@pytest.fixture(scope="module")
def images(textures):
    return textures(3, 3, 20, 20)


@pytest.fixture(scope="module")
def seen():
    return torch.rand(3, 1, 20, 20, generator=torch.Generator().manual_seed(5)) < 0.6


def network(target="maps", steps=("contrast",)):
    common = dict(
        solver=SolverSettings("fista", iterations=8, training_iterations=3),
        learning=LearningSettings(epochs=2, batch_size=2),
    )
    layers = [
        LayerSettings(4, 5, pool=[1, 2, 2], **common),
        LayerSettings(5, 3, target=target, **common),
    ]
    preprocessing = PreprocessingSettings("grey", steps=list(steps), contrast_size=5)
    return DeconvNet(layers, preprocessing)


def trained(images, **options):
    net = network(options.pop("target", "maps"))
    train(net, ImageSource.from_tensor(images, has_holes=True), **options)
    return net


@pytest.mark.parametrize("target", ["maps", "image"])
def test_unseen_pixels_change_neither_the_network_nor_its_maps(images, seen, target):
    net = trained(images.where(seen, torch.nan), target=target)
    # Nor does it matter whether codes are held in memory or inferred again.
    again = trained(images.where(seen, torch.nan), target=target, limits=Limits(hold_codes=False))
    assert_same_network(net, again)
    first = net.infer(images.where(seen, torch.nan), mask=seen)
    second = net.infer(images.where(seen, 0.1), mask=seen)
    for one, two in zip(first.layers, second.layers, strict=True):
        assert torch.equal(one.z, two.z)
    assert not torch.equal(net.infer(images).layers[0].z, first.layers[0].z)


def test_layers_that_explain_the_image_explain_its_seen_pixels(images, seen):
    net = network("image")
    net.preprocessing.fit(images)
    codes = net.infer(images, mask=seen)
    y, synthesis = codes.y, net.synthesize(codes, 2)
    error = (seen * (y - synthesis)).square().sum((1, 2, 3))
    assert_close(codes.layers[1].reconstruction, error.double(), rtol=1e-4, atol=1e-6)
    first = seen * (y - deconvolve(codes.layers[0].z, net.layer(1).filters))
    assert_close(codes.layers[0].reconstruction, first.double().square().sum((1, 2, 3)))
    assert net.snr(codes, 2) == pytest.approx(snr(y[seen], synthesis[seen]))
    part = codes.select(slice(1, 3))
    assert torch.equal(part.mask, seen[1:3]) and torch.equal(codes.to("cpu").mask, seen)


def test_masks_of_other_sizes_are_refused(images):
    with pytest.raises(ValueError, match="^mask of shape .* does not fit images of shape"):
        network().infer(images, mask=torch.ones(4, 1, 20, 19))
