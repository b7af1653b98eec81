"""Are the derivatives of a Function right? And how far is a number from the true one?

`check_gradients` is for a `torch.autograd.Function` of your own. It does not say "right" where it
cannot know: in saturation a numerical derivative has no digits, and `torch.autograd.gradcheck`,
with its absolute tolerance, lets a backward of all zeros pass there.
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Verdict = Literal["right", "wrong", "cannot tell", "not there"]

# Directions: some through all inputs at once, the others along one element each, without which a
# small derivative would hide behind the large ones.
_DENSE_DIRECTIONS = 4
_SINGLE_DIRECTIONS = 64


class Finding(NamedTuple):
    """What is known of one derivative."""

    verdict: Verdict
    """"not there" is said of a forward mode that the Function does not have."""
    error: float
    """The largest relative error seen, where there was one to see; else NaN."""
    detail: str
    """Where that was, or why nothing can be told."""


class Report(NamedTuple):
    """What `check_gradients` found."""

    value: Finding
    """The output itself; without a reference there is nothing to hold it to."""
    first: Finding
    """First derivatives by backward."""
    forward_mode: Finding
    """First derivatives by `jvp`."""
    second: Finding
    """Second derivatives, by backward through the backward."""

    @property
    def right(self) -> bool:
        """First and second derivatives are right everywhere, and nothing is wrong."""
        return (
            self.first.verdict == self.second.verdict == "right"
            and self.value.verdict != "wrong"
            and self.forward_mode.verdict in ("right", "not there")
        )

    def __str__(self) -> str:
        """A line for each."""
        return "\n".join(
            f"{name.replace('_', ' '):<13}{found.verdict:<12}{found.detail}"
            for name, found in self._asdict().items()
        )


def check_gradients(
    function: Callable[..., Tensor],
    *inputs: Any,
    reference: Callable[..., Tensor] | None = None,
    rtol: float = 1e-5,
    seed: int = 0,
) -> Report:
    """Hold a function's derivatives to numerical ones, or to those of a reference.

    Everything is computed in float64, under a random upstream gradient. Without a reference, first
    and second derivatives are compared with extrapolated central differences along random
    directions and along single elements, which say themselves how many digits they have: where too
    few are left to see a relative error of rtol, the verdict is "cannot tell", never "right". With
    a reference, value and derivatives are compared element by element, at any input.

    Args:
        function: takes the inputs and returns a tensor; a Function's `apply`, for instance.
        inputs: floating-point tensors are differentiated by; all else is handed on as it is.
        reference: computes the same by means that are trusted.
        rtol: the relative error from which a derivative is wrong. There is no absolute one.
        seed: fixes directions and upstream gradients.

    Returns:
        A finding each for the value, the first derivatives, those in forward mode, and the second.

    Raises:
        TypeError: no input is a floating-point tensor, or an output is not a real one.
        ValueError: the inputs are empty, the output does not depend on them differentiably, or a
            derivative cannot be computed; the sentence says which and why.
    """
    wide = [t.detach().double() if _is_real(t) else t for t in inputs]
    places = [i for i, t in enumerate(wide) if _is_real(t)]
    if not places:
        kinds = ", ".join(str(t.dtype) if isinstance(t, Tensor) else repr(t) for t in inputs)
        raise TypeError(f"expected a floating-point tensor to differentiate by, got {kinds}")
    if not any(wide[i].numel() for i in places):
        raise ValueError("expected something to differentiate by, got empty tensors")
    generator = torch.Generator().manual_seed(seed)
    ours = _Derivatives(function, wide, places, "the function")
    upstream = _random(ours.value(ours.x), generator)
    directions = _directions(ours.x, generator)

    if reference is not None:
        theirs = _Derivatives(reference, wide, places, "the reference")
        along = directions[0]

        def compare_tangents(got: Tensor) -> Finding:
            return _compare(got, theirs.forward_mode(along, needed=False), rtol)

        return Report(
            value=_compare(ours.value(ours.x), theirs.value(ours.x), rtol),
            first=_compare(ours.first(ours.x, upstream), theirs.first(ours.x, upstream), rtol),
            forward_mode=_forward_mode(ours, compare_tangents, along),
            second=_compare(ours.second(upstream, along), theirs.second(upstream, along), rtol),
        )

    along = _random(ours.x, generator)
    first, second = ours.first(ours.x, upstream), ours.second(upstream, along)

    def value(x: Tensor) -> float:
        return float((ours.value(x) * upstream).sum())

    def slope(x: Tensor) -> float:
        return float((ours.first(x, upstream) * along).sum())

    numerical = [_differences(value, ours.x, v) for v in directions]
    return Report(
        value=Finding("cannot tell", float("nan"), "there is no reference to hold it to"),
        first=_judge([float((first * v).sum()) for v in directions], numerical, rtol),
        forward_mode=_forward_mode(
            ours,
            lambda got: _judge([float((got * upstream).sum())], numerical[:1], rtol),
            directions[0],
        ),
        second=_judge(
            [float((second * v).sum()) for v in directions],
            [_differences(slope, ours.x, v) for v in directions],
            rtol,
        ),
    )


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)


def _directions(x: Tensor, generator: torch.Generator) -> list[Tensor]:
    dense = [_random(x, generator) for _ in range(_DENSE_DIRECTIONS)]
    chosen = torch.randperm(x.numel(), generator=generator)[:_SINGLE_DIRECTIONS].sort().values
    single = [torch.zeros_like(x).index_fill(0, i.to(x.device), 1.0) for i in chosen]
    return dense + single


class _Derivatives:
    """A function of all its differentiable inputs, laid out in one vector x."""

    def __init__(
        self, function: Callable[..., Tensor], inputs: list[Any], places: list[int], name: str
    ) -> None:
        self.function, self.inputs, self.places, self.name = function, inputs, places, name
        self.x = torch.cat([inputs[i].flatten() for i in places])

    def _call(self, x: Tensor) -> Tensor:
        inputs = list(self.inputs)
        sizes = [inputs[i].numel() for i in self.places]
        for i, part in zip(self.places, x.split(sizes), strict=True):
            inputs[i] = part.view(inputs[i].shape)
        output = self.function(*inputs)
        if not _is_real(output):
            kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"expected {self.name} to return a floating-point tensor, got {kind}")
        return output

    def value(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._call(x).detach()

    def _gradient(self, output: Tensor, x: Tensor, upstream: Tensor, **options: Any) -> Tensor:
        try:
            (gradient,) = torch.autograd.grad(output, x, upstream, **options)
        except RuntimeError as error:
            raise ValueError(f"the backward of {self.name} failed: {error}") from error
        return gradient

    def _output(self, x: Tensor) -> Tensor:
        output = self._call(x)
        if not output.requires_grad:
            raise ValueError(
                f"the output of {self.name} does not depend on its floating-point inputs in a way "
                "that autograd can follow"
            )
        return output

    def first(self, x: Tensor, upstream: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return self._gradient(self._output(x), x, upstream)

    def second(self, upstream: Tensor, along: Tensor) -> Tensor:
        """The gradient of the slope along a direction."""
        x = self.x.detach().requires_grad_()
        gradient = self._gradient(self._output(x), x, upstream, create_graph=True)
        if (
            not gradient.requires_grad
        ):  # the function is linear, or its backward hides from autograd
            return torch.zeros_like(x)
        return self._gradient(gradient, x, along, materialize_grads=True, allow_unused=True)

    def forward_mode(self, along: Tensor, *, needed: bool) -> Tensor:
        try:
            with warnings.catch_warnings():
                # PyTorch's warning of itself: it scripts its own forward-mode decompositions.
                warnings.filterwarnings("ignore", message="`torch.jit.script")
                tangent: Tensor = torch.func.jvp(self._call, (self.x,), (along,))[1]
        except (RuntimeError, NotImplementedError) as error:
            if needed or "jvp" not in str(error):
                raise
            # The reference has no forward mode: its Jacobian, row by row, has the same numbers.
            x = self.x.detach().requires_grad_()
            output = self._output(x)
            rows = torch.eye(output.numel(), dtype=x.dtype, device=x.device)
            slopes = [
                (self._gradient(output, x, row.view(output.shape), retain_graph=True) * along).sum()
                for row in rows
            ]
            return torch.stack(slopes).view(output.shape)
        return tangent


def _forward_mode(ours: _Derivatives, judge: Callable[[Tensor], Finding], along: Tensor) -> Finding:
    try:
        got = ours.forward_mode(along, needed=True)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        return Finding("not there", float("nan"), f"no forward mode: {reason}")
    return judge(got)


# ------------------------------------------------------------------------------- the comparisons


def _compare(got: Tensor, expected: Tensor, rtol: float) -> Finding:
    """Element by element, relatively; equal infinities and two NaNs are equal."""
    if got.shape != expected.shape:
        return Finding(
            "wrong",
            float("inf"),
            f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}",
        )
    if got.numel() == 0:
        return Finding("cannot tell", float("nan"), "there is nothing to compare")
    same = (got == expected) | (got.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (got - expected).abs() / expected.abs())
    error = error.nan_to_num(nan=float("inf"), posinf=float("inf")).flatten()
    worst = int(error.argmax())
    where = (
        f"largest relative error {error[worst]:.1e}, at element {worst}: "
        f"{got.flatten()[worst]:.6g}, expected {expected.flatten()[worst]:.6g}"
    )
    return Finding("right" if error[worst] <= rtol else "wrong", float(error[worst]), where)


def _judge(got: list[float], numerical: list[tuple[float, float]], rtol: float) -> Finding:
    """Against numerical derivatives, each with a bound of its own error."""
    worst, blind = Finding("right", 0.0, "nothing to see"), None
    for ours, (theirs, uncertainty) in zip(got, numerical, strict=True):
        error = abs(ours - theirs)
        size = max(abs(ours), abs(theirs))
        # Not finite counts as no digits, unless only ours is at fault.
        if not uncertainty < rtol * size and not (error > uncertainty and error > rtol * size):
            blind = blind or Finding(
                "cannot tell",
                float("nan"),
                f"the numerical derivative {theirs:.2g} is uncertain by {uncertainty:.2g}; "
                f"computed was {ours:.2g}",
            )
            continue
        relative = error / size if size else 0.0
        if not relative <= worst.error or worst.detail == "nothing to see":
            worst = Finding(
                "right" if error <= rtol * size else "wrong",
                relative,
                f"largest relative error {relative:.1e}: {ours:.6g}, numerically {theirs:.6g}",
            )
    return blind if blind is not None and worst.verdict == "right" else worst


def _differences(
    value: Callable[[Tensor], float], x: Tensor, direction: Tensor
) -> tuple[float, float]:
    """The derivative of value along a direction, and a bound of its error.

    Ridders' method: central differences of halved steps, extrapolated to step 0. The bound is the
    disagreement of neighbours in the table, or what rounding does to the differences if that is
    more. Source: C. Ridders, Advances in Engineering Software 4 (1982) 75–76.
    """
    scale = float(direction.abs().max())
    step = 0.25 / scale
    best, bound = float("nan"), float("inf")
    previous: list[float] = []
    for _ in range(8):
        above, below = value(x + step * direction), value(x - step * direction)
        row = [(above - below) / (2 * step)]
        # Values are right to a few units in the last place, their arguments to half a unit.
        size = max(abs(above), abs(below)) + float((x * direction).abs().max()) / scale * abs(
            row[0]
        )
        rounding = 8 * torch.finfo(torch.float64).eps * size / step
        for k, before in enumerate(previous, start=1):
            row.append(row[-1] + (row[-1] - before) / (4**k - 1))
            disagreement = max(abs(row[-1] - row[-2]), abs(row[-1] - before))
            if disagreement + rounding < bound:
                best, bound = row[-1], disagreement + rounding
        previous = row
        step /= 2
    return best, bound


def ulp_distance(value: Tensor, exact: Tensor) -> Tensor:
    """|value − exact| in units in the last place that `exact` has in the dtype of `value`.

    Below the smallest normal number the unit is that of the subnormal numbers. Equal infinities are
    0 apart, and so are two NaNs; a NaN beside a number is infinitely far from it.

    Args:
        value: computed, of any floating-point dtype.
        exact: the truth in float64, of value's shape.

    Returns:
        float64, value's shape, at least 0.
    """
    wide = value.double()
    distance = (wide - exact).abs() / ulp(exact, value.dtype)
    same = (wide == exact) | (wide.isnan() & exact.isnan())
    return torch.where(same, 0.0, distance).nan_to_num(nan=float("inf"), posinf=float("inf"))


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place, in dtype, at the place of `exact` (float64); float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact).exponent - 1
    binade = torch.ldexp(torch.ones_like(exact), exponent)
    return torch.where(exact == 0, 0.0, binade).clamp(min=info.smallest_normal) * info.eps
