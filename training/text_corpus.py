"""The texts on which the text tower learns to imitate its teacher."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from wordnet import Senses, Synset, read_senses, read_synsets

_MAX_WORDS = 24
_N_MIXED = 80_000
_TEMPLATES = (
    "{a} and {b}",
    "{a} with {b}",
    "{a} with a {b}",
    "a {adj} {a}",
    "{adj} {a}",
    "{adj} {a} and {b}",
    "a picture of a {a}",
    "icon of {a}",
    "{a} on a {b}",
    "something like a {a}",
    "{verb} a {a}",
    "a {a} to {verb}",
    "where you {verb}",
    "what you use to {verb} a {a}",
    "someone who can {verb}",
)


def general_texts(wordnet: Path, *, seed: int = 0) -> list[str]:
    """Return words, definitions, examples and mixed phrases from WordNet, without repeats."""
    synsets, senses = read_synsets(wordnet), read_senses(wordnet)
    texts: dict[str, None] = {}
    for synset in synsets:
        texts.update(dict.fromkeys(_synset_texts(synset, senses)))
    texts.update(dict.fromkeys(_mixed_phrases(synsets, senses, random.Random(seed))))
    return [t for t in texts if t and len(t.split()) <= _MAX_WORDS]


def without_phrases(texts: Iterable[str], phrases_file: Path) -> list[str]:
    """Drop every text that equals a phrase of the evaluation list, ignoring case."""
    listed = json.loads(phrases_file.read_text(encoding="utf-8"))["phrases"]
    phrases = {entry["phrase"].lower() for entry in listed}
    return [t for t in texts if t.lower() not in phrases]


def _synset_texts(synset: Synset, senses: dict[tuple[str, str], Senses]) -> Iterator[str]:
    for lemma in synset.lemmas:
        known = senses.get((synset.pos, lemma.lower()))
        used = known is not None and known.n_tagged > 0
        if used or (synset.is_concrete and len(lemma.split()) <= 3):
            yield lemma.lower()
    definition = synset.definition
    plain = re.sub(r"\([^)]*\)", "", definition)
    clauses = [" ".join(c.split()) for c in plain.split(";")]
    if synset.pos == "noun" or len(clauses[0].split()) > 2:
        yield clauses[0]
    if synset.is_concrete:
        if len(clauses) > 1:
            yield "; ".join(clauses)
        yield f"{synset.lemmas[0].lower()}, {clauses[0]}"
    yield from (e.strip() for e in synset.examples[:1])


def _mixed_phrases(
    synsets: list[Synset], senses: dict[tuple[str, str], Senses], rng: random.Random
) -> Iterator[str]:
    def frequent(pos: str, *, concrete: bool = False) -> list[str]:
        return sorted(
            {
                s.lemmas[0].lower()
                for s in synsets
                if s.pos == pos
                and (not concrete or s.is_concrete)
                and (pos, s.lemmas[0].lower()) in senses
                and senses[pos, s.lemmas[0].lower()].n_tagged > 0
            }
        )

    nouns, adjectives, verbs = frequent("noun", concrete=True), frequent("adj"), frequent("verb")
    for _ in range(_N_MIXED):
        yield rng.choice(_TEMPLATES).format(
            a=rng.choice(nouns),
            b=rng.choice(nouns),
            adj=rng.choice(adjectives),
            verb=rng.choice(verbs),
        )
