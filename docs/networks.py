"""Draws pictures of docs/networks.md and docs/visualization.md from runs and their visualization.

python docs/networks.py PHOTOGRAPHS FOUR_LAYERS PHOTOGRAPH [CALTECH]

for example runs/photographs runs/iccv2011-small flower.jpg: run folders of `deconvnet train` and of
`deconvnet train +experiment=iccv2011_small`, the second with the output of `deconvnet visualize`
and of `deconvnet ablate`; and the photograph whose parts are shown, here `flower.jpg` of
scikit-learn. CALTECH: the run of +experiment=iccv2011_caltech, with the output of `deconvnet
visualize` on images that it has not seen.
"""

import io
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from deconvnet import load
from deconvnet.cli.reconstruct import scale_of
from deconvnet.images.decoding import read_image
from deconvnet.images.fit import reduced
from deconvnet.visualization.drawing.canvas import (
    GAP,
    PAPER,
    arrange_tiles,
    hstack,
    shade_projections,
    vstack,
    with_title,
)
from deconvnet.visualization.drawing.charts import COLORS as FRAMES
from deconvnet.visualization.pictures.image_parts import image_parts
from deconvnet.visualization.pictures.parts_picture import draw_parts
from deconvnet.visualization.projection.feature_projection import shown_pixels
from deconvnet.visualization.search.projection_grids import tiles_to_show
from deconvnet.visualization.search.strongest_units import strongest
from deconvnet.visualization.search.top_projections import load_top_projections

HERE = Path(__file__).parent
# The most bytes of a picture, and the numbers of colours to try.
LIMIT, COLORS = 148_000, (128, 96, 64, 48, 40, 32, 24, 20, 16)
# Pixels whose planes differ by more, of 255, are colours rather than greys.
COLORFUL = 24
# Columns of the picture of a run that the guide shows, and the share of their size.
SHOWN_IMAGES, SHARE = (0, 1, 4, 5), 0.5
# The width of the picture of parts in pixels.
PARTS = 800
# WebP's quality of pictures with photographs, which need more colours than a small PNG has.
QUALITY = 85
# The reduction of the photograph whose strongest units are shown.
REDUCED = 0.7
# By layer: the number of features, their columns, and the width of a tile.
FEATURES = {1: (15, 5, 49), 2: (40, 8, 49), 3: (30, 10, 70), 4: (20, 10, 74)}


def main() -> None:
    if len(sys.argv) not in (4, 5):
        raise SystemExit(__doc__)
    photographs, four_layers, photograph, *caltech = map(Path, sys.argv[1:])
    picture = Image.open(photographs / "pictures" / "layer2-reconstructed.png").convert("RGB")
    write(reconstructed(as_tensor(picture)), "reconstructed")
    write(features(four_layers / "visualization" / "projections"), "iccv2011-features")
    switches = Image.open(four_layers / "pictures" / "switches.png").convert("RGB")
    write(half(as_tensor(switches)), "iccv2011-switches")
    write_webp(parts(four_layers, photograph), "iccv2011-parts")
    write_webp(units(four_layers, photograph), "visualization-strongest")
    for run in caltech:
        write(features(run / "visualization" / "projections"), "iccv2011-caltech")


def reconstructed(picture: Tensor) -> Tensor:
    """Some columns of the picture of a run, with smaller images and labels of their own size."""
    columns, rows = _stripes(picture, 2), _stripes(picture, 1)
    # The last columns and rows are as large as the images; those before are the letters of labels.
    side = rows[0][1] - rows[0][0]
    images = [(first, last) for first, last in columns if last - first == side]
    lines = []
    for top, bottom in rows:
        cells = [_reduced(picture[:, top:bottom, slice(*images[n])]) for n in SHOWN_IMAGES]
        label = picture[:, top : top + cells[0].shape[1], : images[0][0]]
        lines.append(hstack([label, *cells], GAP))
    return vstack(lines, GAP)


