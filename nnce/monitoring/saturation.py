"""How a layer learns: how strongly it is pulled, and what its σ'(z) lets through.

The *learning slowdown* of the notes in figures, from z, dC/dz and the pull on a layer. Training and
`nnce.watch` take them from here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nnce import rules
from nnce.algorithm import deltas
from nnce.losses import Loss
from nnce.modules import MLP

# σ'(z) is ¼ at most; below this a neuron counts as saturated (|z| above 4.6).
SATURATED = 0.01


class LayerFigures(NamedTuple):
    """How one layer learns, over some examples."""

    dz_norm: float
    """‖dC/dz‖ of one example, averaged over the examples."""
    sigmoid_prime: float
    """σ'(z), averaged over examples and neurons, in [0, ¼]."""
    saturated: float
    """The share of (example, neuron) pairs with σ'(z) below 0.01, in [0, 1]."""
    slowdown: float
    """`slowdown` of dC/da, in [0, ¼]. Of the last layer it is the *slowdown meter*, over the
    examples that are wrong by more than ½ alone: ‖dz quadratic‖ / ‖dz cross-entropy‖, whatever the
    loss. NaN where no example is that wrong."""


def slowdown(pull: Tensor, z: Tensor) -> float:
    """How much of a pull on a layer its σ'(z) lets through: ‖pull ∘ σ'(z)‖ / ‖pull‖, in [0, ¼].

    With a − y for the pull it is ‖dz quadratic‖ / ‖dz cross-entropy‖ (equations 4 and 5), with
    dC/da of a hidden layer ‖dC/dz‖ / ‖dC/da‖ (equation 8). NaN where nothing pulls.
    """
    return float(rules.dz_hidden(pull, z).norm() / pull.norm())


def hidden_layer(z: Tensor, dz: Tensor, da: Tensor) -> LayerFigures:
    """The figures of a hidden layer: z, dC/dz and dC/da, [n, neurons] each."""
    return _figures(z, dz, slowdown(da, z))


def output_layer(z: Tensor, dz: Tensor, y: Tensor) -> LayerFigures:
    """The figures of the last layer: z, dC/dz and the targets, [n, neurons] each."""
    wrong = ((rules.sigmoid(z) - y).abs() > 0.5).any(-1)  # [n]: the examples that are
    return _figures(z, dz, slowdown(rules.dz_cross_entropy(z, y)[wrong], z[wrong]))


def _figures(z: Tensor, dz: Tensor, let_through: float) -> LayerFigures:
    prime = rules.sigmoid_prime(z)
    return LayerFigures(
        dz_norm=dz.norm(dim=-1).mean().item(),
        sigmoid_prime=prime.mean().item(),
        saturated=(prime < SATURATED).double().mean().item(),
        slowdown=let_through,
    )


@torch.no_grad()
def layer_figures(network: MLP, x: Tensor, y: Tensor, loss: Loss) -> list[LayerFigures]:
    """How each layer of a network learns, from the first layer with weights to the last.

    Args:
        network: whose layers.
        x: inputs, [n, n_in].
        y: targets in [0, 1], [n, n_out].
        loss: "quadratic" or "cross-entropy".
    """
    layers = network.weights_and_biases()
    z, _, dz = deltas(layers, x, y, loss)
    hidden = [
        hidden_layer(z[layer], dz[layer], rules.da_prev(dz[layer + 1], layers[layer + 1][0]))
        for layer in range(len(layers) - 1)
    ]
    return [*hidden, output_layer(z[-1], dz[-1], y)]
