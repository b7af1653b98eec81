"""Whether the derivatives of a function are right.

`check_gradients` tests a custom `torch.autograd.Function`. It does not report "right" without
evidence: in saturation a numerical derivative has no correct digits, and there
`torch.autograd.gradcheck`, with its absolute tolerance, accepts a backward of all zeros.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nnce.checks._curves import roughness, small_steps
from nnce.checks._derivatives import Broken, Derivatives, Unsupported, element
from nnce.checks._lines import Direction, Line, Precision
from nnce.checks._numerical import EPS, Slopes
from nnce.checks._resolution import Resolution
from nnce.checks._subject import Subject, alike, equal
from nnce.checks._torch_private import TANGENT_IGNORED
from nnce.checks._variations import Setting, Variation, variations

Verdict = Literal["right", "wrong", "cannot tell", "unsupported"]

# Number of directions through all elements, tried if not every element is probed.
_DENSE_DIRECTIONS = 4
# Two small steps are enough for most functions.
_QUICK_STEPS = (2.0**-9, 2.0**-17)
# If not: steps from 64 times the size of x down to a unit in its last place, each a quarter of the
# one before.
_STEPS = 30
_LARGEST_STEP = 64.0
# A derivative is wrong only if the numerical one is certain to three digits: two or three estimates
# may agree by accident.
_CERTAIN = 1e-3
# In lower precision than float64 a derivative is right if it agrees and is certain to two digits
_ROUGHLY = 1e-2
# or to this many units.
_COARSE = 8
# Values that deviate from a smooth curve by this fraction of a unit are in low precision.
_LEAST_SCATTER = 2.0**-6
# A derivative is 0 if the slopes on both sides are alike, and this many times its uncertainty.
_CLEARLY = 4
# Sums in low precision differ by a few units of their largest terms.
_FEW = 4
# Summing in a different order changes a sum by a few units in the last place of its largest terms.
_ULPS = 64
_ROUNDING = _ULPS * EPS
_REORDERED = 1e4 * EPS


class Finding(NamedTuple):
    """The verdict on one derivative."""

    verdict: Verdict
    """"unsupported": the function has no forward mode, or refuses second derivatives (by
    `once_differentiable`, or an error containing "no second derivatives")."""
    error: float
    """The largest relative error measured; NaN if none could be measured."""
    detail: str
    """Location of the largest error, or the reason for "cannot tell"."""
    probed: int = 0
    """The number of input elements probed one by one."""
    elements: int = 0
    """The number of input elements."""
    resolution: float = 0.0
    """The largest undetectable error, relative to the largest derivative, for a function in low
    precision; 0 for float64."""


_OF_WHAT = "Derivatives are of Σ u f, with a random upstream gradient u."


class Report(NamedTuple):
    """The report of `check_gradients`."""

    value: Finding
    """The output; compared only if there is a reference."""
    first: Finding
    """First derivatives by backward."""
    forward_mode: Finding
    """First derivatives by `jvp`."""
    second: Finding
    """Second derivatives: of the backward, with respect to inputs and upstream gradient."""

    @property
    def right(self) -> bool:
        """Whether first derivatives are right, and all other findings right or unsupported."""
        return (
            self.first.verdict == "right"
            and self.value.verdict != "wrong"
            and self.forward_mode.verdict in ("right", "unsupported")
            and self.second.verdict in ("right", "unsupported")
        )

    def __bool__(self) -> bool:
        """Return `right`, so that `assert check_gradients(…)` works."""
        return self.right

    def __str__(self) -> str:
        """A summary sentence, one line per finding, and what the numbers are."""
        lines = [
            f"{name.replace('_', ' '):<13}{finding.verdict:<12}{finding.detail}"
            for name, finding in self._asdict().items()
        ]
        return "\n".join([self._summary(), *lines, _OF_WHAT])

    def _summary(self) -> str:
        verdicts = [finding.verdict for finding in self[1:]]
        verdict: Verdict = "right" if self.right else "cannot tell"
        if "wrong" in (self.value.verdict, *verdicts):
            verdict = "wrong"
        sentence = f"{verdict}: {_listed(self, verdict)}"
        if "unsupported" in verdicts:
            sentence += f"; unsupported: {_listed(self, 'unsupported')}"
        sentence += f"; {self.first.probed:,} of {self.first.elements:,} elements probed"
        resolution = max(finding.resolution for finding in self)
        return sentence + (f"; in low precision, to {resolution:.1e}" if resolution else "")


def _listed(report: Report, verdict: Verdict) -> str:
    """List the findings with a verdict: "values, first and second derivatives, forward mode"."""
    value, first, forward_mode, second = (finding.verdict == verdict for finding in report)
    orders = [order for order, has in (("first", first), ("second", second)) if has]
    words = ["values"] if value and verdict != "cannot tell" else []
    words += [f"{' and '.join(orders)} derivatives"] if orders else []
    words += ["forward mode"] if forward_mode else []
    return ", ".join(words)


def check_gradients(
    function: Callable[..., Tensor],
    *inputs: Any,
    reference: Callable[..., Tensor] | None = None,
    rtol: float = 1e-5,
    elements: int | Literal["all"] = 64,
    seed: int = 0,
) -> Report:
    """Compare a function's derivatives with numerical derivatives, or with a reference.

    Everything is computed in float64 with a random upstream gradient, and repeated under conditions
    found in real graphs: inputs and upstream gradients that are expanded, strided, or at an offset
    in memory; upstream gradients that contain zeros, or are very small or large; some inputs
    frozen, or two inputs the same tensor; and a graph that is differentiated twice.

    Without a reference, first and second derivatives are compared element by element with central
    differences over several steps, which also show how many digits are certain:

    - right: numerical and computed derivative agree within rtol, and the numerical one is certain
      to rtol. A computed 0 is right on a plateau that ends in a kink or a jump, and where the
      slopes nearby shrink to 0 as a power of the distance.
    - wrong: the numerical derivative is certain to three digits, and they differ by more than rtol
      and twice its uncertainty, or the computed one is not finite; or the derivative changes under
      one of the conditions above; or the backward overwrites its upstream gradient; or the jvp
      raises.
    - cannot tell: all other cases, such as saturation; a kink, where the derivatives from below and
      above differ; a pole; or some elements not probed.

    An elementwise function, whose inputs all have the shape of the output, is probed at all
    elements at once. For any other function, the elements with the smallest and the largest
    computed derivatives and some random elements are probed one by one.

    Values are assumed to be accurate to a few units in the last place of float64. If a function
    computes in float32, float16 or bfloat16, polynomials are fitted to a few hundred values and
    gradients. Their scatter is the function's resolution: the derivative is right if the difference
    is no larger, and the first line of the report states the resolution relative to the largest
    derivative. A gradient that scatters much more than rounding explains is not right. If the
    function is itself a staircase, or x is beyond 10^14 or closer to a pole than 10^-14, the
    computed values have different derivatives from the intended function, and the verdict may be
    "wrong"; use a reference there.

    With a reference, value and derivatives are compared with it element by element, at any input.
    The verdict is "cannot tell" if they differ by no more than the reference changes when the
    inputs are rounded.

    Args:
        function: takes the inputs and returns a tensor, such as a Function's `apply`. It receives
            copies, so it may work in place.
        inputs: the function's arguments. It is differentiated with respect to the floating-point
            tensors that require a gradient, or all floating-point tensors if none does.
        reference: a trusted implementation of the same function.
        rtol: relative tolerance, above 0 and below 1. There is no absolute tolerance.
        elements: number of elements to probe if they are probed one by one, or "all".
        seed: random seed for directions, steps and upstream gradients.

    Returns:
        One finding each for the value, first derivatives, forward mode and second derivatives.

    Raises:
        TypeError: no input is a floating-point tensor, or an output is not one.
        ValueError: the inputs are empty, sparse or on the meta device; gradients are disabled; the
            function cannot take the inputs in float64, is random, returns an empty tensor, or is
            not differentiable with respect to its inputs; its backward fails; or an option is
            invalid.

    >>> function = nnce.functional.SigmoidFunction.apply
    >>> report = nnce.check_gradients(function, torch.tensor([-1.0, 0.5]))
    >>> report.right, report.first.verdict
    (True, 'right')
    """
    _check_options(rtol, elements, seed)
    with warnings.catch_warnings():
        # PyTorch warns about its own scripted forward-mode decompositions.
        warnings.filterwarnings("ignore", message="`torch.jit.script")
        return _check(function, inputs, reference, float(rtol), elements, int(seed))


def _check(
    function: Callable[..., Tensor],
    inputs: Sequence[Any],
    reference: Callable[..., Tensor] | None,
    rtol: float,
    elements: int | Literal["all"],
    seed: int,
) -> Report:
    subject = Subject(function, inputs, "the function")
    subject.observe()
    ours = Derivatives(subject)
    value = ours.value()
    draw = _Draw(seed)
    try:
        upstream = ours.exact(draw.like(value))
        first = ours.first(upstream)
        if reference is None:
            count = ours.x.numel() if elements == "all" else int(elements)
            finder = _ByDifferences(ours, value, first, upstream, draw, count, rtol)
            report = finder.report()
            resolution, computed = finder.resolution, (finder.tangent, finder.second)
        else:
            trusted = Subject(reference, inputs, "the reference")
            trusted.observe()
            report = _by_reference(ours, Derivatives(trusted), upstream, draw, rtol)
            along, *rest = _along_random(ours, upstream, draw)
            computed = rest[0], rest[1]
            resolution = Resolution(ours, upstream, along)
    except Broken as error:
        raise ValueError(str(error)) from error
    start = Setting(resolution, value, first, upstream, resolution.along, *computed, draw.mask)
    found = _changes(start, rtol)
    if ours.subject.writes_upstream:
        found["first"] = "the backward overwrites its upstream gradient, which others may need"
    changes = {
        name: getattr(report, name)._replace(verdict="wrong", error=math.nan, detail=detail)
        for name, detail in found.items()
        if getattr(report, name).verdict != "wrong"
    }
    return report._replace(**changes)


def _check_options(rtol: object, elements: object, seed: object) -> None:
    def is_number(value: object, type_: type) -> bool:
        return isinstance(value, type_) and not isinstance(value, bool)

    if elements != "all" and not (is_number(elements, Integral) and int(elements) >= 1):  # type: ignore[call-overload]
        raise ValueError(f"expected elements 'all' or a number of at least 1, got {elements!r}")
    if not (is_number(rtol, Real) and 0 < float(rtol) < 1):  # type: ignore[arg-type]
        raise ValueError(f"expected rtol between 0 and 1, got {rtol!r}")
    if not is_number(seed, Integral):
        raise ValueError(f"expected seed to be an integer, got {seed!r}")


class _Draw:
    """Random numbers from one generator, on a tensor's device."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def like(self, tensor: Tensor) -> Tensor:
        """Random values of either sign with magnitudes from ½ to 1½, no two nearly equal.

        No element gets a weight near 0, and swapping two elements changes the gradient.
        """
        n, generator = tensor.numel(), self.generator
        places = torch.randperm(n, generator=generator)
        within = torch.rand(n, generator=generator, dtype=torch.float64) / 2
        sign = 2 * torch.randint(2, (n,), generator=generator).double() - 1
        drawn = sign * (0.5 + (places + within) / max(n, 1))
        return drawn.view(tensor.shape).to(tensor.device)

    def mask(self, tensor: Tensor) -> Tensor:
        """A random mask, half zeros and half ones; a single element is 0."""
        n = tensor.numel()
        ones = torch.randperm(n, generator=self.generator) >= (n + 1) // 2
        return ones.view(tensor.shape).to(tensor)

    def steps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A few small steps, and many; random, as fixed steps might be multiples of a period."""
        share = 1 - float(torch.rand((), generator=self.generator)) / 2
        many = 0.25 ** torch.arange(_STEPS, dtype=torch.float64, device=device)
        few = torch.tensor(_QUICK_STEPS, dtype=torch.float64, device=device)
        return share * few, share * _LARGEST_STEP * many

    def some_of(self, indices: Tensor, count: int) -> Tensor:
        """A random choice of `count` indices."""
        chosen = torch.randperm(len(indices), generator=self.generator)[:count]
        return indices[chosen.to(indices.device)]


# ---------------------------------------------------------------------- under other conditions


def _along_random(
    ours: Derivatives, upstream: Tensor, draw: _Draw
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A random direction, and the tangent and second derivatives along it, if supported."""
    along = ours.exact(draw.like(ours.x))

    def unless_missing(compute: Callable[[], Tensor]) -> Tensor | None:
        try:
            return compute()
        except (Unsupported, Broken):
            return None

    tangent = unless_missing(lambda: ours.tangent(along))
    return along, tangent, unless_missing(lambda: ours.second_as_one(upstream, along))


