"""`watch`: log the saturation figures of any PyTorch model's sigmoid layers, through hooks.

The figures are those of `nnce.monitoring.saturation`, logged by any writer with `add_scalar`.
"""

import dataclasses
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from nnce import _torch_private, modules
from nnce._arguments import check_size
from nnce.modules import MLP
from nnce.monitoring import saturation


class ScalarWriter(Protocol):
    """Protocol of a logger: TensorBoard's `SummaryWriter`, or any object with `add_scalar`."""

    def add_scalar(self, tag: str, value: float, step: int) -> object:
        """Log one point of the curve `tag`."""


def watch(
    model: nn.Module,
    writer: ScalarWriter,
    *,
    every: int = 100,
    logits: bool | None = None,
    name: str | None = None,
) -> "Watcher":
    """Log saturation figures of a model's sigmoid layers while your own loop trains it.

    Logs four curves per sigmoid layer, numbered in the order of the forward pass: dz_norm/layer1
    (‖dC/dz‖ averaged over the examples, with C as your code averages and scales it),
    sigmoid_prime/layer1, saturated/layer1 and slowdown/layer1 (see `nnce.monitoring.slowdown`). The
    slowdown of an output layer is ‖dz quadratic‖ / ‖dz cross-entropy‖ over the examples with an
    error above ½. Targets, which are not passed to a model, are inferred from the sign of the
    gradient, as 0 or 1.

    A step is a forward pass in training mode with gradients enabled. Only the outermost call of a
    recursive model is a step; threads that share a model take separate steps. A step without a
    backward pass leaves a gap; two backward passes (retain_graph=True) log two points, each with
    its own gradient. Gradients are not changed.

    Rows of a sigmoid's input are examples; a one-dimensional input is one neuron over several
    examples. A layer is an output layer if the model returns its a, alone or in mappings, lists,
    tuples and dataclasses, in whole or in part, clamped, cast, reshaped, concatenated or detached.
    A layer whose a is returned in any other form, such as 1 − a, is a hidden layer.

    Layers are found by calls of `torch.sigmoid`, its aliases and its in-place form,
    `torch.nn.Sigmoid`, and the `nnce.Sigmoid` modules that the model has when `watch` is called.
    Not logged, and not numbered, are:

    - the function `nnce.sigmoid`, and sigmoids inside a fused kernel, as in an LSTM;
    - code that runs with gradients disabled, including code under `torch.utils.checkpoint` with
      use_reentrant=True, which is differentiated in a second run during the backward pass;
    - threads that the model starts, as `torch.nn.DataParallel` does;
    - compiled and scripted code, and `torch.func` transforms.

    A model that is checkpointed as a whole is logged; with use_reentrant=False, its second run,
    during the backward pass, counts as another step, which leaves a gap.

    Args:
        model: any module that is not compiled; for a compiled model, pass the original module.
        writer: receives each point by add_scalar(tag, value, step): a TensorBoard `SummaryWriter`
            that stays open while the model is watched, or any other object with this method.
        every: number of steps between two points of a curve, at least 1; the first step is logged.
        logits: whether the model returns z, with the sigmoid in the loss, as with
            `BCEWithLogitsLoss` and nnce's losses; None for True if the model is an `nnce.MLP`.
        name: prefix that distinguishes several models on one writer: dz_norm/NAME/layer1; None for
            dz_norm/layer1.

    Returns:
        A watcher. Its `remove()`, or leaving its with-block, stops logging.

    Raises:
        TypeError: model is not a Module, writer has no add_scalar, or name is not a string.
        ValueError: `every` is not a whole number of at least 1, the model is compiled, or the
            writer already logs a model under the same name.
        ValueError: at the first step, if no sigmoid was called in the forward pass.

    >>> class Printer:
    ...     def add_scalar(self, tag, value, step):
    ...         print(tag, step)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Sigmoid())
    >>> with nnce.watch(model, Printer()):
    ...     model(torch.rand(4, 2)).sum().backward()
    dz_norm/layer1 0
    sigmoid_prime/layer1 0
    saturated/layer1 0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module to watch, got {type(model).__name__}")
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"expected a writer with add_scalar, got {type(writer).__name__}")
    every = check_size("every", every)
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "expected a model that is not compiled, because compiled code is not logged; "
            "watch and train the original module"
        )
    if not (name is None or isinstance(name, str)):
        raise TypeError(f"expected name to be a string or None, got {type(name).__name__}")
    if any(other.logs_to(writer, name) for other in list(_WATCHERS)):
        raise ValueError(
            f"expected a different name for each model watched on one writer, got a second one "
            f"with name={name!r}"
        )
    return Watcher(model, writer, every, isinstance(model, MLP) if logits is None else logits, name)


class Watcher:
    """Hooks that `watch` has attached to a model."""

    def __init__(
        self,
        model: nn.Module,
        writer: ScalarWriter,
        every: int,
        logits: bool,
        name: str | None = None,
    ) -> None:
        self.step = 0
        """Number of steps so far."""
        self._writer, self._every, self._logits, self._name = writer, every, logits, name
        self._model, self._kind = weakref.ref(model), type(model).__name__
        self._removed = False
        self._call = _Call()
        self._lock = threading.Lock()
        # Number of running passes, over all threads, on PyTorch's stacks of function modes.
        self._on_stacks = 0
        self._handles = [
            *(
                module.register_forward_hook(self._sigmoid_module, with_kwargs=True)
                for module in model.modules()
                if isinstance(module, modules.Sigmoid)
            ),
            # First, so that it is always called if the hook after the forward is.
            model.register_forward_pre_hook(self._before, prepend=True),
            # Also called after a forward that raised.
            model.register_forward_hook(self._after, always_call=True),
        ]
        _WATCHERS.add(self)

    def __reduce__(self) -> tuple[Callable[[], "Watcher"], tuple[()]]:
        """Copy or pickle as a removed watcher: the copy of a watched model is not watched."""
        return _unwatching, ()

    def logs_to(self, writer: ScalarWriter, name: str | None) -> bool:
        """Whether this watcher logs to this writer under this name."""
        ended = self._removed or self._model() is None
        return not ended and self._writer is writer and self._name == name

    def remove(self) -> None:
        """Stop logging and remove all hooks from the model.

        Passes that are still running, in other threads or around this call, are completed but not
        logged. The last of them removes the hooks; if it raises, the next call of the model does.
        """
        self._removed = True
        if not self._call.is_running():
            self._end()
        self._detach()

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _detach(self) -> None:
        # A running pass requires the hook that ends it.
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
        self._end()  # clean up after an interrupted call
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
        # output is None if the forward pass raised. PyTorch is then iterating over the model's
        # dictionary of hooks, so that no hook can be removed.
        if watched is None or output is None:
            return
        if self._removed:
            self._detach()
            return
        if self._logits:
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"expected {self._kind} to return one tensor of logits, got "
                    f"{type(output).__name__}; watch with logits=False if its sigmoids are inside"
                )
            watched.add(watched.layer(output), None)
        if not watched.layers:
            self.remove()
            raise ValueError(
                f"expected a model with sigmoids, but the forward pass of {self._kind} called "
                f"none; if the sigmoid is in the loss, as in BCEWithLogitsLoss, watch with "
                f"logits=True"
            )
        watched.complete(list(_tensors(output)))

    def _end(self) -> "_Pass | None":
        """Remove this thread's pass, if there is one, from PyTorch's stack and return it."""
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
        error = dz if da is None else _rows(da)
        if layer.is_output:
            # The gradient with respect to an output that is too large is positive for any loss. If
            # the gradient is rounded to 0, the output counts as right.
            a = z.sigmoid()
            y = torch.where(error > 0, 0.0, torch.where(error < 0, 1.0, a.round()))
            figures = saturation.output_layer(z, dz, y)
        else:
            figures = saturation.hidden_layer(z, dz, error)
        name = "" if self._name is None else f"/{self._name}"
        for figure, value in zip(saturation.LayerFigures._fields, figures.tolist(), strict=True):
            if math.isfinite(value):
                self._writer.add_scalar(f"{figure}{name}/layer{layer.number}", value, layer.step)


_WATCHERS: "weakref.WeakSet[Watcher]" = weakref.WeakSet()


def _unwatching() -> Watcher:
    watcher = Watcher(nn.Module(), cast(ScalarWriter, None), every=1, logits=False)
    watcher.remove()
    return watcher


def _goes_by() -> bool:
    """Whether the current code is compiled or transformed, so that tensors have no values."""
    return torch.compiler.is_compiling() or _torch_private.in_functorch_transform()


def _rows(tensor: Tensor) -> Tensor:
    """Reshape to [examples, neurons], with one neuron if one-dimensional, in at least float32."""
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)
    return rows if rows.dtype == torch.float64 else rows.float()


class _Call(threading.local):
    """The watched model's call in this thread; the outermost one if the model is recursive."""

    caller: FrameType | None = None
    depth = 0
    watched: "_Pass | None" = None

    def is_running(self) -> bool:
        """Whether the call is running. Ctrl-C may end it without the hook after the forward."""
        frame = None if self.caller is None else sys._getframe(1)
        while frame is not None and frame is not self.caller:
            frame = frame.f_back
        return frame is not None


