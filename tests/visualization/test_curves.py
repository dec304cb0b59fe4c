"""Signals, which are images of one row, are drawn as curves wherever pictures are made of them."""

import json
import re

import numpy as np
import torch
from PIL import Image

from deconvnet import DeconvNet, LayerSettings, PreprocessingSettings, SolverSettings
from deconvnet.cli.reconstruct import CURVES, reconstruct
from deconvnet.cli.settings import ReconstructConfig
from deconvnet.visualization.drawing.canvas import as_curves, resize_tiles, shade_projections
from deconvnet.visualization.gallery.exhibits import GalleryLayer, GalleryMap
from deconvnet.visualization.gallery.gallery import write_gallery
from deconvnet.visualization.pictures.parts_tree import shaded

T = 96
# One plane falls from 1 to -1, one rises, one is zero.
SIGNED = torch.stack([torch.linspace(1, -1, T), torch.linspace(-1, 1, T), torch.zeros(T)])
RED, GREEN = (255, 0, 0), (0, 255, 0)


def heights(picture, color):
    """(w,): how far from the top the pixels of a colour are in a picture (h, w, 3), from 0 to 1;
    NaN in columns without any."""
    inked = (np.asarray(picture).astype(int) == color).all(2)
    rows = np.arange(len(inked))[:, None] / (len(inked) - 1)
    with np.errstate(invalid="ignore"):
        return (inked * rows).sum(0) / inked.sum(0)


def assert_is_plot(picture):
    """Red falls from the top left to the bottom right, green rises, on white."""
    picture = np.asarray(picture)
    place = np.linspace(0, 1, picture.shape[1])
    for color, expected in ((RED, place), (GREEN, 1 - place)):
        found = heights(picture, color)
        visible = np.isfinite(found)
        assert visible.mean() > 0.8 and np.abs(found - expected)[visible].max() < 0.05
    assert (picture == 255).all(2).mean() > 0.8


def as_pixels(picture):
    return (picture * 255).round().byte().permute(1, 2, 0).numpy()


def test_projections_of_signals_are_plots_with_a_line_for_each_channel():
    tiles = SIGNED[None, :, None]
    assert_is_plot(as_pixels(shade_projections(tiles, width=T, contrast=1)[0]))
    assert_is_plot(as_pixels(resize_tiles(0.5 + tiles / 2, 2 * T)[0]))
    # Images of several rows stay pictures.
    several = tiles.expand(-1, -1, 2, -1)
    assert torch.equal(as_curves(several), several)


def test_tiles_of_signals_in_the_gallery_are_plots(tmp_path):
    tiles = (0.5 + SIGNED / 2)[None, :, None]
    shown = GalleryMap(0, {"generative": tiles}, tiles, filter=tiles[0])
    page = write_gallery(tmp_path / "g", title="t", layers=[GalleryLayer("a", "A", [shown])])
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text())[1])
    sheets = data["layers"][0]["sheets"]
    assert sorted(sheets) == ["filters", "generative", "patches"]
    for sheet in sheets.values():
        with Image.open(page.parent / sheet["file"]) as picture:
            assert_is_plot(picture.convert("RGB"))


def test_the_picture_of_a_reconstructed_signal_is_a_plot(tmp_path):
    settings = LayerSettings(2, (1, 5), lam=1e4, solver=SolverSettings(iterations=300))
    net = DeconvNet([settings], PreprocessingSettings("none", channels=3, steps=[]))
    signals = SIGNED[None, :, None]
    net.preprocessing.fit(signals)
    with torch.no_grad():  # filters of a single channel paint all of it
        net.layers[0].filters.zero_()
        net.layers[0].filters[0, 0, 0, 2] = net.layers[0].filters[1, 1, 0, 2] = 1
    net.save(tmp_path / "net.safetensors")
    np.save(tmp_path / "signal.npy", signals.numpy())
    reconstruct(
        ReconstructConfig(
            str(tmp_path / "net.safetensors"),
            str(tmp_path / "signal.npy"),
            output=str(tmp_path / "out"),
            device="cpu",
        )
    )
    with Image.open(next((tmp_path / "out").glob("*.png"))) as picture:
        assert picture.size == (T, CURVES)
        assert_is_plot(picture)


def test_parts_of_signals_are_plots():
    rising = torch.linspace(-1, 1, 20).expand(1, 3, 1, 20)
    picture = shaded(rising, 200)
    assert picture.shape[:2] == (1, 3) and picture.shape[3] == 200 and picture.shape[2] > 50
    # A black curve on white, from the lower left to the upper right.
    assert (picture == 1).float().mean() > 0.8
    inked = (picture[0].sum(0) < 0.3).nonzero().float()
    assert torch.corrcoef(inked.T)[0, 1] < -0.98
