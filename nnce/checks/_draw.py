"""Random numbers for the checks: upstream gradients, directions, masks and step sizes."""

import torch
from torch import Tensor

# Two small steps are enough for most functions.
_QUICK_STEPS = (2.0**-9, 2.0**-17)
# If not: steps from 64 times the size of x down to a unit in its last place, each a quarter of the
# one before.
_STEPS = 30
_LARGEST_STEP = 64.0


class Draw:
    """Random numbers from one generator, on a tensor's device."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def like(self, tensor: Tensor) -> Tensor:
        """Random values of either sign with magnitudes from ½ to 1½, no two nearly equal.

        No element gets a weight near 0, and swapping two elements changes the gradient.
        """
        n, generator = tensor.numel(), self.generator
        places = torch.randperm(n, generator=generator)
        within = torch.rand(n, generator=generator, dtype=torch.float64) / 2
        sign = 2 * torch.randint(2, (n,), generator=generator).double() - 1
        drawn = sign * (0.5 + (places + within) / max(n, 1))
        return drawn.view(tensor.shape).to(tensor.device)

    def mask(self, tensor: Tensor) -> Tensor:
        """A random mask, half zeros and half ones; a single element is 0."""
        n = tensor.numel()
        ones = torch.randperm(n, generator=self.generator) >= (n + 1) // 2
        return ones.view(tensor.shape).to(tensor)

    def steps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A few small steps, and many; random, as fixed steps might be multiples of a period."""
        share = 1 - float(torch.rand((), generator=self.generator)) / 2
        many = 0.25 ** torch.arange(_STEPS, dtype=torch.float64, device=device)
        few = torch.tensor(_QUICK_STEPS, dtype=torch.float64, device=device)
        return share * few, share * _LARGEST_STEP * many

    def some_of(self, indices: Tensor, count: int) -> Tensor:
        """A random choice of `count` indices."""
        chosen = torch.randperm(len(indices), generator=self.generator)[:count]
        return indices[chosen.to(indices.device)]
