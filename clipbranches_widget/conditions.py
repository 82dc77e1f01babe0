"""Boxes in the words of other tools (layer 1): conditions on named columns, for SQL and pandas.

The columns are those that `column_export` writes. A column is exported under its own name where
pandas and SQL can quote that name, and under one close to it otherwise: see `column_names`.
"""

from __future__ import annotations

import itertools
import keyword
import math
import token
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.boxes import N_CODES, LeafBox
from clipbranches_widget.errors import QueryError

RuleState = Literal["on", "off", "pinned"]
"""What the user said of a rule: nothing, leave it out, or keep it whatever is learned."""

ROW_COLUMN = "row"
"""Exported column that holds the row ids."""

EVERY_ROW = ("1 = 1", f"{ROW_COLUMN} >= 0")
"""The rule of a box without ranges, for SQL and for pandas."""

# What `DataFrame.query` makes of the characters of a name in backticks, in pandas 2.2 and later.
# Other characters it refuses, or treats differently from release to release.
_SPOKEN = {
    ord(char): f"_{token.tok_name[kind]}_"
    for char, kind in token.EXACT_TOKEN_TYPES.items()
    if len(char) == 1
} | {
    ord(" "): "_",
    ord("?"): "_QUESTIONMARK_",
    ord("!"): "_EXCLAMATIONMARK_",
    ord("$"): "_DOLLARSIGN_",
    ord("'"): "_SINGLEQUOTE_",
    ord('"'): "_DOUBLEQUOTE_",
}
# Names that `DataFrame.query` looks up elsewhere than among the columns, and the export's own.
_TAKEN = (ROW_COLUMN, "timestamp", "datetime", "list", "tuple", "inf")


@dataclass(frozen=True, slots=True)
class Condition:
    """One range of one exported column: ``low <= value < high``.

    Attributes
    ----------
    name : str
        The column, as `column_names` names it.
    low, high : float or None
        float32 values; None where the range is open.

    Examples
    --------
    >>> both = Condition("red bird", 0.25, 0.5)
    >>> both.to_sql()
    '"red bird" >= 0.25e0 AND "red bird" < 0.5e0'
    >>> both.to_pandas_query()
    '`red bird` >= 0.25 and `red bird` < 0.5'
    """

    name: str
    low: float | None = None
    high: float | None = None

    def to_sql(self) -> str:
        """Return the condition as SQL.

        Numbers are written with an exponent, which makes them double precision in every dialect
        (others read ``0.31`` as a decimal): every float32 is a double, so comparing with a
        column of either type is exact.
        """
        name = sql_identifier(self.name)
        terms = [f"{name} {sign} {_sql_number(bound)}" for sign, bound in self._bounds()]
        return " AND ".join(terms) or EVERY_ROW[0]

    def to_pandas_query(self) -> str:
        """Return the condition for `pandas.DataFrame.query`."""
        terms = [f"`{self.name}` {sign} {_number(bound)}" for sign, bound in self._bounds()]
        return " and ".join(terms) or EVERY_ROW[1]

    def _bounds(self) -> list[tuple[str, float]]:
        bounds = ((">=", self.low), ("<", self.high))
        return [(sign, bound) for sign, bound in bounds if bound is not None]


def conditions_of(
    box: LeafBox, names: Sequence[str], edges: NDArray[np.float32]
) -> tuple[Condition, ...]:
    """Say a box as conditions, one a range, in column order.

    Parameters
    ----------
    box : LeafBox
    names : sequence of str
        What the D columns are called: see `column_names`.
    edges : (D, 255) float32
        Inner bin edges: code ``c`` holds ``edges[c - 1] <= value < edges[c]``.

    Examples
    --------
    >>> edges = np.linspace(0, 1, 255, dtype=np.float32)[None, :]
    >>> conditions_of(LeafBox.from_bounds({0: (128, 256)}), ["bird"], edges)
    (Condition(name='bird', low=0.5, high=None),)
    """
    return tuple(
        Condition(
            names[column],
            float(edges[column, low - 1]) if low > 0 else None,
            float(edges[column, high - 1]) if high < N_CODES else None,
        )
        for column, low, high in box.ranges
    )


def column_names(names: Sequence[str]) -> tuple[str, ...]:
    """Name the exported columns so that each name means one column, in pandas and in SQL.

    A name stays as it is unless pandas cannot quote it (backticks, ``#``, control characters),
    another column has it (SQL tells no upper from lower case; pandas tells ``a_b c`` from
    ``a b c`` by no means), or it is the export's own ``row``. Characters that cannot be quoted
    become ``_``; a name that is taken gets a number.

    Examples
    --------
    >>> column_names(["red bird", "Red Bird", "row", "a`b", "like 'cat'"])
    ('red bird', 'Red Bird_2', 'row_2', 'a_b', "like 'cat'")
    """
    plain = [_quotable(name) for name in names]
    taken = set(_TAKEN)
    out: dict[int, str] = {}
    # Names that can stay come first: a mended name must not take theirs.
    for column in sorted(range(len(plain)), key=lambda column: plain[column] != names[column]):
        numbered = (f"{plain[column]}_{n}" for n in itertools.count(2))
        for name in itertools.chain((plain[column],), numbered):
            keys = _keys(name)
            if not keys & taken:
                break
        taken |= keys
        out[column] = name
    return tuple(out[column] for column in range(len(plain)))


def sql_identifier(name: str) -> str:
    """Quote a name as a standard SQL identifier.

    Raises
    ------
    QueryError
        If the name is empty or holds a NUL character, which no dialect can quote.
    """
    if not name or "\0" in name:
        raise QueryError(f"expected a name without NUL characters for SQL, got {name!r}")
    return '"' + name.replace('"', '""') + '"'


def _quotable(name: str) -> str:
    """Return `name` with ``_`` for what cannot be quoted; identifiers are NFKC in Python."""
    normal = unicodedata.normalize("NFKC", name)
    quoted = {ord(c): c if ord(c) in _SPOKEN or f"_{c}".isidentifier() else "_" for c in normal}
    return normal.translate(quoted) or "_"


def _keys(name: str) -> set[str]:
    """Return what SQL and pandas know a name by: names that share any of it may be mixed up."""
    spoken = name
    if not name.isidentifier() or keyword.iskeyword(name):
        escaped = name.encode("ascii", "backslashreplace").decode().replace("\\", "_UNICODE_")
        spoken = "BACKTICK_QUOTED_STRING_" + escaped.translate(_SPOKEN)
    return {name.casefold(), spoken.casefold()}


def _number(value: float) -> str:
    """Write a float32 so that reading it as a double gives it back."""
    if not math.isfinite(value):
        raise QueryError(f"expected a finite bound, got {value}: the column has no such edge")
    return repr(float(np.float32(value)))


def _sql_number(value: float) -> str:
    text = _number(value)
    return text if "e" in text else f"{text}e0"
