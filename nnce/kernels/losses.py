"""Fused CPU kernels for the losses and the sigmoid, compiled by Numba on first use.

Kernels process arrays in blocks of 1,024 elements, whose intermediate results stay in the cache of
a core. A block runs several short loops: one converts the targets to the weights of the two terms
of the loss, one computes C or dC/dz, and others apply `weight` and `ignore_index`. Sums are
accumulated in float64.

Arrays are passed as addresses, with markers for their dtypes: passing an array object would cost as
much as the computation for several hundred elements. Markers are part of a kernel's signature, so
each combination of dtypes is compiled on first use. Everything else is decided at run time.

The number of functions is kept small, because Numba takes about 0.1 s to compile each one. Memory
is read and written by intrinsics, which compile quickly.
"""

# Numba's decorators are untyped, and its intrinsics are called without their first argument.
# mypy: disable-error-code="no-untyped-def, call-arg, var-annotated"
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

import inspect
import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import NativeValue, intrinsic, models, overload, register_model, unbox

from nnce.kernels._numba import njit

BLOCK = 1024
"""Elements per block; a kernel puts up to five times as many numbers on the stack."""

# "reassoc" would undo the two-part range reduction in e^x, so only sums over a block may use it.
# "contract" allows fused multiply-add.
_EXACT = {"contract", "nsz"}
_SUM = {"contract", "nsz", "reassoc"}


# ------------------------------------------------------------------------------------- memory


class Marker(types.Dummy):
    """A Numba type whose only value is None: it selects code at compile time.

    Args:
        label: "cross-entropy", "quadratic", "focal", "margin" (a focal loss with a margin), the
            name of a dtype, or "zeros" for an array of zeros that is not stored.
    """

    def __init__(self, label: str) -> None:
        """Create the type; types with equal labels are equal."""
        super().__init__(label)
        self.label = label


register_model(Marker)(models.OpaqueModel)


@unbox(Marker)
def _unbox(_: Any, __: Any, c: Any) -> NativeValue:
    return NativeValue(c.context.get_dummy_value())


# Numba does not support half precision on a CPU: these numbers are read and written as bits.
_STORED: dict[str, Any] = {
    **{"float32": types.float32, "float64": types.float64},
    **{"float16": types.uint16, "bfloat16": types.uint16},
    **{"bool": types.uint8, "uint8": types.uint8, "int8": types.int8},
    **{"int16": types.int16, "int32": types.int32, "int64": types.int64},
}


def _pointer(context: Any, builder: Any, label: str, address: Any, i: Any) -> Any:
    """Return the LLVM pointer to element i."""
    kind = context.get_data_type(_STORED[label])
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [i])


@intrinsic
def _read(_: Any, address: Any, i: Any, dtype: Any, like: Any) -> Any:
    """Return element i converted to like's type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if dtype.label == "zeros":
            return context.get_constant(like, 0)
        value = builder.load(_pointer(context, builder, dtype.label, *arguments[:2]))
        stored = _STORED[dtype.label]
        if dtype.label in _FROM_BITS:
            stored = types.float32
            value = _FROM_BITS[dtype.label](context, builder, value)
        return context.cast(builder, value, stored, like)

    return like(types.int64, types.int64, dtype, like), generate


@intrinsic
def _write(_: Any, address: Any, i: Any, dtype: Any, value: Any) -> Any:
    """Store a float32 or float64 as element i."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        halves = dtype.label in _TO_BITS
        stored = types.float32 if halves else _STORED[dtype.label]
        number = context.cast(builder, arguments[3], value, stored)
        if halves:
            number = _TO_BITS[dtype.label](context, builder, number)
        builder.store(number, _pointer(context, builder, dtype.label, *arguments[:2]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, dtype, value), generate


@intrinsic
def _scratch(_: Any, one: Any) -> Any:
    """Return the address of stack memory for a block of numbers of one's type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # Not a power of 2: addresses 4,096 bytes apart would alias in the processor.
        memory = cgutils.alloca_once(builder, context.get_data_type(one), size=BLOCK + 256)
        memory.align = 64
        return builder.ptrtoint(memory, ir.IntType(64))

    return types.int64(one), generate


@intrinsic
def _one(_: Any, dtype: Any) -> Any:
    """Return 1 as a float32 or float64."""
    kind: Any = _STORED[dtype.label]
    return kind(dtype), lambda context, *_: context.get_constant(kind, 1)


@intrinsic
def _as(_: Any, x: Any, like: Any) -> Any:
    """Return a float64 converted to like's type."""
    return like(x, like), lambda context, builder, _, arguments: context.cast(
        builder, arguments[0], x, like
    )


@intrinsic
def _same(_: Any, first: Any, second: Any) -> Any:
    """Return whether two markers are equal."""
    answer = first == second
    return types.boolean(first, second), lambda *_: ir.Constant(ir.IntType(1), answer)


def _from_float16(bits: Any) -> Any:
    sign = np.uint32(np.uint32(bits) & np.uint32(0x8000)) << np.uint32(16)
    size = np.uint32(np.uint32(bits) & np.uint32(0x7FFF))
    # The exponent's bias is 112 larger in float32; infinities and NaN have the largest exponent.
    shift = np.uint32(224 << 23) if size >= np.uint32(0x7C00) else np.uint32(112 << 23)
    normal = np.uint32(np.uint32(size << np.uint32(13)) + shift)
    subnormal = np.float32(np.float32(np.int32(size)) * np.float32(2**-24)).view(np.uint32)
    wide = subnormal if size < np.uint32(0x0400) else normal
    return np.uint32(wide | np.uint32(sign)).view(np.float32)


def _to_float16(x: Any) -> Any:
    bits = np.float32(x).view(np.uint32)
    sign = np.uint32(bits & np.uint32(0x80000000)) >> np.uint32(16)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(size >> np.uint32(13)) & np.uint32(1))
    narrow = np.uint32(size - np.uint32((112 << 23) - 0xFFF)) + odd
    narrow = np.uint32(narrow) >> np.uint32(13)
    # The last place of 0.5 in float32 is 2⁻²⁴, the smallest number of float16.
    rounded = np.float32(abs(x) + np.float32(0.5)).view(np.uint32)
    if size < np.uint32(0x38800000):
        narrow = np.uint32(rounded) - np.uint32(0x3F000000)
    if size >= np.uint32(0x477FF000):  # rounds beyond the largest number
        narrow = np.uint32(0x7C00)
    if x != x:
        narrow = np.uint32(0x7E00)
    return np.uint16(np.uint32(narrow) | np.uint32(sign))


