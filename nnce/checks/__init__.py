"""Checks for custom autograd Functions; imports nothing from nnce outside this package."""

from nnce.checks.composability import Cell as Cell
from nnce.checks.composability import Composability as Composability
from nnce.checks.composability import check_composability as check_composability
from nnce.checks.gradients import Finding as Finding
from nnce.checks.gradients import Report as Report
from nnce.checks.gradients import check_gradients as check_gradients

__all__ = [
    "Cell",
    "Composability",
    "Finding",
    "Report",
    "check_composability",
    "check_gradients",
]
