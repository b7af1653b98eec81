"""Sweeps: what is planned, trained next to each other, chosen and shown."""

import csv
import json
import math

import killed
import pytest
import torch

import nnce
from nnce import training
from nnce.experiments import figures, sweep
from nnce.losses import LOSSES
from nnce.training import Settings
from nnce.training.parallel import ALONE

OPTIONS = ["--train-size", "200", "--epochs", "3", "--seeds", "2"]
SWEEP = ["--sweep", "lr=0.3,1", "init=scaled,large", "hidden=12,8-6"]


@pytest.fixture(scope="module")
def compare():
    return killed.loaded("compare")


@pytest.fixture(scope="module")
def finished(compare, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("sweep") / "run"
    assert compare.main([*OPTIONS, *SWEEP, "--run-dir", str(run_dir)]) == 0
    return run_dir, json.loads((run_dir / "results.json").read_text())


def test_each_combination_is_what_train_would_come_to(finished, digits):
    """Whatever it is trained next to; the mean over the seeds, the best first."""
    _, results = finished
    short = digits._replace(train=type(digits.train)(*(part[:200] for part in digits.train)))
    rows = results["rows"]
    assert len(rows) == 8 and len({tuple(row[n] for n in ("lr", "init", "hidden")) for row in rows})
    means = [row["validation accuracy, mean"] for row in rows]
    assert means == sorted(means, reverse=True) and means[0] > means[-1]
    for row in (rows[0], rows[5]):
        found = []
        for seed in (0, 1):
            settings = Settings(
                tuple(map(int, row["hidden"].split("-"))),
                lr=float(row["lr"]),
                init=row["init"],
                seed=seed,
                epochs=3,
            )
            state = training.initial_state(settings, short)
            *_, last = training.train(state, settings, short)
            found.append(last.accuracy)
        validation = sum(accuracy["validation"] for accuracy in found) / 2
        assert row["validation accuracy, mean"] == pytest.approx(validation)
        if row is rows[0]:
            test = sum(accuracy["test"] for accuracy in found) / 2
            assert results["test"]["mean"] == pytest.approx(test)
            assert results["chosen"] == {name: row[name] for name in ("lr", "init", "hidden")}


def test_nothing_but_the_chosen_one_is_measured_on_the_test_data(finished, digits):
    run_dir, results = finished
    with (run_dir / "epochs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * 2 * 4
    assert "accuracy/validation" in rows[0] and "accuracy/test" not in rows[0]
    assert all("test accuracy" not in row for row in results["rows"])
    chosen = nnce.load(run_dir / "network.pt")
    assert "-".join(map(str, chosen.sizes[1:-1])) == results["chosen"]["hidden"]


def test_the_screen(compare, tmp_path, capsys, drawn):
    run_dir = tmp_path / "run"
    options = ["--seeds", "1", "--epochs", "1", "--train-size", "50", "--run-dir", str(run_dir)]
    assert compare.main([*options, "--sweep", "lr=0.1,0.3,1", "l2=0,1,5", "init=scaled,0.5,2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    answer = json.loads((run_dir / "results.json").read_text())["answer"].splitlines()
    assert answer[0].startswith("Best of 27 on validation: lr=") and "test accuracy" in answer[1]
    assert lines[3:5] == answer and answer[1] in lines[-4:]
    assert len(lines) <= 60 and max(map(len, lines)) <= 120
    assert "7 more rows in results.md" in lines
    page = (run_dir / "results.md").read_text()
    assert page.count("\n| ") == 1 + 27 and "Made by `scripts/compare.py" in page
    assert (run_dir / "heat-map.png").read_bytes().startswith(b"\x89PNG")


def test_diverged_combinations_are_last_and_never_chosen(compare, tmp_path):
    options = ["--sweep", "lr=1e38,0.5", "--seeds", "2", "--epochs", "2"]
    assert compare.main([*options, "--run-dir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["lr"] for row in results["rows"]] == ["0.5", "1e38"]
    assert [row["diverged"] for row in results["rows"]] == [0, 2]
    assert "diverged: 2 of 2" in (tmp_path / "results.md").read_text()
    assert results["chosen"] == {"lr": "0.5"} and not (tmp_path / "heat-map.png").exists()


def test_where_all_diverge_nothing_is_chosen(compare, tmp_path, capsys):
    options = ["--sweep", "lr=1e38", "l2=0,1", "--seeds", "1", "--epochs", "2"]
    assert compare.main([*options, "--run-dir", str(tmp_path)]) == 0
    assert "No combination chosen: all 2 diverged." in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["chosen"] is None and results["test"] is None
    assert not (tmp_path / "network.pt").exists()


@pytest.mark.parametrize("writes", [25, pytest.param(12, marks=pytest.mark.slow)])
def test_a_sweep_that_was_killed_goes_on_to_the_same(writes, compare, finished, tmp_path):
    """In the second group and in the first."""
    alone, _ = finished
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = [*OPTIONS, *SWEEP, "--run-dir", str(run_dir)]
    child = killed.run("compare", arguments, log, dies_at=writes)
    assert killed.status_of(child) == -9, log.read_text()
    assert compare.main(["--resume", str(run_dir)]) == 0
    outcomes = [killed.outcome(folder) for folder in (alone, run_dir)]
    assert killed.differences(*outcomes) == []


def test_groups_are_as_few_as_shapes_allow(compare, digits):
    given = ["lr=1,2", "l2=0,3", "momentum=0,0.5", "init=scaled,2", "loss=quadratic,cross-entropy"]
    for more, groups in (([], 1), (["hidden=3,4-2"], 2), (["hidden=3,4", "batch-size=5,7"], 4)):
        options = compare.parser().parse_args(["--seeds", "1", "--sweep", *given, *more])
        planned = sweep.Sweep(options, digits, ALONE)
        assert len(planned.groups) == groups
        assert planned.networks == len(planned.combinations) == 2 ** (5 + len(more))
        settings = {run.settings for group in planned.groups for run in group.runs}
        assert len(settings) == planned.networks
        assert {s.loss for s in settings} == set(LOSSES) and {s.l2 for s in settings} == {0, 3}


def test_a_heat_map_has_each_value_in_order_and_the_others_as_chosen(drawn):
    def combination(lr, l2, init, share):
        state = training.Record(1, 1, 0.0, {"validation": 1.0}, {"validation": share}, [])
        run = sweep.Run(Settings(), None, [state], stopped=math.isnan(share))
        return sweep.Combination({"lr": lr, "init": init, "l2": l2}, [run])

    all_of_it = [
        combination(lr, l2, init, share + (0.01 if init == "scaled" else 0))
        for init in ("scaled", "large")
        for (lr, l2), share in {
            ("10", "0"): 0.9, ("2", "0"): 0.5, ("10", "5"): 0.7, ("2", "5"): math.nan,
        }.items()
    ]  # fmt: skip
    ranked = sorted(all_of_it, key=lambda one: (one.diverged, -one.validation.mean))
    names, values, accuracies, others = sweep.heat_map(sweep.Conclusion(ranked, None))
    assert others == "l2=0"
    assert names == ["lr", "init"] and values == [["2", "10"], ["large", "scaled"]]
    expected = torch.tensor([[0.5, 0.51], [0.9, 0.91]])
    torch.testing.assert_close(torch.tensor(accuracies), expected)
    values = [["2", "10"], ["0", "5"]]
    of = figures.HeatMap(["lr", "l2"], values, [[0.5, math.nan], [0.9, 1]], "init=large")
    figure = figures.heat_map(of)
    assert figure.axes[0].get_title() == "validation accuracy, %\ninit=large"
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["50.00", "90.00", "100.00"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["2", "10"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["depth=1,2"],
            "expected --sweep over options out of batch-size, cosine-epochs, elastic, ",
        ),
        (["epochs=1,2"], "got 'epochs'"),
        (["lr=fast"], "argument --lr: invalid float value: 'fast'"),
        (["lr=0,1"], "error: --sweep lr=0: expected a positive learning rate, got 0.0"),
        (["l2=1,-1"], "error: --sweep l2=-1: expected l2 of at least 0, got -1.0"),
        (["loss=hinge"], "argument --loss: invalid choice: 'hinge'"),
        (["hidden=3-x"], "argument --hidden: invalid int value: 'x'"),
        (["hidden=0"], "error: --sweep hidden=0: expected positive hidden sizes, got (0,)"),
        (["init=tiny"], "or a positive standard deviation, got 'tiny'"),
        (["lr"], "expected each option in --sweep once, as NAME=V,V, got 'lr'"),
        (["lr=1,"], "expected each option in --sweep once, as NAME=V,V, got 'lr=1,'"),
        (["lr=1", "lr=2"], "expected each option in --sweep once, as NAME=V,V, got 'lr=2'"),
        (["lr=1,3,1.0"], "expected each value of --sweep lr once, got 1.0 again"),
        (["hidden=30-5,30-5"], "expected each value of --sweep hidden once, got 30-5 again"),
        (["hidden=10,1000000000000"], "would need"),
        (["lr=1", "--lrs", "3"], "expected --sweep or --lrs, got both"),
        (["lr=1", "--epochs", "0"], "error: expected --epochs of at least 1"),
        (["lr=1", "--seeds", "0"], "expected 1 to 1,000 --seeds, got 0"),
    ],
)
def test_a_wrong_sweep_is_one_line(options, message, compare, refused):
    assert message in refused(compare.main, "--sweep", *options)
