"""How many rows of an index have which codes: all that a planner is told (layer 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.boxes import CodeRange
from clipbranches_widget.sorted_columns import SortedColumns


class Stats(Protocol):
    """What a planner may ask of an index: counts, no rows."""

    @property
    def n_rows(self) -> int:
        """Rows of all shards."""

    @property
    def n_shards(self) -> int:
        """Shards that are asked one by one."""

    @property
    def has_bits(self) -> bool:
        """Whether every shard stores prefix bit vectors."""

    @property
    def has_order(self) -> bool:
        """Whether every shard stores its sorted order."""

    def count(self, code_range: CodeRange) -> int:
        """Return how many rows have a code in the range."""


@dataclass(frozen=True, slots=True)
class ColumnStats:
    """Counts over all shards of an index; see `Stats`. `offsets` is (D, 257) int64."""

    offsets: NDArray[np.int64]
    n_rows: int
    n_shards: int
    has_bits: bool
    has_order: bool

    @classmethod
    def of(cls, shards: Sequence[SortedColumns]) -> ColumnStats:
        """Sum the counts of shards; reads 2 KB a shard and column."""
        return cls(
            np.sum([shard.offsets for shard in shards], axis=0),
            sum(shard.n_rows for shard in shards),
            len(shards),
            all(shard.prefix is not None for shard in shards),
            all(shard.order is not None for shard in shards),
        )

    def count(self, code_range: CodeRange) -> int:
        """Return how many rows have a code in the range."""
        offsets = self.offsets[code_range.column]
        return int(offsets[code_range.high] - offsets[code_range.low])
