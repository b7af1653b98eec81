"""How far a gradient is from the true one."""

import torch
from torch import Tensor


def ulp_distance(value: Tensor, exact: Tensor) -> Tensor:
    """|value − exact| in units in the last place that `exact` has in the dtype of `value`.

    Below the smallest normal number the unit is that of the subnormal numbers. Equal infinities are
    0 apart, and so are two NaNs; a NaN beside a number is infinitely far from it.

    Args:
        value: computed, of any floating-point dtype.
        exact: the truth in float64, of value's shape.

    Returns:
        float64, value's shape, at least 0.
    """
    info = torch.finfo(value.dtype)
    wide = value.double()
    exponent = torch.frexp(exact).exponent - 1
    binade = torch.ldexp(torch.ones_like(exact), exponent).clamp(min=info.smallest_normal)
    distance = (wide - exact).abs() / (binade * info.eps)
    same = (wide == exact) | (wide.isnan() & exact.isnan())
    return torch.where(same, 0.0, distance).nan_to_num(nan=float("inf"), posinf=float("inf"))
