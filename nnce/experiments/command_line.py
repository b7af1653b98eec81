"""Command line of the scripts: options, signals, output streams and run directories."""

import argparse
import contextlib
import dataclasses
import functools
import gc
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

import torch
from tqdm import tqdm

from nnce import _memory, data, modules
from nnce.engines import ensemble, loops
from nnce.training import Engine, Settings, checkpoints, parallel, schedules
from nnce.training.parallel import ALONE, World
from nnce.training.schedules import Schedule

DTYPES = {"float32": torch.float32, "float64": torch.float64}

# Marker file in a run directory that contains no result yet.
_NO_RESULT = ".nothing-finished-yet"
# Files of file managers and file systems; a folder with only these counts as empty.
_SYSTEM_FILES = (".DS_Store", ".directory", "Thumbs.db", "desktop.ini", "lost+found")
_CHECKPOINTS = "checkpoint-*"
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
            is_usage = isinstance(error, ValueError)
            message = _external_failure(error) or (self._named(str(error)) if is_usage else None)
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
                path = stack.enter_context(run_directory(options.run_dir, name, **more))
            if options.quiet:
                out, err = _Muted(sys.stdout, mute=True), _Muted(sys.stderr, mute=False)
                stack.enter_context(contextlib.redirect_stdout(cast(Any, out)))
                stack.enter_context(contextlib.redirect_stderr(cast(Any, err)))
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


