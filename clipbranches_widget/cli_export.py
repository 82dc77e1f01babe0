"""``clipbranches export`` (layer 6): the answer or the labels of a session, as files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipbranches_widget.errors import QueryError

if TYPE_CHECKING:
    from clipbranches_widget.row_export import RowExport

FORMATS = ("csv", "parquet", "imagefolder", "images")


def add_export(commands: Any) -> None:
    """Add the command to the subparsers of ``clipbranches``."""
    export = commands.add_parser("export", help="write the answer or the labels of a session")
    export.add_argument("session", type=Path, metavar="SESSION", help="session file")
    export.add_argument("out", type=Path, metavar="OUT", help="file, or new folder for images")
    export.add_argument(
        "--to",
        choices=FORMATS,
        help="csv or parquet tables (default by OUT's ending), imagefolder (a folder for each "
        "label, default for an OUT without an ending) or images (files alone)",
    )
    export.add_argument(
        "--labels", action="store_true", help="the labelled images, not the latest round's answer"
    )
    export.add_argument("--catalog", type=Path, help="where the catalog is (default: where it was)")
    export.add_argument("--overwrite", action="store_true", help="replace what is there")
    export.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.session import Session
    from clipbranches_widget.session_file import read_catalog_id

    out: Path = arguments.out
    to = arguments.to or {".csv": "csv", ".parquet": "parquet", "": "imagefolder"}.get(
        out.suffix.lower()
    )
    if to is None:
        raise QueryError(
            f"expected OUT to end in .csv or .parquet, or to be a folder without an ending, got "
            f"{out.name}: say what to write with --to"
        )
    catalog = Catalog.open(arguments.catalog or read_catalog_id(arguments.session).name)
    session = Session.open(arguments.session, catalog)
    rows: RowExport | None = session.export_labels() if arguments.labels else session.result
    if rows is None:
        raise QueryError(
            f"expected a session with a round, got {session}: --labels writes the labels"
        )
    if to == "imagefolder":
        if arguments.overwrite:
            raise QueryError("expected --overwrite only without imagefolder: delete the folder")
        print(rows.to_imagefolder(out, labels=session.labels))
    elif to == "images":
        print(rows.copy_images(out, overwrite=arguments.overwrite))
    else:
        write = rows.to_csv if to == "csv" else rows.to_parquet
        print(f"{len(rows.rows):,} rows written to {write(out, overwrite=arguments.overwrite)}")
    return 0
