"""The rules as `torch.autograd.Function`s, and the public functions that check and apply them.

A Function's forward is a rule of `nnce.rules` and its backward is another, both with the number of
the equation. A backward that needs σ uses this module's own `sigmoid`, so that derivatives of any
order are taken by the rules and stay exact where a rounds to 0 or 1. Only inputs are saved for the
backward: a saved intermediate would give silently wrong second derivatives.

The public functions check shape, dtype and device, never values: a check on values would make CUDA
wait and break `torch.compile` and `torch.func`. Values are checked where data enters, in
`nnce.data`.
"""

import inspect
from typing import Any, Literal, TypeVar, cast

from torch import Tensor
from torch.autograd import Function

from nnce import rules

Reduction = Literal["none", "sum", "mean", "batchmean"]

# ------------------------------------------------------------------------------- the Functions

_F = TypeVar("_F", bound=type[Function])


def _with_signature(function: _F) -> _F:
    # Function.apply asks inspect.signature about forward at every call, which took a sixth of a
    # training step; the answer is the same each time, and inspect looks for it here first.
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
    return function


@_with_signature
class LinearFunction(Function):
    """Equation 1 forward, equations 6 and 7 backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a_prev: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """z = W a_prev + b."""
        return rules.linear(a_prev, W, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep a_prev and W."""
        a_prev, W, _ = inputs
        ctx.save_for_backward(a_prev, W)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by a_prev (7), W and b (6), each only if it is asked for."""
        (dz,) = upstream
        a_prev, W = ctx.saved_tensors
        wants_a_prev, wants_W, wants_b = ctx.needs_input_grad
        return (
            rules.da_prev(dz, W) if wants_a_prev else None,
            rules.dW(dz, a_prev) if wants_W else None,
            rules.db(dz) if wants_b else None,
        )


@_with_signature
class SigmoidFunction(Function):
    """Equation 1 forward, equation 8 backward, from z."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        """a = σ(z)."""
        return rules.sigmoid(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep z: from a, σ'(z) = a (1−a) is 0 as soon as a rounds to 1."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        """dC/dz = dC/da ∘ σ'(z)."""
        (da,) = upstream
        (z,) = ctx.saved_tensors
        return rules.dz_hidden(da, z, sigmoid)


@_with_signature
class SigmoidQuadraticFunction(Function):
    """Equation 2 forward, equation 4 backward, per component."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, y: Tensor) -> Tensor:
        """C = ½ (σ(z) − y)²."""
        return rules.quadratic(z, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep z and y."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """dC/dz = (a − y) ∘ σ'(z), and dC/dy = y − a."""
        (dC,) = upstream
        z, y = ctx.saved_tensors
        wants_z, wants_y = ctx.needs_input_grad
        return (
            dC * rules.dz_quadratic(z, y, sigmoid) if wants_z else None,
            -dC * rules.residual(z, y, sigmoid) if wants_y else None,
        )


