"""What stops a script, and what remains of its run, mostly in separate processes.

The processes are forked (tests/programs.py), except where the start of Python matters.
"""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, slow_unless
from programs import Program, run

import nnce
from nnce import _memory, data, training
from nnce.experiments import comparison_report, side_by_side
from nnce.training import Settings

SCRIPTS = ROOT / "scripts"
NAMES = [path.stem for path in sorted(SCRIPTS.glob("*.py")) if path.stem != "startup"]
QUICK = {
    "train": ["--epochs", "3"],
    "compare": ["--epochs", "3", "--seeds", "2", "--lrs", "1", "--control-seeds", "0"],
}
ENDLESS = {name: [*options, "--epochs", "100000"] for name, options in QUICK.items()}
ACKNOWLEDGED = "stopping after this step ... (Ctrl-C again exits at once)"
posix = pytest.mark.skipif(os.name != "posix", reason="signals, limits and streams of POSIX")


def results(run_dir):
    return json.loads((run_dir / "results.json").read_text())


def csv_epochs(run_dir):
    """The epochs of every network by epochs.csv, each row of it whole."""
    content = (run_dir / "epochs.csv").read_bytes()
    assert content.endswith(b"\r\n")
    rows = list(csv.DictReader(content.decode().splitlines()))
    assert all(None not in row.values() and "" not in row.values() for row in rows)
    return [int(row["epoch"]) for row in rows]


# --------------------------------------------------------------------------- stopped by a signal


@contextlib.contextmanager
def begun(name, run_dir, change=""):
    """An endless run in a separate process, after its first epochs."""
    with Program(name, *ENDLESS[name], "--run-dir", str(run_dir), before=change) as process:
        # The first checkpoint is written before the first epoch.
        while len(list(run_dir.glob("checkpoint-*"))) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        yield process


