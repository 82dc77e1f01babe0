"""Column models of every kind for `columns.py`, and a catalog's index on them, in memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from quality_data import Collection, text_tower

from clipbranches_widget.box_query import ColumnIndex
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.column_build import optional_arrays
from clipbranches_widget.column_model import (
    SAMPLE_ROWS,
    ColumnModel,
    default_column_model,
    equi_depth_edges,
    vocabulary,
)
from clipbranches_widget.sorted_columns import SortedColumns

Kind = Literal["anchors", "centroids", "pca", "mixture"]
KINDS: tuple[Kind, ...] = ("anchors", "centroids", "pca", "mixture")
SEED = 0


@dataclass(frozen=True)
class Embedded:
    """The text tower of a collection for its vocabulary only, embedded before any clock runs."""

    vectors: NDArray[np.float32]

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the vocabulary's vectors."""
        if tuple(texts) != vocabulary():
            raise ValueError(f"expected the vocabulary, got {len(texts)} other texts")
        return self.vectors


@lru_cache(maxsize=2)
def _embedded(name: str, folder: Path | None) -> Embedded:
    return Embedded(text_tower(name, folder).encode_text(vocabulary()))


class GivenColumns(CatalogIndex):
    """A catalog's indexes with other columns than it stores: codes in memory, no bit vectors.

    Which rows a box holds does not depend on the parts that are stored.

    Parameters
    ----------
    catalog : Catalog
    model : ColumnModel
    codes : (D, n) uint8
        Of all rows.
    """

    def __init__(self, catalog: Catalog, model: ColumnModel, codes: NDArray[np.uint8]) -> None:
        super().__init__(catalog)
        self.model = model
        self.columns = ColumnIndex([SortedColumns.from_codes(codes, columns="codes")])


@dataclass(frozen=True)
class Built:
    """Columns of a kind, and how many were asked for."""

    data: str
    kind: Kind
    asked: int
    index: GivenColumns
    fit_s: float
    code_s: float

    def facts(self) -> dict[str, Any]:
        """Return what is known without any round."""
        n_columns, n_rows = self.index.model.n_columns, len(self.index.catalog)
        arrays = optional_arrays("full", n_columns=n_columns, n_rows=n_rows).values()
        n_bytes = n_columns * n_rows  # the codes
        n_bytes += sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in arrays)
        return {
            "data": self.data,
            "kind": self.kind,
            "asked": self.asked,
            "n_columns": n_columns,
            "fit_s": self.fit_s,
            "code_s": self.code_s,
            "bytes_per_row": n_bytes / n_rows,
        }


def build(collection: Collection, kind: Kind, n_columns: int, folder: Path | None) -> Built:
    """Make columns of a kind from a sample of the rows, and code all rows with them."""
    tower = _embedded(collection.name, folder)
    start = time.perf_counter()
    model = _model(collection.embeddings, kind, n_columns, tower)
    fitted = time.perf_counter()
    codes = model.codes(collection.embeddings)
    SortedColumns.from_codes(codes)
    coded = time.perf_counter()
    index = GivenColumns(collection.index.catalog, model, codes)
    return Built(collection.name, kind, n_columns, index, fitted - start, coded - fitted)


def _model(
    embeddings: NDArray[np.float32], kind: Kind, n_columns: int, tower: Embedded
) -> ColumnModel:
    if kind == "pca":
        return _pca(embeddings, n_columns)
    if kind == "mixture":
        return default_column_model(embeddings, encoder=tower, n_columns=n_columns, seed=SEED)
    return default_column_model(
        embeddings,
        encoder=tower if kind == "anchors" else None,
        n_columns=n_columns,
        n_concepts=n_columns,
        seed=SEED,
    )


def _pca(embeddings: NDArray[np.float32], n_columns: int) -> ColumnModel:
    """Return the first principal components of a sample as columns."""
    n_rows = len(embeddings)
    rng = np.random.default_rng(SEED)
    picked = np.sort(rng.choice(n_rows, size=min(n_rows, SAMPLE_ROWS), replace=False))
    sample = embeddings[picked]
    centred = sample - sample.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    anchors = np.ascontiguousarray(vectors[:, ::-1][:, :n_columns].T, dtype=np.float32)
    names = tuple(f"component {number}" for number in range(len(anchors)))
    return ColumnModel("centroids", names, anchors, equi_depth_edges(sample @ anchors.T))
