"""The command line ``clipbranches`` (layer 6): arguments in, text out, no numerics."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipbranches_widget import __version__
from clipbranches_widget.cli_catalogs import COLUMN_PARTS, COLUMNS_HELP, add_growth, add_index
from clipbranches_widget.cli_duplicates import add_duplicates
from clipbranches_widget.cli_export import add_export
from clipbranches_widget.cli_text import one_line
from clipbranches_widget.errors import ClipBranchesError, ExportError, QueryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clipbranches_widget.result import Result

QUICKSTART = "quickstart.ipynb"
TABLE_SUFFIXES = (".csv", ".parquet")
OUT_HELP = "write the answer as a table, .parquet or .csv, replacing what is there"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 an error that was explained, 2 usage."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except ClipBranchesError as error:
        print(f"clipbranches: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("clipbranches: stopped", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clipbranches",
        description="Find every image of something: build, search and explore image catalogs.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="build the demo catalog if it is missing, open JupyterLab on the quickstart"
    )
    demo.add_argument("--no-browser", action="store_true", help="print the address instead")
    demo.add_argument("--port", type=int, default=8888, help="first port to try (default 8888)")
    demo.add_argument(
        "--folder",
        type=Path,
        default=Path("clipbranches-demo"),
        help="where the notebooks are copied to (default ./clipbranches-demo)",
    )
    demo.set_defaults(run=_demo)

    add_index(commands)

    info = commands.add_parser("info", help="say what a catalog holds, as JSON")
    info.add_argument("catalog", metavar="CATALOG")
    info.add_argument("--verify", action="store_true", help="read every file, check its checksum")
    info.set_defaults(run=_info)

    columns = commands.add_parser(
        "columns", help="change how much of its column index a catalog stores"
    )
    columns.add_argument("catalog", metavar="CATALOG")
    columns.add_argument("--parts", choices=COLUMN_PARTS, required=True, help=COLUMNS_HELP)
    columns.add_argument("--quiet", action="store_true", help="no progress bar")
    columns.set_defaults(run=_columns)

    map_of = commands.add_parser("map", help="compute the map of a catalog")
    map_of.add_argument("catalog", metavar="CATALOG")
    map_of.add_argument("--quiet", action="store_true", help="no progress bar")
    map_of.set_defaults(run=_map)

    add_growth(commands)

    search = commands.add_parser("search", help="print the images nearest to a text")
    search.add_argument("catalog", metavar="CATALOG")
    search.add_argument("text", metavar="TEXT")
    search.add_argument("-k", type=int, default=10, help="how many (default 10)")
    search.set_defaults(run=_search)

    apply = commands.add_parser(
        "apply", help="find the images of a saved concept in a catalog, without training"
    )
    apply.add_argument("concept", type=Path, metavar="CONCEPT", help="from session.save_concept")
    apply.add_argument("catalog", metavar="CATALOG")
    apply.add_argument("--threshold", type=float, help="lowest score, 0 to 1 (default its own)")
    apply.add_argument("--out", type=Path, help=OUT_HELP)
    apply.add_argument("-k", type=int, help="how many, best first (default 10; with --out all)")
    apply.set_defaults(run=_apply)

    _add_sessions(commands)

    doctor = commands.add_parser("doctor", help="say what is installed and what is wrong with it")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_sessions(commands: Any) -> None:
    add_export(commands)
    add_duplicates(commands)
    app = commands.add_parser(
        "app", help="serve the Explorer as a web page without cells (needs voila)"
    )
    app.add_argument("catalog", metavar="CATALOG")
    app.add_argument(
        "--session", type=Path, help="session file, resumed if it is there (default: a new one)"
    )
    app.add_argument("--no-browser", action="store_true", help="print the address instead")
    app.add_argument("--port", type=int, default=8866, help="first port to try (default 8866)")
    app.set_defaults(run=_app)


def _demo(arguments: argparse.Namespace) -> int:
    from jupyterlab.labapp import LabApp

    from clipbranches_widget.demo_catalog import demo

    catalog = demo()
    print(catalog)
    folder = copy_notebooks(arguments.folder)
    options = [
        f"--ServerApp.root_dir={folder}",
        f"--LabApp.default_url=/lab/tree/{QUICKSTART}",
        f"--port={arguments.port}",
    ]
    if arguments.no_browser:
        options.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        print("clipbranches: running as root, so JupyterLab is told to allow it", file=sys.stderr)
        options.append("--allow-root")
    LabApp.launch_instance(argv=options)
    return 0


def copy_notebooks(folder: Path) -> Path:
    """Copy the package's notebooks into `folder`; files that are there already are kept."""
    folder = folder.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for notebook in sorted(_notebooks().glob("*.ipynb")):
        if not (folder / notebook.name).exists():
            shutil.copyfile(notebook, folder / notebook.name)
    return folder


