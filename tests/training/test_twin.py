import pytest
import torch
from torch.testing import assert_close

import nnce
from nnce.functional import LOSS_FUNCTIONS
from nnce.losses import LOSSES
from nnce.training.twin import BUILT_IN_LOSSES, torch_twin


def test_twin_shares_its_parameters():
    network = nnce.MLP((4, 3, 2))
    twin = torch_twin(network)
    x = torch.rand(5, 4)
    assert_close(twin(x), network(x))
    assert all(a is b for a, b in zip(twin.parameters(), network.parameters(), strict=True))
    assert [type(layer).__module__.split(".")[0] for layer in twin] == ["torch"] * 3


@pytest.mark.parametrize("loss", LOSSES)
def test_built_in_losses_are_the_notes_c(loss):
    z, y = torch.randn(7, 3, dtype=torch.float64), torch.rand(7, 3, dtype=torch.float64)
    expected = LOSSES[loss].value(z, y).sum() / 7
    assert_close(BUILT_IN_LOSSES[loss](z, y), expected)
    assert_close(LOSS_FUNCTIONS[loss](z, y), expected)
