"""Several phrases in one line of text, with weights and a minus (layer 1). Pure.

``beach + sunset^2 -people`` is three phrases: beach, sunset counted twice, and people taken
away. The rules are few, so that an ordinary sentence stays one phrase:

- ``+`` starts another phrase, as a word of its own or at the start of a word.
- ``-`` at the start of a word takes the phrase away that follows. A hyphen within a word, as in
  *t-shirt* or *black-and-white*, and a dash between spaces are part of the phrase.
- A phrase goes on to the next sign: ``dog -black cat`` takes *black cat* away.
- ``^2`` at the end of a phrase is its weight, a number above 0. Without it a phrase counts 1,
  one that is taken away half: see `MINUS`.
- Quotes keep a phrase together, whatever is in it: ``"c+ -b"^2``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.errors import QueryError

MAX_PHRASES = 32
"""Most phrases of one query: each is a run of the model."""

MINUS = 0.5
"""Weight of a phrase that is taken away, unless it is given.

Subtracting moves a query away from everything, also from what is wanted. Of 18 pairs such as
``animal -bird`` on the demo catalog, in the first 20 images: wanted .77, unwanted .16 without a
minus; .76 and .12 at a weight of .25; .72 and .09 at .5; .63 and .06 at .75; .42 and .02 at 1.
"""

_WORD = re.compile(r'[+-]?"[^"]+"(?:\^\S*)?(?!\S)|\S+')
_SIGN = re.compile(r'[+-](?=["\w]|[^\x00-\x7f])')
_WEIGHT = re.compile(r"^(?P<words>.*[^\s^])\^(?P<weight>[^\s^]+)$", re.DOTALL)
_LEAST_NORM = 1e-4
_RULES = (
    "phrases are joined as in: beach + sunset^2 -people; quotes keep a phrase with signs together"
)


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words to embed, and how much they count.

    Attributes
    ----------
    text : str
        Never empty.
    weight : float
        Finite; below zero for a phrase that is taken away, never zero.
    """

    text: str
    weight: float = 1.0


def phrases_of(text: str) -> tuple[Phrase, ...]:
    """Read the phrases of a query, in order; see the module for the rules.

    Parameters
    ----------
    text
        At least one word.

    Raises
    ------
    QueryError
        No phrase at all, none that is wanted, too many, or a weight that is not a finite number
        above 0 at the end of its phrase.

    Examples
    --------
    >>> [(each.text, each.weight) for each in phrases_of("beach + sunset^2 -people")]
    [('beach', 1.0), ('sunset', 2.0), ('people', -0.5)]
    >>> phrases_of("a black-and-white t-shirt - long sleeves")
    (Phrase(text='a black-and-white t-shirt - long sleeves', weight=1.0),)
    """
    if not isinstance(text, str) or not text.strip():
        raise QueryError(f"expected some words to search for, got {text!r}")
    phrases = tuple(_phrase(start, end, text) for start, end in _pieces(text))
    if not phrases:
        raise QueryError(f"expected some words to search for, got {text!r}: {_RULES}")
    if len(phrases) > MAX_PHRASES:
        raise QueryError(f"expected at most {MAX_PHRASES} phrases, got {len(phrases)}: {_RULES}")
    if all(phrase.weight < 0 for phrase in phrases):
        raise QueryError(
            f"expected something to look for, got only what to leave out, {text!r}: write what "
            'the images show before the minus, as in animal -bird, or quote it: "-bird"'
        )
    return phrases


def weighted_sum(
    vectors: NDArray[np.float32], weights: Sequence[float], *, what: str
) -> NDArray[np.float64]:
    """Return the direction of the weighted sum of unit vectors.

    Parameters
    ----------
    vectors : (n, dim) real
        Of any length but zero; each is scaled to norm 1 first.
    weights : sequence of n float
        Finite; those below zero subtract.
    what
        The query in words, for the error.

    Returns
    -------
    NDArray[np.float64]
        Shape (dim,), norm 1.

    Raises
    ------
    QueryError
        The vectors cancel each other out.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    scale = np.asarray(weights, dtype=np.float64) / np.abs(weights).max()
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    total: NDArray[np.float64] = scale @ units
    norm = float(np.linalg.norm(total))
    if not norm > _LEAST_NORM:
        raise QueryError(
            f"expected phrases or examples that leave a direction to search in, got {what!r}, "
            "which cancel each other out: leave out or reword one of them"
        )
    return total / norm


def _pieces(text: str) -> list[tuple[str, str]]:
    """Return the sign of each phrase and its words as they were typed, weight included."""
    starts: list[tuple[str, int, int]] = [("", 0, 0)]  # sign, where it is, where words start
    for word in _WORD.finditer(text):
        if word.group() == "+":
            starts.append(("+", word.start(), word.end()))
        elif _SIGN.match(word.group()):
            starts.append((word.group()[0], word.start(), word.start() + 1))
    ends = [start for _, start, _ in starts[1:]] + [len(text)]
    pieces = [(sign, text[first:end]) for (sign, _, first), end in zip(starts, ends, strict=True)]
    if len(pieces) == 1:
        return [("", text)]
    return [(sign, words.strip()) for sign, words in pieces if words.strip()]


def _phrase(sign: str, words: str, text: str) -> Phrase:
    weight = MINUS if sign == "-" else 1.0
    if (found := _WEIGHT.match(words.rstrip())) and _is_number(found["weight"]):
        words, weight = found["words"], float(found["weight"])
        if not (math.isfinite(weight) and weight > 0):
            raise QueryError(
                f"expected a weight that is a finite number above 0, got ^{found['weight']} in "
                f"{text!r}: leave the phrase out, or take it away with a minus before it"
            )
    bare = words.strip()
    is_quoted = len(bare) > 2 and bare[0] == bare[-1] == '"' and '"' not in bare[1:-1]
    if is_quoted and bare[1:-1].strip():
        words = bare[1:-1]
    elif any(
        (inner := _WEIGHT.match(word.group())) and _is_number(inner["weight"])
        for word in _WORD.finditer(words)
    ):
        raise QueryError(
            f"expected a weight at the end of a phrase, got {words!r}: write + before the next "
            "phrase, or quote it all"
        )
    return Phrase(words, -weight if sign == "-" else weight)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
