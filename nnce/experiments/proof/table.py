"""Rows of nnce's compatibility tables: its functions and their PyTorch equivalents."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnce import functional
from nnce.checks import Composability, check_composability
from nnce.labels import linear_sigmoid_cross_entropy
from nnce.labels.pairs import pair_sigmoid_cross_entropy

_F = torch.nn.functional


def _random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Row(NamedTuple):
    """A function of nnce, its PyTorch equivalent, and inputs for both."""

    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    """Inputs in float64; examples are rows."""
    examples: tuple[bool, ...]
    """Whether each input has one row per example."""

    def check(self, only: Sequence[str] | None = None) -> Composability:
        """Run the checks named in `only` (default: all)."""
        return check_composability(
            self.function, *self.inputs, reference=self.reference, examples=self.examples, only=only
        )


def _focal(z: Tensor, y: Tensor) -> Tensor:
    C = _F.binary_cross_entropy_with_logits(z, y, reduction="none")
    q = z.sigmoid() * (1 - y) + (1 - z.sigmoid()) * y
    return ((0.25 * y + 0.75 * (1 - y)) * q.square() * C).sum()


def _asymmetric(z: Tensor, y: Tensor) -> Tensor:
    a = z.sigmoid()
    p = (a - 0.05).clamp(min=0)
    C = -y * a.log() - (1 - y) * (1 - p).log()
    return ((y * (1 - a) + (1 - y) * p).pow(y + 4 * (1 - y)) * C).sum()


def rows() -> dict[str, Row]:
    """Rows of the six functions with all derivatives."""
    z, y = _random(5, 3, seed=0), _random(5, 3, seed=1).sigmoid()
    a_prev, W, b = _random(5, 4, seed=2), _random(3, 4, seed=3), _random(3, seed=4)
    return {
        "linear": Row(functional.linear, _F.linear, (a_prev, W, b), (True, False, False)),
        "sigmoid": Row(functional.sigmoid, torch.sigmoid, (z,), (True,)),
        "sigmoid_quadratic": Row(
            lambda z, y: functional.sigmoid_quadratic(z, y, reduction="sum"),
            lambda z, y: 0.5 * _F.mse_loss(z.sigmoid(), y, reduction="sum"),
            (z, y),
            (True, True),
        ),
        "sigmoid_cross_entropy": Row(
            lambda z, y: functional.sigmoid_cross_entropy(z, y, reduction="sum"),
            lambda z, y: _F.binary_cross_entropy_with_logits(z, y, reduction="sum"),
            (z, y),
            (True, True),
        ),
        "sigmoid_focal_loss": Row(
            lambda z, y: functional.sigmoid_focal_loss(z, y, reduction="sum"),
            _focal,
            (z, y),
            (True, True),
        ),
        "sigmoid_asymmetric_loss": Row(
            lambda z, y: functional.sigmoid_asymmetric_loss(z, y, reduction="sum"),
            _asymmetric,
            (z, y),
            (True, True),
        ),
    }


def walked_rows() -> dict[str, Row]:
    """Rows of the blockwise functions, which have first derivatives only."""
    x, W, b = _random(3, 2, seed=2), _random(4, 2, seed=3), _random(4, seed=4)
    scale, bias = _random(seed=5), _random(seed=6)

    def positives(x: Tensor) -> Tensor:
        # −1 and 0, 1 and 2, 3 and −1, …; PyTorch before 2.9 cannot export a constant here.
        return torch.arange(2 * len(x), device=x.device).view(-1, 2) % 5 - 1

    def targets(x: Tensor) -> Tensor:
        return _F.one_hot(positives(x) % 5, 5).sum(1)[:, :4].to(x.dtype)

    def all_pairs(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        z, positive = scale * x @ y.mT + bias, torch.eye(len(x), dtype=x.dtype, device=x.device)
        return _F.binary_cross_entropy_with_logits(z, positive, reduction="sum") / len(x)

    return {
        "linear_sigmoid_cross_entropy": Row(
            lambda x, W, b: linear_sigmoid_cross_entropy(
                x, W, positives(x), linear_bias=b, block=3, reduction="sum"
            ),
            lambda x, W, b: _F.binary_cross_entropy_with_logits(
                _F.linear(x, W, b), targets(x), reduction="sum"
            ),
            (x, W, b),
            (True, False, False),
        ),
        "pair_sigmoid_cross_entropy": Row(
            lambda x, y, scale, bias: pair_sigmoid_cross_entropy(x, y, scale, bias, block=2),
            all_pairs,
            (x, _random(3, 2, seed=7), scale, bias),
            (True, True, False, False),
        ),
    }


REFUSED = {
    **dict.fromkeys(
        ("double backward", "compile, double backward", "func.hessian", "compile(hessian)"),
        "no second derivatives",
    ),
    **dict.fromkeys(("func.jvp", "forward mode in forward mode"), "no forward mode"),
    **dict.fromkeys(("func.vmap", "per-sample vmap(grad)", "compile(vmap(grad))"), "no vmap"),
    "leading dimensions": "examples are rows",
}
"""Columns that `walked_rows` do not support by design, with the reason."""
INSIDE_PYTORCH = {"compile, double backward": "aot_autograd has no double backward"}
"""Columns that fail because of limitations of PyTorch, with the reason."""
if torch.torch_version.TorchVersion(torch.__version__) >= "2.15":  # 2.6 to 2.14 could do these
    INSIDE_PYTORCH["compile(vmap(grad))"] = "dynamo's replacement of a Function has no vmap rule"
    INSIDE_PYTORCH["compile(hessian)"] = "dynamo cannot trace forward mode over its replacement"
