"""The Explorer's scores on the kernel side: real rounds, recorded comm messages, no browser."""

from __future__ import annotations

import numpy as np
import pytest
from explorer_rig import settle, wait_for
from word_encoder import WordEncoder, build_catalog

from clipbranches_widget.explorer_scores import MAX_TICKS, curve, kept_threshold, ticks
from clipbranches_widget.session import Session


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return build_catalog(tmp_path_factory.mktemp("catalog") / "words.cbcat")


@pytest.fixture
def session(catalog, tmp_path):
    session = Session(catalog, tmp_path / "s.jsonl", encoder=WordEncoder())
    hits = session.search("striped bird")
    session.label(positive=hits.rows[:5], negative=hits.rows[50:55])
    return session


def act(explorer, action, **data):
    explorer.vue_part({"part": "scores", "action": action, "data": data})
    settle(explorer)


def shown(explorer):
    return [item["row"] for item in explorer.view["items"]]


def test_the_curve_is_what_at_gives(session):
    result = session.refine(threshold=0.333)
    found = curve(result)
    assert sum(found["bins"]) == found["n_scored"] == len(result.pool.rows)
    assert found["thresholds"] == sorted(found["thresholds"])
    assert len(found["thresholds"]) == 100
    for threshold in (0.05, 0.333, 0.5, 0.99):
        at = found["thresholds"].index(threshold)
        answer = result.at(threshold)
        assert found["n_rows"][at] == len(answer)
        right = np.where(np.isin(answer.rows, result.labels.positive), 1.0, answer.scores)
        assert found["expected_precision"][at] == pytest.approx(right.mean(), abs=1e-4)


def test_bins_count_scores_where_they_are(session):
    result = session.refine()
    bins = curve(result)["bins"]
    below = int((result.pool.scores < 0.25).sum())
    assert sum(bins[:10]) == below


def test_labelled_images_are_ticks_at_their_scores(session):
    result = session.refine()
    outside = np.setdiff1d(np.arange(900), result.pool.rows)
    session.label(negative=outside[:4])
    found = ticks(result, session.labels)
    scores = dict(zip(result.pool.rows.tolist(), result.pool.scores.tolist(), strict=True))
    yes = sorted(round(scores[row], 3) for row in session.labels.positive.tolist())
    no = [row for row in session.labels.negative.tolist() if row in scores]
    assert found["yes"] == yes
    assert found["no"] == sorted(round(scores[row], 3) for row in no)
    assert found["n_elsewhere"] == min(4, len(outside))


def test_of_many_labels_some_are_drawn_from_end_to_end(session):
    result = session.refine()
    session.label(negative=result.pool.rows[: MAX_TICKS * 2])
    found = ticks(result, session.labels)
    assert len(found["no"]) == MAX_TICKS
    scores = result.pool.scores[np.isin(result.pool.rows, session.labels.negative)]
    assert (found["no"][0], found["no"][-1]) == (
        pytest.approx(scores.min(), abs=1e-3),
        pytest.approx(scores.max(), abs=1e-3),
    )


def test_a_threshold_changes_what_is_shown_and_nothing_else(session, explore):
    result = session.refine()
    explorer = explore(session)
    n_events = len(session.history)
    act(explorer, "at", threshold=0.6)
    wait_for(lambda: explorer.view["n_rows"] == len(result.at(0.6)))
    assert len(result.at(0.6)) < len(result)
    assert shown(explorer) == result.at(0.6).rows.tolist()[:60]
    assert explorer.scores == {"chosen": 0.6, "own": 0.3}
    assert explorer.view["tab"] == "result"
    assert session.result is result
    assert len(session.history) == n_events
    act(explorer, "at", threshold=None)
    assert explorer.view["n_rows"] == len(result)
    assert explorer.scores["chosen"] is None


def test_below_the_rounds_own_the_notes_say_that_images_may_be_missing(session, explore):
    session.refine()
    explorer = explore(session)
    act(explorer, "at", threshold=0.05)
    wait_for(lambda: any("may be missing" in note for note in explorer.view["notes"]))


def test_the_threshold_stays_through_labels_and_goes_with_the_next_round(session, explore):
    result = session.refine()
    explorer = explore(session)
    act(explorer, "at", threshold=0.6)
    wait_for(lambda: explorer.view["n_rows"] == len(result.at(0.6)))
    explorer.vue_label({"rows": [3], "value": -1})
    settle(explorer)
    assert explorer.view["n_rows"] == len(result.at(0.6))
    assert explorer.scores["chosen"] == 0.6
    explorer.vue_refine()
    settle(explorer)
    wait_for(lambda: explorer.scores["chosen"] is None)
    assert explorer.view["n_rows"] == len(session.result)
    assert session.result.threshold == 0.3


def test_the_threshold_stays_when_a_rule_is_switched_off(session, explore):
    result = session.refine()
    explorer = explore(session)
    act(explorer, "at", threshold=0.4)
    wait_for(lambda: explorer.view["n_rows"] == len(result.at(0.4)))
    changed = session.switch_off(0)
    settle(explorer)
    wait_for(lambda: explorer.view["n_rows"] == len(changed.at(0.4)))
    assert explorer.scores["chosen"] == 0.4


def test_with_filters_the_threshold_is_about_what_they_leave(session, explore):
    session.refine()
    explorer = explore(session)
    explorer.vue_dock({"name": "scores"})
    act(explorer, "at", threshold=0.2)
    session.filter({"row": (400, None)})
    settle(explorer)
    filtered = session.result
    wait_for(lambda: explorer.view["n_rows"] == len(filtered.at(0.2)))
    wait_for(lambda: sum(explorer.scores["bins"]) == len(filtered.pool.rows))
    assert explorer.scores["chosen"] == 0.2
    assert min(shown(explorer)) >= 400
    session.filter()
    settle(explorer)
    wait_for(lambda: explorer.view["n_rows"] == len(session.result.at(0.2)))


def test_the_next_rounds_keep_a_threshold_and_undo_takes_it_back(session, explore):
    session.refine()
    explorer = explore(session)
    act(explorer, "keep", threshold=0.5)
    assert session.result.threshold == 0.5
    explorer.vue_label({"rows": [3], "value": -1})
    explorer.vue_refine()
    settle(explorer)
    assert not session.is_stale
    assert session.result.threshold == 0.5
    for _ in range(3):
        session.undo()
    assert session.result.threshold == 0.3
    explorer.vue_refine()
    settle(explorer)
    assert session.result.threshold == 0.3
    assert session.history[-1].parameters["threshold"] is None


def test_without_a_round_there_is_no_threshold_to_keep():
    assert kept_threshold(None) is None


def test_an_open_panel_gets_the_curve_and_follows_the_labels(session, explore):
    explorer = explore(session)
    explorer.vue_dock({"name": "scores"})
    settle(explorer)
    assert explorer.scores == {"chosen": None, "own": None}
    result = session.refine()
    wait_for(lambda: "bins" in explorer.scores)
    assert explorer.scores["bins"] == curve(result)["bins"]
    session.label(negative=result.rows[-1:])
    settle(explorer)
    assert explorer.scores["no"] == ticks(result, session.labels)["no"]
    session.undo()
    session.undo()
    settle(explorer)
    wait_for(lambda: explorer.scores["own"] is None)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -3.0, float("nan")])
def test_a_threshold_outside_is_refused(session, explore, threshold):
    session.refine()
    explorer = explore(session)
    act(explorer, "at", threshold=threshold)
    assert "expected a threshold between 0 and 1" in explorer.notice["text"]
    assert explorer.view["n_rows"] == len(session.result)
