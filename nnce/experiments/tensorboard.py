"""TensorBoard: values, and the tags under which they are logged.

One TensorBoard run per variant, with identical tags, so that the runs of a folder are overlaid. The
step is the epoch; epoch 0 is the start. Layers are numbered from 1, the first with weights.

    loss/train            C; also loss/validation and loss/test
    accuracy/train        in [0, 1]; also accuracy/validation and accuracy/test
    dz_norm/layer1        ‖dC/dz‖ of one example, the mean over 1,000 validation examples
    sigmoid_prime/layer1  the mean of σ'(z) over the same examples
    saturated/layer1      the share of neurons with σ'(z) < 0.01 over the same examples
    slowdown/layer1       how much of the pull on the layer its σ'(z) lets through; of the last one
                          the slowdown meter, ‖dz quadratic‖ / ‖dz cross-entropy‖ of the examples
                          that are wrong by more than ½ (no point where there are none)
    first_epochs/…        accuracy and loss up to epoch 5, of several networks
    upper_and_lower/…     ends of the 95 % confidence interval, for the margin charts of Custom
                          Scalars; with several networks the curves above are their means
    output/z              histograms over the outputs' neurons and 1,000 validation examples, at
                          some ten epochs; also output/a and output/dz
    weights/layer1        images at the end: the weights of each neuron of the first layer,
    wrong, confusion      the most confidently wrong test examples, and the confusion matrix
    distortion            distorted training images (not of a comparison)
    config, results       texts: the options; the closing table and the command that made it

`nnce.watch` logs dz_norm, sigmoid_prime, saturated and slowdown of any PyTorch model, and any
loop, under the same tags.
"""

from __future__ import annotations

import functools
import math
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

# Histograms are worth most in the first epochs; more of them would only make the files large.
_HISTOGRAM_EPOCHS = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1_000)
_HISTOGRAM_EXAMPLES = 1_000
# TensorBoard draws 30 by default.
_BINS = 60
# Number of neurons of a wide first layer that are drawn, the first ones.
_IMAGES = 100
_ROW = 8
_PREFIX = "events.out.tfevents."
_EVENTS = f"{_PREFIX}*"
_CLOSING = ".closing"
_BANDS = "upper_and_lower"
_FIRST, _FIRST_EPOCHS = "first_epochs/", 5
# Tags whose values are in [0, 1].
_SHARES = ("accuracy/", "saturated/", "sigmoid_prime/", "slowdown/")
# Names of the options in the table of hyperparameters,
_HYPERPARAMETERS = {"loss": "loss", "lr": "rate", "init": "start", "l2": "λ", "engine": "engine"}
# of the figures there,
_METRICS = {
    "accuracy/test": "test accuracy",
    "accuracy/validation": "validation accuracy",
    "loss/test": "test loss",
}
# and the options that are there only if they differ from these.
_USUAL: Mapping[str, object] = {
    **{"data": "digits", "train_size": None, "hidden": [30], "optimizer": "sgd", "epochs": 30},
    **{"batch_size": 10, "momentum": 0.0, "schedule": "constant", "warmup": 0, "dtype": "float32"},
    **{"rotation": 0.0, "scaling": 0.0, "shear": 0.0, "translation": 0.0, "elastic": 0.0},
    **{"dropout": 0.0, "input_dropout": 0.0},
}


def scalars(record: Record) -> dict[str, float]:
    """A record's figures by their tags."""
    by_tag = {
        **{f"loss/{split}": value for split, value in record.loss.items()},
        **{f"accuracy/{split}": value for split, value in record.accuracy.items()},
    }
    for number, layer in enumerate(record.layers, start=1):
        by_tag |= {f"{name}/layer{number}": value for name, value in layer._asdict().items()}
    return by_tag


def _of_first_epochs(by_tag: Mapping[str, float], epoch: int) -> dict[str, float]:
    """Accuracies and losses once more, for a chart of the first epochs."""
    if epoch > _FIRST_EPOCHS:
        return {}
    names = [f"{figure}/{of}" for figure in ("accuracy", "loss") for of in ("validation", "test")]
    return {f"{_FIRST}{name}": by_tag[name] for name in names if name in by_tag}


def add_points(writer: SummaryWriter, points: Mapping[str, float], step: int) -> None:
    """Add one point to each of several curves, in one event: nine times as fast as `add_scalar`."""
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in points.items()]
    file_writer: Any = writer.file_writer
    file_writer.add_summary(Summary(value=values), step)


def _put_first(run_dir: Path) -> bool:
    """See to it that TensorBoard reads the event files that are there before the next one.

    It reads them in the order of their names, which begin with the second they were made in: wrong
    for two of one second, and after a clock was set back. Returns whether there are any.
    """
    files = sorted(run_dir.glob(_EVENTS))
    if files and files[-1].name >= f"{_PREFIX}{int(time.time()):010d}":
        for number, file in enumerate(files):
            file.rename(file.with_name(f"{_PREFIX}{number:010d}{file.name[len(_PREFIX) + 10 :]}"))
    return bool(files)


