"""The query bar in a real JupyterLab: phrases, images, former searches, filters."""

from __future__ import annotations

import datetime as dt
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.ingest import from_embeddings

TESTS = Path(__file__).parents[1]
SETUP = """
import sys, tempfile, pathlib
sys.path.insert(0, {tests!r})
import numpy as np
from word_encoder import WordEncoder
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.explorer import Explorer
from clipbranches_widget.session import Session

class ColourEncoder(WordEncoder):
    def encode_images(self, images):
        red, _, blue = np.asarray(images[0], float).reshape(-1, 3).mean(axis=0)
        return self.encode_text(["red bird" if red > blue else "blue fish"])

catalog = Catalog.open({catalog!r})
"""
NEW_SESSION = """
path = pathlib.Path(tempfile.mkdtemp()) / "session.jsonl"
session = Session(catalog, path, encoder=ColourEncoder())
"""
HOSTILE_COLUMN = '<b onmouseover="window.cbw_hacked = true">x</b>'


@pytest.fixture(scope="module")
def catalog_path(tmp_path_factory, word_catalog):
    words = Catalog.open(word_catalog)
    n_rows = len(words)
    groups = ["animals", "food", "<i>sights</i>", "vehicles"]
    items = pa.table(
        {
            "uri": words.items.column("uri"),
            "caption": words.items.column("caption"),
            "group": [groups[row % 4] for row in range(n_rows)],
            "stars": pa.array([row % 7 if row % 9 else None for row in range(n_rows)], pa.int8()),
            "price": [row / 8 for row in range(n_rows)],
            "taken": [dt.date(2020, 1, 1) + dt.timedelta(days=row) for row in range(n_rows)],
            "sold": [row % 3 == 0 for row in range(n_rows)],
            HOSTILE_COLUMN: ["a" if row % 2 else "b" for row in range(n_rows)],
        }
    )
    path = tmp_path_factory.mktemp("filtered") / "f.cbcat"
    return from_embeddings(words.embeddings, path, items=items).path


@pytest.fixture(scope="module")
def shared(open_shared_notebook, catalog_path):
    setup = SETUP.format(tests=str(TESTS), catalog=str(catalog_path))
    return open_shared_notebook([setup, NEW_SESSION, "explorer = Explorer(session)\nexplorer"])


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
    assert not shared.page.evaluate("Boolean(window.cbw_hacked)")


def field_of(explorer):
    return explorer.get_by_role("combobox", name="Search the catalog by text")


def search(explorer, text):
    field_of(explorer).fill(text)
    field_of(explorer).press("Enter")
    explorer.locator(".cbw-headline", has_text=f"to \u201c{text}\u201d").wait_for()


def picture(colour):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "PNG")
    return file.getvalue()


def send_file(explorer, event, name, data, kind="image/png"):
    """Fire a drop or paste event with a file at the Explorer, as a browser does."""
    explorer.evaluate(
        """(root, [event, name, data, kind]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(data)], name, {type: kind}));
            const about = event === "paste" ? {clipboardData: transfer} : {dataTransfer: transfer};
            const Kind = event === "paste" ? ClipboardEvent : DragEvent;
            const target = root.querySelector(".cbw-cell");
            target.dispatchEvent(new Kind(event, {bubbles: true, cancelable: true, ...about}));
        }""",
        [event, name, list(data), kind],
    )


def open_filters(explorer, name="Filter"):
    explorer.get_by_role("button", name=name, exact=True).click()
    panel = explorer.get_by_role("region", name="Filters by column")
    panel.locator("fieldset").first.wait_for()
    return panel


def passes(explorer, n_rows):
    explorer.locator(".cbw-passing", has_text=f"{n_rows:,} of 900 images pass").wait_for()


def test_phrases_are_shown_as_they_were_understood(nb, artifacts):
    explorer = nb.explorer()
    search(explorer, "red bird + boat^2 -old <b>shoe</b>")
    phrases = explorer.get_by_role("list", name="Phrases of the search").locator("li")
    assert [text.split("\n") for text in phrases.all_inner_texts()] == [
        ["+", "with", "red bird"],
        ["+", "with", "boat", "\u00d72"],
        ["\u2212", "without", "old <b>shoe</b>", "\u00d70.5"],
    ]
    assert nb.rows_shown(explorer) == nb.value("session.hits.rows[:60].tolist()")
    nb.shot(artifacts, "query-phrases", explorer)
    field_of(explorer).fill("-bird")
    field_of(explorer).press("Enter")
    explorer.get_by_role("alert").filter(has_text="got only what to leave out").wait_for()
    explorer.get_by_role("button", name="Dismiss the message").click()


