"""Argument checks for the whole package: numbers, tensors, devices and options of losses.

Imports no other module of nnce. Checks raise TypeError for a non-tensor or a wrong dtype and
ValueError for shapes, devices and values. Checks of numbers also accept those of other libraries,
such as NumPy, and return Python numbers.
"""

import numbers
from typing import TypeGuard

import torch
from torch import Tensor

# -------------------------------------------------------------------------------------- numbers

# Python's own types first, each in its own isinstance: dynamo in PyTorch 2.6 does not support
# `int | float` or the abstract types; this way it never evaluates the latter.


def is_integer(value: object) -> TypeGuard[int]:
    """Whether value is an integer, of Python or another library, and not a bool."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or isinstance(value, numbers.Integral)  # noqa: SIM101  see above


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether value is a real number, of Python or another library, and not a bool."""
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float)) or isinstance(value, numbers.Real)  # noqa: SIM101  see above


def is_size(value: object) -> TypeGuard[int]:
    """Whether value is an integer of at least 1."""
    return is_integer(value) and value >= 1


def plain(value: float) -> int | float:
    """Convert a number to a Python int or float, to store, save and print."""
    return int(value) if is_integer(value) else float(value)


def check_size(name: str, value: object) -> int:
    """Return an integer of at least 1 as a Python int; raise ValueError for anything else."""
    if not is_size(value):
        raise ValueError(f"expected {name} to be a whole number of at least 1, got {value!r}")
    return int(value)


def check_block(block: int | None) -> int | None:
    """Return None, or a number of labels checked by `check_size`."""
    return None if block is None else check_size("block", block)


# ----------------------------------------------------------------------------- options of losses


def check_reduction(reduction: str) -> None:
    """Raise ValueError unless `reduction` is one of "none", "sum", "mean" and "batchmean"."""
    if reduction not in ("none", "sum", "mean", "batchmean"):
        raise ValueError(
            f"expected reduction 'none', 'sum', 'mean' or 'batchmean', got {reduction!r}"
        )


def check_label_smoothing(label_smoothing: float) -> int | float:
    """Return a Python number; TypeError for a non-number, ValueError outside [0, 1)."""
    inside = is_number(label_smoothing) and 0 <= label_smoothing < 1
    _check_range("label_smoothing", label_smoothing, inside, "in [0, 1)")
    return plain(label_smoothing)


def _check_range(name: str, value: object, inside: bool, expected: str) -> float:
    """Return a number as a float; raise TypeError for a non-number, ValueError if not inside."""
    if not is_number(value):
        raise TypeError(f"expected {name} to be a number, got {type(value).__name__}")
    if not inside:
        raise ValueError(f"expected {name} {expected}, got {value}")
    return float(value)


# A gamma beyond float32's range would give 0 · ∞ in the powers.
_LARGEST_GAMMA = 1e6


def check_focus(
    gammas: dict[str, float], margin: float, alpha: float | None
) -> tuple[float, float, float, float | None]:
    """Return the options of a focal loss as floats: both gammas, margin and alpha.

    An alpha of −1 becomes None.

    Args:
        gammas: by name, those of positive and negative targets, or one for both.

    Raises:
        TypeError: an option is not a number.
        ValueError: a gamma is negative or above 1,000,000, margin is outside [0, 1), or alpha is
            outside [0, 1].
    """
    found = []
    for name, gamma in gammas.items():
        inside = is_number(gamma) and 0 <= gamma <= _LARGEST_GAMMA
        found.append(_check_range(name, gamma, inside, "from 0 to 1,000,000"))
    inside = is_number(margin) and 0 <= margin < 1
    margin = _check_range("margin", margin, inside, "in [0, 1)")
    if alpha is not None:
        inside = is_number(alpha) and (0 <= alpha <= 1 or alpha == -1)
        alpha = _check_range("alpha", alpha, inside, "in [0, 1], or None or -1 for no alpha")
    return found[0], found[-1], margin, None if alpha == -1 else alpha


def check_ignore_index(ignore_index: int | None) -> int | None:
    """Return None or a Python int; TypeError for other types, ValueError for 0 and 1."""
    if ignore_index is None:
        return None
    if not is_integer(ignore_index):
        kind = type(ignore_index).__name__
        raise TypeError(f"expected ignore_index to be a whole number or None, got {kind}")
    if ignore_index in (0, 1):
        raise ValueError(f"expected ignore_index other than 0 and 1, got {ignore_index}")
    return int(ignore_index)


# -------------------------------------------------------------------------------------- tensors


def shape_of(tensor: Tensor) -> str:
    """Format the shape for an error message: (32, 10)."""
    return str(tuple(tensor.shape))


def some_of(tensor: Tensor) -> str:
    """Format the first four values for an error message: [1, 2, 3, 4, …]."""
    values = tensor.flatten()[:4].tolist()
    return f"{values}"[:-1] + (", …]" if tensor.numel() > 4 else "]")


def in_unit_interval(tensor: Tensor) -> Tensor:
    """Mask of the values in [0, 1], which excludes NaN."""
    return (tensor >= 0) & (tensor <= 1)


def check_alike(
    required: dict[str, Tensor], optional: dict[str, Tensor | None] | None = None
) -> None:
    """Raise unless all are dense tensors with the floating-point dtype and device of the first.

    Args:
        required: tensors by their names in error messages.
        optional: further tensors; None is skipped.

    Raises:
        TypeError: an argument is not a tensor, or is sparse or quantized, the first is not
            floating-point, or the dtypes differ.
        ValueError: the devices differ.
    """
    given = {name: tensor for name, tensor in (optional or {}).items() if tensor is not None}
    tensors = {**required, **given}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
    (first_name, first), *others = tensors.items()
    if not first.dtype.is_floating_point:
        raise TypeError(f"expected {first_name} of a floating-point dtype, got {first.dtype}")
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            whole = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
            how = f"; {name}.to({first.dtype}) makes it so" if whole else ""
            raise TypeError(
                f"expected {name} of dtype {first.dtype} like {first_name}, got {tensor.dtype}{how}"
            )
        check_device(name, tensor, first.device, like=first_name)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a sparse or quantized tensor."""
    if torch.compiler.is_compiling():  # dynamo does not support these checks
        return
    if tensor.layout != torch.strided:
        raise TypeError(
            f"expected {name} to be dense, got {tensor.layout}; {name}.to_dense() makes it so"
        )
    if tensor.is_quantized:
        raise TypeError(
            f"expected {name} of plain numbers, got {tensor.dtype}; {name}.dequantize() makes it so"
        )


def check_device(name: str, tensor: Tensor, device: torch.device, *, like: str) -> None:
    """Raise ValueError unless the tensor is on the device, that of the argument named `like`."""
    if tensor.device != device:
        raise ValueError(f"expected {name} on device {device} like {like}, got {tensor.device}")


def check_whole(name: str, tensor: object) -> None:
    """Raise TypeError unless the argument is a tensor of integers."""
    kind = getattr(tensor, "dtype", type(tensor).__name__)
    if not isinstance(tensor, Tensor) or tensor.dtype not in (
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    ):
        raise TypeError(f"expected {name} to be a tensor of whole numbers, got {kind}")
