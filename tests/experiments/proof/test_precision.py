"""What nnce promises of its elementwise rules, at every z, in every dtype, against mpmath."""

import math

import pytest
import torch
import toys
from oracles import ulp_distance

from nnce.experiments.proof import precision
from nnce.losses import LOSSES

LIMITS = {
    "cross-entropy, dC/dz": 3,
    "cross-entropy, C": 4,
    "quadratic, dC/dz": 8,
    "quadratic, C": 8,
    # 8 + 2γ in float64, 8 in other dtypes.
    "focal (γ = 2, α = ¼), dC/dz": 12,
    "focal (γ = 2, α = ¼), C": 12,
    "asymmetric (γ = 1, 4), dC/dz": 16,
    "asymmetric (γ = 1, 4), C": 16,
    "sigmoid, da/dz": 6,
}


@pytest.fixture(scope="module", params=precision.DTYPES, ids=str)
def measured(request):
    rows, _ = toys.measured(request.param)
    return {(row.quantity, row.by): row for row in rows}


@pytest.mark.parametrize("by", precision.OURS)
@pytest.mark.parametrize("quantity", LIMITS)
def test_nnce_keeps_its_promise(measured, quantity, by):
    row = measured[quantity, by]
    assert row.ulps <= (LIMITS[quantity] if row.dtype == "float64" else min(LIMITS[quantity], 8)), (
        row
    )
    assert row.below_normal < 1, row
    assert row.right_at_infinity, "±∞ must give the limit and NaN must give NaN"


def test_the_printed_limits_are_these():
    assert {q.name: q.promised_ulps for q in precision.quantities()} == LIMITS


def test_pytorch_is_seen_to_be_wrong_where_it_is(measured):
    """The same measure refuses what is wrong, so it can fail."""
    with_logits = measured["cross-entropy, dC/dz", "BCEWithLogitsLoss"]
    assert with_logits.relative == 1  # σ(z) − 1 rounds to 0
    blind = measured["cross-entropy, dC/dz", "BCELoss of σ(z)"]
    assert blind.wrong_from < 40 and blind.ulps > 100
    assert not measured["cross-entropy, dC/dz", "textbook formula"].right_at_infinity
    theirs = measured["focal (γ = 2, α = ¼), dC/dz", "torchvision"]
    assert theirs.relative > 0.02 and not theirs.right_at_infinity


def test_bce_loss_is_0_from_17_on_in_float32():
    rows, _ = toys.measured(torch.float32)
    (row,) = [r for r in rows if r.quantity == "cross-entropy, dC/dz" and "BCELoss" in r.by]
    assert 16 < row.zero_from <= 17


@pytest.mark.parametrize("dtype", precision.DTYPES, ids=str)
def test_the_grid_is_where_it_matters(dtype):
    z = precision.grid(dtype).double()
    tiny = torch.finfo(dtype).tiny
    assert z.isfinite().all() and (z == 0).any() and (z.diff() > 0).all()
    assert z.min() == torch.tensor(-1e4, dtype=dtype) and z.max() == torch.tensor(1e4, dtype=dtype)
    assert ((z.abs() < tiny) & (z != 0)).sum() >= 10  # subnormal numbers, of both signs
    decades = z[z > tiny].log10().floor().unique()
    assert len(decades) == decades.max() - decades.min() + 1


@pytest.mark.parametrize("dtype", precision.DTYPES, ids=str)
def test_negative_zero(dtype):
    z = torch.tensor([-0.0], dtype=dtype)
    y = torch.zeros_like(z)
    for quantity in precision.quantities():
        for by in precision.OURS:
            nnce = quantity.contenders[by]
            assert torch.equal(nnce(z, y), nnce(-z, y))


@pytest.mark.parametrize("dtype", precision.DTYPES, ids=str)
def test_linear_layer(dtype):
    rows = precision.measure_linear(dtype)
    assert [row.by for row in rows].count("nnce") == 4
    assert all(0 < row.ulps <= precision.LINEAR_PROMISED_ULPS for row in rows), rows


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_ulp_distance():
    one = torch.tensor([1.0])
    assert ulp_distance(one, column(1.0 + 2**-23)).item() == 1
    assert ulp_distance(one, column(1.0 - 2**-24)).item() == 1  # units of the exact value's binade
    assert ulp_distance(torch.tensor([2.0**-149]), column(0.0)).item() == 1
    values = torch.tensor([math.inf, math.nan, math.nan, math.inf])
    distances = ulp_distance(values, column(math.inf, math.nan, 1.0, 1.0))
    assert distances.tolist() == [0, 0, math.inf, math.inf]


@pytest.mark.parametrize("loss", LOSSES)
def test_contenders_compute_the_same_where_nothing_is_saturated(loss):
    z, y = torch.randn(7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    (quantity,) = [of for of in precision.quantities() if of.name == f"{loss}, C"]
    for contender in quantity.contenders.values():
        torch.testing.assert_close(contender(z, y), LOSSES[loss].value(z, y))