# ------------------------------------------------------------------------------ running a script


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run main() and exit with its status, without a traceback for errors outside the script.

    Ctrl-C, SIGTERM and SIGHUP (a closed terminal) raise KeyboardInterrupt, so that main() can save
    its state; the status is 130, 143 or 129. A closed output pipe, as behind `| head`, is status
    141. If standard output cannot be written, as on a full disk, the script continues without it
    and exits with status 1. Running out of memory or disk space is a one-line error and status 1.
    """
    gc.freeze()
    gc.enable()
    program = Path(sys.argv[0]).name
    out = _Stream(1, stops=True)
    if not parallel.is_first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = _text(sys.stdout, out)
    sys.stderr = _text(sys.stderr, _Stream(2, stops=False))
    threading.excepthook = _thread_failed
    _signals.listen()
    status: Any  # SystemExit.code may be any object
    try:
        try:
            status = main()
            sys.stdout.flush()
        finally:
            # SIG_IGN, because Python's own handlers are removed before the process ends.
            for number in loops.SIGNALS:
                signal.signal(number, signal.SIG_IGN)
    except SystemExit as stop:
        status = stop.code
    except KeyboardInterrupt:
        status = 128 + (_signals.first or signal.SIGINT)
    except BrokenPipeError:
        status = 141
    except Exception as error:
        message = _external_failure(error)
        if message is None:
            raise
        print(f"{program}: error: {message}", file=sys.stderr)
        status = 1
    if out.lost and not status:
        print(f"{program}: error: standard output: {out.lost.strerror}", file=sys.stderr)
        status = 1
    if parallel.under_torchrun():
        parallel.exit_at_once(status or 0)
    gc.freeze()  # otherwise Python looks for garbage among all objects, which takes half a second
    sys.exit(status)


class _Stream(io.FileIO):
    """Standard output (1) or error (2), which discards text that cannot be written.

    With `stops`, the first write to a closed pipe raises BrokenPipeError.
    """

    def __init__(self, number: int, *, stops: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._stops = stops
        self.lost: OSError | None = None
        """The last error on writing, if any."""

    def write(self, content: Any) -> int:  # collections.abc.Buffer needs Python 3.12
        try:
            return super().write(content)
        except OSError as error:
            first, self.lost = self.lost is None, error
            if first and self._stops and isinstance(error, BrokenPipeError):
                raise
            return len(content)


def _text(old: object, stream: _Stream) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(stream),
        encoding=getattr(old, "encoding", None),
        errors="replace",  # for terminals that cannot encode σ
        line_buffering=True,
    )


class _Muted:
    """Stream that poses as a non-terminal, to suppress progress bars, and may discard its text."""

    def __init__(self, stream: Any, *, mute: bool) -> None:
        self.stream, self._mute = stream, mute

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        return len(text) if self._mute else self.stream.write(text)


def unmuted_stdout() -> Any:
    """Standard output, even under --quiet."""
    return sys.stdout.stream if isinstance(sys.stdout, _Muted) else sys.stdout


def _thread_failed(arguments: threading.ExceptHookArgs) -> None:
    """Ignore OSError in a thread: TensorBoard raises it again in the main thread."""
    if not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)


class _Signals:
    """Handlers for Ctrl-C (SIGINT), SIGTERM and SIGHUP.

    The first signal raises KeyboardInterrupt; within an `undisturbed` block, at its end or at
    `raise_pending`. A second Ctrl-C exits immediately; other signals after the first are ignored.

    Python runs signal handlers in the main thread only, which a compiler may block for many
    seconds. Therefore a second thread reads the signal numbers from a pipe, acknowledges the first
    and exits at the second Ctrl-C.
    """

    def __init__(self) -> None:
        self._held = self._waiting = False
        self._numbers: list[int] = []
        self.first: int | None = None
        """The number of the first signal."""

    def listen(self) -> None:
        # Signals that nohup or a shell's & has disabled stay ignored.
        self._numbers = [n for n in loops.SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        for number in self._numbers:
            signal.signal(number, self._handle)
        read, write = os.pipe()
        if hasattr(os, "set_blocking"):  # on Windows since Python 3.12; optional there
            os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        threading.Thread(target=self._read_pipe, args=(read,), daemon=True).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.stop(number)

    def _read_pipe(self, pipe: int) -> None:
        # torchrun forwards the Ctrl-C that its processes have already received.
        again_after = _SAME_PRESS if parallel.under_torchrun() else 0.0
        began: float | None = None
        while numbers := os.read(pipe, 1):
            (number,) = numbers
            if number not in self._numbers:  # ignored, or with another handler
                continue
            if began is None:
                began = time.monotonic()
                self._acknowledge()
            elif number == signal.SIGINT and time.monotonic() - began > again_after:
                os._exit(128 + number)

    def _acknowledge(self) -> None:
        def write(text: str) -> None:
            new_line = "\n" if os.isatty(2) else ""  # after a progress bar and ^C
            with contextlib.suppress(OSError):
                os.write(2, f"{new_line}{text} (Ctrl-C again exits at once)\n".encode())

        if not parallel.is_first():
            return
        if self._held:
            write("stopping after this step ...")
        else:  # stops immediately, unless the main thread is in compiled code
            slow = threading.Timer(_AT_ONCE, write, ["stopping ..."])
            slow.daemon = True
            slow.start()

    def stop(self, number: int) -> None:
        """Stop as if this process had received the signal."""
        if not self._waiting:
            self.first, self._waiting = number, self._held
            if not self._held:
                raise KeyboardInterrupt

    def waiting(self) -> int:
        """The number of a signal that is pending until the end of a block; 0 without one."""
        return self.first or 0 if self._waiting else 0

    def raise_pending(self) -> None:
        """Raise KeyboardInterrupt now if a signal is pending."""
        if self._waiting:
            self._waiting = False
            raise KeyboardInterrupt

    def ignore_pending(self) -> None:
        """Ignore a pending signal, because there is nothing left to stop."""
        self._waiting = False

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Delay signals until the end of the outermost such block."""
        outer, self._held = self._held, True
        try:
            yield
        finally:
            self._held = outer
        if not outer:
            self.raise_pending()


_signals = _Signals()
# Seconds within which a second SIGINT is the first one, forwarded by torchrun.
_SAME_PRESS = 1.0
# Seconds before "stopping ..." is printed outside an `undisturbed` block.
_AT_ONCE = 0.5


