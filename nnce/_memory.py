"""Memory estimates before anything is allocated, and how to recognize a failed allocation.

Imports nothing of nnce.
"""

import itertools
import os
import re
from collections.abc import Sequence

import torch


def dashed(sizes: Sequence[int]) -> str:
    """A network's sizes as text: 784-30-10."""
    return "-".join(map(str, sizes))


def check_memory(
    sizes: Sequence[int],
    networks: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Raise MemoryError if `count` networks of these sizes cannot fit, before any is made.

    Counted are parameters, as many again for their momentum, and once more while they are moved; or
    the float64 numbers that the largest layer is drawn from, where that is more.
    """
    parameters = networks * bytes_of(sizes, dtype)
    drawn = 8 * max(n_in * n_out for n_in, n_out in itertools.pairwise(sizes))
    needed = max(3 * parameters, parameters + drawn)
    device = torch.device(device)
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu" and hasattr(os, "sysconf"):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if needed > there:
        raise MemoryError(
            f"{networks:,} network{'s' * (networks > 1)} of sizes {dashed(sizes)} would "
            f"need {_gigabytes(needed)} GB of memory, and {device.type} has {_gigabytes(there)} GB"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f}" if count < 1e15 else f"{count / 1e9:.1e}"


def bytes_of(sizes: Sequence[int], dtype: torch.dtype) -> int:
    """How many bytes the parameters of one network of these sizes take."""
    return sum((n_in + 1) * n_out for n_in, n_out in itertools.pairwise(sizes)) * dtype.itemsize


def shortage(error: BaseException) -> str | None:
    """A sentence, if the error says that memory could not be had, on the CPU or on CUDA."""
    if isinstance(error, MemoryError):
        return str(error) or "there is not enough memory"
    # The CPU's allocator raises a bare RuntimeError; torch.OutOfMemoryError, CUDA's, is one too.
    words = str(error)
    lacking = "CPUAllocator|out of memory|Storage size calculation overflowed"
    if not isinstance(error, RuntimeError) or not re.search(lacking, words):
        return None
    amount = re.search(r"allocate (\d+ bytes|[\d.]+ [KMGT]iB)", words)
    return f"there is not enough memory: {amount[1] if amount else 'some'} could not be allocated"
