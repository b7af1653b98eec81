"""The kernels of `nnce.kernels.losses` as PyTorch operations, for use without Numba.

They process arrays in chunks and reuse the memory of one chunk, so that intermediate results stay
in the processor's cache.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nnce import rules
from nnce.losses import Loss
from nnce.rules import Focus

BLOCK = 2**17
"""Elements in a chunk."""


class Packed(NamedTuple):
    """Options of one call in the form that the kernels read."""

    weight: Tensor | None
    """Repeated so that any block is contiguous, wherever it begins; in the working dtype."""
    weight_period: int
    pos_weight: Tensor | None
    pos_period: int
    label_smoothing: float
    ignored: float
    ignores: bool
    focus: Focus | None = None

    @property
    def is_plain(self) -> bool:
        """Whether there are no weights, no smoothing and no ignored value."""
        return self.weight is self.pos_weight is None and not (self[4] or self.ignores)

    def addresses(self) -> tuple[float, ...]:
        """Return the options as a tuple for the compiled kernels."""
        weight, pos_weight = (0 if t is None else t.data_ptr() for t in (self[0], self[2]))
        return (weight, self.weight_period, pos_weight, *self[3:7])


class _Chunk(NamedTuple):
    """A chunk of elements in the working dtype, float32 or float64, and scratch memory like z."""

    z: Tensor
    negative: Tensor
    """Weights of the term of 1 − y, after label smoothing."""
    positive: Tensor
    """Weights of the term of y, after label smoothing and times pos_weight."""
    weight: Tensor | None
    ignored: Tensor | None
    """Mask of ignored targets."""
    focus: Focus | None
    both: Tensor | None
    """negative + positive; None if it is 1."""
    first: Tensor
    second: Tensor


class _Work:
    """Chunks of logits and targets, with shared scratch memory.

    Args:
        z: logits, contiguous.
        options: weights, smoothing, ignored targets.
    """

    def __init__(self, z: Tensor, options: Packed) -> None:
        self._options = options
        self._dtype = torch.promote_types(z.dtype, torch.float32)
        self._memory = z.new_empty(4, min(z.numel(), BLOCK), dtype=self._dtype)

    def chunks(self, z: Tensor, y: Tensor) -> Iterator[tuple[slice, _Chunk]]:
        """Yield the chunks of whole arrays, with their slices."""
        z, y = z.view(-1), y.view(-1)
        for begin in range(0, len(z), BLOCK):
            part = slice(begin, begin + BLOCK)
            yield part, self.chunk(z[part], y[part], begin)

    def chunk(self, z: Tensor, y: Tensor, begin: int) -> _Chunk:
        """Return the chunk of the elements that begin at index `begin` of the whole z."""
        weight, period, pos_weight, pos_period, smoothing, ignored, ignores, focus = self._options
        negative, positive, *others = self._memory[:, : len(z)]
        if y.dtype == self._dtype and not smoothing and pos_weight is None:
            positive = y
        else:
            positive.copy_(y)
        torch.sub(1, positive, out=negative)
        if smoothing:
            negative.mul_(1 - smoothing).add_(smoothing / 2)
            positive.mul_(1 - smoothing).add_(smoothing / 2)
        both = None
        if pos_weight is not None:
            positive.mul_(pos_weight[begin % pos_period :][: len(z)])
            both = negative + positive
        return _Chunk(
            z.to(self._dtype),
            negative,
            positive,
            None if weight is None else weight[begin % period :][: len(z)],
            y == ignored if ignores else None,
            focus,
            both,
            *others,
        )


def value(z: Tensor, y: Tensor, C: Tensor | None, options: Packed, loss: Loss) -> list[float]:
    """Return the sum of C over each chunk, and write C of each element if C is not None."""
    sums = []
    for part, chunk in _Work(z, options).chunks(z, y):
        found, total = _value(chunk, loss)
        if C is not None:
            C.view(-1)[part] = found
        sums.append(total.item())
    return sums


def gradient(
    z: Tensor,
    y: Tensor,
    dz: Tensor,
    options: Packed,
    upstream: Tensor | None,
    scale: float,
    loss: Loss,
) -> None:
    """Write dC/dz times scale, and times the elements' upstream gradients if given."""
    for part, chunk in _Work(z, options).chunks(z, y):
        found = _gradient(chunk, loss).mul_(scale)
        if upstream is not None:
            found.mul_(upstream.view(-1)[part])
        dz.view(-1)[part] = _finished(chunk, found)


