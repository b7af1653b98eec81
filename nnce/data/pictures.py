"""Pictures from files, brought to the form of a data set. Needs Pillow and NumPy.

A data set's form is what was done to its pictures before they became its inputs. A drawing becomes
like them if the same is done to it.
"""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nnce import _memory
from nnce.data.errors import DataError

# Larger pictures are reduced to this size first, in pixels.
_LARGEST = 1_000
# Of the largest distance from the background: less is a photograph's or JPEG's noise.
_NOISE = 0.15
# Strokes of MNIST's digits are some 0.11 of the longer side wide; others become it beyond these.
_THIN, _STROKE, _THICK = 0.085, 0.11, 0.16
# Pixels of ink in the 32x32 bitmaps behind scikit-learn's digits, of which each has about as many.
_INK = 312


def read(path: str | os.PathLike[str]) -> Any:
    """A picture of Pillow's from a PNG, JPEG or similar file: upright, 8 bits a channel.

    Raises:
        DataError: the file is not there, not a picture, damaged, or very large.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError(f"pictures need Pillow: pip install 'nnce[scripts]' ({error})") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file)
                if picture.mode.startswith("I"):  # 16 bits, which convert("L") would cut off
                    picture = picture.point(lambda value: value / 256).convert("L")
                picture.load()
                return picture.convert("RGB") if picture.mode == "CMYK" else picture
    except Exception as error:  # of any type: the content of a damaged file is arbitrary
        if _memory.shortage(error):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"expected a picture (PNG or JPEG) in {path}: {reason}") from error


def gray(picture: Any) -> Tensor:
    """Brightness of each pixel, [height, width], bytes from 0 for black."""
    import numpy as np

    return torch.from_numpy(np.array(picture.convert("L")))


def inputs(
    path: str | os.PathLike[str], data: str, image: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The inputs of a network for a picture from a file, [height · width], in [0, 1].

    For "digits" and "mnist" that is a drawing of any size, light on dark or dark on light, in any
    colors, which is brought to the form of the data set; for "fashion-mnist" and "kmnist" it is
    cut out and centered. For data of one's own the picture is as bright as it is, and scaled.

    Args:
        path: the file.
        data: the name of the data set that the network was trained on.
        image: height and width of the data set's pictures.
        dtype: of the result.

    Raises:
        DataError: the file is not a picture, or there is nothing in it.
    """
    picture = read(path)
    if data not in _FORMS:
        return _scaled(gray(picture).float() / 255, *image).to(dtype).flatten()
    picture.thumbnail((_LARGEST, _LARGEST))
    ink = _ink(picture)
    if ink is None:
        raise DataError(f"expected a drawing in {path}, got a picture of one color")
    return _FORMS[data](_cropped(ink)).clamp(0, 1).to(dtype).flatten()


def _ink(picture: Any) -> Tensor | None:
    """How far each pixel's color is from the background's: 1 where farthest; None if nowhere."""
    import numpy as np

    channels = torch.from_numpy(np.array(picture.convert("RGBA"))).float() / 255
    color, alpha = channels[..., :3], channels[..., 3:]
    # Nothing behind a drawing is white, or if the drawing is light, black.
    is_light = (color * alpha).mean() > 0.5 * alpha.mean()
    color = color * alpha + (1 - alpha) * (0.0 if is_light else 1.0)
    border = torch.cat((color[0], color[-1], color[:, 0], color[:, -1]))
    distance = (color - border.median(0).values).abs().amax(-1)
    largest = float(distance.max())
    if largest < 0.1:
        return None
    return ((distance / largest - _NOISE) / (1 - _NOISE)).clamp_min(0)


def _cropped(ink: Tensor) -> Tensor:
    """Crop to the smallest rectangle around the drawing."""
    drawn = ink > 0.2
    rows, columns = (drawn.any(axis).nonzero() for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _scaled(ink: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(ink[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]


def _fitted(ink: Tensor, side: int) -> Tensor:
    """Scaled, its proportions kept, so that its longer side is this long."""
    longest = max(ink.shape)
    height, width = (max(1, round(size * side / longest)) for size in ink.shape)
    return _scaled(ink, height, width)


def _placed(ink: Tensor, side: int, row: int, column: int) -> Tensor:
    """On an empty square, with its upper left corner there."""
    height, width = ink.shape
    return F.pad(ink, (column, side - width - column, row, side - height - row))


def _like_mnist(ink: Tensor) -> Tensor:
    """In a box of 20x20, on 28x28 with the center of mass in the middle, strokes as wide."""
    ink = _fitted(_with_stroke(_fitted(ink, 200)), 20)
    ink = ink / ink.max()
    place = []
    for axis in (0, 1):
        size, mass = ink.shape[axis], ink.sum(1 - axis)
        center = float((mass * torch.arange(size)).sum() / mass.sum())
        place.append(min(max(round(14 - center), 0), 28 - size))
    return _placed(ink, 28, *place)


def _with_stroke(ink: Tensor) -> Tensor:
    """Strokes that are thin or thick become as wide as MNIST's are on average."""
    drawn = (ink > 0.5).float()
    inner = -F.max_pool2d(-F.pad(drawn, (1, 1, 1, 1))[None], 3, 1)[0]  # without its outline
    width = 2 * drawn.sum() / (drawn - inner).sum().clamp_min(1) / max(ink.shape)
    if _THIN <= width <= _THICK:
        return ink
    more = round(float(_STROKE - width) * max(ink.shape) / 2)
    reach = abs(more)
    padded = F.pad(ink, [2 * reach] * 4)[None]
    pooled = F.max_pool2d(padded.mul((more > 0) * 2 - 1), 2 * reach + 1, 1)[0].abs()
    return _cropped(pooled) if (pooled > 0.2).any() else ink


def _like_digits(ink: Tensor) -> Tensor:
    """Stretched to 20x32 in a bitmap of 32x32 with about as much ink; its 4x4 blocks counted."""
    height, width = ink.shape
    # A narrow drawing, most often a 1, keeps its proportions.
    stretched = 20 if width > 0.35 * height else max(1, round(32 * width / height))
    bitmap = _placed(_scaled(ink, 32, stretched), 32, 0, (32 - stretched) // 2)[None]
    for _ in range(2):  # the blacker its surroundings, the sooner a pixel is ink
        bitmap = bitmap + 0.5 * F.avg_pool2d(bitmap, 5, 1, 2, count_include_pad=False)
    chosen = torch.zeros(32 * 32)
    chosen[bitmap.flatten().topk(_INK).indices] = 1
    return F.avg_pool2d(chosen.view(1, 32, 32), 4)[0]


def _framed(ink: Tensor) -> Tensor:
    """As large as fits on 28x28, in the middle."""
    ink = _fitted(ink, 28)
    row, column = ((28 - size) // 2 for size in ink.shape)
    return _placed(ink, 28, row, column)


_FORMS = {
    "digits": _like_digits,
    "mnist": _like_mnist,
    "fashion-mnist": _framed,
    "kmnist": _framed,
}
