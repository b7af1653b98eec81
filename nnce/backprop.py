"""The revised algorithm of the notes, whole: forward, last delta by loss, hidden deltas, gradients.

To be read beside the notes, and to look inside a network: every z, a and delta is in the answer.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nnce import rules
from nnce.modules import MLP

Loss = Literal["quadratic", "cross-entropy"]
LOSSES: tuple[Loss, ...] = ("quadratic", "cross-entropy")


class Pass(NamedTuple):
    """What one pass found; lists go from the first layer with weights to the last."""

    z: list[Tensor]
    """Weighted inputs, [n, neurons] each."""
    a: list[Tensor]
    """Activations σ(z)."""
    dz: list[Tensor]
    """dC/dz, a row for each example, of that example's own C: not divided by n."""
    gradients: dict[str, Tensor]
    """The gradients of the mean of C over the examples, by the name of the parameter."""


def check_loss(loss: str) -> None:
    """Raise ValueError unless `loss` is "quadratic" or "cross-entropy"."""
    if loss not in LOSSES:
        raise ValueError(f"expected loss {' or '.join(map(repr, LOSSES))}, got {loss!r}")


def loss_per_component(z: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """C of each component, z's shape: equation 2 or 3."""
    return rules.quadratic(z, y) if loss == "quadratic" else rules.cross_entropy(z, y)


def dz_last(z: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """dC/dz of the last layer, z's shape: equation 4 or 5. All that sets the losses apart."""
    return rules.dz_quadratic(z, y) if loss == "quadratic" else rules.dz_cross_entropy(z, y)


def backprop(
    network: MLP | Sequence[tuple[Tensor, Tensor | None]],
    x: Tensor,
    y: Tensor,
    *,
    loss: Loss = "cross-entropy",
) -> Pass:
    """One pass of the revised backpropagation algorithm, without autograd.

    Args:
        network: an `nnce.MLP`, or the layers as pairs (W [n_out, n_in], b [n_out] or None).
        x: inputs, [n, n_in of the first layer].
        y: targets in [0, 1], [n, n_out of the last layer].
        loss: "quadratic" or "cross-entropy".

    Returns:
        All z, a and dC/dz, and the gradients of C averaged over the n examples, named as in an
        MLP's `state_dict` ("0.weight", "0.bias", "2.weight", …).

    Raises:
        ValueError: the loss is unknown, there is no layer, or x or y does not fit the network.
        TypeError: x or y is not of the network's dtype.
    """
    check_loss(loss)
    layers: list[tuple[Tensor, Tensor | None]] = (
        [(linear.weight, linear.bias) for linear in network.linears()]
        if isinstance(network, MLP)
        else list(network)
    )
    if not layers:
        raise ValueError("expected a network of at least one layer, got none")
    n_in, n_out = layers[0][0].shape[1], layers[-1][0].shape[0]
    if x.dim() != 2 or x.shape[1] != n_in:
        raise ValueError(f"expected x of shape (n, {n_in}), got {tuple(x.shape)}")
    if y.shape != (len(x), n_out):
        raise ValueError(f"expected y of shape ({len(x)}, {n_out}), got {tuple(y.shape)}")
    dtype = layers[0][0].dtype
    if not x.dtype == y.dtype == dtype:
        raise TypeError(f"expected x and y of dtype {dtype}, got {x.dtype} and {y.dtype}")
    with torch.no_grad():
        return _backprop(layers, x, y, loss)


def _backprop(layers: list[tuple[Tensor, Tensor | None]], x: Tensor, y: Tensor, loss: Loss) -> Pass:
    # Forward.
    z: list[Tensor] = []
    a = [x]
    for W, b in layers:
        z.append(rules.linear(a[-1], W, b))  # (1)
        a.append(rules.sigmoid(z[-1]))  # (1)

    # Backward: the last delta, then each layer's from the one after it.
    dz = [dz_last(z[-1], y, loss)]  # (4) or (5)
    for (W, _), z_hidden in zip(reversed(layers[1:]), reversed(z[:-1]), strict=True):
        da = rules.da_prev(dz[-1], W)  # (7)
        dz.append(rules.dz_hidden(da, z_hidden))  # (8)
    dz.reverse()

    # Gradients, averaged over the examples.
    n = len(x)
    gradients: dict[str, Tensor] = {}
    for layer, ((_, b), a_prev) in enumerate(zip(layers, a[:-1], strict=True)):
        name = 2 * layer  # in an MLP every other module is a sigmoid
        gradients[f"{name}.weight"] = rules.dW(dz[layer], a_prev) / n  # (6)
        if b is not None:
            gradients[f"{name}.bias"] = rules.db(dz[layer]) / n  # (6)
    return Pass(z, a[1:], dz, gradients)
