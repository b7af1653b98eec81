"""Benchmark of training: one epoch of each peer, and a lower bound of the time.

An epoch is 50,000 random examples of MNIST's shape, including shuffling and gathering mini-batches
but not evaluation. All peers start from the same network and see the same mini-batches, after a
check that they reach the same loss. `ratio` is a peer's time divided by nnce's.

Two rows are not peers. The floor is PyTorch's time for the dense matrix products alone. The limit
is an estimated lower bound for any implementation with nnce's number of threads: the time of the
multiplications and memory traffic for the nonzero inputs, at the peak rates measured on one thread.
"""

import argparse
import itertools
import math
import os
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from nnce import _memory, data, training
from nnce.engines import ensemble
from nnce.experiments import command_line
from nnce.experiments.benchmarks import peers
from nnce.experiments.benchmarks.peers import FLOOR, JAX, JAX_VMAP, NNCE, PEERS, Epoch, Work
from nnce.experiments.timing import Neighbors, Timing, in_turns, peak_memory, seconds_of
from nnce.modules import MLP

EXAMPLES = 50_000
# Largest relative difference of C after an epoch of 1,000 examples; a wrong update changes the
# first digit.
SAME_LOSS = 1e-3
# Largest product of weights, examples and networks in a turn, which then takes a second or two.
BUDGET = 10_000_000_000
# Other programs that keep more processors busy than this spoil a measurement.
BUSY = 0.1
LIMIT = "limit (estimate)"
_UNKNOWN = Timing()

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


class Runner(NamedTuple):
    """A peer that is compiled and has run once."""

    epoch: Epoch
    examples: int
    """Number of timed examples."""
    peak_bytes: float


# ------------------------------------------------------------------------------------- preparing


def fresh_networks(work: Work, networks: int, device: torch.device) -> list[MLP]:
    """Create the initial networks, the same for every peer."""
    _memory.check_memory(work.sizes, networks, device=device)
    return [
        MLP(work.sizes, generator=torch.Generator().manual_seed(seed), device=device)
        for seed in range(networks)
    ]


def check(name: str, work: Work, x: Tensor, y: Tensor, networks: int) -> float:
    """Loss of the first network on 1,000 examples after an epoch of them in fixed order."""
    x, y = x[:1000], y[:1000]
    epoch, parameters = PEERS[name](work, x, y, fresh_networks(work, networks, x.device))
    # The order of the first network is always the same.
    order = torch.arange(len(x), device=x.device)
    epoch(work.indices(order, networks, torch.Generator().manual_seed(0)))
    network = fresh_networks(work, 1, x.device)[0]
    with torch.no_grad():
        for p, value in zip(network.parameters(), parameters(), strict=True):
            p.copy_(torch.as_tensor(value).view_as(p))
    return training.evaluate(network, data.Split(x, y), "cross-entropy").loss


def prepare(name: str, work: Work, x: Tensor, y: Tensor, networks: int) -> Runner:
    """Create a peer and run it once, to compile and to measure its peak memory."""
    # Large or many networks are timed on a part of an epoch; times are scaled to a whole one.
    weights = sum(n_in * n_out for n_in, n_out in itertools.pairwise(work.sizes))
    affordable = BUDGET // (weights * networks * (10 if name == peers.BY_EXAMPLE else 1))
    examples = min(len(x), max(4 * work.batch_size, affordable))

    def first() -> Epoch:
        epoch, _ = PEERS[name](work, x, y, fresh_networks(work, networks, x.device))
        # Code that is compiled for fixed shapes must run with all of them.
        compiles = name in (JAX, JAX_VMAP, peers.COMPILED)
        warm = torch.arange(examples if compiles else min(examples, 2_000), device=x.device)
        epoch(work.indices(warm, networks, torch.Generator().manual_seed(0)))
        return epoch

    epoch, peak = peak_memory(first, x.device)
    return Runner(epoch, examples, peak)


# ------------------------------------------------------------------------------------- measuring


def row(
    work: Work,
    peer: str,
    networks: int,
    outcome: str,
    note: str = "",
    timing: Timing = _UNKNOWN,
    **more: object,
) -> dict[str, Any]:
    """A row of results.json, with the time of an epoch of one network.

    The outcome is "right", "wrong" (the loss differs from nnce's), "failed" (an exception),
    "missing" (cannot run here) or "estimate"; the note is a wrong loss, or the reason why there is
    no time. `more` has peak_bytes, threads, and examples, the number of timed examples.
    """
    return {
        **{"work": str(work), "peer": peer, "networks": networks, "outcome": outcome, "note": note},
        **timing._asdict(),
        "examples_per_second": EXAMPLES / timing.seconds,
        **{"peak_bytes": math.nan, "examples": 0, "threads": 0, **more},
    }


def peaks_of_one_thread(work: Work) -> tuple[float, float]:
    """Peak multiply-adds and bytes per second of one thread, the best of several runs.

    The former is measured on a matrix product, the latter on an addition to the weights of a first
    layer, which are in the cache; reads and writes both count.
    """
    before, cpu = torch.get_num_threads(), torch.device("cpu")
    torch.set_num_threads(1)
    try:
        a, b, c = (torch.rand(1_024, 1_024) for _ in range(3))
        weights, steps = (torch.rand(work.sizes[0] * work.sizes[1]) for _ in range(2))
        runs = 100_000_000 // len(weights)
        product = min(seconds_of(lambda: torch.mm(a, b, out=c), cpu) for _ in range(20))
        add = min(
            seconds_of(lambda: torch.add(weights, steps, out=weights), cpu, runs) for _ in range(5)
        )
    finally:
        torch.set_num_threads(before)
    return 1_024**3 / product, 3 * 4 * len(weights) / add


