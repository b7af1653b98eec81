"""Time an epoch of training, of nnce and of what else one would use, side by side on one machine.

An epoch is 50,000 examples of MNIST's shape, drawn at random: shuffling and gathering mini-batches
is part of it, evaluation is not. Every way starts from the same network, sees the same mini-batches
and is first checked to come to the same loss. Ways take turns, so that what else the machine does
falls on all of them alike; the figures are medians, and `ratio` is a way's time over nnce's, the
median of the ratios of each turn.
"""

if __name__ == "__main__":
    import startup  # noqa: F401  before all else


import argparse
import contextlib
import copy
import gc
import itertools
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from tqdm import tqdm

from nnce import data, ensemble, experiment, functional, training
from nnce.ensemble import Ensemble, Hyperparameters
from nnce.modules import MLP

EXAMPLES = 50_000
LR = 0.5
# Of ‖C‖ after one epoch of 1,000 examples; a wrong update shows in the first digit.
SAME_LOSS = 1e-3
# Weights times examples times networks that one turn of one way may take: a second or two.
BUDGET = 10_000_000_000
# More of a processor than this in other hands spoils a figure.
BUSY = 0.1


class Work(NamedTuple):
    """A network and its mini-batches."""

    sizes: tuple[int, ...]
    batch_size: int
    networks: tuple[int, ...]
    """How many side by side, each a row of its own."""

    def __str__(self) -> str:
        """As the table has it."""
        return f"{'-'.join(map(str, self.sizes))}, batch {self.batch_size}"


WORKS = (
    Work((784, 30, 10), 10, (1, 4, 16, 64)),
    Work((784, 100, 10), 10, (1, 4, 16, 64)),
    Work((784, 800, 10), 128, (1, 4, 16, 64)),
    Work((784, 1000, 1000, 10), 512, (1, 4, 16, 64)),
)
QUICK = (Work((784, 30, 10), 10, (1, 16)),)

Epoch = Callable[[Tensor], object]
"""Train on the examples in this order."""
Parameters = Callable[[], Sequence[Any]]
"""W, b, W, b, … of the first network, as they are now."""
Way = Callable[[Work, Tensor, Tensor, list[MLP]], tuple[Epoch, Parameters]]


class Missing(Exception):
    """This way cannot be tried here; the message says why."""


# ------------------------------------------------------------------------------------- the ways


def nnce_(
    work: Work, x: Tensor, y: Tensor, networks: list[MLP], kind: type[Ensemble] = Ensemble
) -> tuple[Epoch, Parameters]:
    """The revised algorithm, networks side by side."""
    values = [Hyperparameters("cross-entropy", LR)] * len(networks)
    together = kind(networks, values, batch_size=work.batch_size)
    return partial(together.train_epoch, x, y), lambda: list(networks[0].parameters())


class _Products(ensemble._Step):
    """Of a step the matrix products alone: nothing is learnt."""

    def calls(self, x: Tensor, y: Tensor, not_y: Tensor) -> list[ensemble.Call]:
        """Two forward, one da and two dW for two layers, and likewise for more."""
        calls: list[ensemble.Call] = []
        inputs = [x, *(place.a for place in self._places)]
        for place, a_prev in zip(self._places, inputs[:-1], strict=True):
            calls.append(partial(place.multiply, a_prev, place.WT, out=place.z))
        for index in reversed(range(len(self._places))):
            place, W = self._places[index], self._places[index].layer.W.value
            place.dz.zero_()  # what was in that memory before may be slow numbers
            if index > 0:
                da = self._places[index - 1].da
                calls.append(partial(place.multiply, place.dz, W, out=da))
            calls.append(partial(place.multiply_add, W, place.dzT, inputs[index], out=W))
        return calls


class Products(Ensemble):
    """An ensemble of such steps: the data's way is the same."""

    def _step(self, group: ensemble._Group, n: int) -> ensemble._Step:
        return _Products(group, n)


