"""Checkpoints and resuming: options, contents and times of checkpoints."""

import argparse
import contextlib
import math
import os
import re
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nnce import training
from nnce.experiments import command_line, directories, report, running
from nnce.experiments.command_line import ArgumentParser
from nnce.training import checkpoints, mismatch_is_value_error, parallel
from nnce.training.checkpoints import CheckpointError
from nnce.training.parallel import World

# Options that may differ on resuming: they change no result, or only its rounding.
_MAY_CHANGE = ("epochs", "patience", "checkpoint_every", "data_dir", "threads", "resume", "quiet")
# Options that may only increase, because the run may already be beyond a lower value.
_MAY_RISE = ("epochs", "patience")
# Steps between two exchanges on whether to save or stop, with several processes.
_STEPS_PER_POLL = 10


def add_options(parser: ArgumentParser) -> None:
    """Add --checkpoint-every and --resume."""
    add = parser.add_argument
    interval = "checkpoint interval: epochs (5) or seconds (30s); a stopped run also saves one"
    add("--checkpoint-every", type=_every, default="1", metavar="EPOCHS", help=interval)
    stopped = (
        "run directory of a stopped or killed run to continue, with its own options and "
        "bit-identical results; --epochs may be increased"
    )
    add("--resume", type=Path, metavar="RUN_DIR", help=stopped)


def _every(text: str) -> str:
    """Parse --checkpoint-every: an integer, or a number followed by s."""
    seconds = re.fullmatch(r"(\d{1,9}(\.\d{1,9})?)s", text)
    epochs = re.fullmatch(r"\d{1,9}", text)
    if not (epochs and int(text)) and not (seconds and float(seconds[1])):
        raise argparse.ArgumentTypeError(
            f"expected epochs (such as 5) or seconds (such as 30s), got {text!r}"
        )
    return text


# ------------------------------------------------------------------------------- options


class Start(NamedTuple):
    """Options of a run, and the checkpoint that it is resumed from."""

    options: argparse.Namespace
    """Options from the command line and, for a resumed run, from its checkpoint."""
    found: dict[str, Any] | None
    """Content of the checkpoint; None for a new run."""
    run_dir: Path | None
    """Directory of the resumed run; None for a new run."""
    command: str
    """Command that started the run."""

    @contextlib.contextmanager
    def directory(self, parser: ArgumentParser, name: str, **more: Any) -> Iterator[Path]:
        """Context with the run directory; signals are delayed to the end of a step or block."""
        options = argparse.Namespace(**vars(self.options))
        if self.run_dir is not None:
            options.run_dir, options.name = self.run_dir, None
            more["resumed"] = True
        with running.undisturbed(), parser.run_directory(options, name, **more) as path:
            yield path
            running.ignore_pending()  # the run is finished and everything is written


