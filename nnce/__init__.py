"""Backpropagation derived by hand for networks of sigmoid neurons, as PyTorch Functions.

Two losses, the quadratic one and the cross-entropy. The equations are in `nnce.rules`; README.md
beside this file says what else is where, and in what order: a file imports only what stands above
it there, and all but `experiments/` needs torch alone.
"""

import sys

from nnce.algorithm import Hyperparameters as Hyperparameters
from nnce.algorithm import backprop as backprop
from nnce.checks import check_composability as check_composability
from nnce.checks import check_gradients as check_gradients
from nnce.engines.ensemble import Ensemble as Ensemble
from nnce.functional import linear as linear
from nnce.functional import sigmoid as sigmoid
from nnce.functional import sigmoid_cross_entropy as sigmoid_cross_entropy
from nnce.functional import sigmoid_quadratic as sigmoid_quadratic
from nnce.labels import LinearSigmoidCrossEntropyLoss as LinearSigmoidCrossEntropyLoss
from nnce.labels import Positives as Positives
from nnce.labels import linear_sigmoid_cross_entropy as linear_sigmoid_cross_entropy
from nnce.labels import pair_sigmoid_cross_entropy as pair_sigmoid_cross_entropy
from nnce.labels import positives
from nnce.labels import sampled_sigmoid_cross_entropy as sampled_sigmoid_cross_entropy
from nnce.modules import MLP as MLP
from nnce.modules import Linear as Linear
from nnce.modules import Sigmoid as Sigmoid
from nnce.modules import SigmoidCrossEntropyLoss as SigmoidCrossEntropyLoss
from nnce.modules import SigmoidQuadraticLoss as SigmoidQuadraticLoss
from nnce.monitoring.watching import watch as watch
from nnce.saving import load as load
from nnce.saving import save as save

__version__ = "0.1.0"

# Objects pickled by nnce 0.1 name this module.
sys.modules["nnce.labels.positives"] = positives
