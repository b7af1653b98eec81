"""Few labels: their logits are computed as a whole, with the results of the walk."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import nnce
from nnce.labels import function
from nnce.labels.function import SMALL

N, LABELS, FEATURES = 6, 7, 4


def _random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _layer(dtype=torch.float64):
    return [
        _random(*shape, seed=i).to(dtype).requires_grad_()
        for i, shape in enumerate([(N, FEATURES), (LABELS, FEATURES), (LABELS,)])
    ]


NUMBERS = torch.tensor([[0, 3], [1, 1], [-1, -1], [6, -1], [2, 5], [4, 0]])
Y = torch.zeros(N, LABELS, dtype=torch.float64)
Y[[0, 0, 1, 3, 4, 4, 5, 5], [0, 3, 1, 6, 2, 5, 4, 0]] = 1
SOFT = _random(N, LABELS, seed=3).sigmoid()
TARGETS = {
    "label numbers": (NUMBERS, Y),
    "one label number": (NUMBERS[:, 0], Y * (torch.arange(LABELS) == NUMBERS[:, :1])),
    "positives": (nnce.Positives.from_lists([[0, 3], [1], [], [6], [2, 5], [4, 0]]), Y),
    "soft, sparse": ((Y * SOFT).to_sparse(), Y * SOFT),
    "boolean": (Y.bool(), Y),
    "soft": (SOFT, SOFT),
    "soft, not contiguous": (SOFT.T.contiguous().T, SOFT),
}
OPTIONS = {
    "plain": {},
    "weight": {"weight": _random(LABELS, seed=4).abs()},
    "pos_weight": {"pos_weight": _random(LABELS, seed=5).abs()},
    "smoothing": {"label_smoothing": 0.1},
    "all": {
        "weight": _random(LABELS, seed=4).abs(),
        "pos_weight": _random(1, seed=5).abs(),
        "label_smoothing": 0.2,
        "example_weight": _random(N, seed=6).abs(),
    },
}


@pytest.fixture
def at_once(monkeypatch):
    """Calls of the Function for few labels."""
    calls = []

    def apply(*arguments):
        calls.append(arguments)
        return function.AtOnce.apply(*arguments)

    monkeypatch.setattr("nnce.labels.linear.apply_at_once", apply)
    return calls


def _loss(layer, target, **options):
    x, W, b = layer
    return nnce.linear_sigmoid_cross_entropy(x, W, target, linear_bias=b, **options)


def _oracle(layer, y, reduction="batchmean", example_weight=None, label_smoothing=0, **options):
    """PyTorch's loss of PyTorch's layer."""
    x, W, b = layer
    z = torch.nn.functional.linear(x, W, b)
    y = y * (1 - label_smoothing) + label_smoothing / 2
    C = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none", **options)
    C = C.sum(1) if example_weight is None else example_weight * C.sum(1)
    divisor = {"mean": N * LABELS, "batchmean": N}.get(reduction, 1)
    return C if reduction == "none" else C.sum() / divisor


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize(("target", "options"), list(itertools.product(TARGETS, OPTIONS)))
def test_value_and_gradients(target, options, reduction, at_once):
    target, y = TARGETS[target]
    layer = _layer()
    found = _loss(layer, target, reduction=reduction, **OPTIONS[options])
    wanted = _oracle(layer, y, reduction, **OPTIONS[options])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    upstream = _random(*found.shape, seed=7)
    for a, b in zip(
        torch.autograd.grad(found, layer, upstream),
        torch.autograd.grad(wanted, layer, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert len(at_once) == 1


def test_where_it_is_used(at_once):
    def calls(*layer, target=NUMBERS, **options):
        at_once.clear()
        nnce.linear_sigmoid_cross_entropy(*layer, target, **options)
        return len(at_once)

    x, W, _ = (t.detach() for t in _layer(torch.float32))
    assert calls(x, W) == 1
    assert calls(x, W, block=3) == calls(x.bfloat16(), W.bfloat16()) == 0
    assert calls(x, torch.zeros(SMALL, FEATURES)) == 1
    assert calls(x, torch.zeros(SMALL + 1, FEATURES)) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(x, W) == 0


def test_wrong_values_are_refused(at_once):
    x, W, b = _layer()
    for target, options in (
        (NUMBERS + 5, {}),
        (NUMBERS - 1, {}),
        (2 * SOFT, {}),
        (NUMBERS, {"weight": -torch.ones(LABELS)}),
    ):
        with pytest.raises(ValueError, match=r"^expected (label|target|weight)"):
            _loss((x, W, b), target, **options)
    assert len(at_once) == 4


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_backwards_of_every_kind(reduction, at_once):
    layer = _layer()
    C = _loss(layer, NUMBERS, reduction=reduction)
    upstream = _random(3, *C.shape, seed=8)
    oracle = _oracle(layer, Y, reduction)
    wanted = [torch.autograd.grad(oracle, layer, u, retain_graph=True) for u in upstream]
    batched = torch.autograd.grad(C, layer, upstream, is_grads_batched=True, retain_graph=True)
    for i, u in enumerate(upstream):
        for a, b, c in zip(
            torch.autograd.grad(C, layer, u, retain_graph=True), batched, wanted[i], strict=True
        ):
            torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(b[i], c, rtol=1e-12, atol=1e-14)
    recomputed = checkpoint(_loss, layer, NUMBERS, reduction=reduction, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(recomputed, layer, upstream[0]), wanted[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    x, *_ = layer
    (dx,) = torch.autograd.grad(C, x, upstream[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        dx.sum().backward()


def test_only_what_is_asked_for(at_once):
    for wants in ((True, False, False), (False, True, False), (False, False, True)):
        layer = [t.detach().requires_grad_(w) for t, w in zip(_layer(), wants, strict=True)]
        gradients = _loss(layer, NUMBERS).grad_fn.apply(torch.ones((), dtype=torch.float64))
        assert tuple(g is not None for g in gradients[:3]) == wants
    assert not _loss([t.detach() for t in layer], NUMBERS).requires_grad
