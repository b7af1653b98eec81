"""Empty figures in place of those of nnce.experiments.figures.

Drawing takes nine tenths of a short run, and most tests of runs are about other things. Files are
written and images are logged all the same. The tests of figures draw them (`drawn`), and so does
one run of each script.
"""

import contextlib
import functools
import inspect

from matplotlib.figure import Figure

from nnce.experiments import figures

DRAWN = {
    name: function
    for name, function in inspect.getmembers(figures, inspect.isfunction)
    if inspect.signature(function).return_annotation == "Figure" and not name.startswith("_")
}


def _empty(function):
    signature = inspect.signature(function)

    @functools.wraps(function)
    def empty(*arguments, **more):
        signature.bind(*arguments, **more)
        return Figure(figsize=(1, 1))

    return empty


EMPTY = {name: _empty(function) for name, function in DRAWN.items()}


def replace():
    """Make every figure empty from now on."""
    vars(figures).update(EMPTY)


def restore(*names):
    """Draw these figures from now on, or all."""
    vars(figures).update({name: DRAWN[name] for name in names or DRAWN})


@contextlib.contextmanager
def drawn(*names):
    """Draw these figures within, or all."""
    restore(*names)
    try:
        yield
    finally:
        replace()
