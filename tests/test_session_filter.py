"""Filters, repeated searches and combined queries of a session, against brute force."""

from __future__ import annotations

import json
import re
import threading

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from word_encoder import NOUNS, WordEncoder, build_catalog

from clipbranches_widget.errors import QueryError, RefineError
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.session import Session

N_ROWS = 900


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filter")
    words = build_catalog(folder / "words.cbcat", N_ROWS)
    items = pa.table(
        {
            "caption": words.items.column("caption"),
            "stars": pa.array([row % 5 if row % 7 else None for row in range(N_ROWS)]),
            "group": [("animals", "food", "sights")[row % 3] for row in range(N_ROWS)],
        }
    )
    path = folder / "items.cbcat"
    return from_embeddings(words.embeddings, path, items=items)


@pytest.fixture
def session(catalog, tmp_path):
    return Session(catalog, tmp_path / "s.jsonl", encoder=WordEncoder())


def rows_of(noun, n):
    return [row for row in range(5, N_ROWS) if NOUNS[row % 60 % 10] == noun][:n]


STARS = np.array([bool(row % 7) and row % 5 >= 2 for row in range(N_ROWS)])


def test_a_filter_lets_matching_rows_pass(session):
    assert session.filters == {}
    assert session.passing.all()
    assert session.filter({"stars": (2, None)}) == STARS.sum()
    assert np.array_equal(session.passing, STARS)
    assert not session.passing.flags.writeable
    assert session.filters == {"stars": (2, None)}
    assert session.filter_texts == {"stars": "stars >= 2"}
    texts = session.catalog.items.column("caption").to_pylist()
    n_birds = sum("bird" in text for text in texts[1::3])
    assert session.filter({"group": ["food"], "caption": "BIRD"}) == n_birds
    assert session.filters == {"caption": "BIRD", "group": ["food"]}
    assert session.filter() == N_ROWS
    assert session.filters == {}


def test_a_search_finds_the_nearest_of_the_matching_rows(session):
    everything = session.search("red bird", k=N_ROWS)
    session.filter({"stars": (2, None)})
    expected = everything.rows[STARS[everything.rows]]
    assert session.hits.rows.tolist() == expected.tolist()
    hits = session.search("red bird", k=25)
    assert hits.rows.tolist() == expected[:25].tolist()
    assert hits.notes == ()
    assert session.hits is hits
    session.filter()
    assert session.hits.rows.tolist() == everything.rows[:25].tolist()


def test_a_round_is_the_unfiltered_one_without_the_other_rows(session):
    session.search("bird")
    session.label(positive=rows_of("bird", 6), negative=rows_of("fish", 4))
    whole = session.refine()
    session.filter({"stars": (2, None)})
    result = session.result
    kept = STARS[whole.rows]
    assert 0 < kept.sum() < len(whole)
    assert result.rows.tolist() == whole.rows[kept].tolist()
    for name in ("scores", "margins", "branch_ids"):
        assert np.array_equal(getattr(result, name), getattr(whole, name)[kept])
    assert [each.n_rows for each in result.branches] == [each.n_rows for each in whole.branches]
    assert all(STARS[list(each.example_rows)].all() for each in result.branches)
    assert (
        result.notes[-1]
        == f"{len(result)} of the {len(whole)} images of the answer match the filter"
    )
    assert not session.is_stale
    assert session.result is result
    assert result.unfiltered.rows.tolist() == whole.rows.tolist()
    session.undo()
    assert session.result is whole


def test_another_threshold_and_the_preview_agree_with_the_filter(session):
    session.label(positive=rows_of("bird", 6), negative=rows_of("fish", 4))
    whole = session.refine()
    session.filter({"stars": (2, None)})
    result = session.result
    for threshold in (0.05, 0.3, 0.8):
        at, other = result.at(threshold), whole.at(threshold)
        assert at.rows.tolist() == other.rows[STARS[other.rows]].tolist()
        assert at.at(0.3).rows.tolist() == result.rows.tolist()
        assert result.preview([threshold])["n_rows"].tolist() == [len(at)]
    assert STARS[result.pool.rows].all()
    margins = dict(zip(whole.pool.rows.tolist(), whole.pool.margins().tolist(), strict=True))
    assert result.pool.margins().tolist() == [margins[row] for row in result.pool.rows.tolist()]


