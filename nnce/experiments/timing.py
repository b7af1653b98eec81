"""Measure the time of contenders, in alternating turns, and their peak memory."""

import contextlib
import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil
import torch
from tqdm import tqdm

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


class Timing(NamedTuple):
    """Time of a contender, and its ratio to the reference's time in the same turn."""

    seconds: float = math.nan
    """Median over all turns."""
    ratio: float = math.nan
    """Median of the ratios."""
    ratio_least: float = math.nan
    ratio_most: float = math.nan
    repetitions: int = 0

    @classmethod
    def of(cls, seconds: Sequence[float], reference: Sequence[float]) -> "Timing":
        """Summarize the times of a contender and the reference, given per turn."""
        ratios = [a / b for a, b in zip(seconds, reference, strict=True)]
        spread = (statistics.median(ratios), min(ratios), max(ratios))
        return cls(statistics.median(seconds), *spread, len(ratios))


def seconds_of(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Mean time of a call, including the synchronization of the device."""
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
    names: Iterable[Name],
    prepare: Callable[[Name], Callable[[], object]],
    repetitions: int,
    device: torch.device,
    title: str,
    times: int = 1,
) -> dict[Name, list[float]]:
    """Time contenders in alternating turns, so that other load on the machine affects all alike.

    `prepare` prepares a turn of a contender, which is not timed, and returns the call, which is
    timed `times` times. Returns the mean time of a call in each turn, by contender.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    # A new random order in each turn, because a slow contender leaves cold caches to the next.
    shuffled = random.Random(0)
    every = list(seconds)
    turns = [name for _ in range(repetitions) for name in shuffled.sample(every, len(every))]
    for name in tqdm(turns, desc=title, disable=None, leave=False):
        seconds[name].append(seconds_of(prepare(name), device, times))
    return seconds


# ------------------------------------------------------------------------------------------ memory


def resident(*, peak: bool = False) -> int:
    """Resident memory of this process in bytes: current, or its peak so far."""
    memory = psutil.Process().memory_info()
    if not peak:
        return int(memory.rss)
    if sys.platform == "win32":
        return int(memory.peak_wset)
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss starts at the parent's value
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on macOS


def peak_memory(call: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Return the result of a call, and its peak memory in bytes beyond the memory in use before.

    The peak is NaN where it cannot be reset, which for CPU memory works on Linux only.
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
    """Processor time of other programs since this object was created."""

    def __init__(self) -> None:
        self._began, self._others = time.perf_counter(), self._seconds()

    def share(self) -> float:
        """Mean number of processors kept busy by other programs so far."""
        return max(0.0, self._seconds() - self._others) / (time.perf_counter() - self._began)

    def _seconds(self) -> float:
        every, own = psutil.cpu_times(), psutil.Process().cpu_times()
        busy = every.user + every.system + getattr(every, "nice", 0.0)
        return float(busy - own.user - own.system)
