"""A function under test, and the inputs with respect to which it is differentiated."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nnce.checks._torch_private import version

Function = Callable[..., Tensor]


class Subject:
    """A function with copies of its arguments, the floating-point ones in float64.

    The function is differentiated with respect to the floating-point tensors that require a
    gradient, or all floating-point tensors if none does. Other arguments are passed unchanged.
    """

    def __init__(self, function: Function, arguments: Sequence[Any], name: str) -> None:
        if not callable(function):
            raise TypeError(f"expected {name} to be callable, got {type(function).__name__}")
        _check_arguments(arguments)
        real = [i for i, value in enumerate(arguments) if is_real(value)]
        wanted = [i for i in real if arguments[i].requires_grad]
        self.function, self.name = function, name
        self.places = wanted or real
        self.arguments = [_wide(value) for value in arguments]
        self.writes = False
        """Whether the function overwrites an argument; if so, it receives copies."""
        self.writes_upstream = False
        """Whether its backward has overwritten an upstream gradient."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments with respect to which the function is differentiated."""
        return tuple(self.arguments[i] for i in self.places)

    def fill(self, inputs: Sequence[Tensor]) -> list[Any]:
        """All arguments, with the given inputs substituted."""
        filled = list(self.arguments)
        for i, value in zip(self.places, inputs, strict=True):
            filled[i] = value
        if self.writes:
            filled = [copied(value) for value in filled]
        return filled

    def fresh(self) -> list[Any]:
        """Copies of all arguments; non-leaf tensors, so that they may be overwritten."""
        arguments = [copied(value) for value in self.arguments]
        for i in self.places:
            arguments[i] = arguments[i].requires_grad_().clone()
        return arguments

    def call(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output; any exception from the function becomes a one-sentence ValueError."""
        return self._run(self.fill(inputs))

    def _run(self, arguments: Sequence[Any]) -> Tensor:
        try:
            output = self.function(*arguments)
        except Exception as error:  # any error from the user's function
            where = "in float64" if torch.is_grad_enabled() else "under torch.no_grad()"
            raise ValueError(f"{self.name} failed {where}: {sentence(error)}") from error
        if not is_real(output):
            raise TypeError(
                f"expected {self.name} to return a floating-point tensor, got {kind(output)}"
            )
        if output.layout != torch.strided or output.is_meta:
            got = "a meta tensor" if output.is_meta else f"layout {output.layout}"
            raise ValueError(f"expected {self.name} to return a dense tensor with data, got {got}")
        return output

    def observe(self) -> Tensor:
        """Call the function twice, set `writes`, and return the output.

        Raises:
            TypeError: the output is not a floating-point tensor.
            ValueError: the function fails, is random, returns an empty tensor, or is not
                differentiable with respect to its inputs.
        """
        first, second = self._observe_once(), self._observe_once()
        if not first.requires_grad:
            raise ValueError(
                f"expected {self.name} to depend on its floating-point inputs in a way that "
                "autograd can follow, got an output that does not require a gradient"
            )
        if not first.numel():
            shape = tuple(first.shape)
            raise ValueError(f"expected {self.name} to return elements, got shape {shape}")
        if not equal(first, second):
            raise ValueError(
                f"expected {self.name} to be deterministic, got two different outputs for the same "
                "inputs"
            )
        return first.detach()

    def _observe_once(self) -> Tensor:
        arguments = self.fresh()
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        originals = [value for value in self.arguments if isinstance(value, Tensor)]
        versions = [version(value) for value in tensors]
        output = self._run(arguments)
        triples = zip(tensors, originals, versions, strict=True)
        if any(version(now) != old or not equal(now, then) for now, then, old in triples):
            self.writes = True
        return output


def _check_arguments(arguments: Sequence[Any]) -> None:
    """Raise unless derivatives can be computed with these arguments."""
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        where = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
        raise ValueError(f"expected gradients to be enabled, got a call under torch.{where}()")
    real = {i: value for i, value in enumerate(arguments) if is_real(value)}
    if not real:
        got = ", ".join(kind(value) for value in arguments) or "no inputs"
        raise TypeError(
            f"expected a floating-point tensor to differentiate with respect to, got {got}"
        )
    for i, value in real.items():
        if value.layout != torch.strided:
            raise ValueError(f"expected dense inputs, got input {i} of layout {value.layout}")
        if value.is_meta:
            raise ValueError(f"expected inputs with data, got input {i} on the meta device")
    if not any(value.numel() for value in real.values()):
        raise ValueError("expected elements to differentiate with respect to, got empty tensors")


def _wide(value: Any) -> Any:
    """Copy a tensor, converting floating point to float64; return other values unchanged."""
    if is_real(value):
        return value.detach().double().clone(memory_format=torch.contiguous_format)
    return value.detach().clone() if isinstance(value, Tensor) else value


def copied(value: Any) -> Any:
    """Copy a tensor; return other values unchanged."""
    return value.clone() if isinstance(value, Tensor) else value


def is_real(value: object) -> bool:
    """Whether a value is a floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def kind(value: object) -> str:
    """The description of a value for error messages."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def alike(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors are equal, or both NaN."""
    return (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether all elements of two tensors are equal, or both NaN."""
    return a.shape == b.shape and bool(alike(a, b).all())


def sentence(error: BaseException) -> str:
    """The type and the first line of an exception."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
