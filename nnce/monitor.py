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

import dataclasses
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
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

    A step is a forward pass in training mode with gradients on. A model that calls itself makes
    one, the outermost call; threads that share a model make one each. What is logged needs its
    backward pass too; a step without one leaves a gap. The gradients are looked at and not touched.

    Rows of a sigmoid's input are examples, as everywhere in nnce, but a one-dimensional input is
    taken for one neuron's, an example each. An output layer is one whose a the model returns, alone
    or among others, in mappings, lists, tuples and dataclasses, whole or in part, clamped, cast,
    reshaped, joined with others or detached. Whatever else a model makes of its a, be it 1 − a,
    leaves it a hidden layer.

    Seen are `torch.sigmoid` and its other names, in place too, wherever the model calls them,
    `torch.nn.Sigmoid`, and the modules `nnce.Sigmoid` that the model has when the watch begins. Not
    seen, and not counted in the layers' numbers, are

    - the function `nnce.sigmoid`, and what is inside a fused kernel, as in an LSTM;
    - what runs with gradients off, hence what is under `torch.utils.checkpoint` with
      use_reentrant=True, which is run again, and differentiated, only in the backward pass;
    - what the model runs in threads of its own, as `torch.nn.DataParallel` does;
    - what is compiled or scripted, or inside `torch.func`'s transforms.

    A model that is checkpointed as a whole is seen; with use_reentrant=False its second run, in the
    backward pass, counts as one more step, which leaves a gap.

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
        self._removed = False
        self._call = _Call()
        self._lock = threading.Lock()
        # Passes under way, of all threads, that are on PyTorch's stacks of function modes.
        self._on_stacks = 0
        self._handles = [
            *(
                module.register_forward_hook(self._sigmoid_module, with_kwargs=True)
                for module in model.modules()
                if isinstance(module, modules.Sigmoid)
            ),
            # First, so that it is called wherever the hook after the forward is.
            model.register_forward_pre_hook(self._before, prepend=True),
            # Called after a forward that raised, too.
            model.register_forward_hook(self._after, always_call=True),
        ]

    def __reduce__(self) -> Any:
        """A copy of a watched model, deep or pickled, is not watched."""
        return _unwatching, ()

    def remove(self) -> None:
        """End the watch: no hook is left on the model.

        Passes under way, in other threads or around this call, go on and are not logged. The last
        of them removes the hooks; if it raises, the next call does.
        """
        self._removed = True
        if not self._call.is_running():
            self._end()
        self._detach()

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

    def _detach(self) -> None:
        # A pass that has begun needs the hook that ends it.
        with self._lock:
            if self._on_stacks == 0:
                for handle in self._handles:
                    handle.remove()
                self._handles = []

    def _before(self, model: nn.Module, arguments: object) -> None:
        call = self._call
        if _goes_by():
            return
        if call.is_running():
            call.depth += 1
            return
        self._end()  # what an interrupted call has left
        if self._removed:
            self._detach()
            return
        if not (model.training and torch.is_grad_enabled()):
            return
        call.caller, call.depth = sys._getframe(1), 1
        with self._lock:
            step, self.step = self.step, self.step + 1
            if step % self._every != 0:
                return
            self._on_stacks += 1
        call.watched = _Pass(self, step)
        call.watched.__enter__()  # type: ignore[no-untyped-call]

    def _sigmoid_module(
        self,
        module: nn.Module,
        arguments: tuple[Tensor, ...],
        keywords: Mapping[str, Tensor],
        a: Tensor,
    ) -> None:
        watched = self._call.watched
        if watched is not None and torch.is_grad_enabled() and not _goes_by():
            layer = watched.layer((*arguments, *keywords.values())[0])
            watched.add(layer, a)

    def _after(self, model: nn.Module, arguments: object, output: object) -> None:
        call = self._call
        if _goes_by() or call.depth == 0:
            return
        call.depth -= 1
        if call.depth > 0:
            return
        watched = self._end()
        # None where the forward pass raised. PyTorch is then going through the model's own
        # dictionary of hooks, so that none of them can be removed.
        if watched is None or output is None:
            return
        if self._removed:
            self._detach()
            return
        if self._logits:
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"expected {self._name} to give one tensor of logits, got "
                    f"{type(output).__name__}"
                )
            watched.add(watched.layer(output), None)
        if not watched.layers:
            self.remove()
            raise ValueError(
                f"expected a model with sigmoids, but the forward pass of {self._name} came by "
                f"none; if its loss has the sigmoid, as BCEWithLogitsLoss has, watch with "
                f"logits=True"
            )
        watched.complete(list(_tensors(output)))

    def _end(self) -> "_Pass | None":
        """Take this thread's pass, if it is in one, off PyTorch's stack."""
        call = self._call
        watched, call.watched, call.caller, call.depth = call.watched, None, None, 0
        if watched is not None:
            watched.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            with self._lock:
                self._on_stacks -= 1
        return watched

    def _log(self, layer: "_Layer", da: Tensor | None, dz: Tensor) -> None:
        if self._removed or _goes_by() or layer.z.numel() == 0 or layer.z.is_complex():
            return
        z, dz = (_rows(tensor) for tensor in (layer.z, dz))
        pull = dz if da is None else _rows(da)
        if layer.is_output:
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
                self._writer.add_scalar(f"{what}/layer{layer.number}", value, layer.step)


def _unwatching() -> Watcher:
    nothing: Any = None
    watcher = Watcher(nn.Module(), nothing, every=1, logits=False)
    watcher.remove()
    return watcher


