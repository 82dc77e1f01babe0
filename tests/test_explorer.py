"""The kernel side of the Explorer: real sessions, recorded comm messages, no browser."""

from __future__ import annotations

import dataclasses
import io
import logging
import threading
import time

import numpy as np
import pytest
from comm.base_comm import BaseComm
from PIL import Image
from word_encoder import WordEncoder, build_catalog

from clipbranches_widget import refine
from clipbranches_widget.explorer import Explorer
from clipbranches_widget.explorer_lanes import Lane
from clipbranches_widget.explorer_rules import branch_view
from clipbranches_widget.explorer_view import (
    MAX_CAPTION_CHARS,
    PAGE_SIZE,
    Contents,
    Place,
    marks_view,
    page_view,
)
from clipbranches_widget.session import Session

N_ROWS = 900


class RecordingComm(BaseComm):
    """A comm that keeps what the widget sends."""

    def __init__(self, *args, **kwargs):
        self.sent = []
        super().__init__(*args, **kwargs)

    def publish_msg(self, msg_type, data=None, metadata=None, buffers=None, **_keys):  # noqa: ARG002
        getattr(self, "sent", []).append((msg_type, data or {}, buffers or []))

    def states(self):
        return [data["state"] for _, data, _ in self.sent if data.get("method") == "update"]

    def images(self):
        """Return ``{row: bytes}`` of every thumbnail sent."""
        found = {}
        for _, data, buffers in self.sent:
            if data.get("method") == "custom" and data["content"]["method"] == "thumbs":
                (rows,) = data["content"]["args"]
                found.update(zip(rows, buffers, strict=True))
        return found


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return build_catalog(tmp_path_factory.mktemp("catalog") / "words.cbcat", N_ROWS)


@pytest.fixture
def session(catalog, tmp_path):
    return Session(catalog, tmp_path / "s.jsonl", encoder=WordEncoder())


@pytest.fixture
def comm_class():
    return RecordingComm


def settle(*explorers):
    """Wait until everything posted so far, and what it posted in turn, is done."""
    for explorer in explorers:
        ui, work, *reading = explorer._lanes
        for lane in (ui, work, ui, *reading, ui):
            done = threading.Event()
            lane.post(done.set)
            assert lane._is_closed or done.wait(60)


def act(explorer, event, **data):
    """Deliver a browser event as the comm would, and wait for what follows."""
    send(explorer, event, **data)
    settle(explorer)


def send(explorer, event, **data):
    """Deliver a browser event as the comm would."""
    content = {"method": "custom", "content": {"event": event, "data": data}}
    explorer._handle_msg({"content": {"data": content}, "buffers": []})


def shown(explorer):
    return [item["row"] for item in explorer.view["items"]]


def rows_of(catalog, noun):
    words = catalog.items.column("caption").to_pylist()
    return [row for row, caption in enumerate(words) if f" {noun} " in caption]


# -- what a page shows: pure functions ------------------------------------------------------------


def test_an_empty_session_shows_the_catalog(session):
    contents = Contents.of(session)
    place = contents.settle(Place(tab=""))
    view = page_view(contents, place)
    assert (view["tab"], view["page"], view["n_pages"]) == ("catalog", 0, N_ROWS // PAGE_SIZE)
    assert [item["row"] for item in view["items"]] == list(range(PAGE_SIZE))
    assert view["headline"] == "900 images in the catalog"
    assert view["range"] == "1\u201360 of 900"
    assert marks_view(contents, place) == {
        "rows": {},
        "n_yes": 0,
        "n_no": 0,
        "tabs": {"catalog": N_ROWS},
        "is_stale": False,
        "can_undo": False,
        "can_redo": False,
    }


def test_pages_cover_a_search_in_rank_order(session):
    hits = session.search("bird", k=130)
    contents = Contents.of(session)
    pages = [page_view(contents, contents.settle(Place("hits", page))) for page in range(3)]
    items = [item for page in pages for item in page["items"]]
    assert [item["row"] for item in items] == hits.rows.tolist()
    assert [item["score"] for item in items] == [f"{score:.3f}" for score in hits.scores]
    assert [page["range"] for page in pages] == [
        "1\u201360 of 130",
        "61\u2013120 of 130",
        "121\u2013130 of 130",
    ]
    assert "130 nearest images to \u201cbird\u201d in " in pages[0]["headline"]


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (Place("hits", 99), Place("hits", 2)),
        (Place("hits", -5), Place("hits", 0)),
        (Place("result", 1), Place("hits", 1)),
        (Place("nonsense", 0), Place("hits", 0)),
    ],
)
def test_a_place_that_does_not_exist_becomes_the_nearest_that_does(session, asked, given):
    session.search("bird", k=130)
    assert Contents.of(session).settle(asked) == given