def _float16_to_float32(context: Any, builder: Any, bits: Any) -> Any:
    signature = types.float32(types.uint16)
    return context.compile_internal(builder, _from_float16, signature, (bits,))


def _float32_to_float16(context: Any, builder: Any, x: Any) -> Any:
    return context.compile_internal(builder, _to_float16, types.uint16(types.float32), (x,))


def _bfloat16_to_float32(context: Any, builder: Any, bits: Any) -> Any:
    wide = builder.zext(bits, ir.IntType(32))
    return builder.bitcast(builder.shl(wide, ir.Constant(wide.type, 16)), ir.FloatType())


def _float32_to_bfloat16(context: Any, builder: Any, x: Any) -> Any:
    bits = builder.bitcast(x, ir.IntType(32))
    places = ir.Constant(bits.type, 16)
    odd = builder.and_(builder.lshr(bits, places), ir.Constant(bits.type, 1))
    half = builder.add(odd, ir.Constant(bits.type, 0x7FFF))
    rounded = builder.lshr(builder.add(bits, half), places)
    nan = builder.fcmp_unordered("uno", x, x)
    rounded = builder.select(nan, ir.Constant(bits.type, 0x7FC0), rounded)
    return builder.trunc(rounded, ir.IntType(16))


_FROM_BITS: dict[str, Any] = {"float16": _float16_to_float32, "bfloat16": _bfloat16_to_float32}
_TO_BITS: dict[str, Any] = {"float16": _float32_to_float16, "bfloat16": _float32_to_bfloat16}


# ------------------------------------------------------------------------------- e^x and ln(1+e)


def _generic(choose: Any) -> Any:
    """Return a function for compiled code whose implementation depends on the argument types."""
    choose.__annotations__.clear()  # Numba compares its signature with those of the implementations

    def stub(*arguments: Any) -> Any:
        raise NotImplementedError

    overload(stub, jit_options={"fastmath": _EXACT})(choose)
    return stub


def _polynomial(in_float32: tuple[float, ...], in_float64: tuple[float, ...]) -> Any:
    """Return an intrinsic that evaluates a polynomial with these coefficients, lowest first."""

    def evaluate(_: Any, x: Any) -> Any:
        coefficients = in_float32 if x == types.float32 else in_float64

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            (value,), flags = arguments, tuple(sorted(_EXACT))
            total = ir.Constant(value.type, coefficients[-1])
            for c in coefficients[-2::-1]:
                product = builder.fmul(total, value, flags=flags)
                total = builder.fadd(product, ir.Constant(value.type, c), flags=flags)
            return total

        return x(x), generate

    return intrinsic(evaluate)


