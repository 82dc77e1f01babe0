"""Whether embeddings belong to the lines beside them: a spot check by the model (layer 9).

Some images, spread over all rows, are embedded again and compared with the stored embedding of
their row. What comes out below `SAME` is looked for among all embeddings: found at one constant
distance, the lines are shifted; found elsewhere, they are in another order; not found, the
embeddings are of another model or of other images.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.encoder import Encoder
from clipbranches_widget.errors import CatalogError, ImageReadError
from clipbranches_widget.images import load
from clipbranches_widget.source_embeddings import EmbeddingSource

SAME = 0.95
"""Cosine from which on two embeddings are of the same image: decoders and scalers differ a bit."""

_CLEARLY = 0.02
_TRIES = 3
_FEWEST = 8
_BLOCK_ROWS = 8192
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OrderCheck:
    """What a spot check saw.

    Attributes
    ----------
    rows : (m,) int64
        The rows whose images were embedded again, ascending.
    similarities : (m,) float32
        Cosine of each row's stored embedding with its image.
    """

    rows: NDArray[np.int64]
    similarities: NDArray[np.float32]


def check_order(source: EmbeddingSource, encoder: Encoder, n_images: int) -> OrderCheck:
    """Embed some images again and compare with what is stored.

    Parameters
    ----------
    source
        Embeddings with a ``uri`` a line.
    encoder
        The model that is said to have made them.
    n_images
        How many images, one from each of so many equal stretches of the rows; up to `_TRIES`
        others are tried for one that cannot be read.

    Raises
    ------
    CatalogError
        The embeddings are of another order or another model, or too few images can be read.
    """
    n_images = min(n_images, source.n_rows)
    candidates = _spread(source.n_rows, n_images)
    stored, uris = _gather(source, candidates)
    rows, images, failed = [], [], []
    for stretch in candidates.reshape(n_images, -1).tolist():
        for row in dict.fromkeys(stretch):
            try:
                images.append(load(uris[row], target_size=encoder.image_size).image)
            except ImageReadError as error:
                failed.append(f"row {row}: {error}")
            else:
                rows.append(row)
                break
    if len(rows) < min(n_images, _FEWEST):
        raise CatalogError(
            f"expected to read {n_images} images for the check of order, got {len(rows)}; "
            f"{'; '.join(failed[:2])}: build without check_order, or where the images can be read"
        )
    fresh = encoder.encode_images(images)
    own = np.array([stored[row] for row in rows], np.float32)
    similarities = np.einsum("ij,ij->i", fresh, own)
    found = OrderCheck(np.array(rows, np.int64), similarities)
    _judge(source, found, fresh, encoder)
    _log.info(
        "checked %d of %d rows: median cosine %.3f",
        len(rows),
        source.n_rows,
        float(np.median(similarities)),
    )
    return found


def _spread(n_rows: int, n_images: int) -> NDArray[np.int64]:
    """Return `_TRIES` random rows of each of `n_images` equal stretches, (n_images, _TRIES)."""
    rng = np.random.default_rng(0)
    edges = np.linspace(0, n_rows, n_images + 1).astype(np.int64)
    chosen: NDArray[np.int64] = rng.integers(edges[:-1, None], edges[1:, None], (n_images, _TRIES))
    return chosen


def _gather(
    source: EmbeddingSource, rows: NDArray[np.int64]
) -> tuple[dict[int, NDArray[np.float32]], dict[int, str]]:
    """Return the stored unit vector and the uri of each row."""
    wanted = np.unique(rows)
    vectors: dict[int, NDArray[np.float32]] = {}
    uris: dict[int, str] = {}
    first = 0
    for array, table in source.parts():
        inside = wanted[(wanted >= first) & (wanted < first + len(array))]
        local = inside - first
        places = table.column("uri").take(local).to_pylist() if "uri" in table.column_names else []
        for row, vector, uri in zip(
            inside.tolist(), _unit(array[local]), places or [""] * len(local), strict=True
        ):
            vectors[row], uris[row] = vector, uri or ""
        first += len(array)
    return vectors, uris


def _judge(
    source: EmbeddingSource, found: OrderCheck, fresh: NDArray[np.float32], encoder: Encoder
) -> None:
    """Raise CatalogError where the rows that differ say that something is wrong with all."""
    differ = found.similarities < SAME
    if not differ.any():
        return
    rows, own = found.rows[differ], found.similarities[differ]
    blocks = (array for array, _ in source.parts())
    best_rows, best = nearest(fresh[differ], blocks)
    moved = (best >= SAME) & (best > own + _CLEARLY)
    median = float(np.median(found.similarities))
    if median >= SAME and not moved.any():
        _log.warning(
            "%d of %d images differ from their embeddings, such as that of row %d (cosine %.2f): "
            "they were changed since",
            len(rows),
            len(found.rows),
            rows[0],
            own[0],
        )
        return
    shown = ", ".join(str(row) for row in rows[:5].tolist())
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    raise CatalogError(
        f"expected the embeddings of {len(found.rows)} rows to be those of their images (cosine at "
        f"least {SAME}), got a median of {median:.2f}, and others in rows {shown}{more}: "
        + _cause(rows, best_rows, moved, encoder)
    )


def nearest(
    vectors: NDArray[np.float32], blocks: Iterable[NDArray[Any]]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the row of the most similar stored embedding for each vector, and its cosine.

    Parameters
    ----------
    vectors : (m, dim) float32
        Norm 1.
    blocks
        All stored embeddings, (any, dim) real each, in order; read once, a few thousand rows at a
        time. Of equal ones the first counts.
    """
    best = np.full(len(vectors), -np.inf, np.float32)
    rows = np.zeros(len(vectors), np.int64)
    first = 0
    for block in blocks:
        for start in range(0, len(block), _BLOCK_ROWS):
            cosines = vectors @ _unit(block[start : start + _BLOCK_ROWS]).T
            place = cosines.argmax(axis=1)
            value = cosines[np.arange(len(vectors)), place]
            better = value > best
            best[better], rows[better] = value[better], first + start + place[better]
        first += len(block)
    return rows, best


def _cause(
    rows: NDArray[np.int64],
    best_rows: NDArray[np.int64],
    moved: NDArray[np.bool_],
    encoder: Encoder,
) -> str:
    if 2 * int(moved.sum()) < len(rows):
        return (
            f"no embedding fits these images: they were made by another model than {encoder.info}, "
            "or the images were changed; name the model that made them"
        )
    shift, count = Counter((best_rows[moved] - rows[moved]).tolist()).most_common(1)[0]
    if 5 * count >= 4 * int(moved.sum()):
        return (
            f"their embeddings are {'further down' if shift > 0 else 'higher up'}: the items "
            f"(metadata) are shifted by {-shift:+d} rows against the embeddings, from row "
            f"{rows[moved][0]} or before on; put the lines back in step"
        )
    row, place = int(rows[moved][0]), int(best_rows[moved][0])
    return (
        f"their embeddings are elsewhere (that of row {row} is in row {place}): the two are in "
        "different orders; sort neither, and take the parts of both in the same order (10 after 2)"
    )


def _unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    array = np.asarray(rows, np.float32)
    lengths = np.linalg.norm(array, axis=1, keepdims=True)
    unit: NDArray[np.float32] = array / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit
