"""Accuracy of the elementwise rules and PyTorch's counterparts over the whole range of z.

Exact values are computed by mpmath (a dependency of torch) with 60 digits, and stored as the sum of
two float64 numbers, because one is not accurate enough to judge float64.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnce import functional
from nnce.training.twin import LossFunction

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Quantity(NamedTuple):
    """A quantity computed from z and y, and the functions that compute it, nnce first."""

    name: str
    contenders: dict[str, LossFunction]
    exact: Callable[[Any, Any, Any, int], Any]
    """Exact value from y and mpmath's σ(z), σ(−z) and softplus(z), or softplus(−z) if y = 1."""
    promised_ulps: float
    """Promised largest error for y ∈ {0, 1} and normal results, in units in the last place; at most
    8 in every dtype but float64, in which the focal losses compute."""
    limits: tuple[tuple[float, float], tuple[float, float]]
    """Limits at z = −∞ and ∞, for y = 0 and for y = 1."""

    @property
    def derivative(self) -> bool:
        """Whether the quantity is a derivative with respect to z, or a value."""
        return self.name.endswith("/dz")

    def promised(self, dtype: str) -> float:
        """The units promised in a dtype."""
        return self.promised_ulps if dtype == "float64" else min(self.promised_ulps, 8.0)


_F = torch.nn.functional
OURS = ("nnce", "nnce, rules")
"""Contenders to which nnce's promises apply: its kernels, and the rules in PyTorch operations, as
used under `torch.func`, compile and `create_graph=True`."""


def _ours(function: LossFunction) -> dict[str, LossFunction]:
    # vmap bypasses the fused kernel.
    return dict(zip(OURS, (function, torch.func.vmap(function)), strict=True))


def _textbook_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    a = z.sigmoid()
    return -(y * a.log() + (1 - y) * (1 - a).log())


_CROSS_ENTROPY: dict[str, LossFunction] = {
    **_ours(lambda z, y: functional.sigmoid_cross_entropy(z, y, reduction="none")),
    "BCEWithLogitsLoss": lambda z, y: _F.binary_cross_entropy_with_logits(z, y, reduction="none"),
    "BCELoss of σ(z)": lambda z, y: _F.binary_cross_entropy(z.sigmoid(), y, reduction="none"),
    "textbook formula": _textbook_cross_entropy,
}
_QUADRATIC: dict[str, LossFunction] = {
    **_ours(lambda z, y: functional.sigmoid_quadratic(z, y, reduction="none")),
    "½ MSELoss of σ(z)": lambda z, y: 0.5 * _F.mse_loss(z.sigmoid(), y, reduction="none"),
    "textbook formula": lambda z, y: (1 / (1 + torch.exp(-z)) - y).square() / 2,
}
_SIGMOID: dict[str, LossFunction] = {
    **_ours(lambda z, y: functional.sigmoid(z)),
    "torch.sigmoid": lambda z, y: z.sigmoid(),
}


def _textbook_focal(z: Tensor, y: Tensor) -> Tensor:
    a = z.sigmoid()
    of_1, of_0 = -(1 - a).square() * a.log(), -a.square() * (1 - a).log()
    return 0.25 * y * of_1 + 0.75 * (1 - y) * of_0


def _peers(name: str) -> dict[str, LossFunction]:
    """Other libraries' focal and asymmetric losses, of those libraries that are installed."""
    found: dict[str, LossFunction] = {}
    with contextlib.suppress(ImportError):
        if name == "focal":
            from torchvision.ops import sigmoid_focal_loss

            found["torchvision"] = lambda z, y: sigmoid_focal_loss(z, y, 0.25, 2.0)
            from kornia.losses import binary_focal_loss_with_logits as kornia_loss

            found["kornia"] = lambda z, y: kornia_loss(z[:, None], y[:, None], 0.25, 2.0)[:, 0]
        else:
            from timm.loss.asymmetric_loss import AsymmetricLossMultiLabel

            loss = AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=1, clip=0)
            one = (None, None)  # an example and a label: it sums
            found["timm"] = torch.func.vmap(lambda z, y: loss(z[one], y[one]))
    return found


