"""The settings of each command.

The default and the meaning of a setting are defined once, in a dataclass, from which --help shows
both. Settings dataclasses are defined next to the code that they configure; this module has those
of the commands. Files in configs/ contain published settings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from deconvnet.activations.settings import TrainingData
from deconvnet.applications.classification.settings import ClassData, ClassifySettings
from deconvnet.applications.restoration.restorer import STRENGTH
from deconvnet.cli.setting_keys import TEXTS
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.images.sources import DataSettings
from deconvnet.network.layer import MAX_SIZE, LayerSettings
from deconvnet.network.tiling import MEMORY, check_memory
from deconvnet.support.renaming import renamed
from deconvnet.visualization.projection.backward_rules import AUTO, METHODS
from deconvnet.visualization.settings import OLD_NAMES, VisualizationSettings

# Settings of `deconvnet visualize` that a run has of its own.
OF_MODELS = {"weights", "options", "mean", "std", "order", "checkpoints"}
# Settings that apply to CNNs, whether they are given as model=... or a run explains their
# activations.
OF_CNNS = {"labels", "method", "strict", "gates", "overlap", "trust_code"}
# More maps, images per batch or epochs can only be a mistake.
MOST = 100_000
# Settings that denoise and inpaint pass to the common code.
COMMON = ("output", "layer", "strength", "clean", "memory")


@dataclass
class TrainConfig:
    """The settings of `deconvnet train`."""

    # the run folder is runs/<name>
    name: str
    # the layers: a choice above, or your own file
    model: dict[str, LayerSettings]
    # the images: a choice above
    data: TrainingData = field(default_factory=TrainingData)
    # preprocessing of the images before layer 1: a choice above
    preprocessing: PreprocessingSettings = field(default_factory=PreprocessingSettings)
    # number of layers of the model to train, from the first; null: all. +layers=2 means the same
    layers: int | None = None
    # seed of all random choices
    seed: int = 0
    # auto (cuda, else cpu), or a torch device such as cpu, cuda, cuda:1
    device: str = "auto"
    # auto: resume the run in this folder, if there is one; false: archive it in previous-N and
    # start again; or a checkpoint or run folder to resume from, of which only the filters are used
    # if it was trained on other images or for other numbers of epochs
    resume: str = "auto"
    # a run folder, checkpoint or network file from whose filters a new run starts; null: filters
    # start as model.layerN.learning.init says
    init: str | None = None
    # images inferred at a time: bounds memory, changes results by rounding only
    chunk: int = 8
    # show progress bars
    progress: bool = True
    # torchrun: seconds that a process waits for another before it gives up
    patience: float = 600.0
    # GiB of memory for the states from which inference resumes when an image is visited again
    memory: float = 4.0
    # GiB on disk, in the run folder, for these states (three times their size) if they do not fit
    # into memory=; if they do not fit here either, inference starts from zero in every epoch
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
                f"{len(expected)}, or define a deeper model (--help all shows how)"
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
class SuggestConfig:
    """The settings of `deconvnet suggest`."""

    # the images: a choice above
    data: DataSettings
    # preprocessing of the images: a choice above
    preprocessing: PreprocessingSettings = field(default_factory=PreprocessingSettings)
    # numbers of maps to compare
    maps: list[int] = field(default_factory=lambda: [8, 16, 32, 64])
    # side of the square filters in pixels
    filter_size: int = 7
    # weight of the reconstruction relative to the sparsity, while filters are learned
    lam: float = 2.0
    # passes over the images for each number of maps
    epochs: int = 6
    # seed of all random choices
    seed: int = 0
    # show progress bars
    progress: bool = True
    # auto (cuda, else cpu), or a torch device
    device: str = "auto"

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not self.maps or not all(1 <= number <= MOST for number in self.maps):
            raise ValueError(f"maps={self.maps}: give a list of numbers of maps, such as [8,16,32]")
        if not 1 <= self.filter_size <= MAX_SIZE:
            raise ValueError(f"filter_size={self.filter_size}: must be 1 to {MAX_SIZE}")
        if not 0 < self.lam < math.inf:
            raise ValueError(f"lam={self.lam}: must be above 0, and finite")
        if not 1 <= self.epochs <= MOST:
            raise ValueError(f"epochs={self.epochs}: must be at least 1, at most {MOST}")


@dataclass
class NetworkConfig:
    """The settings of the commands that look into a network: which one it is, and its input."""

    # a run folder of `deconvnet train`, or a network file (.safetensors); or else give `model`
    run: str | None = None
    # torchvision/NAME, timm/NAME, package.module:factory (which runs the code of that package, as
    # python does: only for code that you trust), or a network file of `deconvnet train-cnn`
    model: str | None = None
    # weights of the model: default (pretrained), the name of other ones, a file, or none (random)
    weights: str = "default"
    # arguments of the function that builds the model, such as 'options={num_classes: 10}'
    options: Any = None
    # the model is given (pixel - mean) / std, with pixels in [0, 1]; null: those of its weights
    mean: list[float] | None = None
    std: list[float] | None = None
    # colour planes that the model expects: rgb, bgr or grey; null: those it was trained with
    order: str | None = None
    # names of the classes of the model: a file with one name a line or a JSON list, or a list such
    # as [cat,dog]; null: those of its weights
    labels: Any = field(default=None, metadata=TEXTS)
    # side in pixels of the squares that images are cropped to; null: what the network expects
    size: int | None = None
    # run: if it explains activations of package.module:factory, call this code, as training did
    trust_code: bool = False

    def __post_init__(self) -> None:
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
        _check_positive_or_null(self, "size")
        if self.size is not None and self.size > MAX_SIZE:
            raise ValueError(f"size={self.size}: must be at most {MAX_SIZE} pixels")


@renamed(**OLD_NAMES)
@dataclass
class VisualizeConfig(VisualizationSettings, NetworkConfig):
    """The settings of `deconvnet visualize`: the network and images, and how to visualize them."""

    # a folder of images, a file, a text file (.txt) of one path per line, or a list of these; null:
    # the images that the run was trained on
    images: Any = field(default=None, metadata=TEXTS)
    # use at most this many images, evenly spaced among all; null: all
    max_images: int | None = None
    # skip files of a folder that cannot be read instead of stopping
    skip_unreadable: bool = False
    # weights of the model at several times of its training, to draw how its features evolve
    checkpoints: list[str] | None = None
    # folder for all results; null: the run folder, or runs/<model>
    output: str | None = None
    # auto (cuda, else cpu), or a torch device
    device: str = "auto"

    def __post_init__(self) -> None:
        VisualizationSettings.__post_init__(self)
        NetworkConfig.__post_init__(self)
        _check_images(self)


@dataclass
class OcclusionConfig(NetworkConfig):
    """The settings of `deconvnet occlusion`."""

    # a folder of images, a file, a text file (.txt) of one path per line, or a list of these; null:
    # the images that the run was trained on
    images: Any = field(default=None, metadata=TEXTS)
    # use at most this many images, evenly spaced among all; null: all
    max_images: int | None = 4
    # skip files of a folder that cannot be read instead of stopping
    skip_unreadable: bool = False
    # dotted name of the layer; null: the highest that has maps; [?] lists them
    layer: str | None = None
    # number of the map; null: the one that responds most strongly to the image
    map: int | None = None
    # the correct class, by its number or name; null: the most likely one
    label: str | None = None
    # side of the grey square in pixels; null: a quarter of the shorter side of the image
    square: int | None = None
    # pixels by which the square moves; null: a quarter of its side
    stride: int | None = None
    # how to project the strongest activation of a trained network: auto (deconv for layers above
    # max pooling, else guided) | deconv | guided | gradient
    method: str = "auto"
    # images that go through the network at a time, which bounds memory
    batch: int = 8
    # seed of weights that are random
    seed: int = 0
    # folder for the results; null: occlusion in the run folder, or in runs/<model>
    output: str | None = None
    # auto (cuda, else cpu), or a torch device
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_images(self)
        _check_positive_or_null(self, "square", "stride")
        if self.map is not None and self.map < 0:
            raise ValueError(f"map={self.map}: maps are numbered from 0")
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: must be at least 1")
        if self.method not in (AUTO, *METHODS):
            raise ValueError(f"method={self.method}: choose one of {', '.join((AUTO, *METHODS))}")


@dataclass
class CorrespondenceConfig(NetworkConfig):
    """The settings of `deconvnet correspondence`."""

    # a CSV file with the columns image, part, top, left, bottom, right: where each part is in each
    # image, in pixels, bottom and right exclusive; images are files relative to its folder
    boxes: str = MISSING
    # dotted names of layers; null: the lowest and the highest that have maps; [?] lists all
    layers: list[str] | None = None
    # boxes of the same sizes at random places that are covered for comparison; 0: none
    draws: int = 10
    # the part of the file that random boxes must stay inside, such as the face or the whole object,
    # and that is not covered itself; null: the image
    within: str | None = None
    # images that go through the network at a time, which bounds memory
    batch: int = 8
    # seed of the random boxes, and of weights that are random
    seed: int = 0
    # folder for the results; null: correspondence in the run folder, or in runs/<model>
    output: str | None = None
    # auto (cuda, else cpu), or a torch device
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("draws", 0), ("batch", 1)):
            if not least <= getattr(self, key) <= MOST:
                raise ValueError(f"{key}={getattr(self, key)}: must be {least} to {MOST}")
        if self.layers == []:
            raise ValueError("layers=[]: name at least one")


@dataclass
class FaithfulnessConfig:
    """The settings of `deconvnet faithfulness`."""

    # a run folder of `deconvnet train data=activations ...`
    run: str = MISSING
    # a folder of images, a file, a text file (.txt) of one path per line, or a list of these; null:
    # the images that the run was trained on
    images: Any = field(default=None, metadata=TEXTS)
    # use at most this many images, evenly spaced among all; null: all
    max_images: int | None = 500
    # names of the classes of the network: a file with one name a line or a JSON list, or a list;
    # null: those of its weights. If all images lie in folders with such names, the accuracy is
    # measured
    labels: Any = field(default=None, metadata=TEXTS)
    # also code the activations with these lam, such as [10,30,100], under the same concepts, to see
    # how large it must be for the network to stay the same
    lam: list[float] = field(default_factory=list)
    # side in pixels of the squares that images are cropped to; null: as in training
    size: int | None = None
    # skip files of a folder that cannot be read instead of stopping
    skip_unreadable: bool = False
    # images that go through the network at a time, which bounds memory
    batch: int = 8
    # if the run explains activations of package.module:factory, call this code, as training did
    trust_code: bool = False
    # show a progress bar
    progress: bool = True
    # auto (cuda, else cpu), or a torch device
    device: str = "auto"

    # Other commands take networks that no run has learned.
    model = None

    def __post_init__(self) -> None:
        _check_images(self)
        _check_positive_or_null(self, "size")
        if wrong := [lam for lam in self.lam if not 0 < lam < math.inf]:
            raise ValueError(f"lam={wrong[0]}: must be a positive number")
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: must be at least 1")


@dataclass
class StabilityConfig:
    """The settings of `deconvnet stability`."""

    # a run folder
    run: str = MISSING
    # how many other seeds to learn from
    seeds: int = 1
    # also learn from every second of the images, and from the others
    halves: bool = True
    # if the run explains activations of package.module:factory, call this code, as training did
    trust_code: bool = False
    # auto (cuda, else cpu), or a torch device
    device: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.seeds <= 100:
            raise ValueError(f"seeds={self.seeds}: must be 0 to 100")
        if self.seeds == 0 and not self.halves:
            raise ValueError("seeds=0, halves=false: nothing to compare with; give at least one")


@dataclass
class RestoreConfig:
    """The settings that `deconvnet denoise` and `deconvnet inpaint` have in common."""

    # a run folder, or a network file (.safetensors)
    run: str
    # images: a file, a folder, a text file (.txt) of paths, or a list such as [a.jpg,b.jpg]
    images: Any = field(metadata=TEXTS)
    # use the maps of layers up to this one; null: all layers of the network
    layer: int | None = None
    # the threshold in standard deviations of the noise; larger is smoother
    strength: float = STRENGTH
    # clean images to fit the thresholds to: a file, a folder or a list; null: the images that the
    # run was trained on
    clean: Any = field(default=None, metadata=TEXTS)
    # GiB of memory beyond that of the program itself; images that need more are processed in tiles,
    # or refused
    memory: float = MEMORY
    # seed of the noise that is added, or of the pixels that are hidden, for a test
    seed: int = 0
    # folder for the pictures; null: <run>/denoised, or <run>/inpainted
    output: str | None = None
    # auto (cuda, else cpu), or a torch device
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.images == [] or self.clean == []:
            raise ValueError("images=[] or clean=[]: give a file, a folder, or a list of them")
        if not 0 < self.strength < math.inf:
            raise ValueError(f"strength={self.strength}: must be a positive number")
        check_memory(self.memory)
        for key in ("sigma", "noise"):
            value = getattr(self, key, None)
            if value is not None and not 0.5 <= value <= 255:
                raise ValueError(f"{key}={value}: is in grey levels of 0 to 255, from 0.5")
        check_seed(self.seed)

    def common(self) -> dict[str, Any]:
        """The settings that do not depend on the task."""
        return {key: getattr(self, key) for key in COMMON}


@dataclass
class DenoiseConfig(RestoreConfig):
    """The settings of `deconvnet denoise`."""

    # standard deviation of the noise, in grey levels from 0 to 255; null: estimated from each image
    sigma: float | None = None
    # to test: first add noise of this standard deviation, in grey levels, and report how close the
    # result comes to the clean image; null: the images are noisy already
    noise: float | None = None
    # clip the noisy pixels to 0 to 255, as a camera does
    clip: bool = False


@dataclass
class InpaintConfig(RestoreConfig):
    """The settings of `deconvnet inpaint`."""

    # which pixels are missing: an image file of the same size, black where pixels are missing. Or,
    # to hide pixels of complete images and report how close the result comes: a fraction of all
    # pixels such as 0.5, box (in the middle, a quarter of each side), or half (the right one)
    missing: str = MISSING
    # standard deviation of the noise in the observed pixels, in grey levels from 0 to 255
    sigma: float = 2.5


@dataclass
class ReconstructConfig:
    """The settings of `deconvnet reconstruct`."""

    # a run folder, or a network file (.safetensors)
    run: str
    # images: a file, a folder, a text file (.txt) of paths, or a list such as [a.jpg,b.jpg]
    images: Any = field(metadata=TEXTS)
    # reconstruct from the maps of this layer; null: the highest
    layer: int | None = None
    # also draw what each image is made of: the activations of the layer that explain most of it,
    # and those of the layers below that support each of these
    parts: bool = False
    # with parts: first reduce larger images to the scale of those that the run was trained on
    rescale: bool = True
    # GiB of memory beyond that of the program itself; images that need more are processed in tiles,
    # or refused
    memory: float = MEMORY
    # folder for the pictures; null: <run>/reconstructions
    output: str | None = None
    # auto (cuda, else cpu), or a torch device
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.images == []:
            raise ValueError("images=[]: give a file, a folder, or a list of them")
        check_memory(self.memory)


@dataclass
class InfoConfig:
    """The settings of `deconvnet info`."""

    # a run folder, a checkpoint (.pt), or a file (.safetensors) of a network, of filters or of
    # events
    run: str


@dataclass
class DoctorConfig:
    """The settings of `deconvnet doctor`."""

    # auto (cuda, else cpu), or a torch device
    device: str = "auto"


@dataclass
class ExportConfig:
    """The settings of `deconvnet export`."""

    # a run folder, or a file (.safetensors) of a network or of filters
    run: str
    # the file to write: .npz for numpy, or .mat for Matlab
    output: str
    # write the feature maps of these images: a file, a folder, a text file (.txt) of paths, or a
    # list such as [a.jpg,b.jpg]; null: write the filters of all layers
    images: Any = field(default=None, metadata=TEXTS)
    # with images: the maps of this layer; null: the highest
    layer: int | None = None
    # auto (cuda, else cpu), or a torch device
    device: str = "auto"

    def __post_init__(self) -> None:
        if Path(self.output).suffix not in (".npz", ".mat"):
            raise ValueError(f"output={self.output}: must end in .npz or .mat")
        if self.images == []:
            raise ValueError("images=[]: give a file, a folder, or a list of them")
        if self.images is None and self.layer is not None:
            raise ValueError(f"layer={self.layer}: needs images=..., whose maps are written")


@dataclass
class AblateConfig:
    """The settings of `deconvnet ablate`."""

    # a run folder
    run: str
    # number of its training images to reconstruct
    count: int = 6
    # images inferred at a time: bounds memory
    chunk: int = 8
    # auto (cuda, else cpu), or a torch device
    device: str = "auto"

    def __post_init__(self) -> None:
        for key in ("count", "chunk"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")


@dataclass
class ClassifyConfig(ClassifySettings):
    """The settings of `deconvnet classify`."""

    # a run folder, or a network file (.safetensors)
    run: str = MISSING
    # the images and their classes
    data: ClassData = field(default_factory=lambda: ClassData(path=MISSING))
    # other run folders or network files whose layers are also tested, each alone and all together,
    # such as [runs/colour]: of the layers named in `layers` those that they have, else all
    beside: list[str] = field(default_factory=list)
    # folder for the results and for the features, from which the same command resumes; null:
    # <run>/classified
    output: str | None = None
    # auto (cuda, else cpu), or a torch device
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)


@renamed(images="max_images")
@dataclass
class TrainCnnConfig:
    """The settings of `deconvnet train-cnn`."""

    # the run folder is runs/<name>
    name: str
    # the images and their classes: data=torchvision, or data=folder, whose folders are the classes
    data: DataSettings
    # planes of the images: grey (one) or rgb
    color: str = "grey"
    # train on this many of the images, drawn at random; null: all
    max_images: int | None = 12000
    # fraction of the images to test on, if the data set has no test split of its own
    held_out: float = 0.1
    # maps of the first layer; the others have 2, 3, 3 and 2 times as many, the hidden layer 8 times
    width: int = 24
    # fraction of the units of the hidden layer that are dropped at random in training
    dropout: float = 0.5
    # passes over the images
    epochs: int = 10
    # save a network file after each of these epochs, and after the last
    checkpoints: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 30, 40, 64])
    # images per update
    batch: int = 32
    # learning rate of the first update; it falls to 0 along half a cosine
    learning_rate: float = 0.02
    # momentum of stochastic gradient descent
    momentum: float = 0.9
    # weight decay of stochastic gradient descent
    weight_decay: float = 0.001
    # upper limit on the root mean square of a filter (the paper: 0.1); null: none
    filter_rms: float | None = None
    # flip images left to right at random
    mirror: bool = True
    # shift images by up to this many pixels at random
    shift: int = 4
    # seed of all random choices
    seed: int = 0
    # auto (cuda, else cpu), or a torch device such as cpu, cuda, cuda:1
    device: str = "auto"
    # show progress bars
    progress: bool = True

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
        for key in ("max_images", "learning_rate", "filter_rms"):
            if getattr(self, key) is not None and not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"{key}={getattr(self, key)}: must be above 0, and finite")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay}: must be at least 0, and finite")


# The settings class of each command, by name.
SCHEMAS = {
    "train": TrainConfig,
    "suggest": SuggestConfig,
    "visualize": VisualizeConfig,
    "occlusion": OcclusionConfig,
    "correspondence": CorrespondenceConfig,
    "reconstruct": ReconstructConfig,
    "ablate": AblateConfig,
    "info": InfoConfig,
    "doctor": DoctorConfig,
    "export": ExportConfig,
    "faithfulness": FaithfulnessConfig,
    "stability": StabilityConfig,
    "denoise": DenoiseConfig,
    "inpaint": InpaintConfig,
    "classify": ClassifyConfig,
    "train_cnn": TrainCnnConfig,
}


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}: must not be negative, and below 2^63")


def _check_positive_or_null(settings: object, *keys: str) -> None:
    for key in keys:
        value = getattr(settings, key)
        if value is not None and value < 1:
            raise ValueError(f"{key}={value}: must be at least 1, or null")


def _check_images(settings: VisualizeConfig | OcclusionConfig) -> None:
    if settings.images == []:
        raise ValueError("images=[]: give a folder, a file, or a list of at least one file")
    _check_positive_or_null(settings, "max_images")
