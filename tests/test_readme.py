"""What the README says in code runs."""

import re

import pytest
import torch
from conftest import ROOT
from zoo import ZOO

from nnce import composability, rules

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"### ([^\n]+)\n(?:(?!\n#).)*?```python\n(.*?)```", README, re.DOTALL)
TEN_LINES = re.search(r"ten lines:\n\n```python\n(.*?)```", README, re.DOTALL)[1]


def execute(code):
    namespace = {}
    exec(compile(code, "README.md", "exec"), namespace)
    return namespace


def test_every_example_is_run():
    assert len(EXAMPLES) + 1 == README.count("```python")


def test_ten_lines():
    code = TEN_LINES.strip().splitlines()
    found = execute(TEN_LINES)
    assert len([line for line in code if line]) == 10
    a = found["nnce"].sigmoid(found["network"](found["x"]))
    assert ((a > 0.5) == (found["y"] > 0.5)).all()


@pytest.mark.parametrize(("name", "code"), EXAMPLES)
def test_example(name, code, script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "runs/digits" in code:
        command = re.search(r"scripts/train.py (--run-dir runs/digits)", README)[1]
        script("train").main(command.split())
    execute(code)


def test_convolutional_example_trains_as_with_pytorchs_loss():
    code = dict(EXAMPLES)["In place of `BCEWithLogitsLoss`"]
    ours = 'nnce.SigmoidCrossEntropyLoss(reduction="mean")'
    assert ours in code
    gradients = []
    for variant in (code, code.replace(ours, "nn.BCEWithLogitsLoss()")):
        torch.manual_seed(0)
        network = execute(variant)["network"]
        gradients.append([p.detach() for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_two_commands_name_what_exists():
    first, second = re.findall(r"```sh\n(python3 -m venv .*)\n```", README)
    assert first.endswith("&& .venv/bin/python scripts/compare.py")
    assert second.endswith("&& .venv/bin/python -m pytest")


def test_every_rule_named_in_the_table_exists():
    table = README[README.index("## The equations") : README.index("## In Python")]
    names = [
        name
        for row in re.findall(r"^\| \d .*\|([^|]*)\|$", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    ]
    assert len(names) == 10 and all(hasattr(rules, name) for name in names)


def test_the_matrix_is_the_one_that_is_tested():
    rows = re.findall(
        r"^\| ([^|]+) \|((?: (?:works|no .|not tried ³) \|){4})$", README, re.MULTILINE
    )
    assert [name for name, _ in rows] == list(composability.COLUMNS)
    # What the newest PyTorch cannot do; older ones can do some of it.
    not_possible = {"compile, double backward", "compile(vmap(grad))", "compile(hessian)"}
    assert set(composability.INSIDE_PYTORCH) <= not_possible
    for name, cells in rows:
        assert ("works" in cells) == (name not in not_possible and "CUDA" not in name)


def test_the_zoo_has_so_many():
    (count,) = re.findall(r"Over a zoo of (\d+) functions", README)
    assert int(count) == len(ZOO)
