import os
import signal
from pathlib import Path

import hypothesis
import killed
import matplotlib.font_manager  # noqa: F401  makes its cache; scripts would say that they make it
import peak
import pytest
import torch
import undrawn

from nnce import data

ROOT = Path(__file__).parent.parent

# In a shell's background SIGINT is ignored, and under nohup SIGHUP: the scripts that are run here
# would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# The networks here are small: one thread is as fast, also while other programs are busy. In the
# processes that are started here, threads would wait busily for each other, and slow other tests.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
undrawn.replace()
# The same examples everywhere, however long one of them takes while other programs are busy.
hypothesis.settings.register_profile("nnce", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("nnce")


# They take longest, so they come first: at the end, one process would wait for another.
LONGEST = (
    "test_it_runs_to_the_outputs_in_the_file",
    "test_interpreted",
    "test_a_killed_worker_is_noticed",
    "test_several_processes_train_the_same_network",
    "test_two_hosts_survive",
    "test_the_default_comparison_stays_small",
    "test_killed_over_and_over",
    "test_a_recipe_prints_its_result",
    "test_what_is_right_works_without_a_reference",
    "test_torch_is_all_that_is_needed",
)


@pytest.hookimpl(trylast=True)  # after deselection
def pytest_collection_modifyitems(items):
    """Begin both halves, of which each process takes one, with some of the longest tests."""
    longest = [item for item in items if item.name.startswith(LONGEST)]
    others = [item for item in items if not item.name.startswith(LONGEST)]
    first, second = longest[::2], longest[1::2]
    middle = max(0, len(items) // 2 - len(first))
    items[:] = [*first, *others[:middle], *second, *others[middle:]]


def missing(what, why):
    """Skip, or fail where $NNCE_REQUIRE says that this machine must have it."""
    if what in os.environ.get("NNCE_REQUIRE", "").split(","):
        pytest.fail(f"$NNCE_REQUIRE names {what}, but {why}")
    pytest.skip(why)


def slow_unless(is_ordinary, cases):
    """Parameters for `parametrize`, of which only the ordinary cases run without -m slow."""
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(*case, marks=marks[bool(is_ordinary(*case))]) for case in cases]


@pytest.fixture(scope="session")
def digits():
    return data.load("digits")


@pytest.fixture(scope="session")
def mnist():
    """MNIST's first 2,000 training examples in float64: 200 steps of 10."""
    if "NNCE_DATA" not in os.environ:
        missing("mnist", "$NNCE_DATA does not say where MNIST is")
    return data.load("mnist", train_size=2_000, dtype=torch.float64)


@pytest.fixture(scope="session")
def mnist_like():
    """Drawn data of MNIST's shape and density in float64, in ten classes."""
    generator = torch.Generator().manual_seed(0)
    # How often a pixel is not 0, class by class; a fifth of the time on average.
    often = torch.rand(10, 784, generator=generator, dtype=torch.float64) ** 4

    def draw(n):
        labels = torch.randint(10, (n,), generator=generator)
        x = torch.rand(n, 784, generator=generator, dtype=torch.float64)
        inked = torch.rand(n, 784, generator=generator, dtype=torch.float64) < often[labels]
        return data.Split(x * inked, data.one_hot(labels, 10).double())

    return data.Dataset(draw(2_000), draw(500), draw(500))


@pytest.fixture
def script():
    """A function that imports a script by name, for its main()."""
    return killed.loaded


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a script's main() on bad input: one line, status 2, and nothing left behind; the line."""

    def run(main, *options):
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            main(list(options))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


@pytest.fixture
def drawn():
    """Figures with their content, which other tests do without (tests/undrawn.py)."""
    with undrawn.drawn():
        yield


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def peak_memory():
    """Peak of memory of a loss, each time in a process of its own (tests/peak.py)."""
    with peak.meter() as measured:
        yield measured


@pytest.fixture(scope="session")
def processes_found(tmp_path_factory):
    """What each of several processes computed together (tests/processes.py)."""
    import processes

    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(processes.in_one_process, (str(folder),), nprocs=processes.WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes.WORLD)]
