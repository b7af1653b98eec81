import math
import subprocess
import sys
import time

import pytest
import torch

from nnce.experiments import timing
from nnce.experiments.timing import Timing, in_turns, peak_memory, seconds_of

CPU = torch.device("cpu")


def test_medians_and_ratios():
    found = Timing.of([2.0, 8.0, 3.0], [1.0, 2.0, 3.0])
    assert found == Timing(3.0, 2.0, 1.0, 4.0, 3)
    assert math.isnan(Timing().seconds) and Timing().repetitions == 0


def test_the_preparation_of_a_turn_is_not_timed():
    calls = []

    seconds = {"a": 0.002, "b": 0}

    def prepare(name):
        time.sleep(0.05)
        calls.append(("prepare", name))
        return lambda: (time.sleep(seconds[name]), calls.append(("run", name)))

    found = in_turns(seconds, prepare, 4, CPU, "")
    assert {name: len(times) for name, times in found.items()} == {"a": 4, "b": 4}
    assert all(seconds >= 0.002 for seconds in found["a"])
    assert min(found["a"]) < 0.05 and min(found["b"]) < 0.05
    assert calls[::2] == [("prepare", name) for _, name in calls[1::2]]
    turns = [tuple(name for _, name in calls[i : i + 4 : 2]) for i in range(0, 16, 4)]
    assert {frozenset(turn) for turn in turns} == {frozenset("ab")}
    assert len(set(turns)) == 2  # the order differs between turns


def test_the_mean_of_several_calls():
    calls = []
    seconds = seconds_of(lambda: calls.append(time.sleep(0.01)), CPU, times=3)
    assert len(calls) == 3 and seconds >= 0.01


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory():
    """In a process of its own: memory that this one has freed would not show."""
    code = """
import torch
from nnce.experiments.timing import peak_memory, resident
def call():
    torch.ones(25_000_000).sum()  # freed again: 100 MB
    return torch.ones(5_000_000)
kept, peak = peak_memory(call, torch.device("cpu"))
assert len(kept) == 5_000_000 and 95e6 < peak < 130e6, peak
_, later = peak_memory(lambda: None, torch.device("cpu"))
assert later < 10e6, later
assert resident(peak=True) >= resident() > 20e6
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_peak_memory_where_it_is_unknown(monkeypatch):
    class Read:
        def __init__(self, *_):
            pass

        def write_text(self, _):
            raise PermissionError

    monkeypatch.setattr(timing, "Path", Read)
    result, peak = peak_memory(lambda: 3, CPU)
    assert result == 3 and math.isnan(peak)


def test_other_programs_are_noticed():
    neighbors = timing.Neighbors()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(1.0)
        assert neighbors.share() > 0.1
    finally:
        busy.kill()
        busy.wait()
