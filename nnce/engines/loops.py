"""Engine "loops": compiled loops over examples, for small networks on a CPU.

The loops are in `nnce.kernels.training`. This module converts inputs and networks to their memory
layout, and handles threads and interrupts. The bits of a trained network depend on its initial
parameters, its settings and its order of the examples, but not on the networks trained with it, the
number of threads, or the division of the steps into calls.
"""

import concurrent.futures
import contextlib
import functools
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nnce import kernels
from nnce._torch_private import owner, version
from nnce.algorithm import Hyperparameters
from nnce.losses import LOSSES
from nnce.modules import MLP

if TYPE_CHECKING:  # needs Numba
    from nnce.kernels.training import Array, Inputs

DTYPES = (torch.float32, torch.float64)
# Share of nonzero inputs above which inputs that are 0 are no longer skipped.
DENSE = 0.7
# A loop over nonzero inputs computes a first layer faster than a matrix product does, if it has at
# least _WIDE inputs and at most _NARROW neurons, and at most the share _SPARSE of inputs is not 0.
_WIDE, _NARROW, _SPARSE = 256, 128, 0.3
# Number of tensors of inputs cached in the loops' layout, for training and for evaluation.
_MAX_INPUTS = 4
# Number of examples whose outputs are computed together.
_OUTPUTS_AT_ONCE = 100
# Windows has no SIGHUP.
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
# Number of mini-batches in a call: few, so that Ctrl-C takes effect soon, and a block of data is
# still in the cache when the next network reads it.
_BLOCK_STEPS = 20


