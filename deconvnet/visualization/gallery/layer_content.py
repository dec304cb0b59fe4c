"""The content of one layer of the gallery: its maps with their examples, relatives and control."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.visualization.drawing.canvas import (
    as_curves,
    quantile_magnitude,
    shade_projections,
    shade_signed,
)
from deconvnet.visualization.evolution.evolution import Evolution
from deconvnet.visualization.gallery.concept_content import ConceptContent
from deconvnet.visualization.gallery.exhibits import (
    Control,
    Example,
    GalleryLayer,
    GalleryMap,
    ProjectionSheet,
    Source,
)
from deconvnet.visualization.gallery.relatives import (
    SOURCES,
    closest,
    filter_weights,
    pooled_maps,
    separate_sources,
    similarities,
)
from deconvnet.visualization.gallery.survey import Survey
from deconvnet.visualization.gallery.wording import (
    border_sentences,
    layer_title,
    method_sentences,
    words_of,
)
from deconvnet.visualization.projection.boxes import crop
from deconvnet.visualization.projection.projection import LayerInfo
from deconvnet.visualization.result import LayerMeasurements, VisualizationResult
from deconvnet.visualization.search.projection_grids import pixel_filters, tiles_to_show
from deconvnet.visualization.search.tile_codec import reduced
from deconvnet.visualization.search.top_activations import group_by_size
from deconvnet.visualization.search.top_projections import TopProjections

# Maps of the control to show in each layer.
CONTROL_MAPS = 6


def layer_content(
    result: VisualizationResult,
    layer: str,
    survey: Survey,
    names: list[str],
    step: Callable[[], None],
) -> GalleryLayer:
    """One layer of a result; its maps are computed when they are read.

    survey: of this layer; names: of all images; step: called after every map.
    """
    info, top = result.infos[layer], result.top_activations[layer]
    projections = result.projections[layer]
    content, words = _LayerContent.of(result, layer, survey, names), words_of(result)
    facts: dict[str, str | float] = {
        f"dead {words['maps']}": int(top.dead.sum()),
        "active positions": f"{top.density_sum.mean() / top.num_images:.2%}",
    }
    boards = projections.checkerboard[np.isfinite(projections.checkerboard)]
    if len(boards):
        facts["checkerboard (median)"] = f"{np.median(boards):.2f}"
    facts |= content.measurements.facts
    return GalleryLayer(
        layer,
        layer_title(layer),
        (content.map(row, step) for row in range(len(projections.maps))),
        kind=_kind(result, info),
        shape=info.shape,
        field=info.field,
        stride=info.stride,
        facts=facts,
        control=_control(result, layer),
        below=content.below,
        sources_are="weights" if result.projector.is_deconvnet else "contributions",
        similar_are="pictures" if content.concepts is None else "filters",
        notes=[
            *method_sentences(projections, words),
            *border_sentences(projections, words),
            *(content.concepts.notes if content.concepts else ()),
        ],
    )


def _kind(result: VisualizationResult, info: LayerInfo) -> str:
    if not result.projector.is_deconvnet:
        return info.kind
    number = int(info.name.removeprefix("layer"))
    h, w = result.projector.model.layer(number).settings.filter_shape
    return f"deconvolution, {h}×{w} filters"


def _control(result: VisualizationResult, layer: str) -> Control | None:
    control = result.control.get(layer)
    if control is None:
        return None
    shown = {}
    for row in range(min(len(control.maps), CONTROL_MAPS)):
        is_alive = control.count(row) > 0
        tiles = _shaded(control, row, control.methods[0], result.contrast) if is_alive else None
        shown[int(control.maps[row])] = tiles
    return Control(shown)


def _shaded(projections: TopProjections, row: int, method: str, contrast: float) -> Tensor:
    """The tiles of a map by one method, (k, 3, h, w) in [0, 1], as in the grid of the layer."""
    tiles = tiles_to_show(projections, row)[method][: projections.count(row)]
    return shade_projections(tiles, contrast=contrast)


@dataclass(frozen=True)
class _LayerContent:
    """What the maps of one layer need, computed once.

    filters: of all maps, shaded, if the layer sees pixels; similar, coactive: (M, M) and (K, K);
    below: the name of the layer that its maps are made of; weights: (M, C), of the channels that
    this layer passes on. concepts: if the maps are those of a dictionary over a layer.
    """

    result: VisualizationResult
    layer: str
    survey: Survey
    names: list[str]
    filters: Tensor | None
    similar: np.ndarray
    coactive: np.ndarray | None
    below: str | None
    weights: np.ndarray | None
    concepts: ConceptContent | None

    @classmethod
    def of(
        cls, result: VisualizationResult, layer: str, survey: Survey, names: list[str]
    ) -> _LayerContent:
        projections, projector = result.projections[layer], result.projector
        filters = pixel_filters(projector)
        is_first = filters is not None and filters[0] == layer.partition("#")[0]
        below, concepts = _layer_below(result, layer), ConceptContent.of(result, layer)
        return cls(
            result,
            layer,
            survey,
            names,
            as_curves(shade_signed(filters[1])) if is_first else None,
            _similar_pictures(projections) if concepts is None else concepts.similar,
            survey.correlations(),
            below,
            None if below is None else _weights(result, layer, below),
            concepts,
        )

    @property
    def measurements(self) -> LayerMeasurements:
        return self.result.measurements.get(self.layer, LayerMeasurements())

    def map(self, row: int, step: Callable[[], None]) -> GalleryMap:
        """The map in this row of the projections."""
        result, projections = self.result, self.result.projections[self.layer]
        top, number = result.top_activations[self.layer], int(projections.maps[row])
        count, total, words = projections.count(row), top.num_images, words_of(result)
        spectrum, spectrum_patches = self._spectrum(row) if count else ([], None)
        e = result.evolutions.get(self.layer)
        has_evolution = e is not None and number in e.maps
        patches = torch.from_numpy(projections.patches[row, :count]).float() / 255
        step()
        return GalleryMap(
            number,
            {
                method: _shaded(projections, row, method, result.contrast)
                for method in projections.methods
                if count
            },
            patches if count else None,
            [self._example(row, rank) for rank in range(count)],
            sheet=self._sheet(row),
            label=self._label(number),
            statistics={
                "strongest activation": float(np.abs(projections.values[row, 0])) if count else 0.0,
                f"mean of the strongest per {words['image']}": float(top.peak_sum[number] / total),
                f"active in {words['images']}, %": 100 * float(top.active_images[number] / total),
                "active positions, %": 100 * float(top.density_sum[number] / total),
                **(self.concepts.statistics(row) if self.concepts else {}),
                **{name: float(v[number]) for name, v in self.measurements.maps.items()},
            },
            filter=None if self.filters is None else self.filters[number],
            spectrum=spectrum,
            spectrum_patches=spectrum_patches,
            histogram=self.survey.histogram(number),
            similar=closest(self.similar[row], projections.maps, number),
            coactive=self._coactive(number),
            sources=self._sources(row) if count else (),
            evolution=_evolution_tiles(e, e.maps.index(number)) if has_evolution else None,
            epochs=e.epochs if has_evolution else (),
        )

    def _sheet(self, row: int) -> ProjectionSheet | None:
        """The projections of a map in full size, unless its tiles are small."""
        projections, contrast = self.result.projections[self.layer], self.result.contrast
        full = projections.full_tiles(row)
        if not full:
            return None
        size = projections.patches.shape[3:]
        factors = {}
        for method, tiles in full.items():
            tiles = torch.from_numpy(tiles).float()
            magnitudes = [
                quantile_magnitude(each, contrast).flatten()
                for each in (reduced(tiles, size), tiles)
            ]
            factors[method] = [tuple(pair) for pair in (127 / torch.stack(magnitudes, 1)).tolist()]
        return ProjectionSheet(projections.sheets[row], projections.sheet_tile, factors)

    def _label(self, number: int) -> str:
        """The class of a map, if there is one map for each."""
        labels, shape = self.result.model.labels, self.result.infos[self.layer].shape
        is_output = labels is not None and shape[0] == len(labels) and shape[1:] == (1, 1)
        return labels[number] if is_output else ""

    def _example(self, row: int, rank: int) -> Example:
        projections = self.result.projections[self.layer]
        image, _, i, j = projections.units[row, rank].tolist()
        return Example(
            self.names[image],
            float(projections.values[row, rank]),
            image,
            (i, j),
            projections.boxes[row, rank].tolist(),
            projections.windows[row, rank].tolist(),
            bool(projections.border_marks[row, rank]),
            heat=self.concepts and self.concepts.heats.get((row, rank)),
        )

    def _spectrum(self, row: int) -> tuple[list[Example], Tensor | None]:
        """Examples at lower activations, and the image there."""
        projections, info = self.result.projections[self.layer], self.result.infos[self.layer]
        number = int(projections.maps[row])
        strongest = projections.units[row, : projections.count(row), 0].tolist()
        examples, patches = [], []
        for share, n in self.survey.spectrum(number, without=strongest):
            image = int(self.survey.images[n])
            unit = int(self.survey.rows[n, number]), int(self.survey.columns[n, number])
            pixels = self.result.shown_images[image]
            size = tuple(pixels.shape[1:])
            window = _window_of(unit, info, row, projections, size)
            patch = crop(pixels[None], torch.tensor([window]), fill=0.5)[0]
            tile = projections.patches.shape[3:]
            if tuple(patch.shape[1:]) != tile:
                patch = F.interpolate(patch[None], tile, mode="bilinear", antialias=True)[0]
            patches.append(patch)
            value = float(self.survey.peaks[n, number])
            border = not projections.all_at_border and _is_at_border(unit, info, size)
            example = Example(self.names[image], value, image, unit, window=window, border=border)
            examples.append(replace(example, share=share))
        return examples, torch.stack(patches).clamp(0, 1) if patches else None

    def _coactive(self, number: int) -> list[tuple[int, float]]:
        if self.coactive is None:
            return []
        shown = self.result.projections[self.layer].maps
        return closest(self.coactive[number, shown], shown, number)

    def _sources(self, row: int) -> list[Source]:
        """The maps below with the largest weights."""
        if self.weights is None:
            return []
        weights, net = self.weights[row], self.result.projector.model
        channels = [int(c) for c in np.argsort(-weights, kind="stable")[:SOURCES] if weights[c] > 0]
        if not self.result.projector.is_deconvnet:
            return [Source([channel], float(weights[channel])) for channel in channels]
        depth = int(self.layer.removeprefix("layer"))
        pictures = self._source_pictures(row, channels)
        return [
            Source(pooled_maps(net, depth, channel), float(weights[channel]), picture)
            for channel, picture in zip(channels, pictures, strict=True)
        ]

    def _source_pictures(self, row: int, channels: list[int]) -> Tensor:
        """(len(channels), 3, h, w): what each channel adds to the strongest example, in a
        deconvolutional network."""
        projector, projections = self.result.projector, self.result.projections[self.layer]
        depth = int(self.layer.removeprefix("layer"))
        image, number, i, j = projections.units[row, 0].tolist()
        x = projector.prepare(self.result.images[image][None])
        codes = projector.backend.codes(x, depth)
        parts = separate_sources(projector.model, codes, depth, (0, number, i, j), channels)
        windows = torch.from_numpy(projections.windows[row, :1]).expand(len(parts), -1)
        tiles = projector.signed_rgb(crop(parts, windows)).cpu() * float(projections.signs[row, 0])
        # One scale for all, so that a reader sees which of them matter.
        return shade_signed(tiles, quantile_magnitude(tiles.flatten()[None], 0.995))


def _similar_pictures(projections: TopProjections) -> np.ndarray:
    """(M, M): how alike the strongest projections of the maps are."""
    # With the sign taken out, zero where there is no activation. Deconvnet projections of deep
    # layers are gratings that all look alike.
    method = "guided" if "guided" in projections.methods else projections.methods[0]
    tiles = projections.tiles[method][:, 0].astype(np.float32)
    return similarities(torch.from_numpy(tiles * projections.signs[:, 0, None, None, None]))


def _layer_below(result: VisualizationResult, layer: str) -> str | None:
    """The next lower layer of the result, None for the lowest."""
    layers = list(result.projections)
    number = layers.index(layer)
    if not result.projector.is_deconvnet:
        return layers[number - 1] if number else None
    below = f"layer{int(layer.removeprefix('layer')) - 1}"
    return below if below in layers else None


def _weights(result: VisualizationResult, layer: str, below: str) -> np.ndarray | None:
    """(M, C): with which weight each channel that a layer below passes on enters the shown maps of
    a layer; None if none does.

    In a deconvolutional network, the norms of the filters; else the shares of the strongest
    activation that the maps below contribute.
    """
    projector, projections = result.projector, result.projections[layer]
    if projector.is_deconvnet:
        number = int(layer.removeprefix("layer"))
        return filter_weights(projector.model, number)[projections.maps]
    strongest = projections.units[:, 0]
    rows = np.flatnonzero(strongest[:, 0] >= 0)
    rows = rows[np.argsort(strongest[rows, 0], kind="stable")]
    weights = np.zeros((len(strongest), result.infos[below].shape[0]))
    numbers = np.unique(strongest[rows, 0])
    for start in range(0, len(numbers), projector.batch):
        images = numbers[start : start + projector.batch].tolist()
        pixels = [result.images[number] for number in images]
        for group in group_by_size(pixels):
            x = projector.prepare(torch.stack([pixels[index] for index in group]))
            index = {images[n]: position for position, n in enumerate(group)}
            chosen = [row for row in rows if int(strongest[row, 0]) in index]
            units = [(index[int(n)], *rest) for n, *rest in strongest[chosen].tolist()]
            found = projector.contributions(x, layer, units, below)
            weights[chosen] = found.cpu().numpy() / projections.values[chosen, :1]
    return weights if weights.any() else None


def _is_at_border(unit: tuple[int, int], info: LayerInfo, image: tuple[int, int]) -> bool:
    """Whether the receptive field of a unit (row, column) reaches beyond an image of this size."""
    if info.field is None:
        return False
    starts = [int(info.starts(axis)[n]) for axis, n in enumerate(unit)]
    ends = [start + side for start, side in zip(starts, info.field, strict=True)]
    return min(starts) < 0 or any(end > side for end, side in zip(ends, image, strict=True))


def _window_of(
    unit: tuple[int, int],
    info: LayerInfo,
    row: int,
    projections: TopProjections,
    image: tuple[int, int],
) -> list[int]:
    """What a tile of a unit (row, column) shows: the window of the strongest example in a row of
    the projections, moved by the distance of the two units; along an axis where it is the whole
    image, it stays."""
    window = projections.windows[row, 0].tolist()
    if info.stride is None:  # units without a place of their own
        return window
    strongest = projections.units[row, 0, 2:].tolist()
    for axis, (n, m) in enumerate(zip(unit, strongest, strict=True)):
        if window[axis::2] != [0, image[axis]]:
            starts = info.starts(axis)
            window[axis] += int(starts[n] - starts[m])
            window[axis + 2] += int(starts[n] - starts[m])
    return window


def _evolution_tiles(e: Evolution, row: int) -> Tensor:
    tiles = e.tiles[:, row].float()
    return shade_signed(tiles, quantile_magnitude(tiles))
