"""Build a catalog from images or from ready embeddings (layer 5)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.catalog_writer import ROWS_PER_SHARD, CatalogWriter
from clipbranches_widget.embed import EmbeddedBatch, embed_images
from clipbranches_widget.encoder import Encoder, EncoderInfo, OpenClipEncoder, bundled_encoder
from clipbranches_widget.errors import CatalogError
from clipbranches_widget.sorted_columns import ColumnParts
from clipbranches_widget.sources import (
    MEASURED_COLUMNS,
    ImageSource,
    Source,
    fill_captions,
    image_source,
    items_table,
)
from clipbranches_widget.stage_bars import StageBars, StageProgress
from clipbranches_widget.storage import staged_folder

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import ArrayLike

MODEL, PRETRAINED = "ViT-B-32", "laion2b_s34b_b79k"
BUNDLED = "bundled"

_BLOCK_ELEMENTS = 2**23
_log = logging.getLogger(__name__)


def index(
    source: Source,
    path: str | Path,
    *,
    model: str = MODEL,
    pretrained: str = PRETRAINED,
    batch_size: int = 64,
    device: str | None = None,
    progress: bool = True,
    encoder: Encoder | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    columns: ColumnParts = "full",
    about: str = "",
) -> Catalog:
    """Embed images and build a catalog of them.

    Parameters
    ----------
    source
        A folder (its whole tree; hidden files are ignored), a list or Series of paths, or a
        DataFrame or Arrow table with a column ``uri`` or ``path``, optionally ``caption``, and
        columns of your own, which are kept. Without a caption the file name serves.
    path
        Folder to create, by custom ``NAME.cbcat``. It appears when the catalog is complete.
    model, pretrained
        An OpenCLIP model and its weights, a tag or a checkpoint file; ``model="bundled"`` takes
        the small demo encoder for icons, offline.
    batch_size
        Images a step of the model.
    device
        "cuda", "mps", "cpu"; None takes the best there is.
    progress
        Show progress bars with rate and remaining time.
    encoder
        A ready encoder, in place of `model`, `pretrained` and `device`.
    rows_per_shard
        Rows a shard holds at most.
    columns : "full", "bits" or "codes"
        How much of the column index to store: 9, 5 or 1 bytes per image and column. Answers are
        the same, but slower with less. `rebuild_columns` changes it later.
    about
        Free text kept in the catalog, such as an attribution.

    Returns
    -------
    Catalog
        Rows in the order of the source (a folder: sorted by path). Images that could not be
        read are in ``catalog.skipped`` with the reason.

    Raises
    ------
    CatalogExistsError
        Something is at `path` already.
    CatalogError
        No image in the source, or none that can be read, or a column name that is taken, or
        unknown `columns`.
    WeightsUnavailableError
        The weights are neither here nor downloadable.
    """
    if encoder is not None and (model, pretrained, device) != (MODEL, PRETRAINED, None):
        raise CatalogError(
            "expected either encoder or model, pretrained and device, got both: drop one"
        )
    target = Path(path).expanduser().absolute()
    with staged_folder(target) as stage:
        images = image_source(source)
        used = encoder if encoder is not None else _encoder(model, pretrained, device)
        with (
            CatalogWriter(
                stage, encoder_info=used.info, rows_per_shard=rows_per_shard, columns=columns
            ) as writer,
            StageBars(show=progress) as bars,
        ):
            skipped = _embed(images, used, writer, batch_size=batch_size, progress=bars)
            if not writer.n_rows:
                raise CatalogError(_nothing_read(skipped))
            writer.finish(
                text_tower=used if used.has_text else None,
                skipped=skipped,
                source_root=images.root,
                about=about,
                progress=bars,
            )
    if skipped:
        _log.warning(
            "left out %d of %d images that cannot be read: see catalog.skipped for the reasons",
            len(skipped),
            len(images.table),
        )
    return Catalog.open(target)


def from_embeddings(
    embeddings: ArrayLike,
    path: str | Path,
    *,
    items: pd.DataFrame | pa.Table | None = None,
    encoder: Encoder | EncoderInfo | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    columns: ColumnParts = "full",
    about: str = "",
    progress: bool = False,
) -> Catalog:
    """Build a catalog from embeddings that you have.

    Parameters
    ----------
    embeddings : (n, dim) real
        n >= 1 rows, finite and not zero; they are scaled to norm 1 and kept as float16. May be a
        memory map larger than the memory: it is read in blocks.
    path
        Folder to create, by custom ``NAME.cbcat``. It appears when the catalog is complete.
    items
        n lines: ``uri`` (or ``path``) says where the image is, ``caption`` what it shows;
        ``width``, ``height`` and ``content_hash`` where known; other columns are kept as they are.
    encoder
        What made the embeddings: an encoder (text search works, columns are named by concepts),
        its info, or None (search by row and vector only, columns named by captions).
    rows_per_shard
        Rows a shard holds at most.
    columns : "full", "bits" or "codes"
        How much of the column index to store: 9, 5 or 1 bytes per image and column. Answers are
        the same, but slower with less. `rebuild_columns` changes it later.
    about
        Free text kept in the catalog, such as an attribution.
    progress
        Show progress bars.

    Raises
    ------
    CatalogExistsError
        Something is at `path` already.
    CatalogError
        Bad embeddings (the message names the rows), another number of items, another dimension
        than the encoder's, a column name that is taken, or unknown `columns`.
    """
    array = _checked_embeddings(embeddings)
    info = encoder if isinstance(encoder, EncoderInfo) or encoder is None else encoder.info
    if info is None:
        info = EncoderInfo("none", model="", pretrained="", dim=array.shape[1], weights_hash="")
    if info.dim != array.shape[1]:
        raise CatalogError(
            f"expected embeddings of dim {info.dim}, that of {info.model}, got {array.shape[1]}: "
            "give the encoder that made them"
        )
    table = _complete_items(items, len(array))
    tower = encoder if encoder is not None and not isinstance(encoder, EncoderInfo) else None
    target = Path(path).expanduser().absolute()
    with (
        staged_folder(target) as stage,
        CatalogWriter(
            stage, encoder_info=info, rows_per_shard=rows_per_shard, columns=columns
        ) as writer,
        StageBars(show=progress) as bars,
    ):
        for start, block in _unit_blocks(array):
            writer.append(block, table.slice(start, len(block)))
            bars("embeddings", start + len(block), len(array))
        writer.finish(
            text_tower=tower if tower is not None and tower.has_text else None,
            about=about,
            progress=bars,
        )
    return Catalog.open(target)


def _encoder(model: str, pretrained: str, device: str | None) -> Encoder:
    if model == BUNDLED:
        return bundled_encoder(device)
    return OpenClipEncoder(model, pretrained, device=device)


def _embed(
    images: ImageSource,
    encoder: Encoder,
    writer: CatalogWriter,
    *,
    batch_size: int,
    progress: StageProgress,
) -> list[tuple[str, str]]:
    """Embed all images into `writer`; return those that cannot be read, with the reason."""
    uris: list[str] = images.table.column("uri").to_pylist()
    skipped: list[tuple[str, str]] = []
    batches = embed_images(uris, encoder, root=images.root, batch_size=batch_size)
    with contextlib.closing(batches):  # an interrupt frees the images that wait decoded
        for batch in batches:
            if len(batch.positions):
                items = _measured_items(images.table, batch)
                writer.append(batch.embeddings, items, batch.thumbnails)
            skipped += [(uris[position], reason) for position, reason in batch.skipped]
            progress("images", writer.n_rows + len(skipped), len(uris))
    return skipped


def _measured_items(table: pa.Table, batch: EmbeddedBatch) -> pa.Table:
    import pyarrow as pa

    measured = {
        "width": pa.array(batch.widths, pa.int32()),
        "height": pa.array(batch.heights, pa.int32()),
        "content_hash": pa.array(batch.content_hashes, pa.string()),
    }
    items = table.take(pa.array(batch.positions))
    for name, column in measured.items():
        items = items.append_column(name, column)
    return items


def _nothing_read(skipped: list[tuple[str, str]]) -> str:
    shown = "; ".join(f"{uri}: {reason}" for uri, reason in skipped[:3])
    return f"expected at least one readable image, got {len(skipped)} that are not, such as {shown}"


def _checked_embeddings(embeddings: ArrayLike) -> NDArray[Any]:
    try:
        array = np.asanyarray(embeddings)
    except ValueError as error:
        raise CatalogError(f"expected a 2-D array of embeddings: {error}") from error
    if array.ndim != 2 or 0 in array.shape:
        raise CatalogError(f"expected embeddings of shape (n >= 1, dim >= 1), got {array.shape}")
    if array.dtype.kind not in "fiu":
        raise CatalogError(f"expected real numbers as embeddings, got dtype {array.dtype}")
    return array


def _complete_items(items: pd.DataFrame | pa.Table | None, n_rows: int) -> pa.Table:
    """Return a table with every column of a catalog but ``row``."""
    import pyarrow as pa

    unknown = pa.array([""] * n_rows, pa.string())
    table = items_table(pa.table({"uri": unknown}) if items is None else items)
    if len(table) != n_rows:
        raise CatalogError(
            f"expected as many items as embeddings, got {len(table)} items and {n_rows} "
            "embeddings: they must be in the same order, one line each"
        )
    if "uri" not in table.column_names:
        table = table.append_column("uri", unknown)
    for name, kind in MEASURED_COLUMNS.items():
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(n_rows, pa.type_for_alias(kind)))
    captions = fill_captions(table.column("uri").to_pylist(), table.column("caption").to_pylist())
    position = table.column_names.index("caption")
    return table.set_column(position, "caption", pa.array(captions, pa.string()))


def _unit_blocks(array: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield (first row, rows scaled to norm 1), a bounded number of rows at a time."""
    block_rows = max(1, _BLOCK_ELEMENTS // array.shape[1])
    for start in range(0, len(array), block_rows):
        block = np.asarray(array[start : start + block_rows], dtype=np.float64)
        _refuse(start, ~np.isfinite(block).all(axis=1), "finite numbers", "NaN or infinity")
        largest = np.abs(block).max(axis=1, keepdims=True)
        _refuse(start, ~block.any(axis=1), "embeddings with a direction", "all zeros")
        block = block / largest
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        yield start, block


def _refuse(start: int, bad: NDArray[np.bool_] | np.bool_, expected: str, got: str) -> None:
    rows = np.flatnonzero(bad) + start
    if rows.size:
        shown = ", ".join(str(row) for row in rows[:5])
        more = " and more" if rows.size > 5 else ""
        raise CatalogError(
            f"expected {expected}, got {got} in rows {shown}{more}: drop these rows from "
            "embeddings and items"
        )
