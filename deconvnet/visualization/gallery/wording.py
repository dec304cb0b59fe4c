"""What a gallery says in sentences: about the network, its layers, the projections and figures."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from deconvnet.visualization.gallery.page_text import CONCEPT_WORDS, IMAGES, RECORDINGS
from deconvnet.visualization.models.concept_model import ConceptModel
from deconvnet.visualization.projection.projection import CONCEPTS, ProjectionReport
from deconvnet.visualization.result import VisualizationResult
from deconvnet.visualization.search.top_projections import TopProjections

METHOD_NAMES = {
    "generative": "projection",
    "deconv": "deconvnet",
    "guided": "guided backpropagation",
    "gradient": "gradient",
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def words_of(result: VisualizationResult) -> dict[str, str]:
    """What the images of a result are called: images of one row are recordings; and its maps, which
    are concepts if a dictionary has them."""
    words = RECORDINGS if result.images[0].shape[1] == 1 else IMAGES
    are_concepts = all(info.kind == CONCEPTS for info in result.infos.values())
    return {**words, **CONCEPT_WORDS} if are_concepts else words


def layer_title(layer: str) -> str:
    """The name of a layer; "layer 22" if a network only numbers its layers."""
    return f"layer {layer}" if layer.replace(".", "").replace("#", "").isdigit() else layer


def how_projected(layer: str, projections: TopProjections) -> list[str]:
    """How the pictures of a layer were made; methods that passed the same are named together."""
    methods: dict[str, list[str]] = {}
    for method, report in projections.reports.items():
        name = METHOD_NAMES.get(method, method)
        methods.setdefault(report_sentences(report), []).append(name)
    return [
        f"{layer_title(layer)} ({' and '.join(names)}): {sentences}"
        for sentences, names in methods.items()
    ]


def title_of(result: VisualizationResult) -> str:
    """The name of a network without the place that it was loaded from."""
    name = re.split(r"[/:]", result.model.name.rstrip("/"))[-1] or result.model.name
    module = result.projector.model
    if isinstance(module, ConceptModel):
        return f"{name}: concepts of {layer_title(module.layer)}"
    return f"{name}: a deconvolutional network" if result.projector.is_deconvnet else name


def subtitle_of(result: VisualizationResult) -> str:
    """A sentence on what the network is and on which images it is shown."""
    words, count = words_of(result), len(result.images)
    images = f"{count:,} {words['images']}" if count != 1 else f"one {words['image']}"
    if result.projector.is_deconvnet:
        net = result.projector.model
        return (
            f"{_layers(net.depth).capitalize()} of sparse maps, learned without labels "
            f"({', '.join(str(layer.settings.num_maps) for layer in net.layers)} maps from the "
            f"lowest to the highest). This page shows what each map responds to in {images}."
        )
    module = result.projector.model
    if isinstance(module, ConceptModel):
        return (
            f"{_concepts(module)} that together explain the activations of "
            f"{layer_title(module.layer)}, learned without labels. This page shows what each of "
            f"them responds to in {images}, and what the network loses without it."
        )
    shown = _layers(len(result.projections))
    return f"What the maps of {shown} of this network respond to in {images}."


def report_sentences(report: ProjectionReport) -> str:
    """How projections were made, in sentences for a reader who does not know the code."""
    if report.method == "generative":
        pools = _times(report.switched, "unpooling", "unpoolings")
        through = f" and {pools} with the switches of its image" if report.switched else ""
        filters = _times(sum(report.exact.values()) - report.switched, "layer", "layers")
        return f"Each activation is sent through the filters of {filters}{through}."
    steps = [_times(report.rectified, "rectifier", "rectifiers")]
    steps.append(_times(report.switched, "max pooling", "max poolings"))
    sentences = [f"On the way down, the signal passes {' and '.join(steps)}."]
    for counts, sentence in (
        (report.extended, "Rules in the spirit of the paper are used for {}."),
        (report.skipped, "It skips {}."),
        (report.unsupported, "No rule is known for {}: their gradients are used."),
    ):
        if counts:
            sentences.append(sentence.format(_operations(counts)))
    if report.uneven:
        names = ", ".join(uneven.layer for uneven in report.uneven)
        state = (
            "was divided out"
            if report.overlap == "normalised"
            else "may show as a fine checkerboard"
        )
        kind = "convolution" if len(report.uneven) == 1 else "convolutions"
        sentences.append(f"The uneven overlap of the strided {kind} {names} {state}.")
    return " ".join(sentences)


def method_sentences(projections: TopProjections, words: Mapping[str, str]) -> list[str]:
    """What a reader should know of the methods of a layer: why the first one is the first, and
    which of them does not depend on the image."""
    notes = []
    for method, report in projections.reports.items():
        name = METHOD_NAMES.get(method, method)
        if report.reason:
            notes.append(f"Shown with {name}, because {report.reason}.")
        elif method == "deconv" and not report.depends_on_image:
            notes.append(
                f"No max pooling lies between this layer and the {words['pixels']}, so {name} "
                f"projections of a map look the same for every {words['image']}."
            )
    return notes


def border_sentences(projections: TopProjections, words: Mapping[str, str]) -> list[str]:
    """How many examples are units at the border of their image; nothing if there are none."""
    found = np.isfinite(projections.values)
    border = int((projections.border & found).sum())
    if border == 0:
        return []
    if projections.all_at_border:
        return [
            f"The receptive fields of all examples reach beyond the {words['image']}, where a unit "
            "sees padding."
        ]
    return [
        f"Border units are included: in {border} of the {int(found.sum())} strongest examples the "
        f"receptive field reaches beyond the {words['image']}, where a unit sees padding."
    ]


def figure_caption(name: str, layers: Mapping[str, object], words: Mapping[str, str]) -> str:
    """The caption of a picture of `visualize_network` by its name; layers: those on the page.

    words: what maps are called, of `words_of`.
    """
    layer, _, kind = name.rpartition("-")
    if name in layers:
        return (
            f"Layer {name}: for each {words['map']}, its strongest activations projected to the "
            "pixels, next to the image at the same positions."
        )
    if kind == "filters":
        return (
            f"The filters of {layer_title(layer)}, which see the pixels themselves. Grey is zero."
        )
    if kind == "evolution":
        return (
            f"{words['maps'].capitalize()} of {layer_title(layer)} during training: one row for "
            f"each {words['map']}, one column for each epoch."
        )
    if kind == "invariance":
        return (
            "Invariance: how far the features move from those of the original when an image is "
            "shifted, enlarged or rotated, in the lowest and the highest layer (Zeiler and Fergus "
            "2014, figure 5)."
        )
    if layer == "occlusion" and kind.isdigit():
        return (
            f"Occlusion of image {int(kind) + 1}: a grey square slides over the image; where it "
            f"covers what the {words['map']} responds to, its activity falls (Zeiler and Fergus "
            "2014, fig. 7)."
        )
    return name.replace("-", " ")


def _concepts(module: ConceptModel) -> str:
    """How many concepts of which size a dictionary has."""
    settings = module.dictionary.layer(module.dictionary.depth).settings
    return (
        f"{settings.num_maps:,} concepts of {'×'.join(map(str, settings.filter_shape))} positions"
    )


def _operations(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count}×)" for name, count in sorted(counts.items()))


def _times(count: int, one: str, many: str) -> str:
    number = NUMBERS[count] if 0 <= count < len(NUMBERS) else str(count)
    return f"{number} {one if count == 1 else many}"


def _layers(count: int) -> str:
    return _times(count, "layer", "layers")
