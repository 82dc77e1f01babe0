"""Which catalog a concept belongs to, and its images in another one (layer 3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.encoder import EncoderInfo
from clipbranches_widget.errors import ConceptError
from clipbranches_widget.integrity import identity
from clipbranches_widget.session_file import CatalogId


def catalog_id(catalog: Catalog) -> CatalogId:
    """Name a catalog by its content.

    Its name is that of its folder, not the path, so that a file can be passed on.
    """
    return CatalogId(identity(catalog.manifest), catalog.path.name, len(catalog))


def content_hashes(catalog: Catalog, rows: NDArray[np.int64]) -> dict[int, str]:
    """Return the content hashes of rows, by row, where the catalog has them."""
    texts = catalog.lines(rows, ["content_hash"]).column(0).to_pylist()
    return {row: text for row, text in zip(rows.tolist(), texts, strict=True) if text}


def rows_with(catalog: Catalog, hashes: set[str]) -> NDArray[np.int64]:
    """Return the rows whose content hash is among `hashes`: (m,) int64, ascending."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(sorted(hashes), pa.string())
    mask = pc.is_in(catalog.item_store.columns(["content_hash"]).column(0), value_set=wanted)
    return np.flatnonzero(mask.to_numpy())


def check_fits(
    catalog: Catalog,
    *,
    name: str,
    encoder: EncoderInfo,
    column_model_hash: str,
    n_columns: int,
    way_out: str,
) -> None:
    """Check that boxes and vectors made on one catalog mean the same on another.

    Raises
    ------
    ConceptError
        Another encoder or dimension, or other columns; the message names both and ends with
        `way_out`.
    TypeError
        `catalog` is none.
    """
    if not isinstance(catalog, Catalog):
        raise TypeError(
            f"expected a Catalog, got {type(catalog).__name__}: "
            "open one with clipbranches_widget.open(path)"
        )
    theirs = catalog.encoder_info
    if _model(encoder) != _model(theirs):
        raise ConceptError(
            f"expected a catalog made with the encoder of {name!r}, {_said(encoder)}, got "
            f"{catalog.path} with {_said(theirs)}: {way_out}"
        )
    ours, got = (
        (column_model_hash, n_columns),
        (catalog.column_model_hash, catalog.manifest.n_columns),
    )
    if ours != got:
        raise ConceptError(
            f"expected a catalog with the {ours[1]} columns of {name!r} (model {ours[0]}), got "
            f"{catalog.path} with {got[1]} (model {got[0]}): {way_out}"
        )


def _model(info: EncoderInfo) -> tuple[str, str, int, str]:
    """Return what two encoders share when their embeddings mean the same."""
    return info.kind, info.model, info.dim, info.weights_hash


def _said(info: EncoderInfo) -> str:
    return f"{info}, weights {info.weights_hash or 'unknown'}"
