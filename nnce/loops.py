"""The revised algorithm as loops, for small networks on a CPU: one network, example by example.

The same equations as in `nnce.algorithm`, which is the one to read first, in the form in which the
notes have them: for each example forward, the last delta, the deltas below, and for the mini-batch
the steps. Compiled by Numba they need no calls and no arithmetic for inputs of 0, whose terms in z
and dC/dW are 0: of an MNIST image four fifths of the pixels.

A network trained here has bits of its own: they depend on its start, its settings and its order of
the examples, and not on what it is trained beside, on the threads, or on the blocks of steps that
one call makes.

How the numbers lie in memory, and why:

- First-layer weights [n_in + 2, H]: a row an input, so that one input's weights are one run of
  memory. The last two rows are dummies, which fill up an example's list of inputs by turns: no two
  neighbours in a list are the same row.
- H, and the width of every layer, is n filled up to a multiple of 32, for the processor's wide
  registers. What is filled up is exactly 0 and stays so.
- The layers above: one vector of biases, and one of weights, [n_out, filled-up n_in] each.
- Indices are unsigned: a signed one costs a test at each access.

Below, the functions named `_loop_…` are compiled at first use, and cached on disk where that can be
written. They are at the top of the module because Numba caches no others.
"""

import concurrent.futures
import contextlib
import importlib.util
import math
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnce.algorithm import Hyperparameters
from nnce.losses import LOSSES
from nnce.modules import MLP

# Rows are filled up to a multiple of this many numbers, and lists of inputs to one of so many.
_LANES = 32
_INPUTS_AT_ONCE = 4
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
DENSE = 0.5

# NumPy, once the loops are compiled; the name is looked up in them then.
np: Any = None


def is_available() -> bool:
    """Whether Numba is there to compile the loops."""
    return importlib.util.find_spec("numba") is not None


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
    W: Any, b: Any, rows: Any, starts: Any, inputs: Any, values: Any, z: Any
) -> None:
    """(1) z = W a_prev + b of the first layer, for the examples of a mini-batch."""
    H = np.uint64(W.shape[1])
    for e in range(np.uint64(len(rows))):
        for h in range(H):
            z[e, h] = b[h]
        k, end = np.uint64(starts[rows[e]]), np.uint64(starts[rows[e] + np.uint64(1)])
        # Eight inputs a pass over z, and four if so many are left.
        while k + np.uint64(4) < end:
            i0, i1 = inputs[k], inputs[k + np.uint64(1)]
            x0, x1 = values[k], values[k + np.uint64(1)]
            k += np.uint64(2)
            i2, i3 = inputs[k], inputs[k + np.uint64(1)]
            x2, x3 = values[k], values[k + np.uint64(1)]
            k += np.uint64(2)
            i4, i5 = inputs[k], inputs[k + np.uint64(1)]
            x4, x5 = values[k], values[k + np.uint64(1)]
            k += np.uint64(2)
            i6, i7 = inputs[k], inputs[k + np.uint64(1)]
            x6, x7 = values[k], values[k + np.uint64(1)]
            k += np.uint64(2)
            for h in range(H):
                z[e, h] += (x0 * W[i0, h] + x1 * W[i1, h] + x2 * W[i2, h] + x3 * W[i3, h]) + (
                    x4 * W[i4, h] + x5 * W[i5, h] + x6 * W[i6, h] + x7 * W[i7, h]
                )
        if k < end:
            i0, i1 = inputs[k], inputs[k + np.uint64(1)]
            x0, x1 = values[k], values[k + np.uint64(1)]
            k += np.uint64(2)
            i2, i3 = inputs[k], inputs[k + np.uint64(1)]
            x2, x3 = values[k], values[k + np.uint64(1)]
            for h in range(H):
                z[e, h] += x0 * W[i0, h] + x1 * W[i1, h] + x2 * W[i2, h] + x3 * W[i3, h]


