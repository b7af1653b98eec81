import argparse

import pytest
import torch

from nnce.experiments.benchmarks import checks


def test_rows_of_both_in_turns():
    options = argparse.Namespace(quick=True, repetitions=2)
    rows = checks.measure_all(options, torch.device("cpu"))
    assert [row["peer"] for row in rows] == 3 * [checks.NNCE, checks.PEER]
    assert all(row["outcome"] == "right" and row["seconds"] > 0 for row in rows)
    assert [row["ratio"] for row in rows[::2]] == [1, 1, 1]


def test_a_right_function_that_is_not_called_right_is_told(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            return 2 * upstream

    monkeypatch.setattr(checks, "FUNCTIONS", {"wrong": Wrong.apply})
    monkeypatch.setattr(checks, "gradcheck", lambda *_: True)
    monkeypatch.setattr(checks, "gradgradcheck", lambda *_: True)
    options = argparse.Namespace(quick=False, repetitions=1)
    ours, theirs = checks.measure_all(options, torch.device("cpu"))
    assert ours["outcome"] == "wrong" and theirs["outcome"] == "right"


@pytest.mark.slow
@pytest.mark.parametrize("name", checks.FUNCTIONS)
def test_no_more_than_a_few_calls(name):
    """A measure of time that does not depend on the machine: calls of the function."""
    calls = []

    def counted(x):
        calls.append(1)
        return checks.FUNCTIONS[name](x)

    assert checks.check_gradients(counted, torch.randn(checks.SHAPE, dtype=torch.float64))
    assert len(calls) <= 200
