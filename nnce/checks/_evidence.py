"""Evidence for a derivative: the values along a line, and the verdict by them."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnce.checks._lines import Line
from nnce.checks._numerical import EPS, Slopes
from nnce.checks._report import Finding, Verdict

# A derivative is wrong only if the numerical one is certain to three digits: two or three estimates
# may agree by accident.
_CERTAIN = 1e-3
# In lower precision than float64 a derivative is right if it agrees and is certain to two digits
_ROUGHLY = 1e-2
# or to this many units.
_COARSE = 8
# A derivative is 0 if the slopes on both sides are alike, and this many times its uncertainty.
_CLEARLY = 4
# Summing in a different order changes a sum by a few units in the last place of its largest terms.
_ULPS = 64
ROUNDING = _ULPS * EPS
REORDERED = 1e4 * EPS


class Own(NamedTuple):
    """A smooth curve through a derivative computed in low precision, by cell."""

    value: Tensor
    uncertainty: Tensor
    scatter: Tensor


class Evidence(NamedTuple):
    """A computed derivative, and the values along a line to compare it with."""

    line: Line
    computed: Tensor
    """One for each cell."""
    floor: Tensor
    """A derivative up to this size may be pure rounding error."""
    names: Callable[[int], str]
    """Returns the name of a cell."""
    largest: Tensor
    """The largest of all derivatives of its kind."""
    own: Callable[[], Own]
    """The computed derivative around x."""
    rough: Callable[[], Tensor]
    """How far the computed derivative along a line through all elements is from smooth."""
    reordered: float | Tensor = 0.0
    """The extra rounding error in float64 from a different order of summation."""

    def of(self, cells: Tensor) -> "Evidence":
        """The evidence for some of the elements that are moved separately."""

        def names(cell: int) -> str:
            return self.names(int(cells[cell]))

        return self._replace(
            line=self.line.of(cells),
            computed=self.computed[cells],
            floor=self.floor[cells],
            names=names,
            own=lambda: Own(*(t[cells] for t in self.own())),
        )

    def each(self) -> "list[Evidence]":
        """Split the evidence by separately moved element."""
        if not self.line.direction.apart:
            return [self]
        return [self.of(cell) for cell in torch.arange(len(self.computed)).split(1)]

    def error(self, few: Tensor, rtol: float) -> float:
        """The largest relative error over a few small steps."""
        _, derivative = self.line.quick(few, self.computed, rtol)
        return float(_relative(self.computed, derivative).max())


def judge(pieces: Sequence[Evidence], few: Tensor, many: Tensor, rtol: float) -> Finding:
    """The verdict over all evidence: wrong if any is wrong, else cannot tell if any cannot tell.

    Two small steps are tried first. The rest is judged worst first.
    """
    findings: list[Finding] = []
    rest: list[Evidence] = []
    for piece in pieces:
        right, _ = piece.line.quick(few, piece.computed, rtol)
        if right.all():
            findings.append(judge_one(piece, few, many, rtol)[0])
        elif not piece.line.direction.apart:
            rest.append(piece)
        else:
            if right.any():
                findings.append(judge_one(piece.of(right.nonzero().flatten()), few, many, rtol)[0])
            zeros = (~right & (piece.computed == 0)).nonzero().flatten()
            if len(zeros) > 1 and piece.line.of(zeros).independent():
                findings.append(independent(len(zeros), piece.names(int(zeros[0]))))
                right[zeros] = True
            if not right.all():
                rest += piece.of((~right).nonzero().flatten()).each()
    for piece in sorted(rest, key=lambda piece: -piece.error(few, rtol)):
        finding, _ = judge_one(piece, few, many, rtol)
        if finding.verdict == "wrong":
            return finding
        findings.append(finding)
    undecided = [finding for finding in findings if finding.verdict == "cannot tell"]
    worst = undecided[0] if undecided else max(findings, key=lambda finding: finding.error)
    return worst._replace(resolution=max(finding.resolution for finding in findings))


def independent(count: int, place: str) -> Finding:
    """The finding that derivatives are 0 because the values do not depend on these elements."""
    return Finding("right", 0.0, f"the values do not depend on {count} elements, such as {place}")


def _relative(computed: Tensor, derivative: Tensor) -> Tensor:
    """The relative error: 0 where both are 0, infinite where either is NaN."""
    size = torch.maximum(computed.abs(), derivative.abs())
    error = torch.where(computed == derivative, 0.0, (computed - derivative).abs() / size)
    return error.nan_to_num(math.inf, math.inf)


def judge_one(piece: Evidence, few: Tensor, many: Tensor, rtol: float) -> tuple[Finding, Tensor]:
    """The verdict on one line, and the undecided cells."""
    line, computed = piece.line, piece.computed
    small = computed.abs() <= piece.floor + piece.reordered
    right = flat = fades = torch.zeros_like(small)
    derivative = torch.zeros_like(computed)
    if not small.all() or not line.plateau().flat.all():
        right, derivative = line.quick(few, computed, rtol)
    if (small & ~right).any():
        flat, fades = line.plateau()
        right = right | (small & flat)
        derivative = torch.where(flat, 0.0, derivative)
    if right.all():
        error = torch.where(small & flat, 0.0, _relative(computed, derivative))
        return _finding("right", piece, derivative, error, int(error.argmax())), right.nonzero()[:0]
    found = line.slopes(many, rtol)
    single = line.precision.unit() > EPS
    floor = piece.floor + piece.reordered
    if single:
        certain, agrees, is_zero, resolution = _compared_coarsely(piece, found, rtol)
    else:
        certain, agrees, resolution = _compared(piece, found, rtol)
        is_zero = (found.zero >= 0) & (computed.abs() <= torch.maximum(floor, found.zero))
    known = found.uncertainty.isfinite() & ~found.kinked
    right = right | (known & (agrees | is_zero))
    # Both are 0 to within rounding.
    tiny = computed.abs() <= REORDERED / ROUNDING * floor
    nothing = tiny & (found.derivative.abs() <= 2 * found.uncertainty)
    wrong = known & certain & ~right & ~nothing
    wrong |= known & ~computed.isfinite() & (found.zero >= 0)
    # A step of a staircase is also flat, and may end in a jump.
    if not single and not (right | wrong | tiny).all():
        flat, fades = line.plateau()  # where the derivative is 0, and the computed one is not
        wrong |= flat & ~tiny & ~right
        found = found._replace(derivative=torch.where(flat, 0.0, found.derivative))
    error = torch.where(is_zero | (small & flat), 0.0, _relative(computed, found.derivative))
    if wrong.any():
        cell = int(torch.where(wrong, error, -1.0).argmax())
        return _finding("wrong", piece, found.derivative, error, cell), right.nonzero()[:0]
    if right.all():
        if single:  # a derivative far smaller than the largest has no digits
            error = torch.minimum(error, (computed - found.derivative).abs() / piece.largest)
        finding = _finding("right", piece, found.derivative, error, int(error.argmax()))
        return finding._replace(resolution=float(resolution.max())), right.nonzero()[:0]
    undecided = (~right).nonzero().flatten()
    return _undecided(piece, found, fades, int(undecided[0])), undecided


def _compared(piece: Evidence, found: Slopes, rtol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Where a derivative certainly differs from the numerical one, where it agrees; its resolution.

    Near a zero of the derivative, it is enough that the uncertainty is negligible compared with
    nearby slopes. In low precision, a derivative may be off by its scatter.
    """
    computed = piece.computed
    finite = computed.isfinite()
    difference = (computed - found.derivative).abs()
    size = torch.maximum(torch.where(finite, computed.abs(), 0.0), found.derivative.abs())
    bound = 2 * found.uncertainty + rtol * size
    scatter = torch.zeros_like(computed)
    if piece.line.precision.coarsest() > EPS and not (difference <= rtol * size).all():
        scatter = piece.own().scatter
    agrees = finite & (found.uncertainty <= rtol * size) & (difference <= rtol * size + scatter)
    certain = found.uncertainty <= _CERTAIN * size
    enough = found.uncertainty <= found.nothing
    differs = ~(difference <= bound + scatter)
    resolution = torch.where(scatter > 0, scatter / piece.largest, 0.0)
    return certain & differs, agrees | (finite & enough & ~differs), resolution


