"""Random distortions of square images, affine and elastic."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nnce._arguments import is_number, plain
from nnce.data.errors import DataError
from nnce.data.orders import stream

# Number of examples distorted at once; each block has its own seed.
_AT_ONCE = 1_000
MAX_CHUNK = 10_000
"""Number of images that are distorted within a few tenths of a second.

>>> nnce.data.MAX_CHUNK
10000
"""
_LIMITS = {
    "rotation": (0.0, 180.0),
    "scaling": (0.0, 0.99),
    "shear": (0.0, 1e3),
    "translation": (0.0, 1e3),
    "alpha": (0.0, 1e6),
    "sigma": (0.1, 1e3),
}


@dataclass(frozen=True)
class Distortion:
    """Random distortions of square images for training: affine, elastic or both.

    Each image is distorted independently, and differently in each epoch. The pixel at p, relative
    to the center, is set to the bilinearly interpolated value of the image at

        R(θ) [[s_x, k], [0, s_y]] p + t + α G_σ * u,

    where θ, s, k and t are drawn uniformly within the limits below, and the fields u uniformly from
    (−1, 1) at each pixel, then smoothed by G_σ, a Gaussian whose weights sum to 1. Images and
    fields are padded with 0.

    Shape: called with x [n, side²] in [0, 1] and a generator, returns [n, side²] in [0, 1].

    Raises:
        ValueError: a value is out of range.

    Source: P. Simard, D. Steinkraus, J. Platt, Best practices for convolutional neural networks,
    ICDAR 2003, who take σ = 4 and α = 34, and state neither the sum of the Gaussian nor which
    affine distortions they use.

    >>> distort = nnce.data.Distortion(rotation=15, alpha=34)
    >>> distort(torch.rand(5, 28 * 28), torch.Generator().manual_seed(0)).shape
    torch.Size([5, 784])
    """

    rotation: float = 0.0
    """Largest |θ| in degrees, up to 180."""
    scaling: float = 0.0
    """Largest |s − 1|, up to 0.99; s_x and s_y are drawn independently."""
    shear: float = 0.0
    """Largest |k|."""
    translation: float = 0.0
    """Largest |t| in pixels, horizontally and vertically."""
    alpha: float = 0.0
    """α in pixels; 0 for no elastic distortion. The standard deviation of the displacements is
    about α / (σ √(12 π))."""
    sigma: float = 4.0
    """σ in pixels, at least 0.1."""

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if not is_number(value) or not least <= value <= most:
                raise ValueError(f"expected {name} from {least:g} to {most:g}, got {value!r}")
            object.__setattr__(self, name, plain(value))

    def check(self, features: int) -> None:
        """Raise DataError unless this many features form a square image."""
        if math.isqrt(features) ** 2 != features or features < 4:
            raise DataError(
                f"expected square images to distort, got examples of {features} features"
            )

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Distort images, each independently.

        Args:
            x: images [n, side²], row by row, in [0, 1].
            generator: source of the random numbers, on the device of x.

        Returns:
            [n, side²], in [0, 1].

        Raises:
            DataError: the images are not square.
        """
        self.check(x.shape[1])
        n, side = len(x), math.isqrt(x.shape[1])
        if n == 0:
            return x.clone()
        half = (side - 1) / 2
        line = torch.arange(side, device=x.device, dtype=x.dtype) - half
        # Source position of each pixel, [n, side, side, 2], column before row as in grid_sample.
        places = self._affine(n, generator, line)
        if self.alpha:
            places += self.alpha * self._fields(n, generator, line)
        seen = torch.nn.functional.grid_sample(
            x.view(n, 1, side, side), places / half, align_corners=True
        )
        return seen.view(n, -1).clamp_(0, 1)  # rounding may exceed [0, 1]

    def _uniform(self, like: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
        """Uniform samples from (−1, 1)."""
        new = torch.empty(shape, device=like.device, dtype=like.dtype)
        return new.uniform_(-1, 1, generator=generator)

    def _affine(self, n: int, generator: torch.Generator, line: Tensor) -> Tensor:
        drawn = self._uniform(line, generator, 6, n)
        angle = math.radians(self.rotation) * drawn[0]
        s_x, s_y = 1 + self.scaling * drawn[1], 1 + self.scaling * drawn[2]
        k = self.shear * drawn[3]
        cos, sin = angle.cos(), angle.sin()
        # R(θ) [[s_x, k], [0, s_y]] p + t: one plane each for source columns and source rows.
        rows = ((cos * s_x, cos * k - sin * s_y), (sin * s_x, sin * k + cos * s_y))
        planes = [
            of_x[:, None, None] * line[None, None, :]
            + of_y[:, None, None] * line[None, :, None]
            + (self.translation * t)[:, None, None]
            for (of_x, of_y), t in zip(rows, drawn[4:], strict=True)
        ]
        return torch.stack(planes, dim=-1)

    def _fields(self, n: int, generator: torch.Generator, line: Tensor) -> Tensor:
        # The Gaussian is separable into columns and rows: two matrix products.
        gaussian = torch.exp(-((line[:, None] - line) ** 2) / (2 * self.sigma**2))
        reach = torch.arange(-math.ceil(5 * self.sigma), math.ceil(5 * self.sigma) + 1)
        gaussian /= torch.exp(-(reach.double() ** 2) / (2 * self.sigma**2)).sum()
        fields = self._uniform(line, generator, n, 2, len(line), len(line))
        return (gaussian @ fields @ gaussian).movedim(1, -1)


class Distorted:
    """The images of an epoch in order, each distorted independently.

    An image depends on the seed, the epoch, its position and the length of the order, but not on
    the slice requested or, on a CPU, on the number of threads. CUDA draws different numbers.

    Args:
        x: images, [N, side²], in [0, 1].
        order: indices of the images, [n].
        distortion: the random distortion.
        seed: the seed of `nnce.training.Settings`.
        epoch: number of the epoch, from 0.

    >>> x, order = torch.rand(6, 28 * 28), torch.arange(6)
    >>> images = nnce.data.Distorted(x, order, nnce.data.Distortion(shear=0.1), seed=0, epoch=0)
    >>> images[2:5].shape
    torch.Size([3, 784])
    """

    def __init__(
        self, x: Tensor, order: Tensor, distortion: Distortion, seed: int, epoch: int
    ) -> None:
        self._x, self._order, self._distortion = x, order, distortion
        parent = torch.Generator().manual_seed(stream(seed, 2) ^ epoch)
        blocks = -(-len(order) // _AT_ONCE)
        self._seeds = torch.randint(2**32, (blocks,), generator=parent).tolist()
        self._block = functools.lru_cache(maxsize=1)(self._make)

    def __getitem__(self, places: slice) -> Tensor:
        """The distorted images at a slice of the order, [places, side²]."""
        begin, end, _ = places.indices(len(self._order))
        blocks = [
            self._block(number)[max(begin - number * _AT_ONCE, 0) : end - number * _AT_ONCE]
            for number in range(begin // _AT_ONCE, -(-end // _AT_ONCE))
        ]
        return blocks[0] if len(blocks) == 1 else torch.cat([self._x[:0], *blocks])

    def _make(self, number: int) -> Tensor:
        chosen = self._order[number * _AT_ONCE : (number + 1) * _AT_ONCE]
        generator = torch.Generator(self._x.device).manual_seed(self._seeds[number])
        return self._distortion(self._x[chosen], generator)
