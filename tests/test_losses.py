import pytest
import torch

from nnce import rules
from nnce.losses import LOSSES, check_loss


@pytest.mark.parametrize("loss", LOSSES)
def test_dz_last_is_the_derivative_of_the_value(loss):
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.rand(5, 3, dtype=torch.float64)
    (dz,) = torch.autograd.grad(LOSSES[loss].value(z, y).sum(), z)
    torch.testing.assert_close(LOSSES[loss].dz_last(z.detach(), y), dz)


@pytest.mark.parametrize("loss", LOSSES)
def test_sigmoid_prime_is_all_that_sets_the_last_deltas_apart(loss):
    z, y = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    factor = rules.sigmoid_prime(z) if LOSSES[loss].has_sigmoid_prime else 1.0
    torch.testing.assert_close(LOSSES[loss].dz_last(z, y), rules.residual(z, y) * factor)


def test_textbook_rates():
    assert {name: loss.textbook_lr for name, loss in LOSSES.items()} == {
        "quadratic": 3.0,
        "cross-entropy": 0.5,
    }


@pytest.mark.parametrize("loss", ["hinge", "", None, ["quadratic"]])
def test_unknown_losses_are_refused(loss):
    with pytest.raises(ValueError, match="expected loss 'quadratic' or 'cross-entropy', got"):
        check_loss(loss)