# e^x for x ≤ 0: x = k ln 2 + r, e^r = 1 + r + r² Q(r). The product of k and the larger part of ln 2
# is exact. ln(1 + e) = e − e² P(e) in float32; 2 artanh(s) = 2 (s + s³ P(s²)), s = e / (2 + e), in
# float64. Q and P are minimax in relative error: 0.05 and 0.09 units of 2⁻²⁴ in float32, 0.0005 and
# 0.01 units of 2⁻⁵³ in float64.
_least = _polynomial((-104.5,), (-746.0,))  # e^x rounds to 0
# Adding and subtracting this constant rounds to an integer k. The lowest bits of the sum are the
# biased exponent of 2^(k + 64), or of 2^(k + 512) in float64.
_shift = _polynomial((1.5 * 2**23 + 127 + 64,), (1.5 * 2**52 + 1023 + 512,))
_last_factor = _polynomial((2.0**-64,), (2.0**-512,))
_ln2_large = _polynomial((0.693359375,), (6.93147180369123816490e-01,))
_log2_e = _polynomial((1.4426950408889634,), (1.4426950408889634,))
_ln2_small = _polynomial((-2.12194440e-4,), (1.90821492927058770002e-10,))
_Q = _polynomial(
    (0.499999934335, 0.166665204022, 0.0416683905176, 0.00836874490391, 0.001381455364),
    (
        *(0.50000000000000000441, 0.16666666666666683484, 0.041666666666666092524),
        *(0.0083333333333169840053, 0.0013888888889116152821, 0.00019841269896512448272),
        *(0.000024801586926052735274, 2.7557234729792016557e-6, 2.7557582038658133661e-7),
        *(2.5112084005850369693e-8, 2.0826648732293425774e-9),
    ),
)
_P = _polynomial(
    (
        *(0.499999327719, -0.333305114763, 0.249585887728, -0.196954068485, 0.153554132167),
        *(-0.106805823621, 0.057664693954, -0.0202047108609, 0.00331849915363),
    ),
    (
        *(0.33333333333333151897, 0.20000000000078620883, 0.1428571427392716632),
        *(0.11111111984845844544, 0.090908719632707665966, 0.07693279943035179833),
        *(0.06650487044388582197, 0.060530411115526983895, 0.041700595731621486482),
        0.085092714149811265446,
    ),
)


@intrinsic
def _power_of_2(_: Any, shifted: Any) -> Any:
    """Return the power of 2 whose biased exponent is in the lowest bits of shifted."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        width, places = (32, 23) if shifted == types.float32 else (64, 52)
        bits = builder.bitcast(arguments[0], ir.IntType(width))
        power = builder.shl(bits, ir.Constant(bits.type, places))
        return builder.bitcast(power, arguments[0].type)

    return shifted(shifted), generate


@intrinsic
def _split(_: Any, x: Any) -> Any:
    """Return k, in x's type, and f in [1, 2) with x = 2^k f, for a positive normal number x."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        width, places, bias = (32, 23, 127) if x == types.float32 else (64, 52, 1023)
        whole, kind = ir.IntType(width), arguments[0].type
        bits = builder.bitcast(arguments[0], whole)
        exponent = builder.lshr(bits, ir.Constant(whole, places))
        if width == 32:
            k = builder.sitofp(builder.sub(exponent, ir.Constant(whole, bias)), kind)
        else:  # by way of 2⁵² + k + 1023: AVX2 cannot convert int64
            shifted = builder.or_(exponent, ir.Constant(whole, 1075 << 52))
            large = ir.Constant(kind, -(2.0**52) - 1023)
            k = builder.fadd(builder.bitcast(shifted, kind), large)
        fraction = builder.and_(bits, ir.Constant(whole, (1 << places) - 1))
        f = builder.bitcast(builder.or_(fraction, ir.Constant(whole, bias << places)), kind)
        return context.make_tuple(builder, signature.return_type, (k, f))

    return types.UniTuple(x, 2)(x), generate


@njit(fastmath=_EXACT)
def _exp_in_two(x: Any, one: Any) -> Any:
    """e^x for x ≤ 0, and its rounding error."""
    x = _least(x) if x < _least(x) else x  # NaN stays NaN
    shifted = x * _log2_e(x) + _shift(x)
    k = shifted - _shift(x)
    r = x - k * _ln2_large(x)
    r -= k * _ln2_small(x)
    rest = r * r * _Q(r)
    small = r + rest
    near_1 = one + small
    lost = (small - (near_1 - one)) + (rest - (small - r))
    power = _power_of_2(shifted)
    # 2^k in two factors, so that a subnormal result is rounded once.
    return near_1 * power * _last_factor(x), lost * power * _last_factor(x)


@njit(fastmath=_EXACT)
def _exp(x: Any, one: Any) -> Any:
    return _exp_in_two(x, one)[0]


@_generic
def _log1p(e: Any, one: Any) -> Any:
    """ln(1 + e) for e in [0, 1]."""
    if e == types.float32:
        return lambda e, one: e - e * (e * _P(e))

    return lambda e, one: _log1p_by_quotient(e)


@njit(fastmath=_EXACT)
def _log1p_by_quotient(e: Any) -> Any:
    w = 2 + e
    t = 2 / w
    s = e * t  # twice the s of the formula
    s += (((e + e) - s * w) - s * (e - (w - 2))) * (t / 2)  # rounding error
    v = s * s / 4
    return s + s * v * _P(v)


@njit(fastmath=_EXACT, forceinline=True)
def _power(q, gamma):
    """q^γ for q in [0, 1], in float64: 2^(γ k) f^γ for q = 2^k f."""
    k, f = _split(q if q > 2.3e-308 else 2.3e-308)  # below, all is negligible
    # An error in x is a relative error in e^x, so x is a sum of two parts. Two products are exact:
    # γ rounded to 24 bits times k, and the integer part of that times the larger part of ln 2.
    few_bits = np.float64(np.float32(gamma))
    n = np.floor(few_bits * k)
    large, part = n * _ln2_large(q), (few_bits * k - n) + (gamma - few_bits) * k
    rest = n * _ln2_small(q) + (part * math.log(2) + gamma * _log1p(f - 1.0, 1.0))
    total = large + rest
    power = _exp(total, 1.0)
    return power + power * (rest - (total - large)) if q == q else q


