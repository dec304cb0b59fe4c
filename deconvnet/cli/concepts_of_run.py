"""The network whose activations a run explains, with the concepts that the run has learned."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from deconvnet.activations.settings import TrainingData, load_data_model
from deconvnet.cli.class_names import read_class_names
from deconvnet.cli.printed_commands import setting, sibling
from deconvnet.images.arrays import is_array_file
from deconvnet.images.decoding import shown_name
from deconvnet.images.fit import Crop
from deconvnet.network.network import DeconvNet
from deconvnet.training.run_folder import training_data
from deconvnet.visualization.models.concept_model import ConceptModel
from deconvnet.visualization.models.zoo import LoadedModel, digest

# What models are built by without any code of a user.
KNOWN_SOURCES = ("torchvision/", "timm/")


def load_concepts(
    run: Path,
    net: DeconvNet,
    data: TrainingData,
    *,
    trust_code: bool = False,
    labels: list[str] | str | None = None,
) -> LoadedModel:
    """The network of data.model with the concepts of `net`, which is that of the run.

    trust_code: see `check_trusted`. labels: names of the classes, as in the settings.
    """
    check_trusted(run, data, trust_code)
    base = load_data_model(data)
    names = read_class_names(labels)
    module = ConceptModel(base.module, data.layer, net)
    return dataclasses.replace(
        base,
        module=module.eval(),
        weights=f"{base.weights}; concepts of {shown_name(run)}",
        crop=Crop(data.size, data.size) if data.size else base.crop,
        labels=base.labels if names is None else tuple(names),
        digest=digest(module),
        training={},
    )


def check_takes_images(
    run: Path, net: DeconvNet, files: list[Path], *, or_arrays: bool = False
) -> None:
    """Raise ValueError if a network explains activations, or other arrays, and a file is an image.

    run: its run folder, or network file. or_arrays: the command also takes files of arrays.
    """
    if not net.preprocessing.are_arrays or all(map(is_array_file, files)):
        return
    data, name = training_data(run), shown_name(str(run))
    arrays = f"arrays of {net.preprocessing.settings.channels} channels"
    given = f"; {arrays} are given as a .npy or .npz file" if or_arrays else ""
    if data is not None and data.model is not None:
        explained = f"activations of layer {data.layer} of {shown_name(data.model)}"
        other = f": {sibling('visualize')} {setting('run', run)} shows its concepts in images"
    else:
        explained = arrays
        other = "" if run.is_dir() else "; if they are activations, give the run folder"
    raise ValueError(f"run={name}: explains {explained}, not images{other}{given}")


def check_trusted(run: Path, data: TrainingData, trust_code: bool) -> None:
    """Raise ValueError if the model of a run is built by code that the user does not trust.

    A run folder may come from a stranger, and name any function of the packages that are there.
    """
    is_known = data.model.startswith(KNOWN_SOURCES) or Path(data.model).is_file()
    if not is_known and not trust_code:
        raise ValueError(
            f"run={shown_name(run)}: explains activations of {shown_name(data.model)}, whose code "
            "would run; trust_code=true if you trust this code and this run"
        )
