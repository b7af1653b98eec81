import itertools
import math

import pytest
import torch
from conftest import slow_unless
from oracles import (
    HAND_WRITTEN,
    REDUCTIONS,
    bce_with_logits,
    half_mse,
    random,
    same_gradients,
    targets,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import nnce

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
