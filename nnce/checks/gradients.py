"""Whether the derivatives of a function are right.

`check_gradients` tests a custom `torch.autograd.Function`. It does not report "right" without
evidence: in saturation a numerical derivative has no correct digits, and there
`torch.autograd.gradcheck`, with its absolute tolerance, accepts a backward of all zeros.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from nnce.checks._derivatives import Broken, Derivatives, Unsupported, element
from nnce.checks._differences import ByDifferences
from nnce.checks._draw import Draw
from nnce.checks._evidence import REORDERED, ROUNDING
from nnce.checks._numerical import EPS
from nnce.checks._report import Finding, Report, Verdict, or_unsupported, or_wrong
from nnce.checks._resolution import Resolution
from nnce.checks._subject import Subject, alike
from nnce.checks._variations import Setting, Variation, variations

# Sums in low precision differ by a few units of their largest terms.
_FEW = 4
# The unit of bfloat16. In float8 a derivative has no digits to compare.
_COARSEST = 2.0**-7


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
    found in real graphs: inputs and upstream gradients that are expanded, strided, padded, or at an
    offset in memory; upstream gradients that contain zeros, or are very small or large; one input
    frozen, or all others, or two inputs the same tensor; inputs that were changed in place; two
    calls before their backward passes; and a graph that is differentiated twice.

    Without a reference, first and second derivatives are compared element by element with central
    differences over several steps, which also show how many digits are certain:

    - right: numerical and computed derivative agree within rtol, and the numerical one is certain
      to rtol. A computed 0 is right on a plateau that ends in a kink, or in a jump of at least
      1/128 of the value (a smaller one may be rounding), and where the slopes nearby shrink to 0 as
      a power of the distance.
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
            not differentiable with respect to its inputs; it computes in float8; its backward
            fails; or an option is invalid.

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
    draw = Draw(seed)
    try:
        if ours.unit > _COARSEST:
            raise ValueError(f"expected a function in float16 or more precise, got {ours.dtype}")
        upstream = ours.exact(draw.like(value))
        first = ours.first(upstream)
        if reference is None:
            count = ours.x.numel() if elements == "all" else int(elements)
            finder = ByDifferences(ours, value, first, upstream, draw, count, rtol)
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


# ---------------------------------------------------------------------- under other conditions


def _along_random(
    ours: Derivatives, upstream: Tensor, draw: Draw
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
        got, expected = got.detach(), expected.detach()
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
    if torch.equal(got, expected) or torch.allclose(got, expected, ROUNDING, atol=0.0):
        return ""
    like = [expected, usual.get(variation.of, start.second)]
    # A different layout may be summed in a different order.
    largest = max(float(t.nan_to_num(0.0, 0.0, 0.0).abs().max()) for t in like if t is not None)
    bound = rtol * torch.maximum(got.abs(), expected.abs()) + REORDERED * largest
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
    n, m = len(ours.x), shape.numel()

    def output(at: int) -> str:
        return element("output", at % m, shape)

    def first(at: int) -> str:
        return ours.place(at % n)

    def second(at: int) -> str:
        return ours.place(at) if at < n else element("upstream gradient", at - n, shape)

    return {"value": output, "forward_mode": output, "first": first}.get(of, second)


# ------------------------------------------------------------------------- against a reference


def _by_reference(
    ours: Derivatives, theirs: Derivatives, upstream: Tensor, draw: Draw, rtol: float
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
        forward_mode=or_wrong(ours, lambda: compare("forward_mode", forward_mode)),
        second=or_unsupported(
            lambda: compare("second", lambda function: function.second_as_one(upstream, along))
        ),
    )


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
