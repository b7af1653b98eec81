"""Time an epoch of training, of nnce and of what else one would use, side by side on one machine.

An epoch is 50,000 examples of MNIST's shape, drawn at random: shuffling and gathering mini-batches
is part of it, evaluation is not. Every peer starts from the same network, sees the same
mini-batches and is first checked to come to the same loss. Peers take turns, so that what else the
machine does falls on all of them alike; the figures are medians, and `ratio` is a peer's time over
nnce's, the median of the ratios of each turn.

Two rows are no peers. The floor is what PyTorch takes for the dense matrix products alone. The
limit is an estimate of what no implementation on nnce's threads can go below: the multiplications
and bytes that the inputs that are not 0 need, at the peaks measured on one thread of the machine.

`benchmark.py labels` times something else: value and gradients of a linear layer and its
cross-entropy over many labels, on the same tensors. Its floor is the three matrix products of the
same blocks. The peak is the memory beyond inputs, parameters and their gradients, each in a process
of its own.

`benchmark.py distortions` times what a new distortion of every image costs, an epoch of them beside
an epoch of training 784-800-10 on the distorted images. kornia and torchvision are peers where they
are installed.
"""

if __name__ == "__main__":
    import startup  # noqa: F401  before all else


import argparse
import contextlib
import copy
import dataclasses
import gc
import importlib
import itertools
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from nnce import blocks, data, functional, memory, training
from nnce.algorithm import Hyperparameters
from nnce.engines import ensemble, loops
from nnce.engines.ensemble import Engine, Ensemble
from nnce.experiments import command_line, report
from nnce.experiments.command_line import ArgumentParser
from nnce.labels import linear_sigmoid_cross_entropy
from nnce.modules import MLP
from nnce.reference import BUILT_IN_LOSSES, torch_twin

EXAMPLES = 50_000
LR = 0.5
# Of ‖C‖ after one epoch of 1,000 examples; a wrong update shows in the first digit.
SAME_LOSS = 1e-3
# Weights times examples times networks that one turn of one peer may take: a second or two.
BUDGET = 10_000_000_000
# For the floor: networks are walked in groups that fit into the processor's cache, and mini-batches
# gathered so many at a time.
CACHE_BYTES = 3_000_000
BLOCK_STEPS = 32
# As many inputs are not 0 as of MNIST's: a weight whose input is 0 does not move.
DENSITY = 0.19
# More of a processor than this in other hands spoils a figure.
BUSY = 0.1


class Work(NamedTuple):
    """A network and its mini-batches."""

    sizes: tuple[int, ...]
    batch_size: int
    networks: tuple[int, ...]
    """How many side by side, each a row of its own."""
    density: float = DENSITY
    """The share of inputs that are not 0."""
    own_orders: bool = False
    """Whether each of several networks has its own order of the examples."""
    threads: int | None = None
    """What was asked for."""

    def __str__(self) -> str:
        """As the table has it."""
        inputs = "" if self.density < 1 else ", no zeros"
        orders = ", own orders" if self.own_orders else ""
        return f"{'-'.join(map(str, self.sizes))}, batch {self.batch_size}{inputs}{orders}"

    def indices(self, order: Tensor, networks: int, generator: torch.Generator) -> Tensor:
        """The order for so many networks side by side, [n], or [networks, n] of their own."""
        if not self.own_orders or networks == 1:
            return order
        others = [data.order(len(order), generator, order.device) for _ in range(1, networks)]
        return torch.stack([order, *others])


WORKS = (
    Work((784, 30, 10), 10, (1, 4, 16, 64)),
    Work((784, 100, 10), 10, (1, 4, 16, 64)),
    Work((784, 800, 10), 128, (1, 4, 16, 64)),
    Work((784, 1000, 1000, 10), 512, (1, 4, 16, 64)),
    Work((784, 30, 10), 10, (16,), own_orders=True),
    Work((784, 30, 10), 1, (1,)),
    Work((784, 30, 10), 10, (1,), density=1.0),
)
QUICK = (Work((784, 30, 10), 10, (1, 16)), Work((784, 30, 10), 10, (16,), own_orders=True))

Epoch = Callable[[Tensor], object]
"""Train on the examples in this order, or in these."""
Parameters = Callable[[], Sequence[Any]]
"""W, b, W, b, … of the first network, as they are now."""
Peer = Callable[[Work, Tensor, Tensor, list[MLP]], tuple[Epoch, Parameters]]


class Missing(Exception):
    """This peer cannot be tried here; the message says why."""


# ------------------------------------------------------------------------------------- the peers


def nnce_ensemble(
    work: Work, x: Tensor, y: Tensor, networks: list[MLP], engine: Engine | None = None
) -> tuple[Epoch, Parameters]:
    """The revised algorithm, networks side by side, by loops or products, whichever suits."""
    if engine == "loops" and (x.is_cuda or not loops.is_available()):
        raise Missing("no loops: they want the CPU, and Numba")
    values = [Hyperparameters("cross-entropy", LR)] * len(networks)
    together = Ensemble(
        networks, values, batch_size=work.batch_size, engine=engine, threads=work.threads
    )
    return partial(together.train_epoch, x, y), lambda: list(networks[0].parameters())


class Products:
    """Of a step of some networks side by side the matrix products alone: nothing is learnt.

    The first layers are one product, those above batched ones; forward, da and dW. What is not
    computed between them is 0.
    """

    def __init__(self, networks: list[MLP], n: int) -> None:
        """Make the memory for mini-batches of n."""
        by_layer = zip(*(network.linears() for network in networks), strict=True)
        self._W = [torch.stack([linear.weight.detach() for linear in layer]) for layer in by_layer]
        R = len(networks)
        self._first = self._W[0].flatten(0, 1)  # [R·n_out, n_in]
        self._z_first = self._first.new_zeros(n, len(self._first))
        self._dz_first = torch.zeros_like(self._z_first)
        self._a = [W.new_zeros(R, n, W.shape[1]) for W in self._W]
        self._dz = [torch.zeros_like(a) for a in self._a]

    def step(self, x: Tensor) -> None:
        """All products of one mini-batch, [n, n_in]."""
        torch.mm(x, self._first.mT, out=self._z_first)
        for W, a_prev, a in zip(self._W[1:], self._a, self._a[1:], strict=False):
            torch.bmm(a_prev, W.mT, out=a)
        for layer in range(len(self._W) - 1, 0, -1):
            W, dz = self._W[layer], self._dz[layer]
            torch.bmm(dz, W, out=self._a[layer - 1])  # da
            torch.baddbmm(W, dz.mT, self._a[layer - 1], out=W)  # dW
        torch.addmm(self._first, self._dz_first.mT, x, out=self._first)


