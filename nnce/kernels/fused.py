"""Interface to the fused kernels: losses and sigmoid in single passes over z and y.

`forward` computes the value and `backward` computes dC/dz from z and y, so that only these are
saved. `joint` computes both in one pass. The implementation on a CPU is Numba
(`nnce.kernels.losses`) or, if Numba is not installed, PyTorch in chunks that fit the cache
(`nnce.kernels.chunked`); on CUDA it is Triton (`nnce.kernels.triton_losses`).

There is no autograd here, and arguments are not checked: `fits` returns whether the kernels support
tensors that are already known to be plain (`nnce.functional.is_plain`).

Sums are accumulated in float64 over fixed parts of an array, so that results are bit-identical for
any number of threads.
"""

import concurrent.futures
import functools
import math
import os
import threading
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from nnce import kernels
from nnce._torch_private import dispatches_plainly
from nnce.kernels import chunked
from nnce.kernels.chunked import Packed
from nnce.losses import Loss
from nnce.rules import Focus

_PART = 2**16
"""Elements in a part, which is one kernel call and one sum in float64."""
_THREADED = 2**17
"""Smallest number of elements split over threads, which costs about 50 µs."""

_CPU = torch.device("cpu")
_FLOATS = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_TARGETS = {
    **_FLOATS,
    **{torch.bool: "bool", torch.uint8: "uint8", torch.int8: "int8"},
    **{torch.int16: "int16", torch.int32: "int32", torch.int64: "int64"},
}


class Options(NamedTuple):
    """Options of the cross-entropy. The quadratic loss only has ignore_index."""

    weight: Tensor | None = None
    """Multiplies C; of a shape that broadcasts to z's."""
    pos_weight: Tensor | None = None
    """Multiplies the term of y; of a shape that broadcasts to z's."""
    label_smoothing: float = 0
    ignore_index: int | None = None
    """Targets with this value contribute nothing to C and are not counted in a mean."""
    focus: Focus | None = None
    """Makes the cross-entropy a focal loss; CPU only, without pos_weight and label_smoothing."""


_PLAIN = Options()
_PACKED_PLAIN = Packed(None, 0, None, 0, 0.0, 0, False)


def fits(z: Tensor, y: Tensor) -> bool:
    """Whether the kernels support these logits and targets, whose dtypes may differ."""
    return (
        z.dtype in _FLOATS
        and y.dtype in _TARGETS
        and z.shape == y.shape
        and ((z.is_cpu and y.is_cpu) or (z.device == y.device and backend(z) == "triton"))
    )


def has_joint(z: Tensor, y: Tensor | None) -> bool:
    """Whether `joint` runs compiled code on these tensors; includes the checks of `is_plain`."""
    tensors = (z,) if y is None else (z, y)
    return (
        not torch.compiler.is_compiling()  # after a graph break
        and all(t.is_cpu and t.dtype in _TARGETS for t in tensors)
        and dispatches_plainly(tensors)
        and uses_numba()
    )


# -------------------------------------------------------------------------------- the passes


def forward(
    z: Tensor,
    y: Tensor,
    options: Options = _PLAIN,
    reduction: str = "mean",
    loss: Loss = "cross-entropy",
) -> tuple[Tensor, float | Tensor]:
    """Compute a loss, equation 2 or 3.

    Args:
        z: logits, of any shape; float32, float64, float16 or bfloat16.
        y: targets of z's shape, of any of these dtypes, whole numbers or booleans.
        options: weights, smoothing, ignored targets.
        reduction: "none", "sum", "mean" or "batchmean".
        loss: "cross-entropy" or "quadratic".

    Returns:
        C in z's dtype, z's shape for "none", else a scalar; and the divisor of its sum, for
        `backward`: a number, or on CUDA a scalar tensor, which avoids a synchronization.
    """
    z, y = z.contiguous(), y.contiguous()
    if backend(z) == "triton":
        from nnce.kernels import triton_losses

        return triton_losses.forward(z, y, _pack(options, z, y, 0), reduction, loss)
    if reduction == "none":
        C = torch.empty_like(z)
        _values(z, y, C, options, loss)
        return C, 1.0
    total = 0.0
    for part in _values(z, y, None, options, loss):
        total += part
    divisor = _divisor(z, y, options, reduction)
    return _scalar(total / divisor if divisor else math.nan, z.dtype), divisor


