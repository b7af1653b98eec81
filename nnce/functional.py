"""The rules as `torch.autograd.Function`s, and the public functions that check and apply them.

Forward and backward of each Function call rules of `nnce.rules`, which give the numbers of the
equations. A backward that needs σ uses this module's own `sigmoid`, so that derivatives of any
order follow the rules and stay exact where a rounds to 0 or 1. Only inputs are saved for the
backward: a saved intermediate would give silently wrong second derivatives.

Each Function has two versions: one with its `tangent` as `jvp`, for forward-mode derivatives and
the transforms of `torch.func` that use them, and one without, because `torch.compile` rejects a
Function with a `jvp`. Neither works for nested forward mode: PyTorch disables the outer level while
it calls a `jvp`, so the result would silently lack a term. There the rules are differentiated as
plain code. `_apply` chooses the version.

Plain eager code (`is_plain`) needs none of this, and the overhead would dominate a small training
step. It uses a third version, which saves the same inputs but calls the fused kernels, and builds
a differentiable backward only if `create_graph` is set.

The public functions check shape, dtype and device, never values: a check on values would
synchronize CUDA and break `torch.compile` and `torch.func`. `nnce.data` checks values when data is
loaded.

May import `rules`, `losses`, `kernels` and the files with an underscore.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import Function

from nnce import _torch_private, rules
from nnce._arguments import (
    check_alike,
    check_dense,
    check_device,
    check_focus,
    check_ignore_index,
    check_label_smoothing,
    check_reduction,
    shape_of,
)
from nnce._torch_private import dispatches_plainly, forward_mode_levels
from nnce.kernels import fused
from nnce.losses import Loss

__all__ = [
    "LOSS_FUNCTIONS",
    "LinearFunction",
    "Reduction",
    "SigmoidCrossEntropyFunction",
    "SigmoidFocalFunction",
    "SigmoidFunction",
    "SigmoidQuadraticFunction",
    "binary_cross_entropy_with_logits",
    "linear",
    "sigmoid",
    "sigmoid_asymmetric_loss",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
    "sigmoid_quadratic",
]


Reduction = Literal["none", "sum", "mean", "batchmean"]
"""How the losses of the components are reduced.

>>> nnce.functional.Reduction.__args__
('none', 'sum', 'mean', 'batchmean')
"""

# ------------------------------------------------------------------------------- the Functions


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the inputs for backward and jvp; a saved intermediate would have no derivatives."""
    ctx.save_for_backward(*inputs)
    ctx.save_for_forward(*inputs)


class _Rule(Function):
    """A Function that saves its inputs, and whose vmap PyTorch derives from its two passes."""

    generate_vmap_rule = True

    def __init_subclass__(cls) -> None:
        # Function.apply calls inspect.signature(forward) every time, which took a sixth of a
        # training step. inspect uses __signature__ if it is set.
        forward: Any = cls.forward
        forward.__signature__ = inspect.signature(forward)

    setup_context = staticmethod(_keep_inputs)


class LinearFunction(_Rule):
    """Equation 1 forward, equations 6 and 7 backward.

    z = W a_prev + b for a_prev [..., n_in], W [n_out, n_in], b [n_out] or None -> z [..., n_out];
    dC/dW = dC/dz a_prevᵀ, dC/db = dC/dz and dC/da_prev = Wᵀ dC/dz. Arguments are not checked:
    `linear` does that.

    >>> a_prev, W = torch.ones(1, 2), torch.tensor([[3.0, 4.0]], requires_grad=True)
    >>> nnce.functional.LinearFunction.apply(a_prev, W, None).backward(torch.tensor([[2.0]]))
    >>> W.grad
    tensor([[2., 2.]])
    """

    @staticmethod
    def forward(a_prev: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """z = W a_prev + b."""
        return rules.linear(a_prev, W, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save a_prev and W."""
        _keep_inputs(ctx, inputs[:2], output)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients with respect to a_prev (7), W and b (6); None where not needed."""
        (dz,) = upstream
        a_prev, W = ctx.saved_tensors
        wants_a_prev, wants_W, wants_b = ctx.needs_input_grad
        return (
            rules.da_prev(dz, W) if wants_a_prev else None,
            rules.dW(dz, a_prev) if wants_W else None,
            rules.db(dz) if wants_b else None,
        )

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor) -> Tensor:
        """dz = W da_prev + dW a_prev + db."""
        da_prev, dW, db = tangents
        a_prev, W = ctx.saved_tensors
        return linear(da_prev, W) + linear(a_prev, dW, db)


class SigmoidFunction(_Rule):
    """Equation 1 forward, equation 8 backward, from z.

    a = σ(z) and dC/dz = dC/da ∘ σ'(z), of z's shape. Arguments are not checked: `sigmoid` does.

    >>> z = torch.tensor([0.0, 40.0], requires_grad=True)
    >>> nnce.functional.SigmoidFunction.apply(z).sum().backward()
    >>> z.grad
    tensor([2.5000e-01, 4.2484e-18])
    """

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        """a = σ(z)."""
        return rules.sigmoid(z)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        """dC/dz = dC/da ∘ σ'(z)."""
        (da,) = upstream
        (z,) = ctx.saved_tensors  # not a: σ'(z) = a (1−a) is 0 as soon as a rounds to 1
        return rules.dz_hidden(da, z, sigmoid)

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor) -> Tensor:
        """da = σ'(z) dz."""
        (dz,) = tangents
        (z,) = ctx.saved_tensors
        return rules.dz_hidden(dz, z, sigmoid)


