"""The part of the maps of an image that shows the picture, not what it was padded with."""

from __future__ import annotations

from torch import Tensor

from deconvnet.images.preprocessing import Frame
from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet
from deconvnet.operators.arithmetic import Field
from deconvnet.visualization.projection.feature_projection import layer_field


def picture_maps(net: DeconvNet, codes: Codes, image: int, layer: int) -> Tensor:
    """(1, K, H, W): z of one image of the codes, where receptive fields overlap the picture."""
    z = codes.layer(layer).select(slice(image, image + 1)).z
    return crop_to_frame(z, net, layer, picture_frame(codes, image))


def picture_frame(codes: Codes, image: int) -> Frame:
    """The frame of the picture in its image; the last record of preprocessing, if it is padded."""
    if codes.record and "frame" in codes.record[-1]:
        return tuple(codes.record[-1]["frame"][image].tolist())
    return (0, 0, *codes.y.shape[2:])


def crop_to_frame(z: Tensor, net: DeconvNet, layer: int, frame: Frame) -> Tensor:
    """The part of the maps whose receptive fields overlap the picture."""
    top, left, height, width = frame
    for axis, first, length in ((2, top, height), (3, left, width)):
        low, high = _overlapping(layer_field(net, layer, axis - 2), first, length, z.shape[axis])
        z = z.narrow(axis, low, high - low)
    return z


def _overlapping(field: Field, first: int, length: int, units: int) -> tuple[int, int]:
    """The range of units whose fields overlap the pixels from first to first + length."""
    low = (first - field.offset - field.size) // field.stride + 1
    high = -((field.offset - first - length) // field.stride)
    return max(low, 0), min(high, units)
