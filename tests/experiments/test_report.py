import json
import math
import re
import shutil
import subprocess
import urllib.parse

import pytest
import sklearn.metrics
import torch

import nnce
from nnce.experiments import comparison_report, report
from nnce.experiments.estimates import Estimate
from nnce.training import Record


def test_a_table_has_numbers_to_the_right():
    rows = [{"name": "a", "value": 1.23456}, {"name": "long", "value": 12}]
    assert report.table(rows).splitlines() == [
        "| name |  value |",
        "|:-----|-------:|",
        "| a    | 1.2346 |",
        "| long |     12 |",
    ]


def test_a_runaway_number_does_not_push_the_table_off_the_screen():
    assert "1.23e+30" in report.table([{"loss": 1.23456e30}])


def test_json_has_no_numbers_that_json_has_not(tmp_path):
    path = tmp_path / "some.json"
    report.write_json(path, {"a": [math.nan, math.inf, (-math.inf, 1.5)], "b": {"c": None}})
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content == {"a": [None, "inf", ["-inf", 1.5]], "b": {"c": None}}


def test_results_say_where_they_come_from(tmp_path):
    path = report.write_results(
        tmp_path, config={"x": 1}, device=torch.device("cpu"), seconds=1.5, rows=[], extra=[2]
    )
    content = json.loads(path.read_text())
    assert content["config"] == {"x": 1} and content["extra"] == [2]
    assert content["versions"]["torch"] == torch.__version__
    assert content["git"] == report.checkout()["git"] or "git" not in content
    assert content["device"] == "cpu" and content["threads"] == torch.get_num_threads()


def test_the_version_is_that_of_the_source_with_its_commit(tmp_path, monkeypatch):
    """Not of the installed metadata, nor of a repository that a virtual environment lies in."""
    monkeypatch.setattr(nnce, "__version__", "9.9")
    assert report.versions()["nnce"] == "9.9"
    checkout = tmp_path / "checkout"
    checkout.mkdir()

    def git(*arguments):
        names = ("user.name=nnce", "user.email=nnce", "commit.gpgsign=false")
        options = [option for name in names for option in ("-c", name)]
        command = ["git", "-C", str(checkout), *options, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (checkout / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    git("tag", "-m", "a name", "v1")
    commit = git("rev-parse", "HEAD")[:12]
    for name in ("dirty", "without git"):
        shutil.copytree(checkout, tmp_path / name)
    (tmp_path / "dirty" / "file").write_text("2")

    def commit_of(root):
        monkeypatch.setattr(nnce, "__file__", str(root / "nnce" / "__init__.py"))
        return report.versions().get("commit"), report.checkout().get("git")

    assert commit_of(checkout) == (commit, {"commit": commit, "clean": True})
    assert commit_of(checkout / "site-packages") == (None, None)
    dirty = {"commit": commit, "clean": False}
    assert commit_of(tmp_path / "dirty") == (f"{commit}-dirty", dirty)
    monkeypatch.setenv("PATH", "")
    assert commit_of(tmp_path / "without git") == (None, None)


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.95, 0.01, 0.94, 0.96, 8), "95.00 ± 1.00 (94.00 to 96.00)"),
        (Estimate(0.95, 0.1, 0.8, 0.99, 8, True), "95.00 ± 10.00 (80.00 to 99.00)†"),
        (Estimate(0.95, math.nan, math.nan, math.nan, 1), "95.00"),
        (Estimate(math.nan, math.nan, math.nan, math.nan, 0), ""),
    ],
)
def test_percent(estimate, text):
    assert comparison_report.percent(estimate) == text


def test_lines_and_tables_have_the_same_units():
    record = Record(3, 30, 1.0, {"test": 0.25}, {"test": 0.97666}, [])
    assert report.epoch_line(record).endswith("loss: test 0.2500  accuracy: 97.67 %")
    row = {"network": "last", "epoch": 3, "data": "test", "loss": 0.25, "accuracy": 0.97666}
    assert "| last    |     3 | 0.2500, 97.67 % |" in report.closing_table([row])


def test_few_of_many_epochs_are_printed():
    shown = [epoch for epoch in range(1_001) if report.has_line(epoch)]
    assert shown == [*range(10), *range(10, 100, 10), *range(100, 1_000, 100), 1_000]


def test_figures_by_class_are_scikit_learns(generator):
    """Of class 6 there are no examples, class 7 is never named, and class 8 is neither."""
    true = torch.randint(6, (500,), generator=generator)
    true[:20] = 7
    named = torch.where(torch.rand(500, generator=generator) < 0.7, true, true.roll(1))
    named[named == 7] = 6
    counts = torch.zeros(9, 9, dtype=torch.long).index_put_(
        (true, named), torch.tensor(1), accumulate=True
    )
    found = report.by_class(counts)
    expected = sklearn.metrics.classification_report(
        true, named, output_dict=True, zero_division=0.0
    )
    del expected["accuracy"]
    rows = {str(row["class"]): row for row in [*found["classes"], *found["averages"]]}
    assert rows.pop("8") == dict(rows["6"], **{"class": 8})
    assert rows.keys() == expected.keys()
    for name, row in expected.items():
        assert {**rows[name], "class": 0} == pytest.approx({**row, "class": 0}), name
    assert (
        found["confusion"]
        == sklearn.metrics.confusion_matrix(true, named, labels=range(9)).tolist()
    )
    assert report.class_table(found).count("\n") == 2 + 2 + 9 + 2 - 1
    many = report.class_table(report.by_class(torch.eye(100, dtype=torch.long)))
    assert "macro avg" in many and many.count("\n") == 2 + 2 + 2 - 1


def test_the_end_names_folders_inside_the_run(tmp_path, capsys):
    """Wherever it is: the neighbors of a run are none of its curves."""
    report.print_results("It works.", "| 1 |", "Results", tmp_path / "x")
    out = capsys.readouterr().out
    assert out.startswith("\nIt works.\n\n| 1 |\n\nIt works.\nResults: ")
    (command,) = [line for line in out.splitlines() if "--logdir" in line]
    assert command.endswith(f"tensorboard --logdir {tmp_path / 'x'}")
    assert "http://localhost:6006/?smoothing=0&tagFilter=" in out and out.count("#timeseries") == 1
    report.print_results("It works.", "| 1 |", "Results", tmp_path / "x", curves={})
    assert "tensorboard" not in capsys.readouterr().out


def test_the_link_hides_helper_tags_and_no_curve():
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(report.TENSORBOARD).query)
    (pattern,) = query["tagFilter"]
    assert not re.match(pattern, "upper_and_lower/accuracy/test/upper")
    for tag in ("accuracy/test", "loss/train", "slowdown/layer2", "first_epochs/loss/test"):
        assert re.match(pattern, tag)


@pytest.mark.parametrize(
    ("epochs", "text"),
    [
        ([1, 2, 9], "2"),
        ([1, None, 3], "3 (2/3)"),
        ([None, None, 3], "never (1/3)"),
        ([None], "never"),
        ([], "never"),
    ],
)
def test_median(epochs, text):
    assert comparison_report.median(epochs) == text
