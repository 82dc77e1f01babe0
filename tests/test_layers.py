"""A module imports only from lower layers, so that each can be read, tested and replaced alone."""

import ast
from pathlib import Path

import pytest

import clipbranches_widget

PACKAGE = Path(clipbranches_widget.__file__).parent

# Lowest first; modules of one line do not import each other.
LAYERS = [
    {"errors", "npy", "boxes", "file_lock", "teacher", "kept_threads", "stage_bars", "intervals"}
    | {"cli_text"},
    {"explorer_lanes", "round_clock", "kept_rows"},
    {"remote", "cluster_client"},
    {"archives", "cells", "openmoji"},
    {
        "storage",
        "images",
        "thumbnails",
        "labels",
        "manifest",
        "session_file",
        "conditions",
        "counts",
        "query_text",
        "row_filter",
        "audit_report",
        "contact_sheet",
        "label_values",
        "concept_values",
    },
    {"weights", "ranking", "trees", "vector_index", "column_model", "integrity", "array_build"}
    | {"map_layout", "source_table", "item_columns", "removed_rows", "catalog_lock"}
    | {"leader_groups"},
    {
        "open_clip_models",
        "shard_writer",
        "catalog_store",
        "catalog_map",
        "concept_file",
        "sorted_columns",
        "session_events",
        "tree_program",
        "tree_loops",
        "arrow_layout",
        "json_columns",
    },
    {"encoder", "branch", "column_build", "box_program", "box_loops", "shard"}
    | {"source_parquet", "source_tar"},
    {"catalog_items"},
    {"catalog_rows"},
    {"catalog", "array_kernels", "kernels", "embed", "session_state", "pool"}
    | {"source_datasets", "source_embeddings"},
    {"engine", "column_stats", "image_copy", "session_code", "sources", "known_content"}
    | {"shard_ask"},
    {"query_plan", "shard_search", "proposed_pairs", "embed_source"}
    | {"imagefolder", "huggingface_export", "fiftyone_export"},
    {"row_export"},
    {"duplicate_search", "query_answer"},
    {"result_groups"},
    {"result_export", "source_arrays", "order_check", "labelled_rows"},
    {"box_query", "label_files"},
    {"label_import"},
    {"index_protocol"},
    {"catalog_writer", "catalog_index", "concept_catalog", "session_log"},
    {"cluster_worker", "cluster_tasks"},
    {"cluster_requests", "cluster_ingest"},
    {"cluster_crew"},
    {"cluster"},
    {"open_index"},
    {"ingest", "distil", "column_rebuild", "column_export"},
    {"round_model", "demo_catalog", "map_build", "catalog_change"},
    {"catalog_append", "catalog_remove", "catalog_compact"},
    {"round_notes"},
    {"result"},
    {"search", "round_answer", "suggest"},
    {"refine"},
    {"session_results", "concept", "diagnostics"},
    {"session_view", "audit"},
    {"session_rules"},
    {"session_rounds"},
    {"session_advice"},
    {"session_search"},
    {"session_labels"},
    {"session"},
    {"explorer_view", "explorer_images"},
    {"explorer_part"},
    {"explorer_computed", "explorer_jobs"},
    {"explorer_suggest", "explorer_audit", "explorer_scores", "explorer_rounds", "explorer_map"},
    {
        "explorer_query",
        "explorer_zoom",
        "explorer_rules",
        "explorer_export",
        "explorer_groups",
        "explorer_picture",
        "app",
        "cli_catalogs",
        "cli_duplicates",
        "cli_export",
    },
    {"explorer", "cli"},
    {"__init__"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
LAZY = {
    "torch": {"encoder", "open_clip_models", "weights", "embed", "diagnostics"},
    "openTSNE": {"map_layout"},
    "fsspec": {"remote"},
    "open_clip": {"encoder", "open_clip_models", "weights"},
    "numba": {"kernels", "box_loops", "tree_loops"},
    "xgboost": {"trees"},
    "usearch": {"vector_index"},
    "ipyvuetify": {"explorer"},
    "ipywidgets": {"explorer"},
    "distributed": {"cluster_client", "cluster_crew", "cluster_ingest"}
    | {"cluster_worker", "catalog", "catalog_rows", "cluster", "ingest"},
}

EAGER = {
    "explorer",
    "kernels",
    "box_loops",
    "tree_loops",
    "cluster_worker",
}  # themselves imported late


def imports(module):
    """Yield (imported module, at the top level?) of every import statement."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in top
            yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)


def test_every_module_has_a_layer():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(LEVEL)


@pytest.mark.parametrize("module", sorted(LEVEL))
def test_imports_go_down(module):
    for name, _ in imports(module):
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if root == "clipbranches_widget" and target in LEVEL:
            assert LEVEL[target] < LEVEL[module], f"{module} imports {target}, which is not lower"


@pytest.mark.parametrize("module", sorted(LEVEL))
def test_heavy_packages_are_imported_in_one_place_and_late(module):
    for name, is_top in imports(module):
        root = name.partition(".")[0]
        if root in LAZY and module not in EAGER:
            assert not is_top, f"{module} imports {root} at the top"
        if root in LAZY:
            assert module in LAZY[root], f"{module} imports {root}"


def test_session_and_below_know_nothing_of_jupyter():
    for module, level in LEVEL.items():
        if level <= LEVEL["session"]:
            roots = {name.partition(".")[0] for name, _ in imports(module)}
            assert not roots & {"ipywidgets", "ipyvuetify", "IPython", "traitlets", "jupyterlab"}
