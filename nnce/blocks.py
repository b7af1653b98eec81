"""Blocks of labels, walked one by one: what a linear layer and its cross-entropy make of each.

Because dC/dz is a − y (equation 5), component by component, no sum ties the labels together as
softmax does: the weighted inputs z of a block of labels, the value, the delta, and the delta's two
products (equations 6 and 7) are computed and used up at once. The z of all labels never exist.

    z = x Wᵀ + b        [n, block]      (1)
    C = −Σ [y ln a + (1−y) ln(1−a)]     (3)   a number for each example
    dz = a − y                          (5)   in the place of z
    dW, db += dzᵀ x, Σ dz               (6)
    dx += dz W                          (7)

No autograd, and no state.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnce import rules
from nnce.positives import Targets

# ----------------------------------------------------------------------------- one block's rules


class _Room:
    """Memory for three chunks, used again and again."""

    def __init__(self, elements: int, like: Tensor) -> None:
        self._memory = like.new_empty(3, elements)

    def like(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second, third = (part[: z.numel()].view_as(z) for part in self._memory)
        return first, second, third


def _log1p_of_exp_of_minus_abs(z: Tensor, room: _Room) -> tuple[Tensor, Tensor]:
    """ln(1 + e^(−|z|)), and memory to spare.

    ln(1 + t) = t · ln(u)/(u − 1) with u = 1 + t rounded, in which what u has lost cancels (Kahan;
    Higham, Accuracy and Stability of Numerical Algorithms, 2002, §1.14.1): some units in the last
    place, in a tenth of the time of PyTorch's log1p on a CPU in float32, which is four fifths of
    all that is done to z. Where u is 1 the quotient is 1, and that of the next number is as good.
    """
    t, u, ln = room.like(z)
    torch.abs(z, out=t).neg_().exp_()
    torch.add(t, 1, out=u).clamp_(min=1 + torch.finfo(u.dtype).eps)
    torch.log(u, out=ln)
    return ln.div_(u.sub_(1)).mul_(t), u


class Options(NamedTuple):
    """What there is for each label."""

    b: Tensor | None
    """The layer's biases, [labels]."""
    weight: Tensor | None
    """Multiplies C, [labels]."""
    pos_weight: Tensor | None
    """Multiplies the term of y, [labels]."""
    label_smoothing: float

    def of(self, labels: slice, dtype: torch.dtype) -> "Options":
        """Those of some labels."""
        b, weight, pos_weight = (None if t is None else t[labels].to(dtype) for t in self[:3])
        return Options(b, weight, pos_weight, self.label_smoothing)


class _Rows(NamedTuple):
    """How the rows of a block are gone through, and what is wanted of them."""

    room: _Room
    chunk: int
    """Rows at a time."""
    factor: Tensor
    """Multiplies dz, a number for each example, [rows, 1]."""
    wants_value: bool
    wants_dz: bool


def _use_up(
    z: Tensor,
    options: Options,
    negative: Any,
    positive: Any,
    factor: Tensor,
    how: _Rows,
) -> Tensor | None:
    """C per component, in the room's memory; z becomes dC/dz in place.

    C = negative · softplus(z) + positive · softplus(−z) and dC/dz = negative · σ(z) − positive ·
    σ(−z): equations 3 and 5 with 1 − y and y, each with its weights. A positive of None is 0, and a
    negative of None is 1.
    """
    C = None
    if how.wants_value:
        ln, spare = _log1p_of_exp_of_minus_abs(z, how.room)
        C = torch.clamp(z, min=0, out=spare).add_(ln)  # softplus(z) = max(z, 0) + ln(1 + e^−|z|)
        if negative is not None:
            C = _weighted(negative, C)
        if positive is not None:
            C = C + _weighted(positive, ln - z.clamp(max=0))
        if options.weight is not None:
            C = rules.weighted(options.weight, C)
    if how.wants_dz:
        pulled_up = None if positive is None else positive * (-z).sigmoid_()
        z.sigmoid_()
        if negative is not None:
            z.mul_(negative)
        if pulled_up is not None:
            z.sub_(pulled_up)
        if options.weight is not None:
            z.mul_(options.weight)
        z.mul_(factor)
    return C


def _weighted(weight: Any, term: Tensor) -> Tensor:
    return rules.weighted(weight, term) if isinstance(weight, Tensor) else term.mul_(weight)


