"""Near-duplicates in a real JupyterLab: folding, badges, and a group labelled at once."""

from __future__ import annotations

import pytest

NEW_SESSION = """
path = pathlib.Path(tempfile.mkdtemp()) / "session.jsonl"
session = Session(catalog, path, encoder=WordEncoder())
hits = session.search("striped bird", k=150)
grouped = hits.grouped(0.6)
most = max(grouped.groups, key=grouped.groups.count)
members = [most, *grouped.groups[most].tolist()]
explorer = Explorer(session)
explorer.vue_part({"part": "groups", "action": "show", "data": {"is_on": False, "similarity": 0.6}})
"""
LABELS = "[session.labels.positive.tolist(), session.labels.negative.tolist()]"


@pytest.fixture(scope="module")
def shared(open_shared_notebook, word_setup):
    return open_shared_notebook([word_setup, NEW_SESSION, "explorer"])


@pytest.fixture
def nb(shared):
    """The shared notebook with every cell run anew: a new session, a new Explorer."""
    shared.theme("JupyterLab Light")
    shared.console.clear()
    shared.page.set_viewport_size({"width": 1280, "height": 1000})
    shared.run_all()
    shared.wait_painted(shared.explorer())
    yield shared
    assert shared.console == []


def toggle(explorer):
    return explorer.get_by_role("checkbox", name="Group near-duplicates")


def group(explorer, nb):
    """Group near-duplicates; return the text that counts them, once it is there."""
    toggle(explorer).check()
    n_groups = nb.value("len(grouped)")
    text = f"150 images in {n_groups} groups"
    explorer.locator(".cbw-grouping-text", has_text=text).wait_for()
    return text


def cell_of(explorer, row):
    return explorer.locator(f'.cbw-cell[data-row="{row}"]')


def widest(explorer):
    """Return by how many pixels the search, the page or a dialog is wider than the Explorer."""
    return explorer.evaluate(
        """root => Math.max(
            ...[...root.querySelectorAll('.cbw-search, .cbw-area, .cbw-tools, .cbw-sheet')].map(
                part => Math.max(part.scrollWidth, part.clientWidth) - root.clientWidth
            )
        )"""
    )


def test_near_duplicates_are_folded_and_come_back(nb, artifacts):
    explorer = nb.explorer()
    assert not toggle(explorer).is_checked()
    assert nb.rows_shown(explorer) == nb.value("hits.rows[:60].tolist()")
    group(explorer, nb)
    assert nb.rows_shown(explorer) == nb.value("grouped.rows[:60].tolist()")
    most, n_folded = nb.value("[most, grouped.groups.count(most)]")
    badge = cell_of(explorer, most).get_by_role("button", name=f"Show its {n_folded} near")
    assert badge.inner_text().strip() == f"+{n_folded}"
    assert f"stands for {n_folded} more" in cell_of(explorer, most).get_attribute("aria-label")
    assert explorer.locator(".cbw-folded").count() == nb.value(
        "sum(row in grouped.groups for row in grouped.rows[:60].tolist())"
    )
    nb.wait_painted(explorer)
    nb.shot(artifacts, "groups-page", explorer)
    toggle(explorer).uncheck()
    explorer.locator(".cbw-folded").first.wait_for(state="detached")
    assert nb.rows_shown(explorer) == nb.value("hits.rows[:60].tolist()")


def test_a_group_opens_and_all_of_it_is_labelled_and_undone_as_one(nb, artifacts):
    explorer = nb.explorer()
    group(explorer, nb)
    most, members = nb.value("[most, members]")
    cell_of(explorer, most).locator(".cbw-folded").click()
    dialog = explorer.get_by_role("dialog", name=f"{len(members)} near-duplicates")
    dialog.wait_for()
    assert dialog.locator(".cbw-group-tile").count() == len(members)
    nb.wait_painted(explorer)
    nb.shot(artifacts, "groups-open", explorer)
    dialog.get_by_role("button", name="Label the whole group yes").click()
    nb.wait_value(LABELS, [sorted(members), []])
    n_events = nb.value("len(session.history)")
    dialog.get_by_role("button", name="Label the whole group no", exact=True).click()
    nb.wait_value(LABELS, [[], sorted(members)])
    assert nb.value("len(session.history)") == n_events + 1
    nb.shot(artifacts, "groups-labelled", explorer)
    nb.page.keyboard.press("z")
    nb.wait_value(LABELS, [sorted(members), []])
    last = dialog.locator(".cbw-group-tile").last
    last.get_by_role("button", name="no", exact=True).click()
    nb.wait_value(LABELS, [sorted(members[:-1]), members[-1:]])
    nb.page.keyboard.press("u")
    nb.wait_value(LABELS, [[], []])
    nb.page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    nb.page.wait_for_function(
        "row => document.activeElement?.dataset?.row === String(row)", arg=most
    )


