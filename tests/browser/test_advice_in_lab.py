"""Suggestions, audit and scores in a real JupyterLab; one kernel serves all tests here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SETUP = """
import sys
sys.path.insert(0, {tests!r})
from word_encoder import WordEncoder
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.explorer import Explorer
from clipbranches_widget.session import Session
catalog = Catalog.open({catalog!r})
"""
NEW_SESSION = """
import tempfile, pathlib
session = Session(catalog, pathlib.Path(tempfile.mkdtemp()) / "s.jsonl", encoder=WordEncoder())
hits = session.search("striped bird")
session.label(positive=hits.rows[:5], negative=hits.rows[50:55])
result = session.refine()
"""


@pytest.fixture(scope="module")
def shared(open_shared_notebook, word_catalog):
    setup = SETUP.format(tests=str(TESTS), catalog=str(word_catalog))
    show = "explorer = Explorer(session)\nexplorer"
    return open_shared_notebook([setup, NEW_SESSION, show, "explorer"], height=1400)


@pytest.fixture
def nb(shared):
    """The shared notebook, run anew: a session with a round, an Explorer, and two views of it."""
    shared.theme("JupyterLab Light")
    shared.console.clear()
    shared.page.set_viewport_size({"width": 1280, "height": 1400})
    shared.run_all()
    shared.explorer()
    yield shared
    assert shared.console == []


def open_panel(explorer, name):
    explorer.get_by_role("group", name="Panels").get_by_role("button", name=name).click()
    panel = explorer.locator(f".cbw-{name.lower()}")
    panel.wait_for()
    return panel


def text_of(locator):
    return " ".join(locator.inner_text().split())


# -- suggestions ----------------------------------------------------------------------------------


def test_suggestions_are_answered_by_click_and_by_key(nb, artifacts):
    explorer = nb.explorer()
    panel = open_panel(explorer, "Suggest")
    images = panel.locator(".cbw-suggestion")
    images.first.wait_for()
    rows = nb.value("[int(row) for row in session.suggest(12)]")
    reasons = nb.value("list(session.suggest(12).reasons)")
    assert [text_of(each) for each in panel.locator(".cbw-reason").all()] == reasons
    panel.locator(".cbw-skeleton").first.wait_for(state="detached")

    images.nth(0).get_by_role("button", name="yes").click()
    images.nth(1).focus()
    for key in ("n", "y", "ArrowRight", "n"):  # an answer goes on to the next
        nb.page.keyboard.press(key)
    assert images.nth(5).evaluate("one => one === document.activeElement")
    signs = f"[session.labels.get(row) for row in {rows[:6]}]"
    nb.wait_value(signs, [1, -1, 1, 0, -1, 0])
    assert images.count() == 12
    assert images.nth(1).locator(".cbw-badge").is_visible()
    nb.shot(artifacts, "advice-suggest", explorer)

    images.nth(6).locator(".cbw-picture").click()
    zoom = explorer.get_by_role("dialog")
    zoom.wait_for()
    nb.page.keyboard.press("Escape")
    zoom.wait_for(state="detached")
    images.nth(1).focus()
    nb.page.keyboard.press("u")
    nb.wait_value(signs, [1, 0, 1, 0, -1, 0])
    panel.get_by_role("button", name="Ask for more").click()
    images.nth(0).get_by_role("button", name="yes", pressed=False).wait_for()
    more = nb.value("explorer.suggest['items']")
    assert len(more) == 12
    assert not {item["row"] for item in more} & set(rows)


def test_when_all_are_answered_it_says_what_next(nb):
    explorer = nb.explorer()
    panel = open_panel(explorer, "Suggest")
    images = panel.locator(".cbw-suggestion")
    images.first.wait_for()
    images.nth(0).focus()
    for _ in range(12):
        nb.page.keyboard.press("n")
    panel.get_by_text("All answered.").wait_for()
    nb.wait_value("len(session.labels.negative)", 17)
    explorer.get_by_role("button", name=re.compile("^Refine")).click()
    panel.get_by_text("teach the next round most").wait_for()
    assert not panel.locator(".cbw-badge").count()


# -- audit ----------------------------------------------------------------------------------------


def start_audit(nb, explorer, n):
    panel = open_panel(explorer, "Audit")
    panel.get_by_role("radio", name=f"{n} images").check()
    assert "minutes" in text_of(panel)
    panel.get_by_role("button", name="Start the audit").click()
    panel.locator(".cbw-audit-stage").wait_for()
    panel.locator(".cbw-measure").first.wait_for()
    return panel


def label_rest(nb, n=1000):
    """Answer the audit's images as their captions say, in a cell."""
    nb.run_cell(
        f"rows = [item['row'] for item in explorer.audit['items']][:{n}]\n"
        "right = [row for row in rows if 'striped bird' in catalog.caption(row)]\n"
        "session.label(positive=right, negative=sorted(set(rows) - set(right)))"
    )


