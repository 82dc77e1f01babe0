"""Locks on open files, and flushing folders, on each operating system (layer 0)."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

_LOCK_BYTE = 2**40  # Windows locks are mandatory: lock a byte that is never read or written
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextlib.contextmanager
def locked(stream: io.FileIO, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of an open file; wait for it first. The lock dies with the process.

    Where the file system has no locks the block runs without one, after a RuntimeWarning.

    Parameters
    ----------
    stream
        The file.
    shared
        Let other shared locks in (not on Windows, where every lock is exclusive).

    Raises
    ------
    OSError
        If the lock cannot be had.
    """
    is_supported = True
    try:
        _lock(stream, shared=shared)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        is_supported = False
        warnings.warn(
            f"the file system of {stream.name!r} has no locks: use the file from one process "
            "at a time, or choose a path on a local disk",
            RuntimeWarning,
            stacklevel=3,
        )
    try:
        yield
    finally:
        if is_supported:
            _unlock(stream)


if sys.platform == "win32":
    import msvcrt

    def _lock(stream: io.FileIO, *, shared: bool) -> None:  # noqa: ARG001 - msvcrt has one kind
        stream.seek(_LOCK_BYTE)
        msvcrt.locking(stream.fileno(), msvcrt.LK_LOCK, 1)

    def _unlock(stream: io.FileIO) -> None:
        stream.seek(_LOCK_BYTE)
        msvcrt.locking(stream.fileno(), msvcrt.LK_UNLCK, 1)

    def sync_folder(path: Path) -> None:
        """Do nothing: Windows has no such call and needs none."""

    def hold(path: Path) -> int | None:
        """Keep a file from being deleted until the descriptor is closed; None if that fails."""
        try:
            return os.open(path, os.O_RDONLY | os.O_BINARY)
        except OSError:
            return None

    def delete_unless_held(path: Path) -> bool:
        """Delete a file that no process holds; return whether it is gone."""
        try:
            path.unlink(missing_ok=True)
        except PermissionError:
            return False
        return True

else:
    import fcntl

    def _lock(stream: io.FileIO, *, shared: bool) -> None:
        # flock, not lockf: it also keeps apart two objects of one process.
        fcntl.flock(stream, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)

    def _unlock(stream: io.FileIO) -> None:
        fcntl.flock(stream, fcntl.LOCK_UN)

    def sync_folder(path: Path) -> None:
        """Flush the folder's entry of a new file."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def hold(path: Path) -> int | None:
        """Keep a file from `delete_unless_held` until the descriptor is closed.

        None if that fails: the file is gone, or the file system has no locks.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)
        return None

    def delete_unless_held(path: Path) -> bool:
        """Delete a file that no process holds; return whether it is gone."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        except BlockingIOError:
            return False
        except OSError:  # no locks here: whoever reads the file has it mapped
            path.unlink()
        finally:
            os.close(descriptor)
        return True
