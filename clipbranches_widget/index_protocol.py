"""What rounds, suggestions and audits ask of the opened indexes of a catalog (layer 4).

Two things answer: `catalog_index.CatalogIndex`, on this machine, and `cluster.ClusterIndex`, which
has the shards asked where they are. They give the same answers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import threading

    from clipbranches_widget.boxes import LeafBox
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.column_model import ColumnModel
    from clipbranches_widget.labels import LabelSet
    from clipbranches_widget.query_answer import BoxPart
    from clipbranches_widget.query_plan import BoxStrategy, QueryPlan
    from clipbranches_widget.shard_search import Nearest
    from clipbranches_widget.teacher import Teacher
    from clipbranches_widget.trees import TreeEnsemble

Rows = NDArray[np.int64]


class ScoredPart(NamedTuple):
    """Rows of some boxes with the teacher's logits, (m,) float32, in the order of `part.rows`."""

    part: BoxPart
    rows: Rows
    logits: NDArray[np.float32]


class Index(Protocol):
    """The opened indexes of one catalog. Thread-safe.

    Wherever rows are asked for, each may be named more than once, and answers are in their order.
    """

    @property
    def catalog(self) -> Catalog:
        """The catalog."""

    @property
    def model(self) -> ColumnModel:
        """The column model."""

    def start_loading(self) -> None:
        """Get ready in the background; returns at once."""

    def present(self, labels: LabelSet) -> tuple[LabelSet, int]:
        """Return the labels of rows that are not removed, and how many others there were."""

    def search(
        self, query: NDArray[np.float64], k: int, *, only: NDArray[np.bool_] | None = None
    ) -> Nearest:
        """Return the rows nearest to a query of `unit_query`; see `shard_search.nearest`."""

    def nearest(self, vector: NDArray[np.floating], k: int) -> tuple[Rows, NDArray[np.float32]]:
        """Return the k rows nearest to a vector and their similarities, best first."""

    def nearest_of_each(self, wanted: Sequence[tuple[NDArray[np.floating], int]]) -> list[Rows]:
        """Return the k rows nearest to each of several (vector, k)."""

    def nearest_scored(self, teacher: Teacher, k: int) -> tuple[Rows, NDArray[np.float32]]:
        """Return the k rows nearest to a teacher's direction and their logits, best row first."""

    def embeddings(self, rows: Rows) -> NDArray[np.float32]:
        """Return the embeddings of `rows`: (m, dim) float32, a copy."""

    def codes(self, rows: Rows) -> NDArray[np.uint8]:
        """Return the codes of `rows`: (D, m) uint8, a copy."""

    def logits(self, teacher: Teacher, rows: Rows) -> NDArray[np.float32]:
        """Return a teacher's logits of `rows`: (m,) float32."""

    def sampled(
        self, teacher: Teacher, rows: Rows
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Return both `logits` and `codes` of `rows`."""

    def margins(self, forest: TreeEnsemble, rows: Rows) -> NDArray[np.float32]:
        """Return the margins of `rows`: (m,) float32."""

    def counts(self, boxes: Sequence[LeafBox]) -> NDArray[np.int64]:
        """Return how many rows each of `boxes` holds: (n_boxes,) int64."""

    def stream_boxes(
        self,
        boxes: Sequence[LeafBox],
        teacher: Teacher,
        *,
        strategy: BoxStrategy | None = None,
        cancel: threading.Event | None = None,
    ) -> tuple[QueryPlan, Iterator[ScoredPart]]:
        """Plan boxes, and return the plan and their rows with logits, some at a time.

        `join_parts` puts the parts together. Parameters and errors are those of
        `ColumnIndex.stream_boxes`.
        """
