"""The resolution of a function that computes in a lower precision than float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from nnce.checks._curves import Fit, fit
from nnce.checks._derivatives import Broken, Derivatives

_COMPUTE: dict[str, Callable[[Derivatives, Tensor, Tensor], Tensor]] = {
    "value": lambda ours, upstream, along: ours.value(),
    "first": lambda ours, upstream, along: ours.first(upstream),
    "forward_mode": lambda ours, upstream, along: ours.tangent(along),
    "second": lambda ours, upstream, along: ours.second_as_one(upstream, along),
}

# A derivative may scatter by at most this many times as much as rounding explains.
_MOST = 16.0
_TINY = torch.finfo(torch.float64).tiny


def _largest(values: Tensor) -> float:
    return float(values.nan_to_num(0.0, 0.0, 0.0).abs().max())


class Resolution:
    """Smooth curves through a function's values and derivatives along a direction."""

    def __init__(self, ours: Derivatives, upstream: Tensor, along: Tensor) -> None:
        self.ours, self._upstream, self.along = ours, upstream, along
        self._fits: dict[str, Fit] = {}

    def of(self, name: str) -> Fit:
        """The curves for values, gradient, tangent or second derivatives, one per element."""
        if name not in self._fits:

            def values(steps: Tensor) -> Tensor:
                each = [self.after(name, step * self.along) for step in steps]
                return torch.stack(each).unsqueeze(1)

            self._fits[name] = fit(values, self.ours.unit, self.along.device)
        return self._fits[name]

    def scatter(self, name: str) -> Tensor:
        """How much rounding changes each element; 0 where there is no smooth curve."""
        scatter = self.of(name).scatter.nan_to_num(0.0, 0.0, 0.0)
        return scatter if name == "value" else scatter.clamp(max=_MOST * self.rounded(name))

    def rounded(self, name: str) -> float:
        """The expected rounding error of a derivative: its own, and that of x as seen in values."""
        values, curve = self.of("value"), self.of(name)
        of_x = _largest(values.typical) / max(_largest(values.slope), _TINY)
        return (self.ours.unit + of_x) * (_largest(curve.value) + _largest(curve.slope))

    def noise(self, name: str) -> float:
        """The scatter of a derivative if it is much larger than rounding explains, else 0."""
        typical = _largest(self.of(name).typical)
        return typical if typical > _MOST * self.rounded(name) else 0.0

    def after(self, name: str, move: Tensor) -> Tensor:
        """Values, gradient, tangent or second derivatives at x + move; NaN outside the domain."""
        moved = self.ours.at(self.ours.x + move)
        try:
            return _COMPUTE[name](moved, self._upstream, self.along).detach().flatten()
        except (TypeError, ValueError, Broken):  # outside the function's domain
            return torch.full_like(self.after(name, torch.zeros_like(move)), torch.nan)
