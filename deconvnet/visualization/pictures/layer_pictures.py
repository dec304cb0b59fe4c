"""The pictures of a layer, as tensors (3, H, W) in [0, 1]: filters, patches, reconstructions, maps.

Each filter or feature is scaled separately: the contrast of a tile has no meaning, only its shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deconvnet.network.codes import Codes
from deconvnet.network.metrics import snr
from deconvnet.network.network import DeconvNet
from deconvnet.operators.pooling import max_pool
from deconvnet.visualization.pictures.canvas import (
    hstack,
    quantile_magnitude,
    shade_signed,
    text_block,
    tile_grid,
    vstack,
)
from deconvnet.visualization.pictures.parts_picture import image_parts_picture
from deconvnet.visualization.projection.feature_projection import pixel_features, signed_rgb

SHOWN_IMAGES = 6
FEATURE = 84


def layer_pictures(net: DeconvNet, codes: Codes, images: Tensor, number: int) -> dict[str, Tensor]:
    """The pictures of one trained layer, by name.

    layerN/filters: its filters in pixel space; layerN/patches (upper layers): the image patches
    where they respond most strongly; layerN/parts (upper layers): the parts of one image;
    layerN/reconstructed: some images and their reconstructions by every layer; layerN/maps: the
    feature maps of one image.
    """
    pictures = {}
    if number == 1:
        pictures["layer1/filters"] = filter_picture(net)
    else:
        features = pixel_features(net, codes, number).cropped(tuple(images.shape[2:]))
        tiles, patches = signed_rgb(net, features.tiles), features.patches(images)
        tiles = shade_signed(tiles, quantile_magnitude(tiles))
        pictures[f"layer{number}/filters"] = tile_grid(tiles, tile_width=FEATURE)
        pictures[f"layer{number}/patches"] = tile_grid(
            patches.expand(-1, 3, -1, -1), tile_width=FEATURE
        )
    shown = torch.linspace(0, len(images) - 1, min(SHOWN_IMAGES, len(images))).round().long()
    shown_codes = codes.select(shown.to(net.device))
    if number > 1:
        clearest = _clearest(net, shown_codes, number)
        single = shown_codes.select(slice(clearest, clearest + 1))
        pictures[f"layer{number}/parts"] = image_parts_picture(
            net, single, images[shown[clearest]], number
        )
    pictures[f"layer{number}/reconstructed"] = reconstruction_picture(
        net, shown_codes, images[shown]
    )
    busiest = shown_codes.layer(number).z.abs().sum((1, 2, 3)).argmax()
    pictures[f"layer{number}/maps"] = map_grid(shown_codes.layer(number).z[busiest])
    return pictures


def filter_picture(net: DeconvNet) -> Tensor:
    """The filters of the first layer."""
    return filter_grid(signed_rgb(net, net.layer(1).filters))


def filter_grid(f: Tensor, *, columns: int | None = None) -> Tensor:
    """Filters (K, 1 or 3, h, w) as a grid, each shaded by its own largest magnitude."""
    return tile_grid(shade_signed(f), columns=columns)


def map_grid(z: Tensor, *, columns: int | None = None) -> Tensor:
    """The maps (K, H, W) of one image as a grid: grey is zero, white positive, black negative.

    A sparse map would be almost invisible, so maps are max-pooled over 2x2 positions. Nine in ten
    of the non-zero values lie between black and white, on the same scale for all maps.
    """
    strongest = max_pool(z[None], (1, 2, 2))[0][0]
    return tile_grid(
        shade_signed(strongest[:, None], quantile_magnitude(strongest[None], 0.9)), columns=columns
    )


def reconstruction_picture(net: DeconvNet, codes: Codes, images: Tensor) -> Tensor:
    """Rows of images: original, preprocessed, reconstructed by every layer, and back in pixels.

    The reconstructions are in the preprocessed domain, with their SNR. The last row undoes the
    preprocessing with what it recorded for these images (for contrast normalisation, the local
    means and deviations).
    """
    y, top = codes.y, len(codes.layers)
    rows = [("preprocessed", y)]
    for number, layer in enumerate(codes.layers, 1):
        reconstruction = net.synthesize(codes, number)
        label = f"layer {number}\n{snr(y, reconstruction):.1f} dB\n{layer.density:.1%} of z"
        rows.append((label, reconstruction))
    return vstack(
        [
            _labelled_row("image", images),
            labelled_images(net, rows),
            _labelled_row(f"layer {top}\nto pixels", net.reconstruct(codes, top)),
        ]
    )


def labelled_images(net: DeconvNet, rows: list[tuple[str, Tensor]]) -> Tensor:
    """Rows of preprocessed images (N, C, H, W) with labels, all on the scale of the first row."""
    white = 3 * rows[0][1].std().clamp(min=1e-12)
    return vstack(
        [_labelled_row(label, shade_signed(signed_rgb(net, row), white)) for label, row in rows]
    )


def _labelled_row(label: str, images: Tensor) -> Tensor:
    page = tile_grid(images.clamp(0, 1).expand(-1, 3, -1, -1), columns=len(images), tile_width=96)
    return hstack([text_block(label, 110, page.shape[1]), page])


def _clearest(net: DeconvNet, codes: Codes, number: int) -> int:
    """The index of the image that a layer reconstructs best."""
    reconstruction = net.synthesize(codes, number)
    return max(range(len(reconstruction)), key=lambda n: snr(codes.y[n], reconstruction[n]))