def test_the_answer_of_a_round_is_shown_with_its_rules(session, catalog):
    session.search("bird", k=60)
    session.label(positive=rows_of(catalog, "bird")[:5], negative=rows_of(catalog, "fish")[:3])
    result = session.refine()
    contents = Contents.of(session)
    assert contents.best_tab() == "result"
    view = page_view(contents, contents.settle(Place("result")))
    assert [item["row"] for item in view["items"]] == result.rows[:PAGE_SIZE].tolist()
    assert [item["branch"] for item in view["items"]] == result.branch_ids[:PAGE_SIZE].tolist()
    assert view["headline"].startswith(f"{len(result):,} matching image")
    assert view["headline"].endswith("of the catalog scored")
    assert view["notes"] == list(result.notes)
    assert [branch["n_rows"] for branch in branch_view(result)] == [
        branch.n_rows for branch in result.branches
    ]


def test_the_later_of_search_and_round_opens_first(session, catalog):
    session.label(positive=rows_of(catalog, "bird")[:3])
    session.search("bird")
    session.refine()
    assert Contents.of(session).best_tab() == "result"
    session.search("fish")
    assert Contents.of(session).best_tab() == "hits"
    session.undo()
    assert Contents.of(session).best_tab() == "result"


def test_a_hostile_caption_stays_text_and_a_long_one_is_cut(session):
    items = page_view(Contents.of(session), Place("catalog"))["items"]
    assert items[0]["caption"] == '<img src=x onerror="window.cbw_hacked = true">'
    assert len(items[2]["caption"]) == MAX_CAPTION_CHARS
    assert items[2]["caption"].endswith("\u2026")
    assert items[4]["caption"] == ""


class Millions:
    """Two million rows that can be sliced a page at a time, and nothing else."""

    def __len__(self):
        return 2_000_000

    def __getitem__(self, part):
        assert isinstance(part, slice)
        assert part.stop - part.start <= PAGE_SIZE
        return np.arange(part.start, part.stop) % N_ROWS

    def __array__(self, *_arguments, **_options):
        raise AssertionError("the whole ranking was converted")

    __iter__ = tolist = __array__


def test_a_page_of_millions_reads_only_its_slice(session):
    contents = dataclasses.replace(Contents.of(session), ranked={"catalog": Millions()})
    place = contents.settle(Place("catalog", 20_000))
    view = page_view(contents, place)
    assert [item["row"] for item in view["items"]] == list(range(300, 360))
    assert view["range"] == "1,200,001\u20131,200,060 of 2,000,000"
    assert view["n_pages"] == 33_334
    assert marks_view(contents, place)["tabs"] == {"catalog": 2_000_000}


def test_a_part_of_a_ranking_keeps_its_scores(session):
    hits = session.search("bird", k=130)
    part = hits.rows[5::3]
    contents = dataclasses.replace(
        Contents.of(session), ranked={"catalog": range(N_ROWS), "hits": part}
    )
    items = page_view(contents, Place("hits"))["items"]
    assert [item["row"] for item in items] == part.tolist()
    assert [item["score"] for item in items] == [f"{score:.3f}" for score in hits.scores[5::3]]


