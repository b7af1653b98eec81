"""Every cell of the compatibility table of nnce's own functions."""

import itertools
import re

import pytest
import torch
from conftest import missing, slow_unless
from torch.utils._python_dispatch import TorchDispatchMode

from nnce import functional, rules
from nnce.checks import check_composability
from nnce.checks.composability import COLUMNS
from nnce.experiments.proof.table import INSIDE_PYTORCH, REFUSED, rows, walked_rows
from nnce.kernels import fused

ROWS = rows()
WALKED = walked_rows()


def cell(row, column, of=ROWS):
    """One cell of the table."""
    return of[row].check(only=[column])[column]


def is_ordinary(row, column):
    """Whether the ordinary suite checks a cell: compilers are tried on one row, without C++."""
    compiles = "compile" in column or column == "export"
    if row == "sigmoid_asymmetric_loss":  # by the same Functions as the focal loss
        return False
    of_one_row = row in ("sigmoid_cross_entropy", "linear_sigmoid_cross_entropy")
    return not compiles or (of_one_row and column != "compile (inductor)")


def cells(rows, columns):
    return slow_unless(is_ordinary, itertools.product(rows, columns))


def skip_unless_tried(found, column):
    if found.verdict == "not tried" and "inductor" in column:
        missing("compiler", found.detail)
    if found.verdict == "not tried" and "CUDA" in column and not torch.cuda.is_available():
        pytest.skip(found.detail)


@pytest.mark.parametrize(
    ("row", "column"), cells(ROWS, [c for c in COLUMNS if c not in INSIDE_PYTORCH])
)
def test_cell(row, column):
    found = cell(row, column)
    skip_unless_tried(found, column)
    assert found.verdict == "works", found.detail


TARGETS = torch.tensor([[0, 1, -100], [1, 1, 0], [-100, -100, -100], [0, 0, 1], [1, -100, 0]])


def with_options(z, y):
    return functional.sigmoid_cross_entropy(
        z, y, label_smoothing=0.1, ignore_index=-100, reduction="mean"
    )


def with_options_by_pytorch(z, y):
    counts = y != -100
    y = y.where(counts, 0).to(z.dtype) * 0.9 + 0.05
    C = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none")
    return (C * counts).sum() / counts.sum()


NO_DOUBLE_BACKWARD = "not currently support double backward|not have been used in the graph"
# Columns in which the loss with these options does not work, and PyTorch's reason: under
# torch.compile vmap accepts no operation in front of a Function.
FAILS_WITH_OPTIONS = {
    "compile, double backward": NO_DOUBLE_BACKWARD,
    "compile(vmap(grad))": "does not have vmap support",
    "compile(hessian)": "does not have vmap support",
}
# The targets have one shape, so `examples` is not given.
NOT_TRIED_WITH_OPTIONS = ("leading dimensions", "compile, dynamic shapes")
# The targets are on the CPU.
WITH_OPTIONS = [c for c in COLUMNS if c not in ("meta device", "autocast (CUDA)")]


@pytest.mark.parametrize(("row", "column"), cells(["sigmoid_cross_entropy"], WITH_OPTIONS))
def test_the_losss_options_go_with_all_that_the_loss_goes_with(row, column):
    report = check_composability(
        with_options,
        ROWS[row].inputs[0],
        TARGETS,
        reference=with_options_by_pytorch,
        only=[column],
    )
    found = report[column]
    if column in FAILS_WITH_OPTIONS:
        assert found.verdict == "fails" and re.search(FAILS_WITH_OPTIONS[column], found.detail)
    elif column in NOT_TRIED_WITH_OPTIONS:
        assert found.verdict == "not tried" and "example" in found.detail
    else:
        skip_unless_tried(found, column)
        assert found.verdict == "works", found.detail


# What the error says in each column of REFUSED: the function's own sentence, or PyTorch's.
NO_VMAP = "does not have vmap support"
REFUSALS = {
    "double backward": "walked block by block has no second derivatives",
    "compile, double backward": NO_DOUBLE_BACKWARD,
    "func.hessian": NO_VMAP,
    "compile(hessian)": "Unsupported",
    "func.jvp": "must implement the jvp function",
    "forward mode in forward mode": NO_VMAP,
    "func.vmap": NO_VMAP,
    "per-sample vmap(grad)": NO_VMAP,
    "compile(vmap(grad))": "Unsupported",
    "leading dimensions": r"expected (input|x) of shape \(n, features\)",
}


def test_every_refusal_has_its_reason():
    assert REFUSALS.keys() == REFUSED.keys()


