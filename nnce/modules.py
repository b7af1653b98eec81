"""Layers, networks and losses as `torch.nn.Module`s, which hold only parameters and options.

The arithmetic is in `nnce.functional`, and the rules are in `nnce.rules`. May import `rules`,
`losses`, `functional` and the files with an underscore.
"""

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nnce import functional
from nnce._arguments import (
    check_focus,
    check_ignore_index,
    check_label_smoothing,
    check_reduction,
    is_number,
    is_size,
    plain,
)
from nnce.functional import Reduction

__all__ = [
    "INITS",
    "MLP",
    "BCEWithLogitsLoss",
    "Init",
    "Linear",
    "Sigmoid",
    "SigmoidAsymmetricLoss",
    "SigmoidCrossEntropyLoss",
    "SigmoidFocalLoss",
    "SigmoidQuadraticLoss",
]


Init = Literal["scaled", "large"] | float
"""Initialization of a layer: "scaled", "large", or a standard deviation (see `Linear`).

>>> nnce.Linear(2, 1, init=0.1).init
0.1
"""
INITS: tuple[str, ...] = ("scaled", "large")
"""Named initializations.

>>> nnce.modules.INITS
('scaled', 'large')
"""


def check_init(init: Init) -> Init:
    """Return "scaled", "large" or a positive standard deviation; raise ValueError for others."""
    if is_number(init) and 0 < init < math.inf:
        return plain(init)
    if init not in INITS:
        names = ", ".join(map(repr, INITS))
        raise ValueError(f"expected init {names} or a positive standard deviation, got {init!r}")
    return init


class Linear(nn.Linear):
    """z = W a_prev + b (equation 1), differentiated by hand (equations 6 and 7).

    A subclass of `torch.nn.Linear` with the initialization of the textbook (see Source). It is
    drawn in float64 on the generator's device, so that a seed gives the same network in every dtype
    and on every device.

    Args:
        in_features: n_in, at least 1.
        out_features: n_out, at least 1.
        bias: whether there is a bias b.
        init: "scaled" for weights from N(0, 1/n_in) or "large" for weights from N(0, 1), with
            biases from N(0, 1); or a number for weights and biases from N(0, init²).
        generator: source of the random numbers; None for PyTorch's global generator.
        device, dtype: of the parameters.

    Shape: a_prev [..., in_features] -> z [..., out_features].

    Raises:
        ValueError: a size is not positive, the initialization is unknown, or the dtype is not a
            floating-point dtype.
        TypeError: dtype is not a torch.dtype.

    Source: M. Nielsen, Neural Networks and Deep Learning, chapters 1 and 3, `network2.py`.

    >>> layer = nnce.Linear(784, 30, generator=torch.Generator().manual_seed(0))
    >>> layer(torch.zeros(5, 784)).shape
    torch.Size([5, 30])
    """

    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        init: Init = "scaled",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # torch.nn.Linear.__init__ would draw from the global generator
        if not (is_size(in_features) and is_size(out_features)):
            raise ValueError(
                f"expected positive whole sizes, got in_features={in_features!r}, "
                f"out_features={out_features!r}"
            )
        in_features, out_features, init = int(in_features), int(out_features), check_init(init)
        if not isinstance(dtype, torch.dtype | None):
            raise TypeError(f"expected dtype to be a torch.dtype, got {dtype!r}")
        if not (dtype is None or dtype.is_floating_point):
            raise ValueError(f"expected a floating-point dtype, got {dtype}")
        self.in_features, self.out_features, self.init = in_features, out_features, init
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype)
        )
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None,
        )
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Redraw the weights, then the biases."""
        sd, of_biases = 1.0, 1.0
        if self.init == "scaled":
            sd = self.in_features**-0.5
        elif not isinstance(self.init, str):
            sd = of_biases = self.init
        with torch.no_grad():
            self.weight.copy_(_standard_normal(self.weight, generator).mul_(sd))
            if self.bias is not None:
                self.bias.copy_(_standard_normal(self.bias, generator).mul_(of_biases))

    def forward(self, input: Tensor) -> Tensor:
        """z [..., out_features] for a_prev [..., in_features]."""
        return functional.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        """The sizes, bias and initialization."""
        return f"{super().extra_repr()}, init={self.init!r}"


def _standard_normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=torch.float64)


class Sigmoid(nn.Sigmoid):
    """a = σ(z) (equation 1), differentiated by hand from z (equation 8). Any shape.

    A subclass of `torch.nn.Sigmoid`.

    Raises:
        TypeError: z is not a tensor or not floating-point.

    >>> nnce.Sigmoid()(torch.tensor([-2.0, 0.0, 2.0]))
    tensor([0.1192, 0.5000, 0.8808])
    """

    def forward(self, input: Tensor) -> Tensor:
        """a = σ(z) in [0, 1], of z's shape."""
        return functional.sigmoid(input)


