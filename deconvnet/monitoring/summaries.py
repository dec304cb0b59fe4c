"""TensorBoard summaries with a description, and the tags, descriptions and layout of a run's page.

TensorBoard sorts tags by name. The groups of pictures begin with a digit, so that the page opens on
the filters. All steps of a run are filter updates; the columns of features over time are epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from deconvnet.monitoring.picture_files import png

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

BINS = 60
STEP = "The step counts filter updates since the run began."

# The groups of the pictures of a layer, and what each shows. The missing numbers are those of a
# visualization (`visualization.event_page`), which TensorBoard shows between them.
PICTURES = {
    "filters": (
        "0 filters",
        "What each map looks for, in pixels, with the number of the map below, in the order of "
        "the numbers. Layer 1: the filters. Higher layers: the strongest activation of each map, "
        "projected to pixels with the switches of its image, as if it were positive. Grey is "
        "zero; every tile has its own scale, so only its shape has a meaning. Of a layer with "
        "hundreds of maps, the first are shown here, and all in the folder pictures.",
    ),
    "patches": (
        "1 patches",
        "For each map: its feature, and the part of an image where it responds most strongly. "
        "Negative: the response there is negative, so the image shows the feature with light and "
        "dark exchanged.",
    ),
    "reconstructed": (
        "5 reconstructed",
        "From the top: the image, the image after preprocessing, what each layer reconstructs of "
        "it (with its SNR and density over these images), the residual that the highest layer "
        "leaves, and the reconstruction in pixels. From the second row to the residual, all rows "
        "have the same scale.",
    ),
    "lam": (
        "0 lam",
        "What lam=auto chose before the layer learned, and from what: the squared error with which "
        "the code of the other pixels predicts hidden pixels, relative to that of maps of zeros.",
    ),
    "evolution": (
        "4 evolution",
        "A row for each map, a column for each epoch: the strongest activation in this epoch, "
        "projected to pixels as if it were positive. The number of the image is below a tile if "
        "it differs from that of the tile before; a jump there need not be a change of the "
        "feature.",
    ),
    "maps": (
        "6 maps",
        "One image (the one that the layer reconstructs best), and where its strongest maps are "
        "active: red for positive, blue for negative coefficients, the stronger the larger they "
        "are. Below each: the feature, the number of the map, and its non-zero coefficients.",
    ),
    "parts": (
        "7 parts",
        "One image as the sum of its strongest activations, and the strongest of these as the sum "
        "of activations in the layers below.",
    ),
}

# What the curves of a layer show, by the name of the statistic.
CURVES = {
    "objective": "The objective, mean per image: reconstruction + sparsity. It should fall.",
    "reconstruction": "The term of the objective for the error: lam / 2 |error|^2, mean per image.",
    "sparsity": "The term of the objective for the maps, |z|^p summed, mean per image.",
    "snr": "Signal-to-noise ratio in dB of what the layer reconstructs: of the preprocessed images "
    "in layer 1, by default of the pooled maps below in higher layers. Higher is better.",
    "density": "Share of the coefficients of the maps that are not zero.",
    "dead": "Number of filters that no map used in this epoch. Some may be re-initialised.",
    "double": "Number of filters that duplicate another one.",
    "seconds_per_image": "Seconds that this epoch took, for each image.",
}
# What the curves of the inference of a layer show.
INFERENCE = {
    "objective": "The objective, mean over a few images, at each iteration of inference.",
    "beta": "beta, the weight of the quadratic term of the last proximal map, a mean as above.",
    "density": "Share of the coefficients that are not zero, at each iteration.",
}
# What the final statistics of a layer show: over all training images, with the final filters.
RESULTS = {
    "snr": ("SNR of the image, dB", "reconstructed from this layer through all layers below"),
    "density": ("density", "share of the coefficients that are not zero"),
    "objective": ("objective", "mean per image"),
    "dead": ("dead maps", "maps that are zero on all images"),
    "seconds": ("seconds", "the training time of the layer"),
}
# Final statistics that HPARAMS compares between runs.
METRICS = ("snr", "density", "objective")
# The settings of a layer that HPARAMS shows first.
SHOWN = (".num_maps", ".filter_size", ".lam")


def picture_tag(name: str) -> str:
    """The tag of the picture layerN/kind on the page."""
    layer, _, kind = name.partition("/")
    return f"{PICTURES[kind][0]}/{layer}" if kind in PICTURES else name


def picture_description(name: str) -> str:
    kind = name.partition("/")[2]
    return f"{PICTURES[kind][1]} {STEP}" if kind in PICTURES else STEP


def result_tag(layer: int, key: str) -> str:
    """The tag of a final statistic of a layer."""
    return f"result/layer{layer} {key}"


def scalar_summary(tag: str, value: float, description: str) -> Summary:
    from torch.utils.tensorboard.summary import scalar

    return _described(scalar(tag, value), description, "scalars")


def histogram_summary(tag: str, values: Tensor, description: str) -> Summary:
    from torch.utils.tensorboard.summary import histogram

    summary = histogram(tag, values.detach().cpu().numpy(), BINS)
    return _described(summary, description, "histograms")


def text_summary(tag: str, markdown: str, description: str) -> Summary:
    from torch.utils.tensorboard.summary import text

    return _described(text(tag, markdown), description, "text")


def image_summary(
    tag: str,
    pictures: Sequence[Tensor],
    description: str,
    *,
    encode: Callable[[Tensor], bytes] = png,
) -> Summary:
    """Pictures (3, H, W) in [0, 1] as the samples of one tag.

    encode: a function of `picture_files`.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.image.metadata import create_summary_metadata

    _, height, width = pictures[0].shape
    strings = [
        str(width).encode(),
        str(height).encode(),
        *map(encode, pictures),
    ]
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(strings))])
    tensor = TensorProto(dtype="DT_STRING", string_val=strings, tensor_shape=shape)
    metadata = create_summary_metadata(display_name=tag, description=description)
    return Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=metadata)])


