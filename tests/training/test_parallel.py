"""One network trained by several processes, and many shared out over them, over gloo."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed
import psutil
import pytest
import together
import torch
from conftest import ROOT

from nnce.experiments.command_line import ArgumentParser
from nnce.training import parallel
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


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.exhaustive), 3])
def test_several_processes_train_the_same_network(processes, tmp_path):
    """As one does on the same mini-batches, the short last ones included, every engine."""
    job = torchrun(processes, ROOT / "tests" / "together.py", tmp_path)
    assert job.wait(timeout=300) == 0
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == together.CASES.keys() and len(found) == 20
    for name, settings in together.CASES.items():
        for parameter, expected in together.trained(settings, ALONE).items():
            torch.testing.assert_close(
                found[name][parameter], expected, rtol=0, atol=1e-12, msg=f"{name}, {parameter}"
            )


def test_networks_shared_out_over_processes_are_the_same_bits(tmp_path):
    """More networks of one kind than processes, and fewer controls."""
    options = ["--epochs", "2", "--seeds", "3", "--lrs", "1", "--train-size", "200"]
    outcomes = []
    for name in ("alone", "shared"):
        command = [ROOT / "scripts" / "compare.py", *options, "--run-dir", tmp_path / name]
        if name == "alone":
            job = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
        else:
            job = torchrun(2, *command, stdout=subprocess.DEVNULL)
        assert job.wait(timeout=300) == 0
        outcomes.append(killed.outcome(tmp_path / name))
        for of_processes in ("side by side", "controls"):  # as many parts as processes
            del outcomes[-1][of_processes]
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


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
def test_a_killed_worker_is_noticed_and_the_job_goes_on_by_itself(rank, tmp_path):
    """From its last checkpoint, to the same bits."""
    options = ["--epochs", "8", "--engine", "functions", "--checkpoint-every", "0.2s"]
    alone = torchrun(
        2, ROOT / "scripts" / "train.py", *options, "--run-dir", tmp_path / "alone",
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert alone.wait(timeout=300) == 0
    job, run_dir = begun(tmp_path, *options, restarts=1)
    first = workers(job)
    first[rank].kill()
    deadline = time.monotonic() + 120
    while any(map(is_running, first)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert job.wait(timeout=300) == 0, (tmp_path / "out").read_text()
    assert "going on after step" in (tmp_path / "out").read_text()
    assert "--resume" not in (tmp_path / "out").read_text()
    expected, found = killed.outcome(tmp_path / "alone"), killed.outcome(run_dir)
    assert killed.differences(expected, found) == []


def test_a_killed_worker_takes_the_job_down(tmp_path):
    """Without restarts, and it is said why."""
    job, run_dir = begun(tmp_path, "--epochs", "100000")
    workers(job)[1].kill()
    assert job.wait(timeout=120) != 0
    out = (tmp_path / "out").read_text()
    assert "rank      : 1" in out and "Signal 9" in out
    assert any(run_dir.glob("checkpoint-*"))
    command = rf"torchrun --nproc-per-node 2 \S*train\.py --resume {run_dir}\n"
    assert re.search(rf"process 0 has lost another one: .*; to go on:\n\S*{command}", out)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive)]
)
def test_a_job_that_is_asked_to_stop_saves_once_and_leaves(number, tmp_path):
    """Ctrl-C comes to all processes, and torchrun passes it on to them once more."""
    job, run_dir = begun(tmp_path, "--epochs", "100000", start_new_session=True)
    os.killpg(job.pid, number)
    assert job.wait(timeout=120) != 0
    out = (tmp_path / "out").read_text()
    assert out.count("Interrupted after step") == 1
    assert re.search(rf"torchrun --nproc-per-node 2 \S*train\.py --resume {run_dir}\n", out)
    assert not list(run_dir.glob(".unfinished*"))


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
    assert "expected another engine than 'loops' for several processes" in err


def test_the_first_process_has_the_time_to_say_what_is_wrong(tmp_path):
    script = tmp_path / "late.py"
    script.write_text(
        "import time\n"
        "from nnce import parallel\n"
        "from nnce.experiments import command_line\n"
        "def main():\n"
        "    if parallel.is_first():\n"
        "        time.sleep(1)\n"
        "    command_line.ArgumentParser(None).error('expected something else')\n"
        "command_line.run_script(main)\n"
    )
    job = torchrun(2, script, stderr=subprocess.PIPE)
    _, err = job.communicate(timeout=120)
    assert job.returncode != 0
    assert re.findall(r"late.py: error: .*", err) == ["late.py: error: expected something else"]


def test_what_is_wrong_with_another_process_alone_is_said_by_it(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(parallel, "_MOMENT", 0.0)
    with pytest.raises(SystemExit, match="2"):
        ArgumentParser(None).error("no such folder")
    assert capsys.readouterr().err.endswith("error: process 1: no such folder\n")


def test_one_process_alone_asks_nobody():
    assert parallel.join() is ALONE
    order = torch.arange(5)
    assert ALONE.share(order).equal(order)
    assert ALONE.largest(3) == 3 and ALONE.gather("a") == ALONE.exchange("a") == ["a"]
    assert ALONE.broadcast("a") == "a"
    parallel.leave()
