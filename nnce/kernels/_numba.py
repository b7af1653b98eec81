"""Compilation by Numba, with a disk cache whose failures never raise."""

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
    """Compile a function on its first call with each combination of argument types.

    The function must not allocate arrays; it may slice its arguments. The compiled code runs
    without the GIL, divides by 0 as IEEE 754 does, and is cached on disk. If the cache cannot be
    written (read-only, a full disk), the function is compiled in each process. If a cached file is
    damaged, the function is recompiled and the file replaced.

    Args:
        fastmath: LLVM's fast-math flags for floating-point operations.
        forceinline: whether LLVM must inline it, however long: a loop that calls is not vectorized.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        # "_nrt" off: otherwise arrays in a tuple are reference-counted in the innermost loops, and
        # a step takes 1.2 times as long.
        options: Any = {"nogil": True, "error_model": "numpy", "_nrt": False, "fastmath": fastmath}
        dispatcher: Any = numba.njit(**options, forceinline=forceinline)(function)
        with contextlib.suppress(RuntimeError, OSError):  # no writable folder
            dispatcher._cache = _Cache(function)
        return dispatcher

    return compiled


def is_cached(dispatcher: Any) -> bool:
    """Whether compiled code of a function is on disk, for any argument types."""
    cache = dispatcher._cache
    return isinstance(cache, _Cache) and cache.has_files()


# Private in Numba, and without type annotations.
_FunctionCache: Any = numba.core.caching.FunctionCache


class _Cache(_FunctionCache):  # type: ignore[misc]
    """Cache of one function's compiled code: a file per combination of types and processor.

    A file begins with a SHA-256 digest of everything that its content depends on. A file with a
    wrong digest counts as absent: it is damaged, out of date, or of a different function. Numba's
    own cache does not verify its files, and a damaged one stops the program (numba #10434).
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
        except Exception:  # of any type: the function can always be compiled instead
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write the compiled code for these types, if possible."""
        if not self._impl.check_cachable(data):
            return
        path = self._path(sig, data.codegen)
        content = dumps(self._impl.reduce(data))
        with contextlib.suppress(OSError):  # a full disk, or a folder that has become read-only
            self._impl.locator.ensure_cache_path()
            with self._cache_file._open_for_write(path) as file:  # renamed when complete
                file.write(self._digest(path, content) + content)

    def has_files(self) -> bool:
        """Whether there is a file for any argument types."""
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
    """Digest of all files in this folder, because a kernel contains the code of its callees."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"\0".join(sources)).digest()
