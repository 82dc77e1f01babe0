"""The export panel, copied code and the static picture, in a real JupyterLab."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

TESTS = Path(__file__).parents[1]
SETUP = """
import sys, tempfile, os
sys.path.insert(0, {tests!r})
from word_encoder import WordEncoder
import clipbranches_widget as cb
catalog = cb.open({catalog!r})
folder = tempfile.mkdtemp()
os.chdir(folder)
session = cb.Session(catalog, folder + "/session.jsonl", encoder=WordEncoder())
session.search("striped bird")
session.label(positive=session.hits[:5], negative=session.hits[-5:])
session.refine()
print(folder)
"""


@pytest.fixture(scope="module")
def shared(open_shared_notebook, word_catalog):
    setup = SETUP.format(tests=str(TESTS), catalog=str(word_catalog))
    cells = [setup, "explorer = cb.Explorer(session)\nexplorer"]
    return open_shared_notebook(cells, permissions=["clipboard-read", "clipboard-write"])


@pytest.fixture
def nb(shared):
    """The shared notebook with every cell run anew, and the export panel open."""
    shared.theme("JupyterLab Light")
    shared.console.clear()
    shared.page.set_viewport_size({"width": 1280, "height": 1000})
    shared.run_all()
    shared.explorer().get_by_role("button", name="Export").click()
    shared.explorer().locator(".cbw-export").wait_for()
    yield shared
    assert shared.console == []


def written(panel):
    """Return what the panel says was written."""
    said = panel.locator(".cbw-export-said bdi")
    said.wait_for()
    return said.inner_text()


def test_a_table_is_written_where_the_panel_says(nb, artifacts):
    explorer = nb.explorer()
    nb.wait_painted(explorer)
    panel = explorer.locator(".cbw-export")
    folder = Path(nb.value("folder"))
    n_found = nb.value("len(session.result)")
    path = panel.get_by_role("textbox", name="File to write")
    assert path.input_value() == "striped-bird-result.parquet"
    assert str(folder) in panel.locator(".cbw-export-where").inner_text()
    assert panel.get_by_label("What to write").locator("option").all_inner_texts() == [
        f"All matches ({n_found})",
        "Search (60)",
        "Yes (5)",
        "No (5)",
        "Yes and no, with labels (10)",
    ]
    panel.get_by_role("button", name="Write").click()
    file = folder / "striped-bird-result.parquet"
    assert written(panel) == f"{n_found:,} rows written to {file}"
    assert pd.read_parquet(file)["row"].tolist() == nb.value("session.result.rows.tolist()")
    nb.shot(artifacts, "export-panel", explorer)
    nb.theme("JupyterLab Dark")
    nb.page.set_viewport_size({"width": 620, "height": 1000})
    nb.shot(artifacts, "export-panel-dark-narrow", explorer)


def test_an_existing_file_is_kept_until_the_box_is_ticked(nb):
    explorer = nb.explorer()
    panel = explorer.locator(".cbw-export")
    folder = Path(nb.value("folder"))
    (folder / "mine.csv").write_text("mine")
    panel.get_by_label("Format").select_option("csv")
    panel.get_by_label("What to write").select_option("yes")
    panel.get_by_role("textbox", name="File to write").fill("mine.csv")
    panel.get_by_role("button", name="Write").click()
    alert = explorer.get_by_role("alert")
    alert.wait_for()
    assert "found one: overwrite=True replaces it" in alert.inner_text()
    assert (folder / "mine.csv").read_text() == "mine"
    panel.get_by_label("replace what is there").check()
    panel.get_by_role("button", name="Write").click()
    assert written(panel) == f"5 rows written to {folder / 'mine.csv'}"
    rows = pd.read_csv(folder / "mine.csv")["row"].tolist()
    assert sorted(rows) == nb.value("session.labels.positive.tolist()")


def test_images_go_into_a_folder_for_each_rule(nb):
    panel = nb.explorer().locator(".cbw-export")
    folder = Path(nb.value("folder"))
    panel.get_by_label("Format").select_option("images")
    panel.get_by_label("a folder for each rule").check()
    path = panel.get_by_role("textbox", name="Folder to write to")
    assert path.input_value() == "striped-bird-result"
    path.press("Enter")
    said = written(panel)
    files = sorted(folder.glob("striped-bird-result/R*/*.png"))
    assert said.startswith(f"{len(files)} images written to {folder / 'striped-bird-result'}")
    rows = {int(file.stem) for file in files}
    assert rows == {row for row in nb.value("list(session.result)") if row % 10 != 9}


def test_labels_go_out_as_folders_and_come_back_from_a_file(nb, artifacts):
    explorer = nb.explorer()
    panel = explorer.locator(".cbw-export")
    folder = Path(nb.value("folder"))
    labels = nb.value("session.labels.to_dict()")
    panel.get_by_label("What to write").select_option("labels")
    assert "Contact sheet (HTML)" not in panel.get_by_label("Format").inner_text()
    panel.get_by_label("Format").select_option("imagefolder")
    assert panel.get_by_label("replace what is there").count() == 0
    panel.get_by_role("textbox", name="Folder to write to").fill("sorted")
    panel.get_by_role("button", name="Write").click()
    assert str(folder / "sorted") in written(panel)
    for value, name in (("positive", "yes"), ("negative", "no")):
        rows = {int(file.stem) for file in (folder / "sorted" / name).iterdir()}
        assert rows == {row for row in labels[value] if row % 10 != 9}

    frame = pd.read_json(folder / "sorted" / "metadata.jsonl", lines=True)
    kept = frame.assign(label=frame["label"].map({"yes": 0, "no": 1}))[["path", "label"]]
    hostile = pd.DataFrame({"path": ["<img src=x onerror=alert(1)>"], "label": [1]})
    pd.concat([kept, hostile]).to_csv(folder / "turned.csv", index=False)
    nb.run_cell("_ = session.unlabel(session.labels.rows)")
    panel.get_by_role("button", name="Labels from a file").wait_for()
    panel.locator("input[type=file]").set_input_files(folder / "turned.csv")
    said = panel.locator(".cbw-export-imported bdi")
    said.wait_for()
    n = len(kept)
    assert said.inner_text().startswith(f"turned.csv: {n} labels matched ({n} by path)")
    assert "1 not in the catalog: <img src=x onerror=alert(1)>" in said.inner_text()
    turned = nb.value("session.labels.to_dict()")
    assert set(turned["positive"]) == {row for row in labels["negative"] if row % 10 != 9}
    assert set(turned["negative"]) == {row for row in labels["positive"] if row % 10 != 9}
    nb.shot(artifacts, "export-labels-in", explorer)
    nb.theme("JupyterLab Dark")
    nb.page.set_viewport_size({"width": 700, "height": 1000})
    nb.shot(artifacts, "export-labels-in-dark-narrow", explorer)
    nb.run_cell("_ = session.undo()")
    assert nb.value("len(session.labels)") == 0


def test_a_file_without_labels_says_what_was_expected(nb):
    explorer = nb.explorer()
    folder = Path(nb.value("folder"))
    (folder / "other.csv").write_text("path,verdict\n1.png,yes\n")
    explorer.locator(".cbw-export input[type=file]").set_input_files(folder / "other.csv")
    alert = explorer.get_by_role("alert")
    alert.wait_for()
    assert "expected a column 'label' of labels, got 'path', 'verdict'" in alert.inner_text()


def test_the_copied_code_makes_the_state_anew(nb):
    panel = nb.explorer().locator(".cbw-export")
    panel.get_by_role("button", name="Copy as code").click()
    panel.get_by_role("button", name="Copied").wait_for()
    code = nb.page.evaluate("navigator.clipboard.readText()")
    assert code == nb.value("session.to_code()")
    assert code == panel.get_by_label("Code that makes this state anew").input_value()
    nb.run_cell(f"again = {{}}\nexec({code!r}, again)")
    assert nb.value("list(again['result'])") == nb.value("list(session.result)")
    # The next label shows in the code at once.
    nb.image_cell(nb.explorer(), 8).get_by_role("button", name="Mark no").click()
    row = nb.rows_shown(nb.explorer())[8]
    nb.page.wait_for_function(
        "([area, row]) => new RegExp(`label.negative=.${row}.`).test(area.value)",
        arg=[panel.locator("textarea").element_handle(), row],
    )


def test_without_a_clipboard_the_code_is_selected(nb):
    panel = nb.explorer().locator(".cbw-export")
    nb.page.evaluate(
        "() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no'));"
        " document.execCommand = () => false; }"
    )
    panel.get_by_role("button", name="Copy as code").click()
    selected = "area => area.value.slice(area.selectionStart, area.selectionEnd) === area.value"
    nb.page.wait_for_function(selected, arg=panel.locator("textarea").element_handle())
    assert panel.locator("textarea").evaluate("area => area === document.activeElement")
