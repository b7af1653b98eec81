"""TensorBoard: what is logged and under which tags.

One run per variant, with identical tags, so that `tensorboard --logdir runs` overlays them:

    loss/train            C, and likewise loss/validation and loss/test
    accuracy/train        in [0, 1], and likewise accuracy/validation and accuracy/test
    dz_norm/layer1        ‖dC/dz‖ of one example, the mean over 1,000 validation examples
    saturated/layer1      the share of neurons with σ'(z) < 0.01 over the same examples
    config                the options, as text

The step is the epoch; epoch 0 is the start. Layers are numbered from 1, the first with weights.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from nnce.training import Record


class Monitor:
    """Writes the curves of one run into its directory.

    Args:
        run_dir: where TensorBoard finds them.
        config: name and value of each option.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, object]) -> None:
        """Open the log and write the configuration into it."""
        self._writer = SummaryWriter(str(run_dir))
        lines = ["| option | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in config.items()]
        self._writer.add_text("config", "\n".join(lines))

    def log(self, record: Record) -> None:
        """Add the record of an epoch to the curves."""
        scalars = {
            **{f"loss/{split}": value for split, value in record.loss.items()},
            **{f"accuracy/{split}": value for split, value in record.accuracy.items()},
        }
        for number, layer in enumerate(record.layers, start=1):
            scalars[f"dz_norm/layer{number}"] = layer.dz_norm
            scalars[f"saturated/layer{number}"] = layer.saturated
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, record.epoch)
        self._writer.flush()

    def __enter__(self) -> "Monitor":
        """Close the log at the block's end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the log."""
        self._writer.close()