def _loop_first_layer_dense(W: Any, b: Any, rows: Any, x: Any, z: Any) -> None:
    """The same for inputs that are hardly ever 0: inputs outside, examples inside."""
    H = np.uint64(W.shape[1])
    n = np.uint64(len(rows))
    n_in = np.uint64(x.shape[1])
    whole = n_in - n_in % np.uint64(4)
    for e in range(n):
        for h in range(H):
            z[e, h] = b[h]
    for i in range(np.uint64(0), whole, np.uint64(4)):
        j, k, m = i + np.uint64(1), i + np.uint64(2), i + np.uint64(3)
        for e in range(n):
            x0, x1, x2, x3 = x[rows[e], i], x[rows[e], j], x[rows[e], k], x[rows[e], m]
            for h in range(H):
                z[e, h] += x0 * W[i, h] + x1 * W[j, h] + x2 * W[k, h] + x3 * W[m, h]
    for i in range(whole, n_in):
        for e in range(n):
            x0 = x[rows[e], i]
            for h in range(H):
                z[e, h] += x0 * W[i, h]


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

    z, a, σ(−z), dz, b and db are vectors with a place for each layer, one after the other; at the
    end dz of the first layer is in its place.
    """
    zero, one = V.dtype.type(0), V.dtype.type(1)
    L = np.uint64(len(widths))
    # Forward.
    sigmoids(z, a, not_a, np.uint64(0), np.uint64(widths[0]))
    below, v = np.uint64(0), np.uint64(0)
    for layer in range(np.uint64(1), L):
        P, Q = np.uint64(widths[layer - np.uint64(1)]), np.uint64(widths[layer])
        for h in range(np.uint64(n_outs[layer - np.uint64(1)]), P):
            a[below + h] = zero
        at = below + P
        for o in range(np.uint64(n_outs[layer])):
            total = zero
            for h in range(P):
                total += V[v + h] * a[below + h]
            z[at + o] = total + b[at + o]  # (1)
            v += P
        sigmoids(z, a, not_a, at, Q)
        below = at
    # The last delta.
    at = below
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
            d = dz[at + o]
            for h in range(P):
                dz[below + h] += V[w + h] * d  # (7)
                dV[w + h] += d * a[below + h]  # (6)
            w += P
        for h in range(P):
            dz[below + h] *= a[below + h] * not_a[below + h]  # (8)
        at = below
    for t in range(np.uint64(len(db))):
        db[t] += dz[t]  # (6)


def _loop_update_first_layer(
    W: Any, rows: Any, starts: Any, inputs: Any, values: Any, steps: Any
) -> None:
    """(6) and the step of gradient descent: W ← W − lr / n · dz a_prevᵀ.

    steps are −lr / n · dz; W may be the velocity instead.
    """
    H = np.uint64(W.shape[1])
    for e in range(np.uint64(len(rows))):
        for k in range(
            np.uint64(starts[rows[e]]), np.uint64(starts[rows[e] + np.uint64(1)]), np.uint64(2)
        ):
            i, j = inputs[k], inputs[k + np.uint64(1)]
            x0, x1 = values[k], values[k + np.uint64(1)]
            for h in range(H):
                W[i, h] += x0 * steps[e, h]
                W[j, h] += x1 * steps[e, h]


def _loop_update_first_layer_dense(W: Any, rows: Any, x: Any, steps: Any) -> None:
    """The same for inputs that are hardly ever 0."""
    H = np.uint64(W.shape[1])
    for i in range(np.uint64(x.shape[1])):
        for e in range(np.uint64(len(rows))):
            x0 = x[rows[e], i]
            for h in range(H):
                W[i, h] += x0 * steps[e, h]


def _loop_move(value: Any, velocity: Any, momentum: Any, shrink: Any) -> None:
    """The velocity of flat parameters before a gradient: μ u − lr · weight_decay · W."""
    for t in range(np.uint64(len(value))):
        velocity[t] = momentum * velocity[t] + shrink * value[t]


def _loop_decay(value: Any, keep: Any) -> None:
    """What a step leaves of flat weights, 1 − lr · weight_decay."""
    for t in range(np.uint64(len(value))):
        value[t] *= keep


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
    first_z: Any,
) -> None:
    """Steps of gradient descent through the examples of an order, a mini-batch at a time.

    Momentum and decay are `torch.optim.SGD`'s, with velocities u = −lr v; without momentum the
    velocities are empty.
    """
    dense = len(starts) == 0
    moves = len(ub) > 0
    zero, one = V.dtype.type(0), V.dtype.type(1)
    H = np.uint64(W.shape[1])
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        n = np.uint64(len(rows))
        for t in range(np.uint64(len(db))):
            db[t] = zero
        for t in range(np.uint64(len(dV))):
            dV[t] = zero
        if dense:
            first_layer_dense(W, b, rows, x, first_z)
        else:
            seen = read_ahead(rows, starts, inputs, values)
            first_z[0, 0] = seen  # overwritten at once
            first_layer(W, b, rows, starts, inputs, values, first_z)
        step = -lr / V.dtype.type(n)
        for e in range(n):
            for h in range(H):
                z[h] = first_z[e, h]
            example(z, a, not_a, dz, b, V, n_outs, widths, y[rows[e]], has_sigmoid_prime, db, dV)
            for h in range(H):
                first_z[e, h] = step * dz[h]
        # The step; W stands where it is, or its velocity in its place.
        shrink = -lr * weight_decay
        if moves:
            move(W.ravel(), uW.ravel(), momentum, shrink)
            move(V, uV, momentum, shrink)
            move(b, ub, momentum, zero)
        elif weight_decay != zero:
            decay(W.ravel(), one + shrink)
            decay(V, one + shrink)
        target_W, target_V, target_b = (uW, uV, ub) if moves else (W, V, b)
        if dense:
            update_first_layer_dense(target_W, rows, x, first_z)
        else:
            update_first_layer(target_W, rows, starts, inputs, values, first_z)
        for t in range(np.uint64(len(V))):
            target_V[t] += step * dV[t]
        for t in range(np.uint64(len(b))):
            target_b[t] += step * db[t]
        if moves:
            move(uW.ravel(), W.ravel(), one, one)
            move(uV, V, one, one)
            move(ub, b, one, one)


# The compiled ones, by the names that the loops call each other by.
sigmoids: Any = None
read_ahead: Any = None
first_layer: Any = None
first_layer_dense: Any = None
example: Any = None
update_first_layer: Any = None
update_first_layer_dense: Any = None
move: Any = None
decay: Any = None
train: Any = None


def _compile() -> None:
    """Give the loops to Numba, which compiles each at its first call."""
    global np, sigmoids, read_ahead, first_layer, first_layer_dense, example
    global update_first_layer, update_first_layer_dense, move, decay, train
    if train is not None:
        return
    import numba
    import numpy

    np = numpy

    def compiled(loop: Any, flags: set[str] = _FAST) -> Any:
        options: Any = {"nogil": True, "error_model": "numpy", "fastmath": flags}
        try:
            return numba.njit(cache=True, **options)(loop)
        except RuntimeError:  # "no locator available": there is nowhere to write
            return numba.njit(**options)(loop)

    sigmoids = compiled(_loop_sigmoids, _EXACT)
    read_ahead = compiled(_loop_read_ahead)
    first_layer = compiled(_loop_first_layer)
    first_layer_dense = compiled(_loop_first_layer_dense)
    example = compiled(_loop_example)
    update_first_layer = compiled(_loop_update_first_layer)
    update_first_layer_dense = compiled(_loop_update_first_layer_dense)
    move, decay = compiled(_loop_move), compiled(_loop_decay)
    train = compiled(_loop_train)


def is_cached() -> bool:
    """Whether an earlier process has left the compiled loops on disk."""
    _compile()
    cache = getattr(train, "_cache", None)  # Numba has no public name for it
    path = getattr(cache, "cache_path", None)
    return path is not None and any(Path(path).glob("loops._loop_train-*.nbi"))


@contextlib.contextmanager
def _subnormals_are_0() -> Iterator[None]:
    """In this thread. Deltas of saturated neurons are as small, and a hundred times as slow."""
    before = float(torch.tensor(1e-38) * 0.1) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block.

    Raised inside a compiler's callback they would be lost, and while parameters are written these
    would be of two different steps.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
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


class Examples(NamedTuple):
    """Inputs and targets as the loops read them, for all networks."""

    starts: Any
    """Where each example's list of inputs begins, and where the last one ends; empty if dense."""
    inputs: Any
    """The inputs that are not 0, filled up to a multiple of 4 with the dummies."""
    values: Any
    """What they are."""
    x: Any
    """All of them, [N, n_in]; [0, n_in] unless dense."""
    y: Any
    """[N, n_out]."""


