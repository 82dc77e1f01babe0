"""The Explorer's map on the kernel side: real sessions, recorded messages, no browser."""

from __future__ import annotations

import threading
import time

import comm
import numpy as np
import pytest
from comm.base_comm import BaseComm
from word_encoder import WordEncoder, build_catalog

from clipbranches_widget import explorer_map
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.catalog_map import MAX_COORDINATE
from clipbranches_widget.errors import CatalogError
from clipbranches_widget.explorer import Explorer
from clipbranches_widget.explorer_map import CONFIRM_ABOVE, N_BRANCHES, N_SHADES, OTHER_BRANCHES
from clipbranches_widget.map_build import build_map
from clipbranches_widget.session import Session

N_ROWS = 700


class RecordingComm(BaseComm):
    """A comm that keeps the bulk messages."""

    def __init__(self, *args, **kwargs):
        self.bulk = []
        super().__init__(*args, **kwargs)

    def publish_msg(self, _type, data=None, buffers=None, **_keys):
        content = (data or {}).get("content", {})
        if content.get("method") == "bulk":
            self.bulk.append((*content["args"], buffers))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalog") / "words.cbcat"
    return build_map(build_catalog(folder, N_ROWS), max_points=650)


@pytest.fixture
def session(catalog, tmp_path):
    return Session(catalog, tmp_path / "s.jsonl", encoder=WordEncoder())


@pytest.fixture
def explore(monkeypatch):
    """Return a function that makes an Explorer with its map open; all closed at the end."""
    monkeypatch.setattr(comm, "create_comm", RecordingComm)
    made = []

    def make(session):
        explorer = Explorer(session)
        made.append(explorer)
        explorer.vue_dock({"name": "map"})
        settle(explorer)
        return explorer

    yield make
    for explorer in made:
        explorer.close()


@pytest.fixture
def mapping(session, explore):
    """Return an Explorer whose map a view has asked for."""
    explorer = explore(session)
    act(explorer, "points")
    return explorer


def settle(explorer):
    """Wait until everything posted so far, and what it posted in turn, is done."""
    for lane in (explorer._work, explorer._ui, explorer._ui):
        done = threading.Event()
        lane.post(done.set)
        assert done.wait(60)


def act(explorer, action, **data):
    explorer.vue_part({"part": "map", "action": action, "data": data})
    settle(explorer)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sent(explorer, kind, dtype):
    """Return the arrays of the latest message of a kind."""
    settle(explorer)
    part, _, key, buffers = [each for each in explorer.comm.bulk if each[1] == kind][-1]
    assert (part, key) == ("map", explorer.session.catalog.map.name)
    return [np.frombuffer(buffer, dtype) for buffer in buffers]


def kinds_sent(explorer):
    settle(explorer)
    kinds = [each[1] for each in explorer.comm.bulk]
    explorer.comm.bulk.clear()
    return kinds


EVERYTHING = [
    -1,
    -1,
    MAX_COORDINATE + 1,
    -1,
    MAX_COORDINATE + 1,
    MAX_COORDINATE + 1,
    -1,
    MAX_COORDINATE + 1,
]
LEFT_HALF = [-1, -1, 30_000, -1, 30_000, 70_000, -1, 70_000]


# -- points, colours, labels -----------------------------------------------------------------------


def test_a_view_gets_the_points_it_asks_for(mapping, catalog):
    state = mapping.map
    assert (state["status"], state["n_rows"], state["n_points"]) == ("ready", N_ROWS, 650)
    points, _ = sent(mapping, "points", "<u2")
    assert np.array_equal(points.reshape(-1, 2), catalog.map.points)
    _, rows = sent(mapping, "points", "<u4")
    assert np.array_equal(rows, catalog.map.rows)
    (colors,) = sent(mapping, "colors", np.uint8)
    assert colors.tolist() == [0] * 650
    assert state["summary"].startswith("Map of 650 of 700, near ones")
    assert "0 marked yes, 0 marked no" in state["summary"]


