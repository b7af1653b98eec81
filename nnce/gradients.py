"""Are the derivatives of a Function right? And how far is a number from the true one?

`check_gradients` is for a `torch.autograd.Function` of your own. It does not say "right" where it
cannot know: in saturation a numerical derivative has no digits, and `torch.autograd.gradcheck`,
with its absolute tolerance, lets a backward of all zeros pass there.
"""

import copy
import math
import re
import warnings
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

Verdict = Literal["right", "wrong", "cannot tell", "not there"]

# Where not every element is probed, so many directions through all of them are tried besides.
_DENSE_DIRECTIONS = 4
# Numerical derivatives come from steps that shrink from 64 times the size of x to a unit in its
# last place, each a quarter of the one before.
_STEPS = 30
_LARGEST_STEP = 64.0
_EPS = torch.finfo(torch.float64).eps
# A value counts as right to so many units in the last place. Worse ones are seen by their scatter.
_VALUE_ULPS = 8
# A value may move in jumps, as where a function computes in float32; up to this share of it.
_COARSEST_JUMP = 2.0**-7
# A derivative is wrong only if the numerical one is certain to three digits: two or three estimates
# may agree by accident.
_CERTAIN = 1e-3
# What PyTorch says where an operation has no second derivative, and where a forward mode is none.
_NO_DERIVATIVE = re.compile("derivative for aten::|no second derivatives")
_NO_FORWARD_MODE = ("You must implement the jvp function", "Trying to use forward AD with")


class Finding(NamedTuple):
    """What is known of one derivative."""

    verdict: Verdict
    """"not there" is said of a forward mode that the Function does not have, and of second
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
            and self.forward_mode.verdict in ("right", "not there")
            and self.second.verdict in ("right", "not there")
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
    if not (elements == "all" or (type(elements) is int and elements >= 1)):
        raise ValueError(f"expected elements 'all' or a number of at least 1, got {elements!r}")
    if not 0 < rtol < 1:
        raise ValueError(f"expected rtol between 0 and 1, got {rtol}")
    wide = [t.detach().double() if _is_real(t) else t for t in inputs]
    places = [i for i, t in enumerate(wide) if _is_real(t)]
    if not places:
        kinds = ", ".join(str(t.dtype) if isinstance(t, Tensor) else repr(t) for t in inputs)
        got = kinds or "no inputs"
        raise TypeError(f"expected a floating-point tensor to differentiate by, got {got}")
    if not any(wide[i].numel() for i in places):
        raise ValueError("expected something to differentiate by, got empty tensors")
    ours = _Function(function, wide, places, "the function")
    value = ours.value()
    if not _same(value, ours.value()):
        raise ValueError("expected a function that gives the same each time, got two outputs")
    draw = _Draw(seed)
    upstream = draw.like(value)
    try:
        first = ours.first(upstream)
        if reference is None:
            count = ours.x.numel() if elements == "all" else elements
            report = _by_differences(ours, value, first, upstream, draw, count, rtol)
        else:
            theirs = _Function(reference, wide, places, "the reference")
            report = _by_reference(ours, theirs, upstream, draw, rtol)
    except _Broken as error:
        raise ValueError(str(error)) from error
    wrong = {
        name: Finding("wrong", math.nan, detail)
        for name, detail in _differs_elsewhere(ours, value, first, upstream, rtol).items()
        if getattr(report, name).verdict != "wrong"
    }
    return report._replace(**wrong)


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are equal, or both NaN."""
    return a.shape == b.shape and bool(_alike(a, b).all())


