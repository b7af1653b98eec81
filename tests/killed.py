"""Runs of train.py, compare.py and labels.py that are killed over and over, and resumed.

A process of its own, which imports everything once and then forks a process for each run:

    python tests/killed.py SCRIPT FOLDER KILLS SEED FIGURES OPTIONS…

with figures `drawn` or `empty` (tests/undrawn.py), prints how many kills there were, at how many of
them something was being written, and how often the run was asked to stop between (SIGINT, SIGTERM,
SIGHUP). It fails unless what comes out in the end is, bit for bit, the outcome of a run that is
left alone.
"""

import contextlib
import csv
import functools
import importlib
import importlib.util
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import programs

ROOT = Path(__file__).parent.parent
# What differs from run to run: how long it took, and where it was.
POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A signal may also come before there is anything that listens, or when all is done.
STOPPED = {128 + number for number in POLITE} | {-number for number in POLITE}
_MEMORY = ("memory", "answer")
TIMES = (
    *("minutes", "seconds", "seconds_of", "training_seconds", "seconds a network", "run_dir"),
    *("date", "commit", "git"),  # a file of the checkout may be written while a test runs
)


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [without_times(item) for item in value]
    return value


def rows(path):
    with path.open(newline="") as file:
        return [without_times(row) for row in csv.DictReader(file)]


def curves(folder):
    """Every point of every curve, and the steps of all else, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    return {
        **{
            ("scalar", tag): [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in tags["scalars"]
        },
        **{
            ("histogram", tag): [
                (event.step, event.histogram_value) for event in events.Histograms(tag)
            ]
            for tag in tags["histograms"]
        },
        **{("image", tag): [e.step for e in events.Images(tag)] for tag in tags["images"]},
        **{
            ("tensor", tag): [e.step for e in events.Tensors(tag)]
            for tag in tags["tensors"]
            if "hparams" not in tag
        },
    }


def outcome(run_dir):
    """All results of a run, without times and paths."""
    import torch

    import nnce

    results = (run_dir / "results.json").read_text().replace(str(run_dir), "RUN_DIR")
    found = {"results": without_times(json.loads(results))}
    folders = sorted({path.parent for path in run_dir.rglob("events.out.tfevents.*")})
    for folder in folders:
        found["curves", folder.relative_to(run_dir)] = curves(folder)
    for path in run_dir.glob("*.pt"):
        state = nnce.load(path).state_dict()
        found[path.name] = {name: tensor.tolist() for name, tensor in state.items()}
    if (run_dir / "model.npz").exists():  # of labels.py, whose answer tells the memory
        found["results"] = {k: v for k, v in found["results"].items() if k not in _MEMORY}
        for path in (run_dir / "model.npz", max(run_dir.glob("state-*.npz"))):
            with np.load(path) as arrays:
                found[path.name] = {name: arrays[name].tobytes() for name in arrays}
    if (run_dir / "epochs.csv").exists():
        found["csv"] = rows(run_dir / "epochs.csv")
    for path in run_dir.glob("*.png"):
        found[path.name] = path.read_bytes()
    content = nnce.training.checkpoints.latest_checkpoint(run_dir).content

    def plain(value):
        if isinstance(value, torch.Tensor):
            return (value.dtype, tuple(value.shape), value.numpy().tobytes())
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key not in TIMES}
        return [plain(item) for item in value] if isinstance(value, list) else value

    # Everything but the records, whose times are in them; those are in results and CSV.
    for part in ("state", "side by side", "controls"):
        if content.get(part) is not None:
            found[part] = plain({k: v for k, v in content[part].items() if k != "records"})
    left = [path.name for path in run_dir.iterdir() if path.name.startswith(".")]
    assert not left, left
    return found


def differences(a, b, place=""):
    """Where two outcomes differ, in words."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{place}: {set(a) ^ set(b)}"]
        return [d for key in a for d in differences(a[key], b[key], f"{place}/{key}")]
    same = a == b or (a != a and b != b)
    return [] if same else [f"{place}: {str(a)[:200]} and {str(b)[:200]}"]


