"""Derivatives checked by differences, where there is no reference."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nnce.checks._curves import roughness, small_steps
from nnce.checks._derivatives import Derivatives
from nnce.checks._draw import Draw
from nnce.checks._evidence import REORDERED, ROUNDING, Evidence, Own, independent, judge, judge_one
from nnce.checks._lines import Direction, Line, Precision
from nnce.checks._numerical import EPS
from nnce.checks._report import Finding, Report, or_unsupported, or_wrong
from nnce.checks._resolution import Resolution
from nnce.checks._subject import alike, equal

# Number of directions through all elements, tried if not every element is probed.
_DENSE_DIRECTIONS = 4
# Values that deviate from a smooth curve by this fraction of a unit are in low precision.
_LEAST_SCATTER = 2.0**-6


class ByDifferences:
    """Checks by differences: all elements at once if elementwise, else `count` elements."""

    def __init__(
        self,
        ours: Derivatives,
        value: Tensor,
        first: Tensor,
        upstream: Tensor,
        draw: Draw,
        count: int,
        rtol: float,
    ) -> None:
        self.ours, self.value, self.first, self.upstream = ours, value, first, upstream
        self.draw, self.count, self.rtol = draw, count, rtol
        self.few, self.many = draw.steps(ours.x.device)
        self.size = ours.x.abs().clamp(min=1)
        self.alone = _is_element_by_element(ours, value, draw)
        self.cells = value.numel() if self.alone else 1
        self.probed = len(ours.x) if self.alone else min(len(ours.x), count)
        self.largest = self._largest(first)
        self.everywhere = Direction(ours.exact(draw.like(ours.x) * self.size), None)
        self.resolution = Resolution(ours, upstream, self.everywhere.v)
        self._units: dict[bool, float] = {}
        self.tangent: Tensor | None = None
        self.second: Tensor | None = None

    def report(self) -> Report:
        """All findings."""
        of_first = [self._of_f(direction) for direction in self._directions(self.first)]
        first = self._judge(of_first)
        if first.verdict == "right" and not self.alone and self.ours.unit > EPS:
            first = self._steepest(first)
        first = self._unless_noisy("first", first)
        return Report(
            value=Finding("cannot tell", math.nan, "there is no reference to compare it with"),
            first=first,
            forward_mode=or_wrong(self.ours, lambda: self._forward_mode(first, of_first)),
            second=or_unsupported(lambda: self._unless_noisy("second", self._second(first))),
        )

    def _unless_noisy(self, of: str, found: Finding) -> Finding:
        """Return the finding, unless the derivative is so noisy that errors would be hidden."""
        if found.verdict != "right" or self.ours.unit == EPS:
            return found
        noise = self.resolution.noise(of)
        if not noise:
            return found
        times = noise / self.resolution.rounded(of)
        detail = f"it scatters by {noise:.1e}, {times:.0f} times as much as rounding explains"
        return found._replace(verdict="cannot tell", error=math.nan, detail=detail)

    def _steepest(self, first: Finding) -> Finding:
        """Check along the steepest direction, where values in low precision show errors best."""
        direction = Direction(self.first.sign() * self.size, None)
        together = self._judge([self._of_f(direction)])
        return together if together.verdict == "wrong" else first

    # -------------------------------------------------------------------------------- evidence

    def _f(self, x: Tensor) -> Tensor:
        return self.ours.at(x).value()

    def _gradient(self, x: Tensor) -> Tensor:
        return self.ours.at(x).first(self.upstream)

    def _of_f(self, direction: Direction) -> Evidence:
        """The gradient along a direction."""
        line = self._line(False, direction, self.upstream, self.cells)
        return self._evidence(line, self.first, self.largest, "first")

    def _line(
        self,
        of_gradient: bool,
        direction: Direction,
        weights: Tensor,
        cells: int,
    ) -> Line:
        """The line of the values, or of the gradient's elements."""
        f, center = (self._gradient, self.first) if of_gradient else (self._f, self.value)
        unit = functools.partial(self._unit, of_gradient)
        precision = Precision(unit, lambda: self.ours.unit)
        return Line(f, self.ours.x, direction, weights, cells, center, precision)

    def _unit(self, of_gradient: bool) -> float:
        """The relative precision of values or gradients; the function's own if they scatter."""
        if of_gradient not in self._units:
            self._units[of_gradient] = EPS
            if self.ours.unit > EPS:
                center = (self.first if of_gradient else self.value).flatten().abs()
                scatter = self.resolution.scatter("first" if of_gradient else "value")
                if (scatter > _LEAST_SCATTER * self.ours.unit * center).any():
                    self._units[of_gradient] = self.ours.unit
        return self._units[of_gradient]

    def _largest(self, gradient: Tensor) -> Tensor:
        return (gradient * self.size).nan_to_num(0, 0, 0).abs().max()

    def _evidence(self, line: Line, computed: Tensor, largest: Tensor, of: str) -> Evidence:
        # The terms of the sums are as large as the largest derivatives.
        floor = line.magnitude if self.alone else line.magnitude.clamp(min=largest)
        elements = line.direction.elements

        def names(cell: int) -> str:
            return (
                "a random direction" if elements is None else self.ours.place(int(elements[cell]))
            )

        def own() -> Own:
            value, uncertainty, scatter = self._own(of)
            sign = line.direction.v.sign()
            sizes = (self._along_line(sign * t, line) for t in (uncertainty, scatter))
            return Own(self._along_line(value, line), *sizes)

        def rough() -> Tensor:
            if elements is not None or self.cells > 1:
                return self.ours.x.new_zeros(())
            moves = (step * line.direction.v for step in small_steps(self.ours.x.device))
            moved = [self.resolution.after(of, move)[: len(self.ours.x)] for move in moves]
            return roughness(torch.stack([self._along_line(at, line) for at in moved]))

        along = self._along_line(computed, line)
        return Evidence(line, along, ROUNDING * floor, names, largest, own, rough)

    def _own(self, of: str) -> Own:
        """Smooth curves through the gradient's elements, or through its change along v."""
        fit, n = self.resolution.of(of), len(self.ours.x)
        return Own(fit.value[:n], fit.value_uncertainty[:n], self.resolution.scatter(of)[:n])

    def _along_line(self, gradient: Tensor, line: Line) -> Tensor:
        """A gradient times the direction of a line, in cells."""
        v, elements, apart = line.direction
        return (gradient * v)[elements] + 0.0 if apart else self._sum(gradient * v)

    def _sum(self, values: Tensor) -> Tensor:
        """Sum the values of each cell."""
        return values.reshape(-1, self.cells).sum(0)

    def _directions(self, gradient: Tensor) -> list[Direction]:
        """Directions along each whole input, or along some elements one by one.

        The elements are those with the smallest and largest gradients, and some random ones. If
        these are not all, a few directions through all elements follow.
        """
        numbers = torch.arange(len(self.ours.x), device=self.ours.x.device)
        n, count = len(numbers), self.count
        if self.alone:
            return [self._along(elements) for elements in numbers.split(self.ours.sizes)]
        if count >= n:
            return [self._along(numbers, apart=True)]
        by_size = (gradient * self.size).abs().argsort()
        third = count // 3
        chosen = [by_size[:third], by_size[n - third :]]
        chosen.append(self.draw.some_of(by_size[third : n - third], count - 2 * third))
        dense = (self.draw.like(self.ours.x) * self.size for _ in range(_DENSE_DIRECTIONS))
        return [self._along(torch.cat(chosen), apart=True), *(Direction(v, None) for v in dense)]

    def _along(self, elements: Tensor, apart: bool = False) -> Direction:
        v = torch.zeros_like(self.ours.x).index_copy(0, elements, self.size[elements])
        return Direction(v, elements, apart)

    # -------------------------------------------------------------------------------- findings

    def _judge(self, pieces: Sequence[Evidence]) -> Finding:
        finding = judge(pieces, self.few, self.many, self.rtol)
        return self._counted(finding, self.probed)

    def _counted(self, finding: Finding, probed: int) -> Finding:
        n = len(self.ours.x)
        finding = finding._replace(probed=probed, elements=n)
        if finding.verdict == "right" and probed < n:
            detail = f"{finding.detail}; elements='all' probes the others too"
            return finding._replace(verdict="cannot tell", detail=detail)
        return finding

    def _forward_mode(self, first: Finding, of_first: Sequence[Evidence]) -> Finding:
        """Compare tangents with the gradient along the same direction, then with the values.

        If both are right they differ only by rounding along a direction through all elements; if
        they differ by more, the elements are checked one by one.
        """
        self.tangent = self.ours.tangent(self.everywhere.v)
        everywhere = self._of_tangent(self._of_f(self.everywhere), self.tangent)
        if first.verdict != "wrong" and self._same_as_gradient(everywhere, 0.0).all():
            return first
        each = [one for piece in of_first for one in piece.each()]
        tangents = [self._of_tangent(piece) for piece in each]
        if first.verdict == "wrong":
            return self._judge(tangents)
        differing = [t for t in tangents if not self._same_as_gradient(t, self.rtol).all()]
        if not differing:
            return first
        found = self._judge(differing)
        if found.verdict != "right" and first.verdict == "right":
            detail = found.detail if found.verdict == "wrong" else "differs from the gradient"
            return found._replace(verdict="wrong", detail=detail)
        return found

    def _of_tangent(self, piece: Evidence, tangent: Tensor | None = None) -> Evidence:
        """The evidence with the tangent in place of the gradient."""
        if tangent is None:
            tangent = self.ours.tangent(piece.line.direction.v)
        terms = self.upstream * tangent
        reordered = REORDERED * self._sum(terms.abs()).nan_to_num(0, 0, 0)
        return self._in_place_of(piece, self._sum(terms))._replace(reordered=reordered)

    def _in_place_of(self, piece: Evidence, computed: Tensor) -> Evidence:
        """The evidence with the derivative computed in another way, with as much scatter again."""

        def own() -> Own:
            return Own(computed, torch.zeros_like(computed), 2 * piece.own().scatter)

        return piece._replace(computed=computed, own=own)

    def _same_as_gradient(self, tangent: Evidence, rtol: float) -> Tensor:
        expected = self._along_line(self.first, tangent.line)
        bound = rtol * torch.maximum(tangent.computed.abs(), expected.abs()) + tangent.floor
        off = (tangent.computed - expected).abs()
        same = alike(tangent.computed, expected) | (off <= bound + tangent.reordered)
        if rtol and not same.all() and self.ours.unit > EPS:
            same |= off <= bound + tangent.own().scatter + self._rounded(expected)
        return same & ~off.isinf()

    def _rounded(self, computed: Tensor) -> Tensor:
        """The error from rounding a derivative and the numbers it is computed from."""
        return self.ours.unit * computed.abs()

    def _second(self, first: Finding) -> Finding:
        v = self.everywhere.v
        by_x, by_upstream = self.ours.second(self.upstream, v)
        self.second = torch.cat([by_x, by_upstream.flatten()])
        jacobian = self._jacobian(first, by_upstream)
        if jacobian.verdict == "wrong":
            return self._counted(jacobian, self.probed)
        if self.alone or first.verdict != "right":
            pieces = [self._of_gradient(direction, by_x) for direction in self._directions(by_x)]
            found = self._judge(pieces)
        else:
            found = self._by_symmetry(by_x)
        return (
            jacobian._replace(probed=found.probed, elements=found.elements)
            if (found.verdict == "right" and jacobian.verdict != "right")
            else found
        )

    def _of_gradient(self, direction: Direction, by_x: Tensor) -> Evidence:
        line = self._line(True, direction, self.everywhere.v, self.cells)
        return self._evidence(line, by_x, self._largest(by_x), "second")

    def _jacobian(self, first: Finding, by_upstream: Tensor) -> Finding:
        """Check the derivative with respect to the upstream gradient: along v, it is J v."""
        terms = self.upstream * by_upstream
        along = self._in_place_of(self._of_f(self.everywhere), self._sum(terms))
        if first.verdict != "right":
            return judge([along], self.few, self.many, self.rtol)
        expected = self._sum(self.first * self.everywhere.v)
        size = self._sum(terms.abs()) + self._sum((self.first * self.everywhere.v).abs())
        bound = self.rtol * expected.abs() + along.floor + REORDERED * size
        off = (along.computed - expected).abs()
        wrong = ~(off <= bound)
        if wrong.any() and self.ours.unit > EPS:
            wrong &= ~(off <= bound + along.own().scatter + self._rounded(size))
        if wrong.any():
            cell = int(wrong.int().argmax())
            detail = (
                f"with respect to the upstream gradient, along a random direction: "
                f"{along.computed[cell]:.6g}, expected {expected[cell]:.6g}"
            )
            return Finding("wrong", math.inf, detail)
        return Finding("right", 0.0, "")

    def _by_symmetry(self, by_x: Tensor) -> Finding:
        """Compare second derivatives times v with the gradient's change along v.

        They are equal if the first derivatives are right, and one direction is enough instead of
        one per element. Undecided elements are then checked one by one.
        """
        n = len(by_x)
        line = self._line(True, self.everywhere, torch.ones_like(by_x), n)
        floor = line.magnitude * self.size
        largest = self._largest(by_x)
        floor = ROUNDING * floor.clamp(min=largest) / self.size
        own = functools.partial(self._own, "second")
        dense = Evidence(line, by_x, floor, self.ours.place, largest, own, lambda: 0 * largest)
        found, undecided = judge_one(dense, self.few, self.many, self.rtol)
        tiny = undecided[by_x[undecided].abs() <= REORDERED / ROUNDING * floor[undecided]]
        # If the values do not depend on any of these elements, their derivatives are 0.
        if len(tiny) and self._of_f(self._along(tiny, apart=True)).line.independent():
            undecided = undecided[~torch.isin(undecided, tiny)]
            if not len(undecided):
                found = independent(len(tiny), self.ours.place(int(tiny[0])))
        if found.verdict != "cannot tell":
            return self._counted(found, n)
        if len(undecided) > self.count:
            return self._counted(found, self.probed)
        piece = self._of_gradient(self._along(undecided, apart=True), by_x)
        return self._counted(judge([piece], self.few, self.many, self.rtol), n)


def _is_element_by_element(ours: Derivatives, value: Tensor, draw: Draw) -> bool:
    """Whether each output element depends only on the same element of each input.

    Any two elements differ in some bit of their index. For each bit, the elements with a 1 there
    are moved, then those with a 0; only the same elements of the output may change.
    """
    if any(shape != value.shape for shape in ours.shapes):
        return False
    numbers = torch.arange(value.numel(), device=value.device)
    by = (draw.like(ours.x) * ours.x.abs().clamp(min=1)).view(len(ours.sizes), -1)
    for digit in range(max(0, value.numel() - 1).bit_length()):
        ones = (numbers >> digit) & 1 == 1
        for chosen in (ones, ~ones):
            for one_input in torch.eye(len(ours.sizes), device=value.device):
                moves = by * chosen * one_input.unsqueeze(1)
                try:
                    moved = ours.at(ours.x + moves.flatten()).value()
                except (TypeError, ValueError):  # outside of the function's domain
                    return False
                if not equal(moved.flatten()[~chosen], value.flatten()[~chosen]):
                    return False
    return True
