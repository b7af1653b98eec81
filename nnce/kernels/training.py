"""Training loops: the revised algorithm for one network, example by example.

The equations are those of `nnce.algorithm`, which is the one to read first, in the form of the
notes: for each example forward, the last delta and the deltas below; for each mini-batch the step.
Inputs of 0 take no time, because their terms in z and dC/dW are 0: four fifths of the pixels of an
MNIST image.

Memory layout, and the reasons for it:

- First-layer weights are [n_in + 1, H], a row for each input, so that the weights of one input are
  contiguous. The last row is a dummy that pads the list of an example's inputs.
- H, and the width of every layer, is padded to a multiple of 32, for wide registers. Padding is
  exactly 0 and stays so.
- The layers above have one vector of biases and one of weights, [n_out, padded n_in] each.
- Everything is flat and begins at a cache line: with rows that straddle lines the forward pass of
  the first layer took 1.6 times as long.
- Indices are unsigned: a signed one costs a test at each access.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from llvmlite import ir
from numba import extending
from numba.core import cgutils, types

from nnce import kernels
from nnce.kernels._numba import njit

Array: TypeAlias = Any  # a NumPy array, or a number: Numba has types of its own

LANES = np.uint64(kernels.LANES)
INPUTS_AT_ONCE = np.uint64(kernels.INPUTS_AT_ONCE)
# In float32, e^x is constant below this x, where it would become subnormal and slow.
SMALLEST_EXPONENT = -87.336
# What LLVM may do with sums and products, short of assuming that nothing is NaN or ∞.
_FAST = {"contract", "nsz", "reassoc", "arcp"}
# Without "reassoc", which would undo the reduction of x in two parts: errors of 4.5 units in the
# last place instead of 1.
_EXACT = {"contract", "nsz", "arcp"}


class Layers(NamedTuple):
    """Parameters of one network, and their velocities u = −lr v, empty without momentum."""

    W: Array
    """First-layer weights, [(n_in + 1) H]."""
    b: Array
    """Biases of all layers, one after the other."""
    V: Array
    """Weights of the layers above."""
    uW: Array
    ub: Array
    uV: Array
    n_outs: Array
    """Neurons of each layer."""
    widths: Array
    """The same, padded."""


class Inputs(NamedTuple):
    """Inputs of all examples: dense rows, or lists of those that are not 0."""

    starts: Array
    """Where the list of each example begins, and where the last one ends; empty if dense."""
    indices: Array
    """Inputs that are not 0, each list padded to a multiple of 8 with the dummy; if dense, 0, 1,
    2, … up to the number of inputs, or of examples if these are more."""
    values: Array
    """Their values."""
    x: Array
    """Dense rows, [N, n_in]; [0, n_in] if there are lists."""


class Scratch(NamedTuple):
    """Memory for intermediate results, overwritten by each call."""

    z: Array
    """Of one example, all layers one after the other; a, σ(−z), dz and db have the same layout."""
    a: Array
    not_a: Array
    dz: Array
    db: Array
    """The sum of dz over a mini-batch."""
    dV: Array
    batch: Array
    """Rows of a mini-batch, if inputs are dense."""
    first_z: Array
    """z of the first layer for a mini-batch; then its dz times the step."""


class Rules(NamedTuple):
    """The rule by which the parameters of a network change; momentum and decay as in SGD."""

    batch_size: int
    lr: Array
    momentum: Array
    weight_decay: Array
    has_sigmoid_prime: bool


# ------------------------------------------------------------------------- 32 numbers at once

# Written as LLVM code because the compiler, given a loop over 32 numbers, allows for arrays that
# overlap: it tests that at each row, and the forward pass of the first layer takes 1.4 times as
# long. Arrays are passed whole, each followed by offsets, because a slice is a new object.

_intrinsic: Callable[[Callable[..., Any]], Any] = extending.intrinsic


@_intrinsic
def _add_row(_: Any, to: Any, t: Any, row: Any, r: Any, x: Any) -> tuple[Any, Any]:
    """to[t : t + 32] += x row[r : r + 32], of flat arrays."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, t, row, r, x = arguments
        to_type, _, row_type, _, _ = signature.args
        place = _lanes(context, builder, to_type, to, t)
        numbers = builder.load(_lanes(context, builder, row_type, row, r), align=4)
        before = builder.load(place, align=4)
        builder.store(_add_product(builder, before, x, numbers), place, align=4)
        return context.get_dummy_value()

    return types.void(to, t, row, r, x), code


