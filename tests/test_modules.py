import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import nnce


def test_mlp_is_the_network_of_the_notes(generator):
    network = nnce.MLP((4, 3, 2), generator=generator)
    x = torch.rand(5, 4)
    a = torch.sigmoid(x @ network[0].weight.T + network[0].bias)
    assert_close(network(x), a @ network[2].weight.T + network[2].bias)
    assert network.sizes == (4, 3, 2)
    assert network(torch.rand(2, 7, 4)).shape == (2, 7, 2)


def test_repr_says_what_it_is():
    assert repr(nnce.MLP((4, 3, 2), init="large")) == (
        "MLP(\n"
        "  (0): Linear(in_features=4, out_features=3, bias=True, init='large')\n"
        "  (1): Sigmoid()\n"
        "  (2): Linear(in_features=3, out_features=2, bias=True, init='large')\n"
        ")"
    )
    assert repr(nnce.SigmoidQuadraticLoss()) == "SigmoidQuadraticLoss(reduction='batchmean')"


def test_state_dict_goes_to_torch_nn_and_back():
    network = nnce.MLP((4, 3, 2))
    twin = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2))
    twin.load_state_dict(network.state_dict())
    x = torch.rand(5, 4)
    assert_close(twin(x), network(x))
    other = nnce.MLP((4, 3, 2))
    other.load_state_dict(twin.state_dict())
    assert_close(other(x), network(x))


def test_ordinary_citizens():
    network = nnce.MLP((4, 3, 2))
    assert network.double()(torch.rand(1, 4, dtype=torch.float64)).dtype == torch.float64
    assert next(copy.deepcopy(network).to("meta").parameters()).is_meta
    assert nnce.MLP((4, 3), device="meta")(torch.rand(2, 4, device="meta")).shape == (2, 3)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = torch.rand(5, 4, dtype=torch.float64)
    assert torch.equal(again(x), network(x))
    assert again.sizes == (4, 3, 2)


@pytest.mark.parametrize(
    ("init", "scale", "of_biases"),
    [("scaled", 400**-0.5, 1.0), ("large", 1.0, 1.0), (0.05, 0.05, 0.05), (2, 2.0, 2.0)],
)
def test_initialisations(init, scale, of_biases):
    layer = nnce.Linear(400, 1000, init=init, generator=torch.Generator().manual_seed(1))
    # 400,000 draws: the sd of their sd is scale · 0.0011, that of the biases' is 0.022.
    assert layer.weight.std().item() == pytest.approx(scale, rel=0.006)
    assert layer.bias.std().item() == pytest.approx(of_biases, rel=0.11)
    assert layer.weight.mean().abs().item() < scale * 0.008


def test_a_generator_fixes_the_start_in_every_dtype():
    def network(dtype):
        return nnce.MLP((4, 3, 2), generator=torch.Generator().manual_seed(7), dtype=dtype)

    before = torch.get_rng_state()
    one, two, wide = network(torch.float32), network(torch.float32), network(torch.float64)
    assert torch.equal(before, torch.get_rng_state())
    for a, b, c in zip(one.parameters(), two.parameters(), wide.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c.float())


def test_layer_without_bias():
    layer = nnce.Linear(3, 2, bias=False)
    assert list(layer.state_dict()) == ["weight"]
    assert_close(layer(torch.ones(3)), layer.weight.sum(1))


@pytest.mark.parametrize("sizes", [(), (4,), (4, 0), (4, -1, 2), (4, 2.5), (4, True)])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match=r"at least two positive whole sizes.*got \("):
        nnce.MLP(sizes)


def test_bad_options():
    with pytest.raises(ValueError, match="in_features=0"):
        nnce.Linear(0, 3)
    with pytest.raises(ValueError, match="'large' or a positive standard deviation, got 'xavier'"):
        nnce.Linear(2, 3, init="xavier")
    for init in (0.0, -1.0, math.nan, math.inf, True, None):
        with pytest.raises(ValueError, match="or a positive standard deviation, got"):
            nnce.Linear(2, 3, init=init)
    with pytest.raises(ValueError, match=r"sizes, the input's first, got 5"):
        nnce.MLP(5)
    with pytest.raises(ValueError, match=r"floating-point dtype, got torch\.int64"):
        nnce.Linear(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="got 'avg'"):
        nnce.SigmoidCrossEntropyLoss(reduction="avg")


def test_a_slice_is_a_plain_sequential():
    network = nnce.MLP((4, 3, 2))
    first = network[:2]
    assert type(first) is torch.nn.Sequential and first[0] is network[0]
    x = torch.rand(5, 4)
    assert torch.equal(first(x), nnce.sigmoid(network[0](x)))


def test_losses_are_the_functions():
    z, y = torch.randn(5, 3), torch.rand(5, 3)
    for reduction in ("none", "sum", "mean", "batchmean"):
        assert torch.equal(
            nnce.SigmoidCrossEntropyLoss(reduction)(z, y),
            nnce.sigmoid_cross_entropy(z, y, reduction=reduction),
        )
        assert torch.equal(
            nnce.SigmoidQuadraticLoss(reduction)(z, y),
            nnce.sigmoid_quadratic(z, y, reduction=reduction),
        )


def test_a_dtype_that_is_none():
    with pytest.raises(TypeError, match=r"expected dtype to be a torch.dtype, got 'float32'"):
        nnce.MLP((4, 2), dtype="float32")
