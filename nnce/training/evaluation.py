"""Loss, accuracy and layer figures of networks, and their records."""

import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from nnce import data, rules
from nnce.engines import loops
from nnce.kernels import fused
from nnce.losses import Loss
from nnce.modules import MLP
from nnce.monitoring.saturation import LayerFigures, layer_figures

# Number of validation examples from which layer figures are computed.
_LAYER_EXAMPLES = 1_000
# Number of examples evaluated at once.
_EXAMPLES = 1_024
# Outputs of the widest layer computed at once, over all networks of a part: on a CPU (True) as many
# as fit the cache of a core, otherwise as many as fill a GPU.
_NUMBERS = {True: 2**19, False: 2**26}
_LANES = 32


class Record(NamedTuple):
    """Measurements at the end of an epoch, or before the first step (epoch 0).

    >>> nnce.training.Record._fields
    ('epoch', 'step', 'seconds', 'loss', 'accuracy', 'layers')
    """

    epoch: int
    """Number of finished epochs."""
    step: int
    """Number of mini-batches so far."""
    seconds: float
    """Training time of this epoch, excluding evaluation."""
    loss: dict[str, float]
    """C on each measured split: "train", "validation", "test"."""
    accuracy: dict[str, float]
    """Accuracy on each measured split, in [0, 1]."""
    layers: list[LayerFigures]
    """Figures of each layer with weights, first to last."""


def best_record(records: Sequence[Record]) -> Record:
    """The record with the highest validation accuracy; the first if there are several.

    Args:
        records: at least one record, with "validation" measured.

    Returns:
        An element of records.

    >>> records = [nnce.training.Record(e, e, 0.0, {}, {"validation": e % 2}, []) for e in range(4)]
    >>> nnce.training.best_record(records).epoch
    1
    """
    return max(records, key=lambda record: record.accuracy["validation"])


def pack(records: Sequence[Record]) -> Tensor:
    """Pack the records of one network into a tensor, for a checkpoint.

    Args:
        records: at least one record, all with the same splits measured.

    Returns:
        float64, [records, numbers per record].

    >>> record = nnce.training.Record(0, 0, 0.0, {"test": 0.5}, {"test": 0.9}, [])
    >>> nnce.training.pack([record])
    tensor([[0.0000, 0.0000, 0.0000, 0.5000, 0.9000]], dtype=torch.float64)
    """
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
    """Unpack records from a tensor that `pack` returned.

    Args:
        rows: float64, [records, numbers per record].
        splits: names of the measured splits, in order.

    Returns:
        One record per row.

    >>> record = nnce.training.Record(0, 0, 0.0, {"test": 0.5}, {"test": 0.9}, [])
    >>> nnce.training.unpack(nnce.training.pack([record]), splits=["test"]) == [record]
    True
    """
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
    """Loss and accuracy of a network on a split.

    >>> nnce.training.Evaluation(loss=0.5, accuracy=0.9)
    Evaluation(loss=0.5, accuracy=0.9)
    """

    loss: float
    """C averaged over the examples, at least 0."""
    accuracy: float
    """Share of examples whose largest output is the target's class, in [0, 1]."""


Output = Callable[[Tensor], Tensor]
"""A network as a function: inputs [n, n_in] to z of the last layer, [n, n_out]."""
_Layers = Sequence[tuple[Tensor, Tensor]]
"""R networks of one shape: W [R, n_out, n_in] and b [R, n_out] of each layer."""


def records(
    networks: Sequence[MLP],
    losses: Sequence[Loss],
    measured: Mapping[str, data.Split],
    *,
    epoch: int,
    step: int,
    seconds: float,
    threads: int = 1,
) -> list[Record]:
    """Evaluate networks of one shape at the end of an epoch: one record per network.

    The figures of a network do not depend on the other networks.

    Args:
        networks: MLPs of one shape, dtype and device.
        losses: the loss of each network.
        measured: splits to evaluate, by name; "validation" is required.
        epoch, step: current position of the training.
        seconds: training time of the epoch.
        threads: number of threads, which share the networks.

    Returns:
        One record per network.

    >>> split, networks = nnce.data.load("digits").validation, [nnce.MLP((64, 10))]
    >>> record, = nnce.training.records(
    ...     networks, ["quadratic"], {"validation": split}, epoch=0, step=0, seconds=0.0
    ... )
    >>> list(record.accuracy)
    ['validation']
    """

    def evaluate_part(part: tuple[Loss, list[int]]) -> list[Record]:
        loss, numbers = part
        layers = _stacked([networks[number] for number in numbers])
        forward = {
            name: partial(_forward, layers, _first_layer(layers, split.x))
            for name, split in measured.items()
        }
        by_split = {
            name: _evaluate(forward[name], split.y, loss) for name, split in measured.items()
        }
        y = measured["validation"].y[:_LAYER_EXAMPLES]
        figures = layer_figures(layers, forward["validation"](0, len(y)), y, loss)
        return [
            Record(
                epoch,
                step,
                seconds,
                loss={name: evaluations[r].loss for name, evaluations in by_split.items()},
                accuracy={name: evaluations[r].accuracy for name, evaluations in by_split.items()},
                layers=of_network,
            )
            for r, of_network in enumerate(figures)
        ]

    parts = _parts(networks, losses)
    if min(threads, len(parts)) == 1:
        of_parts = [evaluate_part(part) for part in parts]
    else:
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            of_parts = list(pool.map(evaluate_part, parts))
    found = {
        number: record
        for (_, numbers), of_part in zip(parts, of_parts, strict=True)
        for number, record in zip(numbers, of_part, strict=True)
    }
    return [found[number] for number in range(len(networks))]


