"""The Explorer's export panel (layer 6): write what is shown to files, copy the state as code."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipbranches_widget.errors import ExportError
from clipbranches_widget.explorer_part import Part, Progress
from clipbranches_widget.result import Result

if TYPE_CHECKING:
    from clipbranches_widget.explorer_view import Contents

SETS = {"result": "All matches", "hits": "Search", "yes": "Yes", "no": "No"}
"""What can be written: the rows of these tabs."""

SUFFIXES = {"parquet": ".parquet", "csv": ".csv", "sheet": ".html", "images": "", "links": ""}
"""For each format the ending of its path; without one, a folder."""

MAX_CODE_CHARS = 50_000
"""Longest code that is sent to the browser."""

PROGRESS_EVERY_S = 0.1


class ExportPart(Part):
    """The panel that writes tables, image files and contact sheets, and shows the code."""

    name = "export"
    _said = ""

    def state(self) -> dict[str, Any]:
        """Return what can be written, where to by default, the code, and what was written."""
        contents, session = self.host.contents, self.host.session
        code = session.to_code()
        return {
            "sets": [
                {"name": name, "text": text, "n": len(contents.ranked[name])}
                for name, text in SETS.items()
                if name in contents.ranked
            ],
            "folder": str(Path.cwd()),
            "stem": _stem(session.query_text),
            "suffixes": SUFFIXES,
            "code": code if len(code) <= MAX_CODE_CHARS else "",
            "said": self._said,
        }

    def closed(self) -> None:
        """Forget what was written: the panel was just closed."""
        self._said = ""

    def on_save(self, data: dict[str, Any]) -> None:
        """Write `what` as `format` to `path`; `by_branch` and `overwrite` as for `Result`."""
        what, kind, path = (str(data.get(key, "")) for key in ("what", "format", "path"))
        if kind not in SUFFIXES:
            raise ExportError(f"expected one of the formats {', '.join(SUFFIXES)}, got {kind!r}")
        if not path.strip():
            raise ExportError("expected a path to write to, got none: type one")
        result = shown_result(self.host.contents, what)
        options = {key: bool(data.get(key)) for key in ("by_branch", "overwrite")}
        place = with_suffix(path.strip(), SUFFIXES[kind])

        def save(progress: Progress, is_cancelled: Callable[[], bool]) -> None:
            cancel = threading.Event()
            report = _reporter(progress, is_cancelled, cancel)
            said = write(result, kind, place, **options, progress=report, cancel=cancel)
            self.host.post(self._tell, said)

        self.host.work("export", "Writing", save)

    def _tell(self, said: str) -> None:
        self._said = said
        self.host.update(self)


def shown_result(contents: Contents, tab: str) -> Result:
    """Return the rows of a tab as a Result: with scores and rules where the tab's source has them.

    Raises
    ------
    ExportError
        There is no such tab.
    """
    if tab not in SETS or tab not in contents.ranked:
        raise ExportError(f"expected one of {', '.join(SETS)} that there is, got {tab!r}")
    rows = np.asarray(contents.ranked[tab], dtype=np.int64)
    source = contents.hits if tab == "hits" else contents.result
    if source is None:
        source = contents.hits
    if source is None or not np.isin(rows, source.rows).all():
        return Result.from_search(
            contents.session.catalog,
            rows,
            np.full(len(rows), np.nan, dtype=np.float32),
            n_touched=0,
            seconds=0.0,
            query_text=contents.session.query_text,
        )
    order = np.argsort(source.rows, kind="stable")
    ranks = order[np.searchsorted(source.rows, rows, sorter=order)]
    return replace(
        source,
        rows=rows,
        scores=source.scores[ranks],
        margins=source.margins[ranks],
        branch_ids=source.branch_ids[ranks],
    )


def write(
    result: Result,
    kind: str,
    place: Path,
    *,
    by_branch: bool,
    overwrite: bool,
    progress: Progress,
    cancel: threading.Event,
) -> str:
    """Write a result in one of the formats of `SUFFIXES`, and say what was written where."""
    if kind in {"images", "links"}:
        copied = result.copy_images(
            place,
            by="branch" if by_branch else "flat",
            link=kind == "links",
            overwrite=overwrite,
            progress=progress,
            cancel=cancel,
        )
        return str(copied)
    if kind == "sheet":
        path = result.contact_sheet(place, overwrite=overwrite, progress=progress, cancel=cancel)
    elif kind == "csv":
        path = result.to_csv(place, overwrite=overwrite)
    else:
        path = result.to_parquet(place, overwrite=overwrite)
    rows = "row" if len(result) == 1 else "rows"
    return f"{len(result):,} {rows} written to {path}"


def with_suffix(path: str, suffix: str) -> Path:
    """Return a path with the ending of its format, which is added where it is missing.

    Examples
    --------
    >>> with_suffix("birds", ".csv").name, with_suffix("v1.2", ".csv").name
    ('birds.csv', 'v1.2.csv')
    """
    place = Path(path).expanduser()
    if not suffix or place.suffix.lower() == suffix:
        return place
    return place.with_name(place.name + suffix)


def _stem(query: str) -> str:
    """Return a file name made of the words of a query."""
    words = re.findall(r"\w+", query.lower())
    return "-".join(words)[:40].strip("-_") or "images"


def _reporter(
    progress: Progress, is_cancelled: Callable[[], bool], cancel: threading.Event
) -> Progress:
    """Return a progress that is shown ten times a second at most, and sets `cancel`."""
    last = 0.0

    def report(stage: str, fraction: float) -> None:
        nonlocal last
        if is_cancelled():
            cancel.set()
        now = time.monotonic()
        if now - last >= PROGRESS_EVERY_S:
            last = now
            progress(stage, fraction)

    return report