class SigmoidQuadraticFunction(_Rule):
    """Equation 2 forward, equation 4 backward, per component.

    C = ½ (σ(z) − y)² and dC/dz = (a − y) ∘ σ'(z); z, y and C of one shape. Arguments are not
    checked: `sigmoid_quadratic` does.

    >>> z = torch.tensor([0.0], requires_grad=True)
    >>> nnce.functional.SigmoidQuadraticFunction.apply(z, torch.ones(1)).backward()
    >>> z.grad
    tensor([-0.1250])
    """

    @staticmethod
    def forward(z: Tensor, y: Tensor) -> Tensor:
        """C = ½ (σ(z) − y)²."""
        return rules.quadratic(z, y)

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

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor) -> Tensor:
        """dC = (a − y) σ'(z) dz − (a − y) dy."""
        dz, dy = tangents
        z, y = ctx.saved_tensors
        return rules.dz_quadratic(z, y, sigmoid) * dz - rules.residual(z, y, sigmoid) * dy


class SigmoidCrossEntropyFunction(_Rule):
    """Equation 3 forward, equation 5 backward, per component.

    C = −[y ln σ(z) + (1−y) ln(1 − σ(z))] and dC/dz = a − y; z, y, pos_weight (or None) and C of one
    shape. Arguments are not checked: `sigmoid_cross_entropy` does.

    >>> z = torch.tensor([0.0], requires_grad=True)
    >>> nnce.functional.SigmoidCrossEntropyFunction.apply(z, torch.ones(1), None).backward()
    >>> z.grad
    tensor([-0.5000])
    """

    @staticmethod
    def forward(z: Tensor, y: Tensor, pos_weight: Tensor | None) -> Tensor:
        """C = −[y ln σ(z) + (1−y) ln(1 − σ(z))]."""
        return rules.cross_entropy(z, y, pos_weight)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """dC/dz = a − y, dC/dy = ln(1−a) − ln a = −z, dC/d pos_weight = −y ln a."""
        (dC,) = upstream
        z, y, pos_weight = ctx.saved_tensors
        wants_z, wants_y, wants_pos_weight = ctx.needs_input_grad
        return (
            dC * rules.dz_cross_entropy(z, y, sigmoid, pos_weight) if wants_z else None,
            rules.weighted(dC, _cross_entropy_dy(z, pos_weight)) if wants_y else None,
            rules.weighted(dC * y, _minus_ln_a(z)) if wants_pos_weight else None,
        )

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor) -> Tensor:
        """dC = (a − y) dz − z dy − y ln a d pos_weight."""
        dz, dy, d_pos_weight = tangents
        z, y, pos_weight = ctx.saved_tensors
        dC = rules.dz_cross_entropy(z, y, sigmoid, pos_weight) * dz
        dC = dC + rules.weighted(dy, _cross_entropy_dy(z, pos_weight))
        if pos_weight is None:
            return dC
        return dC + rules.weighted(y * d_pos_weight, _minus_ln_a(z))


