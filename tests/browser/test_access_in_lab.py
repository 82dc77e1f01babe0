"""The Explorer for everyone: axe finds nothing serious, and what changes is announced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SETUP = """
import sys, tempfile
sys.path.insert(0, {tests!r})
from word_encoder import WordEncoder
import clipbranches_widget as cb
catalog = cb.open({catalog!r})
"""
EXPLORE = """
session = cb.Session(catalog, tempfile.mkdtemp() + "/s.jsonl", encoder=WordEncoder())
explorer = cb.Explorer(session)
explorer
"""
SERIOUS = {"serious", "critical"}


@pytest.fixture(scope="module")
def shared(open_shared_notebook, word_catalog):
    return open_shared_notebook(
        [SETUP.format(tests=str(TESTS), catalog=str(word_catalog)), EXPLORE]
    )


@pytest.fixture
def nb(shared):
    shared.theme("JupyterLab Light")
    shared.page.set_viewport_size({"width": 1280, "height": 1000})
    shared.run_all()
    shared.explorer()
    return shared


@pytest.fixture(scope="module")
def axe():
    return pytest.importorskip("axe_playwright_python.sync_playwright").Axe()


def serious(axe, nb):
    """Return what axe finds wrong inside the Explorer, rule and place, that is serious."""
    found = axe.run(nb.page, context=".cbw").response
    assert found["passes"], "axe checked nothing"
    return [
        f"{violation['id']}: {node['html'][:160]} {node['failureSummary'][:300]}"
        for violation in found["violations"]
        if violation["impact"] in SERIOUS
        for node in violation["nodes"]
    ]


def found_something(nb, explorer):
    nb.run_cell(
        "session.search('blue fish', k=120)\n"
        "session.label(positive=session.hits.rows[:4], negative=session.hits.rows[20:23])\n"
        "session.refine()"
    )
    explorer.locator(".cbw-headline", has_text="of the catalog scored").wait_for()
    nb.wait_painted(explorer)


@pytest.mark.parametrize("theme", ["Light", "Dark"])
@pytest.mark.parametrize("width", [420, 1280])
def test_axe_finds_nothing_serious_on_the_page(nb, axe, theme, width):
    nb.theme(f"JupyterLab {theme}")
    nb.page.set_viewport_size({"width": width, "height": 1000})
    explorer = nb.explorer()
    assert serious(axe, nb) == []
    found_something(nb, explorer)
    nb.image_cell(explorer, 1).focus()
    assert serious(axe, nb) == []


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_axe_finds_nothing_serious_in_the_panels(nb, axe, artifacts, theme):
    nb.theme(f"JupyterLab {theme}")
    explorer = nb.explorer()
    found_something(nb, explorer)
    names = explorer.locator(".cbw-dock-tab").all_inner_texts()
    assert len(names) == 7
    for name in map(str.strip, names):
        tab = explorer.locator(".cbw-dock-tab", has_text=name)
        tab.click()
        explorer.locator(".cbw-dock-tab[aria-expanded=true]", has_text=name).wait_for()
        explorer.locator(".cbw-dock").first.wait_for()
        nb.page.wait_for_timeout(500)
        assert serious(axe, nb) == [], name
        nb.shot(artifacts, f"panel-{name}-{theme}", explorer)


def test_axe_finds_nothing_serious_in_the_dialogs(nb, axe):
    explorer = nb.explorer()
    found_something(nb, explorer)
    nb.image_cell(explorer, 1).focus()
    for key in ("Space", "?"):
        nb.page.keyboard.press(key)
        dialog = explorer.get_by_role("dialog")
        dialog.wait_for()
        assert serious(axe, nb) == [], key
        nb.page.keyboard.press("Escape")
        dialog.wait_for(state="detached")


def test_axe_would_find_a_fault(nb, axe):
    explorer = nb.explorer()
    explorer.evaluate("root => root.append(document.createElement('button'))")
    assert any(fault.startswith("button-name") for fault in serious(axe, nb))


def test_counts_and_labels_are_announced(nb):
    explorer = nb.explorer()
    said = explorer.get_by_role("status").first
    nb.image_cell(explorer, 3).locator(".cbw-chip").click()
    said.filter(has_text="1 yes, 0 no").wait_for(state="attached")
    found_something(nb, explorer)
    said.filter(has_text="matching").wait_for(state="attached")
    n_found = json.loads(nb.run_cell("print(len(session.result))"))
    assert f"{n_found:,} matching image" in said.text_content()


def test_nothing_moves_for_those_who_asked_for_that(open_notebook, word_catalog):
    cells = [SETUP.format(tests=str(TESTS), catalog=str(word_catalog)), EXPLORE]
    nb = open_notebook(cells, reduced_motion="reduce")
    nb.run_all()
    explorer = nb.explorer()
    moving = explorer.evaluate(
        "root => { const box = document.createElement('div'); box.className = 'cbw-skeleton';"
        "root.append(box); const name = getComputedStyle(box).animationName;"
        "const timed = [...root.querySelectorAll('*')].filter(node =>"
        "parseFloat(getComputedStyle(node).transitionDuration) > 0"
        "&& !node.closest('.v-progress-linear'));"
        "box.remove(); return [name, timed.length]; }"
    )
    assert moving == ["none", 0]
