"""One rule of an answer (layer 2): a box in words, in SQL and for pandas, with its counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipbranches_widget.conditions import EVERY_ROW, ROW_COLUMN, sql_identifier

if TYPE_CHECKING:
    from clipbranches_widget.boxes import LeafBox
    from clipbranches_widget.conditions import Condition, RuleState


@dataclass(frozen=True, slots=True)
class Branch:
    """One rule of an answer: a leaf box, said in words, with its counts.

    Attributes
    ----------
    id : int
        Position in `Result.branches`; `Result.branch_ids` refers to it.
    text : str
        The rule, such as ``bird >= 0.31 and aircraft < 0.18``.
    n_rows : int
        Rows of the whole catalog that the rule admits, before the score decides; without a box,
        the rows of the answer that no box admits.
    n_positive, n_negative : int
        Labelled rows that the rule admits, by label.
    box : LeafBox or None
        The box; None for the two sources that are no box: the vector index's nearest rows to
        the examples, and rows admitted only because they are labelled yes.
    conditions : tuple of Condition
        The box on the columns that `export_columns` writes, one condition a range.
    example_rows : tuple of int
        The best five rows of the answer whose main branch this is, best first.
    rows : tuple of int
        Without a box, the rows of the answer that no box admits, ascending; else empty.
    state : str
        on, off or pinned: see `Session.switch_off` and `Session.pin`. A branch that is off
        admits no rows; its counts are those it would have.
    """

    id: int
    text: str
    n_rows: int
    n_positive: int
    n_negative: int
    box: LeafBox | None = None
    conditions: tuple[Condition, ...] = ()
    example_rows: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    state: RuleState = "on"

    def to_sql(self, table: str | None = None) -> str:
        """Return the rule as SQL on a table that `export_columns` wrote.

        It selects the very rows that the branch holds (`n_rows`), also where the table keeps
        the values in double precision.

        Parameters
        ----------
        table : str, optional
            Name of the table (for DuckDB also the path of the Parquet file); it is quoted as one
            identifier. Default: only the expression, for a WHERE clause.

        Examples
        --------
        >>> Branch(0, "near your examples", 2, 0, 0, rows=(3, 8)).to_sql("columns")
        'SELECT "row" FROM "columns" WHERE "row" IN (3, 8)'
        """
        where = " AND ".join(condition.to_sql() for condition in self.conditions) or EVERY_ROW[0]
        if self.box is None:
            listed = ", ".join(map(str, self.rows))
            where = f"{sql_identifier(ROW_COLUMN)} IN ({listed})" if listed else "1 = 0"
        if table is None:
            return where
        columns, source = sql_identifier(ROW_COLUMN), sql_identifier(table)
        return f"SELECT {columns} FROM {source} WHERE {where}"  # noqa: S608 - quoted, and numbers

    def to_pandas_query(self) -> str:
        """Return the rule for `pandas.DataFrame.query` on what `export_columns` returns.

        It selects the very rows that the branch holds (`n_rows`).

        Examples
        --------
        >>> Branch(0, "near your examples", 2, 0, 0, rows=(3, 8)).to_pandas_query()
        'row in [3, 8]'
        """
        if self.box is None:
            return f"{ROW_COLUMN} in {list(self.rows)}"
        terms = [condition.to_pandas_query() for condition in self.conditions]
        return " and ".join(terms) or EVERY_ROW[1]

    def __str__(self) -> str:
        """Return the rule with its counts, on one line."""
        images = "image" if self.n_rows == 1 else "images"
        counts = f"{self.n_rows:,} {images} ({self.n_positive} yes, {self.n_negative} no)"
        state = "" if self.state == "on" else f", {self.state}"
        return f"{self.text} -> {counts}{state}"
