"""Scripts in processes forked from one that has already imported everything.

They start in milliseconds instead of seconds. Unlike a new interpreter, they test neither imports
nor what depends on standard streams or the environment at the start. Figures are empty
(tests/undrawn.py).
"""

import contextlib
import functools
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "scripts"
PRELOADED = [
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "mpmath", "numba", "psutil"),
    *("sklearn.datasets", "sklearn.model_selection", "tensorboard.summary.writer.record_writer"),
    *("tensorboard.backend.event_processing.event_accumulator", "torch.utils.tensorboard"),
    *("nnce.engines.loops", "nnce.kernels.training", "nnce.kernels.losses"),
    *("nnce.experiments.comparison_report", "undrawn", "programs", "pytest"),
]


@functools.cache
def _forking():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _work(out, err, before, name, options):
    """In the new process: its output to files, then these lines of Python, then the script."""
    import undrawn

    # As at the start of Python, whatever the signals of the process that forks are.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    undrawn.replace()
    sys.argv = [f"{name}.py", *options]
    sys.path.insert(0, str(SCRIPTS))
    exec(before, {})
    if name:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")


class Program:
    """A process with the methods of subprocess.Popen that tests need."""

    def __init__(self, name, *options, before=""):
        self._folder = tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self._folder.name) / stream for stream in ("out", "err"))
        self._process = _forking().Process(
            target=_work, args=(str(self.out), str(self.err), before, name, options)
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        self._process.join(0)
        return self.returncode

    def wait(self, timeout=120):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.returncode

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def output(self):
        """What it has written so far: standard output, and standard error."""
        return [path.read_text() if path.exists() else "" for path in (self.out, self.err)]

    def until(self, *output):
        """Wait for exactly this output."""
        deadline = time.monotonic() + 60
        while (found := self.output()) != [*output]:
            assert time.monotonic() < deadline and self.poll() is None, found
            time.sleep(0.01)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.poll() is None:
            self.kill()
            self.wait()
        self._folder.cleanup()


@contextlib.contextmanager
def job(size, name, *options, before=""):
    """As many processes as torchrun would start, without torchrun, which starts Python for each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    every = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
    every |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(size))
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in map(str, range(size)):
            own = f"import os\nos.environ |= {every | {'RANK': rank, 'LOCAL_RANK': rank}}\n"
            program = Program(name, *options, before=own + before)
            processes.append(stack.enter_context(program))
        yield processes


def run(name, *options, before=""):
    """A script's exit status and output, once it has ended."""
    with Program(name, *options, before=before) as program:
        program.wait()
        return subprocess.CompletedProcess(options, program.returncode, *program.output())