class _Pass(TorchFunctionMode):
    """Function mode that records the sigmoids of one forward pass."""

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
        # Gradients are disabled inside an autograd Function, such as nnce's.
        if function not in _SIGMOIDS or not torch.is_grad_enabled() or _goes_by():
            return function(*arguments, **keywords)
        z = arguments[0] if arguments else keywords["input"]
        layer = self.layer(z)
        if function in _IN_PLACE and z.requires_grad:
            # In two steps, because no hook receives dz of a view that is overwritten in one.
            a = torch.sigmoid(z)
            result = z.copy_(a)
        else:
            a = result = function(*arguments, **keywords)
        self.add(layer, a)
        return result

    def layer(self, z: Tensor) -> "_Layer":
        """Record z before it can be overwritten."""
        return _Layer(self._watcher, self._step, z)

    def add(self, layer: "_Layer", a: Tensor | None) -> None:
        """Record the layer's a, and number the layer."""
        self.layers.append((layer, a, None if a is None else a.grad_fn))
        layer.number = len(self.layers)
        if a is not None:
            layer.follow(a)

    def complete(self, outputs: Sequence[Tensor]) -> None:
        """Mark the output layers; from now on, all layers log."""
        returned = _nodes_behind(outputs)
        for layer, a, node in self.layers:
            layer.is_output = (
                a is None or node in returned or any(_same_storage(a, output) for output in outputs)
            )