@posix
@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("train", signal.SIGINT),
        pytest.param("compare", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("train", signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_a_run_which_says_how_to_go_on(name, first, tmp_path):
    """And a SIGTERM after it, as from a shell that leaves, takes nothing away."""
    run_dir = tmp_path / "run"
    with begun(name, run_dir) as process:
        process.send_signal(first)
        deadline = time.monotonic() + 60
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
        at_once, first_line, how_to_go_on = process.output()[1].splitlines()
    assert process.returncode == 128 + first and first_line.startswith("Interrupted")
    assert at_once == ACKNOWLEDGED
    assert how_to_go_on.endswith(f"--resume {run_dir}")
    recorded = results(run_dir)
    assert recorded["interrupted"]
    if name == "train":
        assert len(recorded["epochs"]) >= 2
        assert nnce.load(run_dir / "network.pt").sizes == (64, 30, 10)
    else:
        (finished,) = {row["epochs"] for row in recorded["rows"]}
        assert finished == max(csv_epochs(run_dir)) >= 1
        assert (run_dir / "learning-curves.png").exists() and (run_dir / "results.md").exists()


@posix
@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once_with_the_last_checkpoint(tmp_path):
    """Whatever it is at: here at tables that take for ever."""
    run_dir, at_it = tmp_path / "run", tmp_path / "at-it"
    change = f"""
import pathlib, time, nnce.experiments.comparison
def for_ever(*arguments):
    pathlib.Path({str(at_it)!r}).touch()
    while True:
        time.sleep(0.01)
nnce.experiments.comparison.conclude = for_ever
"""
    with begun("compare", run_dir, change) as process:
        process.send_signal(signal.SIGINT)
        while not at_it.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.output()[1] == f"{ACKNOWLEDGED}\n"
    assert not (run_dir / "results.json").exists()
    assert nnce.training.checkpoints.latest_checkpoint(run_dir).damaged == []


@posix
@pytest.mark.parametrize(
    ("where", "epochs", "interrupted"),
    slow_unless(
        lambda where, *_: where == "nnce.save",
        [
            ("nnce.experiments.tensorboard.Monitor.log_images", 3, False),
            ("nnce.experiments.report.write_json", 3, False),
            ("nnce.save", 0, True),
            ("nnce.training.checkpoints.write_checkpoint", 0, True),
        ],
    ),
)
def test_what_is_being_written_is_written_whole(where, epochs, interrupted, tmp_path):
    """Signals in the midst of it wait until it is there."""
    target, function = where.rsplit(".", 1)
    change = f"""
import os, signal, nnce
import nnce.training.checkpoints, nnce.experiments.report, nnce.experiments.tensorboard
whole, numbers = {where}, [signal.SIGINT, signal.SIGTERM]
def disturbed(*arguments, **more):
    while numbers:
        os.kill(os.getpid(), numbers.pop(0))
    return whole(*arguments, **more)
{target}.{function} = disturbed
"""
    done = run("train", *QUICK["train"], "--run-dir", str(tmp_path / "run"), before=change)
    assert done.returncode == (130 if interrupted else 0)  # a finished run has nothing to stop
    assert ("Interrupted after step 0; epochs 0 to 0 are kept;" in done.stderr) == interrupted
    assert done.stderr.startswith(f"{ACKNOWLEDGED}\n")
    assert ("--resume" in done.stderr) == interrupted
    assert done.stderr.count("\n") == 1 + 2 * interrupted
    recorded = results(tmp_path / "run")
    assert recorded["interrupted"] == interrupted
    assert [record["epoch"] for record in recorded["epochs"]] == list(range(epochs + 1))
    assert nnce.load(tmp_path / "run" / "network.pt").sizes == (64, 30, 10)
    assert b"confusion" in next((tmp_path / "run").glob("events*.closing")).read_bytes()


def scripted(main, before=""):
    """A script whose main() has these lines."""
    lines = "\n    ".join(main.strip().splitlines())
    code = (
        "import hashlib, os, signal, sys, time\nfrom nnce.experiments import directories, running\n"
    )
    code += f"def main():\n    {lines}\n    return 0\n{before}\nrunning.run_script(main)"
    return Program("", before=code)


@posix
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_a_signal_waits_for_the_end_of_an_undisturbed_block(number):
    main = f"""
try:
    with running.undisturbed():
        signal.raise_signal({int(number)})
        with running.undisturbed():
            pass  # within another one, which has not ended
        time.sleep(1)  # longer than the acknowledgement takes
        print("undisturbed")
    print("not reached")
finally:
    signal.raise_signal(signal.SIGTERM)  # of a script that is closing
    print("closed")
"""
    with scripted(main) as process:
        assert process.wait() == 128 + number
        assert process.output() == ["undisturbed\nclosed\n", f"{ACKNOWLEDGED}\n"]


@posix
@pytest.mark.parametrize("held", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_signal_is_acknowledged_while_the_main_thread_is_in_compiled_code(held):
    """As Numba's compiler is for seconds, where no handler of Python's can run."""
    where = "running.undisturbed()" if held else "open(os.devnull)"
    main = f"""
with {where}:
    print("at it")
    hashlib.pbkdf2_hmac("sha512", b"", b"", 10**9)  # minutes, with the GIL released
"""
    with scripted(main) as process:
        process.until("at it\n", "")
        used = psutil.Process(process.pid).cpu_times().user
        while psutil.Process(process.pid).cpu_times().user < used + 0.3:
            time.sleep(0.05)  # until it is in there
        process.send_signal(signal.SIGINT)
        expected = ACKNOWLEDGED if held else "stopping ... (Ctrl-C again exits at once)"
        process.until("at it\n", f"{expected}\n")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130


@posix
def test_signals_that_are_ignored_stay_ignored():
    """As under nohup, also while a block of nnce's installs its own handler."""
    process = scripted(
        """
from nnce.engines import loops
for _ in range(2):
    with loops.interrupts_wait():
        signal.raise_signal(signal.SIGINT)
time.sleep(0.1)
print("still here")
""",
        before="signal.signal(signal.SIGINT, signal.SIG_IGN)",
    )
    with process:
        assert process.wait() == 0 and process.output() == ["still here\n", ""]


@posix
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_during_the_imports_it_is_quiet(name, number, tmp_path):
    for module in ("torch", "numpy"):  # whichever is first
        (tmp_path / f"{module}.py").write_text(
            # Short sleeps: a signal that comes just before a long one is answered after it.
            "import time; print('importing', flush=True)\nwhile True: time.sleep(0.01)"
        )
    places = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / f"{name}.py")],
        env={**os.environ, "PYTHONPATH": places},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (128 + number, "", "")


# ----------------------------------------------------------- stopped by a full disk or no memory

FULL = """
import errno, tensorboard.summary.writer.record_writer as records
import nnce.training.checkpoints
from nnce.experiments.tensorboard import Monitor

def full(*arguments, **more):
    raise OSError(errno.ENOSPC, "No space left on device")

def full_after(whole, calls):
    count = iter(range(calls))
    return lambda *arguments: whole(*arguments) if next(count, None) is not None else full()
"""


@pytest.mark.parametrize(
    ("change", "epochs"),
    slow_unless(
        lambda change, epochs: "RecordWriter" in change,
        [
            # While logging, at epoch 2: in TensorBoard's thread, and when the network is saved.
            ("records.RecordWriter.write = full_after(records.RecordWriter.write, 11)", 2),
            ("import nnce; nnce.save = full_after(nnce.save, 4)", 2),
            (
                "import nnce.training.checkpoints as c\n"
                "c.write_checkpoint = full_after(c.write_checkpoint, 2)",
                3,
            ),
            # While closing.
            ("Monitor.log_images = full", 4),
            ("Monitor.__exit__ = full", 4),
        ],
    ),
)
def test_a_full_disk_is_one_sentence_and_takes_nothing_away(change, epochs, tmp_path):
    run_dir = tmp_path / "run"
    done = run("train", *QUICK["train"], "--run-dir", str(run_dir), before=FULL + change)
    assert done.returncode == 1
    assert done.stderr == (
        f"train.py: error: No space left on device; finished results are kept in {run_dir}\n"
    )
    assert nnce.load(run_dir / "network.pt").sizes == (64, 30, 10)
    recorded = results(run_dir)
    # An error in TensorBoard's thread is noticed before the epoch is recorded or right after it.
    found = range(epochs, epochs + 2) if "RecordWriter" in change else [epochs]
    assert len(recorded["epochs"]) in found and recorded["interrupted"] == (epochs < 4)


@pytest.mark.slow
def test_where_not_even_the_results_fit_the_network_stays(tmp_path):
    run_dir = tmp_path / "run"
    change = FULL + "nnce.experiments.report.write_json = full"
    change = change.replace("import nnce.", "import nnce.experiments.report, nnce.", 1)
    done = run("train", *QUICK["train"], "--run-dir", str(run_dir), before=change)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "finished results are kept in" in done.stderr
    assert nnce.load(run_dir / "network.pt").sizes == (64, 30, 10)
    names = {re.split("[.-]", path.name)[0] for path in run_dir.iterdir()}
    assert names == {"network", "best", "epochs", "events", "checkpoint"}


def test_a_disk_that_is_full_from_the_start_leaves_nothing(tmp_path):
    change = FULL + "records.RecordWriter.write = full"
    done = run("train", *QUICK["train"], "--run-dir", str(tmp_path / "run"), before=change)
    assert done.returncode == 1
    assert done.stderr == "train.py: error: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "epochs"),
    [
        pytest.param("Monitor.log = full_after(Monitor.log, 5)", 1, marks=pytest.mark.slow),
        pytest.param("Monitor.log_hparams = full", 3, marks=pytest.mark.exhaustive),
    ],
)
def test_a_full_disk_under_a_comparison(change, epochs, tmp_path):
    run_dir = tmp_path / "run"
    done = run("compare", *QUICK["compare"], "--run-dir", str(run_dir), before=FULL + change)
    assert done.returncode == 1
    assert done.stderr == (
        f"compare.py: error: No space left on device; finished results are kept in {run_dir}\n"
    )
    assert {row["epochs"] for row in results(run_dir)["rows"]} == {epochs}
    assert set(range(epochs + 1)) <= set(csv_epochs(run_dir))