@_with_signature
class SigmoidCrossEntropyFunction(Function):
    """Equation 3 forward, equation 5 backward, per component."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, y: Tensor) -> Tensor:
        """C = −[y ln σ(z) + (1−y) ln(1 − σ(z))]."""
        return rules.cross_entropy(z, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep z and y."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """dC/dz = a − y, and dC/dy = ln(1−a) − ln a = −z."""
        (dC,) = upstream
        z, y = ctx.saved_tensors
        wants_z, wants_y = ctx.needs_input_grad
        return (
            dC * rules.dz_cross_entropy(z, y, sigmoid) if wants_z else None,
            -dC * z if wants_y else None,
        )


# ------------------------------------------------------------------------ the public functions


def linear(a_prev: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """z = W a_prev + b (equation 1), differentiated by equations 6 and 7.

    Args:
        a_prev: activations of the layer before, [..., n_in].
        W: weights, [n_out, n_in].
        b: biases, [n_out], or None for no bias.

    Returns:
        z, [..., n_out].

    Raises:
        TypeError: an argument is no tensor, is not floating-point, or the dtypes differ.
        ValueError: shapes or devices do not fit.
    """
    _check_alike(a_prev=a_prev, W=W, **({} if b is None else {"b": b}))
    if W.dim() != 2:
        raise ValueError(f"expected W of shape (n_out, n_in), got {_shape(W)}")
    if a_prev.dim() == 0 or a_prev.shape[-1] != W.shape[1]:
        raise ValueError(
            f"expected a_prev of shape (..., {W.shape[1]}) to go with W of shape {_shape(W)}, "
            f"got {_shape(a_prev)}"
        )
    if b is not None and b.shape != W.shape[:1]:
        raise ValueError(
            f"expected b of shape ({W.shape[0]},) to go with W of shape {_shape(W)}, "
            f"got {_shape(b)}"
        )
    return _apply(LinearFunction, a_prev, W, b)


def sigmoid(z: Tensor) -> Tensor:
    """a = σ(z) = 1 / (1 + e^(−z)) (equation 1), differentiated by equation 8 from z.

    The derivative is σ(z) σ(−z), which does not vanish where a rounds to 1 as a (1−a) does, and so
    are all the higher ones.

    Args:
        z: any shape, floating-point.

    Returns:
        a in [0, 1], z's shape.

    Raises:
        TypeError: z is no tensor or not floating-point.
    """
    _check_alike(z=z)
    return _apply(SigmoidFunction, z)


def sigmoid_quadratic(z: Tensor, y: Tensor, *, reduction: Reduction = "batchmean") -> Tensor:
    """The quadratic loss of σ(z): C = ½ ‖σ(z) − y‖² (equation 2), differentiated by equation 4.

    Args:
        z: weighted inputs of the last layer (logits), [..., components].
        y: targets in [0, 1], of z's shape, dtype and device.
        reduction: "none" for one value per component; "sum" over all of them; "mean" over all of
            them, as PyTorch means it; "batchmean", the notes' C: the sum over the components
            averaged over the examples, whose number is the product of all dimensions but the last
            (1 for a one-dimensional z). The sum of an empty batch is 0, and its means are NaN.

    Returns:
        C: z's shape for "none", else one number, at least 0.

    Raises:
        TypeError: z or y is no tensor or not floating-point, or their dtypes differ.
        ValueError: shapes or devices differ, or the reduction is unknown.
    """
    _check_loss(z, y, reduction)
    return _reduce(_apply(SigmoidQuadraticFunction, z, y), reduction)


def sigmoid_cross_entropy(z: Tensor, y: Tensor, *, reduction: Reduction = "batchmean") -> Tensor:
    """The cross-entropy of σ(z): C = −Σ [y ln σ(z) + (1−y) ln(1 − σ(z))] (equation 3).

    Differentiated by equation 5, dC/dz = σ(z) − y, computed as (1−y) σ(z) − y σ(−z), which keeps
    its relative precision where σ(z) − y rounds to 0. For y strictly between 0 and 1 the least
    value of C is not 0 but the entropy of y.

    Args:
        z: weighted inputs of the last layer (logits), [..., components].
        y: targets in [0, 1], of z's shape, dtype and device.
        reduction: as for `sigmoid_quadratic`. "mean" is that of
            `torch.nn.functional.binary_cross_entropy_with_logits`.

    Returns:
        C: z's shape for "none", else one number, at least 0.

    Raises:
        TypeError: z or y is no tensor or not floating-point, or their dtypes differ.
        ValueError: shapes or devices differ, or the reduction is unknown.
    """
    _check_loss(z, y, reduction)
    return _reduce(_apply(SigmoidCrossEntropyFunction, z, y), reduction)


# ---------------------------------------------------------------------------------- the inside


def _apply(function: type[Function], *arguments: Tensor | None) -> Tensor:
    return cast(Tensor, function.apply(*arguments))


def _reduce(C: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "sum":
        return C.sum()
    if reduction == "mean":
        return C.mean()
    if reduction == "batchmean":
        return C.sum() / C.shape[:-1].numel()
    return C


def check_reduction(reduction: str) -> None:
    """Raise ValueError unless `reduction` is one of "none", "sum", "mean" and "batchmean"."""
    if reduction not in ("none", "sum", "mean", "batchmean"):
        raise ValueError(
            f"expected reduction 'none', 'sum', 'mean' or 'batchmean', got {reduction!r}"
        )


def _check_loss(z: Tensor, y: Tensor, reduction: str) -> None:
    check_reduction(reduction)
    _check_alike(z=z, y=y)
    if y.shape != z.shape:
        raise ValueError(f"expected y of shape {_shape(z)} like z, got {_shape(y)}")


def _check_alike(**tensors: Tensor) -> None:
    """Tensors of one floating-point dtype on one device; the first one sets which."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(tensor).__name__}")
    (first_name, first), *others = tensors.items()
    if not first.is_floating_point():
        raise TypeError(f"expected {first_name} of a floating-point dtype, got {first.dtype}")
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"expected {name} of dtype {first.dtype} like {first_name}, got {tensor.dtype}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"expected {name} on device {first.device} like {first_name}, got {tensor.device}"
            )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