undisturbed = _signals.undisturbed
waiting = _signals.waiting
raise_pending = _signals.raise_pending
ignore_pending = _signals.ignore_pending
stop = _signals.stop


class Failed(Exception):
    """Failure outside the script, such as a full disk; the message names the kept results."""


def _external_failure(error: BaseException) -> str | None:
    """Message for a lack of memory or space, or a lost process; None for any other error."""
    if isinstance(error, Failed):
        return str(error)
    if parallel.lost(error):
        first_line = str(error).strip().splitlines()[0]
        return f"process {os.environ.get('RANK')} lost its connection to another one: {first_line}"
    if not isinstance(error, OSError) or isinstance(error, BrokenPipeError):
        return _memory.shortage(error)
    where = "" if error.filename is None else f": {error.filename}"
    return f"{error.strerror}{where}" if error.strerror else str(error)


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


# ---------------------------------------------------------------------------- the run's directory


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


@contextlib.contextmanager
def run_directory(
    chosen: Path | None,
    name: str,
    *,
    dry_run: bool = False,
    resumed: bool = False,
    world: World = ALONE,
) -> Iterator[Path]:
    """Context with the directory of a run: the chosen one, or a new runs/NAME-DATE-TIME.

    The directory is removed at the end of the block after a dry run, or if neither `keep` nor
    `report.write_results` has been called. A killed process leaves it behind; a later run may reuse
    it unless it contains a checkpoint. Rank 0 creates the directory and broadcasts its path.

    Raises:
        ValueError: the directory is already used, cannot be created or written, has a name that is
            not UTF-8, or is in use by another process.
        Failed: there are results to keep, and the block ran out of memory or disk space, lost
            another process, or found the directory deleted.
    """
    if world.rank:
        path: Path = world.broadcast(None)
        with _raising_failed(path, lambda: path.is_dir() and any(path.glob(_CHECKPOINTS))):
            yield path
        return
    with contextlib.ExitStack() as stack:
        try:
            path, made = _directory(chosen, name)
            _begin(path, resumed, locked=stack.enter_context(_lock(path)))
        except OSError as error:
            raise ValueError(
                f"the run directory {chosen or name} cannot be written: {error.strerror}"
            ) from error
        mark = path / _NO_RESULT
        try:
            with _raising_failed(path, lambda: not dry_run and not mark.exists()):
                world.broadcast(path)
                yield path
        finally:
            if path.is_dir() and (dry_run or mark.exists()):
                clear(path)
                # Another run may have started in the same directory.
                with contextlib.suppress(OSError):
                    for folder in made:
                        folder.rmdir()


def _directory(chosen: Path | None, name: str) -> tuple[Path, list[Path]]:
    """Create the chosen directory, or a new one by name; return it and the list of new folders."""
    if chosen is not None:
        if chosen.exists() and not chosen.is_dir():
            raise ValueError(f"the run directory {chosen} is a file; choose a folder")
        _check_name(chosen)
    path = first = chosen or Path("runs", f"{name}-{date_and_time()}")
    number = 1
    while True:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=chosen is not None)
            return path, made
        except FileExistsError:
            if chosen is not None:
                raise
            number += 1  # two runs within one second
            path = first.with_name(f"{first.name}-{number}")


def _begin(path: Path, resumed: bool, *, locked: bool) -> None:
    """Prepare the directory for a resumed run, or mark it as one without results."""
    if resumed:
        checkpoints.clear_unfinished(path)
        keep(path)
        return
    if is_without_result(path) and locked:
        clear(path)
    elif is_without_result(path):
        raise ValueError(
            f"the run directory {path} belongs to a run that was killed before its first "
            f"checkpoint; delete it, or choose a new one"
        )
    elif _content(path):
        advice = f"resume it with --resume {path}, or " if any(path.glob(_CHECKPOINTS)) else ""
        raise ValueError(f"the run directory {path} is already used; {advice}choose a new one")
    with (path / _NO_RESULT).open("x") as file:
        file.write(job())


