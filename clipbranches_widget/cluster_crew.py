"""Send requests about shards to the workers of a Dask cluster, one task a worker (layer 4).

Which worker answers for a shard is decided by rendezvous hashing of their names, so that each
serves its own shards again and again and has them in memory, and only the shards of a lost worker
move. A worker that took more than its part, by threads, leaves shards to the next in line. That is
a preference: any worker can answer any request, so that the scheduler moves the tasks of one that
was lost, and the answer is the same.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import math
import pickle
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clipbranches_widget.cluster_client import check_client, import_distributed, worker_threads
from clipbranches_widget.errors import Cancelled, ClipBranchesError, ClusterError

if TYPE_CHECKING:
    from distributed import Client

    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.cluster_requests import ShardRequest

RETRIES = 2
JOIN_TRIES = 10
LOOK_EVERY_S = 0.5
LOOK_FOR_CANCEL_EVERY_S = 0.05
KNOW_WORKERS_S = 1.0
"""How long the list of workers is believed: a lost one costs no more than its page cache."""

_CANCELLED = (asyncio.CancelledError, concurrent.futures.CancelledError)


class Crew:
    """The workers that serve one catalog. Thread-safe.

    Parameters
    ----------
    catalog : Catalog
    client : Client

    Attributes
    ----------
    bytes_moved : int
        Of the requests that were sent and the answers that came back, so far.
    n_round_trips : int
        How many requests were sent, so far; one is for all workers that it concerns.
    """

    def __init__(self, catalog: Catalog, client: Client) -> None:
        self._client: Any = client
        self._catalog = catalog
        self._name = f"clipbranches-{catalog.path.name}-{uuid.uuid4().hex[:12]}"
        self._lock, self._joining = threading.Lock(), threading.Lock()
        self._has_joined = False
        self._workers: dict[str, int] = {}
        self._known_at = -math.inf
        self.bytes_moved = 0
        self.n_round_trips = 0

    def ask(self, request: ShardRequest) -> dict[int, Any]:
        """Return the answer of each shard, by its number.

        Raises
        ------
        ClusterError
            No workers, a closed client, a worker without the catalog's files, or a request that
            several workers died of.
        """
        answers: dict[int, Any] = {}
        for part in self.stream(request):
            answers |= part
        return answers

    def stream(
        self, request: ShardRequest, *, cancel: threading.Event | None = None
    ) -> Iterator[dict[int, Any]]:
        """Send a request and return its answers, those of each worker as they come.

        What is not consumed is cancelled. Raises as `ask`, and Cancelled when `cancel` is set.
        """
        with self._clear_errors():
            futures = self._submitted(request)
        return self._gathered(futures, cancel)

    def _submitted(self, request: ShardRequest) -> list[Any]:
        from clipbranches_widget.cluster_worker import serve

        self._join()
        sizes = {number: self._catalog.shards[number].n_rows for number in request.numbers}
        futures, n_bytes = [], 0
        for address, numbers in shares(sizes, self._known_workers()).items():
            part = request.only(numbers)
            n_bytes += packed_bytes(part)
            futures.append(
                self._client.submit(
                    serve,
                    self._name,
                    part,
                    workers=[address],
                    allow_other_workers=True,
                    pure=False,
                    retries=RETRIES,
                )
            )
        with self._lock:
            self.bytes_moved += n_bytes
            self.n_round_trips += 1
        return futures

    def _gathered(
        self, futures: Sequence[Any], cancel: threading.Event | None
    ) -> Iterator[dict[int, Any]]:
        distributed = import_distributed()
        every = LOOK_EVERY_S if cancel is None else LOOK_FOR_CANCEL_EVERY_S
        done: set[Any] = set()
        waiting, looked = set(futures), time.monotonic()
        del futures
        try:
            while waiting:
                with self._clear_errors():
                    try:
                        done, waiting = distributed.wait(waiting, every, "FIRST_COMPLETED")
                        answers = self._client.gather(list(done))
                    except TimeoutError:
                        answers = []
                    if cancel is not None and cancel.is_set():
                        raise Cancelled("the query was cancelled")
                    if not answers and time.monotonic() - looked > LOOK_EVERY_S:
                        worker_threads(self._client)
                        looked = time.monotonic()
                for answer in answers:
                    n_bytes = packed_bytes(answer)
                    with self._lock:
                        self.bytes_moved += n_bytes
                    yield answer
        finally:
            if waiting:
                with contextlib.suppress(Exception):
                    self._client.cancel(list(waiting))
            done, waiting = set(), set()  # an error keeps this frame, and would keep the answers

    def _join(self) -> None:
        """Have every worker serve the catalog, those that come later as well; once."""
        with self._joining:
            if self._has_joined:
                return
            from clipbranches_widget.cluster_worker import Served

            served = Served(self._name, self._catalog.path, self._catalog.manifest)
            for n_left in reversed(range(JOIN_TRIES)):
                worker_threads(self._client)
                try:
                    self._client.register_plugin(served, name=self._name)
                    break
                except (ImportError, AttributeError, TypeError) as error:
                    raise ClusterError(
                        "expected the same release of clipbranches_widget on every worker, got "
                        f"{type(error).__name__}: {error}: install it there, restart the workers"
                    ) from error
                except OSError:  # a worker was lost meanwhile
                    if not n_left:
                        raise
            weakref.finalize(self, _let_go, self._client, self._name).atexit = False
            self._has_joined = True

    def _known_workers(self) -> dict[str, int]:
        """Return the workers and their threads; waits for one where there is none."""
        with self._lock:
            if time.monotonic() - self._known_at < KNOW_WORKERS_S:
                check_client(self._client)
                return self._workers
        workers = worker_threads(self._client)
        with self._lock:
            self._workers, self._known_at = workers, time.monotonic()
        return workers

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Say what to do about what goes wrong between client and workers."""
        distributed = import_distributed()
        try:
            yield
        except ClipBranchesError:
            raise
        except distributed.KilledWorker as error:
            raise ClusterError(
                f"expected an answer, but several workers died of the request ({error}): give them "
                "more memory or look at their logs, then ask again; labels are kept"
            ) from error
        except _CANCELLED as error:
            check_client(self._client)
            raise ClusterError(
                "expected an answer, but the cluster dropped the request (it was restarted, or "
                "its scheduler was lost): ask again; labels are kept"
            ) from error
        except (OSError, RuntimeError, ValueError):
            check_client(self._client)  # closed meanwhile: that is the reason
            raise


