"""Common parts of the scripts: options, signals and streams, the run's directory."""

import argparse
import contextlib
import dataclasses
import functools
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

# Lies in a run's directory for as long as nothing there is worth keeping.
_NOTHING_YET = ".nothing-finished-yet"
# Put into folders by file managers and file systems; a folder with nothing else is empty.
_NOT_OURS = (".DS_Store", ".directory", "Thumbs.db", "desktop.ini", "lost+found")
_CHECKPOINTS = "checkpoint-*"
# By option, without its dashes: the field of `nnce.data.Distortion`, and its meaning.
_DISTORTIONS = {
    "rotation": ("rotation", "largest rotation, degrees"),
    "scaling": ("scaling", "largest change of the width and the height, relative"),
    "shear": ("shear", "largest shear, relative"),
    "translation": ("translation", "largest translation in x and y, pixels"),
    "elastic": ("alpha", "factor of the elastic displacements, pixels"),
    "elastic_sigma": ("sigma", "standard deviation of their Gaussian, pixels"),
}
_UNDISTORTED = data.Distortion()
# Options that a --config does not set.
_OF_ONE_RUN = ("run_dir", "name", "resume", "config", "quiet", "dry_run")
# PyTorch counts in 64 bits, and multiplies sizes.
_LARGEST = 10**15


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not "(default: None)": such an option's help says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser: defaults in the help, and an error is one line on standard error."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)
        self.register("type", int, _whole_number)

    def parse_args(  # type: ignore[override]  # argparse's may fill an object of another class
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """Positional arguments may stand before, between and after the options.

        The options of a --config file are defaults. It is None afterwards, so that it is read once.
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
                f"--config {options.config}: it has",
                skip=(*_OF_ONE_RUN, *given),
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
            self.error(f"--config {path}: expected JSON, as in the results.json of a run")
        config = content.get("config", content) if isinstance(content, dict) else content
        if not isinstance(config, dict):
            self.error(f"--config {path}: expected an object of options by name")
        return config

    def set_recorded(
        self, config: Mapping[str, object], source: str, skip: Sequence[str] = ()
    ) -> None:
        """Make recorded options the defaults, each value checked like a given one.

        Args:
            config: values by option, as in results.json.
            source: beginning of the error message.
            skip: options that are left as they are.
        """
        actions = {action.dest: action for action in self._actions}
        config = {name: value for name, value in config.items() if name not in skip}
        for name, value in config.items():
            if name not in actions:
                self.error(
                    f"{source} an option {name!r}, which this version of {self.prog} does not have"
                )
            if not self._is_valid(actions[name], value):
                shown = textwrap.shorten(repr(value), 100)
                self.error(
                    f"{source} {name} = {shown}, which this version of {self.prog} does not accept"
                )
        # (argparse takes an empty list of positional arguments for one that was given.)
        defaults = {n: v for n, v in config.items() if v != [] or actions[n].option_strings}
        self.set_defaults(**defaults)

    def _is_valid(self, action: argparse.Action, value: object) -> bool:
        """Whether a recorded value is what argparse would make of it, were it given."""
        if value is None or action.nargs == 0:
            return (value is None and action.default is None) or isinstance(value, bool)
        several = [value]
        if isinstance(action, argparse._AppendAction):
            several = value if isinstance(value, list) else []
        return bool(several) and all(self._is_valid_once(action, one) for one in several)

    def _is_valid_once(self, action: argparse.Action, value: object) -> bool:
        texts = list(map(str, value)) if isinstance(value, list) else [str(value)]
        try:
            given = self._get_values(action, texts)
        except (argparse.ArgumentError, ValueError):
            return False
        return bool(given == value) or (isinstance(given, Path) and str(given) == value)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one clear line, of several processes once."""
        parallel.after_the_first()
        where = "" if parallel.is_first() else f"process {os.environ['RANK']}: "
        self.exit(2, f"{self.prog}: error: {where}{' '.join(message.split())}\n")

    def add_common_options(self) -> None:
        """--data, --data-dir, --device, --dtype, --seed, --run-dir and --name."""
        self.add_argument(
            "--data",
            type=_data,
            default="digits",
            metavar="|".join((*data.DATASETS, "PATH")),
            help="data set, or the path of your own: an .npz file with arrays x and y, or a folder "
            "of images by class",
        )
        folder = "folder of the data, downloaded if missing (default: $NNCE_DATA, else data)"
        self.add_argument("--data-dir", type=Path, help=folder)
        self.add_argument(
            "--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to compute on"
        )
        self.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of all tensors")
        self.add_argument("--seed", type=int, default=0, help="random seed")
        self.add_run_directory_options()

    def add_run_directory_options(self) -> None:
        """--run-dir and --name, for `run_directory`, --config and --quiet."""
        folder = "new or empty folder for the results (default: a new one under runs/)"
        self.add_argument("--run-dir", type=Path, help=folder)
        self.add_argument(
            "--name", type=_word, help="a word in the name of the new folder under runs/"
        )
        self.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="JSON file of options, such as the results.json of a run; explicit ones win",
        )
        self.add_argument(
            "--quiet", action="store_true", help="print the answer and the run directory only"
        )

    def add_hidden_option(self, meaning: str) -> None:
        """--hidden."""
        self.add_argument("--hidden", type=int, nargs="*", default=[30], help=meaning)

    def add_train_size_option(self) -> None:
        """--train-size, for `load_data`."""
        first = "number of training examples, from the first on (default: all)"
        self.add_argument("--train-size", type=int, help=first)

    def add_training_options(self) -> None:
        """What `settings` takes, and --train-size."""
        self.add_hidden_option("neurons of each hidden layer")
        self.add_argument("--epochs", type=int, default=30, help="passes over the training data")
        self.add_argument("--batch-size", type=int, default=10, help="examples in a mini-batch")
        self.add_argument("--momentum", type=float, default=0.0, help="as torch.optim.SGD's")
        self.add_argument(
            "--l2", type=float, default=0.0, help="lambda; weights decay by lambda / n_train"
        )
        self._add_schedule_options()
        self._add_distortion_options()
        self.add_argument(
            "--init",
            type=_init,
            default="scaled",
            metavar="|".join((*modules.INITS, "SD")),
            help="weights from N(0, 1/n_in), or from N(0, 1); or all parameters from N(0, SD^2)",
        )
        self.add_train_size_option()

    def _add_schedule_options(self) -> None:
        add = self.add_argument_group("learning-rate schedule").add_argument
        kind = "change of the rate after the warm-up"
        add("--schedule", choices=schedules.KINDS, default="constant", help=kind)
        add("--step-size", type=int, help="epochs per step of --schedule step (default: 10)")
        add("--gamma", type=float, help="factor of a step of --schedule step (default: 0.1)")
        fall = "epochs in which --schedule cosine falls to 0 (default: all after the warm-up)"
        add("--cosine-epochs", type=int, help=fall)
        add("--warmup", type=int, default=0, help="epochs of linear warm-up")
        add("--warmup-start", type=float, default=0.1, help="factor of the first warm-up epoch")

    def _add_distortion_options(self) -> None:
        add = self.add_argument_group(
            "distortions of the training images (nnce.data.Distortion), drawn for each epoch"
        ).add_argument
        for name, (field, what) in _DISTORTIONS.items():
            add(
                f"--{name.replace('_', '-')}",
                type=functools.partial(_distortion, field),
                default=getattr(_UNDISTORTED, field),
                metavar="X",
                help=what,
            )

    def add_speed_options(self) -> None:
        """--threads and --matmul-precision, for `set_speed`."""
        self.add_argument("--threads", type=int, help="CPU threads (default: what suits the sizes)")
        self.add_argument(
            "--matmul-precision",
            choices=("highest", "high", "medium"),
            default="highest",
            help="argument of torch.set_float32_matmul_precision",
        )

    @contextlib.contextmanager
    def user_errors(self) -> Iterator[None]:
        """Context for reading the user's input: an error is one line."""
        try:
            yield
        except Exception as error:
            sentence = _beyond_us(error) or (str(error) if isinstance(error, ValueError) else None)
            if sentence is None:
                raise
            self.error(sentence)

    @contextlib.contextmanager
    def run_directory(self, options: argparse.Namespace, name: str, **more: Any) -> Iterator[Path]:
        """`run_directory` of --run-dir or --name; one that cannot be used is a user's error."""
        with contextlib.ExitStack() as stack:
            with self.user_errors():
                if options.name and options.run_dir:
                    raise ValueError("expected --run-dir or --name, got both")
                name = f"{name}-{options.name}" if options.name else name
                path = stack.enter_context(run_directory(options.run_dir, name, **more))
            if options.quiet:
                stack.enter_context(_quiet())
            yield path