def test_keys_work_on_the_folded_page(nb):
    explorer = nb.explorer()
    group(explorer, nb)
    most, members = nb.value("[most, members]")
    cell_of(explorer, most).focus()
    nb.page.keyboard.press("g")
    dialog = explorer.get_by_role("dialog", name=f"{len(members)} near-duplicates")
    dialog.wait_for()
    inside = "dialog => dialog.contains(document.activeElement)"
    for _ in range(4):
        nb.page.keyboard.press("Tab")
        assert dialog.evaluate(inside)
    nb.page.keyboard.press("g")
    dialog.wait_for(state="detached")
    nb.page.wait_for_function(
        "row => document.activeElement?.dataset?.row === String(row)", arg=most
    )
    nb.page.keyboard.press("y")
    nb.wait_value(LABELS, [[most], []])
    rows = nb.rows_shown(explorer)
    following = rows[rows.index(most) + 1]
    nb.page.wait_for_function(
        "row => document.activeElement?.dataset?.row === String(row)", arg=following
    )
    toggle(explorer).focus()
    nb.page.keyboard.press("Space")
    explorer.locator(".cbw-folded").first.wait_for(state="detached")


def test_a_picture_of_a_group_is_zoomed(nb):
    explorer = nb.explorer()
    group(explorer, nb)
    most = nb.value("most")
    cell_of(explorer, most).locator(".cbw-folded").click()
    explorer.locator(".cbw-group-tile .cbw-thumb").last.click()
    explorer.locator(".cbw-zoom").wait_for()
    assert explorer.locator(".cbw-group").count() == 0
    nb.page.keyboard.press("Escape")
    explorer.locator(".cbw-zoom").wait_for(state="detached")


def test_a_round_is_folded_and_labels_are_not(nb):
    explorer = nb.explorer()
    group(explorer, nb)
    nb.run_cell("session.label(positive=hits.rows[:6], negative=hits.rows[100:106])")
    nb.run_cell("result = session.refine()")
    n_images, n_groups = nb.value("[len(result), len(result.grouped(0.6))]")
    text = f"{n_images} images in {n_groups} groups"
    explorer.locator(".cbw-grouping-text", has_text=text).wait_for()
    assert nb.rows_shown(explorer) == nb.value("result.grouped(0.6).rows[:60].tolist()")
    explorer.get_by_role("button", name="Yes 6").click()
    explorer.locator(".cbw-grouping-text", has_text="not for this list").wait_for()
    explorer.get_by_role("button", name="Search 150").click()
    explorer.locator(".cbw-grouping-text", has_text="150 images in").wait_for()
    explorer.get_by_role("combobox", name="How alike near-duplicates are").select_option("0.99")
    explorer.locator(".cbw-grouping-text", has_text="150 images in 150 groups").wait_for()


@pytest.mark.parametrize("theme", ["Light", "Dark"])
@pytest.mark.parametrize("width", [420, 1700])
def test_looks(nb, artifacts, theme, width):
    explorer = nb.explorer()
    nb.theme(f"JupyterLab {theme}")
    nb.page.set_viewport_size({"width": width, "height": 1000})
    if width < 600:
        nb.page.evaluate("window.jupyterapp.shell.collapseLeft()")
    group(explorer, nb)
    nb.run_cell("session.label(positive=members[:1], negative=members[1:2])")
    nb.wait_painted(explorer)
    nb.shot(artifacts, f"groups-{theme}-{width}", explorer)
    assert widest(explorer) <= 0
    most = nb.value("most")
    cell_of(explorer, most).locator(".cbw-folded").click()
    explorer.get_by_role("dialog").wait_for()
    nb.wait_painted(explorer)
    nb.shot(artifacts, f"groups-open-{theme}-{width}", explorer)
    assert widest(explorer) <= 0
