"""The hand-written gradients are right, and the checks that say so refuse wrong ones."""

import pytest
import torch
from oracles import CHECKS

from nnce import functional, rules
from nnce.kernels import fused


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("fast", [True, False])
def test_gradients(name, fast, monkeypatch):
    if not fast:
        monkeypatch.setattr(functional, "is_plain", _never)
    CHECKS[name]()


def _never(*_, **__):
    return False


def _drop_upstream(function):
    backward = function.backward

    def wrong(ctx, upstream):
        return backward(ctx, torch.ones_like(upstream))

    return staticmethod(wrong)


def _changed(function, change):
    """The same function with a wrong result."""
    return lambda *arguments: change(function(*arguments))


def _mean_reduction(C, counts, reduction):
    return C if reduction == "none" else C.mean()


# What is planted, where, and which checks must refuse it.
PLANTED = {
    "equation 1: the bias forgotten": (
        rules,
        "linear",
        lambda a_prev, W, b=None: a_prev @ W.T,
        ("linear", "gradcheck", "network"),
    ),
    "equation 2: no ½": (
        rules,
        "quadratic",
        lambda z, y: (z.sigmoid() - y) ** 2,
        ("losses_by_z", "losses_by_y", "gradcheck"),
    ),
    "equation 3: only the term of y": (
        rules,
        "cross_entropy",
        lambda z, y, pos_weight=None: -y * z.sigmoid().log(),
        ("losses_by_z", "losses_by_y", "gradcheck"),
    ),
    "equation 4: a missing σ'": (
        rules,
        "dz_quadratic",
        lambda z, y, sigmoid=torch.sigmoid: sigmoid(z) - y,
        ("losses_by_z", "losses_by_y", "gradcheck", "network", "saturation"),
    ),
    "equation 4: a flipped sign": (
        rules,
        "dz_quadratic",
        lambda z, y, sigmoid=torch.sigmoid: (y - sigmoid(z)) * sigmoid(z) * sigmoid(-z),
        ("losses_by_z", "losses_by_y", "gradcheck", "network", "saturation"),
    ),
    "equation 5: a flipped sign": (
        rules,
        "dz_cross_entropy",
        lambda z, y, sigmoid=torch.sigmoid, pos_weight=None: y - sigmoid(z),
        ("losses_by_z", "losses_by_y", "gradcheck", "network", "saturation"),
    ),
    "equation 5: the σ' of equation 4": (
        rules,
        "dz_cross_entropy",
        lambda z, y, sigmoid=torch.sigmoid, pos_weight=None: (
            (sigmoid(z) - y) * sigmoid(z) * sigmoid(-z)
        ),
        ("losses_by_z", "losses_by_y", "gradcheck", "network", "saturation"),
    ),
    "equation 6: a mean for a sum, biases": (
        rules,
        "db",
        lambda dz: dz.reshape(-1, dz.shape[-1]).mean(0),
        ("linear", "gradcheck", "network"),
    ),
    "equation 6: a mean for a sum, weights": (
        rules,
        "dW",
        lambda dz, a_prev: (
            dz.reshape(-1, dz.shape[-1]).T
            @ a_prev.reshape(-1, a_prev.shape[-1])
            / dz.shape[:-1].numel()
        ),
        ("linear", "gradcheck", "network"),
    ),
    "equation 6: dW transposed": (
        rules,
        "dW",
        lambda dz, a_prev: a_prev.reshape(-1, a_prev.shape[-1]).T @ dz.reshape(-1, dz.shape[-1]),
        ("linear", "gradcheck", "network"),
    ),
    "equation 7: a transposed W": (
        rules,
        "da_prev",
        lambda dz, W: dz @ W.T,
        ("linear", "gradcheck", "network"),
    ),
    "equation 8: a(1+a)": (
        rules,
        "sigmoid_prime",
        lambda z, sigmoid=torch.sigmoid: sigmoid(z) * (1 + sigmoid(z)),
        ("losses_by_z", "sigmoid", "gradcheck", "network", "saturation"),
    ),
    "equation 8: a(1−a), which rounds to 0": (
        rules,
        "sigmoid_prime",
        lambda z, sigmoid=torch.sigmoid: sigmoid(z) * (1 - sigmoid(z)),
        ("saturation",),
    ),
    "equation 8: 0 in saturation": (
        rules,
        "sigmoid_prime",
        lambda z, sigmoid=torch.sigmoid: torch.where(z.abs() < 12, sigmoid(z) * sigmoid(-z), 0 * z),
        ("saturation",),
    ),
    "PyTorch's own σ inside a backward": (
        rules,
        "dz_cross_entropy",
        lambda z, y, sigmoid=None, pos_weight=None: (
            (1 - y) * torch.sigmoid(z) - y * torch.sigmoid(-z)
        ),
        ("saturation",),
    ),
    "a mean for a sum in the reductions": (
        functional,
        "_reduce",
        _mean_reduction,
        ("losses_by_z", "losses_by_y"),
    ),
    "a dropped upstream, linear": (
        functional.LinearFunction,
        "backward",
        _drop_upstream(functional.LinearFunction),
        ("linear", "gradcheck", "network"),
    ),
    "a dropped upstream, sigmoid": (
        functional.SigmoidFunction,
        "backward",
        _drop_upstream(functional.SigmoidFunction),
        ("sigmoid", "gradcheck", "network"),
    ),
    "a dropped upstream, quadratic": (
        functional.SigmoidQuadraticFunction,
        "backward",
        _drop_upstream(functional.SigmoidQuadraticFunction),
        ("losses_by_z", "losses_by_y", "gradcheck"),
    ),
    "a dropped upstream, cross-entropy": (
        functional.SigmoidCrossEntropyFunction,
        "backward",
        _drop_upstream(functional.SigmoidCrossEntropyFunction),
        ("losses_by_z", "losses_by_y", "gradcheck"),
    ),
}


