"""What the shards of a catalog are asked, as values that travel to workers (layer 4).

A request is about some shards; `only` narrows it to those of one worker. Its answers are by shard,
so that it does not matter which worker gave them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.box_query import ColumnIndex
from clipbranches_widget.column_stats import ColumnStats
from clipbranches_widget.shard_ask import Ask, Proposed, propose

if TYPE_CHECKING:
    from typing import Any

    from clipbranches_widget.boxes import LeafBox
    from clipbranches_widget.cluster_worker import Served
    from clipbranches_widget.query_answer import BoxPart
    from clipbranches_widget.query_plan import BoxStrategy
    from clipbranches_widget.teacher import Teacher
    from clipbranches_widget.tree_program import TreeProgram

LocalRows = NDArray[np.uint32]

BLOCK_ROWS = 32_768


class ShardRequest(Protocol):
    """A request that can be split by shard."""

    @property
    def numbers(self) -> Iterable[int]:
        """The shards it is about."""

    def only(self, numbers: Sequence[int]) -> ShardRequest:
        """Return what of it is about some of its shards."""

    def answer(self, served: Served) -> dict[int, Any]:
        """Return the answer of each shard, by its number."""


class SentAsk(NamedTuple):
    """An `Ask` without its query, which others share, and with one bit a row for `allowed`."""

    query: int
    k: int
    expansion: int
    is_scanned: bool
    n_allowed: int
    allowed: NDArray[np.uint8] | None
    floor: float


class Proposals(NamedTuple):
    """What one shard proposed for several queries, one after the other.

    Attributes
    ----------
    lengths : (q,) int64
        Rows of each query.
    local_rows : (m,) uint32
    similarities : (m,) float32
    n_scored : (q,) int64
    is_exact : (q,) bool
    logits : (m,) float32 or None
        Where a teacher was given.
    """

    lengths: NDArray[np.int64]
    local_rows: LocalRows
    similarities: NDArray[np.float32]
    n_scored: NDArray[np.int64]
    is_exact: NDArray[np.bool_]
    logits: NDArray[np.float32] | None

    def split(self) -> list[Proposed]:
        """Return what was proposed for each query."""
        ends = np.cumsum(self.lengths)[:-1]
        parts = (np.split(each, ends) for each in (self.local_rows, self.similarities))
        return [
            Proposed(rows.astype(np.int64), similarities, n_scored, is_exact)
            for rows, similarities, n_scored, is_exact in zip(
                *parts, self.n_scored.tolist(), self.is_exact.tolist(), strict=True
            )
        ]


@dataclass(frozen=True, slots=True)
class Propose:
    """Ask the vector indexes: `queries` is (q, dim) float64; `asks`, those of each shard."""

    queries: NDArray[np.float64]
    asks: Mapping[int, Sequence[SentAsk]]
    teacher: Teacher | None = None

    @classmethod
    def of(cls, asked: Sequence[Ask], teacher: Teacher | None = None) -> Propose:
        """Pack what shards are asked; those of each shard keep their order."""
        queries: dict[int, tuple[int, NDArray[np.float64]]] = {}
        asks: dict[int, list[SentAsk]] = {}
        for ask in asked:
            number, _ = queries.setdefault(id(ask.query), (len(queries), ask.query))
            sent = None
            if ask.is_filtered and ask.allowed is not None:
                sent = np.packbits(ask.allowed)
            about = (ask.k, ask.expansion, ask.is_scanned, ask.n_allowed, sent, ask.floor)
            asks.setdefault(ask.number, []).append(SentAsk(number, *about))
        return cls(np.stack([query for _, query in queries.values()]), asks, teacher)

    @property
    def numbers(self) -> Iterable[int]:
        """The shards it is about."""
        return self.asks

    def only(self, numbers: Sequence[int]) -> Propose:
        """Return what of it is about some of its shards."""
        return replace(self, asks={number: self.asks[number] for number in numbers})

    def answer(self, served: Served) -> dict[int, Proposals]:
        """Search the shards' vector indexes."""
        asks = [(number, sent) for number in self.asks for sent in self.asks[number]]
        for number in self.asks:
            served.shard(number)  # its files are checked
        found = served.each(lambda each: self._proposed(served, *each), asks)
        parts: dict[int, list[Proposed]] = {number: [] for number in self.asks}
        for (number, _), each in zip(asks, found, strict=True):
            parts[number].append(each)
        joined = served.each(lambda each: self._joined(served, *each), list(parts.items()))
        return dict(zip(parts, joined, strict=True))

    def _proposed(self, served: Served, number: int, sent: SentAsk) -> Proposed:
        catalog = served.catalog
        shard = catalog.shards[number]
        allowed: NDArray[np.bool_] | None = None
        if sent.allowed is not None:
            allowed = np.unpackbits(sent.allowed, count=shard.n_rows).astype(np.bool_)
        elif len(shard.among(catalog.removed_rows)):
            allowed = catalog.is_present[shard.first_row : shard.end]
        ask = Ask(
            number=number,
            query=self.queries[sent.query],
            k=sent.k,
            expansion=sent.expansion,
            is_scanned=sent.is_scanned,
            allowed=allowed,
            n_allowed=sent.n_allowed,
            is_filtered=sent.allowed is not None,
        )
        found = propose(catalog, ask)
        needed = found.similarities >= sent.floor
        return found._replace(
            local_rows=found.local_rows[needed], similarities=found.similarities[needed]
        )

    def _joined(self, served: Served, number: int, found: Sequence[Proposed]) -> Proposals:
        rows = np.concatenate([each.local_rows for each in found]).astype(np.uint32)
        return Proposals(
            np.array([len(each.local_rows) for each in found], dtype=np.int64),
            rows,
            np.concatenate([each.similarities for each in found]),
            np.array([each.n_scored for each in found], dtype=np.int64),
            np.array([each.is_exact for each in found], dtype=np.bool_),
            None if self.teacher is None else _logits(served, number, rows, self.teacher),
        )


