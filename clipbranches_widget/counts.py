"""How many are asked for (layer 1)."""

from __future__ import annotations

import operator

from clipbranches_widget.errors import QueryError


def whole_count(value: int, name: str) -> int:
    """Return a count of at least 1; raises QueryError, which calls it `name`, on anything else.

    >>> whole_count(3, "k")
    3
    """
    try:
        count = operator.index(value)
    except TypeError as error:
        raise QueryError(f"expected {name} as a whole number, got {value!r}") from error
    if count < 1:
        raise QueryError(f"expected {name} >= 1, got {count}")
    return count
