"""Files for programs are JSON: null where there is no number."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import strict_json

from deconvnet.monitoring.monitor import Monitor, _truncate_metrics
from deconvnet.monitoring.statistics import EpochStats, LayerResult, RankLoad
from deconvnet.monitoring.strict_json import to_json


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.nan])
def test_what_is_no_number_is_null_wherever_it_is(value):
    assert to_json(value) == "null"
    assert to_json({"a": [1.5, (value, {"b": value})]}) == '{"a": [1.5, [null, {"b": null}]]}'
    assert to_json(torch.tensor(float(value))) == "null"


def test_what_is_a_number_or_text_is_written_as_it_is():
    value = {"a": [1, -2.5, True, None, "NaN"], "b": {}}
    assert to_json(value, indent=1) == json.dumps(value, indent=1)
    assert to_json([np.float32(0.5), np.int64(3), np.float64(0.1)]) == "[0.5, 3, 0.1]"
    assert to_json({"text": "é"}, ensure_ascii=False) == '{"text": "é"}'


def stats(epoch, number):
    load = RankLoad({"inference": number}, number)
    return EpochStats(1, epoch, 4, number, number, -number, 0.0, 0, 0, number, (load,))


def test_the_metrics_of_a_run_on_black_images_are_json_and_the_run_goes_on_from_them(tmp_path):
    with Monitor(tmp_path, progress=False) as monitor:
        monitor.start(0)
        monitor.layer(1, 0, 4)
        monitor.epoch(stats(1, math.nan), 1)
        monitor.epoch(stats(2, math.inf), 2)
        monitor.result(LayerResult(1, math.nan, -math.inf, 0.0, 3, 1.0), torch.zeros(0), 2)
    path = tmp_path / "metrics.jsonl"
    lines = [strict_json(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert lines[0]["snr"] is None and lines[2]["result"]["snr"] is None
    _truncate_metrics(path, 1, 1)
    assert len(path.read_text().splitlines()) == 1


def test_metrics_that_an_earlier_version_wrote_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Monitor(tmp_path, progress=False) as monitor:
        monitor.start(0)
        monitor._append_metrics(1, snr=1.0)
    path.write_text(path.read_text() + '{"step": 2, "snr": -Infinity}\n{"step": 3, "snr": NaN}\n')
    _truncate_metrics(path, 2, 1)
    assert len(path.read_text().splitlines()) == 2
