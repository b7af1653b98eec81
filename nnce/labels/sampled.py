"""Cross-entropy over positive labels and sampled negative labels."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import embedding

from nnce._arguments import check_device, check_reduction, check_whole, shape_of, some_of
from nnce.functional import Reduction, linear, sigmoid_cross_entropy
from nnce.labels.linear import check_layer, check_weight


class _GatherBias(Function):
    """Gather b[rows], with a `torch.sparse` gradient that contains only these rows."""

    @staticmethod
    def forward(b: Tensor, rows: Tensor) -> Tensor:
        return b[rows]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        b, ctx.rows = inputs
        ctx.shape = b.shape

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (dz,) = upstream
        rows = ctx.rows.reshape(1, -1)
        return torch.sparse_coo_tensor(rows, dz.flatten(), ctx.shape, check_invariants=False), None


def sampled_sigmoid_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    linear_bias: Tensor | None = None,
    log_q: Tensor | None = None,
    sparse: bool = False,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Cross-entropy over each example's positive labels and sampled negative labels.

    C = Σ softplus(−z) over the positives + Σ softplus(z) over the negatives, z = W x + b − ln q,
    using only the rows of W for these labels. If q is the distribution from which the negatives
    were drawn, W x + b estimates the log-odds of all labels (Mikolov et al., 2013; Jean et al.,
    2015). A label listed as both positive and negative counts as both.

    Args:
        input: x, [n, features].
        linear_weight: W, [labels, features].
        positives: label numbers, [n] or [n, k]; −1 is ignored.
        negatives: label numbers, [m] shared by all examples, or [n, m]; −1 is ignored.
        linear_bias: b, [labels], or None for no bias.
        log_q: ln q of each label, [labels], or None for 0; it has no gradient.
        sparse: whether the gradients of W and b are `torch.sparse` tensors of the rows used, as in
            `torch.nn.Embedding`; otherwise they are as large as W and b.
        reduction: "batchmean" divides the sum by n, "mean" by the number of labels listed, without
            −1; "sum"; "none" sums over the labels and returns one number per example.

    Returns:
        C: a scalar, or [n] for "none"; float32 at least. Negatives of shape [n, m] need memory for
            n × m × features numbers.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices do not match, log_q requires a gradient, or, on a CPU, a label
            is out of range.

    Source: T. Mikolov et al., Distributed representations of words and phrases, 2013 (negative
    sampling); S. Jean et al., On using very large target vocabulary, 2015 (ln q).

    >>> x, W = torch.ones(2, 3), torch.zeros(1000, 3)
    >>> positives, negatives = torch.tensor([7, 8]), torch.tensor([1, 2, 3])
    >>> nnce.sampled_sigmoid_cross_entropy(x, W, positives, negatives)  # 4 ln 2
    tensor(2.7726)
    """
    check_reduction(reduction)
    check_layer(input, linear_weight, linear_bias)
    n, num_labels = len(input), len(linear_weight)
    _check_labels("positives", positives, input, num_labels)
    _check_labels("negatives", negatives, input, num_labels)
    log_q = check_weight("log_q", log_q, num_labels, input.device)
    positives = positives.long() if positives.dim() == 2 else positives.long()[:, None]
    negatives = negatives.long()
    wide = torch.promote_types(linear_weight.dtype, torch.float32)

    def z_of(labels: Tensor) -> Tensor:
        rows = labels.clamp(min=0)
        W = embedding(rows, linear_weight, sparse=sparse)
        z = linear(input, W) if labels.dim() == 1 else (W @ input[:, :, None])[:, :, 0]
        z = z.to(wide)  # sums easily exceed the largest float16, 65,504
        if linear_bias is not None:
            z = z + (_GatherBias.apply(linear_bias, rows) if sparse else linear_bias.to(wide)[rows])
        return z if log_q is None else z - log_q[rows]

    z = torch.cat([z_of(positives), z_of(negatives)], 1)
    named = torch.cat([positives, negatives.expand(n, -1)], 1) >= 0
    y = torch.zeros_like(named, dtype=torch.int64)
    y[:, : positives.shape[1]] = 1
    C = sigmoid_cross_entropy(z, y.where(named, -100), ignore_index=-100, reduction="none")
    if reduction == "none":
        return C.sum(1)
    return C.sum() / (named.sum() if reduction == "mean" else n if reduction == "batchmean" else 1)


def _check_labels(name: str, labels: Tensor, input: Tensor, num_labels: int) -> None:
    """Raise TypeError or ValueError unless these are label numbers of the input's examples."""
    check_whole(name, labels)
    check_device(name, labels, input.device, like="input")
    n, shared = len(input), name == "negatives" and labels.dim() == 1
    if not shared and (labels.dim() not in (1, 2) or labels.shape[0] != n):
        raise ValueError(
            f"expected {name} of the {n} examples of input, got shape {shape_of(labels)}"
        )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel():
        wrong = (labels < -1) | (labels >= num_labels)
        if bool(wrong.any()):
            raise ValueError(
                f"expected {name} from 0 to {num_labels - 1}, or -1 for none, got "
                f"{some_of(labels[wrong])}"
            )
