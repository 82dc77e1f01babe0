"""Labelled rows of a session, to be written out (layer 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clipbranches_widget.row_export import RowExport, items_with, with_labels

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.labels import LabelSet


@dataclass(frozen=True, slots=True, eq=False)
class LabelledRows(RowExport):
    """The rows that have a label, in the order of their ids, with every way out of a Result.

    Attributes
    ----------
    catalog : Catalog
        Where the rows are.
    rows : (m,) int64
        Row ids, ascending; removed rows are left out.
    labels : LabelSet
        Their labels.
    """

    catalog: Catalog = field(repr=False)
    rows: NDArray[np.int64]
    labels: LabelSet

    @classmethod
    def of(cls, catalog: Catalog, labels: LabelSet) -> LabelledRows:
        """Return the labelled rows that are in a catalog."""
        return cls(catalog, catalog.without_removed(labels.rows), labels)

    def to_arrow(self) -> pa.Table:
        """Return one line a row, by row id, as an Arrow table: what `to_parquet` writes.

        Columns: row (int64), label (string, yes or no), path, caption, width, height, content_hash
        and the user's columns. One of these that is called label becomes source_label.
        """
        return with_labels(self._own_columns(), self.labels)

    def _own_columns(self) -> pa.Table:
        import pyarrow as pa

        return items_with(self.catalog, self.rows, {"row": pa.array(self.rows)})

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the row ids, ascending."""
        return iter(self.rows.tolist())

    def __repr__(self) -> str:
        """Return one line: how many of each."""
        there = self.labels.among(self.rows)
        yes, no = len(there.positive), len(there.negative)
        return f"<LabelledRows of {self.catalog.path.name}: {yes:,} yes, {no:,} no>"
