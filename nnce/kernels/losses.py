"""Fused CPU kernels for the losses and the sigmoid, compiled by Numba at their first use.

Each kernel walks its arrays in blocks of 1,024 elements, whose intermediate results stay in the
cache of a processor core. A block goes through several short loops: the targets become the weights
of the two terms of the loss, one loop computes the loss or its gradient, further loops apply
`weight`, `ignore_index` and the upstream gradient. Sums of float32 are taken in float64.

Arrays are passed as addresses with a code for their dtype, which costs much less than an array
object where a call takes a few microseconds. A code is part of a kernel's signature: each
combination of dtypes is a compilation of its own. Everything else is decided at run time.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import NativeValue, intrinsic, models, overload, register_model, unbox

BLOCK = 1024
"""Elements walked at a time; a kernel needs five times as many numbers on the stack."""


class Marker(types.Dummy):  # type: ignore[misc]
    """A type whose only value is None: it selects code when a kernel is compiled.

    Args:
        name: "cross-entropy", "quadratic", the name of a dtype, or "zeros" for an array of zeros
            that is not in memory.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.label = name


register_model(Marker)(models.OpaqueModel)


@unbox(Marker)
def _unbox(_: Any, __: Any, c: Any) -> NativeValue:
    return NativeValue(c.context.get_dummy_value())


# How numbers lie in memory. Numba has no half-precision numbers on a CPU: they are read as bits.
_STORED = {
    "float32": types.float32,
    "float64": types.float64,
    "float16": types.uint16,
    "bfloat16": types.uint16,
    "bool": types.uint8,
    "uint8": types.uint8,
    "int8": types.int8,
    "int16": types.int16,
    "int32": types.int32,
    "int64": types.int64,
}

# e^x must keep the order of its operations ("reassoc" would undo the reduction of x in two parts);
# only sums over a block may be reordered. "contract" allows fused multiply-add.
_EXACT = {"contract", "nsz"}
_SUM = {"contract", "nsz", "reassoc"}


def _njit(*, fastmath: set[str]) -> Any:
    return numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=fastmath)


def _generic(choose: Any) -> Any:
    """Return a function of compiled code that is chosen by the Numba types of its arguments."""
    choose.__annotations__.clear()  # Numba compares signatures with those of the chosen functions

    def stub(*arguments: Any) -> Any:
        raise NotImplementedError

    overload(stub, jit_options={"fastmath": _EXACT})(choose)
    return stub


# ------------------------------------------------------------------------------------- memory


def _item(context: Any, builder: Any, stored: Any, address: Any, i: Any) -> Any:
    """Return the LLVM pointer to element i of an array of a Numba type."""
    kind = context.get_data_type(stored)
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [i])


@intrinsic
def _read(_: Any, address: Any, i: Any, code: Any) -> Any:
    """Return element i as it is stored."""
    stored = _STORED[code.label]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_item(context, builder, stored, *arguments[:2]))

    return stored(types.int64, types.int64, code), generate


@intrinsic
def _write(_: Any, address: Any, i: Any, code: Any, value: Any) -> Any:
    """Store element i."""
    stored = _STORED[code.label]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[3], _item(context, builder, stored, *arguments[:2]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, code, stored), generate


@intrinsic
def _scratch(_: Any, code: Any) -> Any:
    """Return the address of memory on the stack for a block of numbers of a dtype."""
    stored = _STORED[code.label]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = context.get_data_type(stored)
        memory = cgutils.alloca_once(builder, kind, size=BLOCK)
        return builder.ptrtoint(memory, ir.IntType(64))

    return types.int64(code), generate


# ------------------------------------------------------------------------------------ numbers


@_generic
def _one(code: Any) -> Any:
    """1 in the dtype of a code, float32 or float64."""
    kind = np.float32 if code.label == "float32" else np.float64
    return lambda code: kind(1)


@_generic
def _put(address: Any, i: Any, code: Any, x: Any) -> Any:
    """Store a number of float32 or float64 as element i of another floating-point dtype."""
    stored = code.label
    if stored == "bfloat16":
        return lambda address, i, code, x: _write(address, i, code, _to_bfloat16(x))
    if stored == "float16":
        return lambda address, i, code, x: _write(address, i, code, _to_float16(x))
    return lambda address, i, code, x: _write(address, i, code, x)


