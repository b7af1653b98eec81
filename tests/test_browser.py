"""TensorBoard in a real browser: what the scripts log can be seen, on every page.

Needs Chromium and its driver. The screenshots are kept next to the run, in runs/browser-test-….
"""

import contextlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import killed
import pytest
import undrawn
from conftest import ROOT, missing

from nnce.experiments import report

pytestmark = pytest.mark.slow

# What is drawn in every element of a name, inside shadow roots too, of which TensorBoard is made.
DRAWN = """
const walk = (root, visit) => {
  for (const element of root.querySelectorAll('*')) {
    visit(element);
    if (element.shadowRoot) walk(element.shadowRoot, visit);
  }
};
const hosts = [];
walk(document, (host) => {
  if (host.localName !== arguments[0]) return;
  const box = host.getBoundingClientRect();
  if (box.width < 20 || box.height < 20) return;
  const drawn = {tag: host.tag || '', lines: 0, areas: 0, canvases: 0, images: 0};
  const look = (e) => {
    if (e.localName === 'path' && (e.getAttribute('d') || '').length > 40) {
      drawn.lines += 1;
      if (e.classList.contains('area')) drawn.areas += e.getBoundingClientRect().height > 2;
    }
    if (e.localName === 'canvas') drawn.canvases += 1;
    if (e.localName === 'img' && e.naturalWidth > 20) drawn.images += 1;
  };
  walk(host, look);
  if (host.shadowRoot) walk(host.shadowRoot, look);
  hosts.push(drawn);
});
return hosts;
"""
OPEN_ALL = """
const walk = (root) => {
  for (const element of root.querySelectorAll('*')) {
    if (element.localName === 'tf-category-paginated-view' && !element.opened) {
      const heading = element.shadowRoot.querySelector('button.heading');
      if (heading) heading.click();
    }
    if (element.shadowRoot) walk(element.shadowRoot);
  }
};
walk(document);
"""
CELLS = """
const texts = [];
const walk = (root) => {
  for (const element of root.querySelectorAll('*')) {
    if (element.localName === 'vaadin-grid-cell-content') texts.push(element.textContent.trim());
    if (element.shadowRoot) walk(element.shadowRoot);
  }
};
walk(document);
return texts;
"""
COLORS = """
const swatches = [...document.querySelectorAll('.run-color-swatch')];
return swatches.map((swatch) => getComputedStyle(swatch).backgroundColor);
"""
NUMBERS = """
return [...document.querySelectorAll('input[type=number]')].map((e) => e.value);
"""
TEXT = """
const texts = [];
const walk = (node) => {
  if (node.nodeType === Node.TEXT_NODE) texts.push(node.textContent);
  if (['STYLE', 'SCRIPT', 'TEMPLATE'].includes(node.nodeName)) return;
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) walk(child);
};
walk(document.body);
return texts.join(' ').replace(/\\s+/g, ' ');
"""


class Board:
    """TensorBoard's pages in a browser."""

    def __init__(self, driver, address, screenshots):
        self.driver, self.address, self.screenshots = driver, address, screenshots

    def open(self, page, until, within=40, query=""):
        """Open a page, wait until it shows what it should, and take a screenshot either way."""
        self.driver.get("about:blank")
        self.driver.get(f"{self.address}/{query}#{page}")
        shown = self.wait(until, within)
        time.sleep(1)  # what is drawn in steps
        self.driver.save_screenshot(str(self.screenshots / f"{page}.png"))
        text = self.text()
        assert shown, f"{page} shows {text[:2000]!r}"
        for trouble in ("No dashboards are active", "No scalar data", "Failed to", "Missing Tags"):
            assert trouble not in text
        # Fonts and the like would come from the internet, which may not be there.
        assert not [
            line["message"]
            for line in self.driver.get_log("browser")
            if line["level"] == "SEVERE" and self.address in line["message"]
        ]
        return text

    def wait(self, until, within=40):
        deadline = time.monotonic() + within
        while not until() and time.monotonic() < deadline:
            time.sleep(0.3)
        return until()

    def text(self):
        return self.driver.execute_script(TEXT)

    def drawn(self, name, what):
        """The elements of a name in which there is something of a kind."""
        return [host for host in self.driver.execute_script(DRAWN, name) if host[what]]


@pytest.fixture(scope="module")
def driver():
    browser, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and chromedriver):
        missing("browser", "chromium and chromedriver are not on the PATH")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        "window-size=1600,1400",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@contextlib.contextmanager
