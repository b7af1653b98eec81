"""Smooth curves through values that scatter by rounding, and the slopes of these curves.

Values are given at some hundred steps around x, as [steps, rows, cells]; a curve is fitted to the
sum over rows of each cell.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nnce.checks._numerical import most_certain

# Polynomials are fitted over intervals of up to `_LARGEST` times the size of x, halved repeatedly,
# with `_STEPS` values per octave on either side. Near a kink or a pole, all steps are multiplied by
# `_CLOSER`.
_LARGEST, _OCTAVES, _STEPS = 2.0, 12, 10
_CLOSER = 2.0**-9
_DEGREES = (7, 5)
# Index of the interval that is searched for kinks: a 16th of the size of x.
_SMALL = 5
# A polynomial needs at least this many values, an interval of this many units in the last place of
# x, and in each row this many changes between neighbors.
_LEAST, _UNITS, _CHANGES = 32, 64, 8
# A slope that is known to this fraction of the largest needs no closer steps.
_ENOUGH = 1e-2
_MOST_ALIKE = 0.98
# Curves over two intervals are consistent if they differ by at most this times the uncertainty.
_WIDE = 3


class Fit(NamedTuple):
    """Value and slope at step 0 of a smooth curve through values that scatter, by cell."""

    value: Tensor
    value_uncertainty: Tensor
    slope: Tensor
    slope_uncertainty: Tensor
    scatter: Tensor
    """The largest distance of a value from the curve."""
    typical: Tensor
    """The median distance."""


class _Design(NamedTuple):
    """Polynomials of one degree, evaluated at the steps within a radius."""

    powers: Tensor
    inverse: Tensor


def fit(values_at: Callable[[Tensor], Tensor], unit: float, device: torch.device) -> Fit:
    """Fit polynomials to values over shrinking intervals.

    Args:
        values_at: returns the values [steps, rows, cells] at the steps.
        unit: the lowest relative precision that values may have.
        device: the device of the steps.
    """
    steps = _steps_and_designs()[0].to(device)
    values = values_at(steps)
    found = _fit(values, unit)
    largest = found.slope.abs().nan_to_num(0.0, 0.0, 0.0).max()
    known = bool((found.slope_uncertainty <= _ENOUGH * largest).all())
    if known or _UNITS * unit > _CLOSER * _LARGEST:
        return found
    closer = _fit(values_at(_CLOSER * steps), unit, _CLOSER)
    better = closer.slope_uncertainty < found.slope_uncertainty
    return Fit(*(torch.where(better, c, f) for c, f in zip(closer, found, strict=True)))


def small_steps(device: torch.device) -> Tensor:
    """The steps at which `roughness` expects values."""
    steps, designs = _steps_and_designs()
    return steps[designs[_SMALL][1]].to(device)


def roughness(values: Tensor) -> Tensor:
    """The largest distance of values [steps, cells] near x from a polynomial: large at kinks."""
    powers, inverse = (t.to(values.device) for t in _steps_and_designs()[1][_SMALL][2][0])
    return (values - powers @ (inverse @ values)).abs().amax(0)


def _fit(values: Tensor, unit: float, scale: float = 1.0) -> Fit:
    """The most certain of the curves over intervals of several radii, times `scale`.

    The uncertainty of value and slope on each interval is estimated from the scatter of the values
    about the polynomials, and from the difference between polynomials of two degrees.
    """
    found: list[list[Tensor]] = []
    for radius, inside, designs in _steps_and_designs()[1]:
        reach = radius * scale
        if reach < _UNITS * unit:
            break
        chosen = values[inside.to(values.device)]
        high, low = (_polynomial(chosen, unit, design) for design in designs)
        off, off_slope = (2 * high[i + 1] + (high[i] - low[i]).abs() for i in (0, 2))
        found.append([high[0], off, high[2] / reach, off_slope / reach, *high[4:]])
    value, off_value, slope, off_slope, *scatter = (
        torch.stack(t) for t in zip(*found, strict=True)
    )

    def best(table: Tensor, off: Tensor, *others: Tensor) -> list[Tensor]:
        width, row = most_certain(table, _WIDE * off)
        picked = [t.gather(0, row.clamp(min=0).unsqueeze(0)).squeeze(0) for t in (table, *others)]
        return [*(torch.where(row >= 0, t, torch.nan) for t in picked), width / _WIDE]

    value, largest, typical, off = best(value, off_value, *scatter)
    slope, off_slope = best(slope, off_slope)
    return Fit(value, off, slope, off_slope, largest, typical)


def _polynomial(values: Tensor, unit: float, design: _Design) -> tuple[Tensor, ...]:
    """Value and slope at 0, each with its standard error; the largest and the median residual.

    Neighbors on the same step of a staircase have the same error and count as one value. If a row
    rarely changes, its uncertainty is its range, and that of its slope follows from it.
    """
    powers, inverse = (t.to(values.device) for t in design)
    total = values.sum(1)
    coefficients = inverse @ total
    off = total - powers @ coefficients
    squares = off.square().sum(0)
    alike = ((off[1:] * off[:-1]).sum(0) / squares).nan_to_num(0.0).clamp(0.0, _MOST_ALIKE)
    sigma = (squares / (len(off) - powers.shape[1]) * (1 + alike) / (1 - alike)).sqrt()
    few = (values[1:] != values[:-1]).sum(0) < _CHANGES
    sigma = torch.where(few.all(0), 0.0, sigma)
    span = values.amax(0) - values.amin(0)
    hidden = span + unit * values.abs().amax(0)
    off_value, off_slope = (torch.where(few, t, 0.0).sum(0) for t in (span, hidden))
    error, size = inverse.norm(dim=1), off.abs()
    return (
        coefficients[0],
        off_value + error[0] * sigma,
        coefficients[1],
        off_slope + error[1] * sigma,
        size.amax(0),
        size.median(0)[0],
    )


@functools.cache
def _steps_and_designs() -> tuple[Tensor, list[tuple[float, Tensor, list[_Design]]]]:
    """Sorted steps of all sizes and both signs; for each radius, the steps and polynomials."""
    generator = torch.Generator().manual_seed(0)
    number = _OCTAVES * _STEPS
    octave = torch.arange(number) + torch.rand(2, number, generator=generator, dtype=torch.float64)
    sizes = _LARGEST * 2.0 ** (-octave / _STEPS)
    steps = torch.cat([-sizes[0], sizes[1].flip(0)])
    designs = []
    for radius in (_LARGEST / 2**k for k in range(_OCTAVES)):
        inside = (steps.abs() <= radius).nonzero().flatten()
        powers = [(steps[inside, None] / radius) ** torch.arange(n + 1) for n in _DEGREES]
        if len(inside) >= _LEAST:
            designs.append((radius, inside, [_Design(p, torch.linalg.pinv(p)) for p in powers]))
    return steps, designs