@posix
def test_epochs_csv_has_whole_rows_where_the_disk_is_full(tmp_path, digits):
    """A number that is cut off would be a different one: a row is there whole or not at all."""
    import resource

    settings = Settings((3,), epochs=2)
    short = data.Dataset(*(data.Split(x[:20], y[:20]) for x, y in digits))
    state = training.initial_state(settings, short)
    run = side_by_side.Run(settings, state.network)
    with comparison_report.Log(tmp_path, {}) as log:
        for record in training.train(state, settings, short):
            run.records.append(record)
            if record.epoch == 1:
                log.flush()
                before = (tmp_path / "epochs.csv").read_bytes()
                _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, most))
                try:
                    with pytest.raises(OSError, match="File too large"):
                        log.epoch([run], short)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                assert (tmp_path / "epochs.csv").read_bytes() == before
            log.epoch([run], short)
    assert csv_epochs(tmp_path) == [0, 1, 2]


@pytest.mark.slow
def test_an_error_of_ours_still_has_its_traceback(tmp_path):
    """And takes nothing finished away, either."""
    run_dir = tmp_path / "run"
    change = "from nnce.experiments.tensorboard import Monitor\nMonitor.log_images = None"
    done = run("train", *QUICK["train"], "--run-dir", str(run_dir), before=change)
    assert done.returncode == 1 and "TypeError: 'NoneType'" in done.stderr
    assert nnce.load(run_dir / "network.pt").sizes == (64, 30, 10)


