"""Benchmark of the drop-in loss: `BCEWithLogitsLoss` of nnce and of PyTorch, forward and backward.

`ratio` is the peer's time over nnce's; `difference` is the largest error of the gradient relative
to the exact one, among the elements whose target is 0 or 1.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import nnce
from nnce.experiments.timing import Timing, in_turns

NNCE = "nnce"
_SHORTEST = 2_000_000
"""Elements that a turn takes at least, by several calls: some milliseconds."""


class Work(NamedTuple):
    """Logits and targets."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    boolean: bool = False
    """Whether targets are booleans, which PyTorch's loss takes as `y.float()`."""

    def __str__(self) -> str:
        target = ", boolean target" if self.boolean else ""
        return f"{list(self.shape)}, {str(self.dtype).removeprefix('torch.')}{target}"


WORKS = (
    Work((32, 10)),
    Work((256, 100)),
    Work((1024, 1000)),
    Work((4096, 1000)),
    Work((1024, 1000), boolean=True),
    Work((4096, 1000), boolean=True),
    Work((1024, 1000), torch.bfloat16),
    Work((8, 4, 256, 256)),
    Work((8192, 10_000)),
)
QUICK = WORKS[:3]


def _peers(z: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The contenders: each computes a loss of z, whose backward is timed, too."""
    ours, built_in = nnce.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss()
    compiled = torch.compile(built_in, dynamic=False)

    def as_z(y: Tensor) -> Tensor:
        return y if y.dtype == z.dtype else y.to(z.dtype)

    return {
        NNCE: lambda: ours(z, y),
        "BCEWithLogitsLoss": lambda: built_in(z, as_z(y)),
        "BCEWithLogitsLoss, torch.compile": lambda: compiled(z, as_z(y)),
    }


def _difference(z: Tensor, y: Tensor) -> float:
    """The largest relative error of z.grad, a mean's."""
    assert z.grad is not None
    sign = torch.where(y.bool(), -1.0, 1.0).double()
    exact = sign * (sign * z.detach().double()).sigmoid() / z.numel()
    return float(((z.grad.double() - exact) / exact).abs().max())


def measure(work: Work, device: torch.device, repetitions: int) -> list[dict[str, Any]]:
    """The rows of one work."""
    torch.compiler.reset()  # compiled code of other sizes counts against a limit
    generator = torch.Generator().manual_seed(0)
    z = (4 * torch.randn(work.shape, generator=generator)).to(device, work.dtype).requires_grad_()
    y = (torch.rand(work.shape, generator=generator) < 0.3).to(device)
    y = y if work.boolean else y.to(work.dtype)
    times = max(1, _SHORTEST // z.numel())

    def step(loss: Callable[[], Tensor]) -> None:
        z.grad = None
        loss().backward()

    peers, differences = _peers(z, y), {}
    for name, loss in peers.items():  # a first step of each, which is not timed
        step(loss)
        differences[name] = _difference(z, y)
    turns = {name: partial(partial, step, loss) for name, loss in peers.items()}
    seconds = in_turns(turns, repetitions, device, str(work), times)
    return [
        {
            "work": str(work),
            "peer": name,
            "outcome": "right",
            "note": "",
            **Timing.of(seconds[name], seconds[NNCE])._asdict(),
            "peak_bytes": math.nan,
            "difference": differences[name],
            "threads": torch.get_num_threads(),
        }
        for name in peers
    ]


def measure_all(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Rows of all works."""
    works = QUICK if options.quick else WORKS
    return [row for work in works for row in measure(work, device, options.repetitions)]
