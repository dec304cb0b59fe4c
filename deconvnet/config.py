"""The settings of a run, and the way from Hydra's configuration to them.

The dataclasses of the settings stand beside the code that they steer; here they are put together.
After `read` the rest of the package sees dataclasses only. With scripts/ this is the only place
that knows Hydra.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deconvnet.applications.classification import ClassData
from deconvnet.applications.labelled import ClassifySettings
from deconvnet.applications.restoration import STRENGTH
from deconvnet.data import DataSettings
from deconvnet.network import LayerSettings
from deconvnet.preprocessing import PreprocessingSettings
from deconvnet.survey import SurveySettings
from deconvnet.tiling import MEMORY, check_memory

# Settings of scripts/visualize.py that a network learned here leaves nothing to.
OF_MODELS = {
    *("weights", "options", "mean", "std", "order", "checkpoints"),
    *("method", "strict", "gates", "overlap"),
}
# What denoise and inpaint do not decide by themselves.
COMMON = ("output", "layer", "strength", "clean", "memory")
# Read before `launch` sets it for its own purpose.
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


@dataclass
class Config:
    """Everything that scripts/train.py needs to know; configs/train.yaml says what it means."""

    name: str
    model: dict[str, LayerSettings]
    data: DataSettings = field(default_factory=DataSettings)
    preprocessing: PreprocessingSettings = field(default_factory=PreprocessingSettings)
    layers: int | None = None
    seed: int = 0
    device: str = "auto"
    resume: str = "auto"
    chunk: int = 8
    progress: bool = True
    patience: float = 600.0
    memory: float = 4.0
    disk: float = 0.0

    def layer_settings(self) -> list[LayerSettings]:
        """The layers to train, from the bottom."""
        depth = len(self.model) if self.layers is None else self.layers
        return [self.model[f"layer{number}"] for number in range(1, depth + 1)]


@dataclass
class VisualizeConfig(SurveySettings):
    """Everything that scripts/visualize.py needs to know: what to look at, beside how."""

    # a run folder of scripts/train.py, or a network file; or else `model`
    run: str | None = None
    # torchvision/NAME | timm/NAME | package.module:factory | a network file of scripts/train_cnn.py
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
    images: Any = None
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


@dataclass
class RestoreConfig:
    """What scripts/denoise.py and scripts/inpaint.py have in common; their configs say more."""

    run: str
    image: Any
    layer: int | None = None
    strength: float = STRENGTH
    clean: Any = None
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
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative")

    def common(self) -> dict[str, Any]:
        """What does not depend on what is to be restored."""
        return {key: getattr(self, key) for key in COMMON}


@dataclass
class DenoiseConfig(RestoreConfig):
    """Everything that scripts/denoise.py needs to know; configs/denoise.yaml says what it means."""

    sigma: float | None = None
    noise: float | None = None
    clip: bool = False


@dataclass
class InpaintConfig(RestoreConfig):
    """Everything that scripts/inpaint.py needs to know; configs/inpaint.yaml says what it means."""

    missing: str = MISSING
    sigma: float = 2.5


@dataclass
class ClassifyConfig(ClassifySettings):
    """All that scripts/classify.py needs to know; configs/classify.yaml says what it means."""

    run: str = MISSING
    data: ClassData = MISSING
    beside: list[str] = field(default_factory=list)
    output: str | None = None
    device: str = "auto"


def register() -> None:
    """Make the types of the settings known to Hydra, so that wrong keys and values are refused."""
    OmegaConf.register_new_resolver("inside", _inside, replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(name="visualize_schema", node=VisualizeConfig)
    store.store(name="denoise_schema", node=DenoiseConfig)
    store.store(name="inpaint_schema", node=InpaintConfig)
    store.store(name="classify_schema", node=ClassifyConfig)


def _inside(name: object) -> str:
    """The name of a run as a path below the folder of runs: no way out of it."""
    parts = str(name).replace("\\", "/").split("/")
    if not str(name).isprintable() or not parts[0] or {"..", "~"} & set(parts):
        raise ValueError(f"name={str(name)!r}: must be the name of a folder inside runs")
    return str(name)


def read_visualize(cfg: DictConfig) -> VisualizeConfig:
    """The checked settings of scripts/visualize.py."""
    check_keys(cfg)
    return OmegaConf.to_object(cfg)


def read_command(cfg: DictConfig) -> DenoiseConfig | InpaintConfig | ClassifyConfig:
    """The checked settings of scripts/denoise.py, scripts/inpaint.py or scripts/classify.py."""
    check_keys(cfg)
    check_complete(cfg)
    return OmegaConf.to_object(cfg)


def read(cfg: DictConfig) -> Config:
    """The checked settings; ValueError names the key, the value and what would be right."""
    check_keys(cfg)
    check_complete(cfg)
    for name, layer in cfg.model.items():
        try:
            OmegaConf.to_object(layer)
        except ValueError as error:
            raise ValueError(f"model.{name}.{error}") from None
    config = OmegaConf.to_object(cfg)
    expected = [f"layer{number}" for number in range(1, len(config.model) + 1)]
    if not expected or sorted(config.model) != sorted(expected):
        raise ValueError(
            f"model has the layers {', '.join(config.model) or '(none)'}: name them layer1, "
            "layer2, ... without a gap"
        )
    if config.layers is not None and not 1 <= config.layers <= len(expected):
        raise ValueError(
            f"layers={config.layers}: this model defines {len(expected)} layers; choose 1 to "
            f"{len(expected)}"
        )
    if not 1 <= config.patience < math.inf:
        raise ValueError(f"patience={config.patience}: is in seconds, at least 1")
    for key in ("memory", "disk"):
        value = getattr(config, key)
        if math.isnan(value) or value < 0:
            raise ValueError(f"{key}={value}: is in GiB, at least 0")
    if config.chunk < 1:
        raise ValueError(f"chunk={config.chunk}: must be at least 1")
    if config.seed < 0:
        raise ValueError(f"seed={config.seed}: must not be negative")
    config.resume = {"true": "auto"}.get(config.resume.lower(), config.resume)
    if config.resume.lower() in ("auto", "false"):
        config.resume = config.resume.lower()
    return config


def check_complete(cfg: DictConfig) -> None:
    """Refuse a configuration that leaves a value to the user, who has not given it."""
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{key} has no value: give one with {key}=...")


def device(name: str) -> torch.device:
    """The torch device of a name; "auto" is cuda, else cpu."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name}: no such device; try auto, cpu or cuda") from None
    if found.type == "mps":
        raise ValueError(f"device={name}: the sums need float64, which mps lacks; use device=cpu")
    here = {"cpu": True, "cuda": cuda}.get(found.type, False)
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if not here or (found.index or 0) >= count:
        raise ValueError(f"device={name}: this machine has none; use device=auto or device=cpu")
    return found


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


