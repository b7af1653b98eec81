"""The conditions under which a value or derivative must not change.

In real graphs upstream gradients are expanded, strided or 0, some inputs are frozen, and a graph is
differentiated twice. Each variation computes a value or a derivative under one such condition, and
the expected result from the same function without it. A backward is linear in its upstream
gradient, and a jvp in its tangents: this gives the expected result for different ones.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nnce.checks._derivatives import Arrange, Broken, Derivatives, Recorded, Unsupported
from nnce.checks._numerical import EPS
from nnce.checks._resolution import Resolution

Pair = tuple[Tensor, Tensor]
# Factors for upstream gradients and tangents, smaller and larger than loss scaling produces.
FACTORS = (1e-8, -1e6)
# Scaled values stay within the range of a dtype by this factor.
_MARGIN = 64.0
# Factor for a nearby x, in the domain of most functions, for a call between forward and backward.
NEARBY = 1 - 2.0**-6
# The most pairs of inputs that are tested with the same tensor.
MOST_PAIRS = 3


class Variation(NamedTuple):
    """One condition."""

    of: str
    """The result that is varied: "value", "first", "forward_mode" or "second"."""
    where: str
    """The condition, in words."""
    compute: Callable[[], Pair]
    """Computes the result under the condition, and the expected result, as vectors."""
    required: bool = True
    """Whether an exception counts as wrong."""
    within: "Callable[[], Variation] | None" = None
    """The variation limited to the range of the dtype that the function computes in."""


class Setting(NamedTuple):
    """The function and its unvaried results."""

    resolution: Resolution
    value: Tensor
    first: Tensor
    upstream: Tensor
    along: Tensor
    """A direction for forward mode and second derivatives."""
    tangent: Tensor | None
    """The derivative along `along` in forward mode, if supported."""
    second: Tensor | None
    """The second derivatives along `along` as one vector, if supported."""
    mask: Callable[[Tensor], Tensor]
    """Generates random zeros and ones in the shape of a tensor."""

    @property
    def ours(self) -> Derivatives:
        """The function."""
        return self.resolution.ours

    @property
    def nearby(self) -> Derivatives:
        """The function at a nearby x."""
        return self.ours.at(NEARBY * self.ours.x)

    def scaled(
        self, of: str, what: str, pull: Callable[[float], Tensor], expected: Tensor
    ) -> Iterator[Variation]:
        """A derivative with a much smaller or larger upstream gradient or tangent.

        Underflow and overflow of the function's dtype are not counted as errors.
        """

        def by(factor: float) -> Variation:
            def compute() -> Pair:
                return pull(factor) / factor, expected

            within = functools.partial(in_range, factor)
            return Variation(of, f"{what} {factor:g} times as large", compute, within=within)

        def in_range(factor: float) -> Variation:
            limits, sizes = torch.finfo(self.ours.dtype), (self.first, self.upstream)
            largest = [float(t.nan_to_num(0.0).abs().max()) for t in sizes]
            most = limits.max / _MARGIN / max(1.0, *largest)
            least = _MARGIN * limits.tiny / min(1.0, *(size or 1.0 for size in largest))
            size = min(max(abs(factor), least), most)
            return by(math.copysign(size, factor))

        return map(by, FACTORS)


# ---------------------------------------------------------------------------------------- layouts


def _strided(t: Tensor) -> Tensor:
    return torch.stack([t, t.detach()], dim=-1)[..., 0]


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t.clone()


def _offset(t: Tensor) -> Tensor:
    """Copy to the end of a longer block of memory, as in x[1:]."""
    flat = t.reshape(-1)
    return torch.cat([flat[:1].detach(), flat])[min(1, len(flat)) :].view(t.shape)


def _padded(t: Tensor) -> Tensor:
    """Copy into rows that are one element longer, as in x[:, :-1]."""
    if not t.dim():
        return t.clone()
    return torch.cat([t, t[..., :1].detach()], dim=-1)[..., : t.shape[-1]]


def _channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.clone(memory_format=formats.get(t.dim(), torch.preserve_format))


def _layouts(tensors: list[Tensor]) -> dict[str, Arrange]:
    """The layouts that at least one of the tensors can have, by name."""
    dims = max(t.dim() for t in tensors)
    layouts: dict[str, Arrange] = {"strided": _strided, "offset": _offset} if dims else {}
    if dims > 1:
        layouts |= {"transposed": _transposed, "padded": _padded}
    if dims > 3:
        layouts["channels_last"] = _channels_last
    return layouts


def _expanded(dim: int | None) -> Arrange:
    """Expand the first slice along a dimension, or along all dimensions if None."""

    def arrange(t: Tensor) -> Tensor:
        if dim is None:
            return t.reshape(-1)[:1].view([1] * t.dim()).expand(t.shape) if t.numel() else t
        return t.narrow(dim, 0, 1).expand(t.shape) if t.dim() > dim and t.shape[dim] else t

    return arrange


def _expansions(tensors: list[Tensor]) -> dict[str, Arrange]:
    """Expansions along each dimension with more than one element."""
    dims = max(t.dim() for t in tensors)
    wide = [d for d in range(dims) if any(t.dim() > d and t.shape[d] > 1 for t in tensors)]
    return {f"expanded along dimension {d}": _expanded(d) for d in wide}


def _then_contiguous(arrange: Arrange) -> Arrange:
    return lambda t: arrange(t).clone(memory_format=torch.contiguous_format)


def _then_rounded(arrange: Arrange) -> Arrange:
    """Change the arranged values by a few rounding errors, at random."""

    def rounded(t: Tensor) -> Tensor:
        t = _then_contiguous(arrange)(t)
        # Random, so that equal rows of a matrix do not stay equal.
        units = 4 * torch.rand(t.shape, generator=torch.Generator().manual_seed(0)) - 2
        return t * (1 + 4 * EPS * units.to(t))

    return rounded


# ----------------------------------------------------------------------------------- the variations


def variations(setting: Setting) -> Iterator[Variation]:
    """All variations."""
    recorded = setting.ours.record()
    yield from _of_calls(setting, recorded)
    yield from _of_upstreams(setting, recorded)
    yield from _of_layouts(setting)
    yield from _of_expanded_inputs(setting)
    yield from _of_frozen_inputs(setting)
    yield from _of_equal_inputs(setting)
    if setting.tangent is not None:
        yield from _of_tangents(setting, setting.tangent)
    if setting.second is not None:
        yield from _of_second(setting, setting.second)


def _of_calls(setting: Setting, recorded: Recorded) -> Iterator[Variation]:
    """Variations: repeated calls, and repeated backwards over one graph."""
    ours, (_, value, first, upstream) = setting.ours, setting[:4]

    def again() -> Pair:
        return ours.pull(recorded, upstream, retain_graph=True), first

    nearby = setting.nearby

    @functools.cache
    def both() -> Tensor:
        return torch.cat([first, _elsewhere(lambda: nearby.first(upstream))])

    def after_another_forward() -> Pair:
        expected = both()
        got = ours.pull_together(ours.record(), nearby.record(), upstream)
        return torch.cat(got), expected

    @functools.cache
    def in_place() -> tuple[Tensor, Tensor]:
        """Values and gradients at x and then nearby, in the same memory."""
        values, gradients = [], []
        leaves = [part.clone().requires_grad_() for part in ours.parts(ours.x)]
        for point in (ours, nearby):
            with torch.no_grad():
                for leaf, part in zip(leaves, point.parts(point.x), strict=True):
                    leaf.copy_(part)
            output = point.call(leaves)
            values.append(output.detach().clone())
            gradients.append(
                _elsewhere(functools.partial(point.pull, Recorded(leaves, output), upstream))
            )
        return torch.stack(values), torch.cat(gradients)

    requested = recorded.output.detach().clone()
    yield Variation("value", "when a gradient is requested", _always(requested, value))
    yield Variation("first", "at a second call", again)
    yield Variation("first", "at the second backward over one graph", again)
    yield Variation("first", "after a second forward", after_another_forward)
    yield Variation(
        "value",
        "after a change of the inputs in place",
        lambda: (in_place()[0], torch.stack([value, nearby.value()])),
    )
    yield Variation(
        "first",
        "after a change of the inputs in place",
        lambda: (in_place()[1], both()),
    )
    yield Variation(
        "first",
        "under create_graph=True",
        lambda: (ours.pull(recorded, upstream, create_graph=True).detach(), first),
        required=False,  # second derivatives are judged elsewhere
    )


def _of_upstreams(setting: Setting, recorded: Recorded) -> Iterator[Variation]:
    """Variations: different upstream gradients over one graph."""
    ours, (_, _, first, upstream, *_, mask) = setting.ours, setting
    finite = first.isfinite()

    def pull(upstream: Tensor) -> Tensor:
        return ours.pull(recorded, upstream, retain_graph=True)

    def where_finite(got: Tensor, expected: Tensor) -> Pair:
        return torch.where(finite, got, 0.0), torch.where(finite, expected, 0.0)

    def in_two(part: Tensor) -> Callable[[], Pair]:
        return lambda: where_finite(pull(part) + pull(upstream - part), first)

    def arranged(arrange: Arrange) -> Callable[[], Pair]:
        return lambda: (pull(arrange(upstream)), first)

    def expanded(arrange: Arrange) -> Callable[[], Pair]:
        return lambda: (pull(arrange(upstream)), pull(_then_contiguous(arrange)(upstream)))

    yield from setting.scaled("first", "upstream gradient", lambda k: pull(k * upstream), first)
    if upstream.dim():
        zeros = in_two(upstream * mask(upstream))
        yield Variation("first", "upstream gradient with zeros", zeros)
    yield Variation("first", "upstream gradient of ones", in_two(torch.ones_like(upstream)))
    yield Variation(
        "first",
        "upstream gradient of zeros",
        lambda: where_finite(pull(torch.zeros_like(upstream)), torch.zeros_like(first)),
    )
    for name, arrange in _layouts([upstream]).items():
        yield Variation("first", f"upstream gradient {name}", arranged(arrange))
    expansions = _expansions([upstream])
    if len(expansions) > 1:
        expansions["expanded along all dimensions"] = _expanded(None)
    for name, arrange in expansions.items():
        yield Variation("first", f"upstream gradient {name}", expanded(arrange))


def _of_layouts(setting: Setting) -> Iterator[Variation]:
    """Variations: different input layouts, which some functions refuse."""
    ours, (_, value, first, upstream, along, tangent, second, _) = setting.ours, setting

    def of_first(recorded: Recorded) -> Callable[[], Pair]:
        return lambda: (ours.pull(recorded, upstream), first)

    def of_tangent(arrange: Arrange, expected: Tensor) -> Callable[[], Pair]:
        return lambda: (ours.tangent(along, arrange), expected)

    def of_second(arrange: Arrange, expected: Tensor) -> Callable[[], Pair]:
        return lambda: (ours.second_as_one(upstream, along, arrange=arrange), expected)

    for name, arrange in _layouts(ours.parts(ours.x)).items():
        try:
            recorded = ours.record(arrange=arrange)
        except (TypeError, ValueError):
            continue
        yield Variation("value", f"inputs {name}", _always(recorded.output.detach(), value))
        yield Variation("first", f"inputs {name}", of_first(recorded))
        if tangent is not None and name in ("strided", "offset"):  # one of each kind is enough
            yield Variation("forward_mode", f"inputs {name}", of_tangent(arrange, tangent))
        if second is not None and name not in ("offset", "padded"):
            yield Variation("second", f"inputs {name}", of_second(arrange, second))


def _elsewhere(compute: Callable[[], Tensor]) -> Tensor:
    """A derivative at a point that the user has not chosen; there may be none."""
    try:
        return compute()
    except Broken as error:
        raise Unsupported(str(error)) from error


def _always(got: Tensor, expected: Tensor) -> Callable[[], Pair]:
    return lambda: (got, expected)


def _of_expanded_inputs(setting: Setting) -> Iterator[Variation]:
    """Variations: inputs with stride 0, compared with contiguous copies.

    Equal elements are a special case: they tie, or cancel and leave only rounding error. Elements
    of the result that change when the inputs are rounded are ignored.
    """
    ours, upstream, along = setting.ours, setting.upstream, setting.along

    @functools.cache
    def record(arrange: Arrange) -> Recorded:
        return ours.record(arrange=arrange)

    computed: dict[str, Callable[[Arrange], Tensor]] = {
        "value": lambda arrange: record(arrange).output.detach().clone(),
        "first": lambda arrange: ours.pull(record(arrange), upstream),
    }
    in_forward_mode: dict[str, Callable[[Arrange], Tensor]] = {}
    if setting.tangent is not None:
        in_forward_mode = {"forward_mode": lambda arrange: ours.tangent(along, arrange)}

    def pair(compute: Callable[[Arrange], Tensor], *arranges: Arrange) -> Pair:
        expanded, contiguous, rounded = arranges
        expected = _elsewhere(lambda: compute(contiguous))
        got = compute(expanded)
        if not torch.allclose(got, expected, rtol=64 * EPS, atol=0.0):
            nearby = _elsewhere(lambda: compute(rounded))
            # At a pole, such as log det of equal rows, rounding makes a finite number of infinity.
            stable = torch.isclose(nearby, expected, rtol=1e-6, atol=0.0) & expected.isfinite()
            got = torch.where(stable, got, expected)
        return got, expected

    for number, (name, arrange) in enumerate(_expansions(ours.parts(ours.x)).items()):
        arranges = (arrange, _then_contiguous(arrange), _then_rounded(arrange))
        # In forward mode one dimension is enough.
        for of, compute in (computed if number else computed | in_forward_mode).items():
            yield Variation(of, f"inputs {name}", functools.partial(pair, compute, *arranges))


def _of_frozen_inputs(setting: Setting) -> Iterator[Variation]:
    ours, (_, _, first, upstream, along, *_) = setting.ours, setting
    everything = frozenset(range(len(ours.sizes)))

    def part(vector: Tensor, wanted: frozenset[int]) -> Tensor:
        parts = enumerate(vector.split(ours.sizes))
        return torch.cat([p if i in wanted else torch.zeros_like(p) for i, p in parts])

    def alone(wanted: frozenset[int]) -> Callable[[], Pair]:
        return lambda: (ours.first(upstream, wanted=wanted), part(first, wanted))

    def second_alone(wanted: frozenset[int]) -> Pair:
        got_x, got_upstream = ours.second(upstream, along, wanted=wanted)
        by_x, by_upstream = ours.second(upstream, part(along, wanted))
        expected = [part(by_x, wanted), by_upstream.flatten()]
        return torch.cat([got_x, got_upstream.flatten()]), torch.cat(expected)

    one = [frozenset({i}) for i in everything]
    for wanted in dict.fromkeys([*one, *(everything - each for each in one)]):
        if wanted not in (everything, frozenset()):
            frozen = ", ".join(str(ours.subject.places[i]) for i in sorted(everything - wanted))
            yield Variation("first", f"input {frozen} frozen", alone(wanted))
            if setting.second is not None:
                second = functools.partial(second_alone, wanted)
                yield Variation("second", f"input {frozen} frozen", second)


def _of_equal_inputs(setting: Setting) -> Iterator[Variation]:
    """Variations: f(x, x) compared with f(x, a copy of x), for some pairs of inputs."""
    ours, upstream = setting.ours, setting.upstream
    if ours.subject.writes:  # one call would overwrite both
        return

    def same(i: int, j: int) -> Callable[[], Pair]:
        parts = ours.parts(ours.x)
        parts[j] = parts[i]
        both = ours.at(torch.cat([part.flatten() for part in parts]))

        def compute() -> Pair:
            apart = list(_elsewhere(lambda: both.first(upstream)).split(ours.sizes))
            apart[i], apart[j] = apart[i] + apart[j], torch.zeros_like(apart[j])
            return both.first(upstream, shared=(i, j)), torch.cat(apart)

        return compute

    count = len(ours.shapes)
    pairs = [(i, j) for j in range(count) for i in range(j) if ours.shapes[i] == ours.shapes[j]]
    for i, j in pairs[:MOST_PAIRS]:
        names = " and ".join(str(ours.subject.places[k]) for k in (i, j))
        yield Variation("first", f"inputs {names} the same tensor", same(i, j))


def _of_tangents(setting: Setting, tangent: Tensor) -> Iterator[Variation]:
    ours, along = setting.ours, setting.along
    part = along * setting.mask(along)

    def one_by_one() -> Pair:
        each = [ours.tangent(along, wanted={i}) for i in range(len(ours.sizes))]
        return torch.stack(each).sum(0), tangent

    def after_another_call() -> Pair:
        nearby = setting.nearby
        alone = _elsewhere(lambda: nearby.tangent(along))
        return torch.stack(ours.tangents_together(nearby, along)), torch.stack([tangent, alone])

    yield Variation("forward_mode", "after a second call", after_another_call)
    yield from setting.scaled("forward_mode", "tangent", lambda k: ours.tangent(k * along), tangent)
    yield Variation(
        "forward_mode",
        "tangent with zeros",
        lambda: (ours.tangent(part) + ours.tangent(along - part), tangent),
    )
    if len(ours.sizes) > 1:
        yield Variation("forward_mode", "one input with a tangent at a time", one_by_one)


def _of_second(setting: Setting, second: Tensor) -> Iterator[Variation]:
    ours, upstream, along, mask = setting.ours, setting.upstream, setting.along, setting.mask
    part_of_upstream, part_of_along = upstream * mask(upstream), along * mask(along)
    ones = torch.ones((), dtype=along.dtype, device=along.device).expand(along.shape)

    def in_parts() -> Pair:
        """Linear in both with respect to x; only in the direction with respect to upstream."""
        x0, up0 = ours.second(part_of_upstream, part_of_along)
        x1, up1 = ours.second(part_of_upstream, along - part_of_along)
        x2, _ = ours.second(upstream - part_of_upstream, along)
        return torch.cat([x0 + x1 + x2, (up0 + up1).flatten()]), second

    def along_expanded() -> Pair:
        return ours.second_as_one(upstream, ones), ours.second_as_one(upstream, ones.contiguous())

    yield Variation(
        "second",
        "at the second time over one graph",
        lambda: (ours.second_as_one(upstream, along, times=2), second),
    )
    yield Variation("second", "upstream gradients with zeros", in_parts)
    yield Variation("second", "gradient of the gradient expanded", along_expanded)
