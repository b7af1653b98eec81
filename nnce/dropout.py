"""Dropout: neurons left out at random while a network learns.

Source: N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever, R. Salakhutdinov, Dropout: a simple
way to prevent neural networks from overfitting, JMLR 15, 2014.
"""

import torch
from torch import Tensor, nn


class WithDropout(nn.Module):
    """A network in PyTorch's graph as it learns: each example sees a part of it, of its own.

    What goes into a layer, a_prev, is a_prev ∘ m / (1 − p), with m 0 with probability p and 1
    otherwise, drawn anew for each neuron, example and step. So what comes of it is on average what
    it would be without, and the network that has learnt is used as it is.

    Args:
        layers: a network of linear layers and sigmoids.
        input: p of what comes in, in [0, 1).
        hidden: p of the hidden neurons, in [0, 1).
        stream: a number that fixes what is drawn, with the step; 32 bits count.

    Shape: x [n, n_in] -> z [n, n_out].
    """

    def __init__(self, layers: nn.Module, *, input: float, hidden: float, stream: int) -> None:
        """Nothing is drawn yet."""
        super().__init__()
        self.layers = layers
        self._input, self._hidden, self._stream = input, hidden, stream
        self._generator = torch.Generator(next(layers.parameters()).device)

    def at_step(self, step: int) -> None:
        """Draw what belongs to this step from now on, whatever was drawn before."""
        self._generator.manual_seed((self._stream ^ step) % 2**32)

    def forward(self, input: Tensor) -> Tensor:
        """z of the last layer, of what is left of the network."""
        p, a = self._input, input
        for layer in self.layers.children():
            if isinstance(layer, nn.Linear):
                a, p = self._thinned(a, p), self._hidden
            a = layer(a)
        return a

    def _thinned(self, a: Tensor, p: float) -> Tensor:
        if p == 0:
            return a
        kept = torch.empty_like(a).bernoulli_(1 - p, generator=self._generator)
        return a * kept.div_(1 - p)
