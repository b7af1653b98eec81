import pytest
import torch
from torch.testing import assert_close

import nnce
from nnce.algorithm import backprop
from nnce.losses import LOSSES


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", [(4, 2), (4, 3, 2), (4, 3, 5, 2), (4, 3, 5, 6, 2)])
def test_deltas_are_the_gradients_by_z(loss, sizes):
    network = nnce.MLP(sizes, dtype=torch.float64)
    x, y = torch.rand(6, 4, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64)
    one_pass = backprop(network, x, y, loss=loss)

    z, a = [], x
    for W, b in ((layer.weight, layer.bias) for layer in network.linears()):
        z.append(a @ W.T + b)
        a = z[-1].sigmoid()
    C = 0.5 * (a - y).square() if loss == "quadratic" else -(y * a.log() + (1 - y) * (1 - a).log())
    dz = torch.autograd.grad(C.sum(), z)
    for ours, theirs in zip((*one_pass.z, *one_pass.dz, one_pass.a[-1]), (*z, *dz, a), strict=True):
        assert_close(ours, theirs, rtol=1e-11, atol=1e-14)
    assert [tuple(t.shape) for t in one_pass.a] == [(6, n) for n in sizes[1:]]
    assert not any(t.requires_grad for t in one_pass.gradients.values())


def test_takes_tensors():
    network = nnce.MLP((4, 3, 2))
    layers = [(layer.weight, layer.bias) for layer in network.linears()]
    x, y = torch.rand(6, 4), torch.rand(6, 2)
    from_tensors, from_network = backprop(layers, x, y), backprop(network, x, y)
    assert list(from_tensors.gradients) == [name for name, _ in network.named_parameters()]
    for name, gradient in from_tensors.gradients.items():
        assert torch.equal(gradient, from_network.gradients[name])
    without_bias = backprop([(W, None) for W, _ in layers], x, y)
    assert list(without_bias.gradients) == ["0.weight", "2.weight"]


def test_mismatch_is_value_error_is_refused():
    network = nnce.MLP((4, 3, 2))
    x, y = torch.rand(6, 4), torch.rand(6, 2)
    with pytest.raises(ValueError, match="'quadratic' or 'cross-entropy', got 'hinge'"):
        backprop(network, x, y, loss="hinge")
    with pytest.raises(ValueError, match=r"x of shape \(n, 4\), got \(6, 2\)"):
        backprop(network, y, y)
    with pytest.raises(TypeError, match=r"y of dtype torch.float32 like x, got torch.int64"):
        backprop(network, x, y.long())
    with pytest.raises(TypeError, match="x to be a tensor, got list"):
        backprop(network, x.tolist(), y)
    W, b = network[0].weight, network[0].bias
    with pytest.raises(TypeError, match=r"nnce.MLP or a sequence of pairs \(W, b\), got Linear"):
        backprop(torch.nn.Linear(4, 2), x, y)
    with pytest.raises(ValueError, match=r"W of layer 2 of shape \(n_out, 3\), got \(3, 4\)"):
        backprop([(W, b), (W, b)], x, y)
    with pytest.raises(ValueError, match=r"b of layer 1 of shape \(3,\), got \(1,\)"):
        backprop([(W, b[:1])], x, y)
    with pytest.raises(ValueError, match="at least one layer, got none"):
        backprop([], x, y)
    with pytest.raises(ValueError, match=r"y of shape \(6, 2\), got \(5, 2\)"):
        backprop(network, x, y[:5])
    del network[1]
    with pytest.raises(ValueError, match=r"MLP of sizes \(4, 3, 2\), but some have been added"):
        backprop(network, x, y)


def test_tensors_of_another_kind():
    x, y, W = torch.rand(6, 4), torch.rand(6, 2), torch.rand(2, 4)
    with pytest.raises(ValueError, match=r"W of layer 1 of shape \(n_out, n_in\), got \(\)$"):
        backprop([(torch.tensor(1.0), None)], x, y)
    with pytest.raises(ValueError, match=r"W of layer 1 of shape \(n_out, n_in\), got \(4,\)$"):
        backprop([(W[0], None)], x, y)
    with pytest.raises(TypeError, match=r"of a floating-point dtype, got torch.int64$"):
        backprop([(W.long(), None)], x.long(), y.long())
    for layers in ([W, W], [(W, None, None)], [3]):
        with pytest.raises(TypeError, match=r"expected the layers as pairs \(W, b\)"):
            backprop(layers, x, y)
