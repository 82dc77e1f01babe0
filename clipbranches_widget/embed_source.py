"""Embed a source of images, with its lines, into what writes rows (layer 8)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.embed import EmbeddedBatch, Known, embed_images
from clipbranches_widget.encoder import Encoder
from clipbranches_widget.source_table import ImageSource, RowStream
from clipbranches_widget.stage_bars import StageProgress

if TYPE_CHECKING:
    import pyarrow as pa


class RowWriter(Protocol):
    """Takes rows: a `catalog_writer.CatalogWriter`, or its writer of one shard."""

    n_rows: int

    def append(
        self, embeddings: NDArray[np.floating], items: pa.Table, thumbnails: Sequence[bytes]
    ) -> None:
        """Append rows: embeddings (b, dim), b items, b thumbnails."""


def embed_into(
    images: ImageSource,
    encoder: Encoder,
    writer: RowWriter,
    *,
    batch_size: int,
    progress: StageProgress,
    known: Known | None = None,
    n_decoders: int | None = None,
    whole_batches: bool = False,
) -> list[tuple[str, str]]:
    """Embed all images into `writer`; return those that are left out, with the reason.

    Those that cannot be read, and those whose content is `known`. For `n_decoders` and
    `whole_batches` see `embed.embed_images`; `progress` is called after each batch.
    """
    stream = RowStream(images)
    skipped: list[tuple[str, str]] = []
    batches = embed_images(
        stream,
        encoder,
        root=images.root,
        batch_size=batch_size,
        n_decoders=n_decoders,
        known=known,
        whole_batches=whole_batches,
    )
    with contextlib.closing(batches):  # an interrupt frees the images that wait decoded
        for batch in batches:
            if len(batch.positions):
                items = _measured_items(stream.take(batch.positions.tolist()), batch)
                writer.append(batch.embeddings, items, batch.thumbnails)
            if batch.skipped:
                uris = stream.take([position for position, _ in batch.skipped]).column("uri")
                reasons = [reason for _, reason in batch.skipped]
                skipped += zip(uris.to_pylist(), reasons, strict=True)
            progress("images", writer.n_rows + len(skipped), images.n_images)
            stream.forget(writer.n_rows + len(skipped) - 1)
    return skipped


def _measured_items(items: pa.Table, batch: EmbeddedBatch) -> pa.Table:
    import pyarrow as pa

    measured = {
        "width": pa.array(batch.widths, pa.int32()),
        "height": pa.array(batch.heights, pa.int32()),
        "content_hash": pa.array(batch.content_hashes, pa.string()),
    }
    for name, column in measured.items():
        items = items.append_column(name, column)
    return items
