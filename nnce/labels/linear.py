"""A linear layer and its cross-entropy over very many labels, in bounded memory."""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from nnce._arguments import (
    check_alike,
    check_block,
    check_dense,
    check_device,
    check_focus,
    check_label_smoothing,
    check_reduction,
    shape_of,
)
from nnce.functional import Reduction, autocast_dtype
from nnce.labels.function import BlockByBlock, Task, apply_at_once, refuse_tangents, suits_at_once
from nnce.labels.operator import OPERATOR, VERSION
from nnce.labels.positives import Target, targets_of


def linear_sigmoid_cross_entropy(  # noqa: PLR0913  like torch.nn.functional's losses
    input: Tensor,
    linear_weight: Tensor,
    target: Target,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    example_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0,
    reduction: Reduction = "batchmean",
    block: int | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
    check_values: bool | None = None,
) -> Tensor:
    """Compute `sigmoid_cross_entropy(linear(x, W, b), y)` without storing all of z.

    z = x Wᵀ + b (equation 1), C = −Σ [y ln σ(z) + (1−y) ln(1 − σ(z))] (3) and dz = (1−y) σ(z) −
    y σ(−z) (5), from which the gradients with respect to x, W and b are computed (6, 7). This takes
    three matrix products of n × features × labels; "none", and a second backward over a retained
    graph, take a fourth. In addition to the inputs and their gradients, it needs the memory of one
    block. Second derivatives, forward mode and vmap are not supported and raise.

    Args:
        input: x, [n, features].
        linear_weight: W, [labels, features].
        target: y, one of
            - integers [n] or [n, k]: the label numbers of each example; −1 is ignored. Repeated
              labels count once.
            - `Positives`, or a `torch.sparse_csr` or `sparse_coo` tensor [n, labels]: any number of
              labels per example, optionally with soft targets. Unlisted targets are 0.
            - floating-point or boolean [n, labels]: every target.
        linear_bias: b, [labels], or None for no bias.
        weight: multiplies C per label; [labels], or a shape that broadcasts to it.
        example_weight: multiplies C per example; [n].
        pos_weight: multiplies the y term of C; shape as for weight. Targets and these three weights
            have no gradients.
        label_smoothing: s in [0, 1): y becomes y (1−s) + s/2.
        reduction: "batchmean" divides the sum by n, "mean" by n × labels; "sum"; "none" sums over
            the labels and returns one number per example, unlike in `sigmoid_cross_entropy`.
            Weights do not change the divisor of a mean.
        block: number of labels at a time; by default as many as fit in the larger of 16 MB and a
            twentieth of the parameters. Examples are processed about 1,000 at a time.
        group: processes over which the labels are sharded in rank order. Each passes its own rows
            of linear_weight, linear_bias, weight and pos_weight; all pass the same input, target
            (with the numbers and width of all labels), example_weight and upstream gradient. Each
            gets the total value, the gradients of its own rows, which must stay outside
            `DistributedDataParallel`, and the complete gradient of the input. DDP's averaging then
            gives the single-process gradient if every process computed the same input, or if the
            input was gathered by `torch.distributed.nn.all_gather`, whose backward sums. If each
            process instead puts its own part into a tensor gathered without gradients, multiply by
            the world size.
        check_values: whether to check label numbers, targets and weights; by default only on a CPU.
            On CUDA the check is a device-side assertion, which does not synchronize.

    Returns:
        C: a scalar, or [n] for "none"; float32 at least, even under autocast, which only affects
        the dtype of the products.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices do not match, an option is invalid, a target or weight
            requires a gradient, a label is out of range, a target is not in [0, 1], or a weight is
            negative.
        RuntimeError: a second derivative is computed.

    Source: equations 1, 3, 5, 6 and 7 of the notes.

    >>> x, W = torch.ones(2, 3), torch.zeros(1000, 3, requires_grad=True)
    >>> C = nnce.linear_sigmoid_cross_entropy(x, W, torch.tensor([[7, 999], [7, -1]]))
    >>> C.detach()  # 1000 ln 2
    tensor(693.1472)
    """
    smoothing = check_label_smoothing(label_smoothing)
    options = _Options(
        *(weight, example_weight, pos_weight, smoothing, reduction, block, group, check_values)
    )
    return _walked_loss((input, linear_weight, linear_bias), target, options)


