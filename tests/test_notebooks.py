"""The notebooks run from top to bottom in a fresh kernel, and say what is so."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import clipbranches_widget as cb

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("programmatic", "quickstart", "ways-in", "ways-out", "your-own-images")
CELL_TIMEOUT_S = 280
WIDGET = "application/vnd.jupyter.widget-view+json"

pytestmark = pytest.mark.timeout(900)  # the first to need the demo catalog builds it


@pytest.fixture(scope="module", autouse=True)
def demo_catalog():
    """Built before any notebook needs it; kernels find it in the same cache."""
    return cb.demo(progress=False)


def run(name, folder, *, more=(), **environment):
    """Execute a notebook, then the cells `more`, in `folder`; return all cells."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in more]
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=os.environ | environment)
    return notebook.cells


def facts(expressions):
    """Return a cell that prints a JSON object: name -> value of an expression."""
    pairs = ", ".join(f"{name!r}: {code}" for name, code in expressions.items())
    return f"import json\nprint(json.dumps({{{pairs}}}))"


def printed(cell):
    return "".join(out.text for out in cell.get("outputs", ()) if out.output_type == "stream")


def shown(cells, mime):
    return [
        out.data[mime]
        for cell in cells
        for out in cell.get("outputs", ())
        if mime in out.get("data", ())
    ]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_valid_stripped_and_named_for_a_plain_kernel(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)

    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_there_are_no_other_notebooks():
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == set(NAMES)


def test_links_between_notebooks_lead_somewhere():
    for name in NAMES:
        text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
        for other in text.split("](")[1:]:
            target = other.partition(")")[0]
            assert target.startswith("https://") or (FOLDER / target).is_file()


def test_quickstart_runs_without_a_click(tmp_path):
    check = facts(
        {
            "n_hits": "len(session.hits)",
            "query": "session.query_text",
            "is_hits": "result.rows.tolist() == session.hits.rows.tolist()",
            "n_labels": "len(session.labels)",
            "kind": "result.kind",
        }
    )
    cells = run("quickstart", tmp_path, more=[check])

    assert json.loads(printed(cells[-1])) == {
        "n_hits": 60,
        "query": "animals with wings",
        "is_hits": True,
        "n_labels": 0,
        "kind": "search",
    }
    assert len(shown(cells, WIDGET)) == 1
    text = "".join(map(printed, cells[:-1]))
    assert "Nothing has been refined yet" in text
    assert "No branches yet" in text
    assert (tmp_path / "quickstart.session.jsonl").is_file()
    (table,) = [table for table in shown(cells, "text/html") if "score" in table]
    assert table.count("openmoji:") == 10


def test_quickstart_goes_on_where_a_session_was_left(tmp_path):
    """Labels and a round from one kernel; then the whole notebook again in a new one."""
    rounds = [
        "session.label(positive=session.hits.rows[:5], negative=session.hits.rows[-5:])",
        "answer = session.refine()",
        facts({"rows": "answer.rows.tolist()", "branches": "[str(b) for b in answer.branches]"}),
    ]
    first = json.loads(printed(run("quickstart", tmp_path, more=rounds)[-1]))
    cells = run("quickstart", tmp_path, more=[facts({"rows": "result.rows.tolist()"})])

    assert json.loads(printed(cells[-1]))["rows"] == first["rows"]
    assert len(first["rows"]) >= 5
    text = "".join(map(printed, cells[:-1]))
    assert "Nothing has been refined yet" not in text
    assert "refine for 'animals with wings'" in text
    for branch in first["branches"]:
        assert branch in text


def test_programmatic_shows_what_labels_bring(tmp_path):
    check = facts(
        {
            "n_wanted": "n_wanted",
            "page": "page_quality",
            "rounds": "[quality(answer.rows) for answer in results]",
            "text_as_long": "[quality(by_text.rows[: len(a)])[0] for a in results]",
            "labelled_right": "bool(is_wanted[session.labels.positive].all())"
            " and not is_wanted[session.labels.negative].any()",
            "n_frame": "len(frame)",
            "n_result": "len(result)",
            "threshold": "result.threshold",
            "lowest": "float(result.scores.min())",
            "reopened": "reopened.result.rows.tolist() == result.rows.tolist()",
            "actions": "[event.action for event in session.history]",
        }
    )
    cells = run("programmatic", tmp_path, more=[check])
    got = json.loads(printed(cells[-1]))

    assert got["n_wanted"] == 142
    assert got["labelled_right"]
    assert got["n_frame"] == got["n_result"] > 0
    assert got["lowest"] >= got["threshold"] == 0.5
    assert got["reopened"]
    assert got["actions"][:3] == ["search", "label", "refine"]
    assert got["actions"][-2:] == ["undo", "redo"]
    assert got["actions"].count("refine") == 6
    # What the notebook is there to show: a set that is mostly right and larger than a page holds.
    (_, page_recall), (precision, recall) = got["page"], got["rounds"][-1]
    assert recall > page_recall + 0.1
    assert precision > 0.8
    assert precision >= got["text_as_long"][-1]
    images = shown(cells, "image/png")
    assert len(images) == 2
    assert min(map(len, images)) > 10_000
    assert "same labels: True" in printed(cells[-2])
    assert "same result: True" in printed(cells[-2])