def _changes(start: Setting, rtol: float) -> dict[str, str]:
    """Describe the changes under the `variations`, by name of the finding."""
    changes: dict[str, str] = {}
    upstream = start.upstream.clone()
    for variation in variations(start):
        try:
            got, expected = variation.compute()
        except Broken as error:
            # Second derivatives and the jvp themselves are judged elsewhere.
            if variation.required:
                changes.setdefault(variation.of, f"{variation.where}: {error}")
            continue
        except (Unsupported, TypeError, ValueError):
            continue  # judged elsewhere, or the function refuses such inputs
        if not torch.equal(upstream, start.upstream):
            changes.setdefault("first", "the backward overwrites its upstream gradient")
            start.upstream.copy_(upstream)
        elif not torch.equal(got, expected):
            detail = _difference(start, variation, got.flatten(), expected.flatten(), rtol)
            if detail and variation.within and start.ours.unit > EPS:
                variation = variation.within()
                got, expected = (t.flatten() for t in variation.compute())
                detail = _difference(start, variation, got, expected, rtol)
            if detail:
                changes.setdefault(variation.of, detail)
    return changes


def _difference(
    start: Setting, variation: Variation, got: Tensor, expected: Tensor, rtol: float
) -> str:
    """Describe where two vectors differ by more than rounding; empty if they do not."""
    usual = {"value": start.value, "first": start.first, "forward_mode": start.tangent}
    # Most are equal, and `equal` takes a tenth of the time.
    if torch.equal(got, expected) or torch.allclose(got, expected, _ROUNDING, atol=0.0):
        return ""
    like = [expected, usual.get(variation.of, start.second)]
    # A different layout may be summed in a different order.
    largest = max(float(t.nan_to_num(0.0, 0.0, 0.0).abs().max()) for t in like if t is not None)
    bound = rtol * torch.maximum(got.abs(), expected.abs()) + _REORDERED * largest
    off = (got - expected).abs()
    wrong = ~(alike(got, expected) | (off.isfinite() & (off <= bound)))
    if wrong.any() and start.ours.unit > EPS:
        scatter = start.resolution.scatter(variation.of)
        wrong &= ~(off <= bound + _FEW * start.ours.unit * largest + _repeated(scatter, len(off)))
    if not wrong.any():
        return ""
    at = int(torch.where(wrong, off.nan_to_num(math.inf), -1.0).argmax())
    name = _names(start.ours, start.value.shape, variation.of)(at)
    return f"{name}: {got[at]:.6g}, expected {expected[at]:.6g} ({variation.where})"


