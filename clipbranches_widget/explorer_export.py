"""The Explorer's export panel (layer 6): write what is shown to files, copy the state as code.

Labels come in from a file that the browser sends as buffers of at most 1 MiB, ``labels {number,
name, n_bytes}`` each, until the bytes are complete.
"""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipbranches_widget.errors import ExportError, LabelError
from clipbranches_widget.explorer_part import Part, Progress
from clipbranches_widget.image_copy import CopiedImages, safe_name
from clipbranches_widget.result import Result

if TYPE_CHECKING:
    from clipbranches_widget.explorer_view import Contents
    from clipbranches_widget.labelled_rows import LabelledRows
    from clipbranches_widget.labels import LabelSet

SETS = {
    "result": "All matches",
    "hits": "Search",
    "yes": "Yes",
    "no": "No",
    "labels": "Yes and no, with labels",
}
"""What can be written: the rows of these tabs, and the labels."""

SUFFIXES = {
    "parquet": ".parquet",
    "csv": ".csv",
    "sheet": ".html",
    "images": "",
    "links": "",
    "imagefolder": "",
}
"""For each format the ending of its path; without one, a folder."""

MAX_LABELS_BYTES = 64 << 20
"""Largest file of labels that the browser sends."""

MAX_CODE_CHARS = 50_000
"""Longest code that is sent to the browser."""

PROGRESS_EVERY_S = 0.1


class ExportPart(Part):
    """The panel that writes tables, image files and contact sheets, and shows the code."""

    name = "export"
    _said = ""
    _imported = ""
    _upload: tuple[int, bytearray] = (0, bytearray())

    def state(self) -> dict[str, Any]:
        """Return what can be written, where to by default, the code, and what was written."""
        session, sizes = self.host.session, sizes_of_sets(self.host.contents)
        code = session.to_code()
        return {
            "sets": [{"name": name, "text": SETS[name], "n": n} for name, n in sizes.items()],
            "folder": str(Path.cwd()),
            "stem": _stem(session.query_text),
            "suffixes": SUFFIXES,
            "code": code if len(code) <= MAX_CODE_CHARS else "",
            "said": self._said,
            "imported": self._imported,
        }

    def closed(self) -> None:
        """Forget what was written and read: the panel was just closed."""
        self._said = self._imported = ""

    def on_save(self, data: dict[str, Any]) -> None:
        """Write `what` as `format` to `path`; `by_branch` and `overwrite` as for `Result`."""
        what, kind, path = (str(data.get(key, "")) for key in ("what", "format", "path"))
        if kind not in SUFFIXES:
            raise ExportError(f"expected one of the formats {', '.join(SUFFIXES)}, got {kind!r}")
        if not path.strip():
            raise ExportError("expected a path to write to, got none: type one")
        session = self.host.session
        shown = (
            session.export_labels() if what == "labels" else shown_result(self.host.contents, what)
        )
        options = {key: bool(data.get(key)) for key in ("by_branch", "overwrite")}
        place = with_suffix(path.strip(), SUFFIXES[kind])

        def save(progress: Progress, is_cancelled: Callable[[], bool]) -> None:
            cancel = threading.Event()
            report = _reporter(progress, is_cancelled, cancel)
            said = write(
                shown,
                kind,
                place,
                labels=session.labels,
                **options,
                progress=report,
                cancel=cancel,
            )
            self.host.post(self._tell, said)

        self.host.work("export", "Writing", save)

    def on_labels(self, data: dict[str, Any]) -> None:
        """Take a piece of a file of labels; take in the labels when it is complete."""
        number, n_bytes = int(data["number"]), int(data["n_bytes"])
        if not 0 < n_bytes <= MAX_LABELS_BYTES:
            raise LabelError(
                f"expected a file of labels of 1 byte to {MAX_LABELS_BYTES >> 20} MB, got "
                f"{n_bytes:,} bytes: read it in a cell with session.import_labels(path)"
            )
        if number != self._upload[0]:
            self._upload = number, bytearray()
        for piece in data.get("buffers", ()):
            self._upload[1].extend(piece)
        if len(self._upload[1]) < n_bytes:
            return
        content, self._upload = bytes(self._upload[1]), (0, bytearray())
        name = safe_name(str(data.get("name", "")), instead="labels.csv")

        def take_in(_progress: Progress, is_cancelled: Callable[[], bool]) -> None:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, name)
                file.write_bytes(content)
                if not is_cancelled():
                    done = self.host.session.import_labels(file)
                    self.host.post(self._tell_imported, f"{name}: {done}")

        self.host.work("export", "Reading labels", take_in)

    def _tell(self, said: str) -> None:
        self._said = said
        self.host.update(self)

    def _tell_imported(self, said: str) -> None:
        self._imported = said
        self.host.update(self)


def sizes_of_sets(contents: Contents) -> dict[str, int]:
    """Return how many rows each set has that can be written."""
    sizes = {name: len(contents.rows_of(name)) for name in SETS if name in contents.ranked}
    n_labelled = sizes.get("yes", 0) + sizes.get("no", 0)
    return sizes | {"labels": n_labelled} if n_labelled else sizes


def shown_result(contents: Contents, tab: str) -> Result:
    """Return the rows of a tab as a Result: with scores and rules where the tab's source has them.

    Raises
    ------
    ExportError
        There is no such tab.
    """
    if tab not in SETS or tab not in contents.ranked:
        raise ExportError(f"expected one of {', '.join(SETS)} that there is, got {tab!r}")
    rows = np.asarray(contents.rows_of(tab), dtype=np.int64)
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
    result: Result | LabelledRows,
    kind: str,
    place: Path,
    *,
    labels: LabelSet,
    by_branch: bool,
    overwrite: bool,
    progress: Progress,
    cancel: threading.Event,
) -> str:
    """Write a result in one of the formats of `SUFFIXES`, and say what was written where."""
    copy: Callable[..., CopiedImages] = result.copy_images
    sort: Callable[..., CopiedImages] = result.to_imagefolder
    if by_branch and isinstance(result, Result):
        copy, sort = partial(copy, by="branch"), partial(sort, by="branch")
    stop = {"progress": progress, "cancel": cancel}
    if kind in {"images", "links"}:
        return str(copy(place, link=kind == "links", overwrite=overwrite, **stop))
    if kind == "imagefolder":
        return str(sort(place, labels=labels, **stop))
    if kind == "sheet":
        if not isinstance(result, Result):
            raise ExportError("expected a table or images for the labels, got a contact sheet")
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
