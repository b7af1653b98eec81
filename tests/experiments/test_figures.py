"""That every figure draws what it is given; what they look like is seen in the browser's test."""

import itertools
import math

import pytest
import torch
import toys
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nnce import data
from nnce.experiments import figures
from nnce.experiments.side_by_side import Run
from nnce.monitoring.saturation import LayerFigures
from nnce.training import Record, Settings

pytestmark = pytest.mark.usefixtures("drawn")


def test_the_atlas_marks_where_bce_loss_ends():
    _, curves = toys.measured(torch.float32)
    atlas = figures.saturation_atlas(curves[:1], curves[1:2], curves[2:3])
    labels = [line.get_label() for line in atlas.axes[0].lines]
    assert "cross-entropy, nnce" in labels and "BCELoss of σ(z)" in labels
    ends = [line for line in atlas.axes[0].lines if line.get_marker() == "x"]
    assert len(ends) == 1 and 15 < float(ends[0].get_xdata()[0]) < 17


def test_confusion_counts_every_example(digits):
    counts = torch.diag(digits.test.y.sum(0).long())
    counts[3, 5] = 2
    figure = figures.confusion_matrix(counts.tolist())
    assert figure.axes[0].get_title() == "300 of 302 correct"
    texts = figure.axes[0].texts
    assert sum(int(text.get_text()) for text in texts) == 302
    assert min(text.get_fontsize() for text in texts) * figure.dpi / 72 >= 12  # pixels


def test_counts_of_four_digits_fit_their_cells(digits):
    figure = figures.confusion_matrix(torch.eye(10).long().mul(1_100).tolist())
    FigureCanvasAgg(figure).draw()
    (panel,) = figure.axes
    cell = panel.get_window_extent().width / 10
    assert all(text.get_window_extent().width <= cell for text in panel.texts)


def test_learning_curves_have_whole_epochs_titles_and_no_legend_over_curves():
    runs = [
        Run(
            Settings(loss=loss, lr=lr, seed=seed, epochs=3), None, [record(n, lr) for n in range(4)]
        )
        for loss in ("quadratic", "cross-entropy")
        for lr in (1.0, 3.0)
        for seed in range(2)
    ]
    best = {"quadratic": 3.0, "cross-entropy": 1.0}
    figure = figures.learning_curves(runs, best, "title")
    FigureCanvasAgg(figure).draw()
    by_epoch, _, meter = figure.axes
    for panel in (by_epoch, meter):
        assert all(tick == int(tick) for tick in panel.get_xticks())
    assert all(panel.get_legend() is None and panel.get_title() for panel in figure.axes)
    assert "slowdown" in meter.get_title().lower()
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["cross-entropy, rate 1", "quadratic, rate 3"]
    box = legend.get_window_extent()
    assert not any(box.overlaps(panel.get_window_extent()) for panel in figure.axes)


def test_training_curves_have_every_epoch_of_loss_accuracy_and_slowdown():
    records = [record(n, 0.7) for n in range(4)]
    figure = figures.training_curves(records, "title")
    FigureCanvasAgg(figure).draw()
    for panel, names in zip(
        figure.axes, [["train", "validation", "test"]] * 2 + [["layer 1"]], strict=True
    ):
        *curves, best = panel.lines
        assert [line.get_label() for line in curves] == names
        assert all(list(line.get_xdata()) == [0, 1, 2, 3] for line in curves)
        assert best.get_xdata()[0] == 3
        assert all(tick == int(tick) for tick in panel.get_xticks())
    loss, accuracy, slowdown = (panel.lines[0].get_ydata() for panel in figure.axes)
    assert list(loss) == [one.loss["train"] for one in records]
    assert list(accuracy) == [100 * one.accuracy["train"] for one in records]
    assert list(slowdown) == [0.2] * 4
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert not any(box.overlaps(panel.get_window_extent()) for panel in figure.axes)


def record(epoch, lr):
    splits = dict.fromkeys(("train", "validation", "test"), min(1.0, 0.1 + 0.2 * epoch * lr))
    return Record(epoch, epoch, 0.0, splits, splits, [LayerFigures(1.0, 0.2, 0.1, 0.2)])


def test_wrong_examples_are_the_most_confident_ones(digits):
    x, y = digits.test
    z = 10 * y - 5
    none = figures.wrong_examples(digits.test, z)
    assert none.get_suptitle() == "All examples are classified correctly"
    z[3] = 0.1 * z[3].roll(1)  # wrong, but not so confidently
    z[7] = z[7].roll(1)
    shown = figures.wrong_examples(data.Split(x, y), z, count=1)
    label = int(y[7].argmax())
    images, outputs, deltas = shown.axes
    (title,) = images.texts
    assert title.get_text() == f"{label}, predicted {(label + 1) % 10}"
    (image,) = images.get_images()
    assert (image.get_array() == x[7].view(8, 8).numpy()).all()
    a = 1 / (1 + (-z[7].double()).exp())
    heights = torch.tensor([bar.get_height() for bar in outputs.patches])
    assert torch.allclose(heights[:10].double(), a, atol=1e-6)
    for line, factor in zip(deltas.lines, (1, a * (1 - a)), strict=True):
        drawn = torch.tensor(line.get_ydata()[:10], dtype=torch.float64)
        assert torch.allclose(drawn, (a - y[7]) * factor, atol=1e-6)


