"""Near-duplicates in the Explorer on the kernel side: real searches and rounds, no browser."""

from __future__ import annotations

import numpy as np
import pytest
from explorer_rig import settle, wait_for
from word_encoder import WordEncoder, build_catalog

from clipbranches_widget import explorer_groups
from clipbranches_widget.explorer_export import shown_result
from clipbranches_widget.session import Session

LOW = 0.6


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return build_catalog(tmp_path_factory.mktemp("catalog") / "words.cbcat")


@pytest.fixture
def session(catalog, tmp_path):
    session = Session(catalog, tmp_path / "s.jsonl", encoder=WordEncoder())
    session.search("striped bird", k=150)
    return session


def act(explorer, action, **data):
    explorer.vue_part({"part": "groups", "action": action, "data": data})
    settle(explorer)


def show(explorer, *, similarity=LOW):
    act(explorer, "show", is_on=True, similarity=similarity)
    wait_for(lambda: not explorer.groups["is_computing"])


def shown(explorer):
    return [item["row"] for item in explorer.view["items"]]


def test_groups_are_off_until_asked_for(session, explore):
    explorer = explore(session)
    assert not explorer.groups["is_on"]
    assert "open" not in explorer.groups
    assert shown(explorer) == session.hits.rows[:60].tolist()


def test_the_page_shows_what_stands_for_each_group(session, explore):
    explorer = explore(session)
    show(explorer)
    grouped = session.hits.grouped(LOW)
    assert 0 < len(grouped) < 150
    assert shown(explorer) == grouped.rows[:60].tolist()
    state = explorer.groups
    assert (state["n_images"], state["n_groups"]) == (150, len(grouped))
    assert (state["n_grouped"], state["is_exact"], state["open"]) == (150, True, None)
    assert explorer.view["range"].endswith(f" of {len(grouped)} groups")
    assert explorer.view["headline"].startswith("150 nearest images")
    assert explorer.marks["tabs"]["hits"] == 150
    folded = {item["row"]: item.get("folded", 0) for item in explorer.view["items"]}
    assert folded == {row: grouped.groups.count(row) for row in shown(explorer)}
    places = np.flatnonzero(np.isin(session.hits.rows, shown(explorer)))
    scores = [f"{each:.3f}" for each in session.hits.scores[places]]
    assert [item["score"] for item in explorer.view["items"]] == scores
    act(explorer, "show", is_on=False)
    assert shown(explorer) == session.hits.rows[:60].tolist()
    assert explorer.view["range"].endswith("of 150")


def test_another_similarity_gives_other_groups(session, explore):
    explorer = explore(session)
    show(explorer, similarity=0.5)
    few = explorer.groups["n_groups"]
    show(explorer, similarity=0.99)
    assert explorer.groups["n_groups"] > few
    assert explorer.groups["similarity"] == 0.99
    assert 0.99 in explorer.groups["similarities"]


def biggest(session):
    """Return the row that stands for most others, and these."""
    groups = session.hits.grouped(LOW).groups
    row = max(groups, key=groups.count)
    return row, groups[row].tolist()


def test_an_open_group_shows_its_images_and_is_labelled_as_one_action(session, explore):
    explorer = explore(session)
    show(explorer)
    row, others = biggest(session)
    act(explorer, "open", row=row)
    opened = explorer.groups["open"]
    assert opened["n_rows"] == 1 + len(others)
    assert [each["row"] for each in opened["members"]] == [row, *others]
    assert all(float(each["similarity"]) >= LOW for each in opened["members"])
    n_events = len(session.history)
    act(explorer, "label", value=1)
    assert session.labels.positive.tolist() == sorted([row, *others])
    assert len(session.history) == n_events + 1
    assert {explorer.marks["rows"][str(each)] for each in (row, *others)} == {1}
    act(explorer, "label", value=-1)
    assert session.labels.negative.tolist() == sorted([row, *others])
    act(explorer, "label", value=0)
    assert len(session.labels) == 0
    explorer.vue_undo()
    settle(explorer)
    assert session.labels.negative.tolist() == sorted([row, *others])
    act(explorer, "close")
    assert explorer.groups["open"] is None


def test_a_label_on_the_page_is_for_the_image_shown_alone(session, explore):
    explorer = explore(session)
    show(explorer)
    row, _ = biggest(session)
    explorer.vue_label({"rows": [row], "value": 1})
    settle(explorer)
    assert session.labels.positive.tolist() == [row]


