"""Backpropagation derived by hand for networks of sigmoid neurons, as PyTorch Functions.

Two losses, the quadratic one and the cross-entropy. The equations are in `nnce.rules`; "Package
layout" in README.md, next to this file, lists the rest. All but `experiments/` needs torch alone.
"""

import sys

from nnce.algorithm import Hyperparameters, backprop
from nnce.checks import check_composability, check_gradients
from nnce.engines.ensemble import Ensemble
from nnce.functional import (
    linear,
    sigmoid,
    sigmoid_asymmetric_loss,
    sigmoid_cross_entropy,
    sigmoid_focal_loss,
    sigmoid_quadratic,
)
from nnce.labels import (
    LinearSigmoidCrossEntropyLoss,
    Positives,
    linear_sigmoid_asymmetric_loss,
    linear_sigmoid_cross_entropy,
    linear_sigmoid_focal_loss,
    pair_sigmoid_cross_entropy,
    positives,
    sampled_sigmoid_cross_entropy,
)
from nnce.modules import (
    MLP,
    BCEWithLogitsLoss,
    Linear,
    Sigmoid,
    SigmoidAsymmetricLoss,
    SigmoidCrossEntropyLoss,
    SigmoidFocalLoss,
    SigmoidQuadraticLoss,
)
from nnce.monitoring.watching import watch
from nnce.saving import load, save

__all__ = [
    "MLP",
    "BCEWithLogitsLoss",
    "Ensemble",
    "Hyperparameters",
    "Linear",
    "LinearSigmoidCrossEntropyLoss",
    "Positives",
    "Sigmoid",
    "SigmoidAsymmetricLoss",
    "SigmoidCrossEntropyLoss",
    "SigmoidFocalLoss",
    "SigmoidQuadraticLoss",
    "backprop",
    "check_composability",
    "check_gradients",
    "linear",
    "linear_sigmoid_asymmetric_loss",
    "linear_sigmoid_cross_entropy",
    "linear_sigmoid_focal_loss",
    "load",
    "pair_sigmoid_cross_entropy",
    "sampled_sigmoid_cross_entropy",
    "save",
    "sigmoid",
    "sigmoid_asymmetric_loss",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
    "sigmoid_quadratic",
    "watch",
]

__version__ = "0.1.0"

# Objects pickled by nnce 0.1 name this module.
sys.modules[f"{__name__}.positives"] = positives