_ZEROS = ((0.0, 0.0), (0.0, 0.0))


def quantities() -> tuple[Quantity, ...]:
    """All quantities that are measured; the asymmetric loss without its margin."""
    slopes, unbounded = ((0.0, 1.0), (-1.0, 0.0)), ((0.0, math.inf), (math.inf, 0.0))
    focal: dict[str, LossFunction] = {
        **_ours(lambda z, y: functional.sigmoid_focal_loss(z, y)),
        **_peers("focal"),
        "textbook formula": _textbook_focal,
    }
    asymmetric: dict[str, LossFunction] = {
        **_ours(lambda z, y: functional.sigmoid_asymmetric_loss(z, y, margin=0, reduction="none")),
        **_peers("asymmetric"),
    }
    # One table; splitting it would not make it shorter.
    return (
        Quantity(
            "cross-entropy, dC/dz", _CROSS_ENTROPY, lambda s, t, c, y: -t if y else s, 3.0, slopes
        ),
        Quantity("cross-entropy, C", _CROSS_ENTROPY, lambda s, t, c, y: c, 4.0, unbounded),
        Quantity(
            *("quadratic, dC/dz", _QUADRATIC),
            lambda s, t, c, y: -t * s * t if y else s * s * t,
            *(8.0, _ZEROS),
        ),
        Quantity(
            *("quadratic, C", _QUADRATIC),
            lambda s, t, c, y: (t * t if y else s * s) / 2,
            *(8.0, ((0.0, 0.5), (0.5, 0.0))),
        ),
        Quantity(
            *("focal (γ = 2, α = ¼), dC/dz", focal),
            lambda s, t, c, y: (
                -t * t * (t + 2 * s * c) / 4 if y else 3 * s * s * (s + 2 * t * c) / 4
            ),
            *(12.0, ((0.0, 0.75), (-0.25, 0.0))),
        ),
        Quantity(
            *("focal (γ = 2, α = ¼), C", focal),
            lambda s, t, c, y: t * t * c / 4 if y else 3 * s * s * c / 4,
            *(12.0, unbounded),
        ),
        Quantity(
            *("asymmetric (γ = 1, 4), dC/dz", asymmetric),
            lambda s, t, c, y: -t * (t + s * c) if y else s**4 * (s + 4 * t * c),
            *(16.0, slopes),
        ),
        Quantity(
            *("asymmetric (γ = 1, 4), C", asymmetric),
            lambda s, t, c, y: t * c if y else s**4 * c,
            *(16.0, unbounded),
        ),
        Quantity("sigmoid, da/dz", _SIGMOID, lambda s, t, c, y: s * t, 6.0, _ZEROS),
    )


def grid(dtype: torch.dtype) -> Tensor:
    """Sorted test values of z from −10⁴ to 10⁴ in the given dtype, all finite.

    Dense near 0, where σ rounds to 1 and where it underflows in any dtype; also 0 and every decade
    down to the subnormal numbers.
    """
    tiny = torch.finfo(dtype).tiny
    subnormal = tiny * 2.0 ** -torch.arange(0, 11, dtype=torch.float64)
    positive = torch.cat(
        [
            torch.linspace(0, 20, 801, dtype=torch.float64),
            torch.linspace(20, 110, 721, dtype=torch.float64),
            torch.linspace(700, 760, 121, dtype=torch.float64),
            torch.logspace(math.log10(tiny), 4, 400, dtype=torch.float64),
            subnormal,
        ]
    )
    both: Tensor = torch.cat([-positive, positive]).to(dtype).unique()
    return both


