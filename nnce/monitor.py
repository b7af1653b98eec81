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
    config, results       texts: the options; the closing table and the command that made it

`watch` logs dz_norm, sigmoid_prime, saturated and slowdown of any PyTorch model while it trains.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from nnce import comparison, data, modules, plots, training
from nnce.backprop import Loss, backprop
from nnce.modules import MLP
from nnce.training import Record

# Histograms are worth most in the first epochs; more of them would only make the files large.
_HISTOGRAM_EPOCHS = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1_000)
_HISTOGRAM_EXAMPLES = 1_000
# TensorBoard draws 30 by default.
_BINS = 60
_BANDS = ("mean", "lower", "upper")
# The options that say what was trained; others say how long, or where.
_HYPERPARAMETERS = (
    *("data", "train_size", "hidden", "init", "loss", "engine", "optimizer"),
    *("lr", "batch_size", "momentum", "l2", "epochs", "dtype"),
)


def scalars(record: Record) -> dict[str, float]:
    """A record's figures by their tags."""
    found = {
        **{f"loss/{split}": value for split, value in record.loss.items()},
        **{f"accuracy/{split}": value for split, value in record.accuracy.items()},
    }
    for number, layer in enumerate(record.layers, start=1):
        found |= {f"{name}/layer{number}": value for name, value in layer._asdict().items()}
    return found


class Monitor:
    """Writes what there is to see of one variant into its directory.

    Args:
        run_dir: where TensorBoard finds it.
        config: name and value of each option.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, object]) -> None:
        """Open the log and write the configuration into it."""
        self._writer = SummaryWriter(str(run_dir))
        self._config = dict(config)
        lines = ["| option | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in config.items()]
        self.log_text("config", "\n".join(lines))

    def log(self, *records: Record) -> None:
        """Add an epoch to the curves: of one network, or the mean of several and its band."""
        by_tag = [scalars(record) for record in records]
        for tag in by_tag[0]:
            # NaN is no value: a diverged network's loss, or a meter with nothing to measure.
            values = [its[tag] for its in by_tag if math.isfinite(its[tag])]
            mean, _, low, high, n = comparison.estimate(values)
            if n > 0:
                self._writer.add_scalar(tag, mean, records[0].epoch)
            if n > 1:
                # The mean once more, since TensorBoard complains of a run that has one of the
                # three tags of a margin chart and not the others, as a single network's.
                for band, value in zip(_BANDS, (mean, low, high), strict=True):
                    self._writer.add_scalar(f"{band}/{tag}", value, records[0].epoch)
        self._writer.flush()

    def log_layout(self, record: Record) -> None:
        """Lay out Custom Scalars: a margin chart for each curve, the mean with its band."""
        charts: dict[str, Any] = {
            tag: ["Margin", [f"{band}/{tag}" for band in _BANDS]]
            for tag in reversed(scalars(record))  # TensorBoard shows the last one first
        }
        self._writer.add_custom_scalars({"mean and 95 % confidence interval over seeds": charts})

    def log_histograms(self, network: MLP, split: data.Split, loss: Loss, epoch: int) -> None:
        """Add histograms of z, a and dz of the output layer, at a bounded number of epochs."""
        if epoch not in _HISTOGRAM_EPOCHS:
            return
        x, y = split.x[:_HISTOGRAM_EXAMPLES], split.y[:_HISTOGRAM_EXAMPLES]
        found = backprop(network, x, y, loss=loss)
        for name, values in (("z", found.z[-1]), ("a", found.a[-1]), ("dz", found.dz[-1])):
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
            weights = network.linears()[0].weight.detach().view(-1, 1, side, side)
            largest = weights.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
            grey = 0.5 + 0.5 * weights / largest  # 0 is grey, whatever the neuron's scale
            scale = max(1, 56 // side)
            enlarged = grey.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
            framed = nn.functional.pad(enlarged, (1, 1, 1, 1), value=1.0)
            self._writer.add_images("weights/layer1", framed.float().cpu(), epoch)
        with torch.no_grad():
            z = network(split.x)
        self._writer.add_figure("wrong", plots.wrong_examples(split, z), epoch)
        self._writer.add_figure("confusion", plots.confusion_matrix(split, z), epoch)

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
        writer: Any = self._writer.file_writer
        for summary in hparams(options, metrics):
            writer.add_summary(summary)

    def log_figure(self, tag: str, figure: Figure) -> None:
        """Add a picture."""
        self._writer.add_figure(tag, figure)

    def log_text(self, tag: str, markdown: str) -> None:
        """Add a page of text."""
        self._writer.add_text(tag, markdown)

    def __enter__(self) -> "Monitor":
        """Close the log at the block's end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the log."""
        self._writer.close()


