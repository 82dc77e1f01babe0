"""Near-duplicates of a catalog (layer 3): found by the vector index, grouped by exact similarity.

Few rows are compared with each other, all pairs; of many, those that the vector index proposes,
see `proposed_pairs`. The rule of grouping is that of `leader_groups`.

Images of equal content hash count as one: all take part as the first of them does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.errors import QueryError
from clipbranches_widget.leader_groups import Grouping, leader_groups
from clipbranches_widget.proposed_pairs import COMPARING, proposed_pairs
from clipbranches_widget.row_export import RowExport, items_with
from clipbranches_widget.stage_bars import StageBars, StageProgress
from clipbranches_widget.vector_index import EXACT_BELOW

if TYPE_CHECKING:
    import pyarrow as pa

    from clipbranches_widget.labels import LabelSet

Rows = NDArray[np.int64]

DEFAULT_SIMILARITY = 0.96
"""See docs/near-duplicates.md for what it gives."""

_READ_ROWS = 4096


class Compared(NamedTuple):
    """Which of some rows stands for each of them.

    Attributes
    ----------
    leaders : (n,) int64
        Place among the rows of the one that stands for each; its own for itself.
    similarities : (n,) float32
        To that row.
    is_exact : bool
        Whether all pairs were compared, so that none can be missed.
    """

    leaders: Rows
    similarities: NDArray[np.float32]
    is_exact: bool


@dataclass(frozen=True, slots=True, eq=False)
class NearDuplicates(RowExport):
    """Groups of images that are nearly the same; see `near_duplicates`.

    The length is the number of groups. Images that are like no other are in none. `to_pandas`,
    `to_csv`, `to_parquet`, `copy_images` and the other exports are those of `Result`.

    Attributes
    ----------
    catalog : Catalog
        Where the rows are.
    similarity : float
        Lowest similarity of a row to the one that stands for it.
    rows : (m,) int64
        Rows of all groups, group by group in the order of their representatives, each of which
        comes first in its group.
    representatives : (m,) int64
        The row that stands for each.
    similarities : (m,) float32
        Exact cosine similarity to it; 1 for itself and for images of equal content.
    n_compared : int
        Rows that were looked at.
    is_exact : bool
        Whether all pairs were compared. If not, the vector index proposed them and can have
        missed some.
    labels : None
        It has none; see `Result.to_imagefolder`.
    """

    catalog: Catalog = field(repr=False)
    similarity: float
    rows: Rows
    representatives: Rows
    similarities: NDArray[np.float32]
    n_compared: int
    is_exact: bool
    labels: LabelSet | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Return the number of groups."""
        return int(np.count_nonzero(self.rows == self.representatives))

    @property
    def duplicates(self) -> Rows:
        """Rows for which another one stands: what to leave out to keep one of each, (k,) int64."""
        rows: Rows = self.rows[self.rows != self.representatives]
        return rows

    def to_arrow(self) -> pa.Table:
        """Return one line a row of a group, in the order of `rows`, as an Arrow table.

        Columns: row, representative (int64), similarity (float32), path, caption, width, height,
        content_hash and the user's columns; one called as one of the first three gets ``source_``
        before its name.
        """
        import pyarrow as pa

        first = {
            "row": pa.array(self.rows),
            "representative": pa.array(self.representatives),
            "similarity": pa.array(self.similarities),
        }
        return items_with(self.catalog, self.rows, first)

    def __repr__(self) -> str:
        """Return one line: how many, and how alike."""
        how = "all pairs compared" if self.is_exact else "proposed by the vector index"
        return (
            f"<NearDuplicates: {len(self.rows):,} of {self.n_compared:,} images in {len(self):,} "
            f"groups, similarity {self.similarity:g} or more, {how}>"
        )


