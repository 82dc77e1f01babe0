"""The static picture: gone beside a live view, and what remains of a notebook without a kernel."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest

TESTS = Path(__file__).parents[1]
SETUP = """
import sys, tempfile
sys.path.insert(0, {tests!r})
from word_encoder import WordEncoder
import clipbranches_widget as cb
catalog = cb.open({catalog!r})
session = cb.Session(catalog, tempfile.mkdtemp() + "/s.jsonl", encoder=WordEncoder())
session.search("striped bird")
session.label(positive=session.hits[:3])
"""
SEARCH = "_ = session.search('small house')"


@pytest.fixture(scope="module")
def shared(open_shared_notebook, word_catalog):
    setup = SETUP.format(tests=str(TESTS), catalog=str(word_catalog))
    return open_shared_notebook([setup, "explorer = cb.Explorer(session)\nexplorer"])


@pytest.fixture
def nb(shared):
    shared.console.clear()
    shared.page.set_viewport_size({"width": 1280, "height": 1000})
    shared.run_all()
    shared.wait_painted(shared.explorer())
    return shared


def picture_of(nb):
    """Return the HTML of the picture in the notebook as it would be saved now."""
    return nb.page.evaluate(
        """() => {
            const cells = window.jupyterapp.shell.currentWidget.content.model.toJSON().cells;
            return cells[1].outputs[1].data["text/html"];
        }"""
    )


def wait_pictured(nb, text):
    nb.page.wait_for_function(
        """text => {
            const cells = window.jupyterapp.shell.currentWidget.content.model.toJSON().cells;
            return [].concat(cells[1].outputs[1].data["text/html"]).join("").includes(text);
        }""",
        arg=text,
    )


def test_it_is_hidden_beside_the_live_view_and_follows_the_state(nb, artifacts):
    explorer = nb.explorer()
    assert "60 nearest images" in picture_of(nb)
    nb.page.locator(".cbw-still").wait_for(state="hidden")
    # Whether the view is the same one afterwards: an element that is drawn anew loses the mark.
    explorer.evaluate("root => { root.dataset.mine = 'yes'; }")
    nb.image_cell(explorer, 9).get_by_role("button", name="Mark yes").click()
    wait_pictured(nb, "4 yes, 0 no")
    nb.run_cell(SEARCH)
    wait_pictured(nb, "small house")
    assert nb.explorer().evaluate("root => root.dataset.mine") == "yes"
    nb.page.locator(".cbw-still").wait_for(state="hidden")
    assert len(picture_of(nb)) < 150_000
    assert nb.console == []
    nb.shot(artifacts, "picture-hidden")


def test_a_saved_notebook_shows_it_to_whoever_was_sent_it(nb, open_notebook, artifacts):
    nb.command("docmanager:save")
    saved = nb.lab.notebooks / nb.name
    copy = nbformat.read(saved, as_version=4)
    bundle = copy.cells[1].outputs[1].data
    assert bundle["text/html"].startswith('<div class="cbw-still"')
    copy.cells[0].source += "# The server knows no such notebook, so it does not trust it."
    nbformat.write(copy, nb.lab.notebooks / "sent.ipynb")

    reader = open_notebook(name="sent.ipynb")
    still = reader.page.locator(".cbw-still")
    still.wait_for()
    assert "striped bird" in still.inner_text()
    assert "60 nearest images" in still.inner_text()
    sizes = still.locator("img").evaluate_all("all => all.map(image => image.naturalWidth)")
    assert len(sizes) >= 8
    assert min(sizes) > 0
    reader.shot(artifacts, "picture-reader")
    reader.theme("JupyterLab Dark")
    reader.shot(artifacts, "picture-reader-dark")


def test_after_the_kernel_is_gone_it_comes_back_on_reload(nb, artifacts):
    nb.command("docmanager:save")
    nb.page.evaluate("void window.jupyterapp.commands.execute('kernelmenu:restart')")
    nb.page.locator(".jp-Dialog .jp-mod-accept").click()
    nb.page.wait_for_selector(".jp-Dialog", state="detached")
    nb.wait_idle()
    nb.open(reset=False)
    still = nb.page.locator(".cbw-still")
    still.wait_for()
    nb.shot(artifacts, "picture-after-restart")
    assert "striped bird" in still.inner_text()
    # The cell run again: the live view replaces it.
    nb.run_all()
    nb.explorer()
    still.wait_for(state="hidden")
    assert json.loads(nb.run_cell("import json; print(json.dumps(len(session.labels)))")) == 3