def _compared_coarsely(
    piece: Evidence, found: Slopes, rtol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_compared` for values in low precision; also where the derivative is 0, and the resolution.

    The computed derivative may be off by its scatter about a smooth curve; the curve itself may
    not.
    """
    computed, own, unit = piece.computed, piece.own(), piece.line.precision.unit()
    finite = computed.isfinite()
    size = torch.maximum(torch.where(finite, computed.abs(), 0.0), found.derivative.abs())
    nearby = torch.maximum(size, found.nearby)
    off = (computed - found.derivative).abs() - own.scatter
    steady = (own.value - found.derivative).abs() - 2 * own.uncertainty
    off = torch.where(steady > off, steady, off)  # not where there is no curve
    bound = 2 * found.uncertainty + (rtol + unit) * size
    differs = ~(off <= bound)
    certain = found.uncertainty <= max(_CERTAIN, _COARSE * unit) * nearby
    # In low precision a small derivative is known only relative to the largest one; a computed 0
    # must be confirmed by the values.
    largest = nearby.clamp(min=piece.largest)
    enough = found.uncertainty <= max(_ROUGHLY, _COARSE * unit) * largest
    zero = torch.maximum(found.zero, 2 * found.uncertainty + own.scatter)
    turns = found.even & (_CLEARLY * found.uncertainty <= found.nearby)
    turns &= enough & (found.derivative.abs() <= 2 * found.uncertainty)
    is_zero = ((found.zero >= 0) | turns) & (computed.abs() <= zero)
    agrees = finite & enough & ~differs & (computed != 0)
    resolution = (bound + own.scatter) / largest
    wrong = certain & differs
    if wrong.any():  # the slope of a curve through many kinks is an average of nearby derivatives
        wrong &= ~(off <= bound + piece.rough())
    return wrong, agrees, is_zero, torch.where(agrees, resolution, 0.0)


def _length(piece: Evidence, cell: int) -> float:
    """The length of a step; a derivative is per step of length 1."""
    elements = piece.line.direction.elements
    return 1.0 if elements is None else piece.line.direction.v[elements[cell]].item()


def _finding(
    verdict: Verdict, piece: Evidence, derivative: Tensor, error: Tensor, cell: int
) -> Finding:
    length = _length(piece, cell)
    ours, theirs = piece.computed[cell].item() / length, derivative[cell].item() / length
    detail = (
        f"largest relative error {error[cell].item():.1e} at {piece.names(cell)}: {ours:.6g}, "
        f"numerically {theirs:.6g}"
    )
    return Finding(verdict, error[cell].item(), detail)


def _undecided(piece: Evidence, found: Slopes, fades: Tensor, cell: int) -> Finding:
    length, where = _length(piece, cell), piece.names(cell)
    ours, theirs, uncertainty, below, above = (
        t[cell].item() / length
        for t in (piece.computed, found.derivative, found.uncertainty, found.below, found.above)
    )
    if found.kinked[cell]:
        detail = (
            f"a kink at {where}: from below the derivative is {below:.3g}, from above {above:.3g}"
        )
    elif fades[cell]:
        detail = f"saturation at {where}: the values do not move"
    elif not math.isfinite(uncertainty):
        detail = f"there is no numerical derivative at {where}"
    else:
        detail = (
            f"the numerical derivative {theirs:.2g} at {where} is uncertain by {uncertainty:.2g}"
        )
    return Finding("cannot tell", math.nan, f"{detail}; computed was {ours:.2g}")