def test_an_audit_image_by_image_with_the_keyboard(nb, artifacts):
    explorer = nb.explorer()
    panel = start_audit(nb, explorer, 30)
    rows = nb.value("[int(row) for row in session.audit(30)]")
    where, press = panel.locator(".cbw-audit-progress b"), nb.page.keyboard.press
    assert where.inner_text() == "1 of 30"
    stage = panel.locator(".cbw-audit-picture")
    assert stage.evaluate("one => one === document.activeElement")
    signs = f"[session.labels.get(row) for row in {rows[:6]}]"

    press("y")
    where.filter(has_text="2 of 30").wait_for()
    press("n")
    press("s")
    where.filter(has_text="4 of 30").wait_for()
    panel.get_by_text("1 skipped").wait_for()
    panel.get_by_role("button", name="No", exact=True).click()
    where.filter(has_text="5 of 30").wait_for()
    nb.wait_value(signs, [1, -1, 0, -1, 0, 0])

    press("Backspace")
    where.filter(has_text="4 of 30").wait_for()
    press("Backspace")
    where.filter(has_text="3 of 30").wait_for()
    press("y")
    where.filter(has_text="4 of 30").wait_for()
    press("y")
    where.filter(has_text="5 of 30").wait_for()
    nb.wait_value(signs, [1, -1, 1, 1, 0, 0])
    panel.get_by_text("1 skipped").wait_for(state="detached")
    press("z")  # undo goes back by itself
    nb.wait_value(signs, [1, -1, 1, -1, 0, 0])
    press("z")
    where.filter(has_text="3 of 30").wait_for()
    press("y")
    where.filter(has_text="5 of 30").wait_for()
    nb.shot(artifacts, "advice-audit-under-way", explorer)


def test_the_audits_result_is_shown_plainly(nb, artifacts):
    explorer = nb.explorer()
    panel = start_audit(nb, explorer, 60)
    label_rest(nb)
    panel.get_by_text("All 60 labelled").wait_for()
    said = "audit.report(session.labels)"
    nb.run_cell(
        "from clipbranches_widget.audit import propose\n"
        "audit = explorer._parts['audit']._drawn.audit"
    )
    panel.locator(".cbw-audit-advice", has_text=nb.value(f"{said}.advice")).wait_for()
    measures = [text_of(each) for each in panel.locator(".cbw-measure-text").all()]
    assert measures == [
        f"Precision {nb.value(f'str({said}.precision)')}",
        f"Recall {nb.value(f'str({said}.recall)')}",
        f"Recall nearby {nb.value(f'str({said}.recall_nearby)')}",
    ]
    low, high = (nb.value(f"{said}.recall.{end}") for end in ("low", "high"))
    band = panel.locator(".cbw-interval-part").nth(1).bounding_box()
    line = panel.locator(".cbw-interval-all").nth(1).bounding_box()
    assert (band["x"] - line["x"]) / line["width"] == pytest.approx(low, abs=0.01)
    assert band["width"] / line["width"] == pytest.approx(high - low, abs=0.01)
    nb.shot(artifacts, "advice-audit-report", explorer)

    panel.get_by_label("Where to draw more images from").select_option("boundary")
    panel.get_by_role("button", name="Add 20").click()
    panel.locator(".cbw-audit-progress b", has_text="61 of 80").wait_for()
    label_rest(nb)
    panel.get_by_text("All 80 labelled").wait_for()
    explorer.get_by_role("button", name=re.compile("^Refine")).click()
    panel.get_by_text("This is about a former answer").wait_for()
    nb.shot(artifacts, "advice-audit-former", explorer)
    panel.get_by_role("button", name="New audit").click()
    nb.shot(artifacts, "advice-audit-start", explorer)
    panel.get_by_role("button", name="Start the audit").click()
    panel.locator(".cbw-audit-progress b", has_text="1 of 60").wait_for()


def test_an_audit_survives_closing_and_a_second_view_agrees(nb):
    one, two = nb.explorer(0), nb.explorer(1)
    panel = start_audit(nb, one, 30)
    other = two.locator(".cbw-audit-progress b")
    other.filter(has_text="1 of 30").wait_for()
    panel.locator(".cbw-audit-picture").focus()
    nb.page.keyboard.press("n")
    nb.page.keyboard.press("s")
    other.filter(has_text="3 of 30").wait_for()
    open_button = one.get_by_role("group", name="Panels").get_by_role("button", name="Audit")
    open_button.click()
    panel.wait_for(state="detached")
    open_button.click()
    panel.locator(".cbw-audit-progress b", has_text="3 of 30").wait_for()


# -- scores ---------------------------------------------------------------------------------------


def open_scores(explorer):
    panel = open_panel(explorer, "Scores")
    slider = panel.get_by_role("slider", name="Threshold")
    slider.wait_for()
    return panel, slider


def valuetext(nb, threshold):
    frame = nb.value(f"session.result.preview([{threshold}]).to_dict('records')[0]")
    images = f"{frame['n_rows']:,} image" + ("" if frame["n_rows"] == 1 else "s")
    right = f"{100 * frame['expected_precision']:.0f}"
    return f"{threshold:.2f}: {images}, about {right} % right"


