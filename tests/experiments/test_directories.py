import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from programs import run

from nnce.experiments import directories, running

SCRIPTS = ROOT / "scripts"
posix = pytest.mark.skipif(os.name != "posix", reason="signals, limits and streams of POSIX")


def test_two_runs_cannot_take_the_same_directory(tmp_path):
    with (
        directories.run_directory(tmp_path / "run", "run") as run_dir,
        pytest.raises(ValueError, match="in use by another process"),
        directories.run_directory(run_dir, "run"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_runs_of_the_same_second_have_directories_of_their_own(tmp_path, monkeypatch):
    """Also where both find a name free before either has taken it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(directories, "date_and_time", lambda: "now")
    whole, other = Path.mkdir, []

    def late(path, *arguments, **more):
        if path.name == "run-now" and not other:
            other.append(path)
            whole(path, parents=True)  # the other run is first
        return whole(path, *arguments, **more)

    monkeypatch.setattr(Path, "mkdir", late)
    with (
        directories.run_directory(None, "run") as first,
        directories.run_directory(None, "run") as second,
    ):
        assert (str(first), str(second)) == ("runs/run-now-2", "runs/run-now-3")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run-now"]


def test_a_stopped_run_leaves_the_folder_that_another_one_has_begun_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(KeyboardInterrupt),
        directories.run_directory(None, "run") as run_dir,
    ):
        (tmp_path / "runs" / "another").mkdir()
        raise KeyboardInterrupt
    assert not run_dir.exists() and (tmp_path / "runs" / "another").exists()


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("finished", [False, True])
def test_a_deleted_directory_is_not_called_kept(finished, dry_run, tmp_path):
    with (
        pytest.raises(running.Failed) as failed,
        directories.run_directory(tmp_path / "run", "run", dry_run=dry_run) as run_dir,
    ):
        if finished:
            directories.keep(run_dir)
        shutil.rmtree(run_dir)
        (run_dir / "results.json").write_text("")
    assert str(failed.value) == f"the run directory {run_dir} was deleted during the run"


def killed_in(path, *names):
    """What a run leaves that is killed outright before anything is finished, and its checkpoint."""
    work = f"""
import os
from pathlib import Path
from nnce.experiments import directories
with directories.run_directory(Path({str(path)!r}), "run") as run_dir:
    for name in {names!r}:
        (run_dir / name).touch()
    os._exit(9)
"""
    assert run("", before=work).returncode == 9 and path.is_dir()


def test_a_run_begins_again_where_one_was_killed_before_its_first_checkpoint(tmp_path):
    run_dir = tmp_path / "run"
    killed_in(run_dir, "events.out.tfevents.1")
    with directories.run_directory(run_dir, "run"):
        assert directories.is_without_result(run_dir)
        assert not (run_dir / "events.out.tfevents.1").exists()
        directories.keep(run_dir)
    assert run_dir.is_dir()


def test_where_no_lock_says_that_it_was_killed_there_is_advice(tmp_path, monkeypatch):
    import fcntl

    def unknown(*_):
        raise OSError(errno.ENOLCK, "no locks")

    killed_in(tmp_path / "run")
    monkeypatch.setattr(fcntl, "flock", unknown)
    with (
        pytest.raises(ValueError, match="killed before its first checkpoint; delete it, or choose"),
        directories.run_directory(tmp_path / "run", "run"),
    ):
        pass
    assert (tmp_path / "run").is_dir()


def test_where_there_is_a_checkpoint_the_advice_is_to_resume(tmp_path):
    run_dir = tmp_path / "run"
    killed_in(run_dir, "checkpoint-000001")
    with (
        pytest.raises(ValueError, match=f"already used; resume it with --resume {run_dir}, or"),
        directories.run_directory(run_dir, "run"),
    ):
        pass
    assert (run_dir / "checkpoint-000001").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, ZeroDivisionError])
def test_a_directory_goes_until_something_is_finished(error, tmp_path):
    for finished in (False, True):
        with (
            pytest.raises(error),
            directories.run_directory(tmp_path / "new" / "run", "run") as run_dir,
        ):
            (run_dir / "half").write_text("")
            (run_dir / "folder").mkdir()
            if finished:
                directories.keep(run_dir)
                directories.keep(run_dir)
            raise error
        assert (tmp_path / "new" / "run" / "half").exists() == finished
        assert (tmp_path / "new").exists() == finished


def test_files_that_systems_leave_do_not_fill_a_folder(tmp_path):
    (tmp_path / ".DS_Store").write_text("mine")
    (tmp_path / "lost+found").mkdir()
    with (
        pytest.raises(ZeroDivisionError),
        directories.run_directory(tmp_path, "run") as run_dir,
    ):
        (run_dir / "half").write_text("")
        raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.iterdir()) == [".DS_Store", "lost+found"]
    assert (tmp_path / ".DS_Store").read_text() == "mine"


@posix
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Grüße".encode(), "locale's encoding (ascii) cannot represent: set PYTHONUTF8=1"),
        (b"Gr\xfc\xdfe", "expected a run directory whose name is UTF-8"),
    ],
)
def test_a_name_under_an_ascii_locale(name, sentence, tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    path = os.fsencode(tmp_path) + b"/" + name
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "slowdown.py"), "--run-dir", path],
        env={**os.environ, **ascii_only},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
