"""LabelSet against a plain dict of row -> sign, and every input people pass as rows."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipbranches_widget.errors import LabelError
from clipbranches_widget.labels import LabelSet, as_row_ids

ROWS = st.frozensets(st.integers(0, 30), max_size=12)
STEPS = st.lists(st.tuples(st.sampled_from(["positive", "negative", "without"]), ROWS), max_size=8)


@given(STEPS)
def test_any_sequence_of_changes_equals_a_dict(steps):
    labels, model = LabelSet(), {}
    for action, rows in steps:
        if action == "without":
            labels = labels.without(rows)
            model = {row: sign for row, sign in model.items() if row not in rows}
        else:
            labels = labels.with_labels(**{action: rows})
            model |= dict.fromkeys(rows, 1 if action == "positive" else -1)
    assert labels.positive.tolist() == sorted(row for row, sign in model.items() if sign == 1)
    assert labels.negative.tolist() == sorted(row for row, sign in model.items() if sign == -1)
    assert labels.rows.tolist() == sorted(model)
    assert len(labels) == len(model)
    assert [labels.get(row) for row in range(31)] == [model.get(row, 0) for row in range(31)]
    assert [row in labels for row in range(31)] == [row in model for row in range(31)]
    some = range(0, 31, 3)
    assert labels.among(some) == labels.without(set(range(31)) - set(some))
    stored = json.loads(json.dumps(labels.to_dict()))
    assert LabelSet.from_dict(stored) == labels
    assert hash(LabelSet.from_dict(stored)) == hash(labels)


@pytest.mark.parametrize(
    "rows",
    [
        [5, 3, 3],
        (3, 5),
        {3, 5},
        np.array([5, 3], np.uint8),
        np.array([5, 3], np.uint64),
        pd.Series([5, 3], index=[9, 8]),
        (row for row in (5, 3)),
        range(3, 6, 2),
        [np.int32(3), 5],
    ],
    ids=lambda rows: type(rows).__name__,
)
def test_rows_of_any_kind_are_accepted(rows):
    ids = as_row_ids(rows)
    assert ids.dtype == np.int64
    assert ids.tolist() == [3, 5]


@pytest.mark.parametrize("empty", [[], (), set(), np.empty(0), np.empty(0, bool)])
def test_nothing_is_no_rows(empty):
    assert as_row_ids(empty).tolist() == []
    assert as_row_ids(empty).dtype == np.int64


def test_one_integer_is_one_row():
    assert as_row_ids(7).tolist() == [7]
    assert as_row_ids(np.int16(7)).tolist() == [7]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([True, False], "numpy.flatnonzero"),
        (np.array([True]), "got 1 booleans"),
        ([1.0], "expected integer row ids, got values of type float64"),
        ("12", "got text '12'"),
        (["12"], "expected integer row ids"),
        ([[1, 2]], "shape (1, 2): flatten it"),
        ([[1], [2, 3]], "ragged"),
        ([None], "expected integer row ids, got values of type object"),
        (None, "expected integer row ids, got values of type object"),
        ([2**63], "expected integer row ids, got values of type uint64"),
        ([2**70], "expected integer row ids, got values of type object"),
    ],
)
def test_anything_else_is_refused_with_advice(rows, message):
    with pytest.raises(LabelError, match=re.escape(message)):
        as_row_ids(rows)


def test_one_row_cannot_be_both():
    with pytest.raises(LabelError, match=r"got both for \[2, 3\]: drop it from one"):
        LabelSet().with_labels(positive=[1, 2, 3], negative=[3, 2])


def test_long_lists_of_rows_are_cut_in_messages():
    with pytest.raises(LabelError, match=r"8, 9, \.\.\. 90 more\]"):
        LabelSet(positive=range(100), negative=range(100))


def test_rows_below_zero_are_refused():
    with pytest.raises(LabelError, match="at least 0, got -1"):
        LabelSet(negative=[-1, 4])


@pytest.mark.parametrize("stored", [{}, {"positive": []}, None, []])
def test_stored_labels_must_have_both_keys(stored):
    with pytest.raises(LabelError, match="expected the keys positive and negative"):
        LabelSet.from_dict(stored)


def test_a_set_cannot_be_changed_and_shares_no_memory():
    rows = np.array([1, 2])
    labels = LabelSet(positive=rows)
    rows[0] = 9
    assert labels.positive.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        labels.positive[0] = 9
    with pytest.raises(AttributeError, match="cannot assign"):
        labels.positive = rows


def test_equality_is_by_value_and_only_with_label_sets():
    assert LabelSet([1], [2]) == LabelSet((1,), {2})
    assert LabelSet([1], [2]) != LabelSet([2], [1])
    assert LabelSet([1]) != {"positive": [1]}
    assert "1" not in LabelSet([1])