# ------------------------------------------------------------------ a watcher for any PyTorch model


def watch(
    model: nn.Module,
    writer: SummaryWriter,
    *,
    every: int = 100,
    logits: bool | None = None,
) -> "Watcher":
    """Log how the sigmoid layers of any model learn, while your own loop trains it.

    At every so many steps, from the first one on, four curves per sigmoid layer, numbered as the
    forward pass comes by: dz_norm/layer1 (the mean over the examples of ‖dC/dz‖, of C as your code
    averages and scales it), sigmoid_prime/layer1, saturated/layer1 and slowdown/layer1 (see
    `nnce.training.slowdown`). The slowdown of the output layer is that of the examples that are
    wrong by more than ½, ‖dz quadratic‖ / ‖dz cross-entropy‖; the targets, which a model does not
    see, are read from the sign of the gradient, as if they were 0 or 1.

    A step is a forward pass in training mode with gradients on. What is logged needs its backward
    pass too; a step without one leaves a gap. The gradients are looked at and not touched.

    Rows of a sigmoid's input are examples, as everywhere in nnce, but a one-dimensional input is
    taken for one neuron's, an example each. The output layer is the one whose a the model returns,
    alone or among other things.

    Seen are `torch.sigmoid` and its other names, wherever the model calls them, `torch.nn.Sigmoid`
    and the module `nnce.Sigmoid`. Not seen are the function `nnce.sigmoid` and what is inside a
    fused kernel, as in an LSTM. Passes inside `torch.func`'s transforms and compiled ones go by
    unwatched.

    Args:
        model: any module, not compiled; of one that is, watch the module it was made from before.
        writer: open as long as the model is watched.
        every: steps from one point of the curves to the next, at least 1.
        logits: whether the model's output is z of sigmoid neurons, whose sigmoid is in the loss,
            as for `BCEWithLogitsLoss` and nnce's; None for yes if it is an `nnce.MLP`.

    Returns:
        The watcher; its `remove()`, or the end of its with-block, ends the watch.

    Raises:
        TypeError: model or writer is none.
        ValueError: `every` is no whole number of at least 1, or the model is compiled.
        ValueError: at the first step, if the forward pass came by no sigmoid.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module to watch, got {type(model).__name__}")
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"expected a SummaryWriter, got {type(writer).__name__}")
    if not modules.is_size(every):
        raise ValueError(f"expected every to be a whole number of at least 1, got {every!r}")
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "expected a model that is not compiled, whose layers can be seen; train the module it "
            "was made from while you watch"
        )
    return Watcher(model, writer, every, isinstance(model, MLP) if logits is None else logits)


class Watcher:
    """What `watch` has attached to a model."""

    def __init__(self, model: nn.Module, writer: SummaryWriter, every: int, logits: bool) -> None:
        """Attach the hooks; `watch` checks the arguments."""
        self.step = 0
        """Steps seen so far."""
        self._writer, self._every, self._logits = writer, every, logits
        self._name = type(model).__name__
        self._asleep = False
        self._pass: _Pass | None = None
        self._gradients: list[RemovableHandle] = []
        self._handles = [
            model.register_forward_pre_hook(self._before),
            # Called after a forward that raised, too.
            model.register_forward_hook(self._after, always_call=True),
            *(
                module.register_forward_hook(self._sigmoid_module, with_kwargs=True)
                for module in model.modules()
                if isinstance(module, modules.Sigmoid)
            ),
        ]

    def __reduce__(self) -> Any:
        """A copy of a watched model, deep or pickled, is not watched."""
        return _asleep, ()

    def remove(self) -> None:
        """End the watch: no hook is left on the model."""
        for handle in (*self._handles, *self._gradients):
            handle.remove()
        self._handles, self._gradients = [], []

    def __enter__(self) -> "Watcher":
        """End the watch at the block's end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the watch."""
        self.remove()

    def _before(self, model: nn.Module, arguments: object) -> None:
        if self._asleep or torch.compiler.is_compiling():
            return
        if torch._C._are_functorch_transforms_active():
            return
        if not (model.training and torch.is_grad_enabled()):
            return
        if self.step % self._every == 0:
            self._pass = _Pass()
            self._pass.__enter__()  # type: ignore[no-untyped-call]
        self.step += 1

    def _sigmoid_module(
        self,
        module: nn.Module,
        arguments: tuple[Tensor, ...],
        keywords: Mapping[str, Tensor],
        a: Tensor,
    ) -> None:
        if self._pass is not None:
            self._pass.seen.append(((*arguments, *keywords.values())[0], a))

    def _after(self, model: nn.Module, arguments: object, output: object) -> None:
        if self._pass is None:
            return
        seen = self._pass.seen
        self._pass.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._pass = None
        if output is None:  # the forward pass raised
            return
        if self._logits:
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"expected {self._name} to give one tensor of logits, got "
                    f"{type(output).__name__}"
                )
            seen.append((output, None))
        if not seen:
            self.remove()
            raise ValueError(
                f"expected a model with sigmoids, but the forward pass of {self._name} came by "
                f"none; if its loss has the sigmoid, as BCEWithLogitsLoss has, watch with "
                f"logits=True"
            )
        if isinstance(output, Mapping):
            outputs = list(output.values())
        else:
            outputs = list(output) if isinstance(output, tuple | list) else [output]
        # Hooks of an earlier pass that never had its backward would only hold its graph.
        for handle in self._gradients:
            handle.remove()
        self._gradients = []
        for number, (z, a) in enumerate(seen, start=1):
            is_output = a is None or any(_same_values(a, its) for its in outputs)
            self._follow(f"layer{number}", z, a, is_output=is_output, step=self.step - 1)

    def _follow(
        self, name: str, z: Tensor, a: Tensor | None, *, is_output: bool, step: int
    ) -> None:
        """Log a layer when the backward pass has come by: first its da, then its dz."""
        came: dict[str, Tensor] = {}
        values = z.detach()  # a hook that held z itself would keep it alive

        def keep_da(da: Tensor) -> None:
            came["da"] = da.detach()

        def log(dz: Tensor) -> None:
            self._log(name, values, dz.detach(), came.pop("da", None), is_output, step)

        if a is not None and a.requires_grad:
            self._gradients.append(a.register_hook(keep_da))
        if z.requires_grad:
            self._gradients.append(z.register_hook(log))

    def _log(
        self,
        name: str,
        z: Tensor,
        dz: Tensor,
        da: Tensor | None,
        is_output: bool,
        step: int,
    ) -> None:
        z, dz = (_rows(tensor) for tensor in (z, dz))
        pull = dz if da is None else _rows(da)
        if is_output:
            # An output that is too large is pulled down, whatever the loss. Where rounding has left
            # no pull, the output counts as right.
            a = z.sigmoid()
            y = torch.where(pull > 0, 0.0, torch.where(pull < 0, 1.0, a.round()))
            wrong = training.is_wrong(a, y)
            pull, z_seen = (a - y)[wrong], z[wrong]
        else:
            z_seen = z
        prime = z.sigmoid() * (-z).sigmoid()
        figures = training.LayerFigures(
            dz_norm=dz.norm(dim=-1).mean().item(),
            sigmoid_prime=prime.mean().item(),
            saturated=(prime < training.SATURATED).double().mean().item(),
            slowdown=training.slowdown(pull, z_seen),
        )
        for what, value in figures._asdict().items():
            if math.isfinite(value):
                self._writer.add_scalar(f"{what}/{name}", value, step)


def _asleep() -> Watcher:
    watcher = Watcher.__new__(Watcher)
    watcher._asleep, watcher._pass = True, None
    return watcher


def _rows(tensor: Tensor) -> Tensor:
    """[…, neurons], or [examples] of one neuron, as [examples, neurons]; at least in float32."""
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)
    return rows if rows.dtype == torch.float64 else rows.float()


def _same_values(a: Tensor, output: object) -> bool:
    """Whether the output is a, perhaps in another shape."""
    return (
        isinstance(output, Tensor)
        and output.numel() == a.numel()
        and output.untyped_storage().data_ptr() == a.untyped_storage().data_ptr()
    )


class _Pass(TorchFunctionMode):
    """Sees the sigmoids of a forward pass, as z and a."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: object,
        arguments: Sequence[Any] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> Any:
        found = function(*arguments, **(keywords or {}))
        # Inside an autograd Function, such as nnce's, gradients are off.
        if function in _SIGMOIDS and torch.is_grad_enabled():
            z = arguments[0] if arguments else (keywords or {})["input"]
            self.seen.append((z, found))
        return found


_SIGMOIDS = {torch.sigmoid, Tensor.sigmoid, torch.special.expit}
