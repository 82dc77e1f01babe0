"""Embed many images: decode in parallel and ahead, so that the model is the limit (layer 4).

Decoder threads read, hash, decode, thumbnail and preprocess images in order, at most a bounded
window ahead of the model, which runs in the caller's thread. Pillow and torch release the
interpreter lock in all of these. ``benchmarks/throughput.py`` compares the whole with the model
alone on ready tensors. Where both share the same cores, preparation takes its part of them: about
10 ms of one core for a JPEG of 1600 x 1200 (decoding 4, resizing to 224 pixels 3.5, thumbnail 2.5).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.encoder import Encoder
from clipbranches_widget.errors import ImageReadError
from clipbranches_widget.images import MAX_PIXELS, load
from clipbranches_widget.thumbnails import THUMBNAIL_PX, thumbnail_webp


@dataclass(frozen=True, slots=True)
class EmbeddedBatch:
    """Some images, in the order of the uris, and the ones between them that could not be read.

    Attributes
    ----------
    positions
        Indices into the uris of the images that were read, ascending; shape (b,), b may be 0.
    embeddings
        Unit vectors, shape (b, dim).
    widths, heights
        Pixels of the whole upright images, shape (b,).
    content_hashes
        `images.content_hash` of each file.
    thumbnails
        WebP bytes of each image.
    skipped
        Position and reason of each image that could not be read, ascending.
    """

    positions: NDArray[np.int64]
    embeddings: NDArray[np.float32]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    content_hashes: tuple[str, ...]
    thumbnails: tuple[bytes, ...]
    skipped: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class _Ready:
    """One decoded image, on its way to the model."""

    tensor: Any
    width: int
    height: int
    content_hash: str
    thumbnail: bytes


def embed_images(
    uris: Sequence[str],
    encoder: Encoder,
    *,
    root: Path | None = None,
    batch_size: int = 64,
    n_decoders: int | None = None,
    thumbnail_size: int = THUMBNAIL_PX,
    max_pixels: int = MAX_PIXELS,
) -> Generator[EmbeddedBatch, None, None]:
    """Yield the embeddings of images, batch by batch.

    Every position of `uris` comes exactly once, in ascending order over the whole iteration: as
    an image or as skipped. Closing the iterator early, or an exception in the caller's loop
    (Ctrl-C too), drops what is queued and waits only for the images being decoded.

    Parameters
    ----------
    uris
        What `images.load` reads.
    encoder
        Its `preprocess` runs in the decoder threads, its `encode_tensors` in the caller's.
    root
        Folder of relative paths.
    batch_size
        Images per call of the model.
    n_decoders
        Decoder threads; None: one per core, at least 2, at most 16.
    thumbnail_size
        Longest side of the thumbnails in pixels.
    max_pixels
        Larger images are skipped.

    Raises
    ------
    MissingPackageError
        ``openmoji:`` images without the ``demo`` extra.
    EncoderError
        The model failed; an image that fails before that is skipped with its reason.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch_size of at least 1, got {batch_size}")
    n_threads = n_decoders or min(16, max(2, os.cpu_count() or 2))
    target_size = max(encoder.image_size, thumbnail_size)

    def prepare(uri: str) -> _Ready | str:
        try:
            loaded = load(uri, root=root, target_size=target_size, max_pixels=max_pixels)
            return _Ready(
                encoder.preprocess(loaded.image),
                loaded.width,
                loaded.height,
                loaded.content_hash,
                thumbnail_webp(loaded.image, thumbnail_size),
            )
        except (ImageReadError, OSError, ValueError, RuntimeError, MemoryError) as error:
            return str(error) or type(error).__name__

    window: deque[Future[_Ready | str]] = deque()
    waiting = iter(uris)
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="clipbranches-decode")
    ready: list[tuple[int, _Ready]] = []
    skipped: list[tuple[int, str]] = []
    try:
        for uri in islice(waiting, 2 * batch_size + n_threads):
            window.append(pool.submit(prepare, uri))
        position = 0
        while window:
            outcome = window.popleft().result()
            for uri in islice(waiting, 1):
                window.append(pool.submit(prepare, uri))
            if isinstance(outcome, str):
                skipped.append((position, outcome))
            else:
                ready.append((position, outcome))
            position += 1
            if len(ready) == batch_size:
                yield _embed(encoder, ready, skipped)
                ready, skipped = [], []
        if ready or skipped:
            yield _embed(encoder, ready, skipped)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _embed(
    encoder: Encoder, ready: list[tuple[int, _Ready]], skipped: list[tuple[int, str]]
) -> EmbeddedBatch:
    images = [image for _, image in ready]
    return EmbeddedBatch(
        positions=np.asarray([position for position, _ in ready], np.int64),
        embeddings=encoder.encode_tensors([image.tensor for image in images]),
        widths=np.asarray([image.width for image in images], np.int32),
        heights=np.asarray([image.height for image in images], np.int32),
        content_hashes=tuple(image.content_hash for image in images),
        thumbnails=tuple(image.thumbnail for image in images),
        skipped=tuple(skipped),
    )
