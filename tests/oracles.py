"""Checks of the hand-written gradients, shared by the tests of the right rules and of wrong ones.

Each raises AssertionError on a wrong gradient. All draw a random upstream gradient: under one of
ones, a backward that ignores it would pass. Layers are square, so that a transposed W still fits.
"""

import torch
from torch.autograd import grad, gradcheck, gradgradcheck

import nnce
from nnce import rules
from nnce.algorithm import backprop
from nnce.experiments.proof.precision import ulp
from nnce.losses import LOSSES
from nnce.training import twin

REDUCTIONS = ("none", "sum", "mean", "batchmean")
HAND_WRITTEN = {
    "quadratic": nnce.sigmoid_quadratic,
    "cross-entropy": nnce.sigmoid_cross_entropy,
}


def ulp_distance(value, exact):
    """|value − exact| in units in the last place that `exact` has in the dtype of `value`.

    Below the smallest normal number the unit is that of the subnormal numbers. Equal infinities are
    0 apart, and so are two NaNs; a NaN is infinitely far from a number.

    Args:
        value: computed, of any floating-point dtype.
        exact: the truth in float64, of value's shape.

    Returns:
        float64, value's shape, at least 0.
    """
    wide = value.double()
    distance = (wide - exact).abs() / ulp(exact, value.dtype)
    same = (wide == exact) | (wide.isnan() & exact.isnan())
    return torch.where(same, 0.0, distance).nan_to_num(nan=float("inf"), posinf=float("inf"))


def focal_terms(z, y, focus):
    """The sums of the absolute values of the terms of C and dC/dz of a focal loss, in float64.

    A rounding error of σ(z) − margin, whose terms are σ(z) and the margin, grows by 1 + γ.
    """
    a, not_a, gamma, margin = z.sigmoid(), (-z).sigmoid(), focus.gamma(y), focus.margin
    p, dp, L, dL, blur = a, a * not_a, rules.softplus(z), a, 0
    if margin:
        p = (a - margin).clamp(min=torch.finfo(z.dtype).tiny)
        dp = torch.where(a <= margin, 0.0, dp)
        L, dL = -torch.log1p(-p), dp / (1 - p)
        blur = (1 + gamma) * (1 - y) * (a + margin) / p
    L, dL = (1 - y) * L + y * rules.softplus(-z), (1 - y) * dL + y * not_a
    q, dq = ((1 - y) * p + y * not_a).clamp(min=1e-300), (1 - y) * dp + y * a * not_a
    power = focus.alpha_t(y) * q**gamma * (1 + blur)
    return rules.weighted(power, L), power * (dL + gamma * rules.weighted(dq, L / q))


