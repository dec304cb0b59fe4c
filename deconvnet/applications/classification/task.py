"""What features are computed from: a network, labelled images and their splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deconvnet.applications.classification.labelled_images import LabelledImages
from deconvnet.applications.classification.settings import ClassifySettings
from deconvnet.applications.classification.splits import Split
from deconvnet.network.network import DeconvNet
from deconvnet.support.communicator import SINGLE, Communicator


@dataclass(frozen=True)
class Task:
    """The layers of a network whose features are to tell the classes of images apart.

    folder: contains the folders of caches. communicator: processes that share the work, on one
    machine or with a common file system; all must make the same calls.
    """

    net: DeconvNet
    images: LabelledImages
    splits: list[Split]
    layers: list[int]
    settings: ClassifySettings
    folder: Path
    communicator: Communicator = SINGLE
