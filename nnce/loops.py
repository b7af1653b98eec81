"""The revised algorithm as loops, for small networks on a CPU: one network, example by example.

The same equations as in `nnce.algorithm`, which is the one to read first, in the form in which the
notes have them: for each example forward, the last delta, the deltas below, and for the mini-batch
the steps. Compiled by Numba they need no calls and no arithmetic for inputs of 0, whose terms in z
and dC/dW are 0: of an MNIST image four fifths of the pixels.

A network trained here has bits of its own: they depend on its start, its settings and its order of
the examples, and not on what it is trained beside, on the threads, or on the blocks of steps that
one call makes.

How the numbers lie in memory, and why:

- First-layer weights [n_in + 1, H]: a row an input, so that one input's weights are one run of
  memory. The last row is a dummy, which fills up an example's list of inputs.
- H, and the width of every layer, is n filled up to a multiple of 32, for the processor's wide
  registers. What is filled up is exactly 0 and stays so.
- The layers above: one vector of biases, and one of weights, [n_out, filled-up n_in] each.
- All of it flat, and beginning where a line of the cache does: with rows that lie across lines the
  forward of the first layer took 1.6 times as long.
- Indices are unsigned: a signed one costs a test at each access.

Below, the functions named `_loop_…` are compiled at first use, and cached on disk where that can be
written. They are at the top of the module because Numba caches no others. Two more, `_lanes_…`, are
what the loops do to 32 numbers at once.
"""

import concurrent.futures
import contextlib
import math
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnce import kernels
from nnce.algorithm import Hyperparameters
from nnce.losses import LOSSES
from nnce.modules import MLP

# Rows are filled up to a multiple of this many numbers, and lists of inputs to one of so many.
_LANES = 32
_INPUTS_AT_ONCE = 8
# So many data sets are kept as the loops read them: those to train on and to measure on.
_KEPT = 4
# Examples whose outputs are computed together.
_OUTPUTS_AT_ONCE = 100
# Mini-batches to a call: few, so that Ctrl-C is answered soon and the data of a block are still in
# the cache when the next network walks over them.
_BLOCK_STEPS = 20
# In float32, e^x stays what it is here for any smaller x: below, numbers are subnormal, and slow.
_LEAST = -87.336
# What the compiler may do with sums and products, short of believing that nothing is NaN or ∞.
_FAST = {"contract", "nsz", "reassoc", "arcp"}
# Without "reassoc", which would undo the reduction of x in two parts: 1 unit in the last place
# would be 4.5.
_EXACT = {"contract", "nsz", "arcp"}

DTYPES = (torch.float32, torch.float64)
# Where more of the inputs than this are not 0, all of them are walked over.
DENSE = 0.7

# NumPy, once the loops are compiled; the name is looked up in them then.
np: Any = None


