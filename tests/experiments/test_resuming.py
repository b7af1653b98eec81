"""Runs that were stopped, killed or damaged, and what --resume makes of them."""

import contextlib
import copy
import gc
import itertools
import operator
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import killed
import programs
import pytest
import torch
import undrawn
from conftest import ROOT, slow_unless

import nnce
from nnce import training
from nnce.data import Distortion
from nnce.engines import ensemble, products
from nnce.experiments import directories, report, resuming, timing
from nnce.training import Settings, checkpoints, parallel
from nnce.training.schedules import Schedule

VERSION = nnce.__version__
TRAIN = ["--epochs", "3", "--train-size", "300", "--momentum", "0.5", "--l2", "1"]
# Of 30 epochs the first 12: epoch 10 is the best, and epoch 12 no better.
PATIENCE = ["--patience", "2", "--train-size", "300", "--checkpoint-every", "3"]
COMPARE = ["--epochs", "2", "--seeds", "2", "--lrs", "1", "--train-size", "300"]


@pytest.fixture
def train(script):
    return script("train")


@pytest.fixture
def compare(script):
    return script("compare")


@pytest.fixture(autouse=True)
def several_stops_in_an_epoch(monkeypatch):
    """As in tests/killed.py."""
    monkeypatch.setattr(ensemble, "CHUNK_WORK", 200_000)
    monkeypatch.setattr(products, "BLOCK_BYTES", 30_000)


def same_as_alone(alone, run_dir):
    assert killed.differences(killed.outcome(alone), killed.outcome(run_dir)) == []


# --------------------------------------------------------------------------------- bit for bit


CHANGING = {
    "schedule": Schedule("step", step_size=1, gamma=0.3),
    "distortion": Distortion(rotation=10, alpha=5, sigma=1.5),
}
DROPOUT = {"dropout": 0.5, "input_dropout": 0.2}
SGD = {"optimizer": "sgd", "momentum": 0.9}
ADAM = {"optimizer": "adam", "momentum": 0.0}
# Engines without a graph have neither Adam nor dropout, and dropout is the same under Adam.
VARIANTS = {
    f"{engine}, {name}": {"engine": engine, **options}
    for engine in training.ENGINES
    for name, options in {
        "sgd": SGD,
        "sgd, schedule and distortion": SGD | CHANGING,
        "sgd, dropout": SGD | DROPOUT,
        "adam": ADAM,
        "adam, schedule and distortion": ADAM | CHANGING,
    }.items()
    if engine not in training.ENSEMBLE_ENGINES or not ("dropout" in name or "adam" in name)
}


@pytest.mark.parametrize(
    ("variant", "stop"),
    slow_unless(
        lambda variant, stop: stop in (0, 5) or variant == "functions, sgd",
        itertools.product(VARIANTS, (0, 1, 2, 5, 7)),
    ),
)
def test_a_state_goes_on_to_the_same_bits(variant, stop, digits, tmp_path):
    """Between any two steps, through a file: before the first one, within and between epochs."""
    settings = Settings(
        hidden=(9, 8),
        epochs=2,
        batch_size=70,
        l2=1.0,
        lr=0.01,
        **VARIANTS[variant],
    )
    short = digits._replace(train=type(digits.train)(*(part[:200] for part in digits.train)))

    def go(state, calls=None):
        count = iter(range(10**6 if calls is None else calls))

        def between():
            if next(count, None) is None:
                raise KeyboardInterrupt

        records = []
        with contextlib.suppress(KeyboardInterrupt):
            for record in training.train(state, settings, short, between=between):
                records.append(record)
        return records

    alone = training.initial_state(settings, short)
    whole = go(alone)
    first = training.initial_state(settings, short)
    records = go(first, stop)
    checkpoints.write_checkpoint(
        tmp_path, {"state": first.state_dict(), "records": training.pack(records)}
    )
    content = checkpoints.latest_checkpoint(tmp_path).content
    second = training.initial_state(settings, short)
    second.load_state_dict(content["state"])
    # Saved again before anything has happened, it is the same still.
    assert killed.differences(plain(second.state_dict()), plain(content["state"])) == []
    records = training.unpack(content["records"])
    for state in (first, second):  # what was stopped can go on, too
        rest = go(state)
        assert [r._replace(seconds=0) for r in [*records, *rest]] == [
            r._replace(seconds=0) for r in whole
        ]
        assert state.best[:2] == alone.best[:2]
        for network in ("network", "best.network"):
            expected, found = (
                operator.attrgetter(network)(of).parameters() for of in (alone, state)
            )
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)
        assert state.cursor.step == alone.cursor.step == 2 * 3


