"""Published tables, row by row: what is told, what is chosen on what, and going on."""

import dataclasses
import json
from types import SimpleNamespace

import killed
import pytest
from toys import ROW, write_blank

from nnce import data, kernels, training
from nnce.experiments import published, reproduction
from nnce.experiments.published import TABLES, Row, Table
from nnce.training import Settings


@pytest.fixture
def reproduce(script):
    return script("reproduce")


@pytest.fixture
def toy(monkeypatch):
    """A table that digits are soon done with."""
    table = Table(
        title="A toy",
        source="no one",
        measure="error",
        seeds=3,
        rows=(
            dataclasses.replace(ROW, published=50.0),
            Row("T2", Settings(hidden=(8,), epochs=2), published=1.0, of="best test epoch"),
        ),
    )
    monkeypatch.setattr(published, "TABLES", {**TABLES, "toy": table})
    return table


# --------------------------------------------------------------------------------------- the data


def test_without_arguments_it_lists_everything(reproduce, capsys):
    assert reproduce.main([]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name, table in TABLES.items():
        assert f"{name}: {table.title}" in out
        _, headings, first, *_ = out.partition(f"{name}: ")[2].splitlines()
        assert headings.split() == ["row", "published,", "on", "network", "and", "training"]
        assert first[headings.index("network") :].startswith("784-")
        for row in table.rows:
            assert f"  {row.name} " in out and (
                row.published is None or f"{row.published:g}" in out
            )


# ------------------------------------------------------------------------------------ what is done


def test_a_run(reproduce, toy, tmp_path, capsys, drawn):
    options = ["toy", "--data", "digits", "--run-dir", str(tmp_path / "run")]
    assert reproduce.main(options) == 0
    out, err = capsys.readouterr()
    assert err == "" and "64-8-10" in out
    answer = "2 rows, 3 starts each, not compared: not the published protocol or data."
    assert answer in out.splitlines()[-5:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["config"]["table"] == "toy" and results["published"] == {"T1": 50.0, "T2": 1.0}
    dataset = data.load("digits")
    for row, outcome in zip(toy.rows, results["outcomes"].values(), strict=True):
        assert [one["seed"] for one in outcome["trained"]] == [0, 1, 2]
        for one in outcome["trained"]:
            # The same network, trained alone and looked at with everything in sight.
            settings = Settings(**{**vars(row.settings), "seed": one["seed"]})
            state = training.initial_state(settings, dataset)
            records = list(training.train(state, settings, dataset))
            best = max(records, key=lambda record: record.accuracy["validation"])
            assert one["chosen_epoch"] == best.epoch and not one["diverged"]
            assert one["chosen_validation"] == best.accuracy["validation"]
            assert one["chosen_test"] == best.accuracy["test"]
            assert one["last_validation"] == records[-1].accuracy["validation"]
            assert one["last_test"] == records[-1].accuracy["test"]
            highest = max(record.accuracy["test"] for record in records)
            assert one["best_test"] == (highest if row.name == "T2" else None)
        assert len(outcome["curve"]) == 3
    figures = [one["chosen_test"] for one in results["outcomes"]["T1"]["trained"]]
    errors = [100 * (1 - accuracy) for accuracy in figures]
    mean = sum(errors) / 3
    assert f"{mean:.2f} ± " in out and f"({min(errors):.2f}–{max(errors):.2f})" in out
    assert (tmp_path / "run" / "reproduced.png").read_bytes().startswith(b"\x89PNG")
    assert "T1" in (tmp_path / "run" / "results.md").read_text()
    curves = killed.curves(tmp_path / "run" / "T1")
    assert [step for step, _ in curves["scalar", "accuracy/validation"]] == [0, 1, 2]
    assert ("image", "distortion") in curves and ("scalar", "accuracy/test") not in curves
    assert ("image", "reproduced") in killed.curves(tmp_path / "run")


def test_the_answer_counts_what_is_within(reproduce, monkeypatch):
    verdicts = {"A": "within", "B": "ours is better", "C": "within", "D": "ours is worse", "E": ""}
    rows = [SimpleNamespace(name=name) for name in verdicts]
    work = SimpleNamespace(finished=rows, compares=True, seeds=range(3))
    monkeypatch.setattr(
        reproduce,
        "closing_row",
        lambda work, row: {"row": row.name, "verdict": verdicts[row.name]},
    )
    assert reproduce.answer(work) == (
        "2 of 4 published figures are within the range of our starts; ours is better in B; ours is "
        "worse in D."
    )


def test_a_network_that_diverges_is_counted_out(toy, digits, reproduce, monkeypatch, tmp_path):
    row = Row("T3", Settings(hidden=(8,), epochs=2, lr=1e38))
    table = Table("Wild", "no one", "error", 2, (row,))
    monkeypatch.setattr(published, "TABLES", {"wild": table})
    assert reproduce.main(["wild", "--data", "digits", "--run-dir", str(tmp_path / "run")]) == 0
    (line,) = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert line["n"] == "0 (2 diverged)" and line["test, last epoch"] == ""
    assert "together" not in (tmp_path / "run" / "results.md").read_text()


@pytest.mark.parametrize(
    ("measure", "figure", "expected"),
    [
        ("accuracy", 95.0, "within"),
        ("accuracy", 94.0, "within"),
        ("accuracy", 93.99, "ours is better"),
        ("accuracy", 96.01, "ours is worse"),
        ("error", 95.5, "within"),
        ("error", 93.99, "ours is worse"),
        ("error", 96.01, "ours is better"),
    ],
)
def test_the_verdict(measure, figure, expected, reproduce, toy):
    ours = reproduction.Spread(95.0, 1.0, 94.0, 96.0, 2)
    table, row = Table("", "", measure, 2, ()), Row("T", Settings(), figure)
    assert reproduce.verdict(table, row, ours) == expected
    assert reproduce.verdict(table, Row("T", Settings()), ours) == ""


def test_what_is_cut_short_or_of_other_data_is_not_compared(
    reproduce, toy, digits, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(data, "load", lambda *_, **__: digits)

    def told(*options):
        run_dir = tmp_path / str(len(list(tmp_path.iterdir())))
        assert reproduce.main(["toy", "T2", *options, "--run-dir", str(run_dir)]) == 0
        (line,) = json.loads((run_dir / "results.json").read_text())["rows"]
        cut = "Shortened" in (run_dir / "results.md").read_text()
        return line["published"], line["verdict"], cut

    # As if digits were MNIST.
    assert told("--data", "mnist") == ("1.00", "ours is worse", False)
    assert told("--data", "mnist", "--max-epochs", "2") == ("1.00", "ours is worse", False)
    assert told("--data", "mnist", "--max-epochs", "1") == ("", "", True)
    assert told("--data", "mnist", "--train-size", "1197") == ("", "", True)
    assert told("--data", "digits") == ("", "", False)


def test_a_run_that_was_killed_before_it_wrote_its_results_writes_them(
    reproduce, toy, tmp_path, monkeypatch
):
    run_dir, whole = tmp_path / "run", reproduce.write

    def killed_here(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "write", killed_here)
    with pytest.raises(KeyboardInterrupt):
        reproduce.main(["toy", "T2", "--data", "digits", "--run-dir", str(run_dir)])
    assert not (run_dir / "results.json").exists()
    monkeypatch.setattr(reproduce, "write", whole)
    assert reproduce.main(["--resume", str(run_dir)]) == 0
    assert len(json.loads((run_dir / "results.json").read_text())["rows"]) == 1
    assert (run_dir / "results.md").exists() and (run_dir / "reproduced.png").exists()


def test_an_engine_that_cannot_be_had_is_said_before_anything_is_trained(
    reproduce, toy, tmp_path, monkeypatch, refused
):
    by_loops = Row("T3", Settings(hidden=(8,), epochs=1, engine="loops"))
    more = dataclasses.replace(toy, rows=(*toy.rows, by_loops))
    monkeypatch.setattr(published, "TABLES", {"toy": more})
    monkeypatch.setattr(kernels, "numba_problem", lambda: "Numba is not installed")
    line = ["toy", "--data", "digits", "--run-dir", str(tmp_path / "run")]
    assert "expected a working Numba for engine 'loops', but Numba is not installed" in refused(
        reproduce.main, *line
    )
    assert not (tmp_path / "run").exists()


def test_a_table_of_other_seeds_is_another_protocol(reproduce, toy, tmp_path, monkeypatch, refused):
    run_dir = tmp_path / "run"
    assert reproduce.main(["toy", "T2", "--data", "digits", "--run-dir", str(run_dir)]) == 0
    more = Table(toy.title, toy.source, toy.measure, toy.seeds + 1, toy.rows)
    monkeypatch.setattr(published, "TABLES", {"toy": more})
    assert "a different protocol of row T2" in refused(reproduce.main, "--resume", str(run_dir))


@pytest.mark.parametrize(
    ("name", "folder"), [("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_other_sets_of_mnists_format_go_through_the_same_commands(
    name, folder, reproduce, tmp_path, monkeypatch
):
    """Blank images, in files as they would be."""
    write_blank(tmp_path / folder / "raw")
    options = ["--data", name, "--data-dir", str(tmp_path), "--train-size", "50", "--seeds", "1"]
    run_dir = tmp_path / "run"
    command = ["nielsen", "N1", *options, "--max-epochs", "1", "--run-dir", str(run_dir)]
    assert reproduce.main(command) == 0
    (line,) = json.loads((run_dir / "results.json").read_text())["rows"]
    assert line["published"] == "" and line["test, last epoch"] in ("0.00", "100.00")


# --------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("calls", [pytest.param(0, marks=pytest.mark.slow), 7])
def test_a_run_that_was_stopped_goes_on_to_the_same(calls, reproduce, toy, tmp_path, monkeypatch):
    alone, run_dir = tmp_path / "alone", tmp_path / "run"
    options = ["toy", "--data", "digits", "--checkpoint-every", "1"]
    assert reproduce.main([*options, "--run-dir", str(alone)]) == 0
    killed.stopped_after(monkeypatch, calls)
    with pytest.raises(KeyboardInterrupt):
        reproduce.main([*options, "--run-dir", str(run_dir)])
    assert reproduce.main(["--resume", str(run_dir)]) == 0
    expected, found = outcome(alone), outcome(run_dir)
    assert expected.keys() == found.keys()
    assert killed.differences(expected, found) == []


def outcome(run_dir):
    """All but times and places."""
    results = (run_dir / "results.json").read_text().replace(str(run_dir), "RUN_DIR")
    found = {"results": killed.without_times(json.loads(results))}
    for folder in ("T1", "T2"):
        found[folder] = killed.curves(run_dir / folder)
    return found


def test_a_run_with_another_protocol_cannot_be_gone_on_with(
    reproduce, toy, tmp_path, monkeypatch, refused
):
    run_dir = tmp_path / "run"
    assert reproduce.main(["toy", "T2", "--data", "digits", "--run-dir", str(run_dir)]) == 0
    other = Row("T2", Settings(hidden=(9,), epochs=2), published=1.0, of="best test epoch")
    changed = Table(toy.title, toy.source, toy.measure, toy.seeds, (other,))
    monkeypatch.setattr(published, "TABLES", {"toy": changed})
    assert "started with a different protocol of row T2" in refused(
        reproduce.main, "--resume", str(run_dir)
    )
    for options, sentence in (
        (["nielsen"], "table nielsen: the run in"),
        (["--seeds", "9"], "--seeds 9: the run in"),
        (["--seed", "9"], "--seed 9: the run in"),
    ):
        assert sentence in refused(reproduce.main, *options, "--resume", str(run_dir))


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("neilsen",), "expected a table out of nielsen"),
        (("neilsen",), "got 'neilsen'; did you mean nielsen?"),
        (("nielsen", "N9"), "expected a row of nielsen out of N1, N2"),
        (("nielsen", "N1", "N2", "N1"), "expected each row once, got N1 2 times"),
        (("nielsen", "N8x"), "did you mean N8"),
        (("nielsen", "--seeds", "0"), "expected 1 to 1,000 --seeds"),
        (("nielsen", "--seed", "-1", "--data", "digits"), "--seed: expected a seed from 0 to"),
        (
            ("nielsen", "--seed", str(2**32 - 1), "--data", "digits"),
            "expected all seeds below 2**32",
        ),
        (
            ("nielsen", "--max-epochs", "0", "--data", "digits"),
            "expected --max-epochs of at least 1",
        ),
        (("nielsen", "--data-dir", "nowhere"), "mnist is not in nowhere"),
        (("nielsen", "--data", "kmnist", "--data-dir", "nowhere"), "kmnist is not in nowhere"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    options, sentence, reproduce, refused, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NNCE_DATA", raising=False)
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))
    )
    assert sentence in refused(reproduce.main, *options)


def test_no_square_images_is_one_sentence(reproduce, toy, refused, monkeypatch, digits):
    flat = data.Dataset(*(data.Split(split.x[:, :50], split.y) for split in digits))
    monkeypatch.setattr(data, "load", lambda *_, **__: flat)
    sentence = "expected square images to distort, got examples of 50 features"
    assert sentence in refused(reproduce.main, "toy", "T1", "--data", "digits")
