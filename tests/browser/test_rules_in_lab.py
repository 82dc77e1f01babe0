"""The panel of rules in a real JupyterLab; one kernel serves all tests here."""

from __future__ import annotations

import pytest

NEW_SESSION = """
path = pathlib.Path(tempfile.mkdtemp()) / "session.jsonl"
session = Session(catalog, path, encoder=WordEncoder())
session.search("bird", k=300)
session.label(positive=birds[:6], negative=fishes[:6])
session.refine()
"""


@pytest.fixture(scope="module")
def shared(open_shared_notebook, word_setup):
    return open_shared_notebook([word_setup, NEW_SESSION, "explorer = Explorer(session)\nexplorer"])


@pytest.fixture
def nb(shared):
    """The shared notebook with every cell run anew: a new session with a round."""
    shared.theme("JupyterLab Light")
    shared.console.clear()
    shared.page.set_viewport_size({"width": 1280, "height": 1100})
    shared.run_all()
    yield shared
    assert shared.console == []


@pytest.fixture
def rules(nb):
    """The open panel, with its pictures."""
    explorer = nb.explorer()
    explorer.get_by_role("button", name="Rules").click()
    panel = explorer.get_by_role("region", name="Rules")
    panel.locator("li").first.wait_for()
    return panel


def button(where, name):
    return where.get_by_role("button", name=name, exact=True)


def text_of(rule):
    return " ".join(rule.inner_text().split())


def test_each_rule_tells_what_it_found(nb, rules):
    result = nb.value(
        "[[b.text[:50], b.n_rows, int((session.result.branch_ids == b.id).sum()), b.n_positive,"
        " b.n_negative, list(b.example_rows), b.box is not None] for b in session.result.branches]",
    )
    shown = rules.locator("li")
    assert shown.count() == len(result)
    for number, (text, n_rows, n_matches, n_yes, n_no, examples, is_rule) in enumerate(result):
        rule = shown.nth(number)
        said = text_of(rule)
        assert said.startswith(f"R{number + 1} ")
        assert " ".join(text.split()) in said
        assert f"{n_matches:,} of the matches" in said
        assert f"{n_yes} yes {n_no} no" in said
        assert (f"{n_rows:,} in the catalog" in said) == is_rule
        assert rule.locator(".cbw-thumb").count() == len(examples)
    nb.wait_painted(rules)


def test_a_click_on_an_example_zooms(nb, rules):
    rules.locator(".cbw-thumb").first.click()
    row = nb.value("session.result.branches[0].example_rows[0]")
    nb.wait_value("explorer.zoom.get('row')", row)
    nb.page.keyboard.press("Escape")
    nb.wait_value("explorer.zoom.get('row')", None)


def test_switching_off_and_on_changes_the_matches(nb, rules):
    explorer = nb.explorer()
    before = nb.value("session.result.rows.tolist()")
    first = rules.locator("li").first
    button(first, "Switch off rule R1").click()
    first.locator(".cbw-rule-state", has_text="off").wait_for()
    nb.wait_value("session.result.branches[0].state", "off")
    after = nb.value("session.result.rows.tolist()")
    assert len(after) < len(before)
    explorer.locator(".cbw-headline", has_text=f"{len(after):,} matching").wait_for()
    assert nb.rows_shown(explorer) == after[:60]
    first.get_by_text("0 of the matches").wait_for()
    button(first, "Switch on rule R1").click()
    explorer.locator(".cbw-headline", has_text=f"{len(before):,} matching").wait_for()
    assert nb.rows_shown(explorer) == before[:60]
    first.locator(".cbw-rule-state", has_text="on").wait_for()


