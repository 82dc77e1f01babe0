"""Build a catalog on the workers of a Dask cluster (layer 13).

The client lists the source and cuts it into chunks of consecutive images, each a future shard. One
task for each chunk embeds its images (`cluster_tasks`); the client then gives the shards their rows
and chooses the columns on the same sample as a build on one machine; one task for each shard
builds its indexes; the client writes the manifest. Images, embeddings and indexes go between the
workers and the shared storage, never through the scheduler.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from clipbranches_widget import __version__, cluster_tasks
from clipbranches_widget.catalog_writer import ROWS_PER_SHARD, CatalogWriter
from clipbranches_widget.cluster_client import import_distributed, worker_threads
from clipbranches_widget.cluster_tasks import Failed, PartJob, ShardJob, WorkerModel
from clipbranches_widget.encoder import Encoder, OpenClipEncoder
from clipbranches_widget.errors import ClusterError, EncoderError, ImageReadError
from clipbranches_widget.images import load
from clipbranches_widget.integrity import SKIPPED_FILE
from clipbranches_widget.shard_writer import WrittenShard, shard_entry
from clipbranches_widget.source_table import DivisibleSource

if TYPE_CHECKING:
    from distributed import Client

    from clipbranches_widget.column_model import ColumnModel
    from clipbranches_widget.manifest import Piece, ShardEntry
    from clipbranches_widget.stage_bars import StageProgress

CHUNKS_PER_WORKER = 4
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 256, ROWS_PER_SHARD // 4
"""Rows of a shard where the caller does not say: small enough to share the work out evenly."""

MAX_ENCODER_BYTES = 2**23
RETRIES = 2
"""How often a task is tried again after an error of another package, such as of the storage."""

WAIT_FOR_WORKERS_S = 60.0
"""How long to wait for another worker where all are gone: those lost are started again."""

_POLL_S = 0.1
_RESULT_S = 1.0
_LOOK_FOR_WORKERS_S = 1.0

Skipped = list[tuple[str, str]]


def shard_rows(
    n_rows: int, n_workers: int, rows_per_shard: int | None, *, multiple: int = 1
) -> int:
    """Return how many rows a shard is given: all shards but the last.

    Parameters
    ----------
    n_rows, n_workers
        How many rows there are, for how many workers.
    rows_per_shard
        The caller's limit; None for several shards for each worker.
    multiple
        Batches are cut as in one long run where a shard holds whole ones.

    Examples
    --------
    >>> shard_rows(100_000, 4, None, multiple=64), shard_rows(100_000, 4, 1000, multiple=64)
    (6272, 960)
    """
    limit = rows_per_shard
    if limit is None:
        even = -(-n_rows // (CHUNKS_PER_WORKER * n_workers))
        limit = min(max(even + multiple - 1, MIN_CHUNK_ROWS), MAX_CHUNK_ROWS)
    return max(limit // multiple * multiple, min(limit, multiple))


class WorkersAtWork:
    """Builds the pieces of one catalog on the workers of a cluster; a context manager.

    When it ends, in any way, what the workers still do for it is stopped and cleared away.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    writer
        Of the catalog, whose folder all workers see under the same path.
    progress
        Gets (what is being built, done, total).

    Raises
    ------
    ClusterError
        No workers, or with another version of this package.
    """

    def __init__(self, client: Client, writer: CatalogWriter, progress: StageProgress) -> None:
        self.n_workers = len(worker_threads(client))
        self._client: Any = client
        self._writer = writer
        self._progress = progress
        self._token = uuid.uuid4().hex[:12]
        self._topic = f"clipbranches-{self._token}"
        self._work = writer.folder / "work"
        self._resources = _checked_resources(client)
        self._futures: dict[str, Any] = {}
        self._loads_model = False

    def __enter__(self) -> Self:
        self._work.mkdir()
        return self

    def __exit__(self, *error: object) -> None:
        distributed = import_distributed()
        gone = self._work.with_name(f"gone-{self._token}")
        self._work.rename(gone)  # no task can make a file in it any more
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(OSError, TimeoutError, RuntimeError, distributed.CancelledError):
            self._client.cancel(list(self._futures.values()), force=True)
            if self._loads_model:
                self._client.run(cluster_tasks.forget_model, self._token, on_error="ignore")

    def share_out(self, n_rows: int) -> None:
        """Have the writer make several shards for each worker, unless it was told how large."""
        writer = self._writer
        writer.rows_per_shard = shard_rows(n_rows, self.n_workers, writer.rows_per_shard)

    def embed(
        self, images: DivisibleSource, encoder: Encoder, *, device: str | None, batch_size: int
    ) -> Skipped:
        """Embed the images of a source into shards; returns what was left out, with the reason.

        Raises
        ------
        EncoderError
            The encoder cannot be sent to workers, or they find other weights.
        ClusterError
            The workers are gone, one chunk killed several, or they do not see the images.
        """
        n_images = images.n_images
        limit = self._writer.rows_per_shard
        n_rows = shard_rows(n_images, self.n_workers, limit, multiple=batch_size)
        starts = range(0, n_images, n_rows)
        model = self._model(encoder, device)
        (self._work / "lines").mkdir()

        def jobs() -> Iterator[PartJob]:
            for number, start in enumerate(starts):
                part = images.part(
                    start, min(start + n_rows, n_images), self._work / "lines" / str(number)
                )
                is_last = start == starts[-1]
                yield PartJob(
                    self._work, f"part-{number}", part, model, batch_size, not is_last, self._topic
                )

        done: Counter[str] = Counter()

        def finished(number: int, n_read: int) -> None:
            folder = self._work / f"part-{number}"
            if not n_read:
                _check_seen(_skipped(folder), images.root)
            done[f"part-{number}"] = min(n_rows, n_images - starts[number])

        def event(stamped: tuple[float, Any]) -> None:
            message = stamped[1]
            done[message["part"]] = max(done[message["part"]], message["images"])

        what = [
            f"embed chunk {number + 1} of {len(starts)} (images {start} to "
            f"{min(start + n_rows, n_images) - 1} of the source)"
            for number, start in enumerate(starts)
        ]
        self._client.subscribe_topic(self._topic, event)
        try:
            counts = self._run(
                _Tasks(cluster_tasks.embed_part, "embed-chunk", what),
                jobs(),
                finished,
                lambda: self._progress("images", min(sum(done.values()), n_images), n_images),
            )
        finally:
            self._client.unsubscribe_topic(self._topic)
        return self._take(counts)

    def index(self, model: ColumnModel, shards: Sequence[WrittenShard]) -> tuple[ShardEntry, ...]:
        """Build the indexes of shards; a `catalog_writer.IndexShards`."""
        del model  # saved in the stage, where the workers read it
        jobs = [
            ShardJob(
                self._work, f"index-{number}", self._writer.folder, shard, self._writer.columns
            )
            for number, shard in enumerate(shards)
        ]
        what = [f"index shard {number + 1} of {len(shards)}" for number in range(len(shards))]
        n_done = 0

        def finished(_: int, __: dict[str, Piece]) -> None:
            nonlocal n_done
            n_done += 1

        pieces = self._run(
            _Tasks(cluster_tasks.index_shard, "index-shard", what),
            jobs,
            finished,
            lambda: self._progress("shards indexed", n_done, len(shards)),
        )
        for job in jobs:
            for file in (self._work / job.name).iterdir():
                file.replace(job.shard.folder / file.name)
        return tuple(
            shard_entry(self._writer.folder, shard, each)
            for shard, each in zip(shards, pieces, strict=True)
        )

    def _take(self, counts: Sequence[int]) -> Skipped:
        """Make shards of the chunks that hold any row; returns what was left out."""
        skipped: Skipped = []
        for number, n_rows in enumerate(counts):
            part = self._work / f"part-{number}"
            skipped += _skipped(part)
            (part / SKIPPED_FILE).unlink()
            if n_rows:
                self._writer.take(part, n_rows)
        return skipped

    def _model(self, encoder: Encoder, device: str | None) -> WorkerModel:
        """Return what makes the model on a worker."""
        self._loads_model = True
        if type(encoder) is OpenClipEncoder:
            return WorkerModel(self._token, encoder.info, device)
        pickle = import_distributed().protocol.pickle
        try:
            n_bytes = len(pickle.dumps(encoder))
        except Exception as error:  # whatever the classes in it raise
            raise EncoderError(
                f"expected an encoder that can be sent to workers, got {type(encoder).__name__}, "
                f"which cannot be pickled ({error}): give model= and pretrained=, or define "
                "__reduce__ so that it is made anew on a worker"
            ) from error
        if n_bytes > MAX_ENCODER_BYTES:
            raise EncoderError(
                f"expected an encoder of at most {MAX_ENCODER_BYTES:,} bytes to send to workers, "
                f"got {type(encoder).__name__} of {n_bytes:,}: give model= and pretrained=, or "
                "define __reduce__ so that it loads its weights on the worker"
            )
        return WorkerModel(self._token, encoder.info, encoder=encoder)

    def _run(
        self,
        tasks: _Tasks,
        jobs: Iterable[Any],
        finished: Callable[[int, Any], None],
        tick: Callable[[], None],
    ) -> list[Any]:
        """Run one task for each job, as many at once as there are workers; returns their results.

        No more than that wait on a worker: what waits when it dies would count as its killer, too.
        """
        waiting = enumerate(jobs)
        running: dict[str, int] = {}
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        results: dict[int, Any] = {}
        looked = time.monotonic()
        while running or len(results) < len(tasks.what):
            for number, job in islice(waiting, max(self.n_workers - len(running), 0)):
                future = self._submit(tasks, number, job)
                running[future.key] = number
                future.add_done_callback(done.put)
            tick()
            if time.monotonic() > looked + _LOOK_FOR_WORKERS_S:
                self._look_for_workers()
                looked = time.monotonic()
            with contextlib.suppress(queue.Empty):
                future = done.get(timeout=_POLL_S)
                number = running[future.key]
                result = _result(future, tasks.what[number])
                if result is None:  # lost with its worker: it is done again
                    done.put(future)
                else:
                    finished(number, result)
                    results[number] = result
                    del running[future.key], self._futures[future.key]
        tick()
        return [results[number] for number in range(len(results))]

    def _submit(self, tasks: _Tasks, number: int, job: Any) -> Any:
        future = self._client.submit(
            tasks.function,
            job,
            key=f"{tasks.key}-{number + 1}-{self._token}",
            retries=RETRIES,
            resources=self._resources,
            pure=False,
        )
        self._futures[future.key] = future
        return future

    def _look_for_workers(self) -> None:
        try:
            self.n_workers = len(worker_threads(self._client, wait_s=WAIT_FOR_WORKERS_S))
        except ClusterError as error:
            raise ClusterError(
                "expected workers to go on with, but all are gone, and no other came: start some "
                f"and start again, nothing was written ({error})"
            ) from error


@dataclass(frozen=True, slots=True)
class _Tasks:
    """What to run, the name of its tasks on a dashboard, and what each is to do, in words."""

    function: Callable[[Any], Any]
    key: str
    what: Sequence[str]


def _result(future: Any, what: str) -> Any:
    """Return the result of a task that was done; None where it is not any more."""
    distributed = import_distributed()
    try:
        result = future.result(timeout=_RESULT_S)
    except distributed.KilledWorker as error:
        raise ClusterError(
            f"expected a worker to {what}, but each that tried died, the last one at "
            f"{error.last_worker.address}: see the logs of the workers; out of memory is the "
            "usual reason, which a smaller batch_size or rows_per_shard, or fewer workers on a "
            "machine help against"
        ) from error
    except distributed.CancelledError as error:
        raise ClusterError(
            f"expected a worker to {what}, but the task was cancelled, or the scheduler is gone: "
            "connect again, then start again; nothing was written"
        ) from error
    except Exception as error:
        if isinstance(error, TimeoutError) and future.status != "error":
            return None
        error.add_note(f"while a worker was to {what}")
        raise
    if isinstance(result, Failed):
        result.error.add_note(f"while a worker was to {what}")
        raise result.error
    return result


def _checked_resources(client: Client) -> dict[str, float] | None:
    """Return what a task takes of a worker: its GPU, where all have one."""
    try:
        found = client.run(cluster_tasks.introduce)
    except Exception as error:  # whatever an import raises there
        raise ClusterError(
            f"expected clipbranches_widget {__version__} on all workers, got {error!r}: install it "
            "there"
        ) from error
    others = {address: version for address, (version, _) in found.items() if version != __version__}
    if others:
        raise ClusterError(
            f"expected clipbranches_widget {__version__} on all workers, as here, got {others}: "
            "install the same version everywhere"
        )
    return {"GPU": 1} if all(n_gpus >= 1 for _, n_gpus in found.values()) else None


def _check_seen(skipped: Skipped, root: Path | None) -> None:
    """Raise ClusterError if a worker could read no image of a chunk, but this machine can."""
    uri, reason = skipped[0]
    try:
        load(uri, root=root)
    except (ImageReadError, OSError, ValueError, RuntimeError):
        return
    raise ClusterError(
        f"expected workers to read the images, but {uri} can be read here and not there "
        f"({reason}): put the images where all workers see them under the same path"
    )


def _skipped(folder: Path) -> Skipped:
    import pyarrow.parquet as pq

    columns = pq.read_table(folder / SKIPPED_FILE).to_pydict()
    return list(zip(columns["uri"], columns["reason"], strict=True))
