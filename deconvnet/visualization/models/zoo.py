"""Convolutional networks to look into, by name, and what each takes for an image.

A network that was trained by others expects its pixels normalised in its own way, in a size of its
own. This module finds both beside the weights, so that the rest deals in RGB pixels in [0, 1], and
pictures of what is in the network's input space come back in units of pixels. It decides in which
forms a network is named and which files of weights are read; no file is read that could run code.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from deconvnet.images.datasets import INTERPOLATIONS, Crop
from deconvnet.storage.integrity import InvalidFileError
from deconvnet.storage.network_files import load_network, save_network
from deconvnet.visualization.models.normalization import Normalization
from deconvnet.visualization.models.weights import load_state_dict, why_not_weights
from deconvnet.visualization.models.zfnet import ZFNet

WEIGHT_FILES = (".pt", ".pth", ".bin", ".safetensors")

# What others put before the names of parameters.
PREFIXES = ("module.", "_orig_mod.", "model.")

FORMS = (
    "torchvision/NAME, timm/NAME, package.module:factory, or a network file of scripts/train_cnn.py"
)


@dataclass(frozen=True)
class LoadedModel:
    """A network to look into, and how images become what it takes.

    module: in evaluation mode; weights: where its parameters come from, in words; crop: what it
    takes of an image, None if it takes any size; labels: of its scores, where they are known;
    digest: of names and values of all parameters and buffers, 16 hexadecimal digits; training: how
    it came about, where that is known, what JSON can hold; "data" are its data settings.
    """

    module: nn.Module
    name: str
    weights: str
    normalization: Normalization = Normalization()
    crop: Crop | None = None
    labels: tuple[str, ...] | None = None
    digest: str = ""
    training: Mapping[str, object] = field(default_factory=dict)


def load_model(
    spec: str | Path,
    *,
    weights: str | Path | None = "default",
    options: Mapping[str, object] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    order: str | None = None,
    crop: Crop | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> LoadedModel:
    """The network that a text names:

    - torchvision/vgg16: a classifier of torchvision
    - timm/resnet18: one of timm, also with a tag, timm/resnet18.a1_in1k
    - package.module:factory: what a function, or a class, returns when it is called with `options`,
      or a module that has that name; packages in the current folder are found
    - a network file of scripts/train_cnn.py

    weights: "default": the pretrained ones of torchvision and timm, else as the network is built;
    the name of other pretrained ones, such as IMAGENET1K_V2 or a tag of timm; a file of parameters;
    "none": random, the same for the same seed. options: arguments of what builds the network, such
    as {"num_classes": 10}.

    Normalisation, crop and labels are those of the pretrained weights; with random parameters or
    those of a file, normalisation and crop of the default ones. mean, std, order, crop and labels
    take their place. A network with `transform_input` (Inception) changes the normalisation itself;
    its own input space is what these are about.

    ValueError in one line where the name, the weights or a file is wrong.
    """
    spec, options = str(spec), dict(options or {})
    weights = "none" if weights is None else weights
    with _random_from(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torchvision, about how it initialises
        subject = _source(spec)(spec, weights, options)
    given = {"mean": mean, "std": std, "order": order}
    given = {key: value for key, value in given.items() if value is not None}
    return replace(
        subject,
        module=subject.module.eval(),
        normalization=replace(subject.normalization, **given),
        crop=crop or subject.crop,
        labels=subject.labels if labels is None else tuple(map(str, labels)),
        digest=digest(subject.module),
    )


def save_model(path: str | Path, subject: LoadedModel) -> None:
    """Write a ZFNet to a .safetensors file that `load_model` reads by its path alone."""
    if not isinstance(subject.module, ZFNet):
        raise ValueError(f"{path}: only a ZFNet can be saved, not {type(subject.module).__name__}")
    settings = {
        "cnn": "ZFNet",
        "name": subject.name,
        "arguments": subject.module.arguments,
        "normalization": asdict(subject.normalization),
        "crop": subject.crop and asdict(subject.crop),
        "labels": subject.labels,
        "training": dict(subject.training),
    }
    save_network(Path(path), subject.module.state_dict(), settings)


def digest(module: nn.Module) -> str:
    """16 hexadecimal digits of the names and values of all parameters and buffers of a network."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _source(spec: str) -> Callable[[str, str | Path, dict], LoadedModel]:
    """What loads a network of this form of name, from (spec, weights, options)."""
    if spec.startswith("torchvision/"):
        return _torchvision
    if spec.startswith("timm/"):
        return _timm
    if Path(spec).suffix in WEIGHT_FILES or Path(spec).is_file():
        return _file
    if ":" in spec:
        return _imported
    from torchvision import models

    known = models.list_models(module=models)
    close = difflib.get_close_matches(spec.rpartition("/")[2], known, n=1)
    hint = f"; did you mean torchvision/{close[0]}?" if close else ""
    raise ValueError(f"model={spec}: give {FORMS}{hint}")


