import csv
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, slow_unless
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nnce
from nnce import training
from nnce.data import Distortion
from nnce.experiments import command_line, running
from nnce.monitoring import LayerFigures
from nnce.training import Settings
from nnce.training.schedules import Schedule


@pytest.fixture
def train(script):
    return script("train")


def test_a_run(train, tmp_path, capsys, digits, drawn):
    run_dir = tmp_path / "run"
    status = train.main(["--epochs", "2", "--hidden", "12", "8", "--run-dir", str(run_dir)])
    assert status == 0
    out, err = capsys.readouterr()
    assert "network 64-12-8-10, cross-entropy loss" in out
    assert "epoch   2  loss: train" in out
    assert "| best on validation |" in out
    assert f"tensorboard --logdir {run_dir}\n" in out
    assert err == ""  # no progress bar where nobody watches

    results = json.loads((run_dir / "results.json").read_text())
    assert results["config"]["hidden"] == [12, 8]
    assert results["config"]["lr"] == 0.5
    assert set(results["config"]) == set(vars(train.parser().parse_args([])))
    assert results["versions"]["torch"] == torch.__version__
    assert results["device"] == "cpu" or "NVIDIA" in results["device"]
    assert results["threads"] == torch.get_num_threads()
    assert results["seconds"] > results["training_seconds"] > 0
    assert [record["epoch"] for record in results["epochs"]] == [0, 1, 2]
    with (run_dir / "epochs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2]
    for row, record in zip(rows, results["epochs"], strict=True):
        assert float(row["loss/validation"]) == record["loss"]["validation"]
        assert float(row["slowdown/layer3"]) == record["layers"][2]["slowdown"]
    assert (run_dir / "learning-curves.png").read_bytes().startswith(b"\x89PNG")
    last = {row["data"]: row for row in results["rows"] if row["network"] == "last"}
    assert set(last) == {"train", "validation", "test"}

    network = nnce.load(run_dir / "network.pt")
    assert network.sizes == (64, 12, 8, 10)
    end = out.splitlines()[-8:]
    assert results["answer"].splitlines() == end[1:5]
    accuracy = f"{100 * last['test']['accuracy']:.2f} %"
    assert f"Test accuracy {accuracy} after epoch 2." in end
    assert f"Last network: nnce.load('{run_dir / 'network.pt'}')" in end
    assert sum(f" {accuracy} " in line for line in out.splitlines() if "| last " in line) >= 1
    assert f"Best network: nnce.load('{run_dir / 'best.pt'}')" in end
    alone = training.evaluate(network, digits.test, "cross-entropy")
    assert last["test"]["loss"] == pytest.approx(alone.loss)
    assert last["test"]["accuracy"] == alone.accuracy
    counts = results["test"]["confusion"]
    assert sum(map(sum, counts)) == 300
    right = sum(counts[i][i] for i in range(10))
    assert right / 300 == alone.accuracy
    assert [row["support"] for row in results["test"]["classes"]] == list(map(sum, counts))
    lines = out.splitlines()
    assert lines[6:10] == end[1:5]  # after three epochs, and at the end
    assert "| weighted avg |" in out


def test_the_screen_begins_with_the_answer_and_fits(train, tmp_path, capsys):
    assert train.main(["--train-size", "100", "--run-dir", str(tmp_path / "run")]) == 0
    *lines, browser = capsys.readouterr().out.splitlines()
    assert len(lines) < 60 and browser.startswith("In the browser: ")
    assert max(len(line) for line in lines if "/" not in line) <= 100
    shown = [int(line[6:9]) for line in lines if line.startswith("epoch ")]
    assert shown == [*range(10), 10, 20, 30]


@pytest.mark.parametrize(
    ("engine",),
    slow_unless(lambda engine: engine == "loops", [(engine,) for engine in training.ENGINES]),
)
def test_tensorboard_tags(train, tmp_path, engine):
    train.main(["--epochs", "2", "--engine", engine, "--run-dir", str(tmp_path)])
    files = list(tmp_path.glob("events.out.tfevents.*"))
    assert sorted(path.suffix == ".closing" for path in files) == [False, True]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # no stray runs
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    splits = ("train", "validation", "test")
    expected = {
        *(f"{what}/{split}" for what in ("loss", "accuracy") for split in splits),
        *(f"{what}/layer{n}" for what in LayerFigures._fields for n in (1, 2)),
    }
    assert set(events.Tags()["scalars"]) == expected
    results = json.loads((tmp_path / "results.json").read_text())
    for tag in expected:
        assert [event.step for event in events.Scalars(tag)] == [0, 1, 2]
    assert [event.value for event in events.Scalars("loss/test")] == pytest.approx(
        [record["loss"]["test"] for record in results["epochs"]]
    )
    assert [event.value for event in events.Scalars("dz_norm/layer1")] == pytest.approx(
        [record["layers"][0]["dz_norm"] for record in results["epochs"]]
    )
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f"| engine | {engine} |" in text
    assert set(events.Tags()["images"]) == {"weights/layer1", "wrong", "confusion"}
    for tag in ("output/z", "output/a", "output/dz"):
        assert [event.step for event in events.Histograms(tag)] == [0, 1, 2]


def test_the_best_network_and_an_end_by_patience(train, tmp_path, capsys, digits):
    """Of 300 examples epoch 10 is the best, and epoch 12 no better."""
    run_dir = tmp_path / "run"
    options = ["--patience", "2", "--train-size", "300", "--run-dir", str(run_dir)]
    assert train.main(options) == 0
    results = json.loads((run_dir / "results.json").read_text())
    epochs = results["epochs"]
    assert len(epochs) == 13 and results["stopped_early"] and results["config"]["patience"] == 2
    assert results["best"] == epochs[10] != epochs[12]
    assert epochs[10]["accuracy"]["validation"] == epochs[12]["accuracy"]["validation"]
    for name, epoch in (("network", 12), ("best", 10)):
        found = training.evaluate(nnce.load(run_dir / f"{name}.pt"), digits.test, "cross-entropy")
        assert found.accuracy == epochs[epoch]["accuracy"]["test"]
    validation, test = (
        f"{100 * epochs[10]['accuracy'][of]:.2f} %" for of in ("validation", "test")
    )
    out = capsys.readouterr().out
    assert " after epoch 12: no higher validation accuracy in 2 epochs.\n" in out
    assert f"Best on validation: {validation} after epoch 10, with {test} on test.\n" in out
    # With more patience it continues, and ends like a run that had it from the start.
    assert train.main(["--resume", str(run_dir), "--patience", "4"]) == 0
    resumed = json.loads((run_dir / "results.json").read_text())
    assert len(resumed["epochs"]) > 13 and resumed["epochs"][:13] == epochs


def test_quiet_prints_the_answer_and_where_it_is(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run_dir = tmp_path / "run"
    assert train.main(["--quiet", "--epochs", "1", "--run-dir", str(run_dir)]) == 0
    out, err = capsys.readouterr()
    answer = json.loads((run_dir / "results.json").read_text())["answer"]
    assert out == f"{answer}\nResults, epochs.csv and learning-curves.png: {run_dir}\n"
    assert err == ""  # no bars on a terminal
    assert train.main(["--resume", str(run_dir), "--epochs", "2"]) == 0
    assert "epoch   2" in capsys.readouterr().out


def test_an_earlier_run_is_a_configuration(train, tmp_path, capsys):
    """Its options are defaults, and explicit ones win; so does a file of options alone."""
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--hidden", "7", "6", "--l2", "0.5", "--init", "0.1", "--loss", "quadratic"]
    options += ["--train-size", "50", "--epochs", "1", "--quiet", "--patience", "3"]
    assert train.main([*options, "--run-dir", str(first)]) == 0
    config = str(first / "results.json")
    explicit = ["--hidden", "5", "--epochs", "2", "--run-dir", str(second)]
    assert train.main(["--config", config, *explicit]) == 0
    assert "network 64-5-10, quadratic loss" in capsys.readouterr().out
    was, now = (
        json.loads((folder / "results.json").read_text())["config"] for folder in (first, second)
    )
    changed = {"hidden": [5], "epochs": 2, "run_dir": str(second), "quiet": False}
    assert now == {**was, **changed}
    some = tmp_path / "some.json"
    some.write_text('{"lr": 0.25, "seed": 4, "quiet": true}')
    parsed = train.parser().parse_args(["--config", str(some), "--seed", "5"])
    assert (parsed.lr, parsed.seed, parsed.quiet, parsed.config) == (0.25, 5, False, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("precious", "expected JSON, such as the results.json of a run"),
        ("[1]", "expected a JSON object of option values by name"),
        ('{"config": 3}', "expected a JSON object of option values by name"),
        ('{"config": {"seeds": 8}}', "found option 'seeds', which "),
        ('{"epochs": [1, 2]}', "found epochs = [1, 2], which this version of "),
        ('{"lr": "fast"}', "found lr = 'fast', which this version of "),
        ('{"hidden": 30}', "found hidden = 30, which"),
        ('{"epochs": null}', "found epochs = None, which"),
        ('{"patience": 0}', "expected --patience of at least 1 epoch, got 0"),
    ],
)
def test_a_wrong_configuration_is_one_line(content, message, train, tmp_path, refused):
    path = tmp_path / "some.json"
    if content is not None:
        path.write_text(content)
    line = refused(train.main, "--config", str(path))
    assert message in line
    if "patience" not in message:
        assert f"--config {path}: " in line


def test_a_configuration_and_a_run_to_resume_are_refused(train, refused):
    line = refused(train.main, "--config", "a", "--resume", "b")
    assert "expected --config or --resume, got both" in line


def test_dry_run_leaves_nothing_behind(train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "kept no files" in out and "nnce.load" not in out
    assert list(tmp_path.iterdir()) == []


def test_default_run_directory_has_a_telling_name(train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--epochs", "1", "--loss", "quadratic", "--hidden"]) == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("digits-quadratic-lr3-single-layer-scaled-backprop-seed0-")
    assert f"--logdir runs/{run_dir.name}\n" in capsys.readouterr().out


def test_the_name_of_a_run_says_what_differs_and_adds_a_word(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--optimizer", "adam", "--l2", "0.5", "--init", "large", "--name", "mine"]
    assert train.main(["--epochs", "1", "--train-size", "20", *options]) == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    expected = "digits-cross-entropy-lr0.001-adam-30-large-lambda0.5-functions-seed0-mine-"
    assert run_dir.name.startswith(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "0"], "expected a positive --lr, got 0.0"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--batch-size", "0"], "expected --batch-size of at least 1, a whole number, got 0"),
        (["--epochs", "-1"], "expected --epochs of at least 1, a whole number, got -1"),
        (["--hidden", "30", "0"], "expected positive --hidden sizes, got (30, 0)"),
        (["--train-size", "2000"], "a --train-size of at most 1,197 for digits, got 2,000"),
        (["--train-size", "0"], "a --train-size of at least 1, a whole number, got 0"),
        (["--data", "cifar"], "data sets digits, mnist, fashion-mnist, kmnist, got 'cifar'"),
        (["--loss", "hinge"], "invalid choice: 'hinge'"),
        (["--engine", "magic"], "invalid choice: 'magic'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--patience", "0"], "expected --patience of at least 1 epoch, got 0"),
        (["--patience", "soon"], "invalid int value: 'soon'"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--threads", "0"], "1 to 1,024 --threads, got 0"),
        (["--matmul-precision", "low"], "invalid choice: 'low'"),
        (["--engine", "backprop", "--optimizer", "adam"], "use --engine 'functions'"),
        (["--dropout", "0.5", "--engine", "loops"], "expected no --dropout for engine 'loops'"),
        (["--dropout", "0.5", "--hidden"], "hidden=(); use --input-dropout for dropout of inputs"),
        (["--input-dropout", "1"], "expected --input-dropout to be a number in [0, 1), got 1.0"),
        (["--l2", "-1"], "expected --l2 of at least 0, got -1.0"),
        (["--optimizer", "adam", "--momentum", "0.9"], "no --momentum for optimizer 'adam'"),
        (["--hidden", "1000000000000"], "would need 900,000.0 GB of memory, but cpu has"),
        (["--seed", "-1"], "--seed: expected a seed from 0 to 2**32 - 1, got '-1'"),
        (
            ["--name", "a/b"],
            "expected a letter or digit, then at most 59 letters, digits or . _ + -, got 'a/b'",
        ),
        (["--name", "mine", "--run-dir", "there"], "expected --run-dir or --name, got both"),
    ],
)
def test_bad_input_is_one_line_and_status_2(train, options, message, refused):
    assert message in refused(train.main, *options)


def test_damaged_data_is_one_line(train, tmp_path, refused):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for half in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{half}-{kind}-ubyte").write_bytes(b"nonsense")
    assert str(raw) in refused(train.main, "--data", "mnist", "--data-dir", str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(train, capsys):
    with pytest.raises(SystemExit):
        train.main(["--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


def test_run_directory_that_is_used_or_cannot_be_made(train, tmp_path, refused):
    (tmp_path / "thesis.tex").write_text("precious")
    for path, message in (
        (tmp_path, "already used"),
        (tmp_path / "thesis.tex", "is a file; choose a folder"),
        (tmp_path / "thesis.tex" / "run", "cannot be written"),
    ):
        assert message in refused(train.main, "--run-dir", str(path))


@pytest.mark.parametrize("engine", ["loops", "products", "functions", "autograd"])
def test_divergence_is_one_line_and_leaves_nothing(engine, train, tmp_path, capsys):
    run_dir = tmp_path / "new" / "run"
    arguments = [
        "--lr",
        "1e300",
        "--engine",
        engine,
        "--train-size",
        "100",
        "--run-dir",
        str(run_dir),
    ]
    assert train.main(arguments) == 1
    err = capsys.readouterr().err
    assert "is no longer a finite number" in err and "lr=1e+300, " in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_interrupted_run_keeps_what_it_has(train, tmp_path, monkeypatch, capsys):
    run_epoch = training.Cursor.run_epoch

    def third_epoch_is_stopped(cursor, *rest, **options):
        if cursor.epoch == 2:
            raise KeyboardInterrupt
        run_epoch(cursor, *rest, **options)

    monkeypatch.setattr(training.Cursor, "run_epoch", third_epoch_is_stopped)
    run_dir = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train.main(["--run-dir", str(run_dir)])
    first, second = capsys.readouterr().err.splitlines()
    assert first == "Interrupted after step 240; epochs 0 to 2 are kept; resume with:"
    assert second.endswith(f" --resume {run_dir}")
    results = json.loads((run_dir / "results.json").read_text())
    assert results["interrupted"] and len(results["epochs"]) == 3
    assert nnce.load(run_dir / "network.pt").sizes == (64, 30, 10)


@pytest.mark.parametrize("during", ["epoch_row", "figures"])
def test_a_signal_in_a_run_that_is_finished_stops_nothing(during, train, tmp_path, monkeypatch):
    """Before the last checkpoint, or while plotting: everything is written, and the status is 0."""
    module, name = (train, during) if during == "epoch_row" else (train.figures, "training_curves")
    work, run_dir = getattr(module, name), tmp_path / "run"
    signaled = []

    def signal_at_the_end(*arguments):
        if during == "figures" or arguments[1].epoch == 2:
            running.stop(signal.SIGINT)
            signaled.append(running.waiting())
        return work(*arguments)

    monkeypatch.setattr(module, name, signal_at_the_end)
    monkeypatch.setattr(running._signals, "first", None)
    assert train.main(["--epochs", "2", "--train-size", "20", "--run-dir", str(run_dir)]) == 0
    assert signaled == [signal.SIGINT] and running.waiting() == 0
    results = json.loads((run_dir / "results.json").read_text())
    assert not results["interrupted"] and len(results["epochs"]) == 3
    assert (run_dir / "learning-curves.png").exists()


def program(*options, **more):
    """The script in a process of its own, its output line by line."""
    command = [sys.executable, "-u", str(ROOT / "scripts" / "train.py"), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **{**pipes, **more})


@pytest.mark.slow
def test_killed_politely_or_unread_keeps_what_it_has(tmp_path):
    """SIGTERM, and `| head -1`: what was finished is kept, the status says so, and no traceback."""
    stopped, unread = tmp_path / "stopped", tmp_path / "unread"
    for run_dir, stop, status in (
        (stopped, lambda process: process.terminate(), 143),
        (unread, lambda process: process.stdout.close(), 141),
    ):
        process = program("--epochs", "100000", "--run-dir", str(run_dir))
        while "epoch   1" not in process.stdout.readline():
            assert process.poll() is None
        stop(process)
        assert process.wait(timeout=60) == status
        assert "Traceback" not in process.stderr.read()
        process.stderr.close()
        process.stdout.close()
        results = json.loads((run_dir / "results.json").read_text())
        assert results["interrupted"] and len(results["epochs"]) >= 2
        assert nnce.load(run_dir / "network.pt").sizes == (64, 30, 10)


def test_help_on_a_terminal_without_greek(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = program("--help", env=environment)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "--l2" in out and err == ""


def test_as_a_program(tmp_path):
    """In a process of its own: the status of a mistake, and no traceback."""
    environment = {**os.environ, "PYTHONWARNINGS": "error::UserWarning"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), "--lr", "-1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "train.py: error: expected a positive --lr, got -1.0\n"


def test_a_schedule_and_a_distortion(train, tmp_path, drawn):
    """By plain options, and they are where one looks for them."""
    options = ["--epochs", "2", "--schedule", "step", "--step-size", "1", "--init", "0.1"]
    options += ["--rotation", "9", "--elastic", "34", "--run-dir", str(tmp_path / "run")]
    assert train.main(options) == 0
    config = json.loads((tmp_path / "run" / "results.json").read_text())["config"]
    assert (config["schedule"], config["step_size"], config["gamma"]) == ("step", 1, 0.1)
    assert (config["rotation"], config["elastic"], config["elastic_sigma"]) == (9, 34, 4)
    assert config["init"] == 0.1
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert "distortion" in events.Tags()["images"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], Settings()),
        (["--warmup", "5"], Settings(schedule=Schedule(warmup=5))),
        (
            ["--schedule", "cosine", "--warmup", "5", "--warmup-start", "0.2"],
            Settings(schedule=Schedule("cosine", cosine_epochs=25, warmup=5, warmup_start=0.2)),
        ),
        (
            ["--schedule", "step", "--step-size", "7", "--gamma", "0.3"],
            Settings(schedule=Schedule("step", 7, 0.3)),
        ),
        (["--schedule", "step"], Settings(schedule=Schedule("step", 10, 0.1))),
        (["--elastic-sigma", "3"], Settings()),
        (
            ["--elastic", "34", "--elastic-sigma", "3"],
            Settings(distortion=Distortion(0, 0, 0, 0, 34, 3)),
        ),
        (
            ["--rotation", "10", "--scaling", "0.15", "--shear", "0.2", "--translation", "1.5"],
            Settings(distortion=Distortion(10, 0.15, 0.2, 1.5)),
        ),
    ],
)
def test_plain_options_are_settings(options, expected, train):
    assert command_line.settings(train.parser().parse_args(options)) == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--schedule", "step", "--step-size", "0"), "expected --step-size from 1 to 100,000"),
        (("--schedule", "linear"), "argument --schedule: invalid choice: 'linear'"),
        (("--gamma", "0.3"), "expected no --gamma for schedule 'constant', got 0.3"),
        (("--schedule", "cosine", "--warmup", "30"), "expected --cosine-epochs from 1 to 100,000"),
        (
            ("--schedule", "cosine", "--cosine-epochs", "3"),
            "a --schedule that leaves a positive rate for all 30 epochs",
        ),
        (("--elastic=-1",), "argument --elastic: expected a number from 0 to 1e+06, got -1.0"),
        (("--elastic-sigma", "0"), "argument --elastic-sigma: expected a number from 0.1 to"),
        (("--rotation", "far"), "argument --rotation: could not convert string to float: 'far'"),
        (("--init", "0"), "or a positive standard deviation, got 0.0"),
        (("--init", "tiny"), "or a positive standard deviation, got 'tiny'"),
    ],
)
def test_wrong_schedules_and_distortions_are_named(options, sentence, train, refused):
    assert sentence in refused(train.main, *options)
