"""Lines of items: a large catalog reads groups of them, and they are those of the whole table."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import clipbranches_widget as cb
from clipbranches_widget import catalog_items
from clipbranches_widget.errors import QueryError

N_ROWS = 500


@pytest.fixture
def catalog(tmp_path, monkeypatch):
    """Return a catalog of five shards in groups of 30 rows, with columns of several types."""
    rng = np.random.default_rng(0)
    kinds = pa.array(rng.choice(["cat", "dog", "newt"], N_ROWS)).dictionary_encode()
    items = pa.table(
        {
            "uri": [f"{row}.jpg" for row in range(N_ROWS)],
            "caption": [f"picture {row}" if row % 7 else None for row in range(N_ROWS)],
            "kind": kinds,
            "price": rng.random(N_ROWS),
            "tags": [[str(row), "x"] for row in range(N_ROWS)],
        }
    )
    vectors = rng.standard_normal((N_ROWS, 8))
    path = cb.from_embeddings(vectors, tmp_path / "a.cbcat", items=items, rows_per_shard=110).path
    for file in path.glob("shards/*/items.parquet"):
        pq.write_table(pq.read_table(file), file, row_group_size=30)
    monkeypatch.setattr("clipbranches_widget.catalog.check_catalog", lambda *_: None)
    monkeypatch.setattr(catalog_items, "ROWS_READ_WHOLE", 0)
    return cb.open(path)


@pytest.mark.parametrize("names", [None, ["uri"], ["kind", "tags", "row"]])
def test_lines_are_those_of_the_table_in_the_order_asked(catalog, names):
    rng = np.random.default_rng(1)
    for n in (1, 3, 200):
        rows = rng.integers(0, N_ROWS, n)
        found = catalog.lines(rows, names)
        expected = catalog.items.take(pa.array(rows))
        assert (
            found.to_pylist() == (expected if names is None else expected.select(names)).to_pylist()
        )
        catalog = cb.open(catalog.path)  # whose table is not in memory
    assert catalog.lines([], names).num_rows == 0
    assert catalog.lines(np.arange(N_ROWS)).equals(cb.open(catalog.path).items)


def test_only_what_is_asked_for_is_read(catalog):
    assert catalog.uri(123) == "123.jpg"
    assert catalog.caption(8) == "picture 8"
    kept = {(number, group, name) for number, group, name in catalog.item_store._kept}
    assert kept == {(1, 0, "uri"), (0, 0, "caption")}
    assert "table" not in catalog.item_store.__dict__


def test_exports_imports_and_duplicates_read_lines_alone(catalog, tmp_path):
    session = cb.Session(catalog, tmp_path / "s.jsonl")
    session.label(positive=[3, 450], negative=[200])
    out = session.export_labels().to_csv(tmp_path / "l.csv")
    again = cb.Session(catalog, tmp_path / "t.jsonl")
    assert again.import_labels(out).matched["row"] == 3
    paths = session.export_labels().to_pandas()[["path", "label"]]
    assert again.import_labels(paths, by="path").matched["path"] == 3
    assert again.labels == session.labels
    assert cb.near_duplicates(catalog, rows=[7, 300, 8], similarity=0.1).n_compared == 3
    assert "table" not in catalog.item_store.__dict__


def test_what_is_kept_is_bounded(catalog, monkeypatch):
    monkeypatch.setattr(catalog_items, "KEPT_BYTES", 2_000)
    for row in range(N_ROWS):
        assert catalog.uri(row) == f"{row}.jpg"
    store = catalog.item_store
    assert 0 < sum(column.nbytes for column in store._kept.values()) <= 2_000
    assert store._kept_bytes == sum(column.nbytes for column in store._kept.values())


def test_columns_are_read_alone(catalog):
    table = catalog.item_store.columns(["price"])
    assert table.column_names == ["price"]
    assert table.num_rows == N_ROWS
    assert catalog.item_store.schema.names == catalog.items.column_names


def test_unknown_rows_are_named(catalog):
    with pytest.raises(QueryError, match="expected row ids from 0 to 499, got 500"):
        catalog.lines([3, 500])
