"""The page of images in a real JupyterLab: keys, mouse, selection, sizes, help."""

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


def wait_chosen(explorer, n_chosen):
    explorer.locator(".cbw-chosen", has_text=f"{n_chosen} selected").wait_for()


def widest(explorer):
    """Return by how many pixels the page or a dialog is wider than the Explorer."""
    return explorer.evaluate(
        """root => Math.max(
            ...[...root.querySelectorAll('.cbw-area, .cbw-pager, .cbw-sheet')].map(part =>
                Math.max(part.scrollWidth, part.clientWidth) - root.clientWidth
            )
        )"""
    )


def labels(positive=(), negative=()):
    return {"positive": list(positive), "negative": list(negative)}


LABELS = "session.labels.to_dict()"


def test_keys_label_and_go_on_to_the_next(nb):
    explorer = nb.explorer()
    nb.image_cell(explorer, 0).focus()
    nb.press("y", "n", "u", "y", "Y")
    nb.wait_focus(5)
    nb.wait_value(LABELS, labels([0, 3, 4], [1]))
    nb.press("ArrowLeft", "u")
    nb.wait_focus(5)
    nb.wait_value(LABELS, labels([0, 3], [1]))
    nb.press("z", "z", "Shift+Z")
    nb.wait_value(LABELS, labels([0, 3, 4], [1]))


def test_no_key_reaches_the_notebook(nb):
    explorer = nb.explorer()
    before = nb.state()
    keys = ("d", "d", "a", "b", "x", "c", "v", "m", "j", "k", "0", "0", "Enter", "Shift+Enter")
    for target in (nb.image_cell(explorer, 1), nb.image_cell(explorer, 2).locator("button").last):
        target.focus()
        nb.press(*keys, "Escape", "d", "d", "a", "b")
    nb.press("End", "ArrowRight")  # other cells: the focus must not fall out of the Explorer
    nb.wait_focus(60)
    nb.press(*keys)
    nb.page.keyboard.press("?")
    explorer.get_by_role("dialog").wait_for()
    nb.press(*keys)
    assert nb.state() == before
    assert explorer.get_by_role("dialog").count() == 1


def test_arrows_turn_the_page_at_its_edge(nb):
    explorer = nb.explorer()
    nb.image_cell(explorer, 0).focus()
    nb.press("ArrowLeft", "ArrowUp")
    nb.wait_focus(0)
    nb.press("End")
    nb.wait_focus(59)
    nb.press("ArrowRight")
    nb.wait_focus(60)
    nb.press("ArrowLeft")
    nb.wait_focus(59)
    nb.press("PageDown")
    nb.wait_focus(60)
    nb.press("ArrowRight", "ArrowUp")
    nb.page.wait_for_function("Number(document.activeElement?.dataset?.row) < 60")
    n_columns = explorer.evaluate(
        """root => {
            const cells = [...root.querySelectorAll('.cbw-cell')];
            return cells.findIndex(cell => cell.offsetTop !== cells[0].offsetTop);
        }"""
    )
    landed = int(nb.page.evaluate("document.activeElement.dataset.row"))
    assert landed % n_columns == 1
    assert landed + n_columns > 59
    nb.press("ArrowDown")
    nb.wait_focus(61)
    explorer.get_by_role("button", name="Previous page").click()
    explorer.locator(".cbw-range", has_text="1\u201360 of 900").wait_for()
    nb.press("ArrowRight")
    nb.wait_focus(0)
    nb.press("PageUp", "End", "Home")
    nb.wait_focus(0)
    explorer.locator(".cbw-at", has_text="at 1").wait_for()


def test_a_range_by_keys_is_labelled_at_once(nb):
    explorer = nb.explorer()
    nb.image_cell(explorer, 3).focus()
    nb.press("Shift+ArrowRight", "Shift+ArrowRight", "Shift+ArrowRight", "Shift+ArrowLeft")
    wait_chosen(explorer, 3)
    nb.press("y")
    nb.wait_value(LABELS, labels([3, 4, 5]))
    nb.wait_value("len(session.history)", 1)
    nb.wait_focus(6)
    assert explorer.locator(".cbw-chosen").count() == 0
    nb.press("z")
    nb.wait_value(LABELS, labels())
    nb.press("Shift+End")
    wait_chosen(explorer, 54)
    nb.press("Escape")
    explorer.locator(".cbw-chosen").wait_for(state="detached")
    nb.wait_value(LABELS, labels())


