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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

_Answer = concurrent.futures.Future[dict[int, Any]]


@dataclass(frozen=True, slots=True)
class _Sent:
    """Part of a request, its task, and the worker it was meant for; None for any."""

    part: ShardRequest
    future: Any
    address: str | None


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
            waiting = self._submitted(request)
        return self._gathered(waiting, cancel)

    def _submitted(self, request: ShardRequest) -> dict[_Answer, _Sent]:
        self._join()
        sizes = {number: self._catalog.shards[number].n_rows for number in request.numbers}
        dealt = shares(sizes, self._known_workers())
        with self._lock:
            self.n_round_trips += 1
        return dict(self._send(request.only(each), address) for address, each in dealt.items())

    def _send(self, part: ShardRequest, address: str | None) -> tuple[_Answer, _Sent]:
        """Send part of a request, rather to this worker; returns what will be its answer."""
        from clipbranches_widget.cluster_worker import serve

        self._count_bytes(part)
        rather = {} if address is None else {"workers": [address], "allow_other_workers": True}
        future = self._client.submit(serve, self._name, part, pure=False, retries=RETRIES, **rather)
        answer = asyncio.run_coroutine_threadsafe(
            self._client.gather(future, asynchronous=True), self._client.loop.asyncio_loop
        )
        return answer, _Sent(part, future, address)

    def _count_bytes(self, value: object) -> None:
        n_bytes = packed_bytes(value)
        with self._lock:
            self.bytes_moved += n_bytes

    def _gathered(
        self, waiting: dict[_Answer, _Sent], cancel: threading.Event | None
    ) -> Iterator[dict[int, Any]]:
        every = LOOK_EVERY_S if cancel is None else LOOK_FOR_CANCEL_EVERY_S
        done: set[_Answer] = set()
        looked = time.monotonic()
        try:
            while waiting:
                with self._clear_errors():
                    done, _ = concurrent.futures.wait(waiting, every, "FIRST_COMPLETED")
                    answers = [each.result() for each in done]
                    if cancel is not None and cancel.is_set():
                        raise Cancelled("the query was cancelled")
                    if not answers and time.monotonic() - looked > LOOK_EVERY_S:
                        self._send_again(waiting)
                        looked = time.monotonic()
                for each in done:
                    del waiting[each]
                done = set()
                while answers:
                    self._count_bytes(answers[-1])
                    yield answers.pop()
        finally:
            if waiting:
                with contextlib.suppress(Exception):
                    self._client.cancel([sent.future for sent in waiting.values()])
            done, answers = set(), []  # an error keeps this frame, and would keep the answers
            waiting.clear()

    def _send_again(self, waiting: dict[_Answer, _Sent]) -> None:
        """Send to any worker what waits for one that is gone; raises where there is none.

        While no worker runs, the scheduler puts a task with a preference aside, and takes it up
        again for no other worker than that.
        """
        workers = worker_threads(self._client)
        for answer, sent in list(waiting.items()):
            if sent.address is not None and sent.address not in workers:
                again = self._send(sent.part, None)
                self._client.cancel([sent.future])
                del waiting[answer]
                waiting.update([again])

    def _join(self) -> None:
        """Have every worker serve the catalog, those that come later as well; once."""
        with self._joining:
            if self._has_joined:
                return
            from clipbranches_widget.cluster_worker import Served

            catalog = self._catalog
            served = Served(self._name, catalog.path, catalog.manifest, catalog.url)
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
