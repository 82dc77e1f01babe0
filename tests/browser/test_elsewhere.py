"""The Explorer in Notebook 7, and as a Voila app that the command line serves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

import clipbranches_widget as cb

TESTS = Path(__file__).parents[1]
COMMAND = Path(sys.executable).with_name("clipbranches")
START_S = 120
SETUP = """
import sys, tempfile
sys.path.insert(0, {tests!r})
from word_encoder import WordEncoder
import clipbranches_widget as cb
catalog = cb.open({catalog!r})
session = cb.Session(catalog, tempfile.mkdtemp() + "/s.jsonl", encoder=WordEncoder())
"""
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "grey")


def search_label_refine(explorer, text, n_yes, n_no):
    """Do the main job as a person would, and return the headline of the answer."""
    field = explorer.get_by_label("Search the catalog by text")
    field.fill(text)
    field.press("Enter")
    explorer.locator(".cbw-headline", has_text=f"to \u201c{text}\u201d").wait_for(timeout=60_000)
    cells = explorer.locator(".cbw-cell")
    n_cells = cells.count()
    for number in range(n_yes):
        cells.nth(number).get_by_role("button", name="Mark yes").click()
    for number in range(n_cells - n_no, n_cells):
        cells.nth(number).get_by_role("button", name="Mark no").click()
    explorer.get_by_role("button", name=f"Refine ({n_yes} yes, {n_no} no)").click()
    headline = explorer.locator(".cbw-headline", has_text="matching image")
    headline.wait_for(timeout=60_000)
    return headline.inner_text()


def test_in_notebook_7(open_in_notebook7, word_catalog, artifacts):
    setup = SETUP.format(tests=str(TESTS), catalog=str(word_catalog))
    nb = open_in_notebook7([setup, "explorer = cb.Explorer(session)\nexplorer"])
    nb.run_all()
    explorer = nb.explorer()
    nb.wait_painted(explorer)
    nb.page.locator(".cbw-still").wait_for(state="hidden")
    headline = search_label_refine(explorer, "striped bird", 4, 4)
    n_found = int(nb.run_cell("print(len(session.result))"))
    assert headline.startswith(f"{n_found:,} matching images")
    counts = nb.run_cell("print(len(session.labels.positive), len(session.labels.negative))")
    assert counts.split() == ["4", "4"]
    nb.wait_painted(explorer)
    nb.shot(artifacts, "notebook-7")
    assert [text for text in nb.console if "cbw" in text or "vue" in text.lower()] == []


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A catalog of 24 drawn shapes, indexed with the bundled model."""
    folder = tmp_path_factory.mktemp("drawn") / "pictures"
    folder.mkdir()
    for colour in COLOURS:
        for shape, box in {"ellipse": 16, "rectangle": 20, "pieslice": 12}.items():
            image = Image.new("RGB", (128, 128), "white")
            angles = (30, 300) if shape == "pieslice" else ()
            bounds = (box, box, 128 - box, 128 - box)
            getattr(ImageDraw.Draw(image), shape)(bounds, *angles, fill=colour)
            image.save(folder / f"{colour}-{shape}.png")
    target = folder.parent / "drawn.cbcat"
    subprocess.run(
        [str(COMMAND), "index", str(folder), str(target), "--demo-encoder", "--quiet"], check=True
    )
    return target


@pytest.fixture
def app(drawn, tmp_path):
    """A running `clipbranches app`: its address, and its session file."""
    session, log = tmp_path / "s.jsonl", tmp_path / "log.txt"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [str(COMMAND), "app", str(drawn), "--session", str(session), "--no-browser"],
            cwd=tmp_path,
            env=os.environ | {"XDG_DATA_HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield wait_address(server, log), session
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_address(server, log):
    """Return the address that Voila prints once it listens."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+/\?token=\w+", log.read_text(errors="replace"))
        if found:
            return found[0]
        time.sleep(0.1)
    raise AssertionError(f"no app within {START_S} s:\n{log.read_text()[-3000:]}")


def test_as_an_app(app, drawn, browser, artifacts):
    address, file = app
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        stranger = context.new_page()
        stranger.goto(address.partition("?")[0])
        assert "/login" in stranger.url
        stranger.close()
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.goto(address, timeout=90_000)
        explorer = page.locator(".cbw")
        explorer.locator(".cbw-cell img").first.wait_for(timeout=60_000)
        page.locator(".cbw-still").wait_for(state="hidden")
        assert page.locator(".jp-InputArea, .jp-CodeCell .cm-editor").count() == 0
        headline = search_label_refine(explorer, "red circle", 3, 5)
        session = cb.Session.open(file, cb.open(drawn))
        assert session.query_text == "red circle"
        assert (len(session.labels.positive), len(session.labels.negative)) == (3, 5)
        assert headline.startswith(f"{len(session.result)} matching image")
        page.screenshot(path=artifacts / "voila.png")
        # The page again, with a kernel of its own: the session goes on.
        page.goto(address, timeout=90_000)
        again = page.locator(".cbw .cbw-headline", has_text="matching image")
        again.wait_for(timeout=60_000)
        assert page.get_by_role("button", name="Refine (3 yes, 5 no)").is_visible()
    finally:
        context.close()