def backward(
    z: Tensor,
    y: Tensor,
    options: Options,
    upstream: Tensor,
    divisor: float | Tensor = 1.0,
    loss: Loss = "cross-entropy",
) -> Tensor:
    """Compute the gradient of `forward` with respect to z: equation 4 or 5, times upstream.

    Args:
        z: logits, as in `forward`.
        y: targets, as in `forward`.
        options: as in `forward`.
        upstream: gradient with respect to C, a scalar or of z's shape.
        divisor: as returned by `forward`.
        loss: as in `forward`.

    Returns:
        The gradient, of z's shape and dtype.
    """
    z, y = z.contiguous(), y.contiguous()
    if backend(z) == "triton":
        from nnce.kernels import triton_losses

        return triton_losses.backward(z, y, _pack(options, z, y, 0), upstream, divisor, loss)
    assert not isinstance(divisor, Tensor)
    dz = torch.empty_like(z)
    each = None
    if upstream.dim() == 0:
        scale = upstream.item() / divisor if divisor else math.nan
    elif not any(upstream.stride()) and upstream.numel():  # expanded, by the backward of sum()
        scale = upstream[(0,) * upstream.dim()].item() / divisor
    else:
        scale, each = 1.0, upstream.to(z.dtype).contiguous()
    _gradients(z, y, dz, options, each, scale, loss)
    return dz


def joint(
    z: Tensor,
    y: Tensor | None,
    factor: Tensor,
    options: Options = _PLAIN,
    loss: Loss = "cross-entropy",
) -> Tensor:
    """Compute C of each row and overwrite z by dC/dz, in one pass.

    About 1.6 times as fast as `forward` and `backward`. Used for blocks of labels, whose logits are
    not kept.

    Args:
        z: logits [rows, width], float32 or float64, contiguous; overwritten by factor ∘ dC/dz.
        y: targets [rows, width], with any row stride; None for zeros.
        factor: multiplies dC/dz, [rows].
        options: weights of a shape that broadcasts to [width], smoothing, ignored targets.
        loss: "cross-entropy" or "quadratic".

    Returns:
        The sum of C over each row, without the factor, [rows], float64.
    """
    if y is not None and y.stride(-1) != 1 and z.shape[-1] > 1:
        y = y.contiguous()
    C = z.new_empty(len(z), dtype=torch.float64)
    _joint(z, y, C, factor.to(z.dtype).contiguous(), options, loss)
    return C


def sigmoid_backward(z: Tensor, da: Tensor) -> Tensor:
    """Compute dC/dz = dC/da ∘ σ'(z), equation 8, from z, so that it is exact in saturation."""
    z, da = z.contiguous(), da.contiguous()
    if (chosen := backend(z)) == "triton":
        from nnce.kernels import triton_losses

        return triton_losses.sigmoid_backward(z, da)
    dz = torch.empty_like(z)
    if chosen == "chunked":
        chunked.sigmoid_gradient(z, da, dz)
        return dz
    kernel = _compiled("sigmoid_gradient", "", z.dtype, z.dtype)
    places = z.data_ptr(), da.data_ptr(), dz.data_ptr()
    _in_parts(lambda begin, end: kernel(*places, begin, end, None, None), z.numel())
    return dz


# ------------------------------------------------------------------- the three implementations


def backend(z: Tensor) -> Literal["numba", "chunked", "triton"]:
    """The implementation used on z's device."""
    if z.is_cpu:
        return "numba" if uses_numba() else "chunked"
    return "triton" if z.is_cuda and uses_triton(z.device) else "chunked"


@functools.cache
def uses_numba() -> bool:
    """Whether Numba is used on the CPU (cached)."""
    return kernels.numba_problem() is None


@functools.cache
def uses_triton(device: torch.device) -> bool:
    """Whether Triton is used on a CUDA device (cached)."""
    # Triton does not support older devices, and its code for AMD is not tested here.
    if not torch.version.cuda or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        import triton  # noqa: F401  tests whether it is installed
    except ImportError:
        return False
    return True


@functools.cache
def _compiled(
    kernel: str,
    loss: str,
    z_dtype: torch.dtype,
    y_dtype: torch.dtype | None,
    plain: bool = False,
    wide: bool = False,
) -> Any:
    from nnce.kernels import losses

    y_name = "zeros" if y_dtype is None else _TARGETS[y_dtype]
    return losses.compiled(kernel, loss, _FLOATS[z_dtype], y_name, plain, wide)


