"""Compiled code. Each module here needs a package beyond torch, and is imported on first use."""


def numba_problem() -> str | None:
    """Why Numba cannot compile here; None if it can."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return str(error)
    return None
