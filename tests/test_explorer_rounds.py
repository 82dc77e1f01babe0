"""The Explorer's panel of rounds on the kernel side: real sessions, no browser."""

from __future__ import annotations

import pytest
from explorer_rig import settle, wait_for
from word_encoder import WordEncoder, build_catalog

from clipbranches_widget.session import Session

PART = "rounds"


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
def three(session, catalog):
    """Three rounds, each with more labels."""
    birds, fishes = rows_of(catalog, "bird"), rows_of(catalog, "fish")
    session.search("bird")
    for number in range(3):
        session.label(birds[3 * number : 3 * number + 3], fishes[2 * number : 2 * number + 2])
        session.refine(seed=number)
    return session


@pytest.fixture
def timeline(three, explore):
    """Return an Explorer with three rounds, the panel open, and every count there."""
    explorer = explore(three)
    explorer.vue_dock({"name": "rounds"})
    wait_for(lambda: explorer.rounds.get("rounds"))
    wait_for(lambda: all(each["n_gained"] is not None for each in explorer.rounds["rounds"][1:]))
    settle(explorer)
    return explorer


def show(explorer, number):
    act(explorer, "show", number=number)
    wait_for(lambda: (explorer.rounds["shown"] or {}).get("gained"))
    settle(explorer)
    return explorer.rounds["shown"]


def shown(explorer):
    return [item["row"] for item in explorer.view["items"]]


def rows_of(catalog, noun):
    words = catalog.items.column("caption").to_pylist()
    return [row for row, caption in enumerate(words) if f" {noun} " in caption]


def test_the_timeline_tells_every_round_and_what_it_changed(timeline, session):
    cards = timeline.rounds["rounds"]
    assert [card["number"] for card in cards] == [1, 2, 3]
    assert [(card["n_yes"], card["n_no"]) for card in cards] == [(3, 2), (6, 4), (9, 6)]
    assert [card["n_rows"] for card in cards] == [len(session.round(n)) for n in (1, 2, 3)]
    assert [card["is_current"] for card in cards] == [False, False, True]
    assert {card["query"] for card in cards} == {"bird"}
    assert (cards[0]["n_gained"], cards[0]["n_lost"]) == (None, None)
    for number in (2, 3):
        found = session.compare(number - 1, number)
        card = cards[number - 1]
        assert (card["n_gained"], card["n_lost"]) == (len(found.gained), len(found.lost))
    assert timeline.rounds["shown"] is None
    assert timeline.rounds["is_there"]
    assert timeline.rounds["n_earlier"] == 0


def test_a_reopened_session_counts_too(three, catalog, explore):
    again = Session(catalog, three.path, encoder=WordEncoder())
    explorer = explore(again)
    result = again.result
    explorer.vue_dock({"name": "rounds"})
    wait_for(lambda: explorer.rounds.get("rounds"))
    wait_for(lambda: all(each["n_gained"] is not None for each in explorer.rounds["rounds"][1:]))
    assert again.result is result


def test_a_round_shows_what_it_gained_and_lost(timeline, session):
    found = session.compare(1, 2)
    view = show(timeline, 2)
    assert (view["number"], view["against"], view["n_kept"]) == (2, 1, len(found.kept))
    for part, rows in ((view["gained"], found.gained), (view["lost"], found.lost)):
        assert part["n"] == len(rows)
        assert [item["row"] for item in part["items"]] == rows[:60].tolist()
    assert len(found.gained) + len(found.lost) > 0
    labelled = next(row for row in (*found.gained, *found.lost))
    timeline.vue_label({"rows": [int(labelled)], "value": -1})
    settle(timeline)
    assert timeline.marks["rows"][str(labelled)] == -1
    act(timeline, "show", number=None)
    assert timeline.rounds["shown"] is None


def test_of_many_clicks_in_a_row_the_last_round_is_shown(timeline, session):
    for number in (2, 3, 2, 3):
        timeline.vue_part({"part": "rounds", "action": "show", "data": {"number": number}})
    wait_for(lambda: (timeline.rounds["shown"] or {}).get("gained"))
    settle(timeline)
    found = session.compare(2, 3)
    assert timeline.rounds["shown"]["number"] == 3
    assert timeline.rounds["shown"]["gained"]["n"] == len(found.gained)


def test_a_first_round_has_nothing_to_be_compared_with(timeline):
    act(timeline, "show", number=1)
    view = timeline.rounds["shown"]
    assert (view["number"], view["against"], view["gained"]) == (1, None, None)


