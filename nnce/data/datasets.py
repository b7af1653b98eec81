"""Data sets as tensors on a device, split into training, validation and test data.

One encoding everywhere: x [n, features] in [0, 1] and one-hot y [n, classes], both of the same
floating-point dtype. Values are checked once, here, and never again.
"""

import contextlib
import hashlib
import importlib.util
import io
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnce import _memory
from nnce._arguments import is_size
from nnce.data import own
from nnce.data.errors import DataError

# torchvision's classes for data sets in MNIST's format, with 60,000 training and 10,000 test images
# of 28 by 28 pixels in 10 classes each.
_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
_FILES = [
    f"{half}-{kind}-ubyte" for half in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]
DATASETS = ("digits", *_TORCHVISION)
"""Names of the data sets that `load` accepts.

>>> nnce.data.DATASETS
('digits', 'mnist', 'fashion-mnist', 'kmnist')
"""
# MD5 sums of the unpacked files. torchvision checks only those of the packed files.
_MD5 = {
    "6bbc9ace898e44ae57da46a324031adb": "mnist",
    "a25bea736e30d166cdddb491f175f624": "mnist",
    "2646ac647ad5339dbf082846283269ea": "mnist",
    "27ae3e4e09519cfbb04c329615203637": "mnist",
    "f4a8712d7a061bf5bd6d2ca38dc4d50a": "fashion-mnist",
    "9018921c3c673c538a1fc5bad174d6f9": "fashion-mnist",
    "8181f5470baa50b63fa0f6fddb340f0a": "fashion-mnist",
    "15d484375f8d13e6eb1aabb0c3f46965": "fashion-mnist",
}

# The last 10,000 of the 60,000 training images, the validation set of Nielsen's book.
_VALIDATION_SIZE = 10_000
# Of 1,797 digits, 1,197 are for training and 300 each for validation and test.
_DIGITS_HELD_OUT = 300


class Split(NamedTuple):
    """Inputs and targets of one part of a data set: train, validation or test.

    >>> nnce.data.Split(torch.zeros(4, 2), torch.zeros(4, 3)).x.shape
    torch.Size([4, 2])
    """

    x: Tensor
    """Inputs [n, features], in [0, 1]."""
    y: Tensor
    """Targets [n, classes], one-hot."""


class _Splits(NamedTuple):
    train: Split
    """Training data."""
    validation: Split
    """Validation data, for choosing settings."""
    test: Split
    """Test data, for the final result."""


class Dataset(_Splits):
    """A data set, split into train, validation and test.

    >>> digits = nnce.data.load("digits")
    >>> {name: len(split.x) for name, split in digits.splits().items()}
    {'train': 1197, 'validation': 300, 'test': 300}
    """

    about: Mapping[str, Any] = MappingProxyType({})
    """Metadata set by `load`: "data" (a name in `DATASETS`, or the path of your own data), "image"
    (height and width, or None for inputs that are not images) and "classes" (class names, in the
    order of the targets)."""

    def splits(self) -> dict[str, Split]:
        """The three splits by name, in the order of `SPLITS`."""
        return self._asdict()


SPLITS = Dataset._fields
"""Names of the splits of a `Dataset`, in order.

>>> nnce.data.SPLITS
('train', 'validation', 'test')
"""


