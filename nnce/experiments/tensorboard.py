"""TensorBoard logging: values and their tags.

Each variant is a TensorBoard run with the same tags, so that the runs of a folder are overlaid. The
step is the epoch, 0 before training. Layers are numbered from 1, the first one with weights.

    loss/train            C; also loss/validation and loss/test
    accuracy/train        in [0, 1]; also accuracy/validation and accuracy/test
    dz_norm/layer1        mean of ‖dC/dz‖ per example, over 1,000 validation examples
    sigmoid_prime/layer1  mean of σ'(z) over neurons and the same examples
    saturated/layer1      share of (example, neuron) pairs with σ'(z) < 0.01
    slowdown/layer1       share of the gradient that σ'(z) leaves, ‖dC/dz‖ / ‖dC/da‖; for the last
                          layer the slowdown meter, ‖dz quadratic‖ / ‖dz cross-entropy‖ over the
                          examples that are wrong by more than ½ (no point if there are none)
    first_epochs/…        accuracy and loss up to epoch 5 (several networks only)
    upper_and_lower/…     ends of the 95 % confidence interval, for the margin charts of Custom
                          Scalars; with several networks, all other curves are means
    output/z              histograms over output neurons and 1,000 validation examples, in about ten
                          epochs; also output/a and output/dz
    weights/layer1        image at the end: weights of each neuron of the first layer
    wrong, confusion      images at the end: most confidently misclassified test examples, and the
                          confusion matrix
    distortion            image of distorted training examples (not in comparisons)
    config, results       texts: options; closing table and command

`nnce.watch` logs dz_norm, sigmoid_prime, saturated and slowdown of any PyTorch model under the same
tags.
"""

from __future__ import annotations

import functools
import math
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.plugins.hparams.plugin_data_pb2 import (  # type: ignore[import-untyped]
    HParamsPluginData,
)
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams

from nnce import data
from nnce.algorithm import backprop
from nnce.experiments import estimates, figures
from nnce.losses import Loss
from nnce.modules import MLP
from nnce.saving import to_disk
from nnce.training import Record, confusion

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Epochs with histograms; early ones are the most informative, and more would bloat the files.
_HISTOGRAM_EPOCHS = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1_000)
_HISTOGRAM_EXAMPLES = 1_000
# TensorBoard draws 30 by default.
_BINS = 60
# Largest number of neurons of the first layer that are drawn.
_IMAGES = 100
_ROW = 8
_PREFIX = "events.out.tfevents."
_EVENTS = f"{_PREFIX}*"
_CLOSING = ".closing"
_BANDS = "upper_and_lower"
_FIRST, _FIRST_EPOCHS = "first_epochs/", 5
# Tags whose values are in [0, 1].
_SHARES = ("accuracy/", "saturated/", "sigmoid_prime/", "slowdown/")
# Options in the table of hyperparameters, with their names there.
_HYPERPARAMETERS = {"loss": "loss", "lr": "rate", "init": "start", "l2": "λ", "engine": "engine"}
# Metrics in that table, with their names there.
_METRICS = {
    "accuracy/test": "test accuracy",
    "accuracy/validation": "validation accuracy",
    "loss/test": "test loss",
}
# Options in that table only if they differ from these values.
_USUAL: Mapping[str, object] = {
    **{"data": "digits", "train_size": None, "hidden": [30], "optimizer": "sgd", "epochs": 30},
    **{"batch_size": 10, "momentum": 0.0, "schedule": "constant", "warmup": 0, "dtype": "float32"},
    **{"rotation": 0.0, "scaling": 0.0, "shear": 0.0, "translation": 0.0, "elastic": 0.0},
    **{"dropout": 0.0, "input_dropout": 0.0},
}


def scalars(record: Record) -> dict[str, float]:
    """Values of a record by tag."""
    by_tag = {
        **{f"loss/{split}": value for split, value in record.loss.items()},
        **{f"accuracy/{split}": value for split, value in record.accuracy.items()},
    }
    for number, layer in enumerate(record.layers, start=1):
        by_tag |= {f"{name}/layer{number}": value for name, value in layer._asdict().items()}
    return by_tag


def _of_first_epochs(by_tag: Mapping[str, float], epoch: int) -> dict[str, float]:
    """Accuracies and losses under separate tags, for a chart of the first epochs."""
    if epoch > _FIRST_EPOCHS:
        return {}
    names = [f"{figure}/{of}" for figure in ("accuracy", "loss") for of in ("validation", "test")]
    return {f"{_FIRST}{name}": by_tag[name] for name in names if name in by_tag}


def add_points(writer: SummaryWriter, points: Mapping[str, float], step: int) -> None:
    """Add a point to each of several curves in one event, nine times as fast as `add_scalar`."""
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in points.items()]
    file_writer: Any = writer.file_writer
    file_writer.add_summary(Summary(value=values), step)