class SigmoidFocalFunction(_Rule):
    """The focal loss of `rules.Focus` forward and its derivatives backward, per component.

    C = α_t q^γ_t L and dC/dz = α_t q^γ_t (dL + γ_t dq L/q); z, y and C of one shape. Arguments are
    not checked: `sigmoid_focal_loss` does that.

    >>> z = torch.tensor([0.0], requires_grad=True)
    >>> focus = nnce.rules.Focus(gamma_positive=2, gamma_negative=2)
    >>> nnce.functional.SigmoidFocalFunction.apply(z, torch.ones(1), *focus).backward()
    >>> z.grad
    tensor([-0.2983])
    """

    @staticmethod
    def forward(  # separate arguments: dynamo does not support *args here
        z: Tensor,
        y: Tensor,
        gamma_positive: float,
        gamma_negative: float,
        margin: float,
        alpha: float | None,
    ) -> Tensor:
        """C = α_t q^γ_t L."""
        return rules.focal(z, y, rules.Focus(gamma_positive, gamma_negative, margin, alpha))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save z and y."""
        z, y, *focus = inputs
        _keep_inputs(ctx, (z, y), output)
        ctx.focus = rules.Focus(*focus)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """dC/dz and dC/dy."""
        (dC,) = upstream
        z, y = ctx.saved_tensors
        wants_z, wants_y, *others = ctx.needs_input_grad
        return (
            dC * rules.dz_focal(z, y, ctx.focus, sigmoid, _softplus) if wants_z else None,
            dC * rules.dy_focal(z, y, ctx.focus, sigmoid, _softplus) if wants_y else None,
            *(None for _ in others),
        )

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor) -> Tensor:
        """dC = dC/dz dz + dC/dy dy."""
        dz, dy, *_ = tangents
        z, y = ctx.saved_tensors
        dC = rules.dz_focal(z, y, ctx.focus, sigmoid, _softplus) * dz
        return dC + rules.dy_focal(z, y, ctx.focus, sigmoid, _softplus) * dy


def _softplus(z: Tensor) -> Tensor:
    return _minus_ln_a(-z)


def _minus_ln_a(z: Tensor) -> Tensor:
    """−ln σ(z) as the cross-entropy with y = 1, which is differentiated by the rules."""
    return _apply(SigmoidCrossEntropyFunction, z, torch.ones_like(z), None)


def _cross_entropy_dy(z: Tensor, pos_weight: Tensor | None) -> Tensor:
    """dC/dy = ln(1−a) − pos_weight ln a, which is −z without a pos_weight."""
    if pos_weight is None:
        return -z
    return rules.weighted(pos_weight, _minus_ln_a(z)) - _minus_ln_a(-z)


# --------------------------------------------------- Functions with forward-mode derivatives


def _with_jvp(function: Any) -> type[Function]:
    """The subclass of a Function that has its `tangent` as `jvp`."""
    name = function.__name__.replace("Function", "WithJvp")
    with_jvp: type[Function] = type(function)(
        name, (function,), {"jvp": staticmethod(function.tangent)}
    )
    return with_jvp


_WITH_JVP: dict[type[Function], type[Function]] = {
    function: _with_jvp(function)
    for function in (
        LinearFunction,
        SigmoidFunction,
        SigmoidQuadraticFunction,
        SigmoidCrossEntropyFunction,
        SigmoidFocalFunction,
    )
}


# ------------------------------------------------------ plain code for nested forward mode


def _exp_of_minus_abs(z: Tensor) -> Tensor:
    return torch.where(z > 0, -z, z).exp()  # not −|z|, which has no derivative at 0


def _plain_sigmoid(z: Tensor) -> Tensor:
    """σ(z) by operations whose derivatives of any order do not vanish in saturation."""
    e = _exp_of_minus_abs(z)
    return torch.where(z > 0, 1 / (1 + e), e / (1 + e))


def _plain_softplus(z: Tensor) -> Tensor:
    """softplus(z) by operations whose derivatives of any order do not vanish in saturation."""
    return torch.where(z > 0, z, 0.0) + _exp_of_minus_abs(z).log1p()


_PLAIN: dict[type[Function], Callable[..., Tensor]] = {
    LinearFunction: lambda a_prev, W, b: rules.linear(a_prev, W, b),
    SigmoidFunction: _plain_sigmoid,
    SigmoidQuadraticFunction: lambda z, y: rules.quadratic(z, y, _plain_sigmoid),
    SigmoidCrossEntropyFunction: lambda z, y, pos_weight: rules.cross_entropy(
        z, y, pos_weight, _plain_softplus
    ),
    SigmoidFocalFunction: lambda z, y, *focus: rules.focal(
        z, y, rules.Focus(*focus), _plain_sigmoid, _plain_softplus
    ),
}


# ---------------------------------------------------------------- Functions for plain eager code


def is_plain(*tensors: Any, optional: tuple[Any, ...] = ()) -> bool:
    """Whether an operation on these tensors would run only PyTorch's kernels here.

    False under compile, export and trace, inside transforms of `torch.func` and forward-mode
    levels, in dispatch modes, under autocast, and for subclasses, fake and batched tensors,
    negative views and every backend except CPU and CUDA. A backward must check again: its context
    and the type of its upstream gradient may differ.

    Args:
        tensors: arguments; an object that is not a tensor is not plain.
        optional: further arguments; None is skipped.
    """
    if not _runs_kernels(tensors, optional):
        return False
    device = "cpu" if tensors[0].is_cpu else tensors[0].device.type
    return not torch.is_autocast_enabled(device)


def _runs_kernels(tensors: tuple[Any, ...], optional: tuple[Any, ...]) -> bool:
    """Like `is_plain`, but also True under autocast."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN_TYPES:
            return False
    for tensor in optional:
        if tensor is not None:
            if type(tensor) not in _PLAIN_TYPES:
                return False
            tensors = (*tensors, tensor)
    return dispatches_plainly(tensors)


# A set: a failed comparison of the two types would take longer than a hash.
_PLAIN_TYPES = {Tensor, torch.nn.Parameter}


def _is_plain_backward(*tensors: Any, optional: tuple[Any, ...] = ()) -> bool:
    """Whether a backward is plain, given its upstream gradient and its saved tensors.

    It is not plain if its result will be differentiated (`create_graph`). Autocast does not apply:
    the forward has chosen the dtypes.
    """
    return not torch.is_grad_enabled() and _runs_kernels(tensors, optional)


