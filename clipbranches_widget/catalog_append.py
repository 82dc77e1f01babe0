"""Append images or embeddings to a finished catalog (layer 6).

New rows make a new shard, on the catalog's own columns; nothing that is there is read again but
the content hashes, nothing is rewritten, and row ids stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.catalog_change import changing, commit, folder_of, placed
from clipbranches_widget.catalog_writer import ROWS_PER_SHARD, CatalogWriter
from clipbranches_widget.column_model import ColumnModel
from clipbranches_widget.embed_source import embed_into
from clipbranches_widget.encoder import Encoder, load_encoder
from clipbranches_widget.errors import CatalogError, EncoderError
from clipbranches_widget.ingest import unit_blocks
from clipbranches_widget.integrity import ITEM_COLUMNS
from clipbranches_widget.known_content import KnownContent
from clipbranches_widget.order_check import check_order as compare_with_images
from clipbranches_widget.remote import scheme
from clipbranches_widget.source_arrays import embedding_source
from clipbranches_widget.source_table import Chunk, ImageSource
from clipbranches_widget.sources import Found, Source, find, image_source
from clipbranches_widget.stage_bars import StageBars, StageProgress

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import ArrayLike

    from clipbranches_widget.sorted_columns import ColumnParts

Skipped = list[tuple[str, str]]


@dataclass(frozen=True, slots=True, eq=False)
class Appended:
    """What an append did.

    Attributes
    ----------
    catalog : Catalog
        Opened anew, with the new rows. Catalogs and sessions that are open keep what they had.
    n_added : int
        Images that are new.
    first_row : int
        Their row ids are ``first_row <= row < first_row + n_added``.
    skipped : pyarrow.Table
        Images that were left out, in the order of the source: uri and reason (strings).
    """

    catalog: Catalog
    n_added: int
    first_row: int
    skipped: pa.Table = field(repr=False)

    def __str__(self) -> str:
        """Return one line: how many, and where."""
        left_out = f", {len(self.skipped):,} left out" if len(self.skipped) else ""
        images = "1 image" if self.n_added == 1 else f"{self.n_added:,} images"
        return f"{images} added from row {self.first_row:,} on{left_out}"


def append(
    catalog: Catalog | str | Path,
    source: Source,
    *,
    encoder: Encoder | None = None,
    batch_size: int = 64,
    device: str | None = None,
    progress: bool = True,
    image_column: str | None = None,
    caption_column: str | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
) -> Appended:
    """Embed images and add them to a catalog, but for those whose content it has already.

    Parameters
    ----------
    catalog
        An open catalog, or the folder of one.
    source
        Images, as for `index`. The table's own columns must be those of the catalog: a missing
        one is filled with nulls, one that the catalog lacks is refused.
    encoder
        The catalog's model, in place of loading it.
    batch_size, device, image_column, caption_column
        As for `index`.
    progress
        Show progress bars with rate and remaining time.
    rows_per_shard
        Rows a new shard holds at most.

    Returns
    -------
    Appended
        The catalog opened anew, how many rows were added, and what was left out and why: images
        that cannot be read, and files that are, byte for byte, in the catalog already (or were,
        and were removed), or came earlier in `source`. ``catalog.skipped`` keeps that list, where
        any row was added.

    Raises
    ------
    CatalogNotFoundError, CatalogCorruptError
        As of `Catalog.open`.
    CatalogError
        Other columns than the catalog's, no images in the source, a folder that cannot be
        written, or another writer that works on the catalog.
    EncoderError
        `encoder` is not the catalog's model, or it has none.
    WeightsUnavailableError
        The weights are neither here nor downloadable.

    Notes
    -----
    The new rows appear in one step at the end; a call that is killed or fails leaves the catalog
    as it was. Paths of a folder other than that of the first images are stored whole. The map
    has no place for new rows until `build_map`. Where images come in small numbers, `compact`
    now and then joins their shards.
    """
    folder = folder_of(catalog)
    found = find(source) if isinstance(source, str | Path) else source
    if isinstance(found, Found) and found.kind in ("clip-retrieval", "npy"):
        raise CatalogError(
            f"expected images, found embeddings in {source}: give them to "
            "append_embeddings(catalog, source)"
        )
    images = image_source(found, image_column=image_column, caption_column=caption_column)
    with changing(folder, "append") as (current, stage), StageBars(show=progress) as bars:
        used = _encoder(current, encoder, device)
        with _writer(current, stage, rows_per_shard) as writer:
            skipped = embed_into(
                _Fitting(images, current),
                used,
                writer,
                batch_size=batch_size,
                progress=bars,
                known=KnownContent(current),
            )
            _finish(current, stage, writer, skipped, bars)
    return _appended(folder, writer.n_rows, len(current), skipped)


def append_embeddings(
    catalog: Catalog | str | Path,
    embeddings: ArrayLike | str | Path,
    *,
    items: pd.DataFrame | pa.Table | str | Path | None = None,
    encoder: Encoder | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    check_order: int = 0,
    rows_per_shard: int = ROWS_PER_SHARD,
    progress: bool = False,
) -> Appended:
    """Add embeddings to a catalog: those of its own model.

    Parameters
    ----------
    catalog
        An open catalog, or the folder of one.
    embeddings, items, image_column, caption_column, check_order, rows_per_shard, progress
        As for `from_embeddings`. A line of `items` whose ``content_hash`` the catalog has already
        is left out with its embedding; lines without one are all added. Relative paths are
        taken to start where the catalog's own do.
    encoder
        The catalog's model; needed for `check_order` only.

    Returns
    -------
    Appended
        As of `append`.

    Raises
    ------
    CatalogError
        As of `append` and `from_embeddings`.
    EncoderError
        `encoder` is not the catalog's model.
    """
    folder = folder_of(catalog)
    source = embedding_source(
        embeddings, items, image_column=image_column, caption_column=caption_column
    )
    with changing(folder, "append_embeddings") as (current, stage):
        if source.dim != current.dim:
            raise CatalogError(
                f"expected embeddings of dim {current.dim}, as the catalog's, got {source.dim}: "
                "append what the same model made, or build another catalog with from_embeddings"
            )
        if encoder is not None:
            current.check_encoder(encoder)
        if check_order:
            if encoder is None:
                raise CatalogError(
                    "expected an encoder for check_order, got none: drop one or add one"
                )
            compare_with_images(source, encoder, check_order)
        skipped: Skipped = []
        with (
            StageBars(show=progress) as bars,
            _writer(current, stage, rows_per_shard) as writer,
        ):
            known = KnownContent(current)
            for block, lines in unit_blocks(source):
                fitted = fitted_items(lines, current.item_store.schema)
                is_new = _new_lines(fitted, known, skipped)
                writer.append(block[is_new], fitted.filter(is_new))
                bars("embeddings", writer.n_rows + len(skipped), source.n_rows)
            _finish(current, stage, writer, skipped, bars)
    return _appended(folder, writer.n_rows, len(current), skipped)


def fitted_items(items: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return lines with the user columns of a catalog, in its order and types.

    Parameters
    ----------
    items
        Lines to append, with any of a catalog's own columns, which stay as they are.
    schema
        Of the catalog's items.

    Raises
    ------
    CatalogError
        A column that the catalog lacks, one that it cannot do without, or another type.
    """
    import pyarrow as pa

    wanted = [one for one in schema if one.name not in ITEM_COLUMNS]
    own = [name for name in items.column_names if name in ITEM_COLUMNS]
    extra = sorted(set(items.column_names) - set(own) - {one.name for one in wanted})
    if extra:
        known = ", ".join(one.name for one in wanted) or "none of your own"
        raise CatalogError(
            f"expected the columns of the catalog ({known}), got also {', '.join(extra)}: drop or "
            "rename them, or build a new catalog of all images with these columns"
        )
    fitted = items.select(own)
    for one in wanted:
        if one.name in items.column_names:
            column = _cast(items.column(one.name), one)
        elif one.nullable:
            column = pa.nulls(len(items), one.type)
        else:
            raise CatalogError(
                f"expected the column {one.name!r}, which the catalog has for every image, got "
                "none: add it"
            )
        fitted = fitted.append_column(one, column)
    return fitted


