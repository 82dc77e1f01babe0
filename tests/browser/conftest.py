"""A real JupyterLab, a real kernel and headless Chromium for the browser tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from word_encoder import build_catalog

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
START_TIMEOUT_S = 60


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def artifacts():
    """Folder for screenshots: CLIPBRANCHES_ARTIFACTS, else ./artifacts."""
    folder = Path(os.environ.get("CLIPBRANCHES_ARTIFACTS", "artifacts"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium from the system."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        reason = f"no browser found: none of {', '.join(names)} is on the PATH"
        if os.environ.get("CLIPBRANCHES_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=path, headless=True, args=CHROMIUM_FLAGS
        )
        yield chromium
        chromium.close()


class Lab:
    """A running JupyterLab server with folders of its own."""

    module = "jupyterlab"
    options = (
        "--expose-app-in-browser",
        "--LabApp.news_url=",
        "--LabApp.extension_manager=readonly",
    )

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notebooks = root / "notebooks"
        self.notebooks.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._write_settings()
        self._log = (root / "server.log").open("wb")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", self.module, "--no-browser", *self.options),
                *("--allow-root", "--IdentityProvider.token=", f"--ServerApp.port={port}"),
                *("--ServerApp.port_retries=0", f"--ServerApp.root_dir={self.notebooks}"),
                "--ServerApp.disable_check_xsrf=True",
            ],
            env=self._environment(),
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def _environment(self) -> dict[str, str]:
        folders = {
            "JUPYTER_CONFIG_DIR": "config",
            "JUPYTER_DATA_DIR": "data",
            "JUPYTER_RUNTIME_DIR": "runtime",
            "JUPYTERLAB_SETTINGS_DIR": "settings",
            "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
            "IPYTHONDIR": "ipython",
            "XDG_DATA_HOME": "share",
        }
        return os.environ | {name: str(self.root / leaf) for name, leaf in folders.items()}

    def _write_settings(self) -> None:
        settings = {
            "notification": {"fetchNews": "false", "checkForUpdates": False},
            "themes": {"theme": "JupyterLab Light", "adaptive-theme": False},
        }
        folder = self.root / "settings" / "@jupyterlab" / "apputils-extension"
        folder.mkdir(parents=True)
        for name, values in settings.items():
            (folder / f"{name}.jupyterlab-settings").write_text(json.dumps(values))

    def address(self, name: str, workspace: str, *, reset: bool) -> str:
        """Return the address of a notebook, in a workspace of its own."""
        return f"{self.url}/lab/workspaces/{workspace}/tree/{name}{'?reset' if reset else ''}"

    def wait(self) -> None:
        """Return once the server answers."""
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/api", timeout=2):
                    return
            except OSError:
                time.sleep(0.1)
        log = (self.root / "server.log").read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{self.module} did not start in {START_TIMEOUT_S} s:\n{log}")

    def stop(self) -> None:
        """Shut the kernels and the server down."""
        self.process.terminate()
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def write_notebook(self, name: str, cells: list[str]) -> str:
        """Write a notebook of code cells and return its name."""
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(source) for source in cells],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        )
        nbformat.write(notebook, self.notebooks / name)
        return name


@pytest.fixture(scope="session")
def lab(tmp_path_factory, browser):
    """A JupyterLab server; `browser` first, so that nothing starts when there is none."""
    server = Lab(tmp_path_factory.mktemp("lab"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


class Notebook7(Lab):
    """A running Notebook 7 server with folders of its own."""

    module = "notebook"
    options = ("--JupyterNotebookApp.expose_app_in_browser=True",)

    def address(self, name: str, workspace: str, *, reset: bool) -> str:  # noqa: ARG002
        """Return the address of a notebook; there are no workspaces."""
        return f"{self.url}/notebooks/{name}"


@pytest.fixture(scope="session")
def notebook7(tmp_path_factory, browser):
    """A Notebook 7 server."""
    server = Notebook7(tmp_path_factory.mktemp("notebook7"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


class NotebookPage:
    """One browser page with one open notebook; acts on what is visible, as a user does."""

    def __init__(self, lab: Lab, page, name: str, workspace: str) -> None:
        self.lab = lab
        self.page = page
        self.name = name
        self.workspace = workspace
        page.set_default_timeout(15_000)
        self.console: list[str] = []
        page.on("console", lambda m: self.console.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.console.append(str(error)))
        page.on("dialog", lambda dialog: self.console.append(f"dialog: {dialog.message}"))

    def open(self, *, reset: bool = True):
        """Go to the notebook in a workspace of its own and wait for its kernel."""
        self.page.goto(self.lab.address(self.name, self.workspace, reset=reset))
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        self.wait_idle()
        return self

    def wait_idle(self) -> None:
        """Wait until the kernel is connected and idle."""
        self.page.wait_for_function(
            """() => {
                const panel = window.jupyterapp?.shell?.currentWidget;
                const kernel = panel?.sessionContext?.session?.kernel;
                return kernel?.status === "idle" && kernel.connectionStatus === "connected";
            }""",
            timeout=90_000,
        )

    def command(self, name: str, **arguments: str) -> None:
        """Run a JupyterLab command by id and wait for it."""
        self.page.evaluate(
            "([name, args]) => window.jupyterapp.commands.execute(name, args).then(() => {})",
            [name, arguments],
        )

    def theme(self, name: str) -> None:
        """Switch the theme: "JupyterLab Light" or "JupyterLab Dark"."""
        self.command("apputils:change-theme", theme=name)
        is_light = str(name.endswith("Light")).lower()
        self.page.wait_for_selector(f"body[data-jp-theme-light={is_light}]", state="attached")

    def run_all(self) -> None:
        """Run every cell and wait for the last."""
        self.command("notebook:run-all-cells")
        self.wait_idle()

    def restart_and_run_all(self) -> None:
        """Restart the kernel and run every cell, through the menu command and its dialog."""
        page = self.page
        page.evaluate("void window.jupyterapp.commands.execute('notebook:restart-run-all')")
        page.locator(".jp-Dialog .jp-mod-accept").click()
        page.wait_for_selector(".jp-Dialog", state="detached")
        page.wait_for_timeout(500)
        self.wait_idle()

    def run_cell(self, source: str) -> str:
        """Append a cell, run it, and return the text it prints."""
        return self.page.evaluate(
            """async source => {
                const panel = window.jupyterapp.shell.currentWidget;
                const kernel = panel.sessionContext.session.kernel;
                let text = "";
                const future = kernel.requestExecute({code: source, stop_on_error: false});
                future.onIOPub = m => {
                    if (m.header.msg_type === "stream") text += m.content.text;
                    if (m.header.msg_type === "error") text += m.content.traceback.join("\\n");
                };
                await future.done;
                return text;
            }""",
            source,
        )

    def value(self, expression: str):
        """Return the value of an expression in the kernel, by way of JSON."""
        return json.loads(self.run_cell(f"import json; print(json.dumps({expression}))"))

    def wait_value(self, expression: str, expected) -> None:
        """Wait until an expression in the kernel has a value; clicks arrive after the browser."""
        for _ in range(50):
            value = self.value(expression)
            if value == expected:
                return
            self.page.wait_for_timeout(100)
        assert value == expected

    def state(self):
        """Return what JupyterLab's keys would change: cells, the active one, the mode."""
        return self.page.evaluate(
            """() => {
                const { content } = window.jupyterapp.shell.currentWidget;
                return {
                    cells: content.widgets.map(cell => [
                        cell.model.type,
                        cell.model.sharedModel.source,
                        cell.model.executionCount ?? 0,
                    ]),
                    active: content.activeCellIndex,
                    mode: content.mode,
                };
            }"""
        )

    def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        for key in keys:
            self.page.keyboard.press(key)

    def wait_focus(self, row: int) -> None:
        """Wait until the cell of a row has the focus."""
        self.page.wait_for_function(
            "row => document.activeElement?.dataset?.row === String(row)", arg=row
        )

    def explorer(self, number: int = 0):
        """Return the n-th visible Explorer once it shows images."""
        found = self.page.locator(".cbw:visible").nth(number)
        found.locator(".cbw-cell").first.wait_for(timeout=60_000)
        return found

    def image_cell(self, explorer, number: int):
        """Return the n-th image of an Explorer's page."""
        return explorer.locator(".cbw-cell").nth(number)

    def rows_shown(self, explorer) -> list[int]:
        """Return the row ids of an Explorer's page, in order."""
        return explorer.evaluate(
            "root => [...root.querySelectorAll('.cbw-cell')].map(c => Number(c.dataset.row))"
        )

    def wait_painted(self, explorer) -> None:
        """Wait until every picture of the page is drawn or known to be lost."""
        explorer.locator(".cbw-skeleton").first.wait_for(state="detached")
        self.page.wait_for_function(
            "root => [...root.querySelectorAll('.cbw-picture img')].every("
            "image => image.complete && image.naturalWidth > 0)",
            arg=explorer.element_handle(),
        )

    def shot(self, folder: Path, name: str, locator=None) -> Path:
        """Write a screenshot of the page or of one element."""
        path = folder / f"{re.sub(r'[^a-z0-9-]+', '-', name.lower())}.png"
        (locator or self.page).screenshot(path=path)
        return path