def _whole_number(text: str) -> int:
    """What `type=int` means in a script's options."""
    number = int(text)
    if abs(number) > _LARGEST:
        raise argparse.ArgumentTypeError(
            f"expected a whole number within ±{_LARGEST:,}, got {text}"
        )
    return number


def _data(text: str) -> str:
    """`--data`: a path as an absolute one, with which a run is resumed from any folder."""
    is_path = text not in data.DATASETS and os.path.exists(text)
    return os.path.abspath(text) if is_path else text


def data_word(options: argparse.Namespace) -> str:
    """--data for titles and names of folders: of your own data the file's or folder's name."""
    name = Path(options.data).name.removesuffix(".npz")
    return re.sub(r"[^\w.+-]", "_", name)[:60] or "data"


def _word(text: str) -> str:
    """`--name`, checked: a part of a folder's name."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,59}", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"expected a letter or digit and at most 59 more or . _ + -, got {text!r}"
        )
    return text


def _init(text: str) -> modules.Init:
    """`--init`, checked: a name, or a standard deviation."""
    value: object = text
    with contextlib.suppress(ValueError):
        value = float(text)
    try:
        return modules.check_init(cast(modules.Init, value))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _distortion(field: str, text: str) -> float:
    """An option of a distortion, checked."""
    try:
        value = float(text)
        data.Distortion(**{field: value})
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).replace(f"{field} ", "a number ", 1)) from error
    return value


# ------------------------------------------------------------------------------ running a script


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run a script's main() and exit with its status, without a traceback for what users cause.

    Ctrl-C, SIGTERM and SIGHUP (a closed terminal) raise KeyboardInterrupt, so that main() can save
    its state: status 130, 143 and 129. If the output's reader is gone, as behind `| head`, the
    status is 141. If the output cannot be written, as on a full disk, the script continues without
    it, and success is status 1. Lack of memory or space is one sentence and status 1.
    """
    program = Path(sys.argv[0]).name
    out, err = _Stream(1, stops=True), _Stream(2, stops=False)
    if not parallel.is_first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = (
        _text(old, new) for old, new in ((sys.stdout, out), (sys.stderr, err))
    )
    threading.excepthook = _thread_failed
    _signals.listen()
    status: Any  # of an exit it may be any object
    try:
        try:
            status = main()
            sys.stdout.flush()
        finally:
            _signals.ignore()
    except SystemExit as stop:
        status = stop.code
    except KeyboardInterrupt:
        status = 128 + (_signals.came or signal.SIGINT)
    except BrokenPipeError:
        status = 141
    except Exception as error:
        sentence = _beyond_us(error)
        if sentence is None:
            raise
        print(f"{program}: error: {sentence}", file=sys.stderr)
        status = 1
    if out.lost and not status:
        print(f"{program}: error: standard output: {out.lost.strerror}", file=sys.stderr)
        status = 1
    if parallel.launched():
        parallel.exit_at_once(status or 0)
    sys.exit(status)