def laid_out(tensor, layout):
    """The same shape with other strides (and, expanded, other values)."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if layout == "strided":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if layout == "expanded" and tensor.dim() and len(tensor):
        return tensor[:1].expand(tensor.shape)
    return tensor


def bce(z, y):
    return torch.nn.BCELoss(reduction="none")(z.sigmoid(), y)


def bce_with_logits(z, y):
    return torch.nn.BCEWithLogitsLoss(reduction="none")(z, y)


def half_mse(z, y):
    return 0.5 * torch.nn.MSELoss(reduction="none")(z.sigmoid(), y)


BUILT_IN = {"quadratic": (half_mse,), "cross-entropy": (bce, bce_with_logits)}


def reduce(C, reduction):
    """What the reductions mean, said another way than nnce says it."""
    flat = C.reshape(-1, C.shape[-1])
    return {
        "none": C,
        "sum": flat.sum(0).sum(),
        "mean": flat.mean(1).mean(),
        "batchmean": flat.sum(1).mean(),
    }[reduction]


def random(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.clamp(-5, 5).requires_grad_()


def targets(*shape, seed=1):
    """Half of them hard, half of them soft, none at the edge where BCELoss clamps."""
    generator = torch.Generator().manual_seed(seed)
    soft = torch.rand(shape, generator=generator, dtype=torch.float64)
    hard = soft.round()
    return torch.where(torch.rand(shape, generator=generator) < 0.5, soft, hard).requires_grad_()


def same_gradients(got, oracle, inputs, *, rtol=1e-12, atol=1e-14, seed=2):
    """The gradients of two outputs by the inputs agree under a random upstream gradient."""
    torch.testing.assert_close(got, oracle, rtol=rtol, atol=atol)
    upstream = random(*got.shape, seed=seed).detach()
    ours = grad(got, inputs, upstream)
    theirs = grad(oracle, inputs, upstream)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, i=i: f"input {i}: {m}")


def check_losses_by_z():
    for shape in ((7, 4), (2, 3, 4), (5,)):
        for loss in LOSSES:
            for reduction in REDUCTIONS:
                for built_in in BUILT_IN[loss]:
                    z, y = random(*shape), targets(*shape).detach()
                    got = HAND_WRITTEN[loss](z, y, reduction=reduction)
                    same_gradients(got, reduce(built_in(z, y), reduction), (z,), atol=1e-12)


def check_losses_by_y():
    for loss, oracle in (("quadratic", half_mse), ("cross-entropy", bce_with_logits)):
        for reduction in REDUCTIONS:
            z, y = random(7, 4), targets(7, 4)
            got = HAND_WRITTEN[loss](z, y, reduction=reduction)
            same_gradients(got, reduce(oracle(z, y), reduction), (z, y))


def check_linear():
    for leading in ((), (6,), (2, 3)):
        a_prev, W, b = random(*leading, 4), random(4, 4, seed=1), random(4, seed=2)
        oracle = torch.nn.functional.linear(a_prev, W, b)
        same_gradients(nnce.linear(a_prev, W, b), oracle, (a_prev, W, b))


def check_sigmoid():
    z = random(3, 4)
    same_gradients(nnce.sigmoid(z), torch.sigmoid(z), (z,))


def check_gradcheck():
    """First and second derivatives against numerical ones, where those have digits: |z| ≤ 5."""
    z, y = random(3, 4), targets(3, 4)
    a_prev, W, b = random(3, 4), random(4, 4, seed=1), random(4, seed=2)
    for function, inputs in (
        (nnce.linear, (a_prev, W, b)),
        (nnce.sigmoid, (z,)),
        *(
            (lambda z, y, f=f, r=r: f(z, y, reduction=r), (z, some_y))
            for f in HAND_WRITTEN.values()
            for r in REDUCTIONS
            for some_y in (y, y.detach())  # with and without its gradient: two Functions
        ),
    ):
        assert gradcheck(function, inputs, raise_exception=False)
        assert gradgradcheck(function, inputs, raise_exception=False)


def check_network():
    """Every parameter's gradient, by name: Functions, autograd, and the whole algorithm."""
    for loss in LOSSES:
        network = nnce.MLP((4, 4, 4, 4), dtype=torch.float64, generator=_generator())
        names, parameters = zip(*network.named_parameters(), strict=True)
        x, y = random(6, 4).detach().sigmoid(), targets(6, 4).detach()
        oracle = reduce(BUILT_IN[loss][-1](twin.torch_twin(network)(x), y), "batchmean")
        by_autograd = grad(oracle, parameters)
        by_functions = grad(HAND_WRITTEN[loss](network(x), y), parameters)
        by_algorithm = backprop(network, x, y, loss=loss).gradients
        assert tuple(by_algorithm) == names
        for name, want, *gots in zip(
            names, by_autograd, by_functions, by_algorithm.values(), strict=True
        ):
            for got in gots:
                torch.testing.assert_close(
                    got, want, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
                )


def check_saturation():
    """First and second derivatives at |z| from 12 to 40, relatively: atol is 0.

    The exact values, with s = σ(z) and t = σ(−z): σ has s t and s t (t − s); for y = 0 the
    cross-entropy has s and s t, and the quadratic loss s² t and s² t (2t − s).
    """
    z = torch.tensor([-40.0, -20.0, -12.0, 12.0, 20.0, 40.0], dtype=torch.float64)
    s, t = 1 / (1 + torch.exp(-z)), 1 / (1 + torch.exp(z))
    y = torch.zeros_like(z)
    for function, first, second in (
        (nnce.sigmoid, s * t, s * t * (t - s)),
        (lambda z: nnce.sigmoid_cross_entropy(z, y), s, s * t),
        (lambda z: nnce.sigmoid_quadratic(z, y), s * s * t, s * s * t * (2 * t - s)),
    ):
        leaf = z.clone().requires_grad_()
        (got_first,) = grad(function(leaf).sum(), leaf, create_graph=True)
        (got_second,) = grad(got_first.sum(), leaf)
        torch.testing.assert_close(got_first.detach(), first, rtol=1e-14, atol=0)
        torch.testing.assert_close(got_second, second, rtol=1e-13, atol=0)


def _generator():
    return torch.Generator().manual_seed(0)


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in globals().items()
    if name.startswith("check_")
}
