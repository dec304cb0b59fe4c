"""The settings of a run, and the way from Hydra's configuration to them.

The dataclasses of the settings stand beside the code that they steer; here they are put together.
After `read` the rest of the package sees dataclasses only. With scripts/ and arguments.py this is
the only place that knows Hydra.
"""

from __future__ import annotations

import difflib
import errno
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deconvnet.applications.classification.classifier import ClassData
from deconvnet.applications.classification.pipeline import ClassifySettings
from deconvnet.applications.restoration import STRENGTH
from deconvnet.cli import arguments
from deconvnet.images.datasets import DataSettings
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.monitoring.monitor import not_in_bar
from deconvnet.network.network import LARGEST, LayerSettings
from deconvnet.network.tiling import MEMORY, check_memory
from deconvnet.storage import ownership
from deconvnet.visualization.settings import VisualizationSettings

# Settings of scripts/visualize.py that a network learned here leaves nothing to.
OF_MODELS = {
    *("weights", "options", "mean", "std", "order", "checkpoints"),
    *("method", "strict", "gates", "overlap"),
}
# Settings that are paths; those of images and of data are read by who opens them.
PATHS = {
    *("run", "output", "model", "weights", "resume", "init", "missing", "beside", "checkpoints"),
}
# Settings by which a command takes less memory, and what libraries say when there is none left.
LARGE = ("chunk", "batch", "memory", "data.size", "data.max_images", "max_images", "count")
NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "bad allocation")
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
    init: str | None = None
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
class VisualizeConfig(VisualizationSettings):
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
    images: Any = field(default=None, metadata=arguments.TEXTS)
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
        if self.size is not None and self.size > LARGEST:
            raise ValueError(f"size={self.size}: must be at most {LARGEST} pixels")


@dataclass
class RestoreConfig:
    """What scripts/denoise.py and scripts/inpaint.py have in common; their configs say more."""

    run: str
    image: Any = field(metadata=arguments.TEXTS)
    layer: int | None = None
    strength: float = STRENGTH
    clean: Any = field(default=None, metadata=arguments.TEXTS)
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
class ReconstructConfig:
    """All that scripts/reconstruct.py needs to know; configs/reconstruct.yaml says more."""

    run: str
    images: Any = field(metadata=arguments.TEXTS)
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
    """All that scripts/ablate.py needs to know; configs/ablate.yaml says more."""

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
    """All that scripts/classify.py needs to know; configs/classify.yaml says what it means."""

    run: str = MISSING
    data: ClassData = MISSING
    beside: list[str] = field(default_factory=list)
    output: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)