def test_divergence_keeps_the_epochs_before_it(script, tmp_path, monkeypatch, capsys):
    initial_state, run_epoch = training.initial_state, training.Cursor.run_epoch
    states = []

    def remembered(*arguments):
        states.append(initial_state(*arguments))
        return states[0]

    def diverges(cursor, *rest, **options):
        run_epoch(cursor, *rest, **options)
        if cursor.epoch == 3:
            with torch.no_grad():
                states[0].network[0].weight.fill_(torch.nan)

    monkeypatch.setattr(training, "initial_state", remembered)
    monkeypatch.setattr(training.Cursor, "run_epoch", diverges)
    assert script("train").main(["--run-dir", str(tmp_path / "run")]) == 1
    assert "no longer a finite number after epoch 3" in capsys.readouterr().err
    recorded = results(tmp_path / "run")
    assert recorded["interrupted"] and len(recorded["epochs"]) == 3
    assert nnce.load(tmp_path / "run" / "network.pt")[0].weight.isfinite().all()


LITTLE_MEMORY = """
import os, resource, torch, matplotlib.figure, sklearn.model_selection, torch.utils.tensorboard
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000,) * 2)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's limits")
@pytest.mark.parametrize(
    ("name",),
    slow_unless(lambda name: name == "train", [("train",), ("compare",), ("check_gradients",)]),
)
def test_no_memory_is_one_sentence(name, tmp_path):
    """The plain RuntimeError of PyTorch's allocator."""
    options = ["--hidden", "2000000", "--run-dir", str(tmp_path / "run")]
    if name == "compare":
        options += ["--seeds", "1", "--lrs", "1"]
    done = run(name, *options, before=LITTLE_MEMORY)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith(f"{name}.py: error: ") and done.stderr.count("\n") == 1
    assert "there is not enough memory: " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_shortage_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(2**55)
    cuda = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB."
    )
    least = "there is not enough memory"
    for error, sentence in (
        (cpu.value, f"{least}: {2**57} bytes could not be allocated"),
        (cuda, f"{least}: 20.00 MiB could not be allocated"),
        (RuntimeError("CUDA error: out of memory"), f"{least}: some could not be allocated"),
        (MemoryError(), least),
        (MemoryError("8 networks would not fit"), "8 networks would not fit"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("out of memory"), None),
    ):
        assert _memory.shortage(error) == sentence


def test_no_memory_while_preparing_is_the_options_fault(script, refused, monkeypatch):
    def no_memory(*arguments, **more):
        raise MemoryError

    train = script("train")
    monkeypatch.setattr(nnce.data, "load", no_memory)
    assert "error: there is not enough memory\n" in refused(train.main)


# ------------------------------------------------------------------------------ what cannot be read


def redirected(redirection, *options):
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh"]
    train = [sys.executable, str(SCRIPTS / "train.py"), *options]
    return subprocess.run([*shell, *train], capture_output=True, text=True, timeout=120)


@posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("redirection", "status", "reason"),
    slow_unless(
        lambda redirection, *_: redirection == "2>&-",
        [
            (">&-", 1, "Bad file descriptor"),
            (">/dev/full", 1, "No space left on device"),
            ("2>&-", 0, None),
            ("<&- >&- 2>&-", 1, None),
        ],
    ),
)
def test_what_nobody_can_read_is_trained_all_the_same(redirection, status, reason, tmp_path):
    run_dir = tmp_path / "run"
    done = redirected(redirection, *QUICK["train"], "--run-dir", str(run_dir))
    assert done.returncode == status
    assert done.stderr == (f"train.py: error: standard output: {reason}\n" if reason else "")
    assert "| best on validation |" in done.stdout or status
    recorded = results(run_dir)
    assert len(recorded["epochs"]) == 4 and not recorded["interrupted"]
    # Nothing else has come into a file that took the number of a closed stream.
    assert nnce.load(run_dir / "network.pt").sizes == (64, 30, 10)


@posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("options", "redirection", "status"),
    [
        ("--help", ">/dev/full", 1),
        pytest.param("--lr=-1", "2>&-", 2, marks=pytest.mark.slow),
    ],
)
def test_help_and_mistakes_that_cannot_be_written(options, redirection, status):
    done = redirected(redirection, options)
    assert done.returncode == status and "Traceback" not in done.stderr
