"""Read WordNet 3.0's database files: lemmas, definitions, examples and how frequent a sense is.

Format: ``man 5 wndb``.  Used as a source of general vocabulary for the text tower and of
definitions for icon names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

POS_FILES = ("noun", "verb", "adj")
# Lexicographer files of things one can draw: animal, artifact, body, feeling, food, object,
# person, phenomenon, plant (lexnames(5WN)).
CONCRETE = frozenset({5, 6, 8, 12, 13, 17, 18, 19, 20})
_TAXON = re.compile(
    r"(genus|family|order|class|phylum|subfamily|suborder|division) [A-Z]|\w+(idae|ales|aceae)$"
)


@dataclass(frozen=True, slots=True)
class Synset:
    """One WordNet sense.

    Attributes
    ----------
    pos
        ``"noun"``, ``"verb"`` or ``"adj"``.
    lexicographer_file
        Topic number of lexnames(5WN); `CONCRETE` lists those of drawable things.
    lemmas
        The words for it, with spaces, in WordNet's order (most usual first).
    definition, examples
        The gloss, split: the definition without quoted examples, and the examples.
    hypernyms
        Offsets of the more general senses in the same file.
    """

    pos: str
    lexicographer_file: int
    offset: int
    lemmas: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    hypernyms: tuple[int, ...]

    @property
    def is_concrete(self) -> bool:
        """Whether the sense is a drawable thing and no taxon's Latin name."""
        return (
            self.pos == "noun"
            and self.lexicographer_file in CONCRETE
            and not _TAXON.match(self.lemmas[0])
        )


@dataclass(frozen=True, slots=True)
class Senses:
    """The senses of one word, most frequent first.

    Attributes
    ----------
    offsets
        Synset offsets in the data file of the part of speech.
    n_tagged
        How many of them occur in WordNet's reference corpus: 0 for a rare word.
    """

    offsets: tuple[int, ...]
    n_tagged: int


def read_synsets(folder: Path) -> list[Synset]:
    """Read all noun, verb and adjective synsets from WordNet's ``dict`` folder."""
    return [synset for pos in POS_FILES for synset in _read_pos(folder / f"data.{pos}", pos)]


def read_senses(folder: Path) -> dict[tuple[str, str], Senses]:
    """Return (pos, lemma in lower case) -> its senses."""
    senses = {}
    for pos in POS_FILES:
        for line in (folder / f"index.{pos}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):
                continue
            fields = line.split()
            n_senses, n_pointers = int(fields[2]), int(fields[3])
            senses[pos, fields[0].replace("_", " ")] = Senses(
                offsets=tuple(int(f) for f in fields[-n_senses:]),
                n_tagged=int(fields[5 + n_pointers]),
            )
    return senses


def _read_pos(path: Path, pos: str) -> Iterator[Synset]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        n_words = int(fields[3], 16)
        words = fields[4 : 4 + 2 * n_words : 2]
        pointers = fields[5 + 2 * n_words :]
        hypernyms = tuple(
            int(offset)
            for symbol, offset in zip(pointers[::4], pointers[1::4], strict=False)
            if symbol in ("@", "@i")
        )
        lemmas = tuple(re.sub(r"\((a|p|ip)\)$", "", w).replace("_", " ") for w in words)
        examples = tuple(re.findall(r'"([^"]+)"', gloss))
        definition = re.sub(r'"[^"]*"', "", gloss)
        definition = re.sub(r"[;,:\s]+$", "", re.sub(r"(\s*;\s*)+", "; ", definition)).strip()
        yield Synset(pos, int(fields[1]), int(fields[0]), lemmas, definition, examples, hypernyms)
