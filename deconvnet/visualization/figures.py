"""Figures as plain arrays (3, H, W) in [0, 1]: grids of tiles, rows of reconstructions.

Signed tiles are shown symmetrically about mid-grey: grey is zero, and each tile is scaled by its
own largest magnitude, so that contrast between tiles means nothing and shape everything. Pixels are
enlarged without smoothing.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from deconvnet.network import Codes, DeconvNet, snr
from deconvnet.pooling import max_pool
from deconvnet.preprocessing import ycbcr_to_rgb
from deconvnet.visualization.features import pixel_features

PAPER = 1.0
TILE = 44
SHOWN_IMAGES = 6


def layer_pictures(net: DeconvNet, codes: Codes, images: Tensor, number: int) -> dict[str, Tensor]:
    """The pictures of one finished layer, by name.

    layerN/filters: its filters in pixel space; layerN/patches (upper layers): the image patches
    where they are strongest; layerN/reconstructed: some images and what each layer makes of them;
    layerN/maps: the feature maps of one image.
    """
    pictures = {}
    if number == 1:
        pictures["layer1/filters"] = filter_picture(net)
    else:
        features = pixel_features(net, codes, number)
        pictures[f"layer{number}/filters"] = filter_grid(_to_rgb(net, features.tiles))
        patches = features.patches(images.to(net.device))
        pictures[f"layer{number}/patches"] = grid(patches.expand(-1, 3, -1, -1))
    shown = torch.linspace(0, len(images) - 1, min(SHOWN_IMAGES, len(images))).round().long()
    some = codes.select(shown.to(net.device))
    pictures[f"layer{number}/reconstructed"] = reconstructions(net, some, images[shown])
    busiest = some.layer(number).z.abs().sum((1, 2, 3)).argmax()
    pictures[f"layer{number}/maps"] = map_grid(some.layer(number).z[busiest])
    return pictures


def filter_picture(net: DeconvNet) -> Tensor:
    """The filters of the first layer, as they are."""
    return filter_grid(_to_rgb(net, net.layer(1).filters))


def filter_grid(f: Tensor, *, columns: int | None = None) -> Tensor:
    """Filters (K, 1 or 3, h, w) as a grid, each about mid-grey and by its own largest magnitude."""
    reach = f.abs().flatten(1).amax(1).clamp(min=1e-12).view(-1, 1, 1, 1)
    return grid((0.5 + 0.5 * f / reach).expand(-1, 3, -1, -1), columns=columns)


def map_grid(z: Tensor, *, columns: int | None = None) -> Tensor:
    """The maps (K, H, W) of one image as a grid: grey is zero, white positive, black negative.

    A sparse map is next to invisible as it is: of every 2x2 places the strongest is shown, and nine
    in ten of all non-zero values are within the range from black to white, the same for all maps.
    """
    strongest = max_pool(z[None], (1, 2, 2))[0][0]
    magnitudes = strongest[strongest != 0].abs().sort().values
    reach = magnitudes[int(0.9 * (len(magnitudes) - 1))] if len(magnitudes) else 1.0
    tiles = (0.5 + 0.5 * strongest / reach).clamp(0, 1)
    return grid(tiles[:, None].expand(-1, 3, -1, -1), columns=columns)


def grid(tiles: Tensor, *, columns: int | None = None, tile: int = TILE) -> Tensor:
    """Tiles (K, 3, h, w) in [0, 1] side by side on white, each about `tile` pixels wide."""
    tiles = tiles.cpu().float()
    zoom = max(1, round(tile / tiles.shape[3]))
    tiles = tiles.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    K, _, h, w = tiles.shape
    columns = columns or _columns(K)
    rows = -(-K // columns)
    gap = 3
    page = torch.full((3, rows * (h + gap) + gap, columns * (w + gap) + gap), PAPER)
    for k, picture in enumerate(tiles):
        top, left = gap + k // columns * (h + gap), gap + k % columns * (w + gap)
        page[:, top : top + h, left : left + w] = picture
    return page


def _columns(count: int) -> int:
    """As many columns as make the page a little wider than high with the fewest gaps at its end."""
    widths = range(math.ceil(math.sqrt(count)), math.ceil(math.sqrt(2.6 * count)) + 1)
    return min(widths, key=lambda width: (-count % width, width))


def reconstructions(net: DeconvNet, codes: Codes, images: Tensor) -> Tensor:
    """Rows of images: as they came, preprocessed, from every layer, and back to pixels.

    The middle rows are what the layers explain, and their SNR is written beside them. The last row
    undoes the preprocessing, with what it recorded of these images (of contrast normalisation the
    local means and deviations).
    """
    y = codes.y
    reach = 3 * y.std().clamp(min=1e-12)
    rows = [("image", images.to(y)), ("preprocessed", 0.5 + 0.5 * _to_rgb(net, y) / reach)]
    for number, layer in enumerate(codes.layers, 1):
        made = net.operator(codes, number)(layer.z)
        label = f"layer {number}\n{snr(y, made):.1f} dB\n{layer.density:.1%} of z"
        rows.append((label, 0.5 + 0.5 * _to_rgb(net, made) / reach))
    top = len(codes.layers)
    rows.append((f"layer {top}\nto pixels", net.reconstruct(codes, top)))
    return _labelled_rows([(label, row.clamp(0, 1).expand(-1, 3, -1, -1)) for label, row in rows])


def _labelled_rows(rows: list[tuple[str, Tensor]]) -> Tensor:
    margin = 110
    pages = [grid(row, columns=len(row), tile=96) for _, row in rows]
    height = sum(page.shape[1] for page in pages)
    canvas = Image.new("RGB", (margin + pages[0].shape[2], height), "white")
    draw, font, top = ImageDraw.Draw(canvas), ImageFont.load_default(13), 0
    for (label, _), page in zip(rows, pages, strict=True):
        pixels = (page * 255).round().byte().permute(1, 2, 0).numpy()
        canvas.paste(Image.fromarray(pixels), (margin, top))
        draw.multiline_text((6, top + 6), label, fill="black", font=font, spacing=4)
        top += page.shape[1]
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255


def _to_rgb(net: DeconvNet, f: Tensor) -> Tensor:
    """Signed tiles in the network's colour planes as signed red, green and blue."""
    if net.preprocessing.settings.color != "ycbcr":
        return f
    return ycbcr_to_rgb(f) - ycbcr_to_rgb(torch.zeros_like(f))
