"""A Dask cluster to work on: what is given is checked, workers are listed (layer 1).

`dask.distributed` is the engine, and optional: it is imported here, and only when it is asked for.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from clipbranches_widget.errors import ClusterError, MissingPackageError

if TYPE_CHECKING:
    from distributed import Client

WAIT_FOR_WORKERS_S = 30.0
"""How long to wait for a worker where there is none: one that was lost is started again."""

CONNECT_TIMEOUT_S = 10.0


def import_distributed() -> ModuleType:
    """Return the `distributed` package.

    Raises
    ------
    MissingPackageError
        It is not installed.
    """
    try:
        import distributed
    except ImportError as error:
        raise MissingPackageError(
            "expected the package distributed for work on a cluster, but it is not installed: "
            "pip install 'clipbranches_widget[dask]'"
        ) from error
    return distributed


def check_client(client: Client) -> None:
    """Check that a client can be used: it is one, for plain code, and still open.

    Raises
    ------
    MissingPackageError
        `distributed` is not installed.
    ClusterError
        Not a client, an asynchronous one, or a closed one.
    """
    distributed = import_distributed()
    if not isinstance(client, distributed.Client):
        raise ClusterError(
            f"expected a dask.distributed Client, got {type(client).__name__}: "
            "client = distributed.Client(address), or distributed.Client() for this machine"
        )
    if client.asynchronous:
        raise ClusterError(
            "expected a Client for plain code, got an asynchronous one: make another with "
            "distributed.Client(client.scheduler.address)"
        )
    if client.status != "running":
        raise ClusterError(
            f"expected an open Client, got one that is {client.status}: connect again with "
            "distributed.Client(address), and open the catalog again with it"
        )


def worker_threads(client: Client, *, wait_s: float = WAIT_FOR_WORKERS_S) -> dict[str, int]:
    """Return the address and the number of threads of each worker, in order of address.

    Parameters
    ----------
    client : Client
        Checked by `check_client`.
    wait_s : float
        How long to wait for the first, in seconds.

    Raises
    ------
    ClusterError
        The client is closed, the scheduler does not answer, or there is no worker.
    """
    check_client(client)
    untyped: Any = client
    try:
        threads = untyped.nthreads()
        if not threads:
            untyped.wait_for_workers(1, timeout=wait_s)
            threads = untyped.nthreads()
    except (OSError, TimeoutError) as error:
        raise ClusterError(
            f"expected a cluster with workers, found none within {wait_s:g} s ({error}): start "
            "some (dask worker ADDRESS, or cluster.scale(n)), then ask again; nothing is lost"
        ) from error
    return {address: int(threads[address]) for address in sorted(threads)}


def connected(address: str) -> Client:
    """Return a client of the scheduler at an address such as ``tcp://10.0.0.1:8786``.

    Raises
    ------
    ClusterError
        Nothing answers there.
    """
    try:
        client: Client = import_distributed().Client(address, timeout=CONNECT_TIMEOUT_S)
    except (OSError, ValueError, TimeoutError) as error:
        raise ClusterError(
            f"expected a Dask scheduler at {address}, got {error!r}: start one with dask scheduler "
            "and workers with dask worker ADDRESS, or name another"
        ) from error
    return client
