"""The fused passes over z and y: exactness, options, dtypes, threads, and both implementations."""

import itertools
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from conftest import slow_unless
from oracles import focal_terms

from nnce import rules
from nnce.kernels import fused
from nnce.kernels.fused import Options
from nnce.rules import Focus

PLAIN = Options()
LOSSES = ("cross-entropy", "quadratic")
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["numba", "chunked"])
def implementation(request, monkeypatch):
    if request.param == "chunked":
        monkeypatch.setattr(fused, "uses_numba", lambda: False)
    return request.param


def drawn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def targets(*shape, seed=1, dtype=torch.float32):
    return (drawn(*shape, seed=seed) > 0).to(dtype)


# ---------------------------------------------------------------------------- exact references

# NumPy's long double has 64 bits of mantissa; a test below compares it with mpmath.


def softplus(z):
    return np.maximum(z, 0) + np.log1p(np.exp(-abs(z)))


def sigma(z):
    e = np.exp(-abs(z))
    return np.where(z > 0, 1 / (1 + e), e / (1 + e))


def exact(loss, z, y, pos_weight=1.0, weight=1.0):
    """C and dC/dz for targets of 0 and 1, in long double."""
    z, y, pos_weight, weight = (
        np.asarray(t, dtype=np.longdouble) for t in (z, y, pos_weight, weight)
    )
    u = np.where(y == 1, -z, z)
    sign = np.where(y == 1, -1, 1)
    if loss == "quadratic":
        return sigma(u) ** 2 / 2, sign * sigma(u) ** 2 * sigma(-u)
    factor = np.where(y == 1, pos_weight, 1) * weight
    return factor * softplus(u), sign * factor * sigma(u)


def units(got, expected, dtype, factor=1.0):
    """The largest error in units in the last place of a dtype, subnormal numbers included.

    A factor above 1 that multiplies a subnormal number multiplies its rounding error, too.
    """
    info = torch.finfo(dtype)
    places = round(-math.log2(info.eps))
    smallest = round(math.log2(info.tiny))
    exponent = np.floor(np.log2(np.maximum(abs(expected), np.longdouble(2) ** smallest)))
    error = abs(got.double().numpy().astype(np.longdouble) - expected)
    amplified = np.where(exponent > smallest, 1.0, np.maximum(factor, 1.0))
    return float((error / np.longdouble(2) ** (exponent - places) / amplified).max())


def grid(dtype):
    """Every part of the range, beyond which σ(z) rounds to 0 or 1."""
    end = 750 if dtype == torch.float64 else 110
    near = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    tiny = torch.logspace(-12, 0, 10_001, dtype=torch.float64)
    z = torch.cat([torch.linspace(-end, end, 150_001, dtype=torch.float64), near, tiny, -tiny])
    return z.to(dtype)


def test_the_reference_is_exact():
    mpmath.mp.dps = 40
    for z in (-749.3, -88.1, -17.25, -1.5, -1e-9, 0.0, 0.3, 40.0, 700.0):
        e = mpmath.exp(mpmath.mpf(z))
        for y in (0.0, 1.0):
            C, dz = exact("cross-entropy", z, y)
            value = mpmath.log1p(e) if y == 0 else mpmath.log1p(1 / e)
            slope = e / (1 + e) if y == 0 else -1 / (1 + e)
            for got, true in ((C, value), (dz, slope)):
                assert abs(mpmath.mpf(str(got)) - true) <= abs(true) * mpmath.mpf(2) ** -60


# Units in the last place of C and of dC/dz. float16 and bfloat16 are rounded once from float32.
LIMITS = {
    torch.float32: (2.5, 1.6),
    torch.float64: (2.0, 1.6),
    torch.float16: (0.51, 0.51),
    torch.bfloat16: (0.51, 0.51),
}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("y", [0, 1])
def test_cross_entropy_is_exact_at_every_z(dtype, y):
    z = grid(dtype)
    target = torch.full_like(z, y)
    C, _ = fused.forward(z, target, PLAIN, "none")
    dz = fused.backward(z, target, PLAIN, torch.tensor(1.0))
    expected = exact("cross-entropy", z.double().numpy(), float(y))
    assert units(C, expected[0], dtype) <= LIMITS[dtype][0]
    assert units(dz, expected[1], dtype) <= LIMITS[dtype][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [7, 320, 1_024_000])
