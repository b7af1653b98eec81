"""Targets for many labels: the positive labels of each example.

A dense target is as large as the logits. An example has only a few of a million labels, so a list
is enough: label numbers, compressed sparse rows, or pairs of example and label.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from nnce import _torch_private
from nnce._arguments import (
    check_dense,
    check_device,
    check_whole,
    in_unit_interval,
    is_integer,
    shape_of,
    some_of,
)


class Positives:
    """The positive labels of n examples, any number for each, as compressed sparse rows.

    Usable as a data set of n examples: an index, a slice, indices or a mask select examples, and
    `torch.utils.data.DataLoader` joins them into a mini-batch.

    Args:
        crow: offset of each example's first label in col, followed by the length of col, [n + 1].
        col: label numbers from 0, [crow[-1]], each at most once per example.
        values: targets of these labels in [0, 1], [crow[-1]]; None for 1.

    Raises:
        TypeError: crow or col is not a tensor of integers, or values is not a
            floating-point tensor.
        ValueError: shapes or devices do not match, a number is negative or occurs twice in one
            example, or a value is not in [0, 1].

    >>> targets = nnce.Positives.from_lists([[0, 2], [], [1]])
    >>> targets.to_dense(3)
    tensor([[1., 0., 1.],
            [0., 0., 0.],
            [0., 1., 0.]])
    """

    def __init__(self, crow: Tensor, col: Tensor, values: Tensor | None = None) -> None:
        """Check and store the tensors. (On CUDA, the check synchronizes.)"""
        for name, tensor in (("crow", crow), ("col", col)):
            check_whole(name, tensor)
            check_dense(name, tensor)
        check_device("crow", crow, col.device, like="col")
        crow, col = crow.long(), col.long()
        if crow.dim() != 1 or col.dim() != 1 or not len(crow):
            raise ValueError(
                f"expected crow of shape (n + 1,) and col of one dimension, got {shape_of(crow)} "
                f"and {shape_of(col)}"
            )
        if crow[0] != 0 or crow[-1] != len(col) or not bool((crow.diff() >= 0).all()):
            raise ValueError(
                f"expected crow to rise from 0 to the {len(col)} labels of col, got {some_of(crow)}"
            )
        if len(col) and col.min() < 0:
            raise ValueError(f"expected label numbers of at least 0, got {int(col.min())}")
        _check_values(values, col, "col")
        self.crow, self.col, self.values = crow, col, values
        rows = self.rows()
        order = col.argsort(stable=True)
        order = order[rows[order].argsort(stable=True)]
        r, c = rows[order], col[order]
        twice = (r[1:] == r[:-1]) & (c[1:] == c[:-1])
        if bool(twice.any()):
            at = int(twice.nonzero()[0])
            raise ValueError(
                f"expected each label once in an example, got label {int(c[at])} twice in example "
                f"{int(r[at])}"
            )

    @classmethod
    def _trusted(cls, crow: Tensor, col: Tensor, values: Tensor | None) -> "Positives":
        self = cls.__new__(cls)
        self.crow, self.col, self.values = crow, col, values
        return self

    @classmethod
    def from_lists(cls, labels: Iterable[Iterable[int]]) -> "Positives":
        """Create from the label numbers of each example: lists, arrays or tensors of integers.

        Raises:
            TypeError: labels is not a list of lists of integers.
            ValueError: as for the class.
        """
        examples = [_integers(each, number) for number, each in enumerate(_listed(labels))]
        crow = torch.tensor([0, *map(len, examples)]).cumsum(0)
        flat = [label for each in examples for label in each]
        if flat and max(flat) >= 2**63:
            raise ValueError(f"expected label numbers below 2**63, got {max(flat)}")
        return cls(crow, torch.tensor(flat, dtype=torch.int64))

    @classmethod
    def from_scipy(cls, matrix: Any) -> "Positives":
        """Create from a SciPy sparse matrix or array [n, labels] of targets.

        Raises:
            TypeError: matrix is not a SciPy sparse matrix, or its values are not real
                numbers of at most 64 bits.
            ValueError: matrix is not two-dimensional, or as for the class.
        """
        if not hasattr(matrix, "tocsr"):
            raise TypeError(f"expected a SciPy sparse matrix, got {type(matrix).__name__}")
        if len(matrix.shape) != 2:
            raise ValueError(f"expected a matrix of shape (n, labels), got {matrix.shape}")
        if matrix.dtype.kind not in "biuf" or matrix.dtype.itemsize > 8:
            raise TypeError(
                f"expected a matrix of real numbers of at most 64 bits, got {matrix.dtype}"
            )
        csr = matrix.tocsr()
        values = torch.from_numpy(csr.data.astype("float64"))
        if matrix.dtype != "float64":
            values = values.float()
        crow, col = (torch.from_numpy(t.astype("int64")) for t in (csr.indptr, csr.indices))
        return cls(crow, col, None if bool((values == 1).all()) else values)

    @classmethod
    def from_coo(
        cls, rows: Tensor, labels: Tensor, n: int, values: Tensor | None = None
    ) -> "Positives":
        """Create from the example number and label number of each positive, in any order.

        Args:
            rows: example numbers from 0 to n − 1, one-dimensional.
            labels: label numbers, of rows' shape.
            n: number of examples.
            values: targets in [0, 1], of rows' shape; None for 1.

        Raises:
            TypeError: rows or labels is not a tensor of integers, n is not an integer, or values is
                not a floating-point tensor.
            ValueError: as for the class.
        """
        for name, tensor in (("rows", rows), ("labels", labels)):
            check_whole(name, tensor)
            check_dense(name, tensor)
        if not is_integer(n):
            raise TypeError(f"expected n to be a whole number, got {type(n).__name__}")
        if n < 0:
            raise ValueError(f"expected n of at least 0, got {n}")
        if rows.dim() != 1:
            raise ValueError(f"expected rows of one dimension, got {shape_of(rows)}")
        if len(rows) and (rows.min() < 0 or rows.max() >= n):
            raise ValueError(f"expected rows from 0 to {n - 1}, got {some_of(rows)}")
        if rows.shape != labels.shape:
            raise ValueError(
                f"expected labels of shape {shape_of(rows)} like rows, got {shape_of(labels)}"
            )
        check_device("labels", labels, rows.device, like="rows")
        _check_values(values, rows, "rows")
        order = rows.argsort(stable=True)
        return cls(_starts(rows, int(n)), labels[order], None if values is None else values[order])

    def __len__(self) -> int:
        return len(self.crow) - 1

    def __getitem__(self, examples: "int | slice | Tensor | Sequence[int]") -> "Positives":
        """Select examples by an index, a slice, indices, or a mask [n].

        Raises:
            TypeError: an index is neither an integer nor a mask.
            IndexError: an index is out of range, or indices or a mask have the wrong shape.
        """
        chosen = self._chosen(examples)
        begin, counts = self.crow[chosen], self.crow.diff()[chosen]
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        within = torch.arange(int(crow[-1]), device=crow.device)
        at = within + (begin - crow[:-1]).repeat_interleave(counts)
        values = None if self.values is None else self.values[at]
        return self._trusted(crow, self.col[at], values)

    def _chosen(self, examples: object) -> Tensor:
        """Return the numbers, from 0, of the examples that an index selects, [chosen]."""
        device = self.crow.device
        if isinstance(examples, slice):
            chosen = range(*examples.indices(len(self)))  # torch does not support negative steps
            return torch.arange(len(chosen), device=device) * chosen.step + chosen.start
        if is_integer(examples):
            index = torch.tensor(int(examples), device=device)
        elif isinstance(examples, list | tuple) and not examples:
            index = torch.tensor([], dtype=torch.int64, device=device)
        else:
            try:
                index = torch.as_tensor(examples, device=device)
            except (TypeError, ValueError, RuntimeError) as error:
                kind = type(examples).__name__
                raise TypeError(
                    f"expected the numbers of examples or a mask [n], got {kind}"
                ) from error
        if index.dtype == torch.bool and index.dim() == 1:
            if len(index) != len(self):
                raise IndexError(f"expected a mask of {len(self)} examples, got {len(index)}")
            return index.nonzero()[:, 0]
        if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
            raise TypeError(f"expected the numbers of examples or a mask [n], got {index.dtype}")
        if index.dim() > 1:
            raise IndexError(
                f"expected one number of an example or one dimension of them, got shape "
                f"{shape_of(index)}"
            )
        index = index.long().reshape(-1)
        wrong = (index < -len(self)) | (index >= len(self))
        if bool(wrong.any()):
            raise IndexError(
                f"expected numbers of {len(self)} examples, got {some_of(index[wrong])}"
            )
        return index.where(index >= 0, index + len(self))

    def rows(self) -> Tensor:
        """Return the example number of each positive, of col's shape."""
        counts = self.crow.diff()
        rows = torch.arange(len(self), device=counts.device)
        return rows.repeat_interleave(counts, output_size=len(self.col))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Positives":
        """Return the positives on the given device."""
        crow, col, values = (
            None if t is None else t.to(device, non_blocking=non_blocking)
            for t in (self.crow, self.col, self.values)
        )
        return self._trusted(cast(Tensor, crow), cast(Tensor, col), values)

    def to_dense(self, num_labels: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the targets as a tensor [n, num_labels]."""
        dense = torch.zeros(len(self), num_labels, dtype=dtype, device=self.col.device)
        dense[self.rows(), self.col] = 1 if self.values is None else self.values.to(dense.dtype)
        return dense

    def __repr__(self) -> str:
        soft = "" if self.values is None else ", soft"
        return f"Positives({len(self.col)} labels in {len(self)} examples{soft})"


def _collate(batch: Sequence[Positives], *, collate_fn_map: object = None) -> Positives:
    """Concatenate the examples of all parts of a batch."""
    begins = itertools.accumulate((len(part.col) for part in batch), initial=0)
    crows = [part.crow[1:] + begin for part, begin in zip(batch, begins, strict=False)]
    values = None
    if any(part.values is not None for part in batch):
        dtype = torch.get_default_dtype()
        values = torch.cat(
            [torch.ones_like(p.col, dtype=dtype) if p.values is None else p.values for p in batch]
        )
    crow = torch.cat([batch[0].crow[:1], *crows])
    return Positives._trusted(crow, torch.cat([part.col for part in batch]), values)


# PyTorch's documented way to extend `torch.utils.data.default_collate`.
_torch_private.register_collate(Positives, _collate)


Target = Tensor | Positives


class Targets(NamedTuple):
    """Targets of any kind, normalized to a dense tensor or a list of nonzero targets."""

    dense: Tensor | None
    """[n, labels]."""
    rows: Tensor | None
    labels: Tensor | None
    """Example and label of each listed target; negative labels are ignored."""
    values: Tensor | None
    """The listed targets; None for 1."""
    once: bool
    """Whether each label occurs at most once per example."""

    def dense_for(self, n: int, num_labels: int) -> Tensor:
        """Return all targets, [n, num_labels]; the tensor may be non-contiguous."""
        if self.dense is not None:
            return self.dense
        # One extra column, the last, for label −1.
        if self.values is None:
            dense = torch.zeros(n, num_labels + 1, dtype=torch.uint8)
            dense[self.rows, self.labels] = 1
        else:
            dense = self.values.new_zeros(n, num_labels + 1)
            dense[self.rows, self.labels] = self.values
        return dense[:, :-1]


def targets_of(target: object, n: int, num_labels: int, device: torch.device) -> Targets:
    """Convert any kind of target for n examples and num_labels labels.

    Raises:
        TypeError: target is not of a supported type.
        ValueError: its shape or device does not match, or it requires a gradient.
    """
    if isinstance(target, Tensor) and target.requires_grad:
        raise ValueError("expected a target that needs no gradient: none is computed by it")
    if isinstance(target, Tensor) and target.layout in (torch.sparse_csr, torch.sparse_coo):
        if tuple(target.shape) != (n, num_labels):
            raise ValueError(
                f"expected a sparse target of shape {(n, num_labels)}, got {shape_of(target)}"
            )
        hybrid = target.dense_dim() > 0  # dense rows: a list would be larger
        target = _soft(target.to_dense()) if hybrid else _positives(target)
    if isinstance(target, Positives):
        if len(target) != n:
            raise ValueError(
                f"expected positives of the input's {n} examples, got crow for {len(target)}"
            )
        check_device("target", target.col, device, like="input")
        return Targets(None, target.rows(), target.col, target.values, once=True)
    if not isinstance(target, Tensor):
        raise TypeError(
            f"expected target to be a tensor or nnce.Positives, got {type(target).__name__}"
        )
    check_device("target", target, device, like="input")
    return _targets_of_dense(target, n, num_labels)


def _targets_of_dense(target: Tensor, n: int, num_labels: int) -> Targets:
    """Convert a dense tensor that contains the targets of all labels, or label numbers."""
    if target.layout != torch.strided:
        raise TypeError(f"expected a dense, CSR or COO target, got {target.layout}")
    if target.dtype.is_complex:
        raise TypeError(f"expected a real target, got {target.dtype}")
    if target.dtype.is_floating_point or target.dtype == torch.bool:
        if tuple(target.shape) != (n, num_labels):
            raise ValueError(
                f"expected a dense target of shape {(n, num_labels)}, got {shape_of(target)}"
            )
        return Targets(target, None, None, None, once=True)
    if target.dim() not in (1, 2) or target.shape[0] != n:
        raise ValueError(
            f"expected the label numbers of {n} examples, of shape ({n},) or ({n}, k), got "
            f"{shape_of(target)}"
        )
    if target.dim() == 2 and target.shape[1] == num_labels:
        raise ValueError(
            f"expected label numbers, got an integer target as wide as there are labels, "
            f"{shape_of(target)}: an integer tensor holds label numbers, never zeros and ones; "
            f"target.bool() makes it dense"
        )
    k = target.shape[1] if target.dim() == 2 else 1
    rows = torch.arange(n, device=target.device)
    rows = rows if k == 1 else rows.repeat_interleave(k)
    return Targets(None, rows, target.reshape(n * k).long(), None, once=k == 1)


def _positives(target: Tensor) -> Positives:
    """Convert a torch.sparse tensor; on CUDA without checks, which would synchronize."""
    if target.layout == torch.sparse_coo:
        (rows, labels), values = _torch_private.uncoalesced(target)
        values = _soft(values)
        if not target.is_cuda:
            return Positives.from_coo(rows, labels, target.shape[0], values)
        order = rows.argsort(stable=True)
        crow = _starts(rows, target.shape[0])
        return Positives._trusted(crow, labels[order], values[order])
    # Copies, because torch.compile cannot handle views of them after a graph break.
    crow, col = (
        t.to(torch.int64, copy=True) for t in (target.crow_indices(), target.col_indices())
    )
    values = _soft(target.values().clone())
    return Positives._trusted(crow, col, values) if target.is_cuda else Positives(crow, col, values)


def _starts(rows: Tensor, n: int) -> Tensor:
    """Compute crow from example numbers in any order."""
    counts = torch.bincount(rows.long(), minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _soft(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.float()


def _check_values(values: object, like: Tensor, name: str) -> None:
    """Raise unless values is None or has a target in [0, 1] for each element of `like`."""
    if values is None:
        return
    if not (isinstance(values, Tensor) and values.is_floating_point()):
        kind = getattr(values, "dtype", type(values).__name__)
        raise TypeError(f"expected values to be a floating-point tensor, got {kind}")
    check_dense("values", values)
    if values.shape != like.shape:
        raise ValueError(
            f"expected values of shape {shape_of(like)} like {name}, got {shape_of(values)}"
        )
    check_device("values", values, like.device, like=name)
    if values.requires_grad:
        raise ValueError("expected values that need no gradient: none is computed by them")
    if not bool(in_unit_interval(values).all()):
        raise ValueError(f"expected values in [0, 1], got {some_of(values)}")


def _listed(labels: object) -> list[object]:
    """Convert an iterable other than text to a list; arrays give Python numbers."""
    if isinstance(labels, str | bytes | Mapping) or not isinstance(labels, Iterable):
        kind = type(labels).__name__
        raise TypeError(f"expected a list of label numbers for each example, got {kind}")
    found = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    return found if isinstance(found, list) else [found]


def _integers(labels: object, example: int) -> list[int]:
    """Convert the label numbers of one example to Python integers."""
    found = _listed(labels)
    if set(map(type, found)) <= {int}:  # fast path: there may be millions
        return cast(list[int], found)
    numbers = []
    for label in found:
        number = label.tolist() if isinstance(label, Tensor) else label
        if not is_integer(number):
            raise TypeError(
                f"expected label numbers that are whole numbers, got {number!r} in example "
                f"{example}"
            )
        numbers.append(int(number))
    return numbers
