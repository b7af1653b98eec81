"""Examples with sparse features and many labels, in the text format of the XMC repository.

A binary copy next to a text file is read in its place. Source: K. Bhatia et al., The extreme
classification repository: multi-label datasets and code, 2016.
"""

import codecs
import contextlib
import gzip
import hashlib
import itertools
import re
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from nnce import Positives
from nnce.experiments import report
from nnce.experiments.report import counted

_LARGEST = 2**31 - 1
_LARGEST_VALUE = torch.finfo(torch.float32).max

Features = Tensor | tuple[Tensor, Tensor, Tensor]
"""Dense features, or the input, offsets and weights of `torch.nn.EmbeddingBag`."""


class Examples(NamedTuple):
    """Features (dense, or a SciPy sparse matrix) and positive labels of each example."""

    features: Tensor | scipy.sparse.csr_array
    positives: Positives

    def batches(self, size: int, order: Tensor) -> Iterator[tuple[Features, Positives]]:
        """Yield mini-batches in the given order."""
        for chosen in order.split(size):
            if isinstance(self.features, Tensor):
                yield self.features[chosen], self.positives[chosen]
                continue
            rows = self.features[chosen.numpy()]
            numbers, starts = (torch.from_numpy(t).long() for t in (rows.indices, rows.indptr[:-1]))
            bags = (numbers, starts, torch.from_numpy(rows.data).float())
            yield bags, self.positives[chosen]


def read(path: Path) -> tuple[Examples, int, int]:
    """Read a file in the XMC repository's sparse text format.

    The first line holds the numbers of examples, features and labels. Each other line is one
    example: its labels, separated by commas, a blank, and feature:value pairs in any order. An
    example may lack labels, features, or both.

    Returns:
        The examples, the number of features, and the number of labels.

    Raises:
        ValueError: the file cannot be read or a line is not in this format.
    """
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as lines:
            return _parse(lines)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {reason}") from error
    except _BadLine as error:
        number, sentence = error.args
        raise ValueError(f"{path}, line {number:,}: {sentence}") from error


def cache_of(path: Path) -> Path:
    """Path of the binary copy of a data file, in the same folder."""
    return path.with_name(f"{path.name}.cache.npz")


def read_cached(path: Path) -> tuple[Examples, int, int] | None:
    """Read the binary copy of a data file; None if it is missing, damaged or outdated."""
    with contextlib.suppress(Exception):  # many types; a damaged copy is written again
        with cache_of(path).open("rb") as file, np.load(file, allow_pickle=False) as found:
            if str(found["text"]) != _sha256(path):
                return None
            n, features, labels = map(int, found["sizes"])
            arrays = (found["values"], found["columns"], found["starts"])
            crow, col = torch.from_numpy(found["crow"]), torch.from_numpy(found["col"])
        matrix = scipy.sparse.csr_array(arrays, shape=(n, features))
        matrix.check_format(full_check=True)
        if len(crow) == n + 1 and (not len(col) or col.max() < labels):
            return Examples(matrix, Positives(crow, col)), features, labels
    return None


def write_cache(path: Path, examples: Examples, features: int, labels: int) -> None:
    """Write the binary copy for `read_cached` atomically; print a warning if that fails."""
    matrix = cast(scipy.sparse.csr_array, examples.features)
    arrays = {
        "text": np.array(_sha256(path)),
        "sizes": np.array([len(examples.positives), features, labels]),
        **{"values": matrix.data, "columns": matrix.indices, "starts": matrix.indptr},
        **{"crow": examples.positives.crow.numpy(), "col": examples.positives.col.numpy()},
    }
    try:
        report.write_arrays(cache_of(path), arrays)
    except OSError as error:
        print(
            f"no binary copy of {path} written, the next run will parse it again: {error}",
            file=sys.stderr,
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


class _BadLine(Exception):
    """Invalid line; the arguments are its number, from 1, and the error."""


# At most 18 digits, which fit in 64 bits.
_WHOLE = re.compile(rb"\d{1,18}")
_PAIR = re.compile(rb"\d{1,18}:[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")


def _parse(lines: Iterable[bytes]) -> tuple[Examples, int, int]:
    numbered = enumerate(lines, start=1)
    n, features, labels = _sizes(next(numbered, (1, b""))[1])
    starts, columns, values = array("q", [0]), array("q"), array("f")
    examples, positives = array("q"), array("q")
    number = 1
    for number, line in numbered:
        if number > n + 1:
            if line.strip():
                raise _BadLine(number, f"expected the file to end after {counted(n, 'example')}")
            continue
        its_labels, its_features, its_values = _example(number, line, features, labels)
        columns.extend(its_features)
        values.extend(its_values)
        starts.append(len(columns))
        examples.extend([number - 2] * len(its_labels))
        positives.extend(its_labels)
    read = len(starts) - 1
    if read < n:
        raise _BadLine(
            number, f"expected {counted(n, 'example')}, but the file ends after {read:,}"
        )
    matrix = scipy.sparse.csr_array((values, columns, starts), shape=(n, features))
    matrix.sort_indices()
    rows, col = (torch.tensor(numbers, dtype=torch.int64) for numbers in (examples, positives))
    return Examples(matrix, Positives.from_coo(rows, col, n)), features, labels


def _sizes(header: bytes) -> list[int]:
    """Parse the numbers of examples, features and labels from the first line."""
    words = header.removeprefix(codecs.BOM_UTF8).split()
    sizes = [int(word) for word in words if _WHOLE.fullmatch(word)]
    if not len(sizes) == len(words) == 3 or not 0 < min(sizes) <= max(sizes) <= _LARGEST:
        raise _BadLine(
            1,
            f"expected three integers from 1 to {_LARGEST:,}, the numbers of examples, "
            f"features and labels, got {_shown(b' '.join(words))}",
        )
    return sizes


def _example(
    number: int, line: bytes, features: int, labels: int
) -> tuple[list[int], list[int], list[float]]:
    """Parse and check the labels, features and values of one line."""
    tokens = line.split()
    first = tokens.pop(0).split(b",") if tokens and b":" not in tokens[0] else []
    for expected, pattern, found in (
        ("integer label numbers", _WHOLE, first),
        ("feature:value", _PAIR, tokens),
    ):
        for wrong in itertools.filterfalse(pattern.fullmatch, found):
            raise _BadLine(number, f"expected {expected}, got {_shown(wrong)}")
    pairs = b" ".join(tokens).replace(b":", b" ").split()
    its_labels, its_features = list(map(int, first)), list(map(int, pairs[::2]))
    for kind, its, size in (("label", its_labels, labels), ("feature", its_features, features)):
        if its and max(its) >= size:
            raise _BadLine(
                number, f"expected {kind} numbers from 0 to {size - 1:,}, got {max(its):,}"
            )
        if len(set(its)) < len(its):
            twice = next(i for i in its if its.count(i) > 1)
            raise _BadLine(number, f"expected each {kind} once, got {kind} {twice:,} twice")
    its_values = list(map(float, pairs[1::2]))
    largest = max(its_values, key=abs, default=0.0)
    if abs(largest) > _LARGEST_VALUE:
        raise _BadLine(number, f"expected values within float32's range, got {largest:g}")
    return its_labels, its_features, its_values


def _shown(text: bytes) -> str:
    return repr(text[:60].decode(errors="replace"))
