import json

import pytest
from conftest import ROOT

from nnce.experiments import command_line

SCRIPTS = ROOT / "scripts"
NAMES = [path.stem for path in sorted(SCRIPTS.glob("*.py")) if path.stem != "startup"]


def results(run_dir):
    return json.loads((run_dir / "results.json").read_text())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [2**63, -(2**63), 10**400], ids=["2^63", "-2^63", "10^400"])
def test_absurd_numbers_are_one_line(name, number, script, refused, capsys):
    module = script(name)
    options = [
        action.option_strings[0] for action in module.parser()._actions if action.type is int
    ]
    assert options
    for option in options:
        assert "expected an integer within ±1,000,000,000,000,000, got" in refused(
            module.main, f"{option}={number}"
        )


def test_the_largest_number_that_is_taken_can_be_computed_with(script, tmp_path, capsys):
    options = ["--batch-size", str(10**15), "--epochs", "1"]
    for engine in ("backprop", "functions"):
        run_dir = tmp_path / engine
        assert script("train").main([*options, "--engine", engine, "--run-dir", str(run_dir)]) == 0
        assert results(run_dir)["config"]["batch_size"] == 10**15


def test_no_whole_number_is_said_as_before(script, refused):
    assert "invalid int value: '3.5'" in refused(script("train").main, "--epochs", "3.5")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("train", ["--epochs", "3"]),
        ("compare", ["--epochs", "3", "--seeds", "1", "--lrs", "1", "--train-size", "50"]),
    ],
)
def test_a_bar_counts_whole_epochs_and_ends_full(name, options, script, tmp_path, monkeypatch):
    counts = []

    class Bar:
        """tqdm's, which counts nothing where nobody watches."""

        def __init__(self, total, initial=0, **options):
            self.total, self.n = total, initial

        def __enter__(self):
            return self

        def __exit__(self, *error):
            counts.append((self.n, self.total))

        def reset(self, total):
            counts.append((self.n, self.total))
            self.n, self.total = 0, total

        def update(self, n):
            self.n += n

        def write(self, text):
            pass

        set_description = write

    module = script(name)
    monkeypatch.setattr(command_line, "progress", Bar)
    monkeypatch.setattr(module, "tqdm", Bar, raising=False)
    assert module.main([*options, "--run-dir", str(tmp_path)]) == 0
    # A comparison's second bar is of the two controls.
    assert counts == {"train": [(3, 3)], "compare": [(3, 3), (6, 6)]}[name]