class MLP(nn.Sequential):
    """A network of sigmoid neurons: `Linear`, `Sigmoid`, `Linear`, …; returns z of the last layer.

    a = σ(W a_prev + b) in every layer (equation 1), but the last sigmoid is part of the loss:
    `nnce.sigmoid(network(x))` gives the activations of the last layer. Parameters are named as in a
    `torch.nn.Sequential` of `torch.nn.Linear` and `torch.nn.Sigmoid`, so each can load the other's
    `state_dict`.

    Args:
        sizes: number of neurons in each layer, starting with the input: (784, 30, 10).
        init, generator, device, dtype: as for `Linear`; layers are drawn from first to last.

    Shape: x [..., sizes[0]] -> z [..., sizes[-1]].

    Raises:
        ValueError: fewer than two sizes, one that is not positive, or as for `Linear`.

    >>> network = nnce.MLP((784, 30, 10))
    >>> [name for name, _ in network.named_parameters()]
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    about: Mapping[str, Any] = MappingProxyType({})
    """JSON values that `nnce.save` stores with the parameters. `nnce.training` copies them from
    the data set: see `nnce.data.Dataset.about`."""

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        init: Init = "scaled",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        given = tuple(sizes) if isinstance(sizes, Iterable) else ()
        if len(given) < 2 or not all(map(is_size, given)):
            raise ValueError(
                f"expected at least two positive whole sizes, the input's first, got {sizes!r}"
            )
        self.sizes = tuple(map(int, given))
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(self.sizes):
            layers += [
                Linear(n_in, n_out, init=init, generator=generator, device=device, dtype=dtype),
                Sigmoid(),
            ]
        super().__init__(*layers[:-1])

    def __getitem__(self, index: slice | int) -> Any:
        """One layer, or for a slice a plain `torch.nn.Sequential` of layers."""
        if isinstance(index, slice):
            every = self.named_modules(remove_duplicate=False)
            layers = [(name, layer) for name, layer in every if name and "." not in name]
            return nn.Sequential(OrderedDict(layers[index]))
        return super().__getitem__(index)

    def linears(self) -> list[Linear]:
        """The layers with parameters, from first to last.

        Raises:
            ValueError: the layers no longer match `sizes`, a layer was reparametrized or pruned, so
                that its weight or bias is not its own parameter, or a forward was replaced.
        """
        linears = [layer for layer in self if isinstance(layer, Linear)]
        sizes = [(layer.in_features, layer.out_features) for layer in linears]
        alternate = all(
            isinstance(layer, Sigmoid if index % 2 else Linear) for index, layer in enumerate(self)
        )
        whole = alternate and len(self) == 2 * len(linears) - 1
        if not whole or sizes != list(itertools.pairwise(self.sizes)):
            raise ValueError(
                f"expected the layers of an MLP of sizes {self.sizes}, but some have been added, "
                f"replaced or taken out"
            )
        for layer in [self, *self]:
            base = nn.Sequential if layer is self else Linear if layer in linears else Sigmoid
            if type(layer).forward is not base.forward or "forward" in vars(layer):
                raise ValueError(f"expected a {base.__name__} whose forward is its own")
        for layer in linears:
            own = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
            names = [name for name, _ in own]
            if not {"weight"} <= set(names) <= {"weight", "bias"}:
                raise ValueError(
                    f"expected layers with a weight and a bias of their own, but one has been "
                    f"reparametrised or pruned: it has {' and '.join(names)}"
                )
        return linears

    def weights_and_biases(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """W [n_out, n_in] and b [n_out] of each layer, from first to last.

        Raises:
            ValueError: as for `linears`, or a layer has no bias.
        """
        pairs = [(linear.weight, linear.bias) for linear in self.linears()]
        if any(b is None for _, b in pairs):
            raise ValueError("expected a network whose layers all have a bias")
        return [(W, b) for W, b in pairs if b is not None]


def options_of(loss: nn.Module) -> str:
    """A loss's reduction, and nnce's options that differ from their defaults."""
    options = {
        **{"prior": None, "label_smoothing": 0, "ignore_index": None, "block": None},
        **{"alpha": 0.25, "gamma": 2, "gamma_positive": 1, "gamma_negative": 4, "margin": 0.05},
    }
    unusual = [
        f"{name}={getattr(loss, name)!r}"
        for name, usual in options.items()
        if getattr(loss, name, usual) != usual
    ]
    return ", ".join([f"reduction={loss.reduction!r}", *unusual])


class _SigmoidLoss(nn.Module):
    """The options that all of nnce's own losses have."""

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self, reduction: Reduction, ignore_index: int | None, **weights: Tensor | None
    ) -> None:
        """Check the options; register weights as buffers, after a single check of their values."""
        super().__init__()
        check_reduction(reduction)
        self.reduction, self.ignore_index = reduction, check_ignore_index(ignore_index)
        for name, tensor in weights.items():
            if not isinstance(tensor, Tensor | None):
                raise TypeError(f"expected {name} to be a tensor, got {type(tensor).__name__}")
            # With negative weights, PyTorch would maximize the loss.
            if tensor is not None and not tensor.is_meta and not bool((tensor >= 0).all()):
                raise ValueError(f"expected {name} of at least 0, got {tensor.tolist()}")
            self.register_buffer(name, tensor)

    extra_repr = options_of


