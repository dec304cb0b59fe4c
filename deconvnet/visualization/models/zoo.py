"""Loading of convolutional networks by name, with the normalisation and crop that they expect.

Each trained network expects a particular normalisation and size of its input. This module loads
both together with the weights, so that all other code uses RGB pixels in [0, 1]. It never reads a
weight file in a way that could run code.
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
from torch import nn

from deconvnet.images.fit import INTERPOLATIONS, Crop
from deconvnet.storage.file_checks import InvalidFileError
from deconvnet.storage.network_files import load_network, save_network
from deconvnet.visualization.models.model_error import ModelError, described
from deconvnet.visualization.models.normalization import Normalization
from deconvnet.visualization.models.weights import (
    WEIGHT_FILES,
    enumerated,
    load_parameters,
    set_parameters,
    weights_file,
    why_not_weights,
)
from deconvnet.visualization.models.zfnet import ZFNet

FORMS = (
    "torchvision/NAME, timm/NAME, package.module:factory, or a network file of deconvnet train-cnn"
)


@dataclass(frozen=True)
class LoadedModel:
    """A network to visualize, and the conversion of images to its input.

    module: in evaluation mode. weights: the origin of its parameters, in words. crop: the crop of
    an image that is its input; None if it accepts any size. labels: names of its classes, if known.
    digest: 16 hexadecimal digits for the names and values of all parameters and buffers. training:
    how it was trained, if known, as JSON values; its "data" are the data settings.
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
    """Load the network that `spec` names:

    - torchvision/vgg16: a classifier of torchvision
    - timm/resnet18: a model of timm, optionally with a tag, timm/resnet18.a1_in1k
    - package.module:factory: the result of calling a function or class with `options`, or a module
      of that name; packages in the current folder are found
    - a network file of deconvnet train-cnn

    weights: "default", the pretrained weights of torchvision and timm, or the network as it is
    built; the name of other pretrained weights, such as IMAGENET1K_V2 or a tag of timm; a file of
    weights; "none", random, equal for equal seeds. options: arguments for the function that builds
    the network, such as {"num_classes": 10}.

    Normalisation, crop and labels belong to the pretrained weights. With random weights or those
    from a file, normalisation and crop belong to the default weights. mean, std, order, crop and
    labels override them. A network with `transform_input` (Inception) normalises a second time
    itself; these settings describe its own input space.

    Raises ValueError in one line if the name, the weights or a file is wrong.
    """
    spec, options = str(spec), dict(options or {})
    weights = "none" if weights is None else weights
    with _random_from(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from torchvision, about initialisation
        loaded = _source(spec)(spec, weights, options)
    overrides = {"mean": mean, "std": std, "order": order}
    overrides = {key: value for key, value in overrides.items() if value is not None}
    return replace(
        loaded,
        module=loaded.module.eval(),
        normalization=replace(loaded.normalization, **overrides),
        crop=crop or loaded.crop,
        labels=loaded.labels if labels is None else tuple(map(str, labels)),
        digest=digest(loaded.module),
    )


def save_model(path: str | Path, model: LoadedModel) -> None:
    """Write a ZFNet to a .safetensors file that `load_model` reads by its path alone."""
    if not isinstance(model.module, ZFNet):
        raise ValueError(f"{path}: only a ZFNet can be saved, not {type(model.module).__name__}")
    settings = {
        "cnn": "ZFNet",
        "name": model.name,
        "arguments": model.module.arguments,
        "normalization": asdict(model.normalization),
        "crop": model.crop and asdict(model.crop),
        "labels": model.labels,
        "training": dict(model.training),
    }
    save_network(Path(path), model.module.state_dict(), settings)


def digest(module: nn.Module) -> str:
    """16 hexadecimal digits of the names and values of all parameters and buffers of a network."""
    sha256 = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha256.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()[:16]


def _source(spec: str) -> Callable[[str, str | Path, dict], LoadedModel]:
    """The function of (spec, weights, options) that loads a network with this form of name."""
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
    file, member = weights_file(weights), None
    if file is not None:
        # A downloaded file under its original name.
        member = {entry.url.rpartition("/")[2]: entry for entry in known}.get(file.name)
        if member is not None and name in ("googlenet", "inception_v3"):
            options = {"transform_input": True, **options}
    elif _lower(weights) == "default":
        member = known.DEFAULT
    elif _lower(weights) != "none":
        member_name = str(weights).rpartition(".")[2]
        if member_name not in known.__members__:
            choices = [*known.__members__, "none"]
            raise _unknown(f"weights={weights}: {name} has no such weights", member_name, choices)
        member = known[member_name]
    pretrained = member if file is None else None
    try:
        module = models.get_model(name, weights=pretrained, **options)
    except (TypeError, ValueError) as error:
        raise _unbuilt(spec, options, error) from error
    # No network, no permission to write, a damaged or partial file: all have the same remedy.
    except Exception as error:
        if pretrained is None:
            raise _unbuilt(spec, options, error) from error
        path = Path(torch.hub.get_dir(), "checkpoints", pretrained.url.rpartition("/")[2])
        remedy = f"put {pretrained.url} at {path}, or anywhere and give weights=FILE"
        raise _unavailable(spec, pretrained.name, error, remedy) from error
    if file is not None:
        load_parameters(module, file)
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
    file = weights_file(weights)
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
    # timm, and the hub that it loads from, have their own exception for every failure.
    except Exception as error:
        if not pretrained:
            raise _unbuilt(spec, options, error) from error
        configuration = timm.get_pretrained_cfg(full)
        page = f"model.safetensors of https://huggingface.co/{configuration.hf_hub_id}"
        source = page if configuration.hf_hub_id else configuration.url
        remedy = f"get {source} and give weights=FILE"
        raise _unavailable(spec, tag or "default", error, remedy) from error
    if file is not None:
        load_parameters(module, file)
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
    file = weights_file(weights)
    if file is None and _lower(weights) not in ("default", "none"):
        raise ValueError(f"weights={weights}: model={spec} takes a file of weights, or default")
    with _current_folder_importable():
        try:
            # Only the first import runs the code; it must not advance the random numbers.
            with torch.random.fork_rng(devices=[]):
                package = importlib.import_module(where)
        # Whatever the user's own code raises is the user's to read.
        except Exception as error:
            raise ModelError(
                f"model={spec}: {where} cannot be imported: {_message(error)}"
            ) from error
        if not hasattr(package, name):
            names = [key for key in vars(package) if not key.startswith("_")]
            raise _unknown(f"model={spec}: {where} has no {name!r}", name, names)
        module = getattr(package, name)
        if not isinstance(module, nn.Module):
            _check_factory(spec, package, module)
            try:
                module = module(**options)
            except Exception as error:
                raise _unbuilt(spec, options, error) from error
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"model={spec}: returned {type(module).__name__}, must be a torch.nn.Module"
        )
    if file is not None:
        load_parameters(module, file)
    return LoadedModel(module, spec, file.name if file else "as built")