def linear_sigmoid_focal_loss(  # noqa: PLR0913  like torch.nn.functional's losses
    input: Tensor,
    linear_weight: Tensor,
    target: Target,
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    example_weight: Tensor | None = None,
    reduction: Reduction = "batchmean",
    block: int | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
    check_values: bool | None = None,
) -> Tensor:
    """Compute `sigmoid_focal_loss(linear(x, W, b), y)` without storing all of z.

    C = Σ α_t (1 − p_t)^γ · cross-entropy, z = x Wᵀ + b; see `sigmoid_focal_loss`.

    Args:
        alpha, gamma: as for `sigmoid_focal_loss`.
        input, linear_weight, target, linear_bias, weight, example_weight: as for
            `linear_sigmoid_cross_entropy`.
        reduction, block, group, check_values: as for `linear_sigmoid_cross_entropy`.

    Returns:
        C: a scalar, or [n] for "none"; float32 at least.

    Raises:
        TypeError, ValueError, RuntimeError: as for `linear_sigmoid_cross_entropy` and
            `sigmoid_focal_loss`.

    Source: Lin et al., Focal loss for dense object detection, 2017; equations 1, 6 and 7.

    >>> x, W = torch.ones(2, 3), torch.zeros(1000, 3, requires_grad=True)
    >>> nnce.labels.linear_sigmoid_focal_loss(x, W, torch.tensor([7, 9]), alpha=None).detach()
    tensor(173.2868)
    """
    focus = check_focus({"gamma": gamma}, 0, alpha)
    options = _Options(
        *(weight, example_weight, None, 0, reduction, block, group, check_values), focus
    )
    return _walked_loss((input, linear_weight, linear_bias), target, options)


def linear_sigmoid_asymmetric_loss(  # noqa: PLR0913  like torch.nn.functional's losses
    input: Tensor,
    linear_weight: Tensor,
    target: Target,
    *,
    gamma_positive: float = 1.0,
    gamma_negative: float = 4.0,
    margin: float = 0.05,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    example_weight: Tensor | None = None,
    reduction: Reduction = "batchmean",
    block: int | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
    check_values: bool | None = None,
) -> Tensor:
    """Compute `sigmoid_asymmetric_loss(linear(x, W, b), y)` without storing all of z.

    C = −Σ [y (1−a)^γ₊ ln a + (1−y) p^γ₋ ln(1−p)], p = max(a − margin, 0), z = x Wᵀ + b; see
    `sigmoid_asymmetric_loss`.

    Args:
        gamma_positive, gamma_negative, margin: as for `sigmoid_asymmetric_loss`.
        input, linear_weight, target, linear_bias, weight, example_weight: as for
            `linear_sigmoid_cross_entropy`.
        reduction, block, group, check_values: as for `linear_sigmoid_cross_entropy`.

    Returns:
        C: a scalar, or [n] for "none"; float32 at least.

    Raises:
        TypeError, ValueError, RuntimeError: as for `linear_sigmoid_cross_entropy` and
            `sigmoid_asymmetric_loss`.

    Source: Ridnik et al., Asymmetric loss for multi-label classification, 2021; equations 1, 6
    and 7.

    >>> x, W = torch.ones(2, 3), torch.zeros(1000, 3, requires_grad=True)
    >>> y = torch.zeros(2, 1000)
    >>> nnce.labels.linear_sigmoid_asymmetric_loss(x, W, y, gamma_negative=0, margin=0).detach()
    tensor(693.1472)
    """
    gammas = {"gamma_positive": gamma_positive, "gamma_negative": gamma_negative}
    options = _Options(
        *(weight, example_weight, None, 0, reduction, block, group, check_values),
        check_focus(gammas, margin, None),
    )
    return _walked_loss((input, linear_weight, linear_bias), target, options)


class _Options(NamedTuple):
    """Arguments of the losses, except for the tensors of the layer and the target."""

    weight: Tensor | None
    example_weight: Tensor | None
    pos_weight: Tensor | None
    label_smoothing: float
    reduction: Reduction
    block: int | None
    group: "torch.distributed.ProcessGroup | None"
    check_values: bool | None
    focus: tuple[float, float, float, float | None] | None = None


