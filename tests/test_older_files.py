"""Files written by nnce 0.1.0 (tests/made_by_0_1_0): pickled objects, a network, a checkpoint.

They were made at commit e0d2746, by `pickle.dump`, `nnce.save` and
`scripts/train.py --engine products --epochs 1 --hidden 2 --train-size 20`.
"""

import pickle
import shutil

import pytest
import torch
from conftest import ROOT

import nnce

MADE = ROOT / "tests" / "made_by_0_1_0"


@pytest.fixture(scope="module")
def objects():
    with (MADE / "objects.pickle").open("rb") as file:
        return pickle.load(file)


def test_pickled_values_load(objects):
    positives = objects["positives"]
    assert type(positives) is nnce.Positives
    assert torch.equal(
        positives.to_dense(3), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    )
    assert objects["hyperparameters"] == nnce.Hyperparameters("quadratic", 3.0, 0.5, 0.1)
    assert type(objects["hyperparameters"]) is nnce.Hyperparameters


def test_pickled_modules_load_and_compute(objects):
    x, y = torch.rand(4, 2), torch.rand(4, 2).round()
    assert type(objects["linear"]) is nnce.Linear and objects["linear"](x).shape == (4, 1)
    assert torch.equal(objects["sigmoid"](x), nnce.sigmoid(x))
    weighted = nnce.sigmoid_cross_entropy(x, y, weight=torch.tensor([1.0, 2.0]), reduction="mean")
    assert torch.equal(objects["cross_entropy_loss"](x, y), weighted)
    summed = nnce.sigmoid_quadratic(x, y, reduction="sum")
    assert torch.equal(objects["quadratic_loss"](x, y), summed)
    assert objects["layer_loss"](x, torch.tensor([0, 1, 2, 0])) > 0


def test_a_saved_network_loads(objects):
    network = nnce.load(MADE / "network.pt")
    assert network.sizes == objects["mlp"].sizes == (3, 2, 1)
    for ours, pickled in zip(network.parameters(), objects["mlp"].parameters(), strict=True):
        assert torch.equal(ours, pickled)


def test_a_run_is_refused_in_one_sentence(script, tmp_path, capsys):
    shutil.copy(MADE / "checkpoint-000002", tmp_path)
    with pytest.raises(SystemExit) as stop:
        script("train").main(["--resume", str(tmp_path)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert "is in checkpoint format 1, but this version of nnce reads format 2" in err