class NotebookPages:
    """Opens notebooks, each in a browser context and a Lab workspace of its own."""

    def __init__(self, lab: Lab, browser, slug: str) -> None:
        self.lab = lab
        self.browser = browser
        self.slug = re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-")
        self.contexts = []

    def __call__(self, cells=None, *, name="", width=1280, height=1000, **options):
        """Write `cells` as a notebook (or take the file `name`), open it, return its page."""
        context = self.browser.new_context(viewport={"width": width, "height": height}, **options)
        self.contexts.append(context)
        name = name or f"{self.slug}-{len(self.contexts)}.ipynb"
        if cells is not None:
            self.lab.write_notebook(name, cells)
        workspace = f"{self.slug}-{len(self.contexts)}"
        return NotebookPage(self.lab, context.new_page(), name, workspace).open()

    def close(self) -> None:
        """Close every page."""
        for context in self.contexts:
            context.close()


@pytest.fixture
def open_notebook(lab, browser, request):
    """Return a function that opens notebooks for one test (see `NotebookPages`)."""
    pages = NotebookPages(lab, browser, request.node.name)
    yield pages
    pages.close()


@pytest.fixture
def open_in_notebook7(notebook7, browser, request):
    """Return a function that opens notebooks in Notebook 7 for one test."""
    pages = NotebookPages(notebook7, browser, request.node.name)
    yield pages
    pages.close()


@pytest.fixture(scope="module")
def open_shared_notebook(lab, browser, request):
    """Return a function that opens notebooks for all tests of a module."""
    pages = NotebookPages(lab, browser, request.module.__name__)
    yield pages
    pages.close()


@pytest.fixture(scope="session")
def word_catalog(tmp_path_factory, browser):
    """Path of a small catalog with pictures, lost pictures and hostile captions."""
    return build_catalog(tmp_path_factory.mktemp("words") / "words.cbcat", with_images=True).path


@pytest.fixture(scope="session")
def word_setup(word_catalog):
    """The first cell of a notebook on that catalog, with the rows of its birds and fishes."""
    return f"""
import pathlib, sys, tempfile
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from word_encoder import WordEncoder
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.explorer import Explorer
from clipbranches_widget.session import Session
catalog = Catalog.open({str(word_catalog)!r})
words = catalog.items.column("caption").to_pylist()
birds = [row for row, text in enumerate(words) if " bird " in text]
fishes = [row for row, text in enumerate(words) if " fish " in text]
"""
