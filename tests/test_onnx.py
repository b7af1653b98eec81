"""Export of a network to ONNX, and the results of the exported file."""

import pytest
import torch
from conftest import missing

import nnce
from nnce import MLP, Sigmoid


@pytest.fixture
def onnx():
    """The packages that torch.onnx's exporter needs, and ONNX's own evaluator."""
    try:
        import onnx.reference
        import onnxscript  # noqa: F401  tests whether it is installed
    except ImportError as error:
        missing("onnx", f"{error}; pip install -e '.[onnx]'")
    return onnx


def run(onnx, path, x):
    (name,) = [value.name for value in onnx.load(path).graph.input]
    (output,) = onnx.reference.ReferenceEvaluator(str(path)).run(None, {name: x.numpy()})
    return torch.from_numpy(output)


# ONNX's own evaluator computes both branches of its sigmoid, of which one may overflow.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning:onnx")
@pytest.mark.parametrize("sizes", [(64, 30, 10), (5, 1)], ids=str)
@pytest.mark.parametrize("with_activations", [False, True], ids=["logits", "activations"])
def test_an_exported_network_computes_the_same(onnx, sizes, with_activations, generator, tmp_path):
    network = MLP(sizes, generator=generator)
    model = torch.nn.Sequential(network, Sigmoid()) if with_activations else network
    path = tmp_path / "network.onnx"
    torch.onnx.export(
        model.eval(),
        (torch.zeros(2, sizes[0]),),
        path,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("examples")},),
        verbose=False,
    )
    x = 20 * torch.randn(33, sizes[0], generator=generator)  # more examples than at the export
    expected = model(x).detach()
    torch.testing.assert_close(run(onnx, path, x), expected, rtol=1e-6, atol=1e-6)


# PyTorch deprecates all of torch.jit, and tracing warns of the argument checks.
@pytest.mark.filterwarnings("ignore:.torch.jit.\\w+. is", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "module", [MLP((4, 3, 2)), nnce.SigmoidCrossEntropyLoss()], ids=["MLP", "loss"]
)
def test_torch_jit_fails_and_export_works_as_documented(module, tmp_path):
    x, y = torch.randn(5, 4), torch.ones(5, 4)
    inputs = (x,) if isinstance(module, MLP) else (x, y)
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only"):
        torch.jit.script(module)
    traced = torch.jit.trace(module, inputs)
    with pytest.raises(RuntimeError, match="Could not export Python function call"):
        traced.save(tmp_path / "traced.pt")
    torch.testing.assert_close(
        torch.export.export(module, inputs).module()(*inputs), module(*inputs)
    )