@pytest.mark.parametrize(("row", "column"), cells(WALKED, COLUMNS))
def test_walked_cell(row, column):
    """Functions that go block by block work, or refuse by intention, with the reason."""
    found = cell(row, column, WALKED)
    skip_unless_tried(found, column)
    if column in REFUSED:
        assert found.verdict == "fails" and re.search(REFUSALS[column], found.detail), found
    else:
        assert found.verdict == "works", found.detail


@pytest.mark.parametrize(("row", "column"), cells(ROWS, INSIDE_PYTORCH))
def test_where_pytorch_stands_in_the_way(row, column):
    """Fails as soon as PyTorch is repaired: then the cell is to be moved to the others."""
    found = cell(row, column)
    assert found.verdict == "fails"
    assert re.search("double backward|vmap|Observed exception", found.detail)


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
    "linear": functional.LinearFunction,
    "sigmoid": functional.SigmoidFunction,
    "sigmoid_quadratic": functional.SigmoidQuadraticFunction,
    "sigmoid_cross_entropy": functional.SigmoidCrossEntropyFunction,
    "sigmoid_focal_loss": functional.SigmoidFocalFunction,
    "sigmoid_asymmetric_loss": functional.SigmoidFocalFunction,
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
    **dict.fromkeys(
        ("sigmoid_focal_loss", "sigmoid_asymmetric_loss"),
        (
            "dz_focal",  # the cross-entropy's slope times q^γ: the term of dq is lost
            lambda z, y, focus, sigmoid, softplus: (sigmoid(z) - y) * (sigmoid(z) - y).abs(),
            ("focal", lambda z, y, focus, *_: (z.sigmoid() - y).square()),
        ),
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_planted_wrong_second_derivative_is_refused(row, monkeypatch):
    function = FUNCTIONS[row]
    # Also in the form for plain eager code, where that has a backward of its own.
    for owner in (function, *function.__subclasses__()):
        if "backward" in vars(owner):
            monkeypatch.setattr(owner, "backward", _detached(owner.backward))
    assert cell(row, "double backward").verdict == "wrong"
    assert cell(row, "func.hessian").verdict == "wrong"


@pytest.mark.parametrize("row", ROWS)
def test_planted_wrong_jvp_is_refused(row, monkeypatch):
    (function,) = (f for f in FUNCTIONS[row].__subclasses__() if "jvp" in vars(f))
    monkeypatch.setattr(function, "jvp", _negated(function.jvp))
    found = cell(row, "func.jvp")
    assert found.verdict == "wrong" and found.detail.startswith("tangent: ")


@pytest.mark.parametrize("row", ROWS)
def test_a_jvp_inside_forward_mode_is_refused(row, monkeypatch):
    """PyTorch loses the outer tangent of a Function's jvp, in silence; so no Function is used."""
    monkeypatch.setattr(functional, "forward_mode_levels", lambda: 1)
    assert cell(row, "forward mode in forward mode").verdict == "wrong"


@pytest.mark.parametrize(
    ("row", "column"),
    cells(
        ROWS,
        ["func.grad", "func.vjp", "per-sample vmap(grad)", "compile (aot_eager)", "checkpoint"],
    ),
)
def test_planted_wrong_backward_is_refused(row, column, monkeypatch):
    name, wrong, _ = WRONG_RULES[row]
    monkeypatch.setattr(rules, name, wrong)
    if row == "sigmoid":  # a checkpoint's backward is plain eager code, which a fused pass computes
        monkeypatch.setattr(fused, "sigmoid_backward", lambda z, da: wrong(da, z, torch.sigmoid))
    found = cell(row, column)
    assert found.verdict == "wrong" and found.detail.startswith("gradient")


@pytest.mark.parametrize(
    ("row", "column"), cells(ROWS, ["func.vmap", "compile (aot_eager)", "export"])
)
def test_planted_wrong_forward_is_refused(row, column, monkeypatch):
    name, wrong = WRONG_RULES[row][2]
    monkeypatch.setattr(rules, name, wrong)
    found = cell(row, column)
    assert found.verdict == "wrong" and found.detail.startswith("value")


class CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("row", [row for row in ROWS if len(ROWS[row].inputs) > 1])
def test_a_gradient_nobody_asked_for_costs_nothing(row):
    """Fewer operations run for one of them than for all."""
    function, _, inputs, _ = ROWS[row]

    def operations(wanted):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        with CountOperations():  # or the forward is a fused pass, whose backward could not count
            output = function(*leaves).sum()
        with CountOperations() as counter:
            output.backward()
        return counter.count

    everything = operations(range(len(inputs)))
    assert all(operations((one,)) < everything for one in range(len(inputs)))
