"""The network whose activations a run explains, with the concepts that the run has learned."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from deconvnet.activations.settings import TrainingData, load_data_model
from deconvnet.cli.class_names import read_class_names
from deconvnet.images.decoding import shown_name
from deconvnet.images.fit import Crop
from deconvnet.network.network import DeconvNet
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
