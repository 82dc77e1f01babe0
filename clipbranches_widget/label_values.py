"""What labels look like in files (layer 1): words, numbers, and how to read them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, TypeAlias

from clipbranches_widget.errors import LabelError

Mapped: TypeAlias = Mapping[Any, Any]

_WORDS = {"yes": 1, "positive": 1, "true": 1, "1": 1, "no": -1, "negative": -1, "false": -1}
_WORDS |= {"0": -1, "-1": -1, "1.0": 1, "0.0": -1, "-1.0": -1, "": 0, "nan": 0, "none": 0}
_N_NAMED = 5
ACCEPTED = "yes and no, positive and negative, true and false, 1 and 0, or 1 and -1"


def read_values(values: Iterable[Any], mapping: Mapped | None = None) -> list[int]:
    """Return +1 for each yes, -1 for each no, and 0 where there is no label.

    Words are compared without case; empty cells, None and NaN are no labels.

    Parameters
    ----------
    values
        As they are in the file.
    mapping
        What other values stand for: a value that is accepted anyway, or None for no label.

    Raises
    ------
    LabelError
        If a value is none of these, or if 0 and -1 are both there, so that 0 may mean no label.

    Examples
    --------
    >>> read_values(["yes", "No", "", 1, False]), read_values(["cat"], {"cat": "yes"})
    ([1, -1, 0, 1, -1], [1])
    """
    listed = list(values)
    read = [value_of(value, mapping) for value in listed]
    unknown = dict.fromkeys(repr(v) for v, label in zip(listed, read, strict=True) if label is None)
    if unknown:
        named = ", ".join(list(unknown)[:_N_NAMED])
        raise LabelError(
            f"expected labels that are {ACCEPTED}, got {named}: say what they stand for with "
            "mapping={'cat': 'yes', 'dog': 'no', 'unsure': None}"
        )
    if mapping is None:
        signs = {str(value).removesuffix(".0") for value in listed if not isinstance(value, bool)}
        if {"0", "-1"} <= signs:
            raise LabelError(
                "expected labels that are 1 and 0 or 1 and -1, got both 0 and -1: say what they "
                "stand for, such as mapping={1: 'yes', -1: 'no', 0: None}"
            )
    return [label or 0 for label in read]


def _text(value: Any) -> str:
    """Return a value as text: a CSV file has no other, and whole numbers beside gaps are floats."""
    return re.sub(r"\A(-?\d+)\.0+\Z", r"\1", str(value))


def value_of(value: Any, mapping: Mapped | None = None) -> int | None:
    """Return +1, -1 or 0 for no label; None for a value that is not known."""
    for key, meaning in (mapping or {}).items():
        if _text(key) == _text(value):
            return value_of(meaning)
    if value is None:
        return 0
    if isinstance(value, bool) or type(value).__name__ == "bool_":
        return 1 if value else -1
    if isinstance(value, str):
        return _WORDS.get(value.strip().casefold())
    if isinstance(value, Real):
        return _WORDS.get(str(float(value)))
    return None
