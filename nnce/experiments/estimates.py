"""Means and paired differences with their 95 % confidence intervals.

`scipy.special` is imported with the first one (and `scipy.stats`, a second more, not at all).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


Limits = tuple[float, float]
"""The least and the largest value that a quantity can have."""
# Of an accuracy or another share, the same in percent, and the difference of two shares.
SHARE: Limits = (0.0, 1.0)
PERCENT: Limits = (0.0, 100.0)
DIFFERENCE: Limits = (-1.0, 1.0)


class Estimate(NamedTuple):
    """A mean and how sure it is."""

    mean: float
    sd: float
    """The sample's standard deviation; NaN for n = 1."""
    low: float
    high: float
    """The 95 % confidence interval of the mean; NaN for n = 1."""
    n: int
    by_logit: bool = False
    """Whether the interval is the delta method's, since Student's leaves the limits."""


def estimate(values: Sequence[float], limits: Limits | None = None) -> Estimate:
    """Mean, standard deviation and 95 % confidence interval of independent values.

    The interval is mean ± t s / √n, with the quantile t of Student's distribution with n − 1
    degrees of freedom. Where that leaves the limits, it is the delta method's on the logit of the
    mean's place p between them, logit(p) ± t s_p / (√n p (1 − p)), mapped back; single values may
    be at a limit. Without values everything is NaN, and n is 0.
    """
    n = len(values)
    if n < 2:
        mean = values[0] if n else math.nan
        return Estimate(mean, math.nan, math.nan, math.nan, n)
    # statistics.stdev is exact, and so slow that logging would feel it. A power of two rounds
    # nothing, and hypot squares nothing: the losses of a diverged network may be huge.
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
    """The interval of `estimate` between limits, from Student's half width."""
    least, width = limits[0], limits[1] - limits[0]
    p = (mean - least) / width
    if not 0 < p < 1:  # all values are at a limit, but for rounding
        return mean, mean
    from scipy import special

    half /= width * p * (1 - p)
    ends = (special.expit(special.logit(p) + step) for step in (-half, half))
    low, high = (least + width * float(end) for end in ends)
    return min(low, mean), max(high, mean)  # a mean near a limit may be subnormal


@functools.lru_cache
def _quantile(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t with this many degrees of freedom."""
    from scipy import special

    return float(special.stdtrit(degrees, (1 + CONFIDENCE) / 2))


class Difference(NamedTuple):
    """A paired difference."""

    mean: float
    low: float
    high: float
    """The 95 % confidence interval; NaN for n = 1."""
    p: float
    """Of the paired t-test, two-sided; NaN where the differences have no spread."""
    n: int
    p_holm: float = math.nan
    """p corrected for the number of differences it is one of, by `holm`; NaN if it is alone."""
    by_logit: bool = False
    """As an `Estimate`'s."""


def paired_difference(
    a: Sequence[float], b: Sequence[float], limits: Limits | None = None
) -> Difference:
    """a − b, pair by pair, and the paired t-test of it: `scipy.stats.ttest_rel`'s p."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, sd, low, high, n, by_logit = estimate(differences, limits)
    # A spread within rounding does not count.
    spread = sd > 1e-12 * max(map(abs, differences), default=0.0)
    p = math.nan
    if spread:
        from scipy import special

        t = mean / (sd / math.sqrt(n))
        p = float(2 * special.stdtr(n - 1, -abs(t)))
    return Difference(mean, low, high, p, n, by_logit=by_logit)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's method, in their order; NaN stays NaN.

    The smallest of m is multiplied by m, the next by m − 1, and so on, each at least as large as
    the one before, and 1 at most: then the chance that any true null hypothesis is rejected is what
    one p-value says. Source: S. Holm, Scandinavian Journal of Statistics 6 (1979) 65–70.
    """
    ranks = sorted((r for r, p in enumerate(ps) if not math.isnan(p)), key=lambda r: ps[r])
    corrected = [math.nan] * len(ps)
    least = 0.0
    for rank, r in enumerate(ranks):
        least = max(least, min(1.0, (len(ranks) - rank) * ps[r]))
        corrected[r] = least
    return corrected