def drag(nb, panel, slider, to):
    plot, line = panel.locator(".cbw-plot").bounding_box(), slider.bounding_box()
    y = plot["y"] + plot["height"] / 3
    nb.page.mouse.move(line["x"] + line["width"] / 2, y)
    nb.page.mouse.down()
    nb.page.mouse.move(plot["x"] + plot["width"] * 0.9, y)
    nb.page.mouse.move(plot["x"] + plot["width"] * to, y)


def test_the_threshold_is_dragged_and_the_images_follow(nb, artifacts):
    explorer = nb.explorer()
    panel, slider = open_scores(explorer)
    n_own = nb.value("len(session.result)")
    assert slider.get_attribute("aria-valuetext") == valuetext(nb, 0.3)
    assert panel.locator(".cbw-bar").count() == 40
    assert panel.locator(".cbw-ticks .cbw-tick-yes").count() == 5
    drag(nb, panel, slider, 0.6)
    assert slider.get_attribute("aria-valuetext") == valuetext(nb, 0.6)
    chip = explorer.get_by_role("button", name="threshold 0.6, reset")
    assert not chip.is_visible()  # nothing is asked for before it is let go
    nb.page.mouse.up()
    chip.wait_for()
    n_cut = nb.value("len(session.result.at(0.6))")
    explorer.locator(".cbw-headline", has_text=f"{n_cut:,} matching").wait_for()
    assert n_cut < n_own
    assert nb.rows_shown(explorer) == nb.value("session.result.at(0.6).rows[:60].tolist()")
    assert nb.value("len(session.result)") == n_own
    nb.shot(artifacts, "advice-scores", explorer)
    chip.click()
    explorer.locator(".cbw-headline", has_text=f"{n_own:,} matching").wait_for()
    assert slider.get_attribute("aria-valuetext") == valuetext(nb, 0.3)


def test_the_threshold_by_keyboard_and_two_views(nb):
    one, two = nb.explorer(0), nb.explorer(1)
    _, slider = open_scores(one)
    slider.focus()
    for key in ("PageUp", "ArrowRight", "ArrowRight", "ArrowLeft"):
        nb.page.keyboard.press(key)
    assert slider.get_attribute("aria-valuetext") == valuetext(nb, 0.41)
    for explorer in (one, two):
        explorer.get_by_role("button", name="threshold 0.41, reset").wait_for()
    other = two.get_by_role("slider", name="Threshold")
    assert other.get_attribute("aria-valuetext") == valuetext(nb, 0.41)
    assert nb.rows_shown(one) == nb.rows_shown(two)
    nb.page.keyboard.press("Home")
    one.locator(".cbw-scores-warning").wait_for()
    one.locator(".cbw-notes", has_text="images may be missing").wait_for()
    nb.page.keyboard.press("End")
    assert slider.get_attribute("aria-valuenow") == "0.99"


def test_a_threshold_for_the_next_rounds(nb):
    explorer = nb.explorer()
    panel, slider = open_scores(explorer)
    drag(nb, panel, slider, 0.5)
    nb.page.mouse.up()
    panel.get_by_role("button", name="Use for the next rounds").click()
    nb.wait_value("session.result.threshold", 0.5)
    panel.get_by_role("button", name="Reset to 0.5").wait_for()
    nb.run_cell("session.label(negative=session.result.rows[-1:])")
    explorer.get_by_role("button", name="Refine (5 yes, 6 no)").click()
    nb.wait_value("(session.is_stale, session.result.threshold)", [False, 0.5])


# -- all three ------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["Light", "Dark"])
@pytest.mark.parametrize("width", [800, 1700])
def test_looks(nb, artifacts, theme, width):
    nb.theme(f"JupyterLab {theme}")
    nb.page.set_viewport_size({"width": width, "height": 1400})
    explorer = nb.explorer()
    start_audit(nb, explorer, 30)
    label_rest(nb, 12)
    explorer.locator(".cbw-audit-progress b", has_text="13 of 30").wait_for()
    for name in ("Scores", "Suggest", "Audit"):
        panel = explorer.locator(f".cbw-{name.lower()}")
        if not panel.is_visible():
            open_panel(explorer, name)
        panel.locator(".cbw-plot, .cbw-suggestion, .cbw-measure").first.wait_for()
        nb.wait_painted(explorer)
        overflow = explorer.evaluate("root => root.scrollWidth - root.clientWidth")
        assert overflow <= 0
        nb.shot(artifacts, f"advice-{name}-{theme}-{width}", explorer)


def test_a_reload_loses_nothing(nb):
    explorer = nb.explorer()
    panel = start_audit(nb, explorer, 30)
    panel.locator(".cbw-audit-picture").focus()
    nb.page.keyboard.press("n")
    nb.page.keyboard.press("s")
    nb.wait_value("len(explorer.audit['skipped'])", 1)
    nb.command("docmanager:save")
    nb.open(reset=False)
    explorer = nb.explorer()
    explorer.locator(".cbw-audit-progress b", has_text="3 of 30").wait_for()
    explorer.locator(".cbw-measure").first.wait_for()
    explorer.locator(".cbw-audit-picture img").wait_for()
