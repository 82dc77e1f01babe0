"""The event log of a session in use (layer 4): memory, file and observers kept in step.

Memory is one immutable `Replayed`, replaced in one assignment, so that an interrupt at any
moment leaves it whole: an event that reached the file but not memory is read back next time.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.errors import SessionFileError
from clipbranches_widget.integrity import identity
from clipbranches_widget.session_events import Action, Event
from clipbranches_widget.session_file import CatalogId, Line, Position, SessionFile
from clipbranches_widget.session_state import SessionState

_LOG = logging.getLogger(__name__)

Decision = tuple[Action, Mapping[str, Any]]
_CHANGES: Mapping[Action, str] = {"unlabel": "label"}


class Replayed(NamedTuple):
    """How far the file was read, and what it says."""

    state: SessionState
    events: tuple[Event, ...]
    position: Position


class SessionLog:
    """Every event of one session file, also those that other objects append to it.

    Thread-safe: one lock guards memory, the file's own lock keeps other processes away, and
    observers are called outside both.

    Parameters
    ----------
    file
        Where the events are.
    check
        Raises SessionFileError for a state that does not fit the catalog.
    """

    def __init__(self, file: SessionFile, check: Callable[[SessionState], None]) -> None:
        self._file = file
        self._check = check
        self._lock = threading.RLock()
        self._replayed = Replayed(SessionState(), (), Position())
        self._observers: dict[int, Callable[[str], object]] = {}
        self._observer_ids = itertools.count()

    @property
    def path(self) -> Path:
        """The session file."""
        return self._file.path

    @property
    def remembered(self) -> Replayed:
        """What memory holds, without a look at the file."""
        return self._replayed

    def latest(self) -> Replayed:
        """Read what others appended, and return everything.

        Raises
        ------
        SessionFileError
            If the file is damaged; memory stays as it was.
        """
        with self._lock:
            n_before = len(self._replayed.events)
            lines = self._file.read(self._replayed.position)
            if lines:
                self._replayed = self._replay(lines)
            replayed = self._replayed
        self._notify(replayed.events[n_before:])
        return replayed

    def commit(self, decide: Callable[[SessionState], Decision | None]) -> Event | None:
        """Append one event; return it once it is on the disk, or None if none was decided.

        Parameters
        ----------
        decide
            Gets the latest state, nobody else being able to change it meanwhile; returns an
            action and its parameters, or None to do nothing. Its errors pass through.

        Raises
        ------
        SessionFileError
            If the file is damaged or cannot be written; nothing has happened then.
        """
        new: Sequence[Event] = ()
        try:
            with self._lock:
                n_before = len(self._replayed.events)
                try:
                    return self._commit(decide)
                finally:
                    new = self._replayed.events[n_before:]
        finally:
            self._notify(new)

    def observe(self, callback: Callable[[str], object]) -> Callable[[], None]:
        """Call `callback` with the kind of change after each event; return what stops that."""
        with self._lock:
            number = next(self._observer_ids)
            self._observers[number] = callback

        def unobserve() -> None:
            with self._lock:
                self._observers.pop(number, None)

        return unobserve

    def _commit(self, decide: Callable[[SessionState], Decision | None]) -> Event | None:
        with self._file.exclusive(self._replayed.position) as log:
            self._replayed = self._replay(log.lines)
            state = self._replayed.state
            decision = decide(state)
            if decision is None:
                return None
            event = Event(state.last_id + 1, datetime.now(UTC), *decision)
            self._check(state.apply(event))
            self._replayed = self._replay([log.append(event.to_record())])
            return self._replayed.events[-1]

    def _replay(self, lines: Sequence[Line]) -> Replayed:
        """Return memory with `lines` applied; memory itself is not changed."""
        state, events, position = self._replayed
        new = []
        for line in lines:
            try:
                event = Event.from_record(line.record)
                state = state.apply(event)
                self._check(state)
            except SessionFileError as error:
                raise SessionFileError(
                    f"{self._file.path}, line {line.number}: {error}; or keep a copy of the "
                    "file, delete this line and those after it, and open it again"
                ) from error
            new.append(event)
            position = line.end
        return Replayed(state, (*events, *new), position)

    def _notify(self, events: Iterable[Event]) -> None:
        for event in events:
            with self._lock:
                callbacks = list(self._observers.values())
            for callback in callbacks:
                try:
                    callback(_CHANGES.get(event.action, event.action))
                except Exception:  # an observer's fault must not undo what is already on disk
                    _LOG.exception("an observer of the session failed: %r", callback)


def open_log(catalog: Catalog, path: str | Path | None) -> SessionLog:
    """Open the log of a catalog's session, and read it.

    Parameters
    ----------
    catalog
        What the session is about.
    path
        The file, made at once if it is not there; None for a new one in the user's data folder,
        made by the first event.

    Raises
    ------
    SessionFileError
        If the file is damaged, belongs to another catalog or cannot be made.
    """
    place = _new_path(catalog) if path is None else Path(path).expanduser().absolute()
    file = SessionFile(place, _catalog_id(catalog), _package_version())
    if path is not None:
        file.create()
    log = SessionLog(file, lambda state: _check_fits(state, catalog))
    log.latest()
    return log


def _check_fits(state: SessionState, catalog: Catalog) -> None:
    """Check that the labels and queries of a session file are possible in a catalog."""
    labels, queries = [state.labels], [state.query]
    if state.round is not None:
        labels.append(state.round.labels)
        queries.append(state.round.query)
    last = max(
        int(rows[-1]) for one in labels for rows in (one.positive, one.negative, [-1]) if len(rows)
    )
    if last >= len(catalog):
        raise SessionFileError(
            f"expected rows below {len(catalog)}, the length of {catalog.path}, got {last}: open "
            "the session with the longer catalog it was made on"
        )
    for query in queries:
        if query is not None and len(query.data) != 4 * catalog.dim:
            raise SessionFileError(
                f"expected a query embedding of dim {catalog.dim}, got {len(query.data) // 4}"
            )


def _catalog_id(catalog: Catalog) -> CatalogId:
    """Name a catalog by its content; its path is for people."""
    return CatalogId(identity(catalog.manifest), str(catalog.path), len(catalog))


def _new_path(catalog: Catalog) -> Path:
    from platformdirs import user_data_path

    folder = user_data_path("clipbranches_widget", appauthor=False) / "sessions"
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return folder / f"{catalog.path.stem}-{now}-{secrets.token_hex(2)}.jsonl"


def _package_version() -> str:
    from clipbranches_widget import __version__

    return __version__
