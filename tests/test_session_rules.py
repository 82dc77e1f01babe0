"""Switching rules of a session: at once, undoable, restored, and in every later round."""

import json

import numpy as np
import pytest

from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.errors import RefineError
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.refine import refine
from clipbranches_widget.session import Session

N_ROWS, N_CLUSTERS = 900, 9


@pytest.fixture(scope="module")
def cluster():
    return np.random.default_rng(7).integers(0, N_CLUSTERS, N_ROWS)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory, cluster):
    rng = np.random.default_rng(8)
    embeddings = rng.normal(size=(N_CLUSTERS, 16))[cluster] + 0.9 * rng.normal(size=(N_ROWS, 16))
    return from_embeddings(embeddings, tmp_path_factory.mktemp("c") / "rules.cbcat")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "one.jsonl"


@pytest.fixture
def session(catalog, path, cluster):
    """A session after one round."""
    session = Session(catalog, path)
    session.label(np.flatnonzero(cluster == 0)[:6], np.flatnonzero(cluster != 0)[:6])
    session.refine()
    return session


def n_events(path):
    return path.read_bytes().count(b"\n") - 1


def states(session):
    return [branch.state for branch in session.result.branches if branch.box is not None]


def test_switching_off_changes_the_result_at_once_and_back_on_restores_it(session, catalog):
    before = session.result
    after = session.switch_off(0)
    assert after is session.result
    assert len(after) < len(before)
    expected = refine(CatalogIndex(catalog), labels=session.labels, off=[before.branches[0].box])
    assert np.array_equal(after.rows, expected.rows)
    assert after.branches == expected.branches
    assert states(session)[:2] == ["off", "on"]
    assert (after.seed, after.threshold) == (before.seed, before.threshold)
    assert not session.is_stale
    again = session.switch_on(0)
    assert np.array_equal(again.rows, before.rows)
    assert again.branches == before.branches
    assert session.rules == ()


def test_ids_stay_so_that_several_can_be_switched(session):
    boxes = [branch.box for branch in session.result.branches]
    session.switch_off(0)
    session.switch_off(1)
    assert states(session)[:2] == ["off", "off"]
    assert [rule.box.ranges for rule in session.rules] == [box.ranges for box in boxes[:2]]


def test_a_branch_its_id_and_a_rule_mean_the_same(session):
    branch = session.result.branches[1]
    session.switch_off(branch)
    (rule,) = session.rules
    assert (rule.text, rule.state, rule.box.ranges) == (branch.text, "off", branch.box.ranges)
    assert str(rule) == f"{branch.text} (off)"
    session.switch_on(rule)
    assert session.rules == ()
    session.pin(np.int64(1))
    assert session.rules[0].state == "pinned"


def test_every_change_is_one_event_that_undo_takes_back(session, path):
    text = session.result.branches[0].text
    shown = [states(session)]
    n_before = n_events(path)
    for act in (session.switch_off, session.switch_on, session.pin, session.switch_off):
        act(0)
        shown.append(states(session))
    session.pin(0)
    session.unpin(0)
    assert n_events(path) == n_before + 6
    said = [event.description for event in session.history[-6:]]
    assert said == [
        f"{what} {text!r}"
        for what in ("switch off", "switch on", "pin", "switch off", "pin", "unpin")
    ]
    assert [each[0] for each in shown] == ["on", "off", "on", "pinned", "off"]
    session.undo()
    session.undo()
    for state in reversed(shown[:-1]):
        session.undo()
        assert states(session) == state
    for state in shown[1:]:
        session.redo()
        assert states(session) == state


def test_what_changes_nothing_is_no_event(session, path):
    n_before = n_events(path)
    session.switch_on(0)
    session.unpin(0)
    assert n_events(path) == n_before
    session.switch_off(0)
    session.switch_off(0)
    session.unpin(0)
    assert n_events(path) == n_before + 1
    session.pin(0)
    session.pin(0)
    session.switch_on(0)
    assert n_events(path) == n_before + 2


