"""TensorBoard shows all points of a run whatever the clock did; a full disk is an error at once."""

import errno
import io
import itertools

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.summary.writer.record_writer import RecordWriter

from deconvnet.monitoring import event_files
from deconvnet.monitoring.event_files import event_writer
from deconvnet.monitoring.monitor import Monitor
from deconvnet.monitoring.statistics import EpochStats
from deconvnet.storage import ownership

NOW = 1_800_000_000


def stats(epoch):
    return EpochStats(1, epoch, 9, float(epoch), 0.0, 1.0, 0.5, 0, 0, 1.0)


def learn(folder, steps):
    """What a run shows if it resumes before the first of these steps and is then stopped."""
    with Monitor(folder, progress=False) as monitor:
        monitor.start(steps[0] - 1)
        monitor.layer(1, 0, 9)
        for step in steps:
            monitor.epoch(stats(step), step)


def curve(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars("layer1/objective")]


@pytest.mark.parametrize("later", [0, 1, 3600, -1, -30 * 86400, -57 * 365 * 86400, 5 * 365 * 86400])
def test_all_points_of_a_resumed_run_are_shown_whatever_the_clock_did(tmp_path, monkeypatch, later):
    clock = itertools.count(NOW)
    monkeypatch.setattr(event_files.time, "time", lambda: float(next(clock)))
    learn(tmp_path, [1, 2, 3])
    clock = itertools.count(max(NOW + later, 0))
    learn(tmp_path, [4, 5])
    # Killed after step 5, which no checkpoint has: it is shown once, as it was learned again.
    learn(tmp_path, [5, 6])
    expected = [(step, float(step)) for step in range(1, 7)]
    assert curve(tmp_path) == expected
    multiplexer = EventMultiplexer(size_guidance={"scalars": 0})
    multiplexer.AddRunsFromDirectory(str(tmp_path), "run").Reload()
    (run,) = multiplexer.Runs()
    found = multiplexer.Scalars(run, "layer1/objective")
    assert [(event.step, event.value) for event in found] == expected


def test_what_is_said_can_be_seen_at_once_and_the_file_is_ours(tmp_path):
    writer = event_writer(tmp_path, purge_step=1)
    writer.add_scalar("layer1/objective", 3.0, 1)
    writer.add_image("picture", torch.rand(3, 4, 5), 1)
    writer.add_histogram("values", torch.rand(9), 1)
    writer.add_text("words", "text", 1)
    assert curve(tmp_path) == [(1, 3.0)]
    (path,) = tmp_path.glob("events.out.tfevents.*")
    assert ownership.is_ours(path)
    writer.close()


def test_every_byte_of_a_file_is_what_tensorboards_own_writer_writes(tmp_path):
    writer = event_writer(tmp_path)
    writer.add_scalar("layer1/objective", 3.0, 1)
    writer.add_image("picture", torch.rand(3, 40, 50), 1)
    writer.close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    again = io.BytesIO()
    records = RecordWriter(again)
    for event in RawEventFileLoader(str(path)).Load():
        records.write(event)
    assert len(again.getvalue()) > 5_000
    assert again.getvalue() == path.read_bytes()


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, capfd):
    writer = event_writer(tmp_path)

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    writer.file_writer._file.close()
    writer.file_writer._file = Full()
    with pytest.raises(OSError, match=r"No space left on device: '.*events\.out\.tfevents"):
        writer.add_scalar("a", 1.0, 1)
    writer.close()
    assert capfd.readouterr().err == ""