def evaluate(output: Output, split: data.Split, loss: Loss) -> Evaluation:
    """Evaluate a network on a split: C (equation 2 or 3) averaged over the examples, and accuracy.

    Args:
        output: the network as a function, x [n, n_in] -> z of the last layer [n, n_out].
        split: inputs and one-hot targets.
        loss: "quadratic" or "cross-entropy".

    Returns:
        C averaged over the examples, at least 0, and the share of examples whose largest output is
        the target's class, in [0, 1].

    >>> split = nnce.data.Split(torch.eye(2), torch.eye(2))
    >>> nnce.training.evaluate(lambda x: 40 * (x - 0.5), split, "quadratic").accuracy
    1.0
    """
    x, y = split
    (evaluation,) = _evaluate(lambda begin, end: [output(x[begin:end]).unsqueeze(0)], y, loss)
    return evaluation


@torch.no_grad()
def confusion(network: MLP, split: data.Split) -> Tensor:
    """Confusion matrix: the number of examples of each true class (row) and output class (column).

    The trace divided by n is the accuracy that `records` measures.

    Args:
        network: an MLP.
        split: inputs and one-hot targets.

    Returns:
        [n_out, n_out], integers.

    >>> split, network = nnce.data.load("digits").test, nnce.MLP((64, 10))
    >>> nnce.training.confusion(network, split).sum().item()
    300
    """
    layers, (x, y) = _stacked([network]), split
    first, classes = _first_layer(layers, x), y.shape[1]
    counts = torch.zeros(classes**2, dtype=torch.long, device=y.device)
    for begin in range(0, len(y), _EXAMPLES):
        true = y[begin : begin + _EXAMPLES].argmax(1)
        z = _forward(layers, first, begin, begin + len(true))[-1].mT.double()  # [1, n_out, n]
        pairs = true * classes + z.max(1).indices[0]
        counts += torch.bincount(pairs, minlength=classes**2)
    return counts.view(classes, classes)


# ------------------------------------------------------- stacks of networks of one shape and loss


def _parts(networks: Sequence[MLP], losses: Sequence[Loss]) -> list[tuple[Loss, list[int]]]:
    """Divide networks into parts that are evaluated together: their loss and their indices."""
    widest = max(networks[0].sizes[1:])
    at_once = max(1, _NUMBERS[networks[0][0].weight.device.type == "cpu"] // (_EXAMPLES * widest))
    parts = []
    for loss in dict.fromkeys(losses):
        numbers = [number for number, of_network in enumerate(losses) if of_network == loss]
        parts += [
            (loss, numbers[begin : begin + at_once]) for begin in range(0, len(numbers), at_once)
        ]
    return parts


def _stacked(networks: Sequence[MLP]) -> _Layers:
    by_network = [network.weights_and_biases() for network in networks]
    return [
        (torch.stack([W.detach() for W, _ in of_all]), torch.stack([b.detach() for _, b in of_all]))
        for of_all in zip(*by_network, strict=True)
    ]


_First = Callable[[int, int], Tensor]
_Forward = Callable[[int, int], list[Tensor]]


def _first_layer(layers: _Layers, x: Tensor) -> _First:
    """(1) A function of begin and end that returns z of the first layer, [R, n, n_out].

    In memory z is [R, n_out, n], as are z and a of all layers, which makes products twice as fast.
    """
    (W, b), *_ = layers
    by_loops = loops.first_layer(x, W, b)

    def some(begin: int, end: int) -> Tensor:
        if by_loops is not None:
            return by_loops(begin, end).mT.contiguous().mT
        a = x[begin:end].expand(len(W), end - begin, x.shape[1])
        return torch.baddbmm(b.unsqueeze(-1), W, a.mT).mT

    return some


@torch.no_grad()
def _forward(layers: _Layers, first: _First, begin: int, end: int) -> list[Tensor]:
    """z of every layer, [R, n, n_out] each, for the examples from begin to end."""
    n = end - begin
    # Padded, because the last numbers of an array, which do not fill a SIMD register, are rounded
    # differently.
    z = [first(begin, end)]
    if missing := -n % _LANES:
        z = [pad(z[0].mT, (0, missing)).mT]
    for W, b in layers[1:]:
        z.append(torch.baddbmm(b.unsqueeze(-1), W, rules.sigmoid(z[-1]).mT).mT)  # (1)
    return [of_layer[:, :n] for of_layer in z]


@torch.no_grad()
def _evaluate(forward: _Forward, y: Tensor, loss: Loss) -> list[Evaluation]:
    """C and accuracy of R networks, from z of every layer, [R, n, n_out] each."""
    totals: list[Tensor] = []
    for begin in range(0, len(y), _EXAMPLES):
        some = y[begin : begin + _EXAMPLES].mT.double()  # [n_out, n]
        z = forward(begin, begin + some.shape[1])[-1].mT.double()  # [R, n_out, n]
        C, _ = fused.forward(z, some.expand_as(z), reduction="none", loss=loss)
        right = some.gather(0, z.max(1).indices)  # 1 where the largest output is the target's class
        totals.append(torch.stack([C.flatten(1).sum(1), right.sum(1)], -1))
    mean = torch.stack(totals).sum(0) / len(y)  # [R, 2]
    return [Evaluation(*of_network) for of_network in mean.tolist()]
