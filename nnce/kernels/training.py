"""Training loops: the revised algorithm for one network, example by example.

The equations are those of `nnce.algorithm`, which should be read first: for each example, the
forward pass, the last delta and the hidden deltas; for each mini-batch, the update. Unless inputs
are stored as dense rows, those that are 0 (four fifths of the pixels of an MNIST image) are
skipped, since their terms in z and dC/dW are 0.

Memory layout:

- First-layer weights are [n_in + 1, H], one row per input, so that the weights of one input are
  contiguous. The last row is a dummy that pads the list of an example's inputs.
- H, and the width of every layer, is padded to a multiple of 32, for wide registers. Padding stays
  exactly 0.
- The biases of all layers are one vector. So are the weights of the layers above the first, each
  [n_out, padded n_in].
- Arrays are flat and begin at a cache line: with rows that straddle cache lines, the forward pass
  of the first layer took 1.6 times as long.
- Indices are unsigned: signed ones add a test to each access.
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

Array: TypeAlias = Any  # a NumPy array, or a number; Numba infers the type

LANES = np.uint64(kernels.LANES)
INPUTS_AT_ONCE = np.uint64(kernels.INPUTS_AT_ONCE)
# In float32, x is clamped to this value, below which e^x would be subnormal and slow.
SMALLEST_EXPONENT = -87.336
# All fast-math flags for sums and products that do not assume the absence of NaN and ∞.
_FAST = {"contract", "nsz", "reassoc", "arcp"}
# Without "reassoc", which would undo the two-part reduction of x: the error would be 4.5 units in
# the last place instead of 1.
_EXACT = {"contract", "nsz", "arcp"}


class Layers(NamedTuple):
    """Parameters of one network, and their velocities u = −lr v, empty without momentum."""

    W: Array
    """First-layer weights, [(n_in + 1) H]."""
    b: Array
    """Biases of all layers, concatenated."""
    V: Array
    """Weights of the layers above the first, concatenated."""
    uW: Array
    ub: Array
    uV: Array
    n_outs: Array
    """Number of neurons of each layer."""
    widths: Array
    """Padded width of each layer."""


class Inputs(NamedTuple):
    """Inputs of all examples: dense rows, or lists of nonzero inputs."""

    starts: Array
    """Position at which the list of each example begins, and the end of the last; empty if
    dense."""
    indices: Array
    """Indices of nonzero inputs, each list padded to a multiple of 8 with the dummy; if dense, 0,
    1, 2, …, as many as inputs or examples, whichever is more."""
    values: Array
    """Values of the inputs at `indices`; empty if dense."""
    x: Array
    """Dense rows, [N, n_in]; [0, n_in] with lists."""


class Scratch(NamedTuple):
    """Memory for intermediate results, overwritten by each call."""

    z: Array
    """z of one example, all layers concatenated; a, not_a, dz and db have the same layout."""
    a: Array
    not_a: Array
    """σ(−z)."""
    dz: Array
    db: Array
    """Sum of dz over a mini-batch."""
    dV: Array
    """Sum of dC/dW of the layers above the first over a mini-batch, in the layout of V."""
    batch: Array
    """Rows of a mini-batch, if inputs are dense."""
    first_z: Array
    """z of the first layer for a mini-batch, then overwritten by its dz times −lr / n."""


class Rules(NamedTuple):
    """The update rule of a network; momentum and weight decay as in `torch.optim.SGD`."""

    batch_size: int
    lr: Array
    momentum: Array
    weight_decay: Array
    has_sigmoid_prime: bool


# ------------------------------------------------------------------------- 32 numbers at once

# Written as LLVM code, because the compiler would test for overlapping arrays at each row of a loop
# over 32 numbers, which makes the forward pass of the first layer 1.4 times as long. Whole arrays
# are passed, each followed by its offsets, because a slice would create a new object.

_intrinsic: Callable[[Callable[..., Any]], Any] = extending.intrinsic


@_intrinsic
def _add_row(_: Any, to: Any, t: Any, row: Any, r: Any, x: Any) -> tuple[Any, Any]:
    """Scaled addition of 32 numbers: to[t : t + 32] += x row[r : r + 32], for flat arrays."""

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
    """Scaled addition of 32 columns of eight rows of W, which have H numbers each.

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
    """The address of an element of an array."""
    made = context.make_array(array_type)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, array_type, made, [at], wraparound=False)


