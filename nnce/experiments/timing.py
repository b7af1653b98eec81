"""Measure contenders side by side: time, in turns, and memory at its peak."""

import contextlib
import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil
import torch
from tqdm import tqdm

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


class Timing(NamedTuple):
    """The time of a contender, and its ratio to a reference's time in the same turn."""

    seconds: float = math.nan
    """Median over the turns."""
    ratio: float = math.nan
    """Median of the ratios."""
    ratio_least: float = math.nan
    ratio_most: float = math.nan
    repetitions: int = 0

    @classmethod
    def of(cls, seconds: Sequence[float], reference: Sequence[float]) -> "Timing":
        """Summarize the seconds of a contender and of the reference, turn by turn."""
        ratios = [a / b for a, b in zip(seconds, reference, strict=True)]
        return cls(
            statistics.median(seconds),
            *(statistics.median(ratios), min(ratios), max(ratios)),
            len(ratios),
        )


def seconds_of(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Mean seconds of a call, until the device has finished."""
    _finish(device)
    began = time.perf_counter()
    for _ in range(times):
        call()
    _finish(device)
    return (time.perf_counter() - began) / times


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(
    contenders: Mapping[Name, Callable[[], Callable[[], object]]],
    repetitions: int,
    device: torch.device,
    title: str,
) -> dict[Name, list[float]]:
    """Time contenders in turns, so that other work on the machine slows all of them alike.

    Args:
        contenders: by name, a function that prepares a turn, untimed, and returns the call to time.
        repetitions: number of turns.
        device: where the calls compute.
        title: label of the progress bar.

    Returns:
        The seconds of each contender, turn by turn.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in contenders}
    # A new order in each turn: whichever comes after the slowest finds cold caches.
    shuffled = random.Random(0)
    names = list(contenders)
    turns = [name for _ in range(repetitions) for name in shuffled.sample(names, len(names))]
    for name in tqdm(turns, desc=title, disable=None, leave=False):
        seconds[name].append(seconds_of(contenders[name](), device))
    return seconds


# ------------------------------------------------------------------------------------------ memory


def resident(*, peak: bool = False) -> int:
    """Memory of this process in bytes: now, or the most so far."""
    memory = psutil.Process().memory_info()
    if not peak:
        return int(memory.rss)
    if sys.platform == "win32":
        return int(memory.peak_wset)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss begins with the parent process's
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on macOS


def peak_memory(call: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Result of a call, and the most bytes that it took beyond those in use before.

    NaN bytes where the peak cannot be reset: on a CPU, everywhere but on Linux.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        return result, float(torch.cuda.max_memory_allocated(device) - before)
    is_reset = False
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        is_reset = True
    before = resident()
    result = call()
    return result, float(max(0, resident(peak=True) - before)) if is_reset else math.nan


# ------------------------------------------------------------------------------- other programs


class Neighbors:
    """Processor time that other programs take while this one measures."""

    def __init__(self) -> None:
        self._began, self._others = time.perf_counter(), self._seconds()

    def share(self) -> float:
        """Mean number of processors that other programs have kept busy so far."""
        return max(0.0, self._seconds() - self._others) / (time.perf_counter() - self._began)

    def _seconds(self) -> float:
        every, own = psutil.cpu_times(), psutil.Process().cpu_times()
        busy = every.user + every.system + getattr(every, "nice", 0.0)
        return float(busy - own.user - own.system)
