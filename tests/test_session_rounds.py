"""Rounds of a session: numbered for ever, compared exactly, and gone back to."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipbranches_widget import refine as refine_module
from clipbranches_widget import session_results
from clipbranches_widget.errors import RefineError, SessionFileError
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.session import Session
from clipbranches_widget.session_rounds import Comparison

N_ROWS, N_CLUSTERS = 900, 9


@pytest.fixture(scope="module")
def cluster():
    return np.random.default_rng(7).integers(0, N_CLUSTERS, N_ROWS)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory, cluster):
    rng = np.random.default_rng(8)
    embeddings = rng.normal(size=(N_CLUSTERS, 16))[cluster] + 0.9 * rng.normal(size=(N_ROWS, 16))
    return from_embeddings(embeddings, tmp_path_factory.mktemp("c") / "rounds.cbcat")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "one.jsonl"


@pytest.fixture
def session(catalog, path):
    return Session(catalog, path)


@pytest.fixture
def three(session, cluster):
    """A session after a search and three rounds, each with more labels; and their answers."""
    yes, no = np.flatnonzero(cluster == 0), np.flatnonzero(cluster != 0)
    session.search(row=int(yes[0]))
    results = []
    for number in range(3):
        session.label(yes[5 * number : 5 * number + 5], no[6 * number : 6 * number + 6])
        results.append(session.refine(seed=number))
    return session, results


def n_events(path):
    return path.read_bytes().count(b"\n") - 1


def standing(session):
    """Return all that going back restores."""
    result = session.result
    rows = None if result is None else result.rows.tolist()
    return session.labels, session.query_text, session.rules, rows, session.is_stale


def assert_same(one, two):
    """Assert that two results are the same to the bit, times aside."""
    for name in ("rows", "scores", "margins", "branch_ids"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    assert one.branches == two.branches
    assert one.notes == two.notes
    assert (one.threshold, one.seed, one.n_touched) == (two.threshold, two.seed, two.n_touched)
    for name in ("rows", "scores", "box_ids"):
        assert np.array_equal(getattr(one.pool, name), getattr(two.pool, name)), name
    assert np.array_equal(one.pool.margins(), two.pool.margins())


def test_a_session_without_rounds_has_none(session):
    assert session.rounds == ()
    for act in (session.round, session.go_back):
        with pytest.raises(RefineError, match=r"with rounds, got round 1: refine\(\) first"):
            act(1)


def test_rounds_say_what_was_asked_and_found(three):
    session, results = three
    rounds = session.rounds
    assert [each.number for each in rounds] == [1, 2, 3]
    assert [each.parent for each in rounds] == [None, 1, 2]
    assert [(each.n_yes, each.n_no) for each in rounds] == [(5, 6), (10, 12), (15, 18)]
    assert [each.n_rows for each in rounds] == [len(result) for result in results]
    assert [each.seed for each in rounds] == [0, 1, 2]
    assert {each.query_text for each in rounds} == {session.query_text}
    assert [each.threshold for each in rounds] == [result.threshold for result in results]
    assert [each.is_current for each in rounds] == [False, False, True]
    done = [event for event in session.history if event.action == "refine"]
    assert [(each.event_id, each.at) for each in rounds] == [(e.id, e.at) for e in done]
    assert str(rounds[2]) == (
        f"round 3 for {session.query_text!r}: {len(results[2])} found from 15 yes, 18 no, current"
    )


def test_a_round_is_its_answer_in_memory_and_computed_again(three, catalog, path):
    session, results = three
    again = Session.open(path, catalog)
    for number, result in enumerate(results, start=1):
        assert session.round(number) is result
        assert_same(again.round(number), result)


def test_comparisons_are_set_operations_in_rank_order(three, catalog, path):
    session, results = three
    for one in (session, Session.open(path, catalog)):
        for before in (1, 2, 3):
            for after in (1, 2, 3):
                old, new = results[before - 1].rows, results[after - 1].rows
                found = one.compare(before, after)
                assert (found.before, found.after) == (before, after)
                assert sorted(found.gained.tolist()) == np.setdiff1d(new, old).tolist()
                assert sorted(found.lost.tolist()) == np.setdiff1d(old, new).tolist()
                assert sorted(found.kept.tolist()) == np.intersect1d(old, new).tolist()
                for part, ranked in ((found.gained, new), (found.lost, old), (found.kept, new)):
                    assert part.tolist() == [row for row in ranked.tolist() if row in set(part)]
    assert len(session.compare(1, 3).gained) > 0


RANKED = st.lists(st.integers(0, 30), unique=True).map(lambda rows: np.array(rows, np.int64))


@given(before=RANKED, after=RANKED)
def test_a_comparison_of_any_rankings_equals_lists(before, after):
    found = Comparison.of(1, 2, before, after)
    old, new = before.tolist(), after.tolist()
    assert found.gained.tolist() == [row for row in new if row not in old]
    assert found.lost.tolist() == [row for row in old if row not in new]
    assert found.kept.tolist() == [row for row in new if row in old]


def test_going_back_restores_labels_query_rules_and_answer(three, path):
    session, results = three
    then = standing(session)
    session.search(row=3)
    session.switch_off(0)
    session.unlabel(session.labels.rows)
    n_before, left = n_events(path), standing(session)
    assert session.go_back(3) is results[2]
    assert standing(session) == then
    assert session.hits is not None
    assert n_events(path) == n_before + 1
    assert session.history[-1].description == "go back to round 3"
    assert session.undo() == "go back to round 3"
    assert standing(session) == left
    session.redo()
    assert standing(session) == then


def test_going_back_to_where_one_stands_is_no_event(three, path):
    session, _ = three
    n_before = n_events(path)
    session.go_back(3)
    assert n_events(path) == n_before
    session.go_back(1)
    session.go_back(1)
    assert n_events(path) == n_before + 1
    session.label(positive=[3])
    session.go_back(1)
    assert n_events(path) == n_before + 3


def test_refining_after_going_back_repeats_the_round_and_branches_off(three, cluster):
    session, results = three
    session.go_back(2)
    assert_same(session.refine(seed=1), results[1])
    session.label(positive=np.flatnonzero(cluster == 0)[20:24])
    session.refine()
    session.go_back(1)
    session.refine()
    assert [each.parent for each in session.rounds] == [None, 1, 2, 2, 4, 1]
    assert [each.is_current for each in session.rounds] == 5 * [False] + [True]
    assert_same(session.round(3), results[2])


def test_rounds_that_were_undone_stay_and_can_be_gone_back_to(three, catalog, path):
    session, results = three
    session.undo()
    assert [each.undone for each in session.rounds] == [False, False, True]
    assert [each.is_current for each in session.rounds] == [False, True, False]
    session.label(positive=[7])  # gives up what redo would do
    assert not session.can_redo
    for one in (session, Session.open(path, catalog)):
        assert len(one.compare(2, 3).kept) == len(np.intersect1d(*(r.rows for r in results[1:])))
    assert session.go_back(3) is results[2]
    assert session.rounds[2].is_current
    assert session.rounds[2].undone
    assert "current, undone" in str(session.rounds[2])


def test_a_round_under_rules_is_gone_back_to_with_them(three, catalog, path):
    session, results = three
    session.switch_off(0)
    session.pin(1)
    fourth = session.refine(seed=9)
    rules = session.rules
    session.go_back(1)
    assert session.rules == ()
    assert np.array_equal(session.result.rows, results[0].rows)
    again = Session.open(path, catalog)
    again.go_back(4)
    assert again.rules == rules
    assert_same(again.result, fourth)
    assert [each.rules for each in again.rounds] == [(), (), (), rules]


def test_filters_stay_and_rounds_are_compared_whole(tmp_path, cluster, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    rng = np.random.default_rng(8)
    items = pd.DataFrame({"place": np.where(np.arange(N_ROWS) % 2, "odd", "even")})
    embeddings = rng.normal(size=(N_CLUSTERS, 16))[cluster] + 0.9 * rng.normal(size=(N_ROWS, 16))
    session = Session(from_embeddings(embeddings, tmp_path / "items.cbcat", items=items))
    results = []
    for n_yes in (4, 9):
        session.label(np.flatnonzero(cluster == 0)[:n_yes], np.flatnonzero(cluster != 0)[:6])
        results.append(session.refine())
    session.filter({"place": ["odd"]})
    assert session.round(1) is results[0]
    found = session.compare(1, 2)
    assert sorted((*found.gained, *found.kept)) == sorted(results[1])
    went = session.go_back(1)
    assert went is session.result
    assert went.rows.tolist() == [row for row in results[0] if row % 2]
    assert session.filters == {"place": ["odd"]}
    session.filter()
    assert session.result is results[0]
    session.go_back(1)
    assert session.history[-1].action == "filter"


def test_another_session_on_the_file_follows(three, catalog, path):
    session, results = three
    other, heard = Session(catalog, path), []
    other.observe(heard.append)
    session.go_back(1)
    assert np.array_equal(other.result.rows, results[0].rows)
    assert heard == ["go_back"]
    assert standing(other) == standing(session)
    assert standing(Session.open(path, catalog)) == standing(session)


def test_the_answer_is_there_before_anybody_hears_of_it(three, monkeypatch):
    session, _ = three
    computed = []
    for name in ("refine", "answer_again"):
        plain = getattr(session_results, name)
        monkeypatch.setattr(
            session_results,
            name,
            lambda *args, plain=plain, name=name, **options: (
                computed.append(name) or plain(*args, **options)
            ),
        )
    heard = []
    session.observe(lambda change: heard.append((change, list(computed), len(session.result))))
    session.switch_off(0)
    session.go_back(1)
    assert [(change, when) for change, when, _ in heard] == [
        ("switch_off", ["answer_again"]),
        ("go_back", ["answer_again"]),
    ]
    assert computed == ["answer_again"]


@pytest.mark.parametrize("number", [0, -1, 4, 2.5, "2", None])
def test_rounds_that_are_not_there_are_refused(three, path, number):
    session, _ = three
    n_before = n_events(path)
    for act in (session.round, session.go_back, lambda number: session.compare(1, number)):
        with pytest.raises(RefineError, match=r"from 1 to 3, got .*: see session\.rounds"):
            act(number)
    assert n_events(path) == n_before


def test_many_old_rounds_do_not_push_the_present_answer_out(three, monkeypatch):
    monkeypatch.setattr(session_results, "N_KEPT", 3)
    session, results = three
    for seed in range(3, 7):
        session.refine(seed=seed)
    result, hits = session.result, session.hits
    for number in range(1, 7):
        session.compare(number, number + 1)
        session.round(number)
        assert session.result is result
        assert session.hits is hits
    assert_same(session.round(1), results[0])


def test_rows_of_rounds_are_forgotten_oldest_first(three, monkeypatch):
    session, results = three
    monkeypatch.setattr(session_results, "MAX_KEPT_ROWS", len(results[2]) + 1)
    session.refine(seed=11)
    assert len(session._results._rows) < 3
    assert sorted(session.compare(1, 2).gained) == sorted(
        np.setdiff1d(results[1].rows, results[0].rows)
    )


# -- rules answered with what was learned --------------------------------------------------------


def test_switching_rules_learns_nothing_and_equals_learning_anew(three, catalog, path, monkeypatch):
    session, _ = three
    changes = [("switch_off", 0), ("pin", 1), ("switch_off", 2), ("switch_on", 0), ("pin", 2)]
    quick = []
    with monkeypatch.context() as patch:
        patch.setattr(refine_module, "fit_forest", None)
        patch.setattr(refine_module, "fit_teacher", None)
        for action, branch in changes:
            quick.append((getattr(session, action)(branch), session.rules))
    for result, rules in quick:
        off, pinned = (
            [rule.box for rule in rules if rule.state == state] for state in ("off", "pinned")
        )
        anew = refine_module.refine(
            session._results.index,
            labels=session.labels,
            query=session._state.query.vector,
            query_text=session.query_text,
            seed=2,
            off=off,
            pinned=pinned,
        )
        assert_same(result, anew)
        assert result.model.boxes == anew.model.boxes
        assert result.model.listed == anew.model.listed
    assert_same(Session.open(path, catalog).result, session.result)


def test_other_labels_query_threshold_or_seed_learn_anew(session, cluster, monkeypatch):
    yes, no = np.flatnonzero(cluster == 0), np.flatnonzero(cluster != 0)
    session.label(yes[:5], no[:5])
    session.refine(threshold=0.5, seed=4)
    model = session.result.model
    session.pin(0)
    assert session.result.model.forest is model.forest
    assert session.result.threshold == 0.5
    for options in ({"threshold": 0.5}, {"seed": 4}, {}):
        session.refine(**options)
        assert session.result.model.forest is not model.forest
    session.refine(threshold=0.5, seed=4)
    assert session.result.model.forest is not model.forest  # a round that is asked for is run


# -- files ----------------------------------------------------------------------------------------


def test_a_file_of_an_older_release_loads(three, catalog, path):
    session, results = three
    lines = path.read_text().splitlines()
    assert {json.loads(line).get("action") for line in lines[1:]} == {"search", "label", "refine"}
    again = Session.open(path, catalog)
    assert again.rounds == session.rounds
    again.go_back(1)
    assert np.array_equal(again.result.rows, results[0].rows)


def test_an_action_of_a_newer_release_says_so(three, catalog, path):
    session, _ = three
    session.go_back(1)
    text = path.read_text()
    assert '"action": "go_back", "to": 3, "number": 1}' in text
    path.write_text(text.replace('"go_back"', '"go_further"'))
    with pytest.raises(SessionFileError, match=r"line 9: .*'go_further': .*upgrade this package"):
        Session.open(path, catalog)


def test_a_line_that_goes_back_to_nothing_is_refused(three, catalog, path):
    session, _ = three
    session.go_back(1)
    path.write_text(path.read_text().replace('"to": 3', '"to": 2'))
    with pytest.raises(SessionFileError, match="line 9: event 8 has no valid parameters"):
        Session.open(path, catalog)