# -- the widget -----------------------------------------------------------------------------------


def test_a_new_explorer_shows_what_the_session_already_has(session, catalog, explore):
    session.search("bird", k=60)
    session.label(positive=rows_of(catalog, "bird")[:3])
    result = session.refine()
    explorer = explore(session)
    assert explorer.view["tab"] == "result"
    assert explorer.query["text"] == "bird"
    assert shown(explorer) == result.rows[:PAGE_SIZE].tolist()
    assert explorer.marks["n_yes"] == 3
    assert explorer.task["name"] == ""


def test_a_reopened_session_file_shows_labels_and_answer(session, catalog, explore):
    session.search("bird", k=60)
    session.label(positive=rows_of(catalog, "bird")[:3])
    result = session.refine()
    explorer = explore(Session(catalog, session.path))
    assert shown(explorer) == result.rows[:PAGE_SIZE].tolist()
    assert (explorer.marks["n_yes"], explorer.query["text"]) == (3, "bird")


def test_searching_in_the_widget_is_a_search_of_the_session(session, explore):
    explorer = explore(session)
    act(explorer, "part", part="query", action="search", data={"text": "fish"})
    assert session.query_text == "fish"
    assert explorer.view["tab"] == "hits"
    assert shown(explorer) == session.hits.rows[:PAGE_SIZE].tolist()
    assert explorer.task["name"] == ""


def test_labels_go_both_ways(session, explore):
    explorer = explore(session)
    act(explorer, "label", rows=[7], value=1)
    act(explorer, "label", rows=[8], value=-1)
    assert session.labels.to_dict() == {"positive": [7], "negative": [8]}
    assert explorer.marks["rows"] == {"7": 1, "8": -1}
    session.label(negative=[7])
    session.unlabel([8])
    settle(explorer)
    assert explorer.marks["rows"] == {"7": -1}
    act(explorer, "label", rows=[7], value=0)
    assert len(session.labels) == 0


def test_a_repeated_label_message_changes_nothing(session, explore):
    explorer = explore(session)
    act(explorer, "label", rows=[7], value=1)
    act(explorer, "label", rows=[7], value=1)
    assert len(session.history) == 1


def test_a_label_sends_no_page(session, explore):
    explorer = explore(session)
    explorer.comm.sent.clear()
    act(explorer, "label", rows=[7], value=1)
    assert [sorted(state) for state in explorer.comm.states()] == [["marks"]]
    assert explorer.comm.images() == {}


def test_refine_undo_redo_in_the_widget(session, catalog, explore):
    explorer = explore(session)
    act(explorer, "part", part="query", action="search", data={"text": "bird"})
    for row in rows_of(catalog, "bird")[:4]:
        act(explorer, "label", rows=[row], value=1)
    act(explorer, "refine")
    assert explorer.view["tab"] == "result"
    assert explorer.view["n_rows"] == len(session.result)
    stages = [state["task"]["stage"] for state in explorer.comm.states() if "task" in state]
    assert len(set(stages)) > 2
    act(explorer, "undo")
    assert session.result is None
    assert explorer.view["tab"] == "hits"
    assert explorer.marks["can_redo"]
    assert explorer.notice["text"].startswith("Undid: ")
    act(explorer, "redo")
    assert explorer.view["tab"] == "result"


def test_paging_and_tabs(session, explore):
    session.label(positive=[5, 6])
    explorer = explore(session)
    act(explorer, "go", tab="catalog", page=14)
    assert shown(explorer) == list(range(840, 900))
    act(explorer, "go", tab="yes", page=0)
    assert shown(explorer) == [5, 6]
    assert explorer.view["headline"] == "2 images marked yes"
    session.unlabel([5, 6])
    settle(explorer)
    assert explorer.view["tab"] == "catalog"


