"""Measure which filters of a run other seeds, and halves of its images, learn again.

deconvnet stability run=runs/resnet50-layer3 seeds=2
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from deconvnet.cli import printed_commands
from deconvnet.cli.concepts_of_run import check_trusted
from deconvnet.cli.errors import one_line_errors
from deconvnet.cli.model_errors import one_line_model_errors
from deconvnet.cli.read_settings import read_settings
from deconvnet.cli.settings import StabilityConfig
from deconvnet.cli.train import relative_path, source
from deconvnet.cli.unfinished_run import load_run
from deconvnet.filters.update import Diverged
from deconvnet.monitoring.strict_json import to_json
from deconvnet.stability import measure_stability
from deconvnet.storage import ownership
from deconvnet.support.devices import torch_device
from deconvnet.training.loop import Interrupted
from deconvnet.training.run_folder import recorded_seed, training_data
from deconvnet.training.session import Limits

RESULT = "stability.json"


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError, Diverged):
        settings = read_settings(cfg)
        with one_line_model_errors(settings.run):
            try:
                measure(settings)
            except Interrupted:
                print(f"\nstopped; to resume: {printed_commands.again()}")
                raise SystemExit(130) from None


def measure(settings: StabilityConfig) -> None:
    """Print the table, and write it as stability.json into the run folder."""
    run = Path(settings.run)
    net, data = load_run(run), training_data(run)
    if data is None:
        raise ValueError(f"run={run}: not a run folder of deconvnet train with a checkpoint")
    if data.model is not None:
        check_trusted(run, data, settings.trust_code)
    path, folder = run / RESULT, run / "stability"
    ownership.check_writable(path)
    device = torch_device(settings.device)
    result = measure_stability(
        net.to(device),
        source(data, device),
        seeds=settings.seeds,
        halves=settings.halves,
        seed=recorded_seed(run),
        folder=folder,
        limits=Limits(hold_codes=not data.stream),
        note=lambda name: print(f"learning {relative_path(folder / name)}", flush=True),
    )
    ownership.write(path, to_json(result.as_dict()).encode())
    print(f"\n{result}\n\n{relative_path(path)}")