def test_the_wish_shows_before_the_kernel_answers(nb, rules):
    nb.page.evaluate(
        """source => {
            const panel = window.jupyterapp.shell.currentWidget;
            panel.sessionContext.session.kernel.requestExecute({code: source});
        }""",
        "import time; explorer._ui.post(lambda: time.sleep(3)); time.sleep(3)",
    )
    first, second = rules.locator("li").nth(0), rules.locator("li").nth(1)
    button(first, "Pin rule R1").click()
    button(second, "Switch off rule R2").click()
    assert first.locator(".cbw-rule-state").inner_text().strip() == "pinned"
    assert second.locator(".cbw-rule-state").inner_text().strip() == "off"
    assert rules.locator("li").count() > 2
    nb.wait_value("[b.state for b in session.result.branches[:2]]", ["pinned", "off"])
    nb.wait_value("explorer.rules['branches'][1]['state']", "off")
    assert first.locator(".cbw-rule-state").inner_text().strip() == "pinned"
    button(first, "Unpin rule R1").click()
    nb.wait_value("[b.state for b in session.result.branches[:2]]", ["on", "off"])


def test_only_the_matches_of_a_rule_and_all_again(nb, rules):
    explorer = nb.explorer()
    rows = nb.value("session.result.rows[session.result.branch_ids == 1].tolist()")
    button(rules, "Show only the matches of rule R2").click()
    explorer.locator(".cbw-headline", has_text="found by rule R2").wait_for()
    assert nb.rows_shown(explorer) == rows[:60]
    tab = explorer.get_by_role("button", name=f"Only R2 {len(rows)}", exact=True)
    assert tab.get_attribute("aria-pressed") == "true"
    explorer.get_by_role("button", name="Rules").click()  # the tab outlives the panel
    rules.wait_for(state="detached")
    button(explorer, "Close Only R2").click()
    explorer.locator(".cbw-headline", has_text="matching").wait_for()
    assert tab.count() == 0


@pytest.mark.parametrize(("kind", "method"), [("SQL", "to_sql"), ("pandas", "to_pandas_query")])
def test_a_rule_is_copied(nb, rules, kind, method):
    nb.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button(rules, f"Copy rule R1 as {kind}").click()
    expected = nb.value(f"session.result.branches[0].{method}()")
    rules.locator("li").first.locator(".mdi-check").last.wait_for()
    assert nb.page.evaluate("navigator.clipboard.readText()") == expected


def test_where_copying_is_not_allowed_the_text_is_selected(nb, rules):
    nb.page.evaluate(
        "Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})"
    )
    button(rules, "Copy rule R1 as SQL").click()
    field = rules.get_by_role("textbox")
    field.wait_for()
    assert field.input_value() == nb.value("session.result.branches[0].to_sql()")
    chosen = "field => field.value.slice(field.selectionStart, field.selectionEnd)"
    assert field.evaluate(chosen) == field.input_value()
    assert field.evaluate("field => field === document.activeElement")
    nb.page.evaluate("delete navigator.clipboard")
    field.press("Escape")
    field.wait_for(state="detached")


def test_the_keyboard_reaches_every_control(nb, rules):
    button(rules, "Switch off rule R1").focus()
    nb.page.keyboard.press("Enter")
    nb.wait_value("session.result.branches[0].state", "off")
    nb.page.keyboard.press("Tab")
    nb.page.keyboard.press("Space")
    nb.wait_value("session.result.branches[0].state", "pinned")


def test_looks(nb, rules, artifacts):
    explorer = nb.explorer()
    button(rules, "Pin rule R1").click()
    button(rules, "Switch off rule R2").click()
    nb.wait_value("[b.state for b in session.result.branches[:2]]", ["pinned", "off"])
    button(rules, "Show only the matches of rule R1").click()
    explorer.locator(".cbw-headline", has_text="found by rule R1").wait_for()
    for theme, width in (("Light", 1280), ("Dark", 1280), ("Dark", 852), ("Light", 852)):
        nb.theme(f"JupyterLab {theme}")
        nb.page.set_viewport_size({"width": width, "height": 1100})
        nb.wait_painted(explorer)
        assert explorer.evaluate("root => root.scrollWidth - root.clientWidth") <= 0
        nb.shot(artifacts, f"rules-{theme}-{width}", explorer)