def launch(main: Callable[[], None]) -> None:
    """Run a Hydra main so that a user's mistake ends in one line and exit code 1.

    HYDRA_FULL_ERROR=1 in the environment shows the traceback.
    """
    # Hydra then raises instead of printing a traceback of its own.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if int(os.environ.get("RANK", 0)) > 0:
        # Of several processes under torchrun the first writes and speaks; the others warn.
        sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=stdout", "hydra.verbose=false"]
        logging.disable(logging.INFO)
    try:
        main()
    except (HydraException, OmegaConfBaseException, OSError) as error:
        if WANTS_TRACEBACK:
            raise
        sys.exit(f"configuration error: {_one_line(error)}")
    except (TypeError, AttributeError, AssertionError) as error:
        # Hydra's own, where it did not think of an argument such as data=[1].
        if WANTS_TRACEBACK or not _raised_in(error, ("hydra", "omegaconf")):
            raise
        sys.exit(f"configuration error: Hydra cannot make sense of the arguments ({error})")


def _raised_in(error: BaseException, packages: tuple[str, ...]) -> bool:
    """Whether an error comes from code of one of these packages."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] in packages


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the program with one line and exit code 1 where an error of these kinds is raised."""
    try:
        yield
    except kinds as error:
        if WANTS_TRACEBACK:
            raise
        raise SystemExit(f"error: {error}") from None


@contextmanager
def interruptible(said: str = "what was finished is there") -> Iterator[None]:
    """End the program with one line and exit code 130 where Ctrl-C stops it."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; {said}", file=sys.stderr)
        raise SystemExit(130) from None


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


def _one_line(error: BaseException | None) -> str:
    """The message of an error and of its causes: Hydra often says only there what is wrong."""
    messages = []
    while error is not None:
        lines = [line.strip() for line in str(error).splitlines()]
        kept = (line for line in lines if line and not line.startswith(("object_", "reference_")))
        message = " ".join(kept)
        if message not in "; ".join(messages):
            messages.append(message)
        error = error.__cause__
    return "; ".join(messages)
