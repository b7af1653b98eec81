"""All uses of PyTorch's private API in this package, each with its reason.

They have their own file here because the checks import nothing else of nnce, so that they can be
copied elsewhere.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# PyTorch has no exception types for these errors; they are recognized by their messages.
NO_DERIVATIVE = re.compile("derivative for aten::|no second derivatives")
"""Pattern in the error of an operation without a (second) derivative."""
NO_FORWARD_MODE = (
    "You must implement the jvp function",
    "Trying to use forward AD with",
    "Nested forward mode AD is not supported",
)
"""Beginnings of the errors of a Function or an operation without forward mode."""
TANGENT_IGNORED = "PyTorch ignores the tangent of this operator, which has no forward mode"
"""Our message for `torch.library.custom_op` operators, where PyTorch raises no error."""


class Unavailable(Exception):
    """This version of PyTorch lacks a private API that a check needs."""


def version(tensor: Tensor) -> int:
    """The number of in-place writes to a tensor; there is no public counter."""
    return tensor._version


def refuses_derivative(tensor: Tensor) -> bool:
    """Whether a node in the tensor's graph raises when it is differentiated.

    `once_differentiable` inserts an "Error" node without outgoing edges, so that a derivative with
    respect to a chosen input would skip it and be 0. The type of that node is not public.
    """
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("::Error"):
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False


def compile_counter() -> Any:
    """A `torch.compile` backend that counts compilations, from PyTorch's own test utilities."""
    try:
        from torch._dynamo.testing import CompileCounterWithBackend
    except ImportError as error:
        raise Unavailable("this PyTorch has no torch._dynamo.testing") from error
    counter: Any = CompileCounterWithBackend
    return counter("aot_eager")


class _Watched(TorchDispatchMode):
    """Observes the operators of a call, with arguments and output; no public API does this."""

    def __init__(self, see: Callable[[Any, Any, Any, Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._see = see

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self._see(func, args, kwargs or {}, output)
        return output


def narrowest(call: Callable[[], object]) -> torch.dtype:
    """The least precise dtype that a call converts numbers to, or float64."""
    found = [torch.float64]

    def unit(dtype: torch.dtype) -> float:
        return torch.finfo(dtype).eps

    def dtypes(nested: Any) -> list[torch.dtype]:
        tensors = [t for t in tree_leaves(nested) if isinstance(t, Tensor)]
        return [t.dtype for t in tensors if t.is_floating_point()]

    def see(func: Any, args: Any, kwargs: Any, output: Any) -> None:
        returned = max(dtypes(output), key=unit, default=torch.float64)
        if returned != torch.float64:
            given = dtypes((args, kwargs))
            if given and unit(returned) > min(map(unit, given)):
                found.append(returned)

    with _Watched(see):
        call()
    return max(found, key=unit)


def operators_without_tangents(call: Callable[[], object]) -> list[str]:
    """The custom operators in a call whose tangents PyTorch drops without an error.

    PyTorch does so for `torch.library.custom_op` with `register_autograd`, which has no forward
    mode.
    """
    calls: list[tuple[Any, Any, Any]] = []

    def see(func: Any, args: Any, kwargs: Any, output: Any) -> None:
        if func.namespace not in ("aten", "prim", "prims"):
            calls.append((func, args, kwargs))

    with _Watched(see):
        call()
    return list(dict.fromkeys(str(func.name()) for func, *rest in calls if _drops(func, *rest)))


def _drops(func: Any, args: Any, kwargs: Any) -> bool:
    def dual(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return fwAD.make_dual(value.detach().clone(), torch.ones_like(value))
        return value

    try:
        with fwAD.dual_level():
            outputs = tree_leaves(func(*tree_map(dual, args), **tree_map(dual, kwargs)))
            real = [t for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]
            return bool(real) and all(fwAD.unpack_dual(t).tangent is None for t in real)
    except Exception:  # the function raises its own error for missing forward mode
        return False
