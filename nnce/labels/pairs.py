"""The SigLIP loss over all pairs of two sets of embeddings, in memory linear in their number.

Rows of x are treated as examples and rows of y as labels, so the same walk computes the loss. With
several processes, the rows of y are passed around a ring.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor

from nnce._arguments import (
    check_block,
    check_dense,
    check_device,
    check_reduction,
    is_number,
    plain,
    shape_of,
)
from nnce.functional import Reduction
from nnce.labels.blocks import Options, Walk, Wants, default_block, multiplied, walk
from nnce.labels.function import BlockByBlock, Kind
from nnce.labels.linear import check_layer, gathered_sizes, linear_sigmoid_cross_entropy
from nnce.labels.positives import Targets


def pair_sigmoid_cross_entropy(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    bias: Tensor | float | None = None,
    *,
    reduction: Reduction = "batchmean",
    block: int | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Cross-entropy over all n × n pairs of embeddings, with positives on the diagonal.

    z = scale · x yᵀ + bias, with target 1 on the diagonal and 0 elsewhere. This is the SigLIP loss,
    as computed by open_clip's `SigLipLoss.forward` from (image_features, text_features,
    logit_scale, logit_bias) with labels ±1. The rows of y are processed in blocks, so forward and
    backward need memory linear in n.

    Args:
        x, y: embeddings, [n, features] each; row i of x belongs to row i of y.
        scale: factor of the products, one number (SigLIP learns its logarithm).
        bias: term added to the scaled products, one number, or None for 0.
        reduction: "batchmean" divides the sum by n, "mean" by n²; "sum"; "none" sums over y and
            returns one number per row of x.
        block: number of rows of y at a time, as for `linear_sigmoid_cross_entropy`.
        group: processes that each have their own pairs, whose number may differ; all pass the same
            scale, bias and upstream gradient. The y and their gradients are passed around a ring.
            Each process gets the value over all pairs ("none": of its own x), the gradients of its
            own x and y, and the complete gradients of scale and bias. `DistributedDataParallel`
            averages over processes, so multiply the gradients of the model's parameters, except
            scale and bias, by the world size.

    Returns:
        C: a scalar, or [n] for "none".

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices do not match, or an option is invalid.
        RuntimeError: a second derivative is computed.

    Source: X. Zhai et al., Sigmoid loss for language image pre-training, ICCV 2023.

    >>> x = torch.eye(3)
    >>> nnce.pair_sigmoid_cross_entropy(x, x, scale=10.0, bias=-5.0)
    tensor(0.0201)
    """
    check_reduction(reduction)
    block = check_block(block)
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape != y.shape:
        raise ValueError(f"expected x and y of one shape, got {shape_of(x)} and {shape_of(y)}")
    product_dtype = check_layer(x, y, None, names=("x", "y", "bias"))
    by = _one_number("scale", scale, x)
    b = None if bias is None else _one_number("bias", bias, x)
    if group is None:
        # In half precision, scale, bias and their gradients stay in float32, as under autocast.
        dtype = torch.promote_types(product_dtype, torch.float32)
        half = dtype != product_dtype and not x.is_meta
        dtype = dtype if half else x.dtype
        with torch.autocast(x.device.type, product_dtype) if half else nullcontext():
            return linear_sigmoid_cross_entropy(
                x.to(dtype) * by.to(dtype),
                y,
                torch.arange(len(x), device=x.device),
                linear_bias=None if b is None else b.to(dtype).expand(len(y)),
                reduction=reduction,
                block=block,
            )
    if torch.compiler.is_compiling():
        raise ValueError("expected no process group under torch.compile")
    ring = _Ring(group, gathered_sizes(len(x), x, group), reduction, block, product_dtype)
    inputs = (x, y, by, b)
    wants = (t is not None and t.requires_grad and torch.is_grad_enabled() for t in inputs)
    C, *_ = BlockByBlock.apply(*inputs, ring, (True, *wants))
    return cast(Tensor, C)


def _one_number(name: str, value: object, like: Tensor) -> Tensor:
    if is_number(value):
        return like.new_tensor(plain(value))
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a number or a tensor, got {type(value).__name__}")
    check_dense(name, value)
    if value.numel() != 1 or not value.dtype.is_floating_point:
        raise ValueError(
            f"expected {name} to be one floating-point number, got {value.dtype} of shape "
            f"{shape_of(value)}"
        )
    check_device(name, value, like.device, like="x")
    return value.reshape(())