def test_reopening_restores_rules_and_result(session, catalog, path):
    session.switch_off(1)
    session.pin(0)
    again = Session.open(path, catalog)
    assert again.rules == session.rules
    assert np.array_equal(again.result.rows, session.result.rows)
    assert again.result.branches == session.result.branches
    assert again.result.notes == session.result.notes


def test_another_session_on_the_file_follows(session, catalog, path):
    other, heard = Session(catalog, path), []
    other.observe(heard.append)
    session.switch_off(0)
    session.undo()
    session.pin(0)
    assert states(other)[0] == "pinned"
    assert heard == ["switch_off", "undo", "pin"]


def test_rules_stay_in_later_rounds_until_taken_back(session, cluster, catalog, path):
    off, pinned = session.result.branches[0].box, session.result.branches[1].box
    session.switch_off(0)
    session.pin(1)
    session.label(np.flatnonzero(cluster == 0)[6:10], np.flatnonzero(cluster != 0)[6:12])
    result = session.refine(seed=5)
    by_state = {branch.state: branch.box for branch in result.branches}
    assert by_state["off"].ranges == off.ranges
    assert by_state["pinned"].ranges == pinned.ranges
    inside = CatalogIndex(catalog).columns.in_boxes([pinned]).rows
    assert np.isin(inside, result.pool.rows).all()
    again = Session.open(path, catalog).result
    assert np.array_equal(again.rows, result.rows)
    assert again.notes == result.notes
    session.undo()
    assert session.result.seed == 0
    assert states(session)[:2] == ["off", "pinned"]
    session.redo()
    assert session.result is result


def test_a_rule_changed_while_a_round_runs_counts_for_its_result(session):
    branch = session.result.branches[0]

    def switch(stage, _fraction):
        if stage == "rank":
            session.switch_off(branch)

    session.refine(progress=switch)
    off = [each.box for each in session.result.branches if each.state == "off"]
    assert [box.ranges for box in off] == [branch.box.ranges]


def test_repr_counts_only_what_is_known(session):
    n_found = len(session.result)
    session.switch_off(0)
    assert "round: new rules" in repr(session)
    session.undo()
    assert f"round: {n_found} found" in repr(session)


def test_images_are_no_rules(session, cluster):
    session.label(positive=np.flatnonzero(cluster == 4)[:1])
    result = session.refine()
    images = [branch for branch in result.branches if branch.box is None]
    assert images
    for branch in images:
        with pytest.raises(RefineError, match="expected a branch that is a rule, got"):
            session.switch_off(branch.id)


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (-1, "expected the id of one of the"),
        (999, "branches, from 0, got 999"),
        ("bird", "the id of a branch, got 'bird'"),
        (0.5, "the id of a branch, got 0.5"),
    ],
)
def test_branches_that_are_not_there_are_refused(session, path, branch, message):
    n_before = n_events(path)
    with pytest.raises(RefineError, match=message):
        session.switch_off(branch)
    assert n_events(path) == n_before


def test_rules_need_a_round(catalog):
    with pytest.raises(RefineError, match="expected a round before its rules are changed"):
        Session(catalog).pin(0)


def test_sessions_without_rules_write_what_older_releases_read(session, path):
    *_, line = path.read_text().splitlines()
    assert json.loads(line)["action"] == "refine"
    assert "rules" not in json.loads(line)


@pytest.mark.parametrize("change", [("columns", "another model"), ("ranges", [[500, 3, 9]])])
def test_rules_of_other_columns_are_kept_but_not_applied(session, catalog, path, change):
    before = session.result
    session.switch_off(0)
    *lines, last = path.read_text().splitlines()
    record = json.loads(last)
    record["rule"][change[0]] = change[1]
    path.write_text("\n".join([*lines, json.dumps(record)]) + "\n")
    again = Session.open(path, catalog)
    assert np.array_equal(again.result.rows, before.rows)
    assert "1 of the session's rules were made on other columns" in again.result.notes[-1]
    assert len(again.rules) == 1
    again.switch_on(again.rules[0])
    assert again.rules == ()
    assert again.result.notes == before.notes
