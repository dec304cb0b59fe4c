"""The figures of benchmarks/categories.py, against loops and planted categories."""

import categories
import pytest
import torch
from PIL import Image

from deconvnet import DataSettings, DeconvNet, LayerSettings, load_images


def test_features_of_one_category_are_counted_and_shuffled_ones_are_rare():
    labels = torch.arange(4).repeat_interleave(6)
    generator = torch.Generator().manual_seed(0)
    maxima = torch.rand(24, 30, generator=generator) + 0.1
    maxima[:6, :9] += 2  # nine features prefer the first category
    maxima[:, 29] = 0  # one is dead
    row = categories.table_row(maxima, labels, 5)
    pure = 0
    for feature in range(29):
        top = sorted(range(24), key=lambda n: -maxima[n, feature])[:5]
        pure += len({labels[n].item() for n in top}) == 1
    assert row["features"] == 29 and row["of_one_category"] == pytest.approx(pure / 29)
    assert pure >= 9 and row["by_chance"] < 0.02


def test_an_image_is_compared_with_the_other_images_of_each_category():
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    maxima = torch.eye(2).repeat_interleave(3, 0) + 0.01
    assert categories.nearest_to_own(maxima, labels) == 1
    maxima[0] = maxima[5]  # an image like those of the other category
    assert categories.nearest_to_own(maxima, labels) == pytest.approx(5 / 6)


def test_maxima_are_those_of_both_signs_of_each_map_of_each_layer(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in "abc":
        pixels = torch.randint(0, 255, (24, 18, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    net = DeconvNet([LayerSettings(4, 5, pool=(1, 2, 2)), LayerSettings(3, 3)])
    data = DataSettings(source="folder", path=str(tmp_path), size=24, fit="pad", max_images=None)
    images = load_images(data)
    codes = net.infer(images.images, frames=images.frames)
    found = categories.layer_maxima(net, data, str(tmp_path))
    assert [tuple(maxima.shape) for maxima in found] == [(3, 8), (3, 6)]
    for number, maxima in enumerate(found, 1):
        z = codes.layer(number).z
        for n, k in ((0, 0), (2, 2)):
            expected = [max(0, z[n, k].max().item()), max(0, -z[n, k].min().item())]
            assert maxima[n, 2 * k : 2 * k + 2].tolist() == pytest.approx(expected, abs=1e-5)
