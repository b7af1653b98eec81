import math
import statistics

import pytest
import torch
from scipy import stats

from nnce.experiments.estimates import DIFFERENCE, SHARE, estimate, holm, paired_difference


def test_estimate_by_hand():
    # Four values with mean 5 and s² = 20/3; t of 3 degrees of freedom is 3.1824 at 97.5 %.
    estimated = estimate([2.0, 4.0, 6.0, 8.0])
    half = 3.182446305284263 * math.sqrt(20 / 3) / 2
    assert estimated == pytest.approx((5.0, math.sqrt(20 / 3), 5 - half, 5 + half, 4, False))


def test_estimate_of_one_has_no_interval_and_of_none_nothing():
    mean, sd, low, high, n, _ = estimate([3.0])
    assert (mean, n) == (3.0, 1) and all(map(math.isnan, (sd, low, high)))
    mean, *_, n, _ = estimate([])
    assert math.isnan(mean) and n == 0


def test_huge_values_have_a_mean():
    mean, sd, low, high, n, _ = estimate([1e308, 1.6e308, 1e308])
    assert (mean, sd, n) == (pytest.approx(1.2e308), pytest.approx(math.sqrt(0.12) * 1e308), 3)
    assert low < mean < high
    assert estimate([-1e308, 1.6e308, 1.6e308]).sd > 1e308


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4_000, 5, generator=generator, dtype=torch.float64).tolist()
    covered = statistics.fmean(e.low < 0 < e.high for e in map(estimate, samples))
    assert covered == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_the_interval_of_a_share_stays_within_0_and_1():
    """By hand: logit(p) ± t s / (√n p (1 − p)), with p = ¾, s = ½ and t = 3.1824; one is at 0."""
    values = [1.0, 1.0, 1.0, 0.0]
    assert estimate(values).high > 1
    found = estimate(values, SHARE)
    half = 3.182446305284263 * 0.25 / (0.75 * 0.25)
    low, high = (1 / (1 + math.exp(-(math.log(3) + side * half))) for side in (-1, 1))
    assert found == pytest.approx((0.75, 0.5, low, high, 4, True))
    assert 0 < found.low < 0.75 < found.high < 1


def test_within_the_limits_the_interval_is_students():
    values = [0.5, 0.6, 0.7]
    assert estimate(values, SHARE) == estimate(values) and not estimate(values, SHARE).by_logit
    assert estimate([1.0, 1.0], SHARE)[2:] == (1.0, 1.0, 2, False)
    assert estimate([1.0, 1.0 - 2**-53], SHARE).high <= 1


@pytest.mark.parametrize("n", [2, 3, 8, 30])
def test_no_interval_of_shares_leaves_its_limits(n):
    generator = torch.Generator().manual_seed(n)
    for _ in range(200):
        power = 10 ** (4 * torch.rand((), generator=generator, dtype=torch.float64))
        values = (torch.rand(n, generator=generator, dtype=torch.float64) ** power).tolist()
        for some in (values, [1 - value for value in values], [*values, 0.0], [*values, 1.0]):
            found = estimate(some, SHARE)
            assert 0 <= found.low <= found.mean <= found.high <= 1
        difference = paired_difference(values, values[::-1], DIFFERENCE)
        assert -1 <= difference.low <= difference.high <= 1


def test_the_delta_method_covers_the_truth_about_as_often():
    """Means of 20 draws of a skewed share, where Student's interval leaves 1 now and then."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(4_000, 20, generator=generator, dtype=torch.float64) ** 0.05
    estimates = [estimate(sample, SHARE) for sample in samples.tolist()]
    covered = statistics.fmean(e.low < 1 / 1.05 < e.high for e in estimates)
    assert covered == pytest.approx(0.95, abs=0.03)
    assert all(e.high <= 1 for e in estimates)


def test_paired_difference_by_hand():
    # Differences 1, 2, 3: mean 2, s = 1, t = 2 √3; two-sided p with 2 degrees of freedom.
    difference = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    t = 2 * math.sqrt(3)
    p = 1 - t / math.sqrt(2 + t**2)
    assert difference.mean == 2 and difference.n == 3
    assert difference.p == pytest.approx(p)
    assert difference.low == pytest.approx(2 - 4.302652729911275 / math.sqrt(3))


@pytest.mark.parametrize("n", [2, 3, 10, 200])
@pytest.mark.parametrize("shift", [0.0, 0.3, -2.0, 1e6])
def test_paired_difference_is_scipys(n, shift):
    generator = torch.Generator().manual_seed(n)
    a, b = torch.randn(2, n, generator=generator, dtype=torch.float64)
    found = paired_difference((a + shift).tolist(), b.tolist())
    expected = stats.ttest_rel(a + shift, b)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx(expected.confidence_interval(0.95), rel=1e-6)


def test_paired_difference_without_spread_or_of_one_pair():
    difference = paired_difference([1.5, 2.5], [1.0, 2.0])
    assert (difference.mean, difference.low, difference.high) == (0.5, 0.5, 0.5) and math.isnan(
        difference.p
    )
    difference = paired_difference([1.5], [1.0])
    assert difference.mean == 0.5 and math.isnan(difference.low) and math.isnan(difference.p)


def test_holm_by_hand():
    """Of 0.01, 0.04, 0.03 the smallest counts three times, the next twice, the largest as it is."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    first, alone = holm([math.nan, 0.02])
    assert math.isnan(first) and alone == 0.02
    assert holm([]) == []


def test_a_spread_of_rounding_alone_is_none():
    """The differences of 0.3 and 0.1 and of 1.2 and 1.0 are not quite the same."""
    difference = paired_difference([0.3, 1.2], [0.1, 1.0])
    assert math.isnan(difference.p) and difference.mean == pytest.approx(0.2)
