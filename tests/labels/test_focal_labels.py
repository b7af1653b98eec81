"""The focal losses over many labels: those of all logits, in the memory of the cross-entropy's."""

import itertools

import pytest
import torch
from conftest import slow_unless
from torch.testing import assert_close

import nnce
from nnce import functional
from nnce.kernels import fused
from nnce.labels import linear_sigmoid_asymmetric_loss, linear_sigmoid_focal_loss

LOSSES = {
    "focal": (
        lambda *args, **options: linear_sigmoid_focal_loss(*args, gamma=1.5, **options),
        lambda z, y, **options: functional.sigmoid_focal_loss(z, y, gamma=1.5, **options),
    ),
    "asymmetric": (linear_sigmoid_asymmetric_loss, functional.sigmoid_asymmetric_loss),
}
KINDS = ("index", "positives", "soft", "boolean")


def problem(kind, n=7, labels=1100, features=5):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, W, b = (
        t.requires_grad_() for t in (normal(n, features), normal(labels, features), normal(labels))
    )
    index = torch.randint(labels, (n, 3), generator=generator)
    y = torch.zeros(n, labels, dtype=torch.float64).scatter_(1, index, 1.0)
    if kind == "index":
        return (x, W, b), index, y
    if kind == "positives":
        values = torch.linspace(0.1, 1, 3 * n, dtype=torch.float64)
        index = torch.stack([torch.randperm(labels, generator=generator)[:3] for _ in range(n)])
        target = nnce.Positives(torch.arange(n + 1) * 3, index.flatten(), values)
        return (x, W, b), target, target.to_dense(labels, torch.float64)
    if kind == "soft":
        y = normal(n, labels).sigmoid()
    return (x, W, b), y.bool() if kind == "boolean" else y, y


@pytest.mark.parametrize(
    ("loss", "kind", "numba"),
    slow_unless(
        lambda loss, kind, numba: (loss, kind, numba) == ("asymmetric", "positives", False),
        itertools.product(LOSSES, KINDS, [True, False]),
    ),
)
def test_value_and_gradients_are_those_of_all_logits(loss, kind, numba, monkeypatch):
    if not numba:
        monkeypatch.setattr(fused, "uses_numba", lambda: False)
    walked, whole = LOSSES[loss]
    (x, W, b), target, y = problem(kind)
    weight, example_weight = torch.rand(1100).double(), torch.rand(7).double()
    z = torch.nn.functional.linear(x, W, b)
    expected = whole(z, y, weight=weight, reduction="none").sum(1) @ example_weight / 7
    for block in (None, 300):
        C = walked(
            *(x, W, target),
            **{"linear_bias": b, "weight": weight, "example_weight": example_weight},
            block=block,
        )
        assert_close(C, expected)
        found, of_all = (
            torch.autograd.grad(3 * t, (x, W, b), retain_graph=True) for t in (C, expected)
        )
        assert_close(found, of_all)
    of_each = walked(x, W, target, linear_bias=b, reduction="none")
    assert_close(of_each, whole(z, y, reduction="none").sum(1))


@pytest.mark.parametrize("loss", slow_unless(lambda loss: loss == "asymmetric", zip(LOSSES)))
def test_few_labels_at_once(loss):
    walked, whole = LOSSES[loss]
    (x, W, b), target, y = problem("index", labels=30)
    C, expected = walked(x, W, target, linear_bias=b), whole(x @ W.T + b, y, reduction="batchmean")
    assert_close(C, expected)
    assert_close(torch.autograd.grad(C, (x, W, b)), torch.autograd.grad(expected, (x, W, b)))


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_under_compile(loss):
    walked, _ = LOSSES[loss]
    (x, W, b), target, _ = problem("index")
    compiled = torch.compile(walked, backend="aot_eager", fullgraph=True)
    found, expected = (f(x, W, target, linear_bias=b, block=300) for f in (compiled, walked))
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found, (x, W, b)), torch.autograd.grad(expected, (x, W, b)))


def test_bad_options_are_refused_in_one_sentence():
    x, W, y = torch.rand(2, 3), torch.rand(4, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"^expected gamma from 0 to 1,000,000, got -1$"):
        linear_sigmoid_focal_loss(x, W, y, gamma=-1)
    with pytest.raises(ValueError, match=r"^expected margin in \[0, 1\), got 1$"):
        linear_sigmoid_asymmetric_loss(x, W, y, margin=1)