def _put_last(run_dir: Path) -> None:
    """See to it that TensorBoard reads the file of the end after the curves: see `_put_first`.

    Else it would forget the end of a run that has gone on, as if that were of before.
    """
    files = sorted(run_dir.glob(_EVENTS))
    for file in files[:-1]:
        if file.suffix == _CLOSING:
            file.rename(f"{files[-1]}{_CLOSING}")


def _layout(tags: Iterable[str]) -> Summary:
    """The page of Custom Scalars for several networks: margin charts in three groups."""
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
            "slowdown meter: share of cross-entropy's dz that the quadratic loss has left, "
            "where an output is badly wrong": meter,
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
    """The tags of the ends of a curve's interval."""
    return [f"{_BANDS}/{tag}/{end}" for end in ("lower", "upper")]


def options_table(config: Mapping[str, object]) -> str:
    """The options as a Markdown table."""
    lines = [f"| {name} | {value} |" for name, value in config.items()]
    return "\n".join(["| option | value |", "|---|---|", *lines])


class Monitor:
    """Writes curves, histograms and images of one variant into its directory.

    The end is in another file, which is deleted when a run is resumed.

    Args:
        run_dir: where TensorBoard finds it.
        config: name and value of each option, to be shown; None for a variant of several.
        so_far: the records of each epoch that has been logged, if a run is resumed. Points of later
            epochs, which a killed run has left, are purged. Where the event files are gone, the
            curves are written again (but not histograms, which records do not have).
        several: whether curves have bands and a page of Custom Scalars. The band of one network is
            its curve: TensorBoard complains of a run that has not all tags of a margin chart.
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
        # (Texts would not be purged. And a purge where there is nothing has no sense.)
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
        """Wait until everything is on the disk, so that a checkpoint is never ahead of it."""
        self._writer.flush()
        for path in self._run_dir.glob(_EVENTS):
            to_disk(path)

    def log(self, *records: Record) -> None:
        """Add an epoch to the curves: of one network, or the mean of several and its band."""
        by_network = [scalars(record) for record in records]
        if self._several:
            epoch = records[0].epoch
            by_network = [{**tags, **_of_first_epochs(tags, epoch)} for tags in by_network]
        points: dict[str, float] = {}
        for tag in by_network[0]:
            # NaN is no value: a diverged network's loss, or a meter with nothing to measure.
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
        """Add histograms of z, a and dz of the output layer, at a bounded number of epochs."""
        if epoch not in _HISTOGRAM_EPOCHS:
            return
        x, y = split.x[:_HISTOGRAM_EXAMPLES], split.y[:_HISTOGRAM_EXAMPLES]
        one_pass = backprop(network, x, y, loss=loss)
        for name in ("z", "a", "dz"):
            values = getattr(one_pass, name)[-1]
            if values.isfinite().all():
                self._writer.add_histogram(f"output/{name}", values.double(), epoch, _BINS)

    def log_images(self, network: MLP, split: data.Split, epoch: int) -> None:
        """Add first-layer weights, the most confidently wrong examples and the confusion matrix.

        Args:
            network: whose parameters are finite numbers.
            split: the test data, of one-hot targets.
            epoch: the step they are shown at.
        """
        side = math.isqrt(network.sizes[0])
        if side**2 == network.sizes[0]:
            weights = network.linears()[0].weight.detach()[:_IMAGES].view(-1, 1, side, side)
            largest = weights.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
            grey = 0.5 + 0.5 * weights / largest  # 0 is grey, whatever the neuron's scale
            scale = max(1, 56 // side)
            enlarged = grey.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
            # TensorBoard draws rows of 8, and fills the last one with black.
            missing = -len(weights) % _ROW if len(weights) > _ROW else 0
            framed = nn.functional.pad(enlarged, (1, 1, 1, 1, 0, 0, 0, missing), value=1.0)
            self._closing.add_images("weights/layer1", framed.float().cpu(), epoch)
        with torch.no_grad():
            z = network(split.x)
        self._closing.add_figure("wrong", figures.wrong_examples(split, z), epoch)
        counts = confusion(network, split).tolist()
        self._closing.add_figure("confusion", figures.confusion_matrix(counts), epoch)

    def log_hparams(self, config: Mapping[str, object], record: Record) -> None:
        """Enter the options that vary, and the last figures, in the table of hyperparameters.

        `SummaryWriter.add_hparams` would start a run of its own for it.
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

    def log_figure(self, tag: str, figure: Figure) -> None:
        """Add a picture."""
        self._closing.add_figure(tag, figure)

    def log_text(self, tag: str, markdown: str) -> None:
        """Add a page of text, at the end."""
        self._closing.add_text(tag, markdown)

    def close(self) -> None:
        """Write everything out."""
        self._writer.close()
        if "_closing" in vars(self):
            self._closing.close()
            _put_last(self._run_dir)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
