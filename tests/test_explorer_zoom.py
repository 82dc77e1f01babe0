"""The zoom's kernel side: real sessions, recorded comm messages, no browser."""

from __future__ import annotations

import io

import comm
import pyarrow as pa
import pytest
from comm.base_comm import BaseComm
from explorer_rig import settle
from PIL import Image
from word_encoder import WordEncoder, build_catalog, captions

from clipbranches_widget.explorer import Explorer
from clipbranches_widget.explorer_zoom import MAX_FACT_CHARS, facts, zoomed
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.session import Session

N_ROWS = 200
LONG = "z" * 50_000


class RecordingComm(BaseComm):
    """A comm that keeps what the widget sends."""

    def __init__(self, *args, **kwargs):
        self.sent = []
        super().__init__(*args, **kwargs)

    def publish_msg(self, msg_type, data=None, metadata=None, buffers=None, **_keys):  # noqa: ARG002
        getattr(self, "sent", []).append((data or {}, buffers or []))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "p.cbcat"
    return build_catalog(path, N_ROWS, with_images=True)


@pytest.fixture
def session(catalog, tmp_path):
    return Session(catalog, tmp_path / "s.jsonl", encoder=WordEncoder())


@pytest.fixture
def explorer(session, monkeypatch):
    monkeypatch.setattr(comm, "create_comm", RecordingComm)
    made = Explorer(session)
    settle(made)
    yield made
    made.close()


def act(explorer, event, **data):
    content = {"method": "custom", "content": {"event": event, "data": data}}
    explorer._handle_msg({"content": {"data": content}, "buffers": []})
    settle(explorer)


def zoom(explorer, action, **data):
    act(explorer, "part", part="zoom", action=action, data=data)
    return explorer.zoom


def pictures(explorer):
    """Return row, kind, problem and bytes of every picture sent for the zoom."""
    return [
        (*data["content"]["args"], buffers[0])
        for data, buffers in explorer.comm.sent
        if data.get("method") == "custom" and data["content"]["method"] == "zoom_image"
    ]


def test_nothing_is_zoomed_at_first_nor_after_closing(explorer):
    assert explorer.zoom == {}
    assert zoom(explorer, "open", row=7)["row"] == 7
    assert zoom(explorer, "close") == {}
    assert zoom(explorer, "step", by=1) == {}


def test_what_is_told_of_an_image(explorer, catalog):
    state = zoom(explorer, "open", row=7)
    assert (state["rank"], state["n_rows"]) == (7, N_ROWS)
    assert (state["previous"], state["next"]) == (6, 8)
    assert (state["score"], state["branch"], state["rule"]) == ("", -1, "")
    assert state["caption"] == captions(N_ROWS)[7]
    assert state["facts"] == [
        ("row", "7"),
        ("caption", captions(N_ROWS)[7]),
        ("uri", catalog.uri(7)),
    ]


def test_score_and_rule_of_a_match(explorer, session):
    session.search("bird", k=100)
    birds = [row for row, said in enumerate(captions(N_ROWS)) if " bird" in said]
    session.label(positive=birds[:4])
    result = session.refine()
    settle(explorer)
    rank = len(result) - 1
    state = zoom(explorer, "open", row=int(result.rows[rank]))
    assert state["rank"] == rank
    assert state["score"] == f"{result.scores[rank]:.3f}"
    assert state["branch"] == result.branch_ids[rank]
    assert state["rule"] == result.branch_text(rank)


def test_steps_go_through_the_whole_ranking_and_the_page_follows(explorer, session):
    hits = session.search("fish", k=130)
    settle(explorer)
    zoom(explorer, "open", row=int(hits.rows[58]))
    walked = [zoom(explorer, "step", by=1)["row"] for _ in range(3)]
    assert walked == hits.rows[59:62].tolist()
    assert explorer.view["page"] == 1
    zoom(explorer, "step", by=-1)
    assert zoom(explorer, "step", by=-1)["row"] == hits.rows[59]
    assert explorer.view["page"] == 0


def test_the_ends_of_the_ranking_have_one_neighbour(explorer):
    assert zoom(explorer, "open", row=0)["previous"] is None
    assert zoom(explorer, "step", by=-1)["row"] == 0
    assert zoom(explorer, "open", row=N_ROWS - 1)["next"] is None
    assert zoom(explorer, "step", by=1)["row"] == N_ROWS - 1


