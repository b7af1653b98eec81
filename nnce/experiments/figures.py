"""Plots with matplotlib; each function returns a figure, which the caller saves or logs.

matplotlib is imported with the first figure, because runs need it only at their end.
"""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from nnce import data, rules
from nnce.experiments.estimates import PERCENT, SHARE, Limits, estimate
from nnce.experiments.proof.precision import Curve
from nnce.experiments.side_by_side import Run, Variant, by_variant
from nnce.losses import Loss
from nnce.training import Record, best_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _new_figure(width: float, height: float, **margins: float) -> Figure:
    """A figure of this size in inches, with a constrained layout unless margins are given.

    A constrained layout measures all texts and draws everything twice.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=None if margins else "constrained")
    if margins:
        figure.subplots_adjust(**margins)
    return figure


def as_png(figure: Figure, dpi: float = 100) -> bytes:
    """Draw a figure, and encode it as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def _use_integer_ticks(panel: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def saturation_atlas(
    cross_entropy: Sequence[Curve], quadratic: Sequence[Curve], focal: Sequence[Curve]
) -> Figure:
    """Plot |dC/dz| against z for y = 0, exact and as computed, in one panel per dtype."""
    figure = _new_figure(11, 7)
    panels = figure.subplots(2, 2, squeeze=False).flatten()
    for panel, ours, slow, focused in zip(panels, cross_entropy, quadratic, focal, strict=False):
        z = ours.z.double()
        shown = (z >= -30) & (z <= 60)
        lines = {
            "cross-entropy, exact": (ours.exact, "black", "-", 5.0),
            "quadratic, exact": (slow.exact, "0.6", "-", 5.0),
            "focal, exact": (focused.exact, "C2", "-", 5.0),
            "cross-entropy, nnce": (ours.computed["nnce"], "C0", "-", 1.8),
            "quadratic, nnce": (slow.computed["nnce"], "C1", "-", 1.8),
            "focal, nnce": (focused.computed["nnce"], "C2", "-", 1.8),
        }
        if "BCELoss of σ(z)" in ours.computed:
            lines["BCELoss of σ(z)"] = (ours.computed["BCELoss of σ(z)"], "C3", "--", 1.8)
        for label, (values, color, style, width) in lines.items():
            y = values[shown].double().abs()
            panel.plot(
                z[shown],
                y.where(y > 0, float("nan")),
                style,
                color=color,
                lw=width,
                label=label,
                alpha=0.3 if "exact" in label else 1.0,
            )
            if label.startswith("BCELoss"):
                end = int((y > 0).nonzero()[-1])
                panel.plot(z[shown][end], y[end], "x", color=color, ms=9, mew=2)
        panel.set_yscale("log")
        panel.set_ylim(1e-14, 10)
        panel.set_title(ours.dtype)
        panel.set_xlabel("z (target y = 0)")
        panel.set_ylabel("|dC/dz|")
        panel.grid(alpha=0.3)
    _legend_below(figure, panels[0])
    figure.suptitle("The saturation atlas: where a line ends, the gradient is exactly 0")
    return figure


def wrong_examples(split: data.Split, z: Tensor, count: int = 8) -> Figure:
    """Plot the most confidently misclassified examples, with dC/dz of both losses.

    Args:
        split: inputs (drawn if they are square images) and one-hot targets.
        z: logits of the network for all examples.
        count: largest number of examples.
    """
    x, y = split
    a = rules.sigmoid(z)
    predicted, true = a.argmax(-1), y.argmax(-1)
    # Lead of the predicted class over the right one.
    lead = (a.amax(-1) - a[torch.arange(len(a), device=a.device), true]) * (predicted != true)
    order = lead.argsort(descending=True)[: min(count, int((predicted != true).sum()))]
    figure = _new_figure(11, 5, left=0.052, right=0.995, bottom=0.15, top=0.905, hspace=0.1)
    if not len(order):
        figure.suptitle("All examples are classified correctly")
        return figure
    # A panel for each example would take ten times as long. The examples are side by side, with a
    # gap of one class.
    classes, slots = y.shape[1], len(order) * (y.shape[1] + 1)
    first, at = range(0, slots, classes + 1), range(slots)
    images, outputs, deltas = figure.subplots(3)
    titles = [f"{true[i]}, predicted {predicted[i]}" for i in order]
    _show_images(images, x[order], titles, classes + 1)

    def joined(values: Tensor) -> list[float]:
        return pad(values[order].double(), (0, 1), value=math.nan).flatten().tolist()

    outputs.bar(at, pad(a[order], (0, 1)).flatten().tolist(), color="0.6")
    outputs.step(at, joined(y), where="mid", color="black", lw=0.8)
    slow, fast = (rule(z, y) for rule in (rules.dz_quadratic, rules.dz_cross_entropy))
    deltas.plot(at, joined(fast), "o", ms=3, color="C0", label="cross-entropy")
    deltas.plot(at, joined(slow), "x", ms=4, color="C1", label="quadratic")
    shown = range(0, classes, max(1, classes // 5))
    ticks = [left + c for left in first for c in shown]
    deltas.set_xticks(ticks, [*shown] * len(order))
    outputs.set_xticks([])
    for panel in (images, outputs, deltas):
        between, height = [left - 1 for left in first[1:]], panel.get_xaxis_transform()
        panel.vlines(between, 0, 1, "0.8", transform=height)
        panel.tick_params(labelsize=7)
        panel.set_xlim(-1, slots - 1)
    deltas.set_xlabel("output neuron", fontsize=8)
    outputs.set_ylabel("output a, target y")
    deltas.set_ylabel("dC/dz")
    _legend_below(figure, deltas)
    figure.suptitle("The most confidently misclassified examples, and dC/dz of each loss")
    return figure


def _show_images(panel: Axes, x: Tensor, titles: Sequence[str], slot: int) -> None:
    """Show images side by side, with square pixels, each in a slot of this width that begins at −1.

    If the number of inputs is not a square, only the titles are shown.
    """
    side = math.isqrt(x.shape[1])
    high = len(x) * slot * panel.bbox.height / panel.bbox.width  # the panel's height in units of x
    wide = min(high, slot - 1)
    for k, (image, title) in enumerate(zip(x, titles, strict=True)):
        middle = (k + 0.5) * slot - 1
        if side**2 == x.shape[1]:
            extent = (middle - wide / 2, middle + wide / 2, 0, wide / high)
            panel.imshow(image.view(side, side).tolist(), "gray_r", extent=extent, aspect="auto")
        above = panel.get_xaxis_transform()
        panel.text(middle, 1.04, title, fontsize=9, ha="center", transform=above)
    panel.set_ylim(0, 1)
    panel.set_axis_off()


def confusion_matrix(counts: Sequence[Sequence[int]]) -> Figure:
    """Plot the numbers of examples by true class (row) and predicted class (column)."""
    classes = len(counts)
    right = sum(counts[i][i] for i in range(classes))
    mistakes = [n for row, line in enumerate(counts) for n in [*line[:row], *line[row + 1 :]]]
    # The color scale is for the mistakes; correct cells are darker.
    darkest = 2 * max(1, *mistakes)
    figure = _new_figure(4.4, 4.9, left=0.07, right=0.99, bottom=0.095, top=0.93)
    panel = figure.subplots()
    panel.imshow(counts, cmap="Reds", vmin=0, vmax=darkest)
    if classes <= 20:
        for (row, line), column in itertools.product(enumerate(counts), range(classes)):
            if n := line[column]:
                color = "white" if 2 * n > darkest else "black"
                # 14 pixels; TensorBoard shrinks them to 12.
                panel.text(column, row, str(n), ha="center", va="center", color=color, fontsize=11)
        panel.set_xticks(range(classes))
        panel.set_yticks(range(classes))
    panel.tick_params(length=0, pad=2)
    panel.set_xlabel("row: true class; column: predicted class")
    panel.set_title(f"{right:,} of {sum(map(sum, counts)):,} correct")
    return figure


def distortions(x: Tensor, distortion: data.Distortion, examples: int = 8, each: int = 5) -> Figure:
    """Plot images in the first row, and several random distortions of each below.

    Args:
        x: images [n, side²]; the first ones are drawn.
        distortion: distortion to apply.
        examples: number of images.
        each: number of distortions per image.
    """
    side = math.isqrt(x.shape[1])
    first = x[:examples]
    generator = torch.Generator(x.device).manual_seed(0)
    rows = [first, *(distortion(first, generator) for _ in range(each))]
    figure = _new_figure(len(first), len(rows) + 0.6)
    panels = figure.subplots(len(rows), len(first), squeeze=False)
    for line, images in zip(panels, rows, strict=True):
        for panel, image in zip(line, images, strict=True):
            panel.imshow(image.view(side, side).tolist(), cmap="gray_r", vmin=0, vmax=1)
            panel.set_xticks([])
            panel.set_yticks([])
    panels[0, 0].set_ylabel("original", fontsize=8)
    figure.suptitle(str(distortion), fontsize=8)
    return figure


def reproduced(rows: Sequence[tuple[str, float | None, Sequence[float]]], title: str) -> Figure:
    """Plot the published result of each row, and ours from each start.

    Args:
        rows: name, published result (or None) and our results; NaN are not drawn.
        title: title of the figure, which names the measure.
    """
    figure = _new_figure(8, 1.2 + 0.4 * len(rows))
    panel = figure.subplots()
    finite = [[value for value in ours if math.isfinite(value)] for _, _, ours in rows]
    all_published = [published for _, published, _ in rows if published is not None]
    left, right = _limits_without_outliers(list(itertools.chain(*finite)), all_published)
    for height, ((_, published, _), ours) in enumerate(zip(rows, finite, strict=True)):
        for values, marker, label in (
            ([value for value in ours if left <= value <= right], "o", "ours"),
            ([left for value in ours if value < left], "<", "ours, off the scale"),
            ([right for value in ours if value > right], ">", "ours, off the scale"),
        ):
            at = [height] * len(values)
            if values:
                look: dict[str, Any] = {"ms": 4, "alpha": 0.5, "color": "C0", "clip_on": False}
                panel.plot(values, at, marker, **look, label=label)
        if ours:
            panel.plot(
                *([statistics.median(ours)], [height], "|"),
                ms=16,
                mew=2,
                color="C0",
                label="median",
            )
        if published is not None:
            panel.plot([published], [height], "D", ms=6, color="C1", label="published")
    panel.set_xlim(left, right)
    panel.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)
    _legend_below(figure, panel)
    panel.set_title(title, fontsize=10)
    return figure


def _limits_without_outliers(
    values: Sequence[float], published: Sequence[float]
) -> tuple[float, float]:
    """Axis limits that include all values except far outliers, with a margin.

    Far outliers (Tukey, Exploratory Data Analysis, 1977) are more than three interquartile ranges
    beyond a quartile: usually starts that got stuck.
    """
    near = values
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4)
        far = 3 * (high - low)
        near = [value for value in values if low - far <= value <= high + far]
    shown = [*near, *published] or [0.0]
    margin = 0.05 * (max(shown) - min(shown)) or 1.0
    return min(shown) - margin, max(shown) + margin


def learning_curves(runs: Sequence[Run], best: Mapping[Loss, float], title: str) -> Figure:
    """Plot test accuracy by epoch and by rate, and the slowdown meter, of both losses.

    Args:
        runs: all networks; diverged ones are excluded.
        best: the best rate of each loss.
        title: title of the figure.
    """
    variants = by_variant([run for run in runs if not run.diverged])
    figure = _new_figure(12, 4.6, left=0.05, right=0.99, bottom=0.18, top=0.84, wspace=0.24)
    by_epoch, by_lr, meter = figure.subplots(1, 3)
    shown: list[float] = []
    for color, loss in zip(("C0", "C1"), sorted(best), strict=False):
        chosen = variants[Variant(loss, best[loss])]
        of_loss = sorted(variant for variant in variants if variant.loss == loss)
        epochs = list(zip(*(run.records for run in chosen), strict=True))
        numbers = [records[0].epoch for records in epochs]
        accuracies = [[100 * one.accuracy["test"] for one in records] for records in epochs]
        slowdowns = [[one.layers[-1].slowdown for one in records] for records in epochs]
        last = [[100 * run.last.accuracy["test"] for run in variants[v]] for v in of_loss]
        label = f"{loss}, rate {best[loss]:g}"
        shown += _draw_band(by_epoch, numbers, accuracies, PERCENT, "-", color, label)[1:]
        _draw_band(by_lr, [variant.lr for variant in of_loss], last, PERCENT, "o-", color, "")
        _draw_band(meter, numbers, slowdowns, SHARE, "-", color, label)
    for panel in (by_epoch, by_lr, meter):
        panel.grid(alpha=0.3)
        if not best:
            panel.text(0.5, 0.5, "all diverged", ha="center", transform=panel.transAxes)
    for panel in (by_epoch, meter):
        panel.set_xlabel("epoch")
        _use_integer_ticks(panel)
    _legend_below(figure, by_epoch)
    by_epoch.set_title("Accuracy at the best rates", fontsize=10)
    by_lr.set_title("Final accuracy by rate", fontsize=10)
    meter.set_title(
        "Slowdown meter: ratio of dz, over examples\nthat are wrong by more than ½", fontsize=10
    )
    by_epoch.set_ylabel("test accuracy, %")
    if shown:  # epoch 0, at chance level, would compress the scale
        by_epoch.set_ylim(*_accuracy_limits(shown))
    by_lr.set_xscale("log")
    by_lr.set_xlabel("learning rate")
    by_lr.set_ylabel("test accuracy after the last epoch, %")
    meter.set_ylabel("‖dz quadratic‖ / ‖dz cross-entropy‖")
    meter.set_ylim(bottom=0)
    figure.suptitle(title)
    return figure


class HeatMap(NamedTuple):
    """Mean validation accuracy by the values of two options."""

    names: list[str]
    """Names of the two options."""
    values: list[list[str]]
    """Values of each option, in order."""
    accuracies: list[list[float]]
    """Accuracies in [0, 1] by value of the first option (row) and second option (column); NaN where
    networks diverged."""
    others: str
    """Values of the other options, as in --sweep."""


def heat_map(of: HeatMap) -> Figure:
    """Plot validation accuracy by two options of a sweep; NaN is left blank."""
    rows, columns = of.values
    figure = _new_figure(2.6 + 0.9 * len(columns), 2 + 0.5 * len(rows))
    panel = figure.subplots()
    percents = [[100 * share for share in row] for row in of.accuracies]
    drawn = panel.imshow(percents, cmap="viridis", aspect="auto")
    low, high = drawn.get_clim()
    for (y, row), x in itertools.product(enumerate(percents), range(len(columns))):
        if math.isfinite(row[x]):
            color = "black" if 2 * row[x] > low + high else "white"
            panel.text(x, y, f"{row[x]:.2f}", ha="center", va="center", color=color)
    panel.set_xticks(range(len(columns)), columns)
    panel.set_yticks(range(len(rows)), rows)
    panel.set_ylabel(of.names[0])
    panel.set_xlabel(of.names[1])
    panel.set_title(f"validation accuracy, %\n{of.others}", fontsize=10)
    return figure


def training_curves(records: Sequence[Record], title: str) -> Figure:
    """Plot loss, accuracy and slowdown of each layer of one network by epoch.

    Args:
        records: records from epoch 0; the epoch with the best validation accuracy is marked.
        title: title of the figure.
    """
    margins = {"left": 0.05, "right": 0.99, "bottom": 0.24, "top": 0.86, "wspace": 0.18}
    figure = _new_figure(12, 4.4, **margins)
    panels = figure.subplots(1, 3)
    epochs, best = [record.epoch for record in records], best_record(records).epoch
    for split, color in zip(records[0].loss, ("C0", "C1", "C2"), strict=True):
        panels[0].plot(epochs, [one.loss[split] for one in records], color=color, label=split)
        accuracies = [100 * one.accuracy[split] for one in records]
        panels[1].plot(epochs, accuracies, color=color, label=split)
    for layer in range(len(records[0].layers)):
        slowdowns = [record.layers[layer].slowdown for record in records]
        look = {"ls": "--", "color": f"C{3 + layer}", "label": f"layer {layer + 1}"}
        panels[2].plot(epochs, slowdowns, **look)
    titles = ("loss", "accuracy, %", "slowdown: share of the gradient left by σ'(z)")
    for panel, name in zip(panels, titles, strict=True):
        panel.axvline(best, color="0.6", lw=1, ls=":", label="best on validation")
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("epoch")
        _use_integer_ticks(panel)
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_tick_params(which="minor", labelleft=False)
    shares = [share for record in records[1:] for share in record.accuracy.values()]
    if shares:  # epoch 0, at chance level, would compress the scale
        panels[1].set_ylim(*_accuracy_limits([100 * share for share in shares]))
    panels[2].set_ylim(bottom=0)
    _legend_below(figure, panels[1], panels[2])
    figure.suptitle(title)
    return figure


def _accuracy_limits(shown: Sequence[float]) -> tuple[float, float]:
    return max(min(shown) - 1, max(shown) - 15), max(shown) + 0.5


def _legend_below(figure: Figure, *panels: Axes) -> None:
    """Draw a common legend below all panels."""
    by_label = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if by_label:
        figure.legend(
            list(by_label.values()),
            list(by_label),
            loc="outside lower center" if figure.get_layout_engine() else "lower center",
            ncols=4,
            fontsize=8,
        )


def _draw_band(
    panel: Axes,
    x: Sequence[float],
    values: Sequence[Sequence[float]],
    limits: Limits,
    style: str,
    *look: str,
) -> list[float]:
    """Draw the mean of the values at each x, and its confidence interval as a band."""
    color, label = look
    finite = ([value for value in some if math.isfinite(value)] for some in values)
    estimates = [estimate(some, limits) for some in finite]
    means = [one.mean for one in estimates]
    panel.plot(x, means, style, color=color, ms=4, label=label)
    low, high = [one.low for one in estimates], [one.high for one in estimates]
    panel.fill_between(x, low, high, color=color, alpha=0.25, lw=0)
    return means


def single_neuron(stories: Sequence[tuple[str, Mapping[str, Sequence[Sequence[float]]]]]) -> Figure:
    """Plot output, loss and |dC/dw| by epoch, of a neuron with input 1 and target 0.

    Args:
        stories: for each start, its title and three curves by rule: output, loss and |dC/dw|.
    """
    figure = _new_figure(4 * len(stories), 7)
    panels = figure.subplots(3, len(stories), squeeze=False, sharex=True, sharey="row")
    colors = {"cross-entropy": "C0", "quadratic": "C1"}
    for column, (title, by_rule) in zip(panels.T, stories, strict=True):
        column[0].set_title(title)
        for rule, curves in by_rule.items():
            for panel, values in zip(column, curves, strict=True):
                style = "-" if rule in colors else "--"
                panel.plot(values, style, color=colors.get(rule, "C3"), label=rule)
        for panel in column:
            panel.grid(alpha=0.3)
        column[2].set_xlabel("epoch")
    for panel, label in zip(panels[:, 0], ("output a", "loss C", "|dC/dw|"), strict=True):
        panel.set_ylabel(label)
    panels[0, 0].set_ylim(-0.03, 1.03)
    panels[1, 0].set_yscale("log")
    _use_integer_ticks(panels[0, 0])
    _legend_below(figure, panels[0, 0])
    figure.suptitle("One neuron, input 1, target 0: the learning slowdown")
    return figure
