"""The complete revised algorithm of the notes: forward, last delta, hidden deltas, gradients.

Written to be read next to the notes, and to inspect a network: it returns every z, a and delta.
May import `rules`, `losses`, `functional`, `modules` and the files with an underscore.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnce import rules
from nnce._arguments import check_alike
from nnce.losses import LOSSES, Loss, check_loss
from nnce.modules import MLP

__all__ = [
    "Hyperparameters",
    "Pass",
    "backprop",
    "deltas",
]


class Hyperparameters(NamedTuple):
    """Hyperparameters of one network, named as in `torch.optim.SGD`.

    >>> nnce.Hyperparameters("quadratic", lr=3.0)
    Hyperparameters(loss='quadratic', lr=3.0, momentum=0.0, weight_decay=0.0)
    """

    loss: Loss
    """Loss to minimize."""
    lr: float
    """Learning rate η, above 0."""
    momentum: float = 0.0
    """Momentum μ, in [0, 1)."""
    weight_decay: float = 0.0
    """L2 regularization λ / n_train, at least 0; applied to weights only."""


class Pass(NamedTuple):
    """All tensors of one pass; lists are ordered from the first layer with weights to the last.

    >>> nnce.algorithm.Pass._fields
    ('z', 'a', 'dz', 'gradients')
    """

    z: list[Tensor]
    """Weighted inputs, [n, neurons] each."""
    a: list[Tensor]
    """Activations σ(z), [n, neurons] each."""
    dz: list[Tensor]
    """dC/dz, [n, neurons] each; each row is for the C of one example, not divided by n."""
    gradients: dict[str, Tensor]
    """Gradients of C averaged over the examples, by parameter name."""


def backprop(
    network: MLP | Sequence[tuple[Tensor, Tensor | None]],
    x: Tensor,
    y: Tensor,
    *,
    loss: Loss = "cross-entropy",
) -> Pass:
    """Run one pass of the revised algorithm (equations 1 and 4 to 8), without autograd.

    Forward, z = W a_prev + b and a = σ(z); dC/dz of the last layer by (4) or (5), of hidden layers
    by (7) and (8); dC/dW and dC/db by (6).

    Args:
        network: an `nnce.MLP`, or a sequence of layers (W [n_out, n_in], b [n_out] or None).
        x: inputs, [n, n_in of the first layer].
        y: targets in [0, 1], [n, n_out of the last layer].
        loss: "quadratic" or "cross-entropy".

    Returns:
        All z, a and dC/dz, and the gradients of C averaged over the n examples, named as in an
        MLP's `state_dict` ("0.weight", "0.bias", "2.weight", …).

    Raises:
        ValueError: the loss is unknown; there is no layer; shapes or devices of the layers, x and y
            do not match; or the MLP is reparametrized or pruned.
        TypeError: network is neither an MLP nor a sequence of pairs, or the tensors do not have the
            same floating-point dtype.

    >>> W, b = torch.zeros(1, 2), torch.zeros(1)
    >>> done = nnce.backprop([(W, b)], torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0]]))
    >>> done.a, done.gradients["0.weight"]
    ([tensor([[0.5000]])], tensor([[-0.5000, -1.0000]]))
    """
    check_loss(loss)
    layers = _layers(network)
    check_alike({"x": x, "y": y, "W": layers[0][0]})
    n_in, n_out = layers[0][0].shape[1], layers[-1][0].shape[0]
    if x.dim() != 2 or x.shape[1] != n_in:
        raise ValueError(f"expected x of shape (n, {n_in}), got {tuple(x.shape)}")
    if y.shape != (len(x), n_out):
        raise ValueError(f"expected y of shape ({len(x)}, {n_out}), got {tuple(y.shape)}")
    with torch.no_grad():
        z, a, dz = deltas(layers, x, y, loss)

        # Gradients, averaged over the examples.
        n = len(x)
        gradients: dict[str, Tensor] = {}
        for layer, ((_, b), a_prev) in enumerate(zip(layers, [x, *a[:-1]], strict=True)):
            name = 2 * layer  # every second module of an MLP is a sigmoid
            gradients[f"{name}.weight"] = rules.dW(dz[layer], a_prev) / n  # (6)
            if b is not None:
                gradients[f"{name}.bias"] = rules.db(dz[layer]) / n  # (6)
    return Pass(z, a, dz, gradients)


_Layer = tuple[Tensor, Tensor | None]


def _layers(network: MLP | Sequence[_Layer]) -> list[_Layer]:
    """Return the layers as pairs (W, b), after checking their types and shapes."""
    if isinstance(network, MLP):
        return [(linear.weight, linear.bias) for linear in network.linears()]
    if not isinstance(network, Sequence):
        kind = type(network).__name__
        raise TypeError(f"expected an nnce.MLP or a sequence of pairs (W, b), got {kind}")
    layers = list(network)
    if not all(isinstance(layer, tuple | list) and len(layer) == 2 for layer in layers):
        raise TypeError("expected the layers as pairs (W, b), b a tensor or None")
    if not layers:
        raise ValueError("expected a network of at least one layer, got none")
    for number, (W, b) in enumerate(layers, start=1):
        check_alike({"the first W": layers[0][0], "W": W}, {"b": b})
        n_in = layers[number - 2][0].shape[0] if number > 1 else "n_in"
        if W.dim() != 2 or n_in not in ("n_in", W.shape[1]):
            raise ValueError(
                f"expected W of layer {number} of shape (n_out, {n_in}), got {tuple(W.shape)}"
            )
        if b is not None and b.shape != W.shape[:1]:
            raise ValueError(
                f"expected b of layer {number} of shape ({len(W)},), got {tuple(b.shape)}"
            )
    return layers


def deltas(
    layers: Sequence[tuple[Tensor, Tensor | None]], x: Tensor, y: Tensor, loss: Loss
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Compute z, a and dC/dz of every layer by equations 1, 4, 5, 7 and 8, without gradients.

    z = W a_prev + b, a = σ(z); the last dC/dz by (4) or (5), the others by (7) and (8). Arguments
    are not checked.

    Args:
        layers: pairs (W [n_out, n_in], b [n_out] or None).
        x: inputs, [n, n_in of the first layer].
        y: targets, [n, n_out of the last layer].
        loss: "quadratic" or "cross-entropy".

    Returns:
        z, a and dz, as in `Pass`.

    >>> layers = [(torch.zeros(1, 2), None)]
    >>> nnce.algorithm.deltas(layers, torch.ones(1, 2), torch.ones(1, 1), "quadratic")
    ([tensor([[0.]])], [tensor([[0.5000]])], [tensor([[-0.1250]])])
    """
    # Forward.
    z: list[Tensor] = []
    a: list[Tensor] = []
    for W, b in layers:
        z.append(rules.linear(a[-1] if a else x, W, b))  # (1)
        a.append(rules.sigmoid(z[-1]))  # (1)

    # Backward: the last delta, then each layer's from the one after it.
    dz = [LOSSES[loss].dz_last(z[-1], y)]  # (4) or (5)
    for (W, _), z_hidden in zip(reversed(layers[1:]), reversed(z[:-1]), strict=True):
        da = rules.da_prev(dz[-1], W)  # (7)
        dz.append(rules.dz_hidden(da, z_hidden))  # (8)
    dz.reverse()
    return z, a, dz