def padded_width(n: int) -> int:
    """Width of a layer of n neurons in the loops' memory layout."""
    return -(-n // kernels.LANES) * kernels.LANES


def is_available() -> bool:
    """Whether Numba can compile the loops."""
    return kernels.numba_problem() is None


def is_cached() -> bool:
    """Whether the compiled loops are cached on disk, from an earlier process."""
    from nnce.kernels import _numba

    return _numba.is_cached(_kernels().train)


def _kernels() -> ModuleType:
    """Import the compiled loops on first use: Numba is optional, and slow to import."""
    with interrupts_wait():
        from nnce.kernels import training
    return training


@contextlib.contextmanager
def _subnormals_are_0() -> Iterator[None]:
    """Flush subnormal numbers to 0 in this thread.

    Deltas of saturated neurons become subnormal, and arithmetic on subnormal numbers is a hundred
    times slower.
    """
    # A Python float, because a PyTorch tensor depends on the default dtype and device.
    before = sys.float_info.min / 2 == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Delay Ctrl-C, SIGTERM and SIGHUP until the end of the block.

    An exception raised in a compiler callback would be lost; one raised while parameters are being
    written would leave parameters of two different steps.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = [signal.signal(number, lambda *arrived: came.append(arrived)) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    for waiting, frame in came:
        handler = signal.getsignal(waiting)
        # If raised again, it would count twice for a reader of `signal.set_wakeup_fd`.
        if callable(handler):
            handler(waiting, frame)
        else:
            signal.raise_signal(waiting)


# ---------------------------------------------------------------------------------------- data


def density(x: Tensor) -> float:
    """Share of inputs that are not 0."""
    return int(torch.count_nonzero(x)) / max(1, x.numel())


def make_inputs(x: Tensor, *, dense: bool) -> "Inputs":
    """Convert x to the loops' memory layout."""
    import numpy as np

    _kernels()
    from nnce.kernels.training import Inputs, list_inputs

    rows = x.detach().contiguous().numpy()
    n, n_in = rows.shape
    if dense:
        return Inputs(
            starts=np.zeros(0, dtype=np.int64),
            indices=np.arange(max(n, n_in), dtype=np.uint32),
            values=np.zeros(0, dtype=rows.dtype),
            x=rows,
        )
    counts = np.count_nonzero(rows, axis=1)
    starts = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(-(-counts // kernels.INPUTS_AT_ONCE) * kernels.INPUTS_AT_ONCE, out=starts[1:])
    indices = np.full(starts[-1], n_in, dtype=np.uint32)
    values = np.zeros(starts[-1], dtype=rows.dtype)
    with interrupts_wait():  # the first call for a dtype compiles
        list_inputs(rows, starts, indices, values)
    return Inputs(starts, indices, values, np.zeros((0, n_in), dtype=rows.dtype))


class InputCache:
    """Cache of inputs in the loops' layout, valid while their tensors exist and are unchanged."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[tuple[object, ...], tuple[weakref.ref[Tensor], Inputs]] = {}

    def get(self, x: Tensor, *, dense: bool) -> "Inputs":
        """The inputs of x, recomputed if x is a different tensor or has been changed in place."""
        if x.is_inference():  # PyTorch does not track in-place changes of inference tensors
            return make_inputs(x, dense=dense)
        # Each slice of a data set is a new tensor, but the base that it is a view of remains.
        whole = owner(x)
        place = (x.storage_offset(), tuple(x.shape), x.stride(), version(x), dense)
        key = (id(whole), *place)
        with self._lock:
            source, made = self._made.pop(key, (None, None))
            if source is None or made is None or source() is not whole:
                made = make_inputs(x, dense=dense)
            self._made[key] = weakref.ref(whole), made  # most recently used last
            for other, (source, _) in list(self._made.items()):
                changed = other[0] == key[0] and other[-2] != version(x)
                if source() is None or changed or len(self._made) > _MAX_INPUTS:
                    del self._made[other]
        return made


# One cache for all ensembles: a comparison or a benchmark has several on the same data.
INPUTS = InputCache()


def first_layer(x: Tensor, W: Tensor, b: Tensor) -> Callable[[int, int], Tensor] | None:
    """z = W a_prev + b of the first layer of R networks, skipping inputs that are 0.

    Args:
        x: inputs [N, n_in].
        W: weights [R, n_out, n_in], in x's dtype.
        b: biases [R, n_out].

    Returns:
        A function of begin and end that returns z [R, end − begin, n_out] of these examples; None
        if a matrix product is faster, or loops are not available.
    """
    (R, n_out, n_in), width = W.shape, padded_width(W.shape[1])
    small = n_in < _WIDE or width > _NARROW
    if small or not x.is_cpu or x.dtype not in DTYPES or not len(x) or not is_available():
        return None
    import numpy as np

    kernels_, inputs = _kernels(), INPUTS.get(x, dense=False)
    if len(inputs.values) > _SPARSE * x.numel():
        return None
    W = nn.functional.pad(W.mT, (0, width - n_out, 0, 1))  # [R, n_in + 1, width], last row 0
    b = nn.functional.pad(b, (0, width - n_out))
    none, widths = W.new_zeros(0).numpy(), np.array([width])
    layers = [
        kernels_.Layers(W[r].flatten().numpy(), b[r].numpy(), *[none] * 4, widths, widths)
        for r in range(R)
    ]

    def some(begin: int, end: int) -> Tensor:
        rows, z = np.arange(begin, end), W.new_empty(R, end - begin, width)
        for of_one, to in zip(layers, z, strict=True):
            kernels_.first_layer(of_one, inputs, rows, to.view(-1).numpy())
        return z[..., :n_out]

    with interrupts_wait():  # the first call for a dtype compiles
        some(0, 1)
    return some


# -------------------------------------------------------------------------------------- networks


class _Network:
    """One network's parameters in the loops' layout, and the scratch memory of its steps."""

    def __init__(self, network: MLP, values: Hyperparameters, batch_size: int) -> None:
        import numpy as np

        self._kernels = _kernels()
        self._parameters = [p for pair in network.weights_and_biases() for p in pair]
        self._like = self._parameters[0].detach()
        self._n_outs = network.sizes[1:]
        self.widths = [padded_width(n) for n in self._n_outs]
        total = sum(self.widths)
        above = sum(n * width for n, width in zip(self._n_outs[1:], self.widths[:-1], strict=True))
        sizes = ((network.sizes[0] + 1) * self.widths[0], total, above)
        self.moves = bool(values.momentum)
        self._layers = self._kernels.Layers(
            *(self._zeros(size) for size in sizes),
            *(self._zeros(size if self.moves else 0) for size in sizes),
            *(np.array(n, dtype=np.int64) for n in (self._n_outs, self.widths)),
        )
        self._scratch = self._kernels.Scratch(
            *(self._zeros(total) for _ in range(5)),
            dV=self._zeros(above),
            batch=self._zeros(0),
            first_z=self._zeros(0),
        )
        to_dtype = self._layers.W.dtype.type
        with np.errstate(over="ignore"):  # a rate beyond float32 is infinite, as in PyTorch
            self._rules = self._kernels.Rules(
                min(batch_size, 2**62),  # indices have 64 bits
                to_dtype(values.lr),
                to_dtype(values.momentum),
                to_dtype(values.weight_decay),
                LOSSES[values.loss].has_sigmoid_prime,
            )

    def train(self, inputs: "Inputs", y: "Array", order: "Array") -> None:
        """Take a step for each mini-batch of an order; the last one may be shorter."""
        self._grow_scratch(inputs, min(self._rules.batch_size, len(order)))
        self._kernels.train(self._layers, inputs, self._scratch, y, order, self._rules)

    def outputs(self, inputs: "Inputs", n: int) -> "Array":
        """z of the last layer for the first n examples, [n, n_out]."""
        import numpy as np

        self._grow_scratch(inputs, _OUTPUTS_AT_ONCE)
        out = np.empty((n, self._n_outs[-1]), dtype=self._layers.W.dtype)
        rows = np.arange(n)
        self._kernels.outputs(self._layers, inputs, self._scratch, rows, _OUTPUTS_AT_ONCE, out)
        return out

    def _zeros(self, size: int) -> "Array":
        return self._like.new_zeros(size).numpy()  # PyTorch's memory begins at a cache line

    def _grow_scratch(self, inputs: "Inputs", n: int) -> None:
        """Ensure scratch memory for a mini-batch of n: its inputs, if dense, and their z."""
        sizes = {
            "batch": n * inputs.x.shape[1] if len(inputs.x) else 0,
            "first_z": n * self.widths[0],
        }
        small = {k: size for k, size in sizes.items() if len(getattr(self._scratch, k)) < size}
        if small:
            self._scratch = self._scratch._replace(
                **{name: self._zeros(size) for name, size in small.items()}
            )

    def _places(self, *, velocities: bool = False) -> "Iterator[Array]":
        """Views of W [n_out, n_in] and b [n_out] of each layer, or of their velocities."""
        layers = self._layers
        W, bs, V = (
            (layers.uW, layers.ub, layers.uV) if velocities else (layers.W, layers.b, layers.V)
        )
        b, v = 0, 0
        n_below, width_below = 0, 0
        for n_out, width in zip(self._n_outs, self.widths, strict=True):
            if width_below == 0:
                yield W.reshape(-1, width)[:-1, :n_out].T
            else:
                yield V[v : v + n_out * width_below].reshape(n_out, width_below)[:, :n_below]
                v += n_out * width_below
            yield bs[b : b + n_out]
            b += width
            n_below, width_below = n_out, width

    def velocities(self) -> "list[Array]":
        """Views of the velocity of each parameter; [] without momentum."""
        return list(self._places(velocities=True)) if self.moves else []

    def read_parameters(self) -> None:
        """Copy the network's parameters into the loops' memory."""
        for parameter, place in zip(self._parameters, self._places(), strict=True):
            place[...] = parameter.detach().numpy()

    def write_parameters(self) -> None:
        """Copy the parameters from the loops' memory to the network, in place."""
        with torch.no_grad():
            for parameter, place in zip(self._parameters, self._places(), strict=True):
                parameter.copy_(torch.from_numpy(place))


_Job = tuple[_Network, "Array"]
"""A network and its order of the examples."""


class Loops:
    """Train networks of one shape by loops.

    Args:
        networks, hyperparameters, batch_size: as for `Ensemble`, in float32 or float64, on a CPU.
        dense: process all inputs instead of skipping those that are 0.
    """

    def __init__(
        self,
        networks: Sequence[MLP],
        hyperparameters: Sequence[Hyperparameters],
        batch_size: int,
        *,
        dense: bool,
    ) -> None:
        self._dense, self._batch_size = dense, batch_size
        self._networks = [
            _Network(network, values, batch_size)
            for network, values in zip(networks, hyperparameters, strict=True)
        ]

    def train(self, x: Tensor, y: Tensor, orders: Sequence[Tensor], threads: int) -> None:
        """Train each network for one epoch, in its own order.

        Args:
            x, y: as for `Ensemble.train_epoch`.
            orders: indices of the examples, one tensor per network, all of the same length.
            threads: number of threads, which share the networks.
        """
        inputs, targets = INPUTS.get(x, dense=self._dense), y.detach().contiguous().numpy()
        for network in self._networks:
            network.read_parameters()
        jobs = list(zip(self._networks, [order.numpy() for order in orders], strict=True))
        with interrupts_wait():  # the first call for a dtype compiles
            self._networks[0].train(inputs, targets, jobs[0][1][:0])
        stop = threading.Event()
        walk = functools.partial(self._walk, inputs, targets, stop)
        try:
            if min(threads, len(jobs)) == 1:
                walk(jobs)
            else:
                _share_out(walk, jobs, min(threads, len(jobs)), stop)
        finally:
            with interrupts_wait():
                for network in self._networks:
                    network.write_parameters()

    def velocities(self) -> list[Tensor]:
        """Velocities of each parameter, [networks, *shape]; [] if no network has momentum.

        The velocity of a network without momentum is 0.
        """
        by_network = [network.velocities() for network in self._networks]
        like = [torch.from_numpy(v) for v in max(by_network, key=len)]
        return [
            torch.stack(
                [torch.from_numpy(v[i]) if v else torch.zeros_like(some) for v in by_network]
            )
            for i, some in enumerate(like)
        ]

    def set_velocities(self, velocities: Sequence[Tensor]) -> None:
        """Set the velocities to values that `velocities` returned."""
        for r, network in enumerate(self._networks):
            for place, values in zip(network.velocities(), velocities, strict=False):
                place[...] = values[r].numpy()

    def outputs(self, number: int, x: Tensor) -> Tensor:
        """As `Ensemble.outputs`."""
        network = self._networks[number]
        network.read_parameters()
        inputs = INPUTS.get(x, dense=self._dense)
        with interrupts_wait():  # the first call for a dtype compiles
            return torch.from_numpy(network.outputs(inputs, len(x)))

    def _walk(
        self, inputs: "Inputs", y: "Array", stop: threading.Event, jobs: "Sequence[_Job]"
    ) -> None:
        """Train all networks block by block, so that a thread reads the data from memory once."""
        length = len(jobs[0][1])
        size = min(_BLOCK_STEPS * self._batch_size, length)
        with _subnormals_are_0():
            for begin in range(0, length, size):
                for network, order in jobs:
                    if stop.is_set():
                        return
                    network.train(inputs, y, order[begin : begin + size])


def _share_out(
    walk: "Callable[[Sequence[_Job]], None]",
    jobs: "Sequence[_Job]",
    threads: int,
    stop: threading.Event,
) -> None:
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            list(pool.map(walk, [jobs[thread::threads] for thread in range(threads)]))
        finally:
            stop.set()  # after Ctrl-C; blocks in progress are finished
