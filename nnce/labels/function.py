"""The loss over many labels as an autograd Function that computes gradients in the forward.

The forward walks the labels block by block and computes the gradients for an upstream gradient of
1. The backward scales them in place, once. A second backward, or one whose upstream gradient varies
between examples, walks the blocks again.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from nnce import _torch_private, rules
from nnce._arguments import some_of
from nnce._torch_private import checkpoint_stage, is_functorch_tensor, version
from nnce.functional import Reduction, is_plain
from nnce.kernels import fused
from nnce.labels.blocks import (
    Options,
    Wants,
    default_block,
    has_unit,
    multiplied,
    multiply_inplace,
    walk,
)
from nnce.labels.positives import Targets


class Task(NamedTuple):
    """All arguments of the loss except x, W and b: those of the operators, then of processes."""

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
    # Quoted, here and elsewhere: not every build of PyTorch has process groups.
    group: "torch.distributed.ProcessGroup | None" = None
    offset: int = 0
    """The number of this process's first label."""
    num_labels: int = 0
    """The number of labels of all processes."""

    @property
    def operands(self) -> tuple[Any, ...]:
        """The operators' arguments after x, W and b, in order."""
        return self[:-3]

    @property
    def targets(self) -> Targets:
        """The targets of all examples."""
        return Targets(*self[:5])

    @property
    def options(self) -> Options:
        """The options for all labels, without biases."""
        focus = None if self.focus is None else rules.Focus(*self.focus)
        if focus is not None and focus.alpha == -1:
            focus = focus._replace(alpha=None)
        return Options(None, *self[5:8], focus)

    def check(self) -> None:
        """Check values: on a CPU by default, on CUDA only on request and asynchronously.

        Raises:
            ValueError: a label is out of range, a target is not in [0, 1] or a weight is negative.
                (On CUDA, a RuntimeError at a later call.)
        """
        labels = f"labels from 0 to {self.num_labels - 1}, or -1 for none"
        self._check_all(self.labels, (-1, self.num_labels - 1), labels)
        for soft in (self.dense, self.values):
            if soft is not None and soft.is_floating_point():
                self._check_all(soft, (0, 1), "target in [0, 1]")
        for name, weight in (
            ("weight", self.weight),
            ("pos_weight", self.pos_weight),
            ("example_weight", self.example_weight),
        ):
            self._check_all(weight, (0, math.inf), f"{name} of at least 0")

    def _check_all(
        self, values: Tensor | None, interval: tuple[float, float], expected: str
    ) -> None:
        if values is None or not values.numel():
            return
        if not self.check_values if values.is_cuda else self.check_values is False:
            return
        lowest, highest = interval
        ends = _extremes(values)
        if values.is_cuda:
            _torch_private.assert_later(((ends >= lowest) & (ends <= highest)).all())
        elif not all(lowest <= end <= highest for end in ends.tolist()):
            wide = values.double()  # float8 has no comparisons
            wrong = ~((wide >= lowest) & (wide <= highest))
            raise ValueError(f"expected {expected}, got {some_of(values[wrong])}")

    def run(
        self, x: Tensor, W: Tensor, b: Tensor | None, upstream: Tensor | None, wants: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """C, the gradients with respect to x, W and b, and the unit of dW.

        The gradients are for the given upstream gradient of C, or for 1 if it is None; `multiplied`
        rounds them to the dtypes of the inputs.
        """
        factor = self.factor(x, upstream)
        block = self.block or default_block(len(x), len(W), x.shape[1], self.product_dtype)
        targets = self.targets
        if self.labels is not None and self.offset:
            labels = (self.labels - self.offset).where(self.labels >= 0, -1)
            targets = targets._replace(labels=labels)
        C, dx, *others = walk(
            *(x, W, targets, self.options._replace(b=b), factor),
            *(min(block, max(len(W), 1)), self.product_dtype, Wants(*wants)),
        )
        if self.group is not None:
            for total in (C, dx):
                if total is not None:
                    torch.distributed.all_reduce(total, group=self.group)
        if C is not None:
            C = self.reduced(C)
        return C, dx, *others

    def gradient_kinds(
        self, x: Tensor, W: Tensor, b: Tensor | None, wants: Sequence[bool]
    ) -> "list[Kind | None]":
        """Shapes and dtypes of dx, dW, db and the unit of dW that `run` returns."""
        _, wants_dx, wants_dW, wants_db = wants
        return [
            (x.shape, self.value_dtype) if wants_dx else None,
            (W.shape, W.dtype) if wants_dW else None,
            (W.shape[:1], self.value_dtype) if wants_db else None,
            (W.shape[:1], torch.float32) if has_unit(W, Wants(*wants)) else None,
        ]

    def constants(self) -> list[Tensor]:
        """The targets and weights, which have no gradients."""
        return [t for t in self if isinstance(t, Tensor)]

    def _denominator(self, n: int) -> int:
        return {"mean": n * self.num_labels, "batchmean": n}.get(self.reduction, 1)

    def factor(
        self, x: Tensor, upstream: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """The factor of dC/dz for each example, [n]."""
        denominator = self._denominator(len(x))
        factor = x.new_full((len(x),), 1 / denominator if denominator else math.inf, dtype=dtype)
        if upstream is not None:
            factor = factor * upstream
        return factor if self.example_weight is None else factor * self.example_weight

    def reduced(self, C: Tensor) -> Tensor:
        """Reduce the per-example sums over labels to C."""
        n = len(C)
        if self.example_weight is not None:
            C = rules.weighted(self.example_weight, C)
        if self.reduction != "none":
            C = C.sum() / self._denominator(n)
        return C.to(self.value_dtype)

    @property
    def value_dtype(self) -> torch.dtype:
        """The dtype of C: float32 at least."""
        return torch.promote_types(self.product_dtype, torch.float32)


def _extremes(values: Tensor) -> Tensor:
    """The smallest and largest values of each chunk, or NaN if a chunk contains one.

    Only tensors that would be copied are split: aminmax copies a non-contiguous tensor, and float8,
    which it does not support, is converted.
    """
    copies = values.itemsize == 1 or not values.is_contiguous()
    chunks = values.chunk(64) if copies else (values,)
    parts = [(t if t.itemsize > 1 else t.half()).aminmax() for t in chunks]
    return torch.stack([end for part in parts for end in part])


class _Once(Function):
    """The identity with a derivative that raises, for gradients without second derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        raise RuntimeError(
            "a loss that is walked block by block has no second derivatives: for those, take "
            "nnce.sigmoid_cross_entropy of nnce.linear"
        )


class BlockByBlock(Function):
    """Equations 1, 3, 5, 6 and 7 in the forward; the backward scales, or walks again.

    Takes the inputs of a task (x, W and b, or x, y, scale and bias), the task (a `Task`, or the
    pairs' ring), and the flags of `Wants`. Returns C, and the gradients for an upstream gradient of
    1.
    """

    @staticmethod
    def forward(*arguments: Any) -> Any:
        """Compute C and the gradients."""
        *inputs, task, wants = arguments
        task.check()
        value_only = (True, *(False for _ in inputs))
        if task.reduction == "none":
            return task.run(*inputs, None, value_only)
        if checkpoint_stage() == "forward":
            C = task.run(*inputs, None, value_only)[0]
            return C, *_placeholders(inputs[0], task.gradient_kinds(*inputs, wants))
        return task.run(*inputs, None, wants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Save the tensors that the backward needs."""
        *tensors, ctx.task, _ = inputs
        made = () if ctx.task.reduction == "none" else output[1:]
        # Under a checkpoint, the backward gets the recomputed gradients as saved tensors.
        checkpointed = checkpoint_stage() is not None
        ctx.save_for_backward(*tensors, *(made if checkpointed else ()))
        ctx.made = [] if checkpointed or not made else [made]
        ctx.versions = [(t, version(t)) for t in ctx.task.constants() if not t.is_inference()]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients, scaled by the upstream gradient of C."""
        return *_consume_gradients(ctx, upstream[0]), None, None


SMALL = 1024
"""Largest number of labels for which all logits are computed at once."""


class AtOnce(Function):
    """Equations 1, 3 and 5 for few labels in the forward; the products (6, 7) in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, task: Task) -> Tensor:
        """Compute C, and overwrite z with dC/dz for an upstream gradient of 1."""
        task.check()
        z = rules.linear(x, W, b)
        factor = task.factor(x, dtype=x.dtype)
        options = fused.Options(*task[5:8], None, task.options.focus)
        C = fused.joint(z, task.targets.dense_for(*z.shape), factor, options)
        ctx.save_for_backward(x, W, z, *(() if b is None else (b,)))
        return task.reduced(C)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        """Compute the gradients from dz scaled by the upstream gradient of C."""
        (dC,) = upstream
        x, W, dz, *b = ctx.saved_tensors
        wants_dx, wants_dW, wants_db, _ = ctx.needs_input_grad
        with torch.no_grad():
            dz = dz * dC.unsqueeze(-1)
            gradients = [
                rules.da_prev(dz, W) if wants_dx else None,
                rules.dW(dz, x) if wants_dW else None,
                rules.db(dz) if wants_db else None,
            ]
        return *_refusing_derivatives(gradients, dC, [x, W, *b]), None


apply_at_once = _torch_private.single_level_apply(AtOnce)


def suits_at_once(x: Tensor, W: Tensor, b: Tensor | None, task: Task) -> bool:
    """Whether there are few labels and a fused pass can compute the loss."""
    return (
        len(W) <= SMALL
        and task.block is None
        and task.group is None
        and task.check_values is not False
        and x.dtype in (torch.float32, torch.float64)
        and x.is_cpu
        and is_plain(x, W, *task.constants(), optional=(b,))
    )


Kind = tuple[Sequence[int], torch.dtype]
"""Shape and dtype of a tensor that the forward computes for the backward."""


def _placeholders(like: Tensor, kinds: Sequence[Kind | None]) -> list[Tensor | None]:
    """Expanded scalars of these kinds, for a checkpoint to compare metadata with."""
    return [
        None if kind is None else like.new_empty((), dtype=kind[1]).expand(kind[0])
        for kind in kinds
    ]


def _consume_gradients(ctx: Any, dC: Tensor | None) -> list[Tensor | None]:
    """Scale the gradients from the forward, once; after that, compute them in a new walk."""
    needed = ctx.needs_input_grad[:-2]
    if dC is None:
        return [None for _ in needed]
    saved = ctx.saved_tensors  # read once: hooks unpack at each read, and checkpoint's raise
    inputs, recomputed = saved[: len(needed)], saved[len(needed) :]
    if not ctx.made and any(version(t) != before for t, before in ctx.versions):
        raise RuntimeError(
            "a target or weight of the loss was changed in place after the forward, and this "
            "backward has to read it again: pass a clone to the loss"
        )
    with torch.no_grad():
        if ctx.made or recomputed:
            *made, unit = ctx.made.pop() if ctx.made else recomputed
            upstream: Tensor | None = dC
        else:
            _, *made, unit = ctx.task.run(*inputs, dC, (False, *needed))
            upstream = None
        units = (None, unit, None, None)
        gradients = [
            None if gradient is None or not wanted else _scaled(gradient, like.dtype, upstream, of)
            for gradient, like, wanted, of in zip(made, inputs, needed, units, strict=False)
        ]
        del made, recomputed, saved  # without other references, the memory becomes .grad
    return _refusing_derivatives(gradients, dC, inputs)


def _refusing_derivatives(
    gradients: list[Tensor | None], dC: Tensor, inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """With grad mode enabled, wrap the gradients so that their derivatives raise."""
    if not torch.is_grad_enabled():
        return gradients
    return [None if t is None else _Once.apply(t, dC, *inputs) for t in gradients]


def _scaled(gradient: Tensor, dtype: torch.dtype, dC: Tensor | None, unit: Tensor | None) -> Tensor:
    # In place, except under torch.func, where gradients may be batched.
    batched = is_functorch_tensor(gradient) or (dC is not None and is_functorch_tensor(dC))
    return (multiplied if batched else multiply_inplace)(gradient, dtype, dC, unit)


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError if a tensor has a forward-mode tangent."""
    for t in tensors:
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                "a loss that is walked block by block has no forward-mode derivatives: for those, "
                "take nnce.sigmoid_cross_entropy of nnce.linear"
            )
