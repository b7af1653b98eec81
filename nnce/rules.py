"""The rules: equations 1 to 8 of the notes, each a plain function of tensors.

No autograd and no state. Rows are examples: the last dimension of a tensor is the neurons of one
layer, and there may be any number of dimensions before it, or none. Products written ∘ are
elementwise. The letters are those of the notes:

    a_prev  activations of the layer before     z   weighted inputs of a layer
    W, b    weights [n_out, n_in], biases       a   activations, a = σ(z)
    y       targets in [0, 1], of z's shape     dX  the gradient of the loss C by X

The sums that make one number of a loss, and the mean over a mini-batch, are not here: rules 2 and 3
give one value per component, and rule 6 adds up over the examples it is given.

Where 1 − a would lose its digits, σ(−z) stands for it: they are equal, and it does not round to 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = [
    "cross_entropy",
    "dW",
    "da_prev",
    "db",
    "dz_cross_entropy",
    "dz_hidden",
    "dz_quadratic",
    "linear",
    "quadratic",
    "residual",
    "sigmoid",
    "sigmoid_prime",
    "softplus",
    "weighted",
]


# Rules that are made of σ or softplus take them as arguments, so that they can also be
# differentiated: nnce.functional hands in its own, whose derivatives stay exact in saturation.
Elementwise = Callable[[Tensor], Tensor]


# ------------------------------------------------------------------------------------- forward


def linear(a_prev: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """Equation 1, first half: z = W a_prev + b.

    a_prev [..., n_in], W [n_out, n_in], b [n_out] or None for no bias -> z [..., n_out].
    """
    return torch.nn.functional.linear(a_prev, W, b)  # a_prev @ W.T + b, rounded once


def sigmoid(z: Tensor) -> Tensor:
    """Equation 1, second half: a = σ(z) = 1 / (1 + e^(−z)), between 0 and 1; z's shape."""
    return torch.sigmoid(z)


def quadratic(z: Tensor, y: Tensor, sigmoid: Elementwise = torch.sigmoid) -> Tensor:
    """Equation 2, per component: C = ½ (a − y)²; z, y and C of one shape."""
    return 0.5 * residual(z, y, sigmoid).square()


def softplus(z: Tensor) -> Tensor:
    """softplus(z) = ln(1 + e^z) = −ln σ(−z); z's shape, at least 0.

    `torch.nn.functional.softplus` gives up at its threshold, z = 20, where in float64 it is off by
    10⁵ units in the last place; logsigmoid has no threshold.
    """
    return -logsigmoid(-z)


def cross_entropy(
    z: Tensor,
    y: Tensor,
    pos_weight: Tensor | None = None,
    softplus: Elementwise = softplus,
) -> Tensor:
    """Equation 3, per component: C = −[y ln a + (1−y) ln(1−a)]; z, y and C of one shape.

    Computed as y softplus(−z) + (1−y) softplus(z), which keeps its relative precision however small
    C is. A term whose weight is 0 is 0, at z = ±∞ as well. A pos_weight multiplies the first term.
    """
    return weighted(_positive(y, pos_weight), softplus(-z)) + weighted(1 - y, softplus(z))


def _positive(y: Tensor, pos_weight: Tensor | None) -> Tensor:
    """How much a positive target counts: y, or pos_weight ∘ y."""
    return y if pos_weight is None else pos_weight * y


def weighted(weight: Tensor, term: Tensor) -> Tensor:
    """weight ∘ term, where 0 · ∞ is 0: there is nothing to pay for what does not count.

    0 · NaN is NaN. Of one shape, or of shapes that broadcast.
    """
    return weight * torch.where((weight == 0) & term.isinf(), 0.0, term)


# ------------------------------------------------------------------- backward, elementwise


def residual(z: Tensor, y: Tensor, sigmoid: Elementwise = torch.sigmoid) -> Tensor:
    """a − y = a (1−y) − y (1−a) = (1−y) σ(z) − y σ(−z), the trick of the notes' integral.

    For y of 0 or 1 one term is left, so that no digits are lost where σ(z) − y would round to 0.
    Between them the terms cancel where a comes near y, and what is left is right to some units in
    the last place of the terms. z, y and the result of one shape.
    """
    return (1 - y) * sigmoid(z) - y * sigmoid(-z)


def sigmoid_prime(z: Tensor, sigmoid: Elementwise = torch.sigmoid) -> Tensor:
    """σ'(z) = a ∘ (1−a) = σ(z) ∘ σ(−z), at most ¼; z's shape."""
    return sigmoid(z) * sigmoid(-z)


def dz_quadratic(z: Tensor, y: Tensor, sigmoid: Elementwise = torch.sigmoid) -> Tensor:
    """Equation 4, last layer, quadratic loss: dC/dz = (a − y) ∘ σ'(z); z's shape."""
    return residual(z, y, sigmoid) * sigmoid_prime(z, sigmoid)


def dz_cross_entropy(
    z: Tensor,
    y: Tensor,
    sigmoid: Elementwise = torch.sigmoid,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Equation 5, last layer, cross-entropy: dC/dz = a − y; z's shape.

    A pos_weight multiplies the term of positive targets: (1−y) σ(z) − pos_weight y σ(−z).
    """
    return (1 - y) * sigmoid(z) - _positive(y, pos_weight) * sigmoid(-z)


def dz_hidden(da: Tensor, z: Tensor, sigmoid: Elementwise = torch.sigmoid) -> Tensor:
    """Equation 8, hidden layers: dC/dz = dC/da ∘ σ'(z); z's shape."""
    return da * sigmoid_prime(z, sigmoid)


# ------------------------------------------------------------------- backward, through the weights


def dW(dz: Tensor, a_prev: Tensor) -> Tensor:
    """Equation 6 for weights: dC/dW = dC/dz a_prevᵀ, summed over the examples.

    dz [..., n_out], a_prev [..., n_in] -> [n_out, n_in].
    """
    return _rows(dz).mT @ _rows(a_prev)


def _rows(tensor: Tensor) -> Tensor:
    """[..., n] -> [examples, n]; not reshape(-1, n), which cannot be said where n is 0."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def db(dz: Tensor) -> Tensor:
    """Equation 6 for biases: dC/db = dC/dz, summed over the examples.

    dz [..., n_out] -> [n_out].
    """
    return dz.sum_to_size(dz.shape[-1])


def da_prev(dz: Tensor, W: Tensor) -> Tensor:
    """Equation 7: dC/da_prev = Wᵀ dC/dz; dz [..., n_out], W [n_out, n_in] -> [..., n_in]."""
    return dz @ W
