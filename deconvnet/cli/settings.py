"""The settings of a run, and the way from Hydra's configuration to them.

The dataclasses of the settings stand beside the code that they steer; here they are put together.
After `read` the rest of the package sees dataclasses only. Only this folder knows Hydra.
"""

from __future__ import annotations

import difflib
import math
import os
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from deconvnet.applications.classification.settings import ClassData, ClassifySettings
from deconvnet.applications.restoration import STRENGTH
from deconvnet.cli.keys import TEXTS
from deconvnet.images.datasets import DataSettings
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.network.layer import MAX_SIZE, LayerSettings
from deconvnet.network.tiling import MEMORY, check_memory
from deconvnet.storage import ownership
from deconvnet.visualization.settings import VisualizationSettings

# Settings of `deconvnet visualize` that a network learned here leaves nothing to.
OF_MODELS = {
    *("weights", "options", "mean", "std", "order", "checkpoints"),
    *("method", "strict", "gates", "overlap"),
}
# Settings that are paths; those of images and of data are read by who opens them.
PATHS = {
    *("run", "output", "model", "weights", "resume", "init", "missing", "beside", "checkpoints"),
}
# More maps, images of a batch or epochs can only be a mistake.
MOST = 100_000
# What denoise and inpaint do not decide by themselves.
COMMON = ("output", "layer", "strength", "clean", "memory")


@dataclass
class TrainConfig:
    """The settings of `deconvnet train`; configs/train.yaml says what they mean."""

    name: str
    model: dict[str, LayerSettings]
    data: DataSettings = field(default_factory=DataSettings)
    preprocessing: PreprocessingSettings = field(default_factory=PreprocessingSettings)
    layers: int | None = None
    seed: int = 0
    device: str = "auto"
    resume: str = "auto"
    init: str | None = None
    chunk: int = 8
    progress: bool = True
    patience: float = 600.0
    memory: float = 4.0
    disk: float = 0.0

    def __post_init__(self) -> None:
        expected = [f"layer{number}" for number in range(1, len(self.model) + 1)]
        if not expected or sorted(self.model) != sorted(expected):
            raise ValueError(
                f"model has the layers {', '.join(self.model) or '(none)'}: name them layer1, "
                "layer2, ... without a gap"
            )
        if self.layers is not None and not 1 <= self.layers <= len(expected):
            raise ValueError(
                f"layers={self.layers}: this model defines {len(expected)} layers; choose 1 to "
                f"{len(expected)}"
            )
        if not 1 <= self.patience < math.inf:
            raise ValueError(f"patience={self.patience}: is in seconds, at least 1")
        for key in ("memory", "disk"):
            value = getattr(self, key)
            if math.isnan(value) or value < 0:
                raise ValueError(f"{key}={value}: is in GiB, at least 0")
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}: must be at least 1")
        check_seed(self.seed)
        self.resume = {"true": "auto"}.get(self.resume.lower(), self.resume)
        if self.resume.lower() in ("auto", "false"):
            self.resume = self.resume.lower()

    def layer_settings(self) -> list[LayerSettings]:
        """The layers to train, from the bottom."""
        depth = len(self.model) if self.layers is None else self.layers
        return [self.model[f"layer{number}"] for number in range(1, depth + 1)]


