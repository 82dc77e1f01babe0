"""Conditions on columns, compared with plain Python over the rows."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import math
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipbranches_widget.errors import QueryError
from clipbranches_widget.item_columns import MAX_CATEGORIES, summaries
from clipbranches_widget.row_filter import ColumnFilter, checked_filters, column_kind, passing

UTC = dt.UTC
TIMES = ["2024-01-01T12:00", None, "2024-01-02T00:00", "2024-01-02T23:59"]
DAYS = [time and dt.datetime.fromisoformat(time) for time in TIMES]
TABLE = pa.table(
    {
        "caption": ["Red bird", None, "\u00c9COLE (a+b)", "red"],
        "group": pa.array(["a", "b", None, "a"]).dictionary_encode(),
        "small": pa.array([1, 2, None, 4], pa.int8()),
        "huge": pa.array([1, 2**63, None, 2**64 - 1], pa.uint64()),
        "score": pa.array([0.1, math.nan, None, 2.5], pa.float32()),
        "half": pa.array(np.array([0.1, np.nan, 1, 2.5], np.float16)),
        "price": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal(2), decimal.Decimal(3)]),
        "day": pa.array([day and day.date() for day in DAYS]),
        "day64": pa.array([day and day.date() for day in DAYS], pa.date64()),
        "time": pa.array(DAYS, pa.timestamp("ns")),
        "zoned": pa.array([day and day.replace(tzinfo=UTC) for day in DAYS]).cast(
            pa.timestamp("ms", "Asia/Tokyo")
        ),
        "sold": [True, False, None, True],
        "tags": [["x"], [], None, ["y"]],
    }
)


def rows_of(conditions, table=TABLE):
    return np.flatnonzero(passing(table, checked_filters(conditions, table.schema))).tolist()


@pytest.mark.parametrize(
    ("conditions", "rows", "words"),
    [
        ({"caption": "RED"}, [0, 3], "caption contains 'RED'"),
        ({"caption": "\u00e9cole (A+B"}, [2], None),
        ({"caption": ["red", "x"]}, [3], "caption is red or x"),
        ({"group": ["a"]}, [0, 3], None),
        ({"group": "B"}, [1], None),
        ({"small": (2, 4)}, [1, 3], "2 <= small <= 4"),
        ({"small": (1.5, None)}, [1, 3], "small >= 1.5"),
        ({"small": (-(10**12), 10**30)}, [0, 1, 3], None),
        ({"small": (10**12, None)}, [], None),
        ({"small": (None, -(10**12))}, [], None),
        ({"small": {1, 4, 2.5, 10**20}}, [0, 3], None),
        ({"huge": (2**63, None)}, [1, 3], None),
        ({"huge": (-5, 2**63)}, [0, 1], None),
        ({"score": (None, 0.1)}, [0], "score <= 0.1"),
        ({"score": (0.1, 1e300)}, [0, 3], None),
        ({"score": [2.5, 7]}, [3], None),
        ({"half": (0.1, None)}, [2, 3], None),
        ({"price": (1.5, 2)}, [0, 2], None),
        ({"price": np.array([2, 3])}, [2, 3], None),
        ({"day": ("2024-01-02", None)}, [2, 3], "day >= 2024-01-02"),
        ({"day": (dt.date(2024, 1, 1), dt.datetime(2024, 1, 1, 5, tzinfo=UTC))}, [0], None),
        ({"day64": (None, np.datetime64("2024-01-01"))}, [0], None),
        ({"time": (None, "2024-01-02")}, [0, 2, 3], None),
        ({"time": (None, "2024-01-02T00:00:00")}, [0, 2], None),
        ({"time": ("1500-01-01", "9999-12-31")}, [0, 2, 3], None),
        ({"time": ["2024-01-01"]}, [0], None),
        ({"zoned": ("2024-01-01T12:00:00+00:00", "2024-01-01T21:00:00+09:00")}, [0], None),
        ({"zoned": ("2024-01-02", "2024-01-02")}, [2, 3], None),
        ({"sold": True}, [0, 3], "sold is yes"),
        ({"sold": np.False_}, [1], "sold is no"),
        ({"sold": True, "small": (2, None)}, [3], None),
        ({}, [0, 1, 2, 3], None),
    ],
)
def test_conditions(conditions, rows, words):
    assert rows_of(conditions) == rows
    filters = checked_filters(conditions, TABLE.schema)
    stored = json.loads(json.dumps([one.to_dict() for one in filters]))
    assert tuple(map(ColumnFilter.from_dict, stored)) == filters
    assert checked_filters({one.column: one.condition for one in filters}, TABLE.schema) == filters
    if words is not None:
        assert [str(one) for one in filters] == [words]


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (
            {"nope": 1},
            f"expected a column to filter on: {', '.join(TABLE.column_names[:-1])}; got 'nope'",
        ),
        ({3: 1}, "got 3"),
        ({"tags": "x"}, "expected a column of texts, numbers, dates or true/false, got 'tags' of"),
        ({"small": 5}, "for the number column 'small' a pair (min, max) of numbers"),
        ({"small": "5"}, "got '5'"),
        ({"small": (1, 2, 3)}, "got (1, 2, 3)"),
        ({"small": (None, None)}, "one of the two must be given"),
        ({"small": (5, 1)}, "min is above max"),
        ({"small": (math.nan, 1)}, "nan is not finite; None leaves an end open"),
        ({"small": (True, None)}, "True is no number"),
        ({"small": []}, "expected 1 to 10,000 values, got 0"),
        ({"small": range(10_001)}, "expected 1 to 10,000 values, got 10,001"),
        ({"score": (10**400, None)}, "too large"),
        ({"caption": ""}, "for the text column 'caption' a text that it contains"),
        ({"caption": ("a", "b")}, "got ('a', 'b')"),
        ({"caption": [None]}, "None is no text"),
        ({"caption": b"red"}, "got b'red'"),
        ({"day": ("soon", None)}, "for the date column 'day' a pair (min, max) of dates"),
        ({"day": (20240101, None)}, "20240101 is no date"),
        ({"sold": [True]}, "for the flag column 'sold' True or False"),
        (["small"], "expected conditions by column, such as {'width': (300, None)}"),
    ],
)
def test_conditions_that_cannot_be(conditions, message):
    with pytest.raises(QueryError, match=re.escape(message)):
        checked_filters(conditions, TABLE.schema)


@pytest.mark.parametrize(
    "one",
    [
        ColumnFilter("gone", "is", (True,)),
        ColumnFilter("small", "contains", ("x",)),
        ColumnFilter("day", "range", ("soon", None)),
        ColumnFilter("caption", "any_of", ("b", "a")),
        ColumnFilter("small", "any_of", ("x",)),
    ],
)
def test_a_filter_of_another_table_is_refused(one):
    with pytest.raises(QueryError, match="expected"):
        passing(TABLE, [one])


@pytest.mark.parametrize(
    "stored",
    [
        {"column": "a", "test": "like", "values": ["x"]},
        {"column": 1, "test": "is", "values": [True]},
        {"column": "a", "test": "is", "values": []},
        {"column": "a", "test": "range", "values": [1]},
        {"column": "a", "test": "any_of", "values": [[1]]},
        {"column": "a", "test": "any_of", "values": 5},
        {"test": "is", "values": [True]},
    ],
)
def test_a_damaged_record_is_refused(stored):
    with pytest.raises((KeyError, TypeError, ValueError)):
        ColumnFilter.from_dict(stored)


@settings(max_examples=60)
@given(
    values=st.lists(st.none() | st.integers(-200, 200), min_size=1, max_size=30),
    ends=st.tuples(st.none() | st.floats(-250, 250), st.none() | st.floats(-250, 250)),
    of=st.sampled_from([pa.int16(), pa.int64(), pa.float64()]),
    n_chunks=st.integers(1, 3),
)
def test_a_range_is_what_a_loop_finds(values, ends, of, n_chunks):
    low, high = ends
    if (low is None and high is None) or (None not in ends and low > high):
        return
    parts = np.array_split(np.array(values, object), n_chunks)
    table = pa.table({"x": pa.chunked_array([pa.array(list(part), of) for part in parts], of)})
    expected = [
        row
        for row, value in enumerate(values)
        if value is not None and (low is None or value >= low) and (high is None or value <= high)
    ]
    assert rows_of({"x": (low, high)}, table) == expected


@given(
    values=st.lists(st.none() | st.text("aAbB\u00e9\u00c9", max_size=4), min_size=1, max_size=20),
    part=st.text("aAbB\u00e9\u00c9", min_size=1, max_size=2),
)
def test_contains_is_what_a_loop_finds(values, part):
    table = pa.table({"x": pa.array(values, pa.string())})
    texts = enumerate(values)
    expected = [row for row, text in texts if text is not None and part.lower() in text.lower()]
    assert rows_of({"x": part}, table) == expected


def test_many_texts_are_searched_in_parts(monkeypatch):
    monkeypatch.setattr("clipbranches_widget.row_filter._MIN_TEXTS", 3)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    texts = ["Red", None, "x", "red", "a red", "b", "c", "RED", None, "d", "red"]
    table = pa.table({"x": pa.chunked_array([texts[:5], texts[5:]])})
    assert rows_of({"x": "red"}, table) == [0, 3, 4, 7, 10]
    assert rows_of({"x": "red"}, table.slice(0, 0)) == []


def test_kinds_of_columns():
    kinds = {field.name: column_kind(field.type) for field in TABLE.schema}
    assert kinds["tags"] is None
    assert {name for name, kind in kinds.items() if kind == "number"} == {
        "small", "huge", "score", "half", "price"
    }  # fmt: skip


def test_summaries_tell_what_can_be_asked():
    n_rows = 200
    table = pa.table(
        {
            "row": range(n_rows),
            "caption": [f"image {row % 3}" for row in range(n_rows)],
            "group": ["b" if row % 4 else "a" for row in range(n_rows)],
            "name": [f"n{row % (MAX_CATEGORIES + 1)}" for row in range(n_rows)],
            "same": ["x"] * n_rows,
            "width": pa.array([row if row % 2 else None for row in range(n_rows)], pa.int32()),
            "score": [math.nan, math.inf, -1.5, *([2.0] * (n_rows - 3))],
            "day": [dt.date(2020, 1, 1) + dt.timedelta(days=row) for row in range(n_rows)],
            "sold": [None, *([True] * (n_rows - 1))],
            "empty": pa.nulls(n_rows, pa.string()),
            "tags": [["x"]] * n_rows,
        }
    )
    found = {each.name: each for each in summaries(table)}
    assert list(found) == ["caption", "group", "name", "width", "score", "day", "sold"]
    assert [found[name].kind for name in found] == [
        "text", "category", "text", "number", "number", "date", "flag"
    ]  # fmt: skip
    assert found["group"].counts == (("b", 150), ("a", 50))
    assert (found["width"].least, found["width"].most, found["width"].n_missing) == (1, 199, 100)
    assert (found["score"].least, found["score"].most) == (-1.5, 2.0)
    assert (found["day"].least, found["day"].most) == ("2020-01-01", "2020-07-18")
    assert found["sold"].n_missing == 1