@pytest.mark.parametrize("what", ["gained", "lost"])
def test_all_of_a_difference_is_shown_on_the_page(timeline, session, what):
    number = next(n for n in (2, 3) if len(getattr(session.compare(n - 1, n), what)))
    rows = getattr(session.compare(number - 1, number), what)
    show(timeline, number)
    act(timeline, "all", what=what)
    assert timeline.view["tab"] == "difference"
    assert shown(timeline) == rows[:60].tolist()
    assert timeline.marks["tabs"]["difference"] == len(rows)
    assert timeline.view["extras"]["difference"] == {
        "text": f"{what.capitalize()} in round {number}",
        "part": "rounds",
    }
    assert timeline.view["headline"].endswith(
        f"{what} in round {number}, against round {number - 1}"
    )
    act(timeline, "close_tab")
    assert timeline.view["tab"] == "result"
    assert "difference" not in timeline.marks["tabs"]


def test_going_back_in_the_widget_and_undo(timeline, session):
    act(timeline, "go_back", number=1)
    assert session.history[-1].description == "go back to round 1"
    assert len(session.labels) == 5
    assert [card["is_current"] for card in timeline.rounds["rounds"]] == [True, False, False]
    assert timeline.view["tab"] == "result"
    assert shown(timeline) == session.round(1).rows[:60].tolist()
    assert timeline.marks["n_yes"] == 3
    assert not timeline.marks["is_stale"]
    assert timeline.task["name"] == ""
    timeline.vue_undo()
    settle(timeline)
    assert timeline.rounds["rounds"][2]["is_current"]
    assert timeline.marks["n_yes"] == 9
    timeline.vue_undo()
    settle(timeline)
    card = timeline.rounds["rounds"][2]
    assert (card["undone"], card["is_current"]) == (True, False)


def test_a_branched_round_is_compared_with_the_one_gone_back_to(timeline, session, catalog):
    act(timeline, "go_back", number=1)
    session.label(positive=rows_of(catalog, "tree")[:3])
    assert len(session.refine())
    settle(timeline)
    found = session.compare(1, 4)
    view = show(timeline, 4)
    assert (view["against"], view["gained"]["n"]) == (1, len(found.gained))
    assert timeline.rounds["rounds"][3]["parent"] == 1


def test_other_labels_or_rules_are_not_there(timeline, session):
    session.switch_off(0)
    settle(timeline)
    assert not timeline.rounds["is_there"]
    session.undo()
    settle(timeline)
    assert timeline.rounds["is_there"]
    session.label(positive=[3])
    settle(timeline)
    assert not timeline.rounds["is_there"]
    act(timeline, "go_back", number=3)
    assert timeline.rounds["is_there"]


def test_it_says_that_filters_hide_some_of_what_is_counted(timeline, session):
    assert not timeline.rounds["is_filtered"]
    before = [card["n_rows"] for card in timeline.rounds["rounds"]]
    session.filter({"caption": "red"})
    settle(timeline)
    assert timeline.rounds["is_filtered"]
    assert [card["n_rows"] for card in timeline.rounds["rounds"]] == before


@pytest.mark.parametrize(
    ("action", "data", "message"),
    [
        ("show", {"number": 4}, "expected the number of a round from 1 to 3, got 4"),
        ("go_back", {"number": 0}, "expected the number of a round from 1 to 3, got 0"),
        ("all", {"what": "gained"}, "expected a round whose difference is shown"),
    ],
)
def test_what_is_not_there_is_refused(timeline, action, data, message):
    act(timeline, action, **data)
    assert timeline.notice["kind"] == "error"
    assert message in timeline.notice["text"]


def test_closing_the_panel_closes_the_difference(timeline):
    show(timeline, 2)
    timeline.vue_dock({"name": ""})
    timeline.vue_dock({"name": "rounds"})
    settle(timeline)
    assert timeline.rounds["shown"] is None


def test_a_long_history_lists_the_latest(session, explore, monkeypatch):
    monkeypatch.setattr("clipbranches_widget.explorer_rounds.MAX_ROUNDS", 2)
    session.label(positive=[3, 4])
    for seed in range(4):
        session.refine(seed=seed)
    explorer = explore(session)
    explorer.vue_dock({"name": "rounds"})
    settle(explorer)
    assert [card["number"] for card in explorer.rounds["rounds"]] == [3, 4]
    assert explorer.rounds["n_earlier"] == 2
