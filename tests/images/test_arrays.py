"""Arrays of any number of channels: read, preprocessed, learned from, drawn and reconstructed."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from deconvnet import load
from deconvnet.cli.train import for_arrays
from deconvnet.images.arrays import array_shape, read_array_image
from deconvnet.images.datasets import load_images, stream_images
from deconvnet.images.preprocessing import Preprocessing, PreprocessingSettings
from deconvnet.images.sources import DataSettings
from deconvnet.network.layer import LayerSettings
from deconvnet.network.network import DeconvNet
from deconvnet.visualization import filter_grid
from deconvnet.visualization.drawing.canvas import as_curves, thickened
from deconvnet.visualization.projection.feature_projection import shown_pixels, side_by_side

UNITS = 1e4


@pytest.fixture(scope="module")
def arrays(textures):
    return UNITS * (textures(4, 7, 18, 24).double().numpy() - 0.4)


@pytest.fixture(scope="module")
def file(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("arrays") / "seven.npy"
    np.save(path, arrays)
    return path


@pytest.fixture(scope="module")
def run(file, script):
    """(folder, result) of a command that trains one layer on 7 channels."""
    folder = file.parent
    small = ["num_maps=4", "filter_size=[3,5]", "learning.epochs=2", "solver.iterations=10"]
    layer = [f"model.layer1.{setting}" for setting in small]
    common = ["progress=false", "device=cpu", "preprocessing=mean", "+layers=1"]
    return folder, script(folder, "train.py", "data=array", "data.path=seven.npy", *common, *layer)


def settings(path, **others):
    return DataSettings(source="array", path=str(path), size=None, max_images=None, **others)


def test_an_array_file_is_read_whole_streamed_or_one_by_one(file, arrays, tmp_path):
    images = load_images(settings(file))
    assert images.images.dtype == torch.float32 and images.frames is None
    assert_allclose(images.images, arrays, rtol=1e-6)
    streamed = stream_images(settings(file))
    assert torch.equal(streamed.read(torch.tensor([2, 0]))[0], images.images[[2, 0]])
    assert streamed.fingerprint == images.fingerprint
    np.savez(tmp_path / "other.npz", arrays.astype(np.float32))
    other = load_images(settings(tmp_path / "other.npz"))
    assert torch.equal(other.images, images.images) and other.fingerprint == images.fingerprint
    assert other.names[1] == "other-1"


def test_commands_train_on_and_reconstruct_arrays_in_their_units(run, arrays, script):
    folder, result = run
    assert result.code == 0, result.err
    net = load(folder / "runs" / "array")
    assert net.layer(1).filters.shape == (4, 7, 3, 5)
    assert net.preprocessing.settings.color == "none" and net.preprocessing.channels == 7
    result = script(
        folder, "reconstruct.py", "run=runs/array", "images=seven.npy", "parts=true", "device=cpu"
    )
    assert result.code == 0, result.err
    assert "dB in the units of the array" in result.out
    found = np.load(folder / "runs/array/reconstructions/seven-3-layer1.npy")
    expected = net.reconstruct(net.infer(torch.from_numpy(arrays[3:]).float()))
    assert_allclose(found, expected[0], atol=1e-3 * UNITS)
    assert np.linalg.norm(found - arrays[3]) < 0.7 * np.linalg.norm(arrays[3])


def test_commands_visualize_networks_of_arrays(run, script):
    folder, _ = run
    arguments = ["device=cpu", "progress=false", "maps=2", "k=2", "control=false"]
    result = script(folder, "visualize.py", "run=runs/array", "images=seven.npy", *arguments)
    assert result.code == 0, result.err
    assert (folder / "runs/array/gallery/index.html").exists()
    assert (folder / "runs/array/visualization/figures/layer1-filters.png").exists()


def test_preprocessing_of_arrays_does_not_depend_on_their_units(arrays):
    x = torch.from_numpy(arrays).float()
    steps = PreprocessingSettings("none", channels=7, steps=["contrast"], contrast_size=5)
    for factor in (1.0, 1e-12):
        preprocessing = Preprocessing(steps).fit(factor * x)
        y, record = preprocessing(factor * x)
        assert_allclose(preprocessing.pixels(y, record), factor * x, atol=1e-3 * factor * UNITS)
        expected = y if factor == 1.0 else expected  # noqa: F821
        assert_allclose(y, expected, atol=1e-3)
    assert_allclose(preprocessing.energy.sum(), 1, rtol=1e-5)


def test_pictures_show_the_three_channels_with_the_most_energy(arrays):
    x = torch.from_numpy(arrays).float()
    x[:, [1, 4, 6]] *= 10
    net = DeconvNet([LayerSettings(2, 3)], PreprocessingSettings("none", channels=7, steps=[]))
    net.preprocessing.fit(x)
    assert net.preprocessing.shown_channels == [1, 4, 6]
    shown = shown_pixels(net, x)
    assert shown.shape == (4, 3, 18, 24) and shown.amin() == 0 and shown.amax() == 1
    assert shown_pixels(net, x / 2, like=x).amax() < 0.9
    two = Preprocessing(PreprocessingSettings("none", channels=2))
    assert two.shown_channels == [0, 1, 1]


def test_filters_of_many_channels_and_of_one_row_are_drawn():
    f = torch.arange(7.0).view(1, 7, 1, 1).expand(2, 7, 2, 3)
    plane = side_by_side(f)
    assert plane.shape == (2, 1, 8, 11)
    assert plane[0, 0, ::3, ::4].tolist() == [[0, 1, 2], [3, 4, 5], [6, 0, 0]]
    assert side_by_side(f[:, :, :1]).shape == (2, 1, 7, 3)
    assert filter_grid(f).shape[0] == 3
    step = torch.tensor([0.0, 1.0]).repeat_interleave(48).expand(1, 3, 1, 96)
    curve = as_curves(step)[0]
    assert curve.shape == (3, 48, 96) and not curve[:, -1, :40].any() and not curve[:, 0, 56:].any()
    assert torch.equal(as_curves(step[:, :1], height=48)[0], curve)
    assert thickened(torch.ones(1, 3, 1, 64)).shape == (1, 3, 16, 64)
    assert thickened(torch.ones(1, 3, 64, 1)).shape == (1, 3, 64, 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((3, 4, 5)), "must be images .N, C, H, W. of real numbers, got .* .3, 4, 5."),
        (np.zeros((2, 3, 4, 5), complex), "of real numbers, got complex128"),
        (np.full((1, 1, 4, 5), np.nan), "image 0 has values that are NaN"),
        (np.full((1, 1, 4, 5), 1e300), "image 0 has values .* beyond the range of float32"),
        (dict(a=np.zeros(1), b=np.zeros(1)), "must hold one array, but holds a, b"),
        (b"text", "cannot read"),
    ],
)
def test_a_file_without_images_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "file.npz" if isinstance(content, dict) else tmp_path / "file.npy"
    if isinstance(content, dict):
        np.savez(path, **content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=message) as caught:
        array_shape(path)
        read_array_image(path, 0)
    assert "\n" not in str(caught.value) and "file.np" in str(caught.value)


def test_wrong_settings_of_arrays_are_refused_in_one_line(file, arrays, script):
    result = script(file.parent, "train.py", "data=array", "data.path=missing.npy")
    assert result.code == 1 and "cannot read missing.npy" in result.err
    assert result.err.count("\n") == 1
    with pytest.raises(ValueError, match=r"got \(4, 7, 18, 24\): .*need preprocessing.color=none"):
        Preprocessing().fit(torch.from_numpy(arrays))
    with pytest.raises(ValueError, match="data.size=32: arrays are not resized; use null"):
        DataSettings(source="array", path="x.npy", size=32)
    settings_of_three = PreprocessingSettings("none", channels=3)
    with pytest.raises(ValueError, match="preprocessing.channels=3: the arrays have 7"):
        for_arrays(settings_of_three, settings(file))
    with pytest.raises(ValueError, match="color=none: is for data.source=array, not photographs"):
        for_arrays(settings_of_three, DataSettings())
    with pytest.raises(ValueError, match="channels=None: color=none needs the number"):
        Preprocessing(PreprocessingSettings("none"))
    with pytest.raises(ValueError, match="channels=7: must be null with color=rgb"):
        PreprocessingSettings(channels=7)
    with pytest.raises(ValueError, match="channels=0: must be at least 1"):
        PreprocessingSettings("none", channels=0)
