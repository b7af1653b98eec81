"""`nnce.Linear` and `nnce.Sigmoid` are PyTorch's own by type, and its tools treat them so."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

import nnce
from nnce.training import twin

# PyTorch's own warnings, of its old quantisation, and in 2.11 of what dynamo itself looks at.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]


def pair(generator):
    """A network of nnce's layers, and the same of PyTorch's."""
    ours = nn.Sequential(
        nnce.Linear(6, 5, generator=generator),
        nnce.Sigmoid(),
        nnce.Linear(5, 3, generator=generator),
    )
    theirs = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_they_are_pytorchs_by_type(generator):
    ours, _ = pair(generator)
    assert [isinstance(layer, nn.Linear) for layer in ours] == [True, False, True]
    assert isinstance(ours[1], nn.Sigmoid)
    network = nnce.MLP((6, 5, 3))
    assert isinstance(network[0], nn.Linear) and isinstance(network[1], nn.Sigmoid)


@pytest.mark.parametrize("bias", [True, False])
def test_start_and_state_are_those_of_before(bias):
    """The textbook's numbers from the generator, none from the global one, and the same names."""
    before = torch.get_rng_state()
    layer = nnce.Linear(6, 5, bias, generator=torch.Generator().manual_seed(3))
    assert torch.equal(before, torch.get_rng_state())
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(5, 6, generator=generator, dtype=torch.float64) * 6**-0.5
    assert torch.equal(layer.weight, W.float())
    assert list(layer.state_dict()) == ["weight", "bias"][: 1 + bias]
    if bias:
        b = torch.randn(5, generator=generator, dtype=torch.float64)
        assert torch.equal(layer.bias, b.float())
    x = torch.rand(2, 6)
    for copied in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert type(copied) is nnce.Linear and torch.equal(copied(x), layer(x))
    theirs = nn.Linear(6, 5, bias)
    theirs.load_state_dict(layer.state_dict())
    assert [name for name, _ in layer.named_parameters()] == [
        name for name, _ in theirs.named_parameters()
    ]
    assert_close(theirs(x), layer(x))


def weight_norm(model):
    parametrizations.weight_norm(model[0])


def spectral_norm(model):
    torch.manual_seed(0)  # it draws vectors to begin with
    parametrizations.spectral_norm(model[0])


def orthogonal(model):
    torch.manual_seed(0)
    parametrizations.orthogonal(model[2])


def pruned(model):
    prune.l1_unstructured(model[0], "weight", amount=0.4)


def pruned_globally(model):
    linears = [module for module in model if isinstance(module, nn.Linear)]
    prune.global_unstructured(
        [(linear, "weight") for linear in linears],
        pruning_method=prune.L1Unstructured,
        amount=0.4,
    )


def prepared(model):
    """Quantisation's observers, which see what goes by and change nothing; by the exact type.

    (The sigmoids are left out: PyTorch's own would get a stand-in that rounds.)
    """
    model[0].qconfig = model[2].qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    torch.ao.quantization.prepare(model, inplace=True, allow_list={nn.Linear, nnce.Linear})


class LowRank(nn.Module):
    """A layer plus a product of two small matrices, as in LoRA."""

    def __init__(self, whole):
        super().__init__()
        self.whole = whole
        self.down = nn.Parameter(torch.ones(2, whole.in_features))
        self.up = nn.Parameter(torch.full((whole.out_features, 2), 0.1))

    def forward(self, x):
        return self.whole(x) + x @ self.down.T @ self.up.T


def adapted(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            setattr(model, name, LowRank(module))


def compiled(model):
    model.compile(backend="aot_eager", fullgraph=True)


TOOLS = [
    weight_norm,
    spectral_norm,
    orthogonal,
    pruned,
    pruned_globally,
    prepared,
    adapted,
    compiled,
]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_tools_do_with_them_what_they_do_with_pytorchs(tool, generator):
    """Values and gradients after it, by the name of the parameter."""
    ours, theirs = pair(generator)
    x = torch.rand(4, 6, generator=generator)
    for model in (ours, theirs):
        tool(model)
        model(x).pow(2).sum().backward()
    assert_close(ours(x), theirs(x))
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert [name for name, _ in ours.named_parameters()] == list(gradients)
    for name, p in ours.named_parameters():
        assert p.grad is not None or gradients[name] is None
        assert_close(p.grad, gradients[name])
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_observers_have_seen_the_activations(generator):
    """Preparing is of use only if it attaches its observers to these layers."""
    ours, theirs = pair(generator)
    x = torch.rand(4, 6, generator=generator)
    for model in (ours, theirs):
        prepared(model)
        model(x)
    for layer in (0, 2):
        mine, other = (model[layer].activation_post_process for model in (ours, theirs))
        assert_close(mine.min_val, other.min_val)
        assert_close(mine.max_val, other.max_val)


def test_quantisation_goes_by_the_exact_type(generator):
    """The one tool that, if not told of these types, passes them over without a word."""
    ours, theirs = pair(generator)
    dynamic = [
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}) for model in pair(generator)
    ]
    assert type(dynamic[0][0]) is nnce.Linear and type(dynamic[1][0]) is not nn.Linear
    for model in (ours, theirs):
        model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
        torch.ao.quantization.prepare(model, inplace=True)
    assert hasattr(theirs[0], "activation_post_process")
    assert not hasattr(ours[0], "activation_post_process")
    x = torch.rand(4, 6, generator=generator)
    # Its way round: PyTorch's own layers with these parameters.
    network = nnce.MLP((6, 5, 3), generator=generator)
    quantized = torch.ao.quantization.quantize_dynamic(twin.torch_twin(network), {nn.Linear})
    assert_close(quantized(x), network(x), rtol=0.1, atol=0.1)
