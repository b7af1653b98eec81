"""Train a classifier with very many labels in bounded memory, and rank them all."""

if __name__ == "__main__":
    import startup  # noqa: F401  before all else


import argparse
import codecs
import gzip
import itertools
import math
import re
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import scipy.sparse
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from nnce import LinearSigmoidCrossEntropyLoss, Positives
from nnce.experiments import command_line, report, resuming
from nnce.experiments.command_line import ArgumentParser
from nnce.experiments.timing import resident
from nnce.labels import blocks

BEST = (1, 3, 5)
"""How many of the best labels precision and nDCG look at."""
# What Python, PyTorch's threads and the allocator may take besides what is counted.
SLACK_MB = 100
LARGEST = 2**31 - 1
"""The most examples, features and labels that a file may have."""
LARGEST_VALUE = torch.finfo(torch.float32).max
PLANTED_LABELS = 2**24
"""The most that `torch.multinomial` draws from."""


Features = Tensor | tuple[Tensor, Tensor, Tensor]
"""Dense, or as `torch.nn.EmbeddingBag` takes them: numbers, where each row begins, weights."""


class Examples(NamedTuple):
    """Features, dense or a SciPy sparse matrix, and the labels that each example has."""

    features: Tensor | scipy.sparse.csr_array
    positives: Positives

    def batches(self, size: int, order: Tensor) -> Iterator[tuple[Features, Positives]]:
        """Mini-batches in this order."""
        for chosen in order.split(size):
            if isinstance(self.features, Tensor):
                yield self.features[chosen], self.positives[chosen]
                continue
            rows = self.features[chosen.numpy()]
            numbers, starts = (torch.from_numpy(t).long() for t in (rows.indices, rows.indptr[:-1]))
            bags = (numbers, starts, torch.from_numpy(rows.data).float())
            yield bags, self.positives[chosen]


class Classifier(nn.Module):
    """Dense features as they are, or a sum of embeddings of sparse ones; then all labels.

    The biases start from the share of the targets which are 1.
    """

    def __init__(self, inputs: int | None, features: int, labels: int, share: float) -> None:
        super().__init__()
        self.embedding = (
            None if inputs is None else nn.EmbeddingBag(inputs, features, mode="sum", sparse=False)
        )
        self.labels = LinearSigmoidCrossEntropyLoss(features, labels, prior=share)

    def encode(self, x: Features) -> Tensor:
        """The features of a mini-batch, [n, features]."""
        if isinstance(x, Tensor):
            return x
        assert self.embedding is not None
        numbers, offsets, weights = x
        return cast(Tensor, self.embedding(numbers, offsets, per_sample_weights=weights))

    def forward(self, x: Features, positives: Positives) -> Tensor:
        """C, a mean over the examples."""
        return cast(Tensor, self.labels(self.encode(x), positives))


# ---------------------------------------------------------------------------------------- data


