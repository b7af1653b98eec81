"""Data sets as tensors on a device, random orders of the examples, and distortions of images.

May import the notes' files.
"""

from nnce.data.datasets import (
    DATASETS,
    SPLITS,
    Dataset,
    Split,
    check,
    load,
    one_hot,
)
from nnce.data.distortions import MAX_CHUNK, Distorted, Distortion
from nnce.data.errors import DataError
from nnce.data.orders import order, stream

__all__ = [
    "DATASETS",
    "MAX_CHUNK",
    "SPLITS",
    "DataError",
    "Dataset",
    "Distorted",
    "Distortion",
    "Split",
    "check",
    "load",
    "one_hot",
    "order",
    "stream",
]
