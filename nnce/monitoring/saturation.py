"""Saturation figures of a layer, which measure the *learning slowdown* of the notes.

They are computed from z, dC/dz, and dC/da or a − y, for training and for `nnce.watch`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm as _norm

from nnce import rules
from nnce.losses import LOSSES, Loss

# σ'(z) is at most ¼; below this value (|z| > 4.6) a neuron counts as saturated.
SATURATED = 0.01


class LayerFigures(NamedTuple):
    """Saturation figures of one layer, over a set of examples."""

    dz_norm: float
    """‖dC/dz‖ of one example, averaged over the examples."""
    sigmoid_prime: float
    """σ'(z), averaged over examples and neurons, in [0, ¼]."""
    saturated: float
    """Share of (example, neuron) pairs with σ'(z) below 0.01, in [0, 1]."""
    slowdown: float
    """Hidden layer: `slowdown` of dC/da, in [0, ¼]. Last layer: the *slowdown meter*, ‖dz
    quadratic‖ / ‖dz cross-entropy‖ for either loss, over only the examples with an error above ½;
    NaN if there are no such examples."""


def slowdown(pull: Tensor, z: Tensor) -> float:
    """Factor by which σ'(z) shrinks an error signal: ‖pull ∘ σ'(z)‖ / ‖pull‖, in [0, ¼].

    With pull = a − y it is ‖dz quadratic‖ / ‖dz cross-entropy‖ (equations 4 and 5); with dC/da of a
    hidden layer, ‖dC/dz‖ / ‖dC/da‖ (equation 8). NaN if pull is 0.
    """
    return float(_shrinkage(pull, rules.sigmoid_prime(z)))


# z, dC/dz, dC/da and y below are [..., n, neurons]; figures are [..., 4], those of `LayerFigures`.


def hidden_layer(z: Tensor, dz: Tensor, da: Tensor) -> Tensor:
    """Figures of a hidden layer, from z, dC/dz and dC/da."""
    prime = rules.sigmoid_prime(z)
    return _figures(prime, dz, _shrinkage(da, prime))


def output_layer(z: Tensor, dz: Tensor, y: Tensor) -> Tensor:
    """Figures of the last layer, from z, dC/dz and the targets."""
    prime, error = rules.sigmoid_prime(z), rules.dz_cross_entropy(z, y)
    wrong = (error.abs() > 0.5).any(-1, keepdim=True)  # [..., n, 1]
    shrinkage = _shrinkage(torch.where(wrong, error, 0.0), torch.where(wrong, prime, 0.0))
    return _figures(prime, dz, shrinkage)


def _shrinkage(error: Tensor, prime: Tensor) -> Tensor:
    share: Tensor = _norm(error * prime, dim=(-2, -1)) / _norm(error, dim=(-2, -1))
    return share


def _figures(prime: Tensor, dz: Tensor, shrinkage: Tensor) -> Tensor:
    figures = (
        _norm(dz, dim=-1).mean(-1),
        prime.mean((-2, -1)),
        (prime < SATURATED).sum((-2, -1)) / prime.shape[-2:].numel(),
        shrinkage,
    )
    return torch.stack([figure.double() for figure in figures], -1)


@torch.no_grad()
def layer_figures(
    layers: Sequence[tuple[Tensor, Tensor]], z: Sequence[Tensor], y: Tensor, loss: Loss
) -> list[list[LayerFigures]]:
    """Figures of each layer of R networks.

    Args:
        layers: W [R, n_out, n_in] and b [R, n_out] of each layer.
        z: weighted inputs of each layer, [R, n, n_out].
        y: targets in [0, 1], [n, n_out of the last layer].
        loss: "quadratic" or "cross-entropy".

    Returns:
        For each network, the figures of its layers with weights, first to last.
    """
    dz = LOSSES[loss].dz_last(z[-1], y)  # (4) or (5)
    figures = [output_layer(z[-1], dz, y)]
    for (W, _), z_hidden in zip(reversed(layers[1:]), reversed(z[:-1]), strict=True):
        da = (W.mT @ dz.mT).mT  # (7), in the memory layout of z
        prime = rules.sigmoid_prime(z_hidden)
        dz = da * prime  # (8)
        figures.append(_figures(prime, dz, _shrinkage(da, prime)))
    by_network = torch.stack(figures[::-1], 1).tolist()  # [R, layers, 4]
    return [[LayerFigures(*layer) for layer in of_network] for of_network in by_network]
