"""Checkpoints and resuming: when a checkpoint is written, and how a run continues from one."""

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
from nnce.experiments import command_line, report
from nnce.experiments.command_line import ArgumentParser
from nnce.training import checkpoints, mismatch_is_value_error, parallel
from nnce.training.checkpoints import CheckpointError
from nnce.training.parallel import ALONE, World

# Options that change no number, or only its rounding, may differ when a run is resumed.
_MAY_CHANGE = ("epochs", "patience", "checkpoint_every", "data_dir", "threads", "resume", "quiet")
# Those of them that may only be raised, since the run is beyond a lower value.
_MAY_RISE = ("epochs", "patience")
# Steps between which the processes of a job do not ask each other whether to stop.
_STEPS_UNASKED = 10


def add_options(parser: ArgumentParser) -> None:
    """--checkpoint-every and --resume."""
    parser.add_argument(
        "--checkpoint-every",
        type=_every,
        default="1",
        metavar="EPOCHS",
        help="checkpoint interval: epochs (5) or seconds (30s); a run that is stopped saves, too",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="RUN_DIR",
        help="go on with a run that was stopped or killed, with its own options, bit for bit as if "
        "it had not been; more --epochs than it was begun with may be asked for",
    )


def _every(text: str) -> str:
    """`--checkpoint-every`, checked: a whole number, or a number and an s."""
    seconds = re.fullmatch(r"(\d{1,9}(\.\d{1,9})?)s", text)
    epochs = re.fullmatch(r"\d{1,9}", text)
    if not (epochs and int(text)) and not (seconds and float(seconds[1])):
        raise argparse.ArgumentTypeError(
            f"expected a number of epochs, 5 say, or of seconds, 30s say, got {text!r}"
        )
    return text


# ------------------------------------------------------------------------------- options


class Start(NamedTuple):
    """Options and checkpoint that a run starts from."""

    options: argparse.Namespace
    """Those on the command line, or of the run that is resumed."""
    found: dict[str, Any] | None
    """The content of its checkpoint."""
    run_dir: Path | None
    """Position from which it continues."""
    command: str
    """The script's command; for a resumed run the one that started it."""

    @contextlib.contextmanager
    def directory(
        self, parser: ArgumentParser, name: str, *, dry_run: bool = False, world: World = ALONE
    ) -> Iterator[Path]:
        """The run's directory; signals wait for the end of a step or of the block."""
        options, resumed = argparse.Namespace(**vars(self.options)), self.found is not None
        if self.run_dir is not None:
            options.run_dir, options.name = self.run_dir, None
        with (
            command_line.undisturbed(),
            parser.run_directory(
                options, name, dry_run=dry_run, resumed=resumed, world=world
            ) as path,
        ):
            yield path


def start(
    parser: ArgumentParser, arguments: Sequence[str] | None, script: str, world: World
) -> Start:
    """Parse the options and, for --resume, read the checkpoint.

    A job that `torchrun` has restarted resumes by itself from its checkpoint, if it has one. Exits
    with status 2 and a sentence if there is no good checkpoint, or the options contradict it.

    Args:
        parser: the script's parser.
        arguments: those of the command line; None for sys.argv's.
        script: the script's name, recorded in its checkpoints.
        world: the processes; rank 0 reads the file.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = shlex.join([f"scripts/{script}", *arguments])
    options = parser.parse_args(arguments)
    run_dir: Path | None = options.resume
    if run_dir is None and parallel.launched() and world.rank == 0:
        run_dir = _begun_by_this_job(options)
    found: dict[str, Any] | None = None
    wrong = ""
    if run_dir is not None and world.rank == 0:
        try:
            found = _read(run_dir, script)
        except ValueError as error:
            wrong = f"--resume {run_dir}: {error}"
    # Together with what went wrong, which is the same for all.
    run_dir, found, wrong = world.broadcast((run_dir, found, wrong))
    if wrong:
        parser.error(wrong)
    if run_dir is None or found is None:
        return Start(options, None, None, command)
    begun = f"--resume {run_dir}: it was begun with"
    parser.set_recorded(found["config"], begun, skip=("quiet",))
    recorded = parser.parse_args([])
    recorded.quiet = options.quiet
    if options.resume is None:  # restarted, with the same arguments as at first
        return Start(recorded, found, run_dir, found["command"])
    asked = parser.parse_args(arguments)
    positional = [action.dest for action in parser._actions if not action.option_strings]
    if any(getattr(options, name) for name in positional):  # then all of them are given again
        for name in positional:
            setattr(asked, name, getattr(options, name))
    for name, value in vars(asked).items():
        was = getattr(recorded, name)
        option = name if name in positional else f"--{name.replace('_', '-')}"
        if name in _MAY_RISE and value != was and (was is None or value < was):
            parser.error(
                f"{option} {value}: may be raised on resuming, and the run has {was or 'no limit'}"
            )
        if value != was and name not in _MAY_CHANGE:
            parser.error(
                f"{option} {_in_words(value)}: the run in {run_dir} was begun with "
                f"{_in_words(was)}; omit it, or begin a new run"
            )
    asked.resume = None
    return Start(asked, found, run_dir, found["command"])


def _begun_by_this_job(options: argparse.Namespace) -> Path | None:
    """The folder of a run that this job has begun, and torchrun has restarted."""
    by_name = Path("runs").glob(f"*-{command_line.date_and_time()}*")
    for run_dir in [options.run_dir] if options.run_dir else sorted(by_name):
        if not run_dir.is_dir():
            continue
        with contextlib.suppress(CheckpointError, OSError):
            found = checkpoints.latest_checkpoint(run_dir)
            if found is not None and command_line.is_this_job(str(found.content.get("job"))):
                return Path(run_dir)
        command_line.remove_what_this_job_left(run_dir)
    return None


def _in_words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _read(run_dir: Path, script: str) -> dict[str, Any]:
    """The content of a run's checkpoint; raises ValueError if it has none that can be resumed."""
    try:
        if not run_dir.is_dir():
            raise ValueError("there is no such folder")
        found = checkpoints.latest_checkpoint(run_dir)
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}") from error
    if found is None:
        if command_line.is_without_result(run_dir):
            raise ValueError(
                "it was killed before its first checkpoint: start it again as at first"
            )
        raise ValueError(f"no run of {script} has left a checkpoint there")
    of = found.content.get("script")
    if of != script:
        raise ValueError(f"that is a run of {of}, not of {script}")
    if not _has_header(found.content):
        raise ValueError(f"{found.path} does not record the options of the run")
    for sentence in found.damaged:
        print(f"{sentence}; going on from {found.path}, the one before", file=sys.stderr)
    return found.content