@dataclass
class VisualizeConfig(VisualizationSettings):
    """Everything that `deconvnet visualize` needs to know: what to look at, beside how."""

    # a run folder of `deconvnet train`, or a network file; or else `model`
    run: str | None = None
    # torchvision/NAME | timm/NAME | package.module:factory | a network file of train-cnn
    model: str | None = None
    # of the model: default (pretrained) | the name of others | a file | none (random)
    weights: str = "default"
    # arguments of what builds the model, such as {num_classes: 10}; not a dict, to whose keys Hydra
    # lets nobody add without a plus
    options: Any = None
    # what the model takes for pixels: (pixel - mean) / std, planes rgb | bgr | grey; null: its own
    mean: list[float] | None = None
    std: list[float] | None = None
    order: str | None = None
    # a folder of images, a file, or a list of files; null: those that the run has learned from
    images: Any = field(default=None, metadata=TEXTS)
    # side of the squares that images are cropped to; null: as the network takes them
    size: int | None = None
    # so many images, evenly among all; null: all
    max_images: int | None = None
    # of a folder, leave out files that cannot be read; all are read once at the start to know
    skip_unreadable: bool = False
    # files of weights of the model in the course of its training, for pictures of its features
    checkpoints: list[str] | None = None
    # folder for everything; null: the run folder, or runs/<model>
    output: str | None = None
    # auto (cuda, else cpu), or a torch device
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        if (self.run is None) == (self.model is None):
            raise ValueError(
                "give either run=<a run folder or network file> or model=<a name such as "
                "torchvision/vgg16>"
            )
        for entry in fields(self) if self.run is not None else ():
            value = getattr(self, entry.name)
            if entry.name in OF_MODELS and value != entry.default:
                raise ValueError(f"{entry.name}={value}: only with model=..., not with run=...")
        if not isinstance(self.options, dict | None):
            raise ValueError(f"options={self.options}: give arguments as {{name: value}}")
        if self.images == []:
            raise ValueError("images=[]: give a folder, a file, or a list of at least one file")
        for key in ("size", "max_images"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1, or null")
        if self.size is not None and self.size > MAX_SIZE:
            raise ValueError(f"size={self.size}: must be at most {MAX_SIZE} pixels")


@dataclass
class RestoreConfig:
    """What `deconvnet denoise` and `deconvnet inpaint` have in common; their configs say more."""

    run: str
    image: Any = field(metadata=TEXTS)
    layer: int | None = None
    strength: float = STRENGTH
    clean: Any = field(default=None, metadata=TEXTS)
    memory: float = MEMORY
    seed: int = 0
    output: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.image == [] or self.clean == []:
            raise ValueError("image=[] or clean=[]: give a file, a folder, or a list of them")
        if not 0 < self.strength < math.inf:
            raise ValueError(f"strength={self.strength}: must be a positive number")
        check_memory(self.memory)
        for key in ("sigma", "noise"):
            value = getattr(self, key, None)
            if value is not None and not 0.5 <= value <= 255:
                raise ValueError(f"{key}={value}: is in grey levels of 0 to 255, from 0.5")
        check_seed(self.seed)

    def common(self) -> dict[str, Any]:
        """What does not depend on what is to be restored."""
        return {key: getattr(self, key) for key in COMMON}


@dataclass
class DenoiseConfig(RestoreConfig):
    """The settings of `deconvnet denoise`; configs/denoise.yaml says what they mean."""

    sigma: float | None = None
    noise: float | None = None
    clip: bool = False


@dataclass
class InpaintConfig(RestoreConfig):
    """The settings of `deconvnet inpaint`; configs/inpaint.yaml says what they mean."""

    missing: str = MISSING
    sigma: float = 2.5


@dataclass
class ReconstructConfig:
    """The settings of `deconvnet reconstruct`; configs/reconstruct.yaml says what they mean."""

    run: str
    images: Any = field(metadata=TEXTS)
    layer: int | None = None
    parts: bool = False
    memory: float = MEMORY
    output: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.images == []:
            raise ValueError("images=[]: give a file, a folder, or a list of them")
        check_memory(self.memory)


@dataclass
class AblateConfig:
    """The settings of `deconvnet ablate`; configs/ablate.yaml says what they mean."""

    run: str
    count: int = 6
    chunk: int = 8
    device: str = "auto"

    def __post_init__(self) -> None:
        for key in ("count", "chunk"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")


@dataclass
class ClassifyConfig(ClassifySettings):
    """The settings of `deconvnet classify`; configs/classify.yaml says what they mean."""

    run: str = MISSING
    data: ClassData = MISSING
    beside: list[str] = field(default_factory=list)
    output: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)


@dataclass
class TrainCnnConfig:
    """Everything that train-cnn needs to know; configs/train_cnn.yaml says what it means."""

    name: str
    color: str
    images: int | None
    held_out: float
    width: int
    dropout: float
    epochs: int
    checkpoints: list[int]
    batch: int
    learning_rate: float
    momentum: float
    weight_decay: float
    filter_rms: float | None
    mirror: bool
    shift: int
    seed: int
    device: str
    progress: bool
    data: DataSettings = field(default_factory=DataSettings)

    def __post_init__(self) -> None:
        if self.color not in ("grey", "rgb"):
            raise ValueError(f"color={self.color!r}: choose grey or rgb")
        if self.data.source not in ("torchvision", "folder"):
            raise ValueError(
                f"data.source={self.data.source}: has no classes to learn; choose torchvision or "
                "folder"
            )
        if self.data.size is None:
            raise ValueError("data.size=None: a number is needed")
        check_seed(self.seed)
        for key in ("width", "epochs", "batch"):
            if not 1 <= getattr(self, key) <= MOST:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1, at most {MOST}")
        for key in ("held_out", "dropout", "momentum"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 0 and below 1")
        if not 0 <= self.shift < self.data.size:
            raise ValueError(f"shift={self.shift}: must be at least 0 and below data.size")
        for key in ("images", "learning_rate", "filter_rms"):
            if getattr(self, key) is not None and not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"{key}={getattr(self, key)}: must be above 0, and finite")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay}: must be at least 0, and finite")