def _cast(column: pa.ChunkedArray, wanted: pa.Field) -> pa.ChunkedArray:
    import pyarrow as pa

    try:
        return column if column.type == wanted.type else column.cast(wanted.type)
    except (pa.ArrowException, ValueError) as error:
        raise CatalogError(
            f"expected column {wanted.name!r} to hold {wanted.type}, as in the catalog, got "
            f"{column.type} ({error}): convert it"
        ) from error


@dataclass(frozen=True, slots=True)
class _Fitting:
    """A source whose lines fit a catalog: its columns, and uris that start where its own do."""

    source: ImageSource
    catalog: Catalog

    @property
    def n_images(self) -> int:
        return self.source.n_images

    @property
    def root(self) -> Path | None:
        return None if self._is_elsewhere else self.source.root

    def chunks(self) -> Iterator[Chunk]:
        schema = self.catalog.item_store.schema
        for chunk in self.source.chunks():
            table = fitted_items(chunk.table, schema)
            if self._is_elsewhere:
                table = _absolute(table, cast(Path, self.source.root))
            yield replace(chunk, table=table)

    @property
    def _is_elsewhere(self) -> bool:
        own = self.catalog.manifest.source_root
        return self.source.root is not None and str(self.source.root) != own


def _absolute(table: pa.Table, root: Path) -> pa.Table:
    import pyarrow as pa

    uris = [
        uri if scheme(uri) or uri.startswith("openmoji:") else str(root / uri)
        for uri in table.column("uri").to_pylist()
    ]
    position = table.column_names.index("uri")
    return table.set_column(position, "uri", pa.array(uris, pa.string()))