def density(x: Tensor) -> float:
    """The share of inputs that are not 0."""
    return int(torch.count_nonzero(x)) / max(1, x.numel())


def make_examples(x: Tensor, y: Tensor, *, dense: bool) -> Examples:
    """The examples for the loops: as dense rows, or as the inputs that are not 0."""
    import numpy

    targets = y.detach().contiguous().numpy()
    if dense:
        return Examples(
            starts=numpy.zeros(0, dtype=numpy.int64),
            inputs=numpy.zeros(0, dtype=numpy.uint32),
            values=numpy.zeros(0, dtype=targets.dtype),
            x=x.detach().contiguous().numpy(),
            y=targets,
        )
    n, n_in = x.shape
    rows, columns = torch.nonzero(x, as_tuple=True)  # NaN is an input like any other
    counts = torch.bincount(rows, minlength=n)
    filled = (counts + _INPUTS_AT_ONCE - 1) // _INPUTS_AT_ONCE * _INPUTS_AT_ONCE
    starts = torch.zeros(n + 1, dtype=torch.int64)
    torch.cumsum(filled, 0, out=starts[1:])
    # Where each of them goes: its number within its example, from where that begins.
    first = torch.cumsum(counts, 0) - counts
    places = torch.arange(len(rows)) - first[rows] + starts[rows]
    inputs = n_in + torch.arange(int(starts[-1])) % 2
    inputs[places] = columns
    values = torch.zeros(int(starts[-1]), dtype=x.dtype)
    values[places] = x.detach()[rows, columns]
    return Examples(
        starts.numpy(),
        inputs.numpy().astype(numpy.uint32),
        values.numpy(),
        numpy.zeros((0, n_in), dtype=targets.dtype),
        targets,
    )


