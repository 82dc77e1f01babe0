"""The command ``clipbranches duplicates`` (layer 6): arguments in, text out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from clipbranches_widget.cli_text import one_line


def add_duplicates(commands: Any) -> None:
    """Add the command to those of the command line."""
    parser = commands.add_parser(
        "duplicates", help="print groups of images that are nearly the same"
    )
    parser.add_argument("catalog", type=Path, metavar="CATALOG")
    parser.add_argument(
        "--similarity",
        type=float,
        help="lowest similarity to the first image of the group (default 0.96)",
    )
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write a table instead, replacing what is there"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_duplicates)


def _duplicates(arguments: argparse.Namespace) -> int:
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.duplicate_search import DEFAULT_SIMILARITY, near_duplicates

    asked = arguments.similarity
    similarity = DEFAULT_SIMILARITY if asked is None else asked
    catalog = Catalog.open(arguments.catalog)
    found = near_duplicates(catalog, similarity=similarity, progress=not arguments.quiet)
    if arguments.csv is not None:
        found.to_csv(arguments.csv, overwrite=True)
    else:
        names = ("representative", "row", "similarity", "path", "caption")
        columns = (found.to_arrow().column(name).to_pylist() for name in names)
        for first, row, alike, path, caption in zip(*columns, strict=True):
            said = map(one_line, (path or "", caption or ""))
            print(first, row, f"{alike:.4f}", *said, sep="\t")
    print(found)
    return 0
