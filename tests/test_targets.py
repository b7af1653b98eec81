"""Targets of any dtype, smoothed or ignored: PyTorch's loss of the components that count."""

import itertools
import math

import pytest
import torch
from conftest import slow_unless
from hypothesis import given
from hypothesis import strategies as st
from oracles import HAND_WRITTEN, REDUCTIONS, bce_with_logits, half_mse, random, ulp_distance
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import nnce

SHAPE = (6, 4)
IGNORED = -100
ORACLES = {"quadratic": half_mse, "cross-entropy": bce_with_logits}


def which_count(share):
    """True where a component counts."""
    counts = torch.ones(SHAPE, dtype=torch.bool)
    if share == "some":
        counts[0, 1:3] = counts[4, 0] = False
    elif share == "a whole example":
        counts[2] = False
        counts[5, 3] = False
    elif share == "all":
        counts[:] = False
    return counts


def reduced(C, counts, reduction):
    """Of C [examples, components], said another way than nnce says it."""
    if reduction == "none":
        return torch.stack([torch.where(k, c, 0.0) for c, k in zip(C, counts, strict=True)])
    total = C[counts].sum()
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / C[counts].numel()
    return total / sum(bool(row.any()) for row in counts)


def expected(loss, z, hard, counts, reduction, smoothing=0.0, weight=None, pos_weight=None):
    """By PyTorch's own loss, of the components that count alone."""
    y = hard.to(z.dtype) * (1 - smoothing) + smoothing / 2
    if loss == "quadratic":
        C = half_mse(z, y)
    else:
        C = torch.nn.functional.binary_cross_entropy_with_logits(
            z, y, weight, pos_weight=pos_weight, reduction="none"
        )
    return reduced(C, counts, reduction)


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, SHAPE, generator=generator)


def with_ignored(hard, counts, dtype):
    y = hard.to(dtype)
    return y if dtype == torch.bool else y.where(counts, torch.tensor(IGNORED, dtype=dtype))


# A boolean cannot say that it does not count.
CASES = [
    *itertools.product(
        ["none", "some", "a whole example", "all"], [torch.float64, torch.int64, torch.int8]
    ),
    ("none", torch.bool),
]
WEIGHTS = {
    "none": None,
    "by component": torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.float64),
    "by example": torch.linspace(0.1, 2, 6, dtype=torch.float64)[:, None],
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("share", "dtype"), CASES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradient_are_pytorchs_of_what_counts(reduction, share, dtype, smoothing):
    """1e-12 in float64, for each weight and pos_weight; whatever z is where nothing counts."""
    counts, hard = which_count(share), drawn()
    y = with_ignored(hard, counts, dtype)
    for weight, pos_weight in itertools.product(WEIGHTS.values(), WEIGHTS.values()):
        theirs = random(*SHAPE)
        ours = theirs.detach().clone()
        ours[~counts] = torch.tensor([math.nan, math.inf, -math.inf]).double()[
            torch.arange(int((~counts).sum())) % 3
        ]
        ours.requires_grad_()
        got = nnce.sigmoid_cross_entropy(
            ours,
            y,
            weight=weight,
            pos_weight=pos_weight,
            label_smoothing=smoothing,
            ignore_index=IGNORED,
            reduction=reduction,
        )
        want = expected(
            "cross-entropy", theirs, hard, counts, reduction, smoothing, weight, pos_weight
        )
        assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)
        if reduction in ("mean", "batchmean") and share == "all":
            assert got.isnan()
            continue
        upstream = random(*got.shape, seed=2).detach()
        (got_dz,), (want_dz,) = (
            torch.autograd.grad(C, z, upstream) for C, z in ((got, ours), (want, theirs))
        )
        assert_close(got_dz, want_dz, rtol=1e-12, atol=1e-12)
        assert (got_dz[~counts] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("share", "dtype"), [case for case in CASES if case[0] != "all"])
def test_the_quadratic_loss_too(reduction, share, dtype):
    counts, hard = which_count(share), drawn()
    z = random(*SHAPE)
    got = nnce.sigmoid_quadratic(
        z, with_ignored(hard, counts, dtype), ignore_index=IGNORED, reduction=reduction
    )
    want = expected("quadratic", z, hard, counts, reduction)
    assert_close(got, want, rtol=1e-12, atol=1e-12)
    (got_dz,), (want_dz,) = (torch.autograd.grad(C.sum(), z) for C in (got, want))
    assert_close(got_dz, want_dz, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "units"),
    slow_unless(
        lambda dtype, units: dtype == torch.float32,
        [(torch.float32, 8), (torch.bfloat16, 8), (torch.float16, 8)],
    ),
)
@pytest.mark.parametrize("target", [torch.int64, torch.bool, None])
@pytest.mark.parametrize("loss", HAND_WRITTEN)
def test_whole_numbers_are_the_same_targets_in_every_dtype(dtype, units, target, loss):
    z, hard = random(*SHAPE).detach().to(dtype).requires_grad_(), drawn()
    y = hard.to(dtype if target is None else target)
    got = HAND_WRITTEN[loss](z, y, ignore_index=IGNORED, reduction="mean")
    want = expected(loss, z.double(), hard, which_count("none"), "mean").to(dtype)
    assert got.dtype == dtype
    tolerance = units * torch.finfo(dtype).eps
    assert_close(got, want, rtol=tolerance, atol=0)
    (dz,) = torch.autograd.grad(got, z)
    assert dz.dtype == dtype and dz.isfinite().all()