def floor(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> tuple[Epoch, Parameters]:
    """The matrix products alone, with the same shuffling and gathering."""
    return nnce_(work, x, y, networks, kind=Products)


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
    criterion = training.builtin_loss("cross-entropy")

    def seconds(settings: dict[str, bool]) -> float:
        trial = training.torch_twin(copy.deepcopy(networks[0]))
        epoch, _ = _loop(work, x, y, trial, criterion, **settings)
        generator = torch.Generator().manual_seed(0)
        epoch(data.order(min(len(x), 10 * work.batch_size), generator, x.device))
        return timed(epoch, min(len(x), 100 * work.batch_size), generator, x.device)

    best = min(({"fused": True}, {"foreach": True}, {"foreach": False}), key=seconds)
    return _loop(work, x, y, training.torch_twin(networks[0]), criterion, **best)


def functions(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> tuple[Epoch, Parameters]:
    """nnce's Functions inside PyTorch's graph."""
    return _loop(work, x, y, networks[0], functional.sigmoid_cross_entropy, fused=True)


def compiled(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> tuple[Epoch, Parameters]:
    """The whole step under torch.compile: forward, backward and update in one graph."""
    torch._dynamo.reset()  # what was compiled for another work counts against a limit
    twin = training.torch_twin(networks[0])
    parameters = {name: p.detach() for name, p in twin.named_parameters()}
    criterion = training.builtin_loss("cross-entropy")

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return criterion(torch.func.functional_call(twin, parameters, (x,)), y)

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
    twin = training.torch_twin(networks[0])
    criterion = training.builtin_loss("cross-entropy")
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


def jax_scan(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> tuple[Epoch, Parameters]:
    """JAX: an epoch as one jitted scan over the mini-batches."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError as error:
        raise Missing("not installed: pip install -e '.[bench]'") from error
    X, Y = jnp.asarray(x.cpu().numpy()), jnp.asarray(y.cpu().numpy())
    parameters = [tuple(map(jnp.asarray, pair)) for pair in zip(*_arrays(networks[0]), strict=True)]

    def loss(parameters: Any, x: Any, y: Any) -> Any:
        a = x
        for W, b in parameters[:-1]:
            a = jax.nn.sigmoid(a @ W.T + b)
        W, b = parameters[-1]
        z = a @ W.T + b
        return (jax.nn.softplus(z) - y * z).sum() / len(x)

    def step(parameters: Any, batch: Any) -> tuple[Any, None]:
        gradients = jax.grad(loss)(parameters, X[batch], Y[batch])
        return jax.tree.map(lambda p, g: p - LR * g, parameters, gradients), None

    @partial(jax.jit, donate_argnums=0)
    def scan(parameters: Any, order: Any) -> Any:
        whole = len(order) // work.batch_size * work.batch_size
        parameters, _ = jax.lax.scan(step, parameters, order[:whole].reshape(-1, work.batch_size))
        if whole < len(order):
            parameters, _ = step(parameters, order[whole:])
        return parameters

    def epoch(order: Tensor) -> None:
        nonlocal parameters
        wait: Any = jax.block_until_ready
        parameters = wait(scan(parameters, jnp.asarray(order.cpu().numpy())))

    return epoch, lambda: [np.array(p) for pair in parameters for p in pair]


NNCE = "nnce"
FLOOR = "floor (matrix products alone)"
EAGER = "torch.nn eager"
COMPILED = "torch.compile"
JAX = "JAX jit + scan"
BY_EXAMPLE = "NumPy, by example"

WAYS: dict[str, Way] = {
    NNCE: nnce_,
    FLOOR: floor,
    EAGER: eager,
    COMPILED: compiled,
    "torch.nn eager, CUDA graph": cuda_graphed,
    "nnce functions": functions,
    JAX: jax_scan,
    "scikit-learn": scikit_learn,
    "NumPy, vectorised": numpy_vectorised,
    BY_EXAMPLE: numpy_by_example,
}
QUICK_WAYS = (NNCE, FLOOR, EAGER, JAX)
# Networks side by side; the others train R networks one after the other.
SIDE_BY_SIDE = (NNCE, FLOOR)


# ------------------------------------------------------------------------------------- measuring


class Runner(NamedTuple):
    """A way, ready to run."""

    way: str
    networks: int
    epoch: Epoch
    examples: int
    peak_bytes: int | None


def timed(epoch: Epoch, n: int, generator: torch.Generator, device: torch.device) -> float:
    """Seconds that drawing an order and training on it take, until the device is done."""
    began = time.perf_counter()
    epoch(data.order(n, generator, device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@contextlib.contextmanager
def peak(device: torch.device, found: list[int]) -> Iterator[None]:
    """How much memory the block needed at most, beyond what was in use; nothing if unknowable."""
    gc.collect()
    status = Path("/proc/self/status")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        found.append(torch.cuda.max_memory_allocated() - before)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:
        yield
        return
    before = psutil.Process().memory_info().rss
    yield
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    found.append(max(0, int(line.split()[1]) * 1024 - before))


def start(work: Work, networks: int, device: torch.device) -> list[MLP]:
    """The networks every way starts from."""
    ensemble.check_memory(work.sizes, networks, device=device)
    return [
        MLP(work.sizes, generator=torch.Generator().manual_seed(seed), device=device)
        for seed in range(networks)
    ]


def check(name: str, work: Work, x: Tensor, y: Tensor, networks: int) -> float:
    """The first network's C over 1,000 examples after an epoch of them, in a fixed order."""
    x, y = x[:1000], y[:1000]
    epoch, parameters = WAYS[name](work, x, y, start(work, networks, x.device))
    epoch(torch.arange(len(x), device=x.device))
    network = start(work, 1, x.device)[0]
    with torch.no_grad():
        for p, value in zip(network.parameters(), parameters(), strict=True):
            p.copy_(torch.as_tensor(value).view_as(p))
    return training.evaluate(network, data.Split(x, y), "cross-entropy")[0]


def prepare(name: str, work: Work, x: Tensor, y: Tensor, networks: int) -> Runner:
    """Make a way ready, and run it once."""
    # Large networks, and many, take a part of an epoch; the figures are for the whole.
    weights = sum(n_in * n_out for n_in, n_out in itertools.pairwise(work.sizes))
    affordable = BUDGET // (weights * networks * (10 if name == BY_EXAMPLE else 1))
    examples = min(len(x), max(4 * work.batch_size, affordable))
    found: list[int] = []
    with peak(x.device, found):
        epoch, _ = WAYS[name](work, x, y, start(work, networks, x.device))
        # What is compiled for its shapes must have seen them all.
        compiles = name in (JAX, COMPILED)
        warm = torch.arange(examples if compiles else min(examples, 2_000))
        epoch(warm.to(x.device))
    return Runner(name, networks, epoch, examples, found[0] if found else None)


def measure(
    work: Work, names: Sequence[str], x: Tensor, y: Tensor, repetitions: int
) -> list[experiment.Row]:
    """The rows of one work."""
    rows: list[experiment.Row] = []
    runners: list[Runner] = []
    losses: dict[tuple[str, int], float] = {}
    for name in names:
        try:
            counts = work.networks if name in SIDE_BY_SIDE else (1,)
            if name != FLOOR:
                losses |= {(name, n): check(name, work, x, y, n) for n in counts}
            runners += [prepare(name, work, x, y, networks) for networks in counts]
        except Missing as reason:
            rows.append(row(work, name, 1, note=str(reason)))
        except Exception as error:  # others' code; the rest of the table is still worth having
            if name in SIDE_BY_SIDE:
                raise
            rows.append(row(work, name, 1, note=f"FAILED: {type(error).__name__}"))
    wrong = {
        key: loss
        for key, loss in losses.items()
        if not abs(loss - losses[NNCE, 1]) <= SAME_LOSS * losses[NNCE, 1]
    }
    seconds: dict[tuple[str, int], list[float]] = {(r.way, r.networks): [] for r in runners}
    generator = torch.Generator().manual_seed(0)
    # In another order each time: whoever comes after the slowest finds cold caches.
    shuffled = random.Random(0)
    turns = [r for _ in range(repetitions) for r in shuffled.sample(runners, len(runners))]
    for runner in tqdm(turns, desc=str(work), disable=None, leave=False):
        took = timed(runner.epoch, runner.examples, generator, x.device)
        per_network = took / runner.networks * EXAMPLES / runner.examples
        seconds[runner.way, runner.networks].append(per_network)

    measured = {(r.way, r.networks): (r.peak_bytes, r.examples) for r in runners}
    for networks in work.networks:
        ours = seconds[NNCE, networks]
        for name in names:
            side_by_side = name in SIDE_BY_SIDE
            if networks > 1 and not side_by_side and name != EAGER:
                continue
            key = (name, networks if side_by_side else 1)
            if key in seconds:
                ratios = [a / b for a, b in zip(seconds[key], ours, strict=True)]
                note = f"WRONG: C is {wrong[key]:.4f}" if key in wrong else ""
                rows.append(row(work, name, networks, seconds[key], ratios, *measured[key], note))
    return rows


def row(
    work: Work,
    peer: str,
    networks: int,
    seconds: Sequence[float] = (),
    ratios: Sequence[float] = (),
    peak_bytes: int | None = None,
    examples: int = 0,
    note: str = "",
) -> experiment.Row:
    """One row of results.json."""
    median = statistics.median(seconds) if seconds else math.nan
    return {
        "work": str(work),
        "peer": peer,
        "networks": networks,
        "seconds": median,
        "examples_per_second": EXAMPLES / median,
        "ratio": statistics.median(ratios) if ratios else math.nan,
        "ratio_least": min(ratios, default=math.nan),
        "ratio_most": max(ratios, default=math.nan),
        "peak_bytes": peak_bytes,
        "examples": examples,
        "repetitions": len(seconds),
        "threads": torch.get_num_threads(),
        "note": note,
    }


def readable(row: experiment.Row) -> experiment.Row:
    """A row for people."""
    seconds, ratio, peak_bytes = (row[key] for key in ("seconds", "ratio", "peak_bytes"))
    there = isinstance(seconds, float) and not math.isnan(seconds)
    return {
        "work": row["work"],
        "networks": row["networks"],
        "way": row["peer"],
        "seconds": f"{seconds:.3f}" if there else "",
        "examples/s": f"{row['examples_per_second']:,.0f}" if there else "",
        "ratio": f"{ratio:.2f} ({row['ratio_least']:.2f}–{row['ratio_most']:.2f})" if there else "",
        "peak MB": f"{peak_bytes / 1e6:,.0f}" if isinstance(peak_bytes, int) else "",
        "threads": row["threads"] if there else "",
        "note": row["note"],
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


def parser() -> experiment.ArgumentParser:
    """The options."""
    parser = experiment.ArgumentParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="two minutes' worth of it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="where")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of each way")
    parser.add_argument("--run-dir", type=Path, help="a new folder (default: one under runs/)")
    parser.add_speed_options()
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 if a way did not come to the loss of the others."""
    options_parser = parser()
    options = options_parser.parse_args(arguments)
    began = time.perf_counter()
    with options_parser.user_errors():
        device = experiment.device(options.device)
        if not 1 <= options.repetitions <= 1_000:
            raise ValueError(f"expected 1 to 1,000 repetitions, got {options.repetitions}")
        experiment.set_speed(options, suited=torch.get_num_threads())  # refuses before a run
    with options_parser.run_directory(options.run_dir, "benchmark") as run_dir:
        rows = measure_all(options, device)
        experiment.write_results(
            run_dir,
            config=vars(options),
            device=device,
            seconds=time.perf_counter() - began,
            rows=rows,
        )
        print(f"{experiment.table([readable(row) for row in rows])}\n")
        print(f"Results: {run_dir}")
    wrong = [row for row in rows if str(row["note"]).startswith(("WRONG", "FAILED"))]
    for found in wrong:
        print(f"{found['work']}, {found['peer']}: {found['note']}", file=sys.stderr)
    return 1 if wrong else 0


def measure_all(options: argparse.Namespace, device: torch.device) -> list[experiment.Row]:
    """All rows, and a warning where another program was at work."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(EXAMPLES, 784, generator=generator)
    # As many zeros as MNIST has: weights whose input is 0 do not move.
    x = (x * (torch.rand(EXAMPLES, 784, generator=generator) < 0.2)).to(device)
    labels = torch.randint(10, (EXAMPLES,), generator=generator)
    y = data.one_hot(labels, 10).to(device, torch.float32)
    rows: list[experiment.Row] = []
    processors = os.cpu_count() or 1
    all_threads = torch.get_num_threads()
    for work in QUICK if options.quick else WORKS:
        torch.set_num_threads(all_threads)
        experiment.set_speed(options, suited=ensemble.threads(work.sizes, work.batch_size))
        neighbours = Neighbours()
        with threadpool_limits(torch.get_num_threads()):
            rows += measure(
                work, QUICK_WAYS if options.quick else list(WAYS), x, y, options.repetitions
            )
        if neighbours.share() > BUSY:
            print(
                f"warning: {work}: other programs took {neighbours.share():.1f} of {processors} "
                f"processors while this was measured; do not trust it",
                file=sys.stderr,
            )
    return rows


if __name__ == "__main__":
    experiment.run_script(main)
