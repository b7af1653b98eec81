"""Random streams of a seed, and orders of the examples."""

import torch
from torch import Tensor


def order(n: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """The indices of n examples in a new order, [n]; mini-batches are its `split(batch_size)`.

    Drawn on the CPU, so that it is the same on every device.
    """
    return torch.randperm(n, generator=generator).to(device)


def stream(seed: int, number: int) -> int:
    """The seed of one of a seed's streams of random numbers, which have nothing to do with another.

    Args:
        seed: as `nnce.training.Settings` has it.
        number: 0 for the start, 1 for the order, 2 for the distortions, and from 3 on for who is
            left out, in each process.
    """
    parent = torch.Generator().manual_seed(seed)
    return int(torch.randint(2**32, (number + 1,), generator=parent)[number])