def _torchvision(spec: str, weights: str | Path, options: dict) -> LoadedModel:
    from torchvision import models

    name = spec.removeprefix("torchvision/")
    names = models.list_models(module=models)
    if name not in names:
        raise _unknown(f"model={spec}: torchvision has no such classifier", name, names)
    known = models.get_model_weights(name)
    file, member = _weights_file(weights), None
    if file is not None:
        # A file as it was downloaded: under its own name.
        member = {entry.url.rpartition("/")[2]: entry for entry in known}.get(file.name)
        if member is not None and name in ("googlenet", "inception_v3"):
            options = {"transform_input": True, **options}
    elif _lower(weights) == "default":
        member = known.DEFAULT
    elif _lower(weights) != "none":
        wanted = str(weights).rpartition(".")[2]
        if wanted not in known.__members__:
            choices = [*known.__members__, "none"]
            raise _unknown(f"weights={weights}: {name} has no such weights", wanted, choices)
        member = known[wanted]
    pretrained = member if file is None else None
    try:
        module = models.get_model(name, weights=pretrained, **options)
    except (TypeError, ValueError) as error:
        raise _unbuilt(spec, options, error) from error
    # No network, no right to write, a damaged or half loaded file: all have the same remedy.
    except Exception as error:
        if pretrained is None:
            raise _unbuilt(spec, options, error) from error
        place = Path(torch.hub.get_dir(), "checkpoints", pretrained.url.rpartition("/")[2])
        remedy = f"put {pretrained.url} at {place}, or anywhere and give weights=FILE"
        raise _unavailable(spec, pretrained.name, error, remedy) from error
    if file is not None:
        _load_parameters(module, file)
    transform = (member or known.DEFAULT).transforms()
    labels = member and member.meta.get("categories")
    return LoadedModel(
        module,
        spec,
        file.name if file else member.name if member else "none",
        Normalization(tuple(transform.mean), tuple(transform.std)),
        Crop(transform.resize_size[0], transform.crop_size[0], transform.interpolation.value),
        tuple(labels) if labels else None,
    )


def _timm(spec: str, weights: str | Path, options: dict) -> LoadedModel:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"model={spec} needs timm (pip install timm): {error}") from error

    name, _, tag = spec.removeprefix("timm/").partition(".")
    if name not in timm.list_models():
        message = f"model={spec}: timm has no such model"
        raise _unknown(message, name, timm.list_models())
    file = _weights_file(weights)
    if file is None and _lower(weights) not in ("default", "none"):
        tag = str(weights)
    tags = [entry.partition(".")[2] for entry in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        raise _unknown(f"weights={tag}: {name} has no such weights in timm", tag, [*tags, "none"])
    pretrained = file is None and _lower(weights) != "none"
    if pretrained and not tags:
        raise ValueError(f"model={spec}: timm has no weights for it; give weights=FILE or none")
    full = f"{name}.{tag}" if tag else name
    try:
        module = timm.create_model(full, pretrained=pretrained, **options)
    except TypeError as error:
        raise _unbuilt(spec, options, error) from error
    # timm and the hub that it loads from have their own exceptions for every failure.
    except Exception as error:
        if not pretrained:
            raise _unbuilt(spec, options, error) from error
        configuration = timm.get_pretrained_cfg(full)
        page = f"model.safetensors of https://huggingface.co/{configuration.hf_hub_id}"
        source = page if configuration.hf_hub_id else configuration.url
        remedy = f"get {source} and give weights=FILE"
        raise _unavailable(spec, tag or "default", error, remedy) from error
    if file is not None:
        _load_parameters(module, file)
    expected = timm.data.resolve_data_config({}, model=module)
    size, kind = expected["input_size"][-1], expected["interpolation"]
    mean, std = tuple(expected["mean"]), tuple(expected["std"])
    if options.get("in_chans", 3) == 1:
        normalization = Normalization((sum(mean) / len(mean),), (sum(std) / len(std),), "grey")
    else:
        normalization = Normalization(mean, std)
    return LoadedModel(
        module,
        spec,
        file.name if file else (tag or "default") if pretrained else "none",
        normalization,
        Crop(
            max(size, math.floor(size / expected["crop_pct"])),
            size,
            kind if kind in INTERPOLATIONS else INTERPOLATIONS[0],
        ),
    )


def _imported(spec: str, weights: str | Path, options: dict) -> LoadedModel:
    where, _, name = spec.partition(":")
    if where.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"model={spec}: {where} is part of Python itself and builds no networks")
    file = _weights_file(weights)
    if file is None and _lower(weights) not in ("default", "none"):
        raise ValueError(f"weights={weights}: model={spec} takes a file of weights, or default")
    with _current_folder_importable():
        try:
            # Only the first import runs its code: what that draws must not change what comes next.
            with torch.random.fork_rng(devices=[]):
                found = importlib.import_module(where)
        # Whatever the user's own code raises is the user's to read.
        except Exception as error:
            raise ValueError(f"model={spec}: {where} cannot be imported: {_say(error)}") from error
        if not hasattr(found, name):
            names = [key for key in vars(found) if not key.startswith("_")]
            raise _unknown(f"model={spec}: {where} has no {name!r}", name, names)
        module = getattr(found, name)
        if not isinstance(module, nn.Module):
            _check_factory(spec, found, module)
            try:
                module = module(**options)
            except Exception as error:
                raise _unbuilt(spec, options, error) from error
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"model={spec}: returned {type(module).__name__}, must be a torch.nn.Module"
        )
    if file is not None:
        _load_parameters(module, file)
    return LoadedModel(module, spec, file.name if file else "as built")