@_generic
def _is(address: Any, i: Any, code: Any, ignored: Any) -> Any:
    """Whether element i is the ignored value."""
    if code.label in ("float16", "bfloat16"):
        one = np.float32(1)
        return lambda address, i, code, ignored: _number(address, i, code, one) == ignored
    if code.label == "zeros":
        return lambda address, i, code, ignored: False
    return lambda address, i, code, ignored: _read(address, i, code) == ignored


@_generic
def _number(address: Any, i: Any, code: Any, like: Any) -> Any:
    """Element i as a number of like's type, float32 or float64."""
    kind = np.float32 if like == types.float32 else np.float64
    stored = code.label
    if stored == "zeros":
        return lambda address, i, code, like: kind(0)
    if stored == "bfloat16":
        return lambda address, i, code, like: kind(
            (np.uint32(_read(address, i, code)) << np.uint32(16)).view(np.float32)
        )
    if stored == "float16":
        return lambda address, i, code, like: kind(_from_float16(_read(address, i, code)))
    return lambda address, i, code, like: kind(_read(address, i, code))


@_njit(fastmath=_EXACT)
def _from_float16(bits: Any) -> Any:
    sign = (np.uint32(bits) & np.uint32(0x8000)) << np.uint32(16)
    size = np.uint32(bits) & np.uint32(0x7FFF)
    # The exponent's bias is 112 larger in float32; infinities and NaN have the largest exponent.
    shift = np.uint32(224 << 23) if size >= np.uint32(0x7C00) else np.uint32(112 << 23)
    normal = (size << np.uint32(13)) + shift
    subnormal = (np.float32(np.int32(size)) * np.float32(2**-24)).view(np.uint32)
    wide = subnormal if size < np.uint32(0x0400) else normal
    return (np.uint32(wide) | sign).view(np.float32)


