"""What the user said about rows: an immutable set of yes and no labels (layer 1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.errors import LabelError

RowIds: TypeAlias = NDArray[np.int64]

LABEL_WORDS: Mapping[int, str] = {1: "yes", -1: "no"}
"""The words for labels in files."""

_MAX_NAMED = 10


def as_row_ids(rows: int | Iterable[int] | NDArray[Any]) -> RowIds:
    """Turn what people pass as rows into sorted, distinct row ids.

    Parameters
    ----------
    rows
        One integer, or any iterable, array or pandas Series of integers, with one dimension.

    Returns
    -------
    Array of shape (n,), int64, ascending, without repeats; read-only, so not a view of an array
    that can change.

    Raises
    ------
    LabelError
        If `rows` holds anything but integers (booleans and floats included).

    Examples
    --------
    >>> as_row_ids({40, 12}).tolist()
    [12, 40]
    """
    if isinstance(rows, np.ndarray) and _are_row_ids(rows):
        return rows
    if isinstance(rows, str | bytes):
        raise LabelError(f"expected integer row ids, got text {rows!r}: pass rows such as [12, 40]")
    listed = rows if isinstance(rows, np.ndarray | int | np.integer) else _listed(rows)
    try:
        values = np.atleast_1d(np.asarray(listed))
    except ValueError as error:
        raise LabelError(f"expected a flat list of row ids, got a ragged one: {error}") from error
    if values.ndim != 1:
        raise LabelError(
            f"expected a flat list of row ids, got an array of shape {values.shape}: flatten it"
        )
    if values.size == 0:
        return _frozen(np.empty(0, np.int64))
    if values.dtype == bool:
        raise LabelError(
            f"expected integer row ids, got {values.size} booleans: "
            "pass numpy.flatnonzero(mask) to label the rows where a mask is true"
        )
    if values.dtype.kind not in "iu" or (
        values.dtype == np.uint64 and values.max() > np.iinfo(np.int64).max
    ):
        raise LabelError(
            f"expected integer row ids, got values of type {values.dtype} such as "
            f"{values.flat[0]!r}: pass rows such as result.rows[:5] or [12, 40]"
        )
    return _frozen(np.unique(values.astype(np.int64)))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LabelSet:
    """Rows labelled yes (+1) and rows labelled no (-1); every other row has no label (0).

    Immutable: the methods return new sets. Two sets are equal when they label the same rows
    alike.

    Parameters
    ----------
    positive, negative
        Row ids (see `as_row_ids`). As attributes: shape (n,), int64, ascending, read-only.

    Raises
    ------
    LabelError
        If a row is in both, is below zero or is not an integer.

    Examples
    --------
    >>> labels = LabelSet(positive=[12, 40], negative=[7])
    >>> labels
    LabelSet(positive=[12, 40], negative=[7])
    >>> labels = labels.with_labels(negative=[40])
    >>> labels.get(40), labels.get(12), labels.get(5), len(labels)
    (-1, 1, 0, 3)
    """

    positive: RowIds = field(default_factory=lambda: np.empty(0, np.int64))
    negative: RowIds = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        positive, negative = as_row_ids(self.positive), as_row_ids(self.negative)
        for rows in (positive, negative):
            if rows.size and rows[0] < 0:
                raise LabelError(f"expected row ids of at least 0, got {rows[0]}")
        both = positive[_are_in(negative, positive)]
        if both.size:
            raise LabelError(
                f"expected each row to be yes or no, got both for {_named(both)}: "
                "drop it from one of the two lists"
            )
        object.__setattr__(self, "positive", positive)
        object.__setattr__(self, "negative", negative)

    @property
    def rows(self) -> RowIds:
        """All labelled rows: shape (n,), int64, ascending, read-only."""
        return _frozen(_plus(self.positive, self.negative))

    def with_labels(
        self,
        positive: int | Iterable[int] | NDArray[Any] = (),
        negative: int | Iterable[int] | NDArray[Any] = (),
    ) -> LabelSet:
        """Add labels; a row that already has one takes the new one. Cost `O(n + m log n)`.

        Raises
        ------
        LabelError
            If a row is in both lists, is below zero or is not an integer.
        """
        added = LabelSet(as_row_ids(positive), as_row_ids(negative))
        kept = self.without(added.rows)
        return _trusted(_plus(kept.positive, added.positive), _plus(kept.negative, added.negative))

    def without(self, rows: int | Iterable[int] | NDArray[Any]) -> LabelSet:
        """Remove the labels of `rows`; rows without a label are passed over."""
        dropped = as_row_ids(rows)
        return _trusted(_minus(self.positive, dropped), _minus(self.negative, dropped))

    def among(self, rows: int | Iterable[int] | NDArray[Any]) -> LabelSet:
        """Return only the labels of `rows`."""
        wanted = as_row_ids(rows)
        return _trusted(
            wanted[_are_in(self.positive, wanted)], wanted[_are_in(self.negative, wanted)]
        )

    def get(self, row: int) -> int:
        """Return +1, -1, or 0 for a row without a label. Cost `O(log n)`."""
        one = np.array([row])
        return int(_are_in(self.positive, one)[0]) - int(_are_in(self.negative, one)[0])

    def to_dict(self) -> dict[str, list[int]]:
        """Return plain lists, ready for JSON; `from_dict` reads them back."""
        return {"positive": self.positive.tolist(), "negative": self.negative.tolist()}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> LabelSet:
        """Read what `to_dict` wrote.

        Raises
        ------
        LabelError
            If a key is missing or the rows are no valid labels.
        """
        try:
            return cls(stored["positive"], stored["negative"])
        except (KeyError, TypeError) as error:
            raise LabelError(f"expected the keys positive and negative, got {stored!r}") from error

    def __len__(self) -> int:
        return self.positive.size + self.negative.size

    def __contains__(self, row: object) -> bool:
        return isinstance(row, int | np.integer) and self.get(int(row)) != 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LabelSet):
            return NotImplemented
        return np.array_equal(self.positive, other.positive) and np.array_equal(
            self.negative, other.negative
        )

    def __hash__(self) -> int:
        return hash((self.positive.tobytes(), self.negative.tobytes()))

    def __repr__(self) -> str:
        return f"LabelSet(positive={_named(self.positive)}, negative={_named(self.negative)})"


def _are_row_ids(rows: NDArray[Any]) -> bool:
    """Tell whether an array is what `as_row_ids` returns."""
    return (
        rows.dtype == np.int64
        and rows.ndim == 1
        and not rows.flags.writeable
        and rows.base is None
        and bool((rows[1:] > rows[:-1]).all())
    )


def _listed(rows: object) -> object:
    """Turn sets, ranges and generators into lists; leave arrays and Series to NumPy."""
    if hasattr(rows, "__array__") or not isinstance(rows, Iterable):
        return rows
    return list(rows)


def _frozen(rows: RowIds) -> RowIds:
    rows.setflags(write=False)
    return rows


def _trusted(positive: RowIds, negative: RowIds) -> LabelSet:
    """Make a set of disjoint row ids that are sorted and distinct already."""
    labels = object.__new__(LabelSet)
    object.__setattr__(labels, "positive", _frozen(positive))
    object.__setattr__(labels, "negative", _frozen(negative))
    return labels


def _are_in(rows: RowIds, wanted: RowIds) -> NDArray[np.bool_]:
    """Tell which of `wanted` are among the sorted `rows`: shape as `wanted`."""
    if not rows.size:
        return np.zeros(wanted.shape, bool)
    places = np.minimum(np.searchsorted(rows, wanted), rows.size - 1)
    found: NDArray[np.bool_] = rows[places] == wanted
    return found


def _plus(rows: RowIds, added: RowIds) -> RowIds:
    """Merge two sorted arrays that share no row."""
    return np.insert(rows, np.searchsorted(rows, added), added) if added.size else rows


def _minus(rows: RowIds, dropped: RowIds) -> RowIds:
    """Take out of sorted `rows` those of sorted `dropped` that are there."""
    there = dropped[_are_in(rows, dropped)]
    return np.delete(rows, np.searchsorted(rows, there)) if there.size else rows


def _named(rows: RowIds) -> str:
    """Name up to ten rows and count the rest."""
    shown = ", ".join(str(row) for row in rows[:_MAX_NAMED])
    rest = rows.size - _MAX_NAMED
    return f"[{shown}, ... {rest} more]" if rest > 0 else f"[{shown}]"
