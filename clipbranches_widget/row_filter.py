"""Which rows pass conditions on the columns of a catalog's items (layer 1). Pure.

A condition is plain data, and what it may be depends on the type of its column:

==========  =============================  ====================================================
column      condition                      passes
==========  =============================  ====================================================
text        ``"red"``                      texts that contain it, upper and lower case alike
number      ``(300, None)``                from 300 on; both bounds closed, None for an open end
date, time  ``("2024-01-01", None)``       the same; a bound that is a day means all of that day
true/false  ``True`` or ``False``          equal values
all but     ``["animals", "food"]``        any of these values, exactly as they are spelt
true/false
==========  =============================  ====================================================

Missing values, and NaN, pass no condition. Several conditions must all hold.
"""

from __future__ import annotations

import datetime as dt
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.errors import QueryError

if TYPE_CHECKING:
    import pyarrow as pa

ColumnKind = Literal["text", "number", "date", "flag"]
Test = Literal["contains", "any_of", "range", "is"]
Condition: TypeAlias = Any
"""A text, a pair of bounds, true or false, or values: see the module."""

MAX_VALUES = 10_000
"""Most values one condition can list."""

_EXPECTED: Mapping[ColumnKind, str] = {
    "text": 'a text that it contains, such as "red", or a list of values, such as ["animals"]',
    "number": "a pair (min, max) of numbers, either None, such as (300, None), or a list of values",
    "date": 'a pair (min, max) of dates, either None, such as ("2024-01-31", None), or a list',
    "flag": "True or False",
}
_DAY_CHARS = len("2024-01-31")
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_NS_PER_UNIT = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "day": 86_400 * 10**9}
_MAX_THREADS = 8
_MIN_TEXTS = 100_000
_EXACT_BELOW = 2**64


