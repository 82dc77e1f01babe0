"""The commands that make and change catalogs: index, append, remove, compact (layer 6)."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from clipbranches_widget.cli_text import one_line
from clipbranches_widget.errors import QueryError

PRETRAINED = "laion2b_s34b_b79k"
SOURCE_HELP = (
    "folder of images, Parquet, Arrow, WebDataset .tar or .zip files, a saved Hugging Face data "
    "set, .npy embeddings or a clip-retrieval folder; a path, a pattern or a URL"
)
COLUMN_PARTS = ("full", "bits", "codes")
COLUMNS_HELP = (
    "how much of the column index to store: full (9 bytes per image and column, fastest), bits (5) "
    "or codes (1); answers are the same, but slower with less"
)


def add_index(commands: Any) -> None:
    """Add ``clipbranches index`` to the subparsers of ``clipbranches``."""
    index = commands.add_parser("index", help="embed images into a new catalog")
    index.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    index.add_argument("catalog", metavar="CATALOG", help="new folder, NAME.cbcat, or its URL")
    index.add_argument("--model", help="open_clip model (default ViT-B-32)")
    index.add_argument(
        "--pretrained",
        default=PRETRAINED,
        help="open_clip tag or a checkpoint file (default laion2b_s34b_b79k)",
    )
    index.add_argument(
        "--demo-encoder",
        action="store_true",
        help="use the bundled demo model for icons: offline, but not meant for photographs",
    )
    index.add_argument("--batch-size", type=int, default=64, help="images a batch (default 64)")
    _add_source_options(index)
    index.add_argument("--columns", choices=COLUMN_PARTS, default="full", help=COLUMNS_HELP)
    index.add_argument("--no-map", action="store_true", help="do not compute the map")
    index.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    index.add_argument(
        "--scheduler", metavar="ADDRESS", help="work on the workers of this Dask scheduler"
    )
    index.add_argument("--quiet", action="store_true", help="no progress bar")
    index.set_defaults(run=_index)


def _add_source_options(index: argparse.ArgumentParser) -> None:
    index.add_argument(
        "--image-column", metavar="NAME", help="column with the image bytes, paths or URLs"
    )
    index.add_argument("--caption-column", metavar="NAME", help="column with the captions")
    index.add_argument(
        "--items", metavar="TABLE", help="Parquet or Arrow file, a line for each row of .npy files"
    )
    index.add_argument(
        "--check-order",
        type=int,
        default=0,
        metavar="N",
        help="embed N images again and compare with the embeddings of their rows, such as 32",
    )


def add_growth(commands: Any) -> None:
    """Add ``append``, ``remove`` and ``compact`` to the subparsers of ``clipbranches``."""
    append = commands.add_parser(
        "append", help="add images to a catalog, but for those that it has already"
    )
    append.add_argument("catalog", metavar="CATALOG")
    append.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    append.add_argument("--batch-size", type=int, default=64, help="images a batch (default 64)")
    _add_source_options(append)
    append.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    append.add_argument("--quiet", action="store_true", help="no progress bar")
    append.set_defaults(run=_append)

    remove = commands.add_parser("remove", help="hide images of a catalog for good")
    remove.add_argument("catalog", metavar="CATALOG")
    remove.add_argument("rows", type=int, nargs="+", metavar="ROW", help="row ids")
    remove.set_defaults(run=_remove)

    compact = commands.add_parser(
        "compact", help="join the small shards of a catalog and erase removed images"
    )
    compact.add_argument("catalog", metavar="CATALOG")
    compact.add_argument("--quiet", action="store_true", help="no progress bar")
    compact.set_defaults(run=_compact)


def _index(arguments: argparse.Namespace) -> int:
    from clipbranches_widget.ingest import BUNDLED, index, make_encoder

    model = BUNDLED if arguments.demo_encoder else arguments.model
    device = arguments.device if arguments.scheduler is None else None
    encoder = None
    if model is not None:  # named, so that embeddings are known to be its own
        encoder = make_encoder(model, arguments.pretrained, device)
    with _client(arguments.scheduler) as client:
        catalog = index(
            arguments.source,
            arguments.catalog,
            pretrained=arguments.pretrained if encoder is None else PRETRAINED,
            encoder=encoder,
            items=arguments.items,
            image_column=arguments.image_column,
            caption_column=arguments.caption_column,
            check_order=arguments.check_order,
            batch_size=arguments.batch_size,
            columns=arguments.columns,
            device=arguments.device if encoder is None or client is not None else None,
            client=client,
            progress=not arguments.quiet,
            with_map=not arguments.no_map,
        )
    print(catalog)
    for uri, reason in zip(*catalog.skipped.to_pydict().values(), strict=True):
        print(f"skipped {one_line(uri)}: {one_line(reason)}", file=sys.stderr)
    return 0


def _client(scheduler: str | None) -> AbstractContextManager[Any]:
    if scheduler is None:
        return nullcontext()
    from clipbranches_widget.cluster_client import connected

    client: AbstractContextManager[Any] = connected(scheduler)
    return client


def _append(arguments: argparse.Namespace) -> int:
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.catalog_append import append, append_embeddings
    from clipbranches_widget.encoder import load_encoder
    from clipbranches_widget.sources import find

    kind = find(arguments.source).kind
    columns = {
        "image_column": arguments.image_column,
        "caption_column": arguments.caption_column,
    }
    if kind in ("npy", "clip-retrieval"):
        encoder = None
        if arguments.check_order:
            info = Catalog.open(arguments.catalog).encoder_info
            encoder = load_encoder(info, device=arguments.device)
        added = append_embeddings(
            arguments.catalog,
            arguments.source,
            items=arguments.items,
            encoder=encoder,
            check_order=arguments.check_order,
            progress=not arguments.quiet,
            **columns,
        )
    elif arguments.items is not None or arguments.check_order:
        raise QueryError("expected --items and --check-order only with embeddings: drop them")
    else:
        added = append(
            arguments.catalog,
            arguments.source,
            batch_size=arguments.batch_size,
            device=arguments.device,
            progress=not arguments.quiet,
            **columns,
        )
    for uri, reason in zip(*added.skipped.to_pydict().values(), strict=True):
        print(f"skipped {one_line(uri)}: {one_line(reason)}", file=sys.stderr)
    print(added)
    print(added.catalog)
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    from clipbranches_widget.catalog_remove import remove

    print(remove(arguments.catalog, arguments.rows))
    return 0


def _compact(arguments: argparse.Namespace) -> int:
    from clipbranches_widget.catalog_compact import compact

    print(compact(arguments.catalog, progress=not arguments.quiet))
    return 0
