"""The zoom in a real JupyterLab: one image over the page, its keys, focus and facts."""

from __future__ import annotations

import pytest

NEW_SESSION = """
path = pathlib.Path(tempfile.mkdtemp()) / "session.jsonl"
session = Session(catalog, path, encoder=WordEncoder())
explorer = Explorer(session)
"""


@pytest.fixture(scope="module")
def shared(open_shared_notebook, word_setup):
    return open_shared_notebook([word_setup, NEW_SESSION, "explorer"])


@pytest.fixture
def nb(shared):
    """The shared notebook with every cell run anew: a new session, a new Explorer."""
    shared.theme("JupyterLab Light")
    shared.console.clear()
    shared.page.set_viewport_size({"width": 1280, "height": 1000})
    shared.page.evaluate("localStorage.removeItem('clipbranches-image-size')")
    shared.run_all()
    shared.wait_painted(shared.explorer())
    yield shared
    assert shared.console == []


def wait_zoomed(nb, explorer, row):
    """Wait until a row is zoomed and its picture drawn; return the dialog."""
    dialog = explorer.get_by_role("dialog")
    dialog.wait_for()
    nb.page.wait_for_function(
        """([dialog, row]) => {
            const value = dialog.querySelector('.cbw-facts .cbw-fact')?.textContent;
            const picture = dialog.querySelector('.cbw-zoom-picture');
            const is_loaded = dialog.querySelector('.cbw-zoom-stage').ariaBusy === 'false';
            return value === String(row) && is_loaded && (!picture || picture.complete);
        }""",
        arg=[dialog.element_handle(), row],
    )
    return dialog


def open_zoom(nb, explorer, number):
    nb.image_cell(explorer, number).focus()
    nb.press("Space")
    return wait_zoomed(nb, explorer, nb.rows_shown(explorer)[number])


def facts_of(dialog):
    """Return the table of facts as ``{name: value}``."""
    rows = dialog.locator(".cbw-facts tr")
    return dict(
        zip(rows.locator("th").all_inner_texts(), rows.locator("td").all_inner_texts(), strict=True)
    )


LABELS = "session.labels.to_dict()"


def test_space_zooms_and_escape_returns_to_the_image(nb):
    explorer = nb.explorer()
    dialog = open_zoom(nb, explorer, 7)
    assert dialog.get_attribute("aria-modal") == "true"
    size = dialog.locator("img").evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert size == [200, 150]
    assert dialog.locator(".cbw-zoom-at").inner_text() == "8 of 900"
    facts = facts_of(dialog)
    assert facts["row"] == "7"
    assert facts["uri"].endswith("7.png")
    nb.press("Escape")
    dialog.wait_for(state="detached")
    nb.wait_focus(7)
    open_zoom(nb, explorer, 8)
    nb.press("Space")
    dialog.wait_for(state="detached")
    nb.wait_focus(8)


def test_the_page_behind_follows_through_the_ranking(nb):
    explorer = nb.explorer()
    dialog = open_zoom(nb, explorer, 58)
    nb.press("ArrowRight", "ArrowRight", "ArrowRight")
    wait_zoomed(nb, explorer, 61)
    explorer.locator(".cbw-range", has_text="61\u2013120 of 900").wait_for()
    nb.press("ArrowLeft")
    wait_zoomed(nb, explorer, 60)
    nb.press("Escape")
    dialog.wait_for(state="detached")
    nb.wait_focus(60)


def test_labels_in_the_zoom(nb):
    explorer = nb.explorer()
    dialog = open_zoom(nb, explorer, 3)
    nb.press("y")
    wait_zoomed(nb, explorer, 4)
    nb.press("n")
    wait_zoomed(nb, explorer, 5)
    dialog.get_by_role("button", name="Yes").click()
    assert dialog.get_by_role("button", name="Yes").get_attribute("aria-pressed") == "true"
    nb.wait_value(LABELS, {"positive": [3, 5], "negative": [4]})
    dialog.get_by_role("button", name="None").click()
    nb.wait_value(LABELS, {"positive": [3], "negative": [4]})
    nb.press("z")
    nb.wait_value(LABELS, {"positive": [3, 5], "negative": [4]})
    dialog.get_by_role("button", name="Close the zoom").click()
    dialog.wait_for(state="detached")
    assert nb.image_cell(explorer, 3).locator(".cbw-chip").inner_text().strip() == "yes"