def test_wrong_examples_are_apart_and_the_legend_is_below_them(digits):
    """Each at its own ticks, with its own image between the same lines."""
    z = (10 * digits.test.y - 5).roll(1, 1)
    figure = figures.wrong_examples(digits.test, z)
    FigureCanvasAgg(figure).draw()
    images, outputs, deltas = figure.axes
    assert len(images.texts) == len(images.get_images()) == 8
    lines = [-1, *(float(line[0, 0]) for line in outputs.collections[0].get_segments()), 87]
    for (left, right), image, title in zip(
        itertools.pairwise(lines), images.get_images(), images.texts, strict=True
    ):
        first, last, *_ = image.get_extent()
        assert left < first < title.get_position()[0] < last < right
    ticks = [
        (tick, label.get_text())
        for tick, label in zip(deltas.get_xticks(), deltas.get_xticklabels(), strict=True)
    ]
    assert ticks == [(11 * k + c, str(c)) for k in range(8) for c in range(0, 10, 2)]
    (legend,) = figure.legends
    box = legend.get_window_extent()
    below = [deltas.xaxis.label, *deltas.get_xticklabels(), deltas]
    assert not any(box.overlaps(artist.get_window_extent()) for artist in below)


@pytest.mark.parametrize(("features", "classes"), [(60, 4), (64, 2), (64, 30)])
def test_titles_of_wrong_examples_are_in_the_figure(features, classes):
    """Also where there is no image, and pixels are square, however many classes there are."""
    generator = torch.Generator().manual_seed(0)
    y = torch.eye(classes)[torch.arange(50) % classes]
    x, z = torch.rand(50, features, generator=generator), y.roll(1, 1)
    figure = figures.wrong_examples(data.Split(x, y), z)
    FigureCanvasAgg(figure).draw()
    images = figure.axes[0]
    assert len(images.texts) == 8
    for title in images.texts:
        box = title.get_window_extent()
        assert box.y0 > 0 and box.y1 < figure.bbox.height
    for image in images.get_images():
        left, right, bottom, top = image.get_extent()
        corners = images.transData.transform([(left, bottom), (right, top)])
        width, height = corners[1] - corners[0]
        assert width == pytest.approx(height)


def test_a_single_neurons_story():
    stories = [("start", {"quadratic": ([1.0, 0.9], [0.5, 0.4], [0.1, 0.2])})]
    figure = figures.single_neuron(stories)
    assert [list(panel.lines[0].get_ydata()) for panel in figure.axes] == [
        [1.0, 0.9],
        [0.5, 0.4],
        [0.1, 0.2],
    ]


def test_distortions_are_drawn_below_what_they_are_of(digits):
    distortion = data.Distortion(alpha=20, sigma=2)
    figure = figures.distortions(digits.train.x, distortion, examples=3, each=2)
    drawn = [panel.get_images()[0].get_array() for panel in figure.axes]
    assert len(drawn) == 9
    for column in range(3):
        image = digits.train.x[column].view(8, 8).numpy()
        first, *below = drawn[column::3]
        assert abs(first - image).max() < 1e-6
        for one, other in ((first, below[0]), (first, below[1]), below):
            assert abs(one - other).max() > 0.05


def test_a_reproduced_table_is_drawn():
    """Most of ours and the published figures are within the edges; outliers are at them."""
    ours = [95.0 + 0.01 * number for number in range(20)]
    rows = [("A", 95.5, [*ours, 60.0]), ("B", None, [96.0, math.nan]), ("C", 97.0, [])]
    figure = figures.reproduced(rows, "accuracy")
    (panel,) = figure.axes
    left, right = panel.get_xlim()
    assert 94 < left < 95 and 97 < right < 98
    points = {}
    for line in panel.lines:
        points.setdefault(line.get_label(), []).extend(zip(*line.get_data(), strict=True))
    assert sorted(points["ours"]) == [*((x, 0) for x in ours), (96.0, 1)]
    assert points["ours, off the scale"] == [(left, 0)]
    assert points["published"] == [(95.5, 0), (97.0, 2)]
    assert points["median"] == [(pytest.approx(95.09), 0), (96.0, 1)]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["A", "B", "C"]
    assert panel.get_title() == "accuracy"


@pytest.mark.parametrize("ours", [[], [95.0], [95.0, 95.0], [95.0, 96.0]])
def test_a_reproduced_table_of_few_starts_has_all_its_points(ours):
    (panel,) = figures.reproduced([("A", None, ours)], "accuracy").axes
    left, right = panel.get_xlim()
    assert left < right and all(left < value < right for value in ours)
    assert sum(len(line.get_xdata()) for line in panel.lines if line.get_label() == "ours") == len(
        ours
    )
