"""Independent random streams from one seed, and random orders of the examples."""

import torch
from torch import Tensor


def order(n: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Draw a random order of n examples; its `split(batch_size)` are the mini-batches.

    The order is drawn on the CPU, so it is the same for every device.

    Args:
        n: number of examples.
        generator: source of the random numbers, on the CPU.
        device: device of the result.

    Returns:
        int64, [n].

    >>> sorted(nnce.data.order(4, torch.Generator().manual_seed(0)).tolist())
    [0, 1, 2, 3]
    """
    return torch.randperm(n, generator=generator).to(device)


def stream(seed: int, number: int) -> int:
    """Derive the seed of one of several independent random streams.

    Args:
        seed: the seed of `nnce.training.Settings`.
        number: number of the stream: 0 for initial parameters, 1 for orders, 2 for distortions,
            3 + rank for dropout in each process.

    Returns:
        0 to 2³² − 1.

    >>> nnce.data.stream(0, 0) == nnce.data.stream(0, 1)
    False
    """
    parent = torch.Generator().manual_seed(seed)
    return int(torch.randint(2**32, (number + 1,), generator=parent)[number])
