"""The Explorer's audit on the kernel side: real rounds, no browser."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from explorer_rig import settle, wait_for
from word_encoder import WordEncoder, build_catalog

from clipbranches_widget.explorer_audit import MAX_ROWS, estimate_view, report_view
from clipbranches_widget.intervals import Estimate
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
    explorer.vue_part({"part": "audit", "action": action, "data": data})
    settle(explorer)


@pytest.fixture
def audited(session, explore):
    """Return an Explorer with a round and an audit of 30 images, none labelled yet."""
    session.refine()
    explorer = explore(session)
    explorer.vue_dock({"name": "audit"})
    act(explorer, "start", n=30)
    wait_for(lambda: explorer.audit.get("report"))
    return explorer


def asked(explorer):
    return [item["row"] for item in explorer.audit["items"]]


def is_match(session, rows):
    return np.array(["striped bird" in session.catalog.caption(row) for row in rows], dtype=bool)


def answer(session, rows):
    rows = np.array(rows)
    right = is_match(session, rows)
    session.label(positive=rows[right], negative=rows[~right])


def wait_counted(explorer):
    settle(explorer)
    wait_for(lambda: not explorer.audit["is_counting"])


def test_without_a_round_there_is_nothing_to_audit(session, explore):
    explorer = explore(session)
    explorer.vue_dock({"name": "audit"})
    settle(explorer)
    assert explorer.audit["n_answer"] is None
    assert "items" not in explorer.audit
    act(explorer, "start", n=30)
    wait_for(lambda: explorer.notice.get("kind") == "error")
    assert "refine() first" in explorer.notice["text"]
    settle(explorer)
    assert not explorer.audit["is_busy"]


def test_its_images_are_those_of_the_sessions_audit(session, audited):
    assert asked(audited) == list(session.audit(30))
    assert audited.audit["about"] == {"n_rows": len(session.result), "threshold": 0.3}
    assert not audited.audit["is_former"]


def test_the_report_is_that_of_the_audit_after_every_label(session, audited):
    audit = session.audit(30)
    for n in (1, 9, 30):
        answer(session, asked(audited)[:n])
        wait_counted(audited)
        assert audited.audit["report"] == report_view(audit.report(session.labels))
    report = audited.audit["report"]
    assert (report["n_labelled"], report["n_missing"], report["n_counted"]) == (30, 0, 30)
    precision = audit.report(session.labels).precision
    assert report["measures"][0]["text"] == str(precision)
    assert report["advice"] == audit.report(session.labels).advice


def test_the_labels_of_its_images_are_sent(session, audited):
    answer(session, asked(audited)[:5])
    settle(audited)
    marks = audited.marks["rows"]
    assert all(str(row) in marks for row in asked(audited)[:5])
    assert not any(str(row) in marks for row in asked(audited)[5:])


def test_a_skipped_image_widens_the_intervals_and_can_come_back(session, audited):
    rows = asked(audited)
    answer(session, rows)
    wait_counted(audited)
    sure = audited.audit["report"]["measures"][0]
    inside = next(row for row in rows[:-1] if row in session.result and is_match(session, [row]))
    session.unlabel([inside])
    act(audited, "skip", row=inside)
    wait_counted(audited)
    unsure = audited.audit["report"]["measures"][0]
    assert audited.audit["skipped"] == [inside]
    assert unsure["high"] - unsure["low"] > sure["high"] - sure["low"]
    act(audited, "skip", row=inside, value=False)
    assert audited.audit["skipped"] == []
    act(audited, "skip", row=inside)
    act(audited, "revisit")
    assert audited.audit["skipped"] == []


def test_labels_behind_too_many_gaps_do_not_count(session, audited):
    answer(session, asked(audited)[20:])
    wait_counted(audited)
    report = audited.audit["report"]
    assert report["n_labelled"] == 10
    assert report["n_counted"] < 10


def test_it_survives_closing_and_belongs_to_its_own_answer(session, audited):
    rows = asked(audited)
    answer(session, rows)
    for name in ("", "audit"):
        audited.vue_dock({"name": name})
        settle(audited)
    wait_counted(audited)
    report = audited.audit["report"]
    assert asked(audited) == rows
    assert not audited.audit["is_former"]
    session.refine(threshold=0.6)
    settle(audited)
    assert audited.audit["is_former"]
    assert audited.audit["report"] == report
    session.undo()
    settle(audited)
    assert not audited.audit["is_former"]


def test_filters_hide_nothing_from_the_audit(session, explore):
    whole = session.refine()
    session.filter({"row": (400, None)})
    assert 0 < len(session.result) < len(whole)
    explorer = explore(session)
    explorer.vue_dock({"name": "audit"})
    act(explorer, "start", n=30)
    wait_for(lambda: explorer.audit.get("items"))
    assert explorer.audit["n_answer"] == explorer.audit["about"]["n_rows"] == len(whole)
    assert explorer.audit["is_filtered"]
    assert not explorer.audit["is_former"]


def test_a_new_audit_asks_nothing_twice(session, audited):
    rows = asked(audited)
    answer(session, rows)
    session.refine(threshold=0.2)
    settle(audited)
    act(audited, "start", n=60)
    wait_for(lambda: len(asked(audited)) == 60 and audited.audit["report"])
    assert not set(rows) & set(asked(audited))
    assert not audited.audit["is_former"]
    wait_counted(audited)
    assert audited.audit["report"]["n_labelled"] == 0


@pytest.mark.parametrize("only", ["", "near"])
def test_more_images_come_after_those_there_are_once_for_two_views(session, audited, only):
    rows = asked(audited)
    for _ in range(2):
        act(audited, "more", n=20, only=only, n_before=30)
    more = session.audit(30).more(20, only=only or None)
    assert asked(audited) == list(more)
    assert asked(audited)[:30] == rows
    assert {more.stratum_of(at) for at in range(30, 50)} <= {only} if only else True


def test_an_audit_has_an_end(session, audited):
    while len(before := asked(audited)) < MAX_ROWS:
        act(audited, "more", n=200, n_before=len(before))
    assert len(asked(audited)) == MAX_ROWS
    assert audited.audit["is_full"]


def test_a_running_round_is_not_disturbed(session, explore):
    session.refine()
    explorer = explore(session)
    session.label(negative=[3])
    gate = threading.Event()
    explorer._work.post(gate.wait)
    explorer.vue_refine()
    explorer.vue_dock({"name": "audit"})
    explorer.vue_part({"part": "audit", "action": "start", "data": {"n": 30}})
    wait_for(lambda: explorer.audit.get("items"))
    assert not explorer.audit["is_former"]
    gate.set()
    settle(explorer)
    assert not session.is_stale


@pytest.mark.parametrize(
    ("action", "data", "said"),
    [
        ("start", {"n": 31}, "expected an audit of 30, 60, 120 images, got 31"),
        ("skip", {"row": 3}, "expected an audit that is under way"),
        ("more", {"n": 20, "n_before": 30}, "expected an audit that is under way"),
    ],
)
def test_what_cannot_be_is_refused(session, explore, action, data, said):
    session.refine()
    explorer = explore(session)
    act(explorer, action, **data)
    assert said in explorer.notice["text"]


def test_what_is_not_known_is_none():
    unknown = Estimate(float("nan"), 0.25, 1.0)
    assert estimate_view(unknown) == {
        "text": "not known yet (25 % to 100 %)",
        "value": None,
        "low": 0.25,
        "high": 1.0,
    }