class _EagerLinear(LinearFunction):
    """`LinearFunction` for plain eager code; its backward uses PyTorch's operations throughout."""

    @staticmethod
    def forward(ctx: Any, a_prev: Tensor, W: Tensor, b: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(a_prev, W)
        return rules.linear(a_prev, W, b)

    setup_context = Function.setup_context


class _EagerSigmoid(SigmoidFunction):
    """`SigmoidFunction` with a single-pass backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(z)
        return rules.sigmoid(z)

    setup_context = Function.setup_context

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        """dC/dz = dC/da ∘ σ'(z)."""
        (da,) = upstream
        (z,) = ctx.saved_tensors
        if _is_plain_backward(da, z) and da.dtype is z.dtype and fused.fits(z, da):
            return fused.sigmoid_backward(z, da)
        return rules.dz_hidden(da, z, sigmoid)


class _Settings(NamedTuple):
    """Non-tensor arguments of a loss."""

    loss: Loss
    reduction: Reduction
    label_smoothing: float = 0
    ignore_index: int | None = None
    promotes: bool = False
    """Whether dtypes may differ, as in PyTorch's function."""
    focus: rules.Focus | None = None
    """Makes the cross-entropy a focal loss."""


_Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Tensor arguments of a loss: z, y, weight and pos_weight."""


class _EagerSigmoidLoss(Function):
    """A loss including its reduction: one pass for the value, one for dC/dz."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        y: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        """C by equation 2 or 3."""
        ctx.save_for_backward(z, y, weight, pos_weight)
        ctx.settings = settings
        options = _options(weight, pos_weight, settings)
        C, ctx.divisor = fused.forward(z, y, options, settings.reduction, settings.loss)
        return C

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """dC/dz by equation 4 or 5."""
        (dC,) = upstream
        z, y, weight, pos_weight = ctx.saved_tensors
        settings = ctx.settings
        if _is_plain_backward(dC, z, y, optional=(weight, pos_weight)) and fused.fits(z, y):
            options = _options(weight, pos_weight, settings)
            dz = fused.backward(z, y, options, dC, ctx.divisor, settings.loss)
        else:
            dz = _differentiable_dz(dC, (z, y, weight, pos_weight), settings)
        return dz, None, None, None, None


def _options(
    weight: Tensor | None, pos_weight: Tensor | None, settings: _Settings
) -> fused.Options:
    _, _, smoothing, ignore_index, _, focus = settings
    without_weights = weight is None and pos_weight is None
    if without_weights and not smoothing and ignore_index is None and focus is None:
        return fused._PLAIN
    return fused.Options(weight, pos_weight, smoothing, ignore_index, focus)


def _differentiable_dz(dC: Tensor, tensors: _Tensors, settings: _Settings) -> Tensor:
    """dC/dz by differentiable operations: PyTorch's and `sigmoid`."""
    loss, reduction, smoothing, *_, focus = settings
    dtype = tensors[0].dtype
    (z, y, weight, pos_weight), counts = _operands(tensors, tensors[1], settings)
    dC = _to(dC, z.dtype)
    if reduction in ("mean", "batchmean"):
        wide = _to(dC, torch.promote_types(dC.dtype, torch.float32))
        dC = _to(wide / _divisor(z, counts, reduction), dC.dtype)
    if weight is not None:
        dC = dC * weight
    if loss == "quadratic":
        dz = rules.dz_quadratic(z, y, sigmoid)
    elif focus is not None:
        dz = rules.dz_focal(z, y, focus, sigmoid, _softplus)
    else:
        dz = rules.dz_cross_entropy(z, y, sigmoid, pos_weight)
        if smoothing:
            at_half = rules.dz_cross_entropy(z, torch.full_like(z, 0.5), sigmoid, pos_weight)
            dz = (1 - smoothing) * dz + smoothing * at_half
    dz = dC * dz
    return _to(dz if counts is None else dz.where(counts, 0.0), dtype)


_apply_linear = _torch_private.single_level_apply(_EagerLinear)
_apply_sigmoid = _torch_private.single_level_apply(_EagerSigmoid)
_apply_loss = _torch_private.single_level_apply(_EagerSigmoidLoss)


# ------------------------------------------------------------------------ the public functions


def linear(a_prev: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """z = W a_prev + b (equation 1), differentiated by equations 6 and 7.

    Args:
        a_prev: activations of the previous layer, [..., n_in].
        W: weights, [n_out, n_in].
        b: biases, [n_out], or None for no bias.

    Returns:
        z, [..., n_out].

    Raises:
        TypeError: an argument is not a tensor or not floating-point, or the dtypes differ.
        ValueError: shapes or devices do not match.

    >>> nnce.linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([0.5]))
    tensor([[11.5000]])
    """
    if is_plain(a_prev, W, optional=(b,)) and _fits_linear(a_prev, W, b):
        return cast(Tensor, _apply_linear(a_prev, W, b))
    a_prev, W, b = _autocast(a_prev, W, b)
    check_alike({"a_prev": a_prev, "W": W}, {"b": b})
    if W.dim() != 2:
        raise ValueError(f"expected W of shape (n_out, n_in), got {shape_of(W)}")
    if a_prev.dim() == 0 or a_prev.shape[-1] != W.shape[1]:
        raise ValueError(
            f"expected a_prev of shape (..., {W.shape[1]}) to go with W of shape {shape_of(W)}, "
            f"got {shape_of(a_prev)}"
        )
    if b is not None and b.shape != W.shape[:1]:
        raise ValueError(
            f"expected b of shape ({W.shape[0]},) to go with W of shape {shape_of(W)}, "
            f"got {shape_of(b)}"
        )
    return _apply(LinearFunction, a_prev, W, b)


def _fits_linear(a_prev: Tensor, W: Tensor, b: Tensor | None) -> bool:
    """Whether all checks of `linear` would pass."""
    dtype, shape = W.dtype, W.shape
    if not (
        len(shape) == 2
        and a_prev.dim() > 0
        and a_prev.shape[-1] == shape[1]
        and a_prev.dtype is dtype
        and dtype.is_floating_point
        and (b is None or (b.dtype is dtype and b.shape == shape[:1]))
    ):
        return False
    if W.is_cpu:  # takes half the time of comparing devices
        return a_prev.is_cpu and (b is None or b.is_cpu)
    return a_prev.device == W.device and (b is None or b.device == W.device)


def sigmoid(z: Tensor) -> Tensor:
    """a = σ(z) = 1 / (1 + e^(−z)) (equation 1), differentiated by equation 8 from z.

    The derivative is computed as σ(z) σ(−z), which unlike a (1−a) does not vanish where a rounds to
    1. Higher derivatives do not vanish there either.

    Args:
        z: any shape, floating-point.

    Returns:
        a in [0, 1], z's shape.

    Raises:
        TypeError: z is not a tensor or not floating-point.

    >>> z = torch.tensor([0.0, 40.0], requires_grad=True)
    >>> torch.autograd.grad(nnce.sigmoid(z).sum(), z)  # PyTorch: 0 for the second one
    (tensor([2.5000e-01, 4.2484e-18]),)
    """
    if is_plain(z) and z.dtype.is_floating_point:
        return cast(Tensor, _apply_sigmoid(z))
    check_alike({"z": z})
    return _apply(SigmoidFunction, z)


def sigmoid_quadratic(
    z: Tensor,
    y: Tensor,
    *,
    ignore_index: int | None = None,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """The quadratic loss of σ(z): C = ½ ‖σ(z) − y‖² (equation 2), differentiated by equation 4.

    Args:
        z: weighted inputs of the last layer (logits), [..., components].
        y: targets in [0, 1], of z's shape and device, in z's dtype; or integers or booleans, 0 and
            1, which get no gradient. Values are not checked here; `nnce.data.check` does that.
        ignore_index: a target other than 0 and 1, such as −100: components with this target
            contribute neither loss nor gradient, even if z is NaN or infinite, and are not counted
            in a mean.
        reduction: "none" for one value per component; "sum" over all components; "mean" over all
            components not ignored, as in PyTorch; "batchmean", C in the notes: the sum over the
            components, averaged over the examples with at least one component not ignored. The
            number of examples is the product of all dimensions except the last (1 for a
            one-dimensional z). If every component is ignored, the sum is 0 and the means are NaN.

    Returns:
        C, at least 0: z's shape for "none", else a scalar.

    Raises:
        TypeError: z or y is not a tensor, z is not floating-point, y has a different floating-point
            dtype, or ignore_index is not an integer.
        ValueError: shapes or devices differ, the reduction is unknown, or ignore_index is 0 or 1.

    >>> z, y = torch.zeros(2, 3), torch.ones(2, 3)
    >>> nnce.sigmoid_quadratic(z, y), nnce.sigmoid_quadratic(z, y, reduction="mean")
    (tensor(0.3750), tensor(0.1250))
    """
    return _loss((z, y, None, None), _Settings("quadratic", reduction, 0, ignore_index))


def sigmoid_cross_entropy(
    z: Tensor,
    y: Tensor,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0,  # with 0.0, dynamic torch.compile would recompile
    ignore_index: int | None = None,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """The cross-entropy of σ(z): C = −Σ [y ln σ(z) + (1−y) ln(1 − σ(z))] (equation 3).

    Differentiated by equation 5, dC/dz = σ(z) − y, computed as (1−y) σ(z) − y σ(−z), which for y of
    0 or 1 keeps its relative precision where σ(z) − y rounds to 0. For 0 < y < 1, the error is a
    few units in the last place of the two terms, which cancel where σ(z) is close to y, and the
    minimum of C is the entropy of y, not 0.

    Args:
        z: weighted inputs of the last layer (logits), [..., components].
        y: targets, as for `sigmoid_quadratic`.
        weight: multiplies C component by component; of a shape that broadcasts to z's. Components
            with weight 0 contribute neither loss nor gradient, even if z is infinite.
        pos_weight: multiplies the term of y: the weight of positive targets relative to negative
            ones; of a shape that broadcasts to z's, [components] for one per component.
        label_smoothing: s in [0, 1): y becomes y (1−s) + s/2, as for two classes in
            `torch.nn.CrossEntropyLoss`. Computed as (1−s) C + s C(½), since C is linear in y, which
            avoids rounding 1 − y in dC/dz.
        ignore_index: as for `sigmoid_quadratic`.
        reduction: as for `sigmoid_quadratic`; weights do not change the divisor of a mean. With
            "mean", weights and options have the same meaning as in
            `torch.nn.functional.binary_cross_entropy_with_logits`.

    Returns:
        C: z's shape for "none", else a scalar; at least 0 for y in [0, 1] and weights of at least
            0, which is not checked.

    Raises:
        TypeError: z or y is not a tensor, z is not floating-point, floating-point dtypes differ,
            label_smoothing is not a number, or ignore_index is not an integer.
        ValueError: shapes or devices do not match, the reduction is unknown, label_smoothing is not
            in [0, 1), or ignore_index is 0 or 1.

    >>> z = torch.tensor([[2.0, -40.0]], requires_grad=True)
    >>> nnce.sigmoid_cross_entropy(z, torch.tensor([[1, 0]])).backward()
    >>> z.grad
    tensor([[-1.1920e-01,  4.2484e-18]])
    """
    settings = _Settings("cross-entropy", reduction, label_smoothing, ignore_index)
    return _loss((z, y, weight, pos_weight), settings)


def sigmoid_focal_loss(
    z: Tensor,
    y: Tensor,
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """The focal loss of σ(z): C = α_t (1 − p_t)^γ · cross-entropy. As in `torchvision.ops`, exact.

    1 − p_t = (1−y) σ(z) + y σ(−z), the distance of σ(z) from a y of 0 or 1, and
    α_t = (1−y) (1−alpha) + y alpha. For y = 1,
    C = alpha σ(−z)^γ softplus(−z) and dC/dz = −alpha σ(−z)^γ (σ(−z) + γ σ(z) softplus(−z)): terms
    of one sign, so that for y of 0 or 1 there is no cancellation and no 0 · ∞ at any z. (Lin et
    al., Focal loss for dense object detection, 2017.)

    >>> z, y = torch.tensor([-1.0, 200.0]), torch.tensor([1.0, 0.0])
    >>> nnce.sigmoid_focal_loss(z, y)
    tensor([  0.1755, 150.0000])

    Args:
        z: weighted inputs of the last layer (logits), [..., components].
        y: targets, as for `sigmoid_quadratic`.
        alpha: weight of positive targets, in [0, 1]; negative targets have weight 1 − alpha. None
            or −1 for no weights.
        gamma: from 0 to 10⁶; at 0 the loss is the cross-entropy times α_t.
        weight, ignore_index: as for `sigmoid_cross_entropy`.
        reduction: as for `sigmoid_quadratic`, but "none" by default, as in torchvision.

    Returns:
        C: z's shape for "none", else a scalar.

    Raises:
        TypeError, ValueError: as for `sigmoid_cross_entropy`, or gamma or alpha is not a number or
            out of range.
    """
    focus = rules.Focus(*check_focus({"gamma": gamma}, 0, alpha))
    settings = _Settings("cross-entropy", reduction, 0, ignore_index, focus=focus)
    return _loss((z, y, weight, None), settings)


def sigmoid_asymmetric_loss(
    z: Tensor,
    y: Tensor,
    *,
    gamma_positive: float = 1.0,
    gamma_negative: float = 4.0,
    margin: float = 0.05,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """The asymmetric loss of σ(z): a focal loss with two exponents and a margin.

    C = −σ(−z)^gamma_positive ln σ(z) for y = 1, and −p^gamma_negative ln(1 − p) for y = 0, where
    p = max(σ(z) − margin, 0): a negative target whose σ(z) is at most the margin contributes
    neither loss nor gradient. Where σ(z) equals the margin, the derivative is the left one, 0; for
    gamma_negative > 0 the right one is also 0. Soft targets mix σ(−z) and p as in
    `sigmoid_focal_loss`, and the exponents. (Ridnik et al., Asymmetric loss for multi-label
    classification, 2021; the defaults are their values for COCO.)

    >>> z, y = torch.tensor([[-1.0, 200.0, -3.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    >>> nnce.sigmoid_asymmetric_loss(z, y, reduction="none")
    tensor([[0.9601, 2.4400, 0.0000]])

    Args:
        z: weighted inputs of the last layer (logits), [..., components].
        y: targets, as for `sigmoid_quadratic`.
        gamma_positive, gamma_negative: exponents of the two kinds of target, from 0 to 10⁶.
        margin: m in [0, 1), subtracted from σ(z) for negative targets; called `clip` in other code.
        weight, ignore_index: as for `sigmoid_cross_entropy`.
        reduction: as for `sigmoid_quadratic`.

    Returns:
        C: z's shape for "none", else a scalar.

    Raises:
        TypeError, ValueError: as for `sigmoid_cross_entropy`, or an exponent or margin is not a
            number or out of range.
    """
    gammas = {"gamma_positive": gamma_positive, "gamma_negative": gamma_negative}
    focus = rules.Focus(*check_focus(gammas, margin, None))
    settings = _Settings("cross-entropy", reduction, 0, ignore_index, focus=focus)
    return _loss((z, y, weight, None), settings)


def binary_cross_entropy_with_logits(  # noqa: PLR0913  PyTorch's signature
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    label_smoothing: float = 0,
    ignore_index: int | None = None,
) -> Tensor:
    """`torch.nn.functional.binary_cross_entropy_with_logits`, computed by equations 3 and 5.

    C = −[y ln σ(z) + (1−y) ln(1 − σ(z))] and dC/dz = σ(z) − y. It accepts the arguments of
    PyTorch's function and returns C in the same dtype, that of the target, but computes in at least
    float32. It is exact where PyTorch's function is not: C is 0 at z = ∞ with y = 1, where PyTorch
    returns NaN, and a float16 mean is finite even if the sum overflows.

    Args:
        input: z, the logits, of any shape; floating-point.
        target: y, of z's shape and device, of any floating-point dtype; or, unlike in PyTorch,
            integers or booleans.
        weight: multiplies C; of a shape that broadcasts to z's. It may be negative.
        size_average, reduce: deprecated as in PyTorch; they take precedence over reduction.
        reduction: "none", "sum" or "mean" over all elements, for any shape. (The default of
            `sigmoid_cross_entropy`, "batchmean", has a smaller divisor: 1, not N, for z [N].)
        pos_weight: multiplies the term of y; of a shape that broadcasts to z's and any real dtype.
        label_smoothing: s in [0, 1): y becomes y (1−s) + s/2.
        ignore_index: an integer other than 0 and 1: elements with this target contribute neither
            loss nor gradient, and are not counted in the mean.

    Returns:
        C, z's shape for "none", else a scalar; in the target's dtype, or z's for integer or
            boolean targets.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype, label_smoothing is not a
            number, or ignore_index is not an integer.
        ValueError: shapes or devices do not match, reduction is unknown, label_smoothing is not in
            [0, 1), or ignore_index is 0 or 1.

    >>> z, y = torch.tensor([0.0, 9.0, 7.0]), torch.tensor([1, 1, -100])
    >>> nnce.functional.binary_cross_entropy_with_logits(z, y, ignore_index=-100)
    tensor(0.3466)
    """
    if size_average is not None or reduce is not None:
        reduction = _legacy_reduction(size_average, reduce)
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"expected reduction 'none', 'sum' or 'mean', got {reduction!r}")
    kind = cast(Reduction, reduction)
    settings = _Settings("cross-entropy", kind, label_smoothing, ignore_index, promotes=True)
    return _loss((input, target, weight, pos_weight), settings)


def _legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The reduction selected by PyTorch's two deprecated arguments."""
    mean, summed = size_average is None or size_average, reduce is None or reduce
    reduction = ("mean" if mean else "sum") if summed else "none"
    warnings.warn(
        f"size_average and reduce args will be deprecated, please use reduction='{reduction}' "
        "instead.",
        stacklevel=3,
    )
    return reduction


LOSS_FUNCTIONS: dict[Loss, Callable[..., Tensor]] = {
    "quadratic": sigmoid_quadratic,
    "cross-entropy": sigmoid_cross_entropy,
}
"""Loss functions by name.

>>> nnce.functional.LOSS_FUNCTIONS["quadratic"] is nnce.sigmoid_quadratic
True
"""


# ----------------------------------------------------------------------------------- internals


def _loss(tensors: _Tensors, settings: _Settings) -> Tensor:
    """C by one pass of a kernel for plain tensors that fit, else by `_composed_loss`."""
    z, y, weight, pos_weight = tensors
    smoothing, ignore_index = settings.label_smoothing, settings.ignore_index
    # NumPy's and other libraries' numbers become Python's.
    if type(smoothing) not in (int, float):
        settings = settings._replace(label_smoothing=check_label_smoothing(smoothing))
    if ignore_index is not None and type(ignore_index) is not int:
        settings = settings._replace(ignore_index=check_ignore_index(ignore_index))
    if is_plain(z, y, optional=(weight, pos_weight)) and _fits_loss(tensors, settings):
        C: Tensor
        if z.requires_grad and torch.is_grad_enabled():
            C = _apply_loss(z, y, weight, pos_weight, settings)
        else:
            options = _options(weight, pos_weight, settings)
            C, _ = fused.forward(z, y, options, settings.reduction, settings.loss)
        return _to(C, _value_dtype(z, y)) if settings.promotes else C
    z, wide_y, weight, pos_weight = _float32_under_autocast(*tensors)
    if settings.promotes:
        _check_real(z, {"target": y, "weight": weight, "pos_weight": pos_weight})
        _check_shape("target", y, "input", z)
    smoothing = check_label_smoothing(settings.label_smoothing)
    check_reduction(settings.reduction)
    ignore_index = check_ignore_index(settings.ignore_index)
    if not settings.promotes:
        _check_target(z, wide_y)
        check_alike({"z": z}, {"weight": weight, "pos_weight": pos_weight})
    settings = settings._replace(label_smoothing=smoothing, ignore_index=ignore_index)
    return _composed_loss((z, wide_y, weight, pos_weight), y, settings)


def _fits_loss(tensors: _Tensors, settings: _Settings) -> bool:
    """Whether all checks would pass and the kernels support the loss and its gradients.

    The kernels compute no gradients with respect to y or weights, and work in z's dtype.
    """
    z, y, *weights = tensors
    _, reduction, smoothing, ignore_index, any_dtype, focus = settings
    if focus is not None and not z.is_cpu:  # the Triton kernels do not support focal losses
        return False
    if not (fused.fits(z, y) and reduction in ("mean", "batchmean", "sum", "none")):
        return False
    dtype = y.dtype
    if (
        dtype is not z.dtype
        and dtype.is_floating_point
        and not (any_dtype and torch.promote_types(dtype, z.dtype) is z.dtype)
    ):
        return False
    if not 0 <= smoothing < 1 or ignore_index in (0, 1):
        return False
    for tensor in weights:
        if tensor is None:
            continue
        dtype = tensor.dtype
        if not (dtype is z.dtype or (any_dtype and not dtype.is_complex)):
            return False
        if not (tensor.is_cpu and _broadcasts(tensor, z)):
            return False
        if tensor.requires_grad and torch.is_grad_enabled():
            return False
    return not (y.requires_grad and torch.is_grad_enabled())


def _composed_loss(tensors: _Tensors, target: Tensor, settings: _Settings) -> Tensor:
    """C by a Function per component and PyTorch's operations; works in every context.

    Args:
        tensors: y among them is in the dtype to compute in.
        target: y as it was given, which is compared with ignore_index.
    """
    loss, reduction, smoothing, *_, focus = settings
    dtype = _value_dtype(*tensors[:2])
    (z, y, weight, pos_weight), counts = _operands(tensors, target, settings)
    if loss == "quadratic":
        C = _apply(SigmoidQuadraticFunction, z, y)
    elif focus is not None:
        C = _apply(SigmoidFocalFunction, z, y, *focus)
    else:
        C = _apply(SigmoidCrossEntropyFunction, z, y, pos_weight)
        if smoothing:
            at_half = _apply(SigmoidCrossEntropyFunction, z, torch.full_like(z, 0.5), pos_weight)
            C = (1 - smoothing) * C + smoothing * at_half
    C = C if weight is None else rules.weighted(weight, C)
    return _to(_reduce(C, counts, reduction), dtype)


def _value_dtype(z: Tensor, y: Tensor) -> torch.dtype:
    """The dtype of C, as in PyTorch's function."""
    return y.dtype if y.dtype.is_floating_point else z.dtype


def _operands(
    tensors: _Tensors, target: Tensor, settings: _Settings
) -> tuple[_Tensors, Tensor | None]:
    """The tensors in one dtype and shape, and the mask of components that count, or None."""
    z, y, weight, pos_weight = tensors
    if settings.promotes:
        dtype = torch.promote_types(_value_dtype(z, y), z.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        z, weight, pos_weight = _to(z, dtype), _to(weight, dtype), _to(pos_weight, dtype)
    if settings.focus is not None:  # the power has γ times the relative error of q
        dtype = torch.float64 if z.dtype == torch.float32 else torch.float32
        dtype = torch.promote_types(dtype, z.dtype)
        z, y, weight = _to(z, dtype), _to(y, dtype), _to(weight, dtype)
    weight = _expand("weight", weight, z)
    pos_weight = _expand("pos_weight", pos_weight, z)
    counts = _counts(target, settings.ignore_index)
    y = _to(y, z.dtype)
    if counts is not None:
        # Zeros for ignored components, so that a NaN there has no effect. `where` makes their
        # derivatives 0, of any order and in both modes.
        z, y = z.where(counts, 0.0), y.where(counts, 0.0)
    return (z, y, weight, pos_weight), counts


_OptionalTensor = TypeVar("_OptionalTensor", Tensor, Tensor | None)


def _to(tensor: _OptionalTensor, dtype: torch.dtype) -> _OptionalTensor:
    """Convert if necessary: dynamo's vmap fails on a conversion to the same dtype."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _apply(function: type[Function], *arguments: Tensor | float | None) -> Tensor:
    if not torch.compiler.is_compiling():
        if forward_mode_levels() > 1:
            return _PLAIN[function](*arguments)
        function = _WITH_JVP[function]
    return cast(Tensor, function.apply(*arguments))


def _counts(y: Tensor, ignore_index: int | None) -> Tensor | None:
    """Mask of the components that count; None if all do.

    ignore_index is compared in y's own dtype, since a half-precision target has been rounded. An
    index outside the range of an integer dtype, which PyTorch would wrap around, matches no target.
    """
    if ignore_index is None:
        return None
    if y.dtype.is_floating_point:
        return y != (ignore_index if abs(ignore_index) < 2**63 else float(ignore_index))
    if y.dtype != torch.bool:
        limits = torch.iinfo(y.dtype)
        if limits.min <= ignore_index <= limits.max:
            return y != ignore_index
    return torch.ones_like(y, dtype=torch.bool)


def _reduce(C: Tensor, counts: Tensor | None, reduction: Reduction) -> Tensor:
    if counts is not None:
        C = C.where(counts, 0.0)
    if reduction == "none":
        return C
    if reduction == "sum":
        return C.sum()
    if counts is None and reduction == "mean":
        return C.mean()
    # The largest float16 is 65,504; a sum or the number of components may exceed it.
    total = C.sum(dtype=torch.promote_types(C.dtype, torch.float32))
    return (total / _divisor(C, counts, reduction)).to(C.dtype)


def _divisor(C: Tensor, counts: Tensor | None, reduction: Reduction) -> Tensor | int:
    """The number of components or examples that count."""
    if counts is None:
        return C.numel() if reduction == "mean" else C.shape[:-1].numel()
    return counts.sum() if reduction == "mean" else counts.any(-1).sum()


def _check_target(z: Tensor, y: Tensor) -> None:
    if not isinstance(y, Tensor) or y.dtype.is_floating_point or y.dtype.is_complex:
        check_alike({"z": z, "y": y})
    else:
        check_alike({"z": z})
        check_dense("y", y)
        check_device("y", y, z.device, like="z")
    _check_shape("y", y, "z", z)


def _check_real(z: Tensor, others: dict[str, Tensor | None]) -> None:
    """Raise unless all are dense tensors on one device, z floating-point and the others real."""
    check_alike({"input": z})
    for name, tensor in others.items():
        if tensor is None and name != "target":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(tensor).__name__}")
        if tensor.dtype.is_complex:
            raise TypeError(f"expected {name} of a real dtype, got {tensor.dtype}")
        check_dense(name, tensor)
        check_device(name, tensor, z.device, like="input")


def _check_shape(name: str, tensor: Tensor, z_name: str, z: Tensor) -> None:
    if tensor.shape != z.shape:
        raise ValueError(
            f"expected {name} of shape {shape_of(z)} like {z_name}, got {shape_of(tensor)}"
        )


def _expand(name: str, tensor: Tensor | None, z: Tensor) -> Tensor | None:
    if tensor is None:
        return None
    if not _broadcasts(tensor, z):
        raise ValueError(
            f"expected {name} of a shape that broadcasts to z's, {shape_of(z)}, got "
            f"{shape_of(tensor)}"
        )
    return tensor.expand_as(z)


def _broadcasts(tensor: Tensor, z: Tensor) -> bool:
    leading, shape = z.dim() - tensor.dim(), tensor.shape
    if leading < 0:
        return False
    return all(n in (1, m) for n, m in zip(shape, z.shape[leading:], strict=True))


# The casts that torch.autocast applies to PyTorch's own functions. They are done here because a
# Function's forward and backward must see the same dtypes. Like autocast, they leave float64 as is.


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast to autocast's dtype if autocast is enabled, as for `torch.nn.functional.linear`."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    low = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in low else t for t in tensors)


def _float32_under_autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast to float32 if autocast is enabled, as for PyTorch's own losses."""
    if autocast_dtype(tensors[0]) is None:
        return tensors
    low = (torch.bfloat16, torch.float16)
    return tuple(t.float() if isinstance(t, Tensor) and t.dtype in low else t for t in tensors)


def autocast_dtype(tensor: Any) -> torch.dtype | None:
    """Autocast's dtype on the tensor's device; None if autocast is off or it is not a tensor."""
    if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
        return None
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
