"""Reconstruct images from the feature maps of a trained network.

deconvnet reconstruct run=runs/photographs layer=2 images=photo.jpg
"""

import io
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from deconvnet.cli.concepts_of_run import check_takes_images
from deconvnet.cli.errors import interruptible, one_line_errors
from deconvnet.cli.image_files import (
    check_outputs,
    errors_naming,
    image_names,
    image_sizes,
    output_folder,
    progress_bar,
    read_images,
)
from deconvnet.cli.read_settings import read_settings
from deconvnet.cli.settings import ReconstructConfig
from deconvnet.cli.unfinished_run import load_run
from deconvnet.images.files import image_files
from deconvnet.images.fit import TrainingScale, reduced
from deconvnet.images.sources import training_scale
from deconvnet.monitoring.monitor import save_picture
from deconvnet.network import tiling
from deconvnet.network.metrics import snr
from deconvnet.network.network import DeconvNet
from deconvnet.storage import ownership
from deconvnet.support.devices import torch_device
from deconvnet.training.run_folder import training_data
from deconvnet.visualization.drawing.canvas import as_curves
from deconvnet.visualization.pictures.image_parts import image_parts
from deconvnet.visualization.pictures.parts_picture import draw_parts
from deconvnet.visualization.projection.feature_projection import shown_pixels

# The height in pixels of the picture of a signal.
CURVES = 160


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError), interruptible():
        reconstruct(read_settings(cfg))


def reconstruct(settings: ReconstructConfig) -> None:
    """Save the reconstruction of each image from a layer as NAME-layerN.png.

    With `parts` also NAME-layerN-parts.png, which shows what the image is made of. Of a network for
    arrays also NAME-layerN.npy, the reconstruction (C, H, W).
    """
    path, device = Path(settings.run), torch_device(settings.device)
    net = load_run(path, "layer={}").to(device)
    layer = net.depth if settings.layer is None else settings.layer
    net.layer(layer)
    paths = image_files(settings.images)
    check_takes_images(path, net, paths, or_arrays=True)
    names = image_names(paths)
    folder = output_folder(path, settings.output, "reconstructions")
    endings = [".png"] + ["-parts.png"] * settings.parts + [".npy"] * net.preprocessing.are_arrays
    outputs = [folder / f"{name}-layer{layer}{end}" for name in names for end in endings]
    check_outputs(outputs, [path, *paths])
    scale = scale_of(net, path) if settings.parts and settings.rescale else None
    sizes = image_sizes(paths)
    for file, size in sizes.items():
        with errors_naming(file):
            check_image(net, scale.size(size) if scale else size, layer, settings)
    if scale and any(scale.size(size) != size for size in sizes.values()):
        print(f"larger images are reduced to {scale}; rescale=false keeps them as they are")
    units = "the units of the array" if net.preprocessing.are_arrays else "pixels"
    for name, image in read_images(paths, device, as_rgb=True):
        if scale:
            image = reduced(image[0], scale.side, fit=scale.fit)[None]
        if settings.parts:
            codes = net.infer(image, depth=layer)
            result = tiling.reconstruct_from(net, codes, layer)
        else:
            with progress_bar(name, "tile") as progress:
                result = tiling.reconstruct(
                    net, image, layer, memory=settings.memory, progress=progress
                )
        output = folder / f"{name}-layer{layer}.png"
        shown = shown_pixels(net, result.pixels, like=image)
        save_picture(output, as_curves(shown, height=CURVES)[0])
        original = image
        if net.preprocessing.are_arrays:
            save_array(output.with_suffix(".npy"), result.pixels[0])
        elif result.pixels.shape[1] == 1:
            original = image.mean(1, keepdim=True)
        tqdm.write(
            f"{output}   layer {layer}: {result.snr:.2f} dB preprocessed, "
            f"{snr(original, result.pixels):.2f} dB in {units}, "
            f"{result.density:.2%} non-zero coefficients"
        )
        if settings.parts:
            parts = image_parts(net, codes, layer)
            output = folder / f"{name}-layer{layer}-parts.png"
            save_picture(output, draw_parts(net, codes, shown_pixels(net, image)[0], layer, parts))
            tqdm.write(f"{output}   {parts}")


def scale_of(net: DeconvNet, run: Path) -> TrainingScale | None:
    """The scale of the training images, from the network or, of an earlier version, its run."""
    if net.training_scale is None and (data := training_data(run)) is not None:
        return training_scale(data)
    return net.training_scale


def save_array(path: Path, array: Tensor) -> None:
    """Write an array to a .npy file; ForeignFileError if a file that is not ours is there."""
    buffer = io.BytesIO()
    np.save(buffer, array.cpu().numpy())
    ownership.write(path, buffer.getbuffer())


def check_image(
    net: DeconvNet, size: tuple[int, int], layer: int, settings: ReconstructConfig
) -> None:
    """Raise ValueError for an image of H x W pixels that is too small, or too large for memory."""
    net.preprocessing.check_size(size)
    net.check_size(size, layer)
    if tiling.fits(net, size, layer, settings.memory):
        return
    if settings.parts:
        raise ValueError(
            "parts=true: needs the maps of the whole image at once, for which "
            f"{size[0]}x{size[1]} pixels are too many with memory={settings.memory:g}"
        )
    tiling.plan_image(net, size, layer, settings.memory)
