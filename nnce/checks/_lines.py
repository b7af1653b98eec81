"""A function along one direction through its inputs: differences, and plateaus.

The values of a function are grouped in *cells*. With one cell, all weighted values are summed; with
one cell per element, that many derivatives are probed at once.
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nnce.checks._curves import Fit, fit
from nnce.checks._derivatives import Broken
from nnce.checks._numerical import COARSEST_JUMP, EPS, Ladder, Slopes, quick, slopes

# Steps to search for the end of a plateau, from a small fraction to many times the size of x.
_GRID = tuple(4.0**k for k in range(-8, 4))
# Values that do not change at these steps up and down are constant.
_SPARSE_GRID = {1.0: (61.7, 2.0**-9), -1.0: (61.7, 4.3)}
# An edge is located to within `_EDGE` times x; the other two are distances beyond it.
_EDGE, _BEYOND, _FAR_BEYOND = 2.0**-32, 2.0**-20, 2.0**-14
# Near x = 0 they are relative to this instead.
_LEAST = 2.0**-10
# At an edge that is not a jump, a value has changed by at most `_FEW` units in its last place. A
# little beyond an edge that fades out, it has changed by fewer than `_MANY`.
_FEW, _MANY = 4.0, 16.0
# This many units of x beyond its first step, a staircase has moved more than twice as far.
_SOME = 4.0
# Units of float32 are smaller, and those of half precision larger.
_SINGLE = 2.0**-16
# Beyond a kink a value changes by this many times as much as at it; on a staircase by fewer.
_STEEP = 512.0


class _Edge(NamedTuple):
    """Thresholds that distinguish a plateau ending in a kink from one that fades out."""

    share: float
    """An edge is located to within this fraction of x."""
    beyond: float
    """The distance to probe beyond the edge, as a fraction of x."""
    many: float
    """Units by which values have changed at that distance beyond a kink."""
    steep: float
    """See `_STEEP`."""


def _edge_in(unit: float) -> _Edge:
    """The thresholds for a precision; half precision has only 32 units in a quarter of x."""
    if unit == EPS:
        return _Edge(_EDGE, _BEYOND, _MANY, _STEEP)
    if unit < _SINGLE:
        return _Edge(16 * unit, 2.0**17 * unit, _MANY, _STEEP)
    return _Edge(unit, 32 * unit, 8.0, 8.0)


# Values scatter by up to this many units in their last place because of rounding.
_SCATTER = 64.0
# Values below the smallest normal float32 number count as faded to 0.
_TINY = torch.finfo(torch.float32).tiny
_MOST_HALVINGS = 80


class Direction(NamedTuple):
    """A direction to probe along."""

    v: Tensor
    """Scaled to the magnitude of x, so that a step of 1 is as large as x."""
    elements: Tensor | None
    """The elements of x that it moves, one per cell; None for all elements."""
    apart: bool = False
    """Whether elements are moved one at a time; a cell then holds all values after one move."""


class Precision(NamedTuple):
    """The relative precision of values, computed on demand as it takes several calls."""

    unit: Callable[[], float]
    """The precision of the values at and near x."""
    coarsest: Callable[[], float]
    """The lowest precision of the values anywhere."""


class Plateau(NamedTuple):
    """Whether values are constant around x, by cell."""

    flat: Tensor
    """Whether they are constant, and the plateau ends in a kink or a jump, or not at all."""
    fades: Tensor
    """Whether they are constant, and then change by a unit in the last place: saturation."""


class Line:
    """Values along a direction from x; `center` is the value at x. NaN outside the domain."""

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        x: Tensor,
        direction: Direction,
        weights: Tensor,
        cells: int,
        center: Tensor,
        precision: Precision,
    ) -> None:
        self.precision = precision
        self._f, self._x, self.direction = f, x, direction
        self._quick: Ladder | None = None
        self._slopes: Slopes | None = None
        self._fit: Fit | None = None
        self._plateau: Plateau | None = None
        # [rows, cells], or [rows, 1] if all cells share the values.
        self._weights = weights.reshape(-1, cells)
        self._center = center.reshape(-1, cells)
        self._cells = len(self._elements) if direction.apart else cells
        self.magnitude = (self._weights * self._center).abs().sum(0).expand(self._cells)
        """The summed magnitude of the weighted values in each cell."""

    @property
    def _elements(self) -> Tensor:
        assert self.direction.elements is not None
        return self.direction.elements

    def of(self, cells: Tensor) -> "Line":
        """The line for some of the elements that are moved separately."""
        v, elements = self.direction.v, self._elements[cells]
        part = copy.copy(self)
        only = torch.zeros_like(v).index_copy(0, elements, v[elements])
        part.direction, part._cells = Direction(only, elements, apart=True), len(elements)
        part.magnitude = self.magnitude[cells]
        part._slopes = part._plateau = part._fit = None
        if self._quick is not None:
            part._quick = Ladder(self._quick.step, *(table[:, cells] for table in self._quick[1:]))
        return part

    def _at(self, step: Tensor) -> Tensor:
        """The values [rows, cells] after one step, or after one step per cell."""
        v, elements, apart = self.direction
        if apart:
            return self._one_by_one(self._stepped(step).expand(self._cells))
        if elements is None or not step.dim():
            return self._values_at(self._x + step * v)
        return self._values_at(self._x.index_add(0, elements, step * v[elements]))

    def _stepped(self, step: Tensor) -> Tensor:
        """The moved elements after a step."""
        return self._x[self._elements] + step * self.direction.v[self._elements]

    def _one_by_one(self, stepped: Tensor) -> Tensor:
        moves = zip(self._elements.split(1), stepped.split(1), strict=True)
        values = [self._values_at(self._x.index_copy(0, place, moved)) for place, moved in moves]
        return torch.cat(values, dim=1)

    def _values_at(self, x: Tensor) -> Tensor:
        try:
            return self._f(x).reshape(self._weights.shape)
        except (TypeError, ValueError, Broken):  # outside the function's domain
            return torch.full_like(self._weights, math.nan)

    def ladder(self, steps: Tensor, *, whole: bool) -> Ladder:
        """Differences over these steps.

        Args:
            steps: step sizes, largest first.
            whole: whether values that do not change at any larger step add to the rounding error.
        """
        weights, center = self._weights, self._center
        # [steps, rows, cells]
        plus, minus = (torch.stack([self._at(step) for step in side]) for side in (steps, -steps))
        size = weights.abs() * torch.maximum(torch.maximum(plus.abs(), minus.abs()), center.abs())
        if not whole:
            moves = ((plus != center) | (minus != center)).cummax(0).values
            size = torch.where(moves.any(1, keepdim=True), size * moves, size)
        column = steps.unsqueeze(1)
        return Ladder(
            step=column,
            rise_up=(weights * (plus - center)).sum(1),
            rise_down=(weights * (center - minus)).sum(1),
            up=self._taken(column),
            down=self._taken(-column),
            size=size.sum(1),
        )

    def _taken(self, steps: Tensor) -> Tensor:
        """The actual length of steps [steps, 1] after rounding: [steps, cells], positive."""
        v, elements, _ = self.direction
        if elements is None:
            return steps.abs().expand(len(steps), self._cells)
        return ((self._stepped(steps) - self._x[elements]) / v[elements]).abs()

    def quick(self, steps: Tensor, computed: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
        """Where a few small steps show that a derivative is right, and the numerical derivative."""
        if self._quick is None:
            self._quick = self.ladder(steps, whole=True)
        return quick(self._quick, computed, rtol)

    def slopes(self, steps: Tensor, rtol: float) -> Slopes:
        """Numerical derivatives from many steps."""
        if self._slopes is None:
            unit = self.precision.unit()
            self._slopes = slopes(self.ladder(steps, whole=False), rtol, unit)
            if unit > EPS:
                fit = self.fit()
                self._slopes = self._slopes._replace(
                    derivative=fit.slope, uncertainty=fit.slope_uncertainty
                )
        return self._slopes

    def fit(self) -> Fit:
        """Value and slope of values that scatter by rounding."""
        if self._fit is None:
            one_by_one = self.direction.apart and len(self._weights) > 1
            cells = torch.arange(self._cells).split(1) if one_by_one else []  # less memory
            fits = [self.of(cell)._fitted() for cell in cells] or [self._fitted()]
            self._fit = Fit(*(torch.cat(each) for each in zip(*fits, strict=True)))
        return self._fit

    def _fitted(self) -> Fit:
        """`fit`, without the rows that do not depend on what is moved."""
        ends = [self._at(self._x.new_tensor(side * _GRID[-1])) for side in (1.0, -1.0)]
        depends = torch.stack([end != self._center for end in ends]).any(0)

        def values(steps: Tensor) -> Tensor:
            found = torch.stack([self._at(step) for step in steps])
            moves = depends | (found != self._center).any(0)
            return torch.where(moves, self._weights * found, 0.0)

        return fit(values, self.precision.coarsest(), self._x.device)

    def plateau(self) -> Plateau:
        """Whether the values are constant around x, and how the plateau ends.

        The nearest step at which a value changes is found by bisection on both sides of x. A hard
        function has a kink or a jump there: a little further on its value has changed by very many
        units in the last place. A saturated function has changed by one unit. A jump of less than
        2⁻⁷ of the value may be a staircase, as when a function computes in a lower precision.
        """
        if self._plateau is None:
            self._plateau = self._ends(exact=True)
            flat, fades = self._plateau
            if not flat.all():
                # Values that scatter by a unit seem to fade out.
                scattered = self._ends(exact=False)
                fades = (fades & ~scattered.flat) | (scattered.fades & ~flat)
                self._plateau = Plateau((flat | scattered.flat) & ~fades, fades)
        return self._plateau

    def independent(self) -> bool:
        """Whether no value depends on any of the separately moved elements.

        Each element is moved to both ends of the grid; then all are moved together, far and near.
        """
        center = self._center
        ends = self._x.new_tensor([_GRID[-1], -_GRID[-1]])
        if not all((self._at(end) == center).all() for end in ends):
            return False
        numbers = torch.arange(len(self._x), dtype=self._x.dtype, device=self._x.device)
        for k, size in enumerate(_GRID):
            share = (-1) ** k * size * torch.sin(1.0 + k + 2.4 * numbers)
            if not (self._values_at(self._x + share * self.direction.v) == center).all():
                return False
        return True

    def _ends(self, exact: bool) -> Plateau:
        """The plateau of exactly constant values, or of values that scatter by rounding."""
        up, up_fades = self._end(1.0, exact)
        if not (up | up_fades).any():
            return Plateau(up, up_fades)
        down, down_fades = self._end(-1.0, exact)
        return Plateau(up & down, up_fades | down_fades)

    def _end(self, side: float, exact: bool) -> tuple[Tensor, Tensor]:
        """Where a plateau on one side of x ends hard or never, and where it fades out."""
        inside = torch.zeros(self._cells, dtype=self._x.dtype, device=self._x.device)
        outside = torch.full_like(inside, math.nan)
        steps = [inside.new_tensor(side * size) for size in _SPARSE_GRID[side]]
        endless = ~torch.stack([self._moves(step, exact) for step in steps]).any(0)
        # Along all elements at once, only plateaus without an end count.
        if endless.all() or self.direction.elements is None:
            return endless, torch.zeros_like(endless)
        for size in _GRID:
            step = inside.new_tensor(side * size)
            moved = self._moves(step, exact)
            outside = torch.where(outside.isnan() & moved, step, outside)
            inside = torch.where(outside.isnan(), step, inside)
            if not outside.isnan().any() or not inside.any():
                break
        endless = (inside != 0) & outside.isnan()
        ends = (inside != 0) & ~endless
        if not ends.any():
            return endless, torch.zeros_like(endless)
        hard, fades = self._edge(inside * ends, torch.where(ends, outside, 0.0), exact)
        return endless | (ends & hard), ends & fades

    def _edge(self, inside: Tensor, outside: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
        """Whether the edge between two steps is a kink or a jump, and whether it fades out."""
        unit = self.precision.coarsest()
        share, beyond, many, steep = _edge_in(unit)
        outside = self._bisect(inside, outside, share, exact)
        past = outside + outside.sign() * beyond * self._scale(outside)
        moved, further = (self._amount(step, exact) * EPS / unit for step in (outside, past))
        relative = unit if exact else _SCATTER * unit
        continuous = moved <= _FEW
        kink = further >= torch.where(continuous, many, steep * moved)
        # The steps of a staircase are equally long.
        if unit > EPS:
            kink &= further >= steep * torch.clamp(past / outside - 1, min=1.0)
        else:  # where two parabolas meet, values change slowly at first
            past = outside + outside.sign() * _FAR_BEYOND * self._scale(outside)
            far = self._amount(past, exact)
            kink |= continuous & (far >= _MANY + _STEEP * (past / outside - 1))
        jump = ~continuous & (moved * relative >= COARSEST_JUMP)
        if unit > EPS:  # not a step of a staircase, as produced by rounding x
            past = outside + outside.sign() * _SOME * unit * self._scale(outside)
            jump &= self._amount(past, exact) * EPS / unit < 2 * moved
        return kink | jump, continuous & (further < many) & ~kink

    def _bisect(self, inside: Tensor, outside: Tensor, edge: float, exact: bool) -> Tensor:
        """The first step at which a value changes, to within a fraction of x."""
        for _ in range(_MOST_HALVINGS):
            if not ((outside - inside).abs() > edge * self._scale(outside)).any():
                break
            middle = (inside + outside) / 2
            moved = self._moves(middle, exact)
            inside, outside = (
                torch.where(moved, inside, middle),
                torch.where(moved, middle, outside),
            )
        return outside

    def _scale(self, step: Tensor) -> Tensor:
        """The magnitude of the moved element of x after a step, in units of steps."""
        v = self.direction.v[self._elements]
        return self._stepped(step).abs().clamp(min=_LEAST) / v

    def _moves(self, step: Tensor, exact: bool) -> Tensor:
        """Where values at a step differ from those at x."""
        if exact:
            return (self._at(step) != self._center).any(0)
        return ~(self._amount(step, exact) <= 1.0)

    def _amount(self, step: Tensor, exact: bool) -> Tensor:
        """The distance between values at a step and at x, in units; NaN outside the domain."""
        values, center = self._at(step), self._center
        size = torch.maximum(values.abs(), center.abs())
        unit = EPS * size if exact else (_SCATTER * EPS * size.amax(0)).expand(size.shape)
        amount = (values - center).abs() / unit.clamp(min=_TINY)
        return torch.where(values == center, 0.0, amount).amax(0)
