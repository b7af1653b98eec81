"""That every figure draws what it is given; what they look like is seen in the browser's test."""

import torch

from nnce import data, precision
from nnce.experiments import figures


def test_the_atlas_marks_where_bce_loss_ends():
    _, curves = precision.measure(torch.float32)
    atlas = figures.saturation_atlas(curves[:1], curves[1:2])
    labels = [line.get_label() for line in atlas.axes[0].lines]
    assert "cross-entropy, nnce" in labels and "BCELoss of σ(z)" in labels
    ends = [line for line in atlas.axes[0].lines if line.get_marker() == "x"]
    assert len(ends) == 1 and 15 < float(ends[0].get_xdata()[0]) < 17


def test_confusion_counts_every_example(digits):
    x, y = digits.test
    figure = figures.confusion_matrix(digits.test, 10 * y - 5)
    assert figure.axes[0].get_title() == "300 of 300 right"
    assert sum(int(text.get_text()) for text in figure.axes[0].texts) == len(x)


def test_wrong_examples_are_the_most_confident_ones(digits):
    x, y = digits.test
    z = 10 * y - 5
    none = figures.wrong_examples(digits.test, z)
    assert none.get_suptitle() == "No example is classified wrongly"
    z[3] = 0.1 * z[3].roll(1)  # wrong, but not so confidently
    z[7] = z[7].roll(1)
    shown = figures.wrong_examples(data.Split(x, y), z, count=1)
    label = int(y[7].argmax())
    assert shown.axes[0].get_title() == f"{label} taken for {(label + 1) % 10}"


def test_a_single_neurons_story():
    stories = [("start", {"quadratic": ([1.0, 0.9], [0.5, 0.4], [0.1, 0.2])})]
    figure = figures.single_neuron(stories)
    assert [list(panel.lines[0].get_ydata()) for panel in figure.axes] == [
        [1.0, 0.9],
        [0.5, 0.4],
        [0.1, 0.2],
    ]