def test_filters_narrow_each_other(session):
    session.label(positive=rows_of("bird", 6))
    whole = session.refine()
    even = np.arange(N_ROWS) % 2 == 0
    twice = whole.filtered(STARS).filtered(even)
    assert twice.rows.tolist() == whole.rows[(STARS & even)[whole.rows]].tolist()
    assert twice.unfiltered is whole
    assert len(twice.notes) == len(whole.notes) + 1
    for mask in (np.ones(3, bool), np.ones(N_ROWS, int)):
        with pytest.raises(RefineError, match="expected one bool for each of the 900 rows"):
            whole.filtered(mask)


def test_a_round_under_a_filter_is_recorded_whole(session, catalog):
    session.label(positive=rows_of("bird", 6), negative=rows_of("fish", 4))
    session.filter({"group": ["food"]})
    shown = []
    result = session.refine(partial=shown.append)
    assert (result.rows % 3 == 1).all()
    assert shown
    assert all((each.rows % 3 == 1).all() for each in shown)
    assert session.result is result
    again = Session(catalog, session.path)
    assert again.filters == {"group": ["food"]}
    assert again.result.rows.tolist() == result.rows.tolist()
    assert again.result.notes == result.notes
    other = Session(catalog)
    other.label(positive=rows_of("bird", 6), negative=rows_of("fish", 4))
    assert again.result.unfiltered.rows.tolist() == other.refine().rows.tolist()


def test_advice_is_about_the_whole_catalog(session):
    session.label(positive=rows_of("bird", 6), negative=rows_of("fish", 4))
    session.refine()
    audit, suggestions = session.audit(), session.suggest()
    concept = session.save_concept("birds")
    session.filter({"group": ["food"]})
    assert np.array_equal(session.audit().answer_rows, audit.answer_rows)
    assert session.audit().rows.tolist() == audit.rows.tolist()
    assert session.suggest().rows.tolist() == suggestions.rows.tolist()
    found = [each.apply(session.catalog).rows for each in (session.save_concept("b"), concept)]
    assert np.array_equal(*found)


def test_a_filter_is_one_action_of_the_history(session, catalog):
    told = []
    session.observe(told.append)
    session.filter({"stars": (2, None), "group": ["food"]})
    session.filter({"group": ["food"], "stars": (2.0, None)})
    session.filter({})
    session.filter()
    assert told == ["filter", "filter"]
    assert [event.description for event in session.history] == [
        "filter group is food and stars >= 2",
        "filter off",
    ]
    assert session.undo() == "filter off"
    assert session.filters == {"group": ["food"], "stars": (2, None)}
    assert Session(catalog, session.path).filters == session.filters
    session.undo()
    assert session.filters == {}
    session.redo()
    assert session.filters == {"group": ["food"], "stars": (2, None)}


def test_a_return_to_a_round_keeps_the_filter(session):
    session.label(positive=rows_of("bird", 6))
    session.refine()
    session.label(negative=rows_of("fish", 4))
    session.filter({"group": ["food"]})
    session.go_back(1)
    assert session.filters == {"group": ["food"]}
    assert (session.result.rows % 3 == 1).all()


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"nope": "x"}, "expected a column to filter on: row, uri, caption"),
        ({"stars": "x"}, "for the number column 'stars'"),
        ({"group": 5}, "for the text column 'group'"),
    ],
)
def test_wrong_conditions_are_refused_and_not_recorded(session, conditions, message):
    with pytest.raises(QueryError, match=re.escape(message)):
        session.filter(conditions)
    assert session.history == []


def test_a_filter_on_a_column_that_is_gone_says_so_and_can_be_cleared(session, catalog):
    session.search(row=3)
    session.filter({"group": ["food"]})
    text = session.path.read_text().replace('"column": "group"', '"column": "gone"')
    session.path.write_text(text)
    again = Session(catalog, session.path)
    with pytest.raises(QueryError, match=r"expected a column to filter on: .*; got 'gone'"):
        _ = again.hits
    again.filter()
    assert len(again.hits) == 60


