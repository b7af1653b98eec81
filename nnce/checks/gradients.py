"""Are the derivatives of a Function right? And how far is a number from the true one?

`check_gradients` is for a `torch.autograd.Function` of your own. It does not say "right" where it
cannot know: in saturation a numerical derivative has no digits, and `torch.autograd.gradcheck`,
with its absolute tolerance, lets a backward of all zeros pass there.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nnce.checks._derivatives import Broken, Derivatives, Unsupported
from nnce.checks._numerical import EPS, Ladder, Slopes, slopes
from nnce.checks._subject import Subject, alike, equal
from nnce.checks._variations import Setting, variations

Verdict = Literal["right", "wrong", "cannot tell", "unsupported"]

# Where not every element is probed, so many directions through all of them are tried besides.
_DENSE_DIRECTIONS = 4
# Numerical derivatives come from steps that shrink from 64 times the size of x to a unit in its
# last place, each a quarter of the one before.
_STEPS = 30
_LARGEST_STEP = 64.0
# A derivative is wrong only if the numerical one is certain to three digits: two or three estimates
# may agree by accident.
_CERTAIN = 1e-3


class Finding(NamedTuple):
    """What is known of one derivative."""

    verdict: Verdict
    """"unsupported" is said of a forward mode that the Function does not have, and of second
    derivatives that it refuses (by `once_differentiable`, or an error that says that there are "no
    second derivatives")."""
    error: float
    """The largest relative error seen, where there was one to see; else NaN."""
    detail: str
    """Where that was, or why nothing can be told."""
    probed: int = 0
    """How many elements of the inputs were looked at one by one."""
    elements: int = 0
    """How many there are."""


class Report(NamedTuple):
    """What `check_gradients` found."""

    value: Finding
    """The output itself; without a reference there is nothing to hold it to."""
    first: Finding
    """First derivatives by backward."""
    forward_mode: Finding
    """First derivatives by `jvp`."""
    second: Finding
    """Second derivatives: those of the backward by the inputs and by the upstream gradient."""

    @property
    def right(self) -> bool:
        """First derivatives are right everywhere, and all others right or not there."""
        return (
            self.first.verdict == "right"
            and self.value.verdict != "wrong"
            and self.forward_mode.verdict in ("right", "unsupported")
            and self.second.verdict in ("right", "unsupported")
        )

    def __bool__(self) -> bool:
        """`right`, so that `assert check_gradients(…)` means what it says."""
        return self.right

    def __str__(self) -> str:
        """A line for each."""
        lines = []
        for name, finding in self._asdict().items():
            probed = (
                f" ({finding.probed:,} of {finding.elements:,} elements probed)"
                if finding.elements
                else ""
            )
            title = name.replace("_", " ")
            lines.append(f"{title:<13}{finding.verdict:<12}{finding.detail}{probed}")
        return "\n".join(lines)


def check_gradients(
    function: Callable[..., Tensor],
    *inputs: Any,
    reference: Callable[..., Tensor] | None = None,
    rtol: float = 1e-5,
    elements: int | Literal["all"] = 64,
    seed: int = 0,
) -> Report:
    """Hold a function's derivatives to numerical ones, or to those of a reference.

    Everything is computed in float64, under a random upstream gradient, and repeated with inputs
    and upstream gradients that are not contiguous and with some of the inputs frozen.

    Without a reference, first and second derivatives are compared element by element with
    extrapolated central differences. These say themselves how many digits they have:

    - right: numerical and computed derivative agree within rtol, and the numerical one is certain
      to rtol. A computed 0 is right where the values are exactly 0 about x, or where
      f(x + h) − f(x − h) is 0, up to 8 units in the last place of f, at every step from 64 times
      the size of x down to its last digit.
    - wrong: the numerical derivative is certain to three digits, and they differ by more than rtol
      and twice its uncertainty, or the computed one is not finite; or the backward gives another
      gradient in another layout, with frozen inputs or the second time, or the jvp raises.
    - cannot tell: else, so in saturation; at a kink, where the derivatives from below and from
      above differ; and where not all elements were probed.

    A function whose output has the shape of each of its inputs and whose elements do not depend on
    one another is probed at all elements at once. Of any other, the elements of the smallest and
    the largest computed derivative and some random ones are probed one by one.

    Values are taken to be right to some units in the last place of float64. Where a function works
    in a lower precision, cancels inside, or is a staircase, and where x is beyond 10^14 or nearer
    to a pole than 10^-14, what it computes has other derivatives than what it means, and it may be
    called wrong; a reference decides.

    With a reference, value and derivatives are compared with it element by element, at any input.
    Where they differ by no more than rounding the inputs moves the reference, it cannot tell.

    Args:
        function: takes the inputs and returns a tensor; a Function's `apply`, for instance. It is
            handed copies, and so may work in place.
        inputs: floating-point tensors are differentiated by; all else is handed on as it is.
        reference: computes the same by means that are trusted.
        rtol: the relative error from which a derivative is wrong, above 0. There is no absolute
            one.
        elements: how many elements to probe where that is done one by one (at some 60 calls of the
            function each, and as many of its backward), or "all".
        seed: fixes directions, steps and upstream gradients.

    Returns:
        A finding each for the value, the first derivatives, those in forward mode, and the second.

    Raises:
        TypeError: no input is a floating-point tensor, or an output is not a real one.
        ValueError: the inputs are empty, the function cannot take them in float64, is random, or
            does not depend on them differentiably, its backward fails, or an option makes no
            sense; the sentence says which and why.
    """
    if not (elements == "all" or (_is_number(elements, Integral) and elements >= 1)):
        raise ValueError(f"expected elements 'all' or a number of at least 1, got {elements!r}")
    if not (_is_number(rtol, Real) and 0 < rtol < 1):
        raise ValueError(f"expected rtol between 0 and 1, got {rtol!r}")
    if not _is_number(seed, Integral):
        raise ValueError(f"expected seed to be an integer, got {seed!r}")
    subject = Subject(function, inputs, "the function")
    value = subject.observe().double()
    ours = Derivatives(subject)
    draw = _Draw(int(seed))
    upstream = draw.like(value)
    try:
        first = ours.first(upstream)
        if reference is None:
            count = ours.x.numel() if elements == "all" else int(elements)
            report = _by_differences(ours, value, first, upstream, draw, count, float(rtol))
        else:
            trusted = Subject(reference, inputs, "the reference")
            trusted.observe()
            report = _by_reference(ours, Derivatives(trusted), upstream, draw, float(rtol))
    except Broken as error:
        raise ValueError(str(error)) from error
    setting = Setting(ours, value, first, upstream, draw.like(ours.x), draw.mask)
    wrong = {
        name: Finding("wrong", math.nan, detail)
        for name, detail in _differs_elsewhere(setting, float(rtol)).items()
        if getattr(report, name).verdict != "wrong"
    }
    return report._replace(**wrong)


def _is_number(value: object, type_: type) -> bool:
    return isinstance(value, type_) and not isinstance(value, bool)


class _Draw:
    """Random numbers from one generator, on a tensor's device."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def like(self, tensor: Tensor) -> Tensor:
        """Of either sign and of magnitudes from ½ to 1½, so that nothing is weighed down to 0."""
        shape = tensor.shape
        magnitude = 0.5 + torch.rand(shape, generator=self.generator, dtype=torch.float64)
        sign = 2 * torch.randint(2, shape, generator=self.generator).double() - 1
        return (magnitude * sign).to(tensor.device)

    def mask(self, tensor: Tensor) -> Tensor:
        """Zeros and ones."""
        return torch.randint(2, tensor.shape, generator=self.generator).to(tensor)

    def steps(self, device: torch.device) -> Tensor:
        """The steps of one derivative; drawn, since a period of the function may divide others."""
        largest = _LARGEST_STEP * (1 - float(torch.rand((), generator=self.generator)) / 2)
        return largest * 0.25 ** torch.arange(_STEPS, dtype=torch.float64, device=device)

    def some_of(self, indices: Tensor, count: int) -> Tensor:
        """So many of the indices."""
        chosen = torch.randperm(len(indices), generator=self.generator)[:count]
        return indices[chosen.to(indices.device)]


# ---------------------------------------------------------------------- under other conditions


def _differs_elsewhere(setting: Setting, rtol: float) -> dict[str, str]:
    """Sentences that say what differs under the `variations`, by the name of the finding."""
    differs: dict[str, str] = {}
    upstream = setting.upstream.clone()
    for variation in variations(setting):
        name = variation.of
        try:
            got, expected = variation.compute()
        except Broken as error:
            if name == "first":
                differs.setdefault(name, f"{variation.where}, {error}")
            continue  # judged elsewhere
        except (Unsupported, TypeError, ValueError):
            continue  # judged elsewhere, or the function refuses such inputs
        if not equal(upstream, setting.upstream):
            differs.setdefault("first", "the backward overwrites its upstream gradient")
            setting.upstream.copy_(upstream)
        elif detail := _difference(setting, name, got.flatten(), expected.flatten(), rtol):
            differs.setdefault(name, f"{variation.where}, {detail}")
    return differs


def _difference(setting: Setting, name: str, got: Tensor, expected: Tensor, rtol: float) -> str:
    """Where two vectors differ by more than rounding, in words; else an empty string."""
    if not len(expected):
        return ""
    # Another layout may be summed in another order.
    like = torch.cat([expected, setting.first]) if name == "first" else expected
    rounding = 1e4 * EPS * like.nan_to_num(0.0, 0.0, 0.0).abs().max()
    bound = rtol * torch.maximum(got.abs(), expected.abs()) + rounding
    off = (got - expected).abs()
    wrong = ~(alike(got, expected) | (off <= bound))
    if not wrong.any():
        return ""
    at = int(torch.where(wrong, off.nan_to_num(torch.inf), -1.0).argmax())
    return f"at element {at}: {got[at]:.6g}, expected {expected[at]:.6g}"


# ------------------------------------------------------------------------- against a reference


def _by_reference(
    ours: Derivatives, theirs: Derivatives, upstream: Tensor, draw: _Draw, rtol: float
) -> Report:
    along = draw.like(ours.x)
    moved = [ours.x * (1 + 2 * EPS * draw.like(ours.x).sign()) for _ in range(5)]

    def first(function: Derivatives) -> Tensor:
        return function.first(upstream)

    def second(function: Derivatives) -> Tensor:
        by_x, by_upstream = function.second(upstream, along)
        return torch.cat([by_x, by_upstream.flatten()])

    def forward_mode(function: Derivatives) -> Tensor:
        try:
            return function.tangent(along)
        except Unsupported:
            if function is ours:
                raise
            return function.jacobian_along(along)

    def compare(what: Callable[[Derivatives], Tensor]) -> Finding:
        got, expected = what(ours), what(theirs)
        if got.shape != expected.shape:
            shapes = f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
            return Finding("wrong", math.inf, shapes)
        # How far rounding the inputs moves the truth.
        noise = torch.zeros_like(expected)
        for x in moved:
            moved_by = (what(theirs.at(x)) - expected).abs()
            noise = torch.maximum(noise, moved_by.nan_to_num(0.0, 0.0, 0.0))
        return _compare(got.flatten(), expected.flatten(), noise.flatten(), rtol)

    return Report(
        value=compare(Derivatives.value),
        first=compare(first),
        forward_mode=_or_wrong(lambda: compare(forward_mode)),
        second=_or_unsupported(lambda: compare(second)),
    )


def _or_unsupported(find: Callable[[], Finding]) -> Finding:
    try:
        return find()
    except Unsupported as error:
        return Finding("unsupported", math.nan, str(error))


def _or_wrong(find: Callable[[], Finding]) -> Finding:
    """A jvp that raises is wrong; that there is none is no fault."""
    try:
        return _or_unsupported(find)
    except Broken as error:
        return Finding("wrong", math.inf, str(error))


def _compare(got: Tensor, expected: Tensor, noise: Tensor, rtol: float) -> Finding:
    """Element by element, relatively; equal infinities and two NaNs are equal."""
    if not len(got):
        return Finding("cannot tell", math.nan, "there is nothing to compare")
    error = torch.where(alike(got, expected), 0.0, (got - expected).abs() / expected.abs())
    error = error.nan_to_num(nan=math.inf, posinf=math.inf)
    blind = (error > rtol) & ((got - expected).abs() <= 4 * noise)
    worst = int(torch.where(blind, 0.0, error).argmax())
    verdict: Verdict = "right"
    if error[worst] > rtol and not blind[worst]:
        verdict = "wrong"
    elif blind.any():
        verdict, worst = "cannot tell", int(blind.int().argmax())
    how = "rounding the inputs explains the" if verdict == "cannot tell" else "largest"
    return Finding(
        verdict,
        math.nan if verdict == "cannot tell" else float(error[worst]),
        f"{how} relative error {error[worst]:.1e} at element {worst}: {got[worst]:.6g}, "
        f"expected {expected[worst]:.6g}",
    )


# ------------------------------------------------------------------- against numerical derivatives


class _Direction(NamedTuple):
    """A direction to probe along."""

    v: Tensor
    """As long as x is large, so that a step of 1 is of the size of x."""
    elements: Tensor | None
    """The elements of x that it moves, one for each cell; None for all of them."""


class _Evidence(NamedTuple):
    """Computed derivatives beside numerical ones."""

    computed: Tensor
    slopes: Slopes
    direction: _Direction


def _by_differences(
    ours: Derivatives,
    value: Tensor,
    first: Tensor,
    upstream: Tensor,
    draw: _Draw,
    count: int,
    rtol: float,
) -> Report:
    """At all elements at once where they do not depend on one another, else at `count` of them."""
    n = len(ours.x)
    alone = _is_element_by_element(ours, value, draw)
    probed = n if alone else min(n, count)
    probe = _Probe(ours, value.numel() if alone else 1, draw, rtol)

    def directions(gradient: Tensor) -> list[_Direction]:
        return probe.each_input() if alone else probe.some_elements(gradient, count)

    def judge(evidence: Sequence[_Evidence]) -> Finding:
        finding = _judge(evidence, rtol)._replace(probed=probed, elements=n)
        if finding.verdict == "right" and probed < n:
            detail = f"{finding.detail}; elements='all' probes the others too"
            return finding._replace(verdict="cannot tell", detail=detail)
        return finding

    def f(x: Tensor) -> Tensor:
        return ours.at(x).value()

    def gradient_at(x: Tensor) -> Tensor:
        return ours.at(x).first(upstream)

    everywhere = _Direction(draw.like(ours.x) * probe.size, None)
    of_f = [
        (direction, probe.along(f, direction, upstream))
        for direction in [*directions(first), everywhere]
    ]

    def forward_mode() -> Finding:
        return judge(
            [
                _Evidence(probe.sum(upstream * ours.tangent(direction.v)), slopes, direction)
                for direction, slopes in of_f
            ]
        )

    def second() -> Finding:
        weights = everywhere.v
        by_x, by_upstream = ours.second(upstream, weights)
        by_x_evidence = [
            _Evidence(
                probe.sum(by_x * direction.v),
                probe.along(gradient_at, direction, weights),
                direction,
            )
            for direction in directions(by_x)
        ]
        # What the backward makes of the upstream gradient is linear in it: the Jacobian.
        jacobian = _Evidence(probe.sum(upstream * by_upstream), of_f[-1][1], everywhere)
        return judge([*by_x_evidence, jacobian])

    return Report(
        value=Finding("cannot tell", math.nan, "there is no reference to hold it to"),
        first=judge([_Evidence(probe.sum(first * d.v), slopes, d) for d, slopes in of_f]),
        forward_mode=_or_wrong(forward_mode),
        second=_or_unsupported(second),
    )


def _is_element_by_element(ours: Derivatives, value: Tensor, draw: _Draw) -> bool:
    """Whether each element of the output depends on that element of each input alone.

    Any two elements differ in some digit of their binary numbers. So for each digit those that have
    a 1 there are moved, and then those that have a 0, and no output but theirs may move.
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


class _Probe:
    """Takes numerical derivatives of a function's values, in cells.

    With one cell, the weighted values are added up; with a cell for each element, element by
    element over all that have one (the output, or the gradients by each of the inputs).
    """

    def __init__(self, ours: Derivatives, cells: int, draw: _Draw, rtol: float) -> None:
        self._x, self._cells, self._draw, self._rtol = ours.x, cells, draw, rtol
        self._inputs = torch.arange(len(ours.x), device=ours.x.device).split(ours.sizes)
        self.size = ours.x.abs().clamp(min=1)

    def each_input(self) -> list[_Direction]:
        """One input after the other, all of its elements together."""
        return [self._along(elements) for elements in self._inputs]

    def some_elements(self, gradient: Tensor, count: int) -> list[_Direction]:
        """Single elements: those of the smallest and the largest gradients, and some at random.

        Where those are not all, a few directions through all elements follow.
        """
        n = len(gradient)
        if count >= n:
            return [self._along(element) for element in torch.arange(n).to(self._x.device).split(1)]
        by_size = (gradient * self.size).abs().argsort()
        third = count // 3
        chosen = [by_size[:third], by_size[n - third :]]
        chosen.append(self._draw.some_of(by_size[third : n - third], count - 2 * third))
        dense = (self._draw.like(self._x) * self.size for _ in range(_DENSE_DIRECTIONS))
        return [
            *(self._along(element) for element in torch.cat(chosen).split(1)),
            *(_Direction(v, None) for v in dense),
        ]

    def _along(self, elements: Tensor) -> _Direction:
        v = torch.zeros_like(self._x).index_copy(0, elements, self.size[elements])
        return _Direction(v, elements)

    def sum(self, values: Tensor) -> Tensor:
        """Values in their cells."""
        return values.reshape(-1, self._cells).sum(0)

    def along(
        self, f: Callable[[Tensor], Tensor], direction: _Direction, weights: Tensor
    ) -> Slopes:
        """The derivatives along a direction of what f gives, weighted and in cells."""
        x, (v, elements) = self._x, direction
        steps = self._draw.steps(x.device)
        weights = weights.reshape(-1, self._cells)
        nothing = torch.full_like(weights, math.nan)

        def values(x: Tensor) -> Tensor:
            try:
                return f(x).reshape(weights.shape)
            except (TypeError, ValueError, Broken):  # outside of the function's domain
                return nothing

        center = values(x)
        moves = torch.zeros_like(center, dtype=torch.bool)
        rows = []
        for step in steps:
            above, below = x + step * v, x - step * v
            plus, minus = values(above), values(below)
            magnitude = weights.abs() * torch.stack([plus, minus, center]).abs().amax(0)
            # What does not move, at larger steps either, adds nothing to the rounding error.
            moves |= (plus != center) | (minus != center)
            size = torch.where(moves.any(0), (magnitude * moves).sum(0), magnitude.sum(0))
            # The steps that were really taken, after rounding.
            up, down = (
                (step, step)
                if elements is None
                else ((above - x)[elements] / v[elements], (x - below)[elements] / v[elements])
            )
            rows.append(
                (
                    (weights * (plus - center)).sum(0),
                    (weights * (center - minus)).sum(0),
                    up.expand(self._cells),
                    down.expand(self._cells),
                    size,
                )
            )
        table = (torch.stack(column) for column in zip(*rows, strict=True))
        return slopes(Ladder(steps.unsqueeze(1), *table), self._rtol)


def _judge(evidence: Sequence[_Evidence], rtol: float) -> Finding:
    """The verdict over all evidence: wrong where one is, else cannot tell where one cannot."""
    findings = [_judge_one(*piece, rtol) for piece in evidence]
    for verdict in ("wrong", "cannot tell"):
        for finding in findings:
            if finding.verdict == verdict:
                return finding
    return max(findings, key=lambda finding: finding.error)


def _judge_one(computed: Tensor, slopes: Slopes, direction: _Direction, rtol: float) -> Finding:
    difference = (computed - slopes.derivative).abs()
    finite = computed.isfinite()
    size = torch.maximum(torch.where(finite, computed.abs(), 0.0), slopes.derivative.abs())
    known = slopes.uncertainty.isfinite() & ~slopes.kinked
    agrees = (slopes.uncertainty <= rtol * size) & (difference <= rtol * size)
    is_zero = (computed == 0) & slopes.zero
    right = known & finite & (agrees | is_zero)
    certain = slopes.uncertainty <= _CERTAIN * size
    wrong = known & certain & ~right & ~(difference <= 2 * slopes.uncertainty + rtol * size)
    error = torch.where(is_zero, 0.0, (difference / size).nan_to_num(math.inf, math.inf))
    if wrong.any():
        verdict: Verdict = "wrong"
        cell = int(torch.where(wrong, error, -1.0).argmax())
    elif right.all():
        verdict, cell = "right", int(error.argmax())
    else:
        verdict, cell = "cannot tell", int((~right).int().argmax())

    elements = direction.elements
    where = "in a random direction" if elements is None else f"at element {int(elements[cell])}"
    length = 1.0 if elements is None else direction.v[elements[cell]].item()
    ours, theirs, uncertainty, below, above = (
        t[cell].item() / length
        for t in (computed, slopes.derivative, slopes.uncertainty, slopes.below, slopes.above)
    )
    if verdict != "cannot tell":
        detail = (
            f"largest relative error {error[cell].item():.1e} {where}: {ours:.6g}, "
            f"numerically {theirs:.6g}"
        )
        return Finding(verdict, error[cell].item(), detail)
    if slopes.kinked[cell]:
        detail = f"a kink {where}: from below the derivative is {below:.3g}, from above {above:.3g}"
    elif not math.isfinite(uncertainty):
        detail = f"there is no numerical derivative {where}"
    else:
        detail = f"the numerical derivative {theirs:.2g} {where} is uncertain by {uncertainty:.2g}"
    return Finding(verdict, math.nan, f"{detail}; computed was {ours:.2g}")