# In the fused passes, which plain eager code uses instead of the rules.
PLANTED_IN_PASSES = {
    "a wrong value": (
        "forward",
        _changed(fused.forward, lambda result: (2 * result[0], result[1])),
        ("losses_by_z", "gradcheck"),
    ),
    "a wrong divisor": (
        "forward",
        _changed(fused.forward, lambda result: (result[0], 2 * result[1])),
        ("losses_by_z", "gradcheck", "network"),
    ),
    "a flipped sign": (
        "backward",
        _changed(fused.backward, lambda dz: -dz),
        ("losses_by_z", "gradcheck", "network"),
    ),
    "a dropped upstream": (
        "backward",
        lambda z, y, options, upstream, *others: fused_backward(
            *(z, y, options, torch.ones_like(upstream)), *others
        ),
        ("losses_by_z", "gradcheck"),
    ),
    "equation 8: a flipped sign": (
        "sigmoid_backward",
        _changed(fused.sigmoid_backward, lambda dz: -dz),
        ("sigmoid", "gradcheck", "network"),
    ),
    "equation 8: a dropped upstream": (
        "sigmoid_backward",
        lambda z, da: z.sigmoid() * (-z).sigmoid(),
        ("sigmoid", "gradcheck", "network"),
    ),
}
fused_backward = fused.backward


@pytest.mark.parametrize(
    ("planted", "check"),
    [(planted, check) for planted, (*_, checks) in PLANTED_IN_PASSES.items() for check in checks],
)
def test_planted_wrong_pass_is_refused(planted, check, monkeypatch):
    name, wrong, _ = PLANTED_IN_PASSES[planted]
    monkeypatch.setattr(fused, name, wrong)
    with pytest.raises(AssertionError):
        CHECKS[check]()


@pytest.mark.parametrize(
    ("planted", "check"),
    [(planted, check) for planted, (*_, checks) in PLANTED.items() for check in checks],
)
def test_planted_wrong_rule_is_refused(planted, check, monkeypatch):
    monkeypatch.setattr(functional, "is_plain", _never)
    owner, name, wrong, _ = PLANTED[planted]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        CHECKS[check]()