def served(driver, folder, screenshots, last_run):
    """TensorBoard over a folder, once it knows the last of its runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("tensorboard")),
            *("--logdir", str(folder), "--port", str(port), "--host", "127.0.0.1"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{address}/data/runs", timeout=5) as answer:
                    if last_run.encode() in answer.read():
                        break
            except OSError:
                pass
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.5)
        screenshots.mkdir()
        yield Board(driver, address, screenshots)
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def runs(worker_id):
    """The folders of a small comparison and a training run."""
    # The tests of this file may be shared out over the processes of pytest-xdist.
    runs = ROOT / "runs" / f"browser-test-{worker_id}"
    shutil.rmtree(runs, ignore_errors=True)
    for script, options in (
        ("compare", ["--seeds", "3", "--lrs", "0.5", "3", "--epochs", "5"]),
        ("train", ["--epochs", "5"]),
        ("slowdown", ["--epochs", "50"]),
    ):
        with undrawn.drawn():
            assert killed.loaded(script).main([*options, "--run-dir", str(runs / script)]) == 0
    return runs


@pytest.fixture(scope="module")
def best(driver, runs):
    """TensorBoard over the folder of the first command that a comparison prints."""
    folder = runs / "compare" / "best-rates"
    last = sorted(path.name for path in folder.iterdir())[-1]
    with served(driver, folder, runs / "screenshots-best", last) as board:
        yield board


@pytest.fixture(scope="module")
def board(driver, runs):
    """TensorBoard over a comparison at all rates, a training run and single neurons."""
    with served(driver, runs, runs / "screenshots", "slowdown") as board:
        yield board


def runs_of(*losses):
    return [f"compare/all-rates/{loss}-lr{lr}" for loss in losses for lr in ("0.5", "3")]


def test_run_list_and_time_series(board):
    runs = (*runs_of("quadratic", "cross-entropy"), "train", "slowdown/w2-b2-quadratic")

    def shown():
        text = board.text()
        tags = ("accuracy/test", "accuracy/validation")
        return (
            board.drawn("line-chart", "canvases")
            and all(run in text for run in runs)
            and all(tag in text.replace(" ", "") for tag in tags)  # may be broken at a slash
        )

    board.open("timeseries", shown)


def most_lines(board):
    return max((chart["lines"] for chart in board.drawn("vz-line-chart2", "lines")), default=0)


def test_scalars_are_overlaid(board):
    # In one chart a line each of the comparison's variants, its controls (both also at the best
    # rates) and the training run.
    board.open("scalars", lambda: most_lines(board) >= 4 + 2 + 4 + 1)


def test_the_link_shows_four_runs_in_four_colors(best):
    """Not smoothed, and without helper tags, histograms and images."""
    query = urllib.parse.urlsplit(report.TENSORBOARD).query

    def shown():
        return best.drawn("line-chart", "canvases") and best.driver.execute_script(COLORS)

    text = best.open("timeseries", shown, query=f"?{query}")
    colors = best.driver.execute_script(COLORS)
    assert len(colors) == len(set(colors)) == 4
    assert "18 cards" in text  # 2 layers' 4 figures, and loss and accuracy 3 + 2 times
    numbers = best.driver.execute_script(NUMBERS)  # of the settings, with the smoothing
    assert "0" in numbers and "0.6" not in numbers


def test_scalars_of_the_best_rates_are_four_lines(best):
    text = best.open("scalars", lambda: most_lines(best) >= 4)
    assert all(text.count(f"{loss}-lr") == 2 for loss in ("quadratic", "cross-entropy"))


def test_custom_scalars_are_three_groups_of_margin_charts(best):
    charts = "tf-custom-scalar-margin-chart-card"

    def shown():
        best.driver.execute_script(OPEN_ALL)
        drawn = [chart["areas"] for chart in best.drawn(charts, "areas")]
        return len(drawn) >= 6 and min(drawn) >= 2  # both losses, and their bands have a height

    text = best.open("custom_scalars", shown)
    for title in ("How well", "How fast", "The learning slowdown", "quadratic to cross-entropy"):
        assert title in text


def test_images_of_the_best_rates(best):
    wanted = {"weights/layer1", "wrong", "confusion", "learning curves"}

    def shown():
        best.driver.execute_script(OPEN_ALL)
        return wanted <= {image["tag"] for image in best.drawn("tf-image-loader", "images")}

    best.open("images", shown)


def test_images(board):
    board.open("images", lambda: board.drawn("tf-image-loader", "images"))
    board.driver.execute_script(OPEN_ALL)
    wanted = {"weights/layer1", "wrong", "confusion", "learning curves", "single neuron"}

    def shown():
        return wanted <= {image["tag"] for image in board.drawn("tf-image-loader", "images")}

    all_shown = board.wait(shown)
    board.driver.save_screenshot(str(board.screenshots / "images.png"))
    assert all_shown, board.drawn("tf-image-loader", "images")


def test_histograms(board):
    text = board.open("histograms", lambda: board.drawn("vz-histogram-timeseries", "lines"))
    for tag in ("output/a", "output/dz"):  # output/z is on the next page of cards
        assert tag in text.replace(" ", "")


def test_text(best):
    text = best.open("text", lambda: "Made by" in best.text())
    assert "scripts/compare.py --seeds 3 --lrs 0.5 3 --epochs 5" in text
    assert "best on validation" in text and "cross-entropy − quadratic, each at its best" in text
    assert text.count("config/text_summary") == 2  # a title and a tag: once


def trials(board):
    return set(board.driver.execute_script(CELLS))


def test_hparams(board):
    of_compare = {*runs_of("quadratic", "cross-entropy"), "train"}
    board.open("hparams", lambda: of_compare <= trials(board))


def test_hparams_of_the_best_rates_are_what_varies(best):
    def of_runs():
        return {text for text in trials(best) if text.startswith(("quadratic-", "cross-entropy-"))}

    text = best.open("hparams", lambda: len(of_runs()) >= 4)
    assert len(of_runs()) == 4
    for name in ("loss", "rate", "start", "λ", "engine", "test accuracy", "validation accuracy"):
        assert name in text
    for constant in ("gamma", "warmup", "elastic", "momentum", "batch_size"):
        assert constant not in text
