"""The file epochs.csv: one row per network and epoch, with all logged values."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from nnce.experiments.report import Row, write_text
from nnce.experiments.tensorboard import scalars
from nnce.training import Record, Settings

_NAME = "epochs.csv"


def epoch_row(settings: Settings, record: Record, **more: object) -> Row:
    """Row of one network after one epoch."""
    return {
        "loss": settings.loss,
        "lr": settings.rate,
        "engine": settings.engine,
        **more,
        "seed": settings.seed,
        "epoch": record.epoch,
        "step": record.step,
        "seconds": record.seconds,
        **scalars(record),
    }


class EpochsFile:
    """The epochs.csv of a run, extended after every epoch.

    Args:
        run_dir: the run directory.
        rows: rows of the recorded epochs of a resumed run; any others in the file are dropped.
    """

    def __init__(self, run_dir: Path, rows: Sequence[Row] = ()) -> None:
        write_text(run_dir / _NAME, as_csv(rows))
        self._file = (run_dir / _NAME).open("ab", buffering=0)

    def __enter__(self) -> "EpochsFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, rows: Sequence[Row]) -> None:
        """Append all rows, or none of them if the disk is full."""
        end = self._file.seek(0, os.SEEK_END)
        content = memoryview(as_csv(rows, header=not end).encode())
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError:
            self._file.truncate(self._file.seek(end))
            raise

    def flush(self) -> None:
        """Flush the file to disk."""
        os.fsync(self._file.fileno())


def as_csv(rows: Sequence[Row], *, header: bool = True) -> str:
    """Format rows with the same keys as CSV."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]) if rows else [])
    if header and rows:
        table.writeheader()
    table.writerows(rows)
    return text.getvalue()