@_intrinsic
def _add_rows(  # noqa: PLR0913  an intrinsic takes each pointer and index by itself
    _: Any,
    to: Any,
    t: Any,
    W: Any,
    h: Any,
    H: Any,
    indices: Any,
    k: Any,
    values: Any,
    v: Any,
    stride: Any,
) -> tuple[Any, Any]:
    """Add eight rows of W, H numbers each, to 32 numbers.

    to[t : t + 32] += x_j W[i_j H + h : i_j H + h + 32] for j from 0 to 7, where
    i_j = indices[k + j] and x_j = values[v + stride j].
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, t, W, h, H, indices, k, values, v, stride = arguments
        to_type, _, W_type, _, _, indices_type, _, values_type, *_ = signature.args
        place = _lanes(context, builder, to_type, to, t)
        total = builder.load(place, align=4)
        for j in range(kernels.INPUTS_AT_ONCE):
            at = builder.add(k, k.type(j))
            i = builder.load(_item(context, builder, indices_type, indices, at))
            i = builder.zext(i, H.type)
            at = builder.add(v, builder.mul(stride, stride.type(j)))
            x = builder.load(_item(context, builder, values_type, values, at))
            at = builder.add(builder.mul(i, H), h)
            row = builder.load(_lanes(context, builder, W_type, W, at), align=4)
            total = _add_product(builder, total, x, row)
        builder.store(total, place, align=4)
        return context.get_dummy_value()

    return types.void(to, t, W, h, H, indices, k, values, v, stride), code


def _item(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    """The address of a number of an array."""
    made = context.make_array(array_type)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, array_type, made, [at], wraparound=False)


def _lanes(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    """The address of 32 numbers of an array, as one vector."""
    vector = ir.VectorType(context.get_value_type(array_type.dtype), kernels.LANES)
    place = _item(context, builder, array_type, array, at)
    return builder.bitcast(place, vector.as_pointer())


def _add_product(builder: Any, total: Any, x: Any, row: Any) -> Any:
    """total + x row, rounded once where the processor can."""
    flags = tuple(sorted(_FAST))
    undefined = ir.Constant(row.type, ir.Undefined)
    first = builder.insert_element(undefined, x, ir.IntType(32)(0))
    all_lanes = ir.Constant(ir.VectorType(ir.IntType(32), kernels.LANES), [0] * kernels.LANES)
    product = builder.fmul(builder.shuffle_vector(first, undefined, all_lanes), row, flags=flags)
    return builder.fadd(total, product, flags=flags)


# ------------------------------------------------------------------------------ forward, backward


@njit(fastmath=_EXACT)
def _sigmoids(z: Array, a: Array, not_a: Array, at: Array, n: Array) -> None:
    """(1) a = σ(z) and σ(−z) of n numbers, beginning with number `at`.

    With e = e^(−|z|) the larger of the two is 1 / (1 + e), the smaller e / (1 + e).
    """
    one = z.dtype.type(1)
    for i in range(at, at + n):
        x = -abs(z[i])
        if z.itemsize == 4:
            least = np.float32(SMALLEST_EXPONENT)
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


@njit(fastmath=_FAST)
def _read_ahead(inputs: Array, rows: Array) -> Array:
    """Read a little of each example of a mini-batch; they are scattered over memory.

    None of these reads waits for another, so the processor fetches them all at once; the loops
    below would wait for one example after the other. The sum of what is read is returned so that
    the compiler keeps the reads.
    """
    starts, indices, values = inputs.starts, inputs.indices, inputs.values
    seen = values.dtype.type(0)
    for e in range(np.uint64(len(rows))):
        for k in range(
            np.uint64(starts[rows[e]]), np.uint64(starts[rows[e] + np.uint64(1)]), np.uint64(16)
        ):
            seen += values[k] + values.dtype.type(indices[k])
    return seen


@njit(fastmath=_FAST)
def first_layer(layers: Array, inputs: Array, rows: Array, z: Array) -> None:
    """(1) z = W a_prev + b of the first layer, for the examples of a mini-batch."""
    W, b, H = layers.W, layers.b, np.uint64(layers.widths[0])
    starts, indices, values = inputs.starts, inputs.indices, inputs.values
    for e in range(np.uint64(len(rows))):
        for h in range(H):
            z[e * H + h] = b[h]
        for k in range(
            np.uint64(starts[rows[e]]), np.uint64(starts[rows[e] + np.uint64(1)]), INPUTS_AT_ONCE
        ):
            for h in range(np.uint64(0), H, LANES):
                _add_rows(z, e * H + h, W, h, H, indices, k, values, k, np.uint64(1))


@njit(fastmath=_FAST)
def _gather(x: Array, rows: Array, batch: Array) -> None:
    """Copy the rows of a mini-batch of dense inputs."""
    n_in = np.uint64(x.shape[1])
    for e in range(np.uint64(len(rows))):
        row = np.uint64(rows[e])
        for i in range(n_in):
            batch[e * n_in + i] = x[row, i]


@njit(fastmath=_FAST)
def _first_layer_dense(layers: Array, every: Array, n: Array, batch: Array, z: Array) -> None:
    """(1) z of the first layer for n dense examples: inputs in the outer loop, examples inside.

    every is 0, 1, 2, … (see `Inputs`).
    """
    W, b, H = layers.W, layers.b, np.uint64(layers.widths[0])
    n_in = np.uint64(len(W)) // H - np.uint64(1)
    whole = n_in - n_in % INPUTS_AT_ONCE
    for e in range(n):
        for h in range(H):
            z[e * H + h] = b[h]
    for i in range(np.uint64(0), whole, INPUTS_AT_ONCE):
        for e in range(n):
            for h in range(np.uint64(0), H, LANES):
                _add_rows(z, e * H + h, W, h, H, every, i, batch, e * n_in + i, np.uint64(1))
    for i in range(whole, n_in):
        for e in range(n):
            for h in range(np.uint64(0), H, LANES):
                _add_row(z, e * H + h, W, i * H + h, batch[e * n_in + i])


@njit(fastmath=_FAST)
def _forward(layers: Array, scratch: Array) -> None:
    """(1) z and a of one example, from z of the first layer to z of the last."""
    z, a, b, V = scratch.z, scratch.a, layers.b, layers.V
    n_outs, widths = layers.n_outs, layers.widths
    zero = V.dtype.type(0)
    below, v = np.uint64(0), np.uint64(0)
    for layer in range(np.uint64(1), np.uint64(len(widths))):
        P = np.uint64(widths[layer - np.uint64(1)])
        _sigmoids(z, a, scratch.not_a, below, P)
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


@njit(fastmath=_FAST)
def _forward_backward(layers: Array, scratch: Array, y: Array, has_sigmoid_prime: Array) -> None:
    """Add one example's part of (6), given z of the first layer.

    At the end dz of the first layer is at the beginning of scratch.dz.
    """
    z, a, not_a, dz = scratch.z, scratch.a, scratch.not_a, scratch.dz
    db, dV = scratch.db, scratch.dV
    V, n_outs, widths = layers.V, layers.n_outs, layers.widths
    zero, one = V.dtype.type(0), V.dtype.type(1)
    L = np.uint64(len(widths))
    _forward(layers, scratch)
    # The last delta.
    at, v = np.uint64(len(db)) - np.uint64(widths[L - np.uint64(1)]), np.uint64(len(V))
    _sigmoids(z, a, not_a, at, np.uint64(widths[L - np.uint64(1)]))
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
            for h in range(np.uint64(0), P, LANES):
                _add_row(dz, below + h, V, w + h, dz[at + o])  # (7)
                _add_row(dV, w + h, a, below + h, dz[at + o])  # (6)
            w += P
        for h in range(P):
            dz[below + h] *= a[below + h] * not_a[below + h]  # (8)
        at = below
    for t in range(np.uint64(len(db))):
        db[t] += dz[t]  # (6)


# --------------------------------------------------------------------------------------- the step


@njit(fastmath=_FAST)
def _update_first_layer(W: Array, H: Array, inputs: Array, rows: Array, steps: Array) -> None:
    """(6) and gradient descent for a mini-batch: W ← W − lr / n · dz a_prevᵀ.

    steps are −lr / n · dz of the first layer; W may be its velocity instead.
    """
    starts, indices, values = inputs.starts, inputs.indices, inputs.values
    for e in range(np.uint64(len(rows))):
        for k in range(np.uint64(starts[rows[e]]), np.uint64(starts[rows[e] + np.uint64(1)])):
            for h in range(np.uint64(0), H, LANES):
                _add_row(W, indices[k] * H + h, steps, e * H + h, values[k])


@njit(fastmath=_FAST)
def _update_first_layer_dense(
    W: Array, H: Array, every: Array, n: Array, batch: Array, steps: Array
) -> None:
    """(6) and gradient descent for a mini-batch of n dense examples."""
    n_in = np.uint64(len(W)) // H - np.uint64(1)
    whole = n - n % INPUTS_AT_ONCE
    for i in range(n_in):
        for h in range(np.uint64(0), H, LANES):
            for e in range(np.uint64(0), whole, INPUTS_AT_ONCE):
                _add_rows(W, i * H + h, steps, h, H, every, e, batch, e * n_in + i, n_in)
            for e in range(whole, n):
                _add_row(W, i * H + h, steps, e * H + h, batch[e * n_in + i])


@njit(fastmath=_FAST)
def _move(value: Array, velocity: Array, momentum: Array, shrink: Array) -> None:
    """Velocity of flat parameters before the gradient is added: μ u − lr · weight_decay · W."""
    for t in range(np.uint64(len(value))):
        velocity[t] = momentum * velocity[t] + shrink * value[t]


@njit(fastmath=_FAST)
def _decay(value: Array, keep: Array) -> None:
    """Multiply flat weights by 1 − lr · weight_decay."""
    for t in range(np.uint64(len(value))):
        value[t] *= keep


@njit(fastmath=_FAST)
def _descend(
    layers: Array, inputs: Array, scratch: Array, rows: Array, rules: Array, step: Array
) -> None:
    """Change the parameters by step = −lr / n times the sums over a mini-batch in scratch.

    The gradient is added to the velocities with momentum, else to the parameters themselves.
    """
    W, b, V, uW, ub, uV = layers.W, layers.b, layers.V, layers.uW, layers.ub, layers.uV
    zero, one = V.dtype.type(0), V.dtype.type(1)
    moves = len(ub) > 0
    n, H = np.uint64(len(rows)), np.uint64(layers.widths[0])
    shrink = -rules.lr * rules.weight_decay
    if moves:
        _move(W, uW, rules.momentum, shrink)
        _move(V, uV, rules.momentum, shrink)
        _move(b, ub, rules.momentum, zero)
    elif rules.weight_decay != zero:
        _decay(W, one + shrink)
        _decay(V, one + shrink)
    target_W, target_V, target_b = (uW, uV, ub) if moves else (W, V, b)
    if len(inputs.starts) == 0:
        _update_first_layer_dense(target_W, H, inputs.indices, n, scratch.batch, scratch.first_z)
    else:
        _update_first_layer(target_W, H, inputs, rows, scratch.first_z)
    for t in range(np.uint64(0), np.uint64(len(V)), LANES):
        _add_row(target_V, t, scratch.dV, t, step)
    for t in range(np.uint64(0), np.uint64(len(b)), LANES):
        _add_row(target_b, t, scratch.db, t, step)
    if moves:
        _move(uW, W, one, one)
        _move(uV, V, one, one)
        _move(ub, b, one, one)


# ----------------------------------------------------------------------- called by the engine


@njit(fastmath=_FAST)
def list_inputs(x: Array, starts: Array, indices: Array, values: Array) -> None:
    """Fill the lists of `Inputs` from dense rows x. NaN is not 0."""
    for e in range(np.uint64(len(x))):
        k = np.uint64(starts[e])
        for i in range(np.uint64(x.shape[1])):
            if x[e, i] != 0:
                indices[k] = i
                values[k] = x[e, i]
                k += np.uint64(1)


@njit(fastmath=_FAST)
def outputs(
    layers: Array, inputs: Array, scratch: Array, rows: Array, batch_size: Array, out: Array
) -> None:
    """z of the last layer for some examples, a mini-batch at a time."""
    H = np.uint64(layers.widths[0])
    first_z, z = scratch.first_z, scratch.z
    last = len(layers.b) - layers.widths[len(layers.widths) - 1]
    for begin in range(0, len(rows), batch_size):
        some = rows[begin : begin + batch_size]
        n = np.uint64(len(some))
        if len(inputs.starts) == 0:
            _gather(inputs.x, some, scratch.batch)
            _first_layer_dense(layers, inputs.indices, n, scratch.batch, first_z)
        else:
            first_layer(layers, inputs, some, first_z)
        for e in range(n):
            for h in range(H):
                z[h] = first_z[e * H + h]
            _forward(layers, scratch)
            for o in range(out.shape[1]):
                out[some[e], o] = z[last + o]


@njit(fastmath=_FAST)
def train(
    layers: Array, inputs: Array, scratch: Array, y: Array, order: Array, rules: Array
) -> None:
    """Steps of gradient descent through the examples of an order, a mini-batch at a time."""
    zero = layers.V.dtype.type(0)
    H = np.uint64(layers.widths[0])
    z, dz, db, dV, first_z = scratch.z, scratch.dz, scratch.db, scratch.dV, scratch.first_z
    for begin in range(0, len(order), rules.batch_size):
        rows = order[begin : begin + rules.batch_size]
        n = np.uint64(len(rows))
        for t in range(np.uint64(len(db))):
            db[t] = zero
        for t in range(np.uint64(len(dV))):
            dV[t] = zero
        if len(inputs.starts) == 0:
            _gather(inputs.x, rows, scratch.batch)
            _first_layer_dense(layers, inputs.indices, n, scratch.batch, first_z)
        else:
            first_z[0] = _read_ahead(inputs, rows)  # overwritten at once
            first_layer(layers, inputs, rows, first_z)
        step = -rules.lr / layers.V.dtype.type(n)
        for e in range(n):
            for h in range(H):
                z[h] = first_z[e * H + h]
            _forward_backward(layers, scratch, y[rows[e]], rules.has_sigmoid_prime)
            for h in range(H):
                first_z[e * H + h] = step * dz[h]
        _descend(layers, inputs, scratch, rows, rules, step)