def floor(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> tuple[Epoch, Parameters]:
    """The matrix products alone, dense, with the same shuffling and gathering."""
    if work.own_orders:
        raise Missing("networks with orders of their own share no product")
    # As many networks at a time as the ensemble takes, since more would leave the cache.
    size = max(1, CACHE_BYTES // memory.bytes_of(work.sizes, torch.float32))
    groups = [networks[i : i + size] for i in range(0, len(networks), size)]
    products: dict[int, list[Products]] = {}

    def epoch(order: Tensor) -> None:
        with torch.inference_mode():
            for block in order.split(BLOCK_STEPS * work.batch_size):
                x_block = x[block]
                for index in range(len(groups)):
                    for batch in x_block.split(work.batch_size):
                        n = len(batch)
                        if n not in products:
                            products[n] = [Products(group, n) for group in groups]
                        products[n][index].step(batch)

    return epoch, lambda: list(networks[0].parameters())


def _loop(
    work: Work,
    x: Tensor,
    y: Tensor,
    network: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    **settings: bool,
) -> tuple[Epoch, Parameters]:
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, **settings)

    def epoch(order: Tensor) -> None:
        for batch in order.split(work.batch_size):
            optimizer.zero_grad()
            criterion(network(x[batch]), y[batch]).backward()
            optimizer.step()

    return epoch, lambda: list(network.parameters())


def eager(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> tuple[Epoch, Parameters]:
    """torch.nn and autograd, with the fastest of SGD's settings."""
    criterion = BUILT_IN_LOSSES["cross-entropy"]

    def seconds(settings: dict[str, bool]) -> float:
        trial = torch_twin(copy.deepcopy(networks[0]))
        epoch, _ = _loop(work, x, y, trial, criterion, **settings)
        generator = torch.Generator().manual_seed(0)
        epoch(data.order(min(len(x), 10 * work.batch_size), generator, x.device))
        return timed(epoch, min(len(x), 100 * work.batch_size), generator, x.device)

    best = min(({"fused": True}, {"foreach": True}, {"foreach": False}), key=seconds)
    return _loop(work, x, y, torch_twin(networks[0]), criterion, **best)


def functions(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> tuple[Epoch, Parameters]:
    """nnce's Functions inside PyTorch's graph."""
    return _loop(work, x, y, networks[0], functional.sigmoid_cross_entropy, fused=True)


def compiled(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> tuple[Epoch, Parameters]:
    """The whole step under torch.compile: forward, backward and update in one graph."""
    torch._dynamo.reset()  # what was compiled for another work counts against a limit
    twin = torch_twin(networks[0])
    parameters = {name: p.detach() for name, p in twin.named_parameters()}
    criterion = BUILT_IN_LOSSES["cross-entropy"]

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = torch.func.functional_call(twin, parameters, (x,))
        return criterion(z, y)

    @torch.compile(fullgraph=True, dynamic=False)
    def step(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> None:
        for name, gradient in torch.func.grad(loss)(parameters, x, y).items():
            parameters[name].sub_(LR * gradient)

    def epoch(order: Tensor) -> None:
        for batch in order.split(work.batch_size):
            step(parameters, x[batch], y[batch])

    return epoch, lambda: list(parameters.values())


def cuda_graphed(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> tuple[Epoch, Parameters]:
    """torch.nn and autograd, the whole step captured as a CUDA graph."""
    if not x.is_cuda:
        raise Missing("no CUDA here")
    twin = torch_twin(networks[0])
    criterion = BUILT_IN_LOSSES["cross-entropy"]
    optimizer = torch.optim.SGD(twin.parameters(), lr=LR, fused=True)
    graphs: dict[int, tuple[Tensor, Tensor, torch.cuda.CUDAGraph]] = {}

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        criterion(twin(x), y).backward()
        optimizer.step()

    def captured(n: int) -> tuple[Tensor, Tensor, torch.cuda.CUDAGraph]:
        before = [p.detach().clone() for p in twin.parameters()]
        x_n, y_n = x[:n].clone(), y[:n].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(x_n, y_n)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(x_n, y_n)
        with torch.no_grad():
            for p, value in zip(twin.parameters(), before, strict=True):
                p.copy_(value)
        return x_n, y_n, graph

    def epoch(order: Tensor) -> None:
        for batch in order.split(work.batch_size):
            n = len(batch)
            if n not in graphs:
                graphs[n] = captured(n)
            x_n, y_n, graph = graphs[n]
            torch.index_select(x, 0, batch, out=x_n)
            torch.index_select(y, 0, batch, out=y_n)
            graph.replay()

    return epoch, lambda: list(twin.parameters())


def _arrays(network: MLP) -> tuple[list[Any], list[Any]]:
    linears = network.linears()
    return (
        [linear.weight.detach().cpu().numpy().copy() for linear in linears],
        [
            p.detach().cpu().numpy().copy()
            for p in (linear.bias for linear in linears)
            if p is not None
        ],
    )


def _sigmoid(z: Any) -> Any:
    with np.errstate(over="ignore"):  # e^(−z) = ∞ makes the right 0
        return 1 / (1 + np.exp(-z))


def numpy_by_example(
    work: Work, x: Tensor, y: Tensor, networks: list[MLP]
) -> tuple[Epoch, Parameters]:
    """NumPy as the textbook has it: example by example, columns for vectors."""
    W, b = _arrays(networks[0])
    b = [column[:, None] for column in b]
    X, Y = x.cpu().numpy()[:, :, None], y.cpu().numpy()[:, :, None]

    def gradients(x: Any, y: Any) -> tuple[list[Any], list[Any]]:
        a = [x]
        for W_, b_ in zip(W, b, strict=True):
            a.append(_sigmoid(W_ @ a[-1] + b_))
        dz = a[-1] - y
        dW, db = [dz @ a[-2].T], [dz]
        for layer in range(2, len(a)):
            dz = (W[-layer + 1].T @ dz) * a[-layer] * (1 - a[-layer])
            dW.insert(0, dz @ a[-layer - 1].T)
            db.insert(0, dz)
        return dW, db

    def epoch(order: Tensor) -> None:
        for batch in np.split(
            order.cpu().numpy(), range(work.batch_size, len(order), work.batch_size)
        ):
            sum_W, sum_b = [np.zeros_like(w) for w in W], [np.zeros_like(v) for v in b]
            for i in batch:
                dW, db = gradients(X[i], Y[i])
                sum_W = [s + d for s, d in zip(sum_W, dW, strict=True)]
                sum_b = [s + d for s, d in zip(sum_b, db, strict=True)]
            for layer in range(len(W)):
                W[layer] = W[layer] - np.float32(LR / len(batch)) * sum_W[layer]
                b[layer] = b[layer] - np.float32(LR / len(batch)) * sum_b[layer]

    return epoch, lambda: [p for pair in zip(W, b, strict=True) for p in pair]


def numpy_vectorised(
    work: Work, x: Tensor, y: Tensor, networks: list[MLP]
) -> tuple[Epoch, Parameters]:
    """NumPy, a mini-batch at a time."""
    W, b = _arrays(networks[0])
    X, Y = x.cpu().numpy(), y.cpu().numpy()

    def epoch(order: Tensor) -> None:
        for batch in np.split(
            order.cpu().numpy(), range(work.batch_size, len(order), work.batch_size)
        ):
            a = [X[batch]]
            for W_, b_ in zip(W, b, strict=True):
                a.append(_sigmoid(a[-1] @ W_.T + b_))
            dz = (a[-1] - Y[batch]) * np.float32(LR / len(batch))
            for layer in reversed(range(len(W))):
                da = dz @ W[layer]
                W[layer] -= dz.T @ a[layer]
                b[layer] -= dz.sum(0)
                dz = da * a[layer] * (1 - a[layer])

    return epoch, lambda: [p for pair in zip(W, b, strict=True) for p in pair]


def scikit_learn(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> tuple[Epoch, Parameters]:
    """scikit-learn's MLPClassifier; targets of several labels make its output layer sigmoid."""
    try:
        from sklearn.neural_network import MLPClassifier
    except ImportError as error:
        raise Missing("scikit-learn is not installed") from error
    X, Y = x.cpu().numpy(), y.cpu().numpy().astype(int)
    model = MLPClassifier(
        work.sizes[1:-1],
        activation="logistic",
        solver="sgd",
        alpha=0.0,
        batch_size=work.batch_size,
        learning_rate_init=LR,
        momentum=0.0,
        nesterovs_momentum=False,
        shuffle=False,  # shuffled by the order, as the others are
    )
    model.partial_fit(X[: work.batch_size], Y[: work.batch_size], classes=np.arange(10))
    for layer, (W, b) in enumerate(zip(*_arrays(networks[0]), strict=True)):
        model.coefs_[layer][:], model.intercepts_[layer][:] = W.T, b

    def epoch(order: Tensor) -> None:
        picked = order.cpu().numpy()
        model.partial_fit(X[picked], Y[picked])

    return epoch, lambda: [
        p for W, b in zip(model.coefs_, model.intercepts_, strict=True) for p in (W.T, b)
    ]


def func_vmap(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> tuple[Epoch, Parameters]:
    """torch.func's way with many networks: their parameters stacked, and vmap over them."""
    twins = [torch_twin(network) for network in networks]
    stacked, _ = torch.func.stack_module_state(twins)
    parameters = {name: p.detach() for name, p in stacked.items()}
    criterion = BUILT_IN_LOSSES["cross-entropy"]

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = torch.func.functional_call(twins[0], parameters, (x,))
        return criterion(z, y)

    examples = 0 if work.own_orders else None
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(0, examples, examples))

    def epoch(order: Tensor) -> None:
        for batch in order.view(-1, order.shape[-1]).split(work.batch_size, dim=-1):
            batch = batch if work.own_orders else batch[0]
            for name, gradient in gradients(parameters, x[batch], y[batch]).items():
                parameters[name].sub_(LR * gradient)

    return epoch, lambda: [p[0] for p in parameters.values()]


def jax_scan(
    work: Work, x: Tensor, y: Tensor, networks: list[MLP], *, side_by_side: bool = False
) -> tuple[Epoch, Parameters]:
    """JAX: an epoch as one jitted scan over the mini-batches; many networks by vmap."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError as error:
        raise Missing("not installed: pip install -e '.[bench]'") from error
    X, Y = jnp.asarray(x.cpu().numpy()), jnp.asarray(y.cpu().numpy())
    each = [_arrays(network) for network in networks]
    parameters = [
        tuple(jnp.asarray(np.stack([arrays[i][layer] for arrays in each])) for i in (0, 1))
        for layer in range(len(work.sizes) - 1)
    ]
    if not side_by_side:
        parameters = [(W[0], b[0]) for W, b in parameters]

    def loss(parameters: Any, x: Any, y: Any) -> Any:
        a = x
        for W, b in parameters[:-1]:
            a = jax.nn.sigmoid(a @ W.T + b)
        W, b = parameters[-1]
        z = a @ W.T + b
        return (jax.nn.softplus(z) - y * z).sum() / len(x)

    gradient: Any = jax.grad(loss)
    if side_by_side:
        examples = 0 if work.own_orders else None
        gradient = jax.vmap(gradient, in_axes=(0, examples, examples))

    def step(parameters: Any, batch: Any) -> tuple[Any, None]:
        gradients = gradient(parameters, X[batch], Y[batch])
        return jax.tree.map(lambda p, g: p - LR * g, parameters, gradients), None

    @partial(jax.jit, donate_argnums=0)
    def scan(parameters: Any, order: Any) -> Any:
        n = order.shape[-1]
        whole = n // work.batch_size * work.batch_size
        batches = order[..., :whole].reshape(*order.shape[:-1], -1, work.batch_size)
        parameters, _ = jax.lax.scan(step, parameters, jnp.moveaxis(batches, -2, 0))
        if whole < n:
            parameters, _ = step(parameters, order[..., whole:])
        return parameters

    def epoch(order: Tensor) -> None:
        nonlocal parameters
        wait: Any = jax.block_until_ready
        parameters = wait(scan(parameters, jnp.asarray(order.cpu().numpy())))

    def first() -> list[Any]:
        arrays = [np.array(p) for pair in parameters for p in pair]
        return [array[0] for array in arrays] if side_by_side else arrays

    return epoch, first


NNCE = "nnce"
LOOPS = "nnce, loops"
PRODUCTS = "nnce, products"
FLOOR = "floor (dense products alone)"
LIMIT = "limit (estimate)"
EAGER = "torch.nn eager"
COMPILED = "torch.compile"
JAX = "JAX jit + scan"
JAX_VMAP = "JAX, vmap over networks"
FUNC_VMAP = "torch.func, vmap over networks"
BY_EXAMPLE = "NumPy, by example"

PEERS: dict[str, Peer] = {
    NNCE: nnce_ensemble,
    LOOPS: partial(nnce_ensemble, engine="loops"),
    PRODUCTS: partial(nnce_ensemble, engine="products"),
    FLOOR: floor,
    EAGER: eager,
    COMPILED: compiled,
    "torch.nn eager, CUDA graph": cuda_graphed,
    "nnce functions": functions,
    JAX: jax_scan,
    JAX_VMAP: partial(jax_scan, side_by_side=True),
    FUNC_VMAP: func_vmap,
    "scikit-learn": scikit_learn,
    "NumPy, vectorised": numpy_vectorised,
    BY_EXAMPLE: numpy_by_example,
}
QUICK_PEERS = (NNCE, FLOOR, EAGER, JAX, JAX_VMAP)
# Networks side by side; the others train R networks one after the other.
SIDE_BY_SIDE = (NNCE, LOOPS, PRODUCTS, FLOOR, JAX_VMAP, FUNC_VMAP)


# ------------------------------------------------------------------------------------- measuring


class Runner(NamedTuple):
    """A peer, ready to run."""

    peer: str
    networks: int
    epoch: Epoch
    examples: int
    peak_bytes: int | None


def timed(
    epoch: Epoch,
    n: int,
    generator: torch.Generator,
    device: torch.device,
    work: Work | None = None,
    networks: int = 1,
) -> float:
    """Seconds that drawing the order, or orders, and training take, until the device is done."""
    began = time.perf_counter()
    order = data.order(n, generator, device)
    epoch(order if work is None else work.indices(order, networks, generator))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@contextlib.contextmanager
def peak(device: torch.device, peaks: list[int]) -> Iterator[None]:
    """How much memory the block needed at most, beyond what was in use; nothing if unknowable."""
    gc.collect()
    status = Path("/proc/self/status")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        peaks.append(torch.cuda.max_memory_allocated() - before)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:
        yield
        return
    before = psutil.Process().memory_info().rss
    yield
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    peaks.append(max(0, int(line.split()[1]) * 1024 - before))


def fresh_networks(work: Work, networks: int, device: torch.device) -> list[MLP]:
    """The networks every peer starts from."""
    memory.check_memory(work.sizes, networks, device=device)
    return [
        MLP(work.sizes, generator=torch.Generator().manual_seed(seed), device=device)
        for seed in range(networks)
    ]


def check(name: str, work: Work, x: Tensor, y: Tensor, networks: int) -> float:
    """The first network's C over 1,000 examples after an epoch of them, in a fixed order."""
    x, y = x[:1000], y[:1000]
    epoch, parameters = PEERS[name](work, x, y, fresh_networks(work, networks, x.device))
    # The first network's order is the same one, whatever the others'.
    order = torch.arange(len(x), device=x.device)
    epoch(work.indices(order, networks, torch.Generator().manual_seed(0)))
    network = fresh_networks(work, 1, x.device)[0]
    with torch.no_grad():
        for p, value in zip(network.parameters(), parameters(), strict=True):
            p.copy_(torch.as_tensor(value).view_as(p))
    evaluation = training.evaluate(network, data.Split(x, y), "cross-entropy")
    return evaluation.loss


def prepare(name: str, work: Work, x: Tensor, y: Tensor, networks: int) -> Runner:
    """Make a peer ready, and run it once."""
    # Large networks, and many, take a part of an epoch; the figures are for the whole.
    weights = sum(n_in * n_out for n_in, n_out in itertools.pairwise(work.sizes))
    affordable = BUDGET // (weights * networks * (10 if name == BY_EXAMPLE else 1))
    examples = min(len(x), max(4 * work.batch_size, affordable))
    peaks: list[int] = []
    with peak(x.device, peaks):
        epoch, _ = PEERS[name](work, x, y, fresh_networks(work, networks, x.device))
        # What is compiled for its shapes must have seen them all.
        compiles = name in (JAX, JAX_VMAP, COMPILED)
        warm = torch.arange(examples if compiles else min(examples, 2_000))
        epoch(work.indices(warm.to(x.device), networks, torch.Generator().manual_seed(0)))
    return Runner(name, networks, epoch, examples, peaks[0] if peaks else None)


Outcome = Literal["right", "wrong", "failed", "missing", "estimate"]


class Timing(NamedTuple):
    """A peer's time for one work; a row of results.json."""

    work: str
    peer: str
    networks: int
    outcome: Outcome
    """"wrong": another loss than nnce's; "failed": it raised; "missing": it cannot run here."""
    note: str = ""
    """What the loss was, or why there is no time."""
    seconds: float = math.nan
    """For an epoch of one network, the median."""
    examples_per_second: float = math.nan
    ratio: float = math.nan
    """Its seconds over nnce's in the same turn, the median, the least and the most."""
    ratio_least: float = math.nan
    ratio_most: float = math.nan
    peak_bytes: int | None = None
    examples: int = 0
    """What was timed is an epoch of so many."""
    repetitions: int = 0
    threads: int = 0


class Peaks(NamedTuple):
    """What one thread of this machine can do."""

    multiplications: float
    """A second, each with its addition: of a matrix product."""
    bytes: float
    """A second, read and written, of a first layer's weights: they are in the cache."""


def peaks_of_one_thread(work: Work) -> Peaks:
    """Measured, the best of some runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b, c = (torch.rand(1_024, 1_024) for _ in range(3))
        weights, steps = (torch.rand(work.sizes[0] * work.sizes[1]) for _ in range(2))
        runs = 100_000_000 // len(weights)

        def seconds(call: Callable[[], object], times: int) -> float:
            began = time.perf_counter()
            for _ in range(times):
                call()
            return (time.perf_counter() - began) / times

        product = min(seconds(lambda: torch.mm(a, b, out=c), 1) for _ in range(20))
        add = min(seconds(lambda: torch.add(weights, steps, out=weights), runs) for _ in range(5))
    finally:
        torch.set_num_threads(before)
    return Peaks(1_024**3 / product, 3 * 4 * len(weights) / add)


def limit(work: Work, networks: int, ours: float) -> Timing:
    """What the inputs that are not 0 need of as many threads as nnce has.

    Multiplications: two for a weight of the first layer and an input that is not 0 (forward and
    step), three for a weight of the layers above. Bytes: those inputs and their numbers, once; and
    each weight three times a mini-batch (read forward, read and written for the step) unless all
    its inputs there are 0.
    """
    first, *above = (n_in * n_out for n_in, n_out in itertools.pairwise(work.sizes))
    n, density = work.batch_size, work.density
    multiplications = 2 * density * first + 3 * sum(above)
    inputs = (8 if density < 1 else 4) * density * work.sizes[0]
    weights = (1 - (1 - density) ** n) * first + sum(above)
    needed = inputs + 12 * weights / n
    peaks = peaks_of_one_thread(work)
    at_least = max(multiplications / peaks.multiplications, needed / peaks.bytes)
    threads = threads_of(NNCE, work, networks)
    seconds = EXAMPLES * at_least / threads
    return Timing(
        work=str(work),
        peer=LIMIT,
        networks=networks,
        outcome="estimate",
        note=f"{multiplications:,.0f} multiplications and {needed:,.0f} bytes an example, at "
        f"{peaks.multiplications / 1e9:.0f} G and {peaks.bytes / 1e9:.0f} GB a second and thread",
        seconds=seconds,
        examples_per_second=EXAMPLES / seconds,
        ratio=seconds / ours,
        ratio_least=seconds / ours,
        ratio_most=seconds / ours,
        threads=threads,
    )


def threads_of(name: str, work: Work, networks: int) -> int:
    """How many threads a peer has; JAX takes what it likes."""
    suits = ensemble.suits_loops(
        work.sizes, work.batch_size, torch.float32, torch.device("cpu"), work.density
    )
    if name == LOOPS or (name == NNCE and suits):
        return min(networks, work.threads or os.cpu_count() or 1)
    return (os.cpu_count() or 1) if name in (JAX, JAX_VMAP) else torch.get_num_threads()


def measure(
    work: Work, names: Sequence[str], x: Tensor, y: Tensor, repetitions: int
) -> list[Timing]:
    """The timings of one work."""
    timings: list[Timing] = []
    runners: list[Runner] = []
    losses: dict[tuple[str, int], float] = {}
    for name in names:
        try:
            counts: tuple[int, ...] = work.networks if name in SIDE_BY_SIDE else (1,)
            if name != FLOOR:
                losses |= {(name, n): check(name, work, x, y, n) for n in counts}
            runners += [prepare(name, work, x, y, networks) for networks in counts]
        except Missing as reason:
            timings.append(Timing(str(work), name, 1, "missing", str(reason)))
        except Exception as error:  # others' code; the rest of the table is still worth having
            if name.startswith(NNCE):
                raise
            timings.append(Timing(str(work), name, 1, "failed", type(error).__name__))
    expected = losses[NNCE, work.networks[0]]
    wrong = {
        key: loss
        for key, loss in losses.items()
        if not abs(loss - expected) <= SAME_LOSS * expected
    }
    seconds: dict[tuple[str, int], list[float]] = {(r.peer, r.networks): [] for r in runners}
    generator = torch.Generator().manual_seed(0)
    # In another order each time: whoever comes after the slowest finds cold caches.
    shuffled = random.Random(0)
    turns = [r for _ in range(repetitions) for r in shuffled.sample(runners, len(runners))]
    for runner in tqdm(turns, desc=str(work), disable=None, leave=False):
        took = timed(runner.epoch, runner.examples, generator, x.device, work, runner.networks)
        per_network = took / runner.networks * EXAMPLES / runner.examples
        seconds[runner.peer, runner.networks].append(per_network)

    ready = {(r.peer, r.networks): r for r in runners}
    for networks in work.networks:
        ours = seconds[NNCE, networks]
        for name in names:
            side_by_side = name in SIDE_BY_SIDE
            if networks > 1 and not side_by_side and name != EAGER:
                continue
            key = (name, networks if side_by_side else 1)
            if key not in seconds:
                continue
            ratios = [a / b for a, b in zip(seconds[key], ours, strict=True)]
            median = statistics.median(seconds[key])
            timings.append(
                Timing(
                    work=str(work),
                    peer=name,
                    networks=networks,
                    outcome="wrong" if key in wrong else "right",
                    note=f"C is {wrong[key]:.4f}" if key in wrong else "",
                    seconds=median,
                    examples_per_second=EXAMPLES / median,
                    ratio=statistics.median(ratios),
                    ratio_least=min(ratios),
                    ratio_most=max(ratios),
                    peak_bytes=ready[key].peak_bytes,
                    examples=ready[key].examples,
                    repetitions=len(ratios),
                    threads=threads_of(name, work, key[1]),
                )
            )
        if not x.is_cuda:
            timings.append(limit(work, networks, statistics.median(ours)))
    return timings


def readable(timing: Timing) -> report.Row:
    """A row for people."""
    there = not math.isnan(timing.seconds)
    spread = f"{timing.ratio_least:.2f}–{timing.ratio_most:.2f}"
    wrong = timing.outcome in ("wrong", "failed")
    return {
        "work": timing.work,
        "networks": timing.networks,
        "peer": timing.peer,
        "seconds": f"{timing.seconds:.3f}" if there else "",
        "examples/s": f"{timing.examples_per_second:,.0f}" if there else "",
        "ratio": f"{timing.ratio:.2f} ({spread})" if there else "",
        "peak MB": "" if timing.peak_bytes is None else f"{timing.peak_bytes / 1e6:,.0f}",
        "threads": timing.threads if there else "",
        "note": f"{timing.outcome.upper()}: {timing.note}" if wrong else timing.note,
    }


class Neighbours:
    """What other programs take of the processor while this one measures."""

    def __init__(self) -> None:
        """Begin to look."""
        self._began, self._all, self._own = time.perf_counter(), self._busy(), self._mine()

    def share(self) -> float:
        """Processors in other hands since the beginning, on average."""
        others = (self._busy() - self._all) - (self._mine() - self._own)
        return max(0.0, others / (time.perf_counter() - self._began))

    def _busy(self) -> float:
        times = psutil.cpu_times()
        return float(times.user + times.system + getattr(times, "nice", 0.0))

    def _mine(self) -> float:
        times = psutil.Process().cpu_times()
        return float(times.user + times.system)


# ---------------------------------------------------------------------------------- many labels


class LabelWork(NamedTuple):
    """A linear layer and its loss; five positive labels for each example."""

    n: int
    features: int
    labels: int

    def __str__(self) -> str:
        """In words."""
        return f"{self.labels:,} labels, {self.features} features, n {self.n:,}"

    @property
    def gradient_bytes(self) -> int:
        """Of x, W and b, in float32."""
        return 4 * (self.n * self.features + self.labels * (self.features + 1))


LABEL_WORKS = [
    LabelWork(1_024, 512, 1_000),
    LabelWork(1_024, 512, 16_384),
    LabelWork(1_024, 512, 131_072),
    LabelWork(512, 256, 1_000_000),
]
QUICK_LABEL_WORKS = LABEL_WORKS[:2]
# Gradients in float32 may differ by rounding, in norm.
SAME_GRADIENTS = 1e-5


class LabelProblem:
    """The same tensors for all; dense targets are made where a peer wants them, before its time."""

    def __init__(self, work: LabelWork, device: torch.device) -> None:
        """Draw them."""
        self.work = work
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(work.n, work.features, generator=generator)
        W = torch.empty(work.labels, work.features)
        W.normal_(0, work.features**-0.5, generator=generator)
        index = torch.randint(work.labels, (work.n, 5), generator=generator)
        self.x, self.W = x.to(device).requires_grad_(), W.to(device).requires_grad_()
        self.b = torch.zeros(work.labels, device=device, requires_grad=True)
        self.index = index.to(device)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The targets of all labels."""
        y = torch.zeros(self.work.n, self.work.labels, dtype=dtype, device=self.x.device)
        return y.scatter_(1, self.index, 1)

    def clear(self) -> None:
        """No gradients, as before a first backward."""
        self.x.grad = self.W.grad = self.b.grad = None


def _bce(x: Tensor, W: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = nn.functional.linear(x, W, b)
    C = nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum")
    return C / len(x)


def _walked(problem: LabelProblem, target: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        C = linear_sigmoid_cross_entropy(problem.x, problem.W, target, linear_bias=problem.b)
        C.backward()
        return C

    return step


def labels_nnce(problem: LabelProblem) -> Callable[[], Tensor]:
    """The labels of each example, a list of five."""
    return _walked(problem, problem.index)


def labels_nnce_dense(problem: LabelProblem) -> Callable[[], Tensor]:
    """A boolean target for every label."""
    return _walked(problem, problem.dense(torch.bool))


def labels_products(problem: LabelProblem) -> Callable[[], Tensor]:
    """The three matrix products of nnce's blocks, and nothing else."""
    x, W, b = (t.detach() for t in (problem.x, problem.W, problem.b))
    work = problem.work
    block = blocks.default_block(work.n, work.labels, work.features, x.dtype)

    def step() -> Tensor:
        dx, dW = torch.zeros_like(x), torch.empty_like(W)
        memory = x.new_empty(work.n * min(block, work.labels))
        for first in range(0, work.labels, block):
            W_block = W[first : first + block]
            z = memory[: work.n * len(W_block)].view(work.n, len(W_block))
            torch.addmm(b[first : first + block], x, W_block.mT, out=z)
            dx.addmm_(z, W_block)
            torch.mm(z.mT, x, out=dW[first : first + block])
        return dx

    return step


def labels_eager(problem: LabelProblem) -> Callable[[], Tensor]:
    """`binary_cross_entropy_with_logits` of `linear`."""
    return _by_pytorch(problem, _bce)


def labels_compiled(problem: LabelProblem) -> Callable[[], Tensor]:
    """The same under torch.compile."""
    return _by_pytorch(problem, torch.compile(_bce))


def labels_checkpointed(problem: LabelProblem) -> Callable[[], Tensor]:
    """The same for 8,192 labels at a time, whose activations are computed anew in the backward."""

    def loss(x: Tensor, W: Tensor, b: Tensor, y: Tensor) -> Tensor:
        parts = zip(W.split(8_192), b.split(8_192), y.split(8_192, dim=1), strict=True)
        return torch.stack(
            [checkpoint(_bce, x, *part, use_reentrant=False) for part in parts]
        ).sum()

    return _by_pytorch(problem, loss)


def _by_pytorch(problem: LabelProblem, loss: Callable[..., Tensor]) -> Callable[[], Tensor]:
    y = problem.dense(torch.float32)

    def step() -> Tensor:
        C = loss(problem.x, problem.W, problem.b, y)
        C.backward()
        return C

    return step


LABEL_PEERS: dict[str, Callable[[LabelProblem], Callable[[], Tensor]]] = {
    "nnce": labels_nnce,
    "nnce, dense targets": labels_nnce_dense,
    "floor: three products": labels_products,
    "PyTorch eager": labels_eager,
    "PyTorch compiled": labels_compiled,
    "PyTorch checkpointed": labels_checkpointed,
}


class LabelTiming(NamedTuple):
    """A peer's time and memory for one work; a row of results.json."""

    work: str
    peer: str
    seconds: float
    """Of forward and backward, the median."""
    ratio: float
    """Its seconds over nnce's in the same turn, the median, the least and the most."""
    ratio_least: float
    ratio_most: float
    peak_bytes: float
    difference: float
    """‖its gradients − nnce's‖ / ‖nnce's‖, of x, W and b together; NaN for the floor."""
    repetitions: int
    threads: int


def label_gradients(problem: LabelProblem) -> list[Tensor]:
    """Of x, W and b, taken away."""
    gradients = [t.grad for t in (problem.x, problem.W, problem.b) if t.grad is not None]
    problem.clear()
    return gradients


def measure_labels(
    work: LabelWork, device: torch.device, repetitions: int
) -> Iterator[LabelTiming]:
    """All peers on the same tensors, in turns."""
    problem = LabelProblem(work, device)
    seconds: dict[str, list[float]] = {name: [] for name in LABEL_PEERS}
    differences: dict[str, float] = {}
    for turn in range(repetitions + 1):  # the first is not timed
        usual: list[Tensor] = []
        for name, peer in LABEL_PEERS.items():
            step = peer(problem)
            if turn == 0:
                step()
                gradients = label_gradients(problem)
                usual = usual or gradients
                differences[name] = _difference(gradients, usual)
                del gradients
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - began)
            problem.clear()
            del step
    for name in LABEL_PEERS:
        ratios = [a / b for a, b in zip(seconds[name], seconds["nnce"], strict=True)]
        yield LabelTiming(
            str(work),
            name,
            statistics.median(seconds[name]),
            statistics.median(ratios),
            min(ratios),
            max(ratios),
            peak_of_labels(work, name, device),
            differences[name],
            repetitions,
            torch.get_num_threads(),
        )


def _difference(gradients: list[Tensor], usual: list[Tensor]) -> float:
    if not gradients:
        return math.nan
    squares = [
        torch.stack([(a - b).norm() ** 2, b.norm() ** 2])
        for a, b in zip(gradients, usual, strict=True)
    ]
    off, whole = torch.stack(squares).sum(0).sqrt().tolist()
    return float(off / whole)


def peak_of_labels(work: LabelWork, name: str, device: torch.device) -> float:
    """Bytes beyond what is there before, and the gradients, of a first step; NaN if unknown."""
    if device.type == "cpu" and sys.platform != "linux":
        return math.nan  # the peak cannot be begun anew
    command = [sys.executable, __file__, "labels", "--device", device.type]
    command += ["--peak", name, *map(str, work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else math.nan


def print_peak(name: str, sizes: Sequence[int], device: torch.device) -> None:
    """In this process, which is to have done nothing else."""
    peer = LABEL_PEERS[name]
    warm_up = LabelProblem(LabelWork(*(min(size, 2_048) for size in sizes)), device)
    peer(warm_up)()  # libraries, threads and what they keep
    problem = LabelProblem(LabelWork(*sizes), device)
    step = peer(problem)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        after = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = psutil.Process().memory_info().rss
        step()
        status = Path("/proc/self/status").read_text()
        after = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(after - before - problem.work.gradient_bytes)


def readable_labels(timing: LabelTiming) -> report.Row:
    """A row for people."""
    spread = f"{timing.ratio_least:.2f}–{timing.ratio_most:.2f}"
    known = not math.isnan(timing.difference)
    return {
        "work": timing.work,
        "peer": timing.peer,
        "seconds": f"{timing.seconds:.3f}",
        "ratio": f"{timing.ratio:.2f} ({spread})",
        "peak MB": "" if math.isnan(timing.peak_bytes) else f"{timing.peak_bytes / 1e6:,.0f}",
        "difference": f"{timing.difference:.1e}" if known else "",
    }


def all_labels(options: argparse.Namespace, device: torch.device) -> list[LabelTiming]:
    """All timings of many labels."""
    works = QUICK_LABEL_WORKS if options.quick else LABEL_WORKS
    bar = tqdm(works, unit="size", disable=None, leave=False)
    return [timing for work in bar for timing in measure_labels(work, device, options.repetitions)]


# ---------------------------------------------------------------------------------- distortions


class DistortionTiming(NamedTuple):
    """What a distortion, or a step of training, takes; a row of results.json."""

    work: str
    seconds: float
    """An epoch of 50,000 images, the median."""
    ratio: float
    """Over the training at mini-batch 10, in the same turn: the median, the least and the most."""
    ratio_least: float
    ratio_most: float
    repetitions: int
    threads: int


WIDE = (784, 800, 10)
TRAINING = "training 784-800-10, mini-batch 10"
BOTH = data.Distortion(rotation=10, scaling=0.15, shear=0.15, translation=1.5, alpha=34)
# torchvision draws one field for all images of a call, so it is called for each of so many.
ONE_BY_ONE = 200


def distorters(x: Tensor, y: Tensor) -> dict[str, Callable[[], float]]:
    """By name what distorts some images, or trains on them; it returns what share of x it was."""
    order = torch.arange(len(x), device=x.device)

    def ours(distortion: data.Distortion) -> float:
        new = data.Distorted(x, order, distortion, seed=0, epoch=0)
        for begin in range(0, len(x), 1_000):
            new[begin : begin + 1_000]
        return 1.0

    first = BOTH(x[:1_000], torch.Generator(x.device).manual_seed(0))
    images, targets = first.repeat(-(-len(x) // 1_000), 1)[: len(x)], y

    def trainer(batch_size: int) -> Callable[[], float]:
        network = MLP(WIDE, init=0.05, device=x.device)
        values = Hyperparameters("cross-entropy", 0.01)
        network_alone = Ensemble([network], [values], batch_size=batch_size)

        def train() -> float:
            network_alone.train_epoch(images, targets, order)
            return 1.0

        return train

    found: dict[str, Callable[[], float]] = {
        TRAINING: trainer(10),
        "training 784-800-10, mini-batch 100": trainer(100),
        "nnce, affine": partial(ours, dataclasses.replace(BOTH, alpha=0.0)),
        "nnce, elastic": partial(ours, data.Distortion(alpha=34)),
        "nnce, both": partial(ours, BOTH),
    }
    square = x.view(-1, 1, 28, 28)
    with contextlib.suppress(ImportError):
        kornia = importlib.import_module("kornia.augmentation")
        elastic = kornia.RandomElasticTransform((63, 63), (4.0, 4.0), (1.0, 1.0), p=1.0)

        def by_kornia() -> float:
            for part in square.split(1_000):
                elastic(part)
            return 1.0

        found["kornia, elastic"] = by_kornia
    with contextlib.suppress(ImportError):
        transforms = importlib.import_module("torchvision.transforms.v2")
        one = transforms.ElasticTransform(alpha=34.0, sigma=4.0)

        def by_torchvision() -> float:
            for image in square[:ONE_BY_ONE]:
                one(image)
            return ONE_BY_ONE / len(square)

        found["torchvision, elastic, image by image"] = by_torchvision
    return found


def all_distortions(options: argparse.Namespace, device: torch.device) -> list[DistortionTiming]:
    """All of them in turns."""
    n = EXAMPLES // 10 if options.quick else EXAMPLES
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 784, generator=generator)
    x = (x * (torch.rand(n, 784, generator=generator) < DENSITY)).to(device)
    y = data.one_hot(torch.randint(10, (n,), generator=generator), 10).to(device, torch.float32)
    seconds: dict[str, list[float]] = {}
    distorting = distorters(x, y)
    turns = range(options.repetitions + 1)  # the first is not timed
    for turn in tqdm(turns, unit="turn", disable=None, leave=False):
        for name, work in distorting.items():
            began = time.perf_counter()
            share = work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                an_epoch = (time.perf_counter() - began) / share * EXAMPLES / n
                seconds.setdefault(name, []).append(an_epoch)
    timings = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[TRAINING], strict=True)]
        timings.append(
            DistortionTiming(
                *(name, statistics.median(times)),
                *(statistics.median(ratios), min(ratios), max(ratios)),
                *(options.repetitions, torch.get_num_threads()),
            )
        )
    return timings


def readable_distortions(timing: DistortionTiming) -> report.Row:
    """A row for people."""
    return {
        "what": timing.work,
        "seconds an epoch": f"{timing.seconds:.2f}",
        "over the training": f"{timing.ratio:.2f} ({timing.ratio_least:.2f}–"
        f"{timing.ratio_most:.2f})",
    }


# ------------------------------------------------------------------------------------- the script


def parser() -> ArgumentParser:
    """The options."""
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        choices=("networks", "labels", "distortions"),
        default="networks",
        help="an epoch of training, the loss of many labels, or distortions of images",
    )
    parser.add_argument("--quick", action="store_true", help="two minutes' worth of it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="where")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of each peer")
    parser.add_argument("--run-dir", type=Path, help="a new folder (default: one under runs/)")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)  # for peak_of_labels
    parser.add_speed_options()
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 if a peer did not come to the loss of the others."""
    options_parser = parser()
    options = options_parser.parse_args(arguments)
    began = time.perf_counter()
    with options_parser.user_errors():
        device = command_line.device(options.device)
        if not 1 <= options.repetitions <= 1_000:
            raise ValueError(f"expected 1 to 1,000 repetitions, got {options.repetitions}")
        command_line.set_speed(options, suited=torch.get_num_threads())  # refuses before a run
    if options.peak:
        print_peak(options.peak[0], [int(size) for size in options.peak[1:]], device)
        return 0
    with options_parser.run_directory(options.run_dir, f"benchmark-{options.what}") as run_dir:
        command_line.announce_threads(options)
        timings: Sequence[Timing | LabelTiming | DistortionTiming]
        if options.what == "networks":
            timings = measure_all(options, device)
        elif options.what == "labels":
            timings = all_labels(options, device)
        else:
            timings = all_distortions(options, device)
        report.write_results(
            run_dir,
            config={name: value for name, value in vars(options).items() if name != "peak"},
            device=device,
            seconds=time.perf_counter() - began,
            rows=[timing._asdict() for timing in timings],
        )
        rows = [in_a_row(timing) for timing in timings]
        print(f"{report.table(rows)}\n")
        print(f"Results: {run_dir}")
    wrong = [sentence for sentence in map(complaint, timings) if sentence]
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0


def in_a_row(timing: Timing | LabelTiming | DistortionTiming) -> report.Row:
    """A row for people."""
    if isinstance(timing, Timing):
        return readable(timing)
    if isinstance(timing, LabelTiming):
        return readable_labels(timing)
    return readable_distortions(timing)


def complaint(timing: Timing | LabelTiming | DistortionTiming) -> str | None:
    """What is wrong with a peer's result, if anything."""
    if isinstance(timing, DistortionTiming):
        return None
    if isinstance(timing, LabelTiming):
        if not timing.difference > SAME_GRADIENTS:
            return None
        return f"{timing.work}, {timing.peer}: WRONG: gradients differ by {timing.difference:.1e}"
    if timing.outcome not in ("wrong", "failed"):
        return None
    return f"{timing.work}, {timing.peer}: {timing.outcome.upper()}: {timing.note}"


def measure_all(options: argparse.Namespace, device: torch.device) -> list[Timing]:
    """All timings, and a warning where another program was at work."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(EXAMPLES, 784, generator=generator)
    ranks = torch.rand(EXAMPLES, 784, generator=generator)
    labels = torch.randint(10, (EXAMPLES,), generator=generator)
    y = data.one_hot(labels, 10).to(device, torch.float32)
    timings: list[Timing] = []
    processors = os.cpu_count() or 1
    all_threads = torch.get_num_threads()
    for work in QUICK if options.quick else WORKS:
        x = (values * (ranks < work.density)).to(device)
        torch.set_num_threads(all_threads)
        command_line.set_speed(options, suited=ensemble.threads(work.sizes, work.batch_size))
        work = work._replace(threads=command_line.threads(options))
        neighbours = Neighbours()
        with threadpool_limits(torch.get_num_threads()):
            timings += measure(
                work, QUICK_PEERS if options.quick else list(PEERS), x, y, options.repetitions
            )
        if neighbours.share() > BUSY:
            print(
                f"warning: {work}: other programs took {neighbours.share():.1f} of {processors} "
                f"processors while this was measured; do not trust it",
                file=sys.stderr,
            )
    return timings


if __name__ == "__main__":
    command_line.run_script(main)