def _repeated(scatter: Tensor, length: int) -> Tensor:
    """Twice the scatter of each element, repeated to `length` for several calls in a row."""
    return 2 * scatter.repeat(-(-length // len(scatter)))[:length]


def _names(ours: Derivatives, shape: torch.Size, of: str) -> Callable[[int], str]:
    """Naming function for elements of values, gradients, tangents or second derivatives."""
    n = len(ours.x)

    def output(at: int) -> str:
        return element("output", at, shape)

    def first(at: int) -> str:
        return ours.place(at % n)

    def second(at: int) -> str:
        return ours.place(at) if at < n else element("upstream gradient", at - n, shape)

    return {"value": output, "forward_mode": output, "first": first}.get(of, second)


# ------------------------------------------------------------------------- against a reference


def _by_reference(
    ours: Derivatives, theirs: Derivatives, upstream: Tensor, draw: _Draw, rtol: float
) -> Report:
    along = draw.like(ours.x)
    moved = [ours.x * (1 + 2 * EPS * draw.like(ours.x).sign()) for _ in range(5)]
    n = len(ours.x)

    def forward_mode(function: Derivatives) -> Tensor:
        try:
            return function.tangent(along)
        except Unsupported:
            if function is ours:
                raise
            return function.jacobian_along(along)

    def compare(of: str, compute: Callable[[Derivatives], Tensor]) -> Finding:
        got, expected = compute(ours), compute(theirs)
        if got.shape != expected.shape:
            shapes = f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
            return Finding("wrong", math.inf, shapes, n, n)
        # How much rounding the inputs changes the reference.
        noise = torch.zeros_like(expected)
        for x in moved:
            moved_by = (compute(theirs.at(x)) - expected).abs()
            noise = torch.maximum(noise, moved_by.nan_to_num(0.0, 0.0, 0.0))
        names = _names(ours, upstream.shape, of)
        found = _compare(got.flatten(), expected.flatten(), noise.flatten(), names, rtol)
        return found._replace(probed=n, elements=n)

    return Report(
        value=compare("value", Derivatives.value),
        first=compare("first", lambda function: function.first(upstream)),
        forward_mode=_or_wrong(ours, lambda: compare("forward_mode", forward_mode)),
        second=_or_unsupported(
            lambda: compare("second", lambda function: function.second_as_one(upstream, along))
        ),
    )


def _or_unsupported(find: Callable[[], Finding]) -> Finding:
    try:
        return find()
    except Unsupported as error:
        return Finding("unsupported", math.nan, str(error))


def _or_wrong(ours: Derivatives, find: Callable[[], Finding]) -> Finding:
    """Run `find`; a jvp that raises is wrong, a missing jvp or dropped tangents are not."""
    try:
        finding = _or_unsupported(find)
    except Broken as error:
        return Finding("wrong", math.inf, str(error))
    ignoring = ours.ignores_tangents() if finding.verdict != "right" else ""
    if ignoring:
        detail = f"{TANGENT_IGNORED}: {ignoring}"
        return Finding("unsupported", math.nan, detail)
    return finding


def _compare(
    got: Tensor, expected: Tensor, noise: Tensor, names: Callable[[int], str], rtol: float
) -> Finding:
    """Compare elementwise by relative error; equal infinities and two NaNs are equal."""
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
        f"{how} relative error {error[worst]:.1e} at {names(worst)}: {got[worst]:.6g}, "
        f"expected {expected[worst]:.6g}",
    )


# ------------------------------------------------------------------- against numerical derivatives


class _Own(NamedTuple):
    """A smooth curve through a derivative computed in low precision, by cell."""

    value: Tensor
    uncertainty: Tensor
    scatter: Tensor


class _Evidence(NamedTuple):
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
    own: Callable[[], _Own]
    """The computed derivative around x."""
    rough: Callable[[], Tensor]
    """How far the computed derivative along a line through all elements is from smooth."""
    reordered: float | Tensor = 0.0
    """The extra rounding error in float64 from a different order of summation."""

    def of(self, cells: Tensor) -> "_Evidence":
        """The evidence for some of the elements that are moved separately."""

        def names(cell: int) -> str:
            return self.names(int(cells[cell]))

        return self._replace(
            line=self.line.of(cells),
            computed=self.computed[cells],
            floor=self.floor[cells],
            names=names,
            own=lambda: _Own(*(t[cells] for t in self.own())),
        )

    def each(self) -> "list[_Evidence]":
        """Split the evidence by separately moved element."""
        if not self.line.direction.apart:
            return [self]
        return [self.of(cell) for cell in torch.arange(len(self.computed)).split(1)]

    def error(self, few: Tensor, rtol: float) -> float:
        """The largest relative error over a few small steps."""
        _, derivative = self.line.quick(few, self.computed, rtol)
        return float(_relative(self.computed, derivative).max())


class _ByDifferences:
    """Checks by differences: all elements at once if elementwise, else `count` elements."""

    def __init__(
        self,
        ours: Derivatives,
        value: Tensor,
        first: Tensor,
        upstream: Tensor,
        draw: _Draw,
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
            forward_mode=_or_wrong(self.ours, lambda: self._forward_mode(first, of_first)),
            second=_or_unsupported(lambda: self._unless_noisy("second", self._second(first))),
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

    def _of_f(self, direction: Direction) -> _Evidence:
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

    def _evidence(self, line: Line, computed: Tensor, largest: Tensor, of: str) -> _Evidence:
        # The terms of the sums are as large as the largest derivatives.
        floor = line.magnitude if self.alone else line.magnitude.clamp(min=largest)
        elements = line.direction.elements

        def names(cell: int) -> str:
            return (
                "a random direction" if elements is None else self.ours.place(int(elements[cell]))
            )

        def own() -> _Own:
            value, uncertainty, scatter = self._own(of)
            sign = line.direction.v.sign()
            sizes = (self._along_line(sign * t, line) for t in (uncertainty, scatter))
            return _Own(self._along_line(value, line), *sizes)

        def rough() -> Tensor:
            if elements is not None or self.cells > 1:
                return self.ours.x.new_zeros(())
            moves = (step * line.direction.v for step in small_steps(self.ours.x.device))
            moved = [self.resolution.after(of, move)[: len(self.ours.x)] for move in moves]
            return roughness(torch.stack([self._along_line(at, line) for at in moved]))

        along = self._along_line(computed, line)
        return _Evidence(line, along, _ROUNDING * floor, names, largest, own, rough)

    def _own(self, of: str) -> _Own:
        """Smooth curves through the gradient's elements, or through its change along v."""
        fit, n = self.resolution.of(of), len(self.ours.x)
        return _Own(fit.value[:n], fit.value_uncertainty[:n], self.resolution.scatter(of)[:n])

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

    def _judge(self, pieces: Sequence[_Evidence]) -> Finding:
        finding = _judge(pieces, self.few, self.many, self.rtol)
        return self._counted(finding, self.probed)

    def _counted(self, finding: Finding, probed: int) -> Finding:
        n = len(self.ours.x)
        finding = finding._replace(probed=probed, elements=n)
        if finding.verdict == "right" and probed < n:
            detail = f"{finding.detail}; elements='all' probes the others too"
            return finding._replace(verdict="cannot tell", detail=detail)
        return finding

    def _forward_mode(self, first: Finding, of_first: Sequence[_Evidence]) -> Finding:
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

    def _of_tangent(self, piece: _Evidence, tangent: Tensor | None = None) -> _Evidence:
        """The evidence with the tangent in place of the gradient."""
        if tangent is None:
            tangent = self.ours.tangent(piece.line.direction.v)
        terms = self.upstream * tangent
        reordered = _REORDERED * self._sum(terms.abs()).nan_to_num(0, 0, 0)
        return self._in_place_of(piece, self._sum(terms))._replace(reordered=reordered)

    def _in_place_of(self, piece: _Evidence, computed: Tensor) -> _Evidence:
        """The evidence with the derivative computed in another way, with as much scatter again."""

        def own() -> _Own:
            return _Own(computed, torch.zeros_like(computed), 2 * piece.own().scatter)

        return piece._replace(computed=computed, own=own)

    def _same_as_gradient(self, tangent: _Evidence, rtol: float) -> Tensor:
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

    def _of_gradient(self, direction: Direction, by_x: Tensor) -> _Evidence:
        line = self._line(True, direction, self.everywhere.v, self.cells)
        return self._evidence(line, by_x, self._largest(by_x), "second")

    def _jacobian(self, first: Finding, by_upstream: Tensor) -> Finding:
        """Check the derivative with respect to the upstream gradient: along v, it is J v."""
        terms = self.upstream * by_upstream
        along = self._in_place_of(self._of_f(self.everywhere), self._sum(terms))
        if first.verdict != "right":
            return _judge([along], self.few, self.many, self.rtol)
        expected = self._sum(self.first * self.everywhere.v)
        size = self._sum(terms.abs()) + self._sum((self.first * self.everywhere.v).abs())
        bound = self.rtol * expected.abs() + along.floor + _REORDERED * size
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
        floor = _ROUNDING * floor.clamp(min=largest) / self.size
        own = functools.partial(self._own, "second")
        dense = _Evidence(line, by_x, floor, self.ours.place, largest, own, lambda: 0 * largest)
        found, undecided = _judge_one(dense, self.few, self.many, self.rtol)
        tiny = undecided[by_x[undecided].abs() <= _REORDERED / _ROUNDING * floor[undecided]]
        # If the values do not depend on any of these elements, their derivatives are 0.
        if len(tiny) and self._of_f(self._along(tiny, apart=True)).line.independent():
            undecided = undecided[~torch.isin(undecided, tiny)]
            if not len(undecided):
                found = _independent(len(tiny), self.ours.place(int(tiny[0])))
        if found.verdict != "cannot tell":
            return self._counted(found, n)
        if len(undecided) > self.count:
            return self._counted(found, self.probed)
        piece = self._of_gradient(self._along(undecided, apart=True), by_x)
        return self._counted(_judge([piece], self.few, self.many, self.rtol), n)


def _is_element_by_element(ours: Derivatives, value: Tensor, draw: _Draw) -> bool:
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


def _judge(pieces: Sequence[_Evidence], few: Tensor, many: Tensor, rtol: float) -> Finding:
    """The verdict over all evidence: wrong if any is wrong, else cannot tell if any cannot tell.

    Two small steps are tried first. The rest is judged worst first.
    """
    findings: list[Finding] = []
    rest: list[_Evidence] = []
    for piece in pieces:
        right, _ = piece.line.quick(few, piece.computed, rtol)
        if right.all():
            findings.append(_judge_one(piece, few, many, rtol)[0])
        elif not piece.line.direction.apart:
            rest.append(piece)
        else:
            if right.any():
                findings.append(_judge_one(piece.of(right.nonzero().flatten()), few, many, rtol)[0])
            zeros = (~right & (piece.computed == 0)).nonzero().flatten()
            if len(zeros) > 1 and piece.line.of(zeros).independent():
                findings.append(_independent(len(zeros), piece.names(int(zeros[0]))))
                right[zeros] = True
            if not right.all():
                rest += piece.of((~right).nonzero().flatten()).each()
    for piece in sorted(rest, key=lambda piece: -piece.error(few, rtol)):
        finding, _ = _judge_one(piece, few, many, rtol)
        if finding.verdict == "wrong":
            return finding
        findings.append(finding)
    undecided = [finding for finding in findings if finding.verdict == "cannot tell"]
    worst = undecided[0] if undecided else max(findings, key=lambda finding: finding.error)
    return worst._replace(resolution=max(finding.resolution for finding in findings))


def _independent(count: int, place: str) -> Finding:
    return Finding("right", 0.0, f"the values do not depend on {count} elements, such as {place}")


def _relative(computed: Tensor, derivative: Tensor) -> Tensor:
    """The relative error: 0 where both are 0, infinite where either is NaN."""
    size = torch.maximum(computed.abs(), derivative.abs())
    error = torch.where(computed == derivative, 0.0, (computed - derivative).abs() / size)
    return error.nan_to_num(math.inf, math.inf)


def _judge_one(piece: _Evidence, few: Tensor, many: Tensor, rtol: float) -> tuple[Finding, Tensor]:
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
    tiny = computed.abs() <= _REORDERED / _ROUNDING * floor
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
        finding = _finding("right", piece, found.derivative, error, int(error.argmax()))
        return finding._replace(resolution=float(resolution.max())), right.nonzero()[:0]
    undecided = (~right).nonzero().flatten()
    return _undecided(piece, found, fades, int(undecided[0])), undecided


def _compared(piece: _Evidence, found: Slopes, rtol: float) -> tuple[Tensor, Tensor, Tensor]:
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
    piece: _Evidence, found: Slopes, rtol: float
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


def _length(piece: _Evidence, cell: int) -> float:
    """The length of a step; a derivative is per step of length 1."""
    elements = piece.line.direction.elements
    return 1.0 if elements is None else piece.line.direction.v[elements[cell]].item()


def _finding(
    verdict: Verdict, piece: _Evidence, derivative: Tensor, error: Tensor, cell: int
) -> Finding:
    length = _length(piece, cell)
    ours, theirs = piece.computed[cell].item() / length, derivative[cell].item() / length
    detail = (
        f"largest relative error {error[cell].item():.1e} at {piece.names(cell)}: {ours:.6g}, "
        f"numerically {theirs:.6g}"
    )
    return Finding(verdict, error[cell].item(), detail)


def _undecided(piece: _Evidence, found: Slopes, fades: Tensor, cell: int) -> Finding:
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
