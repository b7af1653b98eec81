"""The loss over many labels as a registered operator, for torch.compile and torch.export."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from nnce import _torch_private
from nnce.labels.blocks import Wants, has_unit
from nnce.labels.function import BlockByBlock, Task, refuse_tangents

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


class _OperatorTask(Task):
    """The operator's task, which walks by calling the other operator."""

    def check(self) -> None:
        """Do nothing: the operator itself checks the values."""

    def run(
        self, x: Tensor, W: Tensor, b: Tensor | None, upstream: Tensor | None, wants: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Call `Task.run` as an operator."""
        found = getattr(torch.ops.nnce, _WALK)(x, W, b, *self.operands, upstream, *wants)
        there = (*wants, has_unit(W, Wants(*wants)))
        return tuple(t if is_there else None for t, is_there in zip(found, there, strict=True))


def _task(W: Tensor, operands: Sequence[Any]) -> Task:
    """The task of an operator's arguments (without trailing defaults), of a single process.

    Raises:
        RuntimeError: the call comes from a file exported by a different version of nnce.
    """
    task = Task(*operands)._replace(num_labels=W.shape[0])
    expected = VERSION + (task.focus is not None)
    if task.version != expected:
        raise RuntimeError(
            f"expected nnce::{OPERATOR} of version {expected}, got {task.version} from a "
            f"model that an older nnce exported: export it again"
        )
    return task


def _walk(x: Tensor, W: Tensor, b: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    *operands, upstream, value, dx, dW, db = arguments
    task = _task(W, operands)
    if upstream is None:
        task.check()
    found = task.run(x, W, b, upstream, (value, dx, dW, db))
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _walk_without_data(
    x: Tensor, W: Tensor, b: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    *operands, _, value, dx, dW, db = arguments
    kinds = _task(W, operands).gradient_kinds(x, W, b, (value, dx, dW, db))
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
    task = _task(W, operands)
    shape = x.shape[:1] if task.reduction == "none" else ()
    return x.new_empty(shape, dtype=task.value_dtype)


def _value_with_gradients(x: Tensor, W: Tensor, b: Tensor | None, *operands: Any) -> Tensor:
    constants = [t for t in operands if isinstance(t, Tensor)]
    refuse_tangents(x, W, b, *constants)
    if any(t.requires_grad for t in constants):
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
    task = _OperatorTask(*operands)._replace(num_labels=W.shape[0])
    C, *_ = BlockByBlock.apply(x, W, b, task, (True, *wants))
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