class SigmoidQuadraticLoss(_SigmoidLoss):
    """C = ½ ‖σ(z) − y‖², the notes' first loss: `nnce.functional.sigmoid_quadratic`.

    Args:
        reduction, ignore_index: as for the function.

    Shape: z and y [..., components], y in [0, 1] or ignore_index -> a scalar, or z's shape for
        "none".

    Raises:
        TypeError: ignore_index is not an integer.
        ValueError: the reduction is unknown, or ignore_index is 0 or 1.

    Source: equations 2 and 4 of the notes.

    >>> nnce.SigmoidQuadraticLoss()(torch.zeros(2, 3), torch.ones(2, 3))
    tensor(0.3750)
    """

    def __init__(
        self, reduction: Reduction = "batchmean", *, ignore_index: int | None = None
    ) -> None:
        super().__init__(reduction, ignore_index)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """C for the weighted inputs z of the last layer and the targets y."""
        return functional.sigmoid_quadratic(
            z, y, ignore_index=self.ignore_index, reduction=self.reduction
        )


class SigmoidCrossEntropyLoss(_SigmoidLoss):
    """C = −Σ [y ln σ(z) + (1−y) ln(1 − σ(z))]: `nnce.functional.sigmoid_cross_entropy`.

    The default reduction averages over the examples: all dimensions except the last. For z of shape
    [N] or [N, C, H, W] the result is N or W times the mean of `torch.nn.BCEWithLogitsLoss`. To
    replace that loss, use `BCEWithLogitsLoss`.

    Args:
        reduction, label_smoothing, ignore_index: as for the function.
        weight, pos_weight: as for the function; at least 0, and buffers as in PyTorch.

    Shape: as for `SigmoidQuadraticLoss`.

    Raises:
        TypeError: a weight is not a tensor, label_smoothing is not a number, or ignore_index is not
            an integer.
        ValueError: the reduction is unknown, a weight is negative or NaN, label_smoothing is not in
            [0, 1), or ignore_index is 0 or 1.

    Source: equations 3 and 5 of the notes.

    >>> loss = nnce.SigmoidCrossEntropyLoss(pos_weight=torch.tensor([1.0, 3.0]))
    >>> loss(torch.zeros(4, 2), torch.ones(4, 2))
    tensor(2.7726)
    """

    def __init__(
        self,
        reduction: Reduction = "batchmean",
        *,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        label_smoothing: float = 0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(reduction, ignore_index, weight=weight, pos_weight=pos_weight)
        self.label_smoothing = check_label_smoothing(label_smoothing)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """C for the weighted inputs z of the last layer and the targets y."""
        return functional.sigmoid_cross_entropy(
            z,
            y,
            weight=self.weight,
            pos_weight=self.pos_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


class SigmoidFocalLoss(_SigmoidLoss):
    """C = α_t (1 − p_t)^γ · cross-entropy of σ(z): `nnce.functional.sigmoid_focal_loss`.

    Args:
        reduction, alpha, gamma, ignore_index: as for the function.
        weight: as for `SigmoidCrossEntropyLoss`.

    Shape: as for `SigmoidQuadraticLoss`.

    Raises:
        TypeError: weight is not a tensor, or another option is not a number.
        ValueError: the reduction is unknown, an option is out of range, or a weight is negative or
            NaN.

    Source: Lin et al., Focal loss for dense object detection, 2017.

    >>> nnce.SigmoidFocalLoss("mean")(torch.zeros(2, 3), torch.ones(2, 3))
    tensor(0.0433)
    """

    def __init__(
        self,
        reduction: Reduction = "none",
        *,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        weight: Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(reduction, ignore_index, weight=weight)
        self.gamma, _, _, self.alpha = check_focus({"gamma": gamma}, 0, alpha)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """C for the weighted inputs z of the last layer and the targets y."""
        return functional.sigmoid_focal_loss(
            z,
            y,
            alpha=self.alpha,
            gamma=self.gamma,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


class SigmoidAsymmetricLoss(_SigmoidLoss):
    """Focal loss with two exponents and a margin: `nnce.functional.sigmoid_asymmetric_loss`.

    Args:
        reduction, gamma_positive, gamma_negative, margin, ignore_index: as for the function.
        weight: as for `SigmoidCrossEntropyLoss`.

    Shape, raises: as for `SigmoidFocalLoss`.

    Source: Ridnik et al., Asymmetric loss for multi-label classification, 2021.

    >>> nnce.SigmoidAsymmetricLoss()(torch.zeros(2, 3), torch.ones(2, 3))  # 3/2 ln 2
    tensor(1.0397)
    """

    def __init__(
        self,
        reduction: Reduction = "batchmean",
        *,
        gamma_positive: float = 1.0,
        gamma_negative: float = 4.0,
        margin: float = 0.05,
        weight: Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(reduction, ignore_index, weight=weight)
        gammas = {"gamma_positive": gamma_positive, "gamma_negative": gamma_negative}
        checked = check_focus(gammas, margin, None)
        self.gamma_positive, self.gamma_negative, self.margin, _ = checked

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """C for the weighted inputs z of the last layer and the targets y."""
        return functional.sigmoid_asymmetric_loss(
            z,
            y,
            gamma_positive=self.gamma_positive,
            gamma_negative=self.gamma_negative,
            margin=self.margin,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """Exact `torch.nn.BCEWithLogitsLoss`: `nnce.functional.binary_cross_entropy_with_logits`.

    A drop-in replacement with the same arguments, defaults, dtypes and `state_dict`: the mean of
    C = −[y ln σ(z) + (1−y) ln(1 − σ(z))], with dC/dz = σ(z) − y.

    Args:
        weight, pos_weight: as for the function; buffers as in PyTorch.
        size_average, reduce, reduction, label_smoothing, ignore_index: as for the function.

    Shape: input and target of one shape -> a scalar, or that shape for "none".

    Raises:
        TypeError: label_smoothing is not a number, or ignore_index is not an integer.
        ValueError: label_smoothing is not in [0, 1), or ignore_index is 0 or 1.

    Source: equations 3 and 5 of the notes.

    >>> z, y = torch.zeros(4, 2), torch.ones(4, 2)
    >>> nnce.BCEWithLogitsLoss()(z, y) == torch.nn.BCEWithLogitsLoss()(z, y)
    tensor(True)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        label_smoothing: float = 0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        self.label_smoothing = check_label_smoothing(label_smoothing)
        self.ignore_index = check_ignore_index(ignore_index)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """C for logits and targets."""
        return functional.binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            pos_weight=self.pos_weight,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )

    extra_repr = options_of
