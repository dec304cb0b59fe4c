"""The pictures of a layer, as tensors (3, H, W) in [0, 1]: filters, patches, reconstructions, maps.

Each filter or feature is scaled separately: the contrast of a tile has no meaning, only its shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.network.codes import Codes
from deconvnet.network.metrics import snr
from deconvnet.network.network import DeconvNet
from deconvnet.operators.pooling import max_pool
from deconvnet.visualization.pictures.active_positions import active_map_sheet
from deconvnet.visualization.pictures.canvas import (
    GAP,
    PAPER,
    hstack,
    quantile_magnitude,
    shade_signed,
    text_block,
    tile_grid,
    vstack,
)
from deconvnet.visualization.pictures.image_decomposition import image_parts_picture
from deconvnet.visualization.pictures.sheet import Sheet, captioned, cut_into_cards, enlarged
from deconvnet.visualization.projection.feature_projection import (
    PixelFeatures,
    pixel_features,
    signed_rgb,
)

SHOWN_IMAGES = 6
# Sizes in pixels: the smallest width of a filter and of a patch next to it, of an image, and the
# width of the labels of rows.
FILTER, PAIR, IMAGE, LABEL = 64, 64, 140, 104


def layer_pictures(net: DeconvNet, codes: Codes, images: Tensor, number: int) -> dict[str, Tensor]:
    """The pictures of one trained layer, by name.

    layerN/filters: its filters in pixel space; layerN/patches (upper layers): the same next to the
    image patches where they respond most strongly; layerN/parts (upper layers): the parts of one
    image; layerN/reconstructed: some images, their reconstructions by every layer and the residual;
    layerN/maps: where the strongest maps of one image are active.
    """
    return {name: picture for name, (picture, _) in layer_cards(net, codes, images, number).items()}


def layer_cards(
    net: DeconvNet, codes: Codes, images: Tensor, number: int
) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """`layer_pictures`, each with the same picture as cards of TensorBoard."""
    sheets, pictures = {}, {}
    if number == 1:
        features = shade_signed(signed_rgb(net, net.layer(1).filters))
        sheets["filters"] = filter_sheet(features)
    else:
        found = pixel_features(net, codes, number).cropped(tuple(images.shape[2:]))
        features = shade_features(signed_rgb(net, found.tiles), found.values)
        sheets["filters"] = filter_sheet(features)
        patches = found.patches(images).expand(-1, 3, -1, -1)
        sheets["patches"] = patch_sheet(features, patches, found.values)
    shown = torch.linspace(0, len(images) - 1, min(SHOWN_IMAGES, len(images))).round().long()
    shown_codes = codes.select(shown.to(net.device))
    sheets["reconstructed"] = reconstruction_sheet(net, shown_codes, images[shown])
    clearest = _clearest(net, shown_codes, number)
    z, image = shown_codes.layer(number).z[clearest], images[shown[clearest]]
    sheets["maps"] = active_map_sheet(net, z, image, features, number)
    if number > 1:
        single = shown_codes.select(slice(clearest, clearest + 1))
        parts = image_parts_picture(net, single, image, number)
        pictures[f"layer{number}/parts"] = parts, cut_into_cards(parts)
    for kind, sheet in sheets.items():
        pictures[f"layer{number}/{kind}"] = sheet.picture(), sheet.cards()
    return pictures


def shade_features(tiles: Tensor, values: Tensor) -> Tensor:
    """Projected activations (K, 1 or 3, S, S) as colours, with the sign of a positive activation.

    values: (K,), the activations. A map that is active with both signs has one feature, which
    would otherwise be shown now as it is, now with light and dark exchanged.
    """
    signs = torch.where(values < 0, -1.0, 1.0).view(-1, 1, 1, 1)
    return shade_signed(signs * tiles, quantile_magnitude(tiles))


def filter_sheet(tiles: Tensor, numbers: Sequence[int] | None = None) -> Sheet:
    """Filters or features (K, 3, h, w) in [0, 1], each above its number, in this order."""
    numbers = range(len(tiles)) if numbers is None else numbers
    shown = enlarged(tiles, FILTER)
    return Sheet([captioned(tile, f"{k}") for tile, k in zip(shown, numbers, strict=True)])


def patch_sheet(features: Tensor, patches: Tensor, values: Tensor) -> Sheet:
    """Features next to image patches (K, 3, S, S), above the number of the map.

    values: (K,), the activations; negative ones are marked, because there the image shows the
    feature with light and dark exchanged.
    """
    cells = []
    for k, pair in enumerate(zip(enlarged(features, PAIR), enlarged(patches, PAIR), strict=True)):
        caption = f"{k}, negative" if values[k] < 0 else f"{k}"
        cells.append(captioned(F.pad(hstack(list(pair)), (0, 2 * GAP), value=PAPER), caption))
    return Sheet(cells)


def snapshot_sheet(features: PixelFeatures, image: tuple[int, int]) -> Sheet:
    """The features of a layer while it learns, from tiles in RGB; image: (H, W) in pixels."""
    shown = features.cropped(image)
    return filter_sheet(shade_features(shown.tiles, shown.values))


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
    """The picture of `reconstruction_sheet`."""
    return reconstruction_sheet(net, codes, images).picture()


def reconstruction_sheet(net: DeconvNet, codes: Codes, images: Tensor) -> Sheet:
    """Rows of images: original, preprocessed, reconstructed by every layer, residual, pixels.

    The reconstructions are in the preprocessed domain, with their SNR, and the residual is what the
    highest layer leaves; these rows have one scale. The last row undoes the preprocessing with what
    it recorded for these images (for contrast normalisation, the local means and deviations).
    """
    y, top = codes.y, len(codes.layers)
    signed = [("preprocessed", y)]
    for number, layer in enumerate(codes.layers, 1):
        reconstruction = net.synthesize(codes, number)
        label = f"layer {number}\n{snr(y, reconstruction):.1f} dB\n{layer.density:.1%} active"
        signed.append((label, reconstruction))
    signed.append(("residual", y - reconstruction))
    white = 3 * y.std().clamp(min=1e-12)
    rows = [
        ("image", images),
        *((label, shade_signed(signed_rgb(net, row), white)) for label, row in signed),
        (f"layer {top}\nin pixels", net.reconstruct(codes, top)),
    ]
    shown = [enlarged(row.clamp(0, 1).expand(-1, 3, -1, -1), IMAGE) for _, row in rows]
    labels = [
        text_block(label, LABEL, row.shape[2]) for (label, _), row in zip(rows, shown, strict=True)
    ]
    columns = [vstack(list(column), GAP) for column in zip(*shown, strict=True)]
    return Sheet(columns, columns=len(columns), labels=vstack(labels, GAP))


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