def test_nothing_is_sent_before_a_view_asks_and_after_the_panel_closed(session, explore):
    explorer = explore(session)
    assert explorer.map["status"] == "ready"
    assert kinds_sent(explorer) == []
    act(explorer, "points")
    assert kinds_sent(explorer) == ["points", "colors", "labels", "lasso"]
    explorer.vue_dock({"name": ""})
    session.label(positive=[1])
    assert kinds_sent(explorer) == []
    explorer.vue_dock({"name": "map"})
    act(explorer, "points")
    assert kinds_sent(explorer) == ["points", "colors", "labels", "lasso"]


def test_only_what_changed_is_sent_again(mapping, session):
    kinds_sent(mapping)
    session.label(positive=[1])
    assert kinds_sent(mapping) == ["labels"]
    session.search("bird", k=50)
    assert kinds_sent(mapping) == ["colors"]
    act(mapping, "color", by="label")
    assert kinds_sent(mapping) == ["colors"]
    act(mapping, "lasso", corners=LEFT_HALF)
    assert kinds_sent(mapping) == ["lasso"]
    mapping.vue_go({"tab": "catalog", "page": 2})
    assert kinds_sent(mapping) == []


def test_labels_go_by_their_points(mapping, session, catalog):
    absent = np.setdiff1d(np.arange(N_ROWS), catalog.map.rows)
    session.label(positive=[*catalog.map.rows[[3, 9]], absent[0]], negative=catalog.map.rows[[5]])
    yes, no = sent(mapping, "labels", "<u4")
    assert (yes.tolist(), no.tolist()) == ([3, 9], [5])
    assert "2 marked yes, 1 marked no" in mapping.map["summary"]


def test_colours_of_a_search_and_of_a_round(mapping, session, catalog):
    assert mapping.map["scale"] is None
    hits = session.search("striped bird", k=80)
    (colors,) = sent(mapping, "colors", np.uint8)
    shown = np.isin(catalog.map.rows, hits.rows)
    assert np.array_equal(colors > 0, shown)
    best = np.searchsorted(catalog.map.rows, hits.rows[np.isin(hits.rows, catalog.map.rows)])
    assert (np.diff(colors[best].astype(int)) <= 0).all()
    assert colors.max() == N_SHADES
    assert mapping.map["scale"]["text"] == "similarity to the search"

    session.label(positive=hits.rows[:6], negative=hits.rows[60:66])
    result = session.refine()
    (colors,) = sent(mapping, "colors", np.uint8)
    assert mapping.map["scale"] == {"low": "0.00", "high": "1.00", "text": "score of the round"}
    place = np.searchsorted(catalog.map.rows, result.pool.rows)
    for row, score in zip(result.pool.rows.tolist(), result.pool.scores.tolist(), strict=True):
        (place,) = catalog.map.places_of([row]).tolist() or [None]
        if place is not None:
            assert colors[place] == 1 + min(int(score * N_SHADES), N_SHADES - 1)

    act(mapping, "color", by="answer")
    (colors,) = sent(mapping, "colors", np.uint8)
    assert np.array_equal(colors == 1, np.isin(catalog.map.rows, result.rows))
    assert [entry["n"] for entry in mapping.map["legend"]] == [colors.sum(), 650 - colors.sum()]


def test_colours_of_the_rules(mapping, session, catalog):
    hits = session.search("striped bird", k=80)
    session.label(positive=hits.rows[:6], negative=hits.rows[60:66])
    result = session.refine()
    act(mapping, "color", by="branch")
    (colors,) = sent(mapping, "colors", np.uint8)
    assert colors.max() <= OTHER_BRANCHES
    legend = {entry["id"]: entry for entry in mapping.map["legend"]}
    assert legend[0]["n"] == (colors == 0).sum()
    counts = np.bincount(result.branch_ids, minlength=len(result.branches))
    largest = np.argsort(-counts, kind="stable")[:N_BRANCHES]
    for place in np.flatnonzero(colors):
        branch = result.branch_ids[result.rows == catalog.map.rows[place]][0]
        expected = np.flatnonzero(largest == branch)
        assert colors[place] == (expected[0] + 1 if expected.size else OTHER_BRANCHES)
        if expected.size:
            assert legend[colors[place]]["text"].startswith(f"R{branch + 1}: ")
    assert sum(entry["n"] for entry in legend.values()) == 650