def near_duplicates(
    catalog: Catalog,
    *,
    similarity: float = DEFAULT_SIMILARITY,
    rows: ArrayLike | None = None,
    exact: bool | None = None,
    progress: bool = False,
) -> NearDuplicates:
    """Find images that are nearly the same, and group them.

    Each group has a representative, its first row, and every other row of it is within the
    similarity of that one; no two representatives are. A row that several could stand for belongs
    to the one it is most like, the earlier of two that are equal.

    Parameters
    ----------
    catalog : Catalog
        Removed rows are left out.
    similarity : float
        Lowest cosine similarity of a row to its representative, above 0 and up to 1; compared as
        float32. The default suits copies, other sizes and other crops of one picture; what it
        gives depends on the model, so look at some groups first.
    rows : (n,) int, optional
        Only these, compared with each other, in this order: the first of a group represents it.
        By default all rows, by row id.
    exact : bool, optional
        True compares all pairs, at some 5 s for 20,000 rows of 512 dimensions and four times that
        for twice as many; False asks the vector index. By default pairs below 25,000 rows.
    progress : bool
        Show progress bars.

    Returns
    -------
    NearDuplicates
        The same on every run, and where all pairs are compared, however the rows are split into
        shards.

    Raises
    ------
    QueryError
        Unknown rows, or a similarity outside of (0, 1].

    Examples
    --------
    >>> import clipbranches_widget as cb
    >>> catalog = cb.open("photos.cbcat")                        # doctest: +SKIP
    >>> found = cb.near_duplicates(catalog)                      # doctest: +SKIP
    >>> found.to_pandas()                                        # doctest: +SKIP
    >>> catalog = cb.remove(catalog, found.duplicates)           # doctest: +SKIP
    """
    if rows is None:
        chosen = catalog.present_rows()
    else:
        checked = catalog.without_removed(catalog.check_rows(rows))
        chosen = checked[np.sort(np.unique(checked, return_index=True)[1])]
    with StageBars(show=progress) as advance:
        found = compare(catalog, chosen, similarity, exact=exact, progress=advance)
    sizes = np.bincount(found.leaders, minlength=len(chosen))
    grouped = np.flatnonzero(sizes[found.leaders] > 1)
    # By leader, and a leader first: it comes before all others of its group anyhow.
    grouped = grouped[np.argsort(found.leaders[grouped], kind="stable")]
    return NearDuplicates(
        catalog,
        float(similarity),
        chosen[grouped],
        chosen[found.leaders[grouped]],
        found.similarities[grouped],
        len(chosen),
        found.is_exact,
    )


def compare(
    catalog: Catalog,
    rows: Rows,
    similarity: float,
    *,
    exact: bool | None = None,
    progress: StageProgress | None = None,
) -> Compared:
    """Group distinct rows that are not removed, in their order: see `near_duplicates`.

    Raises
    ------
    QueryError
        A similarity outside of (0, 1].
    """
    if not 0.0 < similarity <= 1.0:
        raise QueryError(
            f"expected a similarity above 0 and up to 1, such as {DEFAULT_SIMILARITY}, got "
            f"{similarity}"
        )
    first = _first_of_content(catalog, rows)
    places = np.flatnonzero(first == np.arange(len(rows)))
    is_exact = len(places) < EXACT_BELOW if exact is None else exact
    if not is_exact:  # the graph is at its worst with many rows in one place
        same = _first_of_embedding(catalog, rows[places])
        first = places[same][np.searchsorted(places, first)]
        places = places[same == np.arange(len(places))]
    group = _all_pairs if is_exact else proposed_pairs
    found = group(catalog, rows[places], similarity, progress or _silent)
    at = np.searchsorted(places, first)
    return Compared(places[found.leaders][at], found.similarities[at], is_exact)


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Show nothing."""


def _first_of_content(catalog: Catalog, rows: Rows) -> Rows:
    """Return for each row the place of the first one of the same content hash, (n,) int64."""
    import pyarrow.compute as pc

    own = np.arange(len(rows), dtype=np.int64)
    if not len(rows):
        return own
    hashes = catalog.lines(rows, ["content_hash"]).column("content_hash").combine_chunks()
    named = pc.if_else(pc.equal(hashes, ""), None, hashes)
    codes = pc.fill_null(pc.dictionary_encode(named).indices, -1).to_numpy(zero_copy_only=False)
    return np.where(codes < 0, own, _first_of(codes))


def _first_of_embedding(catalog: Catalog, rows: Rows) -> Rows:
    """Return for each row the place of the first one of the same embedding, (n,) int64."""
    weights = np.random.default_rng(0).integers(0, 2**64, catalog.dim, dtype=np.uint64)
    keys = np.empty(len(rows), dtype=np.uint64)
    for start in range(0, len(rows), _READ_ROWS):
        bits = catalog.embeddings_of(rows[start : start + _READ_ROWS]).view(np.uint16)
        keys[start : start + _READ_ROWS] = (bits * weights).sum(axis=1)
    first = _first_of(keys)
    others = np.flatnonzero(first != np.arange(len(rows)))
    for start in range(0, len(others), _READ_ROWS):
        some = others[start : start + _READ_ROWS]
        one, two = (catalog.embeddings_of(rows[each]) for each in (some, first[some]))
        other = some[(one != two).any(axis=1)]  # two embeddings of one key
        first[other] = other
    return first


def _first_of(keys: NDArray[Any]) -> Rows:
    _, starts, of = np.unique(keys, return_index=True, return_inverse=True)
    first: Rows = starts[of]
    return first


def _all_pairs(
    catalog: Catalog, rows: Rows, similarity: float, progress: StageProgress
) -> Grouping:
    def advance(done: int) -> None:
        progress(COMPARING, done, len(rows))

    return leader_groups(catalog.embeddings_of(rows), similarity, progress=advance)