def test_the_size_of_a_page_can_be_chosen(session, explore):
    explorer = explore(session)
    act(explorer, "go", tab="catalog", page=2, page_size=240)
    assert shown(explorer) == list(range(480, 720))
    assert (explorer.view["n_pages"], explorer.view["page_size"]) == (4, 240)
    session.search("bird", k=130)
    settle(explorer)
    assert len(shown(explorer)) == 130
    act(explorer, "go", tab="catalog", page=99, page_size=7)
    assert explorer.view["range"] == "721\u2013900 of 900"


def test_a_page_is_one_label_action_and_one_undo(session, explore):
    explorer = explore(session)
    act(explorer, "label", rows=[3], value=-1)
    act(explorer, "label", rows=list(range(60)), value=1)
    assert len(session.labels.positive) == 60
    assert len(session.history) == 2
    act(explorer, "undo")
    assert session.labels.to_dict() == {"positive": [], "negative": [3]}


def test_a_cut_caption_is_told_whole(session, explore):
    explorer = explore(session)
    items = explorer.view["items"]
    assert [item["row"] for item in items if item.get("is_cut")] == [2]
    act(explorer, "tell", row=2)
    assert messages(explorer, "caption") == [[2, "x" * 10_000]]


def test_two_explorers_on_one_session_stay_in_step(session, explore):
    one, two = explore(session), explore(session)
    act(one, "part", part="query", action="search", data={"text": "tree"})
    act(one, "label", row=int(session.hits.rows[0]), value=1)
    settle(two)
    assert two.query["text"] == "tree"
    assert shown(two) == shown(one)
    assert two.marks == one.marks


def test_stale_is_told_after_a_label(session, catalog, explore):
    session.label(positive=rows_of(catalog, "bird")[:3])
    session.refine()
    explorer = explore(session)
    assert not explorer.marks["is_stale"]
    act(explorer, "label", rows=[7], value=-1)
    assert explorer.marks["is_stale"]


# -- images ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture_catalog(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "p.cbcat"
    return build_catalog(path, 130, with_images=True)


def messages(explorer, method):
    """Return the arguments of every message of a method, in order."""
    sent = [data["content"] for _, data, _ in explorer.comm.sent if data.get("method") == "custom"]
    return [content["args"] for content in sent if content["method"] == method]


def test_a_page_of_images_is_sent_and_lost_ones_are_empty(picture_catalog, tmp_path, explore):
    explorer = explore(Session(picture_catalog, tmp_path / "s.jsonl"))
    images = explorer.comm.images()
    n_sent = 2 * PAGE_SIZE  # the next page's follow
    assert list(images) == list(range(n_sent))
    assert {row for row, data in images.items() if not data} == set(range(9, n_sent, 10))
    assert all(bytes(data[8:12]) == b"WEBP" for data in images.values() if data)
    assert max(map(len, images.values())) <= 10_240
    assert "WEBP" not in repr(explorer.comm.states())


def test_a_mounted_view_gets_the_images_it_lacks(picture_catalog, tmp_path, explore):
    explorer = explore(Session(picture_catalog, tmp_path / "s.jsonl"))
    explorer.comm.sent.clear()
    act(explorer, "ready", rows=[3, 4, 128])
    assert list(explorer.comm.images()) == [3, 4, 128]


def test_the_next_page_is_sent_ahead_and_not_again(picture_catalog, tmp_path, explore):
    explorer = explore(Session(picture_catalog, tmp_path / "s.jsonl"))
    assert [rows for (rows,) in messages(explorer, "thumbs")] == [
        list(range(60)),
        list(range(60, 120)),
    ]
    explorer.comm.sent.clear()
    act(explorer, "go", tab="catalog", page=1)
    assert list(explorer.comm.images()) == list(range(120, 130))


