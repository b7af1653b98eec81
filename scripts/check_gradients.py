"""Compare hand-written gradients with exact values and PyTorch, for all z and dtypes."""

if __name__ == "__main__":
    import startup  # noqa: F401  must be first


import argparse
import itertools
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nnce import _memory, data
from nnce.algorithm import backprop
from nnce.checks import Cell, check_gradients
from nnce.checks.composability import COLUMNS
from nnce.experiments import command_line, figures, report, running
from nnce.experiments.command_line import ArgumentParser
from nnce.experiments.proof import precision, table
from nnce.experiments.proof.precision import Measured
from nnce.losses import LOSSES, Loss
from nnce.modules import MLP
from nnce.training import Settings, twin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Largest relative difference in norm that counts as rounding of float32 gradients.
SAME_IN_NORM = 1e-6
PIECES = ("value", "first", "forward mode", "second")
"""Results of `nnce.check_gradients` on a function."""


def parser() -> ArgumentParser:
    """Create the parser of the options."""
    parser = ArgumentParser(__doc__)
    parser.add_common_options()
    parser.add_hidden_option("neurons of each hidden layer of the tested network")
    features = "also test the functions with torch.func, torch.compile and other PyTorch features"
    with_or_without = argparse.BooleanOptionalAction
    parser.add_argument("--matrix", action=with_or_without, default=True, help=features)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all checks; return 0 if every promise is kept, else 1."""
    options_parser = parser()
    options = options_parser.parse_args(arguments)
    began = time.perf_counter()
    with options_parser.user_errors():
        device = command_line.device(options.device)
        dataset = command_line.load_data(options)
        x, y = dataset.train
        hidden = Settings(hidden=tuple(options.hidden)).hidden  # checked
        sizes = (x.shape[1], *hidden, y.shape[1])
        _memory.check_memory(sizes, dtype=x.dtype, device=device)
        generator = torch.Generator().manual_seed(options.seed)
        network = MLP(sizes, generator=generator, device=device, dtype=x.dtype)
    with options_parser.run_directory(options, "check-gradients") as run_dir:
        measured, atlas = measure_everywhere(device)
        by_loss = [compare_network(network, dataset.train, loss) for loss in LOSSES]
        differences = [*itertools.chain(*by_loss)]
        cells = matrix(table.rows()) if options.matrix else []
        walked = matrix(table.walked_rows()) if options.matrix else []
        checked = derivatives({**table.rows(), **table.walked_rows()})
        kept, broken = promises(measured, differences, checked)
        report.write_results(
            run_dir,
            config=vars(options),
            device=device,
            seconds=time.perf_counter() - began,
            rows=[row._asdict() for row in measured],
            network=differences,
            matrix=cells,
            matrix_of_walked=walked,
            derivatives=checked,
            answer=answer(kept, broken),
            broken=broken,
        )
        report.write_figure(run_dir / "saturation-atlas.png", atlas, dpi=80)
        found = [[*map(readable_difference, differences)], checked, cells, walked]
        tables = [describe(measured), *map(report.table, filter(None, found))]
        files = "Results and saturation-atlas.png"
        report.print_results(answer(kept, broken), "\n\n".join(tables), files, run_dir, curves={})
    for promise in broken:
        print(f"{options_parser.prog}: {promise}", file=sys.stderr)
    return 1 if broken else 0


def describe(measured: Sequence[Measured]) -> str:
    """Table of the errors, and from which z on each other contender is wrong."""
    lines = [report.table([readable(row) for row in measured]), ""]
    for row in measured:
        if row.by not in precision.OURS and not math.isnan(row.wrong_from):
            zero = "" if math.isnan(row.zero_from) else f", and 0 from z = {row.zero_from:g}"
            lines.append(
                f"{row.dtype}: {row.by}: {row.quantity} is off by more than 1 % from "
                f"z = {row.wrong_from:.4g}{zero} (y = 0)"
            )
    return "\n".join(lines)


def measure_everywhere(device: torch.device) -> tuple[list[Measured], "Figure"]:
    """Measure all dtypes on the CPU and on the device; plot the atlas of the CPU."""
    places = dict.fromkeys(["cpu", device.type])
    measured, curves = [], []
    work = [(dtype, place) for place in places for dtype in precision.DTYPES]
    for dtype, place in command_line.progress(work, unit="dtype"):
        rows, curves_of_dtype = precision.measure(dtype, place)
        measured += rows + precision.measure_linear(dtype, place)
        if place == "cpu":
            curves.append(curves_of_dtype)
    return measured, figures.saturation_atlas(*([c[i] for c in curves] for i in range(3)))


def readable(row: Measured) -> report.Row:
    """Format a row of measurements for the table."""
    return {
        "quantity": row.quantity,
        "by": row.by,
        "dtype": f"{row.dtype}" + ("" if row.device == "cpu" else f" {row.device}"),
        "absolute error": f"{row.absolute:.1e}",
        "relative error": f"{row.relative:.1e}",
        "ulps": f"{row.ulps:.3g}",
        "at z": "" if math.isnan(row.worst_z) else f"{row.worst_z:.4g}",
        "1 % off from": row.wrong,
        "±∞, NaN": "right" if row.right_at_infinity else "wrong",
    }


def compare_network(network: MLP, split: data.Split, loss: Loss) -> list[dict[str, Any]]:
    """Compare the gradients of all parameters with autograd, on 1,000 examples.

    In each row, `largest` is the largest absolute difference of an element, `at` its index, and
    `relative` is ‖difference‖ / ‖gradient‖.
    """
    x, y = split.x[:1000], split.y[:1000]
    by_hand = backprop(network, x, y, loss=loss).gradients
    names, parameters = zip(*network.named_parameters(), strict=True)
    C = twin.BUILT_IN_LOSSES[loss](twin.torch_twin(network)(x), y)
    differences = []
    for name, gradient in zip(names, torch.autograd.grad(C, parameters), strict=True):
        difference = (by_hand[name] - gradient).abs()
        where = torch.unravel_index(difference.argmax(), difference.shape)
        numbers = {
            "largest": difference.max().item(),
            "at": tuple(int(i) for i in where),
            "relative": (difference.norm() / gradient.norm()).item(),
        }
        shape = tuple(gradient.shape)
        differences.append({"loss": loss, "parameter": name, "shape": shape, **numbers})
    return differences


def readable_difference(difference: dict[str, Any]) -> report.Row:
    """Format a row of `compare_network` for the table."""
    return {
        "loss": difference["loss"],
        "gradient of": difference["parameter"],
        "shape": "×".join(map(str, difference["shape"])),
        "largest difference": f"{difference['largest']:.1e}",
        "at": ", ".join(map(str, difference["at"])),
        "‖difference‖ / ‖gradient‖": f"{difference['relative']:.1e}",
    }


def derivatives(functions: Mapping[str, table.Row]) -> list[report.Row]:
    """Verdicts of `nnce.check_gradients` on each function, with PyTorch's as the reference."""
    rows: list[report.Row] = []
    for name, row in functions.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about PyTorch's own code
            found = check_gradients(row.function, *row.inputs, reference=row.reference)
        findings = (found.value, found.first, found.forward_mode, found.second)
        verdicts = {piece: one.verdict for piece, one in zip(PIECES, findings, strict=True)}
        error = {"largest relative error": f"{found.first.error:.1e}"}
        rows.append({"derivatives of": name, **verdicts, **error})
    return rows


