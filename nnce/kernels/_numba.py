"""Compilation by Numba, with a cache on disk that cannot stop a program."""

import contextlib
import functools
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numba.core.caching
from numba.core.serialize import dumps

_DIGEST = hashlib.sha256().digest_size


def njit(*, fastmath: set[str], forceinline: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function at its first call with each combination of argument types.

    The function works on the arrays it is given, and on slices of them, but allocates none. The
    compiled code runs without the GIL, divides by 0 as IEEE 754 does, and is kept on disk. Where
    the cache cannot be written (read-only, a full disk) the function is compiled in each process;
    where a cached file is damaged it is compiled again and the file is replaced.

    Args:
        fastmath: LLVM's fast-math flags for floating-point operations.
        forceinline: whether LLVM must inline it, however long: a loop that calls is not vectorized.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        # "_nrt": arrays taken out of a tuple would be reference-counted in the innermost loops,
        # which made a step 1.2 times as long.
        options: Any = {"nogil": True, "error_model": "numpy", "_nrt": False, "fastmath": fastmath}
        dispatcher: Any = numba.njit(**options, forceinline=forceinline)(function)
        with contextlib.suppress(RuntimeError, OSError):  # no folder can be written
            dispatcher._cache = _Cache(function)
        return dispatcher

    return compiled


def is_cached(dispatcher: Any) -> bool:
    """Whether compiled code of a function, of any types, is on disk."""
    cache = dispatcher._cache
    return isinstance(cache, _Cache) and cache.has_files()


# Neither public nor typed.
_FunctionCache: Any = numba.core.caching.FunctionCache


class _Cache(_FunctionCache):  # type: ignore[misc]
    """The compiled code of one function: a file for each combination of types and processor.

    A file begins with a SHA-256 digest of everything that its content depends on. One that does not
    match counts as absent: it is damaged, belongs to another function, or is out of date. Numba's
    own cache trusts its files, and a damaged one stops the program (numba #10434).
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled code for these types, or None if it must be compiled."""
        target_context.refresh()
        path = self._path(sig, target_context.codegen())
        try:
            content = path.read_bytes()
            data = content[_DIGEST:]
            if content[:_DIGEST] != self._digest(path, data):
                return None
            return self._impl.rebuild(target_context, pickle.loads(data))
        except Exception:  # of many types; whatever it is, compiling does not need the file
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write the compiled code for these types, if that is possible."""
        if not self._impl.check_cachable(data):
            return
        path = self._path(sig, data.codegen)
        content = dumps(self._impl.reduce(data))
        with contextlib.suppress(OSError):  # a full disk, or a folder that has become read-only
            self._impl.locator.ensure_cache_path()
            with self._cache_file._open_for_write(path) as file:  # moved into place when complete
                file.write(self._digest(path, content) + content)

    def has_files(self) -> bool:
        """Whether there is a file for any types."""
        return any(Path(self.cache_path).glob(f"{self._impl.filename_base}.*.nbc"))

    def _path(self, sig: Any, codegen: Any) -> Path:
        key = hashlib.sha256(repr(self._index_key(sig, codegen)).encode()).hexdigest()
        return Path(self.cache_path) / f"{self._impl.filename_base}.{key[:16]}.nbc"

    def _digest(self, path: Path, data: bytes) -> bytes:
        stamp = repr((numba.__version__, self._impl.locator.get_source_stamp())).encode()
        return hashlib.sha256(
            b"\0".join([path.name.encode(), stamp, _kernel_sources(), data])
        ).digest()


@functools.cache
def _kernel_sources() -> bytes:
    """A digest of the files of this folder: a kernel contains the code of those that it calls."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"\0".join(sources)).digest()
