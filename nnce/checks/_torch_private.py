"""Every use of PyTorch's private API in this package, one reason each.

The checks import nothing of nnce, so that they can be copied elsewhere; hence a file of their own.
"""

import re
from typing import Any

from torch import Tensor

# PyTorch has no exception type of its own for either; these are the beginnings of its sentences.
NO_DERIVATIVE = re.compile("derivative for aten::|no second derivatives")
"""What an operation says that has no (second) derivative."""
NO_FORWARD_MODE = ("You must implement the jvp function", "Trying to use forward AD with")
"""What a Function or an operation says that has no forward mode."""


class Unavailable(Exception):
    """This version of PyTorch lacks a private part that a check needs."""


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; there is no public counter."""
    return tensor._version


def refuses_derivative(tensor: Tensor) -> bool:
    """Whether a node in the tensor's graph raises when it is differentiated.

    `once_differentiable` puts an "Error" node there, with edges to nowhere, so that a derivative
    with respect to a chosen input would pass it by and be 0. The type of that node is not public.
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
    """A `torch.compile` backend that counts compilations, which PyTorch has for its own tests."""
    try:
        from torch._dynamo.testing import CompileCounterWithBackend
    except ImportError as error:
        raise Unavailable("this PyTorch has no torch._dynamo.testing") from error
    counter: Any = CompileCounterWithBackend
    return counter("aot_eager")
