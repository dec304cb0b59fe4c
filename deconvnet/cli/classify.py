"""Put images into classes by the features of a trained network:

deconvnet classify run=runs/iccv2011 data.path=caltech layers=[1,4]
"""

import dataclasses
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from deconvnet.applications.classification.classifier import Scores, draw_split
from deconvnet.applications.classification.pipeline import Features, Images, judge
from deconvnet.applications.restored_pictures import check_targets, confusion_picture
from deconvnet.cli.errors import interruptible, one_line_errors
from deconvnet.cli.settings import ClassifyConfig, read_settings
from deconvnet.monitoring.monitor import save_picture
from deconvnet.monitoring.strict_json import to_json
from deconvnet.network.network import load
from deconvnet.storage import ownership
from deconvnet.support.communicator import Communicator, RankLost, started
from deconvnet.support.devices import torch_device

# Seconds that a process waits for another: one may be a piece of images behind.
PATIENCE = 3600.0
AGAIN = "run the same command again to resume; the features computed so far are kept"

PICTURE, SCORES = "confusion.png", "scores.json"


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError, RankLost):
        settings = read_settings(cfg)
        with started(patience=PATIENCE) as communicator, interruptible(AGAIN):
            classify(settings, communicator)


def classify(settings: ClassifyConfig, communicator: Communicator) -> None:
    found: dict[str, tuple[Features, int]] = {}
    runs = [Path(run) for run in (settings.run, *settings.beside)]
    for run in runs:
        features = features_of(run, settings, communicator)
        called = run.name if run.is_dir() else run.stem
        name = "" if run == runs[0] else f"{called} "
        for layer in features.layers:
            if f"{name}layer {layer}" in found:
                raise ValueError(f"beside={settings.beside}: two networks are called {called}")
            found[f"{name}layer {layer}"] = features, layer
    folder = results(runs[0], settings)
    if communicator.is_main:
        images = next(iter(found.values()))[0].images
        check_targets([folder / name for name in (PICTURE, SCORES)], [*runs, *images.files])
    for features in dict.fromkeys(features for features, _ in found.values()):
        features.learn_codebooks()
        features.count_words()
    if communicator.is_main:
        scores = judge(found, settings)
        names = next(iter(found.values()))[0].images.names
        report(scores, names, settings, folder)


def features_of(run: Path, settings: ClassifyConfig, communicator: Communicator) -> Features:
    """Those of the layers of a network, nothing of which is made yet."""
    net = load(run).to(torch_device(settings.device))
    layers = settings.layers or list(range(1, net.depth + 1))
    for number in layers:
        net.layer(number)
    images = Images.of(run, settings.data)
    splits = [
        draw_split(
            images.labels,
            images.names,
            train=settings.train,
            test=settings.test,
            seed=settings.seed + number,
            fixed=images.fixed,
        )
        for number in range(settings.splits)
    ]
    return Features(
        net, images, splits, layers, settings, results(run, settings) / "features", communicator
    )


def results(run: Path, settings: ClassifyConfig) -> Path:
    """The folder of what is found for a network."""
    if settings.output:
        return Path(settings.output).expanduser()
    return (run if run.is_dir() else run.parent) / "classified"


def report(
    scores: dict[str, Scores],
    names: list[str],
    settings: ClassifyConfig,
    folder: Path,
) -> None:
    """Say and write down what came out: a table, scores.json, confusion.png of the best."""
    width = max(map(len, scores))
    tested = next(iter(scores.values())).confusions.sum((1, 2))
    lines = [f"{'':{width}}   accuracy, mean over {len(names)} classes"]
    for name, score in scores.items():
        spread = "" if score.spread is None else f" ± {100 * score.spread:.1f}"
        lines.append(f"{name:{width}}   {100 * score.mean:.1f}%{spread}")
    lines.append(
        f"({settings.train} training images of a class, {tested.mean():.0f} tests, "
        f"{len(tested)} splits; by chance {100 / len(names):.1f}%)"
    )
    best = max(scores, key=lambda name: scores[name].mean)
    picture = confusion_picture(scores[best].confusions.sum(0), names)
    save_picture(folder / PICTURE, picture)
    table = {
        "settings": dataclasses.asdict(settings),
        "classes": names,
        "scores": {
            name: {
                "mean": score.mean,
                "std": score.spread,
                "splits": score.accuracies.tolist(),
                "classes": mean_of_splits(score.by_class),
            }
            for name, score in scores.items()
        },
    }
    ownership.write(folder / SCORES, to_json(table, indent=2).encode())
    print("\n".join(lines))
    print(f"{folder / PICTURE} ({best}), {folder / SCORES}")


def mean_of_splits(by_class: np.ndarray) -> list[float]:
    """The mean accuracy of every class over the splits (splits, classes) that test it, or NaN."""
    tested = ~np.isnan(by_class)
    count = tested.sum(0)
    total = np.where(tested, by_class, 0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).tolist()
