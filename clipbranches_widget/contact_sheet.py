"""Pictures of an answer as HTML that needs nothing else (layer 5): a sheet, and a small panel.

Pure: facts and WebP bytes in, HTML out. Both hold their pictures as data URIs and no script.
Titles, facts, rules and captions are untrusted text: everything is escaped here.

The *sheet* is a file of its own. The *panel* goes into a saved notebook, where sanitisers drop
style sheets: it has inline styles only, and takes its colours from what surrounds it.
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

PANEL_CLASS = "cbw-still"
"""Class of a panel's outermost element; the live Explorer hides the panels beside it."""

MARKS = {1: "\u2713 yes", -1: "\u2715 no", 0: ""}

_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 1500px; margin: 0 auto; padding: 16px; font: 14px/1.45 system-ui, sans-serif; }
h1 { margin: 0 0 4px; font-size: 20px; overflow-wrap: anywhere; }
.facts, .rules, .notes { margin: 8px 0; padding-left: 20px; overflow-wrap: anywhere; }
.facts { padding: 0; list-style: none; }
.rules { list-style: none; padding: 0; }
.id { padding: 0 5px; border: 1px solid #8888; border-radius: 3px; font-size: 12px; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 10px; }
figure { margin: 0; padding: 6px; border: 2px solid #8884; border-radius: 6px; break-inside: avoid;
  content-visibility: auto; contain-intrinsic-size: auto 230px; }
figure.yes { border-color: #3b8fd0; }
figure.no { border: 2px dashed #d9691e; }
figure img, .none { display: grid; place-items: center; width: 100%; height: 150px;
  object-fit: contain; background: #8882; }
figcaption { margin-top: 4px; font-size: 12px; overflow-wrap: anywhere; }
figcaption bdi { display: -webkit-box; overflow: hidden; -webkit-box-orient: vertical;
  -webkit-line-clamp: 3; }
.meta { opacity: .8; font-variant-numeric: tabular-nums; }
@media print { .sheet { grid-template-columns: repeat(6, 1fr); } }
""".strip()


@dataclass(frozen=True, slots=True)
class Tile:
    """One picture of a sheet.

    Attributes
    ----------
    row : int
        Row of the catalog.
    image : bytes
        WebP; empty where the image is lost.
    caption : str
        Any text.
    label : int
        1 yes, -1 no, 0 none.
    score : str
        As it is to be shown; may be empty.
    rule : str
        Name of the rule that found it, such as ``R1``; may be empty.
    """

    row: int
    image: bytes = field(repr=False)
    caption: str = ""
    label: int = 0
    score: str = ""
    rule: str = ""


@dataclass(frozen=True, slots=True)
class Sheet:
    """What a sheet or a panel shows.

    Attributes
    ----------
    title : str
        What was looked for.
    facts : sequence of str
        Counts and settings, a line each.
    rules : sequence of (str, str)
        Name and text of each rule, such as ``("R1", "bird >= 0.31")``.
    notes : sequence of str
        What is worth knowing.
    tiles : sequence of Tile
        In the order shown.
    n_left_out : int
        Pictures that are not shown.
    """

    title: str
    facts: Sequence[str] = ()
    rules: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    tiles: Sequence[Tile] = ()
    n_left_out: int = 0


def sheet_html(sheet: Sheet) -> str:
    """Return a complete HTML document: facts and rules at the top, then the pictures.

    Examples
    --------
    >>> page = sheet_html(Sheet("a <b>", tiles=[Tile(7, b"", "lost")], n_left_out=3))
    >>> "<h1><bdi>a &lt;b&gt;</bdi></h1>" in page, "3 more images are not shown" in page
    (True, True)
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(sheet.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1><bdi>{_text(sheet.title)}</bdi></h1>",
        _listing("facts", (f"<bdi>{_text(fact)}</bdi>" for fact in sheet.facts)),
        _listing("rules", (_rule(name, text) for name, text in sheet.rules)),
        _listing("notes", (f"<bdi>{_text(note)}</bdi>" for note in sheet.notes)),
        '<main class="sheet">',
        *map(_figure, sheet.tiles),
        "</main>",
        f"<p>{left_out_text(sheet.n_left_out)}</p>" if sheet.n_left_out else "",
        "</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def panel_html(sheet: Sheet) -> str:
    """Return a sheet as one element with inline styles, for the output of a notebook cell."""
    line = 'style="margin:2px 0;overflow-wrap:anywhere"'
    box = "border:1px solid #8888;border-radius:8px;padding:12px"
    font = "font-family:system-ui,sans-serif;font-size:13px;line-height:1.4"
    head = "font-size:15px;font-weight:600;overflow-wrap:anywhere"
    parts = [
        f'<div class="{PANEL_CLASS}" style="{box};{font}">',
        f'<div style="{head}"><bdi>{_text(sheet.title)}</bdi></div>',
        *(f"<div {line}><bdi>{_text(fact)}</bdi></div>" for fact in sheet.facts),
        *(f"<div {line}>{_rule(name, text)}</div>" for name, text in sheet.rules),
        '<div style="display:flex;flex-wrap:wrap;gap:8px;margin-top:8px">',
        *map(_panel_tile, sheet.tiles),
        "</div>",
        f"<div {line}>{left_out_text(sheet.n_left_out)}</div>" if sheet.n_left_out else "",
        *(f'<div style="opacity:.8">{_text(note)}</div>' for note in sheet.notes),
        "</div>",
    ]
    return "".join(parts)


def left_out_text(n_left_out: int) -> str:
    """Say how many pictures are not shown."""
    are = "image is" if n_left_out == 1 else "images are"
    return f"{n_left_out:,} more {are} not shown."


def _figure(tile: Tile) -> str:
    kind = {1: ' class="yes"', -1: ' class="no"', 0: ""}[tile.label]
    uri = _data_uri(tile.image)
    image = '<div class="none">no image</div>'
    if uri:
        image = f'<img src="{uri}" alt="" loading="lazy">'
    return (
        f"<figure{kind}>{image}<figcaption><bdi>{_text(tile.caption)}</bdi>"
        f'<span class="meta">{_meta(tile)}</span></figcaption></figure>'
    )


def _panel_tile(tile: Tile) -> str:
    edge = {1: "2px solid #3b8fd0", -1: "2px dashed #d9691e", 0: "2px solid #8884"}[tile.label]
    box, uri = "width:112px;height:96px;object-fit:contain", _data_uri(tile.image)
    image = f'<div style="{box};text-align:center">no image</div>'
    if uri:
        image = f'<img src="{uri}" alt="{_text(tile.caption)}" style="{box}">'
    tile_box = f"border:{edge};border-radius:6px;padding:3px;width:124px;font-size:11px"
    clip = "max-height:2.8em;overflow:hidden;overflow-wrap:anywhere"
    caption = f'<div style="{clip}"><bdi>{_text(tile.caption)}</bdi></div>'
    return f'<div style="{tile_box}">{image}{caption}<div>{_meta(tile)}</div></div>'


def _meta(tile: Tile) -> str:
    """Return row, score, rule and label on one line; colour alone says nothing."""
    words = [f"#{tile.row}", tile.score, tile.rule, MARKS[tile.label]]
    return " \u00b7 ".join(_text(word) for word in words if word)


def _rule(name: str, text: str) -> str:
    return f'<b class="id">{_text(name)}</b> <bdi>{_text(text)}</bdi>'


def _listing(name: str, lines: Iterable[str]) -> str:
    items = "\n".join(f"<li>{line}</li>" for line in lines)
    return f'<ul class="{name}">\n{items}\n</ul>' if items else ""


def _data_uri(image: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(image).decode('ascii')}" if image else ""


def _text(text: str) -> str:
    """Escape text for HTML, in elements and attributes; control characters become spaces."""
    plain = "".join(" " if unicodedata.category(char) in {"Cc", "Cs"} else char for char in text)
    return escape(plain, quote=True)