def _alike(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


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

    def steps(self, device: torch.device) -> Tensor:
        """The steps of one derivative; drawn, since a period of the function may divide others."""
        largest = _LARGEST_STEP * (1 - float(torch.rand((), generator=self.generator)) / 2)
        return largest * 0.25 ** torch.arange(_STEPS, dtype=torch.float64, device=device)

    def some_of(self, indices: Tensor, count: int) -> Tensor:
        """So many of the indices."""
        chosen = torch.randperm(len(indices), generator=self.generator)[:count]
        return indices[chosen.to(indices.device)]


# --------------------------------------------------------------------- the function's derivatives


class _NotThere(Exception):
    """The function has no such derivative, and says so."""


class _Broken(Exception):
    """A derivative cannot be computed; the words say why."""


class _Function:
    """A function of all its differentiable inputs, laid out in one vector x."""

    def __init__(
        self, function: Callable[..., Tensor], inputs: list[Any], places: list[int], name: str
    ) -> None:
        self.function, self.inputs, self.places, self.name = function, inputs, places, name
        self.shapes = [inputs[i].shape for i in places]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.x = torch.cat([inputs[i].flatten() for i in places])

    def at(self, x: Tensor) -> "_Function":
        """The same function at another x."""
        moved = copy.copy(self)
        moved.x = x
        return moved

    def parts(self, x: Tensor) -> list[Tensor]:
        """The inputs that a vector like x is made of."""
        parts = x.split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def call(self, parts: Iterable[Tensor]) -> Tensor:
        """The output for these inputs, which the function may overwrite."""
        inputs = list(self.inputs)
        for i, part in zip(self.places, parts, strict=True):
            inputs[i] = part
        try:
            output = self.function(*inputs)
        except Exception as error:  # whatever the user's function raises
            raise ValueError(f"{self.name} failed in float64: {_sentence(error)}") from error
        if not _is_real(output):
            kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"expected {self.name} to return a floating-point tensor, got {kind}")
        return output.double()

    def value(self, arrange: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
        """The output, without a graph."""
        with torch.no_grad():
            return self.call(arrange(part) for part in self.parts(self.x)).clone()

    def first(
        self,
        upstream: Tensor,
        *,
        wanted: Container[int] | None = None,
        arrange: Callable[[Tensor], Tensor] = torch.clone,
    ) -> Tensor:
        """The gradient by x.

        Args:
            upstream: the gradient by the output.
            wanted: which inputs require grad, all if None; by the others it is 0.
            arrange: makes of a leaf what the function is handed.
        """
        leaves = self._leaves(wanted)
        output = self.call(arrange(leaf) for leaf in leaves)
        if not output.requires_grad:
            if wanted is None:
                raise ValueError(
                    f"the output of {self.name} does not depend on its floating-point inputs in a "
                    "way that autograd can follow"
                )
            return torch.zeros_like(self.x)
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = iter(self._differentiate(output, asked, upstream))
        return torch.cat(
            [
                (next(gradients) if leaf.requires_grad else torch.zeros_like(leaf)).flatten()
                for leaf in leaves
            ]
        )

    def second(
        self,
        upstream: Tensor,
        along: Tensor,
        arrange: Callable[[Tensor], Tensor] = torch.clone,
    ) -> tuple[Tensor, Tensor]:
        """The gradient of the slope along a direction, by x and by the upstream gradient."""
        leaves = self._leaves(None)
        upstream = upstream.clone().requires_grad_()
        output = self.call(arrange(leaf) for leaf in leaves)
        gradients = self._differentiate(output, leaves, arrange(upstream), create_graph=True)
        slope = (torch.cat([gradient.flatten() for gradient in gradients]) * along).sum()
        if not slope.requires_grad:  # the backward hides from autograd
            return torch.zeros_like(self.x), torch.zeros_like(upstream)
        if _refuses(slope):
            raise _NotThere("marked with @once_differentiable")
        try:
            *by_x, by_upstream = self._differentiate(slope, [*leaves, upstream], None)
        except _Broken as error:
            if _NO_DERIVATIVE.search(str(error)):  # an operation of PyTorch's has none, or ours
                raise _NotThere(str(error)) from error
            raise
        return torch.cat([gradient.flatten() for gradient in by_x]), by_upstream

    def tangent(self, along: Tensor, arrange: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
        """The derivative of the output along a direction, by `jvp`."""
        try:
            with warnings.catch_warnings(), fwAD.dual_level():
                # PyTorch's warning of itself: it scripts its own forward-mode decompositions.
                warnings.filterwarnings("ignore", message="`torch.jit.script")
                pairs = zip(self.parts(self.x), self.parts(along), strict=True)
                output = self.call(fwAD.make_dual(arrange(part), arrange(dx)) for part, dx in pairs)
                tangent = fwAD.unpack_dual(output).tangent
                return torch.zeros_like(output) if tangent is None else tangent.clone()
        except Exception as error:  # whatever the user's jvp raises
            cause = error.__cause__ or error
            if str(cause).startswith(_NO_FORWARD_MODE):
                raise _NotThere(_sentence(cause)) from error
            raise _Broken(f"the jvp of {self.name} failed: {_sentence(cause)}") from error

    def jacobian_along(self, along: Tensor) -> Tensor:
        """The same number by number, by backward."""
        leaves = self._leaves(None)
        output = self.call(leaf.clone() for leaf in leaves)
        slopes = []
        for row in torch.eye(output.numel(), dtype=output.dtype, device=output.device):
            gradients = self._differentiate(
                output, leaves, row.view(output.shape), retain_graph=True
            )
            slopes.append((torch.cat([g.flatten() for g in gradients]) * along).sum())
        return torch.stack(slopes).view(output.shape)

    def _leaves(self, wanted: Container[int] | None) -> list[Tensor]:
        return [
            part.clone().requires_grad_(wanted is None or i in wanted)
            for i, part in enumerate(self.parts(self.x))
        ]

    def _differentiate(
        self, output: Tensor, inputs: Sequence[Tensor], upstream: Tensor | None, **options: Any
    ) -> tuple[Tensor, ...]:
        try:
            return torch.autograd.grad(
                output, inputs, upstream, allow_unused=True, materialize_grads=True, **options
            )
        except Exception as error:  # whatever the user's backward raises
            raise _Broken(f"the backward of {self.name} failed: {_sentence(error)}") from error


def _refuses(tensor: Tensor) -> bool:
    """Whether there is a node in its graph that raises when it is differentiated.

    `once_differentiable` puts one there, with a way on to nowhere, so that a derivative by a chosen
    input would pass it by and be 0.
    """
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("::Error"):
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


# ------------------------------------------------------------------ other layouts, frozen inputs


def _strided(t: Tensor) -> Tensor:
    return torch.stack([t, t.detach()], dim=-1)[..., 0]


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t.clone()


_LAYOUTS = {"strided": _strided, "transposed": _transposed}


def _differs_elsewhere(
    ours: _Function, value: Tensor, first: Tensor, upstream: Tensor, rtol: float
) -> dict[str, str]:
    """What comes out otherwise in another layout or with frozen inputs, and how.

    Returns:
        A sentence by the name of the finding.
    """
    differs: dict[str, str] = {}

    def hold(name: str, got: Tensor, expected: Tensor, like: Tensor, sentence: str) -> None:
        # Another layout may be summed in another order.
        scale = torch.cat([expected, like]).nan_to_num(0.0, 0.0, 0.0).abs().max()
        rounding = 1e4 * _EPS * scale
        bound = rtol * torch.maximum(got.abs(), expected.abs()) + rounding
        if not (_alike(got, expected) | ((got - expected).abs() <= bound)).all():
            differs.setdefault(name, sentence)

    def hold_first(where: str, upstream: Tensor, expected: Tensor, **options: Any) -> None:
        before = upstream.clone()
        try:
            gradient = ours.first(upstream, **options)
        except _Broken as error:
            differs.setdefault("first", f"{where}, {error}")
            return
        if not _same(before, upstream):
            differs.setdefault("first", "the backward overwrites its upstream gradient")
        for i, (got, right) in enumerate(
            zip(gradient.split(ours.sizes), expected.split(ours.sizes), strict=True)
        ):
            if len(right) and i in options.get("wanted", range(len(ours.sizes))):
                hold("first", got, right, first, f"{where}, the gradient by input {i} is another")

    hold_first("at a second call", upstream, first)
    for name, arrange in _LAYOUTS.items():
        hold_first(f"under a {name} upstream gradient", arrange(upstream), first)
        try:
            again = ours.value(arrange)
        except (TypeError, ValueError):
            continue  # it refuses such inputs, and that is no wrong number
        if len(value.flatten()):
            values = value.flatten()
            hold("value", again.flatten(), values, values, f"for {name} inputs it is another")
        hold_first(f"for {name} inputs", upstream, first, arrange=arrange)
    along = _Draw(0).like(ours.x)

    def tangent(arrange: Callable[[Tensor], Tensor]) -> Tensor:
        return ours.tangent(along, arrange).flatten()

    def second(arrange: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([part.flatten() for part in ours.second(upstream, along, arrange)])

    for name, compute in (("forward_mode", tangent), ("second", second)):
        try:
            usual = compute(torch.clone)
            for layout, arrange in _LAYOUTS.items():
                hold(name, compute(arrange), usual, usual, f"in a {layout} layout it is another")
        except (_NotThere, _Broken, TypeError, ValueError):
            continue  # judged elsewhere, or it refuses such inputs
    even = torch.full((), 0.7, dtype=torch.float64, device=upstream.device).expand(upstream.shape)
    hold_first("under an expanded upstream gradient", even, ours.first(even.contiguous()))
    # Of either sign, and of any size: a backward that clips is not linear.
    for factor in (-1.0, 2.0**10, 2.0**-10):
        where = f"under {factor:g} times the upstream gradient"
        hold_first(where, factor * upstream, factor * first)
    everything = frozenset(range(len(ours.sizes)))
    alone = [frozenset({i}) for i in everything]
    for wanted in dict.fromkeys([*alone, *(everything - one for one in alone)]):
        if wanted not in (everything, frozenset()):
            others = ", ".join(str(i) for i in sorted(everything - wanted))
            hold_first(f"with input {others} frozen", upstream, first, wanted=wanted)
    return differs


# ------------------------------------------------------------------------- against a reference


def _by_reference(
    ours: _Function, theirs: _Function, upstream: Tensor, draw: _Draw, rtol: float
) -> Report:
    along = draw.like(ours.x)
    moved = [ours.x * (1 + 2 * _EPS * draw.like(ours.x).sign()) for _ in range(5)]

    def first(function: _Function) -> Tensor:
        return function.first(upstream)

    def second(function: _Function) -> Tensor:
        by_x, by_upstream = function.second(upstream, along)
        return torch.cat([by_x, by_upstream.flatten()])

    def forward_mode(function: _Function) -> Tensor:
        try:
            return function.tangent(along)
        except _NotThere:
            if function.name == ours.name:
                raise
            return function.jacobian_along(along)

    def compare(what: Callable[[_Function], Tensor]) -> Finding:
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
        value=compare(_Function.value),
        first=compare(first),
        forward_mode=_or_wrong(lambda: compare(forward_mode)),
        second=_or_not_there(lambda: compare(second)),
    )


def _or_not_there(find: Callable[[], Finding]) -> Finding:
    try:
        return find()
    except _NotThere as error:
        return Finding("not there", math.nan, str(error))


def _or_wrong(find: Callable[[], Finding]) -> Finding:
    """A jvp that raises is wrong; that there is none is no fault."""
    try:
        return _or_not_there(find)
    except _Broken as error:
        return Finding("wrong", math.inf, str(error))


def _compare(got: Tensor, expected: Tensor, noise: Tensor, rtol: float) -> Finding:
    """Element by element, relatively; equal infinities and two NaNs are equal."""
    if not len(got):
        return Finding("cannot tell", math.nan, "there is nothing to compare")
    error = torch.where(_alike(got, expected), 0.0, (got - expected).abs() / expected.abs())
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


class _Slopes(NamedTuple):
    """Numerical derivatives, one for each cell: a number, or an element of the function."""

    derivative: Tensor
    uncertainty: Tensor
    below: Tensor
    """The derivative from below, and likewise from above."""
    above: Tensor
    kinked: Tensor
    """Where those two differ however small the step."""
    zero: Tensor
    """Where the values show a derivative of exactly 0."""


class _Direction(NamedTuple):
    """A direction to probe along."""

    v: Tensor
    """As long as x is large, so that a step of 1 is of the size of x."""
    elements: Tensor | None
    """The elements of x that it moves, one for each cell; None for all of them."""


class _Evidence(NamedTuple):
    """Computed derivatives beside numerical ones."""

    computed: Tensor
    slopes: _Slopes
    direction: _Direction


def _by_differences(
    ours: _Function,
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
        (direction, probe.slopes(f, direction, upstream))
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
                probe.slopes(gradient_at, direction, weights),
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
        second=_or_not_there(second),
    )


def _is_element_by_element(ours: _Function, value: Tensor, draw: _Draw) -> bool:
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
                if not _same(moved.flatten()[~chosen], value.flatten()[~chosen]):
                    return False
    return True


class _Probe:
    """Takes numerical derivatives of a function's values, in cells.

    With one cell, the weighted values are added up; with a cell for each element, element by
    element over all that have one (the output, or the gradients by each of the inputs).
    """

    def __init__(self, ours: _Function, cells: int, draw: _Draw, rtol: float) -> None:
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

    def slopes(
        self, f: Callable[[Tensor], Tensor], direction: _Direction, weights: Tensor
    ) -> _Slopes:
        """The derivatives along a direction of what f gives, weighted and in cells."""
        x, (v, elements) = self._x, direction
        steps = self._draw.steps(x.device)
        weights = weights.reshape(-1, self._cells)
        nothing = torch.full_like(weights, math.nan)

        def values(x: Tensor) -> Tensor:
            try:
                return f(x).reshape(weights.shape)
            except (TypeError, ValueError, _Broken):  # outside of the function's domain
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
        return _extrapolate(self._rtol, steps.unsqueeze(1), *table)


def _extrapolate(
    rtol: float,
    step: Tensor,
    rise_up: Tensor,
    rise_down: Tensor,
    up: Tensor,
    down: Tensor,
    size: Tensor,
) -> _Slopes:
    """Derivatives from differences over steps that shrink by 4, cell by cell.

    Richardson's extrapolation makes an estimate of each two successive steps. How uncertain it is
    is seen from the two estimates after it, from how much the estimates at still smaller steps
    scatter, and from the rounding of the values. Then from the smallest step on, as long as all
    that is seen fits together, the most certain estimate is taken: a derivative is what there is
    at small steps, and large ones may reach beyond a kink or a pole.

    Args:
        rtol: how much the derivatives from below and above may differ.
        step: [steps, 1].
        rise_up: f(x + step) − f(x), [steps, cells], and likewise rise_down, f(x) − f(x − step).
        up, down: the steps really taken, [steps, cells].
        size: of f, [steps, cells].
    """
    rise = rise_up + rise_down
    slope = rise / (up + down)
    bend = rise_up / up - rise_down / down
    slope, bend = (torch.where((up > 0) & (down > 0), t, math.nan) for t in (slope, bend))
    estimate = (16 * slope[1:] - slope[:-1]) / 15
    # Of a smooth function the bend shrinks with the step, and this with its third power.
    kink = (4 * bend[1:] - bend[:-1]).abs() / 3

    jumps = torch.stack([rise_up.abs(), rise_down.abs()])
    jump = torch.where(jumps > 0, jumps, math.inf).amin((0, 1))
    jump = torch.minimum(jump, _COARSEST_JUMP * size.nan_to_num(nan=math.inf).amin(0))
    tiny = torch.finfo(torch.float64).tiny
    rounding = (_VALUE_ULPS * _EPS * size + 4 * jump + tiny) / step
    rounding, step = rounding[1:], step[1:]

    gaps = (estimate[:-1] - estimate[1:]).abs()
    # Noise grows as 1 / step: at each step, what the smaller ones show of it.
    noise = (gaps * step[:-1]).nan_to_num(0.0, 0.0, 0.0).flip(0).cummax(0).values.flip(0)
    noise = noise[1:] / step[:-2] + rounding[:-2]
    uncertainty = torch.maximum(gaps[:-1], (estimate[:-2] - estimate[2:]).abs()) + noise

    cells = estimate.shape[1]
    low, high = (step.new_full((cells,), side * math.inf) for side in (-1, 1))
    best, best_row = step.new_full((cells,), math.inf), torch.full_like(low, -1, dtype=torch.long)
    fits, begun = (torch.full_like(low, value, dtype=torch.bool) for value in (True, False))
    for row in range(len(uncertainty) - 1, -1, -1):
        middle, width = estimate[row], uncertainty[row]
        seen = middle.isfinite() & width.isfinite()
        # The smallest steps may be none at all, after rounding.
        fits &= torch.where(seen, (middle + width >= low) & (middle - width <= high), ~begun)
        begun |= seen
        low = torch.where(fits & seen, torch.maximum(low, middle - width), low)
        high = torch.where(fits & seen, torch.minimum(high, middle + width), high)
        better = fits & seen & (width < best)
        best = torch.where(better, width, best)
        best_row = torch.where(better, row, best_row)

    def at_best(table: Tensor) -> Tensor:
        return table.gather(0, best_row.clamp(min=0).unsqueeze(0)).squeeze(0)

    above, below = (rise_up / up)[1:], (rise_down / down)[1:]
    steep = torch.maximum(at_best(above).abs(), at_best(below).abs())
    rows = torch.arange(len(size), device=step.device).unsqueeze(1)
    # The bend of a kink is the same at every step that is free of noise.
    telling = (rows[: len(noise)] >= best_row) & (16 * noise <= rtol * steep)
    kink = kink[: len(noise)]
    least = torch.where(telling, kink, math.inf).amin(0)
    most = torch.where(telling, kink, 0.0).amax(0)
    kinked = (telling.sum(0) > 1) & (least > rtol * steep) & (least >= most / 2)
    resolved = (up > 0) & (down > 0)
    flat = ((rise.abs() <= _VALUE_ULPS * _EPS * size) | ~resolved).all(0)
    nothing = ((size == 0) | ~resolved | (rows <= best_row)).all(0)
    known = best_row >= 0
    return _Slopes(
        derivative=torch.where(known, at_best(estimate), math.nan),
        uncertainty=best,
        below=at_best(below),
        above=at_best(above),
        kinked=known & kinked,
        zero=known & (flat | nothing),
    )


def _judge(evidence: Sequence[_Evidence], rtol: float) -> Finding:
    """The verdict over all evidence: wrong where one is, else cannot tell where one cannot."""
    findings = [_judge_one(*piece, rtol) for piece in evidence]
    for verdict in ("wrong", "cannot tell"):
        for finding in findings:
            if finding.verdict == verdict:
                return finding
    return max(findings, key=lambda finding: finding.error)


def _judge_one(computed: Tensor, slopes: _Slopes, direction: _Direction, rtol: float) -> Finding:
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
