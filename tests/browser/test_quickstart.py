"""The quickstart notebook on the real demo catalog: the job from start to end, in a browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import clipbranches_widget as cb

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def quickstart(lab):
    """Copy the notebook to the server; build the demo catalog if this machine has none."""
    cb.demo(progress=False)
    shutil.copy(NOTEBOOK, lab.notebooks / NOTEBOOK.name)
    return NOTEBOOK.name


@pytest.mark.timeout(600)  # may build the demo catalog
def test_quickstart_from_first_search_to_restart(quickstart, open_notebook, artifacts):
    nb = open_notebook(name=quickstart, height=1300)
    nb.run_all()
    explorer = nb.explorer()
    field = explorer.get_by_role("combobox", name="Search the catalog by text")
    assert field.input_value() == "animals with wings"
    field.press("Enter")
    explorer.locator(".cbw-headline", has_text="2,000 nearest images").wait_for()
    nb.wait_painted(explorer)
    nb.shot(artifacts, "quickstart-search")

    for number in range(5):
        nb.image_cell(explorer, number).locator(".cbw-chip").click()
    for number in range(50, 55):
        nb.image_cell(explorer, number).get_by_role("button", name="Mark no").click()
    explorer.get_by_role("button", name="Refine (5 yes, 5 no)").click()
    headline = explorer.locator(".cbw-headline", has_text="matching image")
    headline.wait_for()
    rules = explorer.locator(".cbw-rules")
    explorer.get_by_role("button", name="Rules").click()
    rules.locator("li").first.wait_for()
    assert " of the matches" in rules.locator("li").first.inner_text()
    nb.wait_painted(explorer)
    nb.shot(artifacts, "quickstart-refined")

    rows = json.loads(nb.run_cell("print(session.result.rows.tolist())"))
    assert re.match(rf"{len(rows):,} matching images? in ", headline.inner_text())
    assert nb.rows_shown(explorer) == rows[:60]
    if len(rows) > 60:
        explorer.get_by_role("button", name="Next page").click()
        explorer.locator(".cbw-range", has_text="61\u2013").wait_for()
        assert nb.rows_shown(explorer) == rows[60:120]

    explorer.get_by_role("button", name="Undo").click()
    headline.wait_for(state="detached")
    explorer.get_by_role("button", name="Redo").click()
    headline.wait_for()

    nb.run_all()  # the cell again: the same session, and the next cells print its answer
    headline.wait_for()
    assert nb.rows_shown(nb.explorer()) == rows[:60]
    printed = nb.page.locator(".jp-OutputArea-output", has_text="<Result refine").last
    assert f"{len(rows):,} of {len(cb.demo()):,} images" in printed.inner_text()

    nb.restart_and_run_all()
    explorer = nb.explorer()
    explorer.get_by_role("button", name="Refine (5 yes, 5 no)").wait_for()
    headline.wait_for()
    nb.wait_painted(explorer)
    assert nb.rows_shown(explorer) == rows[:60]
    assert nb.console == []
