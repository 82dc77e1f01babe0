"""Writing an answer to files (layer 4): what `row_export` does, by branch, and a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Literal, get_args

from clipbranches_widget.contact_sheet import Sheet, Tile, sheet_html
from clipbranches_widget.errors import Cancelled, ExportError, ImageReadError
from clipbranches_widget.image_copy import CopiedImages, copy_images
from clipbranches_widget.imagefolder import label_folders, write_imagefolder
from clipbranches_widget.row_export import (
    Progress,
    RowExport,
    items_with,
    with_labels,
    written_file,
)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from clipbranches_widget.branch import Branch
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.labels import LabelSet
    from clipbranches_widget.result_groups import Groups

FolderBy = Literal["flat", "branch"]
UnlabelledBy = Literal["label", "branch"]

MAX_SHEET_CAPTION = 300
MAX_RULE_CHARS = 400
PROGRESS_STEP = 25
"""A picture in so many is reported."""


class ResultExport(RowExport):
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
        groups: Groups | None

        def branch_text(self, position: int) -> str:
            """See `Result`."""

    def to_arrow(self) -> pa.Table:
        """Return one line a row, in rank order, as an Arrow table: what `to_parquet` writes.

        Columns: row (int64), score and margin (float32), branch (string), of a grouped answer
        near_duplicates (int64, rows folded into this one), path, caption, width, height,
        content_hash and the user's columns, with the types that they have in the catalog.
        """
        import pyarrow as pa

        texts = [self.branch_text(position) for position in range(len(self.rows))]
        first = {
            "row": pa.array(self.rows),
            "score": pa.array(self.scores),
            "margin": pa.array(self.margins),
            "branch": pa.array(texts, pa.string()),
        }
        if self.groups is not None:
            first["near_duplicates"] = pa.array(self.groups.counts(self.rows))
        return items_with(self.catalog, self.rows, first)

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

    def to_imagefolder(
        self,
        folder: str | Path,
        *,
        labels: LabelSet | None = None,
        by: UnlabelledBy = "label",
        unlabelled: str | None = "unlabelled",
        link: bool = False,
        metadata: bool = True,
        progress: Progress | None = None,
        cancel: Event | None = None,
    ) -> CopiedImages:
        """Write the images into a folder for each label: yes, no, and one for those without.

        What `torchvision.datasets.ImageFolder` and Hugging Face's ``load_dataset(folder)`` read,
        and `Session.import_labels` reads back: move files between the folders, and import it. All
        file names differ, across the folders, and are made harmless as for `copy_images`. The
        folder appears complete or not at all.

        Parameters
        ----------
        folder
            A new folder, or an empty one.
        labels
            The labels, such as ``session.labels``; by default those that the round learned from,
            and for a search none.
        by
            "branch": the images without a label go into a folder for each branch of the round.
        unlabelled
            Folder of the images without a label; None leaves them out.
        link
            Make symbolic links to the files instead of copies.
        metadata
            Write ``metadata.jsonl``, a line an image with ``file_name``, ``label`` and the other
            columns, and a ``README.md`` that tells `datasets` to read all files.
        progress
            Called with a stage's name and the fraction done.
        cancel
            Set it to stop after the image in flight; nothing is left behind.

        Returns
        -------
        CopiedImages
            What was written, and what was left out with the reason, by row.

        Raises
        ------
        ExportError
            If the folder holds something or cannot be written, `unlabelled` is no name for one, or
            there are no branches to sort by.
        Cancelled
            If `cancel` was set.
        """
        if by not in get_args(UnlabelledBy):
            raise ExportError(f"expected by='label' or by='branch', got {by!r}")
        known = self._labels(labels)
        rows = self.rows.tolist()
        folders = label_folders(known, rows, unlabelled)
        if by == "branch" and unlabelled is not None:
            of_branches = _branch_folders(self)
            folders = [
                of_branches[at] if folder == unlabelled else folder
                for at, folder in enumerate(folders)
            ]
        return write_imagefolder(
            self.catalog,
            rows,
            folders,
            with_labels(self.to_arrow(), known),
            folder,
            metadata=metadata,
            link=link,
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


def tile_of(catalog: Catalog, row: int, *, size: int, max_caption: int) -> Tile:
    """Return a row as a tile without label, score and rule."""
    try:
        image = catalog.thumbnail(row, size=size)
    except ImageReadError:
        image = b""
    caption = catalog.caption(row)
    cut = caption if len(caption) <= max_caption else caption[: max_caption - 1] + "\u2026"
    return Tile(row, image, cut)


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
