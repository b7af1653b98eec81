"""A row of a table that digits are soon done with."""

from nnce.data import Distortion
from nnce.experiments.published import Row
from nnce.training import Settings
from nnce.training.schedules import Schedule

ROW = Row(
    "T1",
    Settings(
        hidden=(8,),
        epochs=2,
        init=0.05,
        schedule=Schedule("cosine", cosine_epochs=2),
        distortion=Distortion(rotation=5, alpha=3, sigma=1),
    ),
)