class Measured(NamedTuple):
    """Errors of one contender for one quantity, over the grid and y ∈ {0, 1}."""

    quantity: str
    by: str
    dtype: str
    device: str
    absolute: float
    """Largest absolute error."""
    relative: float
    """Largest relative error where the exact value is a normal number; for the linear layer,
    ‖error‖ / ‖exact‖."""
    ulps: float
    """Largest error in units in the last place where the exact value is a normal number."""
    worst_z: float = math.nan
    """The z with the largest error in ulps; NaN for the linear layer."""
    below_normal: float = 0.0
    """Largest absolute error where the exact value is below the smallest normal number, in units of
    that number."""
    zero_from: float = math.nan
    """Smallest z > 0 for which, at y = 0, the result is 0 but the exact value is not; else NaN."""
    wrong_from: float = math.nan
    """Smallest z > 0 with a relative error above 1 % at y = 0; else NaN."""
    right_at_infinity: bool = True
    """Whether z = ±∞ gives the limit, and NaN gives NaN."""
    wrong: str = ""
    """The y and z of smallest |z| with a relative error above 1 %; empty without one."""


class Curve(NamedTuple):
    """Derivatives by z for y = 0, exact and by each contender, for the saturation atlas."""

    dtype: str
    z: Tensor
    exact: Tensor
    computed: dict[str, Tensor]


