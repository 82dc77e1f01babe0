"""The panel of rounds in a real JupyterLab; one kernel serves all tests here."""

from __future__ import annotations

import pytest

NEW_SESSION = """
path = pathlib.Path(tempfile.mkdtemp()) / "session.jsonl"
session = Session(catalog, path, encoder=WordEncoder())
session.search("<b>bird</b> bird", k=300)
for n in range(3):
    session.label(positive=birds[3 * n : 3 * n + 3], negative=fishes[4 * n : 4 * n + 4])
    session.refine(threshold=[0.1, 0.5, 0.3][n])
"""


@pytest.fixture(scope="module")
def shared(open_shared_notebook, word_setup):
    return open_shared_notebook([word_setup, NEW_SESSION, "explorer = Explorer(session)\nexplorer"])


@pytest.fixture
def nb(shared):
    """The shared notebook with every cell run anew: a new session with three rounds."""
    shared.theme("JupyterLab Light")
    shared.console.clear()
    shared.page.set_viewport_size({"width": 1280, "height": 1100})
    shared.run_all()
    yield shared
    assert shared.console == []


@pytest.fixture
def rounds(nb):
    """The open panel."""
    explorer = nb.explorer()
    explorer.get_by_role("button", name="Rounds").click()
    panel = explorer.get_by_role("region", name="Rounds")
    panel.locator(".cbw-round").first.wait_for()
    return panel


def card(rounds, number):
    return rounds.locator(".cbw-round").nth(number - 1)


def compared(nb, before, after):
    """Return the rows gained and lost, from the kernel."""
    found = f"session.compare({before}, {after})"
    return nb.value(f"[{found}.gained.tolist(), {found}.lost.tolist()]")


def thumbs(rounds, part):
    """Return how many pictures a part of the difference shows, and its count."""
    section = rounds.locator(f".cbw-part-{part}")
    return section.locator(".cbw-thumb").count(), section.locator(".cbw-part-head b").inner_text()


def test_the_timeline_counts_every_round(nb, rounds):
    found = nb.value("[[r.n_rows, r.n_yes, r.n_no] for r in session.rounds]")
    for number, (n_rows, n_yes, n_no) in enumerate(found, start=1):
        said = " ".join(card(rounds, number).inner_text().split())
        assert said.startswith(f"Round {number}")
        assert f"{n_rows:,} matches" in said
        assert f"{n_yes} yes · {n_no} no" in said
        assert "<b>bird</b> bird" in said
    for number in (2, 3):
        gained, lost = compared(nb, number - 1, number)
        expected = f"+{len(gained):,} \u2212{len(lost):,}"
        line = card(rounds, number).locator(".cbw-round-diff")
        line.get_by_text(f"\u2212{len(lost):,}").wait_for()
        assert " ".join(line.inner_text().split()) == expected
    assert card(rounds, 3).get_by_text("here").count() == 1
    assert card(rounds, 1).get_by_text("here").count() == 0


def test_a_click_shows_what_was_gained_and_lost(nb, rounds):
    explorer = nb.explorer()
    gained, lost = compared(nb, 1, 2)
    assert len(lost) > 60
    card(rounds, 2).click()
    rounds.get_by_text("Round 2 against round 1").wait_for()
    rounds.locator(".cbw-part-lost .cbw-thumb").nth(59).wait_for()
    assert thumbs(rounds, "gained") == (min(len(gained), 60), f"{len(gained):,}")
    assert thumbs(rounds, "lost") == (60, f"{len(lost):,}")
    nb.wait_painted(rounds)
    rounds.get_by_role("button", name=f"Show all {len(lost)} lost").click()
    explorer.locator(".cbw-headline", has_text="lost in round 2, against round 1").wait_for()
    assert nb.rows_shown(explorer) == lost[:60]
    explorer.get_by_role("button", name="Close Lost in round 2").click()
    explorer.locator(".cbw-headline", has_text="matching").wait_for()
    card(rounds, 2).click()
    rounds.locator(".cbw-difference").wait_for(state="detached")


