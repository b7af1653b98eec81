"""Benchmark of the drop-in loss, `Sigmoid` and a training step with nnce's Functions.

`ratio` is a peer's time divided by nnce's. `peak` is the memory of a step beyond its inputs. `kept`
is the memory saved for the backward pass, relative to the built-in. `ulps` is the largest error of
dC/dz in units in the last place, measured only for targets of 0 and 1 without smoothing, where the
two terms of dC/dz do not cancel.
"""

import argparse
import contextlib
import ctypes
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as built_in_loss

import nnce
from nnce.experiments.proof.precision import ulp
from nnce.experiments.timing import Timing, in_turns, peak_memory
from nnce.kernels import fused

NNCE, BUILT_IN, COMPILED = "nnce", "built-in", "torch.compile of it"
NO_NUMBA, TIMM = "nnce without Numba", "timm BinaryCrossEntropy"
TORCHVISION = "torchvision sigmoid_focal_loss"
SHORTEST, _MOST_CALLS = 2_000_000, 300
"""Smallest number of elements per turn, and largest number of calls to reach it."""
_SMOOTHING, _IGNORED = 0.1, -1

Step = Callable[[], object]


class Work(NamedTuple):
    """Shape of the logits or inputs, and the computation to time."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    kind: str = ""
    """For losses: "", "boolean target" (the built-in gets `y.float()`), "options" (pos_weight and
    label_smoothing), "ignore_index" (and label_smoothing), "no_grad" (forward only) or "focal" (the
    focal loss). Otherwise "Sigmoid", or "step" for a training step of a network with input
    [shape[0], shape[1]]."""
    peers: tuple[str, ...] = (BUILT_IN,)
    all_threads: bool = False
    """Whether to use all threads instead of one."""

    def __str__(self) -> str:
        """Name of the workload in the table."""
        dtype = "" if self.dtype == torch.float32 else str(self.dtype).removeprefix("torch.")
        shape = f"{self.shape[0]} × {'-'.join(map(str, self.shape[1:]))}"
        threads = f"{torch.get_num_threads()} threads" if self.all_threads else ""
        parts = (shape if self.kind == "step" else str([*self.shape]), dtype, self.kind, threads)
        return ", ".join(filter(None, parts))


_EVERY = (BUILT_IN, COMPILED)
WORKS = (
    Work((32, 10), peers=_EVERY),
    Work((256, 100), peers=_EVERY),
    Work((1024, 1000), peers=(*_EVERY, NO_NUMBA, TIMM)),
    Work((4096, 1000), peers=_EVERY),
    Work((4096, 1000), all_threads=True),
    Work((8192, 10_000), peers=_EVERY),
    Work((1024, 1000), kind="boolean target"),
    Work((4096, 1000), kind="boolean target"),
    Work((1024, 1000), torch.bfloat16),
    Work((1024, 1000), kind="options"),
    Work((8, 4, 256, 256), kind="ignore_index"),
    Work((1024, 1000), kind="focal", peers=(TORCHVISION,)),
    Work((10, 10), kind="no_grad"),
    Work((1000, 1000), kind="no_grad"),
    Work((1_000_000,), kind="Sigmoid"),
    Work((10, 784, 30, 10), kind="step"),
    Work((128, 784, 800, 10), kind="step"),
)
QUICK = tuple(
    work._replace(peers=tuple(peer for peer in work.peers if peer != COMPILED))
    for work in WORKS
    if math.prod(work.shape) < 2**21 or work.kind == "step"
)


class Case:
    """Tensors of a workload, the same for all peers, and the step of each peer."""

    def __init__(self, work: Work, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.work, shape = work, work.shape
        if work.kind == "step":
            self.z = torch.rand(*shape[:2], generator=generator).to(device)
            shape = (shape[0], shape[-1])
        else:
            z = 4 * torch.randn(work.shape, generator=generator)
            self.z = z.to(device, work.dtype).requires_grad_(work.kind != "no_grad")
        self.binary = (torch.rand(shape, generator=generator) < 0.3).to(device)
        self.y = self.binary if work.kind == "boolean target" else self.binary.to(work.dtype)
        self.options: dict[str, Any] = {}
        if work.kind == "options":
            pos_weight = torch.linspace(1, 2, shape[-1], device=device)
            self.options = {"pos_weight": pos_weight, "label_smoothing": _SMOOTHING}
        if work.kind == "ignore_index":
            self.options = {"ignore_index": _IGNORED, "label_smoothing": _SMOOTHING}
            self.y[torch.rand(shape, generator=generator).to(device) < 0.1] = _IGNORED
        self.parameters: set[int] = set()
        """Addresses of the parameters of all networks."""

    def step(self, peer: str) -> Step | None:
        """Return the step of a peer; None if the peer is not installed."""
        z, y, kind = self.z, self.y, self.work.kind
        if kind == "step":
            return self._training_step(peer)
        forward: Callable[[], Tensor]
        if peer == TIMM:
            try:
                from timm.loss.binary_cross_entropy import BinaryCrossEntropy
            except ImportError:
                return None
            forward = partial(BinaryCrossEntropy(smoothing=0), z, y)
        elif peer == TORCHVISION:
            from torchvision.ops import sigmoid_focal_loss

            forward = partial(sigmoid_focal_loss, z, y, reduction="mean")
        elif kind == "focal":
            forward = partial(nnce.SigmoidFocalLoss("mean"), z, y)
        elif kind == "Sigmoid":
            forward = partial(nnce.Sigmoid() if peer == NNCE else nn.Sigmoid(), z)
        elif peer in (NNCE, NO_NUMBA):
            forward = partial(nnce.BCEWithLogitsLoss(**self.options), z, y)
        else:
            loss = torch.compile(_built_in, dynamic=False) if peer == COMPILED else _built_in
            forward = partial(loss, z, y, **self.options)
        if kind == "no_grad":
            return torch.no_grad()(forward)
        upstream = torch.ones_like(z) if kind == "Sigmoid" else None

        def step() -> None:
            z.grad = None
            forward().backward(upstream)

        if peer == NO_NUMBA:
            return patch.object(fused, "uses_numba", lambda: False)(step)
        return step

    def _training_step(self, peer: str) -> Step:
        torch.manual_seed(0)
        linear, sigmoid = (nnce.Linear, nnce.Sigmoid) if peer == NNCE else (nn.Linear, nn.Sigmoid)
        network = nn.Sequential()
        for n_in, n_out in pairwise(self.work.shape[1:]):
            network.extend([linear(n_in, n_out), sigmoid()])
        network = network[:-1]
        loss = nnce.BCEWithLogitsLoss() if peer == NNCE else nn.BCEWithLogitsLoss()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        self.parameters |= {parameter.data_ptr() for parameter in network.parameters()}

        def step() -> None:
            optimizer.zero_grad()
            loss(network(self.z), self.y).backward()
            optimizer.step()

        return step

    def ulps(self) -> float:
        """Return the largest error of z.grad after a step; NaN if it is not measured."""
        if self.work.kind not in ("", "boolean target", "Sigmoid") or self.z.grad is None:
            return math.nan
        z = self.z.detach().double()
        if self.work.kind == "Sigmoid":
            exact = z.sigmoid() * (-z).sigmoid()
        else:
            sign = torch.where(self.binary, -1.0, 1.0).double()
            exact = sign * (sign * z).sigmoid() / z.numel()
        error = (self.z.grad.double() - exact).abs()
        return float((error / ulp(exact, self.z.dtype)).max())


def _built_in(
    z: Tensor,
    y: Tensor,
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0,
    ignore_index: int | None = None,
) -> Tensor:
    """Compute PyTorch's loss, with the usual workarounds for options that it lacks."""
    y = y.to(z.dtype)
    counts = None if ignore_index is None else (y != ignore_index).to(z.dtype)
    if label_smoothing:
        y = y * (1 - label_smoothing) + label_smoothing / 2
    if counts is None:
        return built_in_loss(z, y, pos_weight=pos_weight)
    return built_in_loss(z, y, counts, reduction="sum") / counts.sum()