# ------------------------------------------------------------------------------- the equations

# e is e^(−|z|). negative and positive are the weights of the two terms: 1 − y and y, after label
# smoothing and pos_weight; both is their sum. `one` is 1 in the working dtype.


@njit(fastmath=_EXACT)
def _sigmoids(z: Any, e: Any, one: Any) -> Any:
    """Equation 1: σ(z) and σ(−z) as numerators, and their common denominator."""
    return (one if z > 0 else e), (e if z > 0 else one), one + e


def _cross_entropy(z, e, negative, positive, both, one, loss):
    """Equation 3: (1−y) softplus(z) + y softplus(−z) with softplus(z) = max(z, 0) + ln(1 + e)."""
    weight = negative if z > 0 else positive
    size = abs(z) if weight != 0 else one - one  # a term with weight 0 is 0, also at z = ±∞
    return weight * size + both * _log1p(e, one)


@njit(fastmath=_EXACT)
def _residual(z: Any, negative: Any, positive: Any, one: Any) -> Any:
    """a − y as a numerator and denominator, and e^(−|z|), each with its rounding error.

    Without these errors the quadratic loss would be off by up to 5 units in the last place.
    """
    e, e_lost = _exp_in_two(-abs(z), one)
    a, not_a, w = _sigmoids(z, e, one)
    difference_lost = e_lost * (-positive if z > 0 else negative)
    w_lost = (e - (w - one)) + e_lost
    return negative * a - positive * not_a, difference_lost, w, w_lost, e, e_lost


def _quadratic(z, e, negative, positive, both, one, loss):
    """Equation 2: ½ (a − y)²."""
    difference, lost, w, w_lost, _, _ = _residual(z, negative, positive, one)
    difference /= w
    difference += (lost - difference * w_lost) / w
    return difference * difference / (one + one)


def _dz_cross_entropy(z, e, negative, positive, factor, factor_lost, one, loss):
    """Equation 5: a − y = (1−y) σ(z) − y σ(−z), times a factor given with its rounding error."""
    a, not_a, w = _sigmoids(z, e, one)
    difference = negative * a - positive * not_a
    inverse = one / w
    product = difference * factor
    dz = product * inverse
    # Rounding errors of the product, of w and of dz, unless dz is infinite.
    lost = (difference * factor - product) + difference * factor_lost
    lost += (product - dz * w) - dz * (e - (w - one))
    return dz + lost * inverse if abs(dz) < np.inf else dz


def _dz_quadratic(z, e, negative, positive, factor, factor_lost, one, loss):
    """Equation 4: (a − y) σ'(z) with σ'(z) = e / w², times a factor."""
    difference, lost, w, w_lost, e, e_lost = _residual(z, negative, positive, one)
    square = w * w
    cube = square * w
    dz = difference * e / cube
    lost = lost * e + difference * e_lost - (one + one + one) * dz * w_lost * square
    return factor * (dz + lost / cube)


@_generic
def _negative(z, a, not_a, ln, margin, one, loss):
    """Focal loss of a negative target: p, −ln(1 − p), its derivative, and 0 if p is 0, else 1."""
    if loss.label == "margin":
        return _negative_with_margin
    return lambda z, a, not_a, ln, margin, one, loss: (a, ln + max(z, one - one), a, one)


def _negative_with_margin(z, a, not_a, ln, margin, one, loss):
    zero, rest = one - one, not_a + margin
    p, above = (zero, zero) if a <= margin else (a - margin, one)
    is_small = p + p < one
    k, f = _split(rest)
    ln = _log1p(p / rest if is_small else f - one, one)
    of_0 = ln if is_small else -k * _ln2_large(z) - (k * _ln2_small(z) + ln)
    of_0 += rest - rest  # NaN stays NaN
    return p, of_0, above * a * not_a / rest, above


@njit(fastmath=_EXACT, forceinline=True)
def _focal(z, e, e_lost, negative, positive, margin, one, loss):
    """Factors of a focal loss (`nnce.rules.Focus`): q, L, dL and dq/q."""
    zero, w = one - one, one + e
    inverse, w_lost = one / w, (e - (w - one)) + e_lost
    # σ(|z|) and σ(−|z|), corrected for rounding, since a power multiplies their errors.
    large, small = inverse, e * inverse
    large += ((one - large * w) - large * w_lost) * inverse
    small += ((e - small * w) + (e_lost - small * w_lost)) * inverse
    a, not_a = (large, small) if z > 0 else (small, large)
    ln = _log1p(e, one)
    p, of_0, d_of_0, above = _negative(z, a, not_a, ln, margin, one, loss)
    L = negative * (of_0 if negative != 0 else zero)
    L += positive * (ln - min(z, zero) if positive != 0 else zero)
    q = negative * p + positive * not_a
    # dq is the product of σ(z), σ(−z) and the last factor; for y of 0 or 1, q is σ(z) or σ(−z).
    first, second = (a, not_a) if negative > positive else (not_a, a)
    over_q = zero if q == 0 else first / q
    rate = over_q * (second * (negative * above - positive))
    return q, L, negative * d_of_0 - positive * not_a, rate


