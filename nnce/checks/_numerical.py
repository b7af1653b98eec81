"""Numerical derivatives, and how many of their digits are known.

Differences are computed over a ladder of steps, each a quarter of the previous one, for several
*cells* at once: a cell is a number to be differentiated, such as one element of the output.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
# Values are assumed accurate to this many units in the last place; larger errors show as scatter.
VALUE_ULPS = 8
# Values may change in jumps of up to this fraction, as when a function computes in float32.
COARSEST_JUMP = 2.0**-7
# A derivative that is this small next to the slope at a 64th of the size of x is 0: 2^16 units in
# the last place of that slope, extrapolated to the size of x.
NOTHING = 2.0**22 * EPS
# At the larger of two small steps a slope may differ by `_CURVED` times rtol; at the smaller one
# rounding must leave three digits.
_CURVED, _DIGITS = 4096, 1e-3
# Indices of the steps of a 64th and a quarter of the size of x, in a ladder that starts at 64 times
# the size of x; and the largest power of the distance with which slopes may shrink in between.
_NEAR, _FAR = 6, 4
_STEEPEST_POWER = 6


class Ladder(NamedTuple):
    """Differences over shrinking steps, largest first; all [steps, cells] except `step`."""

    step: Tensor
    """[steps, 1]."""
    rise_up: Tensor
    """f(x + step) − f(x)."""
    rise_down: Tensor
    """f(x) − f(x − step)."""
    up: Tensor
    """The step taken upwards, after rounding."""
    down: Tensor
    """The step taken downwards, after rounding."""
    size: Tensor
    """The magnitude of f, where it changes."""

    @property
    def taken(self) -> Tensor:
        """Where the step is not rounded to 0."""
        return (self.up > 0) & (self.down > 0)


class Slopes(NamedTuple):
    """Numerical derivatives, one per cell."""

    derivative: Tensor
    uncertainty: Tensor
    below: Tensor
    """The derivative from below."""
    above: Tensor
    """The derivative from above."""
    kinked: Tensor
    """Where `below` and `above` differ however small the step."""
    zero: Tensor
    """Derivatives up to this size are 0 to within rounding; −1 if the values do not show it."""
    nothing: Tensor
    """An uncertainty up to this size is negligible compared with nearby slopes, if those shrink
    toward x as a power of the distance; in saturation they shrink exponentially."""
    nearby: Tensor
    """The larger one-sided slope at a quarter of the size of x."""
    even: Tensor
    """Whether the one-sided slopes there have about the same size; in saturation one is smaller."""


class _Estimates(NamedTuple):
    """Richardson extrapolation from pairs of successive steps, [steps − 1, cells]."""

    slope: Tensor
    kink: Tensor
    """The difference of the one-sided slopes; for a smooth function it shrinks with the third power
    of the step."""


def quick(ladder: Ladder, computed: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    """Where two small steps show that a computed derivative is right, and the numerical derivative.

    The slope must agree with the derivative to rtol at the smaller step, and to within the possible
    curvature at the larger one; or to rtol at the larger step, and to within rounding at the
    smaller one. The slopes from below and above must also converge from one step to the other.
    """
    slope, bend = _slope_and_bend(ladder)
    bound = rtol * computed.abs()
    noise = (VALUE_ULPS * EPS * ladder.size + torch.finfo(torch.float64).tiny) / ladder.step
    off = (slope - computed).abs()
    small = (off[0] <= _CURVED * bound) & (off[1] <= bound) & (noise[1] <= bound / 4)
    large = (off[0] <= bound) & (noise[0] <= bound / 4) & (off[1] <= bound + noise[1])
    agrees = small | (large & (noise[1] <= _DIGITS * computed.abs()))
    smooth = bend[1].abs() <= bend[0].abs() / 8 + 8 * noise[1]
    ratio = float(ladder.step[0] / ladder.step[1]) ** 2
    return computed.isfinite() & agrees & smooth, (ratio * slope[1] - slope[0]) / (ratio - 1)


def slopes(ladder: Ladder, rtol: float, unit: float = EPS) -> Slopes:
    """Derivatives from a ladder of differences, cell by cell.

    The uncertainty of an estimate is computed from the next two estimates, the scatter of estimates
    at still smaller steps, and the rounding of the values. Starting from the smallest step, as long
    as the estimates are consistent, the most certain one is chosen: a derivative is a limit at
    small steps, and large steps may reach beyond a kink or a pole.

    Args:
        ladder: the differences.
        rtol: how much the derivatives from below and above may differ.
        unit: the relative precision of the values.
    """
    estimates = _richardson(ladder)
    noise = _noise(ladder, estimates.slope, unit)
    gaps = _gaps(estimates.slope)
    uncertainty = torch.maximum(gaps[:-1], _gaps(estimates.slope, 2)) + noise
    best, row = most_certain(estimates.slope, uncertainty)
    known = row >= 0

    def at_best(table: Tensor) -> Tensor:
        return table.gather(0, row.clamp(min=0).unsqueeze(0)).squeeze(0)

    down, up = _one_sided(ladder)
    below, above = at_best(down[1:]), at_best(up[1:])
    smaller, larger = torch.stack([down[_FAR].abs(), up[_FAR].abs()]).aminmax(dim=0)
    steep = torch.maximum(above.abs(), below.abs())
    nothing = _nothing(ladder)
    return Slopes(
        derivative=torch.where(known, at_best(estimates.slope), math.nan),
        uncertainty=best,
        below=below,
        above=above,
        kinked=known & _kinked(estimates.kink, noise, row, rtol * steep),
        zero=torch.where(known, _zero(ladder, at_best(estimates.slope), best, nothing, unit), -1.0),
        nothing=nothing,
        nearby=larger.nan_to_num(0.0, 0.0, 0.0),
        even=2 * smaller >= larger,
    )


def _slope_and_bend(ladder: Ladder) -> tuple[Tensor, Tensor]:
    """The mean of the one-sided slopes at each step, and their difference."""
    slope = (ladder.rise_up + ladder.rise_down) / (ladder.up + ladder.down)
    down, up = _one_sided(ladder)
    bend = up - down
    nothing = torch.full_like(slope, math.nan)
    return torch.where(ladder.taken, slope, nothing), torch.where(ladder.taken, bend, nothing)


def _richardson(ladder: Ladder) -> _Estimates:
    slope, bend = _slope_and_bend(ladder)
    return _Estimates((16 * slope[1:] - slope[:-1]) / 15, (4 * bend[1:] - bend[:-1]).abs() / 3)


def _gaps(estimate: Tensor, distance: int = 1) -> Tensor:
    """The distance of each estimate from a later one."""
    return (estimate[:-distance] - estimate[distance:]).abs()


def _rounding(ladder: Ladder, unit: float) -> Tensor:
    """The slope error at each step from rounding, or from the smallest jump of a staircase."""
    jumps = torch.stack([ladder.rise_up.abs(), ladder.rise_down.abs()])
    jump = torch.where(jumps > 0, jumps, math.inf).amin((0, 1))
    jump = torch.minimum(jump, COARSEST_JUMP * ladder.size.nan_to_num(nan=math.inf).amin(0))
    tiny = torch.finfo(torch.float64).tiny
    # Lower precision has fewer digits to spare, except at the shortest steps.
    ulps = VALUE_ULPS if unit == EPS else 1 + 2 * math.sqrt(unit) / ladder.step
    return (ulps * unit * ladder.size + 4 * jump + tiny) / ladder.step


def _noise(ladder: Ladder, estimate: Tensor, unit: float) -> Tensor:
    """The noise in an estimate, inferred from smaller steps; it grows as 1 / step."""
    step = ladder.step[1:]
    seen = (_gaps(estimate) * step[:-1]).nan_to_num(0.0, 0.0, 0.0)
    largest_below = seen.flip(0).cummax(0).values.flip(0)
    return largest_below[1:] / step[:-2] + _rounding(ladder, unit)[1:-2]


def most_certain(estimate: Tensor, uncertainty: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest uncertainty of consistent estimates, from the smallest step; and its row."""
    low = torch.full_like(estimate[0], -math.inf)
    high, best = -low, -low
    best_row = torch.full_like(low, -1, dtype=torch.long)
    fits, begun = (torch.full_like(low, value, dtype=torch.bool) for value in (True, False))
    for row in range(len(uncertainty) - 1, -1, -1):
        middle, width = estimate[row], uncertainty[row]
        seen = middle.isfinite() & width.isfinite()
        # The smallest steps may be rounded to 0.
        fits &= torch.where(seen, (middle + width >= low) & (middle - width <= high), ~begun)
        begun |= seen
        low = torch.where(fits & seen, torch.maximum(low, middle - width), low)
        high = torch.where(fits & seen, torch.minimum(high, middle + width), high)
        better = fits & seen & (width < best)
        best = torch.where(better, width, best)
        best_row = torch.where(better, row, best_row)
    return best, best_row