def _block_of_list(
    z: Tensor,
    rows: Tensor,
    labels: Tensor,
    values: Tensor | None,
    counts: Tensor | None,
    options: Options,
    how: _Rows,
) -> Tensor | None:
    """Σ C over a block's labels, a number for each example in float64; z becomes dC/dz.

    All targets are 0 but those of a list: rows, in order, and labels within the block, values.
    counts is 0 where a target has been counted already.
    """
    _, weight, pos_weight, s = options
    at = (rows, labels)
    z_listed = z[at]
    p = None if pos_weight is None else pos_weight[labels]
    y = torch.ones_like(z_listed) if values is None else values.to(z.dtype)
    half = torch.full_like(y, 0.5)
    positive = None
    if s:
        share = s / 2 if pos_weight is None else s / 2 * pos_weight
        positive = torch.as_tensor(share, dtype=z.dtype, device=z.device)
    total = z.new_zeros(len(z), dtype=torch.float64) if how.wants_value else None
    begins = [*range(0, len(z), how.chunk), len(z)]
    ends = [0, len(rows)]
    if len(begins) > 2:
        ends = torch.searchsorted(rows, torch.tensor(begins, device=rows.device)).tolist()
    for (begin, end), listed in zip(pairwise(begins), pairwise(ends), strict=True):
        part, here = slice(begin, end), slice(*listed)
        C = _use_up(z[part], options, 1 - s / 2 if s else None, positive, how.factor[part], how)
        if C is not None and total is not None:
            C[rows[here] - begin, labels[here]] = 0  # no negatives; what they cost comes below
            total[part] = C.sum(1)
    if total is not None:
        C = rules.cross_entropy(z_listed, y, p)
        if s:
            C = (1 - s) * C + s * rules.cross_entropy(z_listed, half, p)
        if weight is not None:
            C = rules.weighted(weight[labels], C)
        if counts is not None:
            C = rules.weighted(counts.to(C.dtype), C)
        total.index_add_(0, rows, C.double())
    if how.wants_dz:
        dz = rules.dz_cross_entropy(z_listed, y, pos_weight=p)
        if s:
            dz = (1 - s) * dz + s * rules.dz_cross_entropy(z_listed, half, pos_weight=p)
        z[at] = how.factor[rows, 0] * (dz if weight is None else dz * weight[labels])
    return total


def _block_of_dense(z: Tensor, y: Tensor, options: Options, how: _Rows) -> Tensor | None:
    """The same for the targets of a whole block, y of z's shape."""
    s = options.label_smoothing
    total = z.new_zeros(len(z), dtype=torch.float64) if how.wants_value else None
    for begin in range(0, len(z), how.chunk):
        part = slice(begin, begin + how.chunk)
        positive = y[part].to(z.dtype)
        negative = 1 - positive
        if s:
            negative, positive = (1 - s) * negative + s / 2, (1 - s) * positive + s / 2
        if options.pos_weight is not None:
            positive = options.pos_weight * positive
        C = _use_up(z[part], options, negative, positive, how.factor[part], how)
        if C is not None and total is not None:
            total[part] = C.sum(1)
    return total


# -------------------------------------------------------------------------------------- the walk


class Walk(NamedTuple):
    """What comes of walking all blocks; None for what was not asked for."""

    C: Tensor | None
    """A number for each example, [n] in float64, before the examples' own factors."""
    dx: Tensor | None
    dW: Tensor | None
    db: Tensor | None


class Wants(NamedTuple):
    """What is asked for: C, and the gradients by x, W and b."""

    value: bool
    dx: bool
    dW: bool
    db: bool


