"""Keys of cached results: a file is reused only if the key of its inputs is the same."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import asdict
from functools import cache

import numpy as np
from torch import nn

from deconvnet.network.network import DeconvNet
from deconvnet.visualization.models.zoo import LoadedModel
from deconvnet.visualization.search.top_activations import TopActivations


def network_key(model: LoadedModel) -> list[object]:
    """The key of responses and projections: parameters, structure and normalisation."""
    module = model.module
    if isinstance(module, DeconvNet):
        structure = module.to_parts()[1]
    else:
        structure = [str(module), _source_digest(module)]
    digest = hashlib.sha256(json.dumps(structure).encode()).hexdigest()[:16]
    return [model.digest, digest, asdict(model.normalization)]


def activations_key(top: TopActivations) -> str:
    """A digest of a table of activations."""
    digest = hashlib.sha256()
    for array in (top.values, top.images, top.rows, top.columns):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _source_digest(module: nn.Module) -> str:
    """A digest of the source of all classes of a network except those of PyTorch: users may change
    the code of their own network but keep its parameters."""
    digest = hashlib.sha256()
    classes = {type(part) for part in module.modules()}
    for kind in sorted(classes, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}"):
        if kind.__module__.partition(".")[0] != "torch":
            digest.update(_source(kind))
    return digest.hexdigest()[:16]


@cache
def _source(kind: type) -> bytes:
    try:
        return inspect.getsource(kind).encode("utf-8", "surrogateescape")
    except (OSError, TypeError):  # for a class that was defined in an interpreter
        return f"{kind.__module__}.{kind.__qualname__}".encode()
