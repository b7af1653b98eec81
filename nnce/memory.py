"""What a failed allocation looks like, which PyTorch has no type of its own for."""

import re


def shortage(error: BaseException) -> str | None:
    """A sentence, if the error says that memory could not be had, on the CPU or on CUDA."""
    if isinstance(error, MemoryError):
        return str(error) or "there is not enough memory"
    # The CPU's allocator raises a bare RuntimeError; torch.OutOfMemoryError, CUDA's, is one too.
    words = str(error)
    if not isinstance(error, RuntimeError) or not re.search("CPUAllocator|out of memory", words):
        return None
    amount = re.search(r"allocate (\d+ bytes|[\d.]+ [KMGT]iB)", words)
    return f"there is not enough memory: {amount[1] if amount else 'some'} could not be allocated"