class _Ring(NamedTuple):
    """The ring of processes that exchange y, and the options of the loss."""

    group: "torch.distributed.ProcessGroup"
    sizes: list[int]
    """The number of pairs of each process."""
    reduction: Reduction
    block: int | None
    product_dtype: torch.dtype

    def run(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        upstream: Tensor | None,
        wants: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """C and the gradients with respect to x, y, scale and bias, in float32 at least.

        The gradients are for the given upstream gradient of C, or for 1 if it is None. The last
        item, None, is the unit of dW.
        """
        wants_value, wants_x, wants_y, wants_scale, wants_bias = wants
        rank, world = torch.distributed.get_rank(self.group), len(self.sizes)
        n = sum(self.sizes)
        denominator = {"mean": n * n, "batchmean": n}.get(self.reduction, 1)
        dtype = torch.promote_types(self.product_dtype, torch.float32)
        factor = x.new_ones(len(x), dtype=torch.float64) / denominator
        if upstream is not None:
            factor = factor * upstream
        scaled = x.to(dtype) * scale.to(dtype)
        C = x.new_zeros(len(x), dtype=torch.float64) if wants_value else None
        dx = x.new_zeros(x.shape, dtype=dtype) if wants_x or wants_scale else None
        db = x.new_zeros((), dtype=torch.float64) if wants_bias else None
        y_here, dy_here = y.contiguous(), y.new_zeros(y.shape, dtype=dtype) if wants_y else None
        # One loop for all four results; functions split off would have to pass all of them on.
        for step in range(world):
            owner = (rank - step) % world
            wanted = Wants(wants_value, dx is not None, wants_y, wants_bias)
            block = self._walk(scaled, y_here, bias, factor, wanted, paired=owner == rank)
            if C is not None:
                C += cast(Tensor, block.C)
            if dx is not None:
                dx += cast(Tensor, block.dx)
            if db is not None:
                db += cast(Tensor, block.db).sum(dtype=torch.float64)
            if dy_here is not None:
                dy_here += multiplied(cast(Tensor, block.dW), dtype, None, block.dW_unit)
                dy_here = self._pass_on(dy_here, owner)
            if step < world - 1 or dy_here is not None:
                y_here = self._pass_on(y_here, owner)
        d_scale = (dx.double() * x.double()).sum() if wants_scale and dx is not None else None
        for total in (d_scale, db):
            if total is not None:
                torch.distributed.all_reduce(total, group=self.group)
        if C is not None and self.reduction != "none":
            C = C.sum() / denominator
            torch.distributed.all_reduce(C, group=self.group)
        return (
            None if C is None else C.to(dtype),
            dx * scale.to(dtype) if wants_x and dx is not None else None,
            dy_here,
            d_scale,
            db,
            None,
        )

    def _walk(
        self,
        x: Tensor,
        y: Tensor,
        bias: Tensor | None,
        factor: Tensor,
        wants: Wants,
        *,
        paired: bool,
    ) -> Walk:
        """C and gradients for x here and the y of one process; x and y of its own are paired."""
        rows = torch.arange(len(x), device=x.device)
        labels = rows if paired else torch.full_like(rows, -1)
        return walk(
            x,
            y,
            Targets(None, rows, labels, None, once=True),
            Options(None if bias is None else bias.expand(len(y)), None, None, 0),
            factor,
            self.block or default_block(len(x), len(y), x.shape[1], self.product_dtype),
            self.product_dtype,
            wants,
        )

    def gradient_kinds(
        self, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, wants: Sequence[bool]
    ) -> list[Kind | None]:
        """Shapes and dtypes of the items that `run` returns after C."""
        dtype = torch.promote_types(self.product_dtype, torch.float32)
        kinds = ((x.shape, dtype), (y.shape, dtype), ((), torch.float64), ((), torch.float64))
        wanted = zip(kinds, wants[1:], strict=True)
        return [*(kind if is_wanted else None for kind, is_wanted in wanted), None]

    def check(self) -> None:
        """Do nothing: there are no targets or weights to check."""

    def constants(self) -> list[Tensor]:
        """Return an empty list: there are no targets or weights."""
        return []

    def _pass_on(self, tensor: Tensor, owner: int) -> Tensor:
        """Send a tensor to the next rank and return the previous rank's, of owner − 1."""
        rank, world = torch.distributed.get_rank(self.group), len(self.sizes)
        if world == 1:
            return tensor
        coming = tensor.new_empty(self.sizes[(owner - 1) % world], tensor.shape[1])
        ranks = ((rank + 1) % world, (rank - 1) % world)
        to, source = (torch.distributed.get_global_rank(self.group, r) for r in ranks)
        exchange = [
            torch.distributed.P2POp(torch.distributed.isend, tensor, to, self.group),
            torch.distributed.P2POp(torch.distributed.irecv, coming, source, self.group),
        ]
        for work in torch.distributed.batch_isend_irecv(exchange):
            work.wait()
        return coming
