"""What is logged, read back; what it looks like is seen in the browser's test."""

import itertools
import math
import time
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.summary.writer import event_file_writer

import nnce
from nnce.experiments.tensorboard import Monitor, scalars
from nnce.monitoring.saturation import LayerFigures
from nnce.training import Record


def record(epoch, accuracy, slowdown=0.1):
    splits = ("train", "validation", "test")
    return Record(
        epoch=epoch,
        step=10 * epoch,
        seconds=1.0,
        loss=dict.fromkeys(splits, 0.5),
        accuracy=dict.fromkeys(splits, accuracy),
        layers=[LayerFigures(1.0, 0.2, 0.0, slowdown)],
    )


def read(path):
    return EventAccumulator(str(path), size_guidance={"histograms": 0}).Reload()


def test_scalars_are_the_documented_tags():
    tags = scalars(record(0, 0.9))
    assert tags["accuracy/test"] == 0.9 and tags["dz_norm/layer1"] == 1.0
    assert len(tags) == 2 * 3 + 4


def test_one_network_has_curves_and_no_bands(tmp_path):
    with Monitor(tmp_path, {"lr": 0.5}) as monitor:
        monitor.log(record(0, 0.1, slowdown=math.nan))
        monitor.log(record(1, 0.9))
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == set(scalars(record(0, 0.9)))
    assert [(e.step, e.value) for e in events.Scalars("accuracy/test")] == [
        (0, pytest.approx(0.1)),
        (1, pytest.approx(0.9)),
    ]
    assert [e.step for e in events.Scalars("slowdown/layer1")] == [1]  # NaN is no point


def test_an_epoch_is_one_event(tmp_path):
    with Monitor(tmp_path, {}) as monitor:
        for epoch in range(3):
            monitor.log(record(epoch, 0.8), record(epoch, 0.9))
    (path,) = tmp_path.iterdir()
    events = [e for e in EventFileLoader(str(path)).Load() if e.summary.value]
    by_event = [{value.tag for value in event.summary.value} for event in events]
    means = set(scalars(record(0, 0.8)))
    bands = {f"{band}/{tag}" for band in ("mean", "lower", "upper") for tag in means}
    assert by_event == [{"config/text_summary"}, *[means | bands] * 3]
    assert [event.step for event in events[1:]] == [0, 1, 2]


@pytest.mark.parametrize("number", [5, 9])
def test_the_end_of_a_run_that_went_on_is_read_after_its_curves(
    number, tmp_path, digits, monkeypatch
):
    """Also where its file is of the same second, and a name ends in 10 and the other in 9."""
    with Monitor(tmp_path, {}) as monitor:
        monitor.log(record(0, 0.1))
    counter = SimpleNamespace(get=itertools.count(number).__next__)
    monkeypatch.setattr(event_file_writer, "_global_uid", counter)
    now = math.ceil(time.time())
    monkeypatch.setattr(time, "time", lambda: now)
    with Monitor(tmp_path, {}, [[record(0, 0.1)]]) as monitor:
        monitor.log(record(1, 0.9))
        monitor.log_images(nnce.MLP((64, 10)), digits.test, 1)
    monkeypatch.undo()
    events = read(tmp_path)
    assert [e.step for e in events.Scalars("accuracy/test")] == [0, 1]
    assert [e.step for e in events.Images("weights/layer1")] == [1]
    assert sum(path.suffix == ".closing" for path in tmp_path.iterdir()) == 1


def test_several_networks_have_their_mean_and_its_band(tmp_path):
    with Monitor(tmp_path, {}) as monitor:
        monitor.log(record(1, 0.8), record(1, 0.9))
    events = read(tmp_path)
    mean, low, high = (
        events.Scalars(f"{band}/accuracy/test")[0].value for band in ("mean", "lower", "upper")
    )
    assert mean == pytest.approx(0.85) == events.Scalars("accuracy/test")[0].value
    assert low < mean < high and mean - low == pytest.approx(high - mean, rel=1e-4)


def test_histograms_at_some_epochs_alone(tmp_path, digits):
    network = nnce.MLP((64, 10))
    with Monitor(tmp_path, {}) as monitor:
        for epoch in (0, 1, 4):
            monitor.log_histograms(network, digits.validation, "quadratic", epoch)
    events = read(tmp_path)
    assert set(events.Tags()["histograms"]) == {"output/z", "output/a", "output/dz"}
    assert [e.step for e in events.Histograms("output/dz")] == [0, 1]
    assert events.Histograms("output/z")[0].histogram_value.num == 10 * len(digits.validation.x)


def test_weights_that_are_all_0_are_drawn_grey(tmp_path, digits):
    network = nnce.MLP((64, 10))
    with torch.no_grad():
        network[0].weight.zero_()
    with Monitor(tmp_path, {}) as monitor:
        monitor.log_images(network, digits.test, 0)
    assert set(read(tmp_path).Tags()["images"]) >= {"wrong", "confusion"}


def test_of_a_wide_layer_some_neurons_are_drawn(tmp_path, digits):
    with Monitor(tmp_path, {}) as monitor:
        monitor.log_images(nnce.MLP((64, 500, 10)), digits.test, 0)
    (event,) = read(tmp_path).Images("weights/layer1")
    assert event.height * event.width <= 100 * 60 * 60
