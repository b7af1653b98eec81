"""The derivatives that a function computes: backward, double backward and forward mode."""

import functools
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from nnce.checks._subject import Subject, sentence
from nnce.checks._torch_private import (
    NO_DERIVATIVE,
    NO_FORWARD_MODE,
    narrowest,
    operators_without_tangents,
    refuses_derivative,
    version,
)

# A gradient smaller than this is 0 to within rounding.
_NOISE = 2.0**-40
# A relative step over which most half-precision numbers change.
_COARSE_STEP = 0.0137
Arrange = Callable[[Tensor], Tensor]
"""Copies a tensor into one of the same shape, possibly of a different layout."""


class Unsupported(Exception):
    """The function does not support this derivative, and raises an error that says so."""


class Broken(Exception):
    """A derivative cannot be computed; the message says why."""


def element(of: str, at: int, shape: torch.Size) -> str:
    """The name of a tensor element, given its flat index: "output, element (0, 2)"."""
    index = torch.unravel_index(torch.tensor(at), shape) if shape else ()
    places = ", ".join(str(int(i)) for i in index)
    return f"{of}, element ({places})" if shape else of


class Recorded(NamedTuple):
    """A call recorded with its autograd graph."""

    leaves: list[Tensor]
    output: Tensor


def _keeps_changing(values: Tensor) -> bool:
    """Whether an element changes more than once over the rows; crossing a kink changes it once."""
    return bool(((values[1:] != values[:-1]).sum(0) > 1).any())