def _lanes(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    """The address of 32 numbers of an array, as one vector."""
    vector = ir.VectorType(context.get_value_type(array_type.dtype), kernels.LANES)
    place = _item(context, builder, array_type, array, at)
    return builder.bitcast(place, vector.as_pointer())


def _add_product(builder: Any, total: Any, x: Any, row: Any) -> Any:
    """total + x row, as a fused multiply-add if the processor has it."""
    flags = tuple(sorted(_FAST))
    undefined = ir.Constant(row.type, ir.Undefined)
    first = builder.insert_element(undefined, x, ir.IntType(32)(0))
    all_lanes = ir.Constant(ir.VectorType(ir.IntType(32), kernels.LANES), [0] * kernels.LANES)
    product = builder.fmul(builder.shuffle_vector(first, undefined, all_lanes), row, flags=flags)
    return builder.fadd(total, product, flags=flags)


# ------------------------------------------------------------------------------ forward, backward


@njit(fastmath=_EXACT)
def _sigmoids(z: Array, a: Array, not_a: Array, at: Array, n: Array) -> None:
    """(1) Compute a = σ(z) and σ(−z) for n numbers, starting at index `at`.

    With e = e^(−|z|), the larger of the two is 1 / (1 + e), and the smaller is e / (1 + e).
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
    """Prefetch the examples of a mini-batch, which are scattered over memory, by reading parts.

    These reads are independent, so the processor runs them concurrently; the loops below would wait
    for one example after the other. The sum is returned only so that the compiler does not remove
    the reads.
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
    """(1) Compute z = W a_prev + b of the first layer for the examples of a mini-batch."""
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
    """Copy the rows of a mini-batch from dense inputs."""
    n_in = np.uint64(x.shape[1])
    for e in range(np.uint64(len(rows))):
        row = np.uint64(rows[e])
        for i in range(n_in):
            batch[e * n_in + i] = x[row, i]


@njit(fastmath=_FAST)
def _first_layer_dense(layers: Array, every: Array, n: Array, batch: Array, z: Array) -> None:
    """(1) Compute z of the first layer for n dense examples, with inputs in the outer loop.

    every is 0, 1, 2, … (`Inputs.indices`).
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
    """(1) Compute z and a of one example, from z of the first layer to z of the last."""
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
    """Add one example's gradients (6) to scratch.db and scratch.dV, given z of the first layer.

    On return, dz of the first layer is at the beginning of scratch.dz.
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


# ------------------------------------------------------------------------------------- the update


@njit(fastmath=_FAST)
def _update_first_layer(W: Array, H: Array, inputs: Array, rows: Array, steps: Array) -> None:
    """(6) Gradient descent for a mini-batch: W ← W − lr / n · dz a_prevᵀ.

    steps is −lr / n · dz of the first layer; W may be the velocity instead.
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
    """(6) Gradient descent for a mini-batch of n dense examples."""
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
    """velocity ← momentum · velocity + shrink · value, for flat parameters.

    With shrink = −lr · weight_decay, the velocity before the gradient is added.
    """
    for t in range(np.uint64(len(value))):
        velocity[t] = momentum * velocity[t] + shrink * value[t]


@njit(fastmath=_FAST)
def _decay(value: Array, keep: Array) -> None:
    """Multiply flat weights by keep = 1 − lr · weight_decay."""
    for t in range(np.uint64(len(value))):
        value[t] *= keep


@njit(fastmath=_FAST)
def _descend(
    layers: Array, inputs: Array, scratch: Array, rows: Array, rules: Array, step: Array
) -> None:
    """Update the parameters by step = −lr / n times the sums over a mini-batch in scratch.

    With momentum the gradients are added to the velocities, otherwise to the parameters.
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


# ------------------------------------------------------------------------- called by the engine


@njit(fastmath=_FAST)
def list_inputs(x: Array, starts: Array, indices: Array, values: Array) -> None:
    """Fill the lists of `Inputs` from dense rows x. NaN counts as nonzero."""
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
    """Compute z of the last layer for the examples in rows, a mini-batch at a time."""
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
    """Take a step of gradient descent for each mini-batch of an order."""
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
            first_z[0] = _read_ahead(inputs, rows)  # overwritten by the next line
            first_layer(layers, inputs, rows, first_z)
        step = -rules.lr / layers.V.dtype.type(n)
        for e in range(n):
            for h in range(H):
                z[h] = first_z[e * H + h]
            _forward_backward(layers, scratch, y[rows[e]], rules.has_sigmoid_prime)
            for h in range(H):
                first_z[e * H + h] = step * dz[h]
        _descend(layers, inputs, scratch, rows, rules, step)
