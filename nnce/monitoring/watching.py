"""Watch any PyTorch model learn: the figures of its sigmoid layers, through hooks.

The figures are those of `nnce.monitoring.saturation`; any writer with `add_scalar` takes them.
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
    """What takes the figures: TensorBoard's `SummaryWriter`, or a few lines of your own."""

    def add_scalar(self, tag: str, value: float, step: int) -> object:
        """Take one point of the curve called `tag`."""


def watch(
    model: nn.Module,
    writer: ScalarWriter,
    *,
    every: int = 100,
    logits: bool | None = None,
    name: str | None = None,
) -> "Watcher":
    """Log how the sigmoid layers of any model learn, while your own loop trains it.

    Logs four curves per sigmoid layer, numbered in the order of the forward pass: dz_norm/layer1
    (‖dC/dz‖ averaged over the examples, with C as your code averages and scales it),
    sigmoid_prime/layer1, saturated/layer1 and slowdown/layer1 (see `nnce.monitoring.slowdown`). The
    slowdown of an output layer is ‖dz quadratic‖ / ‖dz cross-entropy‖ over the examples that are
    wrong by more than ½; targets, which a model does not see, are inferred from the sign of the
    gradient, as 0 or 1.

    A step is a forward pass in training mode with gradients on: of a recursive model the outermost
    call, of a model shared by threads one for each thread. A step without a backward pass leaves a
    gap; two backward passes (retain_graph=True) log two points, each of its own gradient. Gradients
    are not changed.

    Rows of a sigmoid's input are examples; a one-dimensional input is one neuron, an example each.
    An output layer is one whose a the model returns, alone or inside mappings, lists, tuples and
    dataclasses, whole or in part, clamped, cast, reshaped, concatenated or detached. A layer whose
    a is returned in any other form, such as 1 − a, is a hidden layer.

    Seen are `torch.sigmoid`, its aliases and its in-place form, `torch.nn.Sigmoid`, and the
    `nnce.Sigmoid` modules that the model has when the watch begins. Not seen, and not numbered:

    - the function `nnce.sigmoid`, and sigmoids inside a fused kernel, as in an LSTM;
    - whatever runs with gradients off, hence under `torch.utils.checkpoint` with
      use_reentrant=True, which differentiates a second run in the backward pass;
    - threads that the model starts, as `torch.nn.DataParallel` does;
    - compiled and scripted code, and `torch.func` transforms.

    A model that is checkpointed as a whole is seen; with use_reentrant=False its second run, in the
    backward pass, counts as one more step, which leaves a gap.

    Args:
        model: any module that is not compiled; of a compiled one, watch the original module.
        writer: receives each point by add_scalar(tag, value, step): a `SummaryWriter` of
            TensorBoard that stays open while the model is watched, or any other such object.
        every: steps between two points of a curve, at least 1; the first step is one.
        logits: whether the model returns z, with the sigmoid in the loss, as for
            `BCEWithLogitsLoss` and nnce's losses; None for yes if it is an `nnce.MLP`.
        name: distinguishes models on one writer, in the tags: dz_norm/NAME/layer1; None for
            dz_norm/layer1.

    Returns:
        The watcher; its `remove()`, or the end of its with-block, ends the watch.

    Raises:
        TypeError: model is not a Module, writer has no add_scalar, or name is not a string.
        ValueError: `every` is not a whole number of at least 1, the model is compiled, or the
            writer is taken already, under the same name.
        ValueError: at the first step, if the forward pass came by no sigmoid.

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
            "expected a model that is not compiled, whose layers can be seen; train the module it "
            "was made from while you watch"
        )
    if not (name is None or isinstance(name, str)):
        raise TypeError(f"expected name to be a string or None, got {type(name).__name__}")
    if any(other.logs_to(writer, name) for other in list(_WATCHERS)):
        raise ValueError(
            f"expected a name of its own for each model watched on one writer, got a second one "
            f"with name={name!r}"
        )
    return Watcher(model, writer, every, isinstance(model, MLP) if logits is None else logits, name)


class Watcher:
    """What `watch` has attached to a model."""

    def __init__(
        self,
        model: nn.Module,
        writer: ScalarWriter,
        every: int,
        logits: bool,
        name: str | None = None,
    ) -> None:
        self.step = 0
        """Steps seen so far."""
        self._writer, self._every, self._logits, self._name = writer, every, logits, name
        self._model, self._kind = weakref.ref(model), type(model).__name__
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
        _WATCHERS.add(self)

    def __reduce__(self) -> tuple[Callable[[], "Watcher"], tuple[()]]:
        """A copy of a watched model, deep or pickled, is not watched."""
        return _unwatching, ()

    def logs_to(self, writer: ScalarWriter, name: str | None) -> bool:
        """Whether it logs to this writer under this name."""
        ended = self._removed or self._model() is None
        return not ended and self._writer is writer and self._name == name

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
        return self

    def __exit__(self, *error: object) -> None:
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
                    f"expected {self._kind} to give one tensor of logits, got "
                    f"{type(output).__name__}"
                )
            watched.add(watched.layer(output), None)
        if not watched.layers:
            self.remove()
            raise ValueError(
                f"expected a model with sigmoids, but the forward pass of {self._kind} came by "
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
            figures = saturation.output_layer(z, dz, y)
        else:
            figures = saturation.hidden_layer(z, dz, pull)
        name = "" if self._name is None else f"/{self._name}"
        for what, value in figures._asdict().items():
            if math.isfinite(value):
                self._writer.add_scalar(f"{what}{name}/layer{layer.number}", value, layer.step)


_WATCHERS: "weakref.WeakSet[Watcher]" = weakref.WeakSet()


def _unwatching() -> Watcher:
    watcher = Watcher(nn.Module(), cast(ScalarWriter, None), every=1, logits=False)
    watcher.remove()
    return watcher


def _goes_by() -> bool:
    """Whether what runs now is compiled or transformed, where tensors have no values to look at."""
    return torch.compiler.is_compiling() or _torch_private.in_functorch_transform()


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
        """Whether it is still running. Ctrl-C ends a call without the hook after the forward."""
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
    """Nodes of autograd's graph that the outputs are parts, views, clamps or casts of."""
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
# Operations that do not change the meaning of an output, by the names of their nodes.
_KEEPING = {
    *("Clamp", "ClampMin", "ClampMax", "NanToNum", "ToCopy", "Clone", "Copy", "CopySlices"),
    *("View", "UnsafeView", "ReshapeAlias", "AsStrided", "Alias", "Squeeze", "Unsqueeze", "T"),
    *("Permute", "Transpose", "Expand", "Repeat", "Flip", "Roll", "Diagonal", "Slice", "Select"),
    *("Index", "IndexSelect", "Gather", "Take", "MaskedSelect", "MaskedFill", "Where", "Unbind"),
    *("Split", "SplitWithSizes", "Cat", "Stack", "BackwardHookFunction"),
}
