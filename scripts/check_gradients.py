"""Hold the hand-written gradients against PyTorch's, over the whole range of z, in every dtype."""

if __name__ == "__main__":
    import startup  # noqa: F401  before all else


import argparse
import math
import shutil
import sys
import time
import warnings
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from nnce import accuracy, backprop, composability, data, ensemble, experiment, plots, training
from nnce.modules import MLP


def parser() -> experiment.ArgumentParser:
    """The options."""
    parser = experiment.ArgumentParser(__doc__)
    parser.add_common_options()
    parser.add_argument(
        "--hidden",
        type=int,
        nargs="*",
        default=[30],
        help="neurons of each hidden layer of the network whose gradients are compared",
    )
    parser.add_argument(
        "--matrix",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="try as well where the functions can be put together with the rest of PyTorch",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Check everything; 0 if all that nnce promises holds, else 1."""
    options_parser = parser()
    options = options_parser.parse_args(arguments)
    began = time.perf_counter()
    with options_parser.user_errors():
        device = experiment.device(options.device)
        dataset = data.load(
            options.data,
            data_dir=options.data_dir,
            device=device,
            dtype=experiment.DTYPES[options.dtype],
        )
        x, y = dataset.train
        sizes = (x.shape[1], *options.hidden, y.shape[1])
        ensemble.check_memory(sizes, dtype=x.dtype, device=device)
        network = MLP(
            sizes,
            generator=torch.Generator().manual_seed(options.seed),
            device=device,
            dtype=x.dtype,
        )
    with options_parser.run_directory(options.run_dir, "check-gradients") as run_dir:
        measured, atlas = measure_everywhere(device)
        named = [
            row for loss in backprop.LOSSES for row in compare_network(network, dataset.train, loss)
        ]
        cells = matrix() if options.matrix else []
        broken = broken_promises(measured, named)

        rows = [row._asdict() for row in measured]
        experiment.write_results(
            run_dir,
            config=vars(options),
            device=device,
            seconds=time.perf_counter() - began,
            rows=rows,
            network=named,
            matrix=cells,
            broken=broken,
        )
        experiment.write_figure(run_dir / "saturation-atlas.png", atlas, dpi=80)
        with SummaryWriter(str(run_dir)) as writer:
            writer.add_figure("saturation atlas", atlas)
        print(f"\n{experiment.table([readable(row) for row in measured])}\n")
        for row in measured:
            if row.by != "nnce" and not math.isnan(row.wrong_from):
                zero = "" if math.isnan(row.zero_from) else f", and 0 from z = {row.zero_from:g}"
                print(
                    f"{row.dtype}: {row.by}: {row.quantity} is off by more than 1 % from "
                    f"z = {row.wrong_from:.4g}{zero} (y = 0)"
                )
        print(f"\n{experiment.table(named)}\n")
        if cells:
            print(f"{experiment.table(cells)}\n")
        print(f"Results and the saturation atlas: {run_dir}")
        print(f"In TensorBoard: {experiment.tensorboard_command(run_dir)}")
    for sentence in broken:
        print(f"{options_parser.prog}: {sentence}", file=sys.stderr)
    return 1 if broken else 0


def measure_everywhere(device: torch.device) -> tuple[list[accuracy.Measured], Figure]:
    """Every dtype, on the CPU and on the device; the atlas is the CPU's."""
    places = dict.fromkeys(["cpu", device.type])
    measured, curves = [], []
    work = [(dtype, place) for place in places for dtype in accuracy.DTYPES]
    for dtype, place in tqdm(work, unit="dtype", disable=None, leave=False):
        rows, found = accuracy.measure(dtype, place)
        measured += rows + accuracy.measure_linear(dtype, place)
        if place == "cpu":
            curves.append(found)
    return measured, plots.saturation_atlas([c[0] for c in curves], [c[1] for c in curves])


def readable(row: accuracy.Measured) -> experiment.Row:
    """A row for people: three digits will do."""
    return {
        "quantity": row.quantity,
        "by": row.by,
        "dtype": f"{row.dtype}" + ("" if row.device == "cpu" else f" {row.device}"),
        "absolute error": f"{row.absolute:.1e}",
        "relative error": f"{row.relative:.1e}",
        "ulps": f"{row.ulps:.3g}",
        "at z": "" if math.isnan(row.worst_z) else f"{row.worst_z:.4g}",
        "1 % off from": row.wrong,
        "±∞, NaN": "right" if row.limits else "wrong",
    }


def compare_network(network: MLP, split: data.Split, loss: backprop.Loss) -> list[experiment.Row]:
    """Every parameter's gradient by name, hand-written against autograd, over 1,000 examples."""
    x, y = split.x[:1000], split.y[:1000]
    by_hand = backprop.backprop(network, x, y, loss=loss).gradients
    names, parameters = zip(*network.named_parameters(), strict=True)
    C = training.builtin_loss(loss)(training.torch_twin(network)(x), y)
    rows: list[experiment.Row] = []
    for name, theirs in zip(names, torch.autograd.grad(C, parameters), strict=True):
        difference = (by_hand[name] - theirs).abs()
        where = torch.unravel_index(difference.argmax(), difference.shape)
        rows.append(
            {
                "loss": loss,
                "gradient of": name,
                "shape": "×".join(map(str, theirs.shape)),
                "largest difference": f"{difference.max().item():.1e}",
                "at": ", ".join(str(int(i)) for i in where),
                "‖difference‖ / ‖gradient‖": f"{(difference.norm() / theirs.norm()).item():.1e}",
            }
        )
    return rows


def matrix() -> list[experiment.Row]:
    """What works together: a row for each way, a column for each function."""
    functions = composability.rows()
    found: list[experiment.Row] = []
    for name, check in tqdm(composability.COLUMNS.items(), disable=None, leave=False):
        found.append({"": name, **{row: cell(name, check, functions[row]) for row in functions}})
    return found


def cell(name: str, check: composability.Cell, row: composability.Row) -> str:
    """What is in a cell, tried out."""
    if "CUDA" in name and not torch.cuda.is_available():
        return "no CUDA here"
    if "inductor" in name and not shutil.which("g++"):
        return "no C++ compiler here"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(row)
        except Exception as error:
            return composability.INSIDE_PYTORCH.get(name, f"fails: {type(error).__name__}")
    return "works"


def broken_promises(
    measured: Sequence[accuracy.Measured], named: Sequence[experiment.Row]
) -> list[str]:
    """What nnce promises and does not keep, a sentence each."""
    limits = {quantity.name: quantity.limit for quantity in accuracy.quantities()}

    def limit(row: accuracy.Measured) -> float:
        return limits.get(row.quantity, accuracy.LINEAR_LIMIT)

    sentences = [
        f"{row.quantity} in {row.dtype} on {row.device}: {row.ulps:.3g} units in the last place at "
        f"z = {row.worst_z:g}, {row.below_normal:.2g} smallest normal numbers below them, limits "
        f"{'right' if row.limits else 'wrong'}"
        for row in measured
        if row.by == "nnce" and not (row.ulps <= limit(row) and row.below_normal < 1 and row.limits)
    ]
    for row in named:
        error = float(str(row["‖difference‖ / ‖gradient‖"]))
        if not error <= 1e-6:
            sentences.append(f"{row['loss']}, {row['gradient of']}: off by {error:.1e} in norm")
    return sentences


if __name__ == "__main__":
    experiment.run_script(main)
