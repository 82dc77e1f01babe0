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
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.encoder import Encoder
from clipbranches_widget.errors import ImageReadError
from clipbranches_widget.images import MAX_PIXELS, Encoded, load
from clipbranches_widget.thumbnails import THUMBNAIL_PX, thumbnail_webp

_MAX_SKIPPED = 4096
"""Images left out before a batch comes anyway: whoever waits hears of them."""


class Known(Protocol):
    """Contents that are not to be embedded, by their hash."""

    def check(self, content_hash: str) -> str | None:
        """Return why an image is skipped before it is decoded, or None; in the decoder threads."""

    def take(self, content_hash: str) -> str | None:
        """Return why a decoded image is skipped, or None: it is taken; in the images' order."""


@dataclass(frozen=True, slots=True)
class EmbeddedBatch:
    """Some images, in the order they were given, and the ones between them that could not be read.

    Attributes
    ----------
    positions
        Places, from 0, of the images that were read, ascending; shape (b,), b may be 0.
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
    images: Iterable[str | tuple[str, Encoded]],
    encoder: Encoder,
    *,
    root: Path | None = None,
    batch_size: int = 64,
    n_decoders: int | None = None,
    thumbnail_size: int = THUMBNAIL_PX,
    max_pixels: int = MAX_PIXELS,
    known: Known | None = None,
    whole_batches: bool = False,
) -> Generator[EmbeddedBatch, None, None]:
    """Yield the embeddings of images, batch by batch.

    Every position of `images` comes exactly once, in ascending order over the whole iteration: as
    an image or as skipped. Closing the iterator early, or an exception in the caller's loop
    (Ctrl-C too), drops what is queued and waits only for the images being decoded.

    Parameters
    ----------
    images
        Uris for `images.load`, alone or with the image's bytes or a way to read them. They are
        asked for no faster than they are decoded, so bytes do not pile up.
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
    known
        Says which contents to skip; they are not decoded, or at least not embedded.
    whole_batches
        Fill up a batch that is not full, as the last, with copies: the model then computes it
        as it would inside a longer list, to the last bit.

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

    def prepare(image: str | tuple[str, Encoded]) -> _Ready | str:
        uri, data = (image, None) if isinstance(image, str) else image
        try:
            loaded = load(
                uri,
                root=root,
                data=data() if callable(data) else data,
                target_size=target_size,
                max_pixels=max_pixels,
                check=None if known is None else known.check,
            )
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
    waiting = iter(images)
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="clipbranches-decode")
    ready: list[tuple[int, _Ready]] = []
    skipped: list[tuple[int, str]] = []
    n_filled = batch_size if whole_batches else 0
    try:
        for image in islice(waiting, 2 * batch_size + n_threads):
            window.append(pool.submit(prepare, image))
        position = 0
        while window:
            outcome = _taken(window.popleft().result(), known)
            for image in islice(waiting, 1):
                window.append(pool.submit(prepare, image))
            if isinstance(outcome, str):
                skipped.append((position, outcome))
            else:
                ready.append((position, outcome))
            position += 1
            if len(ready) == batch_size or len(skipped) == _MAX_SKIPPED:
                yield _embed(encoder, ready, skipped, n_filled)
                ready, skipped = [], []
        if ready or skipped:
            yield _embed(encoder, ready, skipped, n_filled)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _taken(outcome: _Ready | str, known: Known | None) -> _Ready | str:
    """Return an image, or why it is skipped."""
    if known is None or isinstance(outcome, str):
        return outcome
    return known.take(outcome.content_hash) or outcome


def _embed(
    encoder: Encoder,
    ready: list[tuple[int, _Ready]],
    skipped: list[tuple[int, str]],
    n_filled: int,
) -> EmbeddedBatch:
    images = [image for _, image in ready]
    tensors = [image.tensor for image in images]
    tensors += tensors[-1:] * (n_filled - len(tensors))
    return EmbeddedBatch(
        positions=np.asarray([position for position, _ in ready], np.int64),
        embeddings=encoder.encode_tensors(tensors)[: len(images)],
        widths=np.asarray([image.width for image in images], np.int32),
        heights=np.asarray([image.height for image in images], np.int32),
        content_hashes=tuple(image.content_hash for image in images),
        thumbnails=tuple(image.thumbnail for image in images),
        skipped=tuple(skipped),
    )