def test_a_label_change_that_takes_the_row_from_its_tab_keeps_the_neighbours(explorer, session):
    session.label(positive=[10, 20, 30, 40])
    act(explorer, "go", tab="yes", page=0)
    assert zoom(explorer, "open", row=20)["rank"] == 1
    act(explorer, "label", rows=[20], value=-1)
    state = explorer.zoom
    assert (state["row"], state["rank"]) == (20, None)
    assert (state["previous"], state["next"]) == (10, 30)
    assert explorer.marks["rows"]["20"] == -1
    assert zoom(explorer, "step", by=1)["row"] == 30


def test_a_row_that_is_not_in_the_tab_has_no_neighbours(explorer, session):
    session.label(positive=[10, 20])
    act(explorer, "go", tab="yes", page=0)
    state = zoom(explorer, "open", row=5)
    assert (state["rank"], state["previous"], state["next"]) == (None, None, None)


def test_the_label_of_a_zoomed_row_off_the_page_reaches_the_browser(explorer, session):
    session.label(negative=[150])
    zoom(explorer, "open", row=150)
    assert explorer.view["page"] == 0
    assert explorer.marks["rows"] == {"150": -1}


def test_a_row_that_is_not_there_is_told(explorer):
    zoom(explorer, "open", row=N_ROWS)
    assert explorer.zoom == {}
    assert f"expected row ids from 0 to {N_ROWS - 1}" in explorer.notice["text"]


def test_pictures_are_sent_as_messages(explorer):
    explorer.comm.sent.clear()
    zoom(explorer, "image", rows=[3, 4])
    assert [(row, kind, problem) for row, kind, problem, _ in pictures(explorer)] == [
        (3, "full", ""),
        (4, "full", ""),
    ]
    assert Image.open(io.BytesIO(pictures(explorer)[0][3])).size == (200, 150)
    assert "zoom" not in {name for data, _ in explorer.comm.sent for name in data.get("state", {})}


def test_a_lost_original_is_told_and_the_thumbnail_sent(tmp_path, catalog):
    path = tmp_path / "picture.png"
    Image.new("RGB", (400, 300), "green").save(path)
    vectors = WordEncoder().encode_text(["bird", "fish"])
    made = from_embeddings(vectors, tmp_path / "c.cbcat", items=pa.table({"uri": [str(path)] * 2}))
    assert zoomed(made, 0)[:2] == ("full", "")
    thumbnail = made.thumbnail(0)
    path.unlink()
    kind, problem, data = zoomed(made, 0)
    assert kind in {"small", "none"}
    assert "picture.png" in problem
    assert data == (thumbnail if kind == "small" else b"")
    kind, problem, data = zoomed(catalog, 9)
    assert (kind, data) == ("none", b"")
    assert "row 9" in problem


def test_an_image_larger_than_the_zoom_is_scaled_down(tmp_path):
    path = tmp_path / "large.png"
    Image.new("RGB", (3200, 1000), "green").save(path)
    items = pa.table({"uri": [str(path)]})
    made = from_embeddings(WordEncoder().encode_text(["bird"]), tmp_path / "c.cbcat", items=items)
    _, _, data = zoomed(made, 0)
    assert Image.open(io.BytesIO(data)).size == (1600, 500)


def test_facts_are_text_and_bounded(tmp_path):
    items = pa.table(
        {
            "uri": ["a"],
            "caption": ["<b>bold</b>"],
            "price": [0.1 + 0.2],
            "tags": [["x", "y"]],
            "nothing": pa.array([None], pa.string()),
            "raw": pa.array([b"\x00\x01"], pa.binary()),
            "long": [LONG],
        }
    )
    made = from_embeddings(WordEncoder().encode_text(["bird"]), tmp_path / "c.cbcat", items=items)
    told = dict(facts(made, 0))
    assert told.pop("long") == LONG[: MAX_FACT_CHARS - 1] + "\u2026"
    assert told == {
        "row": "0",
        "caption": "<b>bold</b>",
        "uri": "a",
        "price": "0.3",
        "tags": '["x", "y"]',
        "raw": "2 bytes",
    }


def test_more_like_this_is_a_search_and_closes_the_zoom(explorer, session):
    zoom(explorer, "open", row=42)
    assert zoom(explorer, "more", row=42) == {}
    assert session.hits.rows[0] == 42
    assert len(session.hits) == N_ROWS
    assert explorer.view["tab"] == "hits"
    assert explorer.task["name"] == ""
