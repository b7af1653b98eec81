"""Benchmark of many labels: value and gradients of a linear layer and its cross-entropy.

All peers use the same tensors, in alternating turns. `ratio` is a peer's time divided by nnce's.
The floor is the time of the three matrix products of nnce's blocks alone. The peak is the memory
beyond inputs, parameters and their gradients, measured in a separate process for each peer.
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnce.experiments.timing import Timing, in_turns, peak_memory
from nnce.labels import blocks, linear_sigmoid_cross_entropy


class Work(NamedTuple):
    """Sizes of a linear layer with its loss; examples have five positive labels."""

    n: int
    features: int
    labels: int

    def __str__(self) -> str:
        return f"{self.labels:,} labels, {self.features} features, n {self.n:,}"


WORKS = [
    Work(1_024, 512, 1_000),
    Work(1_024, 512, 16_384),
    Work(1_024, 512, 131_072),
    Work(512, 256, 1_000_000),
]
QUICK = WORKS[:2]
# Largest relative difference in norm that counts as rounding of float32 gradients.
SAME_GRADIENTS = 1e-5


Step = Callable[[], Tensor]


class Problem:
    """Inputs, parameters and targets, the same for all peers."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work = work
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(work.n, work.features, generator=generator)
        W = torch.empty(work.labels, work.features)
        W.normal_(0, work.features**-0.5, generator=generator)
        index = torch.randint(work.labels, (work.n, 5), generator=generator)
        self.x, self.W = x.to(device).requires_grad_(), W.to(device).requires_grad_()
        self.b = torch.zeros(work.labels, device=device, requires_grad=True)
        self.index = index.to(device)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dense targets of all labels; created before a peer is timed."""
        y = torch.zeros(self.work.n, self.work.labels, dtype=dtype, device=self.x.device)
        return y.scatter_(1, self.index, 1)

    def clear(self) -> None:
        """Set all gradients to None."""
        self.x.grad = self.W.grad = self.b.grad = None

    def step(self, loss: Callable[..., Tensor], y: Tensor) -> Step:
        """Return a function that computes the loss of x, W, b and y, and its gradients."""

        def step() -> Tensor:
            C = loss(self.x, self.W, self.b, y)
            C.backward()
            return C

        return step


def by_nnce(x: Tensor, W: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Compute the loss block by block with nnce."""
    return linear_sigmoid_cross_entropy(x, W, y, linear_bias=b)


def by_pytorch(x: Tensor, W: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Compute the loss with `linear` and `binary_cross_entropy_with_logits`."""
    z = nn.functional.linear(x, W, b)
    return nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(x)


def checkpointed(x: Tensor, W: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Compute the loss with PyTorch in blocks of 8,192 labels, with activation checkpointing."""
    parts = zip(W.split(8_192), b.split(8_192), y.split(8_192, dim=1), strict=True)
    return torch.stack(
        [checkpoint(by_pytorch, x, *part, use_reentrant=False) for part in parts]
    ).sum()


def products(problem: Problem) -> Step:
    """Return a function that computes the three matrix products of nnce's blocks only."""
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


NNCE = "nnce"
PEERS: dict[str, Callable[[Problem], Step]] = {
    NNCE: lambda problem: problem.step(by_nnce, problem.index),
    "nnce, dense targets": lambda problem: problem.step(by_nnce, problem.dense(torch.bool)),
    "floor: three products": products,
    "PyTorch eager": lambda problem: problem.step(by_pytorch, problem.dense()),
    "PyTorch compiled": lambda problem: problem.step(torch.compile(by_pytorch), problem.dense()),
    "PyTorch checkpointed": lambda problem: problem.step(checkpointed, problem.dense()),
}


def gradients(problem: Problem) -> list[Tensor]:
    """Return the gradients of x, W and b, and clear them."""
    found = [t.grad for t in (problem.x, problem.W, problem.b) if t.grad is not None]
    problem.clear()
    return found


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over all tensors; NaN for a peer without gradients."""
    if not found:
        return math.nan
    off = [(a - b).norm().item() for a, b in zip(found, expected, strict=True)]
    return math.hypot(*off) / math.hypot(*(b.norm().item() for b in expected))


def differences(problem: Problem) -> dict[str, float]:
    """Relative differences of the gradients of each peer from nnce's."""
    expected: list[Tensor] = []
    found = {}
    for name, peer in PEERS.items():
        peer(problem)()
        its = gradients(problem)
        expected = expected or its
        found[name] = difference(its, expected)
    return found


def measure(work: Work, device: torch.device, repetitions: int) -> list[dict[str, Any]]:
    """Measure one workload: one row per peer."""
    problem = Problem(work, device)

    def step_of(name: str) -> Step:
        problem.clear()
        return PEERS[name](problem)

    off = differences(problem)  # also the first step of each, which is not timed
    seconds = in_turns(PEERS, step_of, repetitions, device, str(work))
    problem.clear()
    return [
        {
            "work": str(work),
            "peer": name,
            "outcome": "wrong" if off[name] > SAME_GRADIENTS else "right",
            "note": f"gradients differ by {off[name]:.1e}" if off[name] > SAME_GRADIENTS else "",
            **Timing.of(seconds[name], seconds[NNCE])._asdict(),
            "peak_bytes": peak_in_a_process(work, name, device),
            "difference": off[name],
            "threads": torch.get_num_threads(),
        }
        for name in PEERS
    ]


def peak_in_a_process(work: Work, name: str, device: torch.device) -> float:
    """Peak bytes of a first step, measured in a new process; NaN if unknown."""
    command = [sys.executable, "-m", __name__, name, device.type, *map(str, work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else math.nan


def peak_here(name: str, work: Work, device: torch.device) -> float:
    """Peak bytes of a step beyond inputs, parameters and their gradients; NaN if unknown."""
    warm_up = Problem(Work(*(min(size, 2_048) for size in work)), device)
    PEERS[name](warm_up)()  # libraries, threads and their buffers
    _, peak = peak_memory(PEERS[name](Problem(work, device)), device)
    return peak - 4 * (work.n * work.features + work.labels * (work.features + 1))


def measure_all(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure all workloads."""
    works = QUICK if options.quick else WORKS
    return [row for work in works for row in measure(work, device, options.repetitions)]


if __name__ == "__main__":
    peer, kind, *sizes = sys.argv[1:]
    print(peak_here(peer, Work(*map(int, sizes)), torch.device(kind)))
