"""Typed columns from JSON objects that come one by one (layer 5). Pure.

Each field becomes a column of the narrowest Arrow type that takes all its values: whole numbers
and numbers with a point together are numbers with a point, anything else together is text. Objects
inside objects stay JSON text. A field that is missing in an object is null there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clipbranches_widget.source_table import free_name

if TYPE_CHECKING:
    import pyarrow as pa

_BLOCK_ROWS = 16_384


class JsonColumns:
    """Collects objects, and returns them as one table."""

    def __init__(self) -> None:
        self._waiting: list[Mapping[str, Any]] = []
        self._blocks: list[dict[str, pa.Array]] = []
        self._n_rows: list[int] = []

    def append(self, values: Mapping[str, Any]) -> None:
        """Add a line."""
        self._waiting.append(values)
        if len(self._waiting) == _BLOCK_ROWS:
            self._close_block()

    def table(self) -> pa.Table:
        """Return all lines, columns in the order they first came, under names that are free."""
        import pyarrow as pa

        self._close_block()
        columns: dict[str, pa.ChunkedArray] = {}
        for name in dict.fromkeys(name for block in self._blocks for name in block):
            parts = [
                block.get(name, pa.nulls(n_rows))
                for block, n_rows in zip(self._blocks, self._n_rows, strict=True)
            ]
            columns[free_name(name, taken=columns)] = _joined(parts)
        return pa.table(columns)

    def _close_block(self) -> None:
        names = dict.fromkeys(name for values in self._waiting for name in values)
        if self._waiting:
            self._blocks.append(
                {str(n): _array([values.get(n) for values in self._waiting]) for n in names}
            )
            self._n_rows.append(len(self._waiting))
        self._waiting = []


def _array(values: list[Any]) -> pa.Array:
    import pyarrow as pa

    plain = [as_text(value) if isinstance(value, dict) else value for value in values]
    numbers = [value for value in plain if isinstance(value, int | float)]
    if any(isinstance(value, float) for value in numbers):
        plain = [float(value) if type(value) is int else value for value in plain]
    try:
        return pa.array(plain)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return pa.array([as_text(value) for value in plain], pa.string())


def _joined(parts: list[pa.Array]) -> pa.ChunkedArray:
    """Return the parts of one column under their common type, text where there is no other."""
    import pyarrow as pa

    try:
        schemas = [pa.schema([("x", part.type)]) for part in parts]
        common = pa.unify_schemas(schemas, promote_options="permissive").field("x").type
        if not (pa.types.is_string(common) and any(not _fits_text(part.type) for part in parts)):
            return pa.chunked_array([part.cast(common) for part in parts], common)
    except pa.ArrowException:
        pass
    texts = [pa.array([as_text(v) for v in part.to_pylist()], pa.string()) for part in parts]
    return pa.chunked_array(texts, pa.string())


def _fits_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_null(kind))


def as_text(value: Any) -> str | None:
    """Return a value as text, JSON for what is none, in characters that UTF-8 can hold."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode(errors="replace").decode()  # JSON allows halves of characters
