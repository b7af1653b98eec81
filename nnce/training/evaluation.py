"""Loss, accuracy and layer figures of networks, and records of these."""

import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnce import data
from nnce.losses import LOSSES, Loss
from nnce.modules import MLP
from nnce.monitoring.saturation import LayerFigures, layer_figures

# Validation examples from which the figures of the layers are computed.
_LAYER_EXAMPLES = 1_000
# Examples evaluated at once, to bound the memory of wide layers.
_EVALUATION_CHUNK = 10_000


class Record(NamedTuple):
    """Measurements at an epoch's end; epoch 0 is the start, before any step."""

    epoch: int
    step: int
    seconds: float
    """Training time of this epoch, without evaluation."""
    loss: dict[str, float]
    """C of each measured split: "train", "validation", "test"."""
    accuracy: dict[str, float]
    """Share of examples whose largest output is the right one, in [0, 1], of each split."""
    layers: list[LayerFigures]
    """Figures of each layer, from the first one with weights to the last."""


def pack(records: Sequence[Record]) -> Tensor:
    """Records of one network as a float64 tensor, a row each, for a checkpoint."""
    rows = [
        [
            *record[:3],
            *record.loss.values(),
            *record.accuracy.values(),
            *(figure for layer in record.layers for figure in layer),
        ]
        for record in records
    ]
    return torch.tensor(rows, dtype=torch.float64)


def unpack(rows: Tensor, splits: Sequence[str] = data.SPLITS) -> list[Record]:
    """Records out of the tensor that `pack` made, with these splits measured."""
    found = []
    for epoch, step, seconds, *figures in rows.tolist():
        n, width = len(splits), len(LayerFigures._fields)
        loss, accuracy, layers = figures[:n], figures[n : 2 * n], figures[2 * n :]
        found.append(
            Record(
                int(epoch),
                int(step),
                seconds,
                dict(zip(splits, loss, strict=True)),
                dict(zip(splits, accuracy, strict=True)),
                [
                    LayerFigures(*layers[begin : begin + width])
                    for begin in range(0, len(layers), width)
                ],
            )
        )
    return found


class Evaluation(NamedTuple):
    """Loss and accuracy of a network on a split."""

    loss: float
    """C, at least 0."""
    accuracy: float
    """In [0, 1]."""


Output = Callable[[Tensor], Tensor]
"""A network as a function: inputs [n, n_in] to z of the last layer, [n, n_out]."""


def records(
    outputs: Sequence[Output],
    networks: Sequence[MLP],
    losses: Sequence[Loss],
    measured: Mapping[str, data.Split],
    *,
    epoch: int,
    step: int,
    seconds: float,
    threads: int = 1,
) -> list[Record]:
    """Evaluate networks at the end of an epoch, one record each.

    Args:
        outputs: the networks as functions.
        networks: the same networks, for the figures of their layers.
        losses: the loss of each network.
        measured: splits to evaluate, by name; "validation" at least.
        epoch, step: position of the training.
        seconds: training time of the epoch.
        threads: number of networks to evaluate at once.
    """
    x, y = (part[:_LAYER_EXAMPLES] for part in measured["validation"])

    def record(output: Output, network: MLP, loss: Loss) -> Record:
        by_split = {name: evaluate(output, split, loss) for name, split in measured.items()}
        return Record(
            epoch,
            step,
            seconds,
            loss={name: evaluation.loss for name, evaluation in by_split.items()},
            accuracy={name: evaluation.accuracy for name, evaluation in by_split.items()},
            layers=layer_figures(network, x, y, loss),
        )

    if min(threads, len(networks)) == 1:
        return list(map(record, outputs, networks, losses))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(record, outputs, networks, losses))


@torch.no_grad()
def evaluate(output: Output, split: data.Split, loss: Loss) -> Evaluation:
    """C and accuracy of a network on a split.

    Args:
        output: the network as a function.
        split: inputs and one-hot targets.
        loss: "quadratic" or "cross-entropy".
    """
    n, device = len(split.x), split.x.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    right = torch.zeros((), dtype=torch.float64, device=device)
    for x, y in zip(
        split.x.split(_EVALUATION_CHUNK), split.y.split(_EVALUATION_CHUNK), strict=True
    ):
        z = output(x)
        # In float64, where PyTorch's log1p takes a third of the time it takes in float32.
        total += LOSSES[loss].value(z.double(), y.double()).sum()
        # 1 where the largest output is the right one.
        right += y.gather(-1, z.argmax(-1, keepdim=True)).sum(dtype=torch.float64)
    return Evaluation(total.item() / n, right.item() / n)
