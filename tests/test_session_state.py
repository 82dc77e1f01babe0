"""The pure reducer: what each event means, and which events cannot follow."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from clipbranches_widget.boxes import LeafBox
from clipbranches_widget.errors import SessionFileError
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.session_events import Event, Query, Round, Rule, Search
from clipbranches_widget.session_state import SessionState

NOW = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
QUERY = Query.of("text", "a bird", np.array([0.6, 0.8], np.float32))
SEARCH = Search(0, QUERY, 60)
ROUND = Round(0, LabelSet([1], [2]), QUERY, 0.25, 7, 100, 12, "d1")

BOX = LeafBox.from_bounds({0: (8, 256), 3: (0, 16)})
RULE = Rule.of(BOX, "bird >= 0.310", "abc")


def replay(*actions):
    """Apply (action, parameters) pairs as events 1, 2, 3, ..."""
    state = SessionState()
    for number, (action, parameters) in enumerate(actions, start=1):
        state = state.apply(Event(number, NOW, action, parameters))
    return state


def label(positive=(), negative=()):
    return "label", {"positive": list(positive), "negative": list(negative)}


def change(action, rule=RULE, **stored):
    state = {"switch_off": "off", "pin": "pinned"}.get(action, "on")
    return action, {"rule": rule.to_dict() | {"state": state} | stored}


def test_nothing_has_happened_at_the_start():
    state = SessionState()
    assert state.labels == LabelSet()
    assert state.search is None
    assert state.round is None
    assert state.applied_ids() == frozenset()


def test_each_action_changes_its_own_part():
    state = replay(
        ("search", SEARCH.to_parameters()),
        label([1, 3], [2]),
        ("unlabel", {"rows": [3]}),
        ("refine", ROUND.to_parameters()),
    )
    assert state.labels == LabelSet([1], [2])
    assert state.search == Search(1, QUERY, 60)
    assert state.round == Round(4, LabelSet([1], [2]), QUERY, 0.25, 7, 100, 12, "d1")
    assert state.applied_ids() == {1, 2, 3, 4}


def test_undo_and_redo_walk_one_line_and_a_new_action_drops_the_rest():
    steps = [label([1]), label([2]), ("undo", {"of": 2}), ("undo", {"of": 1})]
    assert replay(*steps).labels == LabelSet()
    assert replay(*steps, ("redo", {"of": 1})).labels == LabelSet([1])
    both = replay(*steps, ("redo", {"of": 1}), ("redo", {"of": 2}))
    assert both.labels == LabelSet([1, 2])
    assert both.undone == ()
    other = replay(*steps, ("redo", {"of": 1}), label([9]))
    assert other.labels == LabelSet([1, 9])
    assert other.undone == ()
    assert other.applied_ids() == {1, 6}


def test_an_answer_is_stale_when_labels_or_query_differ_from_its_own():
    search, refine = ("search", SEARCH.to_parameters()), ("refine", ROUND.to_parameters())
    fresh = [search, label([1], [2]), refine]
    assert not replay(search, label([1], [2])).is_stale
    assert not replay(*fresh).is_stale
    assert replay(*fresh, label([5])).is_stale
    assert not replay(*fresh, label([5]), ("undo", {"of": 4})).is_stale
    assert not replay(*fresh, search).is_stale
    other = Search(0, Query.of("text", "a bus", np.ones(2, np.float32)), 60).to_parameters()
    assert replay(*fresh, ("search", other)).is_stale
    assert replay(label([1], [2]), refine).is_stale


def test_rules_are_switched_pinned_and_taken_back():
    off, pin = change("switch_off"), change("pin")
    other = Rule.of(LeafBox.from_bounds({1: (3, 9)}), "bus >= 0.1", "abc")
    assert [rule.state for rule in replay(off).rules] == ["off"]
    assert [rule.state for rule in replay(off, pin).rules] == ["pinned"]
    assert replay(off, change("switch_on")).rules == ()
    assert replay(pin, change("unpin")).rules == ()
    both = replay(off, change("pin", other))
    assert [(rule.text, rule.state) for rule in both.rules] == [
        ("bird >= 0.310", "off"),
        ("bus >= 0.1", "pinned"),
    ]
    assert replay(off, pin, ("undo", {"of": 2})).rules == replay(off).rules
    assert replay(off, ("undo", {"of": 1})).rules == ()
    assert replay(off, ("undo", {"of": 1}), ("redo", {"of": 1})).rules == replay(off).rules


def test_the_result_answers_the_latest_round_under_the_present_rules():
    refine = ("refine", ROUND.to_parameters())
    assert replay(change("pin")).asked is None
    state = replay(refine)
    assert state.asked is state.round
    state = replay(refine, change("switch_off"))
    assert state.asked.rules == state.rules
    assert (state.asked.digest, state.asked.labels) == ("", ROUND.labels)
    assert not replay(change("switch_off"), refine, change("switch_on")).asked.rules
    state = replay(refine, change("switch_off"), change("switch_on"))
    assert state.asked is state.round


def test_going_back_sets_what_a_round_was_computed_from():
    other = Query.of("text", "a bus", np.ones(2, np.float32))
    search, refine = ("search", SEARCH.to_parameters()), ("refine", ROUND.to_parameters())
    steps = [search, label([1], [2]), refine, change("pin"), label([5], [1])]
    steps += [("search", Search(0, other, 9).to_parameters())]
    back = ("go_back", {"to": 3, "number": 1})
    state = replay(*steps, back)
    assert state.labels == LabelSet([1], [2])
    assert state.search == Search(1, QUERY, 60)
    assert state.asked is state.round
    assert (state.round.event_id, state.rules, state.is_stale) == (3, (), False)
    undone = replay(*steps, back, ("undo", {"of": 7}))
    assert undone.labels == LabelSet([5], [1, 2])
    assert undone.search.query == other
    assert [rule.state for rule in undone.rules] == ["pinned"]
    assert replay(*steps, back, ("undo", {"of": 7}), ("redo", {"of": 7})).labels == state.labels


def test_a_round_that_was_undone_can_be_gone_back_to():
    refine = ("refine", ROUND.to_parameters())
    state = replay(refine, ("undo", {"of": 1}), label([8]), ("go_back", {"to": 1, "number": 1}))
    assert [done.recorded.event_id for done in state.rounds] == [1]
    assert state.labels == LabelSet([1], [2])
    assert state.applied_ids() == {3, 4}
    # Its search was not in the file, or undone while it ran: the query is what counts.
    assert state.search.query == QUERY


def test_going_back_forgets_a_search_that_the_round_did_not_know():
    bare = replace(ROUND, query=None).to_parameters()
    state = replay(("search", SEARCH.to_parameters()), ("refine", bare))
    assert state.is_stale
    event = Event(3, NOW, "go_back", {"to": 2, "number": 1})
    assert state.apply(event).search is None
    assert not state.apply(event).is_stale


def test_events_and_what_they_hold_survive_json_exactly(rng):
    vector = rng.normal(size=512).astype(np.float32)
    query = Query.of("image", "cat.png", vector)
    event = Event(3, NOW, "search", Search(3, query, 17).to_parameters())
    again = Event.from_record(json.loads(json.dumps(event.to_record())))
    assert again == event
    found = Search.from_parameters(3, again.parameters)
    assert found == Search(3, query, 17)
    assert found.query.vector.tobytes() == vector.tobytes()
    assert not found.query.vector.flags.writeable
    kept = json.loads(json.dumps(ROUND.to_parameters()))
    assert Round.from_parameters(0, kept) == ROUND
    under_rules = replace(ROUND, rules=(replace(RULE, state="off"), replace(RULE, state="pinned")))
    kept = json.loads(json.dumps(under_rules.to_parameters()))
    assert Round.from_parameters(0, kept) == under_rules
    assert "rules" not in ROUND.to_parameters()
    bare = Round(0, LabelSet(), None, None, 0, 1, 0, "")
    assert Round.from_parameters(0, bare.to_parameters()) == bare


@pytest.mark.parametrize(
    ("action", "parameters", "words"),
    [
        ("search", SEARCH.to_parameters(), "search 'a bird'"),
        (*label([1, 2], [3]), "label 2 yes, 1 no"),
        ("unlabel", {"rows": [1]}, "unlabel 1"),
        ("refine", ROUND.to_parameters(), "refine, 12 found"),
        (*change("switch_off"), "switch off 'bird >= 0.310'"),
        (*change("unpin"), "unpin 'bird >= 0.310'"),
        ("go_back", {"to": 4, "number": 2}, "go back to round 2"),
        ("undo", {"of": 4}, "undo of 4"),
    ],
)
def test_events_say_what_was_done(action, parameters, words):
    event = Event(5, NOW, action, parameters, undone=True)
    assert event.description == words
    assert repr(event) == f"<Event 5 2026-01-02 03:04:05 {words} (undone)>"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "expected an event with id, at and action, got KeyError"),
        ({"id": 1, "at": "soon", "action": "undo"}, "expected an event with id, at and action"),
        ({"id": None, "at": NOW.isoformat(), "action": "undo"}, "expected an event with id"),
        ({"id": 1, "at": 5, "action": "undo"}, "expected an event with id"),
        ({"id": 1, "at": NOW.isoformat(), "action": "dance"}, "got 'dance': was it written by a"),
        ({"id": 1, "at": NOW.isoformat(), "action": []}, r"got \[\]: was it written by a newer"),
    ],
)
def test_records_that_are_no_events_are_refused(record, message):
    with pytest.raises(SessionFileError, match=message):
        Event.from_record(record)


QUERY_DICT = QUERY.to_dict()


@pytest.mark.parametrize(
    ("action", "parameters"),
    [
        ("search", {}),
        ("search", {"query": None, "k": 1}),
        ("search", {"query": QUERY_DICT, "k": None}),
        ("search", {"query": QUERY_DICT | {"vector": "%%%"}, "k": 1}),
        ("search", {"query": QUERY_DICT | {"vector": "AAA="}, "k": 1}),
        ("search", {"query": QUERY_DICT | {"kind": "smell"}, "k": 1}),
        ("search", {"query": QUERY_DICT | {"text": 5}, "k": 1}),
        ("search", {"query": QUERY_DICT, "k": float("inf")}),
        ("label", {}),
        ("label", {"positive": 5, "negative": []}),
        ("label", {"positive": ["a"], "negative": []}),
        ("label", {"positive": [1], "negative": [1]}),
        ("label", {"positive": [-1], "negative": []}),
        ("unlabel", {"rows": [5]}),
        ("unlabel", {"rows": None}),
        ("refine", {}),
        ("refine", ROUND.to_parameters() | {"threshold": float("nan")}),
        ("refine", ROUND.to_parameters() | {"labels": None}),
        ("refine", ROUND.to_parameters() | {"seed": "x"}),
        ("refine", ROUND.to_parameters() | {"rules": [{}]}),
        ("refine", ROUND.to_parameters() | {"rules": 5}),
        ("go_back", {}),
        ("go_back", {"to": 1, "number": 1}),
        ("go_back", {"to": None, "number": 1}),
        ("switch_off", {}),
        ("switch_off", {"rule": None}),
        change("switch_off", state="pinned"),
        change("switch_off", state="gone"),
        change("switch_on"),
        change("unpin"),
        change("pin", text=5),
        change("pin", ranges=[[0, 9, 3]]),
        change("pin", ranges=[[0, 3, 9], [0, 3, 9]]),
        change("pin", ranges=[[-1, 3, 9]]),
        change("pin", ranges=[[0, 0, 256]]),
        change("pin", ranges=[["a", 3, 9]]),
        change("pin", ranges=[[0, 3]]),
    ],
)
def test_parameters_that_do_not_fit_the_action_are_refused(action, parameters):
    with pytest.raises(SessionFileError, match=f"event 1 has no valid parameters for '{action}'"):
        replay((action, parameters))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([("undo", {"of": 1})], "undoes event 1, but nothing is there to undo"),
        ([label([1]), ("undo", {"of": 7})], "undoes event 7, but event 1 is there to undo"),
        ([label([1]), ("undo", {})], "undoes event None, but event 1"),
        ([label([1]), ("redo", {"of": 1})], "redoes event 1, but nothing is there to redo"),
        ([label([1]), ("undo", {"of": 1}), ("redo", {"of": 2})], "redoes event 2, but event 1"),
    ],
)
def test_undo_and_redo_must_name_what_is_there(steps, message):
    with pytest.raises(SessionFileError, match=message):
        replay(*steps)


def test_event_ids_grow():
    state = SessionState().apply(Event(5, NOW, *label([1])))
    assert state.apply(Event(9, NOW, *label([2]))).last_id == 9
    with pytest.raises(SessionFileError, match="expected an event id above 5, got 5"):
        state.apply(Event(5, NOW, *label([2])))


def test_ten_thousand_events_are_no_deep_recursion():
    state = SessionState()
    for number in range(1, 10_001):
        state = state.apply(Event(number, NOW, *label([number % 50])))
    assert len(state.applied_ids()) == 10_000
    del state