def register() -> None:
    """Make the types of the settings known to Hydra, so that wrong keys and values are refused."""
    OmegaConf.register_new_resolver("inside", _inside, replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(name="visualize_schema", node=VisualizeConfig)
    store.store(name="denoise_schema", node=DenoiseConfig)
    store.store(name="inpaint_schema", node=InpaintConfig)
    store.store(name="reconstruct_schema", node=ReconstructConfig)
    store.store(name="ablate_schema", node=AblateConfig)
    store.store(name="classify_schema", node=ClassifyConfig)


def _inside(name: object) -> str:
    """The name of a run as a path below the folder of runs: no way out of it."""
    parts = str(name).replace("\\", "/").split("/")
    no_name = {".", "..", "~", ownership.OWN}
    if not str(name).isprintable() or not parts[0] or no_name & set(parts):
        raise ValueError(f"name={str(name)!r}: must be the name of a folder inside runs")
    return str(name)


def read_visualize(cfg: DictConfig) -> VisualizeConfig:
    """The checked settings of scripts/visualize.py."""
    check_keys(cfg)
    return _at_home(OmegaConf.to_object(cfg))


def read_command(
    cfg: DictConfig,
) -> DenoiseConfig | InpaintConfig | ReconstructConfig | AblateConfig | ClassifyConfig:
    """The checked settings of a script that works with a trained network."""
    check_keys(cfg)
    check_complete(cfg)
    return _at_home(OmegaConf.to_object(cfg))


def read(cfg: DictConfig) -> Config:
    """The checked settings; ValueError names the key, the value and what would be right."""
    check_keys(cfg)
    check_complete(cfg)
    for name, layer in cfg.model.items():
        try:
            OmegaConf.to_object(layer)
        except ValueError as error:
            raise ValueError(f"model.{name}.{error}") from None
    config = _at_home(OmegaConf.to_object(cfg))
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
    check_seed(config.seed)
    config.resume = {"true": "auto"}.get(config.resume.lower(), config.resume)
    if config.resume.lower() in ("auto", "false"):
        config.resume = config.resume.lower()
    return config


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


@contextmanager
def logged(cfg: DictConfig, folder: Path) -> Iterator[None]:
    """Within it what is logged goes to <folder>/<script>.log as well; the configuration is in
    <folder>/.hydra.

    Hydra would do both by itself, whatever stands in the folder. NotOurs where that is a
    stranger's.
    """
    job = HydraConfig.get()
    configurations = {"config": cfg, "hydra": OmegaConf.create({"hydra": job})}
    for name, node in configurations.items():
        ownership.write(folder / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(node).encode())
    overrides = OmegaConf.to_yaml(job.overrides.task).encode()
    ownership.write(folder / ".hydra" / "overrides.yaml", overrides)
    path = folder / f"{job.job.name}.log"
    ownership.append(path, "")
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    root = logging.getLogger()
    printing = list(root.handlers)
    root.addHandler(handler)
    for other in printing:
        other.addFilter(not_in_bar)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for other in printing:
            other.removeFilter(not_in_bar)
        handler.close()


class _LogFile(logging.FileHandler):
    """A log that a full disk cuts short, and stops nothing."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class SweepFolder(Callback):
    """Refuses a folder of several runs in which Hydra would write over somebody's file."""

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        path = Path(config.hydra.sweep.dir) / "multirun.yaml"
        if os.path.lexists(path) and not _is_sweep(path, config.hydra.job.config_name):
            # Hydra turns other errors of a callback into warnings.
            raise SystemExit(
                f"error: {path}: is there already and is no list of runs of this command; move it "
                "away, or choose another hydra.sweep.dir=..."
            )


def _is_sweep(path: Path, name: str) -> bool:
    """Whether a file is what Hydra writes into a folder of several runs of one command."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        return OmegaConf.select(OmegaConf.load(path), "hydra.job.config_name") == name
    except Exception:  # whatever is wrong with it, it is another file
        return False


def launch(main: Callable[[], None], schema: type) -> None:
    """Run a Hydra main so that a user's mistake ends in one line and exit code 1.

    schema: the dataclass of its settings. Ctrl-C ends it with 130, and a reader that has seen
    enough, as in `| head`, with 141, as the shell does. HYDRA_FULL_ERROR=1 in the environment shows
    tracebacks.
    """
    # Hydra then raises instead of printing a traceback of its own.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    logging.raiseExceptions = WANTS_TRACEBACK
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # Names of files may have characters that the terminal lacks.
        stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        # The scripts are silent while they load their libraries; from here on there is more to do.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        arguments.make_ready(schema)
        if int(os.environ.get("RANK", 0)) > 0:
            # Of several processes under torchrun the first writes and speaks; the others warn.
            sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=stdout"]
            sys.argv += ["hydra.verbose=false"]
            logging.disable(logging.INFO)
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        _finish("stopped", 130)
    except BrokenPipeError:
        # Python writes what is left at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:
        if WANTS_TRACEBACK or not (message := _explain(error, schema)):
            raise
        _finish(message, 1)


def _finish(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)


def _explain(error: Exception, schema: type) -> str | None:
    """What a user can do about an error, in one line; None if it is a fault of this package."""
    if _is_memory(error):
        keys = [key for key in LARGE if arguments.has(schema, key)]
        lower = f"lower {' or '.join(f'{key}=' for key in keys)}" if keys else "use smaller images"
        said = _one_line(error)[:200]
        return f"error: out of memory: {lower}" + (f" ({said})" if said else "")
    if isinstance(error, HydraException | OmegaConfBaseException | OSError | ValueError):
        return f"configuration error: {arguments.explain(error, schema) or _one_line(error)}"
    inside = ("hydra", "omegaconf", "yaml", "antlr4")
    if isinstance(error, RecursionError) and _raised_in(error, inside):
        return "configuration error: nested too deeply, or with a reference to itself"
    # Where Hydra did not think of an argument, such as hydra.launcher._target_=x.
    unforeseen = (TypeError, AttributeError, AssertionError, RuntimeError, ImportError)
    if isinstance(error, unforeseen) and _raised_in(error, inside):
        what = f"({_one_line(error)})"
        return f"configuration error: Hydra cannot make sense of the arguments {what}"
    return None


def _is_memory(error: Exception) -> bool:
    """Whether there was not enough memory, on whatever device."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(said in message for said in NO_MEMORY)


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
        # What `launch` has better words for.
        if WANTS_TRACEBACK or isinstance(error, BrokenPipeError) or _is_memory(error):
            raise
        raise SystemExit(f"error: {' '.join(str(error).splitlines())}") from None


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