class Looked(NamedTuple):
    """What `Look` gives of one shard: None where no row was asked for.

    Attributes
    ----------
    embeddings : (a, dim) float16
    codes : (D, b) uint8
    logits : (c,) float32
    margins : (d,) float32
    """

    embeddings: NDArray[np.float16] | None
    codes: NDArray[np.uint8] | None
    logits: NDArray[np.float32] | None
    margins: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class Look:
    """Look rows up: for each of four things, the local rows of each shard that it is asked of."""

    embedded: Mapping[int, LocalRows] = field(default_factory=dict)
    coded: Mapping[int, LocalRows] = field(default_factory=dict)
    scored: Mapping[int, LocalRows] = field(default_factory=dict)
    summed: Mapping[int, LocalRows] = field(default_factory=dict)
    teacher: Teacher | None = None
    program: TreeProgram | None = None

    @property
    def numbers(self) -> Iterable[int]:
        """The shards it is about."""
        return {*self.embedded, *self.coded, *self.scored, *self.summed}

    def only(self, numbers: Sequence[int]) -> Look:
        """Return what of it is about some of its shards."""

        def of(rows: Mapping[int, LocalRows]) -> Mapping[int, LocalRows]:
            return {number: rows[number] for number in numbers if number in rows}

        embedded, coded, scored, summed = map(
            of, (self.embedded, self.coded, self.scored, self.summed)
        )
        return Look(embedded, coded, scored, summed, self.teacher, self.program)

    def answer(self, served: Served) -> dict[int, Looked]:
        """Read the rows."""
        numbers = sorted(self.numbers)
        found = served.each(lambda number: self._looked(served, number), numbers)
        return dict(zip(numbers, found, strict=True))

    def _looked(self, served: Served, number: int) -> Looked:
        opened = served.shard(number)
        columns = ColumnIndex([opened.columns], n_threads=1, loader=served.loader)
        embeddings = codes = logits = margins = None
        if number in self.embedded:
            embeddings = np.asarray(opened.shard.embeddings[self.embedded[number]])
        if number in self.coded:
            codes = columns.codes(self.coded[number].astype(np.int64))
        if number in self.scored and self.teacher is not None:
            logits = _logits(served, number, self.scored[number], self.teacher)
        if number in self.summed and self.program is not None:
            codes_used = columns.codes(
                self.summed[number].astype(np.int64), self.program.used_columns
            )
            margins = served.loader.engine.margins(codes_used, self.program)
        return Looked(embeddings, codes, logits, margins)


