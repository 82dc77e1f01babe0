"""What a worker of a cluster does to build a catalog (layer 12): embed images, index a shard.

Every task writes into a folder of its own, ``NAME.TOKEN`` in the build's ``work`` folder on the
shared storage, flushes it to the disk and renames it to ``NAME``. A task that is killed leaves a
folder that nobody looks at; of two that run twice, as a scheduler lets them when it loses sight of
a worker, the second finds the work of the first. When the build is over or stopped, ``work`` is
gone, and what still runs ends at its next step.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipbranches_widget import __version__
from clipbranches_widget.cluster_client import import_distributed
from clipbranches_widget.column_build import build_sorted_columns
from clipbranches_widget.column_model import ColumnModel
from clipbranches_widget.embed_source import embed_into
from clipbranches_widget.encoder import Encoder, EncoderInfo, load_encoder
from clipbranches_widget.errors import Cancelled, ClipBranchesError, ClusterError
from clipbranches_widget.integrity import EMBEDDINGS_FILE, ITEMS_FILE, SKIPPED_FILE
from clipbranches_widget.manifest import Piece
from clipbranches_widget.shard_writer import (
    ShardWriter,
    WrittenShard,
    describe_files,
    write_items,
    write_skipped,
)
from clipbranches_widget.sorted_columns import ColumnParts
from clipbranches_widget.source_table import ImageSource
from clipbranches_widget.storage import array_header, open_array, sync_tree
from clipbranches_widget.vector_index import build_vector_index

_REPORT_S = 0.5
_HELD = "clipbranches_model"


@dataclass(frozen=True, slots=True)
class WorkerModel:
    """The model of a build, as a worker gets it.

    Attributes
    ----------
    token
        Of the build.
    info
        What a worker loads, once; it must find the same weights.
    device
        Where; None takes the best of each worker.
    encoder
        The model itself, in place of loading it.
    """

    token: str
    info: EncoderInfo
    device: str | None = None
    encoder: Encoder | None = None

    def load(self) -> Encoder:
        """Return the model."""
        if self.encoder is not None:
            return self.encoder
        return load_encoder(self.info, device=self.device)


@dataclass(frozen=True, slots=True)
class PartJob:
    """Some images to embed.

    Attributes
    ----------
    work, name
        The build's folder, and the one in it that holds the result: the embeddings, items and
        thumbnails of a shard, with rows from 0 on, and the images left out.
    images
        Which.
    model, batch_size, whole_batches
        See `embed.embed_images`.
    topic
        Of the events that say how many images are done: ``{"part": name, "images": n}``.
    """

    work: Path
    name: str
    images: ImageSource
    model: WorkerModel
    batch_size: int
    whole_batches: bool
    topic: str


@dataclass(frozen=True, slots=True)
class ShardJob:
    """A shard to index, on the columns that are saved in its catalog; `name` as of `PartJob`."""

    work: Path
    name: str
    catalog: Path
    shard: WrittenShard
    columns: ColumnParts


@dataclass(frozen=True, slots=True)
class Failed:
    """An error that would come again on any worker: it is a result, so it is not retried."""

    error: ClipBranchesError


@dataclass(slots=True)
class _Held:
    """The model that a worker keeps, and whose turn it is: one task at a time uses it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    token: str = ""
    encoder: Encoder | None = None

    def model(self, wanted: WorkerModel) -> Encoder:
        """Return a build's model, loaded once; the lock must be held."""
        if self.encoder is None or self.token != wanted.token:
            self.encoder, self.token = wanted.load(), wanted.token
        return self.encoder


def embed_part(job: PartJob) -> int | Failed:
    """Embed images; returns how many were read."""
    worker = import_distributed().get_worker()
    held = _held(worker)
    with held.lock:
        try:
            place = job.work / job.name
            if not place.is_dir():
                with _attempt(job.work, job.name, worker.address) as folder:
                    _embed(job, held.model(job.model), folder, worker)
            (n_rows, _), _ = array_header(place / EMBEDDINGS_FILE)
        except ClipBranchesError as error:
            return Failed(error)
        return n_rows


def index_shard(job: ShardJob) -> dict[str, Piece] | Failed:
    """Build the indexes of a shard, and its items under their final rows; describes its files."""
    worker = import_distributed().get_worker()
    with _held(worker).lock:
        try:
            place = job.work / job.name
            if not place.is_dir():
                with _attempt(job.work, job.name, worker.address) as folder:
                    _index(job, folder, worker.state.nthreads)
            return {**describe_files(job.shard.folder), **describe_files(place)}
        except ClipBranchesError as error:
            return Failed(error)


def introduce(dask_worker: Any) -> tuple[str, float]:
    """Return this package's version on a worker, and how many GPUs it announces."""
    return __version__, float(dask_worker.state.total_resources.get("GPU", 0))


def forget_model(token: str, dask_worker: Any) -> None:
    """Let go of the model of a build, unless another has taken its place."""
    held = _held(dask_worker)
    if held.token == token:
        held.token, held.encoder = "", None


def _held(worker: Any) -> _Held:
    held: _Held = vars(worker).setdefault(_HELD, _Held())
    return held


@contextlib.contextmanager
def _attempt(work: Path, name: str, address: str) -> Iterator[Path]:
    """Yield the path of a folder to make, which becomes ``work/name``, unless another did."""
    if not work.is_dir():
        raise ClusterError(
            f"expected worker {address} to see the folder {work}, but it does not: a catalog that "
            "a cluster builds must lie on storage that all workers and this machine share, under "
            "the same path; choose such a path"
        )
    folder = work / f"{name}.{uuid.uuid4().hex[:12]}"
    try:
        yield folder
        sync_tree(folder)
        try:
            folder.rename(work / name)
        except OSError:
            if not (work / name).is_dir():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _embed(job: PartJob, encoder: Encoder, folder: Path, worker: Any) -> None:
    last = time.monotonic()

    def report(_: str, done: int, __: int) -> None:
        nonlocal last
        if not job.work.is_dir():
            raise Cancelled("the build was stopped")
        if time.monotonic() > last + _REPORT_S:
            last = time.monotonic()
            worker.log_event(job.topic, {"part": job.name, "images": done})

    writer = ShardWriter(folder, dim=job.model.info.dim)
    with contextlib.closing(writer):
        skipped = embed_into(
            job.images,
            encoder,
            writer,
            batch_size=job.batch_size,
            progress=report,
            n_decoders=max(2, worker.state.nthreads),
            whole_batches=job.whole_batches,
        )
        if writer.n_rows:
            writer.finish(0)
    write_skipped(folder / SKIPPED_FILE, skipped)


def _index(job: ShardJob, folder: Path, n_threads: int) -> None:
    import pyarrow.parquet as pq

    folder.mkdir()
    embeddings = open_array(job.shard.folder / EMBEDDINGS_FILE, dtype=np.float16)
    build_vector_index(embeddings, folder / "vectors.usearch", n_threads=n_threads)
    build_sorted_columns(
        embeddings,
        ColumnModel.open(job.catalog),
        folder,
        columns=job.columns,
        n_threads=n_threads,
    )
    items = pq.read_table(job.shard.folder / ITEMS_FILE)
    if items.column("row")[0].as_py() != job.shard.first_row:
        write_items(folder / ITEMS_FILE, [items.drop_columns(["row"])], job.shard.first_row)
