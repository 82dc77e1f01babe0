"""Conditions mean the same in NumPy, pandas and SQL, whatever the columns are called."""

import sqlite3

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipbranches_widget.boxes import LeafBox
from clipbranches_widget.column_model import vocabulary
from clipbranches_widget.conditions import (
    Condition,
    column_names,
    conditions_of,
    sql_identifier,
)
from clipbranches_widget.errors import QueryError

HOSTILE = [
    "like 'cat' (3)",
    'like "dog\'s bowl"',
    '"; DROP TABLE columns; --',
    "a`b",
    "#1 dad",
    "100% cotton",
    "3d model",
    "row",
    "ROW",
    "rowid",
    "inf",
    "list",
    "class",
    "None",
    "@bird",
    "back\\slash",
    "two\nlines",
    "nul\0",
    "\ud800",
    "",
    " ",
    "ﬁsh",
    "año nuevo",
    "鳥",
    "bird",
    "Bird",
    "a_b c",
    "a b c",
    "a b_GREATER_c",
    "a b>c",
    "BACKTICK_QUOTED_STRING_a_b_c",
    "[bracket]",
    "x or 1 = 1",
    "index",
    "sin",
]
NAME = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=6), st.text("aA _>`'", max_size=4))
FLOAT = st.floats(-2, 2, width=32, allow_nan=False)


def frame_of(names, values):
    return pd.DataFrame({"row": np.arange(values.shape[1])} | dict(zip(names, values, strict=True)))


def sqlite_of(frame):
    """Return an in-memory database with the table "columns"."""
    connection = sqlite3.connect(":memory:")
    declared = ", ".join(f"{sql_identifier(name)} REAL" for name in frame.columns[1:])
    connection.execute(f'CREATE TABLE "columns" ("row" INTEGER, {declared})')
    marks = ", ".join("?" * frame.shape[1])
    lines = frame.astype({"row": object}).to_numpy(object).tolist()
    connection.executemany(f'INSERT INTO "columns" VALUES ({marks})', lines)
    return connection


@st.composite
def columns_and_edges(draw):
    names = draw(st.lists(NAME, min_size=1, max_size=5))
    edges = sorted(draw(st.lists(FLOAT, min_size=2, max_size=2)))
    near = np.float32([*edges, *np.nextafter(np.float32(edges), -9), 0.0, -0.0, 5, -5])
    seed = draw(st.integers(0, 2**16))
    values = np.random.default_rng(seed).choice(near, (len(names), 12)).astype(np.float32)
    column = draw(st.integers(0, len(names) - 1))
    low, high = draw(st.sampled_from([edges, (edges[0], None), (None, edges[1]), (None, None)]))
    return names, values, column, low, high


@given(columns_and_edges())
def test_a_condition_selects_the_same_rows_everywhere(given_columns):
    names, values, column, low, high = given_columns
    names = column_names(names)
    assert len({name.casefold() for name in names} | {"row"}) == len(names) + 1
    expected = np.ones(values.shape[1], dtype=bool)
    if low is not None:
        expected &= values[column] >= np.float32(low)
    if high is not None:
        expected &= values[column] < np.float32(high)
    condition = Condition(names[column], low, high)
    frame = frame_of(names, values)
    found = frame.query(condition.to_pandas_query())
    assert found["row"].tolist() == np.flatnonzero(expected).tolist()
    with sqlite_of(frame) as connection:
        rows = connection.execute(f'SELECT "row" FROM "columns" WHERE {condition.to_sql()}')
        assert [row for (row,) in rows] == np.flatnonzero(expected).tolist()
    connection.close()


@given(columns_and_edges())
def test_duckdb_agrees(given_columns):
    duckdb = pytest.importorskip("duckdb", reason="DuckDB is an optional cross-check")
    names, values, column, low, high = given_columns
    names = column_names(names)
    condition = Condition(names[column], low, high)
    frame = frame_of(names, values)
    expected = frame.query(condition.to_pandas_query())["row"].tolist()
    with duckdb.connect() as connection:
        connection.register("columns", frame)
        query = f'SELECT "row" FROM "columns" WHERE {condition.to_sql()}'
        assert [row for (row,) in connection.execute(query).fetchall()] == expected


@given(st.lists(NAME, max_size=8))
def test_names_are_settled_at_once(names):
    once = column_names(names)
    assert len(once) == len(names)
    assert column_names(once) == once


def test_everyday_names_stay():
    names = [*vocabulary(), "like row 12", "like 'a red bird' (7)", "t-shirt", "rock & roll"]
    assert column_names(names) == tuple(names)


def test_a_name_that_can_stay_is_not_taken_by_a_mended_one():
    assert column_names(["a`b", "a_b", "a#b"]) == ("a_b_2", "a_b", "a_b_3")


def test_a_box_becomes_one_condition_a_range():
    edges = np.linspace(-1, 1, 255, dtype=np.float32)[None, :].repeat(3, axis=0)
    box = LeafBox.from_bounds({0: (8, 256), 1: (0, 16), 2: (3, 5)})
    assert conditions_of(box, ["a", "b", "c"], edges) == (
        Condition("a", low=float(edges[0, 7])),
        Condition("b", high=float(edges[1, 15])),
        Condition("c", float(edges[2, 2]), float(edges[2, 4])),
    )
    assert conditions_of(LeafBox.from_bounds({}), ["a", "b", "c"], edges) == ()


@pytest.mark.parametrize("bound", [np.inf, -np.inf, np.nan])
def test_bounds_that_no_dialect_can_write_are_refused(bound):
    with pytest.raises(QueryError, match="expected a finite bound, got"):
        Condition("a", low=bound).to_sql()


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_identifiers_that_no_dialect_can_quote_are_refused(name):
    with pytest.raises(QueryError, match="expected a name without NUL characters for SQL"):
        sql_identifier(name)
