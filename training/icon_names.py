"""Names, groups and keywords of the catalog's icons.

Reads the metadata files of three npm packages (openmoji, emojibase-data, emojilib) and joins them
by hexcode.  No images here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}
_WORDS = re.compile(r"[a-z0-9][a-z0-9 '&.+-]*")
_MAX_KEYWORD_CHARS = 40


@dataclass(frozen=True, slots=True)
class IconName:
    """What is known in words about one icon.

    Attributes
    ----------
    name
        OpenMoji's annotation, e.g. ``"waving hand: dark skin tone"``.
    group, subgroup
        Unicode's (or, for OpenMoji's own icons, OpenMoji's) two levels of category.
    keywords
        Lower case, without the name itself, in order of source; a skin-tone variant has those
        of its base icon.
    """

    name: str
    group: str
    subgroup: str
    keywords: tuple[str, ...]


def base_hexcode(hexcode: str) -> str:
    """Return the hexcode without skin tones and variation selectors: the key for joining sets.

    >>> base_hexcode("1F44B-1F3FF")
    '1F44B'
    """
    parts = hexcode.upper().split("-")
    return "-".join(p for p in parts if p != "FE0F" and p not in TONES)


def plain_hexcode(hexcode: str) -> str:
    """Return the hexcode without variation selectors, which packages use differently."""
    return "-".join(p for p in hexcode.upper().split("-") if p != "FE0F")


def clean_keywords(raw: Iterable[str], name: str) -> tuple[str, ...]:
    """Lower-case, drop emoticons, duplicates and the name; keep the order."""
    seen = {name.lower(), ""}
    kept = []
    for item in raw:
        word = " ".join(item.replace("_", " ").lower().split())
        if word in seen or len(word) > _MAX_KEYWORD_CHARS or not _WORDS.fullmatch(word):
            continue
        seen.add(word)
        kept.append(word)
    return tuple(kept)


def read_icon_names(node_modules: Path) -> dict[str, IconName]:
    """Return OpenMoji hexcode -> `IconName` for every icon of the openmoji package."""
    entries = _read_json(node_modules / "openmoji/data/openmoji.json")
    tags = _emojibase_tags(node_modules)
    lib = {
        _hexcode(char): words
        for char, words in _read_json(node_modules / "emojilib/dist/emoji-en-US.json").items()
    }
    raw: dict[str, list[str]] = {}
    for entry in entries:
        key = plain_hexcode(entry["hexcode"])
        own = f"{entry['tags']},{entry['openmoji_tags']}".split(",")
        raw[key] = [*own, *tags.get(key, []), *lib.get(key, [])]
    icons = {}
    for entry in entries:
        hexcode, name = entry["hexcode"], entry["annotation"].strip()
        base = plain_hexcode(entry["skintone_base_hexcode"]) or base_hexcode(hexcode)
        words = [*raw[plain_hexcode(hexcode)], *raw.get(base, [])]
        icons[hexcode] = IconName(
            name, entry["group"], entry["subgroups"], clean_keywords(words, name)
        )
    return icons


def write_keywords(icons: dict[str, IconName], path: Path) -> None:
    """Write ``hexcode -> {name, group, subgroup, keywords}`` as compact JSON, one icon a line."""
    lines = [
        f"{json.dumps(code)}:{json.dumps(asdict(icon), ensure_ascii=False, separators=(',', ':'))}"
        for code, icon in icons.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _emojibase_tags(node_modules: Path) -> dict[str, list[str]]:
    tags = {}
    for entry in _read_json(node_modules / "emojibase-data/en/data.json"):
        tags[plain_hexcode(entry["hexcode"])] = [entry["label"], *entry.get("tags", [])]
    return tags


def _hexcode(char: str) -> str:
    return plain_hexcode("-".join(f"{ord(c):04X}" for c in char))


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
