"""Compiled code, imported on first use: fused losses and training loops.

May import `rules`, `losses` and the files with an underscore. `losses` and `training` need Numba,
`triton_losses` Triton; `fused` chooses between them and `chunked`, which needs torch alone.
"""

from typing import Any

# Memory layout of the training loops, needed where Numba is not installed, too: rows are padded to
# a multiple of LANES numbers, lists of inputs to one of INPUTS_AT_ONCE.
LANES = 32
INPUTS_AT_ONCE = 8


def numba_problem() -> str | None:
    """Why Numba cannot compile here, and what to do about it; None if it can.

    Imports Numba, which takes some tenths of a second: ask this last.
    """
    try:
        import numba
    except ModuleNotFoundError as error:
        if error.name == "numba":
            return "Numba is not installed: pip install 'nnce[fast]'"
        return f"Numba cannot be imported ({error}): reinstall it"
    except ImportError as error:  # such as a version of NumPy that it does not support
        return f"Numba cannot be imported ({error})"
    config: Any = numba.config
    if config.DISABLE_JIT:
        return "its compiler is switched off: unset NUMBA_DISABLE_JIT"
    return None
