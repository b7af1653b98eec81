"""TensorBoard in a real browser: what the scripts log can be seen, on every page.

Needs Chromium and its driver. The screenshots are kept next to the run, in runs/browser-test-….
"""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, missing

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

    def open(self, page, until, within=40):
        """Open a page, wait until it shows what it should, and take a screenshot either way."""
        self.driver.get("about:blank")
        self.driver.get(f"{self.address}/#{page}")
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


@pytest.fixture(scope="module")
def board(driver, worker_id):
    """A small comparison and a training run, and TensorBoard over both."""
    # The tests of this file may be shared out over the processes of pytest-xdist.
    runs = ROOT / "runs" / f"browser-test-{worker_id}"
    shutil.rmtree(runs, ignore_errors=True)
    for script, options in (
        ("compare", ["--seeds", "3", "--lrs", "0.5", "3", "--epochs", "5"]),
        ("train", ["--epochs", "5"]),
        ("slowdown", ["--epochs", "50"]),
    ):
        command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *options]
        subprocess.run([*command, "--run-dir", str(runs / script)], check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("tensorboard")),
            *("--logdir", str(runs), "--port", str(port), "--host", "127.0.0.1"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{address}/data/runs", timeout=5) as answer:
                    if b"slowdown" in answer.read():
                        break
            except OSError:
                pass
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.5)
        screenshots = runs / "screenshots"
        screenshots.mkdir()
        yield Board(driver, address, screenshots)
    finally:
        server.terminate()
        server.wait()


def runs_of(*losses):
    return [f"compare/{loss}-lr{lr}" for loss in losses for lr in ("0.5", "3")]


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


def test_scalars_are_overlaid(board):
    def most_lines():
        return max((chart["lines"] for chart in board.drawn("vz-line-chart2", "lines")), default=0)

    # In one chart a line each of the comparison's variants, its controls and the training run.
    board.open("scalars", lambda: most_lines() >= 4 + 2 + 1)


def test_margin_charts(board):
    charts = "tf-custom-scalar-margin-chart-card"

    def shown():
        drawn = [chart["areas"] for chart in board.drawn(charts, "areas")]
        return len(drawn) >= 6 and min(drawn) >= 2  # both losses, and their bands have a height

    text = board.open("custom_scalars", shown)
    assert "mean and 95 % confidence interval over seeds" in text


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


def test_text(board):
    text = board.open("text", lambda: "Made by" in board.text())
    assert "scripts/compare.py --seeds 3 --lrs 0.5 3 --epochs 5" in text
    assert "best on validation" in text and "Cross-entropy minus quadratic" in text


def test_hparams(board):
    def trials():
        cells = board.driver.execute_script(CELLS)
        return {text for text in cells if text.startswith(("compare/", "train"))}

    # The runs of the comparison, its two controls and the training run, and no others.
    text = board.open("hparams", lambda: len(trials()) >= 4 + 2 + 1)
    assert len(trials()) == 4 + 2 + 1
    for name in ("loss", "lr", "engine", "accuracy/test"):
        assert name in text