def start(
    parser: ArgumentParser, arguments: Sequence[str] | None, script: str, world: World
) -> Start:
    """Parse the options and, for --resume, read the checkpoint.

    After a restart by `torchrun`, the job's own checkpoint is resumed automatically. Rank 0 reads
    the file. Exits with status 2 and a one-line error if there is no valid checkpoint of the script
    or the options contradict it.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = shlex.join([f"scripts/{script}", *arguments])
    options = parser.parse_args(arguments)
    run_dir: Path | None = options.resume
    found: dict[str, Any] | None = None
    wrong = ""
    if world.rank == 0:
        if run_dir is None and parallel.under_torchrun():
            run_dir = _run_of_this_job(options)
        try:
            found = None if run_dir is None else _read(run_dir, script)
        except ValueError as error:
            wrong = f"--resume {run_dir}: {error}"
    # All processes must see the same error.
    run_dir, found, wrong = world.broadcast((run_dir, found, wrong))
    if wrong:
        parser.error(wrong)
    if found is None:
        return Start(options, None, None, command)
    begun = f"--resume {run_dir}: the run was started with"
    parser.set_recorded(found["config"], begun, skip=("quiet",))
    recorded = parser.parse_args([])
    recorded.quiet = options.quiet
    if options.resume is None:  # restarted by torchrun, with the same arguments
        return Start(recorded, found, run_dir, found["command"])
    requested = parser.parse_args(arguments)
    positional = [action.dest for action in parser._actions if not action.option_strings]
    if any(getattr(options, name) for name in positional):  # if any is given, all are
        for name in positional:
            setattr(requested, name, getattr(options, name))
    try:
        for name, value in vars(requested).items():
            typed = name if name in positional else command_line.option(name)
            _check_change(name, typed, getattr(recorded, name), value, run_dir)
    except ValueError as error:
        parser.error(str(error))
    requested.resume = None
    return Start(requested, found, run_dir, found["command"])


def _check_change(name: str, typed: str, was: Any, value: Any, run_dir: Path | None) -> None:
    """Raise ValueError if the value of an option may not change to `value` on resuming."""
    if name in _MAY_RISE and value != was and (was is None or value < was):
        raise ValueError(
            f"{typed} {value}: may only increase on resuming; the run has {was or 'no limit'}"
        )
    if value != was and name not in _MAY_CHANGE:
        raise ValueError(
            f"{typed} {_as_typed(value)}: the run in {run_dir} was started with "
            f"{_as_typed(was)}; omit it, or start a new run"
        )


def _run_of_this_job(options: argparse.Namespace) -> Path | None:
    """Find the run directory that this torchrun job created before it was restarted."""
    by_name = Path("runs").glob(f"*-{directories.date_and_time()}*")
    for run_dir in [options.run_dir] if options.run_dir else sorted(by_name):
        if not run_dir.is_dir():
            continue
        with contextlib.suppress(CheckpointError, OSError):
            found = checkpoints.latest_checkpoint(run_dir)
            if found is not None and directories.is_this_job(str(found.content.get("job"))):
                return Path(run_dir)
        directories.remove_leftovers_of_this_job(run_dir)
    return None


def _as_typed(value: object) -> str:
    """Format an option's value as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _read(run_dir: Path, script: str) -> dict[str, Any]:
    """Read the latest checkpoint of a run; raises ValueError if nothing can be resumed."""
    try:
        if not run_dir.is_dir():
            raise ValueError("there is no such folder")
        found = checkpoints.latest_checkpoint(run_dir)
    except OSError as error:
        raise ValueError(f"the folder cannot be read: {error.strerror}") from error
    if found is None:
        if directories.is_without_result(run_dir):
            raise ValueError(
                "the run was killed before its first checkpoint: start it again without --resume"
            )
        raise ValueError(f"the folder has no checkpoint of {script}")
    of = found.content.get("script")
    if of != script:
        raise ValueError(f"expected a run of {script}, got one of {of}")
    if not _has_header(found.content):
        raise ValueError(f"{found.path} does not record the options of the run")
    for damage in found.damaged:
        print(f"{damage}; continuing from the previous one, {found.path}", file=sys.stderr)
    return found.content


