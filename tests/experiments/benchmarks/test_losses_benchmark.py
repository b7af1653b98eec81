import argparse
import math

import pytest
import torch

from nnce.experiments.benchmarks import losses
from nnce.experiments.benchmarks.losses import Work

PEERS = (losses.BUILT_IN, losses.COMPILED, losses.NO_NUMBA, losses.TIMM)
KINDS = ("boolean target", "options", "ignore_index", "no_grad", "Sigmoid", "focal")


def rows_of(work, monkeypatch):
    monkeypatch.setattr(losses, "SHORTEST", 1)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(losses, "WORKS", (work,))
    options = argparse.Namespace(quick=False, repetitions=2)
    return losses.measure_all(options, torch.device("cpu"))


@pytest.mark.parametrize(
    "work", [Work((8, 3)), *(Work((8, 3), kind=kind) for kind in KINDS)], ids=str
)
def test_rows_of_all_peers(work, monkeypatch):
    peers = {"": PEERS, "focal": (losses.TORCHVISION,)}
    work = work._replace(peers=peers.get(work.kind, PEERS[:1]))
    threads = torch.get_num_threads()
    rows = rows_of(work, monkeypatch)
    assert torch.get_num_threads() == threads
    assert [row["peer"].removesuffix(" (not installed)") for row in rows] == ["nnce", *work.peers]
    measured = [row for row in rows if row["outcome"] == "right"]
    assert rows[0]["ratio"] == 1 and all(row["seconds"] > 0 for row in measured)
    for row in measured:
        assert math.isnan(row["kept"]) == (work.kind == "no_grad")
        assert math.isnan(row["ulps"]) == (work.kind not in ("", "boolean target", "Sigmoid"))
    assert not rows[0]["ulps"] > 3


def test_memory_kept_for_the_backward(monkeypatch):
    (boolean, _), (step, _) = (
        rows_of(work, monkeypatch)
        for work in (Work((64, 50), kind="boolean target"), Work((4, 6, 5, 3), kind="step"))
    )
    assert boolean["kept"] == (4 + 1) / (4 + 4)
    # x, z and a of the hidden layer, z and y of the last; PyTorch keeps no z of the hidden layer.
    assert step["kept"] == pytest.approx((24 + 20 + 20 + 12 + 12) / (24 + 20 + 12 + 12))


def test_the_built_in_with_options_is_the_same_loss(monkeypatch):
    for kind in ("options", "ignore_index"):
        case = losses.Case(Work((40, 30), kind=kind), torch.device("cpu"))
        gradients = []
        for peer in (losses.NNCE, losses.BUILT_IN):
            case.step(peer)()
            gradients.append(case.z.grad)
        torch.testing.assert_close(*gradients)