def _goes_by() -> bool:
    """Whether what runs now is compiled or transformed, where tensors have no values to look at."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _is_batched(gradient: Tensor) -> bool:
    """Whether it is many at once, as autograd's is_grads_batched makes it, and has no values."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)


def _rows(tensor: Tensor) -> Tensor:
    """[…, neurons], or [examples] of one neuron, as [examples, neurons]; at least in float32."""
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)
    return rows if rows.dtype == torch.float64 else rows.float()


class _Call(threading.local):
    """The call of the watched model that this thread is in: the outermost, if it calls itself."""

    caller: FrameType | None = None
    depth = 0
    watched: "_Pass | None" = None

    def is_running(self) -> bool:
        """Whether it goes on. Ctrl-C, for one, ends a call without the hook after the forward."""
        frame = None if self.caller is None else sys._getframe(1)
        while frame is not None and frame is not self.caller:
            frame = frame.f_back
        return frame is not None


class _Pass(TorchFunctionMode):
    """Sees the sigmoids of one forward pass."""

    def __init__(self, watcher: Watcher, step: int) -> None:
        super().__init__()
        self._watcher, self._step = watcher, step
        self.layers: list[tuple[_Layer, Tensor | None, Node | None]] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: object,
        arguments: Sequence[Any] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = keywords or {}
        # Inside an autograd Function, such as nnce's, gradients are off.
        if function not in _SIGMOIDS or not torch.is_grad_enabled() or _goes_by():
            return function(*arguments, **keywords)
        z = arguments[0] if arguments else keywords["input"]
        layer = self.layer(z)
        if function in _IN_PLACE and z.requires_grad:
            # The same in two steps, since no hook sees dz of a view that is overwritten in one.
            a = torch.sigmoid(z)
            result = z.copy_(a)
        else:
            a = result = function(*arguments, **keywords)
        self.add(layer, a)
        return result

    def layer(self, z: Tensor) -> "_Layer":
        """Look at z, before it can be overwritten."""
        return _Layer(self._watcher, self._step, z)

    def add(self, layer: "_Layer", a: Tensor | None) -> None:
        """Look at its a, and number the layer."""
        self.layers.append((layer, a, None if a is None else a.grad_fn))
        layer.number = len(self.layers)
        if a is not None:
            layer.follow(a)

    def complete(self, outputs: Sequence[Tensor]) -> None:
        """Tell the layers which of them the model returns; from now on they log."""
        returned = _made_of(outputs)
        for layer, a, node in self.layers:
            layer.is_output = (
                a is None or node in returned or any(_same_storage(a, output) for output in outputs)
            )


class _Layer:
    """A layer of one pass: its z, and its gradients as the backward pass brings them."""

    number: int
    is_output: bool | None = None
    """None until the forward pass is over."""

    def __init__(self, watcher: Watcher, step: int, z: Tensor) -> None:
        self._watcher, self.step = watcher, step
        # A copy without the graph, which a hook must not hold: z may yet be overwritten.
        self.z = z.detach().clone()
        self._da: Tensor | None = None
        # A hook on a parameter, or another leaf, would outlive the pass; `follow` does without.
        self._is_leaf = z.is_leaf
        if z.requires_grad and not z.is_leaf:
            z.register_hook(self._keep_dz)

    def follow(self, a: Tensor) -> None:
        """Wait for da, and for dz where z is a leaf."""
        if not a.requires_grad:
            return
        a.register_hook(self._keep_da)
        if self._is_leaf and a.grad_fn is not None:
            a.grad_fn.register_hook(lambda dz, da: self._keep_dz(dz[0]))

    def _keep_da(self, da: Tensor) -> None:
        self._da = None if _is_batched(da) else da.detach()

    def _keep_dz(self, dz: Tensor | None) -> None:
        da, self._da = self._da, None
        if self.is_output is not None and dz is not None and not _is_batched(dz):
            self._watcher._log(self, da, dz.detach())


def _tensors(output: object) -> Iterator[Tensor]:
    """The tensors of a model's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from _tensors(getattr(output, field.name))


def _made_of(outputs: Sequence[Tensor]) -> set[Node]:
    """What the outputs are but parts, forms, clamps and casts of, as nodes of autograd's graph."""
    waiting = [output.grad_fn for output in outputs]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # Such as SliceBackward0 and torch::autograd::CopyBackwards.
        if node.name().split("::")[-1].split("Backward")[0] in _KEEPING:
            waiting += [before for before, _ in node.next_functions]
    return seen


def _same_storage(a: Tensor, output: Tensor) -> bool:
    """Whether the output is a or a part of it, perhaps detached."""
    return (
        a.layout == output.layout == torch.strided
        and a.numel() > 0
        and output.untyped_storage().data_ptr() == a.untyped_storage().data_ptr()
    )


_IN_PLACE = {torch.sigmoid_, Tensor.sigmoid_}
_SIGMOIDS = {torch.sigmoid, Tensor.sigmoid, torch.special.expit, *_IN_PLACE}
# The operations that leave an output what it is, by the names of their nodes.
_KEEPING = {
    *("Clamp", "ClampMin", "ClampMax", "NanToNum", "ToCopy", "Clone", "Copy", "CopySlices"),
    *("View", "UnsafeView", "ReshapeAlias", "AsStrided", "Alias", "Squeeze", "Unsqueeze", "T"),
    *("Permute", "Transpose", "Expand", "Repeat", "Flip", "Roll", "Diagonal", "Slice", "Select"),
    *("Index", "IndexSelect", "Gather", "Take", "MaskedSelect", "MaskedFill", "Where", "Unbind"),
    *("Split", "SplitWithSizes", "Cat", "Stack", "BackwardHookFunction"),
}
