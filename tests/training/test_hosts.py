"""One network trained by two hosts: network namespaces joined by a virtual link, over gloo."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import killed
import pytest
import torch
from conftest import ROOT

import nnce

TORCHRUN = Path(sys.executable).with_name("torchrun")
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


@pytest.fixture
def hosts():
    """Two namespaces, named by this process, each with an address of its own."""
    names = [f"nnce{os.getpid()}{letter}" for letter in "ab"]
    if not shutil.which("ip"):
        pytest.skip("the command ip is not installed")
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "veth0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "veth0",
            "netns",
            names[1],
        )
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on_host(hosts, number, folder, options):
    """Start the command of the page on one of them; their names do not resolve."""
    with open(folder / f"host{number}.txt", "w") as log:
        return subprocess.Popen(
            [
                *("ip", "netns", "exec", hosts[number], TORCHRUN, "--nnodes", "2"),
                *("--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "hosts"),
                *("--rdzv-endpoint", f"{ADDRESSES[0]}:29500", "--local-addr", ADDRESSES[number]),
                *("--rdzv-conf", f"is_host={1 - number}"),
                *(ROOT / "scripts" / "train.py", *options, "--run-dir", folder / "two"),
            ],
            # The name of this machine may be that of its loopback interface.
            env={
                **os.environ,
                **{"GLOO_SOCKET_IFNAME": "veth0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            },
            stdout=log,
            stderr=log,
        )


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(5, marks=pytest.mark.slow), pytest.param(25, marks=pytest.mark.exhaustive)],
)
def test_two_hosts_survive_a_link_that_is_down(seconds, hosts, tmp_path):
    """Their network has the parameters of one process, in float64."""
    options = ["--engine", "products", "--dtype", "float64", "--batch-size", "64", "--epochs", "30"]
    options += ["--checkpoint-every", "1"]
    jobs = [on_host(hosts, number, tmp_path, options) for number in (0, 1)]
    logs = [tmp_path / f"host{number}.txt" for number in (0, 1)]
    try:
        while len(list((tmp_path / "two").glob("checkpoint-*"))) < 2:  # in the middle of training
            assert all(job.poll() is None for job in jobs), [log.read_text() for log in logs]
            time.sleep(0.05)
        ip("-n", hosts[1], "link", "set", "veth0", "down")
        time.sleep(seconds)
        assert not (tmp_path / "two" / "results.json").exists()
        ip("-n", hosts[1], "link", "set", "veth0", "up")
        for job, log in zip(jobs, logs, strict=True):
            assert job.wait(timeout=120) == 0, log.read_text()
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    assert killed.loaded("train").main([*options, "--run-dir", str(tmp_path / "one")]) == 0
    one, two = (nnce.load(tmp_path / name / "network.pt").state_dict() for name in ("one", "two"))
    for name, parameter in one.items():
        torch.testing.assert_close(two[name], parameter, rtol=0, atol=1e-10, msg=name)
