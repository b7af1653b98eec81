"""The conditions under which a derivative must not change, as a list.

Real graphs send upstream gradients that are expanded, strided or 0, freeze some of the inputs and
differentiate a graph twice. Each variation computes a value or a derivative under one such
condition, next to what the same function gives without it. A backward is linear in its upstream
gradient, and a jvp in its tangents: that tells what to expect of another one.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nnce.checks._derivatives import Arrange, Derivatives

Pair = tuple[Tensor, Tensor]
# Upstream gradients and tangents that are this much larger; 1e-8 is below what a loss scaled down
# sends, and 1e6 above what a scaled one does.
FACTORS = (-1.0, 1e-8, 1e6)
# Another x, inside the domain of most functions, for a forward pass between forward and backward.
NEARBY = 1 - 2.0**-6
# This many pairs of inputs are passed the same tensor, of a function of many.
MOST_PAIRS = 3


class Variation(NamedTuple):
    """One condition."""

    of: str
    """Of what: "value", "first", "forward_mode" or "second"."""
    where: str
    """The condition, in words."""
    compute: Callable[[], Pair]
    """The result under the condition, and the one that is expected, as vectors."""


class Setting(NamedTuple):
    """What all variations start from."""

    ours: Derivatives
    value: Tensor
    first: Tensor
    upstream: Tensor
    along: Tensor
    """A direction for forward mode and second derivatives."""
    mask: Callable[[Tensor], Tensor]
    """Draws zeros and ones in the shape of a tensor."""


# ---------------------------------------------------------------------------------------- layouts


def _strided(t: Tensor) -> Tensor:
    return torch.stack([t, t.detach()], dim=-1)[..., 0]


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t.clone()


def _offset(t: Tensor) -> Tensor:
    """The end of a longer piece of memory, as of x[1:]."""
    flat = t.reshape(-1)
    return torch.cat([flat[:1].detach(), flat])[min(1, len(flat)) :].view(t.shape)


def _channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.clone(memory_format=formats.get(t.dim(), torch.preserve_format))


def _layouts(tensors: list[Tensor]) -> dict[str, Arrange]:
    """The layouts that at least one of the tensors can have, by their adjectives."""
    dims = max(t.dim() for t in tensors)
    layouts: dict[str, Arrange] = {"strided": _strided, "offset": _offset}
    if dims > 1:
        layouts["transposed"] = _transposed
    if dims > 3:
        layouts["channels_last"] = _channels_last
    return layouts


def _expanded(dim: int | None) -> Arrange:
    """The first slice along a dimension in place of all others, at no memory; None for all."""

    def arrange(t: Tensor) -> Tensor:
        if dim is None:
            return t.reshape(-1)[:1].view([1] * t.dim()).expand(t.shape) if t.numel() else t
        return t.narrow(dim, 0, 1).expand(t.shape) if t.dim() > dim and t.shape[dim] else t

    return arrange


def _expansions(tensors: list[Tensor]) -> dict[str, Arrange]:
    """Expansions along each dimension of more than one element, and along all of them."""
    dims = max(t.dim() for t in tensors)
    wide = [d for d in range(dims) if any(t.dim() > d and t.shape[d] > 1 for t in tensors)]
    expansions = {f"expanded along dimension {d}": _expanded(d) for d in wide}
    if len(wide) > 1:
        expansions["expanded along all dimensions"] = _expanded(None)
    return expansions


def _then_contiguous(arrange: Arrange) -> Arrange:
    return lambda t: arrange(t).clone(memory_format=torch.contiguous_format)


# ----------------------------------------------------------------------------------- the variations


def variations(setting: Setting) -> Iterator[Variation]:
    """All of them."""
    yield from _of_calls(setting)
    yield from _of_upstreams(setting)
    yield from _of_inputs(setting)
    yield from _of_frozen_inputs(setting)
    yield from _of_equal_inputs(setting)
    yield from _of_tangents(setting)
    yield from _of_second(setting)


def _of_calls(setting: Setting) -> Iterator[Variation]:
    """Further calls, and further backwards over one graph."""
    ours, value, first, upstream = setting[:4]
    recorded = ours.record()

    def over_one_graph() -> Pair:
        ours.pull(recorded, upstream, retain_graph=True)
        return ours.pull(recorded, upstream, retain_graph=True), first

    def after_another_forward() -> Pair:
        nearby = ours.at(NEARBY * ours.x)
        alone = nearby.first(upstream)
        mine, other = ours.record(), nearby.record()
        got = torch.cat([ours.pull(mine, upstream), nearby.pull(other, upstream)])
        return got, torch.cat([first, alone])

    requested = recorded.output.detach().clone()
    yield Variation("value", "when a gradient is requested", lambda: (requested, value))
    yield Variation("first", "at a second call", lambda: (ours.first(upstream), first))
    yield Variation("first", "at the second backward over one graph", over_one_graph)
    yield Variation("first", "after a second forward", after_another_forward)
    yield Variation(
        "first",
        "under create_graph=True",
        lambda: (ours.pull(ours.record(), upstream, create_graph=True).detach(), first),
    )


def _of_upstreams(setting: Setting) -> Iterator[Variation]:
    ours, _, first, upstream, _, mask = setting
    finite = first.isfinite()

    def where_finite(got: Tensor, expected: Tensor) -> Pair:
        return torch.where(finite, got, 0.0), torch.where(finite, expected, 0.0)

    def scaled(factor: float) -> Callable[[], Pair]:
        return lambda: (ours.first(factor * upstream) / factor, first)

    def in_two(part: Tensor) -> Callable[[], Pair]:
        return lambda: where_finite(ours.first(part) + ours.first(upstream - part), first)

    def arranged(arrange: Arrange) -> Callable[[], Pair]:
        return lambda: (ours.first(arrange(upstream)), ours.first(arrange(upstream).contiguous()))

    for factor in FACTORS:
        yield Variation("first", f"upstream gradient {factor:g} times as large", scaled(factor))
    yield Variation("first", "upstream gradient with zeros", in_two(upstream * mask(upstream)))
    yield Variation("first", "upstream gradient of ones", in_two(torch.ones_like(upstream)))
    yield Variation(
        "first",
        "upstream gradient of zeros",
        lambda: where_finite(ours.first(torch.zeros_like(upstream)), torch.zeros_like(first)),
    )
    for name, arrange in (_layouts([upstream]) | _expansions([upstream])).items():
        yield Variation("first", f"upstream gradient {name}", arranged(arrange))


def _of_inputs(setting: Setting) -> Iterator[Variation]:
    """Other layouts of the inputs, which some functions refuse."""
    ours, _, _, upstream, along, _ = setting
    inputs = ours.parts(ours.x)

    def first(arrange: Arrange) -> Callable[[], Pair]:
        return lambda: (
            ours.first(upstream, arrange=arrange),
            ours.first(upstream, arrange=_then_contiguous(arrange)),
        )

    def tangent(arrange: Arrange) -> Callable[[], Pair]:
        return lambda: (
            ours.tangent(along, arrange),
            ours.tangent(along, _then_contiguous(arrange)),
        )

    def second(arrange: Arrange) -> Callable[[], Pair]:
        return lambda: (
            ours.second_as_one(upstream, along, arrange),
            ours.second_as_one(upstream, along, _then_contiguous(arrange)),
        )

    for name, arrange in (_layouts(inputs) | _expansions(inputs)).items():
        try:
            value, expected = ours.value(arrange), ours.value(_then_contiguous(arrange))
        except (TypeError, ValueError):
            continue
        yield Variation("value", f"inputs {name}", _always(value, expected))
        yield Variation("first", f"inputs {name}", first(arrange))
        yield Variation("forward_mode", f"inputs {name}", tangent(arrange))
        yield Variation("second", f"inputs {name}", second(arrange))


def _always(got: Tensor, expected: Tensor) -> Callable[[], Pair]:
    return lambda: (got, expected)


def _of_frozen_inputs(setting: Setting) -> Iterator[Variation]:
    ours, _, first, upstream = setting[:4]
    everything = frozenset(range(len(ours.sizes)))

    def alone(wanted: frozenset[int]) -> Callable[[], Pair]:
        parts = enumerate(first.split(ours.sizes))
        expected = torch.cat([p if i in wanted else torch.zeros_like(p) for i, p in parts])
        return lambda: (ours.first(upstream, wanted=wanted), expected)

    one = [frozenset({i}) for i in everything]
    for wanted in dict.fromkeys([*one, *(everything - each for each in one)]):
        if wanted not in (everything, frozenset()):
            frozen = ", ".join(str(i) for i in sorted(everything - wanted))
            yield Variation("first", f"input {frozen} frozen", alone(wanted))


def _of_equal_inputs(setting: Setting) -> Iterator[Variation]:
    """f(x, x) next to f(x, a copy of x), for some pairs of inputs."""
    ours, upstream = setting.ours, setting.upstream
    if ours.subject.writes:  # then one call overwrites both
        return

    def same(i: int, j: int) -> Callable[[], Pair]:
        parts = ours.parts(ours.x)
        parts[j] = parts[i]
        both = ours.at(torch.cat([part.flatten() for part in parts]))

        def compute() -> Pair:
            together = both.first(upstream, shared=(i, j)).split(ours.sizes)
            apart = both.first(upstream).split(ours.sizes)
            return together[i], apart[i] + apart[j]

        return compute

    count = len(ours.shapes)
    pairs = [(i, j) for j in range(count) for i in range(j) if ours.shapes[i] == ours.shapes[j]]
    for i, j in pairs[:MOST_PAIRS]:
        yield Variation("first", f"inputs {i} and {j} the same tensor", same(i, j))


def _of_tangents(setting: Setting) -> Iterator[Variation]:
    ours, along = setting.ours, setting.along
    part = along * setting.mask(along)

    def tangent() -> Tensor:
        return ours.tangent(along)

    def scaled(factor: float) -> Callable[[], Pair]:
        return lambda: (ours.tangent(factor * along) / factor, tangent())

    def arranged(arrange: Arrange) -> Callable[[], Pair]:
        return lambda: (
            ours.tangent(along, torch.clone, arrange_tangent=arrange),
            ours.tangent(along, torch.clone, arrange_tangent=_then_contiguous(arrange)),
        )

    def one_by_one() -> Pair:
        each = [ours.tangent(along, wanted={i}) for i in range(len(ours.sizes))]
        return torch.stack(each).sum(0), tangent()

    yield Variation("forward_mode", "at a second call", lambda: (tangent(), tangent()))
    for factor in FACTORS:
        yield Variation("forward_mode", f"tangent {factor:g} times as large", scaled(factor))
    yield Variation(
        "forward_mode",
        "tangent with zeros",
        lambda: (ours.tangent(part) + ours.tangent(along - part), tangent()),
    )
    for name, arrange in _expansions(ours.parts(along)).items():
        yield Variation("forward_mode", f"tangent {name}", arranged(arrange))
    if len(ours.sizes) > 1:
        yield Variation("forward_mode", "one input with a tangent at a time", one_by_one)


def _of_second(setting: Setting) -> Iterator[Variation]:
    ours, _, _, upstream, along, mask = setting
    part_of_upstream, part_of_along = upstream * mask(upstream), along * mask(along)

    def second(times: int = 1) -> Tensor:
        return ours.second_as_one(upstream, along, times=times)

    def in_two() -> Pair:
        by_x = [
            ours.second(part, along)[0]
            for part in (part_of_upstream, upstream - part_of_upstream, upstream)
        ]
        return by_x[0] + by_x[1], by_x[2]

    def along_in_two() -> Pair:
        rest = along - part_of_along
        parts = [ours.second_as_one(upstream, part) for part in (part_of_along, rest)]
        return parts[0] + parts[1], second()

    yield Variation("second", "at the second time over one graph", lambda: (second(2), second()))
    yield Variation("second", "upstream gradient with zeros", in_two)
    yield Variation("second", "gradient of the gradient with zeros", along_in_two)