def test_two_sessions_of_one_file_filter_together(session, catalog):
    session.search("bird", k=30)
    other = Session(catalog, session.path, encoder=WordEncoder())
    other.filter({"group": ["food"]})
    assert (session.hits.rows % 3 == 1).all()
    assert len(session.search("fish")) == 60
    assert session.hits.rows.tolist() == other.hits.rows.tolist()


def test_searches_and_filters_from_many_threads(session):
    texts = ["red bird", "blue fish", "old boat"] * 4

    def act(number):
        session.filter({"group": [("animals", "food", "sights")[number % 3]]})
        session.search(texts[number])

    threads = [threading.Thread(target=act, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert session.passing[session.hits.rows].all()
    assert len(session.history) >= 12


# -- what is searched for -------------------------------------------------------------------------


def test_phrases_are_added_up_and_taken_away(session):
    encoder = WordEncoder()
    red, bird = encoder.encode_text(["red bird", "bird"])
    session.search("red bird -bird^0.75")
    expected = red - 0.75 * bird
    np.testing.assert_allclose(session.query.vector, expected / np.linalg.norm(expected), atol=1e-6)
    assert (session.query.kind, session.query_text) == ("text", "red bird -bird^0.75")
    assert (
        json.loads(session.path.read_text().splitlines()[1])["query"]["text"] == session.query_text
    )
    with pytest.raises(QueryError, match="cancel each other out"):
        session.search("bird -bird^1")
    with pytest.raises(QueryError, match="got only what to leave out"):
        session.search("-bird")
    assert len(session.history) == 1


def test_several_rows_and_a_text(session, catalog):
    rows = [8, 6, 8]
    hits = session.search(row=rows)
    mean = catalog.embeddings[[6, 8]].astype(np.float64)
    mean = (mean / np.linalg.norm(mean, axis=1, keepdims=True)).sum(axis=0)
    mean /= np.linalg.norm(mean)
    np.testing.assert_allclose(session.query.vector, mean, atol=1e-6)
    assert hits.query_text == "more like rows 6, 8"
    session.search("old boat", row=np.array(rows))
    text = WordEncoder().encode_text(["old boat"])[0]
    both = mean + text
    np.testing.assert_allclose(session.query.vector, both / np.linalg.norm(both), atol=1e-6)
    assert session.query.kind == "row"
    assert session.query_text == "old boat, more like rows 6, 8"
    assert session.search(row=range(9)).query_text == "more like rows 0, 1, 2, 3, 4 and 4 more"
    assert session.search(row=[7]).query_text == session.search(row=7).query_text
    with pytest.raises(QueryError, match="expected one row id or several, got none"):
        session.search(row=[])
    with pytest.raises(QueryError, match=r"got \[0\.5\]|expected row ids"):
        session.search(row=[0.5])


class ColourEncoder(WordEncoder):
    def encode_images(self, images):
        return self.encode_text([f"{image.size}" for image in images])


def test_a_search_again_needs_neither_image_nor_model(catalog, tmp_path):
    session = Session(catalog, tmp_path / "s.jsonl", encoder=ColourEncoder())
    file = tmp_path / "a picture.png"
    Image.new("RGB", (20, 30)).save(file)
    hits = session.search(image=file)
    assert session.search(image=file.read_bytes()).query_text == "an image"
    with Image.open(file) as image:
        assert session.search(image=image).query_text == "image a picture.png"
    session.undo()
    file.unlink()
    session.label(positive=[4])
    session.search("bird")
    again = Session(catalog, session.path)
    found = again.search_again(1, k=30)
    assert found.rows.tolist() == hits.rows[:30].tolist()
    assert (again.query.kind, again.query_text) == ("image", "image a picture.png")
    undone = again.history[2]
    assert undone.undone
    assert again.search_again(undone).query_text == "image a picture.png"
    for wrong in (5, 99, "bird", again.history[4]):
        with pytest.raises(QueryError, match="expected a search of this session or its event id"):
            again.search_again(wrong)
