"""Train a classifier with very many labels in bounded memory, and rank all labels."""

if __name__ == "__main__":
    import startup  # noqa: F401  must be first


import argparse
import functools
import itertools
import math
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from nnce import LinearSigmoidCrossEntropyLoss, Positives
from nnce.experiments import command_line, directories, report, resuming, running, xmc
from nnce.experiments.command_line import ArgumentParser
from nnce.experiments.report import counted
from nnce.experiments.timing import resident
from nnce.experiments.xmc import Examples, Features
from nnce.labels import blocks
from nnce.training.parallel import ALONE
from nnce.training.state import check_fits

BEST = (1, 3, 5)
"""Numbers k of top-ranked labels for precision@k and nDCG@k."""
MODEL = "model.npz"
# Allowance for Python, PyTorch's threads and the allocator, which are not modeled.
SLACK_MB = 100
PLANTED_LABELS = 2**24
"""Largest number of categories of `torch.multinomial`."""


class Classifier(nn.Module):
    """Linear classifier over dense features, or over the summed embeddings of sparse ones.

    The biases are initialized from the share of targets that are 1.
    """

    def __init__(self, inputs: int | None, features: int, labels: int, share: float) -> None:
        super().__init__()
        self.embedding = (
            None if inputs is None else nn.EmbeddingBag(inputs, features, mode="sum", sparse=False)
        )
        self.labels = LinearSigmoidCrossEntropyLoss(features, labels, prior=share)

    def encode(self, x: Features) -> Tensor:
        """Compute the dense features of a mini-batch, [n, features]."""
        if isinstance(x, Tensor):
            return x
        assert self.embedding is not None
        numbers, offsets, weights = x
        return cast(Tensor, self.embedding(numbers, offsets, per_sample_weights=weights))

    def forward(self, x: Features, positives: Positives) -> Tensor:
        """Compute the loss C, averaged over the examples."""
        return cast(Tensor, self.labels(self.encode(x), positives))


def load_model(path: str | Path) -> Classifier:
    """Load a model from the model.npz of a run."""
    with np.load(path, allow_pickle=False) as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    labels, features = state["labels.weight"].shape
    embedding = state.get("embedding.weight")
    model = Classifier(None if embedding is None else len(embedding), features, labels, 0.5)
    model.load_state_dict(state)
    return model


# ---------------------------------------------------------------------------------------- data


