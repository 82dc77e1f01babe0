"""Build a catalog from images or from ready embeddings (layer 5)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.catalog_store import is_remote, new_catalog
from clipbranches_widget.catalog_writer import CatalogWriter
from clipbranches_widget.embed_source import embed_into
from clipbranches_widget.encoder import Encoder, EncoderInfo, OpenClipEncoder, bundled_encoder
from clipbranches_widget.errors import CatalogError
from clipbranches_widget.map_layout import is_available
from clipbranches_widget.npy import drop_pages
from clipbranches_widget.order_check import check_order as compare_with_images
from clipbranches_widget.sorted_columns import ColumnParts
from clipbranches_widget.source_arrays import embedding_source
from clipbranches_widget.source_embeddings import EmbeddingSource
from clipbranches_widget.sources import Found, Source, find, image_source
from clipbranches_widget.stage_bars import StageBars, StageProgress

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from distributed import Client
    from numpy.typing import ArrayLike

    from clipbranches_widget.cluster_ingest import WorkersAtWork

MODEL, PRETRAINED = "ViT-B-32", "laion2b_s34b_b79k"
BUNDLED = "bundled"

_BLOCK_ELEMENTS = 2**19  # float64 of a block fit a core's cache: three times as fast as of 2**23
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
    items: pd.DataFrame | pa.Table | str | Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    check_order: int = 0,
    rows_per_shard: int | None = None,
    columns: ColumnParts = "full",
    about: str = "",
    with_map: bool = True,
    client: Client | None = None,
) -> Catalog:
    """Embed images and build a catalog of them.

    Parameters
    ----------
    source
        A folder (its whole tree; hidden files are ignored), a list or Series of paths or URLs, a
        DataFrame or Arrow table with a column ``uri`` or ``path`` or of image bytes, optionally
        ``caption``, and columns of your own, which are kept. Files or a pattern of files: Parquet,
        Arrow, WebDataset tar, zip. A Hugging Face `datasets.Dataset`, or the folder it was saved
        to. Each may be a URL that fsspec reads, such as ``s3://bucket/train-{000..099}.tar``.
        Without a caption the file name serves. Embeddings that are there already (``.npy``, the
        output of clip-retrieval) are taken as they are, as in `from_embeddings`, when the model
        that made them is named.
    path
        Folder to create, by custom ``NAME.cbcat``, or its URL, such as ``s3://bucket/a.cbcat``. It
        appears when the catalog is complete.
    model, pretrained
        An OpenCLIP model and its weights, a tag or a checkpoint file; ``model="bundled"`` takes
        the small demo encoder for icons, offline.
    batch_size
        Images a step of the model.
    device
        "cuda", "mps", "cpu"; None takes the best there is. With a `client` that of the workers.
    progress
        Show progress bars with rate and remaining time.
    encoder
        A ready encoder, in place of `model`, `pretrained` and `device`.
    items, check_order
        For embeddings only: see `from_embeddings`.
    image_column
        The column with the image bytes, paths or URLs, where several could be meant; for tars the
        extension.
    caption_column
        The column with the captions, if not ``caption``.
    rows_per_shard
        Rows a shard holds at most; None for 1,000,000, or with a `client` fewer, so that each
        worker gets several shards.
    columns : "full", "bits" or "codes"
        How much of the column index to store: 9, 5 or 1 bytes per image and column. Answers are
        the same, but slower with less. `rebuild_columns` changes it later.
    about
        Free text kept in the catalog, such as an attribution.
    with_map
        Compute the map of the images, too: seconds for some thousand, a minute for 100,000 or
        more, of which 100,000 are placed. `build_map` does so later. Left out, with a warning,
        where openTSNE is not installed.
    client : distributed.Client, optional
        Embed and index on the workers of a Dask cluster. They, and this machine, must see the
        images and the folder of `path` under the same paths. Each loads the model once, on
        `device`; an `encoder` of another class than `OpenClipEncoder` is sent to them.

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
    ClusterError
        The workers are gone, or do not see the images or the folder.
    """
    device_here = device if client is None else None
    if encoder is not None and (model, pretrained, device_here) != (MODEL, PRETRAINED, None):
        raise CatalogError(
            "expected either encoder or model, pretrained and device, got both: drop one"
        )
    _check_target(path, client)
    found = source
    if isinstance(source, str | Path) and (is_remote(path) or not Path(path).expanduser().exists()):
        found = find(source)
    if isinstance(found, Found) and found.kind in ("clip-retrieval", "npy"):
        if encoder is None and (model, pretrained) == (MODEL, PRETRAINED):
            raise CatalogError(_whose_embeddings(source))
        return from_embeddings(
            str(source),
            path,
            items=items,
            encoder=encoder or make_encoder(model, pretrained, device_here),
            image_column=image_column,
            caption_column=caption_column,
            check_order=check_order,
            rows_per_shard=rows_per_shard,
            columns=columns,
            about=about,
            progress=progress,
            with_map=with_map,
            client=client,
        )
    if items is not None or check_order:
        raise CatalogError(
            "expected items and check_order only with embeddings (.npy, or the output folder of "
            "clip-retrieval), got images: drop them"
        )
    with new_catalog(path) as stage:
        images = image_source(found, image_column=image_column, caption_column=caption_column)
        used = encoder if encoder is not None else make_encoder(model, pretrained, device_here)
        with (
            StageBars(show=progress) as bars,
            CatalogWriter(
                stage, encoder_info=used.info, rows_per_shard=rows_per_shard, columns=columns
            ) as writer,
            _workers(client, writer, bars) as workers,
        ):
            if workers is None:
                skipped = embed_into(images, used, writer, batch_size=batch_size, progress=bars)
            else:
                skipped = workers.embed(images, used, device=device, batch_size=batch_size)
            if not writer.n_rows:
                raise CatalogError(_nothing_read(skipped))
            writer.finish(
                text_tower=used if used.has_text else None,
                skipped=skipped,
                source_root=images.root,
                about=about,
                progress=bars,
                with_map=with_map and _can_map(),
                index_shards=workers.index if workers is not None else None,
            )
    if skipped:
        _log.warning(
            "left out %d of %d images that cannot be read: see catalog.skipped for the reasons",
            len(skipped),
            images.n_images,
        )
    return Catalog.open(path)


def from_embeddings(
    embeddings: ArrayLike | str | Path,
    path: str | Path,
    *,
    items: pd.DataFrame | pa.Table | str | Path | None = None,
    encoder: Encoder | EncoderInfo | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    check_order: int = 0,
    rows_per_shard: int | None = None,
    columns: ColumnParts = "full",
    about: str = "",
    progress: bool = False,
    with_map: bool = False,
    client: Client | None = None,
) -> Catalog:
    """Build a catalog from embeddings that you have.

    Parameters
    ----------
    embeddings : (n, dim) real
        n >= 1 rows, finite and not zero; they are scaled to norm 1 and kept as float16. May be a
        memory map larger than the memory: it is read in blocks. Or where they are: a ``.npy`` file
        or a pattern of them, or the output folder of ``clip-retrieval inference``.
    path
        Folder to create, or its URL; see `index`.
    items
        n lines: ``uri`` (or ``path``) says where the image is, ``caption`` what it shows;
        ``width``, ``height`` and ``content_hash`` where known; other columns are kept as they are.
        A table, or the path or URL of a Parquet or Arrow file. None with clip-retrieval, which has
        its own.
    encoder
        What made the embeddings: an encoder (text search works, columns are named by concepts),
        its info, or None (search by row and vector only, columns named by captions).
    image_column, caption_column
        The columns with the paths or URLs and with the captions, under other names than the above.
    check_order
        So many images, spread over all rows, are embedded again with `encoder` and compared with
        the embeddings of their rows; 32 takes a second or two. 0 for no check.
    rows_per_shard
        Rows a shard holds at most; see `index`.
    columns : "full", "bits" or "codes"
        How much of the column index to store: 9, 5 or 1 bytes per image and column. Answers are
        the same, but slower with less. `rebuild_columns` changes it later.
    about
        Free text kept in the catalog, such as an attribution.
    progress
        Show progress bars.
    with_map
        Compute the map of the images, too; see `index`. Not by default: it would take longer
        than everything else here.
    client : distributed.Client, optional
        Build the indexes on the workers of a Dask cluster, which must see the folder of `path`.

    Raises
    ------
    CatalogExistsError
        Something is at `path` already.
    CatalogError
        Bad embeddings (the message names the rows), another number of items, another dimension
        than the encoder's, a column name that is taken, or unknown `columns`. Or the check of
        order says that items and embeddings do not belong together.
    ClusterError
        The workers are gone, or do not see the folder.
    """
    source = embedding_source(
        embeddings, items, image_column=image_column, caption_column=caption_column
    )
    info = encoder if isinstance(encoder, EncoderInfo) or encoder is None else encoder.info
    if info is None:
        info = EncoderInfo("none", model="", pretrained="", dim=source.dim, weights_hash="")
    if info.dim != source.dim:
        raise CatalogError(
            f"expected embeddings of dim {info.dim}, that of {info.model}, got {source.dim}: "
            "give the encoder that made them"
        )
    tower = encoder if encoder is not None and not isinstance(encoder, EncoderInfo) else None
    if check_order:
        if tower is None:
            raise CatalogError("expected an encoder for check_order, got none: drop one or add one")
        compare_with_images(source, tower, check_order)
    _check_target(path, client)
    with (
        new_catalog(path) as stage,
        StageBars(show=progress) as bars,
        CatalogWriter(
            stage, encoder_info=info, rows_per_shard=rows_per_shard, columns=columns
        ) as writer,
        _workers(client, writer, bars) as workers,
    ):
        if workers is not None:
            workers.share_out(source.n_rows)
        for block, lines in unit_blocks(source):
            writer.append(block, lines)
            bars("embeddings", writer.n_rows, source.n_rows)
        writer.finish(
            text_tower=tower if tower is not None and tower.has_text else None,
            about=about,
            progress=bars,
            with_map=with_map and _can_map(),
            index_shards=workers.index if workers is not None else None,
        )
    return Catalog.open(path)


def _check_target(path: str | Path, client: Client | None) -> None:
    if client is not None and is_remote(path):
        raise CatalogError(
            f"expected a folder that all workers see, got {path}: build the catalog there, then "
            "copy it with clipbranches_widget.copy_catalog(folder, url)"
        )


def _workers(
    client: Client | None, writer: CatalogWriter, progress: StageProgress
) -> AbstractContextManager[WorkersAtWork | None]:
    if client is None:
        return nullcontext()
    from clipbranches_widget.cluster_ingest import WorkersAtWork

    return WorkersAtWork(client, writer, progress)


def _can_map() -> bool:
    if not is_available():
        _log.warning(
            "left out the map: openTSNE, which computes it, is not installed; "
            "run: pip install openTSNE, then clipbranches_widget.build_map(path)"
        )
    return is_available()


def make_encoder(model: str, pretrained: str, device: str | None) -> Encoder:
    """Load the encoder that `index` would take; ``BUNDLED`` is the demo model."""
    if model == BUNDLED:
        return bundled_encoder(device)
    return OpenClipEncoder(model, pretrained, device=device)


def _whose_embeddings(place: object) -> str:
    return (
        f"expected to be told which model made the embeddings in {place}: name it with model= and "
        "pretrained=, pass encoder=, or call from_embeddings(source, path, encoder=...); with "
        "encoder=None there is no text search"
    )


def _nothing_read(skipped: list[tuple[str, str]]) -> str:
    shown = "; ".join(f"{uri}: {reason}" for uri, reason in skipped[:3])
    return f"expected at least one readable image, got {len(skipped)} that are not, such as {shown}"


def unit_blocks(source: EmbeddingSource) -> Iterator[tuple[NDArray[np.float64], pa.Table]]:
    """Yield rows scaled to norm 1 and their lines, a bounded number of rows at a time."""
    block_rows = max(1, _BLOCK_ELEMENTS // source.dim)
    first = 0
    for array, items in source.parts():
        for start in range(0, len(array), block_rows):
            part = array[start : start + block_rows]
            block = np.asarray(part, dtype=np.float64)
            row = first + start
            _refuse(row, ~np.isfinite(block).all(axis=1), "finite numbers", "NaN or infinity")
            largest = np.abs(block).max(axis=1, keepdims=True)
            _refuse(row, ~block.any(axis=1), "embeddings with a direction", "all zeros")
            block = block / largest
            block /= np.linalg.norm(block, axis=1, keepdims=True)
            drop_pages(part)
            yield block, items.slice(start, len(block))
        first += len(array)


def _refuse(start: int, bad: NDArray[np.bool_] | np.bool_, expected: str, got: str) -> None:
    rows = np.flatnonzero(bad) + start
    if rows.size:
        shown = ", ".join(str(row) for row in rows[:5])
        more = " and more" if rows.size > 5 else ""
        raise CatalogError(
            f"expected {expected}, got {got} in rows {shown}{more}: drop these rows from "
            "embeddings and items"
        )
