"""Every cell of the matrix of `nnce.composability` is earned here."""

import shutil

import pytest
import torch
from conftest import missing

from nnce import functional, rules
from nnce.composability import COLUMNS, INSIDE_PYTORCH, rows

ROWS = rows()

pytestmark = [
    # PyTorch's own warnings: its forward-mode decompositions are scripted, in 2.11 dynamo and
    # export make an instance of Function, and dynamo dislikes Python 3.13.0.
    pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("column", [c for c in COLUMNS if c not in INSIDE_PYTORCH])
def test_cell(row, column):
    if "inductor" in column and not shutil.which("g++"):
        missing("compiler", "inductor needs a C++ compiler, and there is no g++")
    if "CUDA" in column and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    COLUMNS[column](ROWS[row])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("column", INSIDE_PYTORCH)
def test_where_pytorch_stands_in_the_way(row, column):
    """Fails as soon as PyTorch is repaired: then the cell is to be moved to the others."""
    with pytest.raises(Exception, match=r"double backward|vmap|Observed exception"):
        COLUMNS[column](ROWS[row])


def _detached(backward):
    """A backward that autograd cannot see through: second derivatives lose their terms."""

    def wrong(ctx, upstream):
        gradients = backward(ctx, upstream)
        if isinstance(gradients, torch.Tensor):
            return gradients.detach()
        return tuple(None if g is None else g.detach() for g in gradients)

    return staticmethod(wrong)


def _negated(jvp):
    return staticmethod(lambda ctx, *tangents: -jvp(ctx, *tangents))


FUNCTIONS = {
    "linear": (functional.LinearFunction, functional.LinearWithJvp),
    "sigmoid": (functional.SigmoidFunction, functional.SigmoidWithJvp),
    "sigmoid_quadratic": (
        functional.SigmoidQuadraticFunction,
        functional.SigmoidQuadraticWithJvp,
    ),
    "sigmoid_cross_entropy": (
        functional.SigmoidCrossEntropyFunction,
        functional.SigmoidCrossEntropyWithJvp,
    ),
}
WRONG_RULES = {
    "linear": ("da_prev", lambda dz, W: -(dz @ W), ("linear", lambda a, W, b=None: a @ W.T)),
    "sigmoid": (
        "dz_hidden",
        lambda da, z, sigmoid: da * sigmoid(z),
        ("sigmoid", lambda z: 1 - z.sigmoid()),
    ),
    "sigmoid_quadratic": (
        "dz_quadratic",
        lambda z, y, sigmoid: sigmoid(z) - y,
        ("quadratic", lambda z, y, sigmoid=None: (z.sigmoid() - y) ** 2),
    ),
    "sigmoid_cross_entropy": (
        "dz_cross_entropy",
        lambda z, y, sigmoid, pos_weight: y - sigmoid(z),
        ("cross_entropy", lambda z, y, pos_weight, softplus=None: -y * z.sigmoid().log()),
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_planted_wrong_second_derivative_is_refused(row, monkeypatch):
    function = FUNCTIONS[row][0]
    monkeypatch.setattr(function, "backward", _detached(function.backward))
    with pytest.raises((AssertionError, RuntimeError), match=r"Tensor-likes|does not require grad"):
        COLUMNS["double backward"](ROWS[row])
    with pytest.raises(AssertionError):
        COLUMNS["func.hessian"](ROWS[row])


@pytest.mark.parametrize("row", ROWS)
def test_planted_wrong_jvp_is_refused(row, monkeypatch):
    function = FUNCTIONS[row][1]
    monkeypatch.setattr(function, "jvp", _negated(function.jvp))
    with pytest.raises(AssertionError):
        COLUMNS["func.jvp"](ROWS[row])


@pytest.mark.parametrize("row", ROWS)
def test_a_jvp_inside_forward_mode_is_refused(row, monkeypatch):
    """PyTorch loses the outer tangent of a Function's jvp, in silence; so no Function is used."""
    monkeypatch.setattr(functional, "_forward_mode_levels", lambda: 1)
    with pytest.raises(AssertionError):
        COLUMNS["forward mode in forward mode"](ROWS[row])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    "column",
    ["func.grad", "func.vjp", "per-sample vmap(grad)", "compile (aot_eager)", "checkpoint"],
)
def test_planted_wrong_backward_is_refused(row, column, monkeypatch):
    name, wrong, _ = WRONG_RULES[row]
    monkeypatch.setattr(rules, name, wrong)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        COLUMNS[column](ROWS[row])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("column", ["func.vmap", "compile (aot_eager)", "export"])
def test_planted_wrong_forward_is_refused(row, column, monkeypatch):
    name, wrong = WRONG_RULES[row][2]
    monkeypatch.setattr(rules, name, wrong)
    with pytest.raises(AssertionError, match=r"Tensor-likes|Scalars"):
        COLUMNS[column](ROWS[row])
