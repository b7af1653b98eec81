"""A linear layer and its cross-entropy as a module, with top-k prediction."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from nnce._arguments import (
    check_block,
    check_label_smoothing,
    check_reduction,
    check_size,
    is_number,
    is_size,
    plain,
    some_of,
)
from nnce._torch_private import KeepsMissing
from nnce.functional import Reduction, linear
from nnce.labels.blocks import default_block, examples_at_a_time
from nnce.labels.linear import (
    check_layer,
    check_weight,
    gathered_sizes,
    linear_sigmoid_cross_entropy,
    shard,
)
from nnce.labels.positives import Target
from nnce.modules import options_of


class LinearSigmoidCrossEntropyLoss(KeepsMissing):
    """Output layer for many labels with its loss, `linear_sigmoid_cross_entropy`.

    z = x Wᵀ + b (equation 1) and C = −Σ [y ln σ(z) + (1−y) ln(1 − σ(z))] (3), using the memory of
    one block of labels.

    Args:
        in_features: number of features per example, at least 1.
        num_labels: number of labels, at least 1; with a group, those of this process only.
        bias: whether to add a bias b.
        prior: fraction of positives, in (0, 1); b starts at ln(prior / (1 − prior)), because with
            many labels the first steps would otherwise only learn that nearly all targets are 0.
            None: b starts at 0. (Source: Lin et al., Focal loss for dense object detection, 2017,
            §3.3.)
        weight, pos_weight: weights of the loss, [num_labels]; stored as buffers `label_weight` and
            `pos_weight`, because `weight` is the layer's W.
        label_smoothing, reduction, block, group: as for `linear_sigmoid_cross_entropy`.
        generator, device, dtype: as for `nnce.Linear`.

    The parameters are `weight` W [num_labels, in_features], from N(0, 1/in_features), and `bias` b
    [num_labels], or None; a `state_dict` of `torch.nn.Linear`, with the same names, can be loaded.

    Shape: x [n, in_features] and a target as for `linear_sigmoid_cross_entropy` -> a scalar, or [n]
    for "none".

    Raises:
        TypeError, ValueError: a size or option is invalid, or a weight is negative.

    >>> last = nnce.LinearSigmoidCrossEntropyLoss(64, 1000, prior=2 / 1000)
    >>> last(torch.randn(8, 64), torch.randint(1000, (8, 2))).backward()  # two labels each
    >>> last.weight.grad.shape
    torch.Size([1000, 64])
    """

    may_be_missing = ("label_weight", "pos_weight")  # a torch.nn.Linear's state_dict has neither
    weight: nn.Parameter
    bias: nn.Parameter | None
    label_weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(  # noqa: PLR0913  like torch.nn's loss modules: options, each with a default
        self,
        in_features: int,
        num_labels: int,
        bias: bool = True,
        *,
        prior: float | None = None,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        label_smoothing: float = 0,
        reduction: Reduction = "batchmean",
        block: int | None = None,
        group: "torch.distributed.ProcessGroup | None" = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = check_size("in_features", in_features)
        num_labels = check_size("num_labels", num_labels)
        if prior is not None:
            if not (is_number(prior) and 0 < prior < 1):
                raise ValueError(f"expected prior between 0 and 1, got {prior!r}")
            prior = plain(prior)
        check_reduction(reduction)
        self.in_features, self.num_labels, self.prior = in_features, num_labels, prior
        self.label_smoothing, self.reduction = check_label_smoothing(label_smoothing), reduction
        self.block, self.group = check_block(block), group
        self.weight = nn.Parameter(torch.empty(num_labels, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(num_labels, device=device, dtype=dtype)) if bias else None,
        )
        for buffer, name, tensor in (
            ("label_weight", "weight", weight),
            ("pos_weight", "pos_weight", pos_weight),
        ):
            tensor = check_weight(name, tensor, num_labels, self.weight.device, "the parameters")
            if tensor is not None and not tensor.is_meta and not bool((tensor >= 0).all()):
                raise ValueError(f"expected {name} of at least 0, got {some_of(tensor)}")
            self.register_buffer(buffer, tensor)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights and reset the biases."""
        prior = 0.5 if self.prior is None else self.prior
        with torch.no_grad():
            self.weight.normal_(0, self.in_features**-0.5, generator=generator)
            if self.bias is not None:
                self.bias.fill_(math.log(prior / (1 - prior)))

    def forward(
        self, input: Tensor, target: Target, example_weight: Tensor | None = None
    ) -> Tensor:
        """Compute C for the examples and their targets."""
        return linear_sigmoid_cross_entropy(
            input,
            self.weight,
            target,
            linear_bias=self.bias,
            weight=self.label_weight,
            example_weight=example_weight,
            pos_weight=self.pos_weight,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            block=self.block,
            group=self.group,
        )

    def logits(self, input: Tensor) -> Tensor:
        """Compute z for all labels of this process, [n, num_labels], stored in full."""
        return linear(input, *self._whole())

    def topk(self, input: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest z of each example and their labels: (z, labels), [n, k] each.

        Computed block by block, without gradients, in descending order of z; ties are ordered by
        label. NaN is treated as the largest value, as in `torch.topk`. With a group, the labels are
        those of all processes, and every process gets the result.

        Raises:
            ValueError: k is not from 1 to the number of labels.
        """
        W, b = self._whole()
        product_dtype = check_layer(input, W, b, ("input", "weight", "bias"))
        offset, num_labels = shard(self.num_labels, input, self.group)
        if not (is_size(k) and k <= num_labels):
            raise ValueError(f"expected k from 1 to the {num_labels} labels, got {k!r}")
        k = int(k)
        with torch.no_grad():
            best = [
                _topk(rows, W, b, k, self.block, product_dtype)
                for rows in input.split(examples_at_a_time(len(input)))
            ]
            z, labels = (torch.cat(parts) for parts in zip(*best, strict=True))
            labels += offset
            if self.group is None:
                return z, labels
            return _merged(z, labels, k, self.group)

    def _whole(self) -> tuple[Tensor, Tensor | None]:
        """Return W and b, gathered if `fully_shard` has sharded them."""
        return _gathered(self.weight), None if self.bias is None else _gathered(self.bias)

    def extra_repr(self) -> str:
        """Describe the sizes and the non-default options."""
        return (
            f"in_features={self.in_features}, num_labels={self.num_labels}, "
            f"bias={self.bias is not None}, {options_of(self)}"
        )


def _gathered(parameter: Tensor) -> Tensor:
    """Return a full `DTensor`; its gradient is averaged over processes, as by `fully_shard`."""
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import DTensor, Partial  # not in every build of PyTorch

    mean = [Partial("avg")] * cast(DTensor, parameter).device_mesh.ndim
    return cast(DTensor, parameter).full_tensor(grad_placements=mean)


def _topk(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, block: int | None, product_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    block = block or default_block(len(x), len(W), x.shape[1], product_dtype)
    x = x.to(product_dtype)
    z_best = x.new_empty(len(x), 0, dtype=torch.promote_types(product_dtype, torch.float32))
    best = z_best.new_empty(z_best.shape, dtype=torch.int64)
    memory = x.new_empty(len(x) * min(block, len(W)))
    for first in range(0, len(W), block):
        labels = slice(first, min(first + block, len(W)))
        width = labels.stop - first
        z = memory[: len(x) * width].view(len(x), width)
        torch.mm(x, W[labels].to(product_dtype).mT, out=z)
        z = z.to(z_best.dtype)
        if b is not None:
            z += b[labels]
        values, at = _first_of_the_largest(z, min(k, z.shape[1]))
        # Earlier blocks have lower labels: a stable sort keeps them first.
        z_best, order = torch.cat([z_best, values], 1).sort(dim=1, descending=True, stable=True)
        best = torch.cat([best, at + first], 1).gather(1, order)
        z_best, best = z_best[:, :k], best[:, :k]
    return z_best, best


def _first_of_the_largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Like `torch.topk` for each row, but ties are taken and ordered by position."""
    values, at = z.topk(min(k + 1, z.shape[1]), 1)
    # The k-th and (k+1)-th values are equal: topk may have taken either.
    last, next_one = values[:, k - 1], values[:, -1]
    tied = (last == next_one) | (last.isnan() & next_one.isnan())
    values, at = values[:, :k].contiguous(), at[:, :k].contiguous()
    if z.shape[1] > k and bool(tied.any()):
        ordered, where = z[tied].sort(dim=1, descending=True, stable=True)
        values[tied], at[tied] = ordered[:, :k], where[:, :k]
    at, order = at.sort(1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, at.gather(1, order)


def _merged(
    z: Tensor, labels: Tensor, k: int, group: "torch.distributed.ProcessGroup"
) -> tuple[Tensor, Tensor]:
    """Merge the top k of each process into the top k overall."""
    sizes = gathered_sizes(z.shape[1], z, group)
    everyone = [z.new_empty(len(z), size) for size in sizes]
    theirs = [labels.new_empty(len(z), size) for size in sizes]
    for rank, (values, numbers) in enumerate(zip(everyone, theirs, strict=True)):
        if rank == torch.distributed.get_rank(group):
            values.copy_(z)
            numbers.copy_(labels)
        source = torch.distributed.get_global_rank(group, rank)
        torch.distributed.broadcast(values, source, group=group)
        torch.distributed.broadcast(numbers, source, group=group)
    z, order = torch.cat(everyone, 1).sort(dim=1, descending=True, stable=True)
    return z[:, :k], torch.cat(theirs, 1).gather(1, order)[:, :k]