@_generic
def _C(z: Any, e: Any, negative: Any, positive: Any, both: Any, one: Any, loss: Any) -> Any:
    return _cross_entropy if loss.label == "cross-entropy" else _quadratic


@_generic
def _dz(z, e, negative, positive, factor, factor_lost, one, loss):
    return _dz_cross_entropy if loss.label == "cross-entropy" else _dz_quadratic


# ---------------------------------------------------------------------------- parts of a block

# first is the index of a block's first element in z, and at that in the array of targets; n is the
# number of elements. work is the working dtype, float32 or float64. options is None or a tuple:
# address and period of weight and of pos_weight (0 if absent), which are arrays of the working
# dtype; label_smoothing; the ignored value of y, and whether there is one. terms is a tuple of
# addresses that `_term` reads.


@_generic
def _terms(
    y: Any, at: Any, first: Any, n: Any, options: Any, memory: Any, y_dtype: Any, work: Any
) -> Any:
    """Prepare the weights of the two terms of the loss, and return their addresses."""
    if options is types.none:
        return lambda y, at, first, n, options, memory, y_dtype, work: (y, at)
    return _weights


def _weights(y, at, first, n, options, memory, y_dtype, work):
    _, _, pos_weight, period, smoothing, _, _ = options
    negative, positive = memory
    one = _one(work)
    keep, half = _as(1 - smoothing, one), _as(smoothing / 2, one)
    for i in range(n):
        t = _read(y, at + i, y_dtype, one)
        _write(negative, i, work, keep * (one - t) + half)
        _write(positive, i, work, keep * t + half)
    if pos_weight != 0:
        for i in range(n):
            w = _read(pos_weight, first % period + i, work, one)
            _write(positive, i, work, w * _read(positive, i, work, one))
    return memory


@_generic
def _term(terms: Any, i: Any, options: Any, y_dtype: Any, work: Any) -> Any:
    """Return `negative`, `positive` and `both` of an element."""
    if options is types.none:
        return _term_of_target
    return _term_in_memory


def _term_of_target(terms, i, options, y_dtype, work):
    one = _one(work)
    t = _read(terms[0], terms[1] + i, y_dtype, one)
    return one - t, t, one


def _term_in_memory(terms, i, options, y_dtype, work):
    one = _one(work)
    p, q = _read(terms[0], i, work, one), _read(terms[1], i, work, one)
    return p, q, p + q


@_generic
def _finish(
    out: Any,
    out_at: Any,
    y: Any,
    at: Any,
    first: Any,
    n: Any,
    options: Any,
    y_dtype: Any,
    work: Any,
) -> Any:
    """Multiply by weight, where 0 · ∞ is 0, and write 0 where y is the ignored value."""
    if options is types.none:
        return lambda out, out_at, y, at, first, n, options, y_dtype, work: None
    return _weighted


def _weighted(out, out_at, y, at, first, n, options, y_dtype, work):
    weight, period, _, _, smoothing, ignored, ignores = options
    one = _one(work)
    # This is 0, but LLVM does not know it. If x were written back unchanged where y counts, LLVM
    # would use masked stores, which take several times as long on some processors.
    nothing = _as(0 * smoothing, one)
    if weight != 0:
        for i in range(n):
            x, w = _read(out, out_at + i, work, one), _read(weight, first % period + i, work, one)
            product = x * w
            _write(out, out_at + i, work, one - one if w == 0 and abs(x) == np.inf else product)
    if ignores:
        for i in range(n):
            x = _read(out, out_at + i, work, one)
            t = _read(y, at + i, y_dtype, ignored)
            _write(out, out_at + i, work, one - one if t == ignored else x - nothing)


# Each short loop is a separate function, so that the compiler keeps all constants in registers and
# the processor overlaps several elements. Functions with a sum of two products are inlined: the
# compiler chooses which product to round, and the linker would use whichever copy of the function
# was compiled first, so that bits would depend on the contents of the cache.


@njit(fastmath=_EXACT)
def _all_e(z, first, e, n, z_dtype, work):
    one = _one(work)
    for i in range(n):
        _write(e, i, work, _exp(-abs(_read(z, first + i, z_dtype, one)), one))


@njit(fastmath=_EXACT, forceinline=True)
def _all_C(z, first, e, terms, out, n, options, loss, z_dtype, y_dtype, work):
    one = _one(work)
    for i in range(n):
        p, q, both = _term(terms, i, options, y_dtype, work)
        x, t = _read(z, first + i, z_dtype, one), _read(e, i, work, one)
        _write(out, i, work, _C(x, t, p, q, both, one, loss))