@_njit(fastmath=_EXACT)
def _to_float16(x: Any) -> Any:
    bits = np.float32(x).view(np.uint32)
    sign = np.uint32(bits & np.uint32(0x80000000)) >> np.uint32(16)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = (size >> np.uint32(13)) & np.uint32(1)
    normal = (size - np.uint32(112 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13)
    # The last place of 0.5 in float32 is 2⁻²⁴, the smallest number of float16.
    rounded = (size.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
    narrow = np.uint32(rounded) if size < np.uint32(0x38800000) else np.uint32(normal)
    narrow = np.uint32(0x7C00) if size >= np.uint32(0x477FF000) else narrow
    narrow = np.uint32(0x7E00) if size > np.uint32(0x7F800000) else narrow
    return np.uint16(np.uint32(narrow) | sign)


@_njit(fastmath=_EXACT)
def _to_bfloat16(x: Any) -> Any:
    bits = np.float32(x).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(np.uint32(0x7FC0) if is_nan else np.uint32(rounded))


# e^x for x ≤ 0: x = k ln 2 + r, e^r = 1 + r + r² Q(r), with ln 2 in two parts of which k times the
# first is exact. Q and P (below) are minimax in relative error: 0.05 and 0.08
# units of 2⁻²⁴ in float32, 0.0005 and 0.01 of 2⁻⁵³ in float64.
_LOG2_E = 1.4426950408889634
_LN2_32 = (0.693359375, -2.12194440e-4)
_LN2_64 = (6.93147180369123816490e-01, 1.90821492927058770002e-10)
_Q_32 = (0.499999934335, 0.166665204022, 0.0416683905176, 0.00836874490391, 0.001381455364)
_Q_64 = (
    *(0.50000000000000000441, 0.16666666666666683484, 0.041666666666666092524),
    *(0.0083333333333169840053, 0.0013888888889116152821, 0.00019841269896512448272),
    *(0.000024801586926052735274, 2.7557234729792016557e-6, 2.7557582038658133661e-7),
    *(2.5112084005850369693e-8, 2.0826648732293425774e-9),
)
# ln(1 + e) = 2 artanh(s) = 2 (s + s³ P(s²)) with s = e / (2 + e).
_P_32 = (0.333332065665, 0.200108495323, 0.139995704926, 0.140122296236)
_P_64 = (
    *(0.33333333333333151897, 0.20000000000078620883, 0.1428571427392716632),
    *(0.11111111984845844544, 0.090908719632707665966, 0.07693279943035179833),
    *(0.06650487044388582197, 0.060530411115526983895, 0.041700595731621486482),
    0.085092714149811265446,
)


def _polynomial(in_float32: tuple[float, ...], in_float64: tuple[float, ...]) -> Any:
    """Return an intrinsic function of x: the polynomial with these coefficients, lowest first."""

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


_q, _p = _polynomial(_Q_32, _Q_64), _polynomial(_P_32, _P_64)


@_njit(fastmath=_EXACT)
def _exp32(x: Any) -> Any:
    least = np.float32(-104.5)  # e^x rounds to 0
    x = least if x < least else x  # NaN stays NaN
    k = np.floor(x * np.float32(_LOG2_E) + np.float32(0.5))
    r = x - k * np.float32(_LN2_32[0])
    r = r - k * np.float32(_LN2_32[1])
    tail = r + r * r * _q(r)
    head = np.float32(1) + tail
    tail -= head - np.float32(1)
    # 2^k in two factors: the result may be subnormal, and is rounded once.
    n = np.int32(k)
    first = max(n, np.int32(-100))
    scale = np.int32(np.int32(first + np.int32(127)) << np.int32(23)).view(np.float32)
    rest = np.int32(np.int32(n - first + np.int32(127)) << np.int32(23)).view(np.float32)
    return head * scale * rest, tail * scale * rest


@_njit(fastmath=_EXACT)
def _exp64(x: Any) -> Any:
    least = np.float64(-746)
    x = least if x < least else x
    k = np.floor(x * _LOG2_E + 0.5)
    r = x - k * _LN2_64[0]
    r = r - k * _LN2_64[1]
    tail = r + r * r * _q(r)
    head = 1.0 + tail
    tail -= head - 1.0
    n = np.int64(np.int32(k))
    first = max(n, np.int64(-1000))
    scale = np.int64((first + np.int64(1023)) << np.int64(52)).view(np.float64)
    rest = np.int64((n - first + np.int64(1023)) << np.int64(52)).view(np.float64)
    return head * scale * rest, tail * scale * rest


@_generic
def _exp(x: Any) -> Any:
    """e^x for x ≤ 0 as the sum of two numbers, the second within half a unit of the first."""
    return (lambda x: _exp32(x)) if x == types.float32 else (lambda x: _exp64(x))


@_njit(fastmath=_EXACT)
def _log1p(e: Any, rest: Any, one: Any) -> Any:
    """ln(1 + e + rest) for e in [0, 1] and a rest that is small compared with e."""
    two = one + one
    w = two + e
    t = two / w
    s = e * t  # twice that of the formula
    # What the sum, the quotient and the product have lost.
    s += (((e + e) - s * w) + ((two - s) * rest - s * (e - (w - two)))) * (t / two)
    v = s * s / (two + two)
    return s + s * v * _p(v)


# ------------------------------------------------------------------------------- the equations

# negative and positive are the weights of the two terms: 1 − y and y, after smoothing and times
# pos_weight. `one` is 1 in the dtype that is computed in.


@_njit(fastmath=_EXACT)
def _sigmoids(z: Any, one: Any) -> Any:
    """Equation 1: the larger and the smaller one of σ(z) and σ(−z)."""
    e, rest = _exp(-abs(z))
    w = one + e
    large = one / w
    small = e * large
    # What the exponential, the sum, the quotient and the product have lost.
    lost = e - (w - one) + rest
    small += ((e - small * w) + (rest - small * lost)) * large
    large += ((one - large * w) - large * lost) * large
    return large, small


@_njit(fastmath=_EXACT)
def _residual(z: Any, negative: Any, positive: Any, one: Any) -> Any:
    """Equation 5: a − y = (1−y) σ(z) − y σ(−z); and σ'(z)."""
    large, small = _sigmoids(z, one)
    a, not_a = (large, small) if z > 0 else (small, large)
    return negative * a - positive * not_a, large * small


@_njit(fastmath=_EXACT)
def _cross_entropy(z: Any, negative: Any, positive: Any, one: Any) -> Any:
    """Equation 3: (1−y) softplus(z) + y softplus(−z), where softplus(z) is max(z, 0) + ln(1 + e)."""
    size = abs(z)
    e, rest = _exp(-size)
    weight = negative if z > 0 else positive
    size = size if weight != 0 else one - one  # a term with weight 0 is 0, also at z = ±∞
    return weight * size + (negative + positive) * _log1p(e, rest, one)


@_njit(fastmath=_EXACT)
def _quadratic(z: Any, negative: Any, positive: Any, one: Any) -> Any:
    """Equation 2: ½ (a − y)²."""
    difference, _ = _residual(z, negative, positive, one)
    return difference * difference / (one + one)


@_njit(fastmath=_EXACT)
def _quadratic_dz(z: Any, negative: Any, positive: Any, one: Any) -> Any:
    """Equation 4: (a − y) σ'(z)."""
    difference, sigmoid_prime = _residual(z, negative, positive, one)
    return difference * sigmoid_prime


@_generic
def _C(z: Any, negative: Any, positive: Any, one: Any, loss: Any) -> Any:
    """The loss of one element."""
    if loss.label == "cross-entropy":
        return lambda z, negative, positive, one, loss: _cross_entropy(z, negative, positive, one)
    return lambda z, negative, positive, one, loss: _quadratic(z, negative, positive, one)


@_generic
def _dz(z: Any, negative: Any, positive: Any, one: Any, loss: Any) -> Any:
    """dC/dz of one element."""
    if loss.label == "cross-entropy":
        return lambda z, negative, positive, one, loss: _residual(z, negative, positive, one)[0]
    return lambda z, negative, positive, one, loss: _quadratic_dz(z, negative, positive, one)


# ------------------------------------------------------------------------------------- blocks

# Each of these functions goes through a block of n elements. `code` is float32 or float64, the
# dtype that is computed in; `at` and `first` are the indices of a block's first element.


@_njit(fastmath=_EXACT)
def _copy(source: Any, first: Any, source_code: Any, to: Any, at: Any, code: Any, one: Any, n: Any) -> Any:
    for i in range(n):
        _put(to, at + i, code, _number(source, first + i, source_code, one))
    return to, at


@_generic
def _floats(source: Any, first: Any, source_code: Any, room: Any, code: Any, one: Any, n: Any) -> Any:
    """Address and index of a block in the dtype that is computed in, converted to room if need be."""
    if source_code.label == code.label:
        return lambda source, first, source_code, room, code, one, n: (source, first)
    return lambda source, first, source_code, room, code, one, n: _copy(
        source, first, source_code, room, 0, code, one, n
    )


@_generic
def _place(to: Any, first: Any, to_code: Any, room: Any, code: Any) -> Any:
    """Address and index at which to compute a block: room if it has to be converted afterward."""
    if to_code.label == code.label:
        return lambda to, first, to_code, room, code: (to, first)
    return lambda to, first, to_code, room, code: (room, 0)


@_njit(fastmath=_EXACT)
def _multiply(to: Any, at: Any, by: Any, first: Any, code: Any, one: Any, n: Any) -> None:
    """Multiply by an array, where 0 times infinity is 0."""
    for i in range(n):
        x, w = _read(to, at + i, code), _read(by, first + i, code)
        product = x * w
        if w == 0 and abs(x) == np.inf:
            product = one - one
        _put(to, at + i, code, product)


@_njit(fastmath=_EXACT)
def _ignore(
    to: Any, at: Any, y: Any, first: Any, y_code: Any, ignored: Any, code: Any, one: Any, n: Any
) -> None:
    """Write 0 where y is the ignored value."""
    for i in range(n):
        x = _read(to, at + i, code)
        _put(to, at + i, code, one - one if _is(y, first + i, y_code, ignored) else x)


@_njit(fastmath=_EXACT)
def _weights(
    y: Any, first: Any, y_code: Any, options: Any, negative: Any, positive: Any, code: Any, one: Any, n: Any
) -> None:
    """Weights of the two terms."""
    _, _, pos_weight, pos_period, smoothing, _, _ = options
    for i in range(n):
        t = _number(y, first + i, y_code, one)
        _put(negative, i, code, one - t)
        _put(positive, i, code, t)
    if smoothing != 0:
        keep, half = one * (1 - smoothing), one * (smoothing / 2)
        for i in range(n):
            _put(negative, i, code, keep * _read(negative, i, code) + half)
            _put(positive, i, code, keep * _read(positive, i, code) + half)
    if pos_weight != 0:
        for i in range(n):
            w = _read(pos_weight, first % pos_period + i, code)
            _put(positive, i, code, w * _read(positive, i, code))


@_njit(fastmath=_SUM)
def _sum(source: Any, first: Any, code: Any, n: Any) -> Any:
    total = 0.0
    for i in range(n):
        total += np.float64(_read(source, first + i, code))
    return total


# ------------------------------------------------------------------------------------ kernels


@_njit(fastmath=_EXACT)
def value(z, y, C, begin, end, options, loss, z_code, y_code, code):
    """C of elements begin to end.

    Args:
        z, y: addresses of the logits and the targets.
        C: address for the loss of each element, in z's dtype, or 0.
        begin, end: the first element, and the one after the last.
        options: as `pack` makes them.
        loss: CROSS_ENTROPY or QUADRATIC.
        z_code, y_code: dtypes of z and y.
        code: float32 or float64, the dtype to compute in.

    Returns:
        The sum, added up block by block.
    """
    one = _one(code)
    negative, positive, z_room, C_room = (
        _scratch(code), _scratch(code), _scratch(code), _scratch(code)
    )
    weight, weight_period, _, _, _, ignored, ignores = options
    total = 0.0
    for first in range(begin, end, BLOCK):
        n = min(BLOCK, end - first)
        zs, at = _floats(z, first, z_code, z_room, code, one, n)
        _weights(y, first, y_code, options, negative, positive, code, one, n)
        for i in range(n):
            _put(C_room, i, code, _C(_read(zs, at + i, code), _read(negative, i, code), _read(positive, i, code), one, loss))
        if weight != 0:
            _multiply(C_room, 0, weight, first % weight_period, code, one, n)
        if ignores:
            _ignore(C_room, 0, y, first, y_code, ignored, code, one, n)
        if C != 0:
            _copy(C_room, 0, code, C, first, z_code, one, n)
        total += _sum(C_room, 0, code, n)
    return total


@_njit(fastmath=_EXACT)
def gradient(z, y, dz, begin, end, options, upstream, scale, loss, z_code, y_code, code):
    """dC/dz of elements begin to end, times their upstream gradients.

    Args:
        upstream: address of an upstream gradient for each element, in z's dtype, or 0.
        scale: an upstream gradient for all.
    """
    one = _one(code)
    negative, positive, z_room, dz_room = (
        _scratch(code), _scratch(code), _scratch(code), _scratch(code)
    )
    weight, weight_period, _, _, _, ignored, ignores = options
    scale = one * scale
    for first in range(begin, end, BLOCK):
        n = min(BLOCK, end - first)
        zs, at = _floats(z, first, z_code, z_room, code, one, n)
        _weights(y, first, y_code, options, negative, positive, code, one, n)
        out, out_at = _place(dz, first, z_code, dz_room, code)
        for i in range(n):
            d = _dz(_read(zs, at + i, code), _read(negative, i, code), _read(positive, i, code), one, loss)
            _put(out, out_at + i, code, scale * d)
        if weight != 0:
            _multiply(out, out_at, weight, first % weight_period, code, one, n)
        if upstream != 0:
            by, by_at = _floats(upstream, first, z_code, z_room, code, one, n)
            _multiply(out, out_at, by, by_at, code, one, n)
        if ignores:
            _ignore(out, out_at, y, first, y_code, ignored, code, one, n)
        if out != dz:
            _copy(out, out_at, code, dz, first, z_code, one, n)
