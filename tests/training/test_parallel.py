"""One network trained by several processes, and many shared out over them, over gloo.

The processes are started by torchrun where one of them ends too soon, else forked.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed
import programs
import psutil
import pytest
import together
import torch
from conftest import ROOT

import nnce
from nnce import data, training
from nnce.experiments import command_line, directories, running
from nnce.training import Settings, parallel
from nnce.training.parallel import ALONE

TORCHRUN = Path(sys.executable).with_name("torchrun")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="torchrun and signals of POSIX")


def torchrun(processes, *command, restarts=0, **more):
    """Processes on this machine."""
    options = ["--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [str(TORCHRUN), *options, *map(str, command)], env=environment, text=True, **more
    )


def ended(processes):
    """The exit status of each process of a job."""
    return [process.wait(timeout=300) for process in processes]


@pytest.mark.parametrize("size", [3, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_several_processes_train_the_same_network(size, tmp_path):
    """As one does on the same mini-batches, the short last ones included."""
    work = f"import together\ntogether.train_all({str(tmp_path)!r})"
    with programs.job(size, "", before=work) as processes:
        assert ended(processes) == [0] * size, [process.output() for process in processes]
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == together.CASES.keys() and len(found) == 20
    for name, settings in together.CASES.items():
        for parameter, expected in together.trained(settings, ALONE).items():
            torch.testing.assert_close(
                found[name][parameter], expected, rtol=0, atol=1e-12, msg=f"{name}, {parameter}"
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--lrs", "1"], ["--sweep", "lr=0.3,1", "hidden=9,8-6"]], ids=["losses", "sweep"]
)
def test_networks_shared_out_over_processes_are_the_same_bits(options, tmp_path):
    """More networks of one kind than processes, and fewer controls."""
    options = ["--epochs", "2", "--seeds", "3", "--train-size", "200", *options]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert programs.run("compare", *options, "--run-dir", str(alone)).returncode == 0
    with programs.job(2, "compare", *options, "--run-dir", str(shared)) as processes:
        assert ended(processes) == [0, 0], [process.output() for process in processes]
    outcomes = [killed.outcome(alone), killed.outcome(shared)]
    for outcome in outcomes:
        for of_processes in ("side by side", "controls"):  # as many parts as processes
            outcome.pop(of_processes, None)
    assert killed.differences(*outcomes) == []


def begun(tmp_path, *options, **more):
    """A job of two processes in the midst of its work."""
    run_dir = tmp_path / "run"
    command = [ROOT / "scripts" / "train.py", *options, "--run-dir", run_dir]
    with (tmp_path / "out").open("w") as out:
        job = torchrun(2, *command, stdout=out, stderr=subprocess.STDOUT, **more)
    while "epoch   1" not in (tmp_path / "out").read_text():
        assert job.poll() is None, (tmp_path / "out").read_text()
        time.sleep(0.05)
    return job, run_dir


def is_running(worker):
    try:
        return worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def workers(job):
    """The processes of a job, in the order of their ranks."""
    children = psutil.Process(job.pid).children()
    return sorted(children, key=lambda child: int(child.environ().get("RANK", 99)))


@pytest.mark.parametrize(
    "rank",
    [pytest.param(0, marks=pytest.mark.exhaustive), pytest.param(1, marks=pytest.mark.slow)],
)
def test_a_killed_worker_is_noticed_and_the_job_goes_on_by_itself(rank, tmp_path):
    """From its last checkpoint, to the same bits."""
    options = ["--epochs", "8", "--engine", "functions", "--checkpoint-every", "0.2s"]
    alone, draw = str(tmp_path / "alone"), "import undrawn\nundrawn.restore()"
    with programs.job(2, "train", *options, "--run-dir", alone, before=draw) as processes:
        assert ended(processes) == [0, 0]
    job, run_dir = begun(tmp_path, *options, restarts=1)
    first = workers(job)
    first[rank].kill()
    deadline = time.monotonic() + 120
    while any(map(is_running, first)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert job.wait(timeout=300) == 0, (tmp_path / "out").read_text()
    assert "resumed after step" in (tmp_path / "out").read_text()
    assert "--resume" not in (tmp_path / "out").read_text()
    expected, found = killed.outcome(tmp_path / "alone"), killed.outcome(run_dir)
    assert killed.differences(expected, found) == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["backprop", "functions"])
def test_processes_stop_together_where_patience_ends(engine, tmp_path):
    options = ["--patience", "2", "--train-size", "300", "--engine", engine]
    with programs.job(2, "train", *options, "--run-dir", str(tmp_path / "run")) as processes:
        assert ended(processes) == [0, 0], [process.output() for process in processes]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    accuracies = [record["accuracy"]["validation"] for record in results["epochs"]]
    assert results["stopped_early"] and len(accuracies) < 31
    assert accuracies.index(max(accuracies)) == results["best"]["epoch"] == len(accuracies) - 3
    best = nnce.load(tmp_path / "run" / "best.pt")
    validation = data.load("digits").validation
    assert training.evaluate(best, validation, "cross-entropy").accuracy == max(accuracies)


@pytest.mark.slow
def test_a_killed_worker_takes_the_job_down(tmp_path):
    """Without restarts, and it is said why."""
    job, run_dir = begun(tmp_path, "--epochs", "100000")
    workers(job)[1].kill()
    assert job.wait(timeout=120) != 0
    out = (tmp_path / "out").read_text()
    assert "rank      : 1" in out and "Signal 9" in out
    assert any(run_dir.glob("checkpoint-*"))
    command = rf"torchrun --nproc-per-node 2 \S*train\.py --resume {run_dir}\n"
    assert re.search(
        rf"process 0 lost its connection to another one: .*; resume with:\n\S*{command}", out
    )


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive),
    ],
)
def test_a_job_that_is_asked_to_stop_saves_once_and_leaves(number, tmp_path):
    """Ctrl-C reaches all processes, and torchrun sends it to them once more."""
    job, run_dir = begun(tmp_path, "--epochs", "100000", start_new_session=True)
    os.killpg(job.pid, number)
    assert job.wait(timeout=120) != 0
    out = (tmp_path / "out").read_text()
    assert out.count("Interrupted after step") == 1
    assert re.search(rf"torchrun --nproc-per-node 2 \S*train\.py --resume {run_dir}\n", out)
    assert not list(run_dir.glob(".unfinished*"))


@pytest.mark.slow
def test_what_is_wrong_is_said_once(tmp_path):
    job = torchrun(
        2,
        ROOT / "scripts" / "train.py",
        *("--engine", "loops", "--run-dir", tmp_path / "run"),
        stderr=subprocess.PIPE,
    )
    _, err = job.communicate(timeout=120)
    assert job.returncode != 0
    assert err.count("train.py: error: ") == 1
    assert "expected an --engine other than 'loops' for several processes" in err


@pytest.fixture
def of_a_job(monkeypatch):
    """This process as one of two of a job."""

    def become(rank):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))

    return become


def test_an_engine_for_one_process_alone_is_refused_to_several():
    settings = Settings((3,), engine="loops")
    with pytest.raises(ValueError, match="an engine other than 'loops' for several processes"):
        training.initial_state(settings, together.dataset(), parallel.World(0, 2, joined=True))


@pytest.mark.parametrize(("rank", "where"), [(0, ""), (1, "process 1: ")])
def test_the_first_process_has_the_time_to_say_what_is_wrong(
    rank, where, of_a_job, monkeypatch, capsys
):
    """The other one waits, in which torchrun ends it; where it is not ended, it says it itself."""
    of_a_job(rank)
    waits = []

    def wait(seconds):
        assert capsys.readouterr().err == ""  # nothing is said before
        waits.append(seconds)

    monkeypatch.setattr("time.sleep", wait)
    with pytest.raises(SystemExit, match="2"):
        command_line.ArgumentParser(None).error("no such folder")
    assert capsys.readouterr().err.endswith(f"error: {where}no such folder\n")
    assert (sum(waits) > 1) == (rank == 1)


def test_a_job_that_has_lost_a_process_says_how_to_go_on(of_a_job, tmp_path, monkeypatch):
    """Unless torchrun will restart it."""
    of_a_job(0)
    commands = {}
    gone = RuntimeError("[gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:29500")
    for restarts in ("1", "0"):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        run_dir = tmp_path / restarts
        with (
            pytest.raises(running.Failed) as failed,
            directories.run_directory(run_dir, "") as path,
        ):
            directories.keep(path)
            raise gone
        sentence, *how = str(failed.value).splitlines()
        assert re.match(
            r"process 0 lost its connection to another one: .*Connection closed by peer", sentence
        )
        assert f"finished results are kept in {run_dir}" in sentence
        commands[restarts] = how
    assert commands["1"] == []
    (command,) = commands["0"]
    assert re.search(rf"torchrun --nproc-per-node 2 \S+ --resume {run_dir}$", command)


def test_one_process_alone_asks_nobody():
    assert parallel.join() is ALONE
    order = torch.arange(5)
    assert ALONE.share(order).equal(order)
    assert ALONE.largest(3) == 3 and ALONE.gather("a") == ALONE.exchange("a") == ["a"]
    assert ALONE.broadcast("a") == "a"
    parallel.leave()