def test_a_view_that_comes_later_gets_what_was_sent_ahead(picture_catalog, tmp_path, explore):
    explorer = explore(Session(picture_catalog, tmp_path / "s.jsonl"))
    act(explorer, "ready", rows=[], is_new=True)
    explorer.comm.sent.clear()
    act(explorer, "go", tab="catalog", page=1)
    assert list(explorer.comm.images()) == list(range(60, 130))


def test_larger_pictures_are_sent_to_who_asks(picture_catalog, tmp_path, explore):
    explorer = explore(Session(picture_catalog, tmp_path / "s.jsonl"))
    explorer.comm.sent.clear()
    act(explorer, "ready", rows=[3, 9], size=250)
    ((rows, size),) = messages(explorer, "sharp")
    assert (rows, size) == ([3, 9], 320)
    ((_, _, (picture, lost)),) = [each for each in explorer.comm.sent if each[2]]
    assert Image.open(io.BytesIO(picture)).size == (200, 150)  # as large as the original is
    assert lost == b""


# -- trouble --------------------------------------------------------------------------------------


def test_an_expected_error_is_shown_as_it_is(catalog, tmp_path, explore):
    explorer = explore(Session(catalog, tmp_path / "s.jsonl"))
    act(explorer, "part", part="query", action="search", data={"text": "bird"})
    assert explorer.notice["kind"] == "error"
    assert "no text search" in explorer.notice["text"] or "encoder" in explorer.notice["text"]
    assert explorer.task["name"] == ""


def test_a_row_that_is_not_there_is_told(session, explore):
    explorer = explore(session)
    act(explorer, "label", rows=[N_ROWS], value=1)
    assert "expected row ids from 0 to 899" in explorer.notice["text"]
    assert len(session.labels) == 0


@pytest.mark.parametrize("data", [{}, {"row": "x", "value": 1}, {"row": 1}])
def test_a_malformed_message_is_logged_and_shown(session, explore, caplog, data):
    explorer = explore(session)
    with caplog.at_level(logging.ERROR):
        act(explorer, "label", **data)
    assert explorer.notice["kind"] == "error"
    assert explorer.notice["text"].startswith("Unexpected ")
    assert "_label" in caplog.text
    act(explorer, "label", rows=[1], value=1)
    assert session.labels.get(1) == 1


def test_refine_without_labels_or_query_explains_itself(session, explore):
    explorer = explore(session)
    act(explorer, "refine")
    assert explorer.notice["kind"] == "error"
    assert explorer.task["name"] == ""


def test_cancel_stops_a_round_and_leaves_the_session(session, catalog, explore):
    session.label(positive=rows_of(catalog, "bird")[:4])
    explorer = explore(session)
    gate = threading.Event()
    explorer._work.post(gate.wait)
    send(explorer, "refine")
    send(explorer, "cancel")
    gate.set()
    settle(explorer)
    assert session.result is None
    assert explorer.notice["text"] == "Cancelled."
    assert explorer.task["name"] == ""


@pytest.fixture
def held_trees(monkeypatch):
    """Hold every round between its teacher and its trees until the event is set."""
    gate, fit = threading.Event(), refine.fit_forest

    def fit_when_open(*arguments, **options):
        assert gate.wait(60)
        return fit(*arguments, **options)

    monkeypatch.setattr(refine, "fit_forest", fit_when_open)
    yield gate
    gate.set()


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_best_page_is_shown_before_the_round_is_complete(session, catalog, explore, held_trees):
    session.label(positive=rows_of(catalog, "bird")[:4])
    explorer = explore(session)
    send(explorer, "refine")
    wait_for(lambda: explorer.view.get("tab") == "result")
    assert "so far" in explorer.view["headline"]
    assert explorer.view["branches"] == []
    early = shown(explorer)
    held_trees.set()
    settle(explorer)
    assert "so far" not in explorer.view["headline"]
    assert explorer.view["branches"]
    assert shown(explorer)[: len(early)] == early[: len(shown(explorer))]


