"""The export panel and the static picture, kernel side: real sessions, no browser."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import comm
import nbformat
import numpy as np
import pandas as pd
import pytest
from explorer_rig import SilentComm, settle
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from word_encoder import HOSTILE, WordEncoder, build_catalog

from clipbranches_widget import explorer_picture
from clipbranches_widget.errors import ExportError
from clipbranches_widget.explorer import Explorer
from clipbranches_widget.explorer_export import MAX_CODE_CHARS, shown_result, with_suffix
from clipbranches_widget.explorer_picture import MAX_TILES, Poster, snapshot
from clipbranches_widget.explorer_view import Contents, Place
from clipbranches_widget.session import Session

TESTS = Path(__file__).parent
MAX_PICTURE_BYTES = 150_000


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return build_catalog(tmp_path_factory.mktemp("c") / "words.cbcat", 600, with_images=True)


@pytest.fixture
def session(catalog, tmp_path):
    session = Session(catalog, tmp_path / "s.jsonl", encoder=WordEncoder())
    hits = session.search("striped bird")
    session.label(positive=hits[:5], negative=hits[-4:])
    session.refine()
    return session


@pytest.fixture
def explorer(session, tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "create_comm", SilentComm)
    monkeypatch.chdir(tmp_path)
    explorer = Explorer(session)
    settle(explorer)
    act(explorer, "dock", name="export")
    yield explorer
    explorer.close()


def act(explorer, event, **data):
    content = {"method": "custom", "content": {"event": event, "data": data}}
    explorer._handle_msg({"content": {"data": content}, "buffers": []})
    settle(explorer)


def save(explorer, **data):
    act(explorer, "part", part="export", action="save", data=data)


# -- the panel ------------------------------------------------------------------------------------


def test_the_panel_says_what_can_be_written_and_shows_the_code(explorer, session, tmp_path):
    state = explorer.export
    n_found = len(session.result)
    assert [(each["name"], each["n"]) for each in state["sets"]] == [
        ("result", n_found),
        ("hits", 60),
        ("yes", 5),
        ("no", 4),
        ("labels", 9),
    ]
    assert state["folder"] == str(tmp_path)
    assert state["stem"] == "striped-bird"
    assert state["code"] == session.to_code()
    session.label(positive=[77])
    settle(explorer)
    assert explorer.export["code"] == session.to_code()
    assert "positive=[77]" in explorer.export["code"]


def test_every_format_is_written(explorer, session, tmp_path):
    rows = session.result.rows.tolist()
    for kind in ("parquet", "csv", "sheet", "images", "links"):
        save(explorer, what="result", format=kind, path=f"new/{kind}")
        assert explorer.notice.get("kind") != "error", explorer.notice
        assert str(tmp_path / "new" / kind) in explorer.export["said"]
    assert pd.read_parquet("new/parquet.parquet")["row"].tolist() == rows
    assert pd.read_csv("new/csv.csv")["row"].tolist() == rows
    assert Path("new/sheet.html").read_text("utf-8").count("<figure") == len(rows)
    kept = {row for row in rows if row % 10 != 9}
    for kind in ("images", "links"):
        assert {int(file.stem) for file in Path("new", kind).iterdir()} == kept
    assert all(file.is_symlink() for file in Path("new/links").iterdir())
    assert explorer.task["name"] == ""


def test_labels_are_written_with_their_words(explorer, session):
    rows = session.labels.rows.tolist()
    words = [("no", "", "yes")[session.labels.get(row) + 1] for row in rows]
    save(explorer, what="labels", format="csv", path="labels")
    frame = pd.read_csv("labels.csv")
    assert frame["row"].tolist() == rows
    assert frame["label"].tolist() == words
    save(explorer, what="labels", format="imagefolder", path="sorted", by_branch=True)
    assert explorer.notice.get("kind") != "error", explorer.notice
    files = {int(file.stem): file.parent.name for file in Path("sorted").glob("*/*.png")}
    assert files == {row: word for row, word in zip(rows, words, strict=True) if row % 10 != 9}
    save(explorer, what="labels", format="sheet", path="labels")
    assert "got a contact sheet" in explorer.notice["text"]


def test_an_answer_is_sorted_into_folders_by_its_latest_labels(explorer, session):
    unlabelled = next(row for row in session.result if row not in session.labels)
    session.label(negative=[unlabelled])
    settle(explorer)
    save(explorer, what="result", format="imagefolder", path="sorted")
    folders = {int(file.stem): file.parent.name for file in Path("sorted").glob("*/*.png")}
    labels = session.labels
    assert folders == {
        row: ("no", "unlabelled", "yes")[labels.get(row) + 1]
        for row in session.result
        if row % 10 != 9
    }
    save(explorer, what="result", format="imagefolder", path="by-rule", by_branch=True)
    assert {file.name[0] for file in Path("by-rule").iterdir() if file.is_dir()} <= set("yRn")
    save(explorer, what="result", format="imagefolder", path="sorted", overwrite=True)
    assert "expected a new or empty folder" in explorer.notice["text"]


# -- labels from a file ----------------------------------------------------------------------------


def send(explorer, content, *, name="labels.csv", n_bytes=None, size=40):
    """Send a file in pieces, as the browser does."""
    data = {"number": 7, "name": name, "n_bytes": len(content) if n_bytes is None else n_bytes}
    for start in range(0, max(len(content), 1), size):
        content_of = {"part": "export", "action": "labels", "data": data}
        explorer.vue_part(content_of, [memoryview(content[start : start + size])])
    settle(explorer)


def test_labels_come_in_from_a_file_and_one_undo_takes_them_back(explorer, session, catalog):
    before = session.labels
    lines = [f"{catalog.uri(row)},{label}" for row, label in ((50, "yes"), (51, "no"))]
    send(explorer, "\n".join(["path,label", *lines, "<img src=x>,yes"]).encode())
    assert explorer.notice.get("kind") != "error", explorer.notice
    assert session.labels == before.with_labels(positive=[50], negative=[51])
    assert explorer.export["imported"].startswith("labels.csv: 2 labels matched (2 by path)")
    assert "1 not in the catalog: <img src=x>" in explorer.export["imported"]
    session.undo()
    assert session.labels == before
    act(explorer, "dock", name="")
    act(explorer, "dock", name="export")
    assert explorer.export["imported"] == ""


def test_a_file_without_labels_is_an_error_that_changes_nothing(explorer, session):
    before = session.labels
    send(explorer, b"path,verdict\na,yes\n", name="../../etc/passwd.csv")
    assert explorer.notice["kind"] == "error"
    assert "expected a column 'label' of labels, got 'path', 'verdict'" in explorer.notice["text"]
    for n_bytes in (0, 65 << 20):
        send(explorer, b"", n_bytes=n_bytes)
        assert "expected a file of labels of 1 byte to 64 MB" in explorer.notice["text"]
    assert session.labels == before
    assert not explorer.export["imported"]


def test_what_is_there_is_an_error_that_says_what_to_do(explorer, tmp_path):
    (tmp_path / "mine.csv").write_text("mine")
    save(explorer, what="hits", format="csv", path="mine")
    assert explorer.notice["kind"] == "error"
    assert "overwrite=True replaces it" in explorer.notice["text"]
    assert (tmp_path / "mine.csv").read_text() == "mine"
    assert not explorer.export["said"]
    save(explorer, what="hits", format="csv", path="mine", overwrite=True)
    assert explorer.export["said"] == f"60 rows written to {tmp_path / 'mine.csv'}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"format": "csv", "path": " "}, "expected a path to write to, got none"),
        ({"format": "exe", "path": "x"}, "expected one of the formats parquet, csv"),
        ({"format": "csv", "path": "x", "what": "catalog"}, "expected one of result, hits"),
    ],
)
def test_what_cannot_be_asked_for(explorer, data, message):
    save(explorer, **{"what": "result", **data})
    assert explorer.notice["kind"] == "error"
    assert message in explorer.notice["text"]


def test_cancel_stops_the_writing(explorer, monkeypatch, tmp_path):
    started, go_on = threading.Event(), threading.Event()
    real = type(explorer.session.result).copy_images

    def slow(self, *args, **options):
        started.set()
        assert go_on.wait(30)
        return real(self, *args, **options)

    monkeypatch.setattr(type(explorer.session.result), "copy_images", slow)
    content = {"part": "export", "action": "save"}
    content["data"] = {"what": "result", "format": "images", "path": "out"}
    explorer.vue_part(content)
    assert started.wait(30)
    explorer.vue_cancel()
    go_on.set()
    settle(explorer)
    assert explorer.notice["text"] == "Cancelled."
    assert not explorer.export["said"]
    assert len(list((tmp_path / "out").glob("*"))) <= 1


def test_each_set_has_the_scores_and_rules_of_its_source(session):
    contents = Contents.of(session)
    result = session.result
    whole = shown_result(contents, "result")
    assert whole.rows.tolist() == result.rows.tolist()
    assert whole.scores.tobytes() == result.scores.tobytes()
    assert shown_result(contents, "hits").rows.tolist() == session.hits.rows.tolist()
    yes = shown_result(contents, "yes")
    assert yes.rows.tolist() == session.labels.positive.tolist()
    scores = dict(zip(result.rows.tolist(), result.scores.tolist(), strict=True))
    assert yes.scores.tolist() == [scores[row] for row in yes]
    assert yes.branch_text(0)
    no = shown_result(contents, "no")  # no row of the answer: without scores
    assert no.rows.tolist() == session.labels.negative.tolist()
    assert np.isnan(no.scores).all()
    with pytest.raises(ExportError, match="that there is, got 'result'"):
        shown_result(Contents(session, {}, None, None), "result")


def test_code_that_is_too_long_is_not_sent(explorer, session, monkeypatch):
    monkeypatch.setattr(type(session), "to_code", lambda _self: "x" * (MAX_CODE_CHARS + 1))
    session.label(positive=[3])
    settle(explorer)
    assert explorer.export["code"] == ""


def test_a_path_gets_the_ending_of_its_format():
    assert with_suffix("~/a", ".csv") == Path.home() / "a.csv"
    assert with_suffix("A.CSV", ".csv").name == "A.CSV"
    assert with_suffix("folder", "").name == "folder"


# -- the static picture ----------------------------------------------------------------------------


def test_a_snapshot_is_small_and_says_what_is_shown(explorer, session):
    html = explorer.snapshot()._repr_html_()
    assert len(html.encode()) < MAX_PICTURE_BYTES
    result = session.result
    assert f"{len(result):,} matching images" in html
    assert "striped bird" in html
    assert "5 yes, 4 no" in html
    assert f"{len(result) - MAX_TILES:,} more images are not shown." in html
    assert str(result.branches[0]).split(" ->")[1].replace(">", "&gt;") in html
    assert html.count("data:image/webp") + html.count("no image") == MAX_TILES
    act(explorer, "go", tab="no", page=0)
    assert "4 images marked no" in explorer.snapshot().html


def test_the_largest_picture_is_within_bounds(catalog, tmp_path, rng, monkeypatch):
    from PIL import Image

    from clipbranches_widget.thumbnails import thumbnail_webp

    noise = Image.fromarray(rng.integers(0, 256, (160, 160, 3), dtype=np.uint8))
    monkeypatch.setattr(
        type(catalog), "thumbnail", lambda _catalog, _row, size: thumbnail_webp(noise, size)
    )
    monkeypatch.setattr(type(catalog), "caption", lambda *_args: "\U0001f426&" * 5_000)
    session = Session(catalog, tmp_path / "n.jsonl", encoder=WordEncoder())
    session.search("<" * 3_000)
    html = snapshot(Contents.of(session), Place("hits")).html
    assert len(html.encode()) < MAX_PICTURE_BYTES


def test_hostile_captions_stay_text(catalog, tmp_path):
    session = Session(catalog, tmp_path / "n.jsonl", encoder=WordEncoder())
    html = snapshot(Contents.of(session), Place("catalog")).html
    assert "<img src=x" not in html
    assert "&lt;img src=x onerror=" in html
    assert HOSTILE[1] in html
    assert "x" * 100 not in html


def test_before_the_session_is_open_it_says_so():
    assert "being opened" in snapshot(None, Place("")).html


def test_the_picture_is_published_once_the_state_is_quiet(monkeypatch):
    monkeypatch.setattr(explorer_picture, "SETTLE_S", 0.05)
    sent, done = [], threading.Event()

    def publish(data, transient=None, *, update=False):
        sent.append((data, transient, update))
        if update:
            done.set()

    shell = SimpleNamespace(display_pub=SimpleNamespace(publish=publish), kernel=object())
    monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: shell)
    poster, drawn = Poster(), iter(map(explorer_picture.Snapshot, "abcdef"))
    poster.follow(lambda: pytest.fail("drawn before it was shown"))
    poster.display({"text/plain": "view"}, lambda: next(drawn))
    for _ in range(20):
        poster.follow(lambda: next(drawn))
    assert done.wait(30)
    poster.close()
    poster.follow(lambda: pytest.fail("drawn after it was closed"))
    view, picture, *later = sent
    assert view == ({"text/plain": "view"}, None, False)
    assert picture[0]["text/html"] == "a"
    assert 1 <= len(later) <= 3  # twenty changes, a few pictures
    assert {one[1]["display_id"] for one in later} == {picture[1]["display_id"]}
    assert all(one[2] for one in later)


def test_outside_a_kernel_only_the_view_is_shown(monkeypatch):
    sent = []
    shell = SimpleNamespace(display_pub=SimpleNamespace(publish=sent.append))
    monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: shell)
    poster = Poster()
    poster.display({"text/plain": "view"}, lambda: pytest.fail("drawn without a kernel"))
    poster.close()
    assert sent == [{"text/plain": "view"}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(240)
def test_an_executed_notebook_shows_it_where_there_is_no_widget(catalog, tmp_path):
    setup = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "from word_encoder import WordEncoder\nimport clipbranches_widget as cb\n"
        f"session = cb.Session(cb.open({str(catalog.path)!r}), {str(tmp_path / 'n.jsonl')!r}, "
        "encoder=WordEncoder())\n_ = session.search('striped bird')"
    )
    explore = "explorer = cb.Explorer(session)\nexplorer"
    label_and_wait = (
        "import threading, time\n_ = session.label(positive=[530, 350])\ndone = threading.Event()\n"
        "explorer._ui.post(done.set)\ndone.wait()\n"
        "while explorer._poster._lane._is_running: time.sleep(0.05)"
    )
    cells = [setup, explore, label_and_wait]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, store_widget_state=False, timeout=120).execute()
    view, picture = notebook.cells[1].outputs
    assert "application/vnd.jupyter.widget-view+json" in view.data
    assert view.data["text/plain"].startswith("<Explorer of 600 images")
    assert "2 yes, 0 no" in picture.data["text/html"]
    assert len(json.dumps(picture.data)) < MAX_PICTURE_BYTES
    page, _ = HTMLExporter().from_notebook_node(notebook)
    assert 'class="cbw-still"' in page
    assert page.count("data:image/webp") >= 8
    safe, _ = HTMLExporter(sanitize_html=True).from_notebook_node(notebook)
    assert "60 nearest images" in safe
