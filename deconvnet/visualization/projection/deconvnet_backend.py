"""Projections of deconvolutional networks, by the generative model itself.

No rules are needed. The model defines the image of its maps, by R_l, which is linear once the
switches of inference are fixed (Zeiler et al. 2011). It is applied to one activation at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deconvnet.network.codes import Codes, join_codes
from deconvnet.network.network import DeconvNet
from deconvnet.operators.convolution import map_size
from deconvnet.operators.pooling import pooled_shape
from deconvnet.support.torch_modes import plain
from deconvnet.visualization.projection.feature_projection import layer_field, project_units
from deconvnet.visualization.projection.projection import (
    LayerInfo,
    Projection,
    ProjectionReport,
    check_units,
    unknown_layer,
)

# Bytes of the codes that are cached: of thousands of small images, or of a few with many maps.
CACHED_BYTES = 2**29
NO_CODES = Codes((), torch.zeros(0), [])


class DeconvNetBackend:
    """Layers, responses and projections of a deconvolutional network; see `Projector`."""

    def __init__(self, net: DeconvNet, *, batch: int):
        self.model, self.batch = net, batch
        self.names = [f"layer{number}" for number in range(1, net.depth + 1)]
        self._cache: dict[bytes, Codes] = {}
        self._version: list[tuple[int, int]] = []

    @property
    def device(self) -> torch.device:
        return self.model.device

    def layers(self, x: Tensor) -> list[LayerInfo]:
        infos, below = [], tuple(x.shape[2:])
        for number, name in enumerate(self.names, 1):
            settings = self.model.layer(number).settings
            size = map_size(below, settings.filter_shape, settings.boundary)
            shape = (settings.num_maps, *size)
            below = pooled_shape(shape, tuple(settings.pool))[1:] if settings.pool else shape[1:]
            rows, columns = (layer_field(self.model, number, axis) for axis in (0, 1))
            field, stride, offset = (
                (getattr(rows, key), getattr(columns, key)) for key in ("size", "stride", "offset")
            )
            infos.append(LayerInfo(name, "Layer", shape, field, stride, offset))
        return infos

    def responses(
        self, x: Tensor, layers: list[str], reduce: Callable[[str, Tensor], object]
    ) -> dict[str, object]:
        numbers = {name: self._number(name) for name in layers}
        codes = self.codes(x, max(numbers.values()))
        return {name: reduce(name, codes.layer(number).z.abs()) for name, number in numbers.items()}

    def codes(self, x: Tensor, depth: int) -> Codes:
        """The codes of images up to a layer. Inference dominates the time, so the codes of the
        latest images are cached until the network learns."""
        version = [(buffer.data_ptr(), buffer._version) for buffer in self.model.buffers()]
        if version != self._version:  # the network has learned
            self._cache, self._version = {}, version
        keys = [_key(image) for image in x]
        cached = {key: self._cache[key] for key in keys if key in self._cache}
        missing = [n for n, key in enumerate(keys) if len(cached.get(key, NO_CODES).layers) < depth]
        if missing:
            new = self.model.infer(x[missing], depth=depth, chunk=self.batch)
            cached |= {keys[n]: new.select(slice(i, i + 1)) for i, n in enumerate(missing)}
        self._cache |= cached
        count = max(self.batch, CACHED_BYTES // max(map(_bytes, cached.values())))
        for key in list(self._cache)[:-count]:
            del self._cache[key]
        return join_codes([replace(cached[key], layers=cached[key].layers[:depth]) for key in keys])

    def outputs(self, x: Tensor) -> Tensor | None:
        return None

    def methods_of(self, x: Tensor, layer: str) -> tuple[str, ...]:
        return ("generative",)

    def project(
        self,
        x: Tensor,
        layer: str,
        units: Tensor | list,
        seeds: Tensor | None,
        methods: Sequence[str],
    ) -> dict[str, Projection]:
        projection = self._project(x, layer, units, seeds)
        return dict.fromkeys(methods, projection)

    @plain
    def _project(
        self, x: Tensor, layer: str, units: Tensor | list, seeds: Tensor | None
    ) -> Projection:
        number, net = self._number(layer), self.model
        shape = self.layers(x)[number - 1].shape
        units = check_units(units, len(x), layer, shape)
        if len(units) == 0:
            return Projection(units, x[:0], units, units, x.new_zeros(0), self._report(number))
        images, n = torch.unique(units[:, 0], return_inverse=True)
        codes = self.codes(x[images.to(x.device)], number)
        positions = tuple(index.to(net.device) for index in (n, *units[:, 1:].unbind(1)))
        values = codes.layer(number).z[positions]
        coefficients = values if seeds is None else seeds.to(values)
        projected = torch.stack(list(project_units(net, codes, number, positions, coefficients)))
        fields = self._fields(number, units)
        limits = torch.tensor(x.shape[2:]).repeat(2)
        boxes = torch.minimum(fields.clamp(min=0), limits)
        return Projection(units, projected, boxes, fields, values, self._report(number))

    def _fields(self, number: int, units: Tensor) -> Tensor:
        """(U, 4): top, left, bottom, right of the receptive fields, not clipped."""
        rows, columns = (layer_field(self.model, number, axis) for axis in (0, 1))
        top, left = (
            rows.offset + rows.stride * units[:, 2],
            columns.offset + columns.stride * units[:, 3],
        )
        return torch.stack([top, left, top + rows.size, left + columns.size], 1)

    def _report(self, number: int) -> ProjectionReport:
        layers = [self.model.layer(level) for level in range(1, number)]
        switched = sum(layer.settings.pool is not None for layer in layers)
        exact = {"deconvolution": number} | ({"unpooling": switched} if switched else {})
        return ProjectionReport("generative", exact, switched=switched)

    def _number(self, name: str) -> int:
        if name not in self.names:
            raise unknown_layer(name, self.names)
        return self.names.index(name) + 1


def _bytes(codes: Codes) -> int:
    """The memory that codes take."""
    tensors = [codes.y, *(t for layer in codes.layers for t in vars(layer).values())]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _key(image: Tensor) -> bytes:
    pixels = image.detach().cpu().contiguous()
    return hashlib.sha1(pixels.view(torch.uint8).numpy()).digest() + str(image.shape).encode()