def load(
    name: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    train_size: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """Load a data set by name, or your own from a file or folder.

    Args:
        name: "digits" (scikit-learn's 1,797 handwritten 8×8 digits, part of its installation; a
            fixed stratified split of 1,197, 300 and 300); "mnist", "fashion-mnist" or "kmnist"
            (from torchvision; the last 10,000 of the 60,000 training images are the validation
            set); or the path of an .npz file or of a folder of images by class (see
            `nnce.data.own`).
        data_dir: folder in torchvision's layout (`MNIST/raw/…`), to which missing data are
            downloaded; None for `$NNCE_DATA`, or `data` if that is not set. Ignored for "digits"
            and paths.
        train_size: number of training examples to keep, from the first; None for all.
        device, dtype: device and floating-point dtype of the tensors.

    Returns:
        The data set: x [n, features] in [0, 1] and one-hot y [n, classes] of each split.

    Raises:
        DataError: the name is unknown; the files are damaged, or missing and cannot be downloaded;
            the package that reads them is missing; or train_size or dtype is invalid.

    >>> digits = nnce.data.load("digits", train_size=100)
    >>> digits.train.x.shape, digits.train.y.shape
    (torch.Size([100, 64]), torch.Size([100, 10]))
    """
    is_own = str(name) not in DATASETS
    if is_own and not os.path.exists(name):
        raise DataError(
            f"expected an .npz file, a folder of images by class, or one of the data sets "
            f"{', '.join(DATASETS)}, got {str(name)!r}"
        )
    if train_size is not None and not is_size(train_size):
        raise DataError(f"expected a train size of at least 1, a whole number, got {train_size!r}")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise DataError(f"expected a floating-point torch.dtype, got {dtype!r}")
    if is_own:
        x, labels, about = own.read(Path(name))
        held_out = min(max(len(x) // 6, len(about["classes"])), _VALIDATION_SIZE)
        parts = [(x[chosen], labels[chosen]) for chosen in _stratified(labels, held_out)]
    elif name == "digits":
        parts, about = _digits(), {"image": [8, 8], "classes": list("0123456789")}
    else:
        default = os.environ.get("NNCE_DATA") or "data"
        parts, classes = _torchvision(str(name), Path(default if data_dir is None else data_dir))
        about = {"image": [28, 28], "classes": classes}

    images, labels = parts[0]
    if train_size is not None and train_size > len(images):
        raise DataError(
            f"expected a train size of at most {len(images):,} for {name}, got {train_size:,}"
        )
    parts[0] = (images[:train_size], labels[:train_size])
    splits = [
        Split(images.to(device, dtype), one_hot(labels, len(about["classes"])).to(device, dtype))
        for images, labels in parts
    ]
    for split in splits:
        check(*split)
    dataset = Dataset(*splits)
    dataset.about = {"data": str(name), **about}
    return dataset


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Encode integer labels from 0 to classes − 1 as one-hot rows.

    Args:
        labels: integers, [n].
        classes: number of classes.

    Returns:
        [n, classes], int64.

    Raises:
        DataError: labels is not a dense tensor of integers, or a label is out of range.

    >>> nnce.data.one_hot(torch.tensor([2, 0]), classes=3)
    tensor([[0, 0, 1],
            [1, 0, 0]])
    """
    _check_values("labels", labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dim() != 1:
        raise DataError(
            f"expected integer labels of shape (n,), got {labels.dtype} of {tuple(labels.shape)}"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"expected labels from 0 to {classes - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    return torch.nn.functional.one_hot(labels.long(), classes)


def check(x: Tensor, y: Tensor) -> None:
    """Check the assumptions of the rules: as many inputs as targets, in [0, 1], without NaN.

    Soft targets are allowed. Call it once on your own data.

    Args:
        x: inputs, [n, features], floating-point.
        y: targets, [n, classes], floating-point.

    Raises:
        DataError: a condition is violated; the message states the first violation and its index.

    >>> nnce.data.check(torch.tensor([[0.5, 2.0]]), torch.tensor([[1.0]]))
    Traceback (most recent call last):
    nnce.data.errors.DataError: expected inputs x in [0, 1], got 2.0 at [0, 1]
    """
    for name, values in (("inputs x", x), ("targets y", y)):
        _check_values(name, values)
        if values.dim() != 2 or not len(values):
            got = tuple(values.shape)
            raise DataError(f"expected {name} of shape (n, …) with at least one row, got {got}")
    if len(x) != len(y):
        raise DataError(
            f"expected as many targets as inputs, got {len(x)} inputs, {len(y)} targets"
        )
    for name, values in (("inputs x", x), ("targets y", y)):
        if not values.is_floating_point():
            raise DataError(f"expected {name} of a floating-point dtype, got {values.dtype}")
        wrong = ~((values >= 0) & (values <= 1))  # NaN is neither
        if wrong.any():
            row = wrong.nonzero()[0].tolist()
            value = values[tuple(row)].item()
            raise DataError(f"expected {name} in [0, 1], got {value} at {row}")


def _check_values(name: str, values: object) -> None:
    """Raise DataError unless values is a tensor whose elements can be read."""
    if not isinstance(values, Tensor):
        raise DataError(f"expected {name} to be a tensor, got {type(values).__name__}")
    if values.layout != torch.strided or values.is_quantized or values.is_meta:
        raise DataError(
            f"expected {name} to be a dense, unquantized tensor with data, got {values.dtype}, "
            f"{values.layout} on {values.device}"
        )


# --------------------------------------------------------------------------------------- sources

_Part = tuple[Tensor, Tensor]  # images [n, features] in [0, 1], labels [n]


def _digits() -> list[_Part]:
    """scikit-learn's digits, in the parts of `_stratified(labels, _DIGITS_HELD_OUT)`."""
    if file := digits_file():
        import numpy as np

        table = torch.from_numpy(np.loadtxt(file, delimiter=","))
        x, labels = table[:, :-1], table[:, -1].long()
        split = np.load(Path(__file__).with_name("digits_split.npy"))
        order = torch.from_numpy(split.astype(np.int64))
    else:
        x, labels = map(torch.from_numpy, _sklearn().datasets.load_digits(return_X_y=True))
        order = torch.cat(_stratified(labels, _DIGITS_HELD_OUT))
    sizes = [len(labels) - 2 * _DIGITS_HELD_OUT, _DIGITS_HELD_OUT, _DIGITS_HELD_OUT]
    return [(x[chosen] / 16, labels[chosen]) for chosen in order.split(sizes)]


def digits_file() -> Path | None:
    """The file in scikit-learn's folder, since the import of scikit-learn would take a second."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("datasets") / "data" / "digits.csv.gz"
    return path if path.exists() else None


def _stratified(labels: Tensor, held_out: int) -> list[Tensor]:
    """Fixed stratified split: indices of train, validation and test, the latter two held_out."""
    split = _sklearn().model_selection.train_test_split
    rest: Any = torch.arange(len(labels)).numpy()
    parts = []
    for _ in ("test", "validation"):
        stratify = labels.numpy()[rest]
        rest, part = split(rest, test_size=held_out, stratify=stratify, random_state=0)
        parts.append(torch.from_numpy(part))
    return [torch.from_numpy(rest), *reversed(parts)]


def _sklearn() -> Any:
    try:
        import sklearn.datasets
        import sklearn.model_selection
    except ImportError as error:
        raise DataError(
            f"digits and your own data need scikit-learn: pip install 'nnce[scripts]' ({error})"
        ) from error
    return sklearn


def _torchvision(name: str, data_dir: Path) -> tuple[list[_Part], list[str]]:
    """The three parts, and the names of the classes."""
    loader = getattr(own.torchvision_datasets(name), _TORCHVISION[name])
    x, labels = _read(loader, name, data_dir, train=True)
    x_test, labels_test = _read(loader, name, data_dir, train=False)
    parts = [
        (x[:-_VALIDATION_SIZE], labels[:-_VALIDATION_SIZE]),
        (x[-_VALIDATION_SIZE:], labels[-_VALIDATION_SIZE:]),
        (x_test, labels_test),
    ]
    return parts, [name.partition(" - ")[0] for name in loader.classes]  # MNIST's: "7 - seven"


def _read(loader: Any, name: str, data_dir: Path, *, train: bool) -> _Part:
    """Read the training or test half of a data set in MNIST's format; download it if missing."""
    folder = data_dir / _TORCHVISION[name] / "raw"
    for file in _FILES:
        if (folder / file).is_dir():
            half = file.partition("-")[0] == "train"
            raise DataError(_damaged(name, folder, half, f"{file} is a folder"))
    complete = all((folder / file).exists() for file in _FILES)
    older = folder.with_name("processed")  # from an older torchvision, and still read first
    if all((older / file).exists() for file in ("training.pt", "test.pt")):
        folder, complete = older, True
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        # torchvision prints a line for each mirror that fails; the errors below suffice.
        with contextlib.redirect_stdout(io.StringIO()):
            dataset = loader(data_dir, train=train, download=not complete)
        why = _unlike_mnist(dataset.data, dataset.targets, 60_000 if train else 10_000)
    except Exception as error:  # of any type: the content of a damaged file is arbitrary
        if _memory.shortage(error):
            raise
        reason = " ".join(str(error).split()) or "not in the format of MNIST"
        if complete:
            raise DataError(_damaged(name, folder, train, reason)) from error
        for parent in made:  # empty folders, made by torchvision before the download failed
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise DataError(
            f"{name} is not in {data_dir}: set --data-dir or $NNCE_DATA to the folder that "
            f"contains {_TORCHVISION[name]}/raw; it could not be downloaded ({_short(reason)})"
        ) from error

    if why:
        raise DataError(_damaged(name, folder, train, why))
    if folder is not older:
        _check_sums(dict(loader.resources), name, folder, train)
    return dataset.data.flatten(1) / 255, dataset.targets


def _unlike_mnist(images: Tensor, labels: Tensor, n: int) -> str:
    """A message if images and labels are not n examples in MNIST's format, otherwise ""."""
    shapes = (tuple(images.shape), tuple(labels.shape))
    if shapes != ((n, 28, 28), (n,)):
        return f"expected {n:,} images of 28 by 28 and as many labels, got {shapes}"
    dtypes = (images.dtype, labels.dtype)
    if dtypes != (torch.uint8, torch.int64):
        return f"expected uint8 images and int64 labels, got {dtypes}"
    if not 0 <= labels.min() <= labels.max() <= 9:
        return f"expected labels from 0 to 9, got {labels.min()} to {labels.max()}"
    return ""


def _check_sums(packed_md5: dict[str, str], name: str, folder: Path, train: bool) -> None:
    """Raise DataError if a file belongs to a different data set or differs from its packed form.

    A file with an unknown MD5 sum and without a packed form passes.
    """
    for file in _FILES[:2] if train else _FILES[2:]:
        content = (folder / file).read_bytes()
        of = _MD5.get(_md5(content))
        packed = folder / f"{file}.gz"
        if of == name or (of is None and not packed.is_file()):
            continue
        # A gzip file ends in the CRC-32 and the length of its content.
        ends = zlib.crc32(content).to_bytes(4, "little") + len(content).to_bytes(4, "little")
        if of is not None:
            why = f"{file} belongs to {of}"
        elif _md5(packed.read_bytes()) != packed_md5[packed.name]:
            why = f"{packed.name} does not have the MD5 sum that torchvision expects"
        elif not packed.read_bytes().endswith(ends):
            why = f"{file} differs from the content of {packed.name}"
        else:
            continue
        raise DataError(_damaged(name, folder, train, why))


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _short(reason: str) -> str:
    """Shorten a long message to its beginning and its end: the attempt and its outcome."""
    return reason if len(reason) <= 160 else f"{reason[:60]} … {reason[-90:]}"


def _damaged(name: str, folder: Path, train: bool, why: str) -> str:
    half = "train" if train else "t10k"
    return (
        f"the files of {name} in {folder} ({half}-…) are damaged or not {name}'s: {why}; "
        f"delete them and run again"
    )