def shares(sizes: Mapping[int, int], workers: Mapping[str, int]) -> dict[str, list[int]]:
    """Deal shards out to workers.

    Weighted rendezvous hashing (Thaler and Ravishankar, *Using name-based mappings to increase hit
    rates*, 1998) with bounded loads: each shard goes to the first worker of its own order that
    still has room, so that no worker has more than its part and half a shard.

    Parameters
    ----------
    sizes : mapping
        Rows of each shard, by its number.
    workers : mapping
        Threads of each worker, by its address; at least one worker.

    Returns
    -------
    dict
        Shard numbers, ascending, of each worker that has any.

    Examples
    --------
    >>> dealt = shares({0: 10, 1: 10, 2: 10, 3: 10}, {"one": 1, "other": 1})
    >>> sorted(map(len, dealt.values()))
    [2, 2]
    """
    n_threads = sum(workers.values())
    room = {address: sum(sizes.values()) * n / n_threads for address, n in workers.items()}
    dealt: dict[str, list[int]] = {}
    for number in sorted(sizes):
        order = sorted(workers, key=lambda address: _rank(address, workers[address], number))
        fits = (address for address in order if room[address] >= sizes[number] / 2)
        address = next(fits, max(order, key=lambda each: room[each] / workers[each]))
        room[address] -= sizes[number]
        dealt.setdefault(address, []).append(number)
    return dealt


def packed_bytes(value: object) -> int:
    """Return how many bytes a value has on its way."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return len(head) + sum(each.raw().nbytes for each in buffers)


def _rank(address: str, weight: int, number: int) -> float:
    """Return the place of a worker in the order of a shard: lower is earlier."""
    digest = hashlib.blake2b(f"{address} {number}".encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)
    return -math.log(uniform) / weight


def _let_go(client: Any, name: str) -> None:
    """Have the workers close the catalog, without waiting: this may run on any thread."""

    def unregister() -> None:
        with contextlib.suppress(Exception):
            if client.status == "running":
                client.unregister_worker_plugin(name)

    threading.Thread(target=unregister, name="clipbranches-let-go", daemon=True).start()
