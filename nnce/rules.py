"""The rules: equations 1 to 8 of the notes, each a plain function of tensors.

No autograd and no state. Rows are examples: the last dimension of a tensor is the neurons of one
layer, after any number of other dimensions. Products written ∘ are elementwise. Arguments are not
checked; `nnce.functional` does that. The letters are those of the notes:

    a_prev  activations of the layer before     z   weighted inputs of a layer
    W, b    weights [n_out, n_in], biases       a   activations, a = σ(z)
    y       targets in [0, 1], of z's shape     dX  dC/dX, C being the loss

Sums over components and means over a mini-batch are not here: rules 2 and 3 return one value per
component, and rule 6 sums over the examples it is given.

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

    >>> nnce.rules.linear(torch.tensor([1.0, 2.0]), torch.eye(2), torch.tensor([0.0, 0.5]))
    tensor([1.0000, 2.5000])
    """
    return torch.nn.functional.linear(a_prev, W, b)  # a_prev @ W.T + b, rounded once


def sigmoid(z: Tensor) -> Tensor:
    """Equation 1, second half: a = σ(z) = 1 / (1 + e^(−z)), between 0 and 1; z's shape.

    >>> nnce.rules.sigmoid(torch.tensor([-2.0, 0.0, 2.0]))
    tensor([0.1192, 0.5000, 0.8808])
    """
    return torch.sigmoid(z)


def quadratic(z: Tensor, y: Tensor, sigmoid: Elementwise = torch.sigmoid) -> Tensor:
    """Equation 2, per component: C = ½ (a − y)²; z, y and C of one shape.

    >>> nnce.rules.quadratic(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))
    tensor([0.1250, 0.0071])
    """
    return 0.5 * residual(z, y, sigmoid).square()


def softplus(z: Tensor) -> Tensor:
    """softplus(z) = ln(1 + e^z) = −ln σ(−z), at least 0; z's shape.

    `torch.nn.functional.softplus` returns z beyond its threshold, 20, where in float64 it is off by
    10⁵ units in the last place; logsigmoid has no threshold.

    >>> nnce.rules.softplus(torch.tensor([-80.0, 0.0, 80.0]))
    tensor([1.8049e-35, 6.9315e-01, 8.0000e+01])
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

    >>> nnce.rules.cross_entropy(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))
    tensor([0.6931, 0.1269])
    """
    return weighted(_positive(y, pos_weight), softplus(-z)) + weighted(1 - y, softplus(z))


def _positive(y: Tensor, pos_weight: Tensor | None) -> Tensor:
    """How much a positive target counts: y, or pos_weight ∘ y."""
    return y if pos_weight is None else pos_weight * y


def weighted(weight: Tensor, term: Tensor) -> Tensor:
    """weight ∘ term, where 0 · ∞ = 0: components with weight 0 contribute no loss.

    0 · NaN is NaN. Both of one shape, or of shapes that broadcast.

    >>> nnce.rules.weighted(torch.tensor([0.0, 2.0]), torch.tensor([torch.inf, 3.0]))
    tensor([0., 6.])
    """
    return weight * torch.where((weight == 0) & term.isinf(), 0.0, term)


# ------------------------------------------------------------------- backward, elementwise


def residual(z: Tensor, y: Tensor, sigmoid: Elementwise = torch.sigmoid) -> Tensor:
    """a − y = a (1−y) − y (1−a) = (1−y) σ(z) − y σ(−z), the identity used in the notes' integral.

    For y of 0 or 1 one term is left, so no digits are lost where σ(z) − y would round to 0. For y
    between 0 and 1 the terms cancel where a is close to y; the error is then a few units in the
    last place of the terms. z, y and the result of one shape.

    >>> nnce.rules.residual(torch.tensor([0.0, 40.0]), torch.tensor([0.0, 1.0]))
    tensor([ 5.0000e-01, -4.2484e-18])
    """
    return (1 - y) * sigmoid(z) - y * sigmoid(-z)


def sigmoid_prime(z: Tensor, sigmoid: Elementwise = torch.sigmoid) -> Tensor:
    """σ'(z) = a ∘ (1−a) = σ(z) ∘ σ(−z), at most ¼; z's shape.

    >>> nnce.rules.sigmoid_prime(torch.tensor([0.0, 40.0]))
    tensor([2.5000e-01, 4.2484e-18])
    """
    return sigmoid(z) * sigmoid(-z)


def dz_quadratic(z: Tensor, y: Tensor, sigmoid: Elementwise = torch.sigmoid) -> Tensor:
    """Equation 4, last layer, quadratic loss: dC/dz = (a − y) ∘ σ'(z); z's shape.

    A neuron that is badly wrong (the second one) hardly learns:

    >>> nnce.rules.dz_quadratic(torch.tensor([0.0, 9.0]), torch.tensor([0.0, 0.0]))
    tensor([1.2500e-01, 1.2336e-04])
    """
    return residual(z, y, sigmoid) * sigmoid_prime(z, sigmoid)


def dz_cross_entropy(
    z: Tensor,
    y: Tensor,
    sigmoid: Elementwise = torch.sigmoid,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Equation 5, last layer, cross-entropy: dC/dz = a − y; z's shape.

    A pos_weight multiplies the term of positive targets: (1−y) σ(z) − pos_weight y σ(−z).

    >>> nnce.rules.dz_cross_entropy(torch.tensor([0.0, 9.0]), torch.tensor([0.0, 0.0]))
    tensor([0.5000, 0.9999])
    """
    return (1 - y) * sigmoid(z) - _positive(y, pos_weight) * sigmoid(-z)


def dz_hidden(da: Tensor, z: Tensor, sigmoid: Elementwise = torch.sigmoid) -> Tensor:
    """Equation 8, hidden layers: dC/dz = dC/da ∘ σ'(z); z's shape.

    >>> nnce.rules.dz_hidden(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
    tensor([0.2500, 0.5000])
    """
    return da * sigmoid_prime(z, sigmoid)


# ------------------------------------------------------------------- backward, through the weights


def dW(dz: Tensor, a_prev: Tensor) -> Tensor:
    """Equation 6 for weights: dC/dW = dC/dz a_prevᵀ, summed over the examples.

    dz [..., n_out], a_prev [..., n_in] -> [n_out, n_in].

    >>> nnce.rules.dW(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([[13., 16.]])
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

    >>> nnce.rules.db(torch.tensor([[1.0], [2.0]]))
    tensor([3.])
    """
    return dz.sum_to_size(dz.shape[-1])


def da_prev(dz: Tensor, W: Tensor) -> Tensor:
    """Equation 7: dC/da_prev = Wᵀ dC/dz; dz [..., n_out], W [n_out, n_in] -> [..., n_in].

    >>> nnce.rules.da_prev(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([[3., 4.],
            [6., 8.]])
    """
    return dz @ W
