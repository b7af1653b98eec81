"""Checks for custom autograd Functions; imports nothing from nnce outside this package.

`gradients` compares a function's derivatives (`_subject`, `_derivatives`) with numerical ones
(`_differences`): values along lines (`_lines`), their slopes (`_numerical`; `_curves` and
`_resolution` in low precision), and the verdict by them (`_evidence`). Then it repeats them under
other conditions (`_variations`), and writes a `_report`. `composability` uses a function with
PyTorch's features.
"""

from nnce.checks._report import Finding as Finding
from nnce.checks._report import Report as Report
from nnce.checks.composability import Cell as Cell
from nnce.checks.composability import Composability as Composability
from nnce.checks.composability import check_composability as check_composability
from nnce.checks.gradients import check_gradients as check_gradients

__all__ = [
    "Cell",
    "Composability",
    "Finding",
    "Report",
    "check_composability",
    "check_gradients",
]