def is_without_result(path: Path) -> bool:
    """Whether the directory belongs to a run that has left neither results nor a checkpoint."""
    return (path / _NO_RESULT).exists() and not any(path.glob(_CHECKPOINTS))


def _check_name(path: Path) -> None:
    """Raise ValueError if the name is not UTF-8, which TensorBoard requires."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        try:
            os.fsencode(path).decode()
        except UnicodeError:
            raise ValueError(
                f"expected a run directory whose name is UTF-8, which TensorBoard needs, got {path}"
            ) from error
        raise ValueError(
            f"the run directory {path} has a name that this locale's encoding "
            f"({sys.getfilesystemencoding()}) cannot represent: set PYTHONUTF8=1 and run again"
        ) from error


def _content(folder: Path) -> list[Path]:
    """Contents of a folder, without the files of file managers and file systems."""
    return [path for path in folder.iterdir() if path.name not in _SYSTEM_FILES]


@contextlib.contextmanager
def _raising_failed(path: Path, has_results: Callable[[], bool]) -> Iterator[None]:
    """Raise Failed for a failure outside the script, if there are results to keep."""
    try:
        yield
    except Exception as error:
        message = _external_failure(error)
        if message is None:
            raise
        if parallel.is_first() and not path.is_dir():
            raise Failed(f"the run directory {path} was deleted during the run") from error
        if not has_results():
            raise
        torchrun_gives_up = parallel.lost(error) and not parallel.restarts_left()
        resume = f"; resume with:\n{command_to_resume(path)}" if torchrun_gives_up else ""
        raise Failed(f"{message}; finished results are kept in {path}{resume}") from error


def command_to_resume(run_dir: Path) -> str:
    """The command that resumes a run."""
    python = [from_here(Path(sys.executable))]
    if parallel.under_torchrun():
        torchrun = Path(sys.executable).with_name("torchrun")
        python = [from_here(torchrun), "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    return shlex.join([*python, from_here(Path(sys.argv[0])), "--resume", from_here(run_dir)])


def from_here(path: Path) -> str:
    """The path relative to the working directory if it lies within, else unchanged."""
    with contextlib.suppress(ValueError):
        path = path.absolute().relative_to(Path.cwd())
    return str(path)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Lock the folder during the block; yield False where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        locked = True
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"the run directory {path} is in use by another process") from error
        except OSError:  # a file system without locks
            locked = False
        yield locked
    finally:
        os.close(folder)


def clear(run_dir: Path) -> None:
    """Remove all files of a run."""
    for leftover in _content(run_dir):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def keep(run_dir: Path) -> None:
    """Record that the run directory contains results, so that it is not removed."""
    (run_dir / _NO_RESULT).unlink(missing_ok=True)


def date_and_time() -> str:
    """Start time of the run; under torchrun that of the job, the same after a restart."""
    now = datetime.now()
    if parallel.under_torchrun():
        now = datetime.fromtimestamp(_agent().create_time())
    return f"{now:%Y%m%d-%H%M%S}"


def _agent() -> Any:
    """The `torchrun` process that started this one."""
    import psutil

    return psutil.Process(os.getppid())


def job() -> str:
    """Identifier of the `torchrun` job, the same after a restart; "" without torchrun."""
    if not parallel.under_torchrun():
        return ""
    agent = _agent()
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {agent.pid}-{agent.create_time()}"


def is_this_job(name: str) -> bool:
    """Whether the name is that of this job, here or on another host with the same --rdzv-id."""
    now, then = job().split(" "), name.split(" ")
    return bool(job()) and (now[-1] == then[-1] or now[0] == then[0] != "none")


def remove_leftovers_of_this_job(run_dir: Path) -> None:
    """Remove a run directory that this job created, if it contains no results."""
    mark = run_dir / _NO_RESULT
    if mark.is_file() and is_this_job(mark.read_text()):
        clear(run_dir)
        run_dir.rmdir()
