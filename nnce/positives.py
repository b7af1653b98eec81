"""The targets of many labels: which labels of each example are positive.

A dense target is as large as the logits. Of a million labels an example has a handful, and a list
of these says as much: label numbers, compressed sparse rows, or pairs of example and label.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor


class Positives:
    """The positive labels of n examples, as compressed sparse rows: any number for each.

    Args:
        crow: where each example's labels begin in col, and at last where they end, [n + 1].
        col: label numbers from 0, [crow[-1]], each at most once in an example.
        values: their targets in [0, 1], [crow[-1]]; None for 1.

    Raises:
        TypeError: what is given is no tensor, or of the wrong kind of numbers.
        ValueError: the three do not fit, a number is negative or stands twice in one example, or a
            value is not in [0, 1].
    """

    def __init__(self, crow: Tensor, col: Tensor, values: Tensor | None = None) -> None:
        """Check and keep them. (The check waits for a CUDA device.)"""
        check_whole("crow", crow)
        check_whole("col", col)
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
        self.crow, self.col, self.values = crow, col, values
        if values is not None:
            if not (isinstance(values, Tensor) and values.is_floating_point()):
                kind = getattr(values, "dtype", type(values).__name__)
                raise TypeError(f"expected values to be a floating-point tensor, got {kind}")
            if values.shape != col.shape:
                raise ValueError(
                    f"expected values of shape {shape_of(col)} like col, got {shape_of(values)}"
                )
            if values.requires_grad:
                raise ValueError("expected values that need no gradient: none is computed by them")
            if not bool(((values >= 0) & (values <= 1)).all()):
                raise ValueError(f"expected values in [0, 1], got {some_of(values)}")
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
    def from_lists(cls, labels: Sequence[Sequence[int]]) -> "Positives":
        """Of a list of label numbers for each example."""
        lengths = [0, *(len(each) for each in labels)]
        flat = [label for each in labels for label in each]
        return cls(torch.tensor(lengths).cumsum(0), torch.tensor(flat, dtype=torch.int64))

    @classmethod
    def from_scipy(cls, matrix: Any) -> "Positives":
        """Of a SciPy sparse matrix or array [n, labels], whose values are the targets."""
        csr = matrix.tocsr()
        values = torch.from_numpy(csr.data.astype("float64")).float()
        crow, col = (torch.from_numpy(t.astype("int64")) for t in (csr.indptr, csr.indices))
        return cls(crow, col, None if bool((values == 1).all()) else values)

    @classmethod
    def from_coo(
        cls, rows: Tensor, labels: Tensor, n: int, values: Tensor | None = None
    ) -> "Positives":
        """Of the number of the example and the label of each positive, in any order; n examples."""
        check_whole("rows", rows)
        if len(rows) and (rows.min() < 0 or rows.max() >= n):
            raise ValueError(f"expected rows from 0 to {n - 1}, got {some_of(rows)}")
        if rows.shape != labels.shape:
            raise ValueError(
                f"expected labels of shape {shape_of(rows)} like rows, got {shape_of(labels)}"
            )
        order = rows.argsort(stable=True)
        return cls(_starts(rows, n), labels[order], None if values is None else values[order])

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.crow) - 1

    def __getitem__(self, examples: "int | slice | Tensor | Sequence[int]") -> "Positives":
        """The positives of some examples: a number, a slice, numbers, or a mask.

        Raises:
            IndexError: there is no such example.
        """
        numbers = torch.arange(len(self), device=self.crow.device)
        if isinstance(examples, int):
            if not -len(self) <= examples < len(self):
                raise IndexError(f"expected one of {len(self)} examples, got {examples}")
            chosen = numbers[examples, None]
        elif isinstance(examples, slice):
            chosen = numbers[examples]
        else:
            asked = torch.as_tensor(examples, device=numbers.device)
            chosen = numbers[asked if asked.dtype == torch.bool else asked.long()]
        begin, counts = self.crow[chosen], self.crow.diff()[chosen]
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        within = torch.arange(int(crow[-1]), device=crow.device)
        at = within + (begin - crow[:-1]).repeat_interleave(counts)
        values = None if self.values is None else self.values[at]
        return self._trusted(crow, self.col[at], values)

    def rows(self) -> Tensor:
        """The number of the example of each positive, as long as col."""
        counts = self.crow.diff()
        rows = torch.arange(len(self), device=counts.device)
        return rows.repeat_interleave(counts, output_size=len(self.col))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Positives":
        """On another device."""
        crow, col, values = (
            None if t is None else t.to(device, non_blocking=non_blocking)
            for t in (self.crow, self.col, self.values)
        )
        return self._trusted(cast(Tensor, crow), cast(Tensor, col), values)

    def to_dense(self, num_labels: int, dtype: torch.dtype | None = None) -> Tensor:
        """The targets as a tensor [n, num_labels]."""
        dense = torch.zeros(len(self), num_labels, dtype=dtype, device=self.col.device)
        dense[self.rows(), self.col] = 1 if self.values is None else self.values.to(dense.dtype)
        return dense

    def __repr__(self) -> str:
        """How many."""
        soft = "" if self.values is None else ", soft"
        return f"Positives({len(self.col)} labels in {len(self)} examples{soft})"


Target = Tensor | Positives


class Targets(NamedTuple):
    """All kinds of targets as two: dense, or a list of those that are not 0."""

    dense: Tensor | None
    """[n, labels]."""
    rows: Tensor | None
    labels: Tensor | None
    """Example and label of each target of the list; a negative label stands for none."""
    values: Tensor | None
    """The targets of the list; None for 1."""
    once: bool
    """Whether no label stands twice in one example."""


def targets_of(target: Any, n: int, num_labels: int, device: torch.device) -> Targets:
    """Any kind of target for n examples and so many labels.

    Raises:
        TypeError: it is none.
        ValueError: its shape or device does not fit, or it asks for a gradient.
    """
    if isinstance(target, Tensor) and target.requires_grad:
        raise ValueError("expected a target that needs no gradient: none is computed by it")
    if isinstance(target, Tensor) and target.layout in (torch.sparse_csr, torch.sparse_coo):
        if tuple(target.shape) != (n, num_labels):
            raise ValueError(
                f"expected a sparse target of shape {(n, num_labels)}, got {shape_of(target)}"
            )
        hybrid = target.dense_dim() > 0  # whole rows of targets: a list would be longer
        target = _soft(target.to_dense()) if hybrid else _positives(target)
    if isinstance(target, Positives):
        if len(target) != n:
            raise ValueError(
                f"expected positives of the input's {n} examples, got crow for {len(target)}"
            )
        check_device("target", target.col, device)
        return Targets(None, target.rows(), target.col, target.values, once=True)
    if not isinstance(target, Tensor):
        raise TypeError(
            f"expected target to be a tensor or nnce.Positives, got {type(target).__name__}"
        )
    check_device("target", target, device)
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
    rows = torch.arange(n, device=device).repeat_interleave(k)
    return Targets(None, rows, target.reshape(n * k).long(), None, once=k == 1)


def _positives(target: Tensor) -> Positives:
    """Of a torch.sparse tensor. On CUDA it is trusted, since a look would wait."""
    if target.layout == torch.sparse_coo:
        (rows, labels), values = target._indices(), _soft(target._values())
        if not target.is_cuda:
            return Positives.from_coo(rows, labels, target.shape[0], values)
        order = rows.argsort(stable=True)
        crow = _starts(rows, target.shape[0])
        return Positives._trusted(crow, labels[order], values[order])
    # Copies, since torch.compile, which continues after a graph break, cannot take views of them.
    crow, col = (
        t.to(torch.int64, copy=True) for t in (target.crow_indices(), target.col_indices())
    )
    values = _soft(target.values().clone())
    return Positives._trusted(crow, col, values) if target.is_cuda else Positives(crow, col, values)


def _starts(rows: Tensor, n: int) -> Tensor:
    """crow of the numbers of the examples, in any order."""
    counts = torch.bincount(rows.long(), minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _soft(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.float()


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless the tensor is on the device, which is the input's."""
    if tensor.device != device:
        raise ValueError(f"expected {name} on device {device} like input, got {tensor.device}")


def check_whole(name: str, tensor: Any) -> None:
    """Raise TypeError unless it is a tensor of whole numbers."""
    kind = getattr(tensor, "dtype", type(tensor).__name__)
    if not isinstance(tensor, Tensor) or tensor.dtype not in (
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    ):
        raise TypeError(f"expected {name} to be a tensor of whole numbers, got {kind}")


def shape_of(tensor: Tensor) -> str:
    """For a sentence."""
    return str(tuple(tensor.shape))


def some_of(tensor: Tensor) -> str:
    """The first few of its values, for a sentence."""
    values = tensor.flatten()[:4].tolist()
    return f"{values}"[:-1] + (", …]" if tensor.numel() > 4 else "]")
