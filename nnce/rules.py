"""The rules: equations 1 to 8 of the notes, each a plain function of tensors.

No autograd, no state, no imports from nnce. Rows are examples: the last dimension of a tensor is
the neurons of one layer, after any number of other dimensions. Products written ∘ are elementwise.
Arguments are not checked; `nnce.functional` does that. The letters are those of the notes:

    a_prev  activations of the layer before     z   weighted inputs of a layer
    W, b    weights [n_out, n_in], biases       a   activations, a = σ(z)
    y       targets in [0, 1], of z's shape     dX  dC/dX, C being the loss

Sums over components and means over a mini-batch are not here: rules 2 and 3 return one value per
component, and rule 6 sums over the examples it is given.

Where 1 − a would lose its digits, σ(−z) stands for it: they are equal, and it does not round to 0.

The focal losses are the cross-entropy times a power of q, how far a is from y: see `Focus`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = [
    "Focus",
    "cross_entropy",
    "dW",
    "da_prev",
    "db",
    "dy_focal",
    "dz_cross_entropy",
    "dz_focal",
    "dz_hidden",
    "dz_quadratic",
    "focal",
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


# ------------------------------------------------------------------------------ focal losses


class Focus(NamedTuple):
    """Options of the focal and the asymmetric loss: C = α_t q^γ_t L, per component.

        q = (1−y) p + y σ(−z)                        how far a is from y
        L = −(1−y) ln(1−p) − y ln σ(z)               the cross-entropy, of p for negative targets
        p = max(σ(z) − margin, 0)                    σ(z) without a margin
        γ_t = (1−y) gamma_negative + y gamma_positive
        α_t = (1−y) (1−alpha) + y alpha              1 without an alpha

    By the chain rule, dC/dz = α_t q^γ_t (dL + γ_t dq L/q), dL and dq being derivatives with
    respect to z. For y of 0 or 1 and no margin both terms have one sign, so nothing cancels: for
    y = 0, dC/dz = (1−alpha) a^γ (a − γ (1−a) ln(1−a)). Where σ(z) is at most the margin, C = dC/dz
    = 0: at the kink the derivative from the left.

    Source: Lin et al., Focal loss for dense object detection, 2017; Ridnik et al., Asymmetric loss
    for multi-label classification, 2021.

    >>> nnce.rules.Focus(gamma_positive=1, gamma_negative=4).gamma(torch.tensor([0.0, 1.0]))
    tensor([4., 1.])
    """

    gamma_positive: float
    """Exponent for y = 1, at least 0."""
    gamma_negative: float
    """Exponent for y = 0, at least 0."""
    margin: float = 0
    """In [0, 1), subtracted from σ(z) for negative targets."""
    alpha: float | None = None
    """Weight of positive targets, in [0, 1]; None for no weights."""

    def gamma(self, y: Tensor) -> Tensor | float:
        """γ_t."""
        if self.gamma_positive == self.gamma_negative:
            return self.gamma_positive
        return (1 - y) * self.gamma_negative + y * self.gamma_positive

    def alpha_t(self, y: Tensor) -> Tensor:
        """α_t; y's shape."""
        if self.alpha is None:
            return torch.ones_like(y)
        return (1 - y) * (1 - self.alpha) + y * self.alpha


class _Terms(NamedTuple):
    """q and L of a focal loss, and their derivatives with respect to z and y."""

    q: Tensor
    L: Tensor
    dq: Tensor
    dL: Tensor
    dq_by_y: Tensor
    dL_by_y: Tensor