# What each command reads, by its name.
SCHEMAS = {
    "train": TrainConfig,
    "visualize": VisualizeConfig,
    "reconstruct": ReconstructConfig,
    "ablate": AblateConfig,
    "denoise": DenoiseConfig,
    "inpaint": InpaintConfig,
    "classify": ClassifyConfig,
    "train_cnn": TrainCnnConfig,
}


def register() -> None:
    """Make the types of the settings known to Hydra, so that wrong keys and values are refused."""
    OmegaConf.register_new_resolver("inside", _inside, replace=True)
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)


def _inside(name: object) -> str:
    """The name of a run as a path below the folder of runs: no way out of it."""
    parts = str(name).replace("\\", "/").split("/")
    no_name = {".", "..", "~", ownership.RECORD_FOLDER}
    if not str(name).isprintable() or not parts[0] or no_name & set(parts):
        raise ValueError(f"name={str(name)!r}: must be the name of a folder inside runs")
    return str(name)


def read_settings(cfg: DictConfig) -> Any:
    """The checked settings of a command, an object of its schema.

    ValueError names the key, the value and what would be right.
    """
    check_keys(cfg)
    check_complete(cfg)
    for key in cfg:
        if not OmegaConf.is_interpolation(cfg, key) and _has_layers(cfg._get_node(key)):
            _check_layers(cfg[key], key)
    return _at_home(OmegaConf.to_object(cfg))


def _has_layers(node: Any) -> bool:
    return OmegaConf.is_dict(node) and is_dataclass(node._metadata.element_type)


def _check_layers(layers: DictConfig, key: str) -> None:
    """Let an error in the settings of a layer name the layer."""
    for name, layer in layers.items():
        try:
            OmegaConf.to_object(layer)
        except ValueError as error:
            raise ValueError(f"{key}.{name}.{error}") from None


def _at_home(settings: Any) -> Any:
    """Settings in which ~ is the home folder: the shell leaves it as it is in key=~/file."""
    for key in PATHS & set(vars(settings)):
        value = getattr(settings, key)
        if isinstance(value, str):
            setattr(settings, key, os.path.expanduser(value))
        elif isinstance(value, list):
            setattr(settings, key, [os.path.expanduser(path) for path in value])
    return settings


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}: must not be negative, and below 2^63")


def check_complete(cfg: DictConfig) -> None:
    """Refuse a configuration that leaves a value to the user, who has not given it."""
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{key} has no value: give one with {key}=...")


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as one level of dotted names, lists and null as text."""
    result = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            result.update(flat(value, f"{name}."))
        else:
            result[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return result


def check_keys(node: DictConfig, prefix: str = "") -> None:
    """Refuse keys that are no settings: Hydra itself lets +key=value add anything anywhere."""
    kind = OmegaConf.get_type(node)
    known = [field.name for field in fields(kind)] if is_dataclass(kind) else list(node)
    for key in node:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"there are {', '.join(known)}"
            raise ValueError(f"{prefix}{key}: no such setting; {hint}")
        if not OmegaConf.is_interpolation(node, key) and OmegaConf.is_dict(node._get_node(key)):
            check_keys(node[key], f"{prefix}{key}.")