def limit(work: Work, networks: int, ours: float) -> dict[str, Any]:
    """Row with a lower bound of the time for the nonzero inputs, with nnce's number of threads.

    Multiplications per example: two per weight of the first layer with a nonzero input (forward and
    update), three per weight of the other layers. Bytes: nonzero inputs and their indices once, and
    each weight three times per mini-batch (read in the forward pass, read and written in the
    update) unless all its inputs in the mini-batch are 0.
    """
    first, *above = (n_in * n_out for n_in, n_out in itertools.pairwise(work.sizes))
    n, density = work.batch_size, work.density
    multiplications = 2 * density * first + 3 * sum(above)
    inputs = (8 if density < 1 else 4) * density * work.sizes[0]
    weights = (1 - (1 - density) ** n) * first + sum(above)
    needed = inputs + 12 * weights / n
    most, most_bytes = peaks_of_one_thread(work)
    at_least = max(multiplications / most, needed / most_bytes)
    threads = threads_of(NNCE, work, networks)
    seconds = EXAMPLES * at_least / threads
    note = (
        f"{multiplications:,.0f} multiplications and {needed:,.0f} bytes per example, at "
        f"{most / 1e9:.0f} G/s and {most_bytes / 1e9:.0f} GB/s per thread"
    )
    timing = Timing(seconds, seconds / ours, seconds / ours, seconds / ours)
    return row(work, LIMIT, networks, "estimate", note, timing, threads=threads)


def threads_of(name: str, work: Work, networks: int) -> int:
    """Number of threads of a peer; JAX uses all processors."""
    suits = ensemble.suits_loops(
        work.sizes, work.batch_size, torch.float32, torch.device("cpu"), work.density
    )
    if name == peers.LOOPS or (name == NNCE and suits):
        return min(networks, work.threads or os.cpu_count() or 1)
    return (os.cpu_count() or 1) if name in (JAX, JAX_VMAP) else torch.get_num_threads()


_Key = tuple[str, int]  # name of a peer, and number of networks that it trains together


def measure(
    work: Work, names: Sequence[str], x: Tensor, y: Tensor, repetitions: int
) -> list[dict[str, Any]]:
    """Measure one workload: one row per peer and number of networks."""
    runners, losses, rows = _prepare_all(work, names, x, y)
    generator = torch.Generator().manual_seed(0)

    def train(key: _Key) -> None:
        order = data.order(runners[key].examples, generator, x.device)
        runners[key].epoch(work.indices(order, key[1], generator))

    took = in_turns(runners, partial(partial, train), repetitions, x.device, str(work))
    seconds = {
        key: [of_turn / key[1] * EXAMPLES / runners[key].examples for of_turn in took[key]]
        for key in runners
    }
    expected = losses[NNCE, work.networks[0]]
    for networks in work.networks:
        ours = seconds[NNCE, networks]
        for name in names:
            key = (name, networks if name in peers.SIDE_BY_SIDE else 1)
            if key not in seconds or (networks != key[1] and name != peers.EAGER):
                continue
            is_right = key not in losses or abs(losses[key] - expected) <= SAME_LOSS * expected
            rows.append(
                row(
                    *(work, name, networks, "right" if is_right else "wrong"),
                    "" if is_right else f"C is {losses[key]:.4f}",
                    Timing.of(seconds[key], ours),
                    peak_bytes=runners[key].peak_bytes,
                    examples=runners[key].examples,
                    threads=threads_of(name, work, key[1]),
                )
            )
        if not x.is_cuda:
            rows.append(limit(work, networks, statistics.median(ours)))
    return rows


def _prepare_all(
    work: Work, names: Sequence[str], x: Tensor, y: Tensor
) -> tuple[dict[_Key, Runner], dict[_Key, float], list[dict[str, Any]]]:
    """Prepare all peers; return those that can run, their losses, and rows for the others."""
    runners: dict[_Key, Runner] = {}
    losses: dict[_Key, float] = {}
    rows = []
    for name in names:
        keys = [(name, n) for n in (work.networks if name in peers.SIDE_BY_SIDE else (1,))]
        try:
            if name != FLOOR:
                losses |= {key: check(name, work, x, y, key[1]) for key in keys}
            runners |= {key: prepare(name, work, x, y, key[1]) for key in keys}
        except peers.Missing as reason:
            rows.append(row(work, name, 1, "missing", str(reason)))
        except Exception as error:  # code of other libraries; continue with the next peer
            if name.startswith(NNCE):
                raise
            rows.append(row(work, name, 1, "failed", type(error).__name__))
    return runners, losses, rows


def measure_all(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure all workloads; warn if other programs were busy."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(EXAMPLES, 784, generator=generator)
    ranks = torch.rand(EXAMPLES, 784, generator=generator)
    labels = torch.randint(10, (EXAMPLES,), generator=generator)
    y = data.one_hot(labels, 10).to(device, torch.float32)
    rows: list[dict[str, Any]] = []
    all_threads = torch.get_num_threads()
    for work in QUICK if options.quick else WORKS:
        x = (values * (ranks < work.density)).to(device)
        torch.set_num_threads(all_threads)
        command_line.set_speed(options, suited=ensemble.threads(work.sizes, work.batch_size))
        work = work._replace(threads=command_line.threads(options))
        neighbors = Neighbors()
        with threadpool_limits(torch.get_num_threads()):
            names = peers.QUICK_PEERS if options.quick else list(PEERS)
            rows += measure(work, names, x, y, options.repetitions)
        if neighbors.share() > BUSY:
            print(
                f"warning: {work}: other programs used {neighbors.share():.1f} of "
                f"{os.cpu_count() or 1} processors during the measurement; do not trust it",
                file=sys.stderr,
            )
    return rows