def test_means_of_float16_do_not_end_at_65504():
    z = torch.full((70_000, 2), 4.0, dtype=torch.float16, requires_grad=True)
    y = torch.zeros(70_000, 2, dtype=torch.int64)
    y[:, 1] = IGNORED
    for reduction in ("mean", "batchmean"):
        C = nnce.sigmoid_cross_entropy(z, y, ignore_index=IGNORED, reduction=reduction)
        assert C.item() == pytest.approx(math.log1p(math.exp(4)), rel=1e-3)


@given(
    st.lists(
        st.tuples(
            st.floats(-50, 50), st.sampled_from([0, 1, IGNORED]), st.floats(0, 3), st.floats(0, 3)
        ),
        min_size=1,
        max_size=12,
    ),
    st.floats(0, 0.99),
    st.sampled_from(REDUCTIONS),
)
def test_any_mixture(rows, smoothing, reduction):
    """One component an example, so that each is a whole example that counts or does not."""
    z, y, weight, pos_weight = (
        torch.tensor(column, dtype=torch.float64)[:, None] for column in zip(*rows, strict=True)
    )
    counts, hard = y != IGNORED, y.clamp(min=0).round()
    z.requires_grad_()
    got = nnce.sigmoid_cross_entropy(
        z,
        y.long(),
        weight=weight,
        pos_weight=pos_weight,
        label_smoothing=smoothing,
        ignore_index=IGNORED,
        reduction=reduction,
    )
    if not counts.any():
        assert (got == 0).all() if reduction in ("none", "sum") else got.isnan()
        return
    want = expected("cross-entropy", z, hard, counts, reduction, smoothing, weight, pos_weight)
    assert_close(got, want, rtol=1e-12, atol=1e-12)
    (got_dz,), (want_dz,) = (torch.autograd.grad(C.sum(), z) for C in (got, want))
    assert_close(got_dz, want_dz, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("z0", [-700.0, -40.0, -1.0, 0.0, 1.0, 40.0, 700.0])
@pytest.mark.parametrize("y0", [0, 1])
@pytest.mark.parametrize("s", [1e-12, 1e-3, 0.1])
def test_smoothing_loses_no_digits(z0, y0, s):
    """dC/dz = (1 − y') σ(z) − y' σ(−z), where 1 − y' of y' near 1 has only some of its digits."""
    mpmath = pytest.importorskip("mpmath")
    z = torch.tensor([z0], dtype=torch.float64, requires_grad=True)
    C = nnce.sigmoid_cross_entropy(z, torch.tensor([y0]), label_smoothing=s, reduction="sum")
    (dz,) = torch.autograd.grad(C, z)
    with mpmath.workdps(400):
        smoothed = y0 * (1 - mpmath.mpf(s)) + mpmath.mpf(s) / 2
        a, not_a = (1 / (1 + mpmath.exp(mpmath.mpf(sign * z0))) for sign in (-1, 1))
        exact = (1 - smoothed) * a - smoothed * not_a
        terms = (1 - s) * ((1 - y0) * a + y0 * not_a) + s / 2 * abs(a - not_a)
        assert abs(dz.item() - exact) <= 8 * 2.3e-16 * terms + 1e-323


@pytest.mark.parametrize(
    ("loss", "smoothing"), [("quadratic", 0.0), ("cross-entropy", 0.0), ("cross-entropy", 0.2)]
)
def test_derivatives_of_every_kind_do_not_see_what_is_ignored(loss, smoothing):
    """Both modes, twice, and under vmap; with NaN in an ignored z, and in its tangent."""
    options = {"label_smoothing": smoothing} if smoothing else {}
    counts, hard = which_count("some"), drawn()
    y = with_ignored(hard, counts, torch.int64)

    def f(z):
        return HAND_WRITTEN[loss](z, y, ignore_index=IGNORED, reduction="batchmean", **options)

    z = random(*SHAPE)
    assert gradcheck(f, (z,), check_forward_ad=True)
    assert gradgradcheck(f, (z,))
    clean, dirty = z.detach(), z.detach().where(counts, math.nan)
    assert_close(torch.func.hessian(f)(dirty), torch.func.hessian(f)(clean))
    tangents = torch.ones(SHAPE, dtype=torch.float64)
    for point, tangent in ((clean, tangents), (dirty, tangents.where(counts, math.nan))):
        _, out = torch.func.jvp(f, (point,), (tangent,))
        assert_close(out, (torch.func.grad(f)(clean) * counts).sum())
    batch = torch.stack([dirty, 2 * dirty])
    together = torch.func.vmap(torch.func.grad(f))(batch)
    assert_close(together, torch.stack([torch.func.grad(f)(one) for one in batch]))
    assert not together.isnan().any()


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_examples_that_count_in_other_shapes(shape):
    """All dimensions but the last number the examples."""
    z = random(*shape)
    y = torch.zeros(shape, dtype=torch.int64)
    options = {"ignore_index": IGNORED, "reduction": "batchmean"}
    assert_close(
        nnce.sigmoid_cross_entropy(z, y, **options),
        nnce.sigmoid_cross_entropy(z, y.double(), reduction="batchmean"),
    )
    if len(shape) == 3:
        y[0, 1] = IGNORED
        part = nnce.sigmoid_cross_entropy(z[y[..., 0] == 0], y[y[..., 0] == 0])
        assert_close(nnce.sigmoid_cross_entropy(z, y, **options), part)


def test_modules_and_functions_are_the_same():
    counts, hard = which_count("some"), drawn()
    z, y = random(*SHAPE), with_ignored(hard, counts, torch.int64)
    module = nnce.SigmoidCrossEntropyLoss(label_smoothing=0.1, ignore_index=IGNORED)
    assert torch.equal(
        module(z, y), nnce.sigmoid_cross_entropy(z, y, label_smoothing=0.1, ignore_index=IGNORED)
    )
    assert repr(module) == (
        "SigmoidCrossEntropyLoss(reduction='batchmean', label_smoothing=0.1, ignore_index=-100)"
    )
    quadratic = nnce.SigmoidQuadraticLoss("sum", ignore_index=IGNORED)
    by_function = nnce.sigmoid_quadratic(z, y, ignore_index=IGNORED, reduction="sum")
    assert torch.equal(quadratic(z, y), by_function)


@pytest.mark.parametrize("make", [nnce.SigmoidCrossEntropyLoss, nnce.SigmoidQuadraticLoss])
def test_bad_options_are_refused_in_one_sentence(make):
    z = torch.zeros(2, 3)
    function = {
        nnce.SigmoidCrossEntropyLoss: nnce.sigmoid_cross_entropy,
        nnce.SigmoidQuadraticLoss: nnce.sigmoid_quadratic,
    }[make]
    uses = [lambda **options: make(**options), lambda **options: function(z, z, **options)]
    for use in uses:
        for index in (0, 1):
            with pytest.raises(ValueError, match=rf"^expected ignore_index .*, got {index}$"):
                use(ignore_index=index)
        for index in (True, 2.0, "-100"):
            with pytest.raises(TypeError, match=r"^expected ignore_index to be a whole number"):
                use(ignore_index=index)
        if make is nnce.SigmoidCrossEntropyLoss:
            for smoothing in (1, -0.1, math.nan):
                with pytest.raises(ValueError, match=r"^expected label_smoothing in \[0, 1\)"):
                    use(label_smoothing=smoothing)
            for smoothing in (True, "0.1", torch.tensor(0.1)):
                with pytest.raises(TypeError, match=r"^expected label_smoothing to be a number"):
                    use(label_smoothing=smoothing)
    with pytest.raises(TypeError, match=r"^expected y of dtype .* got torch.complex64$"):
        function(z, z.to(torch.complex64))


def test_the_whole_algorithm_names_the_conversion():
    network, x, y = nnce.MLP((4, 3)), torch.rand(5, 4), torch.zeros(5, 3, dtype=torch.int64)
    sentence = r"^expected y of dtype .*, got torch.int64; y.to\(torch.float32\) makes it so$"
    with pytest.raises(TypeError, match=sentence):
        nnce.backprop(network, x, y)
    together = nnce.Ensemble([network], [nnce.Hyperparameters("quadratic", 1.0)], batch_size=5)
    with pytest.raises(TypeError, match=sentence):
        together.train_epoch(x, y, torch.arange(5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("s", [1e-6, 1e-3, 0.05, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("y0", [0, 1])
def test_the_smoothed_delta_is_exact_to_3_units(dtype, s, y0):
    """Where (1 − y') σ(z) and y' σ(−z) do not cancel: the sum is 0.8 of them; and in norm."""
    mpmath = pytest.importorskip("mpmath")
    z = torch.cat([torch.linspace(-30, 30, 121), torch.linspace(-5, 5, 101)]).to(dtype)
    z.requires_grad_()
    y = torch.full(z.shape, y0)
    C = nnce.sigmoid_cross_entropy(z, y, label_smoothing=s, reduction="sum")
    (dz,) = torch.autograd.grad(C, z)
    exact, cancels = [], []
    with mpmath.workdps(60):
        smoothed = y0 * (1 - mpmath.mpf(s)) + mpmath.mpf(s) / 2
        for z0 in z.tolist():
            a, not_a = (1 / (1 + mpmath.exp(mpmath.mpf(sign * z0))) for sign in (-1, 1))
            first, second = (1 - smoothed) * a, smoothed * not_a
            exact.append(float(first - second))
            cancels.append(abs(first - second) < 0.8 * (first + second))
    exact, cancels = torch.tensor(exact, dtype=torch.float64), torch.tensor(cancels)
    assert ulp_distance(dz.detach(), exact)[~cancels].max() <= 3
    assert (dz.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("loss", HAND_WRITTEN)
@pytest.mark.parametrize(
    ("dtype",),
    slow_unless(
        lambda dtype: dtype in (torch.uint8, torch.bool),
        [(dtype,) for dtype in (*INTEGERS, torch.bool)],
    ),
)
def test_what_an_integer_dtype_cannot_hold_is_ignored_nowhere(loss, dtype):
    """256 is 0 as a uint8, and 65,537 is 1 as an int16; no 0 and no 1 is dropped for it."""
    bits = 8 if dtype == torch.bool else torch.iinfo(dtype).bits
    z, y = random(*SHAPE), drawn().to(dtype)
    for index in (2**bits, 2**bits + 1, -(2**bits), 2**70, -1 - 2 ** (bits - 1)):
        for reduction in REDUCTIONS:
            got = HAND_WRITTEN[loss](z, y, ignore_index=index, reduction=reduction)
            want = expected(loss, z, drawn(), which_count("none"), reduction)
            assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "index"), [(torch.uint8, 256), (torch.int16, 2**16 + 1)])
def test_nor_is_it_under_compile(dtype, index):
    z, y = random(*SHAPE), drawn().to(dtype)
    got = compiled(nnce.sigmoid_cross_entropy)(z, y, ignore_index=index, reduction="mean")
    want = expected("cross-entropy", z, drawn(), which_count("none"), "mean")
    assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_ends_of_an_integer_dtype_are_ignored():
    for dtype in INTEGERS:
        limits = torch.iinfo(dtype)
        for index in {limits.min, limits.max} - {0}:
            y = drawn().to(dtype)
            y[0] = index
            z = random(*SHAPE)
            got = nnce.sigmoid_cross_entropy(z, y, ignore_index=index, reduction="sum")
            want = nnce.sigmoid_cross_entropy(z[1:], y[1:], reduction="sum")
            assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "dtype", "how"),
    slow_unless(
        lambda loss, dtype, how: how is not compiled or dtype == torch.bfloat16,
        itertools.product(
            HAND_WRITTEN, (torch.bfloat16, torch.float16, torch.float32), (lambda f: f, compiled)
        ),
    ),
)
def test_a_rounded_sentinel_is_ignored_under_autocast(loss, dtype, how):
    """−999 is −1000 in bfloat16, and −2,049 is −2,048 in float16, with and without autocast."""
    index = {torch.bfloat16: -999, torch.float16: -2049, torch.float32: -(2**24) - 1}[dtype]
    counts = which_count("some")
    y = drawn().to(dtype).where(counts, torch.tensor(float(index), dtype=dtype))
    assert (y[~counts] != float(index)).sum() == 0 and y[~counts][0].item() != index
    z = random(*SHAPE).detach().to(dtype).requires_grad_()
    f = how(HAND_WRITTEN[loss])
    for reduction in REDUCTIONS if how is not compiled else ["batchmean"]:
        with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else dtype):
            got = f(z, y, ignore_index=index, reduction=reduction)
        want = expected(loss, z.double(), drawn(), counts, reduction).float()
        assert got.dtype == torch.float32
        assert_close(got, want, rtol=1e-5, atol=1e-5)
        (dz,) = torch.autograd.grad(got.sum(), z)
        assert (dz[~counts] == 0).all() and (dz[counts] != 0).all()


def test_a_sentinel_beyond_int64_is_one_of_floats():
    z, y = random(3).detach(), torch.tensor([0.0, 1.0, float(2**70)]).double()
    got = nnce.sigmoid_cross_entropy(z, y, ignore_index=2**70, reduction="sum")
    assert_close(got, nnce.sigmoid_cross_entropy(z[:2], y[:2], reduction="sum"))
