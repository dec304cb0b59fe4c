"""Layers of patches learn what 1x1 filters learn from the patches, and resume exactly."""

from dataclasses import replace

import pytest
import torch
from helpers import StopAt, no_pictures
from torch.testing import assert_close

from deconvnet import DeconvNet, LayerSettings, LearningSettings, PreprocessingSettings, load
from deconvnet.monitoring.monitor import Monitor
from deconvnet.network.layer import Layer
from deconvnet.operators.patches import extract_patches
from deconvnet.sparse_coding.problem import SolverSettings
from deconvnet.support.seeding import seeded_generator
from deconvnet.training.layer_trainer import LayerTrainer
from deconvnet.training.loop import Interrupted, train
from deconvnet.training.run_folder import RunFolder

FAST = SolverSettings(method="fista", iterations=20, training_iterations=5)
LEARNING = LearningSettings(epochs=5, batch_size=2, reinit_unused=False)
PATCHES = LayerSettings(
    4, 3, lam=6.0, coding="patches", boundary="zero", solver=FAST, learning=LEARNING
)


@pytest.fixture(scope="module")
def images(textures):
    return textures(4, 1, 12, 14)


@pytest.fixture(scope="module")
def b(images):
    y = images - images.mean((2, 3), keepdim=True)
    return y / y.square().mean().sqrt()


def trained(settings, b, filters):
    layer = Layer(settings, b.shape[1], seeded_generator(0, 1))
    trainer = LayerTrainer(layer, b, filters=filters)
    objectives = []
    while not trainer.done:
        stats = trainer.update()
        if stats is not None:
            objectives.append(stats.reconstruction + stats.sparsity)
    return layer.filters, objectives, trainer


def test_filters_of_patches_learn_as_1x1_filters_of_their_numbers(b):
    start = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    f, objectives, trainer = trained(PATCHES, b, start)
    patches = extract_patches(b, (3, 3), "zero")
    alone = replace(PATCHES, filter_size=1, coding="convolution")
    expected, other, _ = trained(alone, patches, start.view(4, 9, 1, 1))
    assert_close(f.flatten(1), expected.flatten(1), atol=1e-6, rtol=1e-5)
    assert objectives == pytest.approx(other, rel=1e-6)
    assert objectives[-1] < 0.95 * objectives[0]
    # The sums that ranks exchange: linear, gram and two flags.
    assert trainer.message_bytes == 8 * (2 + 4 * 9 + 4 * 4)


def test_planes_of_filters_of_patches_keep_mean_zero(b):
    f, _, _ = trained(replace(PATCHES, learning=replace(LEARNING, zero_mean=True)), b, None)
    assert_close(f.mean((2, 3)), torch.zeros(4, 1))
    assert_close(f.flatten(1).norm(dim=1), torch.ones(4))


def test_a_run_of_layers_of_patches_resumes_bit_by_bit(images, tmp_path):
    def run(folder, stop=None):
        learning = replace(LEARNING, epochs=2, reinit_unused=True)
        first = replace(PATCHES, normalize=0.1, pool=[1, 2, 2], split_signs=True, learning=learning)
        layers = [first, replace(first, filter_size=2, pool=None, split_signs=False)]
        net = DeconvNet(layers, PreprocessingSettings(color="grey", steps=["mean"]))
        monitor = StopAt(folder, stop) if stop else Monitor(folder, progress=False)
        with monitor, no_pictures():
            return net, train(net, images, RunFolder(folder, {}), monitor)

    expected, results = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", ("update", 6))
    net, _ = run(tmp_path / "stopped")
    for number in (1, 2):
        assert torch.equal(net.layer(number).filters, expected.layer(number).filters)
    codes = load(tmp_path / "whole").infer(images)
    for number, result in enumerate(results, 1):
        assert result.snr == pytest.approx(expected.snr(codes, number), abs=1e-4)
