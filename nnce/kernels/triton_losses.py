"""The kernels of `nnce.kernels.losses` for CUDA, compiled by Triton on first use.

A program processes blocks of `BLOCK` elements. Sums are accumulated in float64 in two stages, first
within each program, then over the programs. The number of programs depends only on the size of the
array, so results are bit-identical in every run. Divisors and upstream gradients stay on the device
to avoid synchronization.

Triton compiles `tl.exp` and `/` to ex2.approx and div.full, which are not exact. Therefore e^x is a
polynomial here, and quotients are correctly rounded.
"""

# Triton's decorators are untyped, and kernels are not Python code.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnce.kernels.chunked import Packed
from nnce.losses import Loss

BLOCK = 1024
"""Elements per block."""
PROGRAMS = 4096
"""Maximum number of programs, hence of sums in the first stage."""

# ------------------------------------------------------------------------------ e^x and ln(1+e)

# As in nnce.kernels.losses, which states the errors of the polynomials.


@triton.jit
def _exp(x):
    """e^x for x ≤ 0, and most of its rounding error."""
    if x.dtype == tl.float32:
        x = tl.where(x < -104.5, -104.5, x)  # rounds to 0; NaN stays NaN
        shifted = x * 1.4426950408889634 + 12582912.0  # 1.5 · 2²³: rounds to an integer k
        k = shifted - 12582912.0
        r = x - k * 0.693359375
        r -= k * -2.12194440e-4
        q = 0.001381455364
        q = q * r + 0.00836874490391
        q = q * r + 0.0416683905176
        q = q * r + 0.166665204022
        q = q * r + 0.499999934335
        # 2^k in two factors, so that a subnormal result is rounded once. The lowest bits of
        # `shifted` are those of k, and are moved to the exponents.
        bits = shifted.to(tl.int32, bitcast=True)
        most = tl.maximum(bits, 0x4B400000 - 100)
        first = ((most << 23) + 0x3F800000).to(tl.float32, bitcast=True)
        second = ((bits - most << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    else:
        x = tl.where(x < -746.0, -746.0, x)
        shifted = x * 1.4426950408889634 + 6755399441055744.0  # 1.5 · 2⁵²
        k = shifted - 6755399441055744.0
        r = x - k * 6.93147180369123816490e-01
        r -= k * 1.90821492927058770002e-10
        q = r * 2.0826648732293425774e-9 + 2.5112084005850369693e-8
        q = q * r + 2.7557582038658133661e-7
        q = q * r + 2.7557234729792016557e-6
        q = q * r + 0.000024801586926052735274
        q = q * r + 0.00019841269896512448272
        q = q * r + 0.0013888888889116152821
        q = q * r + 0.0083333333333169840053
        q = q * r + 0.041666666666666092524
        q = q * r + 0.16666666666666683484
        q = q * r + 0.50000000000000000441
        bits = shifted.to(tl.int64, bitcast=True)
        most = tl.maximum(bits, 0x4338000000000000 - 100)
        first = ((most << 52) + 0x3FF0000000000000).to(tl.float64, bitcast=True)
        second = ((bits - most << 52) + 0x3FF0000000000000).to(tl.float64, bitcast=True)
    q = r + r * r * q
    e = 1.0 + q
    return e * first * second, (q - (e - 1.0)) * first * second


@triton.jit
def _log1p(e):
    """ln(1 + e) for e in [0, 1]: e − e² P(e), or 2 artanh(e / (2 + e)) in float64."""
    if e.dtype == tl.float32:
        p = e * 0.00331849915363 + -0.0202047108609
        p = p * e + 0.057664693954
        p = p * e + -0.106805823621
        p = p * e + 0.153554132167
        p = p * e + -0.196954068485
        p = p * e + 0.249585887728
        p = p * e + -0.333305114763
        p = p * e + 0.499999327719
        result = e - e * (e * p)
    else:
        w = 2.0 + e
        s = (e + e) / w  # twice the s of the formula
        s -= s * (e - (w - 2.0)) / w  # rounding error of w
        v = s * s * 0.25
        p = v * 0.085092714149811265446 + 0.041700595731621486482
        p = p * v + 0.060530411115526983895
        p = p * v + 0.06650487044388582197
        p = p * v + 0.07693279943035179833
        p = p * v + 0.090908719632707665966
        p = p * v + 0.11111111984845844544
        p = p * v + 0.1428571427392716632
        p = p * v + 0.20000000000078620883
        p = p * v + 0.33333333333333151897
        result = s + s * v * p
    return result


@triton.jit
def _quotient(x, y):
    """x / y, correctly rounded."""
    return tl.div_rn(x, y) if y.dtype == tl.float32 else x / y


# ------------------------------------------------------------------------------- the equations

# negative and positive are the weights of the two terms: 1 − y and y, after label smoothing and
# pos_weight.


@triton.jit
def _sigmoids(z):
    """Equation 1: σ(z) and σ(−z)."""
    e, rest = _exp(-tl.abs(z))
    w = 1.0 + e
    large = _quotient(1.0, w)
    small = _quotient(e, w)
    # Correct for the rounding errors of e and w. Those of the quotients would need a fused
    # multiply-add, which Triton's interpreter does not support.
    lost = large * (e - (w - 1.0) + rest)
    large -= large * lost
    small += large * rest - small * lost
    return tl.where(z > 0, large, small), tl.where(z > 0, small, large)


@triton.jit
def _loss(z, negative, positive, QUADRATIC: tl.constexpr):
    """Equation 2, ½ (a − y)², or 3, (1−y) softplus(z) + y softplus(−z)."""
    if QUADRATIC:
        a, not_a = _sigmoids(z)
        difference = negative * a - positive * not_a
        C = difference * difference * 0.5
    else:
        # softplus(z) = max(z, 0) + ln(1 + e^−|z|)
        e, _ = _exp(-tl.abs(z))
        weight = tl.where(z > 0, negative, positive)
        size = tl.where(weight != 0, tl.abs(z), 0.0)  # a term with weight 0 is 0, even at ±∞
        C = weight * size + (negative + positive) * _log1p(e)
    return C


@triton.jit
def _slope(z, negative, positive, QUADRATIC: tl.constexpr):
    """Equation 4, (a − y) σ'(z), or 5, a − y = (1−y) σ(z) − y σ(−z)."""
    a, not_a = _sigmoids(z)
    dz = negative * a - positive * not_a
    if QUADRATIC:
        dz = dz * (a * not_a)
    return dz


# ------------------------------------------------------------------------------ parts of a block

# start is the index of a block's first element (int64), i the index within the block.


@triton.jit
def _wide(x, QUADRATIC: tl.constexpr):
    """Convert to the working dtype.

    The quadratic loss of float32 needs float64: in float32, a product of three factors is off by up
    to 6 units in the last place.
    """
    if x.dtype == tl.float64 or (QUADRATIC and x.dtype == tl.float32):
        result = x.to(tl.float64)
    else:
        result = x.to(tl.float32)
    return result


@triton.jit
def _repeated(weight, period, start, i, inside):
    """Load the weights of a block from a periodic array, or a full one if period is None."""
    if period is None:
        result = tl.load(weight + start + i, mask=inside)
    else:
        first = start % period
        if period.dtype == tl.int64:  # longer than a block
            index = tl.where(first + i < period, first + i, first + i - period)
        else:
            index = (first.to(tl.uint32) + i.to(tl.uint32)) % period.to(tl.uint32)
        result = tl.load(weight + index, mask=inside)
    return result


@triton.jit
def _weights(t, like, pos_weight, pos_period, smoothing, start, i, inside):
    """The weights of the two terms, in like's dtype."""
    t = t.to(like.dtype)
    negative = 1.0 - t
    positive = t
    if smoothing is not None:
        s = smoothing.to(tl.int64).to(tl.float64, bitcast=True)
        keep = (1.0 - s).to(like.dtype)
        half = (s * 0.5).to(like.dtype)
        negative = keep * negative + half
        positive = keep * positive + half
    if pos_weight is not None:
        factor = _repeated(pos_weight, pos_period, start, i, inside)
        positive = factor.to(like.dtype) * positive
    return negative, positive


@triton.jit
def _counted(t, ignored):
    """Whether targets differ from the ignored value, an integer or the bits of a float64."""
    if t.dtype.is_floating():
        like = tl.float64 if t.dtype == tl.float64 else tl.float32
        result = t.to(like) != ignored.to(tl.int64).to(tl.float64, bitcast=True).to(like)
    else:
        result = t.to(tl.int64) != ignored.to(tl.int64)
    return result


@triton.jit
def _finish(x, t, weight, period, ignored, start, i, inside):
    """Multiply by weight, with 0 · ∞ = 0, and set elements with an ignored target to 0."""
    if weight is not None:
        factor = _repeated(weight, period, start, i, inside).to(x.dtype)
        x = tl.where((factor == 0) & (tl.abs(x) == float("inf")), 0.0, x * factor)
    if ignored is not None:
        x = tl.where(_counted(t, ignored), x, 0.0)
    return x


# -------------------------------------------------------------------------------------- kernels

# The last arguments are returned by `_arguments`. Numbers that change between calls are not
# specialized: a kernel is compiled for each combination of dtypes and of options present, and for
# whether n is a multiple of 16.
_ANY = ["steps", "weight_period", "pos_period", "smoothing", "ignored"]


@triton.jit(do_not_specialize=_ANY)
def value(
    z,
    y,
    C,
    sums,
    counts,
    n,
    steps,
    weight,
    weight_period,
    pos_weight,
    pos_period,
    smoothing,
    ignored,
    QUADRATIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write C of each element, the sum of C over the blocks of each program, or both.

    Args:
        z, y: logits and targets, [n].
        C: losses to write, in z's dtype, or None.
        sums: sums to write, float64, [programs], or None.
        counts: numbers of non-ignored targets to write, float64, [programs], or None.
        n: number of elements.
        steps: number of blocks per program.
    """
    i = tl.arange(0, BLOCK)
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.float64)
    for step in range(steps):
        start = (program.to(tl.int64) * steps + step) * BLOCK
        inside = i < n - start
        x = _wide(tl.load(z + start + i, mask=inside, other=0.0), QUADRATIC)
        t = tl.load(y + start + i, mask=inside, other=0)
        negative, positive = _weights(t, x, pos_weight, pos_period, smoothing, start, i, inside)
        found = _loss(x, negative, positive, QUADRATIC)
        found = _finish(found, t, weight, weight_period, ignored, start, i, inside)
        if C is not None:
            tl.store(C + start + i, found.to(C.dtype.element_ty), mask=inside)
        if sums is not None:
            total += tl.where(inside, found, 0.0).to(tl.float64)
        if counts is not None:
            count += (inside & _counted(t, ignored)).to(tl.float64)
    if sums is not None:
        tl.store(sums + program, tl.sum(total, 0))
    if counts is not None:
        tl.store(counts + program, tl.sum(count, 0))


@triton.jit(do_not_specialize=["n", "parts", "divisor"])
def finish(sums, n, counts, parts, divisor, C, quotient, BLOCK: tl.constexpr):
    """Second stage: write the sum of the sums, divided by a divisor.

    Args:
        sums: float64, [n].
        counts: numbers whose sum is the divisor, float64, [parts], or None.
        divisor: the bits of the divisor in float64, or None.
        C: the scalar to write.
        quotient: where to write the divisor, float64, if counts is not None.
    """
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        total += tl.load(sums + first + i, mask=first + i < n, other=0.0)
    if counts is not None:
        count = tl.zeros([BLOCK], tl.float64)
        for first in range(0, parts, BLOCK):
            count += tl.load(counts + first + i, mask=first + i < parts, other=0.0)
        by = tl.sum(count, 0)
        tl.store(quotient, by)
    else:
        by = divisor.to(tl.int64).to(tl.float64, bitcast=True)
    result = tl.sum(total, 0) / by
    if C.dtype.element_ty != tl.float64:
        result = result.to(tl.float32)
    tl.store(C, result.to(C.dtype.element_ty))


@triton.jit(do_not_specialize=[*_ANY, "divisor"])
def gradient(
    z,
    y,
    dz,
    upstream,
    quotient,
    divisor,
    n,
    weight,
    weight_period,
    pos_weight,
    pos_period,
    smoothing,
    ignored,
    EACH: tl.constexpr,
    QUADRATIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write dC/dz of each element times its upstream gradient, divided by a divisor.

    Args:
        z, y: logits and targets, [n].
        dz: gradients to write, in z's dtype.
        upstream: upstream gradients, [n] if EACH, else a scalar for all elements.
        quotient: the divisor in memory, float64, or None.
        divisor: the bits of the divisor in float64, or None.
        n: number of elements.
    """
    i = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    inside = i < n - start
    x = _wide(tl.load(z + start + i, mask=inside, other=0.0), QUADRATIC)
    t = tl.load(y + start + i, mask=inside, other=0)
    negative, positive = _weights(t, x, pos_weight, pos_period, smoothing, start, i, inside)
    found = _slope(x, negative, positive, QUADRATIC)
    if EACH:
        found = found * tl.load(upstream + start + i, mask=inside, other=0.0).to(x.dtype)
    else:
        if quotient is not None:
            by = tl.load(quotient)
        else:
            by = divisor.to(tl.int64).to(tl.float64, bitcast=True)
        found = found * (tl.load(upstream).to(tl.float64) / by).to(x.dtype)
    found = _finish(found, t, weight, weight_period, ignored, start, i, inside)
    tl.store(dz + start + i, found.to(dz.dtype.element_ty), mask=inside)


@triton.jit
def activation_gradient(z, da, dz, n, BLOCK: tl.constexpr):
    """Write dC/dz = dC/da σ(z) σ(−z) (equation 8)."""
    i = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    inside = i < n - start
    a, not_a = _sigmoids(_wide(tl.load(z + start + i, mask=inside, other=0.0), False))
    found = tl.load(da + start + i, mask=inside, other=0.0).to(a.dtype) * (a * not_a)
    tl.store(dz + start + i, found.to(dz.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------- launches

# Tensors are contiguous and on one device.


def forward(
    z: Tensor, y: Tensor, options: Packed, reduction: str, loss: Loss
) -> tuple[Tensor, float | Tensor]:
    """Compute a loss, as `nnce.kernels.fused.forward` does.

    Returns:
        C; and the divisor of its sum, a tensor on the device if it was counted.
    """
    n, y, quadratic = z.numel(), _bytes(y), loss == "quadratic"
    chosen = (*_arguments(options, y, n), quadratic)
    if reduction == "none":
        C = torch.empty_like(z)
        _launch(value, _blocks(n), z, y, C, None, None, n, 1, *chosen, quadratic=quadratic)
        return C, 1.0
    steps = -(-max(1, _blocks(n)) // PROGRAMS)
    programs = max(1, -(-_blocks(n) // steps))
    sums = z.new_empty(programs, dtype=torch.float64)
    divisor = 1.0 if reduction == "sum" else float(_rows(z, reduction)[0])
    C, counts, quotient, counted = z.new_empty(()), None, None, None
    if options.ignores and reduction != "sum":
        quotient = z.new_empty((), dtype=torch.float64)
        if reduction == "mean":
            counts = counted = torch.empty_like(sums)
        else:
            kept = (y != options.ignored).reshape(_rows(z, reduction)).any(-1)
            counts = kept.sum().double().reshape(1)
    places = z, y, None, sums, counted, n, steps
    _launch(value, programs, *places, *chosen, quadratic=quadratic)
    parts = 0 if counts is None else len(counts)
    _launch(finish, 1, sums, programs, counts, parts, _bits(divisor), C, quotient)
    return C, divisor if quotient is None else quotient


def backward(
    z: Tensor,
    y: Tensor,
    options: Packed,
    upstream: Tensor,
    divisor: float | Tensor,
    loss: Loss,
) -> Tensor:
    """Compute the gradient of `forward`, as `nnce.kernels.fused.backward` does."""
    n, y, dz = z.numel(), _bytes(y), torch.empty_like(z)
    each = any(upstream.stride())  # all strides are 0 in the backward of sum()
    if each:
        upstream = upstream.to(z.dtype).contiguous()
    divisors = (divisor, None) if isinstance(divisor, Tensor) else (None, _bits(divisor))
    places = z, y, dz, upstream, *divisors, n
    quadratic = loss == "quadratic"
    chosen = *_arguments(options, y, n), each, quadratic
    _launch(gradient, _blocks(n), *places, *chosen, quadratic=quadratic)
    return dz


def sigmoid_backward(z: Tensor, da: Tensor) -> Tensor:
    """Compute dC/dz = dC/da ∘ σ'(z)."""
    dz = torch.empty_like(z)
    _launch(activation_gradient, _blocks(z.numel()), z, da, dz, z.numel())
    return dz


def _launch(kernel: Any, programs: int, *arguments: Any, quadratic: bool = False) -> None:
    # 4 elements per thread, the size of one load; 2 in float64, to limit register use.
    warps = 16 if quadratic or arguments[0].dtype is torch.float64 else 8
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, BLOCK=BLOCK, num_warps=warps)


def _blocks(n: int) -> int:
    return -(-n // BLOCK)


def _bytes(y: Tensor) -> Tensor:
    """View booleans as integers, without a copy."""
    return y.view(torch.uint8) if y.dtype is torch.bool else y


def _bits(x: float) -> int:
    """Return the bits of a float64: kernels receive Python floats as float32."""
    return int(struct.unpack("q", struct.pack("d", x))[0])


def _rows(z: Tensor, reduction: str) -> tuple[int, int]:
    """Return the number of items that a mean averages, and the number of elements per item."""
    if reduction == "mean" or z.dim() == 0:
        return z.numel(), 1
    return z.shape[:-1].numel(), z.shape[-1]


def _arguments(options: Packed, y: Tensor, n: int) -> tuple[Any, ...]:
    """Return the options as kernel arguments: None for an option without effect."""
    weight, period, pos_weight, pos_period, smoothing, ignored, ignores, _ = options
    return (
        *(weight, period if period < n else None),
        *(pos_weight, pos_period if pos_period < n else None),
        _bits(smoothing) if smoothing else None,
        None if not ignores else _bits(ignored) if y.is_floating_point() else ignored,
    )
