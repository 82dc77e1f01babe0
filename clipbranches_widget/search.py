"""From a query to ranked rows over all shards (layer 4)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.counts import whole_count
from clipbranches_widget.errors import QueryError
from clipbranches_widget.images import read_image
from clipbranches_widget.open_index import nearest_of
from clipbranches_widget.query_text import phrases_of, weighted_sum
from clipbranches_widget.result import Result
from clipbranches_widget.vector_index import ranked, unit_query

if TYPE_CHECKING:
    from PIL import Image

    from clipbranches_widget.encoder import Encoder

N_NAMED_ROWS = 5

_APPROXIMATE = (
    "The rows were proposed by an approximate vector index (HNSW), which can miss a few of "
    "the nearest; their similarities are exact."
)


def search(
    catalog: Catalog,
    vector: ArrayLike,
    k: int,
    *,
    exclude: ArrayLike | None = None,
    only: NDArray[np.bool_] | None = None,
    query_text: str = "",
) -> Result:
    """Return the `k` rows of a catalog most similar to a vector.

    Parameters
    ----------
    catalog
        Where to look; all of its shards, removed rows aside.
    vector : (dim,) real
        Of any length but zero.
    k
        How many, at least 1; more than there are gives all of them.
    exclude : (m,) int, optional
        Row ids that shall not be in the answer; k others are found.
    only : (n,) bool, optional
        Which rows of the catalog may be in the answer: the k nearest of these. They are scanned
        where they are few; else the vector index is asked for as many more, again if need be.
    query_text
        What was asked, for people; goes into the result.

    Returns
    -------
    Result
        Kind "search", scores = exact cosine similarities, descending, ties by row id. The same
        however the rows are split into shards, as long as the shards are scanned; a note says
        when rows came from the approximate vector index.

    Raises
    ------
    QueryError
        A bad vector, k < 1, unknown rows in `exclude`, or `only` of another length.
    """
    started = time.perf_counter()
    k = whole_count(k, "k")
    query = unit_query(vector, catalog.dim)
    excluded = np.unique(catalog.check_rows([] if exclude is None else exclude))
    n_wanted = k + len(excluded)
    if only is not None and only.shape != (len(catalog),):
        raise QueryError(f"expected a mask of {len(catalog)} rows, got {only.shape}")
    found = nearest_of(catalog, query, n_wanted, only=only)
    all_rows, all_similarities = found.rows, found.similarities
    if len(excluded):
        kept = np.isin(all_rows, excluded, invert=True)
        all_rows, all_similarities = all_rows[kept], all_similarities[kept]
    best_rows, best = ranked(all_rows, all_similarities, k)
    return Result.from_search(
        catalog,
        best_rows,
        best,
        n_touched=found.n_scored,
        seconds=time.perf_counter() - started,
        query_text=query_text,
        notes=() if found.is_exact else (_APPROXIMATE,),
    )


def query_vector(
    catalog: Catalog,
    encoder: Encoder | None,
    *,
    text: str | None = None,
    image: str | Path | bytes | Image.Image | None = None,
    vector: ArrayLike | None = None,
    row: int | Iterable[int] | NDArray[np.integer] | None = None,
) -> tuple[NDArray[np.float32], str]:
    """Turn one query into a vector, and say what it is.

    Parameters
    ----------
    catalog
        The catalog to be searched.
    encoder
        The catalog's encoder; needed for `text` and `image` only.
    text
        A phrase, encoded as given, without a prompt around it; or several with weights and a
        minus, see `query_text`: the sum of their unit vectors.
    image
        A file, its bytes or a PIL image; one that was opened from a file is named after it.
    vector : (dim,) real
        A vector of the catalog's embedding space, of any length but zero.
    row
        A row of the catalog: more like this; or several: the mean of their unit vectors.
        Together with `text`, both count the same: the sum of the two unit vectors.

    Returns
    -------
    vector : (dim,) float32
        Norm 1.
    description : str
        For people; the text itself for a text query.

    Raises
    ------
    QueryError
        Not exactly one query, an empty text, a bad vector or row, no encoder for it, or phrases
        or rows that cancel each other out.
    EncoderError
        The encoder is not the catalog's.
    ImageReadError
        The query image cannot be read.
    """
    given = {"text": text, "image": image, "vector": vector, "row": row}
    names = [name for name, value in given.items() if value is not None]
    if names == ["text", "row"]:
        assert text is not None and row is not None  # noqa: S101, PT018 - both are given
        of_text, said = _text_vector(catalog, encoder, text)
        of_rows, about = _rows_vector(catalog, row)
        both = weighted_sum(np.stack([of_text, of_rows]), [1, 1], what=f"{said}, {about}")
        return _unit(both, catalog.dim), f"{said}, {about}"
    if len(names) != 1:
        got = " and ".join(names) or "none"
        raise QueryError(
            f"expected exactly one of text, image, vector and row, got {got}; "
            "only text and row go together"
        )
    if row is not None:
        return _rows_vector(catalog, row)
    if text is not None:
        return _text_vector(catalog, encoder, text)
    if image is not None:
        usable = _usable(catalog, encoder, "image")
        file = image if isinstance(image, str | Path) else getattr(image, "filename", "")
        name = f"image {Path(file).name}" if file else "an image"
        return _unit(usable.encode_images([read_image(image)])[0], catalog.dim), name
    assert vector is not None  # noqa: S101 - exactly one is given
    return _unit(vector, catalog.dim), "a vector"


def _text_vector(
    catalog: Catalog, encoder: Encoder | None, text: str
) -> tuple[NDArray[np.float32], str]:
    phrases = phrases_of(text)
    usable = _usable(catalog, encoder, "text")
    vectors = usable.encode_text([phrase.text for phrase in phrases])
    if len(phrases) == 1:
        return _unit(vectors[0], catalog.dim), text
    total = weighted_sum(vectors, [phrase.weight for phrase in phrases], what=text)
    return _unit(total, catalog.dim), text


def _rows_vector(
    catalog: Catalog, row: int | Iterable[int] | NDArray[np.integer]
) -> tuple[NDArray[np.float32], str]:
    listed = row if isinstance(row, np.ndarray | int | np.integer) else list(row)
    checked = np.unique(catalog.check_rows(listed))
    if not len(checked):
        raise QueryError("expected one row id or several, got none")
    if len(checked) == 1:
        caption = catalog.caption(int(checked[0]))
        said = f"more like row {checked[0]}" + (f": {caption}" if caption else "")
        return _unit(catalog.embeddings_of(checked)[0], catalog.dim), said
    n_more = len(checked) - N_NAMED_ROWS
    named = ", ".join(map(str, checked[:N_NAMED_ROWS])) + (f" and {n_more} more" * (n_more > 0))
    said = f"more like rows {named}"
    vectors = catalog.embeddings_of(checked).astype(np.float32)
    return _unit(weighted_sum(vectors, [1] * len(checked), what=said), catalog.dim), said


def _usable(catalog: Catalog, encoder: Encoder | None, kind: str) -> Encoder:
    if encoder is None:
        raise QueryError(
            f"expected an encoder for a query by {kind}, but this catalog has none: search it by "
            "row= or vector=, or build it again with from_embeddings(..., encoder=...) and the "
            "encoder that made its embeddings"
        )
    catalog.check_encoder(encoder)
    if kind == "text" and not encoder.has_text:
        raise QueryError(
            f"expected an encoder with a text tower, but {encoder.info.model} has none: search by "
            "image=, row= or vector="
        )
    return encoder


def _unit(vector: ArrayLike, dim: int) -> NDArray[np.float32]:
    return unit_query(vector, dim).astype(np.float32)