def features(folder: Path) -> Tensor:
    """The strongest activation of some maps of each layer, projected to pixels."""
    blocks = {}
    for number, (count, columns, width) in FEATURES.items():
        projections = load_top_projections(folder / f"layer{number}.npz")
        alive = [row for row in range(len(projections.maps)) if projections.count(row)]
        chosen = np.linspace(0, len(alive) - 1, min(count, len(alive))).round().astype(int)
        tiles = [tiles_to_show(projections, alive[n])["generative"][:1] for n in chosen]
        shaded = shade_projections(torch.cat(tiles), width=width, least=width)
        page = arrange_tiles(shaded, columns)
        blocks[number] = with_title(f"layer {number}: {len(chosen)} of {len(alive)} maps", page)
    return vstack([hstack([blocks[1], blocks[2]], 12 * GAP), blocks[3], blocks[4]], 4 * GAP)


def parts(run: Path, photograph: Path) -> Tensor:
    """What `deconvnet reconstruct parts=true` draws of a photograph, on a narrower page."""
    net = load(run)
    scale = scale_of(net, run)
    image = reduced(read_image(photograph), scale.side, fit=scale.fit)[None]
    codes = net.infer(image, depth=net.depth)
    found = image_parts(net, codes, net.depth)
    return draw_parts(net, codes, shown_pixels(net, image)[0], net.depth, found, page=PARTS)


def units(run: Path, photograph: Path) -> Tensor:
    """The units of layer 3 that respond most strongly to a photograph."""
    image = read_image(photograph)[None]
    size = [round(REDUCED * side) for side in image.shape[2:]]
    pixels = F.interpolate(image, size, mode="bilinear", antialias=True).clamp(0, 1)
    return strongest(load(run), pixels, "layer3").picture()


def half(picture: Tensor) -> Tensor:
    """A picture in half of its size."""
    size = [side // 2 for side in picture.shape[1:]]
    return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]


def write_webp(picture: Tensor, name: str) -> None:
    """Write a picture with photographs."""
    pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(HERE / f"{name}.webp", quality=QUALITY, method=6)
    print(f"{name}: {(HERE / f'{name}.webp').stat().st_size} bytes")


def write(picture: Tensor, name: str, limit: int = LIMIT) -> None:
    """Write a PNG with as many colours as the limit allows; most of them are greys."""
    pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
    for count in COLORS:
        file = io.BytesIO()
        _few_colors(pixels, count).save(file, "png", optimize=True)
        if file.tell() <= limit:
            break
    print(f"{name}: {count} colours, {file.tell()} bytes")
    (HERE / f"{name}.png").write_bytes(file.getvalue())


def _few_colors(pixels: np.ndarray, count: int) -> Image.Image:
    """A picture (H, W, 3) in so many colours: evenly spaced greys, and if there are other colours,
    half of them, with those of the frames of the first parts."""
    others = pixels[np.ptp(pixels.astype(int), axis=2) > COLORFUL]
    greys = count // 2 if len(others) else count
    levels = np.linspace(0, 255, greys).round().astype(np.uint8).repeat(3).tolist()
    if len(others):
        frames = [bytes.fromhex(color[1:]) for color in FRAMES[:3]]
        levels += [*b"".join(frames)]
        levels += Image.fromarray(others[None]).quantize(count - greys - 3).getpalette()
    palette = Image.new("P", (1, 1))
    palette.putpalette((levels + levels[:3] * 256)[: 3 * 256])
    page = Image.fromarray(pixels).quantize(palette=palette, dither=Image.Dither.NONE)
    numbers = np.array(page)
    numbers[(pixels == 255).all(2)] = greys - 1  # the nearest colour is found approximately
    exact = Image.fromarray(numbers, "P")
    exact.putpalette(levels[: 3 * count])
    return exact


def _stripes(picture: Tensor, axis: int) -> list[tuple[int, int]]:
    """First and last + 1 of the rows (axis 1) or columns (axis 2) between white ones."""
    filled = (picture != PAPER).any(0).any(2 - axis).int()
    edges = torch.diff(filled, prepend=filled.new_zeros(1), append=filled.new_zeros(1))
    firsts, lasts = ((edges == sign).nonzero()[:, 0].tolist() for sign in (1, -1))
    return list(zip(firsts, lasts, strict=True))


def _reduced(tile: Tensor) -> Tensor:
    size = [round(SHARE * side) for side in tile.shape[1:]]
    return F.interpolate(tile[None], size, mode="bilinear", antialias=True)[0]


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


if __name__ == "__main__":
    main()
