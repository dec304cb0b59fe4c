"""What `deconvnet faithfulness` and `deconvnet stability` have written, for the page of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from deconvnet.cli.faithfulness import RESULT as FAITHFULNESS
from deconvnet.cli.stability import RESULT as STABILITY
from deconvnet.visualization.models.concept_model import ConceptModel
from deconvnet.visualization.models.zoo import LoadedModel
from deconvnet.visualization.result import LayerMeasurements


def load_measurements(run: Path, model: LoadedModel) -> dict[str, LayerMeasurements]:
    """By layer, what was measured of the concepts of a run; {} if nothing was.

    Raises ValueError in one line if a file is damaged or of another network.
    """
    module = model.module
    if not isinstance(module, ConceptModel):
        return {}
    facts, maps = {}, {}
    if (found := _read(run / FAITHFULNESS)) is not None:
        facts |= _in_file(run / FAITHFULNESS, found, _faithfulness)
    if (found := _read(run / STABILITY)) is not None:
        some, maps = _in_file(run / STABILITY, found, _stability)
        facts |= some
    # Filters of the lowest layer are matched.
    lowest = module.concept_layers[0]
    count = module.dictionary.layer(1).settings.num_maps
    for name, values in maps.items():
        if len(values) != count:
            raise ValueError(
                f"{run / STABILITY}: {name} of {len(values)} concepts, but the run has {count}; "
                "measure it again"
            )
    return {lowest: LayerMeasurements(facts, maps)} if facts or maps else {}


def _faithfulness(found: dict) -> dict[str, str | float]:
    own, zero = found["outputs"]["reconstruction"], found["outputs"]["zero"]
    facts: dict[str, str | float] = {
        "variance unexplained": f"{found['fvu']:.1%}",
        "non-zero per position": f"{found['l0_position']:.1f}",
    }
    if own["agreement"] is not None:
        facts["same top-1 with the codes in its place"] = (
            f"{own['agreement']:.1%} (zeros: {zero['agreement']:.1%})"
        )
        facts["KL of the outputs, nats"] = f"{own['kl']:.3f} (zeros: {zero['kl']:.3f})"
    if found["largest_gap"] is not None:
        facts["codes above the minimum"] = f"at most {found['largest_gap']:.1%}"
    return facts


def _stability(found: dict) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    facts, maps = {}, {}
    for key, name in (("seeds", "stability over seeds"), ("halves", "stability over halves")):
        if found[key]:
            matched = np.mean([match["mean_matched"] for match in found[key]])
            facts[name] = f"{matched:.2f} (mean matched cosine)"
            maps[name] = np.array(found[f"over_{key}"], float)
    return facts, maps


def _read(path: Path) -> object:
    """The JSON of a file; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); remove it, or measure again") from None


def _in_file(path: Path, found: object, read: object) -> object:
    """What a function reads from JSON; ValueError, in one line, if it is not there."""
    try:
        return read(found)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        reason = f"{type(error).__name__} {error}"
        raise ValueError(f"{path}: damaged ({reason}); remove it, or measure again") from None
