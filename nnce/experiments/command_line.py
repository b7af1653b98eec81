"""Options of the scripts: parsing, checking, and what they stand for."""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from tqdm import tqdm

from nnce import data, modules
from nnce.engines import ensemble, loops
from nnce.experiments import directories, running
from nnce.training import Engine, Settings, parallel, schedules
from nnce.training.schedules import Schedule

DTYPES = {"float32": torch.float32, "float64": torch.float64}

# For each option: the field of `nnce.data.Distortion`, and the help.
_DISTORTIONS = {
    "rotation": ("rotation", "largest rotation, degrees"),
    "scaling": ("scaling", "largest relative change of width and height"),
    "shear": ("shear", "largest shear factor"),
    "translation": ("translation", "largest translation in x and y, pixels"),
    "elastic": ("alpha", "amplitude of the elastic displacements, pixels"),
    "elastic_sigma": ("sigma", "standard deviation of the elastic smoothing, pixels"),
}
_UNDISTORTED = data.Distortion()
# Options that --config ignores.
_NOT_FROM_CONFIG = ("run_dir", "name", "resume", "config", "quiet", "dry_run")
# For each option whose setting has a different name in error messages: that name.
_SETTINGS = {
    "lr": "learning rate",
    "lrs": "learning rate",
    "max_epochs": "epochs",
    "train_size": "train size",
}
_BEFORE_SETTING = "no |an? |at least one |positive |integer number of "
# Products of sizes must fit in PyTorch's 64-bit integers.
_LARGEST = 10**15


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help formatter that shows defaults, except for None, which the option's help explains."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Argument parser with defaults in the help and errors of one line on standard error."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)
        self.register("type", int, _whole_number)

    def parse_args(  # type: ignore[override]  # argparse allows other namespace classes
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """Parse options and positional arguments in any order.

        The options in a --config file become defaults; `config` is None in the result, so that the
        file is read only once.
        """
        options = self.parse_intermixed_args(args)
        if getattr(options, "config", None) is not None:
            if getattr(options, "resume", None) is not None:
                self.error("expected --config or --resume, got both")
            given = [
                action.dest
                for action in self._actions
                if isinstance(action, argparse._AppendAction) and getattr(options, action.dest)
            ]
            self.set_recorded(
                self._read_config(options.config),
                f"--config {options.config}: found",
                skip=(*_NOT_FROM_CONFIG, *given),
            )
            options = self.parse_intermixed_args(args)
            options.config = None
        return options

    def _read_config(self, path: Path) -> Mapping[str, object]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            self.error(f"--config {path}: {error.strerror}")
        except ValueError:
            self.error(f"--config {path}: expected JSON, such as the results.json of a run")
        config = content.get("config", content) if isinstance(content, dict) else content
        if not isinstance(config, dict):
            self.error(f"--config {path}: expected a JSON object of option values by name")
        return config

    def set_recorded(
        self, config: Mapping[str, object], source: str, skip: Sequence[str] = ()
    ) -> None:
        """Use recorded option values by name, as in results.json, as defaults, except for `skip`.

        Each is checked as on the command line; error messages begin with `source`.
        """
        actions = {action.dest: action for action in self._actions}
        config = {name: value for name, value in config.items() if name not in skip}
        for name, value in config.items():
            if name not in actions:
                self.error(f"{source} option {name!r}, which {self.prog} does not have")
            if not self._is_valid(actions[name], value):
                shown = textwrap.shorten(repr(value), 100)
                self.error(
                    f"{source} {name} = {shown}, which this version of {self.prog} does not accept"
                )
        # An empty list as the default of positional arguments would count as given.
        defaults = {n: v for n, v in config.items() if v != [] or actions[n].option_strings}
        self.set_defaults(**defaults)

    def _is_valid(self, action: argparse.Action, value: object) -> bool:
        """Whether argparse would parse the recorded value, given as text, to the same value."""
        if value is None or action.nargs == 0:
            return (value is None and action.default is None) or isinstance(value, bool)
        several = [value]
        if isinstance(action, argparse._AppendAction):
            several = value if isinstance(value, list) else []
        return bool(several) and all(self._is_valid_once(action, one) for one in several)

    def _is_valid_once(self, action: argparse.Action, value: object) -> bool:
        if isinstance(value, list) and action.nargs is None:
            return False  # which argparse would convert element by element
        texts = list(map(str, value)) if isinstance(value, list) else [str(value)]
        try:
            given = self._get_values(action, texts)
        except (argparse.ArgumentError, ValueError):
            return False
        return bool(given == value) or (isinstance(given, Path) and str(given) == value)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and a message of one line, printed by one process only."""
        parallel.wait_for_rank0_error()
        where = "" if parallel.is_first() else f"process {os.environ['RANK']}: "
        self.exit(2, f"{self.prog}: error: {where}{' '.join(message.split())}\n")

    def add_common_options(self) -> None:
        """Add --data, --data-dir, --device, --dtype, --seed and the run directory options."""
        add = self.add_argument
        names = "|".join((*data.DATASETS, "PATH"))
        kinds = (
            "data set: a name, or the path of an .npz file with arrays x and y or of a folder with "
            "one subfolder of images per class"
        )
        add("--data", type=_data, default="digits", metavar=names, help=kinds)
        folder = "data folder, filled by download if empty (default: $NNCE_DATA, else data)"
        add("--data-dir", type=Path, help=folder)
        devices = ("auto", "cpu", "cuda")
        add("--device", choices=devices, default="auto", help="device to compute on")
        add("--dtype", choices=DTYPES, default="float32", help="dtype of all tensors")
        add("--seed", type=seed, default=0, help="random seed")
        self.add_run_directory_options()

    def add_run_directory_options(self) -> None:
        """Add --run-dir and --name (see `run_directory`), --config and --quiet."""
        add = self.add_argument
        folder = "new or empty run directory (default: a new one under runs/)"
        add("--run-dir", type=Path, help=folder)
        suffix = "suffix for the name of the new run directory under runs/"
        add("--name", type=_name_suffix, help=suffix)
        file = (
            "JSON file of options, such as the results.json of a run; the command line takes "
            "precedence"
        )
        add("--config", type=Path, metavar="FILE", help=file)
        add("--quiet", action="store_true", help="print only the answer and the run directory")

    def add_hidden_option(self, meaning: str) -> None:
        """Add --hidden, with `meaning` as its help."""
        self.add_argument("--hidden", type=int, nargs="*", default=[30], help=meaning)

    def add_train_size_option(self) -> None:
        """Add --train-size, for `load_data`."""
        first = "number of training examples, taken from the start (default: all)"
        self.add_argument("--train-size", type=int, help=first)

    def add_training_options(self) -> None:
        """Add the options that `settings` reads, and --train-size."""
        add = self.add_argument
        self.add_hidden_option("neurons of each hidden layer")
        add("--epochs", type=int, default=30, help="passes over the training data")
        add("--batch-size", type=int, default=10, help="mini-batch size")
        add("--momentum", type=float, default=0.0, help="SGD momentum, in [0, 1)")
        decay = "L2 coefficient lambda; the weight decay is lambda / n_train"
        add("--l2", type=float, default=0.0, help=decay)
        self._add_schedule_options()
        self._add_distortion_options()
        weights = (
            "initial weights: scaled, N(0, 1/n_in); large, N(0, 1); SD, all parameters from "
            "N(0, SD^2)"
        )
        names = "|".join((*modules.INITS, "SD"))
        add("--init", type=_init, default="scaled", metavar=names, help=weights)
        self.add_train_size_option()

    def _add_schedule_options(self) -> None:
        add = self.add_argument_group("learning-rate schedule").add_argument
        kind = "learning-rate schedule after the warm-up"
        add("--schedule", choices=schedules.KINDS, default="constant", help=kind)
        add("--step-size", type=int, help="--schedule step: epochs per step (default: 10)")
        add("--gamma", type=float, help="--schedule step: factor per step (default: 0.1)")
        fall = "--schedule cosine: epochs until the rate is 0 (default: all after the warm-up)"
        add("--cosine-epochs", type=int, help=fall)
        add("--warmup", type=int, default=0, help="epochs of linear warm-up")
        start = "factor of the rate in the first warm-up epoch"
        add("--warmup-start", type=float, default=0.1, help=start)

    def _add_distortion_options(self) -> None:
        add = self.add_argument_group(
            "random distortions of the training images (nnce.data.Distortion), new in each epoch"
        ).add_argument
        for name, (field, meaning) in _DISTORTIONS.items():
            kind, default = functools.partial(_distortion, field), getattr(_UNDISTORTED, field)
            add(option(name), type=kind, default=default, metavar="X", help=meaning)

    def add_speed_options(self) -> None:
        """Add --threads and --matmul-precision, for `set_speed`."""
        self.add_argument("--threads", type=int, help="CPU threads (default: by network size)")
        precisions = ("highest", "high", "medium")
        of_torch = "argument of torch.set_float32_matmul_precision"
        self.add_argument(
            "--matmul-precision", choices=precisions, default="highest", help=of_torch
        )

    @contextlib.contextmanager
    def user_errors(self) -> Iterator[None]:
        """Context that turns ValueError and failures such as a full disk into one-line errors."""
        try:
            yield
        except Exception as error:
            message = running.external_failure(error)
            if message is None and isinstance(error, ValueError):
                message = self._named(str(error))
            if message is None:
                raise
            self.error(message)

    def _named(self, message: str) -> str:
        """Replace the name of a setting in an error message by the option as typed.

        Not in "expected hidden neurons", nor in "expected a picture (PNG or JPEG)", an image file.
        """
        names = {action.dest: action.dest for action in self._actions if action.option_strings}
        names |= {setting: name for name, setting in _SETTINGS.items() if name in names}
        settings = "|".join(names)
        pattern = rf"(^expected (?:{_BEFORE_SETTING})*|; use )({settings})\b(?! neurons| \()"
        return re.sub(pattern, lambda found: found[1] + option(names[found[2]]), message)

    @contextlib.contextmanager
    def run_directory(self, options: argparse.Namespace, name: str, **more: Any) -> Iterator[Path]:
        """Open `run_directory` for --run-dir or --name; exit with status 2 if that fails."""
        with contextlib.ExitStack() as stack:
            with self.user_errors():
                if options.name and options.run_dir:
                    raise ValueError("expected --run-dir or --name, got both")
                name = f"{name}-{options.name}" if options.name else name
                path = stack.enter_context(directories.run_directory(options.run_dir, name, **more))
            if options.quiet:
                stack.enter_context(running.quiet())
            yield path


def option(name: str) -> str:
    """Option of the command line by its name in the parsed options."""
    return f"--{name.replace('_', '-')}"


def check_distinct(name: str, values: Sequence[object], texts: Sequence[object]) -> None:
    """Raise ValueError, with the text of the value, if an option has a value twice."""
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"expected each value of {name} once, got {texts[place]} again")


def _whole_number(text: str) -> int:
    """Parse an integer option, and reject numbers beyond ±10¹⁵."""
    number = int(text)
    if abs(number) > _LARGEST:
        raise argparse.ArgumentTypeError(f"expected an integer within ±{_LARGEST:,}, got {text}")
    return number


def _data(text: str) -> str:
    """Parse --data; a path is made absolute, so that a run can be resumed from any folder."""
    is_path = text not in data.DATASETS and os.path.exists(text)
    return os.path.abspath(text) if is_path else text


def data_name(options: argparse.Namespace) -> str:
    """Short name of --data for titles and folder names; for a path, its last component."""
    name = Path(options.data).name.removesuffix(".npz")
    return re.sub(r"[^\w.+-]", "_", name)[:60] or "data"


def seed(text: str) -> int:
    """Parse --seed: PyTorch's CPU generator uses 32 bits, so that -1 would mean 2**32 - 1."""
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a seed from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def _name_suffix(text: str) -> str:
    """Parse --name, which becomes a part of a folder's name."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,59}", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"expected a letter or digit, then at most 59 letters, digits or . _ + -, got {text!r}"
        )
    return text


def _init(text: str) -> modules.Init:
    """Parse --init: a name or a standard deviation."""
    value: object = text
    with contextlib.suppress(ValueError):
        value = float(text)
    try:
        return modules.check_init(cast(modules.Init, value))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _distortion(field: str, text: str) -> float:
    """Parse and check the option for one field of a distortion."""
    try:
        value = float(text)
        data.Distortion(**{field: value})
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).replace(f"{field} ", "a number ", 1)) from error
    return value


# ------------------------------------------------------------------------------ option values


def settings(options: argparse.Namespace) -> Settings:
    """Settings from the options with the names of their fields.

    Defaults that depend on other options are stored in `options`, so that they are recorded.
    """
    of_distortion = {field: getattr(options, name) for name, (field, _) in _DISTORTIONS.items()}
    distortion = data.Distortion(**of_distortion)
    undistorted = dataclasses.replace(_UNDISTORTED, sigma=distortion.sigma)
    names = {field.name for field in dataclasses.fields(Settings)}
    values: dict[str, Any] = {
        **{name: value for name, value in vars(options).items() if name in names},
        "hidden": tuple(options.hidden),
        "schedule": _schedule(options),
        "distortion": None if distortion == undistorted else distortion,
    }
    return Settings(**values)


def training_name(options: argparse.Namespace) -> str:
    """Part of a run directory's name: initialization, L2 coefficient and momentum."""
    extra = {"lambda": options.l2, "momentum": options.momentum}
    extras = [f"{name}{value:g}" for name, value in extra.items() if value]
    return "-".join([str(options.init), *extras])


def _schedule(options: argparse.Namespace) -> Schedule:
    depending: dict[str, dict[str, float]] = {
        "step": {"step_size": 10, "gamma": 0.1},
        "cosine": {"cosine_epochs": max(options.epochs, 1) - options.warmup},
    }
    for name, value in depending.get(options.schedule, {}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    names = ("schedule", "step_size", "gamma", "cosine_epochs", "warmup", "warmup_start")
    return Schedule(*(getattr(options, name) for name in names))


def load_data(options: argparse.Namespace) -> data.Dataset:
    """Load the data set of --data, on the device and in the dtype of the options."""
    with announced(f"reading {options.data}", quiet=options.quiet):
        return data.load(
            options.data,
            data_dir=options.data_dir,
            train_size=getattr(options, "train_size", None),  # only in scripts that train
            device=device(options.device),
            dtype=DTYPES[options.dtype],
        )


def device(name: str) -> torch.device:
    """The device of --device; "auto" is CUDA if each process has a GPU, else the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not gpus:
        raise ValueError("--device cuda: PyTorch finds no CUDA device on this machine")
    processes = parallel.processes_here()
    if name == "cuda" and gpus < processes:
        raise ValueError(
            f"--device cuda: each of the {processes} processes on this machine needs a GPU, and "
            f"PyTorch finds {gpus}"
        )
    if name == "auto":
        name = "cuda" if gpus >= processes else "cpu"
    return torch.device(name)


def threads(options: argparse.Namespace) -> int | None:
    """Threads for an `Ensemble`: --threads, but at most one per processor; None without it."""
    return None if options.threads is None else min(options.threads, os.cpu_count() or 1)


def set_speed(options: argparse.Namespace, suited: int) -> None:
    """Apply --threads (default: `suited`) and --matmul-precision."""
    threads = suited if options.threads is None else options.threads
    if not 1 <= threads <= 1024:
        raise ValueError(f"expected 1 to 1,024 --threads, got {threads:,}")
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(options.matmul_precision)


progress = functools.partial(tqdm, disable=None, leave=False)
"""Progress bar that is shown on a terminal only, and removed at the end."""


@contextlib.contextmanager
def announced(description: str, *, quiet: bool = False) -> Iterator[None]:
    """Show a description on a terminal while the block runs, unless quiet."""
    disable = None if parallel.is_first() and not quiet else True  # None: only on a terminal
    with tqdm(desc=description, bar_format="{desc} …", disable=disable, leave=False):
        yield


def announce_threads(options: argparse.Namespace) -> None:
    """Warn if --threads exceeds the number of processors."""
    given, processors = options.threads, os.cpu_count() or 1
    if given is not None and given > processors:
        print(f"--threads {given} exceeds the number of processors, {processors}", file=sys.stderr)


def announce_compilation(
    options: argparse.Namespace, sizes: Sequence[int], engine: Engine | None = "backprop"
) -> None:
    """Print a notice if the loops are about to be compiled, which takes seconds, once."""
    dtype, on_device = DTYPES[options.dtype], device(options.device)
    suits = ensemble.suits_loops(sizes, options.batch_size, dtype, on_device, density=0.2)
    if (engine == "loops" or (engine == "backprop" and suits)) and not (
        options.quiet or loops.is_cached()
    ):
        print("compiling the loops (once, takes some seconds)", flush=True)