def _new_lines(lines: pa.Table, known: KnownContent, skipped: Skipped) -> NDArray[np.bool_]:
    """Return which lines have new content, (m,) bool; add the others to `skipped`."""
    is_new = np.ones(len(lines), dtype=np.bool_)
    texts = lines.column("content_hash").to_pylist()
    for at, text in enumerate(texts):
        reason = (known.check(text) if text else None) or known.take(text)
        if reason is not None:
            is_new[at] = False
            skipped.append((lines.column("uri")[at].as_py() or "", reason))
    return is_new


def _encoder(catalog: Catalog, given: Encoder | None, device: str | None) -> Encoder:
    if given is not None:
        if device is not None:
            raise CatalogError("expected either encoder or device, got both: drop one")
        catalog.check_encoder(given)
        return given
    if catalog.encoder_info.kind == "none":
        raise EncoderError(
            f"expected a catalog with an encoder, but {catalog.path} was made from embeddings "
            "alone: give append_embeddings their embeddings, or pass the encoder that made them"
        )
    return load_encoder(catalog.encoder_info, device=device)


def _writer(catalog: Catalog, stage: Path, rows_per_shard: int) -> CatalogWriter:
    parts = catalog.manifest.column_parts
    return CatalogWriter(
        stage,
        encoder_info=catalog.encoder_info,
        rows_per_shard=rows_per_shard,
        columns="full" if parts == "order" else cast("ColumnParts", parts),
        first_row=len(catalog),
    )


def _finish(
    catalog: Catalog,
    stage: Path,
    writer: CatalogWriter,
    skipped: Sequence[tuple[str, str]],
    bars: StageProgress,
) -> None:
    """Build the indexes of the new shards and let them appear."""
    if not writer.n_rows:
        return
    model = ColumnModel.open(catalog.path)
    entries = writer.finish_shards(model, skipped=skipped, progress=bars)
    old = catalog.manifest
    commit(
        catalog.path,
        replace(
            old,
            n_rows=old.n_rows + writer.n_rows,
            shards=(*old.shards, *placed(catalog.path, stage, entries)),
        ),
    )


def _appended(
    folder: Path, n_added: int, first_row: int, skipped: Sequence[tuple[str, str]]
) -> Appended:
    import pyarrow as pa

    columns = {
        "uri": pa.array([uri for uri, _ in skipped], pa.string()),
        "reason": pa.array([reason for _, reason in skipped], pa.string()),
    }
    return Appended(Catalog.open(folder), n_added, first_row, pa.table(columns))
