"""The texts of each picture, with sampling weights: names, keywords, categories, definitions."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from icon_names import TONES, IconName, plain_hexcode
from image_sets import Picture
from wordnet import Senses, Synset, read_senses, read_synsets

# Lexicographer files to prefer for the nouns of a group (lexnames(5WN)): 5 animal, 6 artifact,
# 8 body, 13 food, 17 object, 18 person, 19 phenomenon, 20 plant.
_PREFERRED = {
    "animals-nature": (5, 20, 17),
    "food-drink": (13, 20, 6),
    "people-body": (18, 8, 4),
    "travel-places": (6, 17, 19, 15),
    "objects": (6, 13),
    "activities": (6, 4),
}
_ANY = (5, 6, 8, 13, 17, 18, 19, 20)
_TONE_SLUGS = {name.removesuffix(" skin tone"): name for name in TONES.values()}


@dataclass(frozen=True, slots=True)
class Captions:
    """Texts that describe one picture, each with its probability of being sampled."""

    name: str
    texts: tuple[str, ...]
    weights: tuple[float, ...]


class NounDefinitions:
    """WordNet's definitions and more general words for the noun an icon shows."""

    def __init__(self, folder: Path) -> None:
        self._nouns: dict[int, Synset] = {
            s.offset: s for s in read_synsets(folder) if s.pos == "noun"
        }
        self._senses: dict[tuple[str, str], Senses] = read_senses(folder)

    def find(self, name: str, group: str) -> Synset | None:
        """Return the likeliest concrete sense of `name`, or else of its last word.

        Icons of groups that draw no things (symbols, flags, faces) have none.  `group` is empty
        for a picture outside the catalog.
        """
        files = _PREFERRED.get(group, _ANY if not group else ())
        plain = re.sub(r"[^a-z' -]", " ", name.lower().split(":")[0])
        plain = " ".join(plain.replace(" face", " ").split())
        for candidate in dict.fromkeys([plain, *plain.split()[-1:]]):
            senses = self._senses.get(("noun", candidate))
            if senses is None or (not group and not senses.n_tagged):
                continue
            for synset in (self._nouns[o] for o in senses.offsets):
                if synset.lexicographer_file in files and synset.lemmas[0].islower():
                    return synset
        return None

    def more_general(self, synset: Synset, levels: int = 3) -> list[str]:
        """Return the first words of up to `levels` hypernyms, nearest first."""
        words = []
        for _ in range(levels):
            if not synset.hypernyms or synset.hypernyms[0] not in self._nouns:
                break
            synset = self._nouns[synset.hypernyms[0]]
            if synset.lexicographer_file not in _ANY:
                break
            words.append(synset.lemmas[0])
        return words


class Captioner:
    """Finds an icon's `IconName` for a picture of any design and lists its texts."""

    def __init__(self, icons: dict[str, IconName], wordnet: Path) -> None:
        self._by_hexcode = {plain_hexcode(code): icon for code, icon in icons.items()}
        self._by_slug: dict[str, IconName] = {}
        for icon in icons.values():
            self._by_slug.setdefault(_slug(icon.name), icon)
        for icon in icons.values():
            for keyword in icon.keywords:
                if ":" not in icon.name and len(keyword) > 8:
                    self._by_slug.setdefault(_slug(keyword), icon)
        self._nouns = NounDefinitions(wordnet)

    def captions(self, picture: Picture) -> Captions | None:
        """Return the picture's texts, or None if nothing is known about it."""
        icon = self._icon(picture)
        # fxemoji runs words together ("clinkingbeermugs"): no use when no icon is found.
        if icon is None and (not any(picture.words) or picture.design == "fxemoji"):
            return None
        if icon is None:
            name, keywords, group = picture.words[0], picture.words[1:], ""
            categories: tuple[str, ...] = ()
        else:
            name, keywords = icon.name, icon.keywords
            group = icon.subgroup if icon.group.startswith("extras") else icon.group
            categories = tuple(
                w.replace("-", " ") for w in (icon.subgroup, icon.group) if "extras" not in w
            )
        synset = self._nouns.find(name, group)
        definitions: tuple[str, ...] = ()
        general: tuple[str, ...] = ()
        if synset is not None:
            clause = re.sub(r"\([^)]*\)", "", synset.definition).split(";")[0].strip()
            definitions = tuple(dict.fromkeys([clause, synset.definition]))
            general = tuple(self._nouns.more_general(synset))
        rng = random.Random(picture.key)
        mixed = tuple(
            ", ".join([name, *rng.sample(keywords, min(2, len(keywords)))])
            for _ in range(2 if keywords else 0)
        )
        return _weighted(
            (0.35, (name,)),
            (0.3, keywords),
            (0.1, mixed),
            (0.12, definitions),
            (0.13, (*categories, *general)),
        )

    def _icon(self, picture: Picture) -> IconName | None:
        if plain_hexcode(picture.key) in self._by_hexcode:
            return self._by_hexcode[plain_hexcode(picture.key)]
        if picture.design == "openclipart":
            return None
        return self._by_slug.get(_slug(_spell_out_tone(picture.words[0])))


def _weighted(*parts: tuple[float, tuple[str, ...]]) -> Captions:
    weights: dict[str, float] = {}
    for share, texts in parts:
        for text in texts:
            weights[text] = weights.get(text, 0.0) + share / len(texts)
    total = sum(weights.values())
    name = parts[0][1][0]
    return Captions(name, tuple(weights), tuple(w / total for w in weights.values()))


def _slug(text: str) -> str:
    """Letters and digits only, so that spellings with and without spaces meet.

    >>> _slug("flag: South Africa") == _slug("flag-for-South-Africa".replace("-for", ""))
    True
    """
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _spell_out_tone(words: str) -> str:
    """Bring an Iconify name to OpenMoji's wording of skin tones and flags.

    >>> _spell_out_tone("man frowning medium light")
    'man frowning medium-light skin tone'
    """
    words = re.sub(r"^flag for (flag )?", "flag ", words)
    match = re.fullmatch(r"(.+?) (light|medium light|medium|medium dark|dark)( skin tone)?", words)
    if match is None:
        return words
    return f"{match[1]} {_TONE_SLUGS[match[2].replace(' ', '-')]}"