@njit(fastmath=_EXACT, forceinline=True)
def _all_dz(z, first, e, terms, scale, out, at, n, options, loss, z_dtype, y_dtype, work):
    one = _one(work)
    factor = _as(scale, one)
    lost = scale - _as(factor, 1.0)
    factor_lost = _as(lost if abs(lost) < np.inf else 0.0, one)
    for i in range(n):
        p, q, _ = _term(terms, i, options, y_dtype, work)
        x, t = _read(z, first + i, z_dtype, one), _read(e, i, work, one)
        _write(out, at + i, work, _dz(x, t, p, q, factor, factor_lost, one, loss))


@_generic
def _block_of_C(z, first, e, terms, out, n, options, focus, loss, z_dtype, y_dtype, work):
    """Write C of a block; e is the address of scratch memory."""
    if focus is types.none:
        return _block_of_C_by_e
    return _block_of_focal_C


def _block_of_C_by_e(z, first, e, terms, out, n, options, focus, loss, z_dtype, y_dtype, work):
    _all_e(z, first, e, n, z_dtype, work)
    _all_C(z, first, e, terms, out, n, options, loss, z_dtype, y_dtype, work)


def _block_of_focal_C(z, first, e, terms, out, n, options, focus, loss, z_dtype, y_dtype, work):
    _all_focal(z, first, terms, e, out, 0, n, options, focus, None, loss, z_dtype, y_dtype, work)
    _multiply_by_powers(e, terms, out, 0, n, options, focus, y_dtype, work)


@_generic
def _block_of_dz(
    z, first, e, terms, scale, out, at, n, options, focus, loss, z_dtype, y_dtype, work
):
    """Write dC/dz of a block, times scale; e is the address of scratch memory."""
    if focus is types.none:
        return _block_of_dz_by_e
    return _block_of_focal_dz


def _block_of_dz_by_e(
    z, first, e, terms, scale, out, at, n, options, focus, loss, z_dtype, y_dtype, work
):
    _all_e(z, first, e, n, z_dtype, work)
    _all_dz(z, first, e, terms, scale, out, at, n, options, loss, z_dtype, y_dtype, work)


def _block_of_focal_dz(
    z, first, e, terms, scale, out, at, n, options, focus, loss, z_dtype, y_dtype, work
):
    _all_focal(z, first, terms, e, out, at, n, options, focus, scale, loss, z_dtype, y_dtype, work)
    _multiply_by_powers(e, terms, out, at, n, options, focus, y_dtype, work)


@njit(fastmath=_EXACT, forceinline=True)
def _all_focal(z, first, terms, q, out, at, n, options, focus, scale, loss, z_dtype, y_dtype, work):
    """Write q, and C (if scale is None) or scale times dC/dz, without the factor q^γ_t."""
    one = _one(work)
    zero = one - one
    gamma, gamma_of_0, margin, alpha, alpha_of_0 = (
        *(_as(focus[0], one), _as(focus[1], one), _as(focus[2], one)),
        *(_as(focus[3], one), _as(focus[4], one)),
    )
    if max(gamma, gamma_of_0) > 2:
        for i in range(n):
            e, lost = _exp_in_two(-abs(_read(z, first + i, z_dtype, one)), one)
            _write(out, at + i, work, e)
            _write(q, i, work, lost)
    else:  # the rounding error of e is negligible
        for i in range(n):
            _write(out, at + i, work, _exp(-abs(_read(z, first + i, z_dtype, one)), one))
            _write(q, i, work, zero)
    for i in range(n):
        negative, positive, _ = _term(terms, i, options, y_dtype, work)
        x, e = _read(z, first + i, z_dtype, one), _read(out, at + i, work, one)
        e_lost = _read(q, i, work, one)
        q_i, found, dL, rate = _focal(x, e, e_lost, negative, positive, margin, one, loss)
        weight = negative * alpha_of_0 + positive * alpha
        if scale is not None:
            exponent = negative * gamma_of_0 + positive * gamma
            found = dL + (exponent * rate * found if rate != 0 else zero)
            found *= _as(scale, one)
        _write(q, i, work, q_i)
        _write(out, at + i, work, zero if weight == 0 and abs(found) == np.inf else weight * found)


@njit(fastmath=_EXACT)
def _has_soft(terms, n, options, y_dtype, work):
    one, found = _one(work), False
    for i in range(n):
        _, positive, _ = _term(terms, i, options, y_dtype, work)
        found |= (positive > 0) & (positive < one)
    return found


@njit(fastmath=_EXACT)
def _keep_where(q, terms, sign, n, options, y_dtype, work):
    """Replace q by 1 where the target is 1 (sign −1) or 0 (sign 1)."""
    one = _one(work)
    for i in range(n):
        _, positive, _ = _term(terms, i, options, y_dtype, work)
        keep = sign * (positive - one / (one + one)) > 0
        _write(q, i, work, _read(q, i, work, one) if keep else one)


