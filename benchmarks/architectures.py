"""Which networks can be looked into: projects units of 72 architectures, and prints a table.

python benchmarks/architectures.py                  all, about four minutes on one core
python benchmarks/architectures.py --only convnext  those whose name contains it

Needs timm (pip install timm). Weights are random, images small and random. In the default layers of
each network, it projects the strongest units and checks that the picture is not empty and depends
on the image.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deconvnet.visualization.layer_choice import default_layers
from deconvnet.visualization.models.zoo import load_model
from deconvnet.visualization.projection.projection import ProjectionReport
from deconvnet.visualization.projection.projector import Projector

SIZE = 96
# The side of the images, and arguments, of networks that need others.
OPTIONS: dict[str, tuple[int, dict[str, object]]] = {
    "torchvision/vit_b_16": (64, {"image_size": 64}),
    "torchvision/maxvit_t": (224, {}),
    "timm/levit_128s": (224, {}),
    "timm/bat_resnext26ts": (128, {}),
    "timm/swin_tiny_patch4_window7_224": (112, {"img_size": 112}),
    "timm/vit_tiny_patch16_224": (96, {"img_size": 96}),
    "timm/deit_tiny_distilled_patch16_224": (96, {"img_size": 96}),
    "timm/mixer_s32_224": (96, {"img_size": 96}),
    "timm/crossvit_tiny_240": (240, {}),
    "timm/coatnet_pico_rw_224": (224, {}),
    "timm/visformer_tiny": (224, {}),
    "timm/efficientformer_l1": (224, {}),
    "timm/botnet26t_256": (256, {}),
    "timm/lambda_resnet26t": (256, {}),
}
TORCHVISION = (
    *("alexnet", "vgg11", "vgg16_bn", "resnet18", "resnet50", "wide_resnet50_2"),
    *("resnext50_32x4d", "densenet121", "googlenet", "inception_v3", "shufflenet_v2_x1_0"),
    *("squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet0_5"),
    *("regnet_x_400mf", "regnet_y_400mf", "efficientnet_b0", "efficientnet_v2_s"),
    *("convnext_tiny", "swin_t", "swin_v2_t", "maxvit_t", "vit_b_16"),
)
TIMM = (
    *("resnet18", "resnet50d", "resnetv2_50", "ecaresnet26t", "seresnet50", "res2net50_26w_4s"),
    *("dla34", "vgg11", "inception_v4", "cspresnet50", "ese_vovnet19b_dw", "hrnet_w18_small"),
    *("ghostnet_100", "mobilenetv4_conv_small", "efficientnet_lite0", "regnety_002", "repvgg_a0"),
    *("xception41", "darknet53", "selecsls42b", "tresnet_m", "gernet_s", "resnest14d"),
    *("skresnet18", "tf_efficientnet_b0", "mobilenetv3_small_100", "hardcorenas_a", "rexnet_100"),
    *("nfnet_l0", "levit_128s", "fastvit_t8", "bat_resnext26ts", "convnext_atto"),
    *("convnextv2_atto", "edgenext_xx_small", "poolformer_s12", "swin_tiny_patch4_window7_224"),
    *("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "mixer_s32_224"),
    *("crossvit_tiny_240", "mobilevit_xxs", "coatnet_pico_rw_224", "visformer_tiny"),
    *("efficientformer_l1", "botnet26t_256", "lambda_resnet26t"),
)
NETWORKS = [
    *(f"torchvision/{name}" for name in TORCHVISION),
    *(f"timm/{name}" for name in TIMM),
]
MAPS = 3
# Two pictures whose cosine is larger are the same.
SAME = 0.99999


@dataclass
class Outcome:
    """What was found for one network.

    layers: the report of each layer that was projected; refused: the message of each that was not;
    suspect: the layers whose pictures are empty, or the same for both images.
    """

    name: str
    side: int
    layers: dict[str, ProjectionReport] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    suspect: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        if not self.layers:
            return "refused"
        if self.suspect:
            return "suspect"
        return "in part" if self.refused else "in full"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="networks whose name contains this text")
    options = parser.parse_args()
    if importlib.util.find_spec("timm") is None:
        sys.exit("benchmarks/architectures.py needs timm: pip install timm")
    torch.set_num_threads(1)
    logging.getLogger("deconvnet").setLevel(logging.ERROR)
    names = [name for name in NETWORKS if options.only in name]
    if not names:
        sys.exit(f"--only {options.only}: no such network; there are {', '.join(NETWORKS)}")
    print("| network | pixels | layers | method | extended rules | remarks |")
    print("|---|---|---|---|---|---|")
    outcomes = []
    for name in names:
        outcomes.append(outcome(name))
        print(row(outcomes[-1]), flush=True)
    print(f"\n{summary(outcomes)}")
    print(f"{time.process_time():.0f} seconds of CPU", file=sys.stderr)


def outcome(name: str) -> Outcome:
    """Project units of the default layers of a network."""
    side, arguments = OPTIONS.get(name, (SIZE, {}))
    found = Outcome(name, side)
    try:
        model = load_model(name, weights="none", options=arguments).module
        open_branches(model)
        projector, x = Projector(model), images(side)
        layers = default_layers(projector.layers(x))
    except ValueError as error:
        found.refused["all"] = str(error)
        return found
    for layer in layers:
        try:
            pictures, found.layers[layer] = project(projector, x, layer)
        except ValueError as error:
            found.refused[layer] = str(error)
            continue
        if not pictures.flatten(1).any(1).all():
            found.suspect[layer] = "empty"
        elif found.layers[layer].rectified > 1 and same(pictures):
            found.suspect[layer] = "the same for both images"
    return found


@torch.no_grad()
def open_branches(model: nn.Module) -> None:
    """Set scales of branches that begin at almost zero to one: as they are, nothing passes."""
    for name, p in model.named_parameters():
        if p.squeeze().dim() < 2 and not name.endswith("bias") and p.abs().max() < 0.1:
            p.fill_(1)


def images(side: int) -> Tensor:
    """(2, 3, side, side): random images with structures of several sizes."""
    generator = torch.Generator().manual_seed(0)
    planes = [
        F.interpolate(
            torch.randn(2, 3, size, size, generator=generator), (side, side), mode="bilinear"
        )
        for size in (3, 7, 17, side)
    ]
    return sum(planes) / len(planes) ** 0.5


def project(projector: Projector, x: Tensor, layer: str) -> tuple[Tensor, ProjectionReport]:
    """(2 U, C, H, W): the strongest units of U maps in both images, and the same units there."""
    maps = projector.responses(x, [layer])[layer]
    # In the image where a unit is weaker, its sign counts as well.
    common = maps.amin(0)
    strongest = common.flatten(1).amax(1).topk(min(MAPS, len(common))).indices.tolist()
    W = common.shape[2]
    units = []
    for k in strongest:
        i, j = divmod(int(common[k].argmax()), W)
        units += [(0, k, i, j), (1, k, i, j)]
    found = projector(x, layer, units, seeds=torch.ones(len(units)))
    return found.images, found.report


def same(pictures: Tensor) -> bool:
    """Whether the pictures of all units are the same in both images."""
    one, other = pictures[::2].flatten(1), pictures[1::2].flatten(1)
    return bool((F.cosine_similarity(one, other) > SAME).all())


def row(found: Outcome) -> str:
    methods = Counter(report.method for report in found.layers.values())
    extended = sorted({name for report in found.layers.values() for name in report.extended})
    count = f"{len(found.layers)} of {len(found.layers) + len(found.refused)}"
    columns = (
        *(found.name, f"{found.side}", count),
        ", ".join(f"{method} {number}" for method, number in methods.items()),
        *(", ".join(extended), "; ".join(remarks(found))),
    )
    return f"| {' | '.join(columns)} |"


def remarks(found: Outcome) -> Iterator[str]:
    without_rules = {
        name.partition(" ")[0] for report in found.layers.values() for name in report.unsupported
    }
    if without_rules:
        yield f"no rule for {', '.join(sorted(without_rules))}"
    for layer, message in found.refused.items():
        yield f"{layer} refused: {message}"
    for layer, what in found.suspect.items():
        yield f"**{layer}: {what}**"


def summary(outcomes: list[Outcome]) -> str:
    kinds = Counter(found.kind for found in outcomes)
    alone = sum(
        found.kind == "in full"
        and all(report.method == "gradient" for report in found.layers.values())
        for found in outcomes
    )
    return (
        f"{len(outcomes)} networks: {kinds['in full']} in full ({alone} of them by the gradient "
        f"alone), {kinds['in part']} in part, {kinds['refused']} refused, {kinds['suspect']} with "
        "pictures that are empty or do not depend on the image."
    )


if __name__ == "__main__":
    main()