def drag(nb, start, end):
    mouse = nb.page.mouse
    for step, locator in enumerate((start, end)):
        box = locator.bounding_box()
        mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=8)
        if step == 0:
            mouse.down()
    mouse.up()


def test_a_drag_selects_and_the_bar_labels(nb, artifacts):
    explorer = nb.explorer()
    drag(nb, *(nb.image_cell(explorer, n).locator(".cbw-picture") for n in (2, 5)))
    wait_chosen(explorer, 4)
    nb.shot(artifacts, "grid-selection", explorer)
    explorer.get_by_role("button", name="Label the selection no", exact=True).click()
    nb.wait_value(LABELS, labels(negative=[2, 3, 4, 5]))
    nb.wait_value("len(session.history)", 1)
    explorer.locator(".cbw-chosen").wait_for(state="detached")
    nb.image_cell(explorer, 8).locator(".cbw-chip").click()
    nb.image_cell(explorer, 9).get_by_role("button", name="Mark no").click()
    nb.wait_value(LABELS, labels([8], [2, 3, 4, 5, 9]))


def test_shift_click_and_ctrl_click_select(nb):
    explorer = nb.explorer()
    picture = [nb.image_cell(explorer, n).locator(".cbw-picture") for n in range(8)]
    picture[1].click()
    nb.wait_focus(1)
    assert explorer.locator(".cbw-chosen").count() == 0
    picture[4].click(modifiers=["Shift"])
    wait_chosen(explorer, 4)
    picture[7].click(modifiers=["Control"])
    picture[2].click(modifiers=["Control"])
    wait_chosen(explorer, 4)
    nb.press("y")
    nb.wait_value(LABELS, labels([1, 3, 4, 7]))
    assert explorer.get_by_role("dialog").count() == 0


def test_the_whole_page_is_labelled_as_one_action(nb):
    explorer = nb.explorer()
    explorer.get_by_role("button", name="Next page").click()
    explorer.locator(".cbw-range", has_text="61\u2013120 of 900").wait_for()
    nb.image_cell(explorer, 0).locator(".cbw-chip").click()
    explorer.get_by_role("button", name="Label all on this page no", exact=True).click()
    nb.wait_value("session.labels.negative.tolist()", list(range(60, 120)))
    nb.wait_value("len(session.history)", 2)
    explorer.get_by_role("button", name="Undo").click()
    nb.wait_value(LABELS, labels([60]))
    explorer.get_by_role("button", name="Label all on this page none").click()
    nb.wait_value(LABELS, labels())


def test_the_cursor_stays_when_labels_take_images_from_the_tab(nb):
    explorer = nb.explorer()
    nb.run_cell("session.label(positive=range(10, 20))")
    explorer.get_by_role("button", name="Yes 10").click()
    explorer.locator(".cbw-headline", has_text="10 images marked yes").wait_for()
    nb.image_cell(explorer, 3).focus()
    nb.press("n")
    explorer.locator(".cbw-headline", has_text="9 images marked yes").wait_for()
    nb.wait_focus(14)
    nb.press("u")
    explorer.locator(".cbw-headline", has_text="8 images marked yes").wait_for()
    nb.wait_focus(15)


def test_a_button_that_is_disabled_leaves_the_focus_in_the_explorer(nb):
    explorer = nb.explorer()
    before = nb.state()
    nb.image_cell(explorer, 5).focus()
    nb.press("y")
    explorer.get_by_role("button", name="Refine (1 yes, 0 no)").wait_for()
    for name in ("Undo", "Last page"):
        button = explorer.get_by_role("button", name=name)
        button.click()
        nb.page.wait_for_function("button => button.disabled", arg=button.element_handle())
        assert explorer.evaluate("root => root.contains(document.activeElement)")
        nb.press("d", "d", "a")
    assert nb.state() == before
    nb.press("ArrowLeft")
    nb.wait_focus(840)


