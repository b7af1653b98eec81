"""Backpropagation derived by hand for networks of sigmoid neurons, as PyTorch Functions.

Two losses, the quadratic one and the cross-entropy. Public modules:

- `nnce.rules`: equations 1 to 8 of the notes, and `nnce.losses`, the losses as a table of them
- `nnce.functional` and `nnce.modules`: the rules as autograd Functions, functions and modules
- `nnce.algorithm`: backpropagation without autograd, one whole pass
- `nnce.labels`: losses over very many labels
- `nnce.data` and `nnce.training`: data sets as tensors, and training by any engine
- `nnce.checks` and `nnce.monitoring`: the reports of `check_gradients`, `check_composability` and
  `watch`

The names below are also public here. Examples assume `import torch, nnce`. All but `experiments/`
needs torch alone; "Package layout" in README.md, next to this file, lists every file.
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

__version__ = "0.2.0"

# Objects pickled by nnce 0.1 name this module.
sys.modules[f"{__name__}.positives"] = positives
