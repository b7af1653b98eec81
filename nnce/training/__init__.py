"""Training one network, or many side by side: settings, state, one loop for every engine.

`initial_state` creates the state; `train` advances it and yields a record per epoch. Engines differ
only in how they compute the gradients; evaluation is the same for all.

May import the notes' files, `engines`, `monitoring` and `data`, but not `experiments`.
"""

from nnce.training.cursor import Cursor, generators
from nnce.training.evaluation import (
    Evaluation,
    Record,
    best_record,
    confusion,
    evaluate,
    pack,
    records,
    unpack,
)
from nnce.training.loop import Diverged, train
from nnce.training.settings import (
    ENGINES,
    ENSEMBLE_ENGINES,
    OPTIMIZERS,
    Engine,
    Optimizer,
    Settings,
    ensemble_engine,
    hyperparameters,
)
from nnce.training.state import (
    Best,
    State,
    check_fits,
    check_suits,
    initial_state,
    is_finite,
    make_network,
    mismatch_is_value_error,
    sizes,
)
from nnce.training.steppers import with_dropout, with_graph

__all__ = [
    "ENGINES",
    "ENSEMBLE_ENGINES",
    "OPTIMIZERS",
    "Best",
    "Cursor",
    "Diverged",
    "Engine",
    "Evaluation",
    "Optimizer",
    "Record",
    "Settings",
    "State",
    "best_record",
    "check_fits",
    "check_suits",
    "confusion",
    "ensemble_engine",
    "evaluate",
    "generators",
    "hyperparameters",
    "initial_state",
    "is_finite",
    "make_network",
    "mismatch_is_value_error",
    "pack",
    "records",
    "sizes",
    "train",
    "unpack",
    "with_dropout",
    "with_graph",
]