class Derivatives:
    """The derivatives of a subject with respect to all of its inputs, laid out in one vector x."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.shapes = [t.shape for t in subject.inputs]
        self.sizes = [t.numel() for t in subject.inputs]
        self.x = torch.cat([t.flatten() for t in subject.inputs])

    def at(self, x: Tensor) -> "Derivatives":
        """The derivatives of the same function at a different x."""
        moved = object.__new__(Derivatives)
        moved.subject, moved.shapes, moved.sizes, moved.x = self.subject, self.shapes, self.sizes, x
        return moved

    @property
    def unit(self) -> float:
        """The relative precision of `dtype`."""
        return torch.finfo(self.dtype).eps

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The least precise dtype that the function computes in, forward or backward.

        Either PyTorch sees it convert numbers to that dtype, or its values form a staircase: all of
        them are half-precision numbers, or they do not change over a step that is small in float32
        but change over larger ones.
        """
        if self._narrowest != torch.float64:
            return self._narrowest
        # With an upstream gradient of ones, the gradient of a normalization is rounding noise.
        value, generator = self.value(), torch.Generator().manual_seed(0)
        upstream = 2.0 ** torch.randint(3, value.shape, generator=generator).to(value)
        return (
            self._rounded_to(Derivatives.value)
            or self._rounded_to(lambda ours: ours.first(upstream))
            or torch.float64
        )

    def _rounded_to(self, compute: Callable[["Derivatives"], Tensor]) -> torch.dtype | None:
        """The dtype to which the computed values are rounded, as seen in their changes."""

        def moved(step: float | Tensor, *numbers: int) -> Tensor:
            return torch.stack([compute(self.at(self.x * (1 + step * k))) for k in numbers])

        first, second = values = moved(_COARSE_STEP, 1, 2)
        if values.abs().max() < _NOISE or torch.equal(first, second):
            return None
        halves = (torch.bfloat16, torch.float16)
        exact = [half for half in halves if torch.equal(values.to(half).to(values), values)]
        if exact and _keeps_changing(moved(_COARSE_STEP, *range(1, 7))):
            return exact[0]
        # The larger an element, the larger its step, so that the order of elements does not change.
        rank = self.x.abs().argsort().argsort()
        share = 0.5 + 0.5 * rank.to(self.x) / len(rank)
        small, large = 2.0**-39 * share, 2.0**-11 * share
        rounded = torch.equal(*moved(small, 0, 1)) and _keeps_changing(moved(large, *range(6)))
        return torch.float32 if rounded else None

    @functools.cached_property
    def _narrowest(self) -> torch.dtype:
        """The least precise dtype that PyTorch sees forward or backward convert numbers to."""
        return narrowest(lambda: self.first(torch.ones_like(self.value())))

    def exact(self, drawn: Tensor) -> Tensor:
        """Round random numbers to eight bits if the values are computed in low precision.

        Otherwise the function would round them, a constant error that scatter does not show.
        """
        return drawn.bfloat16().to(drawn) if self._converts else drawn

    @functools.cached_property
    def _converts(self) -> bool:
        """Whether the forward converts numbers to low precision."""
        return self._narrowest != torch.float64 and narrowest(self.value) != torch.float64

    def parts(self, x: Tensor) -> list[Tensor]:
        """Split a vector like x into tensors shaped like the inputs."""
        if len(self.shapes) == 1:
            return [x.reshape(self.shapes[0])]
        parts = x.split(self.sizes)
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def place(self, at: int) -> str:
        """The name of an element of x: "input 1, element (0, 2)"."""
        i = 0
        while at >= self.sizes[i]:
            at -= self.sizes[i]
            i += 1
        return element(f"input {self.subject.places[i]}", at, self.shapes[i])

    def call(self, parts: Iterable[Tensor]) -> Tensor:
        """The output for these inputs, which the function may overwrite."""
        return self.subject.call(list(parts)).double()

    def value(self, arrange: Arrange = torch.clone) -> Tensor:
        """The output, without a graph."""
        with torch.no_grad():
            return self.call(arrange(part) for part in self.parts(self.x)).clone()

    def record(
        self,
        *,
        wanted: Container[int] | None = None,
        arrange: Arrange = torch.clone,
        shared: tuple[int, int] | None = None,
    ) -> Recorded:
        """Call the function with a graph.

        Args:
            wanted: which inputs require a gradient (default: all).
            arrange: applied to each leaf before it is passed to the function.
            shared: two inputs; the first is also passed in place of the second.
        """
        leaves = [
            part.clone().requires_grad_(wanted is None or i in wanted)
            for i, part in enumerate(self.parts(self.x))
        ]
        passed = [arrange(leaf) for leaf in leaves]
        if shared:
            passed[shared[1]] = passed[shared[0]]
        return Recorded(leaves, self.call(passed))

    def pull(self, recorded: Recorded, upstream: Tensor, **options: Any) -> Tensor:
        """The gradient with respect to x; 0 for inputs that do not require a gradient."""
        leaves, output = recorded
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        if not output.requires_grad:
            return torch.zeros_like(self.x)
        return self._as_one(leaves, self._differentiate(output, wanted, upstream, **options))

    @staticmethod
    def _as_one(leaves: Sequence[Tensor], gradients: Iterable[Tensor]) -> Tensor:
        """Gradients as a vector like x; 0 for leaves that do not require one."""
        found = iter(gradients)
        each = (next(found) if leaf.requires_grad else torch.zeros_like(leaf) for leaf in leaves)
        return torch.cat([gradient.flatten() for gradient in each])

    def pull_together(
        self, recorded: Recorded, other: Recorded, upstream: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of two calls by one backward, which must not share memory."""
        leaves = [*recorded.leaves, *other.leaves]
        outputs = [recorded.output, other.output]
        found = self._differentiate(outputs, leaves, [upstream, upstream])
        n = len(recorded.leaves)
        return self._as_one(recorded.leaves, found[:n]), self._as_one(other.leaves, found[n:])

    def first(self, upstream: Tensor, **options: Any) -> Tensor:
        """The gradient with respect to x, from a new call; options as in `record`."""
        return self.pull(self.record(**options), upstream)

    def second(
        self,
        upstream: Tensor,
        along: Tensor,
        arrange: Arrange = torch.clone,
        times: int = 1,
        wanted: Container[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The gradient of the slope along a direction, with respect to x and upstream gradient.

        Args:
            upstream: the gradient with respect to the output.
            along: the direction, a vector like x.
            arrange: applied to the inputs and the upstream gradient.
            times: how often to differentiate the same graph; the last result is returned.
            wanted: which inputs require a gradient (default: all); it is 0 for the others.
        """
        every, output = self.record(arrange=arrange, wanted=wanted)
        leaves = [leaf for leaf in every if leaf.requires_grad]
        upstream = upstream.clone().requires_grad_()
        if not output.requires_grad:
            return torch.zeros_like(self.x), torch.zeros_like(upstream)
        gradients = self._differentiate(output, leaves, arrange(upstream), create_graph=True)
        roots = [gradient for gradient in gradients if gradient.requires_grad]
        if not roots:  # autograd does not see the backward
            return torch.zeros_like(self.x), torch.zeros_like(upstream)
        if any(refuses_derivative(root) for root in roots):
            raise Unsupported("marked with @once_differentiable")
        # Split into views, so that an expanded direction stays expanded.
        pairs = zip(every, self.parts(along), strict=True)
        parts = [part for leaf, part in pairs if leaf.requires_grad]
        weights = [part for g, part in zip(gradients, parts, strict=True) if g.requires_grad]
        try:
            for _ in range(times):
                *by_x, by_upstream = self._differentiate(
                    roots, [*leaves, upstream], weights, retain_graph=times > 1
                )
        except Broken as error:
            if NO_DERIVATIVE.search(str(error)):
                raise Unsupported(str(error)) from error
            raise
        return self._as_one(every, by_x), by_upstream

    def second_as_one(self, upstream: Tensor, along: Tensor, **options: Any) -> Tensor:
        """The two gradients of `second`, concatenated into one vector; options as there."""
        by_x, by_upstream = self.second(upstream, along, **options)
        return torch.cat([by_x, by_upstream.flatten()])

    def tangent(
        self,
        along: Tensor,
        arrange: Arrange = torch.clone,
        *,
        wanted: Container[int] | None = None,
    ) -> Tensor:
        """The derivative of the output along a direction, in forward mode.

        Args:
            along: the direction, a vector like x.
            arrange: applied to inputs and tangents.
            wanted: which inputs have a tangent (default: all).
        """
        (tangent,) = self._tangents([self.x], along, arrange, wanted)
        return tangent

    def tangents_together(self, other: "Derivatives", along: Tensor) -> list[Tensor]:
        """The tangents of two calls, which must not share memory."""
        return self._tangents([self.x, other.x], along)

    def _tangents(
        self,
        xs: Sequence[Tensor],
        along: Tensor,
        arrange: Arrange = torch.clone,
        wanted: Container[int] | None = None,
    ) -> list[Tensor]:
        """The tangent at each x; all of them are read after the last call."""
        try:
            with fwAD.dual_level():
                duals = [fwAD.unpack_dual(self._dual(x, along, arrange, wanted)) for x in xs]
                return [
                    torch.zeros_like(primal) if tangent is None else tangent.detach().clone()
                    for primal, tangent in duals
                ]
        except Exception as error:  # any error from the user's jvp
            cause = error.__cause__ or error
            if str(cause).startswith(NO_FORWARD_MODE):
                raise Unsupported(sentence(cause)) from error
            for x in xs:
                self.at(x).value(arrange)  # raises ValueError if the function refuses these inputs
            name = self.subject.name
            raise Broken(f"the jvp of {name} failed: {sentence(cause)}") from error

    def _dual(
        self, x: Tensor, along: Tensor, arrange: Arrange, wanted: Container[int] | None
    ) -> Tensor:
        """The output of a call with tangents."""
        pairs = zip(self.parts(x), self.parts(along), strict=True)
        return self.call(
            fwAD.make_dual(arrange(part), arrange(dx))
            if wanted is None or i in wanted
            else arrange(part)
            for i, (part, dx) in enumerate(pairs)
        )

    def ignores_tangents(self) -> str:
        """The function's operators without forward mode, whose tangents PyTorch drops."""
        with torch.no_grad():
            return ", ".join(
                operators_without_tangents(lambda: self.call(self.parts(self.x.clone())))
            )

    def jacobian_along(self, along: Tensor) -> Tensor:
        """The derivative along a direction, like `tangent`, by a backward per output element."""
        recorded = self.record()
        output = recorded.output
        rows = torch.eye(output.numel(), dtype=output.dtype, device=output.device)
        slopes = [
            (self.pull(recorded, row.view(output.shape), retain_graph=True) * along).sum()
            for row in rows
        ]
        return torch.stack(slopes).view(output.shape)

    def _differentiate(
        self,
        output: Tensor | Sequence[Tensor],
        inputs: Sequence[Tensor],
        upstream: Tensor | Sequence[Tensor],
        **options: Any,
    ) -> tuple[Tensor, ...]:
        given = [upstream] if isinstance(upstream, Tensor) else upstream
        if self.subject.writes_upstream:
            given = [t.clone() for t in given]
        before = [version(t) for t in given]
        outputs = [output] if isinstance(output, Tensor) else output
        try:
            gradients = torch.autograd.grad(outputs, inputs, given, allow_unused=True, **options)
        except Exception as error:  # any error from the user's backward
            name = self.subject.name
            raise Broken(f"the backward of {name} failed: {sentence(error)}") from error
        self.subject.writes_upstream |= before != [version(t) for t in given]
        pairs = zip(gradients, inputs, strict=True)
        return tuple(torch.zeros_like(t) if g is None else g for g, t in pairs)
