"""What a failed allocation looks like, which PyTorch has no type of its own for."""


def ran_out(error: BaseException) -> bool:
    """Whether the error says that memory could not be had, on the CPU or on CUDA."""
    # The CPU's allocator raises a bare RuntimeError; torch.OutOfMemoryError, CUDA's, is one too.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("DefaultCPUAllocator", "out of memory"))
    )