def _kernel(
    kernel: str, z: Tensor, y_dtype: torch.dtype | None, packed: Packed, loss: Loss
) -> tuple[Any, tuple[float, ...] | None]:
    """A compiled kernel and, for a focal loss, its numbers."""
    if packed.focus is None:
        return _compiled(kernel, loss, z.dtype, y_dtype, packed is _PACKED_PLAIN), None
    *numbers, alpha = packed.focus
    alphas = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    label = "margin" if packed.focus.margin else "focal"
    wide = _needs_float64(z, packed.focus)
    compiled = _compiled(kernel, label, z.dtype, y_dtype, packed.is_plain, wide)
    return compiled, (*numbers, *alphas)


def _needs_float64(z: Tensor, focus: Focus | None) -> bool:
    """Whether a focal loss of float32 must be computed in float64.

    A power multiplies the error of its base: in float32, results are within 8 units in the last
    place up to γ = 4. For γ = 0 the tolerance is 3 units, as for the cross-entropy.
    """
    return focus is not None and z.dtype == torch.float32 and not 0 < max(focus[:2]) <= 4


def _values(z: Tensor, y: Tensor, C: Tensor | None, options: Options, loss: Loss) -> list[float]:
    """Write C of each element unless C is None, and return the sum of each part."""
    packed = _pack(options, z, y)
    if backend(z) != "numba":
        return chunked.value(z, y, C, packed, loss)
    kernel, focus = _kernel("value", z, y.dtype, packed, loss)
    places = z.data_ptr(), y.data_ptr(), 0 if C is None else C.data_ptr()
    addresses = _addresses(packed)
    return _in_parts(
        lambda begin, end: kernel(*places, begin, end, addresses, focus, None, None, None, None),
        z.numel(),
    )


def _gradients(
    z: Tensor,
    y: Tensor,
    dz: Tensor,
    options: Options,
    upstream: Tensor | None,
    scale: float,
    loss: Loss,
) -> None:
    packed = _pack(options, z, y)
    if backend(z) != "numba":
        chunked.gradient(z, y, dz, packed, upstream, scale, loss)
        return
    kernel, focus = _kernel("gradient", z, y.dtype, packed, loss)
    places = z.data_ptr(), y.data_ptr(), dz.data_ptr()
    each = 0 if upstream is None else upstream.data_ptr()
    addresses = _addresses(packed)
    _in_parts(
        lambda begin, end: kernel(
            *places, begin, end, addresses, focus, each, scale, None, None, None, None
        ),
        z.numel(),
    )


def _joint(
    z: Tensor, y: Tensor | None, C: Tensor, factor: Tensor, options: Options, loss: Loss
) -> None:
    packed = _pack(options, z, z if y is None else y)
    if backend(z) != "numba":  # not implemented for CUDA
        chunked.joint(z, y, C, factor, packed, loss)
        return
    kernel, focus = _kernel("joint", z, None if y is None else y.dtype, packed, loss)
    y_place = (0, 0) if y is None else (y.data_ptr(), y.stride(0))
    places = z.data_ptr(), *y_place, C.data_ptr(), factor.data_ptr()
    rows, width = z.shape
    addresses = _addresses(packed)
    _in_parts(
        lambda begin, end: kernel(
            *places, begin, end, width, addresses, focus, None, None, None, None, None
        ),
        rows,
        size=width,
    )


# -------------------------------------------------------------------------------------- options


def _pack(options: Options, z: Tensor, y: Tensor, block: int | None = None) -> Packed:
    if options is _PLAIN:
        return _PACKED_PLAIN
    weight, pos_weight, label_smoothing, ignore_index, focus = options
    ignored, ignores = _ignored(y.dtype, ignore_index)
    if weight is None and pos_weight is None and not label_smoothing and not ignores:
        return _PACKED_PLAIN if focus is None else _PACKED_PLAIN._replace(focus=focus)
    dtype = torch.promote_types(z.dtype, torch.float32)
    dtype = torch.float64 if _needs_float64(z, focus) else dtype
    return Packed(
        *_repeated(weight, z, block, dtype),
        *_repeated(pos_weight, z, block, dtype),
        float(label_smoothing),
        ignored,
        ignores,
        focus,
    )


def _addresses(packed: Packed) -> tuple[float, ...] | None:
    return None if packed.is_plain else packed.addresses()