class _Kept:
    """The examples made last, for as long as x and y are the same and unchanged."""

    def __init__(self) -> None:
        self._of: tuple[Any, ...] = (lambda: None, lambda: None)
        self._versions: tuple[Any, ...] = ()
        self._examples: Examples | None = None

    def get(self, x: Tensor, y: Tensor, *, dense: bool) -> Examples:
        """Those of x and y, made anew if either is another tensor or has been changed in place."""
        versions = (x._version, y._version, dense)
        same = all(ref() is t for ref, t in zip(self._of, (x, y), strict=True))
        if self._examples is None or not same or versions != self._versions:
            self._examples = make_examples(x, y, dense=dense)
            self._of, self._versions = (weakref.ref(x), weakref.ref(y)), versions
        return self._examples


# One for all ensembles: a comparison, or a benchmark, has several on the same data.
_kept = _Kept()


# ---------------------------------------------------------------------------------- the networks


class _Network:
    """One network's numbers as the loops want them."""

    def __init__(self, network: MLP, values: Hyperparameters, batch_size: int) -> None:
        import numpy

        loss, lr, momentum, weight_decay = values
        self._pairs = network.weights_and_biases()
        kind = self._pairs[0][0].detach().numpy().dtype
        n_outs = network.sizes[1:]
        self.widths = [-(-n // _LANES) * _LANES for n in n_outs]
        self._n_outs = n_outs

        def zeros(*shape: int) -> Any:
            return numpy.zeros(shape, dtype=kind)

        total = sum(self.widths)
        above = sum(n * width for n, width in zip(n_outs[1:], self.widths[:-1], strict=True))
        W, b, V = zeros(network.sizes[0] + 2, self.widths[0]), zeros(total), zeros(above)
        self._W, self._b, self._V = W, b, V
        velocities = (
            [zeros(*t.shape) for t in (W, b, V)] if momentum else [zeros(0, 0), zeros(0), zeros(0)]
        )
        self._parameters = (
            *(W, b, V, *velocities),
            numpy.array(n_outs, dtype=numpy.int64),
            numpy.array(self.widths, dtype=numpy.int64),
        )
        self._settings = (
            *(kind.type(value) for value in (lr, momentum, weight_decay)),
            LOSSES[loss].has_sigmoid_prime,
        )
        scratch = (zeros(total) for _ in range(5))
        self._scratch = (*scratch, zeros(above))
        self._first_z = zeros(0, self.widths[0])
        self._batch_size = batch_size

    def train(self, examples: Examples, order: Any) -> None:
        """Steps through the examples of an order, a whole number of mini-batches but at its end."""
        n = min(self._batch_size, len(order))
        if len(self._first_z) < n:
            self._first_z = np.zeros((n, self.widths[0]), dtype=self._first_z.dtype)
        train(
            *(*self._parameters, *examples, order, max(1, n), *self._settings),
            *(*self._scratch, self._first_z),
        )

    def _places(self) -> Iterator[tuple[Any, Any]]:
        """W and b of each layer in the loops' memory, [n_out, n_in] and [n_out]."""
        b, v = 0, 0
        width_below = 0
        for layer, (n_out, width) in enumerate(zip(self._n_outs, self.widths, strict=True)):
            bias = self._b[b : b + n_out]
            if layer == 0:
                yield self._W[:-2, :n_out].T, bias
            else:
                whole = self._V[v : v + n_out * width_below].reshape(n_out, width_below)
                yield whole[:, : self._n_outs[layer - 1]], bias
                v += n_out * width_below
            b += width
            width_below = width

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
        examples = _kept.get(x, y, dense=self._dense)
        for network in self._networks:
            network.take()
        jobs = list(zip(self._networks, [order.numpy() for order in orders], strict=True))
        with _interrupts_wait():  # a first call of a dtype compiles
            self._networks[0].train(examples, jobs[0][1][:0])
        stop = threading.Event()
        try:
            if min(threads, len(jobs)) == 1:
                self._walk(examples, jobs, stop)
            else:
                self._share_out(examples, jobs, threads, stop)
        finally:
            with _interrupts_wait():
                for network in self._networks:
                    network.give()

    def _share_out(
        self, examples: Examples, jobs: list[tuple[_Network, Any]], threads: int, stop: Any
    ) -> None:
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            try:
                walks = [
                    pool.submit(self._walk, examples, jobs[thread::threads], stop)
                    for thread in range(threads)
                ]
                for walk in walks:
                    walk.result()
            finally:
                stop.set()  # after Ctrl-C, say; the blocks under way are finished

    def _walk(
        self, examples: Examples, jobs: list[tuple[_Network, Any]], stop: threading.Event
    ) -> None:
        """Block by block, so that the data are read once for all of a thread's networks."""
        length = len(jobs[0][1]) if jobs else 0
        size = min(_BLOCK_STEPS * self._batch_size, length)
        with _subnormals_are_0():
            for begin in range(0, length, max(1, size)):
                for network, order in jobs:
                    if stop.is_set():
                        return
                    network.train(examples, order[begin : begin + size])