def several_stops_in_an_epoch():
    """Without a graph, too, where so few digits are taken at once."""
    from nnce.engines import ensemble, products

    ensemble.CHUNK_WORK, products.BLOCK_BYTES = 200_000, 30_000


def stopped_after(monkeypatch, calls):
    """The so-manieth time that it may, a run stops, as if a signal had come."""
    from nnce.experiments import resuming

    count = iter(range(calls))
    whole = resuming.Saver.between

    def between(self, *arguments, **more):
        if next(count, None) is None:
            monkeypatch.setattr(resuming.Saver, "between", whole)
            raise KeyboardInterrupt
        return whole(self, *arguments, **more)

    monkeypatch.setattr(resuming.Saver, "between", between)


def forked(work, log):
    """Do something in a process of its own; its number."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


def run(name, arguments, log, dies_at=None):
    """Begin a run in a process of its own; its number.

    With `dies_at` it kills itself at the so-manieth call of what puts a file into its place.
    """

    def work():
        from nnce.experiments import running

        if dies_at is not None:
            calls = iter(range(dies_at))

            def counted(whole):
                def call(*arguments, **more):
                    if next(calls, None) is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return whole(*arguments, **more)

                return call

            for call in ("fsync", "replace", "unlink"):
                setattr(os, call, counted(getattr(os, call)))
        sys.argv = [str(ROOT / "scripts" / f"{name}.py"), *arguments]
        running.run_script(loaded(name).main)

    return forked(work, log)


def status_of(child):
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def check(run_dir, alone):
    """Fail unless two runs have the same results."""
    wrong = differences(outcome(alone), outcome(run_dir))
    assert not wrong, (run_dir, wrong[:5])


def main(name, folder, kills, seed, figures, *options):
    # All that a run imports, once. Nothing else is done here: threads would not be in a fork.
    for module in programs.PRELOADED:
        importlib.import_module(module)
    loaded(name)
    if figures == "empty":
        import undrawn

        undrawn.replace()
    several_stops_in_an_epoch()
    chance = random.Random(int(seed))
    folder, kills = Path(folder), int(kills)
    folder.mkdir(exist_ok=True)
    alone, log = folder / "alone", folder / "log"
    began = time.monotonic()
    assert status_of(run(name, [*options, "--run-dir", str(alone)], log)) == 0, log.read_text()
    lasts = time.monotonic() - began
    killed = in_writes = asked = chains = 0
    while killed < kills:
        run_dir = folder / f"chain-{chains}"
        chains += 1
        while True:
            begun = any(run_dir.glob("checkpoint-*"))  # or the same command begins again
            arguments = (
                ["--resume", str(run_dir)] if begun else [*options, "--run-dir", str(run_dir)]
            )
            hows = ("time", "write", "ask", "not") if killed < kills else ("not",)
            how = chance.choices(hows, (5, 5, 2, 1)[-len(hows) :])[0]
            child = run(name, arguments, log, chance.randrange(60) if how == "write" else None)
            if how in ("time", "ask"):
                time.sleep(chance.random() * lasts / 2)
                number = signal.SIGKILL if how == "time" else chance.choice(POLITE)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)
            status = status_of(child)
            killed += status == -signal.SIGKILL
            in_writes += status == -signal.SIGKILL and how == "write"
            asked += status in STOPPED
            if status != -signal.SIGKILL and status not in STOPPED:
                assert status == 0, (how, status, log.read_text()[-2000:])
                break
        checks = forked(functools.partial(check, run_dir, alone), log)
        assert status_of(checks) == 0, log.read_text()[-2000:]
    print(f"{killed} kills, {in_writes} of them in writes, {asked} stops, {chains} runs: the same")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(*sys.argv[1:])
