"""The Explorer's suggestions on the kernel side: real sessions, no browser."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from explorer_rig import settle, wait_for
from word_encoder import WordEncoder, build_catalog

from clipbranches_widget.errors import QueryError
from clipbranches_widget.explorer_suggest import N_SUGGESTED
from clipbranches_widget.session import Session


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return build_catalog(tmp_path_factory.mktemp("catalog") / "words.cbcat")


@pytest.fixture
def session(catalog, tmp_path):
    return Session(catalog, tmp_path / "s.jsonl", encoder=WordEncoder())


def wait_for_basis(explorer, basis):
    """Wait for the suggestions drawn from a round, a search or nothing; a busy panel takes none."""
    wait_for(lambda: explorer.suggest["basis"] == basis and not explorer.suggest["is_busy"])


def act(explorer, action, **data):
    explorer.vue_part({"part": "suggest", "action": action, "data": data})
    settle(explorer)


@pytest.fixture
def suggesting(session, explore):
    """Return an Explorer with the panel open and its first suggestions there."""
    explorer = explore(session)
    explorer.vue_dock({"name": "suggest"})
    wait_for(lambda: explorer.suggest.get("items"))
    return explorer


def suggested(explorer):
    return [item["row"] for item in explorer.suggest["items"]]


def begin_round(session):
    hits = session.search("striped bird")
    session.label(positive=hits.rows[:5], negative=hits.rows[50:55])
    return session.refine()


def test_they_are_those_of_the_session_with_their_reasons(session, suggesting):
    for basis, step in (
        ("none", lambda: None),
        ("search", lambda: session.search("fish")),
        ("round", lambda: begin_round(session)),
    ):
        step()
        found = session.suggest(N_SUGGESTED)
        wait_for(lambda found=found: suggested(suggesting) == list(found))
        assert suggesting.suggest["basis"] == basis
        assert not suggesting.suggest["is_busy"]
        for item, reason in zip(suggesting.suggest["items"], found.reasons, strict=True):
            assert item["reason"] == reason
            assert item["caption"] == session.catalog.caption(item["row"])[:200]


def test_labelled_ones_stay_and_their_labels_are_sent(session, suggesting):
    rows = suggested(suggesting)
    session.label(positive=rows[:2], negative=rows[2:3])
    settle(suggesting)
    assert suggested(suggesting) == rows
    marks = suggesting.marks["rows"]
    assert [marks.get(str(row), 0) for row in rows[:4]] == [1, 1, -1, 0]


def test_more_brings_others_once_for_two_views(session, suggesting):
    first = suggested(suggesting)
    session.label(negative=first[:3])
    settle(suggesting)
    for _ in range(2):  # both views ask for more of the same batch
        act(suggesting, "more", n_passed=0)
    wait_for(lambda: not suggesting.suggest["is_busy"])
    assert suggesting.suggest["n_passed"] == N_SUGGESTED
    assert len(suggested(suggesting)) == N_SUGGESTED
    assert not set(suggested(suggesting)) & set(first)


def test_a_round_brings_new_ones_and_undo_the_former(session, suggesting):
    begin_round(session)
    wait_for_basis(suggesting, "round")
    session.undo()
    settle(suggesting)
    wait_for_basis(suggesting, "search")
    assert suggested(suggesting) == list(session.suggest(N_SUGGESTED))


def test_filters_change_no_suggestion(session, suggesting):
    begin_round(session)
    wait_for_basis(suggesting, "round")
    act(suggesting, "more", n_passed=0)
    wait_for(lambda: suggesting.suggest["n_passed"] and not suggesting.suggest["is_busy"])
    rows = suggested(suggesting)
    session.filter({"row": (400, None)})
    settle(suggesting)
    assert len(session.result) < len(session.result.unfiltered)
    assert suggested(suggesting) == rows


def test_they_survive_closing_the_panel(session, suggesting):
    act(suggesting, "more", n_passed=0)
    wait_for(lambda: suggesting.suggest["n_passed"] and not suggesting.suggest["is_busy"])
    rows = suggested(suggesting)
    for name in ("", "suggest"):
        suggesting.vue_dock({"name": name})
        settle(suggesting)
    assert suggested(suggesting) == rows


def test_a_running_round_is_not_disturbed(session, explore):
    hits = session.search("striped bird")
    session.label(positive=hits.rows[:5], negative=hits.rows[50:55])
    explorer = explore(session)
    gate = threading.Event()
    explorer._work.post(gate.wait)
    explorer.vue_refine()
    explorer.vue_dock({"name": "suggest"})
    wait_for(lambda: explorer.suggest.get("items"))
    gate.set()
    settle(explorer)
    assert session.result is not None


def test_everything_labelled_leaves_none(session, explore):
    session.label(negative=np.arange(len(session.catalog)))
    explorer = explore(session)
    explorer.vue_dock({"name": "suggest"})
    settle(explorer)
    wait_for(lambda: not explorer.suggest["is_busy"])
    assert explorer.suggest["items"] == []


def test_what_goes_wrong_is_shown_once(session, explore, monkeypatch):
    calls = []

    def fail(*_args, **_keys):
        calls.append(1)
        raise QueryError("expected an index, got none")

    monkeypatch.setattr(session, "suggest", fail)
    explorer = explore(session)
    explorer.vue_dock({"name": "suggest"})
    wait_for(lambda: explorer.notice.get("kind") == "error")
    settle(explorer)
    session.label(positive=[1])
    settle(explorer)
    assert "expected an index" in explorer.notice["text"]
    assert not explorer.suggest["is_busy"]
    assert len(calls) == 1