class _Stream(io.FileIO):
    """Standard output (1) or error (2), which drops what cannot be written.

    With `stops`, the first write to a closed pipe raises BrokenPipeError.
    """

    def __init__(self, number: int, *, stops: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._stops = stops
        self.lost: OSError | None = None
        """Why something could not be written."""

    def write(self, content: Any) -> int:  # a buffer, which has no name before Python 3.12
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
        errors="replace",  # σ on a terminal that has none
        line_buffering=True,
    )


class _Muted:
    """A stream that is not a terminal, so that it has no progress bars; standard output is mute."""

    def __init__(self, stream: Any, *, mute: bool) -> None:
        self.heard, self._mute = stream, mute

    def __getattr__(self, name: str) -> Any:
        return getattr(self.heard, name)

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        return len(text) if self._mute else self.heard.write(text)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    out, err = (_Muted(sys.stdout, mute=True), _Muted(sys.stderr, mute=False))
    with contextlib.redirect_stdout(cast(Any, out)), contextlib.redirect_stderr(cast(Any, err)):
        yield


def heard() -> Any:
    """Standard output, also with --quiet."""
    return sys.stdout.heard if isinstance(sys.stdout, _Muted) else sys.stdout


def _thread_failed(arguments: threading.ExceptHookArgs) -> None:
    """Of TensorBoard's thread that writes: the script meets the same error, and says it."""
    if not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)


