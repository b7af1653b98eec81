"""Losses for very many labels, in memory that does not grow with the number of labels.

May import the notes' files and `kernels`.
"""

from nnce.labels.layer import LinearSigmoidCrossEntropyLoss
from nnce.labels.linear import (
    linear_sigmoid_asymmetric_loss,
    linear_sigmoid_cross_entropy,
    linear_sigmoid_focal_loss,
)
from nnce.labels.pairs import pair_sigmoid_cross_entropy
from nnce.labels.positives import Positives
from nnce.labels.sampled import sampled_sigmoid_cross_entropy

__all__ = [
    "LinearSigmoidCrossEntropyLoss",
    "Positives",
    "linear_sigmoid_asymmetric_loss",
    "linear_sigmoid_cross_entropy",
    "linear_sigmoid_focal_loss",
    "pair_sigmoid_cross_entropy",
    "sampled_sigmoid_cross_entropy",
]