def _put_first(run_dir: Path) -> bool:
    """Rename existing event files if necessary, so that TensorBoard reads them before the next one.

    TensorBoard reads files in the order of their names, which start with their time in seconds: not
    in order for two files of the same second, or after the clock was set back. Returns whether
    there are any files.
    """
    files = sorted(run_dir.glob(_EVENTS))
    if files and files[-1].name >= f"{_PREFIX}{int(time.time()):010d}":
        for number, file in enumerate(files):
            file.rename(file.with_name(f"{_PREFIX}{number:010d}{file.name[len(_PREFIX) + 10 :]}"))
    return bool(files)


def _put_last(run_dir: Path) -> None:
    """Rename the closing file if necessary, so that TensorBoard reads it after the curves.

    Otherwise TensorBoard would purge the closing events of a resumed run as outdated.
    """
    files = sorted(run_dir.glob(_EVENTS))
    for file in files[:-1]:
        if file.suffix == _CLOSING:
            file.rename(f"{files[-1]}{_CLOSING}")


def _layout(tags: Iterable[str]) -> Summary:
    """Layout of Custom Scalars for several networks: margin charts in three groups."""
    # Accuracies before losses; test before validation before train.
    tags = sorted(reversed(list(tags)), key=lambda tag: "accuracy/" not in tag)
    figures_of = {tag.partition("/")[0]: tag for tag in reversed(tags)}  # of the last layer
    meter = figures_of["slowdown"]
    groups = {
        "How well: accuracy and loss": {
            **{tag: tag for tag in tags if tag.startswith("accuracy/")},
            **{f"{tag} (scales differ)": tag for tag in tags if tag.startswith("loss/")},
        },
        f"How fast: epochs 0 to {_FIRST_EPOCHS}": {
            tag.removeprefix(_FIRST): tag for tag in tags if tag.startswith(_FIRST)
        },
        "The learning slowdown": {
            "slowdown meter: ratio of dz, quadratic to cross-entropy, over examples that are wrong "
            "by more than ½": meter,
            "share of saturated output neurons": figures_of["saturated"],
            **{
                f"mean norm of dz, {tag.partition('/')[2]}": tag
                for tag in tags
                if tag.startswith("dz_norm/")
            },
        },
    }
    charts = {
        f"{group} (mean, 95 % band)": {
            title: ["Margin", [tag, *_ends(tag)]]
            for title, tag in reversed(of_group.items())  # TensorBoard shows the last one first
        }
        for group, of_group in groups.items()
    }
    return cast(Summary, custom_scalars(charts))


def _ends(tag: str) -> list[str]:
    """Tags of the ends of a curve's confidence interval."""
    return [f"{_BANDS}/{tag}/{end}" for end in ("lower", "upper")]


def options_table(config: Mapping[str, object]) -> str:
    """Format options as a Markdown table."""
    lines = [f"| {name} | {value} |" for name, value in config.items()]
    return "\n".join(["| option | value |", "|---|---|", *lines])