@njit(fastmath=_EXACT)
def _multiply(q, out, at, n, times, work):
    """Multiply by q^times, where times is a multiple of ½."""
    one = _one(work)
    for _ in range(int(times)):
        for i in range(n):
            _write(out, at + i, work, _read(out, at + i, work, one) * _read(q, i, work, one))
    if times % 1 != 0:
        for i in range(n):
            root = math.sqrt(_read(q, i, work, one))
            _write(out, at + i, work, _read(out, at + i, work, one) * root)


@njit(fastmath=_EXACT, forceinline=True)
def _multiply_by_any_powers(q, terms, out, at, n, gamma, gamma_of_0, options, y_dtype, work):
    for i in range(n):
        negative, positive, _ = _term(terms, i, options, y_dtype, work)
        power = _power(_read(q, i, work, 1.0), negative * gamma_of_0 + positive * gamma)
        _write(out, at + i, work, _read(out, at + i, work, 1.0) * power)


@njit(fastmath=_EXACT)
def _multiply_by_powers(q, terms, out, at, n, options, focus, y_dtype, work):
    """Multiply by q^γ_t, with multiplications and square roots if 2 γ_t are small integers."""
    one, gamma, gamma_of_0 = _one(work), focus[0], focus[1]
    least, most = min(gamma, gamma_of_0), max(gamma, gamma_of_0)
    is_whole = most <= 4 and 2 * gamma % 1 == 0 and 2 * gamma_of_0 % 1 == 0
    if is_whole and least < most:
        is_whole = not _has_soft(terms, n, options, y_dtype, work)
    if is_whole:
        _multiply(q, out, at, n, least, work)
        if least < most:
            sign = _as(1.0 if gamma > gamma_of_0 else -1.0, one)
            _keep_where(q, terms, sign, n, options, y_dtype, work)
            _multiply(q, out, at, n, most - least, work)
        return
    _multiply_by_any_powers(q, terms, out, at, n, gamma, gamma_of_0, options, y_dtype, work)


@njit(fastmath=_SUM)
def _sum(source: Any, n: Any, work: Any) -> Any:
    total = 0.0
    for i in range(n):
        total += _read(source, i, work, 1.0)
    return total


@njit(fastmath=_SUM)
def _sum_by_fours(source: Any, n: Any, work: Any) -> Any:
    # Sums of four in the working dtype: converting each number would take three times as long.
    total, one, quarter = 0.0, _one(work), n // 4
    for i in range(quarter):
        first = _read(source, i, work, one) + _read(source, i + quarter, work, one)
        second = _read(source, i + 2 * quarter, work, one)
        second += _read(source, i + 3 * quarter, work, one)
        total += _as(first + second, 1.0)
    if abs(total) < np.inf:
        for i in range(4 * quarter, n):
            total += _read(source, i, work, 1.0)
        return total
    return _sum(source, n, work)  # a sum of four may have overflowed


# ------------------------------------------------------------------------------------ kernels


@njit(fastmath=_EXACT)
def value(z, y, C, begin, end, options, focus, loss, z_dtype, y_dtype, work):
    """Compute C for elements begin to end, and return the sum.

    Args:
        z, y: addresses of logits and targets.
        C: address of the losses to write, in z's dtype; 0 to write nothing.
        begin, end: index of the first element, and one past the last.
        options: a tuple, or None.
        focus: a tuple for a focal loss, or None.
        loss, z_dtype, y_dtype, work: markers.
    """
    one = _one(work)
    e, out, memory = _scratch(one), _scratch(one), (_scratch(one), _scratch(one))
    total = 0.0
    for first in range(begin, end, BLOCK):
        n = end - first if end - first < BLOCK else BLOCK
        terms = _terms(y, first, first, n, options, memory, y_dtype, work)
        _block_of_C(z, first, e, terms, out, n, options, focus, loss, z_dtype, y_dtype, work)
        _finish(out, 0, y, first, first, n, options, y_dtype, work)
        if C != 0:
            for i in range(n):
                _write(C, first + i, z_dtype, _read(out, i, work, one))
        total += _sum_by_fours(out, n, work)
    return total


@njit(fastmath=_EXACT)
def gradient(z, y, dz, begin, end, options, focus, upstream, scale, loss, z_dtype, y_dtype, work):
    """Write dC/dz for elements begin to end, times their upstream gradients.

    Args:
        dz: address of the gradients to write, in z's dtype.
        upstream: address of the elements' upstream gradients, in z's dtype, or 0.
        scale: upstream gradient common to all elements.
    """
    one = _one(work)
    e, found, memory = _scratch(one), _scratch(one), (_scratch(one), _scratch(one))
    for first in range(begin, end, BLOCK):
        n = end - first if end - first < BLOCK else BLOCK
        terms = _terms(y, first, first, n, options, memory, y_dtype, work)
        out, at = (dz, first) if _same(z_dtype, work) else (found, 0)
        _block_of_dz(
            z, first, e, terms, scale, out, at, n, options, focus, loss, z_dtype, y_dtype, work
        )
        if upstream != 0:
            for i in range(n):
                g = _read(upstream, first + i, z_dtype, one)
                _write(out, at + i, work, g * _read(out, at + i, work, one))
        _finish(out, at, y, first, first, n, options, y_dtype, work)
        if not _same(z_dtype, work):
            for i in range(n):
                _write(dz, first + i, z_dtype, _read(found, i, work, one))