def filled(n: int) -> int:
    """A layer's width in the loops' memory."""
    return -(-n // _LANES) * _LANES


def is_available() -> bool:
    """Whether Numba can compile the loops."""
    return kernels.numba_problem() is None


# ------------------------------------------------------------------------- 32 numbers at once

# Written out for the compiler, which would make the same of a loop over 32 numbers but for a doubt:
# two arrays might be the same memory. It asks at each row anew, and the forward of the first layer
# took 1.4 times as long.


def _lanes_add_row(_: Any, to: Any, t: Any, row: Any, r: Any, x: Any) -> tuple[Any, Any]:
    """add_row(to, t, row, r, x): to[t : t + 32] += x row[r : r + 32], of flat arrays."""
    from numba.core import types

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, t, row, r, x = arguments
        to_type, _, row_type, _, _ = signature.args
        place = _lanes(context, builder, to_type, to, t)
        numbers = builder.load(_lanes(context, builder, row_type, row, r), align=4)
        before = builder.load(place, align=4)
        builder.store(_add_product(builder, before, x, numbers), place, align=4)
        return context.get_dummy_value()

    return types.void(to, t, row, r, x), code


def _lanes_add_rows(
    _: Any,
    to: Any,
    t: Any,
    W: Any,
    h: Any,
    H: Any,
    inputs: Any,
    k: Any,
    values: Any,
    v: Any,
    apart: Any,
) -> tuple[Any, Any]:
    """add_rows(to, t, W, h, H, inputs, k, values, v, apart): eight rows of W, H numbers each.

    to[t : t + 32] += x_j W[i_j H + h : i_j H + h + 32] for j from 0 to 7, where i_j = inputs[k + j]
    and x_j = values[v + apart j].
    """
    from numba.core import types

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, t, W, h, H, inputs, k, values, v, apart = arguments
        to_type, _, W_type, _, _, inputs_type, _, values_type, *_ = signature.args
        place = _lanes(context, builder, to_type, to, t)
        total = builder.load(place, align=4)
        for j in range(_INPUTS_AT_ONCE):
            at = builder.add(k, k.type(j))
            i = builder.zext(builder.load(_item(context, builder, inputs_type, inputs, at)), H.type)
            at = builder.add(v, builder.mul(apart, apart.type(j)))
            x = builder.load(_item(context, builder, values_type, values, at))
            at = builder.add(builder.mul(i, H), h)
            row = builder.load(_lanes(context, builder, W_type, W, at), align=4)
            total = _add_product(builder, total, x, row)
        builder.store(total, place, align=4)
        return context.get_dummy_value()

    return types.void(to, t, W, h, H, inputs, k, values, v, apart), code


def _item(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    """Where a number of an array lies."""
    from numba.core import cgutils

    made = context.make_array(array_type)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, array_type, made, [at], wraparound=False)


def _lanes(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    """Where 32 numbers of an array lie."""
    from llvmlite import ir

    vector = ir.VectorType(context.get_value_type(array_type.dtype), _LANES)
    place = _item(context, builder, array_type, array, at)
    return builder.bitcast(place, vector.as_pointer())


def _add_product(builder: Any, total: Any, x: Any, row: Any) -> Any:
    """total + x row, rounded once where the processor can."""
    from llvmlite import ir

    flags = tuple(sorted(_FAST))
    none = ir.Constant(row.type, ir.Undefined)
    first = builder.insert_element(none, x, ir.IntType(32)(0))
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
    product = builder.fmul(builder.shuffle_vector(first, none, everywhere), row, flags=flags)
    return builder.fadd(total, product, flags=flags)


# ----------------------------------------------------------------------------------- the loops


def _loop_sigmoids(z: Any, a: Any, not_a: Any, at: Any, n: Any) -> None:
    """(1) a = σ(z) and σ(−z) of n numbers from the place `at` on.

    From e = e^(−|z|): the larger of the two is 1 / (1 + e), the smaller one e / (1 + e).
    """
    one = z.dtype.type(1)
    for i in range(at, at + n):
        x = -abs(z[i])
        if z.itemsize == 4:
            least = np.float32(_LEAST)
            x = least if x < least else x  # NaN stays NaN
            # x = k ln 2 + r, and e^x = 2^k e^r, with e^r by a polynomial (Cephes, expf).
            k = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
            r = x - k * np.float32(0.693359375)
            r = r - k * np.float32(-2.12194440e-4)
            p = np.float32(1.9875691500e-4)
            p = p * r + np.float32(1.3981999507e-3)
            p = p * r + np.float32(8.3334519073e-3)
            p = p * r + np.float32(4.1665795894e-2)
            p = p * r + np.float32(1.6666665459e-1)
            p = p * r + np.float32(5.0000001201e-1)
            p = p * (r * r) + (r + one)
            e = p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)
        else:
            e = math.exp(x)
        large = one / (one + e)
        small = e * large
        a[i] = large if z[i] > 0 else small
        not_a[i] = small if z[i] > 0 else large


def _loop_list_inputs(x: Any, starts: Any, inputs: Any, values: Any) -> None:
    """The inputs that are not 0 of each example, and what they are; NaN is one like any other."""
    for e in range(np.uint64(len(x))):
        k = np.uint64(starts[e])
        for i in range(np.uint64(x.shape[1])):
            if x[e, i] != 0:
                inputs[k] = i
                values[k] = x[e, i]
                k += np.uint64(1)


def _loop_read_ahead(rows: Any, starts: Any, inputs: Any, values: Any) -> Any:
    """Look at the examples of a mini-batch, which lie anywhere in memory, here and there.

    None of the reads waits for another, so the processor fetches them all at once; the loops below
    would wait for each example in its turn. What is read is returned lest it be left out.
    """
    seen = values.dtype.type(0)
    for e in range(np.uint64(len(rows))):
        for k in range(
            np.uint64(starts[rows[e]]), np.uint64(starts[rows[e] + np.uint64(1)]), np.uint64(16)
        ):
            seen += values[k] + values.dtype.type(inputs[k])
    return seen


def _loop_first_layer(
    W: Any, b: Any, rows: Any, starts: Any, inputs: Any, values: Any, H: Any, z: Any
) -> None:
    """(1) z = W a_prev + b of the first layer, for the examples of a mini-batch."""
    for e in range(np.uint64(len(rows))):
        for h in range(H):
            z[e * H + h] = b[h]
        for k in range(
            np.uint64(starts[rows[e]]), np.uint64(starts[rows[e] + np.uint64(1)]), np.uint64(8)
        ):
            for h in range(np.uint64(0), H, np.uint64(32)):
                add_rows(z, e * H + h, W, h, H, inputs, k, values, k, np.uint64(1))


def _loop_gather(x: Any, rows: Any, batch: Any) -> None:
    """The rows of a mini-batch of dense inputs, one after the other."""
    n_in = np.uint64(x.shape[1])
    for e in range(np.uint64(len(rows))):
        row = np.uint64(rows[e])
        for i in range(n_in):
            batch[e * n_in + i] = x[row, i]


def _loop_first_layer_dense(W: Any, b: Any, n: Any, every: Any, batch: Any, H: Any, z: Any) -> None:
    """The same for inputs that are hardly ever 0: inputs outside, examples inside.

    every is 0, 1, 2, … up to the number of inputs, or of examples if these are more.
    """
    n_in = np.uint64(len(W)) // H - np.uint64(1)
    whole = n_in - n_in % np.uint64(8)
    for e in range(n):
        for h in range(H):
            z[e * H + h] = b[h]
    for i in range(np.uint64(0), whole, np.uint64(8)):
        for e in range(n):
            for h in range(np.uint64(0), H, np.uint64(32)):
                add_rows(z, e * H + h, W, h, H, every, i, batch, e * n_in + i, np.uint64(1))
    for i in range(whole, n_in):
        for e in range(n):
            for h in range(np.uint64(0), H, np.uint64(32)):
                add_row(z, e * H + h, W, i * H + h, batch[e * n_in + i])


def _loop_forward(z: Any, a: Any, not_a: Any, b: Any, V: Any, n_outs: Any, widths: Any) -> None:
    """(1) z and a of one example, from z of the first layer to z of the last.

    z, a, σ(−z) and b are vectors with a place for each layer, one after the other.
    """
    zero = V.dtype.type(0)
    below, v = np.uint64(0), np.uint64(0)
    for layer in range(np.uint64(1), np.uint64(len(widths))):
        P = np.uint64(widths[layer - np.uint64(1)])
        sigmoids(z, a, not_a, below, P)
        for h in range(np.uint64(n_outs[layer - np.uint64(1)]), P):
            a[below + h] = zero
        at = below + P
        for o in range(np.uint64(n_outs[layer])):
            total = zero
            for h in range(P):
                total += V[v + h] * a[below + h]
            z[at + o] = total + b[at + o]
            v += P
        below = at


def _loop_example(
    z: Any,
    a: Any,
    not_a: Any,
    dz: Any,
    b: Any,
    V: Any,
    n_outs: Any,
    widths: Any,
    y: Any,
    has_sigmoid_prime: Any,
    db: Any,
    dV: Any,
) -> None:
    """One example from z of the first layer on: forward, backward, and its part of (6).

    dz and db are vectors like the forward's; at the end dz of the first layer is in its place.
    """
    zero, one = V.dtype.type(0), V.dtype.type(1)
    L = np.uint64(len(widths))
    forward(z, a, not_a, b, V, n_outs, widths)
    # The last delta.
    at, v = np.uint64(len(b)) - np.uint64(widths[L - np.uint64(1)]), np.uint64(len(V))
    sigmoids(z, a, not_a, at, np.uint64(widths[L - np.uint64(1)]))
    for o in range(np.uint64(widths[L - np.uint64(1)])):
        dz[at + o] = zero
    for o in range(np.uint64(n_outs[L - np.uint64(1)])):
        d = (one - y[o]) * a[at + o] - y[o] * not_a[at + o]  # (5)
        if has_sigmoid_prime:
            d *= a[at + o] * not_a[at + o]  # (4)
        dz[at + o] = d
    # The layers below.
    for up in range(np.uint64(1), L):
        layer = L - up
        P = np.uint64(widths[layer - np.uint64(1)])
        below = at - P
        v -= np.uint64(n_outs[layer]) * P
        for h in range(P):
            dz[below + h] = zero
        w = v
        for o in range(np.uint64(n_outs[layer])):
            for h in range(np.uint64(0), P, np.uint64(32)):
                add_row(dz, below + h, V, w + h, dz[at + o])  # (7)
                add_row(dV, w + h, a, below + h, dz[at + o])  # (6)
            w += P
        for h in range(P):
            dz[below + h] *= a[below + h] * not_a[below + h]  # (8)
        at = below
    for t in range(np.uint64(len(db))):
        db[t] += dz[t]  # (6)


def _loop_update_first_layer(
    W: Any, rows: Any, starts: Any, inputs: Any, values: Any, H: Any, steps: Any
) -> None:
    """(6) and the step of gradient descent: W ← W − lr / n · dz a_prevᵀ.

    steps are −lr / n · dz; W may be the velocity instead.
    """
    for e in range(np.uint64(len(rows))):
        for k in range(np.uint64(starts[rows[e]]), np.uint64(starts[rows[e] + np.uint64(1)])):
            for h in range(np.uint64(0), H, np.uint64(32)):
                add_row(W, inputs[k] * H + h, steps, e * H + h, values[k])


def _loop_update_first_layer_dense(
    W: Any, n: Any, every: Any, batch: Any, H: Any, steps: Any
) -> None:
    """The same for inputs that are hardly ever 0."""
    n_in = np.uint64(len(W)) // H - np.uint64(1)
    whole = n - n % np.uint64(8)
    for i in range(n_in):
        for h in range(np.uint64(0), H, np.uint64(32)):
            for e in range(np.uint64(0), whole, np.uint64(8)):
                add_rows(W, i * H + h, steps, h, H, every, e, batch, e * n_in + i, n_in)
            for e in range(whole, n):
                add_row(W, i * H + h, steps, e * H + h, batch[e * n_in + i])


def _loop_move(value: Any, velocity: Any, momentum: Any, shrink: Any) -> None:
    """The velocity of flat parameters before a gradient: μ u − lr · weight_decay · W."""
    for t in range(np.uint64(len(value))):
        velocity[t] = momentum * velocity[t] + shrink * value[t]


def _loop_decay(value: Any, keep: Any) -> None:
    """What a step leaves of flat weights, 1 − lr · weight_decay."""
    for t in range(np.uint64(len(value))):
        value[t] *= keep


def _loop_outputs(
    W: Any,
    b: Any,
    V: Any,
    n_outs: Any,
    widths: Any,
    starts: Any,
    inputs: Any,
    values: Any,
    x: Any,
    rows: Any,
    batch_size: Any,
    z: Any,
    a: Any,
    not_a: Any,
    batch: Any,
    first_z: Any,
    out: Any,
) -> None:
    """z of the last layer for some examples, a mini-batch at a time."""
    H = np.uint64(widths[0])
    last = len(b) - widths[len(widths) - 1]
    for begin in range(0, len(rows), batch_size):
        some = rows[begin : begin + batch_size]
        n = np.uint64(len(some))
        if len(starts) == 0:
            gather(x, some, batch)
            first_layer_dense(W, b, n, inputs, batch, H, first_z)
        else:
            first_layer(W, b, some, starts, inputs, values, H, first_z)
        for e in range(n):
            for h in range(H):
                z[h] = first_z[e * H + h]
            forward(z, a, not_a, b, V, n_outs, widths)
            for o in range(out.shape[1]):
                out[some[e], o] = z[last + o]


def _loop_train(
    W: Any,
    b: Any,
    V: Any,
    uW: Any,
    ub: Any,
    uV: Any,
    n_outs: Any,
    widths: Any,
    starts: Any,
    inputs: Any,
    values: Any,
    x: Any,
    y: Any,
    order: Any,
    batch_size: Any,
    lr: Any,
    momentum: Any,
    weight_decay: Any,
    has_sigmoid_prime: Any,
    z: Any,
    a: Any,
    not_a: Any,
    dz: Any,
    db: Any,
    dV: Any,
    batch: Any,
    first_z: Any,
) -> None:
    """Steps of gradient descent through the examples of an order, a mini-batch at a time.

    Momentum and decay are `torch.optim.SGD`'s, with velocities u = −lr v; without momentum the
    velocities are empty.
    """
    dense = len(starts) == 0
    moves = len(ub) > 0
    zero, one = V.dtype.type(0), V.dtype.type(1)
    H = np.uint64(widths[0])
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        n = np.uint64(len(rows))
        for t in range(np.uint64(len(db))):
            db[t] = zero
        for t in range(np.uint64(len(dV))):
            dV[t] = zero
        if dense:
            gather(x, rows, batch)
            first_layer_dense(W, b, n, inputs, batch, H, first_z)
        else:
            first_z[0] = read_ahead(rows, starts, inputs, values)  # which is overwritten at once
            first_layer(W, b, rows, starts, inputs, values, H, first_z)
        step = -lr / V.dtype.type(n)
        for e in range(n):
            for h in range(H):
                z[h] = first_z[e * H + h]
            example(z, a, not_a, dz, b, V, n_outs, widths, y[rows[e]], has_sigmoid_prime, db, dV)
            for h in range(H):
                first_z[e * H + h] = step * dz[h]
        # The step; W stands where it is, or its velocity in its place.
        shrink = -lr * weight_decay
        if moves:
            move(W, uW, momentum, shrink)
            move(V, uV, momentum, shrink)
            move(b, ub, momentum, zero)
        elif weight_decay != zero:
            decay(W, one + shrink)
            decay(V, one + shrink)
        target_W, target_V, target_b = (uW, uV, ub) if moves else (W, V, b)
        if dense:
            update_first_layer_dense(target_W, n, inputs, batch, H, first_z)
        else:
            update_first_layer(target_W, rows, starts, inputs, values, H, first_z)
        for t in range(np.uint64(0), np.uint64(len(V)), np.uint64(32)):
            add_row(target_V, t, dV, t, step)
        for t in range(np.uint64(0), np.uint64(len(b)), np.uint64(32)):
            add_row(target_b, t, db, t, step)
        if moves:
            move(uW, W, one, one)
            move(uV, V, one, one)
            move(ub, b, one, one)


# The compiled ones, by the names that the loops call each other by.
add_row: Any = None
add_rows: Any = None
sigmoids: Any = None
read_ahead: Any = None
first_layer: Any = None
gather: Any = None
list_inputs: Any = None
first_layer_dense: Any = None
forward: Any = None
example: Any = None
update_first_layer: Any = None
update_first_layer_dense: Any = None
move: Any = None
decay: Any = None
outputs: Any = None
train: Any = None


def _compile() -> None:
    """Give the loops to Numba, which compiles each at its first call."""
    global np, add_row, add_rows, sigmoids, read_ahead, first_layer, gather
    global list_inputs, first_layer_dense, forward, example
    global update_first_layer, update_first_layer_dense, move, decay, outputs, train
    if train is not None:
        return
    import numpy
    from numba.extending import intrinsic

    from nnce.kernels._numba import njit

    np = numpy
    add_row, add_rows = intrinsic(_lanes_add_row), intrinsic(_lanes_add_rows)

    def compiled(loop: Any, flags: set[str] = _FAST) -> Any:
        return njit(fastmath=flags)(loop)

    sigmoids = compiled(_loop_sigmoids, _EXACT)
    list_inputs, read_ahead = compiled(_loop_list_inputs), compiled(_loop_read_ahead)
    first_layer = compiled(_loop_first_layer)
    gather = compiled(_loop_gather)
    first_layer_dense = compiled(_loop_first_layer_dense)
    forward, example = compiled(_loop_forward), compiled(_loop_example)
    update_first_layer = compiled(_loop_update_first_layer)
    update_first_layer_dense = compiled(_loop_update_first_layer_dense)
    move, decay = compiled(_loop_move), compiled(_loop_decay)
    outputs, train = compiled(_loop_outputs), compiled(_loop_train)


def is_cached() -> bool:
    """Whether an earlier process has left the compiled loops on disk."""
    from nnce.kernels import _numba

    _compile()
    return _numba.is_cached(train)


@contextlib.contextmanager
def _subnormals_are_0() -> Iterator[None]:
    """In this thread. Deltas of saturated neurons are as small, and a hundred times as slow."""
    # Of Python's own numbers: PyTorch's depend on the default dtype and device.
    before = sys.float_info.min / 2 == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP wait for the end of the block.

    Raised inside a compiler's callback they would be lost, and while parameters are written these
    would be of two different steps.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = [
        signal.signal(number, lambda number, frame: came.append(number)) for number in numbers
    ]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    for waiting in came:
        signal.raise_signal(waiting)


# ------------------------------------------------------------------------------------ the data


class Inputs(NamedTuple):
    """Inputs as the loops read them, for all networks."""

    starts: Any
    """Where each example's list of inputs begins, and where the last one ends; empty if dense."""
    inputs: Any
    """The inputs that are not 0, each list filled up to a multiple of 8 with the dummy; 0, 1, 2, …
    if dense."""
    values: Any
    """What they are."""
    x: Any
    """All of them, [N, n_in]; [0, n_in] unless dense."""


def density(x: Tensor) -> float:
    """The share of inputs that are not 0."""
    return int(torch.count_nonzero(x)) / max(1, x.numel())


def make_inputs(x: Tensor, *, dense: bool) -> Inputs:
    """The inputs for the loops: as dense rows, or those that are not 0."""
    import numpy

    x = x.detach()
    n, n_in = x.shape
    whole = x.contiguous().numpy()
    if dense:
        return Inputs(
            starts=numpy.zeros(0, dtype=numpy.int64),
            inputs=numpy.arange(max(n, n_in), dtype=numpy.uint32),
            values=numpy.zeros(0, dtype=whole.dtype),
            x=whole,
        )
    counts = numpy.count_nonzero(whole, axis=1)
    starts = numpy.zeros(n + 1, dtype=numpy.int64)
    numpy.cumsum(-(-counts // _INPUTS_AT_ONCE) * _INPUTS_AT_ONCE, out=starts[1:])
    inputs = numpy.full(starts[-1], n_in, dtype=numpy.uint32)
    values = numpy.zeros(starts[-1], dtype=whole.dtype)
    with _interrupts_wait():  # a first call of a dtype compiles
        _compile()
        list_inputs(whole, starts, inputs, values)
    return Inputs(starts, inputs, values, numpy.zeros((0, n_in), dtype=whole.dtype))


class _Kept:
    """The inputs made of the last tensors, for as long as these are there and unchanged."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[tuple[Any, ...], tuple[Any, Inputs]] = {}

    def get(self, x: Tensor, *, dense: bool) -> Inputs:
        """Those of x, made anew if it is other numbers or has been changed in place."""
        if x.is_inference():  # PyTorch does not say whether it has been changed
            return make_inputs(x, dense=dense)
        # Of views: each slice of a data set is a tensor of its own, but the data set remains.
        whole = x if x._base is None else x._base
        place = (x.storage_offset(), tuple(x.shape), x.stride(), x._version, dense)
        key = (id(whole), *place)
        with self._lock:
            of, made = self._made.pop(key, (lambda: None, None))
            if made is None or of() is not whole:
                made = make_inputs(x, dense=dense)
            self._made[key] = weakref.ref(whole), made  # the last used is last
            for other, (of, _) in list(self._made.items()):
                changed = other[0] == key[0] and other[-2] != x._version
                if of() is None or changed or len(self._made) > _KEPT:
                    del self._made[other]
        return made


# One for all ensembles: a comparison, or a benchmark, has several on the same data.
_kept = _Kept()


# ---------------------------------------------------------------------------------- the networks


class _Network:
    """One network's numbers as the loops want them."""

    def __init__(self, network: MLP, values: Hyperparameters, batch_size: int) -> None:
        import numpy

        loss, lr, momentum, weight_decay = values
        self._pairs = network.weights_and_biases()
        like = self._pairs[0][0].detach()
        n_outs = network.sizes[1:]
        self.widths = [filled(n) for n in n_outs]
        self._n_outs = n_outs

        def zeros(*shape: int) -> Any:
            return like.new_zeros(shape).numpy()  # PyTorch's memory begins with a cache line

        total = sum(self.widths)
        above = sum(n * width for n, width in zip(n_outs[1:], self.widths[:-1], strict=True))
        W, b, V = zeros((network.sizes[0] + 1) * self.widths[0]), zeros(total), zeros(above)
        self._b = b
        velocities = [zeros(len(t) if momentum else 0) for t in (W, b, V)]
        self.moves = bool(momentum)
        self._parameters = (W, b, V, *velocities)
        self._widths = tuple(numpy.array(n, dtype=numpy.int64) for n in (n_outs, self.widths))
        with numpy.errstate(over="ignore"):  # a rate beyond float32 is infinite, as in PyTorch
            step = [W.dtype.type(value) for value in (lr, momentum, weight_decay)]
        self._settings = (*step, LOSSES[loss].has_sigmoid_prime)
        scratch = (zeros(total) for _ in range(5))
        self._scratch = (*scratch, zeros(above))
        self._rooms = [zeros(0), zeros(0)]
        self._batch_size = batch_size

    def train(self, inputs: Inputs, y: Any, order: Any) -> None:
        """Steps through the examples of an order, a whole number of mini-batches but at its end."""
        n = min(self._batch_size, len(order))
        train(
            *(*self._parameters, *self._widths, *inputs, y, order, max(1, n), *self._settings),
            *(*self._scratch, *self._room(inputs, n)),
        )

    def outputs(self, inputs: Inputs, n: int) -> Any:
        """z of the last layer, [n, n_out]."""
        z, a, not_a = self._scratch[:3]
        out = np.empty((n, self._n_outs[-1]), dtype=z.dtype)
        outputs(
            *(*self._parameters[:3], *self._widths, *inputs, np.arange(n), _OUTPUTS_AT_ONCE),
            *(z, a, not_a, *self._room(inputs, _OUTPUTS_AT_ONCE), out),
        )
        return out

    def _room(self, inputs: Inputs, n: int) -> tuple[Any, Any]:
        """For the inputs of so many examples, if they are dense, and for their first z."""
        sizes = (n * inputs.x.shape[1] if len(inputs.x) else 0, n * self.widths[0])
        like = torch.from_numpy(self._b)
        self._rooms = [
            room if len(room) >= size else like.new_zeros(size).numpy()
            for room, size in zip(self._rooms, sizes, strict=True)
        ]
        return self._rooms[0], self._rooms[1]

    def _places(self, *, velocities: bool = False) -> Iterator[tuple[Any, Any]]:
        """W and b of each layer in the loops' memory, [n_out, n_in] and [n_out]; or their v."""
        W, bs, V = self._parameters[3:] if velocities else self._parameters[:3]
        b, v = 0, 0
        width_below = 0
        for layer, (n_out, width) in enumerate(zip(self._n_outs, self.widths, strict=True)):
            bias = bs[b : b + n_out]
            if layer == 0:
                yield W.reshape(-1, width)[:-1, :n_out].T, bias
            else:
                whole = V[v : v + n_out * width_below].reshape(n_out, width_below)
                yield whole[:, : self._n_outs[layer - 1]], bias
                v += n_out * width_below
            b += width
            width_below = width

    def velocities(self) -> list[Any]:
        """Of each parameter, in place; [] without momentum."""
        pairs = self._places(velocities=True) if self.moves else ()
        return [place for pair in pairs for place in pair]

    def take(self) -> None:
        """Read the network's parameters."""
        for pair, places in zip(self._pairs, self._places(), strict=True):
            for parameter, place in zip(pair, places, strict=True):
                place[...] = parameter.detach().numpy()

    def give(self) -> None:
        """Write them, in place."""
        with torch.no_grad():
            for pair, places in zip(self._pairs, self._places(), strict=True):
                for parameter, place in zip(pair, places, strict=True):
                    parameter.copy_(torch.from_numpy(place))


class Loops:
    """Trains networks by loops, each with an order of its own if need be.

    Args:
        networks: MLPs of one shape and dtype, float32 or float64, on the CPU.
        hyperparameters: one for each.
        batch_size: examples in a mini-batch.
        dense: whether inputs are hardly ever 0.
    """

    def __init__(
        self,
        networks: Sequence[MLP],
        hyperparameters: Sequence[Hyperparameters],
        batch_size: int,
        *,
        dense: bool,
    ) -> None:
        """Make the memory, and compile the loops if this is the first use of their dtype."""
        with _interrupts_wait():
            _compile()
        self._dense, self._batch_size = dense, batch_size
        self._networks = [
            _Network(network, values, batch_size)
            for network, values in zip(networks, hyperparameters, strict=True)
        ]

    def train(self, x: Tensor, y: Tensor, orders: Sequence[Tensor], threads: int) -> None:
        """One pass over the training data for each network in its order.

        Args:
            x: inputs [N, n_in].
            y: targets [N, n_out].
            orders: of the examples, one for each network, all of one length.
            threads: how many of the processor's to share the networks out over.
        """
        inputs, targets = _kept.get(x, dense=self._dense), y.detach().contiguous().numpy()
        for network in self._networks:
            network.take()
        jobs = list(zip(self._networks, [order.numpy() for order in orders], strict=True))
        with _interrupts_wait():  # a first call of a dtype compiles
            self._networks[0].train(inputs, targets, jobs[0][1][:0])
        stop = threading.Event()
        try:
            if min(threads, len(jobs)) == 1:
                self._walk(inputs, targets, jobs, stop)
            else:
                self._share_out(inputs, targets, jobs, threads, stop)
        finally:
            with _interrupts_wait():
                for network in self._networks:
                    network.give()

    def velocities(self) -> list[Tensor]:
        """Those of each parameter, [networks, *its shape], 0 where there is none; [] if nowhere."""
        by_network = [network.velocities() for network in self._networks]
        like = next((velocities for velocities in by_network if velocities), [])
        return [
            torch.stack(
                [torch.from_numpy(v[number] if v else np.zeros_like(some)) for v in by_network]
            )
            for number, some in enumerate(like)
        ]

    def set_velocities(self, velocities: Sequence[Tensor]) -> None:
        """Go on with such ones."""
        for r, network in enumerate(self._networks):
            for place, values in zip(network.velocities(), velocities, strict=False):
                place[...] = values[r].numpy()

    def outputs(self, number: int, x: Tensor) -> Tensor:
        """z of the last layer of one network, [n, n_out]; for several at once in several threads.

        Args:
            number: which network.
            x: inputs [n, n_in].
        """
        network = self._networks[number]
        network.take()
        inputs = _kept.get(x, dense=self._dense)
        with _interrupts_wait():  # a first call of a dtype compiles
            return torch.from_numpy(network.outputs(inputs, len(x)))

    def _share_out(
        self,
        inputs: Inputs,
        y: Any,
        jobs: list[tuple[_Network, Any]],
        threads: int,
        stop: threading.Event,
    ) -> None:
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            try:
                walks = [
                    pool.submit(self._walk, inputs, y, jobs[thread::threads], stop)
                    for thread in range(threads)
                ]
                for walk in walks:
                    walk.result()
            finally:
                stop.set()  # after Ctrl-C, say; the blocks under way are finished

    def _walk(
        self, inputs: Inputs, y: Any, jobs: list[tuple[_Network, Any]], stop: threading.Event
    ) -> None:
        """Block by block, so that the data are read once for all of a thread's networks."""
        length = len(jobs[0][1]) if jobs else 0
        size = min(_BLOCK_STEPS * self._batch_size, length)
        with _subnormals_are_0():
            for begin in range(0, length, max(1, size)):
                for network, order in jobs:
                    if stop.is_set():
                        return
                    network.train(inputs, y, order[begin : begin + size])