@dataclass(frozen=True, slots=True)
class ColumnFilter:
    """One condition on one column, checked against it.

    Attributes
    ----------
    column : str
        A column of ``catalog.items``.
    test : str
        contains, any_of, range or is.
    values : tuple
        Of plain JSON values: one text; the values; two bounds, None for an open end; one bool.
        Dates and times are ISO texts.
    """

    column: str
    test: Test
    values: tuple[Any, ...]

    @property
    def condition(self) -> Condition:
        """What a user would write for it."""
        if self.test == "any_of":
            return list(self.values)
        return self.values if self.test == "range" else self.values[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the session file."""
        return {"column": self.column, "test": self.test, "values": list(self.values)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ColumnFilter:
        """Read what `to_dict` wrote; KeyError, TypeError or ValueError if it is not that."""
        column, test, values = stored["column"], stored["test"], stored["values"]
        n_values = {"range": 2, "any_of": None}.get(test, 1)
        is_plain = all(value is None or isinstance(value, str | int | float) for value in values)
        if not isinstance(column, str) or test not in get_args(Test) or not is_plain:
            raise ValueError(f"no such filter: {column!r}, {test!r}")
        if len(values) < 1 or n_values not in {None, len(values)}:
            raise ValueError(f"expected {n_values} values of {test!r}, got {len(values)}")
        return cls(column, test, tuple(values))

    def __str__(self) -> str:
        """Return the condition in words, such as ``width >= 300``."""
        if self.test == "contains":
            return f"{self.column} contains {self.values[0]!r}"
        if self.test == "is":
            return f"{self.column} is {'yes' if self.values[0] else 'no'}"
        if self.test == "any_of":
            shown = " or ".join(map(str, self.values[:5]))
            rest = f" or {len(self.values) - 5} more" if len(self.values) > 5 else ""
            return f"{self.column} is {shown}{rest}"
        low, high = self.values
        if low is None or high is None:
            return f"{self.column} <= {high}" if low is None else f"{self.column} >= {low}"
        return f"{low} <= {self.column} <= {high}"


def column_kind(of: pa.DataType) -> ColumnKind | None:
    """Return what a column of an Arrow type can be asked for; None for lists, bytes and the like.

    Examples
    --------
    >>> import pyarrow as pa
    >>> column_kind(pa.int32()), column_kind(pa.list_(pa.int32()))
    ('number', None)
    """
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(of):
        return "text" if column_kind(of.value_type) == "text" else None
    if types.is_string(of) or types.is_large_string(of) or types.is_string_view(of):
        return "text"
    if types.is_integer(of) or types.is_floating(of) or types.is_decimal(of):
        return "number"
    if types.is_date(of) or types.is_timestamp(of):
        return "date"
    return "flag" if types.is_boolean(of) else None


def checked_filters(
    conditions: Mapping[str, Condition], schema: pa.Schema
) -> tuple[ColumnFilter, ...]:
    """Check conditions against the columns they are about.

    Parameters
    ----------
    conditions
        For each column what must hold: see the module.
    schema
        Of the catalog's items.

    Returns
    -------
    tuple of ColumnFilter
        Sorted by column, values in a canonical form: equal conditions give equal filters.

    Raises
    ------
    QueryError
        No such column, or no such condition for its type; the message names what there is.
    """
    if not isinstance(conditions, Mapping):
        raise QueryError(
            f"expected conditions by column, such as {{'width': (300, None)}}, got {conditions!r}"
        )
    return tuple(_checked(name, conditions[name], schema) for name in sorted(conditions, key=str))


def passing(items: pa.Table, filters: Iterable[ColumnFilter]) -> NDArray[np.bool_]:
    """Return which rows of a table pass all filters: (n,) bool. Cost `O(n)` a filter.

    Raises
    ------
    QueryError
        A filter is about another table.
    """
    mask = np.ones(len(items), dtype=bool)
    for one in filters:
        if _checked(one.column, one.condition, items.schema) != one:
            raise QueryError(f"expected a filter in its plain form, got {one!r}: set it anew")
        mask &= _passing_one(items.column(one.column), one)
    return mask


def _checked(name: str, condition: Condition, schema: pa.Schema) -> ColumnFilter:
    if not isinstance(name, str) or schema.get_field_index(name) < 0:
        raise _no_column(name, schema)
    of = schema.field(name).type
    kind = column_kind(of)
    if kind is None:
        raise QueryError(
            f"expected a column of texts, numbers, dates or true/false, got {name!r} of type "
            f"{of}: build the catalog with a plain column to filter on"
        )
    try:
        if kind == "flag" and isinstance(condition, bool | np.bool_):
            return ColumnFilter(name, "is", (bool(condition),))
        if kind == "text" and isinstance(condition, str) and condition:
            return ColumnFilter(name, "contains", (condition,))
        if kind in {"number", "date"} and isinstance(condition, tuple) and len(condition) == 2:
            return ColumnFilter(name, "range", _bounds(kind, condition))
        is_listed = isinstance(condition, Iterable) and not isinstance(
            condition, str | bytes | tuple | Mapping
        )
        if kind != "flag" and is_listed:
            return ColumnFilter(name, "any_of", _listed(kind, condition))
    except (TypeError, ValueError, OverflowError) as error:
        raise _no_condition(name, kind, condition, f": {error}") from error
    raise _no_condition(name, kind, condition)


def _no_column(name: object, schema: pa.Schema) -> QueryError:
    known = [field.name for field in schema if column_kind(field.type) is not None]
    return QueryError(f"expected a column to filter on: {', '.join(known)}; got {name!r}")


def _no_condition(name: str, kind: ColumnKind, condition: Condition, why: str = "") -> QueryError:
    shown = repr(condition)
    shown = shown if len(shown) <= 80 else shown[:79] + "\u2026"
    return QueryError(
        f"expected for the {kind} column {name!r} {_EXPECTED[kind]}, got {shown}{why}"
    )


def _bounds(kind: ColumnKind, pair: tuple[Any, Any]) -> tuple[Any, Any]:
    low, high = (None if bound is None else _value(kind, bound) for bound in pair)
    if low is None and high is None:
        raise ValueError("one of the two must be given; leave the column out for all rows")
    if low is not None and high is not None and _is_above(kind, low, high):
        raise ValueError("min is above max")
    return low, high


def _is_above(kind: ColumnKind, low: Any, high: Any) -> bool:
    if kind == "date":
        return _nanoseconds(low) > _nanoseconds(high, is_end=True)
    return bool(low > high)


def _listed(kind: ColumnKind, values: Iterable[Any]) -> tuple[Any, ...]:
    found = {_value(kind, value) for value in values}
    if not 0 < len(found) <= MAX_VALUES:
        raise ValueError(f"expected 1 to {MAX_VALUES:,} values, got {len(found):,}")
    return tuple(sorted(found))


def _value(kind: ColumnKind, value: Any) -> Any:
    """Return one value of a condition in its JSON form; raises TypeError or ValueError."""
    if kind == "text":
        if not isinstance(value, str):
            raise TypeError(f"{value!r} is no text")
        return str(value)
    if kind == "date":
        return _iso(value)
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{value!r} is no number")
    number = value.item() if isinstance(value, np.number) else value
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not finite; None leaves an end open")
    if isinstance(number, int):
        return number
    is_whole = number.is_integer() and abs(number) < _EXACT_BELOW
    return int(number) if is_whole else number


def _iso(value: Any) -> str:
    """Return a day as 2024-01-31, a time as 2024-01-31T12:00:00."""
    if isinstance(value, np.datetime64):
        value = str(value)
    if isinstance(value, dt.date):  # a datetime, also of pandas, is one
        return value.isoformat()
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no date")
    if len(value) == _DAY_CHARS:
        return dt.date.fromisoformat(value).isoformat()
    return dt.datetime.fromisoformat(value).isoformat()


def _nanoseconds(text: str, *, is_end: bool = False) -> int:
    """Return an ISO day or time since 1970, UTC; of a day, its first or its last nanosecond."""
    moment = dt.datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    since = (moment - _EPOCH) // dt.timedelta(microseconds=1) * 1000
    return since + _NS_PER_UNIT["day"] - 1 if is_end and len(text) == _DAY_CHARS else since


def _passing_one(column: pa.ChunkedArray, one: ColumnFilter) -> NDArray[np.bool_]:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column_kind(column.type)
    if pa.types.is_dictionary(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    if one.test == "contains":
        return _containing(column, one.values[0])
    if one.test == "is":
        found = pc.equal(column, pa.scalar(one.values[0]))
    elif kind == "text":
        found = pc.is_in(column, value_set=pa.array(one.values, type=column.type))
    elif kind == "date":
        found = _in_time(column, one)
    else:
        found = _in_numbers(column, one)
    mask: NDArray[np.bool_] = pc.fill_null(found, fill_value=False).to_numpy()
    return mask


def _containing(column: pa.ChunkedArray, text: str) -> NDArray[np.bool_]:
    """Return which texts contain one, whatever the case; some 100 ns a text, on all cores."""
    import pyarrow.compute as pc

    def search(start: int) -> NDArray[np.bool_]:
        found = pc.match_substring(column.slice(start, n_each), text, ignore_case=True)
        mask: NDArray[np.bool_] = pc.fill_null(found, fill_value=False).to_numpy()
        return mask

    n_threads = min(os.cpu_count() or 1, _MAX_THREADS)
    n_each = max(-(-len(column) // n_threads), _MIN_TEXTS)
    starts = range(0, max(len(column), 1), n_each)
    if len(starts) == 1:
        return search(0)
    with ThreadPoolExecutor(n_threads) as pool:
        return np.concatenate(list(pool.map(search, starts)))


def _in_time(column: pa.ChunkedArray, one: ColumnFilter) -> Any:
    """Compare instants as whole numbers of the column's unit; no zone counts as UTC."""
    import pyarrow as pa
    import pyarrow.compute as pc

    of = column.type
    unit = "day" if pa.types.is_date32(of) else "ms" if pa.types.is_date64(of) else of.unit
    ns = _NS_PER_UNIT[unit]
    numbers = column.cast(pa.int32() if unit == "day" else pa.int64())
    pairs = [one.values] if one.test == "range" else [(value, value) for value in one.values]
    found = None
    for low, high in pairs:
        first = None if low is None else -(-_nanoseconds(low) // ns)
        last = None if high is None else _nanoseconds(high, is_end=True) // ns
        inside = _between(numbers, first, last)
        found = inside if found is None else pc.or_(found, inside)
    return found


def _in_numbers(column: pa.ChunkedArray, one: ColumnFilter) -> Any:
    """Compare in the column's own type: bounds are rounded to it, as NumPy does."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    if pa.types.is_float16(column.type):
        column = column.cast(pa.float32())
    if one.test == "any_of":
        values = [value for value in one.values if _fits(value, column.type)]
        return pc.is_in(column, value_set=pa.array(values, type=column.type))
    low, high = one.values
    if pa.types.is_integer(column.type):
        low = None if low is None else math.ceil(low)
        high = None if high is None else math.floor(high)
    else:
        low, high = (None if bound is None else float(bound) for bound in one.values)
    return _between(column, low, high)


def _between(column: pa.ChunkedArray, low: float | None, high: float | None) -> Any:
    """Return where `low <= column <= high`, both in the column's type or beyond its range."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.is_valid(column)
    if pa.types.is_integer(column.type):
        least, most = _limits(column.type)
        if (low is not None and low > most) or (high is not None and high < least):
            return pc.and_(found, pc.invert(found))
        low = None if low is None or low <= least else low
        high = None if high is None or high >= most else high
    if low is not None:
        found = pc.and_(found, pc.greater_equal(column, pa.scalar(low, type=column.type)))
    if high is not None:
        found = pc.and_(found, pc.less_equal(column, pa.scalar(high, type=column.type)))
    return found


def _limits(of: pa.DataType) -> tuple[int, int]:
    limits = np.iinfo(of.to_pandas_dtype())
    return int(limits.min), int(limits.max)


def _fits(value: float, of: pa.DataType) -> bool:
    """Return whether a column of this type can hold a value at all."""
    import pyarrow as pa

    if not pa.types.is_integer(of):
        return True
    least, most = _limits(of)
    return value == math.floor(value) and least <= value <= most