def _kept(step: Step, parameters: set[int]) -> int:
    """Count the bytes that a step saves for its backward pass, without parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def measure(work: Work, device: torch.device, repetitions: int) -> list[dict[str, Any]]:
    """Measure one workload: one row per peer."""
    torch.compiler.reset()  # compiled code of other sizes counts against a limit
    case, rows = Case(work, device), {}
    steps = {peer: case.step(peer) for peer in (NNCE, *work.peers)}
    for peer, step in steps.items():
        rows[peer] = {
            **{"work": str(work), "peer": peer, "outcome": "right", "note": ""},
            **{"peak_bytes": math.nan, "kept": math.nan, "ulps": math.nan},
            **{**Timing()._asdict(), "threads": torch.get_num_threads()},
        }
        if step is None:
            rows[peer] |= {"outcome": "not installed", "peer": f"{peer} (not installed)"}
            continue
        step()  # compiles
        rows[peer]["ulps"] = case.ulps()
        case.z.grad = None
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            # Otherwise a step could reuse freed memory, which the peak would not include.
            ctypes.CDLL(None).malloc_trim(0)
        rows[peer]["peak_bytes"] = peak_memory(step, device)[1]
        if work.kind != "no_grad":
            rows[peer]["kept"] = _kept(step, case.parameters)
    of_built_in = rows[work.peers[0]]["kept"]
    times = max(1, min(SHORTEST // math.prod(work.shape), _MOST_CALLS))
    found = {peer: step for peer, step in steps.items() if step is not None}
    seconds = in_turns(found, found.__getitem__, repetitions, device, str(work), times)
    for peer, of_peer in seconds.items():
        rows[peer] |= Timing.of(of_peer, seconds[NNCE])._asdict()
        rows[peer]["kept"] /= of_built_in
    return list(rows.values())


def measure_all(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure all workloads, with one thread unless the workload uses all."""
    threads, rows = torch.get_num_threads(), []
    try:
        for work in QUICK if options.quick else WORKS:
            torch.set_num_threads(threads if work.all_threads else 1)
            rows += measure(work, device, options.repetitions)
    finally:
        torch.set_num_threads(threads)
    return rows