def _block(z: Tensor) -> int:
    """Number of elements per block; repeated weights extend over one block."""
    if backend(z) == "numba":
        from nnce.kernels import losses

        return losses.BLOCK
    from nnce.kernels import chunked

    return chunked.BLOCK


def _repeated(
    weight: Tensor | None, z: Tensor, block: int | None, dtype: torch.dtype
) -> tuple[Tensor | None, int]:
    """Return the weights in z's memory order, and the period after which they repeat."""
    if weight is None:
        return None, 0
    weight = weight.detach().to(z.device, dtype)
    while weight.dim() and weight.shape[0] == 1:
        weight = weight[0]
    last = z.shape[z.dim() - weight.dim() :]
    weight = weight.expand(last).reshape(-1)
    period = weight.numel()
    if 0 < period < z.numel() and block != 0:
        needed = period + min(block or _block(z), z.numel() - period)
        weight = weight.repeat(-(-needed // period))
    return weight, period


def _ignored(dtype: torch.dtype, ignore_index: int | None) -> tuple[float, bool]:
    """Return the value to ignore, rounded to y's dtype, and whether this dtype can hold it."""
    if ignore_index is None or dtype is torch.bool:
        return 0, False
    if dtype.is_floating_point:
        return torch.tensor(float(ignore_index), dtype=dtype, device="cpu").item(), True
    limits = torch.iinfo(dtype)
    inside = limits.min <= ignore_index <= limits.max
    return (ignore_index, True) if inside else (0, False)


def _divisor(z: Tensor, y: Tensor, options: Options, reduction: str) -> float:
    """Return the divisor of the sum of C."""
    if reduction == "sum":
        return 1.0
    width = 1 if reduction == "mean" or z.dim() == 0 else z.shape[-1]
    rows = z.numel() if reduction == "mean" else z.shape[:-1].numel()
    if options.ignore_index is None:
        return float(rows)
    ignored, ignores = _ignored(y.dtype, options.ignore_index)
    if not ignores:
        return float(rows)
    if backend(z) != "numba":
        return float((y != ignored).reshape(rows, width).any(-1).sum())
    kernel = _compiled("count", "", z.dtype, y.dtype)
    at = y.data_ptr()
    return float(
        sum(_in_parts(lambda begin, end: kernel(at, begin, end, width, ignored, None), rows, width))
    )


def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    if -65504 <= value <= 65504:
        return torch.scalar_tensor(value, dtype=dtype, device=_CPU)  # for any default device
    large = torch.tensor(value, dtype=torch.float64, device=_CPU)
    return large.to(dtype)  # scalar_tensor() raises if the value overflows


# -------------------------------------------------------------------------------------- threads

_T = TypeVar("_T")
_pool: concurrent.futures.ThreadPoolExecutor | None = None
_pool_size = 0
_lock = threading.Lock()


def _after_fork() -> None:
    """Drop the pool: its threads do not exist in a child process."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _workers(number: int) -> concurrent.futures.ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < number:
            _pool, _pool_size = concurrent.futures.ThreadPoolExecutor(number, "nnce"), number
        return _pool


def _in_parts(task: Callable[[int, int], _T], n: int, size: int = 1) -> list[_T]:
    """Call task(begin, end) for fixed parts of n items; return the results in order.

    Uses torch.get_num_threads() threads if there are many elements; an item has `size` elements.
    The mode for subnormal numbers is per thread, so it is set to that of the caller.
    """
    if n * size <= _PART:
        return [task(0, n)]
    step = max(1, _PART // size)
    parts = [(begin, min(begin + step, n)) for begin in range(0, n, step)]
    threads = min(torch.get_num_threads(), len(parts))
    if threads == 1 or n * size < _THREADED:
        return [task(*part) for part in parts]
    flush = float(torch.tensor(1e-38, dtype=torch.float32, device="cpu") * 0.1) == 0

    def run(mine: list[tuple[int, int]]) -> list[_T]:
        torch.set_flush_denormal(flush)
        return [task(*part) for part in mine]

    share = -(-len(parts) // threads)
    shares = [parts[begin : begin + share] for begin in range(0, len(parts), share)]
    others = [_workers(threads - 1).submit(run, mine) for mine in shares[1:]]
    try:
        results = run(shares[0])
    finally:
        concurrent.futures.wait(others)  # they write to memory that the caller may free
    for other in others:
        results += other.result()
    return results
