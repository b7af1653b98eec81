"""TensorBoard: what is logged and under which tags.

One TensorBoard run per variant, with identical tags, so that `tensorboard --logdir runs` overlays
them. The step is the epoch; epoch 0 is the start. Layers are numbered from 1, the first with
weights.

    loss/train            C, and likewise loss/validation and loss/test
    accuracy/train        in [0, 1], and likewise accuracy/validation and accuracy/test
    dz_norm/layer1        ‖dC/dz‖ of one example, the mean over 1,000 validation examples
    sigmoid_prime/layer1  the mean of σ'(z) over the same examples
    saturated/layer1      the share of neurons with σ'(z) < 0.01 over the same examples
    slowdown/layer1       how much of the pull on the layer its σ'(z) lets through; of the last one
                          the slowdown meter, ‖dz quadratic‖ / ‖dz cross-entropy‖ of the examples
                          that are wrong by more than ½ (no point where none is)
    mean/…, lower/…,      with several networks the curves above are their means; these are the mean
    upper/…               and its 95 % confidence interval, for the margin charts of Custom Scalars
    output/z              histograms over the outputs' neurons and 1,000 validation examples, at
                          ten epochs or so, and likewise output/a and output/dz
    weights/layer1        images at the end: the weights of each neuron of the first layer,
    wrong, confusion      the most confidently wrong test examples, and what is taken for what
    distortion            what is done to the training images (not of a comparison)
    config, results       texts: the options; the closing table and the command that made it

`nnce.watch` logs dz_norm, sigmoid_prime, saturated and slowdown of any PyTorch model, and any
loop, under the same tags.
"""

import functools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from nnce import data
from nnce.algorithm import backprop
from nnce.experiments import estimates, figures
from nnce.losses import Loss
from nnce.modules import MLP
from nnce.saving import to_disk
from nnce.training import Record

# Histograms are worth most in the first epochs; more of them would only make the files large.
_HISTOGRAM_EPOCHS = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1_000)
_HISTOGRAM_EXAMPLES = 1_000
# TensorBoard draws 30 by default.
_BINS = 60
# Of a wide first layer the first so many neurons are drawn.
_IMAGES = 100
_PREFIX = "events.out.tfevents."
_EVENTS = f"{_PREFIX}*"
_CLOSING = ".closing"
_BANDS = ("mean", "lower", "upper")
# The options that say what was trained; others say how long, or where.
_HYPERPARAMETERS = (
    *("data", "train_size", "hidden", "init", "loss", "engine", "optimizer"),
    *("lr", "batch_size", "momentum", "l2", "distortion"),
    *("schedule", "step_size", "gamma", "cosine_epochs", "warmup", "warmup_start"),
    *("rotation", "scaling", "shear", "translation", "elastic", "elastic_sigma"),
    *("dropout", "input_dropout", "epochs", "dtype"),
)


def scalars(record: Record) -> dict[str, float]:
    """A record's figures by their tags."""
    by_tag = {
        **{f"loss/{split}": value for split, value in record.loss.items()},
        **{f"accuracy/{split}": value for split, value in record.accuracy.items()},
    }
    for number, layer in enumerate(record.layers, start=1):
        by_tag |= {f"{name}/layer{number}": value for name, value in layer._asdict().items()}
    return by_tag


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


class Monitor:
    """Writes what there is to see of one variant into its directory.

    The curves are in one file, and what belongs to the end in another, which is deleted when a run
    is resumed.

    Args:
        run_dir: where TensorBoard finds it.
        config: name and value of each option.
        so_far: the records of each epoch that has been logged, if a run is resumed. Points of later
            epochs, which a killed run has left, are purged. Where the event files are gone, the
            curves are written again (but not histograms, which records do not have).
    """

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, object],
        so_far: Sequence[Sequence[Record]] = (),
    ) -> None:
        self._run_dir = run_dir
        for old in run_dir.glob(f"{_EVENTS}{_CLOSING}" if so_far else _EVENTS):
            old.unlink()
        exists = _put_first(run_dir)
        # (Texts would not be purged. And a purge where there is nothing has no sense.)
        self._writer = SummaryWriter(str(run_dir), purge_step=len(so_far) if exists else None)
        self._config = dict(config)
        if not exists:
            lines = ["| option | value |", "|---|---|"]
            lines += [f"| {name} | {value} |" for name, value in config.items()]
            self._writer.add_text("config", "\n".join(lines))
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
        points: dict[str, float] = {}
        for tag in by_network[0]:
            # NaN is no value: a diverged network's loss, or a meter with nothing to measure.
            values = [tags[tag] for tags in by_network if math.isfinite(tags[tag])]
            mean, _, low, high, n = estimates.estimate(values)
            if n > 0:
                points[tag] = mean
            if n > 1:
                # The mean once more, since TensorBoard complains of a run that has one of the
                # three tags of a margin chart and not the others, as a single network's.
                points |= zip([f"{band}/{tag}" for band in _BANDS], (mean, low, high), strict=True)
        add_points(self._writer, points, records[0].epoch)
        self._writer.flush()

    def log_layout(self, record: Record) -> None:
        """Lay out Custom Scalars: a margin chart for each curve, the mean with its band."""
        charts: dict[str, Any] = {
            tag: ["Margin", [f"{band}/{tag}" for band in _BANDS]]
            for tag in reversed(scalars(record))  # TensorBoard shows the last one first
        }
        self._closing.add_custom_scalars({"mean and 95 % confidence interval over seeds": charts})

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
            framed = nn.functional.pad(enlarged, (1, 1, 1, 1), value=1.0)
            self._closing.add_images("weights/layer1", framed.float().cpu(), epoch)
        with torch.no_grad():
            z = network(split.x)
        self._closing.add_figure("wrong", figures.wrong_examples(split, z), epoch)
        self._closing.add_figure("confusion", figures.confusion_matrix(split, z), epoch)

    def log_hparams(self, record: Record) -> None:
        """Enter the options and what came of them among the hyper-parameters.

        `SummaryWriter.add_hparams` would start a run of its own for it.
        """
        options = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in self._config.items()
            if name in _HYPERPARAMETERS
        }
        metrics = {
            tag: value
            for tag, value in scalars(record).items()
            if tag.startswith(("loss/", "accuracy/"))
        }
        writer: Any = self._closing.file_writer
        for summary in hparams(options, metrics):
            writer.add_summary(summary)

    def log_figure(self, tag: str, figure: Figure) -> None:
        """Add a picture."""
        self._closing.add_figure(tag, figure)

    def log_text(self, tag: str, markdown: str) -> None:
        """Add a page of text, at the end."""
        self._closing.add_text(tag, markdown)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()
        if "_closing" in vars(self):
            self._closing.close()
            _put_last(self._run_dir)
