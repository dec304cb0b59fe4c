"""The pictures of a layer, as tensors (3, H, W) in [0, 1]: filters, patches, reconstructions, maps.

Each filter or feature is scaled separately: the contrast of a tile has no meaning, only its shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.network.codes import Codes
from deconvnet.network.metrics import snr
from deconvnet.network.network import DeconvNet
from deconvnet.operators.pooling import max_pool
from deconvnet.visualization.drawing.canvas import (
    GAP,
    PAPER,
    as_curves,
    hstack,
    quantile_magnitude,
    resize_tiles,
    shade_signed,
    text_block,
    tile_grid,
    vstack,
)
from deconvnet.visualization.drawing.sheet import Sheet, captioned, cut_into_cards, enlarged
from deconvnet.visualization.pictures.active_positions import active_map_sheet
from deconvnet.visualization.pictures.parts_picture import image_parts_picture
from deconvnet.visualization.projection.feature_projection import (
    PixelFeatures,
    pixel_features,
    shown_pixels,
    side_by_side,
    signed_filters,
    signed_rgb,
)

SHOWN_IMAGES = 6
# Sizes in pixels: the smallest width of a filter and of a patch next to it, of an image, and the
# width of the labels of rows.
FILTER, IMAGE, LABEL = 80, 140, 104
# The same on cards of TensorBoard, where more of them must fit: of a filter, and of an image.
CARD_FILTER, CARD_IMAGE = 56, 115


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
    pictures = {}
    arrays, images = images, shown_pixels(net, images)
    if number == 1:
        features = as_curves(shade_signed(signed_filters(net)))
    else:
        found = pixel_features(net, codes, number).cropped(tuple(images.shape[2:]))
        features = as_curves(shade_features(signed_rgb(net, found.tiles), found.values))
        patches = as_curves(found.patches(images))
        pictures["patches"] = (
            patch_sheet(features, patches, found.values).picture(),
            patch_sheet(features, patches, found.values, width=CARD_FILTER).cards(),
        )
    pictures["filters"] = filter_picture(features), filter_cards(features)
    shown = torch.linspace(0, len(images) - 1, min(SHOWN_IMAGES, len(images))).round().long()
    shown_codes = codes.select(shown.to(net.device))
    rows = _reconstructions(net, shown_codes, arrays[shown])
    preprocessed = rows[1].images
    pictures["reconstructed"] = _reconstruction_picture(rows), _reconstruction_cards(rows)
    # The image that the layer reconstructs best.
    clearest = max(range(len(shown)), key=rows[1 + number].snrs.__getitem__)
    z, image = shown_codes.layer(number).z[clearest], images[shown[clearest]]
    sheet = active_map_sheet(net, z, image, preprocessed[clearest], features, number)
    pictures["maps"] = sheet.picture(), sheet.cards()
    if number > 1:
        single = shown_codes.select(slice(clearest, clearest + 1))
        parts = image_parts_picture(net, single, image, number)
        pictures["parts"] = parts, cut_into_cards(parts)
    return {f"layer{number}/{kind}": drawn for kind, drawn in pictures.items()}


def filter_picture(tiles: Tensor) -> Tensor:
    """Filters or features (K, 3, h, w) in [0, 1], each above the number of its map, in order."""
    return filter_sheet(tiles).picture()


def filter_cards(tiles: Tensor) -> list[Tensor]:
    """`filter_picture` as cards of TensorBoard."""
    return filter_sheet(tiles, width=CARD_FILTER).cards()


def shade_features(tiles: Tensor, values: Tensor) -> Tensor:
    """Projected activations (K, 1 or 3, S, S) as colours, with the sign of a positive activation.

    values: (K,), the activations. A map that is active with both signs has one feature, which
    would otherwise be shown now as it is, now with light and dark exchanged.
    """
    signs = torch.where(values < 0, -1.0, 1.0).view(-1, 1, 1, 1)
    return shade_signed(signs * tiles, quantile_magnitude(tiles))


def filter_sheet(tiles: Tensor, *, width: int = FILTER) -> Sheet:
    """Filters or features (K, 3, h, w) in [0, 1], at least this wide, each above its number."""
    return Sheet([captioned(tile, f"{k}") for k, tile in enumerate(enlarged(tiles, width))])


def patch_sheet(features: Tensor, patches: Tensor, values: Tensor, *, width: int = FILTER) -> Sheet:
    """Features next to image patches (K, 3, S, S), above the number of the map.

    values: (K,), the activations; negative ones are marked, because there the image shows the
    feature with light and dark exchanged.
    """
    cells = []
    for k, pair in enumerate(zip(enlarged(features, width), enlarged(patches, width), strict=True)):
        caption = f"{k}, negative" if values[k] < 0 else f"{k}"
        cells.append(captioned(F.pad(hstack(list(pair)), (0, GAP), value=PAPER), caption))
    return Sheet(cells)


def snapshot_features(features: PixelFeatures, image: tuple[int, int]) -> Tensor:
    """(K, 3, S, S): the features of a layer while it learns, whose tiles are in RGB, as colours.

    image: (H, W), the size of the images in pixels.
    """
    shown = features.cropped(image)
    return as_curves(shade_features(shown.tiles, shown.values))


def filter_grid(f: Tensor, *, columns: int | None = None) -> Tensor:
    """Filters (K, C, h, w) as a grid, each shaded by its own largest magnitude.

    Filters of one row are drawn as curves; other than 1 or 3 channels are shown `side_by_side`.
    """
    planes = f if f.shape[1] in (1, 3) else side_by_side(f)
    return tile_grid(as_curves(shade_signed(planes)), columns=columns)


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
    """Rows of images: original, preprocessed, reconstructed by every layer, residual, pixels.

    The reconstructions are in the preprocessed domain, with their SNR, and the residual is what the
    highest layer leaves; these rows have one scale. The last row undoes the preprocessing with what
    it recorded for these images (for contrast normalisation, the local means and deviations).
    """
    return _reconstruction_picture(_reconstructions(net, codes, images))


@dataclass(frozen=True)
class _Row:
    """A row of the reconstruction picture: images (N, 3, H, W), SNR of all and of each in dB."""

    name: str
    images: Tensor
    snr: float | None = None
    snrs: tuple[float, ...] = ()
    density: float | None = None


def _reconstructions(net: DeconvNet, codes: Codes, images: Tensor) -> list[_Row]:
    y, top = codes.y, len(codes.layers)
    white = 3 * y.std().clamp(min=1e-12)

    def shaded(signed: Tensor) -> Tensor:
        return shade_signed(signed_rgb(net, signed), white)

    rows = [_Row("image", shown_pixels(net, images)), _Row("preprocessed", shaded(y))]
    for number, layer in enumerate(codes.layers, 1):
        reconstruction = net.synthesize(codes, number)
        snrs = tuple(snr(one, other) for one, other in zip(y, reconstruction, strict=True))
        row = (shaded(reconstruction), snr(y, reconstruction), snrs, layer.density)
        rows.append(_Row(f"layer {number}", *row))
    rows.append(_Row("residual", shaded(y - reconstruction)))
    pixels = net.preprocessing.inverse(reconstruction, codes.record)
    in_pixels = shown_pixels(net, pixels, like=images)
    units = "its units" if net.preprocessing.are_arrays else "pixels"
    rows.append(_Row(f"layer {top}, in {units}", in_pixels))
    return [replace(r, images=r.images.clamp(0, 1).expand(-1, 3, -1, -1).cpu()) for r in rows]


def _reconstruction_picture(rows: list[_Row]) -> Tensor:
    shown = [enlarged(as_curves(row.images), IMAGE) for row in rows]
    labels = []
    for row, tiles in zip(rows, shown, strict=True):
        lines = row.name.replace(", ", "\n")
        if row.snr is not None:
            lines += f"\n{row.snr:.1f} dB\n{row.density:.1%} active"
        labels.append(text_block(lines, LABEL, tiles.shape[2]))
    columns = [vstack(list(column), GAP) for column in zip(*shown, strict=True)]
    return Sheet(columns, columns=len(columns), labels=vstack(labels, GAP)).picture()


def _reconstruction_cards(rows: list[_Row]) -> list[Tensor]:
    """A card for each image, with its own SNR."""
    cards = []
    for n in range(len(rows[0].images)):
        cells = []
        for row in rows:
            caption = f"{row.name}: {row.snrs[n]:.1f} dB" if row.snrs else row.name
            tile = resize_tiles(as_curves(row.images[n : n + 1]), CARD_IMAGE)[0]
            cells.append(captioned(F.pad(tile, (0, CARD_IMAGE - tile.shape[2]), value=1), caption))
        cards.append(Sheet(cells).cards()[0])
    return cards


def labelled_images(net: DeconvNet, rows: list[tuple[str, Tensor]]) -> Tensor:
    """Rows of preprocessed images (N, C, H, W) with labels, all on the scale of the first row."""
    white = 3 * rows[0][1].std().clamp(min=1e-12)
    return vstack(
        [_labelled_row(label, shade_signed(signed_rgb(net, row), white)) for label, row in rows]
    )


def _labelled_row(label: str, images: Tensor) -> Tensor:
    page = tile_grid(images.clamp(0, 1).expand(-1, 3, -1, -1), columns=len(images), tile_width=96)
    return hstack([text_block(label, 110, page.shape[1]), page])
