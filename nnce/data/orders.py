"""Random streams of a seed, and orders of the examples."""

import torch
from torch import Tensor


def order(n: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """The indices of n examples in a new order; mini-batches are its `split(batch_size)`.

    Drawn on the CPU, so that it is the same on every device.

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
    """The seed of one of the independent random streams of a seed.

    Args:
        seed: the seed of `nnce.training.Settings`.
        number: 0 for the start, 1 for the order, 2 for the distortions, and 3 and higher for
            dropout, one for each process.

    Returns:
        0 to 2³² − 1.

    >>> nnce.data.stream(0, 0) == nnce.data.stream(0, 1)
    False
    """
    parent = torch.Generator().manual_seed(seed)
    return int(torch.randint(2**32, (number + 1,), generator=parent)[number])