class _Layer:
    """A layer in one pass: its z, and its gradients once the backward pass has computed them."""

    number: int
    is_output: bool | None = None
    """None during the forward pass."""

    def __init__(self, watcher: Watcher, step: int, z: Tensor) -> None:
        self._watcher, self.step = watcher, step
        # Cloned, because z may be overwritten; detached, so that the hook does not keep the graph.
        self.z = z.detach().clone()
        self._da: Tensor | None = None
        # A hook on a leaf, such as a parameter, would outlive the pass; `follow` hooks a's node.
        self._is_leaf = z.is_leaf
        if z.requires_grad and not z.is_leaf:
            z.register_hook(self._keep_dz)

    def follow(self, a: Tensor) -> None:
        """Register hooks for da, and for dz if z is a leaf."""
        if not a.requires_grad:
            return
        a.register_hook(self._keep_da)
        if self._is_leaf and a.grad_fn is not None:
            a.grad_fn.register_hook(lambda dz, da: self._keep_dz(dz[0]))

    def _keep_da(self, da: Tensor) -> None:
        self._da = None if _torch_private.is_batched_gradient(da) else da.detach()

    def _keep_dz(self, dz: Tensor | None) -> None:
        da, self._da = self._da, None
        if (
            self.is_output is not None
            and dz is not None
            and not _torch_private.is_batched_gradient(dz)
        ):
            self._watcher._log(self, da, dz.detach())


def _tensors(output: object) -> Iterator[Tensor]:
    """Iterate over the tensors in a model's output."""
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


def _nodes_behind(outputs: Sequence[Tensor]) -> set[Node]:
    """Graph nodes whose values the outputs contain, as parts, views, clamped or cast."""
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
    """Whether the output is a, or a part of it, possibly detached."""
    return (
        a.layout == output.layout == torch.strided
        and a.numel() > 0
        and output.untyped_storage().data_ptr() == a.untyped_storage().data_ptr()
    )


_IN_PLACE = {torch.sigmoid_, Tensor.sigmoid_}
_SIGMOIDS = {torch.sigmoid, Tensor.sigmoid, torch.special.expit, *_IN_PLACE}
# Operations that do not change the meaning of an output, by the names of their nodes.
_KEEPING = {
    *("Clamp", "ClampMin", "ClampMax", "NanToNum", "ToCopy", "Clone", "Copy", "CopySlices"),
    *("View", "UnsafeView", "ReshapeAlias", "AsStrided", "Alias", "Squeeze", "Unsqueeze", "T"),
    *("Permute", "Transpose", "Expand", "Repeat", "Flip", "Roll", "Diagonal", "Slice", "Select"),
    *("Index", "IndexSelect", "Gather", "Take", "MaskedSelect", "MaskedFill", "Where", "Unbind"),
    *("Split", "SplitWithSizes", "Cat", "Stack", "BackwardHookFunction"),
}
