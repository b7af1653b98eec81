import itertools
import math
import re

import mpmath
import numpy as np
import pytest
import torch
from conftest import slow_unless
from oracles import (
    HAND_WRITTEN,
    REDUCTIONS,
    bce_with_logits,
    focal_terms,
    half_mse,
    random,
    same_gradients,
    targets,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss as torchvision_loss

import nnce
from nnce.experiments.proof import precision
from nnce.rules import Focus

LOSSES = list(HAND_WRITTEN.values())


@pytest.mark.parametrize("loss", LOSSES)
def test_bad_targets_are_refused_in_one_sentence(loss):
    z = torch.zeros(32, 10)
    with pytest.raises(ValueError, match=r"^expected y of shape \(32, 10\) like z, got \(32,\)$"):
        loss(z, torch.zeros(32))
    with pytest.raises(
        TypeError, match=r"^expected y of dtype torch.float32 like z, got torch.float64$"
    ):
        loss(z, torch.zeros(32, 10, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^expected y on device cpu like z, got meta$"):
        loss(z, torch.zeros(32, 10, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match=r"^expected y on device cpu like z, got meta$"):
        loss(z, torch.zeros(32, 10, device="meta"))
    with pytest.raises(TypeError, match=r"^expected y to be a tensor, got list$"):
        loss(z, [0.0])
    with pytest.raises(TypeError, match=r"^expected y to be a tensor, got NoneType$"):
        loss(z, None)
    with pytest.raises(TypeError, match=r"^expected z of a floating-point dtype, got torch.int64$"):
        loss(z.long(), z.long())
    with pytest.raises(ValueError, match=r"^expected reduction .*, got 'median'$"):
        loss(z, z, reduction="median")


def test_bad_layers_are_refused_in_one_sentence():
    a_prev, W, b = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4)
    with pytest.raises(
        ValueError, match=r"a_prev of shape \(\.\.\., 3\) .* W of shape \(4, 3\), got \(2, 4\)$"
    ):
        nnce.linear(torch.zeros(2, 4), W, b)
    with pytest.raises(ValueError, match=r"a_prev of shape \(\.\.\., 3\) .*, got \(\)$"):
        nnce.linear(torch.zeros(()), W, b)
    with pytest.raises(ValueError, match=r"b of shape \(4,\) .*, got \(3,\)$"):
        nnce.linear(a_prev, W, torch.zeros(3))
    with pytest.raises(ValueError, match=r"W of shape \(n_out, n_in\), got \(4,\)$"):
        nnce.linear(a_prev, b, b)
    with pytest.raises(TypeError, match=r"W of dtype torch.float32 like a_prev, got"):
        nnce.linear(a_prev, W.double(), b)
    with pytest.raises(TypeError, match="z of a floating-point dtype"):
        nnce.sigmoid(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("loss", LOSSES)
def test_empty_batch(loss):
    z = torch.zeros(0, 10, requires_grad=True)
    y = torch.zeros(0, 10)
    assert loss(z, y, reduction="sum").item() == 0
    assert math.isnan(loss(z, y, reduction="mean").item())
    assert math.isnan(loss(z, y, reduction="batchmean").item())
    assert loss(z, y, reduction="none").shape == (0, 10)
    loss(z, y, reduction="sum").backward()
    assert z.grad.shape == (0, 10)


@pytest.mark.parametrize("loss", LOSSES)
def test_nan_in_nan_out(loss):
    z = torch.tensor([[math.nan, 0.0]], requires_grad=True)
    C = loss(z, torch.ones(1, 2))
    C.backward()
    assert C.isnan() and z.grad.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_one_dimensional_z_is_one_example(loss):
    z, y = random(6), targets(6)
    assert_close(loss(z, y), loss(z, y, reduction="sum"))
    assert_close(loss(z, y), loss(z[None], y[None]))


def test_oracles_as_pytorch_reduces_them():
    """PyTorch's means are over the components too, and MSELoss has no ½."""
    z, y = random(7, 4), targets(7, 4)
    F = torch.nn.functional
    assert_close(
        nnce.sigmoid_cross_entropy(z, y),
        F.binary_cross_entropy_with_logits(z, y, reduction="sum") / 7,
    )
    assert_close(
        nnce.sigmoid_cross_entropy(z, y, reduction="mean"),
        F.binary_cross_entropy_with_logits(z, y),
    )
    assert_close(
        nnce.sigmoid_quadratic(z, y), 0.5 * F.mse_loss(z.sigmoid(), y, reduction="sum") / 7
    )


def test_soft_targets_reach_their_entropy():
    y = targets(5, 3)
    z = torch.logit(y.detach().clamp(0.1, 0.9)).requires_grad_()
    y = z.detach().sigmoid()
    entropy = -(y * y.log() + (1 - y) * (1 - y).log())
    C = nnce.sigmoid_cross_entropy(z, y, reduction="none")
    assert_close(C, entropy)
    C.sum().backward()
    assert z.grad.abs().max() < 1e-15


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("loss", "oracle"),
    [(nnce.sigmoid_quadratic, half_mse), (nnce.sigmoid_cross_entropy, bce_with_logits)],
)
def test_gradients_only_where_asked_for(loss, oracle, reduction):
    z, y = random(3, 4).detach(), targets(3, 4).detach()
    for wants_z, wants_y in ((True, False), (False, True)):
        C = loss(
            z.clone().requires_grad_(wants_z),
            y.clone().requires_grad_(wants_y),
            reduction=reduction,
        )
        gradients = C.grad_fn
        while "Sigmoid" not in gradients.name():
            gradients = gradients.next_functions[0][0]
        of = C if gradients is C.grad_fn else z  # a fused loss includes its reduction
        dz, dy, *_ = gradients.apply(torch.ones_like(of))
        assert (dz is not None, dy is not None) == (wants_z, wants_y)
    assert not loss(z, y).requires_grad


def test_linear_computes_only_what_is_asked_for():
    a_prev, W, b = torch.rand(2, 3), torch.rand(4, 3), torch.rand(4)
    for wants in ((True, False, False), (False, True, False), (False, False, True)):
        inputs = [t.clone().requires_grad_(w) for t, w in zip((a_prev, W, b), wants, strict=True)]
        z = nnce.linear(*inputs)  # kept: PyTorch 2.11 frees what is saved with the output
        gradients = z.grad_fn.apply(torch.rand(2, 4))
        assert tuple(g is not None for g in gradients) == wants


def test_only_inputs_are_saved():
    """A saved intermediate gives silently wrong second derivatives."""
    z, y = random(3, 4), targets(3, 4)
    for output, inputs in (
        (nnce.sigmoid(z), (z,)),
        (nnce.sigmoid_quadratic(z, y, reduction="none"), (z, y)),
        (nnce.sigmoid_cross_entropy(z, y, reduction="none"), (z, y)),
    ):
        saved = [tensor for tensor in output.grad_fn.saved_tensors if tensor is not None]
        assert len(saved) == len(inputs)
        assert all(s.data_ptr() == i.data_ptr() for s, i in zip(saved, inputs, strict=True))


WEIGHTS = {
    "weight": {"weight": (4,)},
    "weight per element": {"weight": (3, 4)},
    "weight per example": {"weight": (3, 1)},
    "pos_weight": {"pos_weight": (4,)},
    "one pos_weight": {"pos_weight": ()},
    "both": {"weight": (3, 4), "pos_weight": (4,)},
}


WEIGHTED = list(itertools.product(WEIGHTS, ("none", "sum", "mean")))


def with_weights(weighted):
    """z, y, and weights of these shapes by name."""
    weights = {
        name: (random(*shape, seed=i).detach().abs() + 0.1).requires_grad_()
        for i, (name, shape) in enumerate(WEIGHTS[weighted].items())
    }
    return random(3, 4), targets(3, 4), weights


@pytest.mark.parametrize(("weighted", "reduction"), WEIGHTED)
def test_weights_mean_what_they_mean_to_pytorch(weighted, reduction):
    z, y, weights = with_weights(weighted)
    ours = nnce.sigmoid_cross_entropy(z, y, reduction=reduction, **weights)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(
        z, y, reduction=reduction, **{name: w.detach() for name, w in weights.items()}
    )
    same_gradients(ours, theirs, (z, y), rtol=1e-11)


@pytest.mark.parametrize(
    ("weighted", "reduction"),
    slow_unless(lambda *case: case == ("weight per example", "mean"), WEIGHTED),
)
def test_first_and_second_derivatives_with_respect_to_weights(weighted, reduction):
    """PyTorch's loss has none."""
    z, y, weights = with_weights(weighted)

    def by_all(z, y, *w):
        named = dict(zip(weights, w, strict=True))
        return nnce.sigmoid_cross_entropy(z, y, reduction=reduction, **named)

    assert gradcheck(by_all, (z, y, *weights.values()))
    assert gradgradcheck(by_all, (z, y, *weights.values()))


def test_weights_with_batchmean():
    z, y, p = random(3, 4), targets(3, 4), torch.full((4,), 2.0, dtype=torch.float64)
    assert_close(
        nnce.sigmoid_cross_entropy(z, y, weight=p, pos_weight=p),
        nnce.sigmoid_cross_entropy(z, y, weight=p, pos_weight=p, reduction="sum") / 3,
    )


def test_what_has_weight_0_costs_and_pulls_nothing_at_an_infinite_z():
    inf = math.inf
    z = torch.tensor([[inf, -inf, inf, -inf]], requires_grad=True)
    y = torch.tensor([[0.0, 1.0, 1.0, 0.0]], requires_grad=True)
    C = nnce.sigmoid_cross_entropy(z, y, weight=torch.zeros(4), reduction="sum")
    dz, dy = torch.autograd.grad(C, (z, y))
    assert C == 0 and (dz == 0).all() and (dy == 0).all()
    C = nnce.sigmoid_cross_entropy(z, y, weight=torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert C == 0
    still_nan = nnce.sigmoid_cross_entropy(z * math.nan, y, weight=torch.zeros(4))
    assert still_nan.isnan()


def test_the_derivative_by_pos_weight_at_an_infinite_z():
    """d/d pos_weight = −y ln a: 0 for y = 0 whatever a is, infinite for y = 1 and a = 0."""
    z, y = torch.full((2,), -math.inf), torch.tensor([0.0, 1.0])
    pos_weight = torch.full((2,), 2.0, requires_grad=True)
    C = nnce.sigmoid_cross_entropy(z, y, pos_weight=pos_weight, reduction="none")
    (d_pos_weight,) = torch.autograd.grad(C, pos_weight, torch.ones(2))
    assert d_pos_weight.tolist() == [0.0, math.inf]


def test_forward_mode_at_an_infinite_z():
    """Along z alone, the derivative by y, which is infinite, has no part in it."""
    z, y = torch.tensor([math.inf, -math.inf]), torch.tensor([0.0, 1.0])
    for options in ({}, {"pos_weight": torch.ones(2)}):

        def loss(z, options=options):
            return nnce.sigmoid_cross_entropy(z, y, reduction="none", **options)

        tangent = torch.func.jvp(loss, (z,), (torch.ones(2),))[1]
        assert tangent.tolist() == [1.0, -1.0]


@pytest.mark.parametrize("leading", [(), (2,), (0,), (2, 3)])
@pytest.mark.parametrize(("n_in", "n_out"), [(0, 3), (3, 0), (0, 0)])
def test_layers_without_features(leading, n_in, n_out):
    a_prev, W, b = (
        torch.rand(*shape, requires_grad=True)
        for shape in ((*leading, n_in), (n_out, n_in), (n_out,))
    )
    upstream = torch.rand(*leading, n_out)
    oracle = torch.nn.functional.linear(a_prev, W, b)
    got = nnce.linear(a_prev, W, b)
    assert_close(got, oracle)
    for ours, theirs in zip(
        torch.autograd.grad(got, (a_prev, W, b), upstream),
        torch.autograd.grad(oracle, (a_prev, W, b), upstream),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_forward_mode_in_forward_mode_is_exact_in_saturation():
    """Second and third derivatives at |z| from 12 to 40, relatively, and at 0."""
    z = torch.tensor([-40.0, -20.0, -12.0, 0.0, 12.0, 20.0, 40.0], dtype=torch.float64)
    s, t = 1 / (1 + torch.exp(-z)), 1 / (1 + torch.exp(z))
    y = torch.zeros_like(z)

    def along(f):
        return lambda z: torch.func.jvp(f, (z,), (torch.ones_like(z),))[1]

    def cross_entropy(z):
        return nnce.sigmoid_cross_entropy(z, y, reduction="none")

    def quadratic(z):
        return nnce.sigmoid_quadratic(z, y, reduction="none")

    for function, second, third in (
        (nnce.sigmoid, s * t * (t - s), s * t * (1 - 6 * s * t)),
        (cross_entropy, s * t, s * t * (t - s)),
        (quadratic, s * s * t * (2 * t - s), s * s * t * (s * s - 7 * s * t + 4 * t * t)),
    ):
        assert_close(along(along(function))(z), second, rtol=1e-13, atol=1e-300)
        assert_close(along(along(along(function)))(z), third, rtol=1e-12, atol=1e-300)


def test_forward_mode_in_forward_mode_by_targets_and_weights():
    """Also by y, where it is 0 and a term is nothing."""
    z, y, p = random(6).detach(), targets(6).detach(), random(6, seed=5).detach().abs()

    def loss(y, p):
        return nnce.sigmoid_cross_entropy(z, y, pos_weight=p, reduction="sum")

    forward = torch.func.jacfwd(torch.func.jacfwd(loss), argnums=1)(y, p)
    backward = torch.func.jacrev(torch.func.jacrev(loss), argnums=1)(y, p)
    assert backward.diagonal().abs().min() > 0
    assert_close(forward, backward, rtol=1e-12, atol=1e-14)


def test_bad_weights():
    z = torch.zeros(2, 3)
    for name in ("weight", "pos_weight"):
        message = rf"^expected {name} of a shape that broadcasts to z's, \(2, 3\), got \(4,\)$"
        with pytest.raises(ValueError, match=message):
            nnce.sigmoid_cross_entropy(z, z, **{name: torch.ones(4)})
        with pytest.raises(ValueError, match=r"\(5, 2, 3\)"):
            nnce.sigmoid_cross_entropy(z, z, **{name: torch.ones(5, 2, 3)})
        with pytest.raises(TypeError, match=f"expected {name} of dtype torch.float32 like z"):
            nnce.sigmoid_cross_entropy(z, z, **{name: torch.ones(3).double()})
        with pytest.raises(ValueError, match=rf"expected {name} of at least 0, got \[1.0, -2.0\]"):
            nnce.SigmoidCrossEntropyLoss(**{name: torch.tensor([1.0, -2.0])})
        with pytest.raises(ValueError, match=f"expected {name} of at least 0, got nan"):
            nnce.SigmoidCrossEntropyLoss(**{name: torch.tensor(math.nan)})


def test_weights_that_are_no_tensors():
    with pytest.raises(TypeError, match="expected pos_weight to be a tensor, got float"):
        nnce.SigmoidCrossEntropyLoss(pos_weight=2.0)
    with pytest.raises(TypeError, match="expected pos_weight to be a tensor, got float"):
        nnce.sigmoid_cross_entropy(torch.zeros(2), torch.zeros(2), pos_weight=2.0)


def test_the_module_takes_the_place_of_bce_with_logits():
    z, y, w = torch.randn(5, 3), torch.rand(5, 3), torch.tensor([1.0, 2.0, 3.0])
    ours = nnce.SigmoidCrossEntropyLoss("mean", weight=w, pos_weight=2 * w)
    theirs = torch.nn.BCEWithLogitsLoss(weight=w, pos_weight=2 * w)
    assert_close(ours(z, y), theirs(z, y))
    assert set(ours.state_dict()) == set(theirs.state_dict())


# -------------------------------------------------------------------------------- focal losses


def focal(z, y, gamma, alpha=None):
    return nnce.sigmoid_focal_loss(z, y, gamma=gamma, alpha=alpha)


@pytest.mark.parametrize("dtype", precision.DTYPES, ids=str)
@pytest.mark.parametrize("gamma", [0, 0.5, 1, 1.5, 2, 5])
def test_focal_rules_are_exact_at_every_z(dtype, gamma):
    """In the contexts in which no kernel runs: vmap is one. (The kernels' test is theirs.)"""
    z = precision.grid(dtype)[::5]
    wide = z.double().numpy().astype(np.longdouble)
    softplus = [np.maximum(u, 0) + np.log1p(np.exp(-abs(u))) for u in (-wide, wide)]
    for y, alpha in itertools.product((0, 1), (None, 0.25)):
        of_y, of_1_minus_y = softplus[1 - y], softplus[y]
        q, power = np.exp(-of_1_minus_y), np.exp(-np.longdouble(gamma) * of_1_minus_y)
        alpha_t = 1 if alpha is None else 0.25 if y else 0.75
        sign = -1 if y else 1
        exact_dz = sign * alpha_t * power * (q + gamma * np.exp(-of_y) * of_y)
        leaf = z.clone().requires_grad_()
        C = torch.func.vmap(focal, (0, 0, None, None))(leaf, torch.full_like(z, y), gamma, alpha)
        (dz,) = torch.autograd.grad(C.sum(), leaf)
        for got, exact, of_0 in ((C.detach(), alpha_t * power * of_y, 4), (dz, exact_dz, 3)):
            limit = (8 + 2 * gamma if dtype == torch.float64 else 8) if gamma else of_0
            high = torch.from_numpy(exact.astype(float))
            error = abs(got.double().numpy() - exact)
            tiny = torch.finfo(dtype).smallest_normal
            units = error / precision.ulp(high, dtype).numpy()
            assert got.isfinite().all()
            assert units[abs(exact) >= tiny].max() <= limit
            assert (error[abs(exact) < tiny] < tiny).all()


def of_focus(z, y, focus):
    gammas = {"gamma_positive": focus.gamma_positive, "gamma_negative": focus.gamma_negative}
    if focus.alpha is not None:
        return nnce.sigmoid_focal_loss(z, y, alpha=focus.alpha, gamma=focus.gamma_positive)
    return nnce.sigmoid_asymmetric_loss(z, y, **gammas, margin=focus.margin, reduction="none")


FOCI = [Focus(2.0, 2.0, 0, 0.25), Focus(0.5, 0.5), Focus(1.0, 4.0, 0.05), Focus(0.0, 1.5, 0.3)]


@pytest.mark.parametrize("focus", FOCI, ids=str)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_focal_derivatives_by_mpmath(focus, kind):
    """C and its first two derivatives, against those that mpmath takes of C in 320 digits.

    Errors are relative to the absolute values of the terms, which cancel for soft targets, at the
    kink of the margin and in the second derivative.
    """
    kinks = [math.log(focus.margin / (1 - focus.margin)) + 1e-4] if focus.margin else []
    for y in (0.0, 1.0) if kind == "hard" else (0.2, 0.5, 0.9):
        for x in (-700.0, -80.0, -12.5, -2.0, -0.3, 0.7, 3.0, 25.0, 300.0, *kinks):
            z, target = (
                torch.tensor([x], dtype=torch.float64, requires_grad=True),
                torch.tensor([y], dtype=torch.float64),
            )
            C = of_focus(z, target, focus)
            (dz,) = torch.autograd.grad(C.sum(), z, create_graph=True)
            (second,) = torch.autograd.grad(dz.sum(), z)
            with mpmath.workdps(320):  # 1 + e^−700 is not 1
                exact = [mpmath.diff(lambda t, y=y: by_mpmath(t, y, focus), x, k) for k in range(3)]
            of_C, of_dz = focal_terms(z.detach(), target, focus)
            # A derivative of a term is at most (1 + γ) times the term, or its own cancellation.
            of_second = of_dz * (2 + max(focus[:2])) + of_dz / (1e-4 if x in kinks else 1)
            for got, true, of in zip((C, dz, second), exact, (of_C, of_dz, of_second), strict=True):
                error = abs(mpmath.mpf(got.item()) - true)
                assert error <= 20 * 2.0**-52 * of.item() + 1e-300, (x, y, got, true)


def by_mpmath(z, y, focus):
    a, m = 1 / (1 + mpmath.exp(-z)), mpmath.mpf(focus.margin)
    p = max(a - m, 0)
    L = y * mpmath.log1p(mpmath.exp(-z)) - (1 - y) * (
        mpmath.log1p(-p) if m else -mpmath.log1p(mpmath.exp(z))
    )
    q = (1 - y) * p + y / (1 + mpmath.exp(z))
    alpha_t = 1 if focus.alpha is None else y * focus.alpha + (1 - y) * (1 - focus.alpha)
    gamma = (1 - y) * focus.gamma_negative + y * focus.gamma_positive
    return alpha_t * q**gamma * L


def test_without_a_power_it_is_the_cross_entropy():
    z, y = 9 * torch.randn(50).double(), torch.rand(50).double().round()
    expected = nnce.sigmoid_cross_entropy(z, y, reduction="none")
    assert_close(nnce.sigmoid_focal_loss(z, y, gamma=0, alpha=None), expected)
    assert_close(nnce.sigmoid_focal_loss(z, y, gamma=0, alpha=0.5), expected / 2)
    plain = {"gamma_positive": 0, "gamma_negative": 0, "margin": 0, "reduction": "none"}
    assert_close(nnce.sigmoid_asymmetric_loss(z, y, **plain), expected)


def test_it_is_torchvisions_focal_loss():
    """Soft targets too, and −1 for no alpha, where torchvision's loses no digits."""
    z, y = 3 * torch.randn(60, dtype=torch.float64), torch.rand(60, dtype=torch.float64)
    for target, alpha, gamma in itertools.product((y, y.round()), (0.25, -1), (0.0, 1.5, 2.0)):
        for reduction in ("none", "sum", "mean"):
            got = nnce.sigmoid_focal_loss(z, target, alpha=alpha, gamma=gamma, reduction=reduction)
            assert_close(got, torchvision_loss(z, target, alpha, gamma, reduction))


@pytest.mark.parametrize(
    "loss",
    [
        nnce.sigmoid_focal_loss,
        pytest.param(nnce.sigmoid_asymmetric_loss, marks=pytest.mark.slow),
    ],
)
def test_options_of_the_focal_losses(loss):
    z = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0, 1, -1, 1, 0, 1]] * 3 + [[-1] * 6]).double()
    weight = torch.rand(6, dtype=torch.float64)
    counts = y != -1
    each = weight * loss(z, y.clamp(min=0), reduction="none") * counts
    of = {"none": each, "sum": each.sum(), "mean": each.sum() / 15, "batchmean": each.sum() / 3}
    for reduction, expected in of.items():
        for vmapped in (False, True):  # the kernel, and the rules
            context = torch.func.vmap if vmapped else lambda f: lambda z: f(z[0])
            got = context(
                lambda z, r=reduction: loss(z, y, weight=weight, ignore_index=-1, reduction=r)
            )(z[None])
            assert_close(got[0] if vmapped else got, expected)
            gradient = torch.autograd.grad(got.sum(), z)[0]
            assert_close(gradient, torch.autograd.grad(expected.sum(), z, retain_graph=True)[0])
    of_booleans = torch.func.vmap(lambda z, y: loss(z, y, reduction="none"))(z, y == 1)
    assert_close(of_booleans, loss(z, (y == 1).double(), reduction="none"))


def test_alpha_0_weighs_nothing_at_infinity():
    z, y = torch.tensor([-math.inf, math.inf]), torch.tensor([1.0, 0.0])
    assert nnce.sigmoid_focal_loss(z, y, alpha=0.0)[0] == 0
    assert nnce.sigmoid_focal_loss(z, y, alpha=1.0)[1] == 0


BAD = {
    "expected gamma from 0 to 1,000,000, got -0.5": {"gamma": -0.5},
    "expected gamma from 0 to 1,000,000, got nan": {"gamma": math.nan},
    "expected alpha in [0, 1], or None or -1 for no alpha, got 1.5": {"alpha": 1.5},
    "expected gamma_positive from 0 to 1,000,000, got -1": {"gamma_positive": -1},
    "expected gamma_negative from 0 to 1,000,000, got -2": {"gamma_negative": -2},
    "expected gamma from 0 to 1,000,000, got inf": {"gamma": math.inf},
    "expected gamma from 0 to 1,000,000, got 1e+39": {"gamma": 1e39},
    "expected margin in [0, 1), got 1": {"margin": 1},
    "expected margin in [0, 1), got -0.1": {"margin": -0.1},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_options_of_the_focal_losses(sentence):
    options = BAD[sentence]
    name = "focal" if {"gamma", "alpha"} & set(options) else "asymmetric"
    function = getattr(nnce, f"sigmoid_{name}_loss")
    module = nnce.SigmoidFocalLoss if name == "focal" else nnce.SigmoidAsymmetricLoss
    for call in (
        lambda: function(torch.zeros(3), torch.zeros(3), **options),
        lambda: module(**options),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            call()
    (option,) = options
    with pytest.raises(TypeError, match=f"^expected {option} to be a number, got str$"):
        module(**{option: "2"})


def test_modules_of_the_focal_losses():
    z, y, weight = (
        t.double() for t in (torch.randn(4, 6), torch.rand(4, 6).round(), torch.rand(6))
    )
    focal = nnce.SigmoidFocalLoss("mean", alpha=None, gamma=1.5, weight=weight, ignore_index=-1)
    options = {"weight": weight, "ignore_index": -1, "reduction": "mean"}
    assert_close(focal(z, y), nnce.sigmoid_focal_loss(z, y, alpha=None, gamma=1.5, **options))
    assert str(focal) == (
        "SigmoidFocalLoss(reduction='mean', ignore_index=-1, alpha=None, gamma=1.5)"
    )
    asymmetric = nnce.SigmoidAsymmetricLoss(
        "mean", gamma_negative=2, weight=weight, ignore_index=-1
    )
    assert_close(asymmetric(z, y), nnce.sigmoid_asymmetric_loss(z, y, gamma_negative=2, **options))
    assert set(asymmetric.state_dict()) == {"weight"}