def test_the_mouse_zooms_but_not_on_tags(nb):
    explorer = nb.explorer()
    nb.image_cell(explorer, 2).locator(".cbw-chip").dblclick()
    nb.wait_value(LABELS, {"positive": [], "negative": [2]})
    assert explorer.get_by_role("dialog").count() == 0
    nb.image_cell(explorer, 2).locator(".cbw-picture").dblclick()
    dialog = wait_zoomed(nb, explorer, 2)
    explorer.locator(".cbw-overlay").click(position={"x": 3, "y": 3})
    dialog.wait_for(state="detached")
    nb.image_cell(explorer, 6).hover()
    nb.image_cell(explorer, 6).get_by_role("button", name="Zoom").click()
    wait_zoomed(nb, explorer, 6)


def test_a_lost_image_is_told(nb, artifacts):
    explorer = nb.explorer()
    dialog = open_zoom(nb, explorer, 9)
    problem = dialog.locator(".cbw-zoom-problem")
    assert "the image of row 9" in problem.inner_text()
    assert dialog.locator("img").count() == 0
    nb.shot(artifacts, "zoom-lost", explorer)


def test_the_focus_stays_and_no_key_reaches_the_notebook(nb):
    explorer = nb.explorer()
    before = nb.state()
    dialog = open_zoom(nb, explorer, 0)
    inside = "dialog => dialog.contains(document.activeElement)"
    assert dialog.evaluate(inside)
    for key in ["Tab"] * 10 + ["Shift+Tab"] * 12:
        nb.press(key)
        assert dialog.evaluate(inside)
    dialog.get_by_role("button", name="Previous image").click(force=True)  # there is none
    assert dialog.evaluate(inside)
    nb.press("d", "d", "a", "b", "x", "m", "Shift+Enter", "/", "PageDown", "Home")
    assert dialog.evaluate(inside)
    assert nb.state() == before
    wait_zoomed(nb, explorer, 0)


def test_a_hostile_caption_is_text(nb):
    explorer = nb.explorer()
    dialog = open_zoom(nb, explorer, 0)
    title = dialog.locator(".cbw-zoom-title")
    assert title.inner_text() == '<img src=x onerror="window.cbw_hacked = true">'
    nb.press("ArrowRight", "ArrowRight")
    wait_zoomed(nb, explorer, 2)
    assert len(facts_of(dialog)["caption"]) == 5000
    assert dialog.evaluate("dialog => dialog.scrollWidth <= dialog.clientWidth")
    nb.press("ArrowRight")
    wait_zoomed(nb, explorer, 3)
    assert title.inner_text().startswith("{{ constructor")
    assert not nb.page.evaluate("Boolean(window.cbw_hacked)")


def test_more_like_this(nb):
    explorer = nb.explorer()
    open_zoom(nb, explorer, 17)
    explorer.get_by_role("button", name="More like this").click()
    explorer.locator(".cbw-headline", has_text="600 nearest images").wait_for()
    assert explorer.get_by_role("dialog").count() == 0
    assert nb.rows_shown(explorer)[0] == 17


def test_a_view_that_comes_later_asks_for_the_picture(nb):
    explorer = nb.explorer()
    open_zoom(nb, explorer, 5)
    nb.page.evaluate("window.jupyterapp.shell.currentWidget.content.activeCellIndex = 2")
    handle = explorer.element_handle()
    nb.command("notebook:run-cell")
    nb.page.wait_for_function("old => !old.isConnected", arg=handle)
    explorer = nb.explorer()
    dialog = wait_zoomed(nb, explorer, 5)
    assert dialog.locator("img").evaluate("image => image.naturalWidth") == 200


@pytest.mark.parametrize("theme", ["Light", "Dark"])
@pytest.mark.parametrize("width", [420, 1700])
def test_looks(nb, artifacts, theme, width):
    explorer = nb.explorer()
    nb.theme(f"JupyterLab {theme}")
    nb.page.set_viewport_size({"width": width, "height": 1000})
    if width < 600:
        nb.page.evaluate("window.jupyterapp.shell.collapseLeft()")
    nb.run_cell(
        "session.search('blue fish', k=100)\n"
        "session.label(positive=session.hits.rows[:4], negative=session.hits.rows[8:11])\n"
        "session.refine()"
    )
    explorer.locator(".cbw-headline", has_text="of the catalog scored").wait_for()
    nb.wait_painted(explorer)
    nb.image_cell(explorer, 0).focus()
    nb.press("Space")
    row = nb.rows_shown(explorer)[0]
    nb.page.wait_for_function(
        "root => root.querySelector('.cbw-zoom-stage')?.ariaBusy === 'false'",
        arg=explorer.element_handle(),
    )
    dialog = explorer.get_by_role("dialog")
    assert facts_of(dialog)["row"] == str(row)
    assert "R1" in dialog.locator(".cbw-zoom-rule").inner_text()
    nb.shot(artifacts, f"zoom-{theme}-{width}", explorer)
    nb.shot(artifacts, f"zoom-lab-{theme}-{width}")
    assert dialog.evaluate("sheet => sheet.scrollWidth - sheet.clientWidth") <= 0