def test_a_click_shows_at_once_while_the_kernel_is_busy(nb, rounds):
    nb.run_cell("import time; explorer._ui.post(lambda: time.sleep(2))")
    card(rounds, 3).click()
    assert card(rounds, 3).get_attribute("aria-pressed") == "true"
    assert rounds.get_by_text("Round 3 against round 2").count() == 1
    rounds.get_by_text("Comparing…").wait_for(timeout=1500)
    rounds.locator(".cbw-part-gained").wait_for()
    card(rounds, 1).click()
    rounds.get_by_text("There is no round before it").wait_for()


def test_going_back_and_branching_off(nb, rounds):
    explorer = nb.explorer()
    labels = nb.value("session.labels.to_dict()")
    card(rounds, 3).click()
    assert rounds.get_by_role("button", name="Go back to this round").is_disabled()
    card(rounds, 1).click()
    rounds.get_by_text("Round 1, a first round").wait_for()
    rounds.get_by_role("button", name="Go back to this round").click()
    card(rounds, 1).get_by_text("here").wait_for()
    assert nb.value("session.labels.to_dict()") == {
        "positive": sorted(labels["positive"])[:3],
        "negative": sorted(labels["negative"])[:4],
    }
    explorer.get_by_role("button", name="Refine (3 yes, 4 no)").wait_for()
    assert nb.rows_shown(explorer) == nb.value("session.round(1).rows[:60].tolist()")
    nb.image_cell(explorer, 59).get_by_role("button", name="Mark no").click()
    explorer.get_by_role("button", name="Refine (3 yes, 5 no)").click()
    card(rounds, 4).get_by_text("from 1").wait_for()
    card(rounds, 4).get_by_text("here").wait_for()
    explorer.get_by_role("button", name="Undo", exact=True).click()
    card(rounds, 4).get_by_text("undone").wait_for()
    explorer.get_by_role("button", name="Undo", exact=True).click()
    explorer.get_by_role("button", name="Undo", exact=True).click()
    card(rounds, 3).get_by_text("here").wait_for()
    nb.wait_value("session.labels.to_dict()", labels)


def test_the_keyboard_and_the_names(nb, rounds):
    gained, lost = compared(nb, 2, 3)
    name = f", {len(gained)} gained, {len(lost)} lost, 9 yes, 12 no"
    third = rounds.get_by_role("button", name=name)
    third.wait_for()
    assert "the session stands here" in third.get_attribute("aria-label")
    card(rounds, 1).focus()
    nb.page.keyboard.press("Tab")
    nb.page.keyboard.press("Enter")
    rounds.get_by_text("Round 2 against round 1").wait_for()
    rounds.locator(".cbw-part-lost").wait_for()
    rounds.locator(".cbw-thumb").first.focus()
    nb.page.keyboard.press("Enter")
    nb.wait_value("explorer.zoom.get('row') is not None", True)
    nb.page.keyboard.press("Escape")


def test_looks(nb, rounds, artifacts):
    explorer = nb.explorer()
    nb.run_cell(
        "session.go_back(2); session.label(positive=birds[20:30]); session.refine();"
        "session.undo(); session.switch_off(0)"
    )
    card(rounds, 4).get_by_text("undone").wait_for()
    card(rounds, 2).get_by_text("here, changed").wait_for()
    card(rounds, 2).click()
    rounds.locator(".cbw-part-lost").wait_for()
    for theme, width in (("Light", 1280), ("Dark", 1280), ("Dark", 852), ("Light", 852)):
        nb.theme(f"JupyterLab {theme}")
        nb.page.set_viewport_size({"width": width, "height": 1100})
        nb.wait_painted(explorer)
        assert explorer.evaluate("root => root.scrollWidth - root.clientWidth") <= 0
        nb.shot(artifacts, f"rounds-{theme}-{width}", explorer)