def _has_header(content: Mapping[str, Any]) -> bool:
    """Whether the content has what `header` makes, as far as `start` does not check it."""
    recorded = content.get("circumstances")
    return (
        isinstance(content.get("config"), dict)
        and isinstance(recorded, dict)
        and all(isinstance(value, str | int | float | None) for value in recorded.values())
        and isinstance(content.get("command"), str)
    )


# ------------------------------------------------------------------------ contents of a checkpoint


def circumstances(world: World) -> dict[str, Any]:
    """Everything that the bits depend on in addition to the options."""
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
    """What every checkpoint has."""
    plain = {
        name: str(value) if isinstance(value, Path) else value for name, value in config.items()
    }
    return {
        "script": script,
        "job": command_line.job(),
        "config": plain,
        "circumstances": circumstances(world),
        "command": command,
    }


def warn(found: Mapping[str, Any], world: World) -> None:
    """Say on standard error where something is not as it was, so that the bits may differ."""
    now, then = circumstances(world), found["circumstances"]
    changed = [
        f"{what} {now.get(what, 'unknown')} (was {value})"
        for what, value in then.items()
        if now.get(what) != value
    ]
    if changed and world.rank == 0:
        print(f"Resumed with {', '.join(changed)}: the bits may differ.", file=sys.stderr)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Context for loading a checkpoint: one sentence for content that does not fit."""
    try:
        with mismatch_is_value_error():
            yield
    except ValueError as error:
        why = textwrap.shorten(str(error), 200)  # the value may be long
        raise ValueError(f"the checkpoint does not fit its configuration: {why}") from error


# ----------------------------------------------------------------------------------- when to save


class Saver:
    """Writes a run's checkpoints when they are due, and stops it between two steps.

    Args:
        run_dir: where they go; None in processes that write none.
        every: `--checkpoint-every`.
        content: everything that the rest of the run needs; called in every process.
        flush: writes to disk what must be there before a checkpoint.
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

    def between(self, ask: int = _STEPS_UNASKED) -> None:
        """Between two steps: save if it is time, and let a signal through that waits.

        Args:
            ask: of several processes, how many steps they take before they ask each other.
        """
        # 0 for nothing, 1 for a checkpoint, and more for a signal, of which SIGHUP is number 1.
        number = command_line.waiting()
        code = 1 + number if number else int(self._is_time())
        if self._world.size > 1:
            self._calls += 1
            if self._calls % ask:
                return
            code = self._world.largest(code)
        if code == 1:
            self.save()
        elif code:
            command_line.stop(code - 1)
            command_line.let_through()

    def after(self, epoch: int, *, is_last: bool) -> None:
        """After an epoch that is logged."""
        due = self._world.largest(int(self._is_time()))
        at_its_turn = bool(epoch and self._epochs and epoch % self._epochs == 0)
        if due or at_its_turn or is_last:
            self.save()
        self.between(ask=1)

    def _is_time(self) -> bool:
        return time.monotonic() - self._saved >= self._seconds

    def save(self) -> None:
        """Write a checkpoint, which waits for all processes where they have parts of it."""
        content = self._content()
        if self._run_dir is not None:
            self._flush()
            checkpoints.write_checkpoint(self._run_dir, content)
        self._saved = time.monotonic()


# ------------------------------------------------------------------------------------- how it ends


class Ending:
    """Around training: hold back what stops it until the results so far are written.

    Args:
        run_dir: the run's directory.
        has_results: whether there is anything to write if the run stops now.
        save: writes a checkpoint; None for a script without them, which holds back Ctrl-C only.
    """

    def __init__(
        self,
        run_dir: Path,
        has_results: Callable[[], bool],
        save: Callable[[], None] | None = None,
    ) -> None:
        self._run_dir, self._has_results, self._save = run_dir, has_results, save
        self.stopped: BaseException | None = None

    def __enter__(self) -> "Ending":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        held: tuple[type[BaseException], ...] = (KeyboardInterrupt,)
        can_go_on = False
        if self._save is not None:
            held = (KeyboardInterrupt, OSError, training.Diverged)
            can_go_on = isinstance(error, KeyboardInterrupt | BrokenPipeError)
            if can_go_on:
                self._save()
                command_line.keep(self._run_dir)
        if can_go_on or (isinstance(error, held) and self._has_results()):
            self.stopped = error
        return self.stopped is not None

    def close(self, interrupted: str) -> None:
        """Raise the exception that stopped the run; after Ctrl-C print how to resume."""
        if isinstance(self.stopped, KeyboardInterrupt):
            print(interrupted, file=sys.stderr)
            if self._save is not None:
                print(command_line.command_to_resume(self._run_dir), file=sys.stderr)
        if self.stopped is not None:
            raise self.stopped
