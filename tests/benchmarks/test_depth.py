"""The benchmark of what each layer is worth."""

import depth
import pytest
import torch

from deconvnet import DeconvNet, LayerSettings
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding.prior import Prior


def test_the_share_explained_by_single_pixels_is_that_of_the_soft_threshold(monkeypatch):
    """With the image in place of a dictionary, the n largest pixels are the best n."""
    monkeypatch.setattr(depth, "MOST_LAMS", 6)
    y = torch.randn(3, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    points = depth.path_points(Deconvolution(torch.ones(1, 1, 1, 1)), y, Prior(), 500)
    thresholds = y.abs().amax() / depth.STEP ** torch.arange(1, len(points)).float()
    for (non_zeros, share), threshold in zip(points[1:], thresholds, strict=True):
        assert non_zeros == pytest.approx(1000 * float((y.abs() > threshold).double().mean()))
        left = y.abs().clamp(max=threshold).square().sum((1, 2, 3)) / y.square().sum((1, 2, 3))
        assert share == pytest.approx(float((1 - left).mean()), abs=1e-5)
    assert points[-1][0] >= 500 or len(points) == 7


def test_between_two_lams_the_share_is_interpolated_and_beyond_the_last_there_is_none():
    points = [(0.0, 0.0), (2.0, 0.5), (2.0, 0.6), (4.0, 1.0)]
    assert depth.interpolated(points, 1.0) == 0.25
    assert depth.interpolated(points, 3.0) == 0.8
    assert depth.interpolated(points, 5.0) is None


def test_every_layer_has_a_row_with_all_columns(tmp_path, monkeypatch):
    net = DeconvNet([LayerSettings(3, 3, pool=(1, 2, 2)), LayerSettings(2, 3)])
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    arguments = ["depth.py", "run", "--images=new", "--non-zeros=5", "--sigma=20"]
    monkeypatch.setattr("sys.argv", arguments)
    rows = depth.table_of(net, images, None, depth.arguments())
    assert [row["layer"] for row in rows] == [1, 2] and [row["maps"] for row in rows] == [3, 2]
    assert set(rows[0]) == {"layer", "maps", "SNR", "non-zero", "5 per 1,000", "sigma 20"}
    assert depth.markdown(rows).count("\n") == 3