def test_cancel_does_not_wait_for_the_trees_and_takes_the_early_page_back(
    session, catalog, explore, held_trees
):
    explorer = explore(session)
    act(explorer, "part", part="query", action="search", data={"text": "bird"})
    act(explorer, "label", row=rows_of(catalog, "bird")[0], value=1)
    before = shown(explorer)
    send(explorer, "refine")
    wait_for(lambda: explorer.view.get("tab") == "result")
    act(explorer, "cancel")
    assert explorer.notice["text"] == "Cancelled."
    assert explorer.view["tab"] == "hits"
    assert shown(explorer) == before
    assert session.result is None
    assert not held_trees.is_set()


def test_of_many_searches_in_a_row_the_last_wins(session, explore):
    explorer = explore(session)
    gate = threading.Event()
    explorer._work.post(gate.wait)
    for text in ("bird", "fish", "tree"):
        content = {
            "method": "custom",
            "content": {
                "event": "part",
                "data": {"part": "query", "action": "search", "data": {"text": text}},
            },
        }
        explorer._handle_msg({"content": {"data": content}, "buffers": []})
    gate.set()
    settle(explorer)
    assert [event.action for event in session.history] == ["search"]
    assert session.query_text == "tree"


def test_a_closed_explorer_ignores_messages_and_the_session(session, explore):
    explorer = explore(session)
    explorer.close()
    explorer.vue_label({"rows": [1], "value": 1})
    session.label(positive=[2])
    settle(explorer)
    assert session.labels.to_dict() == {"positive": [2], "negative": []}
    assert explorer.marks["n_yes"] == 0


def test_something_else_than_a_session_is_refused():
    with pytest.raises(TypeError, match="expected a Session or a Catalog, got ndarray"):
        Explorer(np.zeros(3))


def test_a_catalog_gets_a_session_of_its_own(catalog, explore, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    explorer = explore(catalog)
    assert explorer.session.catalog is catalog
    assert repr(explorer) == "<Explorer of 900 images: 0 yes, 0 no>"


def test_a_lane_runs_in_order_and_takes_nothing_once_closed():
    lane, ran, done = Lane("test"), [], threading.Event()
    for number in range(20):
        lane.post(lambda number=number: ran.append((number, threading.get_ident())))
    lane.post(done.set)
    assert done.wait(10)
    lane.close()
    lane.post(lambda: ran.append(None))
    assert [number for number, _ in ran] == list(range(20))
    assert threading.get_ident() not in {thread for _, thread in ran}


def test_a_round_knows_the_clicks_that_came_before_it(session, explore):
    session.search("striped bird")
    explorer, free = explore(session), threading.Event()
    explorer._ui.post(lambda: free.wait(30))
    explorer.vue_label({"rows": [3, 5], "value": 1})
    explorer.vue_refine()
    explorer._work.post(free.set)  # the lane of rounds has nothing to do yet
    settle(explorer)
    assert session.result.labels.positive.tolist() == [3, 5]


def test_cancel_also_stops_a_round_that_has_not_started(session, explore):
    session.search("striped bird")
    session.label(positive=[3])
    explorer, free = explore(session), threading.Event()
    explorer._ui.post(lambda: free.wait(30))
    explorer.vue_refine()
    explorer.vue_cancel()
    free.set()
    settle(explorer)
    assert session.result is None


def test_explorers_share_their_threads(session, explore):
    """One after the other, they need no more threads than a few do, and none is left behind."""

    def names():
        return sorted(t.name for t in threading.enumerate() if t.name.startswith("explorer-"))

    for _ in range(3):
        settle(explore(session))
    first = names()
    assert first
    for _ in range(12):
        settle(explore(session))
    assert len(names()) < len(first) + 12


def test_a_lane_goes_on_after_a_job_that_fails(caplog):
    lane, done = Lane("test"), threading.Event()
    lane.post(lambda: 1 // 0)
    lane.post(done.set)
    assert done.wait(10)
    assert "ZeroDivisionError" in caplog.text
