"""The walk over blocks of labels: its own arithmetic. What comes of it all is in test_labels.py."""

import math

import mpmath
import pytest
import torch

from nnce import blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_is_right_to_some_units_in_the_last_place(dtype):
    """Everywhere, where it is as small as can be and where 1 + t rounds to 1 or the next number."""
    eps = torch.finfo(dtype).eps
    z = torch.cat([torch.linspace(-80, 80, 4001), torch.linspace(-1, 1, 2001)]).to(dtype)
    edge = torch.tensor([math.log(eps * f) for f in (0.1, 0.4, 0.5, 0.6, 1, 1.4, 1.6, 2, 3)])
    z = torch.cat([z, edge.to(dtype)])[None]
    how = blocks._Rows(blocks._Room(z.numel(), z), 1, z.new_ones(1, 1), True, True)
    C = blocks._use_up(z.clone(), blocks.Options(None, None, None, 0), None, None, how.factor, how)
    with mpmath.workdps(60):
        exact = [mpmath.log1p(mpmath.exp(mpmath.mpf(float(number)))) for number in z[0]]
        worst = max(
            abs(mpmath.mpf(float(got)) - right) / right
            for got, right in zip(C[0], exact, strict=True)
        )
    assert worst < 4 * eps


@pytest.mark.parametrize("z", [math.inf, -math.inf, math.nan, 1e30, -1e30, 0.0])
def test_the_ends_of_the_line(z):
    """softplus and σ of what is not finite, without a warning and without NaN but for NaN."""
    z = torch.full((1, 1), z)
    how = blocks._Rows(blocks._Room(1, z), 1, z.new_ones(1, 1), True, True)
    expected = -torch.nn.functional.logsigmoid(-z), z.sigmoid()
    options = blocks.Options(None, None, None, 0)
    C = blocks._use_up(z, options, None, None, how.factor, how)
    torch.testing.assert_close((C, z), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("n", "labels", "features"),
    [(1, 10, 3), (1024, 131_072, 512), (512, 10**6, 256), (10**6, 9, 4)],
)
def test_a_block_fits_its_memory(n, labels, features):
    block = blocks.default_block(n, labels, features, torch.float32)
    examples = blocks.examples_at_a_time(n)
    assert 1 <= block <= labels and 1 <= examples <= max(n, 1)
    assert block * examples * 4 <= max(2**24, labels * features * 4 / 20)


def test_examples_are_taken_in_equal_parts():
    assert [blocks.examples_at_a_time(n) for n in (0, 1, 1024, 1025, 3000)] == [
        1,
        1,
        1024,
        513,
        1000,
    ]
