"""Each equation of the notes; the names of the tests say which one broke."""

import math

import pytest
import torch
from oracles import ulp_distance
from torch.testing import assert_close

from nnce import rules


def tensor(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def sigma(z):
    return 1 / (1 + math.exp(-z))


def test_equation_1_weighted_input():
    a_prev, W, b = tensor([1.0, 2.0]), tensor([3.0, 4.0], [5.0, 6.0]), tensor(0.5, -0.5)
    assert_close(rules.linear(a_prev, W, b), tensor([11.5, 16.5]))
    assert_close(rules.linear(a_prev, W), tensor([11.0, 17.0]))


def test_equation_1_activation():
    assert_close(rules.sigmoid(tensor(0.0, math.log(3))), tensor(0.5, 0.75))


def test_equation_2_quadratic_loss():
    assert_close(rules.quadratic(tensor(math.log(3)), tensor(0.25)), tensor(0.5 * 0.5**2))


def test_equation_3_cross_entropy():
    z, y = tensor(math.log(3)), tensor(0.25)
    assert_close(
        rules.cross_entropy(z, y), tensor(-(0.25 * math.log(0.75) + 0.75 * math.log(0.25)))
    )


def test_equation_4_last_delta_of_the_quadratic_loss():
    z, y = tensor(math.log(3)), tensor(0.25)
    assert_close(rules.dz_quadratic(z, y), tensor(0.5 * 0.75 * 0.25))


def test_equation_5_last_delta_of_the_cross_entropy():
    assert_close(rules.dz_cross_entropy(tensor(math.log(3)), tensor(0.25)), tensor(0.5))


def test_equation_6_gradients_of_weights_and_biases():
    dz, a_prev = tensor([1.0, 2.0], [3.0, 4.0]), tensor([5.0, 6.0, 7.0], [8.0, 9.0, 10.0])
    assert_close(rules.dW(dz, a_prev), tensor([29.0, 33.0, 37.0], [42.0, 48.0, 54.0]))
    assert_close(rules.db(dz), tensor(4.0, 6.0))


def test_equation_7_gradient_of_the_layer_before():
    dz, W = tensor([1.0, 2.0]), tensor([3.0, 4.0, 5.0], [6.0, 7.0, 8.0])
    assert_close(rules.da_prev(dz, W), tensor([15.0, 18.0, 21.0]))


def test_equation_8_hidden_delta():
    assert_close(rules.dz_hidden(tensor(2.0), tensor(math.log(3))), tensor(2 * 0.75 * 0.25))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_any_leading_dimensions(leading):
    a_prev, W, b = torch.rand(*leading, 5), torch.rand(4, 5), torch.rand(4)
    z = rules.linear(a_prev, W, b)
    assert z.shape == (*leading, 4)
    y = torch.rand(*leading, 4)
    for rule in (
        rules.quadratic,
        rules.cross_entropy,
        rules.dz_quadratic,
        rules.dz_cross_entropy,
        rules.dz_hidden,
    ):
        assert rule(z, y).shape == z.shape
    flat = z.reshape(-1, 4)
    assert_close(rules.dW(z, a_prev), flat.T @ a_prev.reshape(-1, 5))
    assert_close(rules.db(z), flat.sum(0))
    assert rules.da_prev(z, W).shape == a_prev.shape


def test_a_term_of_weight_0_is_0_at_infinity():
    z = tensor(-math.inf, -math.inf, math.inf, math.inf)
    y = tensor(0.0, 1.0, 0.0, 1.0)
    assert rules.cross_entropy(z, y).tolist() == [0.0, math.inf, math.inf, 0.0]
    assert rules.dz_cross_entropy(z, y).tolist() == [0.0, -1.0, 1.0, 0.0]
    assert rules.quadratic(z, y).tolist() == [0.0, 0.5, 0.5, 0.0]
    assert rules.dz_quadratic(z, y).tolist() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "rule", [rules.quadratic, rules.cross_entropy, rules.dz_quadratic, rules.dz_cross_entropy]
)
def test_nan_stays_nan(rule):
    nan = tensor(math.nan, math.nan, 0.0)
    assert rule(nan, tensor(0.0, 1.0, math.nan)).isnan().all()


@pytest.mark.parametrize("y", [0.0, 1.0])
def test_cross_entropy_in_float32_from_minus_100_to_100(y):
    z = torch.linspace(-100, 100, 20_001)
    target = torch.full_like(z, y)
    sign = 1 if y == 0 else -1
    wide = sign * z.double()  # by symmetry, as if y were 0
    exact_gradient = sign / (1 + torch.exp(-wide))
    exact_loss = torch.log1p(torch.exp(-wide.abs())) + wide.clamp(min=0)
    gradient, loss = rules.dz_cross_entropy(z, target), rules.cross_entropy(z, target)
    assert gradient.isfinite().all() and loss.isfinite().all()
    normal = exact_gradient.abs() >= torch.finfo(torch.float32).smallest_normal
    assert ulp_distance(gradient, exact_gradient)[normal].max() <= 3
    assert ulp_distance(loss, exact_loss)[normal].max() <= 4
    assert (gradient - exact_gradient)[~normal].abs().max() < torch.finfo().smallest_normal


def test_bce_loss_is_blind_where_the_rule_sees():
    """What nnce is for: where BCELoss of σ(z) gives exactly 0, equation 5 gives 1."""
    z = torch.tensor([17.0, 50.0, 100.0], requires_grad=True)
    y = torch.zeros(3)
    torch.nn.BCELoss(reduction="sum")(z.sigmoid(), y).backward()
    assert z.grad.tolist() == [0.0, 0.0, 0.0]
    assert_close(rules.dz_cross_entropy(z.detach(), y), torch.ones(3), rtol=1e-7, atol=0)
