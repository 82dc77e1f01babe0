"""A catalog on a worker of a Dask cluster (layer 4): the shards that were asked for, kept open.

Each worker opens the catalog's files at the same path as the client, by the client's manifest, so
that all see the same rows whatever a writer does meanwhile. A request names the shards it is about
and any worker can answer it: where one is lost, another maps the same files.

Dask takes pages of files that are mapped for memory of the worker, and pauses and restarts it over
them. So files are closed when much is in use, and when nobody has asked for long: nothing tells a
worker of clients that ended.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from distributed import WorkerPlugin, get_worker

from clipbranches_widget import __version__
from clipbranches_widget.box_query import ColumnIndex
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.catalog_index import ShardIndex
from clipbranches_widget.catalog_store import folder_at
from clipbranches_widget.engine import EngineLoader
from clipbranches_widget.errors import CatalogCorruptError, ClipBranchesError, ClusterError
from clipbranches_widget.integrity import check_shard_files

if TYPE_CHECKING:
    from clipbranches_widget.manifest import Manifest

S = TypeVar("S")
T = TypeVar("T")

KEPT_OPEN_S = 600.0
"""How long the files of a catalog stay open that nobody asks for, while others are asked for."""

MAX_USED = 0.5
"""Part of a worker's memory limit from which on no file stays open after a request."""

N_GROUPS_KEPT = 4
"""Groups of shards whose column index stays open: one, until workers come or go."""

SERVED_FILES = ("embeddings.npy", "vectors.usearch", "codes.npy", "offsets.npy")
"""Files of a shard that its answers come from; the other parts of the column index only speed
them up, and may have been dropped since."""


class Request(Protocol):
    """What is asked of shards."""

    def answer(self, served: Served) -> dict[int, Any]:
        """Return the answer of each shard, by its number."""


class Served(WorkerPlugin):
    """A catalog on one worker. Thread-safe.

    Parameters
    ----------
    name : str
        Of the plugin; unique.
    path : Path
        The catalog's folder, the same on all machines.
    manifest : Manifest
        As the client read it.
    url : str, optional
        Where a machine that has no such folder fetches the catalog from, once, into its cache.
    """

    _catalog: Catalog | None
    _shards: dict[int, ShardIndex]
    _groups: dict[tuple[int, ...], ColumnIndex]

    def __init__(self, name: str, path: Path, manifest: Manifest, url: str | None = None) -> None:
        self.name = name
        self._path, self._manifest, self._version = path, manifest, __version__
        self._url = url

    def setup(self, worker: Any) -> None:
        """Get ready; nothing is opened before it is asked for, so nothing can fail here."""
        self._address, self._n_threads = worker.address, worker.state.nthreads
        self._lock = threading.RLock()
        self._n_users, self._used_at = 0, time.monotonic()
        self._start_empty()
        self.loader = EngineLoader()
        self.loader.start()

    def teardown(self, worker: Any) -> None:  # noqa: ARG002 - the signature is distributed's
        """Let go of the files."""
        with self._lock:
            self._pool.shutdown(wait=False)
            self._start_empty()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Keep the files that are opened meanwhile."""
        with self._lock:
            self._n_users += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_users -= 1
                self._used_at = time.monotonic()

    def let_go(self, unused_s: float = 0.0) -> None:
        """Close the files, unless they are in use, or were within so many seconds."""
        with self._lock:
            if not self._n_users and time.monotonic() - self._used_at >= unused_s:
                self.teardown(None)

    @property
    def catalog(self) -> Catalog:
        """The catalog, opened when first asked for.

        Raises
        ------
        ClusterError
            There is none at its path, or the worker has another release of the package.
        """
        with self._lock:
            if self._catalog is None:
                self._catalog = self._opened()
            return self._catalog

    def shard(self, number: int) -> ShardIndex:
        """Return one shard, its files checked once; raises ClusterError where they differ."""
        with self._lock:
            if number not in self._shards:
                shard = self.catalog.shards[number]
                try:
                    check_shard_files(
                        self.catalog.path, self._manifest.shards[number], SERVED_FILES
                    )
                except CatalogCorruptError as error:
                    raise ClusterError(
                        f"expected on worker {self._address} the files that the client has: {error}"
                    ) from error
                self._shards[number] = ShardIndex(self.catalog, shard, self._manifest.n_columns)
            return self._shards[number]

    def columns(self, numbers: Iterable[int]) -> ColumnIndex:
        """Return the column index of some shards."""
        group = tuple(sorted(numbers))
        with self._lock:
            if group not in self._groups:
                if len(self._groups) == N_GROUPS_KEPT:
                    del self._groups[next(iter(self._groups))]
                shards = [self.shard(number) for number in group]
                self._groups[group] = ColumnIndex(
                    [each.columns for each in shards],
                    n_threads=self._n_threads,
                    removed=self.catalog.removed_rows,
                    first_rows=[each.shard.first_row for each in shards],
                    loader=self.loader,
                )
            return self._groups[group]

    def each(self, work: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """Return what `work` gives for each item, computed on the worker's threads."""
        if self._n_threads == 1 or len(items) < 2:
            return [work(item) for item in items]
        return list(self._pool.map(work, items))

    def _start_empty(self) -> None:
        self._catalog, self._shards, self._groups = None, {}, {}
        self._pool = ThreadPoolExecutor(self._n_threads, thread_name_prefix="clipbranches-shards")

    def _opened(self) -> Catalog:
        if self._version != __version__:
            raise ClusterError(
                f"expected clipbranches_widget {self._version} on worker {self._address}, found "
                f"{__version__}: install the same release everywhere and restart the workers"
            )
        return Catalog(self._folder(), self._manifest)

    def _folder(self) -> Path:
        """Return where the catalog is on this machine; fetches one that came from a URL."""
        if self._path.is_dir():
            return self._path
        if self._url is None:
            raise ClusterError(
                f"expected the catalog {self._path} on worker {self._address}, found no folder: "
                "all machines need it at the same path, on shared storage or as a copy"
            )
        try:
            return folder_at(self._url)
        except ClipBranchesError as error:
            why = str(error)
        raise ClusterError(  # outside of the handler: what the driver raised may not travel
            f"expected worker {self._address} to fetch {self._url}, but it could not: {why}"
        )


def serve(name: str, request: Request) -> dict[int, Any]:
    """Answer a request on the worker that runs this, from the catalog served under a name.

    Raises
    ------
    ClusterError
        It is not served here, or its files are not those of the client.
    """
    worker = get_worker()
    served = worker.plugins.get(name)
    if not isinstance(served, Served):
        raise ClusterError(
            f"expected worker {worker.address} to serve {name}, but it does not: open the catalog "
            "again with cb.open(path, client=client)"
        )
    try:
        with served.used():
            return request.answer(served)
    finally:
        limit = worker.memory_manager.memory_limit
        is_much = limit and worker.monitor.get_process_memory() > MAX_USED * limit
        for each in list(worker.plugins.values()):
            if isinstance(each, Served):
                each.let_go(0.0 if is_much else KEPT_OPEN_S)