def hparam_summaries(
    settings: dict[str, bool | int | float | str], layers: Sequence[int]
) -> list[Summary]:
    """The settings of a run, and the final statistics of these layers as its metrics."""
    from tensorboard.plugins.hparams.api_pb2 import MetricInfo, MetricName
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    summaries = hparams(settings, {})
    content = summaries[0].value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(content.content)
    # TensorBoard lists settings that differ between runs first, and shows the first five.
    for info in data.experiment.hparam_infos:
        if info.name.endswith(SHOWN) and "differs" in info.DESCRIPTOR.fields_by_name:
            info.differs = True
    for layer in layers:
        for key in METRICS:
            name, description = RESULTS[key]
            data.experiment.metric_infos.append(
                MetricInfo(
                    name=MetricName(tag=result_tag(layer, key)),
                    display_name=f"layer {layer}: {name}",
                    description=description,
                )
            )
    content.content = data.SerializeToString()
    return list(summaries)


def layout_summary(layers: Sequence[int]) -> Summary:
    """The tab CUSTOM SCALARS: curves that belong together in one chart."""
    from torch.utils.tensorboard.summary import custom_scalars

    terms = ("objective", "reconstruction", "sparsity")
    charts = {
        f"layer {n}": {
            "objective = reconstruction + sparsity": _lines(f"layer{n}/{key}" for key in terms),
            "SNR, dB": _lines([f"layer{n}/snr"]),
            "density": _lines([f"layer{n}/density"]),
        }
        for n in layers
    }
    return custom_scalars(charts)


def _described(summary: Summary, description: str, plugin: str) -> Summary:
    for value in summary.value:
        value.metadata.summary_description = description
        value.metadata.plugin_data.plugin_name = plugin
    return summary


def _lines(tags: Sequence[str]) -> list:
    """A chart of several lines; tags are regular expressions."""
    return ["Multiline", [f"^{tag}$" for tag in tags]]
