"""The indexes of a catalog on a Dask cluster (layer 4): shards are asked where they are.

What moves is what was asked for: proposals of the vector indexes, the rows of boxes, and scores
instead of embeddings. Embeddings and codes of the rows that a round samples depend on catalog and
seed alone: they move once, and are kept. Learning and ranking happen on the client, the very same
code as on one machine, so that the answers are the same, bit for bit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.catalog_index import by_shard
from clipbranches_widget.cluster_crew import Crew
from clipbranches_widget.cluster_requests import (
    Boxed,
    Count,
    InBoxes,
    LocalRows,
    Look,
    Looked,
    Proposals,
    Propose,
)
from clipbranches_widget.column_model import ColumnModel
from clipbranches_widget.column_stats import ColumnStats
from clipbranches_widget.errors import ClusterError
from clipbranches_widget.index_protocol import Rows, ScoredPart
from clipbranches_widget.kept_rows import KeptRows
from clipbranches_widget.query_answer import BoxPart
from clipbranches_widget.query_plan import plan_boxes
from clipbranches_widget.shard_ask import Ask, Proposed
from clipbranches_widget.shard_search import Nearest, nearest_of_each
from clipbranches_widget.tree_program import TreeProgram
from clipbranches_widget.vector_index import unit_query

if TYPE_CHECKING:
    from distributed import Client

    from clipbranches_widget.boxes import LeafBox
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.labels import LabelSet
    from clipbranches_widget.query_plan import BoxStrategy, QueryPlan
    from clipbranches_widget.teacher import Teacher
    from clipbranches_widget.trees import TreeEnsemble

MAX_KEPT_BYTES = 64 * 2**20
"""Of embeddings and of codes, each, that are kept on the client."""


class ClusterIndex:
    """All indexes of one catalog, on workers: an `index_protocol.Index`.

    Nothing is sent before it is used. Every method raises ClusterError where the workers cannot
    answer; what a session holds is not touched by that.

    Parameters
    ----------
    catalog : Catalog
    client : Client
    """

    def __init__(self, catalog: Catalog, client: Client) -> None:
        self.catalog = catalog
        self.model = ColumnModel.open(catalog.path)
        self._crew = Crew(catalog, client)
        self._numbers = tuple(range(len(catalog.shards)))
        self._first_rows = np.array([shard.first_row for shard in catalog.shards], dtype=np.int64)
        self._embeddings = KeptRows(catalog.dim, np.float16, MAX_KEPT_BYTES)
        self._codes = KeptRows(self.model.n_columns, np.uint8, MAX_KEPT_BYTES)

    @property
    def bytes_moved(self) -> int:
        """Bytes that went to the workers and came back, so far."""
        return self._crew.bytes_moved

    @property
    def n_round_trips(self) -> int:
        """How often workers were asked and waited for, so far."""
        return self._crew.n_round_trips

    @cached_property
    def stats(self) -> ColumnStats:
        """Counts over all shards."""
        parts = list(self._crew.ask(Count(self._numbers)).values())
        return ColumnStats(
            np.sum([part.offsets for part in parts], axis=0, dtype=np.int64),
            sum(part.n_rows for part in parts),
            sum(part.n_shards for part in parts),
            all(part.has_bits for part in parts),
            all(part.has_order for part in parts),
        )

    def start_loading(self) -> None:
        """Have the workers open the catalog in the background."""

        def load() -> None:
            with contextlib.suppress(ClusterError):  # whoever asks next is told
                _ = self.stats

        threading.Thread(target=load, name="clipbranches-cluster", daemon=True).start()

    def present(self, labels: LabelSet) -> tuple[LabelSet, int]:
        """Return the labels of rows that are not removed, and how many others there were."""
        kept = labels.without(self.catalog.removed_rows)
        return kept, len(labels) - len(kept)

    def search(
        self, query: NDArray[np.float64], k: int, *, only: NDArray[np.bool_] | None = None
    ) -> Nearest:
        """Return the rows nearest to a query of `unit_query`: one round trip, seldom two."""
        return nearest_of_each(self.catalog, [(query, k)], self._proposed, only=only)[0]

    def nearest(self, vector: NDArray[np.floating], k: int) -> tuple[Rows, NDArray[np.float32]]:
        """Return the k rows nearest to a vector and their similarities, best first."""
        found = self.search(unit_query(vector, self.catalog.dim), k)
        return found.rows, found.similarities

    def nearest_of_each(self, wanted: Sequence[tuple[NDArray[np.floating], int]]) -> list[Rows]:
        """Return the k rows nearest to each of several (vector, k): all in one round trip."""
        queries = [(unit_query(vector, self.catalog.dim), k) for vector, k in wanted]
        return [found.rows for found in nearest_of_each(self.catalog, queries, self._proposed)]

    def nearest_scored(self, teacher: Teacher, k: int) -> tuple[Rows, NDArray[np.float32]]:
        """Return the k rows nearest to a teacher's direction and their logits."""
        known: dict[int, Proposals] = {}

        def run(asked: Sequence[Ask]) -> list[Proposed]:
            answers = self._crew.ask(Propose.of(asked, teacher))
            known.update(answers)  # a shard that is asked again gives more of the same
            return _in_order(asked, answers)

        query = unit_query(teacher.direction, self.catalog.dim)
        rows = nearest_of_each(self.catalog, [(query, k)], run)[0].rows
        logits = np.empty(len(rows), dtype=np.float32)
        for number, at in by_shard(rows, self._first_rows):
            proposed, found = known[number].local_rows, known[number].logits
            order = np.argsort(proposed)
            local = rows[at] - self._first_rows[number]
            assert found is not None  # noqa: S101 - a teacher was given
            logits[at] = found[order[np.searchsorted(proposed, local, sorter=order)]]
        return rows, logits

    def embeddings(self, rows: Rows) -> NDArray[np.float32]:
        """Return the embeddings of `rows`: (m, dim) float32, a copy."""
        return self._embeddings.get(rows, self._fetched_embeddings).astype(np.float32)

    def codes(self, rows: Rows) -> NDArray[np.uint8]:
        """Return the codes of `rows`: (D, m) uint8, a copy."""
        return np.ascontiguousarray(self._codes.get(rows, self._fetched_codes).T)

    def logits(self, teacher: Teacher, rows: Rows) -> NDArray[np.float32]:
        """Return a teacher's logits of `rows`: (m,) float32."""
        return self._scored(teacher, rows, with_codes=False)

    def sampled(
        self, teacher: Teacher, rows: Rows
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Return both `logits` and `codes` of `rows`, in one round trip."""
        return self._scored(teacher, rows, with_codes=True), self.codes(rows)

    def margins(self, forest: TreeEnsemble, rows: Rows) -> NDArray[np.float32]:
        """Return the margins of `rows`: (m,) float32."""
        places = self._places(rows)
        if not places:
            return np.empty(0, dtype=np.float32)
        looked = self._crew.ask(
            Look(summed=self._local(rows, places), program=TreeProgram.of(forest))
        )
        out = np.empty(len(rows), dtype=np.float32)
        for number, at in places.items():
            out[at] = looked[number].margins
        return out

    def counts(self, boxes: Sequence[LeafBox]) -> NDArray[np.int64]:
        """Return how many rows each of `boxes` holds: (n_boxes,) int64."""
        total = np.zeros(len(boxes), dtype=np.int64)
        found: dict[int, Boxed] = self._crew.ask(InBoxes(self._numbers, boxes, is_counted=True))
        for each in found.values():
            total += each.counts
        return total

    def stream_boxes(
        self,
        boxes: Sequence[LeafBox],
        teacher: Teacher,
        *,
        strategy: BoxStrategy | None = None,
        cancel: threading.Event | None = None,
    ) -> tuple[QueryPlan, Iterator[ScoredPart]]:
        """Plan boxes, and return the plan and their rows with logits, shard by shard as they come.

        The workers are asked at once, not when the parts are consumed.
        """
        plan = plan_boxes(boxes, self.stats, strategy=strategy)
        request = InBoxes(self._numbers, tuple(boxes), plan.strategy, teacher)
        answers = self._crew.stream(request, cancel=cancel)

        def parts() -> Iterator[ScoredPart]:
            for answer in answers:
                for number in sorted(answer):
                    local_rows, box_ids, counts, logits = answer[number]
                    first_row = self.catalog.shards[number].first_row
                    part = BoxPart(first_row, local_rows, box_ids, counts)
                    yield ScoredPart(part, part.rows, logits)

        return plan, parts()

    def _proposed(self, asked: Sequence[Ask]) -> list[Proposed]:
        return _in_order(asked, self._crew.ask(Propose.of(asked)))

    def _fetched_embeddings(self, rows: Rows) -> NDArray[np.float16]:
        places = self._places(rows)
        looked = self._crew.ask(Look(embedded=self._local(rows, places)))
        out = np.empty((len(rows), self.catalog.dim), dtype=np.float16)
        for number, at in places.items():
            out[at] = looked[number].embeddings
        return out

    def _fetched_codes(self, rows: Rows) -> NDArray[np.uint8]:
        places = self._places(rows)
        looked = self._crew.ask(Look(coded=self._local(rows, places)))
        return self._joined_codes(rows, places, looked)

    def _joined_codes(
        self, rows: Rows, places: Mapping[int, Rows], looked: Mapping[int, Looked]
    ) -> NDArray[np.uint8]:
        out = np.empty((len(rows), self.model.n_columns), dtype=np.uint8)
        for number, at in places.items():
            codes = looked[number].codes
            assert codes is not None  # noqa: S101 - they were asked for
            out[at] = codes.T
        return out

    def _scored(self, teacher: Teacher, rows: Rows, *, with_codes: bool) -> NDArray[np.float32]:
        """Score rows: on the client where their embeddings are known, else where they are.

        With `with_codes` the codes that are not known come with the scores, and are kept.
        """
        distinct = np.unique(rows)
        unknown = self._embeddings.missing(distinct)
        uncoded = self._codes.missing(distinct) if with_codes else distinct[:0]
        at_scored, at_coded = self._places(unknown), self._places(uncoded)
        looked: dict[int, Looked] = {}
        if at_scored or at_coded:
            looked = self._crew.ask(
                Look(
                    scored=self._local(unknown, at_scored),
                    coded=self._local(uncoded, at_coded),
                    teacher=teacher,
                )
            )
        if len(uncoded):
            self._codes.get(uncoded, lambda new: self._joined_codes(new, at_coded, looked))
        logits = np.empty(len(distinct), dtype=np.float32)
        for number, at in at_scored.items():
            logits[np.searchsorted(distinct, unknown[at])] = looked[number].logits
        here = np.isin(distinct, unknown, assume_unique=True, invert=True)
        logits[here] = teacher.logits(self.embeddings(distinct[here]))
        return logits[np.searchsorted(distinct, rows)]

    def _places(self, rows: Rows) -> dict[int, Rows]:
        """Return the positions in `rows` of the rows of each shard that has any."""
        return dict(by_shard(rows, self._first_rows))

    def _local(self, rows: Rows, places: Mapping[int, Rows]) -> dict[int, LocalRows]:
        first_rows = self._first_rows
        return {n: (rows[at] - first_rows[n]).astype(np.uint32) for n, at in places.items()}


def _in_order(asked: Sequence[Ask], answers: Mapping[int, Proposals]) -> list[Proposed]:
    """Return the proposals in the order asked; those of each shard came in that order."""
    parts: dict[int, Iterator[Proposed]] = {
        number: iter(proposals.split()) for number, proposals in answers.items()
    }
    return [next(parts[ask.number]) for ask in asked]
