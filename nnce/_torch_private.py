"""Every use of PyTorch's private API, one function and one reason each.

Imports nothing of nnce. (`nnce/checks` has its own, since it imports nothing of nnce either, and
Numba's is in `kernels`.)
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.utils.data._utils.collate import default_collate_fn_map


def forward_mode_levels() -> int:
    """Number of nested forward-mode transforms of `torch.func` that are active.

    No public function tells: PyTorch drops a term of a `jvp` inside another one silently.
    """
    active = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in active)


def in_functorch_transform() -> bool:
    """Whether a transform of `torch.func` is active, where tensors may have no values to read."""
    return bool(torch._C._are_functorch_transforms_active())


def is_functorch_tensor(tensor: Tensor) -> bool:
    """Whether a transform of `torch.func` wraps the tensor, which no in-place operation may touch.

    The backward of a Function may see one after the transform has ended.
    """
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_batched_gradient(gradient: Tensor) -> bool:
    """Whether autograd's `is_grads_batched` has made it: many gradients in one, without values."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(gradient))


def _keys(*names: str) -> int:
    bits = 0
    for name in names:
        bits |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
    return bits


_NOT_INERT = ~_keys("BackendSelect", "ADInplaceOrView")
_NOT_ORDINARY = ~_keys(
    *("CPU", "AutogradCPU", "AutocastCPU", "CUDA", "AutogradCUDA", "AutocastCUDA"),
    "ADInplaceOrView",
)
_dispatch_keys = torch._C._dispatch_keys
_included_keys = torch._C._dispatch_tls_local_include_set


def dispatches_plainly(tensors: Iterable[Tensor]) -> bool:
    """Whether operations on these tensors go straight to the kernels for a CPU or CUDA.

    Not so in a dispatch mode (`make_fx`, `FlopCounterMode`), a transform of `torch.func`, a
    `jit.trace`, autograd's `is_grads_batched` or a forward-mode level, nor for fake, meta, sparse,
    quantized, batched and zero tensors, tensors wrapped by a transform, and negative views. Public
    functions tell about few of these, in several calls; the dispatcher's own state tells about all
    but forward mode.
    """
    if _included_keys().raw_repr() & _NOT_INERT or forward_ad._current_level >= 0:
        return False
    for tensor in tensors:  # noqa: SIM110  a generator would take twice the time
        if _dispatch_keys(tensor).raw_repr() & _NOT_ORDINARY:
            return False
    return True


def single_level_apply(function: type[Function]) -> Callable[..., Any]:
    """Return `function.apply` without its Python part, for use outside `torch.func`.

    That part looks for transforms and takes a fifth of the time of a call.
    """
    base: Any = super(Function, function)
    apply: Callable[..., Any] = base.apply
    return apply


def assert_later(condition: Tensor) -> None:
    """Fail on the device, some time later, unless the condition is true, without waiting for it."""
    torch._assert_async(condition)


def below_autograd() -> AbstractContextManager[None]:
    """Call an operator's own kernel from its kernel for autograd, as `torch.library` lets one."""
    guard: AbstractContextManager[None] = torch._C._AutoDispatchBelowAutograd()
    return guard


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; autograd's own check reads the same counter."""
    return int(tensor._version)


def owner(tensor: Tensor) -> Tensor:
    """The tensor that a view is a view of, which lives as long as their memory; else the tensor."""
    return tensor if tensor._base is None else tensor._base


def uncoalesced(target: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values of a COO tensor, whose public names require it to be coalesced first."""
    return target._indices(), target._values()


def register_collate(kind: type, collate: Callable[..., Any]) -> None:
    """Let `DataLoader` put examples of this type together by default, as PyTorch's docs do it."""
    default_collate_fn_map[kind] = collate


def hooks_of(module: nn.Module) -> list[object]:
    """The hooks of a module, which has no public name for them."""
    return [
        hook
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        for hook in hooks.values()
    ]


def tensor_hooks_of(parameter: Tensor) -> list[object]:
    """The hooks of a tensor, which has no public name for them."""
    return [
        hook
        for hooks in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
        for hook in (hooks or {}).values()
    ]


def checkpoint_stage() -> str | None:
    """Tell the two runs of a `torch.utils.checkpoint(use_reentrant=False)` apart.

    PyTorch has no public function for this, but the hooks of the two have different names. Where a
    version of PyTorch has other names, the gradients are computed in both.

    Returns:
        "forward", "recomputation", or None outside a checkpoint.
    """
    stages = {"_checkpoint_hook": "forward", "_recomputation_hook": "recomputation"}
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None or torch.compiler.is_compiling():
        return None
    if not all(hasattr(torch.utils.checkpoint, name) for name in stages):
        return None
    pack: Any = (top(False) or (None,))[0]
    if getattr(pack, "__module__", None) != "torch.utils.checkpoint":
        return None
    return stages.get(pack.__qualname__.partition(".")[0])
