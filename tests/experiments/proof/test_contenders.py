import pytest
import torch
from nnce.experiments.proof.contenders import CONTENDERS
from torch.testing import assert_close

from nnce.losses import LOSSES


@pytest.mark.parametrize("loss", LOSSES)
def test_contenders_compute_the_same_where_nothing_is_saturated(loss):
    z, y = torch.randn(7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    for contender in CONTENDERS[loss].values():
        assert_close(contender(z, y), LOSSES[loss].value(z, y))