def _has_header(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has the entries of `header`, with values of the expected types."""
    recorded = content.get("circumstances")
    return (
        isinstance(content.get("config"), dict)
        and isinstance(recorded, dict)
        and all(isinstance(value, str | int | float | None) for value in recorded.values())
        and isinstance(content.get("command"), str)
    )


# ------------------------------------------------------------------------ contents of a checkpoint


def circumstances(world: World) -> dict[str, Any]:
    """Versions, threads and hardware that the rounding of results depends on."""
    return {
        **report.versions(),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "processes": world.size,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def header(
    script: str, config: Mapping[str, object], world: World, command: str = ""
) -> dict[str, Any]:
    """Entries common to the checkpoints of all scripts."""
    return {
        "script": script,
        "job": directories.job(),
        "config": {n: str(v) if isinstance(v, Path) else v for n, v in config.items()},
        "circumstances": circumstances(world),
        "command": command,
    }


def warn(found: Mapping[str, Any], world: World) -> None:
    """Warn on standard error if the circumstances of the run have changed."""
    now, then = circumstances(world), found["circumstances"]
    changed = ", ".join(
        f"{name} {now.get(name, 'unknown')} (was {value})"
        for name, value in then.items()
        if now.get(name) != value
    )
    if changed and world.rank == 0:
        print(f"Resumed with {changed}: rounding may differ.", file=sys.stderr)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Context for loading a checkpoint: content that does not fit raises ValueError."""
    try:
        with mismatch_is_value_error():
            yield
    except ValueError as error:
        why = textwrap.shorten(str(error), 200)  # the value may be long
        raise ValueError(f"the checkpoint does not fit its configuration: {why}") from error


# -------------------------------------------------------------------------------- writing


class Saver:
    """Writes checkpoints when they are due, and stops a run between two steps.

    Args:
        run_dir: the run directory; None in processes that do not write checkpoints.
        every: value of --checkpoint-every.
        content: returns the content of a checkpoint; called in every process.
        flush: flushes all other files to disk, before a checkpoint is written.
        world: the processes.
    """

    def __init__(
        self,
        run_dir: Path | None,
        every: str,
        content: Callable[[], Mapping[str, Any]],
        flush: Callable[[], None],
        world: World,
    ) -> None:
        self._run_dir, self._content, self._flush, self._world = run_dir, content, flush, world
        seconds = every.endswith("s")
        self._seconds = float(every[:-1]) if seconds else math.inf
        self._epochs = 0 if seconds else int(every)
        self._saved, self._calls = time.monotonic(), 0

    def between(self, ask: int = _STEPS_PER_POLL) -> None:
        """Save if a checkpoint is due, and stop if a signal is pending; call between steps.

        Several processes exchange whether to do so at every `ask`-th call.
        """
        # 0 to continue, 1 to save, 1 + number for a signal (SIGHUP is number 1).
        number = running.waiting()
        code = 1 + number if number else int(self._is_time())
        if self._world.size > 1:
            self._calls += 1
            if self._calls % ask:
                return
            code = self._world.largest(code)
        if code == 1:
            self.save()
        elif code:
            running.stop(code - 1)
            running.raise_pending()

    def after(self, epoch: int, *, is_last: bool) -> None:
        """Save if a checkpoint is due, and stop if a signal is pending; call after an epoch.

        After the last one, a signal is left pending: there may be no step left to stop before.
        """
        due = self._world.largest(int(self._is_time()))
        at_epoch = bool(epoch and self._epochs and epoch % self._epochs == 0)
        if due or at_epoch or is_last:
            self.save()
        if not is_last:
            self.between(ask=1)

    def _is_time(self) -> bool:
        return time.monotonic() - self._saved >= self._seconds

    def save(self) -> None:
        """Write a checkpoint; processes that hold parts of it wait for each other."""
        content = self._content()
        if self._run_dir is not None:
            self._flush()
            checkpoints.write_checkpoint(self._run_dir, content)
        self._saved = time.monotonic()


# ------------------------------------------------------------------------------- end of a run


class Ending:
    """Context for training that delays exceptions until the results so far are written.

    `has_results` tells whether there are any if the run stops now; `save` writes a checkpoint.
    """

    def __init__(
        self, run_dir: Path, has_results: Callable[[], bool], save: Callable[[], None]
    ) -> None:
        self._run_dir, self._has_results, self._save = run_dir, has_results, save
        self.stopped: BaseException | None = None

    def __enter__(self) -> "Ending":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        can_resume = isinstance(error, KeyboardInterrupt | BrokenPipeError)
        if can_resume:
            self._save()
            directories.keep(self._run_dir)
        delayed = isinstance(error, OSError | training.Diverged) and self._has_results()
        if can_resume or delayed:
            self.stopped = error
        return self.stopped is not None

    def close(self, interrupted: str) -> None:
        """Raise the exception that stopped the run; after Ctrl-C, print the command to resume."""
        if isinstance(self.stopped, KeyboardInterrupt):
            resume = directories.command_to_resume(self._run_dir)
            print(f"{interrupted}\n{resume}", file=sys.stderr)
        if self.stopped is not None:
            raise self.stopped
