"""All uses of PyTorch's private API, each with its reason.

Imports nothing from nnce. (`nnce/checks`, which imports nothing from nnce either, has its own;
uses of Numba's private API are in `kernels`.)
"""

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.utils.data._utils.collate import default_collate_fn_map


def forward_mode_levels() -> int:
    """Number of active nested forward-mode transforms of `torch.func`.

    Required because PyTorch silently drops a term of a `jvp` inside another; there is no public
    function for it.
    """
    active = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in active)


def in_functorch_transform() -> bool:
    """Whether a transform of `torch.func` is active, in which tensors may have no values."""
    return bool(torch._C._are_functorch_transforms_active())


def is_functorch_tensor(tensor: Tensor) -> bool:
    """Whether a transform of `torch.func` wraps the tensor, which must not be changed in place.

    The backward of a Function may receive such a tensor after the transform has ended.
    """
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_batched_gradient(gradient: Tensor) -> bool:
    """Whether the tensor is a batch of gradients from `is_grads_batched`, without values."""
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
    """Whether operations on these tensors are dispatched directly to CPU or CUDA kernels.

    False in a dispatch mode (`make_fx`, `FlopCounterMode`), a transform of `torch.func`,
    `jit.trace`, autograd's `is_grads_batched` or a forward-mode level, and for fake, meta, sparse,
    quantized, batched and zero tensors, tensors wrapped by a transform, and negative views. Public
    functions detect few of these, in several calls; the dispatcher's state shows all of them except
    forward mode.
    """
    if _included_keys().raw_repr() & _NOT_INERT or forward_ad._current_level >= 0:
        return False
    for tensor in tensors:  # noqa: SIM110  a generator would take twice as long
        if _dispatch_keys(tensor).raw_repr() & _NOT_ORDINARY:
            return False
    return True


def single_level_apply(function: type[Function]) -> Callable[..., Any]:
    """Return `function.apply` without its Python part, for use outside `torch.func`.

    The Python part checks for transforms, and takes a fifth of the time of a call.
    """
    base: Any = super(Function, function)
    apply: Callable[..., Any] = base.apply
    return apply


_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)


def _without_dynamo(optimizer: type[_Optimizer]) -> type[_Optimizer]:
    names = ("add_param_group", "step", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    methods["step"] = torch.no_grad()(methods["step"])
    return cast(type[_Optimizer], type(optimizer.__name__, (optimizer,), methods))


# PyTorch's optimizers without the wrappers that serve `torch.compile`: they import dynamo, which
# takes 2 s, and slow down a step. No public option leaves them out.
SGD = _without_dynamo(torch.optim.SGD)
Adam = _without_dynamo(torch.optim.Adam)


def assert_later(condition: Tensor) -> None:
    """Assert a condition asynchronously: a failure is raised on the device, some time later."""
    torch._assert_async(condition)


def below_autograd() -> AbstractContextManager[None]:
    """Context manager in which an operator's autograd kernel can call its backend kernel."""
    guard: AbstractContextManager[None] = torch._C._AutoDispatchBelowAutograd()
    return guard


def version(tensor: Tensor) -> int:
    """Number of in-place changes of the tensor, the counter that autograd's own check reads."""
    return int(tensor._version)


def owner(tensor: Tensor) -> Tensor:
    """The base of a view, which lives as long as their memory; for other tensors, the tensor."""
    return tensor if tensor._base is None else tensor._base


def uncoalesced(target: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values of a COO tensor; the public methods require a coalesced tensor."""
    return target._indices(), target._values()


def register_collate(kind: type, collate: Callable[..., Any]) -> None:
    """Register a collate function for a type with `DataLoader`, as in PyTorch's documentation."""
    default_collate_fn_map[kind] = collate


class KeepsMissing(nn.Module):
    """Module that keeps its own values of the tensors `may_be_missing` if a state_dict lacks them.

    The public hook for this would be pickled with the module, and is missing in older pickles.
    """

    may_be_missing: tuple[str, ...] = ()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        for name in self.may_be_missing:
            if getattr(self, name) is not None:
                state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def hooks_of(module: nn.Module) -> list[object]:
    """The hooks of a module, for which PyTorch has no public name."""
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
    """The hooks of a tensor, for which PyTorch has no public name."""
    return [
        hook
        for hooks in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
        for hook in (hooks or {}).values()
    ]


def checkpoint_stage() -> str | None:
    """Distinguish the two runs of `torch.utils.checkpoint(use_reentrant=False)`.

    PyTorch has no public function for this, but the hooks of the two runs have different names. In
    a version of PyTorch with different names, gradients are computed in both runs.

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
