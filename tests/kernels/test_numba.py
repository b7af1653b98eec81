"""The decorator that compiles, and its cache on disk."""

import importlib.util
import os
import shutil
import sys

import pytest

from nnce import kernels

numba = pytest.importorskip("numba")

KERNELS = """
from nnce.kernels._numba import njit

@njit(fastmath=set())
def double(x):
    return 2 * x

@njit(fastmath=set())
def triple(x):
    return 3 * x
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where compiled code of the kernels is kept."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "example.py").write_text(KERNELS)
    return tmp_path / "cache"


def fresh(folder):
    """The kernels as a new process has them, with nothing compiled."""
    spec = importlib.util.spec_from_file_location("example", folder.parent / "example.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found(kernel):
    """Whether the code for the last call came from the cache."""
    return sum(kernel.stats.cache_hits.values()) == 1


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flipped(place):
    def flip(content):
        at = int(place * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return flip


DAMAGE = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "without its end": lambda content: content[:-1],
    "zeros": lambda content: bytes(len(content)),
    "longer": lambda content: content + b"\0",
    **{f"a bit flipped at {place}": flipped(place) for place in (0, 0.01, 0.1, 0.5, 0.9, 1)},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_compiled_again_and_replaced(folder, damage):
    assert fresh(folder).double(21) == 42
    whole = [(path, path.read_bytes()) for path in files(folder)]
    assert whole
    for path, content in whole:
        path.write_bytes(damage(content))
    kernel = fresh(folder).double
    assert kernel(21) == 42 and not found(kernel)
    assert [path for path, _ in whole] == files(folder)
    kernel = fresh(folder).double
    assert kernel(21) == 42 and found(kernel)


def test_another_kernels_file_is_not_used(folder):
    kernels = fresh(folder)
    assert kernels.double(14) == 28 and kernels.triple(14) == 42
    double, triple = files(folder)
    assert "double" in double.name and "triple" in triple.name
    shutil.copy(double, triple)
    kernel = fresh(folder).triple
    assert kernel(14) == 42 and not found(kernel)


def test_changed_source_is_compiled_again(folder):
    assert fresh(folder).double(14) == 28
    (folder.parent / "example.py").write_text(KERNELS.replace("2 * x", "x + x + 0 * x"))
    kernel = fresh(folder).double
    assert kernel(14) == 28 and not found(kernel)


def test_each_combination_of_types_is_kept(folder):
    kernel = fresh(folder).double
    assert kernel(21) == 42 and kernel(0.25) == 0.5 and len(files(folder)) == 2
    for x in (21, 0.25):
        kernel = fresh(folder).double
        assert kernel(x) == 2 * x and found(kernel)


def test_a_folder_in_a_files_place_stops_nothing(folder):
    assert fresh(folder).double(21) == 42
    for path in files(folder):
        path.unlink()
        path.mkdir()
    assert fresh(folder).double(21) == 42


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_full_disk_stops_nothing(folder):
    """Empty files can be made there, but not written."""
    import resource

    kernel = fresh(folder).double
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))
    try:
        assert kernel(21) == 42
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(folder) == []


def test_where_no_folder_can_be_written_functions_are_compiled_uncached(folder, monkeypatch):
    folder.write_text("a file")
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "UserProvidedCacheLocator")
    kernel = fresh(folder).double
    assert kernel(21) == 42 and kernel.stats.cache_path is None


def test_why_numba_cannot_compile(monkeypatch):
    assert kernels.numba_problem() is None
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert kernels.numba_problem() == "its compiler is switched off: unset NUMBA_DISABLE_JIT"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "numba", None)  # import raises ModuleNotFoundError
    problem = "Numba is not installed: pip install 'nnce[fast]'"
    assert kernels.numba_problem() == problem