def plain(value):
    """Tensors as lists; times are left out, since no test can compare them."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key != "seconds"}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """An uninterrupted run of each script, not to be changed."""
    folder = tmp_path_factory.mktemp("alone")
    for name, options in (("train", TRAIN), ("compare", COMPARE)):
        assert killed.loaded(name).main([*options, "--run-dir", str(folder / name)]) == 0
    return {name: folder / name for name in ("train", "compare")}


@pytest.mark.parametrize(("calls",), slow_unless(lambda calls: calls == 8, [(0,), (3,), (8,)]))
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(
    calls, train, alone, tmp_path, monkeypatch
):
    run_dir = tmp_path / "run"
    killed.stopped_after(monkeypatch, calls)
    with pytest.raises(KeyboardInterrupt):
        train.main([*TRAIN, "--run-dir", str(run_dir)])
    assert train.main(["--resume", str(run_dir)]) == 0
    same_as_alone(alone["train"], run_dir)


@pytest.mark.parametrize(
    ("name", "options", "figure"),
    [("train", TRAIN, "training_curves"), ("compare", COMPARE, "learning_curves")],
)
def test_the_figure_of_a_run_that_was_stopped_is_as_if_it_had_not(
    name, options, figure, script, tmp_path, monkeypatch
):
    """It is empty in the other tests."""
    alone, run_dir = tmp_path / "alone", tmp_path / "run"
    with undrawn.drawn(figure):
        assert script(name).main([*options, "--run-dir", str(alone)]) == 0
        killed.stopped_after(monkeypatch, 8)
        with pytest.raises(KeyboardInterrupt):
            script(name).main([*options, "--run-dir", str(run_dir)])
        assert script(name).main(["--resume", str(run_dir)]) == 0
    assert (alone / "learning-curves.png").stat().st_size > 20_000
    same_as_alone(alone, run_dir)


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory):
    """An uninterrupted run that --patience ends, not to be changed."""
    run_dir = tmp_path_factory.mktemp("patience") / "run"
    assert killed.loaded("train").main([*PATIENCE, "--run-dir", str(run_dir)]) == 0
    return run_dir


@pytest.mark.parametrize("writes", [80, pytest.param(37, marks=pytest.mark.slow)])
def test_killed_with_patience_it_keeps_the_same_best_network(writes, stopped_early, tmp_path):
    """Killed in the so-manieth write, of best.pt or another file."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    child = killed.run("train", [*PATIENCE, "--run-dir", str(run_dir)], log, dies_at=writes)
    assert killed.status_of(child) == -signal.SIGKILL, log.read_text()
    assert killed.loaded("train").main(["--resume", str(run_dir)]) == 0
    same_as_alone(stopped_early, run_dir)


@pytest.mark.parametrize(("calls",), slow_unless(lambda calls: calls == 9, [(0,), (9,), (14,)]))
def test_a_comparison_that_was_stopped_goes_on_as_if_it_had_not(
    calls, compare, alone, tmp_path, monkeypatch
):
    """Before it began, side by side, and in the midst of its control."""
    run_dir = tmp_path / "run"
    killed.stopped_after(monkeypatch, calls)
    with pytest.raises(KeyboardInterrupt):
        compare.main([*COMPARE, "--run-dir", str(run_dir)])
    assert compare.main(["--resume", str(run_dir)]) == 0
    same_as_alone(alone["compare"], run_dir)