def _check_factory(spec: str, package: ModuleType, factory: object) -> None:
    """Refuse to call what cannot build a network, such as os.system under another name.

    It would run with the rights of the user. Functions from any package except Python's own are
    allowed, including those that a module only re-exports.
    """
    if not callable(factory):
        raise ValueError(f"model={spec}: neither a network nor callable")
    if isinstance(factory, type) and issubclass(factory, nn.Module):
        return
    written = getattr(factory, "func", factory)  # of functools.partial
    where = getattr(written, "__module__", None) or ""
    if not where or where.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(
            f"model={spec}: {package.__name__} imports it from {where or 'elsewhere'}, which "
            "builds no networks; give a torch.nn.Module, or a function that returns one"
        )


def _file(spec: str, weights: str | Path, options: dict) -> LoadedModel:
    path = Path(spec)
    if not path.is_file():
        raise ValueError(f"model={spec}: no such file")
    if options:
        raise ValueError(f"model={spec}: this file says how it is built; leave options out")
    remedy = f"give torchvision/NAME, timm/NAME or package.module:factory, and weights={spec}"
    if path.suffix != ".safetensors":
        raise ValueError(f"model={spec}: holds parameters of a network, not which it is; {remedy}")
    if (says := why_not_weights(path)) is not None:
        raise ValueError(f"model={spec}: {says}")
    try:
        tensors, settings = load_network(path)
    except InvalidFileError as error:
        raise ValueError(f"model={error}; if these are the parameters of one, {remedy}") from error
    if settings.get("cnn") != "ZFNet":
        raise ValueError(
            f"model={spec}: not a convolutional network of scripts/train_cnn.py; a "
            "deconvolutional network is loaded by deconvnet.load"
        )
    try:
        module = ZFNet(**settings["arguments"])
        normalization = Normalization(**settings["normalization"])
        crop = Crop(**settings["crop"]) if settings["crop"] else None
        labels, name, training = (settings[key] for key in ("labels", "name", "training"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"model={spec}: not a network of this version ({_say(error)})") from error
    file = _weights_file(weights)
    if file is not None:
        _load_parameters(module, file)
    elif _lower(weights) == "default":
        _take(module, tensors, path)
    elif _lower(weights) != "none":
        raise ValueError(f"weights={weights}: give a file, none, or default for those in {spec}")
    source = file.name if file else path.name if _lower(weights) == "default" else "none"
    labels = labels and tuple(labels)
    return LoadedModel(module, name, source, normalization, crop, labels, training=training)


def _load_parameters(module: nn.Module, file: Path) -> None:
    """Take the parameters in a file, however they are wrapped."""
    _take(module, load_state_dict(file), file)


def _take(module: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    own = module.state_dict()
    for prefix in PREFIXES:
        if tensors and own.keys().isdisjoint(tensors):
            stripped = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            tensors = stripped if len(stripped) == len(tensors) else tensors
    # Files from before 2018 do not count batches, which evaluation does not need.
    counts = {name: own[name] for name in own if name.endswith("num_batches_tracked")}
    tensors = counts | tensors
    shapes = [
        f"{name} ({_shape(tensors[name])} in the file, {_shape(own[name])} in the network)"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    differences = {
        "missing": [name for name in own if name not in tensors],
        "unexpected": [name for name in tensors if name not in own],
        "of another shape": shapes,
    }
    found = [f"{what}: {_some(names)}" for what, names in differences.items() if names]
    if found:
        raise ValueError(f"weights={file}: not of this network; {'; '.join(found)}")
    module.load_state_dict(tensors)


def _weights_file(weights: str | Path) -> Path | None:
    """The file that is meant, if one is."""
    path = Path(weights).expanduser()
    means_file = isinstance(weights, Path) or path.suffix in WEIGHT_FILES or len(path.parts) > 1
    if path.is_file():
        return path
    if means_file:
        raise ValueError(f"weights={weights}: no such file")
    return None


@contextmanager
def _random_from(seed: int) -> Iterator[None]:
    """Networks draw their parameters from the global generator, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _unknown(message: str, name: str, names: Iterable[str]) -> ValueError:
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {_some(names, 20)}"
    return ValueError(f"{message}; {hint}")


def _unbuilt(spec: str, options: dict, error: Exception) -> ValueError:
    given = f" with options {options}" if options else ""
    return ValueError(f"model={spec}: cannot be built{given}: {_say(error)}")


def _unavailable(spec: str, weights: str, error: Exception, remedy: str) -> ValueError:
    return ValueError(
        f"model={spec}: its weights {weights} are not on this machine and could not be loaded "
        f"({_say(error)}); {remedy}; weights=none builds it with random ones"
    )


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _lower(weights: str | Path) -> str:
    return str(weights).lower()


def _say(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
