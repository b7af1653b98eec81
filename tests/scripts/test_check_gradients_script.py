import json
import re

import pytest
import torch
import toys

from nnce import rules
from nnce.checks import composability
from nnce.experiments.proof import precision, table


@pytest.fixture
def check(script):
    return script("check_gradients")


def test_a_run(check, tmp_path, capsys, drawn):
    assert check.main(["--no-matrix", "--hidden", "12", "8", "--run-dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"\| cross-entropy, dC/dz +\| nnce ", out)
    assert (
        "float32: BCELoss of σ(z): cross-entropy, dC/dz is off by more than 1 % from z = 16" in out
    )
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert {row["dtype"] for row in results["rows"]} == {
        str(dtype).removeprefix("torch.") for dtype in precision.DTYPES
    }
    assert [row["parameter"] for row in results["network"]] == 2 * [
        f"{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")
    ]
    assert results["broken"] == []
    ours = sum(row["by"] in precision.OURS for row in results["rows"])
    count = ours + len(results["network"]) + 4 * len(results["derivatives"])
    assert results["answer"] == f"All {count} promises kept."
    lines = out.splitlines()
    assert lines[1] == lines[-2] == results["answer"]
    derivatives = {row["derivatives of"]: row for row in results["derivatives"]}
    assert set(derivatives) == {*table.rows(), *table.walked_rows()}
    for name, row in derivatives.items():
        refused = "unsupported" if name in table.walked_rows() else "right"
        assert row["value"] == row["first"] == "right"
        assert row["forward mode"] == row["second"] == refused
    assert (tmp_path / "saturation-atlas.png").read_bytes().startswith(b"\x89PNG")
    # Nothing for TensorBoard is written, so no command to start it is printed.
    assert "--logdir" not in out and "localhost" not in out
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "saturation-atlas.png"}


@pytest.mark.slow
def test_on_mnist_in_float64(check, mnist, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(precision, "measure", toys.measured)
    options = ["--data", "mnist", "--hidden", "100", "30", "--dtype", "float64"]
    assert check.main([*options, "--no-matrix", "--run-dir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["network"][0]["shape"] == [100, 784]
    for row in results["network"]:
        assert row["relative"] < 1e-12


@pytest.mark.slow
def test_a_wrong_rule_and_a_wrong_gradient_break_the_promise(check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        rules,
        "dz_cross_entropy",
        lambda z, y, sigmoid=torch.sigmoid, pos_weight=None: sigmoid(z) - y,
    )
    monkeypatch.setattr(precision, "DTYPES", [torch.float64])
    row = table.rows()["sigmoid"]._replace(reference=torch.tanh)
    monkeypatch.setattr(table, "rows", lambda: {"sigmoid": row})
    assert check.main(["--no-matrix", "--run-dir", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    first, last = [line for line in out.splitlines() if " promises broken: " in line]
    assert first == last and "derivatives of sigmoid: first wrong" in last
    assert "nnce, rules: cross-entropy, dC/dz in float64 on cpu" in err
    assert "derivatives of sigmoid: first wrong" in err


@pytest.mark.slow
def test_the_matrix(check, tmp_path, capsys, monkeypatch):
    kept = {name: composability.COLUMNS[name] for name in ("func.grad", "compile, double backward")}
    for module in (composability, check):
        monkeypatch.setattr(module, "COLUMNS", kept)
    monkeypatch.setattr(precision, "measure", toys.measured)
    assert check.main(["--run-dir", str(tmp_path)]) == 0
    grad, double = json.loads((tmp_path / "results.json").read_text())["matrix"]
    assert grad["linear"] == grad["sigmoid_cross_entropy"] == "works"
    assert double["sigmoid"] == "aot_autograd has no double backward"


def test_bad_input_is_one_line(check, tmp_path, refused):
    (tmp_path / "used").write_text("")
    for options, message in (
        (["--hidden", "0"], "expected positive --hidden sizes, got (0,)"),
        (["--run-dir", str(tmp_path)], "already used"),
    ):
        assert message in refused(check.main, *options)