class _Signals:
    """Ctrl-C (SIGINT), SIGTERM and SIGHUP, as a script handles them.

    The first one raises KeyboardInterrupt, at the end of an `undisturbed` block if one is running,
    or at `let_through`. A second Ctrl-C exits at once; other signals after the first are ignored.

    Python runs handlers in the main thread only, which a compiler may block for many seconds. So a
    second thread reads the signals' numbers from a pipe, acknowledges the first, and exits at the
    second Ctrl-C.
    """

    def __init__(self) -> None:
        self._held = self._waiting = False
        self._numbers: list[int] = []
        self.came: int | None = None
        """The number of the first signal."""

    def listen(self) -> None:
        # As nohup and a shell's & ignore them.
        self._numbers = [n for n in loops.SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        for number in self._numbers:
            signal.signal(number, self._take)
        read, write = os.pipe()
        if hasattr(os, "set_blocking"):  # Windows has it from Python 3.12 on, and does without
            os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        threading.Thread(target=self._answer, args=(read,), daemon=True).start()

    def ignore(self) -> None:
        # Not by a handler of Python's: those go before the process does.
        for number in loops.SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.came is None:
            self.stop(number)

    def _answer(self, pipe: int) -> None:
        # torchrun forwards a Ctrl-C that its processes have already received.
        again_after = _SAME_PRESS if parallel.launched() else 0.0
        began: float | None = None
        while numbers := os.read(pipe, 1):
            (number,) = numbers
            if number not in self._numbers:  # ignored, but for a handler of someone else's
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
        else:  # at once, unless the main thread is in compiled code
            slow = threading.Timer(_AT_ONCE, write, ["stopping ..."])
            slow.daemon = True
            slow.start()

    def stop(self, number: int) -> None:
        """Stop as for this signal, which another process may have received."""
        if not self._waiting:
            self.came, self._waiting = number, self._held
            if not self._held:
                raise KeyboardInterrupt

    def waiting(self) -> int:
        """The number of a signal that waits for the end of a block; 0 if none does."""
        return self.came or 0 if self._waiting else 0

    def let_through(self) -> None:
        """Stop here if a signal waits, not at the end of the block."""
        if self._waiting:
            self._waiting = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Let signals wait for the end of the block, or of an outer one."""
        outer, self._held = self._held, True
        try:
            yield
        finally:
            self._held = outer
        if not outer:
            self.let_through()


_signals = _Signals()
# Seconds within which a second Ctrl-C is taken for the first one, forwarded.
_SAME_PRESS = 1.0
# Seconds within which a script that may stop anywhere does so without an acknowledgement.
_AT_ONCE = 0.5


undisturbed = _signals.undisturbed
waiting = _signals.waiting
let_through = _signals.let_through
stop = _signals.stop


class Failed(Exception):
    """Failure outside the script, such as a full disk, and the files that are kept."""


def _beyond_us(error: BaseException) -> str | None:
    """The sentence for no memory, no space and the like; None if the error is one of ours."""
    if isinstance(error, Failed):
        return str(error)
    if parallel.lost(error):
        first_line = str(error).strip().splitlines()[0]
        return f"process {os.environ.get('RANK')} has lost another one: {first_line}"
    if not isinstance(error, OSError) or isinstance(error, BrokenPipeError):
        return _memory.shortage(error)
    where = "" if error.filename is None else f": {error.filename}"
    return f"{error.strerror}{where}" if error.strerror else str(error)


# ------------------------------------------------------------------------------ what options mean


def settings(options: argparse.Namespace, **more: Any) -> Settings:
    """The settings for the training options, and for more fields that a script adds.

    Defaults that depend on other options are written into the options, to be recorded.
    """
    fields = {field: getattr(options, name) for name, (field, _) in _DISTORTIONS.items()}
    distortion = data.Distortion(**fields)
    undistorted = dataclasses.replace(_UNDISTORTED, sigma=distortion.sigma)
    return Settings(
        hidden=tuple(options.hidden),
        epochs=options.epochs,
        batch_size=options.batch_size,
        momentum=options.momentum,
        l2=options.l2,
        schedule=_schedule(options),
        distortion=None if distortion == undistorted else distortion,
        init=options.init,
        seed=options.seed,
        **more,
    )


def name_of(options: argparse.Namespace) -> str:
    """Start, regularization and momentum of the training options, for a run directory's name."""
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
    return Schedule(
        options.schedule,
        options.step_size,
        options.gamma,
        options.cosine_epochs,
        options.warmup,
        options.warmup_start,
    )


def load_data(options: argparse.Namespace) -> data.Dataset:
    """The data set that the options name, on their device and in their dtype."""
    with announced(f"reading {options.data}", quiet=options.quiet):
        return data.load(
            options.data,
            data_dir=options.data_dir,
            train_size=getattr(options, "train_size", None),  # a script that trains has it
            device=device(options.device),
            dtype=DTYPES[options.dtype],
        )


def device(name: str) -> torch.device:
    """The device of --device; "auto" is CUDA if each process has a GPU, else the CPU."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not there:
        raise ValueError("--device cuda: PyTorch sees no CUDA device on this machine")
    processes = parallel.processes_here()
    if name == "cuda" and there < processes:
        raise ValueError(
            f"--device cuda: each of the {processes} processes on this machine needs a GPU, and "
            f"PyTorch sees {there}"
        )
    if name == "auto":
        name = "cuda" if there >= processes else "cpu"
    return torch.device(name)


def threads(options: argparse.Namespace) -> int | None:
    """--threads for an `Ensemble`, at most one per processor (see `announce_threads`)."""
    return None if options.threads is None else min(options.threads, os.cpu_count() or 1)


def set_speed(options: argparse.Namespace, suited: int) -> None:
    """Apply --threads (default: `suited`) and --matmul-precision."""
    threads = suited if options.threads is None else options.threads
    if not 1 <= threads <= 1024:
        raise ValueError(f"expected 1 to 1,024 --threads, got {threads:,}")
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(options.matmul_precision)


@contextlib.contextmanager
def announced(description: str, *, quiet: bool = False) -> Iterator[None]:
    """Show on a terminal the activity of a block of some seconds, unless quiet."""
    disable = None if parallel.is_first() and not quiet else True  # None: where nobody watches
    with tqdm(desc=description, bar_format="{desc} …", disable=disable, leave=False):
        yield


def announce_threads(options: argparse.Namespace) -> None:
    """Warn if --threads exceeds the processors; called once all options are accepted."""
    processors = os.cpu_count() or 1
    if options.threads is not None and options.threads > processors:
        print(
            f"--threads {options.threads}: this machine has {processors} processors",
            file=sys.stderr,
        )


# ---------------------------------------------------------------------------- the run's directory


def announce_compilation(
    options: argparse.Namespace, sizes: Sequence[int], engine: Engine | None = "backprop"
) -> None:
    """Announce that the loops will be compiled, which takes some seconds, once."""
    dtype, place = DTYPES[options.dtype], device(options.device)
    suits = ensemble.suits_loops(sizes, options.batch_size, dtype, place, density=0.2)
    if (engine == "loops" or (engine == "backprop" and suits)) and not (
        options.quiet or loops.is_cached()
    ):
        print("compiling the loops: once, and it takes some seconds", flush=True)


@contextlib.contextmanager
def run_directory(
    chosen: Path | None,
    name: str,
    *,
    dry_run: bool = False,
    resumed: bool = False,
    world: World = ALONE,
) -> Iterator[Path]:
    """The directory of one run: the chosen one, or a new one called runs/NAME-DATE-TIME.

    It is removed again if the block is left before `keep` or `report.write_results` has been
    called, and after a dry run. A process that is killed outright leaves it; a later run may begin
    there unless it has a checkpoint. Rank 0 makes the directory; other processes learn its path.

    Raises:
        ValueError: the directory has been used, cannot be made or written, has a name that is not
            UTF-8, or another process is writing to it.
        Failed: memory or space ran out in the block, another process was lost, or the directory was
            deleted, and there is something to keep.
    """
    if world.rank:
        path: Path = world.broadcast(None)
        with _failing(path, lambda: path.is_dir() and any(path.glob(_CHECKPOINTS))):
            yield path
        return
    with contextlib.ExitStack() as stack:
        try:
            path, made = _directory(chosen, name)
            _begin(path, resumed, locked=stack.enter_context(_for_this_process(path)))
        except OSError as error:
            raise ValueError(
                f"the run directory {chosen or name} cannot be written: {error.strerror}"
            ) from error
        mark = path / _NOTHING_YET
        try:
            with _failing(path, lambda: not dry_run and not mark.exists()):
                world.broadcast(path)
                yield path
        finally:
            if path.is_dir() and (dry_run or mark.exists()):
                clear(path)
                # Another run may have begun in the same place meanwhile.
                with contextlib.suppress(OSError):
                    for folder in made:
                        folder.rmdir()


def _directory(chosen: Path | None, name: str) -> tuple[Path, list[Path]]:
    """The directory, which exists from now on, and the folders that were made for it."""
    if chosen is None:
        return _new_directory(Path("runs"), f"{name}-{date_and_time()}")
    if chosen.exists() and not chosen.is_dir():
        raise ValueError(f"the run directory {chosen} is a file; choose a folder")
    _check_name(chosen)
    made = _missing(chosen)
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen, made


def _missing(path: Path) -> list[Path]:
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _new_directory(parent: Path, name: str) -> tuple[Path, list[Path]]:
    """A directory that no other process has made, nor will take for its own."""
    path, number = parent / name, 1
    while True:
        made = _missing(path)
        with contextlib.suppress(FileExistsError):  # two runs within one second
            path.mkdir(parents=True)
            return path, made
        number += 1
        path = parent / f"{name}-{number}"


def _begin(path: Path, resumed: bool, *, locked: bool) -> None:
    """Mark the directory as one in which nothing is finished yet, or resume in it."""
    if resumed:
        checkpoints.clear_unfinished(path)
        keep(path)
        return
    if _content(path):
        if is_without_result(path):
            if not locked:
                raise ValueError(
                    f"the run directory {path} is of a run that was killed before its first "
                    f"checkpoint; delete it, or choose a new one"
                )
            clear(path)
        else:
            advice = f"resume it with --resume {path}, or " if any(path.glob(_CHECKPOINTS)) else ""
            raise ValueError(f"the run directory {path} is already used; {advice}choose a new one")
    with (path / _NOTHING_YET).open("x") as file:
        file.write(job())


def is_without_result(path: Path) -> bool:
    """Whether a run has begun in the directory that has neither finished anything nor saved it."""
    return (path / _NOTHING_YET).exists() and not any(path.glob(_CHECKPOINTS))


def _check_name(path: Path) -> None:
    """Raise ValueError unless TensorBoard can write to a folder of this name."""
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
    """Contents of a folder, without the files that systems put into every folder."""
    return [path for path in folder.iterdir() if path.name not in _NOT_OURS]


@contextlib.contextmanager
def _failing(path: Path, keeps: Callable[[], bool]) -> Iterator[None]:
    """Raise Failed for what no script can help, if there is something to keep."""
    try:
        yield
    except Exception as error:
        sentence = _beyond_us(error)
        if sentence is None:
            raise
        if parallel.is_first() and not path.is_dir():
            raise Failed(f"the run directory {path} was deleted during the run") from error
        if not keeps():
            raise
        torchrun_gives_up = parallel.lost(error) and not parallel.restarts_left()
        how = f"; to go on:\n{command_to_resume(path)}" if torchrun_gives_up else ""
        raise Failed(f"{sentence}; finished results are kept in {path}{how}") from error


def command_to_resume(run_dir: Path) -> str:
    """The command that resumes a run."""
    python = [from_here(Path(sys.executable))]
    if parallel.launched():
        torchrun = Path(sys.executable).with_name("torchrun")
        python = [from_here(torchrun), "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    return shlex.join([*python, from_here(Path(sys.argv[0])), "--resume", from_here(run_dir)])


def from_here(path: Path) -> str:
    """A path as it is typed in the working directory."""
    with contextlib.suppress(ValueError):
        path = path.absolute().relative_to(Path.cwd())
    return str(path)


@contextlib.contextmanager
def _for_this_process(path: Path) -> Iterator[bool]:
    """Lock the folder as long as this process lives; False where the system has no such locks."""
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
    """Remove everything that a run has left."""
    for leftover in _content(run_dir):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def keep(run_dir: Path) -> None:
    """From now on there is something in the run's directory that must stay, come what may."""
    (run_dir / _NOTHING_YET).unlink(missing_ok=True)


def date_and_time() -> str:
    """When this run began; of several processes when their job did, the same after a restart."""
    now = datetime.now()
    if parallel.launched():
        now = datetime.fromtimestamp(_agent().create_time())
    return f"{now:%Y%m%d-%H%M%S}"


def _agent() -> Any:
    """The `torchrun` that has started this process, and starts it again."""
    import psutil

    return psutil.Process(os.getppid())


def job() -> str:
    """Which job of `torchrun`'s this process belongs to, restarts included; "" if to none."""
    if not parallel.launched():
        return ""
    agent = _agent()
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {agent.pid}-{agent.create_time()}"


def is_this_job(name: str) -> bool:
    """Whether `job` has once said so here, or on another machine under a name given to the job."""
    now, then = job().split(" "), name.split(" ")
    return bool(job()) and (now[-1] == then[-1] or now[0] == then[0] != "none")


def remove_what_this_job_left(run_dir: Path) -> None:
    """Remove a directory that this job has begun, if nothing in it is finished."""
    mark = run_dir / _NOTHING_YET
    if mark.is_file() and is_this_job(mark.read_text()):
        clear(run_dir)
        run_dir.rmdir()
