"""Train the notes' single neuron (input 1, target 0) with both losses from bad starts."""

if __name__ == "__main__":
    import startup  # noqa: F401  must be first


import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from nnce.algorithm import backprop
from nnce.experiments import command_line, figures, report, running
from nnce.experiments.command_line import DTYPES, ArgumentParser
from nnce.experiments.tensorboard import add_points
from nnce.losses import LOSSES, Loss

STARTS = ((0.6, 0.9), (2.0, 2.0), (20.0, 20.0))
# The neuron counts as correct once a is below this threshold.
RIGHT = 0.5

Rule = Literal["quadratic", "cross-entropy", "BCELoss of σ(z)"]
RULES: tuple[Rule, ...] = get_args(Rule)


class Story(NamedTuple):
    """Training history of one neuron by one rule; the first values are before any step."""

    rule: Rule
    w: float
    b: float
    output: list[float]
    """a, in [0, 1]."""
    loss: list[float]
    """Loss C of the rule."""
    dw: list[float]
    """|dC/dw|."""


def parser() -> ArgumentParser:
    """Create the parser of the options."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    usual = ", ".join(f"{w:g} {b:g}" for w, b in STARTS)
    start = f"initial weight and bias; may be repeated (default: {usual})"
    add("--start", type=float, nargs=2, action="append", metavar=("W", "B"), help=start)
    add("--lr", type=float, default=0.15, help="learning rate")
    add("--epochs", type=int, default=300, help="training steps, 1 to 100,000")
    add("--dtype", choices=DTYPES, default="float32", help="dtype of all tensors")
    parser.add_run_directory_options()
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train all neurons and report; return the exit status."""
    options_parser = parser()
    options = options_parser.parse_args(arguments)
    began = time.perf_counter()
    with options_parser.user_errors():
        if not 1 <= options.epochs <= 100_000:
            raise ValueError(f"expected 1 to 100,000 --epochs, got {options.epochs:,}")
        starts = [tuple(start) for start in options.start or STARTS]
        texts = [f"{w:g} {b:g}" for w, b in starts]  # which also name the folders of the curves
        command_line.check_distinct("--start", texts, texts)
        numbers = torch.tensor([options.lr, *(value for start in starts for value in start)])
        if not (numbers.isfinite().all() and options.lr > 0):
            raise ValueError("expected finite numbers for --start and a positive --lr")
    with options_parser.run_directory(options, "slowdown") as run_dir:
        dtype = DTYPES[options.dtype]
        work = [*itertools.product(starts, RULES)]
        stories = [
            learn(rule, w, b, options.lr, options.epochs, dtype)
            for (w, b), rule in command_line.progress(work, "training", unit="neuron")
        ]
        rows = [row(story) for story in stories]
        report.write_results(
            run_dir,
            config=vars(options),
            device=torch.device("cpu"),
            seconds=time.perf_counter() - began,
            rows=rows,
            answer=answer(stories),
            epochs=[story._asdict() for story in stories],
        )
        log(stories, run_dir)
        table = report.table([readable(story) for story in stories])
        report.print_results(answer(stories), table, "Results and single-neuron.png", run_dir)
    return 0


def learn(rule: Rule, w: float, b: float, lr: float, epochs: int, dtype: torch.dtype) -> Story:
    """Train one neuron from (w, b) on its single example."""
    x, y = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    W, bias = torch.full((1, 1), w, dtype=dtype), torch.full((1,), b, dtype=dtype)
    story = Story(rule, w, b, [], [], [])
    for _ in range(epochs + 1):
        if rule == "BCELoss of σ(z)":
            a, C, dW, db = by_autograd(W, bias, x, y)
        else:
            a, C, dW, db = by_hand(W, bias, x, y, rule)
        story.output.append(a.item())
        story.loss.append(C.item())
        story.dw.append(abs(dW.item()))
        W, bias = W - lr * dW, bias - lr * db
    return story