def joint(
    z: Tensor,
    y: Tensor | None,
    C: Tensor,
    factor: Tensor,
    options: Packed,
    loss: Loss,
) -> None:
    """Overwrite z [rows, width] by factor ∘ dC/dz, and write the sum of C over each row."""
    rows, width = z.shape
    C.zero_()
    work, flat = _Work(z, options), z.view(-1)
    at_once = max(1, BLOCK // max(1, width))
    for row in range(0, rows, at_once):
        some = slice(row, min(row + at_once, rows))
        for column in range(0, width, BLOCK):
            columns = slice(column, min(column + BLOCK, width))
            shape = some.stop - some.start, columns.stop - columns.start
            begin = row * width + column
            part = slice(begin, begin + shape[0] * shape[1])
            targets = z.new_zeros(shape) if y is None else y[some, columns]
            chunk = work.chunk(flat[part], targets.reshape(-1), begin)
            C[some] += _value(chunk, loss, shape[0])[1]
            dz = _gradient(chunk, loss).view(shape) * factor[some, None]
            flat[part] = _finished(chunk, dz.view(-1))


def sigmoid_gradient(z: Tensor, da: Tensor, dz: Tensor) -> None:
    """Write dC/dz = dC/da σ(z) σ(−z) (equation 8)."""
    for begin in range(0, z.numel(), BLOCK):
        part = slice(begin, begin + BLOCK)
        dz.view(-1)[part] = rules.dz_hidden(da.view(-1)[part], z.view(-1)[part])


def _finished(chunk: _Chunk, found: Tensor) -> Tensor:
    """Multiply by weight, with 0 · ∞ = 0, and set elements with an ignored target to 0."""
    if chunk.weight is not None:
        found = rules.weighted(chunk.weight, found)
    return found if chunk.ignored is None else found.masked_fill_(chunk.ignored, 0)


def _value(chunk: _Chunk, loss: Loss, rows: int = 1) -> tuple[Tensor, Tensor]:
    """C of each element, equation 2 or 3, and its sums over `rows` equal parts in float64."""
    find = _quadratic if loss == "quadratic" else _cross_entropy
    if chunk.focus is not None:
        find = _cross_entropy_at_infinity
    C = _finished(chunk, find(chunk))
    sums = C.view(rows, -1).sum(1, dtype=torch.float64)
    if loss == "cross-entropy" and not sums.isfinite().all():
        C = _finished(chunk, _cross_entropy_at_infinity(chunk))
        sums = C.view(rows, -1).sum(1, dtype=torch.float64)
    return C, sums


def _quadratic(chunk: _Chunk) -> Tensor:
    return _residual(chunk).square_().mul_(0.5)


def _cross_entropy(chunk: _Chunk) -> Tensor:
    z, negative, positive, *_, both, first, second = chunk
    C = torch.abs(z, out=first).neg_().exp_().log1p_()
    # softplus(±z) = max(±z, 0) + ln(1 + t)
    if both is not None:
        C.mul_(both)
    C.addcmul_(negative, torch.clamp(z, min=0, out=second))
    return C.addcmul_(positive, torch.clamp(z, max=0, out=second), value=-1)


def _cross_entropy_at_infinity(chunk: _Chunk) -> Tensor:
    """C with 0 · ∞ = 0, which is slower, or a focal loss, computed in float64."""
    z, negative, positive, *_, focus, _, _, _ = chunk
    if focus is not None:
        return rules.focal(z.double(), positive.double(), focus).to(z.dtype)
    term = rules.weighted(negative, rules.softplus(z))
    return term + rules.weighted(positive, rules.softplus(-z))


def _residual(chunk: _Chunk) -> Tensor:
    """a − y = (1−y) σ(z) − y σ(−z), equation 5."""
    z, negative, positive, *_, first, second = chunk
    a = torch.sigmoid(z, out=first).mul_(negative)
    return a.addcmul_(torch.neg(z, out=second).sigmoid_(), positive, value=-1)


def _gradient(chunk: _Chunk, loss: Loss) -> Tensor:
    """dC/dz of each element, equation 4 or 5, without weight."""
    if chunk.focus is not None:
        dz = rules.dz_focal(chunk.z.double(), chunk.positive.double(), chunk.focus)
        return dz.to(chunk.z.dtype)
    difference = _residual(chunk)
    return difference if loss == "cross-entropy" else difference.mul_(rules.sigmoid_prime(chunk.z))
