"""Means and paired differences with 95 % confidence intervals.

`scipy.special` is imported on first use; `scipy.stats` is not used, because importing it takes
another second.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


Limits = tuple[float, float]
"""Lower and upper limit of a quantity."""
# Limits of an accuracy (or any share), of the same in percent, and of a difference of two shares.
SHARE: Limits = (0.0, 1.0)
PERCENT: Limits = (0.0, 100.0)
DIFFERENCE: Limits = (-1.0, 1.0)


class Estimate(NamedTuple):
    """A mean with its standard deviation and confidence interval."""

    mean: float
    sd: float
    """Standard deviation of the sample; NaN for n < 2."""
    low: float
    high: float
    """Ends of the 95 % confidence interval of the mean; NaN for n < 2."""
    n: int
    by_logit: bool = False
    """Whether the interval is by the delta method, because Student's exceeds the limits."""


def estimate(values: Sequence[float], limits: Limits | None = None) -> Estimate:
    """Mean, standard deviation and 95 % confidence interval of independent values.

    The interval is mean ± t s / √n, with the quantile t of Student's distribution with n − 1
    degrees of freedom. If it exceeds the limits, the delta method on the logit of the mean's
    relative position p between the limits is used instead: logit(p) ± t s_p / (√n p (1 − p)),
    mapped back. Single values may be at a limit. Without values, all fields are NaN and n is 0.
    """
    n = len(values)
    if n < 2:
        mean = values[0] if n else math.nan
        return Estimate(mean, math.nan, math.nan, math.nan, n)
    # statistics.stdev is exact but would slow down logging. Scaling by a power of two is exact, and
    # hypot avoids overflow: the losses of a diverged network may be huge.
    scale = 2.0 ** n.bit_length()
    mean = math.fsum(value / scale for value in values) / n * scale
    sd = math.hypot(*(value - mean for value in values)) / math.sqrt(n - 1)
    half = _quantile(n - 1) * sd / math.sqrt(n)
    low, high = mean - half, mean + half
    by_logit = limits is not None and not limits[0] <= low <= high <= limits[1]
    if limits is not None and by_logit:
        low, high = _by_logit(mean, half, limits)
    return Estimate(mean, sd, low, high, n, by_logit)


def _by_logit(mean: float, half: float, limits: Limits) -> tuple[float, float]:
    """Delta-method interval of `estimate`, from the half width of Student's interval."""
    least, width = limits[0], limits[1] - limits[0]
    p = (mean - least) / width
    if not 0 < p < 1:  # all values are at a limit, up to rounding
        return mean, mean
    from scipy import special

    half /= width * p * (1 - p)
    ends = (special.expit(special.logit(p) + step) for step in (-half, half))
    low, high = (least + width * float(end) for end in ends)
    return min(low, mean), max(high, mean)  # a mean near a limit may be subnormal


@functools.lru_cache
def _quantile(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t distribution."""
    from scipy import special

    return float(special.stdtrit(degrees, (1 + CONFIDENCE) / 2))


class Difference(NamedTuple):
    """Mean paired difference, its confidence interval and its p-value."""

    mean: float
    low: float
    high: float
    """Ends of the 95 % confidence interval; NaN for n < 2."""
    p: float
    """Two-sided p-value of the paired t-test; NaN if all differences are equal."""
    n: int
    p_holm: float = math.nan
    """p corrected by `holm` for the number of tests; NaN if not corrected."""
    by_logit: bool = False
    """Whether the interval is by the delta method; see `Estimate`."""


def paired_difference(
    a: Sequence[float], b: Sequence[float], limits: Limits | None = None
) -> Difference:
    """Estimate the mean of a − b over pairs, with the p-value of `scipy.stats.ttest_rel`."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, sd, low, high, n, by_logit = estimate(differences, limits)
    # A spread within rounding error counts as none.
    spread = sd > 1e-12 * max(map(abs, differences), default=0.0)
    p = math.nan
    if spread:
        from scipy import special

        t = mean / (sd / math.sqrt(n))
        p = float(2 * special.stdtr(n - 1, -abs(t)))
    return Difference(mean, low, high, p, n, by_logit=by_logit)


def holm(ps: Sequence[float]) -> list[float]:
    """Correct p-values for multiple tests by Holm's method, in the given order; NaN stays NaN.

    The smallest of m p-values is multiplied by m, the next by m − 1, and so on; each result is at
    least the previous one and at most 1. This controls the family-wise error rate. Source: S. Holm,
    Scandinavian Journal of Statistics 6 (1979) 65–70.
    """
    ranks = sorted((r for r, p in enumerate(ps) if not math.isnan(p)), key=lambda r: ps[r])
    corrected = [math.nan] * len(ps)
    least = 0.0
    for rank, r in enumerate(ranks):
        least = max(least, min(1.0, (len(ranks) - rank) * ps[r]))
        corrected[r] = least
    return corrected