def test_an_unknown_colouring_is_refused(mapping):
    act(mapping, "color", by="smell")
    assert "expected one of score, branch, answer, label" in mapping.notice["text"]
    assert mapping.map["by"] == "score"


# -- the lasso -------------------------------------------------------------------------------------


def test_a_lasso_picks_shows_and_lets_go(mapping, session, catalog):
    act(mapping, "lasso", corners=LEFT_HALF)
    expected = catalog.map.rows[catalog.map.points[:, 0] < 30_000]
    assert 0 < len(expected) < 650
    assert mapping.map["lasso"]["n"] == len(expected)
    (picked,) = sent(mapping, "lasso", "<u4")
    assert np.array_equal(catalog.map.rows[picked], expected)
    assert mapping.view["tab"] == "catalog"

    act(mapping, "show")
    assert (mapping.view["tab"], mapping.view["n_rows"]) == ("lasso", len(expected))
    assert [item["row"] for item in mapping.view["items"]] == expected[:60].tolist()
    assert mapping.view["headline"] == f"{len(expected)} images picked on the map"
    assert mapping.view["extras"]["lasso"]["part"] == "map"
    assert mapping.marks["tabs"]["lasso"] == len(expected)
    session.label(positive=expected[:2])
    settle(mapping)
    assert mapping.view["tab"] == "lasso"
    assert (mapping.map["lasso"]["n_yes"], mapping.map["lasso"]["n_no"]) == (2, 0)

    act(mapping, "close_tab")
    assert mapping.view["tab"] == "catalog"
    assert mapping.map["lasso"]["n"] == len(expected)
    act(mapping, "clear")
    assert mapping.map["lasso"] is None


def test_another_lasso_changes_the_page(mapping, catalog):
    act(mapping, "lasso", corners=LEFT_HALF)
    act(mapping, "show")
    act(mapping, "lasso", corners=EVERYTHING)
    assert mapping.view["n_rows"] == 650
    act(mapping, "lasso", corners=[-9, -9, -5, -9, -5, -5])
    assert mapping.view["tab"] == "catalog"
    assert mapping.map["lasso"]["n"] == 0
    act(mapping, "show")
    assert mapping.view["tab"] == "catalog"


def test_the_tab_stays_when_the_panel_closes(mapping):
    act(mapping, "lasso", corners=LEFT_HALF)
    act(mapping, "show")
    mapping.vue_dock({"name": ""})
    settle(mapping)
    assert mapping.view["tab"] == "lasso"
    act(mapping, "close_tab")
    assert mapping.view["tab"] == "catalog"


def test_a_lasso_is_labelled_in_one_step(mapping, session):
    act(mapping, "lasso", corners=LEFT_HALF)
    n = mapping.map["lasso"]["n"]
    assert n <= CONFIRM_ABOVE
    act(mapping, "label", value=-1)
    assert len(session.labels.negative) == n
    act(mapping, "label", value=1)
    assert (len(session.labels.positive), len(session.labels.negative)) == (n, 0)
    session.undo()
    assert len(session.labels.negative) == n
    session.undo()
    assert len(session.labels) == 0
    act(mapping, "label", value=0)
    assert not mapping.session.can_undo


def test_many_images_need_a_confirmation(mapping, session):
    act(mapping, "lasso", corners=EVERYTHING)
    act(mapping, "label", value=1)
    assert "expected a confirmation to label 650 images at once" in mapping.notice["text"]
    assert len(session.labels) == 0
    act(mapping, "label", value=1, is_confirmed=True)
    assert len(session.labels.positive) == 650