def planted(
    n: int, features: int, labels: int, each: int, generator: torch.Generator
) -> tuple[Examples, Examples]:
    """Draw n training and n / 10 test examples; features are noisy sums of label directions.

    Label l is drawn with probability proportional to 1 / (l + 20), similar to word frequencies.
    """
    directions = torch.randn(labels, features, generator=generator)
    frequency = 1 / (torch.arange(labels) + 20.0)
    both = []
    for size in (n, max(n // 10, 1)):
        drawn = torch.multinomial(frequency, size * each, replacement=True, generator=generator)
        rows = torch.arange(size).repeat_interleave(each)
        keys = (rows * labels + drawn).unique()
        positives = Positives.from_coo(keys // labels, keys % labels, size)
        x = torch.randn(size, features, generator=generator)
        x.index_add_(0, positives.rows(), directions[positives.col])
        both.append(Examples(x / math.sqrt(each + 1), positives))
    return both[0], both[1]


# ------------------------------------------------------------------------------------- figures


def relevance(labels: Tensor, positives: Positives, num_labels: int) -> Tensor:
    """Whether each example has each of its top-ranked labels [n, k]: 0 or 1."""
    has = positives.rows() * num_labels + positives.col
    ranked = torch.arange(len(labels))[:, None] * num_labels + labels
    return torch.isin(ranked, has).double()


def figures(relevant: Tensor, counts: Tensor) -> dict[str, float]:
    """Precision and nDCG at 1, 3 and 5, averaged over the examples that have a label.

    Precision at k is the share of relevant labels among the k top-ranked ones. DCG at k is
    Σ relevant_i / log₂(i + 1), and nDCG is DCG divided by that of a perfect ranking.

    Args:
        relevant: relevance of the top-ranked labels, in their order, [n, k].
        counts: number of labels of each example, [n].
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
    """Rank all labels for each example; return the loss and `figures`."""
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
    """`figures` of a baseline that predicts the most frequent labels for every example."""
    frequency = torch.bincount(train.positives.col, minlength=num_labels)
    best = frequency.argsort(descending=True, stable=True)[: max(BEST)]
    relevant = relevance(best.expand(len(test.positives), -1), test.positives, num_labels)
    return figures(relevant, test.positives.crow.diff())


# ------------------------------------------------------------------------------------- the script


def parser() -> ArgumentParser:
    """Create the parser of the options."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    file = (
        "training examples in the XMC repository's sparse text format, optionally gzipped; a "
        "binary copy is written to the same folder (default: planted examples)"
    )
    add("--data-file", type=Path, help=file)
    add("--test-file", type=Path, help="test examples (default: a tenth of --data-file)")
    add("--labels", type=int, default=200_000, help="number of labels of planted examples")
    add("--examples", type=int, default=10_000, help="number of planted training examples")
    features = "number of features, or embedding size with --data-file"
    add("--features", type=int, default=128, help=features)
    add("--positives", type=int, default=5, help="positive labels per planted example")
    add("--epochs", type=int, default=3, help="passes over the training data")
    add("--batch-size", type=int, default=512, help="mini-batch size")
    add("--lr", type=float, default=0.01, help="learning rate of Adam")
    add("--seed", type=command_line.seed, default=0, help="random seed")
    parser.add_run_directory_options()
    parser.add_speed_options()
    resuming.add_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, rank all labels and report; return the exit status."""
    options_parser = parser()
    start = resuming.start(options_parser, arguments, "labels.py", ALONE)
    options = start.options
    with options_parser.user_errors():
        check(options)
        command_line.set_speed(options, torch.get_num_threads())
        generator = torch.Generator().manual_seed(options.seed)
        data = load(options, generator)
        if start.found:
            resuming.warn(start.found, ALONE)
        with command_line.announced("creating the classifier", quiet=options.quiet):
            learning = Learning(data, generator, options)
            if start.found and start.run_dir:
                with resuming.loading():
                    learning.load_state_dict(start.found, start.run_dir)
            warm_up()
    with start.directory(options_parser, "labels") as run_dir:
        command_line.announce_threads(options)
        learn(learning, run_dir)
    return 0


def check(options: argparse.Namespace) -> None:
    """Raise ValueError if the options are invalid or contradict each other."""
    for name in ("labels", "examples", "features", "positives", "epochs", "batch_size"):
        if (value := getattr(options, name)) < 1:
            raise ValueError(f"expected a positive {command_line.option(name)}, got {value:,}")
    if not (math.isfinite(options.lr) and options.lr > 0):
        raise ValueError(f"expected a positive --lr, got {options.lr}")
    if not options.data_file and options.labels > PLANTED_LABELS:
        raise ValueError(f"expected at most {PLANTED_LABELS:,} --labels, got {options.labels:,}")
    if options.test_file and not options.data_file:
        raise ValueError("--test-file requires --data-file")


class Data(NamedTuple):
    """Training and test examples, and the numbers of sparse features and labels."""

    train: Examples
    test: Examples
    inputs: int | None
    num_labels: int


def load(options: argparse.Namespace, generator: torch.Generator) -> Data:
    """Draw planted examples, or read the data files and write their binary copies."""
    if options.data_file is None:
        sizes = (options.examples, options.features, options.labels, options.positives)
        with command_line.announced("drawing examples", quiet=options.quiet):
            return Data(*planted(*sizes, generator), None, options.labels)
    parsed = {}
    read_from = {}
    for path in filter(None, (options.data_file, options.test_file)):
        with command_line.announced(f"reading {path}", quiet=options.quiet):
            if (found := xmc.read_cached(path)) is None:
                found = parsed[path] = xmc.read(path)
        read_from[path] = found
    examples, inputs, num_labels = read_from[options.data_file]
    if options.test_file is not None:
        train, (test, *found_sizes) = examples, read_from[options.test_file]
        if found_sizes != [inputs, num_labels]:
            raise ValueError(
                f"{options.test_file}: expected {counted(inputs, 'feature')} and "
                f"{counted(num_labels, 'label')} like --data-file, got {found_sizes[0]:,} and "
                f"{found_sizes[1]:,}"
            )
    else:
        test, train = _split(examples, options.data_file, generator)
    if not len(test.positives.col):
        source = options.test_file or f"the tenth of {options.data_file} that --seed draws"
        raise ValueError(
            f"expected test examples with labels, found none in {source}: choose a different one"
        )
    for path, content in parsed.items():
        xmc.write_cache(path, *content)
    return Data(train, test, inputs, num_labels)


def _split(examples: Examples, path: Path, generator: torch.Generator) -> tuple[Examples, Examples]:
    """Split randomly into a tenth of the examples and the rest."""
    n = len(examples.positives)
    if n < 2:
        raise ValueError(
            f"{path}: expected at least two examples, one of them for testing, got {n}"
        )
    order = torch.randperm(n, generator=generator)
    matrix = cast(scipy.sparse.csr_array, examples.features)
    test, train = (
        Examples(matrix[chosen.numpy()], examples.positives[chosen])
        for chosen in order.tensor_split([max(n // 10, 1)])
    )
    return test, train


class Learning:
    """Training of a model, with everything that a checkpoint contains."""

    def __init__(self, data: Data, generator: torch.Generator, options: argparse.Namespace) -> None:
        self.data, self.generator, self.options = data, generator, options
        torch.manual_seed(options.seed)
        n, num_labels = len(data.train.positives), data.num_labels
        share = max(len(data.train.positives.col), 1) / (n * num_labels)
        self.model = Classifier(data.inputs, options.features, num_labels, min(share, 0.5))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.lr, fused=True)
        self.steps = math.ceil(n / options.batch_size)
        # Finished epochs, steps in the current one and the sum of its losses; losses of all steps.
        self.epoch, self.step, self.total = 0, 0, 0.0
        self.losses: list[float] = []
        self.rows: list[report.Row] = []
        self._before_order = generator.get_state()
        self._files: list[str] = []
        x = data.train.features
        values: Any = x.numpy() if isinstance(x, Tensor) else x.data
        positives: Any = data.train.positives.col.numpy()
        self._checksum = zlib.crc32(positives, zlib.crc32(values))
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Total time of the run, across resumptions."""
        return time.perf_counter() - self._began

    def state_dict(self, run_dir: Path) -> dict[str, Any]:
        """Content of a checkpoint.

        Parameters and Adam's averages are written to a separate file without a copy, because
        packing a checkpoint takes twice the memory of its content.
        """
        if self.epoch or self.step:
            name = f"state-{self.epoch:04}-{self.step:06}.npz"
            report.write_arrays(
                run_dir / name, {key: t.numpy() for key, t in self._tensors().items()}
            )
            self._files = [*[old for old in self._files if old != name][-1:], name]
        return {
            **resuming.header("labels.py", vars(self.options), ALONE),
            "seconds": self.seconds,
            "data": self._checksum,
            "position": [self.epoch, self.step, self.total],
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "rows": self.rows,
            "generator": self._before_order,
            "files": self._files,
        }

    def load_state_dict(self, state: Mapping[str, Any], run_dir: Path) -> None:
        """Restore a checkpoint; raises ValueError if it does not fit or its file is damaged."""
        if state["data"] != self._checksum:
            raise ValueError("the data have changed since the run was started")
        self.epoch, self.step, self.total = state["position"]
        self.losses, self.rows = state["losses"].tolist(), list(state["rows"])
        self._before_order, self._files = state["generator"], list(state["files"])
        self.generator.set_state(self._before_order)
        self._began -= state["seconds"]
        if not self._files:
            return
        path = run_dir / self._files[-1]
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                moments: dict[int, dict[str, Tensor]] = {}
                for number, (name, p) in enumerate(self.model.named_parameters()):
                    loaded = torch.from_numpy(arrays[name])
                    check_fits(name, loaded, p)
                    p.data.copy_(loaded)
                    del loaded
                    of = {of: torch.from_numpy(arrays[f"adam/{of}/{name}"]) for of in _ADAM}
                    for average in _ADAM[1:]:
                        check_fits(average, of[average], p)
                    moments[number] = of
        except (OSError, zlib.error, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and Adam's state of each, by name."""
        tensors = {name: p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            tensors |= {f"adam/{of}/{name}": self.optimizer.state[p][of] for of in _ADAM}
        return tensors

    def remove_old_files(self, run_dir: Path) -> None:
        """Delete parameter files of checkpoints that no longer exist."""
        for path in run_dir.glob("state-*.npz"):
            if path.name not in self._files:
                path.unlink()

    def run_epoch(self, saver: resuming.Saver, writer: SummaryWriter, bar: Any) -> None:
        """Train the remaining steps of the current epoch."""
        size, train = self.options.batch_size, self.data.train
        order = torch.randperm(len(train.positives), generator=self.generator)
        rest = order[self.step * size :]
        for x, positives in train.batches(size, rest) if len(rest) else ():
            self.optimizer.zero_grad()
            C = self.model(x, positives)
            C.backward()
            self.optimizer.step()
            self.total += C.item() * len(positives)
            writer.add_scalar("loss/step", C.item(), len(self.losses))
            self.losses.append(C.item())
            self.step += 1
            bar.update()
            saver.between()

    def finish_epoch(self, writer: SummaryWriter) -> str:
        """Evaluate and log the epoch; return a line to print."""
        epoch, train_loss = self.epoch + 1, self.total / len(self.data.train.positives)
        check_loss(train_loss, "training", epoch)
        options, data = self.options, self.data
        found = evaluate(self.model, data.test, data.num_labels, options.batch_size)
        check_loss(found["loss"], "test", epoch)
        losses = {"loss_train": train_loss, "loss_test": found.pop("loss")}
        self.rows.append({"epoch": epoch, **losses, **found})
        log(writer, self.rows[-1])
        self.epoch, self.step, self.total = epoch, 0, 0.0
        self._before_order = self.generator.get_state()
        best = report.in_percent(found["precision@1"])
        return f"epoch {epoch}: loss {train_loss:.4f}, precision@1 {best}"


# State of Adam for each parameter.
_ADAM = ("step", "exp_avg", "exp_avg_sq")


def log(writer: SummaryWriter, row: report.Row) -> None:
    """Log the results of an epoch to TensorBoard."""
    for name, value in row.items():
        if isinstance(value, float):
            writer.add_scalar(f"test/{name}", value, cast(int, row["epoch"]))


def learn(learning: Learning, run_dir: Path) -> None:
    """Train, log and save each epoch, and write the results."""
    memory = introduce(learning)
    data, options = learning.data, learning.options
    for old in run_dir.glob("events.out.tfevents.*"):  # of a resumed run; written again below
        old.unlink()
    with SummaryWriter(str(run_dir)) as writer:
        for step, loss in enumerate(learning.losses):
            writer.add_scalar("loss/step", loss, step)
        for row in learning.rows:
            log(writer, row)
        every = str(options.checkpoint_every)
        content = functools.partial(learning.state_dict, run_dir)
        saver = resuming.Saver(run_dir, every, content, writer.flush, ALONE)
        if not learning.losses:
            saver.save()
        with resuming.Ending(run_dir, lambda: learning.epoch > 0, saver.save) as ending:
            train(learning, saver, writer, run_dir)
        learning.remove_old_files(run_dir)
    memory["peak_MB"] = resident(peak=True) / 1e6
    baseline = most_frequent(data.train, data.test, data.num_labels)
    rows = [{"epoch": "the most frequent", **baseline}, *learning.rows]
    conclusion = answer(rows, data.num_labels, memory["peak_MB"], memory["bound_MB"])
    report.write_results(
        run_dir,
        config=vars(options),
        device=torch.device("cpu"),
        seconds=learning.seconds,
        rows=rows,
        answer=conclusion,
        interrupted=ending.stopped is not None,
        memory=memory,
    )
    table = f"{report.table([readable(row) for row in rows])}\n\n{learning.seconds:.1f} s"
    if learning.epoch:
        path = directories.from_here(run_dir / MODEL)
        conclusion += f"\nModel: labels.load_model({path!r})"
    report.print_results(conclusion, table, "Results", run_dir)
    ending.close(f"Interrupted after step {len(learning.losses):,}; resume with:")


def train(learning: Learning, saver: resuming.Saver, writer: SummaryWriter, run_dir: Path) -> None:
    """Train the remaining epochs."""
    epochs = learning.options.epochs
    total, done = epochs * learning.steps, len(learning.losses)
    with command_line.progress(total=total, initial=done, unit="step") as bar:
        while learning.epoch < epochs:
            learning.run_epoch(saver, writer, bar)
            line = learning.finish_epoch(writer)
            parameters = learning.model.state_dict().items()
            report.write_arrays(
                run_dir / MODEL, {name: tensor.numpy() for name, tensor in parameters}
            )
            directories.keep(run_dir)
            bar.write(line)
            saver.after(learning.epoch, is_last=learning.epoch == epochs)
            learning.remove_old_files(run_dir)


def introduce(learning: Learning) -> dict[str, float]:
    """Print the task and its memory requirement; return the latter."""
    data, options = learning.data, learning.options
    n, num_labels = len(data.train.positives), data.num_labels
    size = 4 * sum(p.numel() for p in learning.model.parameters()) / 1e6
    # The ranking uses a second block.
    block = 2 * blocks.memory(min(options.batch_size, n), num_labels, options.features) / 1e6
    before = resident() / 1e6
    of_adam = 1 if learning.optimizer.state else 3  # resumed averages are already in memory
    bound = before + of_adam * size + block + SLACK_MB
    after = f"\nresumed after step {len(learning.losses):,}" if learning.losses else ""
    print(
        f"{n:,} training and {counted(len(data.test.positives), 'test example')}, "
        f"{counted(num_labels, 'label')}, threads {torch.get_num_threads()}{after}\n"
        f"memory in MB: {before:,.0f} in use, including {size:,.0f} of parameters; "
        f"{3 * size:,.0f} for gradients and Adam, {block:,.0f} for blocks of labels: at most "
        f"{bound:,.0f} with a margin of {SLACK_MB} (all logits of a mini-batch would take "
        f"{4 * options.batch_size * num_labels / 1e6:,.0f}, without their gradient)",
        flush=True,
    )
    return {"before_MB": before, "bound_MB": bound}


def answer(rows: Sequence[report.Row], num_labels: int, peak: float, bound: float) -> str:
    """Summarize the precision of the ranking and the peak memory."""
    baseline, last = rows[0], rows[-1]
    best, frequent = (
        report.in_percent(cast(float, row["precision@1"])) for row in (last, baseline)
    )
    trained = f"after epoch {last['epoch']}" if len(rows) > 1 else "before training"
    return (
        f"The top-ranked of {counted(num_labels, 'label')} is right for {best} of the test "
        f"examples {trained} (most frequent label: {frequent}).\n"
        f"Peak memory {peak:,.0f} MB, {'within' if peak <= bound else 'MORE THAN'} the "
        f"predicted {bound:,.0f} MB."
    )


def check_loss(loss: float, examples: str, epoch: int) -> None:
    """Raise Failed unless the loss is finite."""
    if not math.isfinite(loss):
        raise running.Failed(
            f"the loss of the {examples} examples is {loss} in epoch {epoch}: lower --lr, or scale "
            f"the features"
        )


def warm_up() -> None:
    """Train a tiny model for one step, to load everything that PyTorch imports lazily."""
    tiny = Classifier(None, 1, 2, 0.5)
    tiny(torch.ones(1, 1), Positives.from_lists([[0]])).backward()
    torch.optim.Adam(tiny.parameters(), fused=True).step()
    tiny.labels.topk(torch.ones(1, 1), 1)


def readable(row: report.Row) -> report.Row:
    """Format a row of results in percent."""
    losses = {name: row.get(name, "") for name in ("loss_train", "loss_test")}
    percents = {
        f"{name}, %": f"{100 * cast(float, row[name]):.2f}"
        for name in itertools.chain(*((f"precision@{k}", f"nDCG@{k}") for k in BEST))
        if name in row
    }
    return {"epoch": row["epoch"], **losses, **percents}


if __name__ == "__main__":
    running.run_script(main)