def matrix(functions: Mapping[str, table.Row]) -> list[report.Row]:
    """Compatibility table: one row per PyTorch feature, one column per function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about PyTorch's own code
        items = command_line.progress(functions.items())
        found = {name: row.check() for name, row in items}
    return [
        {"": feature, **{name: cell(name, feature, of[feature]) for name, of in found.items()}}
        for feature in COLUMNS
    ]


def cell(name: str, feature: str, found: Cell) -> str:
    """Text of a cell in the compatibility table."""
    if found.verdict == "fails" and name in table.walked_rows():
        return f"refused: {table.REFUSED.get(feature, found.detail)}"
    if found.verdict == "fails" and feature in table.INSIDE_PYTORCH:
        return table.INSIDE_PYTORCH[feature]
    return f"{found.verdict}: {found.detail}" if found.detail else found.verdict


def answer(kept: int, broken: Sequence[str]) -> str:
    """Summarize how many promises are kept, and name the broken ones."""
    if not broken:
        return f"All {kept} promises kept."
    return f"{len(broken)} of {kept + len(broken)} promises broken: {'; '.join(broken)}."


def promises(
    measured: Sequence[Measured],
    differences: Sequence[dict[str, Any]],
    checked: Sequence[report.Row],
) -> tuple[int, list[str]]:
    """Return the number of promises kept, and a description of each broken one."""
    promised = {quantity.name: quantity.promised for quantity in precision.quantities()}

    def is_kept(row: Measured) -> bool:
        of_dtype = promised.get(row.quantity)
        ulps = of_dtype(row.dtype) if of_dtype else precision.LINEAR_PROMISED_ULPS
        return row.ulps <= ulps and row.below_normal < 1 and row.right_at_infinity

    all_promises = [
        (
            is_kept(row),
            f"{row.by}: {row.quantity} in {row.dtype} on {row.device}: {row.ulps:.3g} units in the "
            f"last place at z = {row.worst_z:g}; {row.below_normal:.2g} times the smallest normal "
            f"number below it; limits {'right' if row.right_at_infinity else 'wrong'}",
        )
        for row in measured
        if row.by in precision.OURS
    ]
    all_promises += [
        (
            of["relative"] <= SAME_IN_NORM,
            f"{of['loss']}, {of['parameter']}: relative difference {of['relative']:.1e}",
        )
        for of in differences
    ]
    all_promises += [
        (row[piece] != "wrong", f"derivatives of {row['derivatives of']}: {piece} wrong")
        for row in checked
        for piece in PIECES
    ]
    broken = [promise for is_kept, promise in all_promises if not is_kept]
    return len(all_promises) - len(broken), broken


if __name__ == "__main__":
    running.run_script(main)