@pytest.mark.parametrize(
    ("corners", "message"),
    [
        ([1, 2, 3], "expected up to 2000 corners x, y, x, y, ..., got 3 numbers"),
        ([0] * 5000, "got 5000 numbers"),
        ([1, 2, 3, 4], "expected three or more corners"),
    ],
)
def test_a_bad_lasso_is_refused(mapping, corners, message):
    act(mapping, "lasso", corners=corners)
    assert mapping.notice["kind"] == "error"
    assert message in mapping.notice["text"]
    assert mapping.map["lasso"] is None


def test_label_and_show_without_a_lasso_do_nothing(mapping, session):
    act(mapping, "label", value=1)
    act(mapping, "show")
    assert len(session.labels) == 0
    assert mapping.view["tab"] == "catalog"


# -- a catalog without a map -----------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path):
    return build_catalog(tmp_path / "bare.cbcat", 200)


def test_a_catalog_without_a_map_gets_one(bare, tmp_path, explore, monkeypatch):
    explorer = explore(Session(bare, tmp_path / "s.jsonl", encoder=WordEncoder()))
    assert explorer.map["status"] == "none"
    assert explorer.map["can_compute"]
    act(explorer, "lasso", corners=LEFT_HALF)
    act(explorer, "points")
    assert kinds_sent(explorer) == []
    act(explorer, "compute")
    wait_for(lambda: explorer.map["status"] == "ready")
    assert explorer.map["n_points"] == 200
    act(explorer, "points")
    points, _ = sent(explorer, "points", "<u2")
    assert np.array_equal(points.reshape(-1, 2), Catalog.open(bare.path).map.points)


def test_computing_shows_progress_and_can_be_cancelled(bare, tmp_path, explore, monkeypatch):
    started, go_on = threading.Event(), threading.Event()

    def slow(catalog, *, progress, cancel):
        progress("map", 37, 100)
        started.set()
        assert go_on.wait(60)
        return build_map(catalog, progress=progress, cancel=cancel)

    monkeypatch.setattr(explorer_map, "build_map", slow)
    session = Session(bare, tmp_path / "s.jsonl", encoder=WordEncoder())
    explorer = explore(session)
    act(explorer, "compute")
    assert started.wait(60)
    wait_for(lambda: explorer.map.get("fraction") == 0.37)
    assert explorer.map["status"] == "computing"
    act(explorer, "compute")  # the second click starts nothing
    session.search("bird")  # everything else goes on
    settle(explorer)
    assert explorer.view["tab"] == "hits"
    act(explorer, "cancel")
    go_on.set()
    wait_for(lambda: explorer.notice.get("text") == "Cancelled.")
    assert explorer.map["status"] == "none"
    assert bare.map is None


def test_what_goes_wrong_is_shown(bare, tmp_path, explore, monkeypatch):
    def failing(*_args, **_options):
        raise CatalogError("expected room, got none")

    monkeypatch.setattr(explorer_map, "build_map", failing)
    explorer = explore(Session(bare, tmp_path / "s.jsonl", encoder=WordEncoder()))
    act(explorer, "compute")
    wait_for(lambda: explorer.notice.get("kind") == "error")
    assert explorer.notice["text"] == "expected room, got none"
    assert explorer.map["status"] == "none"


def test_without_the_library_the_panel_says_so(bare, tmp_path, explore, monkeypatch):
    monkeypatch.setattr(explorer_map, "is_available", lambda: False)
    explorer = explore(Session(bare, tmp_path / "s.jsonl", encoder=WordEncoder()))
    assert not explorer.map["can_compute"]


def test_a_map_made_in_a_cell_shows_when_the_panel_is_opened(bare, tmp_path, explore):
    explorer = explore(Session(bare, tmp_path / "s.jsonl", encoder=WordEncoder()))
    build_map(bare)
    explorer.vue_dock({"name": ""})
    explorer.vue_dock({"name": "map"})
    settle(explorer)
    assert explorer.map["status"] == "ready"