def _check_factory(spec: str, package: ModuleType, factory: object) -> None:
    """Raise ValueError for objects that cannot build a network, such as os.system under another
    name, which would run with the permissions of the user.

    Functions from any package except Python's own are allowed, even if the module only re-exports
    them.
    """
    if not callable(factory):
        raise ValueError(f"model={spec}: neither a network nor callable")
    if isinstance(factory, type) and issubclass(factory, nn.Module):
        return
    function = getattr(factory, "func", factory)  # of functools.partial
    where = getattr(function, "__module__", None) or ""
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
    if (reason := why_not_weights(path)) is not None:
        raise ValueError(f"model={spec}: {reason}")
    try:
        tensors, settings = load_network(path)
    except InvalidFileError as error:
        raise ValueError(f"model={error}; if these are the parameters of one, {remedy}") from error
    if settings.get("cnn") != "ZFNet":
        raise ValueError(
            f"model={spec}: not a convolutional network of deconvnet train-cnn; a "
            "deconvolutional network is loaded by deconvnet.load"
        )
    try:
        module = ZFNet(**settings["arguments"])
        normalization = Normalization(**settings["normalization"])
        crop = Crop(**settings["crop"]) if settings["crop"] else None
        labels, name, training = (settings[key] for key in ("labels", "name", "training"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"model={spec}: not a network of this version ({_message(error)})"
        ) from error
    file = weights_file(weights)
    if file is not None:
        load_parameters(module, file)
    elif _lower(weights) == "default":
        set_parameters(module, tensors, path)
    elif _lower(weights) != "none":
        raise ValueError(f"weights={weights}: give a file, none, or default for those in {spec}")
    source = file.name if file else path.name if _lower(weights) == "default" else "none"
    labels = labels and tuple(labels)
    return LoadedModel(module, name, source, normalization, crop, labels, training=training)


@contextmanager
def _random_from(seed: int) -> Iterator[None]:
    """Seed the global generator, from which networks draw parameters; restore it afterwards."""
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
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {enumerated(names, 20)}"
    return ValueError(f"{message}; {hint}")


def _unbuilt(spec: str, options: dict, error: Exception) -> ModelError:
    suffix = f" with options {options}" if options else ""
    return ModelError(f"model={spec}: cannot be built{suffix}: {_message(error)}")


def _unavailable(spec: str, weights: str, error: Exception, remedy: str) -> ValueError:
    return ValueError(
        f"model={spec}: its weights {weights} are not on this machine and could not be loaded "
        f"({_message(error)}); {remedy}; weights=none builds it with random ones"
    )


def _lower(weights: str | Path) -> str:
    return str(weights).lower()


def _message(error: Exception) -> str:
    text = " ".join(str(error).split())
    # The message of a KeyError is only the key.
    return described(error) if not text or isinstance(error, LookupError) else text
