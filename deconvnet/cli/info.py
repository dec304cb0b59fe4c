"""Say what a run folder, a network file, or a file of filters or events holds.

deconvnet info run=runs/photographs
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from deconvnet.cli import printed_commands
from deconvnet.cli.errors import one_line_errors
from deconvnet.cli.read_settings import read_settings
from deconvnet.cli.unfinished_run import check_begun, unfinished_run
from deconvnet.dictionary import Learned
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.monitoring.statistics import LayerResult
from deconvnet.network.layer import LayerSettings
from deconvnet.network.network import FILTERS, DeconvNet, restore_network
from deconvnet.sparse_coding.events import EVENTS, Events
from deconvnet.storage.file_checks import InvalidFileError
from deconvnet.storage.network_files import load_network
from deconvnet.training.checkpoint import TrainingState, check_state, parts_of, state_at

UNITS = ("bytes", "kB", "MB", "GB")


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError):
        print("\n".join(describe(read_settings(cfg).run)))


def describe(run: str) -> Iterator[str]:
    """Lines about a run folder, a checkpoint, or a file of a network, of filters or of events."""
    path = Path(run).expanduser()
    if not path.exists():
        raise ValueError(f"run={run}: no such file or folder")
    if path.is_dir() or path.suffix == ".pt":
        yield from _run(path)
        return
    tensors, settings = load_network(path)
    kind = settings.get("kind") if isinstance(settings, dict) else None
    if kind == EVENTS:
        yield f"{path}: the events of a code, {_size(path)}"
        yield f"{Events.load(path)}"
    elif kind == FILTERS:
        learned = Learned.load(path)
        yield f"{path}: filters of learn_filters or learn_online, {_size(path)}"
        yield ""
        yield from _layers([learned.settings], [learned.filters.shape[1]])
        yield f"learned in {len(learned.history)} epochs" + (
            f", objective {learned.history[-1].objective:.6g}" if learned.history else ""
        )
    else:
        yield f"{path}: a network, {_size(path)}"
        yield from _network(restore_network(path, tensors, settings))


def _run(path: Path) -> Iterator[str]:
    state = state_at(path)
    if state is None:
        check_begun(path)
        raise InvalidFileError(
            f"run={path}: no checkpoint in this folder; expected a run of `deconvnet train`"
        )
    check_state(state, path)
    progress = TrainingState.from_checkpoint(state)
    net = restore_network(path, *parts_of(state))
    what = "checkpoint" if path.is_file() else "run"
    yield f"{path}: a {what} of `deconvnet train`, {_size(path)}"
    yield from _position(path, state, progress, net)
    yield f"images          {_images(state)}"
    of_model = state["settings"].get("data", {}).get("model") is not None
    yield from _network(net, of_model)
    if progress.results:
        yield from _results(progress.results, of_model)
    if path.is_dir():
        run = printed_commands.setting("run", path)
        yield f"look            {printed_commands.sibling('visualize')} {run}"
        yield f"files           {printed_commands.sibling('export')} {run} output=network.npz"


def _position(path: Path, state: dict, progress: TrainingState, net: DeconvNet) -> Iterator[str]:
    updates = f"{progress.step} filter updates"
    if (unfinished := unfinished_run(path, state, net)) is not None:
        yield f"not finished: {unfinished}, {updates}"
        yield f"resume          {unfinished.resume}"
        return
    done, defined = progress.layer - 1, len(state["settings"].get("model", {}))
    more = "" if done >= defined else f"; layers={defined} learns the others"
    yield f"{done} of {defined} layers learned, {updates}{more}"


def _images(state: dict) -> str:
    data = state["settings"].get("data", {})
    images = state.get("images")
    count = "" if images is None else f"{len(images)} "
    where = data.get("path") or data.get("dataset") or data.get("source", "unknown")
    size = f", {data['size']}x{data['size']}" if data.get("size") else ""
    if data.get("model"):
        size += f"; their activations in layer {data.get('layer')} of {data['model']}"
    return f"{count}of {where}{size}"


def _network(net: DeconvNet, of_model: bool = False) -> Iterator[str]:
    """Its preprocessing and layers; of_model: it explains the activations of another network."""
    yield f"preprocessing   {_preprocessing(net.preprocessing.settings)}"
    yield ""
    yield from _layers(
        [layer.settings for layer in net.layers],
        [layer.filters.shape[1] for layer in net.layers],
        of_model,
    )


def _preprocessing(settings: PreprocessingSettings) -> str:
    steps = " and ".join(settings.steps) or "none"
    return f"{steps}, color {settings.color}, scale {settings.scale}"


def _layers(
    layers: list[LayerSettings], channels: list[int], of_model: bool = False
) -> Iterator[str]:
    maps, lowest = ("concepts", "activations") if of_model else ("maps", "image")
    rows = [("layer", maps, "filters", "lam", "p", "explains", "pool", "solver")]
    for number, (layer, C) in enumerate(zip(layers, channels, strict=True), 1):
        explains = lowest if number == 1 and layer.target == "maps" else layer.target
        lam = layer.lam if layer.lam_ratio is None else f"{layer.lam_ratio:g} max"
        rows.append(
            (
                str(number),
                str(layer.num_maps),
                "x".join(map(str, (C, *layer.filter_shape))),
                lam if isinstance(lam, str) else f"{lam:.4g}",
                f"{layer.p:g}",
                explains if layer.coding == "convolution" else f"patches of {explains}",
                "-" if layer.pool is None else "x".join(map(str, layer.pool)),
                layer.solver.method,
            )
        )
    yield from _table(rows)
    yield ""


def _results(results: list[LayerResult], of_model: bool) -> Iterator[str]:
    snr, dead = ("activations", "concepts") if of_model else ("the image", "maps")
    rows = [
        ("layer", f"SNR of {snr}", "non-zero coefficients", "objective", f"dead {dead}"),
    ]
    rows += [
        (str(r.layer), f"{r.snr:.2f} dB", f"{r.density:.2%}", f"{r.objective:.1f}", str(r.dead))
        for r in results
    ]
    yield from _table(rows)
    yield ""


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "   ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    size, unit = float(sum(file.stat().st_size for file in files)), 0
    while size >= 1000 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.0f} {UNITS[unit]}" if unit == 0 else f"{size:.1f} {UNITS[unit]}"