def walk(
    x: Tensor,
    W: Tensor,
    targets: Targets,
    options: Options,
    factor: Tensor,
    block: int,
    product_dtype: torch.dtype,
    wants: Wants,
) -> Walk:
    """Value and gradients, block by block.

    factor multiplies dz, a number for each example, [n].
    """
    (n, features), num_labels = x.shape, W.shape[0]
    dtype = torch.promote_types(product_dtype, torch.float32)
    same = dtype == product_dtype  # else: products in product_dtype, all else in float32
    wants_dz = wants.dx or wants.dW or wants.db
    C = x.new_zeros(n, dtype=torch.float64) if wants.value else None
    dx = x.new_zeros(n, features, dtype=dtype) if wants.dx else None
    dW = W.new_empty(W.shape) if wants.dW else None
    db = W.new_zeros(num_labels, dtype=dtype) if wants.db else None
    if dW is not None and n == 0:
        dW.zero_()
    examples = examples_at_a_time(n)
    memory = x.new_empty(min(n, examples) * min(num_labels, block), dtype=dtype)
    # On a CPU a chunk that fits its cache is done with all at once; on CUDA a call costs as much.
    elements = memory.numel() if x.is_cuda else min(memory.numel(), max(_CHUNK, block))
    room = _Room(elements, memory)
    listed = _listed(targets, n, num_labels, block, examples)
    x, factor = x.to(product_dtype), factor[:, None].to(dtype)
    for first in range(0, num_labels, block):
        labels = slice(first, min(first + block, num_labels))
        width = labels.stop - first
        W_block = W[labels].to(product_dtype)
        of_block = options.of(labels, dtype)
        dW_block = None if dW is None else dW[labels]
        if dW_block is not None and dW_block.dtype != dtype and n > examples:
            dW_block = dW_block.new_empty(dW_block.shape, dtype=dtype)
        for begin in range(0, n, examples):
            rows = slice(begin, min(begin + examples, n))
            x_rows = x[rows]
            z = memory[: len(x_rows) * width].view(len(x_rows), width)
            if not same:
                z.copy_(x_rows @ W_block.mT)
                if of_block.b is not None:
                    z += of_block.b
            elif of_block.b is not None:
                torch.addmm(of_block.b, x_rows, W_block.mT, out=z)  # (1)
            else:
                torch.mm(x_rows, W_block.mT, out=z)
            how = _Rows(room, max(1, elements // width), factor[rows], wants.value, wants_dz)
            if targets.dense is not None:
                C_rows = _block_of_dense(z, targets.dense[rows, labels], of_block, how)
            else:
                C_rows = _block_of_list(z, *next(listed), of_block, how)
            if C is not None and C_rows is not None:
                C[rows] += C_rows
            if not wants_dz:
                continue
            if db is not None:
                db[labels] += z.sum(0)  # (6)
            dz = z.to(product_dtype)
            if dx is not None:
                if same:
                    dx[rows].addmm_(dz, W_block)  # (7)
                else:
                    dx[rows] += dz @ W_block
            if dW_block is not None:
                if begin:
                    dW_block.add_(dz.mT @ x_rows) if not same else dW_block.addmm_(dz.mT, x_rows)
                elif same:
                    torch.mm(dz.mT, x_rows, out=dW_block)  # (6)
                else:
                    dW_block.copy_(dz.mT @ x_rows)
        if dW is not None and dW_block is not None and dW_block.dtype != dW.dtype:
            dW[labels] = dW_block
    return Walk(C, dx, dW, db)


_CHUNK = 2**18
"""Numbers in a chunk: with three more of its size it fits a core's cache of the second level."""


def examples_at_a_time(n: int) -> int:
    """In equal parts of some thousand: what the matrix products like."""
    return max(1, math.ceil(n / math.ceil(n / 1024))) if n else 1


def default_block(n: int, num_labels: int, features: int, dtype: torch.dtype) -> int:
    """As many labels as fit the larger of 16 MB and a twentieth of the parameters."""
    size = torch.finfo(torch.promote_types(dtype, torch.float32)).bits // 8
    numbers = max(2**24 // size, num_labels * features // 20)
    block = numbers // examples_at_a_time(n)
    return max(1, min(block // 256 * 256 or block, num_labels))


def memory(n: int, num_labels: int, features: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that a walk takes beyond inputs, parameters and their gradients, on a CPU."""
    size = torch.finfo(torch.promote_types(dtype, torch.float32)).bits // 8
    numbers = default_block(n, num_labels, features, dtype) * min(n, examples_at_a_time(n))
    return size * (numbers + 3 * min(numbers, _CHUNK) + n * features)


_Listed = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _listed(
    targets: Targets, n: int, num_labels: int, block: int, examples: int
) -> Iterator[_Listed]:
    """For each block of labels and within it of examples, in order: `_block_of_list`'s list."""
    if targets.rows is None or targets.labels is None:
        return
    rows, labels, values = targets.rows, targets.labels, targets.values
    parts = max(1, math.ceil(n / examples))
    blocks = math.ceil(num_labels / block)
    # One number to sort by: block of labels, block of examples, example, label.
    size = block * examples
    number = (labels // block) * parts + rows // examples
    key = number * size + (rows % examples) * block + labels % block
    key = key.where((labels >= 0) & (labels < num_labels), blocks * parts * size)
    key, order = key.sort()
    rows, labels = rows[order] % examples, labels[order] % block
    values = None if values is None else values[order]
    counts = None
    if not targets.once and len(key):
        counts = torch.cat([key.new_ones(1, dtype=torch.bool), key[1:] != key[:-1]])
    starts = torch.arange(blocks * parts + 1, device=key.device) * size
    ends = torch.searchsorted(key, starts).tolist()  # on CUDA the one place where it waits
    for begin, end in pairwise(ends):
        part = slice(begin, end)
        yield (
            rows[part],
            labels[part],
            None if values is None else values[part],
            None if counts is None else counts[part],
        )
