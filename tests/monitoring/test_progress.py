"""What a run says of its epochs: a bar on a terminal of any width, lines in files."""

import io
import itertools
import logging
import sys
from types import SimpleNamespace

import pytest

from deconvnet.monitoring import monitor
from deconvnet.monitoring.monitor import Monitor, not_in_bar
from deconvnet.monitoring.statistics import EpochStats


class Terminal(io.StringIO):
    def isatty(self):
        return True


def stats(epoch, layer=1):
    return EpochStats(layer, epoch, 12, 1234.0, 0.5, 10.08, 0.12, 2, 0, 1.0)


def learn(folder=None, *, progress=True, epochs=range(1, 13)):
    with Monitor(folder, progress=progress) as shown:
        shown.start(0)
        shown.layer(1, 0, 12)
        for epoch in epochs:
            shown.advance()
            shown.epoch(stats(epoch), epoch)


@pytest.mark.parametrize("columns", [40, 60, 100, 200])
def test_the_figures_that_matter_fit_on_a_terminal_of_any_width(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stderr", Terminal())
    learn()
    last = sys.stderr.getvalue().split("\r")[-1].rstrip()
    assert len(last) <= columns
    for part in ("layer 1", "12/12", "1234.5", "10.1 dB"):
        assert part in last
    assert ("density 12.0%, 2 dead" in last) == (columns == 200)


@pytest.mark.parametrize("progress", [True, False])
def test_in_a_file_there_is_a_line_for_epochs_and_no_bar(progress, monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(monitor, "LOG_INTERVAL", 0)
    with caplog.at_level(logging.INFO):
        learn(progress=progress)
    assert sys.stderr.getvalue() == ""
    assert len(caplog.records) == 12 and all(map(not_in_bar, caplog.records))
    expected = "layer 1, epoch 12/12: objective 1234.5, SNR 10.1 dB, density 12.0%, 2 dead"
    assert caplog.messages[-1] == expected


def test_fast_epochs_have_few_lines_but_the_last_has_one(monkeypatch, caplog):
    # A second on each look, of which there is one an epoch.
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)))
    monkeypatch.setattr(monitor, "time", clock)
    with caplog.at_level(logging.INFO):
        learn(progress=False)
    said = [int(line.split("epoch ")[1].split("/")[0]) for line in caplog.messages]
    assert said == [1, 6, 11, 12]
    # A second for an epoch, of which eleven, six, one and none are left.
    assert [line.partition("2 dead")[2] for line in caplog.messages] == [
        *(f", 00:{left:02} left in layer 1 of 1" for left in (11, 6, 1)),
        "",
    ]


def test_what_the_bar_shows_is_not_printed_again_but_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with caplog.at_level(logging.INFO):
        learn()
    assert caplog.records and not any(map(not_in_bar, caplog.records))