def planted(
    n: int, features: int, labels: int, each: int, generator: torch.Generator
) -> tuple[Examples, Examples]:
    """Examples that are noisy sums of the directions of their labels; n to learn, n / 10 to test.

    Label l is drawn as often as 1 / (l + 20) says, as the frequencies of words are.
    """
    directions = torch.randn(labels, features, generator=generator)
    often = 1 / (torch.arange(labels) + 20.0)
    both = []
    for size in (n, max(n // 10, 1)):
        drawn = torch.multinomial(often, size * each, replacement=True, generator=generator)
        rows = torch.arange(size).repeat_interleave(each)
        keys = (rows * labels + drawn).unique()
        positives = Positives.from_coo(keys // labels, keys % labels, size)
        x = torch.randn(size, features, generator=generator)
        x.index_add_(0, positives.rows(), directions[positives.col])
        both.append(Examples(x / math.sqrt(each + 1), positives))
    return both[0], both[1]


def read(path: Path) -> tuple[Examples, int, int]:
    """Read a file in the XMC repository's sparse text format.

    The first line holds the numbers of examples, features and labels. Each other line is one
    example: its labels, separated by commas, a blank, and feature:value pairs in any order. An
    example may lack labels, features, or both.

    Returns:
        The examples, the number of features, and the number of labels.

    Raises:
        ValueError: the file cannot be read or a line is not in this format.
    """
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as lines:
            return _parse(lines)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {reason}") from error
    except _BadLine as error:
        number, sentence = error.args
        raise ValueError(f"{path}, line {number:,}: {sentence}") from error


class _BadLine(Exception):
    """The number of a line, from 1, and what is wrong with it."""


# At most 18 digits, which fit into 64 bits.
_WHOLE = re.compile(rb"\d{1,18}")
_PAIR = re.compile(rb"\d{1,18}:[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")


def _parse(lines: Iterable[bytes]) -> tuple[Examples, int, int]:
    numbered = enumerate(lines, start=1)
    n, features, labels = _sizes(next(numbered, (1, b""))[1])
    starts, columns, values = array("q", [0]), array("q"), array("f")
    examples, positives = array("q"), array("q")
    number = 1
    for number, line in numbered:
        if number > n + 1:
            if line.strip():
                raise _BadLine(number, f"expected the file to end after {n:,} examples")
            continue
        its_labels, its_features, its_values = _example(number, line, features, labels)
        columns.extend(its_features)
        values.extend(its_values)
        starts.append(len(columns))
        examples.extend([number - 2] * len(its_labels))
        positives.extend(its_labels)
    read = len(starts) - 1
    if read < n:
        raise _BadLine(number, f"expected {n:,} examples, but the file ends after {read:,}")
    matrix = scipy.sparse.csr_array((values, columns, starts), shape=(n, features))
    matrix.sort_indices()
    rows, col = (torch.tensor(numbers, dtype=torch.int64) for numbers in (examples, positives))
    return Examples(matrix, Positives.from_coo(rows, col, n)), features, labels


def _sizes(header: bytes) -> list[int]:
    """The numbers of examples, features and labels, from the first line."""
    words = header.removeprefix(codecs.BOM_UTF8).split()
    sizes = [int(word) for word in words if _WHOLE.fullmatch(word)]
    if not len(sizes) == len(words) == 3 or not 0 < min(sizes) <= max(sizes) <= LARGEST:
        raise _BadLine(
            1,
            f"expected three whole numbers from 1 to {LARGEST:,}, the numbers of examples, "
            f"features and labels, got {_shown(b' '.join(words))}",
        )
    return sizes


def _example(
    number: int, line: bytes, features: int, labels: int
) -> tuple[list[int], list[int], list[float]]:
    """The labels, features and values of one line, checked."""
    tokens = line.split()
    first = tokens.pop(0).split(b",") if tokens and b":" not in tokens[0] else []
    for expected, pattern, found in (
        ("whole label numbers", _WHOLE, first),
        ("feature:value", _PAIR, tokens),
    ):
        for wrong in itertools.filterfalse(pattern.fullmatch, found):
            raise _BadLine(number, f"expected {expected}, got {_shown(wrong)}")
    pairs = b" ".join(tokens).replace(b":", b" ").split()
    its_labels, its_features = list(map(int, first)), list(map(int, pairs[::2]))
    for kind, its, size in (("label", its_labels, labels), ("feature", its_features, features)):
        if its and max(its) >= size:
            raise _BadLine(
                number, f"expected {kind} numbers from 0 to {size - 1:,}, got {max(its):,}"
            )
        if len(set(its)) < len(its):
            twice = next(i for i in its if its.count(i) > 1)
            raise _BadLine(number, f"expected each {kind} once, got {kind} {twice:,} twice")
    its_values = list(map(float, pairs[1::2]))
    largest = max(its_values, key=abs, default=0.0)
    if abs(largest) > LARGEST_VALUE:
        raise _BadLine(number, f"expected values within float32's range, got {largest:g}")
    return its_labels, its_features, its_values


def _shown(text: bytes) -> str:
    return repr(text[:60].decode(errors="replace"))


# ------------------------------------------------------------------------------------- figures


def relevance(labels: Tensor, positives: Positives, num_labels: int) -> Tensor:
    """Of the best labels of each example, [n, k], which it has: 0 or 1."""
    has = positives.rows() * num_labels + positives.col
    asked = torch.arange(len(labels))[:, None] * num_labels + labels
    return torch.isin(asked, has).double()


def figures(relevant: Tensor, counts: Tensor) -> dict[str, float]:
    """Precision and nDCG at 1, 3 and 5, means over the examples that have a label.

    Precision at k is the share of the k best that are relevant; DCG at k is Σ relevant_i /
    log₂(i + 1), and nDCG divides by the DCG of the best order there is.

    Args:
        relevant: whether each of the best labels is, in their order, [n, k].
        counts: how many labels each example has, [n].
    """
    relevant, counts = relevant[counts > 0], counts[counts > 0]
    discounts = 1 / torch.log2(torch.arange(relevant.shape[1]) + 2.0).double()
    found = {}
    for k in (k for k in BEST if k <= relevant.shape[1]):
        found[f"precision@{k}"] = relevant[:, :k].mean().item()
        ideal = discounts[:k].cumsum(0)[counts.clamp(max=k) - 1]
        found[f"nDCG@{k}"] = ((relevant[:, :k] @ discounts[:k]) / ideal).mean().item()
    return found


def evaluate(
    model: Classifier, examples: Examples, num_labels: int, batch_size: int
) -> dict[str, float]:
    """Rank all labels for each example; the loss, and `figures`."""
    relevant, C = [], 0.0
    k = min(max(BEST), num_labels)
    with torch.no_grad():
        for x, positives in examples.batches(batch_size, torch.arange(len(examples.positives))):
            features = model.encode(x)
            _, best = model.labels.topk(features, k)
            relevant.append(relevance(best, positives, num_labels))
            C += model.labels(features, positives).item() * len(positives)
    counts = examples.positives.crow.diff()
    return {"loss": C / len(counts), **figures(torch.cat(relevant), counts)}


def most_frequent(train: Examples, test: Examples, num_labels: int) -> dict[str, float]:
    """What naming the most frequent labels for every example would come to."""
    often = torch.bincount(train.positives.col, minlength=num_labels)
    best = often.argsort(descending=True, stable=True)[: max(BEST)]
    relevant = relevance(best.expand(len(test.positives), -1), test.positives, num_labels)
    return figures(relevant, test.positives.crow.diff())


# ------------------------------------------------------------------------------------- the script


def parser() -> ArgumentParser:
    """The options."""
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--data-file",
        type=Path,
        help="examples to learn from, in the XMC repository's sparse text format, or that and .gz "
        "(if not given: planted ones)",
    )
    parser.add_argument(
        "--test-file", type=Path, help="examples to test on (if not given: a tenth of --data-file)"
    )
    parser.add_argument("--labels", type=int, default=200_000, help="labels of planted examples")
    parser.add_argument("--examples", type=int, default=10_000, help="planted ones to learn from")
    parser.add_argument("--features", type=int, default=128, help="of an example, or its embedding")
    parser.add_argument("--positives", type=int, default=5, help="labels of a planted example")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training data")
    parser.add_argument("--batch-size", type=int, default=512, help="examples in a mini-batch")
    parser.add_argument("--lr", type=float, default=0.01, help="Adam's learning rate")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_run_directory_options()
    parser.add_speed_options()
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and rank; the exit status."""
    options_parser = parser()
    options = options_parser.parse_args(arguments)
    with options_parser.user_errors():
        for name in ("labels", "examples", "features", "positives", "epochs", "batch_size"):
            if getattr(options, name) < 1:
                raise ValueError(f"expected a positive --{name.replace('_', '-')}")
        if not (math.isfinite(options.lr) and options.lr > 0):
            raise ValueError(f"expected a positive --lr, got {options.lr}")
        if not options.data_file and options.labels > PLANTED_LABELS:
            raise ValueError(f"expected at most {PLANTED_LABELS:,} --labels of planted examples")
        if options.test_file and not options.data_file:
            raise ValueError("expected --data-file with --test-file")
        command_line.set_speed(options, torch.get_num_threads())
        generator = torch.Generator().manual_seed(options.seed)
        train, test, inputs, num_labels = load(options, generator)
        torch.manual_seed(options.seed)
        share = max(len(train.positives.col), 1) / (len(train.positives) * num_labels)
        model = Classifier(inputs, options.features, num_labels, min(share, 0.5))
    with options_parser.run_directory(options, "labels") as run_dir:
        command_line.announce_threads(options)
        learn(model, train, test, num_labels, generator, options, run_dir)
    return 0


def load(
    options: argparse.Namespace, generator: torch.Generator
) -> tuple[Examples, Examples, int | None, int]:
    """Examples to learn from and to test on, how many sparse features, and how many labels."""
    if options.data_file is None:
        both = planted(
            *(options.examples, options.features, options.labels, options.positives), generator
        )
        return *both, None, options.labels
    examples, inputs, num_labels = read(options.data_file)
    if options.test_file is not None:
        test, *sizes = read(options.test_file)
        if sizes != [inputs, num_labels]:
            raise ValueError(
                f"{options.test_file}: expected {inputs:,} features and {num_labels:,} labels like "
                f"--data-file, got {sizes[0]:,} and {sizes[1]:,}"
            )
        train = examples
    else:
        n = len(examples.positives)
        if n < 2:
            raise ValueError(
                f"{options.data_file}: expected two examples at least, one for the test"
            )
        order = torch.randperm(n, generator=generator)
        matrix = cast(scipy.sparse.csr_array, examples.features)
        test, train = (
            Examples(matrix[chosen.numpy()], examples.positives[chosen])
            for chosen in order.tensor_split([max(n // 10, 1)])
        )
    if not len(test.positives.col):
        source = options.test_file or f"the tenth of {options.data_file} that --seed draws"
        raise ValueError(
            f"expected a test set with labels, got none in {source}: choose a different one"
        )
    return train, test, inputs, num_labels


def learn(
    model: Classifier,
    train: Examples,
    test: Examples,
    num_labels: int,
    generator: torch.Generator,
    options: argparse.Namespace,
    run_dir: Path,
) -> None:
    """Train, log each epoch, and write what came out."""
    began = time.perf_counter()
    n, parameters = len(train.positives), sum(p.numel() for p in model.parameters())
    size = 4 * parameters / 1e6
    # Ranking has a block of its own.
    block = 2 * blocks.memory(min(options.batch_size, n), num_labels, options.features) / 1e6
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)
    warm_up()
    before = resident() / 1e6
    bound = before + 3 * size + block + SLACK_MB
    print(
        f"{n:,} training and {len(test.positives):,} test examples, {num_labels:,} labels, "
        f"threads {torch.get_num_threads()}\n"
        f"memory: {before:,.0f} MB at hand, parameters of {size:,.0f} among them; their gradient "
        f"and Adam's two averages {3 * size:,.0f}, blocks of labels {block:,.0f}: at most "
        f"{bound:,.0f} MB with {SLACK_MB} to spare (all logits of a mini-batch would be "
        f"{4 * options.batch_size * num_labels / 1e6:,.0f}, and more with their gradient)",
        flush=True,
    )
    rows: list[report.Row] = [
        {"epoch": "the most frequent", **most_frequent(train, test, num_labels)}
    ]
    ending = resuming.Ending(run_dir, lambda: len(rows) > 1)
    steps = math.ceil(n / options.batch_size)
    with (
        ending,
        SummaryWriter(str(run_dir)) as writer,
        tqdm(total=options.epochs * steps, unit="step", disable=None, leave=False) as bar,
    ):
        for epoch in range(1, options.epochs + 1):
            total = 0.0
            order = torch.randperm(n, generator=generator)
            for step, (x, positives) in enumerate(train.batches(options.batch_size, order)):
                optimizer.zero_grad()
                C = model(x, positives)
                C.backward()
                optimizer.step()
                total += C.item() * len(positives)
                writer.add_scalar("loss/step", C.item(), (epoch - 1) * steps + step)
                bar.update()
            check_loss(total, "training", epoch)
            found = evaluate(model, test, num_labels, options.batch_size)
            check_loss(found["loss"], "test", epoch)
            with command_line.undisturbed():
                rows.append(
                    {
                        "epoch": epoch,
                        "loss_train": total / n,
                        "loss_test": found.pop("loss"),
                        **found,
                    }
                )
                for name, value in rows[-1].items():
                    if isinstance(value, float):
                        writer.add_scalar(f"test/{name}", value, epoch)
                command_line.keep(run_dir)
                bar.write(
                    f"epoch {epoch}: loss {total / n:.4f}, precision@1 "
                    f"{report.in_percent(found['precision@1'])}"
                )
    peak = resident(peak=True) / 1e6
    with command_line.undisturbed():
        report.write_results(
            run_dir,
            config=vars(options),
            device=torch.device("cpu"),
            seconds=time.perf_counter() - began,
            rows=rows,
            answer=answer(rows, num_labels, peak, bound),
            interrupted=ending.stopped is not None,
            memory={"before_MB": before, "bound_MB": bound, "peak_MB": peak},
        )
    print(f"\n{report.table([readable(row) for row in rows])}\n")
    print(f"{time.perf_counter() - began:.1f} s")
    report.print_end(answer(rows, num_labels, peak, bound), "Results", run_dir)
    ending.close(f"Interrupted; epochs 1 to {len(rows) - 1} are kept.")


def answer(rows: Sequence[report.Row], num_labels: int, peak: float, bound: float) -> str:
    """How good the ranking is, and whether the memory was as stated."""
    baseline, last = rows[0], rows[-1]
    best, frequent = (
        report.in_percent(cast(float, row["precision@1"])) for row in (last, baseline)
    )
    trained = f"after epoch {last['epoch']}" if len(rows) > 1 else "before training"
    return (
        f"The best of {num_labels:,} labels is right for {best} of the test examples {trained} "
        f"(always the most frequent label: {frequent}).\n"
        f"Peak memory {peak:,.0f} MB, {'within' if peak <= bound else 'MORE THAN'} the "
        f"{bound:,.0f} MB stated."
    )


def check_loss(loss: float, examples: str, epoch: int) -> None:
    """Raise Failed unless it is finite."""
    if not math.isfinite(loss):
        raise command_line.Failed(
            f"the loss of the {examples} examples is {loss} in epoch {epoch}: lower --lr, or scale "
            f"the features"
        )


def warm_up() -> None:
    """One step of a tiny model, for what PyTorch imports and starts when it first needs it."""
    tiny = Classifier(None, 1, 2, 0.5)
    tiny(torch.ones(1, 1), Positives.from_lists([[0]])).backward()
    torch.optim.Adam(tiny.parameters(), fused=True).step()
    tiny.labels.topk(torch.ones(1, 1), 1)


def readable(row: report.Row) -> report.Row:
    """A row in percent."""
    losses = {name: row.get(name, "") for name in ("loss_train", "loss_test")}
    percents = {
        f"{name}, %": f"{100 * cast(float, row[name]):.2f}"
        for name in itertools.chain(*((f"precision@{k}", f"nDCG@{k}") for k in BEST))
        if name in row
    }
    return {"epoch": row["epoch"], **losses, **percents}


if __name__ == "__main__":
    command_line.run_script(main)
