"""The Explorer's panel of rules on the kernel side: real sessions, no browser."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from explorer_rig import settle, wait_for
from word_encoder import WordEncoder, build_catalog

from clipbranches_widget import refine as refine_module
from clipbranches_widget.explorer_rules import (
    MAX_QUERY_CHARS,
    branch_view,
    key_of,
    matches_of,
)
from clipbranches_widget.explorer_view import MAX_RULE_CHARS, shorten
from clipbranches_widget.session import Session

PART = "rules"


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return build_catalog(tmp_path_factory.mktemp("catalog") / "words.cbcat")


@pytest.fixture
def session(catalog, tmp_path):
    return Session(catalog, tmp_path / "s.jsonl", encoder=WordEncoder())


def act(explorer, asked, **data):
    explorer.vue_part({"part": PART, "action": asked, "data": data})
    settle(explorer)


@pytest.fixture
def ruling(session, catalog, explore):
    """Return an Explorer with a round and the panel open."""
    birds, fishes = rows_of(catalog, "bird"), rows_of(catalog, "fish")
    session.label(positive=birds[:6], negative=fishes[:6])
    session.refine()
    assert sum(branch.box is not None for branch in session.result.branches) > 2
    explorer = explore(session)
    explorer.vue_dock({"name": "rules"})
    settle(explorer)
    return explorer


def change(explorer, number, action):
    """Send a change, and wait until the session has done it."""
    key, n_before = explorer.rules["branches"][number]["key"], len(explorer.session.history)
    act(explorer, "change", key=key, action=action)
    wait_for(lambda: len(explorer.session.history) > n_before)
    wait_for(lambda: not explorer._parts["rules"]._is_changing)
    settle(explorer)


def shown(explorer):
    return [item["row"] for item in explorer.view["items"]]


def rows_of(catalog, noun):
    words = catalog.items.column("caption").to_pylist()
    return [row for row, caption in enumerate(words) if f" {noun} " in caption]


def test_the_panel_shows_each_rule_with_its_counts_and_examples(ruling, session):
    result = session.result
    for view, branch in zip(ruling.rules["branches"], result.branches, strict=True):
        assert (view["id"], view["state"]) == (branch.id, "on")
        assert view["text"] == shorten(branch.text, MAX_RULE_CHARS)
        assert view["n_rows"] == branch.n_rows
        assert view["n_matches"] == int((result.branch_ids == branch.id).sum())
        assert (view["n_yes"], view["n_no"]) == (branch.n_positive, branch.n_negative)
        assert [item["row"] for item in view["examples"]] == list(branch.example_rows)
        assert view["is_rule"] == (branch.box is not None)
        if branch.box is not None:
            assert view["sql"] in (branch.to_sql(), "")
            assert view["pandas"] in (branch.to_pandas_query(), "")
            assert view["sql"] or len(branch.to_sql()) > MAX_QUERY_CHARS
    assert sum(view["n_matches"] for view in ruling.rules["branches"]) == len(result)
    keys = [view["key"] for view in ruling.rules["branches"]]
    assert len(set(keys)) == len(keys)
    labelled = session.labels.positive[0]
    assert ruling.marks["rows"][str(labelled)] == 1


def test_without_a_round_there_are_no_rules(session, explore):
    explorer = explore(session)
    explorer.vue_dock({"name": "rules"})
    settle(explorer)
    assert explorer.rules == {"branches": [], "only": "", "n_failed": 0}
    assert branch_view(None) == []


def test_rules_too_long_to_copy_and_hostile_captions_are_cut(session, catalog):
    session.label(positive=[0, 2])
    branches = branch_view(session.refine(threshold=0.01))
    captions = [item["caption"] for branch in branches for item in branch["examples"]]
    assert captions
    assert max(map(len, captions)) <= 80
    for branch in branches:
        assert len(branch["sql"]) <= MAX_QUERY_CHARS


@pytest.mark.parametrize(("action", "state"), [("switch_off", "off"), ("pin", "pinned")])
def test_a_rule_is_changed_in_the_widget_and_undone(ruling, session, action, state):
    before = session.result
    change(ruling, 0, action)
    assert session.history[-1].action == action
    assert ruling.rules["branches"][0]["state"] == state
    assert ruling.rules["n_failed"] == 0
    assert ruling.view["tab"] == "result"
    assert ruling.view["n_rows"] == len(session.result)
    assert shown(ruling) == session.result.rows[:60].tolist()
    if action == "switch_off":
        assert len(session.result) < len(before)
    ruling.vue_undo()
    settle(ruling)
    assert ruling.rules["branches"][0]["state"] == "on"
    assert ruling.view["n_rows"] == len(before)


def test_many_changes_in_a_row_are_all_done_in_order(ruling, session):
    keys = [view["key"] for view in ruling.rules["branches"] if view["is_rule"]][:3]
    n_before = len(session.history)
    sent = [(keys[0], "switch_off"), (keys[1], "switch_off"), (keys[2], "pin")]
    sent += [(keys[0], "switch_on"), (keys[1], "pin")]
    for key, action in sent:
        ruling.vue_part(
            {"part": "rules", "action": "change", "data": {"key": key, "action": action}}
        )
    wait_for(lambda: len(session.history) == n_before + len(sent))
    assert [event.action for event in session.history[n_before:]] == [each for _, each in sent]
    wait_for(lambda: not ruling._parts["rules"]._is_changing)
    settle(ruling)
    states = {view["key"]: view["state"] for view in ruling.rules["branches"]}
    assert [states[key] for key in keys] == ["on", "pinned", "pinned"]


def test_a_change_does_not_cancel_a_running_round(ruling, session, catalog, monkeypatch):
    gate, fit = threading.Event(), refine_module.fit_forest
    started = threading.Event()

    def held(*arguments, **options):
        started.set()
        assert gate.wait(60)
        return fit(*arguments, **options)

    monkeypatch.setattr(refine_module, "fit_forest", held)
    session.label(positive=rows_of(catalog, "bird")[6:8])
    settle(ruling)
    cancelled = []
    ruling.observe(lambda change: cancelled.append(change["new"]["text"]), "notice")
    ruling.vue_refine()
    assert started.wait(60)
    wait_for(lambda: "so far" in ruling.view["headline"])
    key = key_of(session.result.branches[0])
    assert ruling.rules["branches"][0]["key"] == key
    n_before = len(session.history)
    data = {"key": key, "action": "switch_off"}
    ruling.vue_part({"part": PART, "action": "change", "data": data})
    wait_for(lambda: len(session.history) == n_before + 1)
    gate.set()
    wait_for(lambda: len(session.history) == n_before + 2)
    settle(ruling)
    assert session.history[-1].action == "refine"
    assert cancelled == []
    states = {key_of(branch): branch.state for branch in session.result.branches}
    assert states[key] == "off"


def test_a_change_that_fails_is_told_and_the_next_one_works(ruling, session):
    images = [view for view in ruling.rules["branches"] if not view["is_rule"]]
    if not images:
        session.label(positive=rows_of(session.catalog, "tree")[:1])
        session.refine()
        settle(ruling)
        images = [view for view in ruling.rules["branches"] if not view["is_rule"]]
    act(ruling, "change", key=images[0]["key"], action="switch_off")
    wait_for(lambda: ruling.rules["n_failed"] == 1)
    settle(ruling)
    assert ruling.notice["kind"] == "error"
    assert "expected a branch that is a rule" in ruling.notice["text"]
    change(ruling, 0, "switch_off")
    assert ruling.rules["branches"][0]["state"] == "off"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"key": "no such rule", "action": "pin"}, "got one that is no longer listed"),
        ({"key": None, "action": "explode"}, "expected one of switch_off, switch_on, pin, unpin"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(ruling, session, data, message):
    n_before = len(session.history)
    key = data["key"] or ruling.rules["branches"][0]["key"]
    act(ruling, "change", key=key, action=data["action"])
    assert message in ruling.notice["text"]
    assert len(session.history) == n_before


def test_only_the_matches_of_one_rule(ruling, session):
    result = session.result
    number = int(np.bincount(result.branch_ids).argmax())
    expected = result.rows[result.branch_ids == number]
    act(ruling, "only", key=ruling.rules["branches"][number]["key"])
    assert ruling.view["tab"] == "rule"
    assert shown(ruling) == expected[:60].tolist()
    assert {item["branch"] for item in ruling.view["items"]} == {number}
    scores = result.scores[result.branch_ids == number]
    assert [item["score"] for item in ruling.view["items"]] == [f"{s:.3f}" for s in scores[:60]]
    assert ruling.marks["tabs"]["rule"] == len(expected)
    assert ruling.view["extras"] == {"rule": {"text": f"Only R{number + 1}", "part": "rules"}}
    assert f"found by rule R{number + 1}" in ruling.view["headline"]
    ruling.vue_label({"rows": [int(expected[0])], "value": -1})
    settle(ruling)
    assert ruling.view["tab"] == "rule"
    act(ruling, "close_tab")
    assert ruling.view["tab"] == "result"
    assert "rule" not in ruling.marks["tabs"]
    assert ruling.rules["only"] == ""


def test_the_tab_of_a_rule_goes_when_the_rule_is_gone(ruling, session):
    act(ruling, "only", key=ruling.rules["branches"][0]["key"])
    session.unlabel(session.labels.rows)
    session.undo()
    session.undo()
    settle(ruling)
    assert session.result is None
    assert "rule" not in ruling.marks["tabs"]
    assert ruling.view["tab"] == "catalog"
    assert ruling.rules["only"] == ""


def test_another_threshold_counts_the_rows_that_are_shown(ruling, session):
    ruling.vue_part({"part": "scores", "action": "at", "data": {"threshold": 0.9}})
    higher = session.result.at(0.9)
    wait_for(lambda: sum(each["n_matches"] for each in ruling.rules["branches"]) == len(higher))
    assert [each["n_matches"] for each in ruling.rules["branches"]] == [
        int((higher.branch_ids == branch.id).sum()) for branch in higher.branches
    ]


def test_parts_of_an_answer_cover_it(session, catalog):
    session.label(positive=rows_of(catalog, "bird")[:6])
    result = session.refine()
    parts = [matches_of(result, branch.id) for branch in result.branches]
    assert sorted(row for part in parts for row in part) == sorted(result)
    for part in parts:
        assert part.rows.tolist() == [row for row in result if row in set(part.rows.tolist())]
