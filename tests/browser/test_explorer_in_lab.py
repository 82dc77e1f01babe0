"""The Explorer in a real JupyterLab, used as a person would; one kernel serves all tests here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SETUP = """
import sys
sys.path.insert(0, {tests!r})
from word_encoder import WordEncoder
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.explorer import Explorer
from clipbranches_widget.session import Session
catalog = Catalog.open({catalog!r})
"""
NEW_SESSION = """
import tempfile, pathlib
path = pathlib.Path(tempfile.mkdtemp()) / "session.jsonl"
session = Session(catalog, path, encoder=WordEncoder())
"""


def setup_cell(catalog):
    return SETUP.format(tests=str(TESTS), catalog=str(catalog))


@pytest.fixture(scope="module")
def shared(open_shared_notebook, word_catalog):
    cells = [setup_cell(word_catalog), NEW_SESSION, "explorer = Explorer(session)\nexplorer"]
    return open_shared_notebook(cells)


@pytest.fixture
def nb(shared):
    """The shared notebook with every cell run anew: a new session, a new Explorer."""
    shared.theme("JupyterLab Light")
    shared.console.clear()
    shared.page.set_viewport_size({"width": 1280, "height": 1000})
    shared.run_all()
    shared.explorer()
    yield shared
    assert shared.console == []


def search(explorer, text):
    field = explorer.get_by_role("combobox", name="Search the catalog by text")
    field.fill(text)
    field.press("Enter")
    explorer.locator(".cbw-headline", has_text=f"to \u201c{text}\u201d").wait_for()


def test_a_fresh_explorer_shows_the_catalog_painted(nb, artifacts):
    explorer = nb.explorer()
    nb.wait_painted(explorer)
    assert nb.rows_shown(explorer) == list(range(60))
    assert explorer.locator(".cbw-headline").inner_text() == "900 images in the catalog"
    assert explorer.get_by_role("button", name="Refine").is_disabled()
    assert explorer.locator(".cbw-missing").count() == 6
    nb.shot(artifacts, "explorer-start")


def test_search_label_refine_and_the_next_cell_agrees(nb, artifacts):
    explorer = nb.explorer()
    search(explorer, "striped bird")
    nb.wait_painted(explorer)
    for number in range(5):
        nb.image_cell(explorer, number).locator(".cbw-chip").click()
    for number in range(50, 55):
        nb.image_cell(explorer, number).get_by_role("button", name="Mark no").click()
    refine = explorer.get_by_role("button", name="Refine (5 yes, 5 no)")
    refine.click()
    headline = explorer.locator(".cbw-headline", has_text="matching image")
    headline.wait_for()
    n_found = nb.value("len(session.result)")
    assert re.fullmatch(
        rf"{n_found:,} matching images in [\d.]+ m?s \u00b7 [<\d. ]+ % of the catalog scored",
        headline.inner_text(),
    )
    assert nb.rows_shown(explorer) == nb.value("session.result.rows[:60].tolist()")
    assert explorer.get_by_role("button", name="All matches").get_attribute("aria-pressed")
    nb.wait_painted(explorer)
    explorer.get_by_role("button", name="Rules").click()
    rules = explorer.locator(".cbw-rules li")
    rules.first.wait_for()
    assert rules.count() == nb.value("len(session.result.branches)")
    assert rules.first.locator(".cbw-rule-text").inner_text() == nb.value(
        "session.result.branches[0].text"
    )
    nb.shot(artifacts, "explorer-refined", explorer)


def test_a_click_on_the_tag_goes_round_and_the_session_follows(nb):
    explorer = nb.explorer()
    chip = nb.image_cell(explorer, 7).locator(".cbw-chip")
    said = []
    for _ in range(4):
        said.append(chip.inner_text().strip())
        chip.click()
    assert said == ["label", "yes", "no", "label"]
    nb.wait_value("session.labels.to_dict()", {"positive": [7], "negative": []})
    nb.image_cell(explorer, 7).get_by_role("button", name="Mark no").click()
    nb.image_cell(explorer, 8).get_by_role("button", name="Mark yes").click()
    nb.wait_value("session.labels.to_dict()", {"positive": [8], "negative": [7]})
    explorer.get_by_role("button", name="Yes 1").click()
    explorer.locator(".cbw-headline", has_text="1 image marked yes").wait_for()
    assert nb.rows_shown(explorer) == [8]


def test_pages(nb):
    explorer = nb.explorer()
    where = explorer.locator(".cbw-range")
    explorer.get_by_role("button", name="Next page").click()
    where.filter(has_text="61\u2013120 of 900").wait_for()
    assert nb.rows_shown(explorer) == list(range(60, 120))
    nb.wait_painted(explorer)
    explorer.get_by_role("button", name="Last page").click()
    where.filter(has_text="841\u2013900 of 900").wait_for()
    assert explorer.get_by_role("button", name="Next page").is_disabled()
    number = explorer.get_by_role("spinbutton", name="Page number")
    number.fill("3")
    number.press("Enter")
    where.filter(has_text="121\u2013180 of 900").wait_for()
    explorer.get_by_role("button", name="Previous page").click()
    where.filter(has_text="61\u2013120 of 900").wait_for()


def test_undo_and_redo(nb):
    explorer = nb.explorer()
    undo, redo = (explorer.get_by_role("button", name=name) for name in ("Undo", "Redo"))
    assert undo.is_disabled()
    nb.image_cell(explorer, 3).locator(".cbw-chip").click()
    nb.image_cell(explorer, 4).locator(".cbw-chip").click()
    explorer.get_by_role("button", name="Refine (2 yes, 0 no)").wait_for()
    undo.click()
    explorer.get_by_role("button", name="Refine (1 yes, 0 no)").wait_for()
    assert nb.image_cell(explorer, 4).locator(".cbw-chip").inner_text().strip() == "label"
    explorer.locator(".cbw-remark", has_text="Undid: label").wait_for()
    redo.click()
    explorer.get_by_role("button", name="Refine (2 yes, 0 no)").wait_for()
    assert redo.is_disabled()


def test_what_a_cell_does_shows_in_the_widget(nb):
    explorer = nb.explorer()
    nb.run_cell("session.label(positive=[2, 3], negative=[5])")
    explorer.get_by_role("button", name="Refine (2 yes, 1 no)").wait_for()
    assert nb.image_cell(explorer, 2).locator(".cbw-chip").inner_text().strip() == "yes"
    assert nb.image_cell(explorer, 5).locator(".cbw-chip").inner_text().strip() == "no"
    nb.run_cell("hits = session.search('old boat')")
    explorer.locator(
        ".cbw-headline", has_text="60 nearest images to \u201cold boat\u201d"
    ).wait_for()
    assert explorer.get_by_label("Search the catalog by text").input_value() == "old boat"
    assert nb.rows_shown(explorer) == nb.value("hits.rows.tolist()")


def test_the_keyboard_labels_and_jupyterlab_keeps_out(nb):
    explorer = nb.explorer()
    keyboard = nb.page.keyboard
    n_cells = nb.page.locator(".jp-Notebook .jp-Cell").count()
    nb.image_cell(explorer, 0).focus()
    for key in ("ArrowRight", "y", "ArrowDown", "n", "d", "d", "a", "y", "ArrowLeft", "u"):
        keyboard.press(key)
    nb.wait_value("session.labels.positive.tolist()", [1])
    nb.wait_value("len(session.labels.negative)", 1)
    below = nb.value("session.labels.negative.tolist()")
    assert below[0] > 2
    keyboard.press("/")
    assert explorer.get_by_label("Search the catalog by text").evaluate(
        "field => field === document.activeElement"
    )
    keyboard.type("dd")
    assert explorer.get_by_label("Search the catalog by text").input_value() == "dd"
    assert nb.page.locator(".jp-Notebook .jp-Cell").count() == n_cells


def test_hostile_captions_are_text(nb):
    explorer = nb.explorer()
    caption = explorer.locator(".cbw-caption")
    assert caption.nth(0).inner_text() == '<img src=x onerror="window.cbw_hacked = true">'
    assert "right to left" in caption.nth(1).inner_text()
    assert len(caption.nth(2).inner_text()) == 200
    assert caption.nth(3).inner_text().startswith("{{ constructor")
    assert caption.nth(4).inner_text() == "4"
    nb.image_cell(explorer, 0).hover()
    assert not nb.page.evaluate("Boolean(window.cbw_hacked)")
    box, long = (nb.image_cell(explorer, number).bounding_box() for number in (6, 2))
    assert (box["width"], box["height"]) == (long["width"], long["height"])


def test_an_error_is_shown_and_dismissed(nb):
    explorer = nb.explorer()
    nb.run_cell("explorer.vue_label({'rows': [10**6], 'value': 1})")
    alert = explorer.get_by_role("alert")
    alert.wait_for()
    assert "expected row ids from 0 to 899" in alert.inner_text()
    explorer.get_by_role("button", name="Dismiss the message").click()
    alert.wait_for(state="detached")


def test_a_click_during_a_running_cell_shows_at_once_and_is_kept(nb):
    # With a subshell the kernel confirms while the cell runs; without one, when it is done.
    explorer = nb.explorer()
    nb.page.evaluate(
        """source => {
            const panel = window.jupyterapp.shell.currentWidget;
            window.busyCell = panel.sessionContext.session.kernel.requestExecute({code: source});
            window.isBusy = true;
            window.busyCell.done.then(() => { window.isBusy = false; });
        }""",
        "import time; time.sleep(5)",
    )
    cell = nb.image_cell(explorer, 3)
    cell.locator(".cbw-chip").click()
    cell.locator(".cbw-badge").wait_for()
    assert cell.locator(".cbw-chip").inner_text().strip() == "yes"
    assert nb.page.evaluate("window.isBusy")
    explorer.get_by_role("button", name="Refine (1 yes, 0 no)").wait_for()
    assert json.loads(nb.run_cell("print(len(session.labels.positive))")) == 1


@pytest.mark.parametrize("theme", ["Light", "Dark"])
@pytest.mark.parametrize("width", [760, 1700])
def test_looks(nb, artifacts, theme, width):
    explorer = nb.explorer()
    nb.theme(f"JupyterLab {theme}")
    nb.page.set_viewport_size({"width": width, "height": 1000})
    search(explorer, "blue fish")
    nb.run_cell(
        "session.label(positive=session.hits.rows[:4], negative=session.hits.rows[8:11])\n"
        "session.refine()"
    )
    explorer.locator(".cbw-headline", has_text="matching").wait_for()
    nb.wait_painted(explorer)
    nb.image_cell(explorer, 1).focus()
    overflow = explorer.evaluate("root => root.scrollWidth - root.clientWidth")
    assert overflow <= 0
    nb.shot(artifacts, f"explorer-{theme}-{width}", explorer)
    nb.shot(artifacts, f"lab-{theme}-{width}")


def test_two_views_reload_and_restart(open_notebook, word_catalog, tmp_path):
    cells = [
        setup_cell(word_catalog),
        f"session = Session(catalog, {str(tmp_path / 's.jsonl')!r}, encoder=WordEncoder())",
        "one = Explorer(session)\none",
        "two = Explorer(session)\ntwo",
    ]
    nb = open_notebook(cells, height=2600)
    nb.run_all()
    one, two = nb.explorer(0), nb.explorer(1)
    search(one, "green tree")
    nb.image_cell(one, 0).locator(".cbw-chip").click()
    nb.image_cell(one, 1).get_by_role("button", name="Mark no").click()
    for explorer in (one, two):
        explorer.get_by_role("button", name="Refine (1 yes, 1 no)").wait_for()
        nb.wait_painted(explorer)
    assert nb.rows_shown(one) == nb.rows_shown(two)
    rows = nb.rows_shown(one)

    nb.command("docmanager:save")
    nb.open(reset=False)
    for explorer in (nb.explorer(0), nb.explorer(1)):
        explorer.get_by_role("button", name="Refine (1 yes, 1 no)").wait_for()
        nb.wait_painted(explorer)
        assert nb.rows_shown(explorer) == rows

    nb.restart_and_run_all()
    one = nb.explorer(0)
    one.get_by_role("button", name="Refine (1 yes, 1 no)").wait_for()
    nb.wait_painted(one)
    assert nb.rows_shown(one) == rows
    assert one.get_by_label("Search the catalog by text").input_value() == "green tree"
    assert nb.console == []
