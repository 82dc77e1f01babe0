"""The code of a state, run: the same answer in a new session."""

from __future__ import annotations

import ast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from word_encoder import WordEncoder, build_catalog

import clipbranches_widget as cb
from clipbranches_widget.session import Session
from clipbranches_widget.session_code import session_code
from clipbranches_widget.session_events import Query, Search
from clipbranches_widget.session_state import SessionState, Step

N_ROWS = 900


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return build_catalog(tmp_path_factory.mktemp("c") / 'it\'s "words".cbcat', N_ROWS)


@pytest.fixture
def session(catalog, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))  # where the code's session goes
    return Session(catalog, tmp_path / "s.jsonl", encoder=WordEncoder())


def run(session):
    """Run the code of a session in an empty namespace; return the session it makes."""
    made = {}
    exec(session.to_code(), made)
    again = made["session"]
    assert again.path != session.path
    assert again.labels == session.labels
    for name in ("hits", "result"):
        one, other = getattr(session, name), getattr(again, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert other.rows.tolist() == one.rows.tolist()
            assert other.scores.tobytes() == one.scores.tobytes()
            assert made[name].rows.tolist() == one.rows.tolist()
    assert again.is_stale == session.is_stale
    assert [(rule.box, rule.state) for rule in again.rules] == [
        (rule.box, rule.state) for rule in session.rules
    ]
    return again


def test_a_new_session_opens_the_catalog(session, catalog):
    assert session.to_code() == (
        "import clipbranches_widget as cb\n\n"
        f"catalog = cb.open({str(catalog.path)!r})\nsession = cb.Session(catalog)\n"
    )
    run(session)


def test_search_labels_and_round(session):
    hits = session.search("striped bird", k=40)
    session.label(positive=hits[:6], negative=hits[-6:])
    session.refine(threshold=0.25, seed=7)
    code = session.to_code()
    assert "session.refine(threshold=0.25, seed=7)" in code
    assert f"positive={sorted(hits.rows[:6].tolist())}" in code
    run(session)


def test_what_changed_since_the_round(session):
    hits = session.search("striped bird")
    session.label(positive=hits[:6], negative=hits[-6:])
    session.refine()
    session.search(row=17, k=25)
    session.label(negative=[int(hits.rows[0])], positive=[3])
    session.unlabel([int(hits.rows[1])])
    assert session.is_stale
    code = session.to_code()
    assert "session.search(row=17, k=25)" in code
    assert code.index("refine(") < code.index("row=17") < code.index("unlabel(")
    run(session)


def test_labels_before_any_search(session):
    session.label(positive=range(0, 300, 3), negative=range(1, 300, 3))
    session.refine()
    session.search("drum")
    code = session.to_code()
    assert code.index("refine(") < code.index("search(")
    assert max(map(len, code.splitlines())) < 100
    run(session)


def test_rules_that_are_off_or_pinned(session):
    hits = session.search("bird")
    session.label(positive=hits[:8], negative=hits[-8:])
    session.refine()
    session.switch_off(0)
    ids = [branch.id for branch in session.result.branches if branch.box is not None]
    session.pin(ids[-1])
    session.refine(seed=3)
    session.switch_on(session.rules[0])
    again = run(session)
    assert [str(branch) for branch in again.result.branches] == [
        str(branch) for branch in session.result.branches
    ]


def test_filters(session):
    session.filter({"caption": "bird"})
    hits = session.search("striped bird")
    session.label(positive=hits[:4])
    session.refine()
    assert run(session).filters == session.filters


@pytest.mark.parametrize(
    "query", [{"vector": np.arange(48) - 20.0}, {"row": [4, 9]}, {"row": 899}, {"text": "drum"}]
)
def test_every_kind_of_query(session, query):
    session.search(**query, k=30)
    run(session)


def test_an_encoder_of_the_catalog_gets_the_words(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, colour in enumerate(["red", "green", "blue", "black"] * 5):
        Image.new("RGB", (60 + number, 60), colour).save(folder / f"{number}.png")
    catalog = cb.index(folder, tmp_path / "p.cbcat", encoder=cb.bundled_encoder(), progress=False)
    session = Session(catalog, tmp_path / "s.jsonl")
    session.search('a "red" thing\'s\nshape')
    assert "session.search('a \"red\" thing\\'s\\nshape', k=60)" in session.to_code()
    run(session)
    session.search(image=folder / "3.png")
    assert "np.frombuffer" in session.to_code()
    run(session)


@given(st.text(min_size=1, max_size=80))
def test_no_text_becomes_code(text):
    for can_encode in (True, False):
        query = Query("text", text, np.ones(8, np.float32).tobytes())
        state = SessionState(latest=Step(search=Search(1, query, 5)))
        code = session_code(FakeCatalog, state, can_encode=can_encode)
        calls = [
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Call)
        ]
        assert set(calls) <= {
            *("cb.open", "cb.Session", "session.search"),
            *("np.frombuffer", "base64.b64decode"),
        }
        if can_encode:
            values = {n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)}
            assert text in values


class FakeCatalog:
    """All that the code needs of a catalog for a query by text."""

    path = "/tmp/c.cbcat"
