"""Every cell of the matrix of `nnce.composability` is earned here."""

import shutil

import pytest
import torch
from conftest import missing

from nnce.composability import COLUMNS, INSIDE_PYTORCH, rows

ROWS = rows()

pytestmark = [
    # PyTorch's own warnings of itself: its forward-mode decompositions are scripted, and in 2.11
    # dynamo and export make an instance of Function.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("column", [c for c in COLUMNS if c not in INSIDE_PYTORCH])
def test_cell(row, column):
    if "inductor" in column and not shutil.which("g++"):
        missing("compiler", "inductor needs a C++ compiler, and there is no g++")
    if "CUDA" in column and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    COLUMNS[column](ROWS[row])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("column", INSIDE_PYTORCH)
def test_where_pytorch_stands_in_the_way(row, column):
    """Fails as soon as PyTorch is repaired: then the cell is to be moved to the others."""
    with pytest.raises(Exception, match=r"double backward|vmap|Observed exception"):
        COLUMNS[column](ROWS[row])
