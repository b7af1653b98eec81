"""The walk over blocks of labels: its own arithmetic. What comes of it all is in test_labels.py."""

import itertools
import math
import sys

import mpmath
import pytest
import torch
from conftest import slow_unless

from nnce import linear_sigmoid_cross_entropy
from nnce.labels import blocks
from nnce.labels.positives import Targets


def without_positives(n):
    return torch.full((n,), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_is_right_to_some_units_in_the_last_place(dtype):
    """Everywhere, where it is as small as can be and where 1 + t rounds to 1 or the next number."""
    eps = torch.finfo(dtype).eps
    z = torch.cat([torch.linspace(-80, 80, 4001), torch.linspace(-1, 1, 2001)]).to(dtype)
    edge = torch.tensor([math.log(eps * f) for f in (0.1, 0.4, 0.5, 0.6, 1, 1.4, 1.6, 2, 3)])
    z = torch.cat([z, edge.to(dtype)])
    one = torch.ones(1, 1, dtype=dtype)
    # z = x · 1 with one label, which is not a positive: C = softplus(z).
    C = linear_sigmoid_cross_entropy(z[:, None], one, without_positives(len(z)), reduction="none")
    with mpmath.workdps(60):
        exact = [mpmath.log1p(mpmath.exp(mpmath.mpf(number))) for number in z.tolist()]
        worst = max(
            abs(mpmath.mpf(got) - right) / right
            for got, right in zip(C.tolist(), exact, strict=True)
        )
    assert worst < 4 * eps


@pytest.mark.parametrize("z", [math.inf, -math.inf, math.nan, 1e30, -1e30, 0.0])
def test_the_ends_of_the_line(z):
    """softplus and σ of what is not finite, without a warning and without NaN but for NaN."""
    b = torch.full((1,), z, requires_grad=True)
    zero = torch.zeros(1, 1)
    C = linear_sigmoid_cross_entropy(zero, zero, without_positives(1), linear_bias=b)
    (dz,) = torch.autograd.grad(C, b)
    expected = -torch.nn.functional.logsigmoid(-b.detach()), b.detach().sigmoid()
    torch.testing.assert_close((C.detach().reshape(1), dz), expected, equal_nan=True)


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


# Dtypes of the parameters, and of autocast.
MEMORY_IN = (
    ("float32",),
    ("float64",),
    ("bfloat16",),
    ("float16",),
    ("float32", "bfloat16"),
    ("float32", "float16"),
    ("bfloat16", "float16"),
)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("n", "dtypes"),
    slow_unless(  # a process each
        lambda n, dtypes: (n, dtypes) == (1000, ("float32", "bfloat16")),
        itertools.product((1000, 2500), MEMORY_IN),
    ),
)
def test_a_loss_takes_the_memory_that_is_stated(n, dtypes, peak_memory):
    """Within 10 %, for parameters in the first dtype and autocast to the second."""
    sizes = (n, 8_000, 32)
    stated = blocks.memory(*sizes, *(getattr(torch, name) for name in dtypes)) / 1e6
    found = peak_memory("labels", n, 32, 8_000, *dtypes)
    if found > 1.1 * stated:  # once in hundreds of runs, 2 MB are mapped that are not the walk's
        found = peak_memory("labels", n, 32, 8_000, *dtypes)
    assert found == pytest.approx(stated, rel=0.1)


def walked(x, W, factor):
    """dx, and dW in its own units, of a walk in float16 over labels of which none is positive."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return blocks.walk(
        x, W,
        Targets(dense=None, rows=nothing, labels=nothing, values=None, once=True),
        blocks.Options(None, None, None, 0.0),
        factor,
        block=len(W),
        product_dtype=torch.half,
        wants=blocks.Wants(value=False, dx=True, dW=True, db=False),
    )  # fmt: skip


@pytest.mark.parametrize("scale", [2.0**-7, 1.0, 2.0**7])
@pytest.mark.parametrize("magnitude", [2.0**-60, 2.0**-20, 1.0, 2.0**20])
def test_a_product_in_float16_neither_overflows_nor_underflows(magnitude, scale):
    """The unit of dz is chosen for each block, whatever the magnitude of dz, x and W."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 8, generator=generator) * scale).half()
    W = (torch.randn(300, 8, generator=generator) / scale).half()
    factor = torch.rand(64, generator=generator) * magnitude
    found = walked(x, W, factor)
    dz = factor[:, None].double() * (x.double() @ W.double().T).sigmoid()
    dx, dW = dz @ W.double(), dz.T @ x.double()
    assert found.dW.dtype == torch.half
    assert (found.dx - dx).norm() <= 2**-9 * dx.norm()
    assert (found.dW.double() * found.dW_unit[:, None] - dW).norm() <= 2**-9 * dW.norm()


@pytest.mark.parametrize("number", [0.0, math.inf, math.nan])
def test_a_unit_is_finite(number):
    """Whatever is in dz."""
    found = walked(torch.ones(3, 2).half(), torch.ones(4, 2).half(), torch.full((3,), number))
    assert ((found.dW_unit > 0) & found.dW_unit.isfinite()).all()
    assert (torch.frexp(found.dW_unit).mantissa == 0.5).all()
    dW = found.dW * found.dW_unit[:, None]
    torch.testing.assert_close(dW, torch.full((4, 2), number), equal_nan=True)


def test_an_upstream_gradient_beyond_float16_is_no_infinity():
    gradient, unit = torch.full((3, 2), 3.0).half(), torch.tensor([1.0, 2.0, 4.0]) / 2**20
    for compute in (blocks.multiplied, blocks.multiply_inplace):
        got = compute(gradient.clone(), torch.half, torch.tensor(2.0**18), unit)
        assert torch.equal(got, torch.tensor([[0.75], [1.5], [3.0]]).half().expand(3, 2))