def _walked_loss(
    inputs: tuple[Tensor, Tensor, Tensor | None], target: Target, options: _Options
) -> Tensor:
    input, linear_weight, _ = inputs
    weight, example_weight, pos_weight, label_smoothing, reduction, *_ = options
    group, focus = options.group, options.focus
    check_reduction(reduction)
    product_dtype = check_layer(*inputs)
    block = check_block(options.block)
    n, own_labels = input.shape[0], linear_weight.shape[0]
    offset, num_labels = shard(own_labels, input, group)
    targets = targets_of(target, n, num_labels, input.device)
    if group is not None and targets.dense is not None:  # lists keep global label numbers
        targets = targets._replace(dense=targets.dense[:, offset : offset + own_labels])
    weight = check_weight("weight", weight, own_labels, input.device)
    pos_weight = check_weight("pos_weight", pos_weight, own_labels, input.device)
    example_weight = check_weight("example_weight", example_weight, n, input.device)
    operands = (
        *targets,
        *(weight, pos_weight, float(label_smoothing), example_weight, reduction),
        *(block, product_dtype, options.check_values, VERSION + (focus is not None)),
        None if focus is None else [*focus[:3], -1.0 if focus[3] is None else focus[3]],
    )
    if torch.compiler.is_compiling():
        if group is not None:
            raise ValueError("expected no process group under torch.compile")
        return cast(Tensor, getattr(torch.ops.nnce, OPERATOR)(*inputs, *operands))
    task = Task(*operands, group, offset, num_labels)
    if input.is_meta:
        shape = (n,) if reduction == "none" else ()
        parts = sum(t.sum() * 0 for t in inputs if t is not None)
        return (cast(Tensor, parts) + input.new_empty(shape)).to(task.value_dtype)
    refuse_tangents(*task.constants())
    if suits_at_once(*inputs, task):
        return cast(Tensor, apply_at_once(*inputs, task))
    wants = (t is not None and t.requires_grad and torch.is_grad_enabled() for t in inputs)
    C, *_ = BlockByBlock.apply(*inputs, task, (True, *wants))
    return cast(Tensor, C)


def check_layer(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    names: tuple[str, str, str] = ("input", "linear_weight", "linear_bias"),
) -> torch.dtype:
    """Check that x, W and b match; return the dtype of the products."""
    low = (torch.float32, torch.bfloat16, torch.float16)
    product_dtype = autocast_dtype(x)
    under_autocast = product_dtype is not None and x.dtype in low
    if under_autocast:
        for name, t in zip(names, (x, W, b), strict=True):
            if t is not None:
                if not isinstance(t, Tensor) or t.dtype not in low:
                    kind = getattr(t, "dtype", type(t).__name__)
                    raise TypeError(
                        f"expected {name} in float32 or less under autocast, got {kind}"
                    )
                check_device(name, t, x.device, like=names[0])
    else:
        check_alike({names[0]: x, names[1]: W}, {names[2]: b})
    if x.dim() != 2:
        raise ValueError(f"expected {names[0]} of shape (n, features), got {shape_of(x)}")
    if W.dim() != 2 or W.shape[1] != x.shape[1]:
        raise ValueError(
            f"expected {names[1]} of shape (labels, {x.shape[1]}) to go with {names[0]} of shape "
            f"{shape_of(x)}, got {shape_of(W)}"
        )
    if b is not None and b.shape != W.shape[:1]:
        raise ValueError(
            f"expected {names[2]} of shape ({W.shape[0]},) to go with {names[1]} of shape "
            f"{shape_of(W)}, got {shape_of(b)}"
        )
    return cast(torch.dtype, product_dtype) if under_autocast else x.dtype


def check_weight(
    name: str, weight: Tensor | None, size: int, device: torch.device, like: str = "input"
) -> Tensor | None:
    """Return a weight expanded to its labels or examples; raise if it does not broadcast."""
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(weight).__name__}")
    check_dense(name, weight)
    if not weight.dtype.is_floating_point:
        raise TypeError(f"expected {name} of a floating-point dtype, got {weight.dtype}")
    check_device(name, weight, device, like=like)
    if weight.requires_grad:
        raise ValueError(f"expected {name} that needs no gradient: none is computed by it")
    if tuple(weight.shape) == (size,):
        return weight
    if name == "example_weight" or weight.dim() > 1 or weight.numel() != 1:
        raise ValueError(f"expected {name} of shape ({size},), got {shape_of(weight)}")
    return weight.expand(size)


def shard(
    own_labels: int, x: Tensor, group: "torch.distributed.ProcessGroup | None"
) -> tuple[int, int]:
    """Return the number of this process's first label, and the total number of labels."""
    if group is None:
        return 0, own_labels
    sizes = gathered_sizes(own_labels, x, group)
    return sum(sizes[: torch.distributed.get_rank(group)]), sum(sizes)


def gathered_sizes(own: int, x: Tensor, group: "torch.distributed.ProcessGroup") -> list[int]:
    """Gather one number per process, in rank order, using x's device.

    Raises:
        TypeError: group is not a process group.
    """
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"expected group to be a process group, got {type(group).__name__}")
    sizes = x.new_zeros(torch.distributed.get_world_size(group), dtype=torch.int64)
    sizes[torch.distributed.get_rank(group)] = own
    torch.distributed.all_reduce(sizes, group=group)
    return cast(list[int], sizes.tolist())