def _terms(
    z: Tensor, y: Tensor, focus: Focus, sigmoid: Elementwise, softplus: Elementwise
) -> _Terms:
    a, not_a, prime, margin = sigmoid(z), sigmoid(-z), sigmoid_prime(z, sigmoid), focus.margin
    if margin:
        rest = not_a + margin  # 1 − p where p is not 0
        p, dp = (torch.where(a <= margin, 0.0, t) for t in (a - margin, prime))
        of_0 = torch.where(p < 0.5, -torch.log1p(-p.clamp(max=0.5)), -rest.log())
        d_of_0 = dp / rest
    else:
        p, dp, of_0, d_of_0 = a, prime, softplus(z), a
    of_1 = softplus(-z)
    q = (1 - y) * p + y * not_a
    return _Terms(
        # Where q is not a normal number all is negligible; but L/q, and the derivative of q^γ,
        # whose exponent may be negative, would be infinite.
        q.clamp(min=torch.finfo(q.dtype).tiny),
        weighted(y, of_1) + weighted(1 - y, of_0),
        (1 - y) * dp - y * prime,
        (1 - y) * d_of_0 - y * not_a,
        not_a - p,
        of_1 - of_0,
    )


def focal(
    z: Tensor,
    y: Tensor,
    focus: Focus,
    sigmoid: Elementwise = torch.sigmoid,
    softplus: Elementwise = softplus,
) -> Tensor:
    """A focal loss, per component: C = α_t q^γ_t L; z, y and C of one shape.

    >>> focus = nnce.rules.Focus(gamma_positive=2, gamma_negative=2)
    >>> nnce.rules.focal(torch.tensor([0.0]), torch.tensor([1.0]), focus)  # ¼ ln 2
    tensor([0.1733])
    """
    q, L, *_ = _terms(z, y, focus, sigmoid, softplus)
    return weighted(focus.alpha_t(y), q.pow(focus.gamma(y)) * L)


def dz_focal(
    z: Tensor,
    y: Tensor,
    focus: Focus,
    sigmoid: Elementwise = torch.sigmoid,
    softplus: Elementwise = softplus,
) -> Tensor:
    """Last layer, focal loss: dC/dz = α_t q^γ_t (dL + γ_t dq L/q); z's shape.

    >>> focus = nnce.rules.Focus(gamma_positive=2, gamma_negative=2)
    >>> nnce.rules.dz_focal(torch.tensor([0.0]), torch.tensor([1.0]), focus)
    tensor([-0.2983])
    """
    q, L, dq, dL, *_ = _terms(z, y, focus, sigmoid, softplus)
    gamma = focus.gamma(y)
    return focus.alpha_t(y) * q.pow(gamma) * (dL + gamma * weighted(dq, L / q))


def dy_focal(
    z: Tensor,
    y: Tensor,
    focus: Focus,
    sigmoid: Elementwise = torch.sigmoid,
    softplus: Elementwise = softplus,
) -> Tensor:
    """dC/dy of a focal loss, for soft targets that are trained themselves; z's shape.

    dC/dy = q^γ_t (α_t (dL + γ_t dq L/q + dγ_t ln q L) + dα_t L), d being derivatives with respect
    to y; see `Focus`.

    >>> focus = nnce.rules.Focus(gamma_positive=0, gamma_negative=0)
    >>> nnce.rules.dy_focal(torch.tensor([2.0]), torch.tensor([0.5]), focus)  # −z, for γ = 0
    tensor([-2.])
    """
    q, L, _, _, dq, dL = _terms(z, y, focus, sigmoid, softplus)
    gamma = focus.gamma(y)
    rate = dL + gamma * weighted(dq, L / q)
    if not isinstance(gamma, float):
        rate = rate + (focus.gamma_positive - focus.gamma_negative) * weighted(q.log(), L)
    rate = focus.alpha_t(y) * rate
    if focus.alpha is not None:
        rate = rate + (2 * focus.alpha - 1) * L
    return q.pow(gamma) * rate


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
    return _rows(dz).sum(0)


def da_prev(dz: Tensor, W: Tensor) -> Tensor:
    """Equation 7: dC/da_prev = Wᵀ dC/dz; dz [..., n_out], W [n_out, n_in] -> [..., n_in].

    >>> nnce.rules.da_prev(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([[3., 4.],
            [6., 8.]])
    """
    return dz @ W
