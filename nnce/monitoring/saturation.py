"""How a layer learns: how strongly it is pulled, and what its σ'(z) lets through.

The *learning slowdown* of the notes in figures, from z, dC/dz and the pull on a layer. Training and
`nnce.watch` take them from here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm as _norm

from nnce import rules
from nnce.losses import LOSSES, Loss

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
    return float(_let_through(pull, rules.sigmoid_prime(z)))


def hidden_layer(z: Tensor, dz: Tensor, da: Tensor) -> LayerFigures:
    """The figures of a hidden layer: z, dC/dz and dC/da, [n, neurons] each."""
    return LayerFigures(*_hidden_layer(z, dz, da).tolist())


def output_layer(z: Tensor, dz: Tensor, y: Tensor) -> LayerFigures:
    """The figures of the last layer: z, dC/dz and the targets, [n, neurons] each."""
    return LayerFigures(*_output_layer(z, dz, y).tolist())


# z, dC/dz, dC/da and y below are [..., n, neurons], and the figures [..., 4]: a row per network.


def _hidden_layer(z: Tensor, dz: Tensor, da: Tensor) -> Tensor:
    prime = rules.sigmoid_prime(z)
    return _figures(prime, dz, _let_through(da, prime))


def _output_layer(z: Tensor, dz: Tensor, y: Tensor) -> Tensor:
    prime, pull = rules.sigmoid_prime(z), rules.dz_cross_entropy(z, y)
    wrong = (pull.abs() > 0.5).any(-1, keepdim=True)  # [..., n, 1]
    let_through = _let_through(torch.where(wrong, pull, 0.0), torch.where(wrong, prime, 0.0))
    return _figures(prime, dz, let_through)


def _let_through(pull: Tensor, prime: Tensor) -> Tensor:
    share: Tensor = _norm(pull * prime, dim=(-2, -1)) / _norm(pull, dim=(-2, -1))
    return share


def _figures(prime: Tensor, dz: Tensor, let_through: Tensor) -> Tensor:
    figures = (
        _norm(dz, dim=-1).mean(-1),
        prime.mean((-2, -1)),
        (prime < SATURATED).sum((-2, -1)) / prime.shape[-2:].numel(),
        let_through,
    )
    return torch.stack([figure.double() for figure in figures], -1)


@torch.no_grad()
def layer_figures(
    layers: Sequence[tuple[Tensor, Tensor]], z: Sequence[Tensor], y: Tensor, loss: Loss
) -> list[list[LayerFigures]]:
    """How each layer of each of R networks learns, from the first layer with weights to the last.

    Args:
        layers: W [R, n_out, n_in] and b [R, n_out] of each layer.
        z: weighted inputs of each layer, [R, n, n_out].
        y: targets in [0, 1], [n, n_out of the last layer].
        loss: "quadratic" or "cross-entropy".

    Returns:
        For each network a list of its layers.
    """
    dz = LOSSES[loss].dz_last(z[-1], y)  # (4) or (5)
    figures = [_output_layer(z[-1], dz, y)]
    for (W, _), z_hidden in zip(reversed(layers[1:]), reversed(z[:-1]), strict=True):
        da = (W.mT @ dz.mT).mT  # (7), in z's order of memory
        dz = rules.dz_hidden(da, z_hidden)  # (8)
        figures.append(_hidden_layer(z_hidden, dz, da))
    by_network = torch.stack(figures[::-1], 1).tolist()  # [R, layers, 4]
    return [[LayerFigures(*layer) for layer in of_network] for of_network in by_network]
