"""The map of the Explorer in a real JupyterLab; one kernel and one catalog serve all tests here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SETUP = """
import json, sys, tempfile, pathlib
sys.path.insert(0, {tests!r})
from word_encoder import WordEncoder
import numpy as np
import clipbranches_widget as cb
catalog = cb.open({catalog!r})
"""
NEW_SESSION = """
path = pathlib.Path(tempfile.mkdtemp()) / "session.jsonl"
session = cb.Session(catalog, path, encoder=WordEncoder())
explorer = cb.Explorer(session)
explorer
"""


@pytest.fixture(scope="module")
def mapped_path(word_catalog, tmp_path_factory):
    """Path of a copy of the small catalog, which gets a map."""
    return shutil.copytree(word_catalog, tmp_path_factory.mktemp("mapped") / "words.cbcat")


@pytest.fixture(scope="module")
def shared(open_shared_notebook, mapped_path):
    setup = SETUP.format(tests=str(TESTS), catalog=str(mapped_path))
    return open_shared_notebook([setup, NEW_SESSION])


@pytest.fixture
def nb(shared):
    """The shared notebook with every cell run anew: a new session, a new Explorer."""
    shared.theme("JupyterLab Light")
    shared.console.clear()
    shared.page.set_viewport_size({"width": 1280, "height": 1300})
    shared.run_all()
    shared.explorer()
    yield shared
    assert shared.console == []


@pytest.fixture
def explorer(nb, mapped_path):
    """An Explorer with the map open; the map is computed where it is missing."""
    nb.run_cell("if catalog.map is None: cb.build_map(catalog)")
    return open_map(nb)


def open_map(nb):
    explorer = nb.explorer()
    explorer.get_by_role("button", name="Map", exact=True).click()
    explorer.locator(".cbw-map-canvas").wait_for()
    explorer.locator(".cbw-map-wait").wait_for(state="detached")
    return explorer


def spot(nb, explorer, row):
    """Return where on the page the point of a row is, while the whole map is shown."""
    x, y = nb.value(f"catalog.map.positions[catalog.map.places_of([{row}])[0]].tolist()")
    box = explorer.locator(".cbw-map-canvas").bounding_box()
    side = 0.94 * min(box["width"], box["height"])
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    return middle[0] + (x - 0.5) * side, middle[1] - (y - 0.5) * side


def n_pixels(explorer, color):
    """Count the pixels of a colour (r, g, b) on the canvas."""
    return explorer.locator(".cbw-map-canvas").evaluate(
        """async (canvas, [r, g, b]) => {
            for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame);
            const context = canvas.getContext("2d");
            const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
            let n = 0;
            for (let i = 0; i < pixels.length; i += 4)
                n += pixels[i] === r && pixels[i + 1] === g && pixels[i + 2] === b;
            return n;
        }""",
        list(color),
    )


def wait_pixels(nb, explorer, color, is_there):
    for _ in range(50):
        if (n_pixels(explorer, color) > 0) == is_there:
            return
        nb.page.wait_for_timeout(100)
    raise AssertionError(f"colour {color} {'missing' if is_there else 'still there'}")


def drag(nb, explorer, corners, *, shift=False):
    """Drag the pointer through corners given as shares of the canvas."""
    box = explorer.locator(".cbw-map-canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
    if shift:
        nb.page.keyboard.down("Shift")
    nb.page.mouse.move(*places[0])
    nb.page.mouse.down()
    for place in places[1:]:
        nb.page.mouse.move(*place, steps=6)
    nb.page.mouse.up()
    if shift:
        nb.page.keyboard.up("Shift")


LEFT_HALF = [(0.02, 0.02), (0.5, 0.02), (0.5, 0.98), (0.02, 0.98)]
YES, NO, PLAIN = (0, 103, 165), (179, 71, 0), (163, 171, 179)


def test_a_catalog_without_a_map_offers_to_compute_it(nb, artifacts):
    nb.run_cell("from clipbranches_widget import explorer_map; kept = explorer_map.build_map")
    nb.run_cell(
        "import threading; gate = threading.Event()\n"
        "def slow(*args, **options):\n"
        "    options['progress']('map', 40, 100); gate.wait(20); return kept(*args, **options)\n"
        "explorer_map.build_map = slow"
    )
    explorer = nb.explorer()
    explorer.get_by_role("button", name="Map", exact=True).click()
    explorer.get_by_role("button", name="Compute the map (about").click()
    explorer.locator(".cbw-map-progress", has_text="40 %").wait_for()
    nb.shot(artifacts, "map-computing", explorer)
    explorer.get_by_role("button", name="Cancel").click()
    nb.wait_value("explorer._parts['map']._cancel.is_set()", True)
    nb.run_cell("gate.set()")
    explorer.locator(".cbw-remark", has_text="Cancelled").wait_for()
    nb.run_cell("explorer_map.build_map = kept")
    explorer.get_by_role("button", name="Compute the map (about").click()
    explorer.locator(".cbw-map-canvas").wait_for()
    explorer.locator(".cbw-map-count", has_text="900 images").wait_for()
    assert nb.value("len(catalog.map)") == 900
    wait_pixels(nb, explorer, PLAIN, True)


def test_points_of_labelled_images_have_a_shape(nb, explorer):
    assert n_pixels(explorer, YES) == n_pixels(explorer, NO) == 0
    nb.image_cell(explorer, 3).locator(".cbw-chip").click()
    wait_pixels(nb, explorer, YES, True)
    nb.run_cell("session.label(negative=[700])")
    wait_pixels(nb, explorer, NO, True)
    nb.run_cell("session.unlabel([3, 700])")
    wait_pixels(nb, explorer, YES, False)


def test_lasso_labels_as_one_step_and_shows_in_the_grid(nb, explorer, artifacts):
    drag(nb, explorer, LEFT_HALF, shift=True)
    panel = explorer.locator(".cbw-map-lasso")
    panel.wait_for()
    rows = nb.value("explorer._parts['map']._lasso.tolist()")
    left = nb.value("catalog.map.rows[catalog.map.positions[:, 0] < 0.49].tolist()")
    assert set(left) <= set(rows)
    assert panel.locator("b").inner_text() == f"{len(rows)} images"

    panel.get_by_role("button", name="Show in the grid").click()
    explorer.locator(".cbw-headline", has_text=f"{len(rows)} images picked on the map").wait_for()
    assert nb.rows_shown(explorer) == rows[:60]
    nb.wait_painted(explorer)
    nb.shot(artifacts, "map-lasso", explorer)
    panel.get_by_role("button", name="Show the grid as before").click()
    explorer.locator(".cbw-headline", has_text="900 images in the catalog").wait_for()

    panel.get_by_role("button", name="Yes").click()
    explorer.get_by_role("button", name=f"Refine ({len(rows)} yes, 0 no)").wait_for()
    panel.get_by_text(f"{len(rows)} yes \u00b7 0 no").wait_for()
    explorer.get_by_role("button", name="Undo").click()
    panel.get_by_text("0 yes \u00b7 0 no").wait_for()
    assert nb.value("len(session.labels)") == 0
    panel.get_by_role("button", name="Clear").click()
    panel.wait_for(state="detached")


def test_many_images_are_labelled_only_after_a_question(nb, explorer):
    explorer.get_by_role("button", name="All in view").click()
    panel = explorer.locator(".cbw-map-lasso", has_text="900 images")
    panel.get_by_role("button", name="No", exact=True).click()
    panel.get_by_text("Mark 900 images no?").wait_for()
    assert nb.value("len(session.labels)") == 0
    panel.get_by_role("button", name="Keep as they are").click()
    panel.get_by_role("button", name="No", exact=True).click()
    panel.get_by_role("button", name="Mark them").click()
    nb.wait_value("len(session.labels.negative)", 900)


def test_hover_shows_the_image_and_a_click_zooms_it(nb, explorer, artifacts):
    row = 321
    x, y = spot(nb, explorer, row)
    nb.page.mouse.move(x + 1, y + 1)
    card = explorer.locator(".cbw-map-card", has_text=f"#{row}")
    card.wait_for()
    caption = nb.value(f"catalog.caption({row})")
    card.locator(".cbw-map-caption", has_text=caption).wait_for()
    card.locator("img").wait_for()
    nb.shot(artifacts, "map-hover", explorer)  # scrolls
    x, y = spot(nb, explorer, row)
    nb.page.mouse.move(x + 1, y + 1)
    card.wait_for()
    nb.page.mouse.click(x + 1, y + 1)
    nb.wait_value("explorer.zoom.get('row')", row)
    explorer.get_by_role("dialog").wait_for()
    nb.page.keyboard.press("Escape")
    nb.wait_value("explorer.zoom.get('row')", None)


def test_keyboard_moves_zooms_and_picks(nb, explorer):
    canvas = explorer.locator(".cbw-map-canvas")
    assert "900 images" in canvas.get_attribute("aria-label")
    whole = n_pixels(explorer, PLAIN)
    canvas.focus()
    for key in ("+", "+", "+", "+"):
        nb.page.keyboard.press(key)
    assert n_pixels(explorer, PLAIN) != pytest.approx(whole, rel=0.05)
    nb.page.keyboard.press("ArrowLeft")
    nb.page.keyboard.press("l")
    panel = explorer.locator(".cbw-map-lasso b")
    panel.wait_for()
    n_view = nb.value("len(explorer._parts['map']._lasso)")
    assert 0 < n_view < 900
    assert panel.inner_text() == f"{n_view} image" + ("s" if n_view > 1 else "")
    nb.page.keyboard.press("Escape")
    panel.wait_for(state="detached")
    nb.page.keyboard.press("0")
    assert n_pixels(explorer, PLAIN) == pytest.approx(whole, rel=0.01)  # rings cover some
    assert nb.page.locator(".jp-Notebook .jp-Cell").count() == 2


def test_wheel_zooms_and_drag_moves(nb, explorer):
    whole = n_pixels(explorer, PLAIN)
    box = explorer.locator(".cbw-map-canvas").bounding_box()
    nb.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    nb.page.mouse.wheel(0, -600)
    nb.page.wait_for_timeout(100)
    zoomed = n_pixels(explorer, PLAIN)
    assert zoomed != pytest.approx(whole, rel=0.05)
    drag(nb, explorer, [(0.5, 0.5), (0.98, 0.5)])
    assert n_pixels(explorer, PLAIN) != pytest.approx(zoomed, rel=0.05)
    explorer.get_by_role("button", name="Show the whole map").click()
    assert n_pixels(explorer, PLAIN) == pytest.approx(whole, rel=0.01)
    assert explorer.locator(".cbw-map-lasso").count() == 0


@pytest.mark.parametrize(
    ("theme", "width"), [("Light", 1280), ("Dark", 1280), ("Light", 420), ("Dark", 1700)]
)
def test_looks(nb, explorer, artifacts, theme, width):
    nb.page.set_viewport_size({"width": max(width, 700), "height": 1300})
    nb.theme(f"JupyterLab {theme}")
    explorer.evaluate(
        "(root, width) => (root.style.width = width < 700 ? `${width}px` : '')", width
    )
    nb.run_cell(
        "session.search('striped bird')\n"
        "session.label(positive=session.hits.rows[:4], negative=session.hits.rows[40:44])\n"
        "session.refine()"
    )
    explorer.locator(".cbw-headline", has_text="matching").wait_for()
    nb.wait_painted(explorer)
    color = "branch" if width == 1700 else "score"
    explorer.get_by_role("combobox", name="Colour by").select_option(color)
    nb.image_cell(explorer, 2).focus()
    wait_pixels(nb, explorer, YES if theme == "Light" else (79, 168, 224), True)
    assert explorer.evaluate("root => root.scrollWidth - root.clientWidth") <= 0
    if color == "branch":
        legend = explorer.locator(".cbw-map-class").first
        legend.wait_for()
        legend.click()
        assert legend.get_attribute("aria-pressed") == "true"
    nb.shot(artifacts, f"map-{theme}-{width}", explorer)