def _kinked(kink: Tensor, noise: Tensor, best_row: Tensor, bound: Tensor) -> Tensor:
    """Whether the one-sided slopes differ by the same amount at every noise-free step."""
    kink = kink[: len(noise)]
    rows = torch.arange(len(noise), device=kink.device).unsqueeze(1)
    telling = (rows >= best_row) & (16 * noise <= bound)
    least = torch.where(telling, kink, math.inf).amin(0)
    most = torch.where(telling, kink, 0.0).amax(0)
    return (telling.sum(0) > 1) & (least > bound) & (least >= most / 2)


def _one_sided(ladder: Ladder) -> tuple[Tensor, Tensor]:
    """The slopes from below and above at each step."""
    return ladder.rise_down / ladder.down, ladder.rise_up / ladder.up


def _steepness(ladder: Ladder) -> Tensor:
    """The larger one-sided slope at each step."""
    down, up = _one_sided(ladder)
    return torch.maximum(up.abs(), down.abs())


def _nothing(ladder: Ladder) -> Tensor:
    """The size negligible compared with nearby slopes; 0 if they may be due to saturation."""
    steep = _steepness(ladder)
    near, far = steep[_NEAR], steep[_FAR]
    distance = float(ladder.step[_FAR] / ladder.step[_NEAR])
    as_a_power = (near > 0) & (far <= distance**_STEEPEST_POWER * near)
    return torch.where(as_a_power, NOTHING * near, 0.0).nan_to_num(0.0, 0.0, 0.0)


def _zero(
    ladder: Ladder, estimate: Tensor, uncertainty: Tensor, nothing: Tensor, unit: float
) -> Tensor:
    """The size up to which a derivative is 0 to within rounding; −1 if it is not shown to be 0.

    Either f(x + h) − f(x − h) is 0 at every step, or the derivative is negligible compared with
    nearby slopes.
    """
    rise = ladder.rise_up + ladder.rise_down
    even = (rise.abs() <= VALUE_ULPS * unit * ladder.size) | ~ladder.taken
    moves = (ladder.size > 0).any(0) & ladder.taken.any(0)
    is_zero = (even.all(0) & moves) | ((nothing > 0) & (estimate.abs() + uncertainty <= nothing))
    size = NOTHING * _steepness(ladder)[_NEAR].nan_to_num(0.0, 0.0, 0.0)
    return torch.where(is_zero, size, -1.0)
