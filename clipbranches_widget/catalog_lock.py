"""One writer at a time on a catalog (layer 3): `append`, `remove`, `compact` and the others.

``catalog.lock`` in the catalog's folder is locked while a writer works, and says who that is. The
lock dies with the process; the file may stay after a kill, and is then taken over. Readers never
look at it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from clipbranches_widget.errors import CatalogError
from clipbranches_widget.storage import try_lock

LOCK_FILE = "catalog.lock"

ORIGIN_FILE = "origin.json"
"""Beside the folder of a catalog that was fetched from a URL; see `catalog_store`."""

NOT_AT_A_URL = (
    "expected a catalog in a folder, got one at a URL, which is not changed in place: copy it with "
    "clipbranches_widget.copy_catalog(url, folder), change the copy, then copy that to a new URL"
)


@contextlib.contextmanager
def only_writer(folder: Path, what: str = "a change") -> Iterator[None]:
    """Hold the lock file of a catalog that is changed.

    The file is removed before it is unlocked, so whoever locks it then, locks a file that has no
    place any more, and must not go on.

    Parameters
    ----------
    folder
        Of the catalog.
    what
        Name of the change, for the error that a second writer gets.

    Raises
    ------
    CatalogError
        Another writer holds it, the folder cannot be written, or it is a copy of what is at a URL.
    """
    if (folder.parent / ORIGIN_FILE).is_file():
        raise CatalogError(NOT_AT_A_URL)
    path = folder / LOCK_FILE
    try:
        lock = path.open("a+b")
    except OSError as error:
        raise CatalogError(
            f"expected a catalog folder that can be written, got {error}: change a copy, or as "
            "its owner"
        ) from error
    with lock:
        if not (try_lock(lock) and _is_at(lock.fileno(), path)):
            raise CatalogError(
                f"expected no other writer on {folder}, got {_running(path)}: wait until it has "
                "finished, then try again; reading goes on meanwhile"
            )
        _sign(lock, what)
        try:
            yield
        finally:
            with contextlib.suppress(PermissionError):  # open files stay, on Windows
                path.unlink()


def _sign(lock: IO[bytes], what: str) -> None:
    """Say in the lock file who works."""
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    who = {"what": what, "process": os.getpid(), "computer": socket.gethostname(), "since": since}
    lock.truncate(0)
    lock.write(json.dumps(who).encode())
    lock.flush()


def _running(path: Path) -> str:
    """Return who works, as far as the lock file tells."""
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return (
            f"{who['what']} that runs in process {who['process']} on {who['computer']} since "
            f"{who['since']}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "one that runs"


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
