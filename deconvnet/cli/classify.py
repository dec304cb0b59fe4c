"""Measure how well the features of a trained network separate classes of images:

deconvnet classify run=runs/iccv2011 data.path=caltech layers=[1,4]
"""

import dataclasses
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from deconvnet.applications.classification.code_pyramids import CodePyramids
from deconvnet.applications.classification.confusion_picture import confusion_picture
from deconvnet.applications.classification.evaluation import LayerFeatures, Scores, evaluate
from deconvnet.applications.classification.labelled_images import LabelledImages
from deconvnet.applications.classification.splits import draw_split
from deconvnet.applications.classification.task import Task
from deconvnet.applications.classification.word_histograms import WordHistograms
from deconvnet.cli.concepts_of_run import check_takes_images
from deconvnet.cli.errors import interruptible, one_line_errors
from deconvnet.cli.image_files import check_outputs, output_folder
from deconvnet.cli.read_settings import read_settings
from deconvnet.cli.settings import ClassifyConfig
from deconvnet.cli.unfinished_run import load_run
from deconvnet.monitoring.monitor import save_picture
from deconvnet.monitoring.strict_json import to_json
from deconvnet.network.layer import PATCHES, LayerSettings
from deconvnet.network.network import DeconvNet
from deconvnet.storage import ownership
from deconvnet.support.communicator import Communicator, RankLost, started
from deconvnet.support.devices import torch_device

# Seconds that a process waits for another, which may still be busy with a block of images.
PATIENCE = 3600.0
AGAIN = "run the same command again to resume; the features computed so far are kept"

PICTURE, SCORES = "confusion.png", "scores.json"


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError, RankLost):
        settings = read_settings(cfg)
        with started(patience=PATIENCE) as communicator, interruptible(AGAIN):
            classify(settings, communicator)


def classify(settings: ClassifyConfig, communicator: Communicator) -> None:
    layers: dict[str, tuple[LayerFeatures, int]] = {}
    runs = [Path(run) for run in (settings.run, *settings.beside)]
    for run in runs:
        network_name = run.name if run.is_dir() else run.stem
        prefix = "" if run == runs[0] else f"{network_name} "
        net = load_run(run, "layers=[{}]").to(torch_device(settings.device))
        check_takes_images(run, net, [Path(settings.data.path)])
        numbers = settings.layers or list(range(1, net.depth + 1))
        if run != runs[0]:
            numbers = layers_beside(net, numbers)
        for layer, features in features_of(run, net, numbers, settings, communicator).items():
            if f"{prefix}layer {layer}" in layers:
                raise ValueError(
                    f"beside={settings.beside}: two networks are called {network_name}"
                )
            layers[f"{prefix}layer {layer}"] = features, layer
    folder = output_folder(runs[0], settings.output, "classified")
    images = next(iter(layers.values()))[0].images
    if communicator.is_main:
        check_outputs([folder / name for name in (PICTURE, SCORES)], [*runs, *images.files])
    for features in dict.fromkeys(features for features, _ in layers.values()):
        features.compute()
    if communicator.is_main:
        report(evaluate(layers, settings), images.class_names, settings, folder)


def layers_beside(net: DeconvNet, layers: list[int]) -> list[int]:
    """Which layers of a network beside the run are tested: those of the run that it also has, or
    all of its own if it has none of them, as a network of one layer beside layer 2 of the run."""
    return [n for n in layers if n <= net.depth] or list(range(1, net.depth + 1))


def features_of(
    run: Path,
    net: DeconvNet,
    layers: list[int],
    settings: ClassifyConfig,
    communicator: Communicator,
) -> dict[int, LayerFeatures]:
    """The features of the layers of a network, not yet computed."""
    kinds = {number: _kind(net.layer(number).settings, settings) for number in layers}
    images = LabelledImages.from_settings(run, settings.data)
    splits = [
        draw_split(
            images.labels,
            images.class_names,
            train=settings.train,
            test=settings.test,
            seed=settings.seed + number,
            is_test=images.is_test,
        )
        for number in range(settings.splits)
    ]
    folder = output_folder(run, settings.output, "classified") / "features"
    by_kind = {}
    for kind in dict.fromkeys(kinds.values()):
        of_kind = [number for number in layers if kinds[number] is kind]
        by_kind[kind] = kind(Task(net, images, splits, of_kind, settings, folder, communicator))
    return {number: by_kind[kinds[number]] for number in layers}


def _kind(layer: LayerSettings, settings: ClassifyConfig) -> type[LayerFeatures]:
    codes = layer.coding == PATCHES if settings.features == "auto" else settings.features == "codes"
    return CodePyramids if codes else WordHistograms


def report(
    scores: dict[str, Scores],
    class_names: list[str],
    settings: ClassifyConfig,
    folder: Path,
) -> None:
    """Print a table; write scores.json, and confusion.png of the best layer."""
    width = max(map(len, scores))
    tested = next(iter(scores.values())).confusions.sum((1, 2))
    lines = [f"{'':{width}}   accuracy, mean over {len(class_names)} classes"]
    for name, score in scores.items():
        spread = "" if score.std is None else f" ± {100 * score.std:.1f}"
        lines.append(f"{name:{width}}   {100 * score.mean:.1f}%{spread}")
    lines.append(
        f"({settings.train or 'all'} training images of each class, {tested.mean():.0f} tests, "
        f"{len(tested)} split{'s' * (len(tested) > 1)}; chance level {100 / len(class_names):.1f}%)"
    )
    best = max(scores, key=lambda name: scores[name].mean)
    picture = confusion_picture(scores[best].confusions.sum(0), class_names)
    save_picture(folder / PICTURE, picture)
    table = {
        "settings": dataclasses.asdict(settings),
        "classes": class_names,
        "scores": {
            name: {
                "mean": score.mean,
                "std": score.std,
                "splits": score.accuracies.tolist(),
                "classes": mean_over_splits(score.class_accuracies),
            }
            for name, score in scores.items()
        },
    }
    ownership.write(folder / SCORES, to_json(table, indent=2).encode())
    print("\n".join(lines))
    print(f"{folder / PICTURE} ({best}), {folder / SCORES}")


def mean_over_splits(class_accuracies: np.ndarray) -> list[float]:
    """The mean accuracy (classes,) over the splits that test a class; NaN if none does."""
    tested = ~np.isnan(class_accuracies)
    count = tested.sum(0)
    total = np.where(tested, class_accuracies, 0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).tolist()
