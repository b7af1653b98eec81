"""Read pictures from files and preprocess them like a data set. Needs Pillow and NumPy.

A network recognizes a drawing only if it was preprocessed like the training images: cropped,
scaled, centered, and with strokes of the same width.
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

# Larger pictures are first reduced to this width and height, in pixels.
_LARGEST = 1_000
# Share of the largest distance from the background below which a pixel is noise (photos, JPEG).
_NOISE = 0.15
# Stroke widths as a share of the longer side. MNIST's are about _STROKE; strokes thinner than _THIN
# or thicker than _THICK are adjusted to it.
_THIN, _STROKE, _THICK = 0.085, 0.11, 0.16
# Approximate number of ink pixels in each of the 32x32 bitmaps behind scikit-learn's digits.
_INK = 312


def read(path: str | os.PathLike[str]) -> Any:
    """Read a PNG, JPEG or similar file as a Pillow image, upright, with 8 bits per channel.

    Raises:
        DataError: the file is missing, damaged, not a picture, or very large.
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
                if picture.mode.startswith("I"):  # 16 bits, which convert("L") would clip
                    picture = picture.point(lambda value: value / 256).convert("L")
                picture.load()
                return picture.convert("RGB") if picture.mode == "CMYK" else picture
    except Exception as error:  # of any type: the content of a damaged file is arbitrary
        if _memory.shortage(error):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"expected a picture (PNG or JPEG) in {path}: {reason}") from error


def gray(picture: Any) -> Tensor:
    """Brightness of each pixel, [height, width], from 0 for black to 255 for white."""
    import numpy as np

    return torch.from_numpy(np.array(picture.convert("L")))


def inputs(
    path: str | os.PathLike[str], data: str, image: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Convert a picture file to inputs of a network, [height · width], in [0, 1].

    For "digits" and "mnist", a drawing of any size and colors, light on dark or dark on light, is
    preprocessed like the data set. For "fashion-mnist" and "kmnist", it is cropped and centered.
    For your own data, the picture is only converted to gray and resized.

    Args:
        path: the file to read.
        data: name of the data set that the network was trained on.
        image: height and width of the data set's images.
        dtype: dtype of the result.

    Raises:
        DataError: the file is not a picture or, except for your own data, has only one color.
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
    """Distance of each pixel's color from the background, at most 1; None for a single color."""
    import numpy as np

    channels = torch.from_numpy(np.array(picture.convert("RGBA"))).float() / 255
    color, alpha = channels[..., :3], channels[..., 3:]
    # A transparent background counts as white, or as black behind a light drawing.
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
    """Scale proportionally to this length of the longer side."""
    longest = max(ink.shape)
    height, width = (max(1, round(size * side / longest)) for size in ink.shape)
    return _scaled(ink, height, width)


def _placed(ink: Tensor, side: int, row: int, column: int) -> Tensor:
    """Place on an empty square, with the upper left corner at (row, column)."""
    height, width = ink.shape
    return F.pad(ink, (column, side - width - column, row, side - height - row))


def _like_mnist(ink: Tensor) -> Tensor:
    """Preprocess like MNIST: strokes of average width, fitted to 20x20, mass centered on 28x28."""
    ink = _fitted(_with_stroke(_fitted(ink, 200)), 20)
    ink = ink / ink.max()
    place = []
    for axis in (0, 1):
        size, mass = ink.shape[axis], ink.sum(1 - axis)
        center = float((mass * torch.arange(size)).sum() / mass.sum())
        place.append(min(max(round(14 - center), 0), 28 - size))
    return _placed(ink, 28, *place)


def _with_stroke(ink: Tensor) -> Tensor:
    """Adjust thin or thick strokes to the average width of MNIST's."""
    drawn = (ink > 0.5).float()
    inner = -F.max_pool2d(-F.pad(drawn, (1, 1, 1, 1))[None], 3, 1)[0]  # without the outline
    width = 2 * drawn.sum() / (drawn - inner).sum().clamp_min(1) / max(ink.shape)
    if _THIN <= width <= _THICK:
        return ink
    more = round(float(_STROKE - width) * max(ink.shape) / 2)
    reach = abs(more)
    padded = F.pad(ink, [2 * reach] * 4)[None]
    pooled = F.max_pool2d(padded.mul((more > 0) * 2 - 1), 2 * reach + 1, 1)[0].abs()
    return _cropped(pooled) if (pooled > 0.2).any() else ink


def _like_digits(ink: Tensor) -> Tensor:
    """Preprocess like scikit-learn's digits: ink counts of 4x4 blocks of a 32x32 bitmap."""
    height, width = ink.shape
    # A narrow drawing, usually a 1, keeps its proportions; others are stretched to 20x32.
    stretched = 20 if width > 0.35 * height else max(1, round(32 * width / height))
    bitmap = _placed(_scaled(ink, 32, stretched), 32, 0, (32 - stretched) // 2)[None]
    for _ in range(2):  # favor pixels whose neighborhood is dark
        bitmap = bitmap + 0.5 * F.avg_pool2d(bitmap, 5, 1, 2, count_include_pad=False)
    chosen = torch.zeros(32 * 32)
    chosen[bitmap.flatten().topk(_INK).indices] = 1
    return F.avg_pool2d(chosen.view(1, 32, 32), 4)[0]


def _framed(ink: Tensor) -> Tensor:
    """Scale to fit 28x28 and center."""
    ink = _fitted(ink, 28)
    row, column = ((28 - size) // 2 for size in ink.shape)
    return _placed(ink, 28, row, column)


_FORMS = {
    "digits": _like_digits,
    "mnist": _like_mnist,
    "fashion-mnist": _framed,
    "kmnist": _framed,
}
