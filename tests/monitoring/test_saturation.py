import math

import pytest
import torch

import nnce
from nnce import rules
from nnce.algorithm import backprop
from nnce.monitoring import saturation


def output_layer(z, dz, y):
    return saturation.LayerFigures(*saturation.output_layer(z, dz, y).tolist())


def column(*values):
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def test_slowdown_is_what_sigma_prime_lets_through():
    pull, z = column(1.0, -2.0), column(0.0, 3.0)
    prime = [
        0.25,
        torch.sigmoid(torch.tensor(3.0)).item() * torch.sigmoid(torch.tensor(-3.0)).item(),
    ]
    expected = math.hypot(1.0 * prime[0], 2.0 * prime[1]) / math.hypot(1.0, 2.0)
    assert saturation.slowdown(pull, z) == pytest.approx(expected, rel=1e-6)
    assert math.isnan(saturation.slowdown(0 * pull, z))
    assert saturation.slowdown(pull, 0 * z) == 0.25


def test_the_meter_looks_at_what_is_wrong_by_more_than_half():
    """z = 5 where y is 0 is wrong, z = −5 is right: only the first counts."""
    z, y = column(5.0, -5.0), column(0.0, 0.0)
    figures = output_layer(z, rules.dz_quadratic(z, y), y)
    prime = rules.sigmoid_prime(z)
    assert figures.slowdown == pytest.approx(prime[0].item())
    assert figures.sigmoid_prime == pytest.approx(prime.mean().item())
    assert figures.saturated == 1.0
    right = output_layer(-z.abs(), rules.dz_quadratic(z, y), y)
    assert math.isnan(right.slowdown)


@pytest.mark.parametrize("loss", ["quadratic", "cross-entropy"])
def test_layer_figures_are_those_of_each_network_s_pass(loss, generator):
    networks = [
        nnce.MLP((4, 3, 3, 2), init="large", generator=generator, dtype=torch.float64)
        for _ in range(3)
    ]
    x = torch.rand(9, 4, dtype=torch.float64)
    y = torch.rand(9, 2, dtype=torch.float64).round()
    passes = [backprop(network, x, y, loss=loss) for network in networks]
    layers = [
        (torch.stack([of_one[i].weight for of_one in networks]).detach(), None) for i in (0, 2, 4)
    ]
    z = [torch.stack([one_pass.z[layer] for one_pass in passes]) for layer in range(3)]
    for network, one_pass, figures in zip(
        networks, passes, saturation.layer_figures(layers, z, y, loss), strict=True
    ):
        assert len(figures) == 3
        for layer, z_of_one, dz in zip(figures, one_pass.z, one_pass.dz, strict=True):
            prime = rules.sigmoid_prime(z_of_one)
            assert layer.dz_norm == pytest.approx(dz.norm(dim=1).mean().item())
            assert layer.sigmoid_prime == pytest.approx(prime.mean().item())
            assert layer.saturated == pytest.approx((prime < 0.01).double().mean().item())
        for layer in (0, 1):
            da = one_pass.dz[layer + 1] @ network[2 * layer + 2].weight.detach()
            expected = one_pass.dz[layer].norm() / da.norm()
            assert figures[layer].slowdown == pytest.approx(expected.item())
        wrong = ((one_pass.a[-1] - y).abs() > 0.5).any(1)
        meter = rules.dz_quadratic(one_pass.z[-1], y)[wrong].norm()
        meter /= rules.dz_cross_entropy(one_pass.z[-1], y)[wrong].norm()
        assert wrong.any() and figures[2].slowdown == pytest.approx(meter.item())


def test_an_output_that_is_nan_does_not_hide_the_meter():
    z, y = column(5.0, math.nan), column(0.0, 0.0)
    figures = output_layer(z, rules.dz_quadratic(z, y), y)
    assert figures.slowdown == pytest.approx(rules.sigmoid_prime(z)[0].item())
    assert math.isnan(figures.sigmoid_prime)