def test_your_own_images_falls_back_to_the_bundled_model_and_says_so(tmp_path):
    check = facts(
        {
            "kind": "catalog.encoder_info.kind",
            "n_images": "len(catalog)",
            "n_chosen": "len(chosen)",
            "skipped": "catalog.skipped.to_pylist()",
            "food": "float(session.result.to_pandas()['path'].str.startswith('food').mean())",
            "n_found": "len(session.result)",
            "same": "session.result.rows.tolist() == result.rows.tolist()",
        }
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    cells = run("your-own-images", tmp_path, more=[check], **offline)
    got = json.loads(printed(cells[-1]))

    text = "".join(map(printed, cells[:-1]))
    assert "No download, so the bundled demo model is used" in text
    assert "expected to download" in text
    assert got["kind"] == "bundled"
    assert got["n_images"] == got["n_chosen"] > 250
    assert [line["uri"] for line in got["skipped"]] == ["broken.jpg"]
    assert got["same"]
    assert got["n_found"] > 20
    assert got["food"] > 0.6
    assert len(shown(cells[-2:-1], WIDGET)) == 1


def test_ways_in_makes_a_catalog_of_every_source(tmp_path):
    sizes = "{name: len(catalog) for name, catalog in made.items()}"
    captions = "[catalog.caption(0) for catalog in made.values()]"
    best = "[catalog.uri(cb.Session(catalog, work / f'{n}.s', encoder=encoder)"
    best += ".search('bird', k=1).rows[0]) for n, catalog in enumerate(made.values())]"
    columns = "{name: catalog.items.column_names for name, catalog in made.items()}"
    check = facts({"sizes": sizes, "captions": captions, "best": best, "columns": columns})
    cells = run("ways-in", tmp_path, more=[check], HF_HUB_OFFLINE="1")
    got = json.loads(printed(cells[-1]))

    assert set(got["sizes"]) == {
        *("folder", "list", "frame", "zip", "parquet", "feather", "dataset", "saved", "tar"),
        *("npy", "clip-retrieval", "memory"),
    }
    assert set(got["sizes"].values()) == {12}
    assert all(got["captions"])
    assert len(set(map(str, got["best"]))) > 6  # the same drawing, at many kinds of places
    assert all("group" in got["columns"][name] for name in ("frame", "parquet", "feather", "tar"))
    assert all("label" in got["columns"][name] for name in ("dataset", "saved"))
    assert "the items (metadata) are shifted by" in "".join(map(printed, cells))


def test_ways_out_are_read_back(tmp_path):
    check = facts(
        {
            "n_result": "len(result)",
            "n_labels": "len(session.labels)",
            "n_images": "len(images)",
            "n_loaded": "len(loaded)",
            "classes": "data['label'][:]",
            "n_found": "len(rows)",
            "n_branch": "branch.n_rows",
            "n_other": "len(other.labels)",
            "page": "(work / 'birds.html').stat().st_size",
        }
    )
    cells = run("ways-out", tmp_path, more=[check], HF_HUB_OFFLINE="1")
    got = json.loads(printed(cells[-1]))

    assert got["n_labels"] == got["n_images"] == got["n_loaded"] == got["n_other"] == 12
    assert sorted(got["classes"]) == [0] * 6 + [1] * 6
    assert got["n_found"] == got["n_branch"] > 5
    assert got["page"] > 10_000
    text = "".join(map(printed, cells[:-1]))
    assert f"{got['n_result']} {got['n_result']}" in text
    assert "12 labels matched (12 by row): 6 yes, 6 no; 12 changed" in text
    assert "the same labels: True" in text
    assert "12 labels matched (12 by content): 6 yes, 6 no; 12 changed" in text
    assert "5 yes, 7 no; 1 changed" in text
    assert "undone: label 0 yes, 1 no" in text
    assert "expected each image to be yes or no, got both for 1" in text
