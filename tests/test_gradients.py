import math

import pytest
import torch
from torch.autograd import Function, gradcheck

import nnce
from nnce.gradients import ulp_distance


class ZeroInSaturation(Function):
    """A sigmoid whose backward is 0 from |z| = 12 on."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.sigmoid()

    @staticmethod
    def backward(ctx, da):
        (z,) = ctx.saved_tensors
        return da * torch.where(z.abs() < 12, z.sigmoid() * (-z).sigmoid(), 0 * z)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_right_ones_are_right():
    z, y = column(-3.0, -0.5, 0.3, 1.0, 4.0), column(0.0, 1.0, 0.5, 0.2, 1.0)
    W, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    for function, inputs in (
        (nnce.sigmoid, (z,)),
        (nnce.sigmoid_cross_entropy, (z, y)),
        (nnce.sigmoid_quadratic, (z, y)),
        (lambda a, W, b: nnce.linear(a, W, b).sin(), (z, W, b)),
        (lambda z, y: nnce.sigmoid_cross_entropy(z, y, reduction="none"), (z, y)),
    ):
        report = nnce.check_gradients(function, *inputs)
        assert report.right, str(report)
        assert report.forward_mode.verdict == "right"


@pytest.mark.parametrize("z", [(12.0,), (-12.0, 14.0), (0.5, 13.0, -1.0)])
def test_zero_in_saturation_is_refused_where_gradcheck_lets_it_pass(z):
    leaf = column(*z).requires_grad_()
    assert gradcheck(ZeroInSaturation.apply, leaf)  # the blindness is real
    report = nnce.check_gradients(ZeroInSaturation.apply, leaf)
    assert report.first.verdict == "wrong" and not report.right


def test_a_derivative_that_is_0_has_no_digits():
    """σ''(0) is 0, to which no relative error can be given."""
    report = nnce.check_gradients(nnce.sigmoid, column(0.0))
    assert report.first.verdict == "right" and report.second.verdict == "cannot tell"


@pytest.mark.parametrize("function", [ZeroInSaturation.apply, nnce.sigmoid])
def test_where_there_are_no_digits_it_cannot_tell(function):
    report = nnce.check_gradients(function, column(40.0, 45.0))
    assert report.first.verdict == "cannot tell" and not report.right
    mixed = nnce.check_gradients(function, column(0.5, 45.0))
    assert mixed.first.verdict == "cannot tell" and not mixed.right


@pytest.mark.parametrize("z", [5.0, 12.0, 40.0, 300.0, -700.0])
def test_a_reference_decides_at_any_z(z):
    right = nnce.check_gradients(nnce.sigmoid, column(z), reference=_exact_sigmoid)
    assert right.right, str(right)
    wrong = nnce.check_gradients(ZeroInSaturation.apply, column(z), reference=_exact_sigmoid)
    assert wrong.first.verdict == ("right" if abs(z) < 12 else "wrong")
    assert wrong.value.verdict == "right"


def _exact_sigmoid(z):
    """σ by exponentials of negative numbers alone: exact derivatives at any z."""
    e = torch.exp(-z.abs())
    return torch.where(z > 0, 1 / (1 + e), e / (1 + e))


class WrongSecond(Function):
    """z², whose backward autograd cannot see: the second derivative would be 0."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**2

    @staticmethod
    def backward(ctx, dC):
        (z,) = ctx.saved_tensors
        return dC * (2 * z).detach()


def test_a_wrong_second_derivative_is_seen():
    report = nnce.check_gradients(WrongSecond.apply, column(1.0, 2.0))
    assert report.first.verdict == "right"
    assert report.second.verdict == "wrong"
    assert report.forward_mode.verdict == "not there"
    against = nnce.check_gradients(WrongSecond.apply, column(1.0, 2.0), reference=lambda z: z**2)
    assert against.first.verdict == "right" and against.second.verdict == "wrong"


class WrongJvp(Function):
    @staticmethod
    def forward(z):
        return z.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, dC):
        (z,) = ctx.saved_tensors
        return dC * z.cos()

    @staticmethod
    def jvp(ctx, dz):
        (z,) = ctx.saved_tensors
        return -dz * z.cos()


def test_a_wrong_jvp_is_seen():
    for reference in (None, torch.sin):
        report = nnce.check_gradients(WrongJvp.apply, column(1.0, 2.0), reference=reference)
        assert report.first.verdict == report.second.verdict == "right"
        assert report.forward_mode.verdict == "wrong" and not report.right


def test_a_wrong_value_is_seen():
    report = nnce.check_gradients(lambda z: z.sin() + 1, column(1.0, 2.0), reference=torch.sin)
    assert report.value.verdict == "wrong" and report.first.verdict == "right"
    assert not report.right


class WrongNumber(Function):
    @staticmethod
    def forward(ctx, z, y):
        return z * y

    @staticmethod
    def backward(ctx, dC):
        return dC


def test_bad_functions_are_named():
    z = column(1.0, 2.0)
    with pytest.raises(ValueError, match=r"backward of the function failed.*number of gradients"):
        nnce.check_gradients(WrongNumber.apply, z, z)
    with pytest.raises(TypeError, match=r"differentiate by, got torch.int64"):
        nnce.check_gradients(nnce.sigmoid, torch.tensor([1, 2]))
    with pytest.raises(TypeError, match=r"return a floating-point tensor, got torch.int64"):
        nnce.check_gradients(lambda z: z.long(), z)
    with pytest.raises(ValueError, match="got empty tensors"):
        nnce.check_gradients(nnce.sigmoid, column())
    with pytest.raises(TypeError, match=r"return a floating-point tensor, got tuple"):
        nnce.check_gradients(lambda z: (z, z), z)
    with pytest.raises(ValueError, match="does not depend on its floating-point inputs"):
        nnce.check_gradients(lambda z: z.detach().sin(), z)


def test_other_inputs_are_handed_on():
    y = torch.tensor([0, 1])
    report = nnce.check_gradients(
        lambda z, y, reduction: nnce.sigmoid_cross_entropy(z, y.double(), reduction=reduction),
        column(1.0, -2.0),
        y,
        "sum",
    )
    assert report.right


def test_the_report_is_readable():
    text = str(nnce.check_gradients(nnce.sigmoid, column(40.0)))
    assert text.splitlines()[1].startswith("first        cannot tell the numerical derivative")


def test_ulp_distance():
    one = torch.tensor([1.0])
    assert ulp_distance(one, column(1.0 + 2**-23)).item() == 1
    assert ulp_distance(one, column(1.0 - 2**-24)).item() == 1  # units of the exact value's binade
    assert ulp_distance(torch.tensor([2.0**-149]), column(0.0)).item() == 1
    values = torch.tensor([math.inf, math.nan, math.nan, math.inf])
    distances = ulp_distance(values, column(math.inf, math.nan, 1.0, 1.0))
    assert distances.tolist() == [0, 0, math.inf, math.inf]
