"""A real TensorBoard in a headless Chromium: pages whose parts are in shadow trees."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

PATIENCE = 60
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # Chromium refuses to run as root otherwise, as in containers; it opens only this server's page
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,1100",
)
PIERCE = """
const selector = arguments[0], found = [];
const walk = root => {
  for (const e of root.querySelectorAll('*')) {
    if (e.matches(selector)) found.push(e);
    if (e.shadowRoot) walk(e.shadowRoot);
  }
};
walk(document);
return found.filter(e => { const b = e.getBoundingClientRect(); return b.width > 0 && b.height > 0; });
"""
TEXT = """
const parts = [];
const walk = n => {
  if (n.nodeType == Node.TEXT_NODE) { if (n.data.trim()) parts.push(n.data.trim()); return; }
  if (n.nodeType == Node.ELEMENT_NODE) {
    if (['STYLE', 'SCRIPT', 'TEMPLATE', 'NOSCRIPT'].includes(n.tagName)) return;
    if (getComputedStyle(n).display == 'none') return;
    if (n.shadowRoot) { n.shadowRoot.childNodes.forEach(walk); }
  }
  n.childNodes.forEach(walk);
};
walk(document.body);
return parts.join('\\n');
"""


def missing():
    """Why no browser can be driven here, or None."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "Selenium is missing: pip install 'torchreg-sparse[browser]'"
    for names in (BROWSERS, ("chromedriver",)):
        if not any(map(shutil.which, names)):
            return f"{names[0]} is missing: apt-get install chromium chromium-driver"
    return None


@contextlib.contextmanager
def tensorboard(logdir):
    """The address of a server that shows the runs, until the body ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1"]
    options = ["--port", str(port), "--samples_per_plugin", "images=100"]
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen([*command, *options], stdout=said, stderr=said)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until(lambda: _answers(f"{address}/data/runs"), "TensorBoard does not answer")
            yield address
        finally:
            server.terminate()
            server.wait(10)


@contextlib.contextmanager
def chromium():
    """Selenium's driver of a headless Chromium with a profile of its own, until the body ends."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver"), env=os.environ))
        try:
            yield driver
        finally:
            driver.quit()


class Tour:
    """Opens TensorBoard's tabs, reads them, and keeps pictures of them."""

    def __init__(self, driver, address, folder):
        self.driver, self.address, self.folder = driver, address, folder
        folder.mkdir(parents=True, exist_ok=True)

    def open(self, tab, *texts, **state):
        """Load the tab, in light colours, and wait until it shows all the texts."""
        self.driver.get("about:blank")
        fragment = "&".join([tab, *(f"{key}={value}" for key, value in state.items())])
        self.driver.get(f"{self.address}/?darkMode=false#{fragment}")
        self.wait_for(*texts)

    def text(self):
        """What the page says, shadow trees included."""
        return self.driver.execute_script(TEXT)

    def all(self, selector):
        """The elements that a selector matches in any shadow tree and that have a size."""
        return self.driver.execute_script(PIERCE, selector)

    def wait_for(self, *texts):
        wait_until(
            lambda: all(text in self.text() for text in texts),
            lambda: f"{[t for t in texts if t not in self.text()]} not in the page:\n{self.text()[:3000]}",
        )

    def wait_for_all(self, selector, least):
        """The elements, when there are so many of them."""
        wait_until(
            lambda: len(self.all(selector)) >= least,
            lambda: f"{len(self.all(selector))} of {least} elements {selector!r}",
        )
        return self.all(selector)

    def click(self, element):
        self.driver.execute_script("arguments[0].click()", element)

    def keep(self, name):
        """A screenshot, NAME.png, when what moves has come to rest."""
        time.sleep(1.5)
        path = self.folder / f"{name}.png"
        self.driver.save_screenshot(str(path))
        return path


def wait_until(condition, message):
    """Until the condition holds, or fail with the message after a minute."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(message() if callable(message) else message)
        time.sleep(0.2)


def _answers(address):
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return len(answer.read()) > 10  # not before the runs are read
    except (OSError, urllib.error.URLError):
        return False