def test_former_searches_by_keyboard_and_mouse(nb, artifacts):
    explorer = nb.explorer()
    field = field_of(explorer)
    assert explorer.get_by_role("button", name="Former searches").is_disabled()
    for text in ("red bird", "old boat", "<b>tree</b>", "old boat"):
        search(explorer, text)
    assert field.get_attribute("aria-expanded") == "false"
    field.press("ArrowDown")
    assert field.get_attribute("aria-expanded") == "true"
    options = explorer.get_by_role("listbox", name="Former searches").get_by_role("option")
    assert options.all_inner_texts() == ["old boat", "<b>tree</b>", "red bird"]
    nb.shot(artifacts, "query-history", explorer)
    field.press("Escape")
    assert field.get_attribute("aria-expanded") == "false"
    assert field.evaluate("field => field === document.activeElement")
    field.press("ArrowUp")
    active = field.get_attribute("aria-activedescendant")
    assert options.nth(2).get_attribute("id") == active
    assert options.nth(2).get_attribute("aria-selected") == "true"
    field.press("Enter")
    explorer.locator(".cbw-headline", has_text="to \u201cred bird\u201d").wait_for()
    assert field.input_value() == "red bird"
    explorer.get_by_role("button", name="Former searches").click()
    options.filter(has_text="tree").click()
    explorer.locator(".cbw-headline", has_text="to \u201c<b>tree</b>\u201d").wait_for()
    assert [
        event["action"] for event in nb.value("[{'action': e.action} for e in session.history]")
    ] == ["search"] * 6


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_dropped_or_pasted_image_is_searched_by(nb, artifacts, event):
    explorer = nb.explorer()
    if event == "drop":
        send_file(explorer, "dragover", "", b"")
        cover = explorer.locator(".cbw-drop")
        cover.wait_for()
        assert cover.bounding_box()["width"] > explorer.bounding_box()["width"] - 4
        nb.shot(artifacts, "query-drag", explorer)
    send_file(explorer, event, "<b>my blue.png", picture((0, 0, 255)))
    explorer.locator(".cbw-drop").wait_for(state="detached")
    chip = explorer.locator(".cbw-query-chip")
    chip.wait_for()
    assert chip.inner_text() == "image <b>my blue.png"
    chip.locator("img").wait_for()
    assert nb.rows_shown(explorer) == nb.value("session.hits.rows[:60].tolist()")
    assert "blue fish" in nb.image_cell(explorer, 0).locator(".cbw-caption").inner_text()
    nb.wait_painted(explorer)
    nb.shot(artifacts, f"query-image-{event}", explorer)
    search(explorer, "old boat")
    field_of(explorer).press("ArrowUp")
    field_of(explorer).press("Enter")
    chip.wait_for()
    assert nb.value("session.query.kind") == "image"


def test_an_image_from_the_file_chooser_comes_in_pieces(nb):
    explorer = nb.explorer()
    noise = np.random.default_rng(1).integers(0, 256, (900, 800, 3), np.uint8)
    noise[..., 0] |= 128
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "BMP")
    assert len(file.getvalue()) > 2 * 2**20
    with nb.page.expect_file_chooser() as chooser:
        explorer.get_by_role("button", name="Search by an image").click()
    chooser.value.set_files(
        {"name": "noise.bmp", "mimeType": "image/bmp", "buffer": file.getvalue()}
    )
    explorer.locator(".cbw-query-chip", has_text="image noise.bmp").wait_for()
    assert "red bird" in nb.image_cell(explorer, 0).locator(".cbw-caption").inner_text()


def test_what_is_no_image_is_told(nb):
    explorer = nb.explorer()
    alert = explorer.get_by_role("alert")
    send_file(explorer, "drop", "broken.png", b"no picture at all")
    alert.filter(has_text="broken.png cannot be searched by").wait_for()
    explorer.get_by_role("button", name="Dismiss the message").click()
    send_file(explorer, "paste", "notes.txt", b"text", "text/plain")
    alert.filter(has_text="Expected an image to search by, got notes.txt").wait_for()
    explorer.get_by_role("button", name="Dismiss the message").click()
    assert nb.value("len(session.history)") == 0


def test_images_like_those_marked_yes(nb):
    explorer = nb.explorer()
    like = explorer.get_by_role("button", name="Search for images like those marked yes")
    assert like.is_disabled()
    for number in (6, 8):
        nb.image_cell(explorer, number).get_by_role("button", name="Mark yes").click()
    explorer.get_by_role("button", name="Refine (2 yes, 0 no)").wait_for()
    like.click()
    chip = explorer.locator(".cbw-query-chip", has_text="more like rows 6, 8")
    chip.wait_for()
    assert {6, 8} < set(nb.rows_shown(explorer))
    field_of(explorer).fill("x")
    chip.wait_for(state="detached")


