"""Table of the differences between the two losses: value, last delta, textbook learning rate.

May import `rules`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from nnce import rules

__all__ = [
    "LOSSES",
    "Loss",
    "LossRules",
    "check_loss",
]


Loss = Literal["quadratic", "cross-entropy"]
"""Name of a loss.

>>> nnce.losses.Loss.__args__
('quadratic', 'cross-entropy')
"""


class LossRules(NamedTuple):
    """The rules of one loss.

    >>> rules = nnce.losses.LOSSES["quadratic"]
    >>> rules.dz_last(torch.tensor([0.0]), torch.tensor([1.0])), rules.has_sigmoid_prime
    (tensor([-0.1250]), True)
    """

    value: Callable[[Tensor, Tensor], Tensor]
    """value(z, y): C of each component, in the shape of z."""
    dz_last: Callable[[Tensor, Tensor], Tensor]
    """dz_last(z, y): dC/dz of the last layer, in the shape of z."""
    has_sigmoid_prime: bool
    """Whether dC/dz of the last layer is (a − y) ∘ σ'(z) rather than a − y."""
    textbook_lr: float
    """Learning rate in Nielsen's book (chapters 1 and 3)."""


# Lambdas look up each rule when it is called, so that replacing a rule takes effect everywhere.
LOSSES: dict[Loss, LossRules] = {
    "quadratic": LossRules(
        value=lambda z, y: rules.quadratic(z, y),  # (2)
        dz_last=lambda z, y: rules.dz_quadratic(z, y),  # (4)
        has_sigmoid_prime=True,
        textbook_lr=3.0,
    ),
    "cross-entropy": LossRules(
        value=lambda z, y: rules.cross_entropy(z, y),  # (3)
        dz_last=lambda z, y: rules.dz_cross_entropy(z, y),  # (5)
        has_sigmoid_prime=False,
        textbook_lr=0.5,
    ),
}
"""The rules of each loss: value, last delta, textbook learning rate.

>>> {name: rules.textbook_lr for name, rules in nnce.losses.LOSSES.items()}
{'quadratic': 3.0, 'cross-entropy': 0.5}
"""


def check_loss(loss: str) -> None:
    """Raise ValueError unless `loss` is "quadratic" or "cross-entropy".

    Raises:
        ValueError: loss is neither.

    >>> nnce.losses.check_loss("hinge")
    Traceback (most recent call last):
    ValueError: expected loss 'quadratic' or 'cross-entropy', got 'hinge'
    """
    if loss not in tuple(LOSSES):
        raise ValueError(f"expected loss {' or '.join(map(repr, LOSSES))}, got {loss!r}")