def test_the_size_is_kept_and_larger_pictures_are_sharper(nb, artifacts):
    explorer = nb.explorer()
    width = "root => root.querySelector('.cbw-cell').getBoundingClientRect().width"
    usual = explorer.evaluate(width)
    slider = explorer.get_by_role("slider", name="Size of the images")
    assert explorer.locator(".cbw-picture img").first.evaluate("i => i.naturalWidth") == 160
    slider.fill("320")
    assert explorer.evaluate(width) >= 320 > usual
    nb.page.wait_for_function(
        "root => root.querySelector('.cbw-picture img').naturalWidth === 200",
        arg=explorer.element_handle(),
    )
    nb.shot(artifacts, "grid-large", explorer)
    nb.run_all()
    explorer = nb.explorer()
    assert explorer.evaluate(width) >= 320
    explorer.get_by_role("slider", name="Size of the images").fill("80")
    assert explorer.evaluate(width) < usual
    nb.wait_painted(explorer)
    nb.shot(artifacts, "grid-small", explorer)


def test_the_number_of_images_on_a_page(nb):
    explorer = nb.explorer()
    nb.image_cell(explorer, 0).focus()
    nb.press("PageDown")
    nb.wait_focus(60)
    explorer.get_by_role("combobox", name="Images on a page").select_option("240")
    explorer.locator(".cbw-range", has_text="1\u2013240 of 900").wait_for()
    assert nb.rows_shown(explorer) == list(range(240))
    nb.wait_painted(explorer)
    explorer.get_by_role("button", name="Last page").click()
    explorer.locator(".cbw-range", has_text="721\u2013900 of 900").wait_for()


def test_the_card_shows_the_whole_caption_as_text(nb, artifacts):
    explorer = nb.explorer()
    card = explorer.locator(".cbw-card-caption")
    nb.image_cell(explorer, 0).locator(".cbw-picture").hover()
    card.wait_for()
    assert card.inner_text() == '<img src=x onerror="window.cbw_hacked = true">'
    nb.image_cell(explorer, 2).locator(".cbw-picture").hover()
    nb.page.wait_for_function(
        "root => root.querySelector('.cbw-card-caption')?.textContent.length === 10000",
        arg=explorer.element_handle(),
    )
    nb.shot(artifacts, "grid-card", explorer)
    assert not nb.page.evaluate("Boolean(window.cbw_hacked)")
    nb.page.mouse.move(2, 2)
    card.wait_for(state="detached")


def test_help_is_a_dialog(nb, artifacts):
    explorer = nb.explorer()
    nb.image_cell(explorer, 4).focus()
    nb.page.keyboard.press("?")
    dialog = explorer.get_by_role("dialog", name="Keys and mouse")
    dialog.wait_for()
    inside = "dialog => dialog.contains(document.activeElement)"
    assert dialog.evaluate(inside)
    for _ in range(6):
        nb.press("Tab")
        assert dialog.evaluate(inside)
    for _ in range(3):
        nb.press("Shift+Tab")
        assert dialog.evaluate(inside)
    nb.shot(artifacts, "help", explorer)
    nb.press("y", "Escape")
    dialog.wait_for(state="detached")
    nb.wait_focus(4)
    nb.wait_value(LABELS, labels())
    explorer.get_by_role("button", name="Help: keys and mouse").click()
    explorer.get_by_role("button", name="Close the help").click()
    dialog.wait_for(state="detached")


@pytest.mark.parametrize("theme", ["Light", "Dark"])
@pytest.mark.parametrize("width", [420, 1700])
def test_looks(nb, artifacts, theme, width):
    explorer = nb.explorer()
    nb.theme(f"JupyterLab {theme}")
    nb.page.set_viewport_size({"width": width, "height": 1000})
    if width < 600:
        nb.page.evaluate("window.jupyterapp.shell.collapseLeft()")
    nb.run_cell("session.label(positive=[1, 2, 6], negative=[3, 8])")
    nb.wait_painted(explorer)
    nb.image_cell(explorer, 0).focus()
    nb.press("ArrowRight", "Shift+ArrowRight", "Shift+ArrowRight")
    wait_chosen(explorer, 3)
    nb.shot(artifacts, f"grid-{theme}-{width}", explorer)
    assert widest(explorer) <= 0
    nb.page.keyboard.press("?")
    explorer.get_by_role("dialog").wait_for()
    nb.shot(artifacts, f"help-{theme}-{width}", explorer)
    assert widest(explorer) <= 0
