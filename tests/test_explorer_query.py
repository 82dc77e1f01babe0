"""The Explorer's query bar on the kernel side: real sessions, no browser."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from explorer_rig import settle, wait_for
from PIL import Image
from word_encoder import WordEncoder, build_catalog

from clipbranches_widget.explorer_query import MAX_UPLOAD_BYTES, N_HISTORY
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.session import Session

N_ROWS = 900


class SizeEncoder(WordEncoder):
    """Images meet words in the names of their sizes."""

    def encode_images(self, images):
        return self.encode_text([f"{image.width} wide" for image in images])


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalog")
    words = build_catalog(folder / "words.cbcat", N_ROWS)
    items = pa.table(
        {
            "caption": words.items.column("caption"),
            "group": [("animals", "food", "<i>x</i>")[row % 3] for row in range(N_ROWS)],
            "stars": [row % 5 for row in range(N_ROWS)],
            "sold": [row % 2 == 0 for row in range(N_ROWS)],
            "many": [f"value {row}" for row in range(N_ROWS)],
        }
    )
    path = folder / "items.cbcat"
    return from_embeddings(words.embeddings, path, items=items)


@pytest.fixture
def session(catalog, tmp_path):
    return Session(catalog, tmp_path / "s.jsonl", encoder=SizeEncoder())


def act(explorer, asked, buffers=(), **data):
    """Deliver an event of the query bar as the comm would, and wait for what follows."""
    content = {"event": "part", "data": {"part": "query", "action": asked, "data": data}}
    message = {"method": "custom", "content": content}
    views = [memoryview(each) for each in buffers]
    explorer._handle_msg({"content": {"data": message}, "buffers": views})
    settle(explorer)


def send_image(explorer, name, data, *, number=7, piece=2**20):
    for start in range(0, len(data), piece):
        part = [data[start : start + piece]]
        act(explorer, "image", part, number=number, name=name, n_bytes=len(data))


def shown(explorer):
    return [item["row"] for item in explorer.view["items"]]


def png(width):
    file = io.BytesIO()
    Image.new("RGB", (width, 8)).save(file, "PNG")
    return file.getvalue()


def test_before_the_first_search(session, explore):
    assert explore(session).query == {
        "text": "",
        "kind": "",
        "picture": 0,
        "phrases": [],
        "history": [],
        "filters": [],
        "n_passing": N_ROWS,
        "n_total": N_ROWS,
        "columns": [],
    }


def test_phrases_are_told_as_they_were_understood(session, explore):
    explorer = explore(session)
    act(explorer, "search", text="beach + <b>sun</b>^2 -people")
    assert explorer.query["phrases"] == [
        {"text": "beach", "weight": 1.0},
        {"text": "<b>sun</b>", "weight": 2.0},
        {"text": "people", "weight": -0.5},
    ]
    assert explorer.view["n_rows"] == N_ROWS
    act(explorer, "search", text="t-shirt")
    assert explorer.query["phrases"] == []
    act(explorer, "search", text="-people")
    assert explorer.notice["kind"] == "error"
    assert "got only what to leave out" in explorer.notice["text"]
    assert session.query_text == "t-shirt"


def test_the_history_holds_the_latest_distinct_searches(session, explore):
    explorer = explore(session)
    for text in ["bird", "fish", "bird", *map(str, range(N_HISTORY))]:
        session.search(text)
    settle(explorer)
    texts = [entry["text"] for entry in explorer.query["history"]]
    assert texts == [str(number) for number in reversed(range(N_HISTORY))]
    session.undo()
    settle(explorer)
    assert explorer.query["text"] == str(N_HISTORY - 2)
    texts = [entry["text"] for entry in explorer.query["history"]]
    assert texts[:2] == [str(N_HISTORY - 2), str(N_HISTORY - 1)]
    act(explorer, "again", id=explorer.query["history"][5]["id"])
    assert session.query_text == texts[5]
    assert explorer.view["tab"] == "hits"
    assert explorer.query["history"][0]["text"] == texts[5]
    assert len({entry["text"] for entry in explorer.query["history"]}) == N_HISTORY


def test_a_label_does_not_read_the_history_again(session, explore, monkeypatch):
    session.search("bird")
    explorer = explore(session)
    noted = []
    monkeypatch.setattr(explorer._parts["query"], "_note_searches", lambda: noted.append(1))
    session.label(positive=[1])
    settle(explorer)
    assert noted == []
    session.search("fish")
    settle(explorer)
    assert noted


@pytest.mark.parametrize("piece", [2**20, 40])
def test_an_image_is_searched_by(session, explore, piece):
    explorer = explore(session)
    send_image(explorer, "my image.png", png(31), number=11, piece=piece)
    vector = SizeEncoder().encode_text(["31 wide"])[0]
    np.testing.assert_allclose(session.query.vector, vector, atol=1e-6)
    assert session.query_text == "image my image.png"
    assert (explorer.query["kind"], explorer.query["picture"]) == ("image", 11)
    assert explorer.query["history"][0]["picture"] == 11
    assert "PNG" not in repr(explorer.query)
    act(explorer, "search", text="bird")
    assert explorer.query["picture"] == 0
    act(explorer, "again", id=explorer.query["history"][1]["id"])
    assert (explorer.query["text"], explorer.query["picture"]) == ("image my image.png", 11)


def test_pieces_of_another_image_do_not_mix(session, explore):
    explorer = explore(session)
    act(explorer, "image", [b"lost"], number=1, name="a.png", n_bytes=90)
    send_image(explorer, "b.png", png(12), number=2)
    assert session.query_text == "image b.png"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no image", "a.png cannot be searched by: "),
        (png(9)[:45], "a.png cannot be searched by: "),
    ],
)
def test_a_broken_image_is_told(session, explore, data, message):
    explorer = explore(session)
    send_image(explorer, "a.png", data)
    assert explorer.notice["kind"] == "error"
    assert message in explorer.notice["text"]
    assert session.history == []
    assert explorer.task["name"] == ""


@pytest.mark.parametrize("n_bytes", [0, MAX_UPLOAD_BYTES + 1])
def test_an_image_too_large_is_refused_at_its_first_piece(session, explore, n_bytes):
    explorer = explore(session)
    act(explorer, "image", [b"x"], number=1, name="a.png", n_bytes=n_bytes)
    assert "expected an image of 1 byte to 20 MB, got" in explorer.notice["text"]


def test_images_like_those_marked_yes(session, explore):
    explorer = explore(session)
    act(explorer, "like_yes")
    assert "expected images marked yes" in explorer.notice["text"]
    session.label(positive=[8, 6], negative=[5])
    act(explorer, "like_yes")
    assert explorer.query["text"] == "more like rows 6, 8"
    assert explorer.query["kind"] == "row"


def test_columns_are_looked_at_when_asked(session, explore):
    explorer = explore(session)
    act(explorer, "columns")
    wait_for(lambda: explorer.query["columns"])
    columns = {column["name"]: column for column in explorer.query["columns"]}
    assert list(columns) == ["caption", "group", "stars", "sold", "many"]
    assert [column["kind"] for column in columns.values()] == [
        "text", "category", "number", "flag", "text"
    ]  # fmt: skip
    assert columns["group"]["counts"] == (("<i>x</i>", 300), ("animals", 300), ("food", 300))


def test_controls_set_and_take_away_conditions(session, explore):
    explorer = explore(session)
    act(explorer, "filter", column="group", test="any_of", values=["food"])
    act(explorer, "filter", column="stars", test="range", values=[2, None])
    act(explorer, "filter", column="caption", test="contains", values=["7"])
    act(explorer, "filter", column="sold", test="is", values=[True])
    assert session.filters == {
        "caption": "7", "group": ["food"], "sold": True, "stars": (2, None)
    }  # fmt: skip
    assert explorer.query["n_passing"] == session.passing.sum()
    assert explorer.query["filters"][0] == {
        "column": "caption", "text": "caption contains '7'", "test": "contains", "values": ["7"]
    }  # fmt: skip
    for column, test, values in [
        ("caption", "contains", [""]),
        ("group", "any_of", []),
        ("sold", "is", []),
        ("stars", "range", [None, None]),
    ]:
        act(explorer, "filter", column=column, test=test, values=values)
        assert column not in session.filters
    assert explorer.notice == {}
    act(explorer, "filter", column="stars", test="range", values=[5, 2])
    assert "min is above max" in explorer.notice["text"]


def test_pages_show_only_rows_that_match(session, explore):
    session.search("bird", k=90)
    session.label(positive=[3, 4, 10], negative=[7, 8])
    explorer = explore(session)
    act(explorer, "filter", column="group", test="any_of", values=["food"])
    assert explorer.view["tab"] == "hits"
    assert all(row % 3 == 1 for row in shown(explorer))
    assert explorer.view["n_rows"] == 90
    assert explorer.marks["tabs"] == {"hits": 90, "yes": 2, "no": 1, "catalog": 300}
    explorer.vue_go({"tab": "catalog", "page": 4})
    settle(explorer)
    assert shown(explorer) == list(range(721, 900, 3))
    assert explorer.view["headline"] == "300 of 900 images in the catalog"
    act(explorer, "filter", column="stars", test="range", values=[2, None])
    assert explorer.view["tab"] == "catalog"
    session.undo()
    settle(explorer)
    assert explorer.view["tab"] == "catalog"
    act(explorer, "clear_filters")
    assert explorer.view["n_rows"] == N_ROWS
    assert explorer.view["tab"] == "catalog"
    session.search("fish")
    settle(explorer)
    assert explorer.view["tab"] == "hits"


def test_a_filter_of_very_many_values_is_shown_in_words(session, explore):
    session.filter({"many": [f"value {row}" for row in range(100)]})
    (shown_filter,) = explore(session).query["filters"]
    assert shown_filter["values"] == []
    assert shown_filter["text"].endswith(" or 95 more")