_Step = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def by_hand(
    W: torch.Tensor, b: torch.Tensor, x: torch.Tensor, y: torch.Tensor, loss: Loss
) -> _Step:
    """Compute a, C, dC/dW and dC/db by the hand-written rules."""
    one_pass = backprop([(W, b)], x, y, loss=loss)
    C = LOSSES[loss].value(one_pass.z[-1], y)
    return one_pass.a[-1], C, one_pass.gradients["0.weight"], one_pass.gradients["0.bias"]


def by_autograd(W: torch.Tensor, b: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> _Step:
    """Compute a, C, dC/dW and dC/db in PyTorch, by sigmoid, BCELoss and autograd."""
    W, b = W.requires_grad_(), b.requires_grad_()
    a = nn.functional.linear(x, W, b).sigmoid()
    C = nn.functional.binary_cross_entropy(a, y)
    dW, db = torch.autograd.grad(C, (W, b))
    return a.detach(), C.detach(), dW, db


def log(stories: Sequence[Story], run_dir: Path) -> None:
    """Log curves to TensorBoard, one run per rule and start, and write the figure."""
    for story in command_line.progress(stories, "logging", unit="neuron"):
        name = f"w{story.w:g}-b{story.b:g}-{story.rule.split(' ')[0]}"
        with SummaryWriter(str(run_dir / name)) as writer:
            for epoch, values in enumerate(zip(story.output, story.loss, story.dw, strict=True)):
                points = zip(("output", "loss", "dC_dw"), values, strict=True)
                add_points(writer, {f"neuron/{name}": value for name, value in points}, epoch)
    by_start: dict[tuple[float, float], dict[str, tuple[list[float], ...]]] = {}
    for story in stories:
        of_start = by_start.setdefault((story.w, story.b), {})
        of_start[story.rule] = (story.output, story.loss, story.dw)
    figure = figures.single_neuron(
        [(f"start w = {w:g}, b = {b:g}", by_rule) for (w, b), by_rule in by_start.items()]
    )
    with command_line.announced("plotting"), SummaryWriter(str(run_dir)) as writer:
        report.write_figure(run_dir / "single-neuron.png", figure, dpi=90)
        writer.add_figure("single neuron", figure)


def row(story: Story) -> report.Row:
    """A row of results.json."""
    right = (epoch for epoch, a in enumerate(story.output) if a < RIGHT)
    return {
        "w": story.w,
        "b": story.b,
        "rule": story.rule,
        "output_start": story.output[0],
        "output_end": story.output[-1],
        "loss_start": story.loss[0],
        "loss_end": story.loss[-1],
        "dw_start": story.dw[0],
        "dw_most": max(story.dw),
        "first_epoch_below_half": next(right, None),
    }


def answer(stories: Sequence[Story]) -> str:
    """Summarize how many epochs each rule needs from the worst start."""
    worst = max(stories, key=lambda story: story.w + story.b)
    took = []
    for story in stories:
        if (story.w, story.b) == (worst.w, worst.b):
            first = row(story)["first_epoch_below_half"]
            epochs = f"not within {len(story.output) - 1}" if first is None else str(first)
            took.append(f"{story.rule} {epochs}")
    return (
        f"From w = {worst.w:g}, b = {worst.b:g}, epochs until the output is below ½: "
        f"{', '.join(took)}."
    )


def readable(story: Story) -> report.Row:
    """Format the results of one neuron for the table."""
    numbers = row(story)
    first = numbers["first_epoch_below_half"]
    return {
        "start w, b": f"{story.w:g}, {story.b:g}",
        "rule": story.rule,
        "|dC/dw| at the start": f"{numbers['dw_start']:.2g}",
        "loss": f"{numbers['loss_start']:.3g} → {numbers['loss_end']:.3g}",
        "output": f"{numbers['output_start']:.4f} → {numbers['output_end']:.4f}",
        "below ½ from epoch": "never" if first is None else str(first),
    }


if __name__ == "__main__":
    running.run_script(main)
