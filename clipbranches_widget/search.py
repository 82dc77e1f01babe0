"""From a query to ranked rows over all shards (layer 4)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.catalog_index import open_vector_index
from clipbranches_widget.counts import whole_count
from clipbranches_widget.errors import QueryError
from clipbranches_widget.images import read_image
from clipbranches_widget.result import Result
from clipbranches_widget.vector_index import n_candidates, ranked, unit_query

if TYPE_CHECKING:
    from PIL import Image

    from clipbranches_widget.encoder import Encoder


def search(
    catalog: Catalog,
    vector: ArrayLike,
    k: int,
    *,
    exclude: ArrayLike | None = None,
    query_text: str = "",
) -> Result:
    """Return the `k` rows of a catalog most similar to a vector.

    Parameters
    ----------
    catalog
        Where to look; all of its shards.
    vector : (dim,) real
        Of any length but zero.
    k
        How many, at least 1; more than there are gives all of them.
    exclude : (m,) int, optional
        Row ids that shall not be in the answer; k others are found.
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
        A bad vector, k < 1, or unknown rows in `exclude`.
    """
    started = time.perf_counter()
    k = whole_count(k, "k")
    query = unit_query(vector, catalog.dim)
    excluded = np.unique(catalog.check_rows([] if exclude is None else exclude))
    n_wanted = k + len(excluded)
    rows, similarities, n_touched, n_approximate = [], [], 0, 0
    for shard in catalog.shards:
        index = open_vector_index(catalog, shard)
        local_rows, found = index.search(query, n_wanted)
        rows.append(local_rows + shard.first_row)
        similarities.append(found)
        exact = index.is_exact(n_wanted)
        n_touched += shard.n_rows if exact else n_candidates(n_wanted, shard.n_rows)
        n_approximate += not exact
    all_rows, all_similarities = np.concatenate(rows), np.concatenate(similarities)
    if len(excluded):
        kept = np.isin(all_rows, excluded, invert=True)
        all_rows, all_similarities = all_rows[kept], all_similarities[kept]
    best_rows, best = ranked(all_rows, all_similarities, k)
    return Result.from_search(
        catalog,
        best_rows,
        best,
        n_touched=n_touched,
        seconds=time.perf_counter() - started,
        query_text=query_text,
        notes=_notes(n_approximate),
    )


def query_vector(
    catalog: Catalog,
    encoder: Encoder | None,
    *,
    text: str | None = None,
    image: str | Path | bytes | Image.Image | None = None,
    vector: ArrayLike | None = None,
    row: int | None = None,
) -> tuple[NDArray[np.float32], str]:
    """Turn one query into a vector, and say what it is.

    Parameters
    ----------
    catalog
        The catalog to be searched.
    encoder
        The catalog's encoder; needed for `text` and `image` only.
    text
        Encoded as given, without a prompt around it.
    image
        A file, its bytes or a PIL image.
    vector : (dim,) real
        A vector of the catalog's embedding space, of any length but zero.
    row
        A row of the catalog: more like this.

    Returns
    -------
    vector : (dim,) float32
        Norm 1.
    description : str
        For people; the text itself for a text query.

    Raises
    ------
    QueryError
        Not exactly one query, an empty text, a bad vector or row, or no encoder for it.
    EncoderError
        The encoder is not the catalog's.
    ImageReadError
        The query image cannot be read.
    """
    given = {"text": text, "image": image, "vector": vector, "row": row}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        got = " and ".join(names) or "none"
        raise QueryError(f"expected exactly one of text, image, vector and row, got {got}")
    if row is not None:
        checked = catalog.check_rows(row)
        if len(checked) != 1:
            raise QueryError(f"expected one row id, got {len(checked)}")
        caption = catalog.caption(int(checked[0]))
        said = f"more like row {checked[0]}" + (f": {caption}" if caption else "")
        return _unit(catalog.embeddings_of(checked)[0], catalog.dim), said
    if text is not None:
        if not isinstance(text, str) or not text.strip():
            raise QueryError(f"expected some words to search for, got {text!r}")
        usable = _usable(catalog, encoder, "text")
        return _unit(usable.encode_text([text])[0], catalog.dim), text
    if image is not None:
        usable = _usable(catalog, encoder, "image")
        name = f"image {Path(image).name}" if isinstance(image, str | Path) else "an image"
        return _unit(usable.encode_images([read_image(image)])[0], catalog.dim), name
    assert vector is not None  # noqa: S101 - exactly one is given
    return _unit(vector, catalog.dim), "a vector"


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


def _notes(n_approximate: int) -> tuple[str, ...]:
    if not n_approximate:
        return ()
    note = (
        "The rows were proposed by an approximate vector index (HNSW), which can miss a few of "
        "the nearest; their similarities are exact."
    )
    return (note,)
