"""The loss over many labels as a registered operator, for torch.compile and torch.export."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from nnce import _torch_private, rules
from nnce.functional import Reduction
from nnce.labels.blocks import Options, Wants, has_unit
from nnce.labels.function import BlockByBlock, Kind, Task, refuse_tangents
from nnce.labels.positives import Targets

# Under torch.compile and torch.export the loss is one opaque operator. Its autograd kernel computes
# the gradients through a second operator, because a compiled graph records the calls of this
# kernel.

_library = torch.library.Library("nnce", "FRAGMENT")
OPERATOR = "linear_sigmoid_cross_entropy"
_WALK = "_linear_sigmoid_cross_entropy_walk"
VERSION = 2  # of the signature: arguments in exported files are positional
_OPERANDS = """
    Tensor x, Tensor W, Tensor? b, Tensor? dense, Tensor? rows, Tensor? labels, Tensor? values,
    bool once, Tensor? weight, Tensor? pos_weight, float label_smoothing, Tensor? example_weight,
    str reduction, int? block, ScalarType product_dtype, bool? check_values, int version
"""
_WANTS = "Tensor? upstream, bool wants_value, bool wants_dx, bool wants_dW, bool wants_db"
for _signature in (
    f"{OPERATOR}({_OPERANDS}=0, float[]? focus=None) -> Tensor",
    f"{_WALK}({_OPERANDS}, float[]? focus, {_WANTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
):
    _library.define(_signature, tags=(torch.Tag.pt2_compliant_tag,))


class Operands(NamedTuple):
    """The operators' arguments after x, W and b, in order: a `Task` of a single process."""

    dense: Tensor | None
    rows: Tensor | None
    labels: Tensor | None
    values: Tensor | None
    once: bool
    weight: Tensor | None
    pos_weight: Tensor | None
    label_smoothing: float
    example_weight: Tensor | None
    reduction: Reduction
    block: int | None
    product_dtype: torch.dtype
    check_values: bool | None
    version: int = 0
    """VERSION, plus 1 with a focus, which an older nnce would ignore."""
    focus: Sequence[float] | None = None
    """Both gammas, margin, and alpha or −1; None for the cross-entropy."""

    def task(self, num_labels: int) -> Task:
        """Return the equivalent `Task`.

        Raises:
            RuntimeError: the call comes from a file exported by a different version of nnce.
        """
        expected = VERSION + (self.focus is not None)
        if self.version != expected:
            raise RuntimeError(
                f"expected nnce::{OPERATOR} of version {expected}, got {self.version} from a "
                f"model that an older nnce exported: export it again"
            )
        focus = None if self.focus is None else rules.Focus(*self.focus)
        if focus is not None and focus.alpha == -1:
            focus = focus._replace(alpha=None)
        targets, options = Targets(*self[:5]), Options(None, *self[5:8], focus)
        return Task(targets, options, *self[8:13], None, 0, num_labels)

    def check(self) -> None:
        """Do nothing: the operator itself checks the values."""

    def constants(self) -> list[Tensor]:
        """The targets and weights."""
        return [t for t in self if isinstance(t, Tensor)]

    def run(
        self, x: Tensor, W: Tensor, b: Tensor | None, upstream: Tensor | None, wants: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Call `Task.run` as an operator."""
        found = getattr(torch.ops.nnce, _WALK)(x, W, b, *self, upstream, *wants)
        there = (*wants, has_unit(W, Wants(*wants)))
        return tuple(t if is_there else None for t, is_there in zip(found, there, strict=True))

    def gradient_kinds(
        self, x: Tensor, W: Tensor, b: Tensor | None, wants: Sequence[bool]
    ) -> list[Kind | None]:
        """Return `Task.gradient_kinds`."""
        return self.task(W.shape[0]).gradient_kinds(x, W, b, wants)


def _walk(x: Tensor, W: Tensor, b: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    *operands, upstream, value, dx, dW, db = arguments
    task = Operands(*operands).task(len(W))
    if upstream is None:
        task.check()
    found = task.run(x, W, b, upstream, (value, dx, dW, db))
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _walk_without_data(
    x: Tensor, W: Tensor, b: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    *operands, _, value, dx, dW, db = arguments
    kinds = Operands(*operands).gradient_kinds(x, W, b, (value, dx, dW, db))
    return (
        _value_without_data(x, W, b, *operands) if value else x.new_empty(0),
        *(
            x.new_empty(0) if kind is None else x.new_empty(kind[0], dtype=kind[1])
            for kind in kinds
        ),
    )


def _value(x: Tensor, W: Tensor, b: Tensor | None, *operands: Any) -> Tensor:
    return _walk(x, W, b, *operands, None, True, False, False, False)[0]


def _value_without_data(x: Tensor, W: Tensor, b: Tensor | None, *operands: Any) -> Tensor:
    task = Operands(*operands).task(W.shape[0])
    shape = x.shape[:1] if task.reduction == "none" else ()
    return x.new_empty(shape, dtype=task.value_dtype)


def _value_with_gradients(x: Tensor, W: Tensor, b: Tensor | None, *arguments: Any) -> Tensor:
    operands = Operands(*arguments)
    refuse_tangents(x, W, b, *operands.constants())
    if any(t.requires_grad for t in operands.constants()):
        raise ValueError("expected targets and weights that need no gradient: none is computed")
    wants = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (x, W, b)]
    if not any(wants):
        with _torch_private.below_autograd():
            return cast(Tensor, getattr(torch.ops.nnce, OPERATOR)(x, W, b, *operands))
    if _torch_private.in_functorch_transform():
        raise NotImplementedError(
            "a compiled or exported loss that is walked block by block has no derivatives by "
            "torch.func: transform nnce.linear_sigmoid_cross_entropy itself"
        )
    C, *_ = BlockByBlock.apply(x, W, b, operands, (True, *wants))
    return cast(Tensor, C)


def _walk_without_derivatives(*arguments: Any) -> tuple[Tensor, ...]:
    tensors = [t for t in arguments if isinstance(t, Tensor)]
    refuse_tangents(*tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(f"nnce::{_WALK} has no derivatives: take those of nnce::{OPERATOR}")
    with _torch_private.below_autograd():
        return cast(tuple[Tensor, ...], getattr(torch.ops.nnce, _WALK)(*arguments))


for _name, _kernel, _fake, _for_autograd in (
    (OPERATOR, _value, _value_without_data, _value_with_gradients),
    (_WALK, _walk, _walk_without_data, _walk_without_derivatives),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    _library.impl(_name, _for_autograd, "Autograd")
    torch.library.register_fake(f"nnce::{_name}", _fake, lib=_library)