@njit(fastmath=_EXACT)
def joint(
    z, y, y_stride, C, factor, begin, end, width, options, focus, loss, z_dtype, y_dtype, work, sums
):
    """Overwrite z by dC/dz for rows begin to end, and write the sum of C over each row.

    Args:
        z: address of the logits, float32 or float64, [rows, width].
        y_stride: stride of the rows of the targets, in elements.
        C: address of the sums to write, float64, [rows].
        factor: address of the factors of dC/dz, one per row, in z's dtype.
        options: a tuple, whose weights have the period `width`, or None.
    """
    one = _one(work)
    e, out, memory = _scratch(one), _scratch(one), (_scratch(one), _scratch(one))
    found = _scratch(one)
    for row in range(begin, end):
        total, scale = 0.0, _read(factor, row, z_dtype, one)
        for column in range(0, width, BLOCK):
            n, first = width - column if width - column < BLOCK else BLOCK, row * width + column
            at = row * y_stride + column
            terms = _terms(y, at, first, n, options, memory, y_dtype, work)
            _block_of_C(z, first, e, terms, out, n, options, focus, loss, z_dtype, y_dtype, work)
            if focus is None:  # not by _all_dz: the compiler would not see that it runs in place
                for i in range(n):
                    p, q, _ = _term(terms, i, options, y_dtype, work)
                    x, t = _read(z, first + i, work, one), _read(e, i, work, one)
                    _write(z, first + i, work, _dz(x, t, p, q, scale, one - one, one, loss))
            else:
                _block_of_dz(
                    *(z, first, e, terms, _as(scale, 1.0), found, 0, n),
                    *(options, focus, loss, z_dtype, y_dtype, work),
                )
                _finish(found, 0, y, at, first, n, options, y_dtype, work)
                for i in range(n):
                    _write(z, first + i, z_dtype, _read(found, i, work, one))
            _finish(out, 0, y, at, first, n, options, y_dtype, work)
            if focus is None:
                _finish(z, first, y, at, first, n, options, y_dtype, work)
            total += _sum(out, n, work)
        _write(C, row, sums, total)


@njit(fastmath=_EXACT)
def count(y, begin, end, width, ignored, y_dtype):
    """Return the number of rows from begin to end with a target that is not ignored."""
    number = 0
    if width == 1:
        for i in range(begin, end):
            number += _read(y, i, y_dtype, ignored) != ignored
        return number
    for row in range(begin, end):
        counts = False
        for i in range(row * width, (row + 1) * width):
            counts |= _read(y, i, y_dtype, ignored) != ignored
        number += counts
    return number


@njit(fastmath=_EXACT)
def sigmoid_gradient(z, da, dz, begin, end, z_dtype, work):
    """Write dC/dz = dC/da σ'(z) (equation 8) with σ'(z) = e / (1 + e)²."""
    one = _one(work)
    for i in range(begin, end):
        e = _exp(-abs(_read(z, i, z_dtype, one)), one)
        square = one + e * (one + one + e)  # smaller rounding error than (1 + e) (1 + e)
        _write(dz, i, z_dtype, _read(da, i, z_dtype, one) * e / square)


# ------------------------------------------------------------------------------------ compile


def compiled(
    kernel: str, loss: str, z_dtype: str, y_dtype: str, plain: bool = False, wide: bool = False
) -> Any:
    """Compile a kernel or load it from the cache on disk.

    Args:
        kernel: name of the kernel.
        loss: label of the loss's marker.
        z_dtype, y_dtype: names of dtypes.
        plain: whether options are None.
        wide: whether to compute in float64.

    Returns:
        The compiled function. Its arguments are Python numbers; markers are passed as None.
    """
    work = "float64" if z_dtype == "float64" else "float32"
    if wide or (loss == "quadratic" and kernel != "joint"):
        work = "float64"  # in float32, a product of three factors loses up to 6 units
    labels = {"loss": loss, "z_dtype": z_dtype, "y_dtype": y_dtype, "work": work, "sums": "float64"}
    # `fused` rounds it to y's dtype, so float32 represents it exactly unless y is float64.
    ignored: Any = types.float32 if "float" in y_dtype else types.int64
    ignored = types.float64 if y_dtype == "float64" else ignored
    kinds = {
        "scale": types.float64,
        "ignored": ignored,
        "options": types.none
        if plain
        else types.Tuple((*[types.int64] * 4, types.float64, ignored, types.boolean)),
        "focus": types.UniTuple(types.float64, 5) if loss in ("focal", "margin") else types.none,
        **{name: Marker(label) for name, label in labels.items()},
    }
    dispatcher = globals()[kernel]
    parameters = inspect.signature(dispatcher.py_func).parameters
    return dispatcher.compile(tuple(kinds.get(name, types.int64) for name in parameters))
