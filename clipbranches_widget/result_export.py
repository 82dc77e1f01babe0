"""Writing an answer to files (layer 4): tables, image files, a contact sheet.

Everything is written under a temporary name and then renamed: a file is complete or not there.
Nothing that exists is replaced unless the caller says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Literal, get_args

from clipbranches_widget.contact_sheet import Sheet, Tile, sheet_html
from clipbranches_widget.errors import Cancelled, ExportError, ImageReadError
from clipbranches_widget.image_copy import CopiedImages, copy_images, make_folder
from clipbranches_widget.storage import atomic_file

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import NDArray

    from clipbranches_widget.branch import Branch
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.labels import LabelSet

Progress = Callable[[str, float], None]
FolderBy = Literal["flat", "branch"]

MAX_SHEET_CAPTION = 300
MAX_RULE_CHARS = 400
PROGRESS_STEP = 25
"""A picture in so many is reported."""

# What spreadsheets take for the start of a formula, also after characters that they skip, and the
# wide forms that some of them read alike.
_FORMULA = re.compile("^[\\s\\x00]*[=+\\-@\uff1d\uff0b\uff0d\uff20]|^[\\t\\r\\n]")


class ResultExport:
    """The part of `Result` that writes it to files."""

    __slots__ = ()

    if TYPE_CHECKING:
        catalog: Catalog
        kind: Literal["search", "refine"]
        rows: NDArray[np.int64]
        scores: NDArray[np.float32]
        margins: NDArray[np.float32]
        branch_ids: NDArray[np.int32]
        branches: tuple[Branch, ...]
        n_total: int
        query_text: str
        threshold: float
        seed: int
        notes: tuple[str, ...]
        labels: LabelSet | None

        def to_pandas(self) -> pd.DataFrame:
            """See `Result`."""

        def branch_text(self, position: int) -> str:
            """See `Result`."""

    def to_parquet(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write what `to_pandas` returns as a Parquet file; the catalog's columns keep their types.

        Parameters
        ----------
        path
            The file; its folder is made.
        overwrite
            Replace a file that is there.

        Returns
        -------
        Path
            Where the file is.

        Raises
        ------
        ExportError
            If a file is there and `overwrite` is False, or it cannot be written.
        """
        import pyarrow.parquet as pq

        with written_file(path, overwrite=overwrite) as (temporary, place):
            pq.write_table(_table(self), temporary, compression="zstd")
        return place

    def to_csv(
        self, path: str | Path, *, overwrite: bool = False, escape_formulas: bool = True
    ) -> Path:
        """Write what `to_pandas` returns as a CSV file: UTF-8, a header, as RFC 4180 has it.

        Parameters
        ----------
        path, overwrite
            As for `to_parquet`.
        escape_formulas
            Put an apostrophe before text that a spreadsheet would take for a formula: text that
            begins with ``=``, ``+``, ``-``, ``@``, a tab or a line break. Captions and file names
            can come from anyone, and a formula can send away what is in the sheet. False writes
            text as it is, for programs that only read values.

        Returns and raises as `to_parquet`.
        """
        frame = self.to_pandas()
        if escape_formulas:
            for name in frame.columns[[dtype.kind in "OUST" for dtype in frame.dtypes]]:
                frame[name] = frame[name].map(_escaped)
            frame.columns = [_escaped(name) for name in frame.columns]
        with written_file(path, overwrite=overwrite) as (temporary, place):
            # Any other line end, and the writer would not quote text that holds a return.
            frame.to_csv(temporary, index=False, encoding="utf-8", lineterminator="\r\n")
        return place

    def copy_images(
        self,
        folder: str | Path,
        *,
        by: FolderBy = "flat",
        link: bool = False,
        overwrite: bool = False,
        progress: Progress | None = None,
        cancel: Event | None = None,
    ) -> CopiedImages:
        """Copy the image files into a folder, or link to them.

        Files keep their names, made harmless where they are not; where several rows have the same
        name, each gets its row id. Drawings of the demo, which are no files, are written as PNG.
        Rows without an image file, and those whose name is taken, are left out with the reason.

        Parameters
        ----------
        folder
            Where to write; it is made. Nothing is ever written outside it.
        by
            "flat": all in `folder`; "branch": a folder for each branch of the round.
        link
            Make symbolic links to the files instead of copies.
        overwrite
            Replace files that are there.
        progress
            Called with a stage's name and the fraction done.
        cancel
            Set it to stop after the image in flight; what was written stays.

        Returns
        -------
        CopiedImages
            What was written, and what was left out with the reason, by row.

        Raises
        ------
        ExportError
            If the folder cannot be written, or `by` is not one of the two.
        Cancelled
            If `cancel` was set.
        """
        if by not in get_args(FolderBy):
            raise ExportError(f"expected by='flat' or by='branch', got {by!r}")
        folders = _branch_folders(self) if by == "branch" else []
        return copy_images(
            self.catalog,
            self.rows.tolist(),
            folder,
            folders=folders,
            link=link,
            overwrite=overwrite,
            progress=progress,
            cancel=cancel,
        )

    def contact_sheet(
        self,
        path: str | Path,
        *,
        max_images: int = 500,
        overwrite: bool = False,
        progress: Progress | None = None,
        cancel: Event | None = None,
    ) -> Path:
        """Write an HTML page with the pictures, the rules and the counts, to send or to print.

        One file that needs nothing else, without scripts; some 5 KB an image.

        Parameters
        ----------
        path, overwrite
            As for `to_parquet`.
        max_images
            Most pictures, best first; the page says how many it leaves out.
        progress, cancel
            As for `copy_images`.

        Returns
        -------
        Path
            Where the file is.

        Raises
        ------
        ExportError
            As `to_parquet`, or if `max_images` is below 1.
        Cancelled
            If `cancel` was set; no file is written then.
        """
        if max_images < 1:
            raise ExportError(f"expected max_images of at least 1, got {max_images}")
        with written_file(path, overwrite=overwrite) as (temporary, place):
            sheet = _sheet(self, max_images, progress, cancel)
            temporary.write_text(sheet_html(sheet), encoding="utf-8")
        return place