def _notebooks() -> Path:
    """Return the folder of notebooks: inside an installed package, or beside a checkout's."""
    package = Path(__file__).parent
    for folder in (package / "notebooks", package.parent / "notebooks"):
        if (folder / QUICKSTART).is_file():
            return folder
    raise ClipBranchesError(
        f"expected {QUICKSTART} beside the package in {package}, found none: "
        "install clipbranches_widget again"
    )


def _info(arguments: argparse.Namespace) -> int:
    from clipbranches_widget.catalog import Catalog

    catalog = Catalog.open(arguments.catalog)
    if arguments.verify:
        catalog.verify()
    print(json.dumps(catalog.info(), indent=2, ensure_ascii=False, default=str))
    return 0


def _columns(arguments: argparse.Namespace) -> int:
    from clipbranches_widget.column_rebuild import rebuild_columns

    catalog = rebuild_columns(
        arguments.catalog, columns=arguments.parts, progress=not arguments.quiet
    )
    print(catalog)
    print(f"column index: {arguments.parts}, {catalog.manifest.column_bytes:,} bytes")
    return 0


def _map(arguments: argparse.Namespace) -> int:
    from clipbranches_widget.map_build import build_map

    catalog = build_map(arguments.catalog, progress=not arguments.quiet)
    print(catalog)
    print(catalog.map)
    return 0


def _search(arguments: argparse.Namespace) -> int:
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.encoder import load_encoder
    from clipbranches_widget.search import query_vector, search

    catalog = Catalog.open(arguments.catalog)
    vector, words = query_vector(catalog, load_encoder(catalog.encoder_info), text=arguments.text)
    hits = search(catalog, vector, arguments.k, query_text=words)
    _print_rows(hits)
    return 0


def _apply(arguments: argparse.Namespace) -> int:
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.concept import Concept

    out, k = arguments.out, arguments.k
    if out is not None and out.suffix not in TABLE_SUFFIXES:
        raise QueryError(f"expected --out to end in {' or '.join(TABLE_SUFFIXES)}, got {out}")
    if k is not None and k < 1:
        raise QueryError(f"expected -k of at least 1, got {k}")
    if out is not None and not out.parent.is_dir():
        raise ExportError(f"cannot write {out}: no folder {out.parent}: make it, or choose another")
    concept = Concept.load(arguments.concept)
    result = concept.apply(Catalog.open(arguments.catalog), threshold=arguments.threshold)
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if out is None:
        _print_rows(result[: 10 if k is None else k])
        return 0
    if out.suffix == ".csv":
        result[:k].to_csv(out, overwrite=True)
    else:
        result[:k].to_parquet(out, overwrite=True)
    print(result)
    return 0


def _print_rows(result: Result) -> None:
    catalog = result.catalog
    for row, score in zip(result.rows.tolist(), result.scores.tolist(), strict=True):
        said = map(one_line, (catalog.uri(row), catalog.caption(row)))
        print(f"{score:.4f}", row, *said, sep="\t")


def _app(arguments: argparse.Namespace) -> int:
    from clipbranches_widget.app import serve
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.session import Session

    session = Session(Catalog.open(arguments.catalog), arguments.session)
    print(f"session file: {session.path}", flush=True)
    serve(session, port=arguments.port, open_browser=not arguments.no_browser)
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from clipbranches_widget.diagnostics import doctor

    print(doctor())
    return 0
