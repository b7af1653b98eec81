"""The same network and losses by PyTorch alone: the `torch.nn` twin, and the built-in losses."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nnce.losses import Loss
from nnce.modules import MLP

_F = torch.nn.functional
LossFunction = Callable[[Tensor, Tensor], Tensor]
"""A loss as a function of z and y."""


def torch_twin(network: MLP) -> nn.Sequential:
    """Build the `torch.nn` equivalent of a network, which shares its parameters."""
    layers: list[nn.Module] = []
    for linear in network.linears():
        twin = nn.Linear(linear.in_features, linear.out_features, device="meta")
        twin.weight = linear.weight
        twin.register_parameter("bias", linear.bias)
        layers += [twin, nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


# reduction="mean" would average over components as well, and mse_loss has no factor ½.
BUILT_IN_LOSSES: dict[Loss, LossFunction] = {
    "quadratic": lambda z, y: 0.5 * _F.mse_loss(z.sigmoid(), y, reduction="sum") / len(z),
    "cross-entropy": lambda z, y: (
        _F.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(z)
    ),
}
"""The notes' C, averaged over the examples, by PyTorch's own loss functions."""