@pytest.mark.slow
def test_a_clock_that_was_set_back_does_not_disorder_the_curves(
    train, alone, tmp_path, monkeypatch
):
    run_dir = tmp_path / "run"
    for number, calls in enumerate((3, 3)):
        killed.stopped_after(monkeypatch, calls)
        with pytest.raises(KeyboardInterrupt):
            train.main(
                ["--resume", str(run_dir)] if number else [*TRAIN, "--run-dir", str(run_dir)]
            )
        # TensorBoard reads a run's files in the order of the seconds in their names.
        for events in run_dir.glob("events.out.tfevents.*"):
            _, _, _, second, *rest = events.name.split(".")
            later = ".".join(("events.out.tfevents", f"{int(second) + 86_400:010d}", *rest))
            events.rename(events.with_name(later))
    assert train.main(["--resume", str(run_dir)]) == 0
    same_as_alone(alone["train"], run_dir)


def outcome_without_command(run_dir):
    """All but the command, which is the one that the run was begun with."""
    found = killed.outcome(run_dir)
    found["results"].pop("command", None)
    return found


def test_more_epochs_may_be_asked_for(begun, train, tmp_path):
    """Asking again for a finished run changes nothing."""
    alone, run_dir = tmp_path / "alone", begun / "train"
    assert train.main([*TRAIN, "--epochs", "5", "--run-dir", str(alone)]) == 0
    expected = outcome_without_command(alone)
    for _ in range(2):
        assert train.main(["--resume", str(run_dir), "--epochs", "5"]) == 0
        assert killed.differences(expected, outcome_without_command(run_dir)) == []


@pytest.mark.slow
def test_a_comparison_of_more_epochs_chooses_its_controls_anew(begun, compare, tmp_path):
    """Curves of the old controls are deleted."""
    alone, run_dir = tmp_path / "alone", begun / "compare"
    assert compare.main([*COMPARE, "--epochs", "5", "--run-dir", str(alone)]) == 0
    (run_dir / "all-rates" / "quadratic-lr99-autograd").mkdir()
    assert compare.main(["--resume", str(run_dir), "--epochs", "5"]) == 0
    assert not (run_dir / "all-rates" / "quadratic-lr99-autograd").exists()
    expected, found = outcome_without_command(alone), outcome_without_command(run_dir)
    assert killed.differences(expected, found) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "compare"])
def test_killed_over_and_over_it_comes_to_the_same(name, tmp_path):
    kills, options = (2, TRAIN) if name == "train" else (1, COMPARE)
    kill(name, kills, 0, tmp_path, "empty", *options)


