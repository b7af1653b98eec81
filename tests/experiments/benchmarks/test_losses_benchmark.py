import argparse

import pytest
import torch

from nnce.experiments.benchmarks import losses


@pytest.mark.parametrize("work", [losses.Work((8, 3)), losses.Work((8, 3), boolean=True)])
def test_rows_of_all_peers(work, monkeypatch):
    monkeypatch.setattr(losses, "_SHORTEST", 1)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(losses, "WORKS", (work,))
    options = argparse.Namespace(quick=False, repetitions=2)
    rows = losses.measure_all(options, torch.device("cpu"))
    assert [row["peer"] for row in rows] == [
        *(losses.NNCE, "BCEWithLogitsLoss", "BCEWithLogitsLoss, torch.compile")
    ]
    assert rows[0]["ratio"] == 1 and all(row["seconds"] > 0 for row in rows)
    assert rows[0]["difference"] < 3 * 2**-23 < 1e-5
