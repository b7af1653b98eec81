"""Directories of runs: creating, locking, keeping and removing them."""

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from nnce.experiments.running import Failed, external_failure
from nnce.training import checkpoints, parallel
from nnce.training.parallel import ALONE, World

# Marker file in a run directory that contains no result yet.
_NO_RESULT = ".nothing-finished-yet"
# Files of file managers and file systems; a folder with only these counts as empty.
_SYSTEM_FILES = (".DS_Store", ".directory", "Thumbs.db", "desktop.ini", "lost+found")
_CHECKPOINTS = "checkpoint-*"


@contextlib.contextmanager
def run_directory(
    chosen: Path | None,
    name: str,
    *,
    dry_run: bool = False,
    resumed: bool = False,
    world: World = ALONE,
) -> Iterator[Path]:
    """Context with the directory of a run: the chosen one, or a new runs/NAME-DATE-TIME.

    The directory is removed at the end of the block after a dry run, or if neither `keep` nor
    `report.write_results` has been called. A killed process leaves it behind; a later run may reuse
    it unless it contains a checkpoint. Rank 0 creates the directory and broadcasts its path.

    Raises:
        ValueError: the directory is already used, cannot be created or written, has a name that is
            not UTF-8, or is in use by another process.
        Failed: there are results to keep, and the block ran out of memory or disk space, lost
            another process, or found the directory deleted.
    """
    if world.rank:
        path: Path = world.broadcast(None)
        with _raising_failed(path, lambda: path.is_dir() and any(path.glob(_CHECKPOINTS))):
            yield path
        return
    with contextlib.ExitStack() as stack:
        try:
            path, made = _directory(chosen, name)
            _begin(path, resumed, locked=stack.enter_context(_lock(path)))
        except OSError as error:
            raise ValueError(
                f"the run directory {chosen or name} cannot be written: {error.strerror}"
            ) from error
        mark = path / _NO_RESULT
        try:
            with _raising_failed(path, lambda: not dry_run and not mark.exists()):
                world.broadcast(path)
                yield path
        finally:
            if path.is_dir() and (dry_run or mark.exists()):
                clear(path)
                # Another run may have started in the same directory.
                with contextlib.suppress(OSError):
                    for folder in made:
                        folder.rmdir()


def _directory(chosen: Path | None, name: str) -> tuple[Path, list[Path]]:
    """Create the chosen directory, or a new one by name; return it and the list of new folders."""
    if chosen is not None:
        if chosen.exists() and not chosen.is_dir():
            raise ValueError(f"the run directory {chosen} is a file; choose a folder")
        _check_name(chosen)
    path = first = chosen or Path("runs", f"{name}-{date_and_time()}")
    number = 1
    while True:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=chosen is not None)
            return path, made
        except FileExistsError:
            if chosen is not None:
                raise
            number += 1  # two runs within one second
            path = first.with_name(f"{first.name}-{number}")


def _begin(path: Path, resumed: bool, *, locked: bool) -> None:
    """Prepare the directory for a resumed run, or mark it as one without results."""
    if resumed:
        checkpoints.clear_unfinished(path)
        keep(path)
        return
    if is_without_result(path) and locked:
        clear(path)
    elif is_without_result(path):
        raise ValueError(
            f"the run directory {path} belongs to a run that was killed before its first "
            f"checkpoint; delete it, or choose a new one"
        )
    elif _content(path):
        advice = f"resume it with --resume {path}, or " if any(path.glob(_CHECKPOINTS)) else ""
        raise ValueError(f"the run directory {path} is already used; {advice}choose a new one")
    with (path / _NO_RESULT).open("x") as file:
        file.write(job())


def is_without_result(path: Path) -> bool:
    """Whether the directory belongs to a run that has left neither results nor a checkpoint."""
    return (path / _NO_RESULT).exists() and not any(path.glob(_CHECKPOINTS))


def _check_name(path: Path) -> None:
    """Raise ValueError if the name is not UTF-8, which TensorBoard requires."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        try:
            os.fsencode(path).decode()
        except UnicodeError:
            raise ValueError(
                f"expected a run directory whose name is UTF-8, which TensorBoard needs, got {path}"
            ) from error
        raise ValueError(
            f"the run directory {path} has a name that this locale's encoding "
            f"({sys.getfilesystemencoding()}) cannot represent: set PYTHONUTF8=1 and run again"
        ) from error


def _content(folder: Path) -> list[Path]:
    """Contents of a folder, without the files of file managers and file systems."""
    return [path for path in folder.iterdir() if path.name not in _SYSTEM_FILES]


@contextlib.contextmanager
def _raising_failed(path: Path, has_results: Callable[[], bool]) -> Iterator[None]:
    """Raise Failed for a failure outside the script, if there are results to keep."""
    try:
        yield
    except Exception as error:
        message = external_failure(error)
        if message is None:
            raise
        if parallel.is_first() and not path.is_dir():
            raise Failed(f"the run directory {path} was deleted during the run") from error
        if not has_results():
            raise
        torchrun_gives_up = parallel.lost(error) and not parallel.restarts_left()
        resume = f"; resume with:\n{command_to_resume(path)}" if torchrun_gives_up else ""
        raise Failed(f"{message}; finished results are kept in {path}{resume}") from error


def command_to_resume(run_dir: Path) -> str:
    """The command that resumes a run."""
    python = [from_here(Path(sys.executable))]
    if parallel.under_torchrun():
        torchrun = Path(sys.executable).with_name("torchrun")
        python = [from_here(torchrun), "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    return shlex.join([*python, from_here(Path(sys.argv[0])), "--resume", from_here(run_dir)])


def from_here(path: Path) -> str:
    """The path relative to the working directory if it lies within, else unchanged."""
    with contextlib.suppress(ValueError):
        path = path.absolute().relative_to(Path.cwd())
    return str(path)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Lock the folder during the block; yield False where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        locked = True
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"the run directory {path} is in use by another process") from error
        except OSError:  # a file system without locks
            locked = False
        yield locked
    finally:
        os.close(folder)


def clear(run_dir: Path) -> None:
    """Remove all files of a run."""
    for leftover in _content(run_dir):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def keep(run_dir: Path) -> None:
    """Record that the run directory contains results, so that it is not removed."""
    (run_dir / _NO_RESULT).unlink(missing_ok=True)


def date_and_time() -> str:
    """Start time of the run; under torchrun that of the job, the same after a restart."""
    now = datetime.now()
    if parallel.under_torchrun():
        now = datetime.fromtimestamp(_agent().create_time())
    return f"{now:%Y%m%d-%H%M%S}"


def _agent() -> Any:
    """The `torchrun` process that started this one."""
    import psutil

    return psutil.Process(os.getppid())


def job() -> str:
    """Identifier of the `torchrun` job, the same after a restart; "" without torchrun."""
    if not parallel.under_torchrun():
        return ""
    agent = _agent()
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {agent.pid}-{agent.create_time()}"


def is_this_job(name: str) -> bool:
    """Whether the name is that of this job, here or on another host with the same --rdzv-id."""
    now, then = job().split(" "), name.split(" ")
    return bool(job()) and (now[-1] == then[-1] or now[0] == then[0] != "none")


def remove_leftovers_of_this_job(run_dir: Path) -> None:
    """Remove a run directory that this job created, if it contains no results."""
    mark = run_dir / _NO_RESULT
    if mark.is_file() and is_this_job(mark.read_text()):
        clear(run_dir)
        run_dir.rmdir()