class Boxed(NamedTuple):
    """The rows of boxes in one shard, as in `BoxPart`, with logits where a teacher was given."""

    local_rows: LocalRows
    box_ids: NDArray[np.uint16]
    counts: NDArray[np.int64]
    logits: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class InBoxes:
    """Find the rows in boxes; with `is_counted`, only how many there are."""

    numbers: Sequence[int]
    boxes: Sequence[LeafBox]
    strategy: str | None = None
    teacher: Teacher | None = None
    is_counted: bool = False

    def only(self, numbers: Sequence[int]) -> InBoxes:
        """Return what of it is about some of its shards."""
        return replace(self, numbers=numbers)

    def answer(self, served: Served) -> dict[int, Boxed]:
        """Ask the column index."""
        columns = served.columns(self.numbers)
        strategy = cast("BoxStrategy | None", self.strategy)
        if (strategy == "bits" and not columns.stats.has_bits) or (
            strategy == "postings" and not columns.stats.has_order
        ):
            strategy = None  # dropped since by `rebuild_columns`: the others find the same rows
        _, stream = columns.stream_boxes(self.boxes, strategy=strategy)
        numbers = {served.catalog.shards[number].first_row: number for number in self.numbers}
        parts: dict[int, list[BoxPart]] = {number: [] for number in self.numbers}
        for part in stream:
            parts[numbers[part.first_row]].append(part)
        found = served.each(lambda each: self._boxed(served, *each), list(parts.items()))
        return dict(zip(parts, found, strict=True))

    def _boxed(self, served: Served, number: int, parts: Sequence[BoxPart]) -> Boxed:
        none = np.zeros(len(self.boxes), dtype=np.int64)
        counts = np.sum([none, *(part.counts for part in parts)], axis=0)
        if self.is_counted:
            return Boxed(np.empty(0, np.uint32), np.empty(0, np.uint16), counts, None)
        rows = np.concatenate([np.empty(0, np.uint32), *(part.local_rows for part in parts)])
        box_ids = np.concatenate([np.empty(0, np.uint16), *(part.box_ids for part in parts)])
        logits = None if self.teacher is None else _logits(served, number, rows, self.teacher)
        return Boxed(rows, box_ids, counts, logits)


@dataclass(frozen=True, slots=True)
class Count:
    """Count the codes of the shards, all shards of a worker together."""

    numbers: Sequence[int]

    def only(self, numbers: Sequence[int]) -> Count:
        """Return what of it is about some of its shards."""
        return Count(numbers)

    def answer(self, served: Served) -> dict[int, ColumnStats]:
        """Return the counts of all these shards, as the answer of one."""
        stats = served.columns(self.numbers).stats
        if stats.n_rows < 2**32:
            stats = replace(stats, offsets=stats.offsets.astype(np.uint32))
        return {self.numbers[0]: stats}


def _logits(served: Served, number: int, rows: LocalRows, teacher: Teacher) -> NDArray[np.float32]:
    """Return the logits of local rows of a shard, block by block."""
    embeddings = served.shard(number).shard.embeddings
    logits = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        logits[block] = teacher.logits(embeddings[rows[block]].astype(np.float32))
    return logits