def measure(
    dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[list[Measured], list[Curve]]:
    """Measure the errors of all contenders in one dtype on one device, with their curves."""
    z = grid(dtype)
    rows, curves = [], []
    every = quantities()
    for quantity, exact in zip(every, _exact(every, z), strict=True):
        computed: dict[str, Tensor] = {}
        for by, contender in quantity.contenders.items():
            try:
                results = torch.stack([_compute(quantity, contender, z, y, device) for y in (0, 1)])
            except (RuntimeError, NotImplementedError):
                continue  # not implemented by PyTorch for this dtype and device
            if by != OURS[1]:  # same curve as OURS[0]
                computed[by] = results[0]
            right = _right_at_infinity(quantity, contender, dtype, device)
            of = (quantity.name, by, _name(dtype), str(device))
            rows.append(_measured(of, z, results, exact)._replace(right_at_infinity=right))
        if quantity.derivative and quantity.contenders is not _SIGMOID:
            curves.append(Curve(_name(dtype), z, exact[0, 0], computed))
    return rows, curves


def _exact(every: Sequence[Quantity], z: Tensor) -> Tensor:
    """Exact values [quantity, part, y, z] in float64; both parts are to be added."""
    import mpmath as mp

    found = []
    with mp.workdps(60):
        for value in z.double().tolist():
            x = mp.mpf(value)
            # The smaller of σ(z) and σ(−z) from the exponential, so that neither cancels.
            e = mp.exp(-abs(x))
            large, small, log = 1 / (1 + e), e / (1 + e), mp.log1p(e)
            s, t = (large, small) if x >= 0 else (small, large)
            softplus = (log + max(x, 0), log + max(-x, 0))
            for quantity in every:
                for y in (0, 1):
                    truth = quantity.exact(s, t, softplus[y], y)
                    high = float(truth)
                    found.append((high, float(truth - mp.mpf(high))))
    both = torch.tensor(found, dtype=torch.float64).view(len(z), len(every), 2, 2)
    return both.permute(1, 3, 2, 0)


def _compute(
    quantity: Quantity, contender: LossFunction, z: Tensor, y: int, device: torch.device | str
) -> Tensor:
    leaf = z.to(device).detach().requires_grad_()
    output = contender(leaf, torch.full_like(leaf, y))
    if quantity.derivative:
        (output,) = torch.autograd.grad(output.sum(), leaf)
    return output.detach().cpu()


def _measured(of: tuple[str, str, str, str], z: Tensor, results: Tensor, exact: Tensor) -> Measured:
    """Compare results [y, z] with their exact values [part, y, z]."""
    high, low = exact
    error = ((results.double() - high) - low).abs().nan_to_num(nan=math.inf)
    tiny = torch.finfo(z.dtype).smallest_normal
    normal = high.abs() >= tiny
    ulps = torch.where(normal, error / ulp(high, z.dtype), 0.0)
    relative = torch.where(normal, error / high.abs(), 0.0)

    blind = z[(results[0] == 0) & normal[0] & (z > 0)]
    wrong = z[(relative[0] > 0.01) & (z > 0)]
    first = torch.where(relative > 0.01, z.double().abs(), math.inf)
    y, nearest = divmod(int(first.argmin()), len(z))
    return Measured(
        *of,
        absolute=float(error.max()),
        relative=float(relative.max()),
        ulps=float(ulps.max()),
        worst_z=float(z[int(ulps.argmax()) % len(z)]),
        below_normal=float(torch.where(normal, 0.0, error).max()) / tiny,
        zero_from=float(blind.min()) if len(blind) else math.nan,
        wrong_from=float(wrong.min()) if len(wrong) else math.nan,
        wrong=f"y = {y}, z = {float(z[nearest]):.4g}" if first.min() < math.inf else "",
    )


# Sums of products have no bounded relative error where terms cancel. The promised error of the
# linear layer is therefore in units in the last place of the sum of the terms' absolute values.
LINEAR_PROMISED_ULPS = 8.0
_LINEAR = {"nnce": functional.linear, "torch.nn.functional.linear": _F.linear}


def measure_linear(dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Measured]:
    """Measure the errors of the linear layer's output and gradients on random inputs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    a_prev, W, b, dz = normal(12, 32), normal(10, 32), normal(10), normal(12, 10)
    ones = torch.ones(12, 1, dtype=dtype)
    # Each quantity is one product: the bias is a weight whose input is always 1.
    factors = {
        "z": (torch.cat([a_prev, ones], dim=1), torch.cat([W.T, b[None]])),
        "da_prev": (dz, W),
        "dW": (dz.T, a_prev),
        "db": (ones.T, dz),
    }
    exact = {name: _exact_product(left, right) for name, (left, right) in factors.items()}
    terms = {
        name: left.double().abs() @ right.double().abs() for name, (left, right) in factors.items()
    }
    rows = []
    for by, function in _LINEAR.items():
        leaves = [t.to(device).requires_grad_() for t in (a_prev, W, b)]
        z = function(*leaves)
        results = (z.detach(), *torch.autograd.grad(z, leaves, dz.to(device)))
        for name, result in zip(exact, results, strict=True):
            high, low = exact[name]
            error = ((result.cpu().double().view_as(high) - high) - low).abs()
            rows.append(
                Measured(
                    *(f"linear, {name}", by, _name(dtype), str(device)),
                    absolute=float(error.max()),
                    relative=float(error.norm() / high.norm()),
                    ulps=float((error / ulp(terms[name], dtype)).max()),
                )
            )
    return rows


def _exact_product(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Exact matrix product, as two float64 matrices to be added."""
    import mpmath as mp

    rows, columns = left.double().tolist(), right.double().T.tolist()
    with mp.workdps(60):
        products = [[mp.fdot(row, column) for column in columns] for row in rows]
        high = [[float(truth) for truth in row] for row in products]
        low = [[float(truth - float(truth)) for truth in row] for row in products]
    return torch.tensor(high, dtype=torch.float64), torch.tensor(low, dtype=torch.float64)


_INFINITE = torch.tensor([-math.inf, math.inf, math.nan])


def _right_at_infinity(
    quantity: Quantity, contender: LossFunction, dtype: torch.dtype, device: torch.device | str
) -> bool:
    for y, (low, high) in enumerate(quantity.limits):
        try:
            got = _compute(quantity, contender, _INFINITE.to(dtype), y, device)
        except RuntimeError:  # BCELoss rejects NaN
            return False
        if got[:2].tolist() != [low, high] or not got[2].isnan():
            return False
    return True


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit in the last place of `dtype` at the values of `exact`, both in float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact).exponent - 1
    binade = torch.ldexp(torch.ones_like(exact), exponent)
    return torch.where(exact == 0, 0.0, binade).clamp(min=info.smallest_normal) * info.eps