def test_a_large_group_shows_some_and_labels_all(session, explore, monkeypatch):
    monkeypatch.setattr(explorer_groups, "MAX_MEMBERS", 2)
    explorer = explore(session)
    show(explorer)
    row, others = biggest(session)
    assert len(others) > 2
    act(explorer, "open", row=row)
    opened = explorer.groups["open"]
    assert [each["row"] for each in opened["members"]] == [row, others[0]]
    assert opened["n_rows"] == 1 + len(others)
    act(explorer, "label", value=1)
    assert session.labels.positive.tolist() == sorted([row, *others])


def test_only_the_first_images_of_a_long_list_are_grouped(session, explore, monkeypatch):
    monkeypatch.setattr(explorer_groups, "MAX_GROUPED", 40)
    explorer = explore(session)
    show(explorer)
    grouped = session.hits.grouped(LOW, first=40)
    assert explorer.groups["n_grouped"] == 40
    assert explorer.groups["n_groups"] == len(grouped)
    assert shown(explorer) == grouped.rows[:60].tolist()


def test_rounds_labels_and_tabs_with_groups(session, explore):
    explorer = explore(session)
    show(explorer)
    hits = session.hits.rows
    session.label(positive=hits[:6], negative=hits[100:106])
    result = session.refine()
    settle(explorer)
    wait_for(lambda: explorer.groups.get("n_images") == len(result))
    assert explorer.view["tab"] == "result"
    assert shown(explorer) == result.grouped(LOW).rows[:60].tolist()
    explorer.vue_go({"tab": "yes", "page": 0})
    settle(explorer)
    assert shown(explorer) == sorted(hits[:6].tolist())
    assert (explorer.groups["can_group"], explorer.groups["is_computing"]) == (False, False)
    explorer.vue_go({"tab": "catalog", "page": 0})
    settle(explorer)
    wait_for(lambda: explorer.groups.get("n_images") == 900)
    assert explorer.groups["n_groups"] < 900
    explorer.vue_go({"tab": "hits", "page": 0})
    settle(explorer)
    wait_for(lambda: explorer.groups.get("n_images") == 150)
    assert shown(explorer) == session.hits.grouped(LOW).rows[:60].tolist()


def test_a_new_search_closes_the_group_and_groups_anew(session, explore):
    explorer = explore(session)
    show(explorer)
    row, _ = biggest(session)
    act(explorer, "open", row=row)
    hits = session.search("old train", k=90)
    settle(explorer)
    wait_for(lambda: explorer.groups.get("n_images") == 90)
    assert explorer.groups["open"] is None or row in hits.grouped(LOW).groups
    assert shown(explorer) == hits.grouped(LOW).rows[:60].tolist()


def test_a_group_that_was_closed_by_a_search_stays_closed_after_undo(session, explore):
    explorer = explore(session)
    show(explorer)
    before = shown(explorer)
    row, _ = biggest(session)
    act(explorer, "open", row=row)
    assert explorer.groups["open"]["n_rows"] > 1
    session.filter({"row": (899, None)})
    settle(explorer)
    wait_for(lambda: explorer.groups.get("n_images") == 1)
    assert explorer.groups["open"] is None
    session.undo()
    settle(explorer)
    wait_for(lambda: explorer.groups.get("n_images") == 150)
    assert shown(explorer) == before
    assert explorer.groups["open"] is None


def test_filters_leave_the_groups_of_what_passes(session, explore):
    explorer = explore(session)
    show(explorer)
    session.filter({"row": (300, None)})
    settle(explorer)
    wait_for(lambda: explorer.groups.get("n_images") == len(session.hits))
    assert shown(explorer) == session.hits.grouped(LOW).rows[:60].tolist()
    assert min(shown(explorer)) >= 300


def test_the_export_has_every_image(session, explore):
    explorer = explore(session)
    show(explorer)
    assert shown_result(explorer.contents, "hits").rows.tolist() == session.hits.rows.tolist()


def test_the_zoom_walks_from_group_to_group(session, explore):
    explorer = explore(session)
    show(explorer)
    rows = session.hits.grouped(LOW).rows.tolist()
    explorer.vue_part({"part": "zoom", "action": "open", "data": {"row": rows[0]}})
    settle(explorer)
    assert (explorer.zoom["n_rows"], explorer.zoom["next"]) == (len(rows), rows[1])


def test_a_similarity_outside_is_refused(session, explore):
    explorer = explore(session)
    act(explorer, "show", is_on=True, similarity=0)
    assert "expected a similarity above 0 and up to 1" in explorer.notice["text"]
    assert not explorer.groups["is_on"]


def test_a_group_that_is_not_there_stays_closed(session, explore):
    explorer = explore(session)
    act(explorer, "open", row=3)
    show(explorer)
    act(explorer, "open", row=899_999)
    assert explorer.groups["open"] is None
    act(explorer, "label", value=1)
    assert len(session.labels) == 0