@contextmanager
def written_file(path: str | Path, *, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """Yield a temporary path to write, and where it will be once the block succeeds.

    Raises
    ------
    ExportError
        Something is there and `overwrite` is False, a folder is there, or writing fails.
    """
    place = Path(path).expanduser().absolute()
    if place.is_dir():
        raise ExportError(f"expected the path of a file, got a folder: {place}; add a file name")
    if place.exists() and not overwrite:
        raise ExportError(
            f"expected no file at {place}, found one: overwrite=True replaces it, or choose "
            "another path"
        )
    make_folder(place.parent)
    try:
        with atomic_file(place) as temporary:
            yield temporary, place
    except (ExportError, Cancelled):
        raise
    except OSError as error:
        raise ExportError(
            f"cannot write {place}: {error.strerror or error}: check the folder, the permissions "
            "and the free space, or choose another path"
        ) from error


def tile_of(catalog: Catalog, row: int, *, size: int, max_caption: int) -> Tile:
    """Return a row as a tile without label, score and rule."""
    try:
        image = catalog.thumbnail(row, size=size)
    except ImageReadError:
        image = b""
    caption = catalog.caption(row)
    cut = caption if len(caption) <= max_caption else caption[: max_caption - 1] + "\u2026"
    return Tile(row, image, cut)


def _table(result: ResultExport) -> pa.Table:
    """Return the table of `to_pandas` without the detour that makes missing integers floats."""
    import pyarrow as pa

    items = result.catalog.items.drop_columns(["row"]).take(result.rows)
    names = ["path" if name == "uri" else name for name in items.column_names]
    texts = [result.branch_text(position) for position in range(len(result.rows))]
    first = {
        "row": pa.array(result.rows),
        "score": pa.array(result.scores),
        "margin": pa.array(result.margins),
        "branch": pa.array(texts, pa.string()),
    }
    return pa.table(first | dict(zip(names, items.columns, strict=True)))


def _escaped(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def _branch_folders(result: ResultExport) -> list[str]:
    """Return for each row the name of its branch's folder."""
    if not result.branches:
        raise ExportError(
            "expected the result of a round for by='branch', got one without branches: use "
            "by='flat', or what session.refine() returns"
        )
    names = [
        f"R{branch.id + 1} {branch.text.replace('>=', 'from').replace('<', 'below')}"[:80]
        for branch in result.branches
    ]
    return [names[branch_id] for branch_id in result.branch_ids.tolist()]


def _sheet(
    result: ResultExport, max_images: int, progress: Progress | None, cancel: Event | None
) -> Sheet:
    n_rows = len(result.rows)
    n_shown = min(n_rows, max_images)
    tiles = []
    for position, row in enumerate(result.rows[:n_shown].tolist()):
        if cancel is not None and cancel.is_set():
            raise Cancelled("cancelled: no contact sheet was written")
        if progress is not None and position % PROGRESS_STEP == 0:
            progress("Drawing the contact sheet", position / n_shown)
        tiles.append(_tile(result, position, row))
    return Sheet(
        title=result.query_text or f"{n_rows:,} images of {result.catalog.path.stem}",
        facts=_facts(result, n_shown),
        rules=rule_lines(result.branches),
        notes=result.notes,
        tiles=tiles,
        n_left_out=n_rows - n_shown,
    )


def _tile(result: ResultExport, position: int, row: int) -> Tile:
    branch_id = int(result.branch_ids[position])
    return replace(
        tile_of(result.catalog, row, size=160, max_caption=MAX_SHEET_CAPTION),
        label=0 if result.labels is None else result.labels.get(row),
        score=f"{float(result.scores[position]):.3f}",
        rule=f"R{branch_id + 1}" if branch_id >= 0 else "",
    )


def rule_lines(branches: Sequence[Branch], limit: int | None = None) -> list[tuple[str, str]]:
    """Return name and text of the rules, with their counts."""
    return [(f"R{branch.id + 1}", str(branch)[:MAX_RULE_CHARS]) for branch in branches[:limit]]


def _facts(result: ResultExport, n_shown: int) -> list[str]:
    n_rows, labels = len(result.rows), result.labels
    what = "matching" if result.kind == "refine" else "nearest"
    of = f"of {result.n_total:,} images in {result.catalog.path.name}"
    facts = [f"{n_rows:,} {what} {of}; {n_shown:,} shown, best first"]
    if result.kind == "refine":
        facts.append(f"scores of at least {result.threshold:g}, seed {result.seed}")
    if labels is not None:
        facts.append(f"learned from {len(labels.positive):,} yes and {len(labels.negative):,} no")
    return facts
