"""Export filters and feature maps to files for other programs.

deconvnet export run=runs/photographs output=filters.mat
deconvnet export run=runs/photographs output=maps.npz images=photo.jpg layer=2
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from deconvnet.cli.concepts_of_run import check_takes_images
from deconvnet.cli.errors import interruptible, one_line_errors
from deconvnet.cli.image_files import check_outputs, read_images
from deconvnet.cli.read_settings import read_settings
from deconvnet.cli.settings import ExportConfig
from deconvnet.cli.unfinished_run import load_run
from deconvnet.dictionary import Learned
from deconvnet.images.files import image_files
from deconvnet.network.network import FILTERS, DeconvNet
from deconvnet.storage import ownership
from deconvnet.storage.network_files import load_network
from deconvnet.support.devices import torch_device

# Names of variables in Matlab have at most this many characters.
MATLAB_NAME = 63
# The parameters of `numpy.savez_compressed`.
RESERVED = ("file", "allow_pickle")


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError), interruptible("nothing is written"):
        export(read_settings(cfg))


def export(settings: ExportConfig) -> None:
    """Write one .npz or .mat file: the filters of all layers or, with images, the maps of one."""
    path, output = Path(settings.run).expanduser(), Path(settings.output).expanduser()
    files = [] if settings.images is None else image_files(settings.images)
    check_outputs([output], [path, *files])
    device = torch_device(settings.device)
    if _holds_filters(path):
        if files:
            raise ValueError(
                f"run={settings.run}: filters without a network have no preprocessing for images; "
                "use deconvnet.Learned.load(...).encode"
            )
        arrays = {"filters": Learned.load(path).filters.numpy()}
    else:
        net = load_run(path, "layer={}" if files else "").to(device)
        check_takes_images(path, net, files, or_arrays=True)
        arrays = _filters(net) if not files else _maps(net, settings, device)
    ownership.write(output, _encoded(output, arrays))
    for name, array in arrays.items():
        print(f"{name:20} {'x'.join(map(str, array.shape)) or 'a number'}")
    print(f"written to {output}")


def _holds_filters(path: Path) -> bool:
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    return load_network(path)[1].get("kind") == FILTERS


def _filters(net: DeconvNet) -> dict[str, np.ndarray]:
    """filters1 (K, C, h, w), connectivity1 (K, C), scale1 and lam1 of layer 1, and so on."""
    arrays = {}
    for number, layer in enumerate(net.layers, 1):
        arrays[f"filters{number}"] = layer.filters.cpu().numpy()
        arrays[f"connectivity{number}"] = layer.connectivity.cpu().numpy()
        arrays[f"scale{number}"] = layer.scale.cpu().numpy()
        arrays[f"lam{number}"] = np.float64(layer.lam)
    return arrays


def _maps(net: DeconvNet, settings: ExportConfig, device: torch.device) -> dict[str, np.ndarray]:
    """The maps (K, rows, columns) of a layer for each image, by the name of its file."""
    layer = net.depth if settings.layer is None else settings.layer
    net.layer(layer)
    return {
        name: net.infer(image, depth=layer).layer(layer).z[0].cpu().numpy()
        for name, image in read_images(settings.images, device, as_rgb=True)
    }


def _encoded(output: Path, arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    if output.suffix == ".npz":
        # An image may be called like a parameter of numpy's function.
        np.savez_compressed(buffer, **_renamed(arrays, lambda n: f"{n}_" if n in RESERVED else n))
    else:
        from scipy.io import savemat

        savemat(buffer, _renamed(arrays, _matlab_name))
    return buffer.getvalue()


def _renamed(arrays: dict[str, np.ndarray], rename: Callable[[str], str]) -> dict[str, np.ndarray]:
    """The arrays under other names, of which no two may be the same."""
    names = {name: rename(name) for name in arrays}
    for name in arrays:
        same = [other for other in arrays if names[other] == names[name]]
        if len(same) > 1:
            raise ValueError(
                f"images: {' and '.join(same)} would have the same name {names[name]} in the file; "
                "rename one, or export them to different files"
            )
    return {names[name]: array for name, array in arrays.items()}


def _matlab_name(name: str) -> str:
    """A name as that of a variable of Matlab: letters, digits and _, with a letter first."""
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
    return (name if name[:1].isalpha() else f"image_{name}")[:MATLAB_NAME]
