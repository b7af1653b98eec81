"""Value and gradients of a linear layer with cross-entropy, one block of labels at a time.

Because dC/dz is a − y for each component (equation 5), the labels are independent, unlike in
softmax. The weighted inputs z of a block of labels, the value, the delta, and the delta's two
products (equations 6 and 7) are computed together and then discarded. The full z is never stored.

    z = x Wᵀ + b        [n, block]      (1)
    C = −Σ [y ln a + (1−y) ln(1−a)]     (3)   one number per example
    dz = a − y                          (5)   overwrites z
    dW, db += dzᵀ x, Σ dz               (6)
    dx += dz W                          (7)

No autograd, and no state.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor

from nnce import rules
from nnce.kernels import fused
from nnce.labels.positives import Targets

# ----------------------------------------------------------------------------- one block's rules


class _Scratch:
    """Reusable memory for three chunks."""

    def __init__(self, elements: int, like: Tensor) -> None:
        self._memory = like.new_empty(3, elements)

    def like(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second, third = (part[: z.numel()].view_as(z) for part in self._memory)
        return first, second, third


def _log1p_of_exp_of_minus_abs(z: Tensor, room: _Scratch) -> tuple[Tensor, Tensor]:
    """Compute ln(1 + e^(−|z|)); return it with a spare buffer.

    ln(1 + t) = t · ln(u)/(u − 1) with u = 1 + t rounded; the rounding error of u cancels (Kahan;
    Higham, Accuracy and Stability of Numerical Algorithms, 2002, §1.14.1). The result is accurate
    to a few units in the last place and takes a tenth of the time of PyTorch's log1p in float32 on
    a CPU, which would be four fifths of the time spent on z. For u = 1 the quotient is 1, and so u
    is clamped to the next larger number, whose quotient is just as accurate.
    """
    t, u, ln = room.like(z)
    torch.abs(z, out=t).neg_().exp_()
    torch.add(t, 1, out=u).clamp_(min=1 + torch.finfo(u.dtype).eps)
    torch.log(u, out=ln)
    return ln.div_(u.sub_(1)).mul_(t), u


class Options(NamedTuple):
    """Per-label options."""

    b: Tensor | None
    """The layer's biases, [labels]."""
    weight: Tensor | None
    """Multiplies C, [labels]."""
    pos_weight: Tensor | None
    """Multiplies the y term of C, [labels]."""
    label_smoothing: float
    focus: rules.Focus | None = None
    """Selects a focal loss, which excludes pos_weight and label_smoothing."""

    def of(self, labels: slice, dtype: torch.dtype) -> "Options":
        """Return the options of a slice of labels."""
        b, weight, pos_weight = (None if t is None else t[labels].to(dtype) for t in self[:3])
        return self._replace(b=b, weight=weight, pos_weight=pos_weight)

    def value_and_dz(
        self, z: Tensor, y: Tensor, pos_weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """C and dC/dz per element, without weight: equations 3 and 5, or the focal loss."""
        if self.focus is not None:
            wide, y = z.double(), y.double()
            C, dz = rules.focal(wide, y, self.focus), rules.dz_focal(wide, y, self.focus)
            return C.to(z.dtype), dz.to(z.dtype)
        C, dz = (
            rules.cross_entropy(z, y, pos_weight),
            rules.dz_cross_entropy(z, y, pos_weight=pos_weight),
        )
        if s := self.label_smoothing:
            half = torch.full_like(y, 0.5)
            C = (1 - s) * C + s * rules.cross_entropy(z, half, pos_weight)
            dz = (1 - s) * dz + s * rules.dz_cross_entropy(z, half, pos_weight=pos_weight)
        return C, dz


class _Rows(NamedTuple):
    """How to process the rows of a block, and which results to compute.

    A compiled pass always computes both results, for all rows at once.
    """

    room: _Scratch
    chunk: int
    """Number of rows at a time."""
    factor: Tensor
    """Multiplies dz, one number per example, [rows, 1]."""
    wants_value: bool
    wants_dz: bool


def _loss_and_delta_inplace(
    z: Tensor,
    options: Options,
    negative: Tensor | float | None,
    positive: Tensor | None,
    factor: Tensor,
    how: _Rows,
) -> Tensor | None:
    """Compute C per component, in the memory of how.room, and overwrite z with dC/dz.

    C = negative · softplus(z) + positive · softplus(−z) and dC/dz = negative · σ(z) − positive ·
    σ(−z): equations 3 and 5, where negative and positive are 1 − y and y times their weights.
    positive=None means 0, and negative=None means 1.
    """
    if options.focus is not None:
        y = torch.zeros_like(z) if positive is None else positive
        of_each, dz = options.value_and_dz(z, y, None)
        z.copy_(factor * (dz if options.weight is None else dz * options.weight))
        return of_each if options.weight is None else rules.weighted(options.weight, of_each)
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


def _weighted(weight: Tensor | float, term: Tensor) -> Tensor:
    return rules.weighted(weight, term) if isinstance(weight, Tensor) else term.mul_(weight)


def _block_of_zeros(
    z: Tensor, rows: Tensor, labels: Tensor, options: Options, how: _Rows
) -> Tensor | None:
    """Σ C for targets of 0, excluding the listed elements; z is overwritten with dC/dz."""
    _, weight, pos_weight, s, focus = options
    if not s and fused.has_joint(z, None):
        z[rows, labels] = -math.inf  # where C is 0
        return fused.joint(z, None, how.factor[:, 0], fused.Options(weight, focus=focus))
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
        C = _loss_and_delta_inplace(
            z[part], options, 1 - s / 2 if s else None, positive, how.factor[part], how
        )
        if C is not None and total is not None:
            C[rows[here] - begin, labels[here]] = 0
            total[part] = C.sum(1)
    return total


def _block_of_list(z: Tensor, listed: "_Listed", options: Options, how: _Rows) -> Tensor | None:
    """Σ C over a block's labels for listed targets; z is overwritten with dC/dz.

    The result is one number per example, in float64. Targets are 0 except for those in the list:
    sorted rows, labels relative to the block, and values. counts is 0 for repeated targets, which
    have already been counted.
    """
    rows, labels, values, counts = listed
    weight, pos_weight = options.weight, options.pos_weight
    at = (rows, labels)
    z_listed = z[at]
    y = torch.ones_like(z_listed) if values is None else values.to(z.dtype)
    p = None if pos_weight is None else pos_weight[labels]
    total = _block_of_zeros(z, rows, labels, options, how)
    C, dz = options.value_and_dz(z_listed, y, p)
    if total is not None and how.wants_value:
        if weight is not None:
            C = rules.weighted(weight[labels], C)
        if counts is not None:
            C = rules.weighted(counts.to(C.dtype), C)
        total.index_add_(0, rows, C.double())
    if how.wants_dz:
        z[at] = how.factor[rows, 0] * (dz if weight is None else dz * weight[labels])
    return total


def _block_of_dense(z: Tensor, y: Tensor, options: Options, how: _Rows) -> Tensor | None:
    """Σ C over a block's labels for dense targets, y of z's shape; z is overwritten with dC/dz."""
    s = options.label_smoothing
    if y.is_floating_point() and y.itemsize == 1:
        y = y.bfloat16()  # exact, and supported by the compiled pass
    if fused.has_joint(z, y):
        return fused.joint(
            z, y, how.factor[:, 0], fused.Options(*options[1:4], None, options.focus)
        )
    total = z.new_zeros(len(z), dtype=torch.float64) if how.wants_value else None
    for begin in range(0, len(z), how.chunk):
        part = slice(begin, begin + how.chunk)
        positive = y[part].to(z.dtype)
        negative = 1 - positive
        if s:
            negative, positive = (1 - s) * negative + s / 2, (1 - s) * positive + s / 2
        if options.pos_weight is not None:
            positive = options.pos_weight * positive
        C = _loss_and_delta_inplace(z[part], options, negative, positive, how.factor[part], how)
        if C is not None and total is not None:
            total[part] = C.sum(1)
    return total


# -------------------------------------------------------------------------------------- the walk


class Walk(NamedTuple):
    """Results of a walk over all blocks; None where not requested."""

    C: Tensor | None
    """One number per example, [n] in float64, before the example weights."""
    dx: Tensor | None
    """[n, features], in float32 at least."""
    dW: Tensor | None
    """[labels, features], in W's dtype and, where that is float16, in units of dW_unit."""
    db: Tensor | None
    """[labels], in float32 at least."""
    dW_unit: Tensor | None
    """A power of two per row of a float16 dW, [labels] in float32; None otherwise."""


class Wants(NamedTuple):
    """What to compute: C, and the gradients with respect to x, W and b."""

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

    factor multiplies dz, one number per example, [n].
    """
    n, num_labels = len(x), len(W)
    dtype = torch.promote_types(product_dtype, torch.float32)
    made = _results(x, W, dtype, wants)
    examples = examples_at_a_time(n)
    memory = _Memory(min(n, examples), min(num_labels, block), dtype, product_dtype, x.device)
    listed = _listed(targets, n, num_labels, block, examples)
    x, factor = x.to(product_dtype), factor[:, None].to(dtype)
    for first in range(0, num_labels, block):
        labels = slice(first, min(first + block, num_labels))
        W_block = W[labels].to(product_dtype)
        of_block = options.of(labels, dtype)
        dW = _RowsOfdW(made, labels, n > examples, product_dtype)
        for begin in range(0, n, examples):
            rows = slice(begin, min(begin + examples, n))
            z, half = memory.of(rows.stop - begin, labels.stop - first)
            _z(x[rows], W_block, of_block.b, z, half)
            chunk = max(1, memory.elements // z.shape[1])
            how = _Rows(memory.room, chunk, factor[rows], wants.value, any(wants[1:]))
            if targets.dense is not None:
                C = _block_of_dense(z, targets.dense[rows, labels], of_block, how)
            else:
                C = _block_of_list(z, next(listed), of_block, how)
            if made.C is not None and C is not None:
                made.C[rows] += C
            if made.db is not None:
                made.db[labels] += z.sum(0)  # (6)
            if made.dx is not None or made.dW is not None:
                dz, unit = _dz(z, half, x[rows], W_block)
                if made.dx is not None:
                    _add_product(made.dx[rows], dz, W_block, unit)  # (7)
                dW.add(dz, x[rows], unit)  # (6)
        dW.finish()
    return made


def _results(x: Tensor, W: Tensor, dtype: torch.dtype, wants: Wants) -> Walk:
    """Allocate the results, zeroed where they are accumulated."""
    return Walk(
        x.new_zeros(len(x), dtype=torch.float64) if wants.value else None,
        x.new_zeros(x.shape, dtype=dtype) if wants.dx else None,
        (W.new_empty if len(x) else W.new_zeros)(W.shape) if wants.dW else None,
        W.new_zeros(len(W), dtype=dtype) if wants.db else None,
        W.new_ones(len(W), dtype=torch.float32) if has_unit(W, wants) else None,
    )


def has_unit(W: Tensor, wants: Wants) -> bool:
    """Whether the walk returns a dW_unit."""
    return wants.dW and W.dtype == torch.float16


class _Memory:
    """Reusable memory for one block."""

    def __init__(
        self,
        rows: int,
        width: int,
        dtype: torch.dtype,
        product_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """dtype is that of z; product_dtype is that of the matrix products."""
        self._z = torch.empty(rows * width, dtype=dtype, device=device)
        self._half = None
        if dtype != product_dtype:
            self._half = torch.empty_like(self._z, dtype=product_dtype)
        # On a CPU, a chunk that fits the cache goes through all steps at once. On CUDA, chunks
        # would only add calls.
        numbers = self._z.numel()
        self.elements = numbers if self._z.is_cuda else min(numbers, max(_CHUNK, width))
        self.room = _Scratch(self.elements, self._z)

    def of(self, rows: int, width: int) -> tuple[Tensor, Tensor | None]:
        """Memory for z, and for a copy in the products' dtype if that differs (otherwise None)."""
        z, half = (
            None if memory is None else memory[: rows * width].view(rows, width)
            for memory in (self._z, self._half)
        )
        return cast(Tensor, z), half


def _z(x: Tensor, W: Tensor, b: Tensor | None, z: Tensor, half: Tensor | None) -> None:
    """Write x Wᵀ + b (equation 1) to z."""
    if half is not None:
        z.copy_(torch.mm(x, W.mT, out=half))
        if b is not None:
            z += b
    elif b is not None:
        torch.addmm(b, x, W.mT, out=z)
    else:
        torch.mm(x, W.mT, out=z)


def _dz(z: Tensor, half: Tensor | None, x: Tensor, W: Tensor) -> tuple[Tensor, Tensor | None]:
    """Convert dz to the products' dtype; return it with its unit, None for 1. z is overwritten.

    float16 ranges from 6e-8 to 65,504. The unit is a power of two such that, divided by it, neither
    dz nor its products exceed 2¹⁵, by the bound |Σ dz W| ≤ Σ |dz| max |W|. Only numbers that are
    negligible compared with these bounds are then rounded to 0.
    """
    if half is None:
        return z, None
    if half.dtype != torch.float16 or not W.numel():
        return half.copy_(z), None
    norm = torch.linalg.vector_norm
    bounds = [
        norm(z, 1, dim).amax() * norm(factor, torch.inf).float().clamp(min=1)
        for dim, factor in ((1, W), (0, x))
    ]
    unit = _unit(torch.stack(bounds).amax())
    return half.copy_(z.div_(unit)), unit


def _unit(largest: Tensor) -> Tensor:
    """The power of two that divides a number into [2¹⁴, 2¹⁵]; 1 for infinity and NaN."""
    largest = largest.nan_to_num(nan=2.0**14, posinf=2.0**14).clamp(min=2.0**-80)
    return largest / torch.frexp(largest).mantissa / 2**15


def _add_product(
    total: Tensor, a: Tensor, b: Tensor, unit: Tensor | None, *, first: bool = False
) -> None:
    """Add unit · a b to total; if first, overwrite total, which is still uninitialized."""
    if total.dtype == a.dtype:
        if first:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
        return
    product = a @ b
    rows = _rows_of_a_chunk(total)
    for part, of_product in zip(total.split(rows), product.split(rows), strict=True):
        term = of_product if unit is None else of_product.to(total.dtype).mul_(unit)
        part.copy_(term) if first else part.add_(term)


class _RowsOfdW:
    """The rows of dW for a block of labels, summed over the blocks of examples."""

    def __init__(self, made: Walk, labels: slice, many: bool, product_dtype: torch.dtype) -> None:
        """many is True if there is more than one block of examples."""
        self._rows = None if made.dW is None else made.dW[labels]
        self._unit = None if made.dW_unit is None else made.dW_unit[labels]
        self._sum, self._empty = self._rows, True
        wide = torch.promote_types(product_dtype, torch.float32)
        # In half precision, a single product is stored directly; a sum needs float32.
        kept = (wide,) if many else (wide, product_dtype)
        if self._rows is not None and self._rows.dtype not in kept:
            self._sum = torch.empty_like(self._rows, dtype=wide)

    def add(self, dz: Tensor, x: Tensor, unit: Tensor | None) -> None:
        """Add the product dzᵀ x of a block of examples; unit is that of dz."""
        if self._sum is None:
            return
        _add_product(self._sum, dz.mT, x, unit, first=self._empty)
        if self._sum is self._rows and self._unit is not None and unit is not None:
            self._unit.copy_(unit)
        self._empty = False

    def finish(self) -> None:
        """Round the sum to dW's dtype."""
        if self._rows is None or self._sum is None or self._sum is self._rows or self._empty:
            return
        if self._unit is not None and self._sum.numel():
            self._unit.copy_(_unit(torch.linalg.vector_norm(self._sum, torch.inf)))
            self._sum.div_(self._unit[:, None])
        self._rows.copy_(self._sum)


# ---------------------------------------------------------------------------- upstream gradients


def multiplied(
    gradient: Tensor, dtype: torch.dtype, dC: Tensor | None, unit: Tensor | None = None
) -> Tensor:
    """gradient · dC, computed in float32 at least and rounded to dtype once.

    dC=None means 1. unit, if given, has one number per row, which multiplies that row.
    """
    product = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if unit is not None:
        product = product * unit[:, None]
    if dC is not None:
        product = product * dC.to(product.dtype)
    return product.to(dtype)


def multiply_inplace(
    gradient: Tensor, dtype: torch.dtype, dC: Tensor | None, unit: Tensor | None = None
) -> Tensor:
    """Like `multiplied`, but in place if dtype is the gradient's."""
    if gradient.dtype == torch.promote_types(gradient.dtype, torch.float32):
        return (gradient if dC is None else gradient.mul_(dC.to(gradient.dtype))).to(dtype)
    if dC is None and unit is None:
        return gradient.to(dtype)
    rows = _rows_of_a_chunk(gradient)
    for begin in range(0, len(gradient), rows):
        part = gradient[begin : begin + rows]
        of_part = None if unit is None else unit[begin : begin + rows]
        part.copy_(multiplied(part, part.dtype, dC, of_part))
    return gradient.to(dtype)


# ---------------------------------------------------------------------------------------- memory


def _rows_of_a_chunk(matrix: Tensor) -> int:
    """The number of rows to convert at a time."""
    return max(1, (2**24 if matrix.is_cuda else _CHUNK) // max(1, matrix.shape[1]))


_CHUNK = 2**18
"""Numbers per chunk. Four chunks of this size fit in a core's level-2 cache."""


def examples_at_a_time(n: int) -> int:
    """Equal chunks of about 1,000 examples, a good size for matmul."""
    return max(1, math.ceil(n / math.ceil(n / 1024))) if n else 1


def default_block(n: int, num_labels: int, features: int, dtype: torch.dtype) -> int:
    """The number of labels per block.

    A block takes at most 16 MB or a twentieth of the parameters' memory, whichever is larger. dtype
    is that of the products.
    """
    wide = torch.promote_types(dtype, torch.float32).itemsize
    limit = max(2**24, num_labels * features // 20 * wide)
    block = limit // max(1, _bytes_of_a_label(n, features, dtype))
    return max(1, min(block // 256 * 256 or block, num_labels))


def _bytes_of_a_label(n: int, features: int, product_dtype: torch.dtype) -> int:
    """Bytes per label: z and, in half precision, copies of the parameters and products."""
    wide = torch.promote_types(product_dtype, torch.float32).itemsize
    rows = min(n, examples_at_a_time(n))
    if wide == product_dtype.itemsize:
        return rows * wide
    return rows * (wide + product_dtype.itemsize) + 2 * features * wide


def memory(
    n: int,
    num_labels: int,
    features: int,
    dtype: torch.dtype = torch.float32,
    product_dtype: torch.dtype | None = None,
) -> int:
    """Bytes that a loss needs on a CPU in addition to inputs, parameters and their gradients.

    dtype is that of input and parameters; product_dtype, by default the same, is autocast's. A
    sorted copy of the list of targets is not counted, nor are a few chunks of 2¹⁸ numbers for label
    weights, label smoothing and dense targets.
    """
    product_dtype = product_dtype or dtype
    size = product_dtype.itemsize
    wide = max(size, 4)
    block, rows = default_block(n, num_labels, features, product_dtype), examples_at_a_time(n)
    numbers = min(n, rows) * block
    chunks = 0 if fused.uses_numba() else 3 * min(numbers, max(_CHUNK, block))
    total = wide * (numbers + chunks) + n * (16 + wide)
    of_dx = max(wide - dtype.itemsize, 0) * n * features  # in float32 until dC is known
    if size == wide:  # plus MKL's packed factors, which stay allocated
        return total + of_dx + wide * (3 * rows * features // 2 + 400_000)
    total += size * numbers + 4 * _CHUNK  # the products' factor, and one converted chunk
    if dtype != product_dtype:
        total += size * features * (n + block)
    if n > rows and dtype.itemsize < wide:
        total += wide * features * block  # the sum
    # PyTorch's own buffer for a product in half precision, and the product unless it is dW itself.
    copied = n > rows or dtype != product_dtype
    product = features * max((wide + size * copied) * block, (wide + size) * rows)
    return max(total + product + of_dx, wide * n * features)


_Listed = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _listed(
    targets: Targets, n: int, num_labels: int, block: int, examples: int
) -> Iterator[_Listed]:
    """Yield `_block_of_list`'s list for each block of labels and, within it, of examples."""
    if targets.rows is None or targets.labels is None:
        return
    rows, labels, values = targets.rows, targets.labels, targets.values
    parts = max(1, math.ceil(n / examples))
    blocks = math.ceil(num_labels / block)
    # Sort key: block of labels, block of examples, example, label.
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
    ends = torch.searchsorted(key, starts).tolist()  # the only synchronization on CUDA
    for begin, end in pairwise(ends):
        part = slice(begin, end)
        yield (
            rows[part],
            labels[part],
            None if values is None else values[part],
            None if counts is None else counts[part],
        )
