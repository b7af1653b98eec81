"""Your own data: arrays in a NumPy archive, or a folder of images by class.

An archive (.npz) contains two arrays:

- x [n, …], one row per example: bytes (uint8, divided by 255), booleans, or numbers in [0, 1]. Rows
  of shape [h, w], [h, w, 1] or [h²] are images.
- y [n], whole numbers or names; the classes are its distinct values, sorted.

A folder has torchvision's `ImageFolder` layout: one folder of images per class. All images must
have the same size; colors are converted to gray.

At least two classes of at least three examples each are required. Validation and test data are a
fixed stratified sixth of the examples each, at most 10,000.
"""

import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnce import _memory
from nnce.data import pictures
from nnce.data.errors import DataError

# Folder names that are parts of a data set, not classes.
_PARTS = {"train", "training", "val", "valid", "validation", "test"}


def read(path: Path) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Read inputs [n, features], class numbers [n], and "image" and "classes" of `Dataset.about`.

    Raises:
        DataError: the path has no such data, or they do not meet the conditions above.
    """
    x, labels, classes = _folder(path) if path.is_dir() else _archive(path)
    if len(classes) < 2:
        raise DataError(f"{path}: expected two classes or more, got {classes}")
    rarest, name = min(zip(labels.bincount().tolist(), classes, strict=True))
    if rarest < 3:
        raise DataError(
            f"{path}: expected at least 3 examples of each class, one each for training, "
            f"validation and test, got {rarest} of {name}"
        )
    shape = list(x.shape[1:])
    if len(shape) == 3 and shape[2] == 1:
        shape = shape[:2]
    side = math.isqrt(math.prod(shape))
    if len(shape) == 1 and side**2 == shape[0]:
        shape = [side, side]
    return x.flatten(1), labels, {"image": shape if len(shape) == 2 else None, "classes": classes}


def torchvision_datasets(user: str) -> Any:
    """Import `torchvision.datasets`; `user` is what needs it, in the error message.

    Raises:
        DataError: there is no torchvision, or not a working one.
    """
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        # A torchvision from a different build than torch fails here: "operator torchvision::nms
        # does not exist".
        raise DataError(
            f"{user} needs a torchvision of the same build as torch {torch.__version__}: "
            f"pip install --upgrade torch torchvision ({str(error).splitlines()[0]})"
        ) from error
    return datasets


def _archive(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    try:
        import numpy as np
    except ImportError as error:
        raise DataError(f"{path} needs NumPy: pip install 'nnce[scripts]' ({error})") from error
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not an archive")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("x", "y") if name in archive}
            names = archive.files
    except Exception as error:  # of any type: the content of a foreign file is arbitrary
        if _memory.shortage(error):
            raise
        why = " ".join(str(error).split())
        raise DataError(f"{path} is damaged or not a NumPy archive (.npz): {why}") from error
    if len(arrays) < 2:
        raise DataError(f"{path}: expected arrays x and y, got {', '.join(names) or 'none'}")
    x, y = arrays["x"], arrays["y"]
    if y.ndim != 1 or x.ndim < 2 or len(x) != len(y) or not x.size:
        raise DataError(
            f"{path}: expected x of shape (n, …) and y of shape (n,), a class number or name for "
            f"each row of x, got {x.shape} and {y.shape}"
        )
    if y.dtype.kind == "f" and np.isfinite(y).all() and not (y % 1).any():
        y = y.astype(np.int64)
    if x.dtype.kind not in "biuf" or y.dtype.kind not in "biuUS":
        raise DataError(
            f"{path}: expected numbers in x, and whole numbers or names in y, got {x.dtype} and "
            f"{y.dtype}"
        )
    found, labels = np.unique(y, return_inverse=True)
    classes = [c.decode(errors="replace") if isinstance(c, bytes) else str(c) for c in found]
    return _inputs(x, path), torch.from_numpy(labels.reshape(-1)), classes


def _inputs(x: Any, path: Path) -> Tensor:
    """Convert an array to a tensor of numbers in [0, 1]."""
    if x.dtype == "uint8":
        if x.size and x.max() == 1:
            raise DataError(
                f"{path}: expected bytes from 0 to 255 in x, got none above 1: convert inputs of 0 "
                "and 1 to bool or float32"
            )
        return torch.from_numpy(x) / 255
    wrong = ~((x >= 0) & (x <= 1))  # NaN is neither
    if wrong.any():
        at = tuple(int(axis[0]) for axis in wrong.nonzero())
        raise DataError(
            f"{path}: expected x in [0, 1], or bytes (uint8) from 0 to 255, got {x[at]} of "
            f"{x.dtype} at {list(at)}: scale it first"
        )
    return torch.from_numpy(x.astype("float64" if x.dtype.itemsize > 4 else "float32"))


def _folder(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    datasets = torchvision_datasets("a folder of images")
    try:
        found = datasets.ImageFolder(path)
    except OSError as error:  # torchvision's message, or the system's
        why = error.strerror or " ".join(str(error).split())
        raise DataError(f"{path}: expected a folder of images for each class: {why}") from error
    if _PARTS.issuperset(name.lower() for name in found.classes):
        raise DataError(
            f"{path}: expected a folder for each class, got {', '.join(found.classes)}: pass one "
            f"of these folders, which is split into training, validation and test data"
        )
    images: list[Tensor] = []
    for file, _ in found.samples:
        images.append(pictures.gray(pictures.read(file)))
        if images[-1].shape != images[0].shape:
            (h, w), (height, width) = images[-1].shape, images[0].shape
            raise DataError(
                f"{path}: expected images of one size, {width}x{height} like {found.samples[0][0]}"
                f", got {w}x{h} in {file}: resize or crop them first"
            )
    return torch.stack(images) / 255, torch.tensor(found.targets), found.classes
