"""What is in place before a script imports anything else."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if path.stem != "startup")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_imports_it_first(script):
    _, first, *_ = ast.parse(script.read_text(encoding="utf-8")).body
    assert isinstance(first, ast.If) and ast.unparse(first.test) == "__name__ == '__main__'"
    assert ast.unparse(first.body[0]) == "import startup"


def test_a_notebooks_backend_is_not_inherited():
    """matplotlib refuses to be imported where it is not installed, as with any unknown name."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), "--help"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MPLBACKEND": "not_installed",
        },
    )
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_garbage_is_collected_once_all_is_imported():
    program = """
import startup
import gc
from nnce.experiments import running
print(gc.isenabled())
running.run_script(lambda: print(gc.isenabled()))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["False", "True"], done.stderr