KILLED = {
    **{
        f"train, {engine}": ["--engine", engine, "--epochs", "8", "--momentum", "0.5", "--l2", "1"]
        for engine in ("loops", "products", "functions", "autograd")
    },
    "train, adam": ["--optimizer", "adam", "--epochs", "8"],
    "train, an epoch at a time": ["--epochs", "40"],
    "train, patience": ["--patience", "6"],
    "compare, loops": ["--epochs", "6", "--seeds", "2", "--lrs", "1", "3", "--momentum", "0.2"],
    "compare, sweep": ["--sweep", "lr=0.3,1", "hidden=12,8-6", "--epochs", "9", "--seeds", "2"],
    "compare, products": [
        *("--epochs", "6", "--seeds", "2", "--lrs", "1", "3"),
        *("--hidden", "3000", "--train-size", "300"),
    ],
    "labels": ["--labels", "300", "--examples", "2000", "--batch-size", "16", "--epochs", "4"],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", KILLED)
def test_killed_50_times_it_comes_to_the_same(what, tmp_path, record_property):
    options = KILLED[what]
    if "an epoch" not in what:
        options = [*options, "--checkpoint-every", "0.05s"]
    record_property("trials", kill(what.split(",")[0], 50, 1, tmp_path, "drawn", *options))


def kill(name, kills, seed, folder, figures, *options):
    """Kill runs this many times (tests/killed.py); return its last line."""
    command = [sys.executable, str(ROOT / "tests" / "killed.py"), name, str(folder / "killed")]
    done = subprocess.run(
        [*command, str(kills), str(seed), figures, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.match(rf"{kills} kills, \d+ of them in writes", done.stdout), done.stdout
    return done.stdout


# ------------------------------------------------------------------------- what is asked for again


@pytest.fixture
def begun(alone, tmp_path):
    """Finished runs that may be changed."""
    for name, run_dir in alone.items():
        shutil.copytree(run_dir, tmp_path / "begun" / name)
    return tmp_path / "begun"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("train", ["--lr", "0.3"], "--lr 0.3: the run in {} was started with 0.5"),
        ("train", ["--hidden", "5", "4"], "--hidden 5 4: the run in {} was started with 30"),
        ("train", ["--seed", "1"], "--seed 1: the run in {} was started with 0"),
        ("train", ["--engine", "autograd"], "--engine autograd: the run in {} was started with"),
        ("train", ["--data", "mnist"], "--data mnist: the run in {} was started with digits"),
        ("train", ["--train-size", "9"], "--train-size 9: the run in {} was started with 300"),
        ("train", ["--run-dir", "elsewhere"], "--run-dir elsewhere: the run in {}"),
        ("train", ["--dry-run"], "--dry-run True: the run in {} was started with False"),
        ("train", ["--epochs", "2"], "--epochs 2: may only increase on resuming; the run has 3"),
        ("train", ["--epochs", "0"], "--epochs 0: may only increase on resuming"),
        (
            "train",
            ["--patience", "2"],
            "--patience 2: may only increase on resuming; the run",
        ),
        ("compare", ["--seeds", "3"], "--seeds 3: the run in {} was started with 2"),
        ("compare", ["--lrs", "1", "3"], "--lrs 1 3: the run in {} was started with 1"),
        (
            "compare",
            ["--control-seeds", "0"],
            "--control-seeds 0: the run in {} was started with 1",
        ),
    ],
)
def test_what_contradicts_the_run_is_refused_by_name(
    name, options, message, begun, script, refused
):
    run_dir = begun / name
    line = refused(script(name).main, "--resume", str(run_dir), *options)
    assert message.format(run_dir) in line


def test_what_the_run_was_begun_with_may_be_said_again(begun, train):
    options = ["--momentum", "0.5", "--lr", "0.5", "--engine", "backprop", "--hidden", "30"]
    others = ["--threads", "1", "--checkpoint-every", "9", "--data-dir", "anywhere"]
    assert train.main(["--resume", str(begun / "train"), *options, *others]) == 0


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "there is no such folder"),
        ("train/results.json", "there is no such folder"),
        ("", "the folder has no checkpoint of train.py"),
        ("compare", "expected a run of train.py, got one of compare.py"),
    ],
)
def test_where_there_is_nothing_to_resume(place, message, begun, train, refused):
    assert message in refused(train.main, "--resume", str(begun / place))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(begun, train, alone, capsys):
    before, newest = sorted((begun / "train").glob("checkpoint-*"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert train.main(["--resume", str(begun / "train")]) == 0
    err = capsys.readouterr().err
    assert (
        f"{newest} is damaged: its checksum is wrong; continuing from the previous one, {before}"
        in err
    )
    same_as_alone(alone["train"], begun / "train")


def test_where_all_are_damaged_it_is_one_line(begun, train, refused):
    for path in (begun / "train").glob("checkpoint-*"):
        path.write_bytes(path.read_bytes()[:-1])
    line = refused(train.main, "--resume", str(begun / "train"))
    assert line.count("is cut off") == 2


def test_a_run_that_was_killed_before_its_first_epoch_starts_anew(
    train, alone, tmp_path, monkeypatch
):
    """Its first checkpoint has no more than its configuration and the start."""
    run_dir = tmp_path / "run"

    def goes(*arguments, **more):
        os._exit(9)

    with monkeypatch.context() as change:
        change.setattr(training.loop, "records", goes)
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                train.main([*TRAIN, "--run-dir", str(run_dir)])
            os._exit(1)
        assert killed.status_of(child) == 9
    content = checkpoints.latest_checkpoint(run_dir).content
    assert content["state"]["cursor"]["step"] == 0 and training.unpack(content["records"]) == []
    assert train.main(["--resume", str(run_dir)]) == 0
    same_as_alone(alone["train"], run_dir)


def test_other_circumstances_are_said(begun, train, capsys, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert train.main(["--resume", str(begun / "train")]) == 0
    err = capsys.readouterr().err
    assert err.startswith("Resumed with torch 2.99 (was 2.") and "rounding may differ" in err
    assert train.main(["--resume", str(begun / "train")]) == 0  # said again only if it is another
    assert "Resumed with" in capsys.readouterr().err


def test_another_commit_or_version_is_said(begun, train, capsys, monkeypatch):
    """Those of the running code, not of what was once installed."""
    whole = report.versions

    def of_commit(commit):
        monkeypatch.setattr(report, "versions", lambda: {**whole(), "commit": commit})

    monkeypatch.setattr(nnce, "__version__", "9.9")
    of_commit("0123456789ab")
    assert train.main(["--resume", str(begun / "train"), "--epochs", "4"]) == 0
    assert f"nnce 9.9 (was {VERSION})" in capsys.readouterr().err
    recorded = checkpoints.latest_checkpoint(begun / "train").content["circumstances"]
    assert recorded["nnce"] == "9.9" and recorded["commit"] == "0123456789ab"
    of_commit("ba9876543210")
    assert train.main(["--resume", str(begun / "train")]) == 0
    assert "commit ba9876543210 (was 0123456789ab)" in capsys.readouterr().err


def test_killed_before_its_first_checkpoint_it_says_what_to_do(train, refused, tmp_path):
    run_dir = tmp_path / "run"
    with directories.run_directory(run_dir, ""):
        shutil.copytree(run_dir, tmp_path / "killed")
    line = refused(train.main, "--resume", str(tmp_path / "killed"))
    assert "killed before its first checkpoint: start it again without --resume" in line


@pytest.mark.parametrize("name", ["train", pytest.param("compare", marks=pytest.mark.slow)])
def test_deleted_curves_are_written_again(name, alone, script, tmp_path):
    """From the records in the checkpoint; histograms are not in there."""
    run_dir = tmp_path / "run"
    shutil.copytree(alone[name], run_dir)
    for events in run_dir.rglob("events.out.tfevents.*"):
        events.unlink()
    assert script(name).main(["--resume", str(run_dir)]) == 0
    expected, found = outcome_without_command(alone[name]), outcome_without_command(run_dir)
    for outcome in (expected, found):
        for place in [place for place in outcome if place[0] == "curves"]:
            curves = outcome[place]
            outcome[place] = {key: of for key, of in curves.items() if key[0] != "histogram"}
    logged = {"train": Path(), "compare": Path("all-rates/quadratic-lr1")}[name]
    assert ("scalar", "loss/validation") in found["curves", logged]
    assert killed.differences(expected, found) == []


@pytest.mark.slow
def test_a_directory_that_is_deleted_during_the_run_is_not_called_kept(tmp_path):
    run_dir = tmp_path / "run"
    change = f"""
import shutil
from nnce.training import loop
whole = loop.records
def deleted(*arguments, epoch, **more):
    if epoch == 2:
        shutil.rmtree({str(run_dir)!r})
    return whole(*arguments, epoch=epoch, **more)
loop.records = deleted
"""
    done = programs.run("train", *TRAIN, "--run-dir", str(run_dir), before=change)
    expected = f"train.py: error: the run directory {run_dir} was deleted during the run\n"
    assert (done.returncode, done.stderr) == (1, expected)
    assert "Results" not in done.stdout and not run_dir.exists()


def test_a_restarted_job_finds_its_own_directory(train, alone, tmp_path, monkeypatch):
    """Among those of other jobs of the same second; what it left unfinished is removed."""
    content = checkpoints.latest_checkpoint(alone["train"]).content
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parallel, "under_torchrun", lambda: True)
    monkeypatch.setattr(directories, "date_and_time", lambda: "now")
    jobs = {"a-now": "none 1-1.0", "a-now-2": "none 2-2.0", "a-now-3": "none 1-1.0"}
    for name, job in jobs.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        checkpoints.write_checkpoint(tmp_path / "runs" / name, {**content, "job": job})

    def start():
        return resuming.start(train.parser(), [], "train.py", parallel.ALONE)

    monkeypatch.setattr(directories, "job", lambda: "none 2-2.0")
    assert start().run_dir == Path("runs/a-now-2") and start().options.momentum == 0.5
    monkeypatch.setattr(directories, "job", lambda: "none 3-3.0")
    with directories.run_directory(tmp_path / "begun", "") as run_dir:
        shutil.copytree(run_dir, tmp_path / "runs" / "a-now-4")
    assert start().run_dir is None
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == list(jobs)


def test_two_processes_cannot_be_at_work_in_one_folder(begun, train, refused):
    with directories.run_directory(begun / "train", "", resumed=True):
        line = refused(train.main, "--resume", str(begun / "train"))
    assert f"the run directory {begun / 'train'} is in use by another process" in line


@pytest.mark.parametrize("text", ["1", "30", "30s", "0.5s"])
def test_how_often_is_said_in_epochs_or_seconds(text, train):
    assert train.parser().parse_args(["--checkpoint-every", text]).checkpoint_every == text


@pytest.mark.parametrize(
    "text", ["0", "0s", "0.0s", "-1", "1.5", "s", "nan", "infs", "1e3s", "", "5m"]
)
def test_no_number_of_epochs_or_seconds(text, train, refused):
    line = refused(train.main, f"--checkpoint-every={text}")
    assert f"expected epochs (such as 5) or seconds (such as 30s), got {text!r}" in line


@pytest.mark.parametrize(("every", "expected"), [("1", 4), ("2", 3), ("100", 2), ("9999s", 2)])
def test_checkpoints_are_written_when_they_are_due(every, expected, train, tmp_path, monkeypatch):
    """At the start, after every N epochs, and after the last one."""
    written = []
    whole = checkpoints.write_checkpoint
    monkeypatch.setattr(checkpoints, "write_checkpoint", lambda *a: (written.append(a), whole(*a)))
    options = ["--epochs", "3", "--checkpoint-every", every, "--run-dir", str(tmp_path / "run")]
    assert train.main(options) == 0
    assert len(written) == expected


# --------------------------------------------------------------------------- what does not fit


def mutated(value, chance):
    """The same but for one thing, somewhere within."""
    value = copy.copy(value)
    if isinstance(value, dict) and value:
        key = chance.choice(list(value))
        if chance.random() < 0.1:
            del value[key]
        else:
            value[key] = mutated(value[key], chance)
        return value
    if isinstance(value, list) and value:
        number = chance.randrange(len(value))
        if chance.random() < 0.1:
            del value[number]
        else:
            value[number] = mutated(value[number], chance)
        return value
    others = [None, -1, 10**30, "text", [], {}, True, float("nan"), torch.zeros(2), [value, value]]
    if isinstance(value, torch.Tensor):
        others += [value[:-1] if value.dim() else value[None], value.to(torch.complex64)]
        others += [value.bool(), value.double(), torch.zeros(0), value.reshape(-1)]
    return chance.choice(others)


@pytest.mark.parametrize(
    ("name", "trials"),
    [
        ("train", 12),
        pytest.param("compare", 12, marks=pytest.mark.slow),
        pytest.param("train", 500, marks=pytest.mark.exhaustive),
        pytest.param("compare", 500, marks=pytest.mark.exhaustive),
    ],
)
def test_a_strangers_checkpoint_is_a_sentence_or_a_run(
    name, trials, begun, script, capsys, record_property
):
    """Its checksum right and anything in it: never a traceback."""
    module, chance = script(name), random.Random(0)
    run_dir = begun / name
    content = checkpoints.latest_checkpoint(run_dir).content
    went_on = 0
    for _ in range(trials):
        for path in run_dir.glob("checkpoint-*"):
            path.unlink()
        for leftover in run_dir.rglob("events.*"):
            leftover.unlink()
        checkpoints.write_checkpoint(run_dir, mutated(content, chance))
        capsys.readouterr()
        try:
            went_on += module.main(["--resume", str(run_dir)]) == 0
        except SystemExit as stop:
            err = capsys.readouterr().err
            assert stop.code == 2 and err.splitlines()[-1].startswith(f"{Path(sys.argv[0]).name}: ")
    assert went_on < trials
    record_property("trials", trials)


# ------------------------------------------------------------------------------------ a full disk


def full_after(calls):
    """Every write of a file fails from the so-manieth on."""
    return f"""
import errno, io, os
import nnce.training.checkpoints, tensorboard.summary.writer.record_writer as records
count = iter(range({calls}))
def full(whole):
    def call(*arguments, **more):
        if next(count, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(*arguments, **more)
    return call
os.fsync, os.replace = full(os.fsync), full(os.replace)
records.RecordWriter.write = full(records.RecordWriter.write)
"""


def small_disk(folder, size):
    """A file system of this size; None where the machine does not allow it."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(["mount", *options], capture_output=True)
    return folder if mounted and mounted.returncode == 0 else None


@pytest.mark.parametrize(
    ("name", "moments"),
    [
        pytest.param("train", 1, marks=pytest.mark.slow),
        pytest.param("compare", 1, marks=pytest.mark.slow),
        pytest.param("train", 20, marks=pytest.mark.exhaustive),
        pytest.param("compare", 20, marks=pytest.mark.exhaustive),
    ],
)
def test_a_full_disk_takes_nothing_away(name, moments, alone, tmp_path, record_property):
    """At a random moment; with free space, the run continues to the same results."""
    chance = random.Random(name)
    options = TRAIN if name == "train" else COMPARE
    stopped = on_disk = 0
    for number in range(moments):
        place = tmp_path / f"disk-{number}"
        disk = small_disk(place, chance.randrange(20_000, 500_000)) if number % 2 else None
        run_dir = place / "run"
        change = "" if disk else full_after(chance.randrange(1, 40))
        try:
            done = programs.run(name, *options, "--run-dir", str(run_dir), before=change)
            if done.returncode == 0:
                continue
            stopped += 1
            on_disk += disk is not None
            lines = done.stderr.splitlines()
            assert done.returncode in (1, 2) and "No space left on device" in lines[-1], lines
            assert len(lines) == 1, lines
            if not run_dir.exists() or not any(run_dir.iterdir()):
                continue  # full before anything was finished
            shutil.copytree(run_dir, tmp_path / f"with-space-{number}")
        finally:
            if disk:
                subprocess.run(["umount", str(disk)], check=True)
        with_space = tmp_path / f"with-space-{number}"
        assert killed.loaded(name).main(["--resume", str(with_space)]) == 0
        expected = outcome_without_command(alone[name])
        found = outcome_without_command(with_space)
        assert killed.differences(expected, found) == []
    assert stopped
    record_property("trials", f"{moments}, {stopped} stopped, {on_disk} by a file system")


@pytest.mark.slow
def test_a_lost_permission_is_one_sentence(tmp_path):
    """In the midst of a run; what was finished stays."""
    change = full_after(30).replace("ENOSPC", "EACCES").replace("No space left on device", "denied")
    run_dir = tmp_path / "run"
    done = programs.run("train", *TRAIN, "--run-dir", str(run_dir), before=change)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "denied" in done.stderr
    assert checkpoints.latest_checkpoint(run_dir).damaged == []


# -------------------------------------------------------------------------- nothing is left behind


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(4, marks=pytest.mark.slow),
        pytest.param(100, marks=pytest.mark.exhaustive, id="exhaustive"),
    ],
)
def test_nothing_is_left_of_many_epochs_and_resumes(count, train, tmp_path, record_property):
    """Memory, file handles, threads and processes are as many after a hundred as after a few."""
    run_dir = str(tmp_path / "run")
    options = ["--train-size", "100", "--hidden", "5"]
    assert train.main([*options, "--epochs", "1", "--run-dir", run_dir]) == 0
    for number in range(2, 6):
        assert train.main(["--resume", run_dir, "--epochs", str(number)]) == 0
    gc.collect()  # what earlier tests have left
    handles = len(os.listdir("/proc/self/fd"))
    threads, memory = threading.active_count(), timing.resident()
    for number in range(6, 6 + count):
        assert train.main(["--resume", run_dir, "--epochs", str(number)]) == 0
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= handles
    assert threading.active_count() <= threads
    grown = (timing.resident() - memory) / 1e6
    record_property("trials", f"{count} resumes, {grown:.1f} MB more")
    assert grown < 5 + 0.1 * count
