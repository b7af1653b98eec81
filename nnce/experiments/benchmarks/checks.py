"""Benchmark of the checks: `check_gradients` against `gradcheck` and `gradgradcheck`.

Both check the same smooth functions of inputs of shape [4, 3], in alternating turns. `ratio` is the
peer's time divided by nnce's.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from nnce import functional
from nnce.checks import check_gradients
from nnce.experiments.timing import Timing, in_turns

_F = torch.nn.functional
SHAPE = (4, 3)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": torch.sin,
    "nnce.sigmoid": functional.sigmoid,
    "softplus": _F.softplus,
    "softmax": lambda x: x.softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "layer_norm": lambda x: _F.layer_norm(x, SHAPE[1:]),
    "x @ x.T": lambda x: x @ x.T,
    "cumsum": lambda x: x.cumsum(0),
    "mse_loss": lambda x: _F.mse_loss(x, torch.ones_like(x)),
    "norm": torch.linalg.vector_norm,
    "sum": torch.sum,
}
NNCE, PEER = "nnce", "gradcheck + gradgradcheck"


def measure_all(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure all functions, or three of them with --quick; two rows each."""
    names = list(FUNCTIONS)[: 3 if options.quick else None]
    return [row for name in names for row in _measure(name, options.repetitions, device)]


def _measure(name: str, repetitions: int, device: torch.device) -> list[dict[str, Any]]:
    function = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    contenders: dict[str, Callable[[], bool]] = {
        NNCE: lambda: check_gradients(function, x).right,
        PEER: lambda: gradcheck(function, x) and gradgradcheck(function, x),
    }
    right = {peer: contender() for peer, contender in contenders.items()}  # also warms up
    seconds = in_turns(contenders, contenders.__getitem__, repetitions, device, name)
    return [
        {
            "work": f"{name} of [{', '.join(map(str, SHAPE))}]",
            "peer": peer,
            "outcome": "right" if right[peer] else "wrong",
            "note": "" if right[peer] else "the verdict on a correct function is not right",
            **Timing.of(times, seconds[NNCE])._asdict(),
            "peak_bytes": math.nan,
        }
        for peer, times in seconds.items()
    ]
