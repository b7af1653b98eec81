"""Random shapes, dtypes, strides, targets and upstream gradients, all against float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import laid_out

import nnce

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@st.composite
def cases(draw):
    return {
        "function": draw(
            st.sampled_from(["linear", "sigmoid", "sigmoid_quadratic", "sigmoid_cross_entropy"])
        ),
        "leading": draw(st.lists(st.integers(0, 3), max_size=4)),
        "components": draw(st.integers(1, 5)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "layout": draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded"])),
        "hard": draw(st.booleans()),
        "spread": draw(st.sampled_from([0.1, 1.0, 5.0, 15.0])),
        "reduction": draw(st.sampled_from(["none", "sum", "mean", "batchmean"])),
        "seed": draw(st.integers(0, 2**31)),
    }


def softplus(z):
    return torch.log1p(torch.exp(-z.abs())) + z.clamp(min=0)


def sigma(z):
    e = torch.exp(-z.abs())
    return torch.where(z > 0, 1, e) / (1 + e)


def check(case):
    generator = torch.Generator().manual_seed(case["seed"])
    dtype = case["dtype"]
    shape = (*case["leading"], case["components"])

    def normal(*shape, scale=1.0):
        values = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return laid_out(values.to(dtype), case["layout"])

    if case["function"] == "linear":
        return check_linear(normal, shape, dtype)

    z = normal(*shape, scale=case["spread"]).requires_grad_()
    y = torch.rand(shape, generator=generator, dtype=torch.float64)
    y = laid_out((y.round() if case["hard"] else y).to(dtype), case["layout"])
    function = getattr(nnce, case["function"])
    options = {} if case["function"] == "sigmoid" else {"reduction": case["reduction"]}
    got = function(z, *([y] if options else []), **options)
    upstream = normal(*got.shape)
    (dz,) = torch.autograd.grad(got, z, upstream)

    # In float64, with the sum of the magnitudes, the scale of the rounding errors.
    wide, target, push = z.detach().double(), y.double(), upstream.double()
    a, b = sigma(wide), sigma(-wide)
    terms = (1 - target) * a + target * b
    if case["function"] == "sigmoid":
        value, size, slope, steep = a, a, a * b, a * b
    elif case["function"] == "sigmoid_quadratic":
        error = (1 - target) * a - target * b
        value, size = error**2 / 2, terms**2
        slope, steep = error * a * b, terms * a * b
    else:
        value = target * softplus(-wide) + (1 - target) * softplus(wide)
        size, slope, steep = value, (1 - target) * a - target * b, terms

    n = {
        "none": 1,
        "sum": 1,
        "mean": wide.numel(),
        "batchmean": wide.shape[:-1].numel(),
    }[options.get("reduction", "none")]
    if options.get("reduction", "none") != "none":
        value, size = (t.sum() / n if n else t.sum() * float("nan") for t in (value, size))
    info = torch.finfo(dtype)
    # Each rule rounds some ten times; a sum in the dtype once more for each binary level, and
    # in the half dtypes PyTorch sums in float32. Below the normal numbers the unit is absolute.
    eps, tiny = 16 * info.eps, 16 * info.smallest_normal
    expected = slope * push / n if n else slope
    assert dz.dtype == dtype and dz.shape == z.shape and got.dtype == dtype
    assert ((got.double() - value).abs() <= eps * size + tiny).all() or not n
    assert got.isnan().all() or n
    assert ((dz.double() - expected).abs() <= eps * steep * push.abs() / max(n, 1) + tiny).all()
    return None


def check_linear(normal, shape, dtype):
    a_prev = normal(*shape).requires_grad_()
    W, b = normal(4, shape[-1]).requires_grad_(), normal(4).requires_grad_()
    z = nnce.linear(a_prev, W, b)
    upstream = normal(*z.shape)
    got = (z, *torch.autograd.grad(z, (a_prev, W, b), upstream))

    x, w, c, u = (t.detach().double() for t in (a_prev, W, b, upstream))

    def by_hand(x, w, c, u):
        return (
            torch.einsum("...i,oi->...o", x, w) + c,
            torch.einsum("...o,oi->...i", u, w),
            torch.einsum("no,ni->oi", u.reshape(-1, 4), x.reshape(-1, x.shape[-1])),
            u.reshape(-1, 4).sum(0),
        )

    sizes = by_hand(x.abs(), w.abs(), c.abs(), u.abs())
    info = torch.finfo(dtype)
    for ours, theirs, size in zip(got, by_hand(x, w, c, u), sizes, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        # Up to 81 terms, summed in whatever order the product takes.
        bound = 32 * info.eps * size + 16 * info.smallest_normal
        assert ((ours.double() - theirs).abs() <= bound).all()


@settings(max_examples=300)
@given(cases())
def test_some_random_inputs(case):
    check(case)


@pytest.mark.exhaustive
@settings(max_examples=10_000, derandomize=False, suppress_health_check=list(HealthCheck))
@given(cases())
def test_10_000_random_inputs(case):
    check(case)


def compare_with_bce(seed):
    """Value and gradients of the cross-entropy and of `BCEWithLogitsLoss`, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def choose(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    shape = choose((4,), (3, 4), (2, 3, 4), (1, 1), (7, 10))
    spread = choose(0.1, 1.0, 5.0, 30.0, 500.0)
    z = (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    y = choose(draw(*shape), draw(*shape).round()).requires_grad_()
    options = {"reduction": choose("none", "sum", "mean")}
    for name in ("weight", "pos_weight"):
        broadcast = choose(None, shape, shape[-1:], ())
        if broadcast is not None:
            options[name] = 3 * draw(*broadcast) * choose(1, draw(*broadcast).round())
    got = nnce.sigmoid_cross_entropy(z, y, **options)
    oracle = torch.nn.functional.binary_cross_entropy_with_logits(z, y, **options)
    upstream = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    ours = (got, *torch.autograd.grad(got, (z, y), upstream))
    theirs = (oracle, *torch.autograd.grad(oracle, (z, y), upstream))
    # PyTorch's loses digits where its terms cancel: the bound is of their size.
    size = 10 * (1 + z.detach().abs().max().item())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14 * size)


def test_some_losses_beside_bce():
    for seed in range(100):
        compare_with_bce(seed)


@pytest.mark.exhaustive
def test_2_700_losses_beside_bce():
    for seed in range(2_700):
        compare_with_bce(seed)
