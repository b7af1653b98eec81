"""Memory estimates before allocation, and detection of out-of-memory errors.

Imports nothing from nnce.
"""

import itertools
import os
import re
from collections.abc import Sequence

import torch


def dashed(sizes: Sequence[int]) -> str:
    """Format a network's sizes, such as 784-30-10."""
    return "-".join(map(str, sizes))


def check_memory(
    sizes: Sequence[int],
    networks: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Raise MemoryError, before allocating, if `networks` networks of these sizes cannot fit.

    The estimate is three times the parameters (for momentum, and a copy while they are moved), or
    the parameters and the float64 numbers from which the largest layer is drawn, if that is more.
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
            f"need {_gigabytes(needed)} GB of memory, but {device.type} has {_gigabytes(there)} GB"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f}" if count < 1e15 else f"{count / 1e9:.1e}"


def bytes_of(sizes: Sequence[int], dtype: torch.dtype) -> int:
    """Number of bytes of the parameters of one network of these sizes."""
    return sum((n_in + 1) * n_out for n_in, n_out in itertools.pairwise(sizes)) * dtype.itemsize


def shortage(error: BaseException) -> str | None:
    """A message if the error is a failed allocation, on the CPU or on CUDA; otherwise None."""
    if isinstance(error, MemoryError):
        return str(error) or "there is not enough memory"
    # On the CPU, PyTorch raises a plain RuntimeError; on CUDA, OutOfMemoryError, a subclass of it.
    words = str(error)
    lacking = "CPUAllocator|out of memory|Storage size calculation overflowed"
    if not isinstance(error, RuntimeError) or not re.search(lacking, words):
        return None
    amount = re.search(r"allocate (\d+ bytes|[\d.]+ [KMGT]iB)", words)
    return f"there is not enough memory: {amount[1] if amount else 'some'} could not be allocated"
