"""The alternatives to nnce's functions whose precision is measured next to theirs."""

import torch
from torch import Tensor

from nnce.training.twin import LossFunction

_F = torch.nn.functional


def _textbook_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    a = z.sigmoid()
    return -(y * a.log() + (1 - y) * (1 - a).log())


CONTENDERS: dict[str, dict[str, LossFunction]] = {
    "cross-entropy": {
        "BCEWithLogitsLoss": lambda z, y: _F.binary_cross_entropy_with_logits(
            z, y, reduction="none"
        ),
        "BCELoss of σ(z)": lambda z, y: _F.binary_cross_entropy(z.sigmoid(), y, reduction="none"),
        "textbook formula": _textbook_cross_entropy,
    },
    "quadratic": {
        "½ MSELoss of σ(z)": lambda z, y: 0.5 * _F.mse_loss(z.sigmoid(), y, reduction="none"),
        "textbook formula": lambda z, y: (1 / (1 + torch.exp(-z)) - y).square() / 2,
    },
    "sigmoid": {"torch.sigmoid": lambda z, y: z.sigmoid()},
}
"""What else computes a quantity of the proof, per component, by quantity and name."""
