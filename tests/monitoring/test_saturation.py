import math

import pytest
import torch

import nnce
from nnce import rules
from nnce.algorithm import backprop
from nnce.monitoring import saturation


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
    figures = saturation.output_layer(z, rules.dz_quadratic(z, y), y)
    prime = rules.sigmoid_prime(z)
    assert figures.slowdown == pytest.approx(prime[0].item())
    assert figures.sigmoid_prime == pytest.approx(prime.mean().item())
    assert figures.saturated == 1.0
    right = saturation.output_layer(-z.abs(), rules.dz_quadratic(z, y), y)
    assert math.isnan(right.slowdown)


@pytest.mark.parametrize("loss", ["quadratic", "cross-entropy"])
def test_layer_figures_are_those_of_the_pass(loss, generator):
    network = nnce.MLP((4, 3, 3, 2), init="large", generator=generator, dtype=torch.float64)
    x = torch.rand(9, 4, dtype=torch.float64)
    y = torch.rand(9, 2, dtype=torch.float64).round()
    one_pass = backprop(network, x, y, loss=loss)
    figures = saturation.layer_figures(network, x, y, loss)
    assert len(figures) == 3
    for layer, dz in zip(figures, one_pass.dz, strict=True):
        assert layer.dz_norm == pytest.approx(dz.norm(dim=1).mean().item())
    da = one_pass.dz[1] @ network[2].weight.detach()
    expected = one_pass.dz[0].norm() / da.norm()
    assert figures[0].slowdown == pytest.approx(expected.item())
