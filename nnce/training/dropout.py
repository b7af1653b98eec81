"""Dropout: leave out random neurons during training.

Source: N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever, R. Salakhutdinov, Dropout: a simple
way to prevent neural networks from overfitting, JMLR 15, 2014.
"""

import torch
from torch import Tensor, nn

# p is a multiple of 1/_PARTS: each neuron is decided by 16 random bits, four to a 64-bit draw.
_PARTS = 2**16
_PER_DRAW = 64 // 16


class WithDropout(nn.Module):
    """A network with dropout, for training in PyTorch's graph.

    The input a_prev of each layer is replaced by a_prev ∘ m / (1 − p), where m is 0 with
    probability p and 1 otherwise, drawn for each neuron, example and step. Its mean is a_prev, so
    the trained network is used unscaled. p is rounded to a multiple of 1/65,536, at most
    65,535/65,536.

    Args:
        layers: a network of linear layers and sigmoids.
        input: p for the inputs, in [0, 1).
        hidden: p for the hidden neurons, in [0, 1).
        stream: seed of the masks, combined with the step; only the low 32 bits are used.

    Shape: x [n, n_in] -> z [n, n_out].
    """

    def __init__(self, layers: nn.Module, *, input: float, hidden: float, stream: int) -> None:
        super().__init__()
        self.layers = layers
        self._input, self._hidden, self._stream = input, hidden, stream
        self._generator = torch.Generator(next(layers.parameters()).device)

    def at_step(self, step: int) -> None:
        """Seed the generator for this step, so that masks do not depend on earlier steps."""
        self._generator.manual_seed((self._stream ^ step) % 2**32)

    def forward(self, input: Tensor) -> Tensor:
        """Compute z of the last layer, with dropped neurons left out."""
        p, a = self._input, input
        for layer in self.layers.children():
            if isinstance(layer, nn.Linear):
                a, p = self._thinned(a, p), self._hidden
            a = layer(a)
        return a

    def _thinned(self, a: Tensor, p: float) -> Tensor:
        if p == 0:
            return a
        # bernoulli_ for 800 neurons takes as long as their matrix product, this a sixth of that.
        parts = min(round(p * _PARTS), _PARTS - 1)
        draws = -(-a.numel() // _PER_DRAW)
        drawn = torch.empty(draws, dtype=torch.int64, device=a.device)
        drawn.random_(-(2**63), None, generator=self._generator)
        kept = drawn.view(torch.int16)[: a.numel()].view(a.shape) >= parts - _PARTS // 2
        return a * kept * (_PARTS / (_PARTS - parts))
