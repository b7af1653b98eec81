"""The walk over blocks of labels: its own arithmetic. What comes of it all is in test_labels.py."""

import math
import os
import subprocess
import sys

import mpmath
import pytest
import torch
from conftest import ROOT

from nnce.labels import blocks


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


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("n", [1000, 2500])
@pytest.mark.parametrize(
    "dtypes",
    [
        ("float32",),
        ("float64",),
        ("bfloat16",),
        ("float16",),
        ("float32", "bfloat16"),
        ("float32", "float16"),
        ("bfloat16", "float16"),
    ],
)
def test_a_loss_takes_the_memory_that_is_stated(n, dtypes):
    """Within 10 %, for parameters in the first dtype and autocast to the second."""
    sizes = (n, 8_000, 32)
    command = [sys.executable, "tests/peak.py", "labels", *map(str, (n, 32, 8_000)), *dtypes]
    # glibc gives large blocks back to the system at once only below a fixed threshold.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    stated = blocks.memory(*sizes, *(getattr(torch, name) for name in dtypes)) / 1e6
    assert float(done.stdout) == pytest.approx(stated, rel=0.1)


def test_a_product_in_float16_neither_overflows_nor_underflows():
    """The unit of dz is chosen for each block, whatever the magnitude of dz, x and W."""
    generator = torch.Generator().manual_seed(0)
    for magnitude in (2.0**-60, 2.0**-20, 1.0, 2.0**20):
        z = torch.rand(64, 300, generator=generator) * magnitude
        x, W = (torch.rand(rows, 8, generator=generator).half() * 100 for rows in (64, 300))
        dz, unit = blocks._dz(z.clone(), torch.empty_like(z, dtype=torch.half), x, W)
        for exact, rounded in ((z @ W.float(), dz @ W), (z.mT @ x.float(), dz.mT @ x)):
            assert (rounded.float() * unit - exact).norm() <= 2**-10 * exact.norm()


@pytest.mark.parametrize("number", [0.0, math.inf, math.nan])
def test_a_unit_is_finite(number):
    unit = blocks._unit(torch.tensor(number))
    assert unit > 0 and unit.isfinite()
    assert torch.frexp(unit).mantissa == 0.5


def test_an_upstream_gradient_beyond_float16_is_no_infinity():
    gradient, unit = torch.full((3, 2), 3.0).half(), torch.tensor([1.0, 2.0, 4.0]) / 2**20
    for compute in (blocks.multiplied, blocks.multiply_inplace):
        got = compute(gradient.clone(), torch.half, torch.tensor(2.0**18), unit)
        assert torch.equal(got, torch.tensor([[0.75], [1.5], [3.0]]).half().expand(3, 2))