def test_filters_of_every_kind(nb, artifacts):
    explorer = nb.explorer()
    panel = open_filters(explorer)
    names = panel.locator("legend").all_inner_texts()
    assert names == ["uri", "caption", "group", "stars", "price", "taken", "sold", HOSTILE_COLUMN]
    panel.get_by_role("checkbox", name="<i>sights</i> 225").check()
    passes(explorer, 225)
    panel.get_by_role("checkbox", name="food 225").check()
    passes(explorer, 450)
    assert nb.rows_shown(explorer)[:4] == [1, 2, 5, 6]
    panel.get_by_role("spinbutton", name="stars from").fill("2")
    panel.get_by_role("spinbutton", name="stars from").press("Enter")
    panel.get_by_role("textbox", name="caption contains").fill("BIRD")
    panel.get_by_role("textbox", name="caption contains").press("Enter")
    panel.get_by_role("combobox", name="sold").select_option("no")
    panel.get_by_label("taken to").fill("2021-12-31")
    panel.get_by_label("taken to").press("Tab")
    expected = [
        row
        for row in range(5, 731)
        if row % 10 == 0 and row % 4 in {1, 2} and row % 9 and row % 7 >= 2 and row % 3
    ]
    chips = explorer.get_by_role("list", name="Filters").locator("li")
    chips.nth(4).wait_for()
    passes(explorer, len(expected))
    assert nb.rows_shown(explorer) == expected
    assert nb.value("session.filters") == {
        "caption": "BIRD",
        "group": ["<i>sights</i>", "food"],
        "sold": False,
        "stars": [2, None],
        "taken": [None, "2021-12-31"],
    }
    search(explorer, "red bird")
    assert nb.rows_shown(explorer) == nb.value("session.hits.rows[:60].tolist()")
    assert nb.value("bool(session.passing[session.hits.rows].all())")
    nb.shot(artifacts, "query-filters", explorer)
    explorer.get_by_role("button", name="Remove the filter on caption").click()
    chips.nth(4).wait_for(state="detached")
    assert panel.get_by_role("textbox", name="caption contains").input_value() == ""
    explorer.get_by_role("button", name="Clear filters").click()
    passes(explorer, 900)
    explorer.get_by_role("button", name="Undo").click()
    chips.nth(3).wait_for()
    panel.get_by_role("spinbutton", name="stars from").press("Escape")
    panel.wait_for(state="detached")
    assert explorer.locator(".cbw-filter-button").evaluate(
        "button => button === document.activeElement"
    )


def test_a_filter_keeps_the_tab_and_a_cell_sets_one_too(nb):
    explorer = nb.explorer()
    search(explorer, "red bird")
    explorer.get_by_role("button", name="Catalog").click()
    explorer.locator(".cbw-headline", has_text="900 images in the catalog").wait_for()
    nb.run_cell("session.filter({'price': (100, None)})")
    explorer.locator(".cbw-headline", has_text="100 of 900 images in the catalog").wait_for()
    assert nb.rows_shown(explorer) == list(range(800, 860))
    assert explorer.get_by_role("list", name="Filters").inner_text() == "price >= 100"
    panel = open_filters(explorer, "Filter (1)")
    panel.get_by_role("spinbutton", name="price from").fill("200")
    panel.get_by_role("spinbutton", name="price from").press("Enter")
    passes(explorer, 0)
    explorer.locator(".cbw-empty").wait_for()


@pytest.mark.parametrize(("theme", "width"), [("Light", 760), ("Dark", 760), ("Dark", 1700)])
def test_looks(nb, artifacts, theme, width):
    explorer = nb.explorer()
    nb.theme(f"JupyterLab {theme}")
    nb.page.set_viewport_size({"width": width, "height": 1000})
    search(explorer, "blue fish + old boat^2 -tree")
    nb.run_cell("session.filter({'group': ['animals', 'food'], 'price': (10, 90.5)})")
    panel = open_filters(explorer, "Filter (2)")
    nb.wait_painted(explorer)
    for each in (explorer, panel):
        assert each.evaluate("root => root.scrollWidth - root.clientWidth") <= 0
    nb.shot(artifacts, f"query-{theme}-{width}", explorer)


def test_what_is_being_typed_survives_the_answer_to_another_filter(nb):
    explorer = nb.explorer()
    panel = open_filters(explorer)
    caption = panel.get_by_role("textbox", name="caption contains")
    caption.press_sequentially("fi")
    nb.run_cell("session.filter({'sold': True})")
    passes(explorer, 300)
    assert caption.input_value() == "fi"
    caption.press_sequentially("sh")
    caption.press("Enter")
    explorer.get_by_role("list", name="Filters").get_by_text("caption contains 'fish'").wait_for()
    assert nb.value("session.filters") == {"caption": "fish", "sold": True}
    explorer.get_by_role("button", name="Remove the filter on caption").click()
    passes(explorer, 300)
    assert caption.input_value() == ""
