"""Find every image of something in a big collection: text search, a few yes / no, readable boxes.

>>> import clipbranches_widget as cb
>>> catalog = cb.demo()                      # doctest: +SKIP
>>> session = cb.Session(catalog)            # doctest: +SKIP
>>> session.search("animals with wings")     # doctest: +SKIP
>>> cb.Explorer(session)                     # doctest: +SKIP

Names load when they are first used: importing this package imports nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from clipbranches_widget.branch import Branch
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.catalog_append import Appended, append, append_embeddings
    from clipbranches_widget.catalog_compact import compact
    from clipbranches_widget.catalog_remove import remove
    from clipbranches_widget.catalog_store import copy_catalog
    from clipbranches_widget.column_export import export_columns
    from clipbranches_widget.column_rebuild import rebuild_columns
    from clipbranches_widget.concept import Concept
    from clipbranches_widget.demo_catalog import demo
    from clipbranches_widget.diagnostics import doctor
    from clipbranches_widget.duplicate_search import near_duplicates
    from clipbranches_widget.encoder import OpenClipEncoder, bundled_encoder
    from clipbranches_widget.errors import ClipBranchesError
    from clipbranches_widget.explorer import Explorer
    from clipbranches_widget.ingest import from_embeddings, index
    from clipbranches_widget.labels import LabelSet
    from clipbranches_widget.map_build import build_map
    from clipbranches_widget.result import Result
    from clipbranches_widget.session import Session

    open = Catalog.open

_HOME = {
    "Appended": "catalog_append",
    "append": "catalog_append",
    "append_embeddings": "catalog_append",
    "compact": "catalog_compact",
    "copy_catalog": "catalog_store",
    "remove": "catalog_remove",
    "Concept": "concept",
    "export_columns": "column_export",
    "Branch": "branch",
    "Catalog": "catalog",
    "ClipBranchesError": "errors",
    "Explorer": "explorer",
    "LabelSet": "labels",
    "OpenClipEncoder": "encoder",
    "Result": "result",
    "Session": "session",
    "build_map": "map_build",
    "bundled_encoder": "encoder",
    "demo": "demo_catalog",
    "doctor": "diagnostics",
    "from_embeddings": "ingest",
    "index": "ingest",
    "near_duplicates": "duplicate_search",
    "open": "catalog",
    "rebuild_columns": "column_rebuild",
}

__all__ = [
    "Appended",
    "Branch",
    "Catalog",
    "ClipBranchesError",
    "Concept",
    "Explorer",
    "LabelSet",
    "OpenClipEncoder",
    "Result",
    "Session",
    "append",
    "append_embeddings",
    "build_map",
    "bundled_encoder",
    "compact",
    "copy_catalog",
    "demo",
    "doctor",
    "export_columns",
    "from_embeddings",
    "index",
    "near_duplicates",
    "open",
    "rebuild_columns",
    "remove",
]


def __getattr__(name: str) -> object:
    """Import a public name from its module when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOME[name]}")
    return module.Catalog.open if name == "open" else getattr(module, name)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted([*__all__, "__version__"])
