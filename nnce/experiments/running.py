"""Running a script: exit status, output streams, signals, and failures outside the script."""

import contextlib
import gc
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

from nnce import _memory
from nnce.engines import loops
from nnce.training import parallel


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
        message = external_failure(error)
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context that discards standard output and hides progress bars."""
    out, err = _Muted(sys.stdout, mute=True), _Muted(sys.stderr, mute=False)
    with contextlib.redirect_stdout(cast(Any, out)), contextlib.redirect_stderr(cast(Any, err)):
        yield


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


def external_failure(error: BaseException) -> str | None:
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
