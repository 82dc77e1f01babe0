"""The contact sheet and the panel: complete, self-contained, and deaf to hostile text."""

from __future__ import annotations

import re
import threading
from html.parser import HTMLParser

import pytest
from word_encoder import HOSTILE, WordEncoder, build_catalog

from clipbranches_widget.contact_sheet import Sheet, Tile, panel_html, sheet_html
from clipbranches_widget.errors import Cancelled, ExportError
from clipbranches_widget.session import Session

N_ROWS = 300
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "ul", "li", "b", "bdi", "main"),
    *("figure", "img", "div", "figcaption", "span", "p"),
}


class Page(HTMLParser):
    """What a browser would make of a page: elements, attributes and texts."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def images(self):
        return [attrs["src"] for tag, attrs in self.elements if tag == "img"]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return build_catalog(tmp_path_factory.mktemp("c") / "w.cbcat", N_ROWS, with_images=True)


@pytest.fixture
def result(catalog, tmp_path):
    """A round's answer that begins with the rows of the hostile captions."""
    session = Session(catalog, tmp_path / "s.jsonl", encoder=WordEncoder())
    session.search('bird <script>alert("1")</script>')
    session.label(positive=range(len(HOSTILE)), negative=[50, 60])
    return session.refine(threshold=0.001)


def test_a_sheet_says_what_it_shows_and_what_it_leaves_out(result, tmp_path):
    path = result.contact_sheet(tmp_path / "sheet.html", max_images=12)
    page = Page(path.read_text(encoding="utf-8"))
    said = " ".join(page.texts)
    assert f"{len(result):,} matching of 300 images in w.cbcat; 12 shown, best first" in said
    assert "learned from 5 yes and 2 no" in said
    assert f"{len(result) - 12:,} more images are not shown." in said
    for branch in result.branches:
        assert str(branch) in said
    for note in result.notes:
        assert note in said
    captions = [result.catalog.caption(row) for row in result.rows[:12].tolist()]
    for row, caption in zip(result.rows[:12].tolist(), captions, strict=True):
        assert f"#{row} \u00b7 " in said
        assert caption[:200] in said
    lost = sum(row % 10 == 9 for row in result.rows[:12])
    assert len(page.images()) == 12 - lost
    assert page.texts.count("no image") == lost


def test_it_needs_nothing_else_and_runs_nothing(result, tmp_path):
    source = result.contact_sheet(tmp_path / "sheet.html").read_text(encoding="utf-8")
    page = Page(source)
    assert {tag for tag, _ in page.elements} <= TAGS
    assert all(image.startswith("data:image/webp;base64,") for image in page.images())
    names = {name for _, attributes in page.elements for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(http|//|file)", source)
    (policy,) = [a["content"] for t, a in page.elements if a.get("http-equiv")]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    # Hostile text is there, as text.
    assert HOSTILE[0] in page.texts
    assert 'bird <script>alert("1")</script>' in page.texts


def test_a_panel_has_no_style_sheet_and_closes_what_it_opens():
    tile = Tile(7, b"webp", '"><script>x()</script>', label=-1, score="0.5", rule="R2")
    sheet = Sheet("</div><b>", ["1 < 2"], [("R1", "a & b")], ["a note"], [tile, Tile(8, b"")], 1)
    page = Page(panel_html(sheet))
    assert page.elements[0][1]["class"] == "cbw-still"
    assert {tag for tag, _ in page.elements} == {"div", "bdi", "b", "img"}
    assert "#7 \u00b7 0.5 \u00b7 R2 \u00b7 \u2715 no" in page.texts
    assert '"><script>x()</script>' in page.texts
    assert "1 more image is not shown." in page.texts


def test_control_characters_do_not_reach_the_page():
    source = sheet_html(Sheet("a\x00b\x1bc\ud800d"))
    assert "a b c d" in source
    assert "\x00" not in source
    source.encode("utf-8")


def test_it_stops_when_cancelled_and_writes_nothing(result, tmp_path):
    cancel = threading.Event()
    with pytest.raises(Cancelled, match="no contact sheet was written"):
        result.contact_sheet(
            tmp_path / "s.html", cancel=cancel, progress=lambda *_step: cancel.set()
        )
    assert not list(tmp_path.glob("*.html"))


def test_at_least_one_image_is_asked_for(result, tmp_path):
    with pytest.raises(ExportError, match="expected max_images of at least 1, got 0"):
        result.contact_sheet(tmp_path / "s.html", max_images=0)
