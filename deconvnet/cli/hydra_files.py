"""Write Hydra's files next to the results without replacing files of others."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from deconvnet.monitoring.monitor import not_in_bar
from deconvnet.storage import ownership


@contextmanager
def unless_refused(folder: Path) -> Iterator[None]:
    """Remove the folder that Hydra has made for a run if its settings are refused in a `with` block
    and it is empty.
    """
    try:
        yield
    except ValueError:
        with suppress(OSError):  # it holds an earlier run
            folder.rmdir()
        raise


@contextmanager
def logged(cfg: DictConfig, folder: Path) -> Iterator[None]:
    """Also log to <folder>/<script>.log within a `with` block; save the configuration to
    <folder>/.hydra.

    Hydra would do both itself, but overwrite any file. Raises ForeignFileError for files of others.
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
    terminal_handlers = list(root.handlers)
    root.addHandler(handler)
    for other in terminal_handlers:
        other.addFilter(not_in_bar)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for other in terminal_handlers:
            other.removeFilter(not_in_bar)
        handler.close()


class _LogFile(logging.FileHandler):
    """A log file whose write errors, such as a full disk, are ignored."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class SweepFolder(Callback):
    """Stops a sweep if Hydra would overwrite a foreign file in its folder."""

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        path = Path(config.hydra.sweep.dir) / "multirun.yaml"
        if os.path.lexists(path) and not _is_sweep(path, config.hydra.job.name):
            # Hydra turns other errors of a callback into warnings.
            raise SystemExit(
                f"error: {path}: already exists and is not a list of runs of this command; move it "
                "away, or choose another hydra.sweep.dir=..."
            )


def _is_sweep(path: Path, name: str) -> bool:
    """Whether a file is the list of runs that Hydra writes for a sweep of this command."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        return OmegaConf.select(OmegaConf.load(path), "hydra.job.name") == name
    except Exception:  # any error means that it is another file
        return False