def test_the_divisor_of_a_mean_costs_less_than_a_unit(dtype, n):
    z = grid(dtype)
    z = z[z.abs() < 60]  # beyond, dC/dz of a large mean is subnormal
    dz = fused.backward(z, torch.zeros_like(z), PLAIN, torch.tensor(1.0, dtype=dtype), n)
    expected = exact("cross-entropy", z.double().numpy(), 0.0)[1] / np.longdouble(n)
    assert units(dz, expected, dtype) <= 2.6
    infinite = fused.backward(z, torch.zeros_like(z), PLAIN, torch.tensor(math.inf), n)
    assert (infinite[z > -9] == math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_cost_less_than_a_unit_each(dtype):
    z = grid(dtype)
    y = targets(len(z), dtype=dtype)
    weight, pos_weight = (drawn(len(z), seed=s, dtype=dtype).abs() + 0.1 for s in (2, 3))
    options = Options(weight, pos_weight)
    C, _ = fused.forward(z, y, options, "none")
    dz = fused.backward(z, y, options, torch.tensor(1.0))
    numbers = [t.double().numpy() for t in (z, y, pos_weight, weight)]
    expected = exact("cross-entropy", *numbers)
    factor = numbers[3] * np.where(numbers[1] == 1, numbers[2], 1)
    assert units(C, expected[0], dtype, factor) <= 4
    assert units(dz, expected[1], dtype, factor) <= 3


@pytest.mark.parametrize(
    ("dtype", "of_C", "of_dz"),
    # In float32 computed in float64.
    [(torch.float32, 0.51, 0.51), (torch.float64, 3.3, 2.9), (torch.bfloat16, 0.51, 0.51)],
    ids=str,
)
def test_quadratic_is_exact_at_every_z(dtype, of_C, of_dz):
    z = grid(dtype)
    z = z[z.abs() < 350]  # beyond, σ² is subnormal in long double's reference, too
    y = targets(len(z), dtype=dtype)
    C, _ = fused.forward(z, y, PLAIN, "none", "quadratic")
    dz = fused.backward(z, y, PLAIN, torch.tensor(1.0), loss="quadratic")
    expected = exact("quadratic", z.double().numpy(), y.double().numpy())
    assert units(C, expected[0], dtype) <= of_C
    assert units(dz, expected[1], dtype) <= of_dz


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_sigmoid_backward_is_exact_at_every_z(dtype):
    z = grid(dtype)
    numbers = z.double().numpy().astype(np.longdouble)
    da = torch.ones_like(z)
    prime = sigma(numbers) * sigma(-numbers)
    assert units(fused.sigmoid_backward(z, da), prime, dtype) <= 2.1


# -------------------------------------------------------------------------------- focal losses


def exact_focal(z, y, gamma):
    """C and dC/dz for targets of 0 and 1, in long double, in which σ^γ = e^(−γ softplus)."""
    z, gamma = np.asarray(z, dtype=np.longdouble), np.longdouble(gamma)
    u, sign = (-z, -1) if y == 1 else (z, 1)
    power = np.exp(-gamma * softplus(-u))
    return power * softplus(u), sign * power * (sigma(u) + gamma * sigma(-u) * softplus(u))


@pytest.mark.parametrize(
    ("dtype", "gamma"),
    slow_unless(
        lambda dtype, gamma: dtype == torch.float64 or (dtype == torch.float32 and gamma == 2),
        itertools.product(LIMITS, [0.0, 0.5, 1.0, 1.5, 1.7, 2.0, 4.0, 5.0]),
    ),
    ids=str,
)
def test_focal_losses_are_exact_at_every_z(dtype, gamma):
    """Whole and half powers, others, and those that float32 computes in float64."""
    z = torch.cat([grid(dtype)[::7], torch.tensor([-1e4, 1e4], dtype=dtype)])
    tiny = torch.finfo(dtype).tiny
    for y in (0, 1):
        expected = exact_focal(z.double().numpy(), y, gamma)
        for alpha in (None, 0.25):
            alpha_t = 1.0 if alpha is None else 0.25 if y == 1 else 0.75
            options, target = Options(focus=Focus(gamma, gamma, 0, alpha)), torch.full_like(z, y)
            C, _ = fused.forward(z, target, options, "none")
            dz = fused.backward(z, target, options, torch.tensor(1.0))
            limit = 8 + (2 * gamma if dtype == torch.float64 else 0)
            limits = (limit, limit) if gamma else (4, 3)  # of the cross-entropy
            for got, true, most in zip((C, dz), expected, limits, strict=True):
                normal = abs(alpha_t * true) >= tiny
                assert units(got[normal], alpha_t * true[normal], dtype) <= most
                far = got[~normal].double().numpy() - alpha_t * true[~normal]
                assert (abs(far) < tiny).all()


FOCI = {
    "one exponent": Focus(2.0, 2.0, 0, 0.25),
    "a half": Focus(1.5, 1.5),
    "two exponents": Focus(0.5, 3.0),
    "any exponents": Focus(0.3, 5.2, 0, 0.9),
    "margin": Focus(1.0, 4.0, 0.05),
    "margin only": Focus(0.0, 0.0, 0.3),
    "a tiny margin": Focus(2.0, 2.0, 1e-6),
    "alpha 0": Focus(1.0, 1.0, 0, 0.0),
}


@pytest.mark.slow  # each compiles five kernels
@pytest.mark.parametrize("name", FOCI)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_focal_losses_against_the_rules(dtype, name, implementation):
    """Hard, soft and ignored targets, weights, infinities and NaN; the joint pass, too."""
    focus = FOCI[name]
    z = 8 * drawn(6, 700, dtype=dtype)
    z[:, :6] = torch.tensor([-math.inf, math.inf, -1e4, 1e4, 0, math.nan])
    soft = drawn(6, 700, seed=3, dtype=dtype).sigmoid()
    hard, ignored = targets(6, 700, dtype=dtype), targets(6, 700, dtype=dtype)
    ignored[drawn(6, 700, seed=7) > 0.5] = -100
    weight = drawn(700, seed=5, dtype=dtype).abs()
    one, eps = torch.ones(6, 700, dtype=dtype), torch.finfo(dtype).eps
    units = (8 + 2 * max(focus[:2])) * eps
    for y in (hard, soft, torch.where(hard > 0, soft, hard), ignored):
        for options in (Options(focus=focus), Options(weight, None, 0, -100, focus)):
            if y is ignored and options.ignore_index is None:
                continue
            C, _ = fused.forward(z, y, options, "none")
            dz = fused.backward(z, y, options, one)
            expected = by_rules(z, y, options, "none", "cross-entropy", one)
            terms = by_rules(z, y, options, "none", "terms", one)
            for got, true, of in zip((C, dz), expected, terms, strict=True):
                close = (got.double() - true).abs() <= units * of + torch.finfo(dtype).tiny
                same = (got == true) | (got.isnan() & true.isnan())
                assert (close | same).all()
            if y is not ignored:  # a kernel less to compile
                continue
            rows = z.clone()
            sums = fused.joint(rows, y, one[:, 0].clone(), options)
            torch.testing.assert_close(
                sums, C.double().sum(1), rtol=4 * eps, atol=0, equal_nan=True
            )
            torch.testing.assert_close(rows, dz, rtol=4 * eps, atol=0, equal_nan=True)


# ------------------------------------------------------------------------ against the rules


def by_rules(z, y, options, reduction, loss, upstream):
    """Value and gradient by nnce.rules in float64, as nnce.functional combines them."""
    weight, pos_weight, s, ignore_index, focus = options
    counts = torch.ones_like(z, dtype=torch.bool)
    if ignore_index is not None and y.dtype != torch.bool:
        counts = y != ignore_index
    z, y = (torch.where(counts, t.double(), 0.0) for t in (z, y))
    weight, pos_weight = (None if t is None else t.double() for t in (weight, pos_weight))

    def both(y):
        if loss == "quadratic":
            return rules.quadratic(z, y), rules.dz_quadratic(z, y)
        if loss == "terms":
            return focal_terms(z, y, focus)
        if focus is not None:
            return rules.focal(z, y, focus), rules.dz_focal(z, y, focus)
        dz = rules.dz_cross_entropy(z, y, pos_weight=pos_weight)
        return rules.cross_entropy(z, y, pos_weight), dz

    C, dz = both(y)
    if s:
        C_half, dz_half = both(torch.full_like(y, 0.5))
        C, dz = (1 - s) * C + s * C_half, (1 - s) * dz + s * dz_half
    if weight is not None:
        C, dz = rules.weighted(weight, C), weight * dz
    C, dz = C.where(counts, 0.0), dz.where(counts, 0.0)
    n = {
        "none": 1,
        "sum": 1,
        "mean": counts.sum(),
        "batchmean": counts.any(-1).sum(),
    }[reduction]
    dz = (upstream.double() * dz / n).where(counts, 0.0)
    return C if reduction == "none" else C.sum() / n, dz


SHAPES = {"full": (6, 700), "components": (700,), "one": (1,), "examples": (6, 1), "none": None}


@pytest.mark.parametrize("shapes", list(itertools.product(SHAPES, repeat=2)), ids="-".join)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("ignores", [False, True])
@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_options_against_the_rules(shapes, reduction, ignores, smoothing, implementation):
    z, y = 5 * drawn(6, 700), targets(6, 700)
    if ignores:
        y[drawn(6, 700, seed=7) > 0.5] = -100
        y[2] = -100
    weight, pos_weight = (
        None if SHAPES[name] is None else drawn(*SHAPES[name], seed=3 + i).abs()
        for i, name in enumerate(shapes)
    )
    options = Options(weight, pos_weight, smoothing, -100 if ignores else None)
    upstream = drawn(6, 700, seed=9) if reduction == "none" else torch.tensor(0.7)
    C, divisor = fused.forward(z, y, options, reduction)
    dz = fused.backward(z, y, options, upstream, divisor)
    expected = by_rules(z, y, options, reduction, "cross-entropy", upstream)
    assert C.dtype == dz.dtype == torch.float32
    torch.testing.assert_close(C.double(), expected[0], rtol=1e-6, atol=1e-30)
    # With smoothing the terms of dC/dz cancel near z = 0.
    torch.testing.assert_close(dz.double(), expected[1], rtol=1e-6, atol=2e-7 if smoothing else 0)


WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Each combination is compiled once on a machine, which takes a second or two.
COMBINATIONS = [
    *itertools.product(["cross-entropy"], [torch.float32], [*LIMITS, *WHOLE]),
    *itertools.product(["cross-entropy"], list(LIMITS)[1:], [torch.float32, torch.int64]),
    *itertools.product(["quadratic"], LIMITS, [torch.bool]),
]


@pytest.mark.parametrize(
    ("loss", "z_dtype", "y_dtype"),
    slow_unless(lambda loss, z, y: z == torch.float32 and y in (z, torch.int64), COMBINATIONS),
    ids=str,
)
def test_targets_of_every_dtype(loss, z_dtype, y_dtype, implementation):
    z = (5 * drawn(3, 500)).to(z_dtype)
    y = targets(3, 500, dtype=y_dtype)
    ignore = 7 if y_dtype in (torch.bool, torch.uint8) else -100
    if y_dtype != torch.bool:
        y[1, :50] = ignore
    options = Options(ignore_index=ignore)
    C, divisor = fused.forward(z, y, options, "mean", loss)
    assert divisor == 1500 - 50 * (y_dtype != torch.bool)
    dz = fused.backward(z, y, options, torch.tensor(2.0, dtype=z_dtype), divisor, loss)
    expected = by_rules(z, y, options, "mean", loss, torch.tensor(2.0))
    rtol = max(torch.finfo(z_dtype).eps, 1e-6 if z_dtype == torch.float32 else 2e-15)
    tiny = torch.finfo(z_dtype).tiny * torch.finfo(z_dtype).eps
    torch.testing.assert_close(C.double(), expected[0], rtol=rtol, atol=0)
    torch.testing.assert_close(dz.double(), expected[1], rtol=rtol, atol=tiny)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("y", [0.0, 1.0, 0.25])
def test_infinities_nan_and_zero_weights_as_the_rules(dtype, y, implementation):
    inf, nan = math.inf, math.nan
    z, weight, pos_weight = (
        torch.tensor(t, dtype=dtype)
        for t in zip(
            *itertools.product((-inf, -3, 0, 2, inf, nan), (0, 1, 2, nan), (0, 1, 3, nan)),
            strict=True,
        )
    )
    target = torch.full_like(z, y)
    for options in (PLAIN, Options(weight), Options(None, pos_weight), Options(weight, pos_weight)):
        C, _ = fused.forward(z, target, options, "none")
        dz = fused.backward(z, target, options, torch.ones_like(z))
        expected = by_rules(z, target, options, "none", "cross-entropy", torch.ones(()))
        for got, true in zip((C, dz), expected, strict=True):
            close = torch.finfo(dtype).eps * 4
            torch.testing.assert_close(got.double(), true, rtol=close, atol=0, equal_nan=True)


def test_half_precision_bits_are_those_of_pytorch():
    """Every float16 and bfloat16, read and written."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        a = bits.view(dtype)
        # σ'(0) is 1/4: dz is da / 4 exactly, but for rounding of subnormal numbers.
        got = fused.sigmoid_backward(torch.zeros_like(a), a)
        expected = (a.float() * 0.25).to(dtype)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        assert (got.signbit() == expected.signbit())[~a.isnan()].all()
        # Numbers between those of the dtype round to the nearest, ties to even.
        far = a.float().abs().clamp(max=1e30)
        C, _ = fused.forward(a, torch.ones_like(a) * 0.5, PLAIN, "none")
        true = (0.5 * (rules.softplus(a.double()) + rules.softplus(-a.double()))).to(dtype)
        assert torch.equal(C.isnan(), true.isnan()) and far.isfinite().any()
        torch.testing.assert_close(C, true, rtol=0, atol=0, equal_nan=True)


def test_empty_arrays_and_scalars(implementation):
    for shape in ((0, 3), (3, 0), (0,)):
        z, y = torch.zeros(shape), torch.zeros(shape)
        total, n = fused.forward(z, y, PLAIN, "sum")
        assert total == 0 and n == 1
        mean, n = fused.forward(z, y, PLAIN, "mean")
        assert mean.isnan() and fused.backward(z, y, PLAIN, torch.tensor(1.0), n).shape == shape
    C, n = fused.forward(torch.tensor(0.0), torch.tensor(1.0), PLAIN, "batchmean")
    torch.testing.assert_close(C.item(), math.log(2), rtol=1e-7, atol=0)
    assert n == 1


def test_all_ignored(implementation):
    z, y = torch.full((2, 3), math.nan), torch.full((2, 3), -1)
    options = Options(ignore_index=-1)
    for reduction in ("mean", "batchmean"):
        C, n = fused.forward(z, y, options, reduction)
        assert C.isnan() and n == 0
        assert torch.equal(fused.backward(z, y, options, torch.tensor(1.0), n), torch.zeros_like(z))


def test_ignored_values_that_a_dtype_cannot_hold(implementation):
    z = drawn(4)
    for dtype, ignore in ((torch.uint8, -100), (torch.int8, 300), (torch.bool, -1)):
        y = torch.tensor([0, 1, 1, 0]).to(dtype)
        assert fused.forward(z, y, Options(ignore_index=ignore), "mean")[1] == 4
    y = torch.tensor([0, 1, -101, 0], dtype=torch.bfloat16)  # rounds to −101 as ignore_index does
    assert fused.forward(z, y, Options(ignore_index=-101), "mean")[1] == 3


def test_sums_beyond_the_dtype_are_infinite_and_means_are_not(implementation):
    z = torch.full((70, 1000), 10.0, dtype=torch.float16)
    y = torch.zeros_like(z)
    assert fused.forward(z, y, PLAIN, "sum")[0] == math.inf
    assert fused.forward(z, y, PLAIN, "mean")[0] == 10
    z, y = torch.full((70,), 2e38), torch.zeros(70)
    assert fused.forward(z, y, PLAIN, "sum")[0] == math.inf
    assert fused.forward(z, y, PLAIN, "mean")[0] == torch.tensor(2e38)


@pytest.mark.parametrize("loss", LOSSES)
def test_layouts_that_are_not_contiguous(loss, implementation):
    z, y = drawn(40, 30), targets(40, 30)
    expected = fused.forward(z, y, PLAIN, "mean", loss)[0]
    gradient = fused.backward(z, y, PLAIN, torch.tensor(1.0), 1200, loss)
    wide = torch.zeros(40, 60)
    wide[:, ::2] = z
    for z_view, y_view in ((wide[:, ::2], y), (z.T.contiguous().T, y), (z, y.T.contiguous().T)):
        assert torch.equal(fused.forward(z_view, y_view, PLAIN, "mean", loss)[0], expected)
        dz = fused.backward(z_view, y_view, PLAIN, torch.tensor(1.0), 1200, loss)
        assert torch.equal(dz, gradient)


def test_upstream_gradients(implementation):
    z, y = drawn(30, 50), targets(30, 50)
    one = fused.backward(z, y, PLAIN, torch.tensor(1.0))
    each = drawn(30, 50, seed=5)
    for upstream in (each, each.T.contiguous().T, torch.tensor(3.0).expand(30, 50)):
        torch.testing.assert_close(fused.backward(z, y, PLAIN, upstream), one * upstream)


# --------------------------------------------------------------------------------- joint pass


@pytest.mark.parametrize("width", [5, 1300, 70_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_joint_pass_is_the_two_passes(width, dtype, smoothing, implementation):
    rows = 7
    z, wide = drawn(rows, width, dtype=dtype), targets(rows, width + 3)
    factor = drawn(rows, seed=4, dtype=dtype)
    weight, pos_weight = (drawn(width, seed=s, dtype=dtype).abs() for s in (5, 6))
    for y in (wide[:, 1:-2], None):
        for options in (
            Options(),
            Options(weight, pos_weight, smoothing, None if y is None else 1),
        ):
            target = torch.zeros_like(z) if y is None else y
            C, _ = fused.forward(z, target, options, "none")
            dz = fused.backward(z, target, options, factor[:, None].expand_as(z))
            into = z.clone()
            sums = fused.joint(into, y, factor, options)
            torch.testing.assert_close(sums, C.double().sum(1), rtol=1e-12, atol=0)
            torch.testing.assert_close(into, dz, rtol=4 * torch.finfo(dtype).eps, atol=0)


# --------------------------------------------------------------- threads, processes and the cache


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(z, y):
    weight = drawn(z.shape[-1], seed=8).abs()
    found = []
    for options in (PLAIN, Options(weight, ignore_index=1)):
        for reduction in ("none", "mean", "batchmean"):
            C, n = fused.forward(z, y, options, reduction)
            found += [C, fused.backward(z, y, options, torch.tensor(1.0), n)]
    rows = z.clone()
    found += [fused.joint(rows, y, torch.ones(len(z))), rows]
    return [*found, fused.sigmoid_backward(z, z)]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bits_do_not_depend_on_threads(threads):
    z, y = drawn(350, 1001), targets(350, 1001)
    threads(1)
    expected = everything(z, y)
    for number in (2, 3, 5):
        threads(number)
        assert same(everything(z, y), expected)


def test_threads_use_the_mode_of_the_caller_for_subnormal_numbers(threads):
    threads(3)
    z, y = torch.full((2**18,), -95.0), torch.zeros(2**18)
    try:
        for flush in (True, False, True):
            torch.set_flush_denormal(flush)
            C, _ = fused.forward(z, y, PLAIN, "none")
            assert ((C == 0) == flush).all()
    finally:
        torch.set_flush_denormal(False)


def test_two_python_threads_at_once(threads):
    threads(2)
    z, y = drawn(350, 1001), targets(350, 1001)
    expected = everything(z, y)
    wrong = []

    def work():
        for _ in range(5):
            if not same(everything(z, y), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_children_have_threads_of_their_own(threads):
    threads(2)
    z, y = drawn(350, 1001), targets(350, 1001)
    expected = fused.forward(z, y)[0]  # the pool's threads exist
    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if torch.equal(fused.forward(z, y)[0], expected) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(fused.forward(z, y)[0], expected)


SMALL = """
import torch
from nnce.kernels import fused
assert fused.uses_numba() is {numba}
z, y = torch.tensor([[0.0, 1.0]]), torch.tensor([[1, 0]])
C, n = fused.forward(z, y)
fused.backward(z, y, fused.Options(), torch.tensor(1.0), n)
print(C.item())
"""


def run_copy(folder, numba=True, **environment):
    """Run the passes in a process of its own, from a copy of the package."""
    return subprocess.run(
        [sys.executable, "-c", SMALL.format(numba=numba)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    shutil.copytree(ROOT / "nnce", tmp_path / "nnce", ignore=shutil.ignore_patterns("*.nb?"))
    (tmp_path / "file").touch()
    # Neither the folder of the package nor the user's own can be written, root or not.
    shutil.rmtree(tmp_path / "nnce" / "kernels" / "__pycache__", ignore_errors=True)
    (tmp_path / "nnce" / "kernels" / "__pycache__").touch()
    nowhere = str(tmp_path / "file" / "nowhere")
    done = run_copy(tmp_path, HOME=nowhere, XDG_CACHE_HOME=nowhere, PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx((math.log(2) + math.log1p(math.e)) / 2)


BITS = """
import nnce, torch
generator = torch.Generator().manual_seed(0)
z = (8 * torch.randn(3_000, generator=generator)).requires_grad_()
y = torch.rand(3_000, generator=generator)
for C in (
    nnce.sigmoid_cross_entropy(z, y, label_smoothing=0.1, reduction="sum"),
    nnce.sigmoid_quadratic(z, y, reduction="sum"),
    nnce.sigmoid_focal_loss(z, y, gamma=3.3, reduction="sum"),
    nnce.sigmoid_asymmetric_loss(z, y, reduction="sum"),
):
    (dz,) = torch.autograd.grad(C, z)
    print(C.item(), dz.tolist())
"""


@pytest.mark.slow
def test_kernels_from_the_cache_give_the_bits_of_those_just_compiled(tmp_path):
    """A function compiled by itself may round otherwise than the same one inside another."""
    command = [sys.executable, "-c", BITS]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path)}
    compiled, cached = (
        subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert compiled.count("\n") == 4 and compiled == cached


def test_without_numba_pytorch_does_the_same(tmp_path):
    (tmp_path / "numba.py").write_text("raise ModuleNotFoundError('no numba', name='numba')")
    done = run_copy(tmp_path, numba=False, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx((math.log(2) + math.log1p(math.e)) / 2)


def test_what_fits():
    z, y = torch.zeros(2, 3), torch.zeros(2, 3)
    assert fused.fits(z, y) and fused.fits(z, y.bool()) and fused.fits(z.half(), y.double())
    assert not fused.fits(z, y[0]) and not fused.fits(z.long(), y)
    assert not fused.fits(z.to("meta"), y.to("meta")) and not fused.fits(z, y.to(torch.complex64))
    assert fused.has_joint(z, None) and fused.has_joint(z, y.bool())
    assert not fused.has_joint(z, y.to_sparse()) and not fused.has_joint(torch._neg_view(z), y)