class Monitor:
    """Writes curves, histograms and images of one variant to its directory.

    Images and texts at the end of a run go to a separate file, which is deleted on resuming.

    Args:
        run_dir: directory of the TensorBoard run.
        config: name and value of each option, logged as text; None to log no options.
        so_far: the records of each logged epoch of a resumed run. Points of later epochs, left by a
            killed run, are purged. If the event files are missing, the curves are written again
            (histograms are lost).
        several: whether curves have confidence bands and a page of Custom Scalars. With one
            network, the band equals the curve: TensorBoard warns if a run lacks tags of a margin
            chart.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, object] | None = None,
        so_far: Sequence[Sequence[Record]] = (),
        *,
        several: bool = False,
    ) -> None:
        self._run_dir = run_dir
        for old in run_dir.glob(f"{_EVENTS}{_CLOSING}" if so_far else _EVENTS):
            old.unlink()
        exists = _put_first(run_dir)
        # Texts are written once, because a purge does not remove them.
        self._writer = SummaryWriter(str(run_dir), purge_step=len(so_far) if exists else None)
        self._several, self._lacks_layout = several, several and not exists
        if not exists:
            if config is not None:
                self._writer.add_text("config", options_table(config))
            for records in so_far:
                self.log(*records)

    @functools.cached_property
    def _closing(self) -> SummaryWriter:
        return SummaryWriter(str(self._run_dir), filename_suffix=_CLOSING)

    def flush(self) -> None:
        """Flush all events to disk, so that a checkpoint is never ahead of them."""
        self._writer.flush()
        for path in self._run_dir.glob(_EVENTS):
            to_disk(path)

    def log(self, *records: Record) -> None:
        """Add an epoch to the curves: of one network, or the mean of several with its band."""
        by_network = [scalars(record) for record in records]
        if self._several:
            epoch = records[0].epoch
            by_network = [{**tags, **_of_first_epochs(tags, epoch)} for tags in by_network]
        points: dict[str, float] = {}
        for tag in by_network[0]:
            # NaN is skipped: the loss of a diverged network, or a meter without examples.
            values = [tags[tag] for tags in by_network if math.isfinite(tags[tag])]
            limits = estimates.SHARE if tag.removeprefix(_FIRST).startswith(_SHARES) else None
            mean, _, low, high, n, _ = estimates.estimate(values, limits)
            if n > 0:
                points[tag] = mean
            if n > 0 and self._several:
                points |= zip(_ends(tag), (low, high) if n > 1 else (mean, mean), strict=True)
        add_points(self._writer, points, records[0].epoch)
        if self._lacks_layout:
            file_writer: Any = self._writer.file_writer
            file_writer.add_summary(_layout(by_network[0]))
            self._lacks_layout = False
        self._writer.flush()

    def log_histograms(self, network: MLP, split: data.Split, loss: Loss, epoch: int) -> None:
        """Add histograms of z, a and dz of the output layer, in selected epochs."""
        if epoch not in _HISTOGRAM_EPOCHS:
            return
        x, y = split.x[:_HISTOGRAM_EXAMPLES], split.y[:_HISTOGRAM_EXAMPLES]
        one_pass = backprop(network, x, y, loss=loss)
        for name in ("z", "a", "dz"):
            values = getattr(one_pass, name)[-1]
            if values.isfinite().all():
                self._writer.add_histogram(f"output/{name}", values.double(), epoch, _BINS)

    def log_images(self, network: MLP, split: data.Split, epoch: int) -> None:
        """Add images of first-layer weights, misclassified examples and the confusion matrix.

        Args:
            network: network with finite parameters.
            split: test data with one-hot targets.
            epoch: step of the images.
        """
        side = math.isqrt(network.sizes[0])
        if side**2 == network.sizes[0]:
            weights = network.linears()[0].weight.detach()[:_IMAGES].view(-1, 1, side, side)
            largest = weights.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
            gray = 0.5 + 0.5 * weights / largest  # 0 is gray for every neuron
            scale = max(1, 56 // side)
            enlarged = gray.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
            # TensorBoard draws rows of 8 images; fill the last one with white instead of black.
            missing = -len(weights) % _ROW if len(weights) > _ROW else 0
            framed = nn.functional.pad(enlarged, (1, 1, 1, 1, 0, 0, 0, missing), value=1.0)
            self._closing.add_images("weights/layer1", framed.float().cpu(), epoch)
        with torch.no_grad():
            z = network(split.x)
        self.log_figure("wrong", figures.wrong_examples(split, z), epoch)
        counts = confusion(network, split).tolist()
        self.log_figure("confusion", figures.confusion_matrix(counts), epoch)

    def log_hparams(self, config: Mapping[str, object], record: Record) -> None:
        """Add options and final metrics to the table of hyperparameters.

        `SummaryWriter.add_hparams` would create a separate run.
        """
        shown = {new: config[name] for name, new in _HYPERPARAMETERS.items()}
        shown |= {
            name: config[name] for name, usual in _USUAL.items() if config.get(name, usual) != usual
        }
        options = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in shown.items()
        }
        tags = scalars(record)
        experiment, *session = hparams(options, {tag: tags[tag] for tag in _METRICS})
        (entry,) = experiment.value
        content = HParamsPluginData.FromString(entry.metadata.plugin_data.content)
        for metric in content.experiment.metric_infos:
            metric.display_name = _METRICS[metric.name.tag]
        entry.metadata.plugin_data.content = content.SerializeToString()
        writer: Any = self._closing.file_writer
        for summary in (experiment, *session):
            writer.add_summary(summary)

    def log_figure(self, tag: str, figure: Figure | bytes, epoch: int = 0) -> None:
        """Add a figure, or its PNG file."""
        png = figure if isinstance(figure, bytes) else figures.as_png(figure)
        width, height = struct.unpack(">II", png[16:24])
        rgba = 4
        image = Summary.Image(width=width, height=height, colorspace=rgba, encoded_image_string=png)
        writer: Any = self._closing.file_writer
        writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), epoch)

    def log_text(self, tag: str, markdown: str) -> None:
        """Add a text in Markdown."""
        self._closing.add_text(tag, markdown)

    def close(self) -> None:
        """Write all pending events and close the files."""
        self._writer.close()
        if "_closing" in vars(self):
            self._closing.close()
            _put_last(self._run_dir)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
