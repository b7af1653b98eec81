"""What is logged, read back; what it looks like is seen in the browser's test."""

import io
import itertools
import math
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
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
    with Monitor(tmp_path, {}, several=True) as monitor:
        for epoch in range(5, 8):
            monitor.log(record(epoch, 0.8), record(epoch, 0.9))
    (path,) = tmp_path.iterdir()
    events = [e for e in EventFileLoader(str(path)).Load() if e.summary.value]
    by_event = [{value.tag for value in event.summary.value} for event in events]
    means = set(scalars(record(0, 0.8)))
    names = ("accuracy/test", "accuracy/validation", "loss/test", "loss/validation")
    first = {f"first_epochs/{name}" for name in names}
    points = [
        tags | {f"upper_and_lower/{tag}/{end}" for tag in tags for end in ("lower", "upper")}
        for tags in (means | first, means, means)
    ]
    texts = [{"config/text_summary"}, {"custom_scalars__config__"}]
    assert by_event == [texts[0], points[0], texts[1], *points[1:]]
    assert [events[number].step for number in (1, 3, 4)] == [5, 6, 7]


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
    with Monitor(tmp_path, several=True) as monitor:
        monitor.log(record(1, 0.8), record(1, 0.82))
    events = read(tmp_path)
    ends = [f"upper_and_lower/accuracy/test/{end}" for end in ("lower", "upper")]
    mean, low, high = (events.Scalars(tag)[0].value for tag in ("accuracy/test", *ends))
    assert mean == pytest.approx(0.81)
    assert low < mean < high and mean - low == pytest.approx(high - mean, rel=1e-4)
    helpers = [tag for tag in events.Tags()["scalars"] if "upper" in tag or "lower" in tag]
    curves = set(events.Tags()["scalars"]) - set(helpers)
    assert all(tag.startswith("upper_and_lower/") for tag in helpers)
    assert len(helpers) == 2 * len(curves)


def test_bands_of_shares_stay_within_0_and_1(tmp_path):
    with Monitor(tmp_path, several=True) as monitor:
        monitor.log(record(1, 1.0, slowdown=0.0), record(1, 0.7, slowdown=0.2))
    events = read(tmp_path)
    for tag in ("accuracy/test", "first_epochs/accuracy/test", "slowdown/layer1"):
        low, high = (
            events.Scalars(f"upper_and_lower/{tag}/{end}")[0].value for end in ("lower", "upper")
        )
        assert 0 < low < events.Scalars(tag)[0].value < high < 1


def test_the_band_of_a_single_network_among_several_is_its_curve(tmp_path):
    """TensorBoard complains of a run that lacks some of the tags of a margin chart."""
    with Monitor(tmp_path, several=True) as monitor:
        monitor.log(record(0, 0.8))
    events = read(tmp_path)
    for tag in (
        "accuracy/test",
        *(f"upper_and_lower/accuracy/test/{e}" for e in ("lower", "upper")),
    ):
        assert [e.value for e in events.Scalars(tag)] == [pytest.approx(0.8)]


def test_first_epochs_end(tmp_path):
    with Monitor(tmp_path, several=True) as monitor:
        for epoch in range(8):
            monitor.log(record(epoch, 0.1), record(epoch, 0.1))
    events = read(tmp_path)
    assert [e.step for e in events.Scalars("first_epochs/accuracy/test")] == [0, 1, 2, 3, 4, 5]
    assert [e.step for e in events.Scalars("accuracy/test")] == list(range(8))


def test_options_that_are_as_usual_are_not_among_the_hyperparameters(tmp_path):
    from tensorboard.plugins.hparams import metadata

    config = {"loss": "quadratic", "lr": 3.0, "init": "scaled", "l2": 0.5, "engine": "backprop"}
    constant = {"data": "digits", "hidden": [30], "gamma": None, "dtype": "float32", "seed": 1}
    with Monitor(tmp_path) as monitor:
        monitor.log_hparams({**config, **constant, "momentum": 0.9}, record(3, 0.9))
    (path,) = tmp_path.glob("*.closing")
    contents = {
        value.tag: value.metadata.plugin_data.content
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    }
    session = metadata.parse_session_start_info_plugin_data(
        contents[metadata.SESSION_START_INFO_TAG]
    )
    assert set(session.hparams) == {"loss", "rate", "start", "λ", "engine", "momentum"}
    assert session.hparams["rate"].number_value == 3.0
    experiment = metadata.parse_experiment_plugin_data(contents[metadata.EXPERIMENT_TAG])
    assert [(info.name.tag, info.display_name) for info in experiment.metric_infos] == [
        ("accuracy/test", "test accuracy"),
        ("accuracy/validation", "validation accuracy"),
        ("loss/test", "test loss"),
    ]


def test_histograms_at_some_epochs_alone(tmp_path, digits):
    network = nnce.MLP((64, 10))
    with Monitor(tmp_path, {}) as monitor:
        for epoch in (0, 1, 4):
            monitor.log_histograms(network, digits.validation, "quadratic", epoch)
    events = read(tmp_path)
    assert set(events.Tags()["histograms"]) == {"output/z", "output/a", "output/dz"}
    assert [e.step for e in events.Histograms("output/dz")] == [0, 1]
    assert events.Histograms("output/z")[0].histogram_value.num == 10 * len(digits.validation.x)


def test_weights_that_are_all_0_are_drawn_grey(tmp_path, digits, drawn):
    network = nnce.MLP((64, 10))
    with torch.no_grad():
        network[0].weight.zero_()
    with Monitor(tmp_path, {}) as monitor:
        monitor.log_images(network, digits.test, 0)
    assert set(read(tmp_path).Tags()["images"]) >= {"wrong", "confusion"}


def test_the_last_row_of_weights_has_no_black_tiles(tmp_path, digits):
    """Of 10 neurons the second row of 8 has 2."""
    with Monitor(tmp_path, {}) as monitor:
        monitor.log_images(nnce.MLP((64, 10)), digits.test, 0)
    (event,) = read(tmp_path).Images("weights/layer1")
    image = Image.open(io.BytesIO(event.encoded_image_string)).convert("L")
    tile = event.width // 8
    assert (event.width, event.height) == (8 * tile, 2 * tile)
    missing = image.crop((2 * tile, tile, 8 * tile, 2 * tile))
    assert missing.getextrema() == (255, 255)


def test_of_a_wide_layer_some_neurons_are_drawn(tmp_path, digits):
    with Monitor(tmp_path, {}) as monitor:
        monitor.log_images(nnce.MLP((64, 500, 10)), digits.test, 0)
    (event,) = read(tmp_path).Images("weights/layer1")
    assert event.height * event.width <= 100 * 60 * 60
