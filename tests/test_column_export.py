"""Exported columns agree with the index, and a branch selects the same rows wherever it is run."""

import sqlite3

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipbranches_widget import column_export
from clipbranches_widget.boxes import LeafBox
from clipbranches_widget.branch import Branch
from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.column_export import export_columns
from clipbranches_widget.column_model import ColumnModel
from clipbranches_widget.conditions import column_names, conditions_of, sql_identifier
from clipbranches_widget.errors import LabelError, QueryError
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.pool import LABELLED_TEXT
from clipbranches_widget.refine import refine

N_ROWS, DIM, N_CLUSTERS = 1_500, 24, 20


@pytest.fixture(scope="module")
def cluster():
    return np.random.default_rng(1).integers(0, N_CLUSTERS, N_ROWS)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory, cluster):
    """Four shards; every tenth row is a twin of the one before."""
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(N_CLUSTERS, DIM))
    embeddings = centres[cluster] + 0.7 * rng.normal(size=(N_ROWS, DIM))
    embeddings[10::10] = embeddings[9:-1:10]
    path = tmp_path_factory.mktemp("export") / "c.cbcat"
    return from_embeddings(embeddings.astype(np.float32), path, rows_per_shard=400)


@pytest.fixture(scope="module")
def index(catalog):
    return CatalogIndex(catalog)


@pytest.fixture(scope="module")
def table(catalog):
    return export_columns(catalog)


@pytest.fixture(scope="module")
def frame(table):
    return table.to_pandas()


@pytest.fixture(scope="module")
def database(table):
    """The exported table in SQLite, where REAL is double precision."""
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    row, *names = map(sql_identifier, table.column_names)
    declared = ", ".join(f"{name} REAL" for name in names)
    connection.execute(f'CREATE TABLE "columns" ({row} INTEGER PRIMARY KEY, {declared})')
    marks = ", ".join("?" * table.num_columns)
    lines = zip(*(column.to_pylist() for column in table.columns), strict=True)
    connection.executemany(f'INSERT INTO "columns" VALUES ({marks})', lines)
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def duck(catalog, tmp_path_factory):
    """DuckDB on the exported Parquet file: a connection and the file's path."""
    duckdb = pytest.importorskip("duckdb", reason="DuckDB is an optional cross-check")
    path = export_columns(catalog, tmp_path_factory.mktemp("duck") / "the columns.parquet")
    with duckdb.connect() as connection:
        yield connection, str(path)


def values_of(table):
    return np.stack([column.to_numpy() for column in table.columns[1:]])


def codes_of(values, edges):
    return np.stack(
        [np.searchsorted(*pair, side="right") for pair in zip(edges, values, strict=True)]
    )


def branch_of(box, index):
    model = index.model
    conditions = conditions_of(box, column_names(model.names), model.edges)
    return Branch(0, "any", 0, 0, 0, box, conditions)


@st.composite
def boxes(draw):
    """A box on up to five columns, from every row to a single code."""
    bounds = {}
    for column in draw(st.sets(st.integers(0, 15), max_size=5)):
        low, high = sorted((draw(st.integers(0, 256)), draw(st.integers(0, 256))))
        if low < high:
            bounds[column] = (low, high)
    return LeafBox.from_bounds(bounds)


MANY = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


# -- the same rows everywhere --------------------------------------------------------------------


@MANY
@given(box=boxes())
def test_a_box_selects_its_rows_in_pandas_and_sqlite(index, frame, database, box):
    expected = index.columns.in_boxes([box]).rows.tolist()
    branch = branch_of(box, index)
    assert frame.query(branch.to_pandas_query())["row"].tolist() == expected
    assert sorted(row for (row,) in database.execute(branch.to_sql("columns"))) == expected


@MANY
@given(box=boxes())
def test_a_box_selects_its_rows_in_duckdb(index, duck, box):
    connection, path = duck
    found = connection.execute(branch_of(box, index).to_sql(path)).fetchall()
    assert sorted(row for (row,) in found) == index.columns.in_boxes([box]).rows.tolist()


@pytest.mark.parametrize("asked", [(0, 0.1), (3, 0.5), (7, 0.8)])
def test_every_branch_of_a_round_selects_its_rows(index, cluster, frame, database, asked):
    wanted, threshold = asked
    members, others = np.flatnonzero(cluster == wanted), np.flatnonzero(cluster != wanted)
    labels = LabelSet([*members[:6], others[0]], others[1:8])
    result = refine(index, labels=labels, threshold=threshold)
    boxes = [branch.box for branch in result.branches]
    assert any(boxes)
    without = refine(index, labels=labels, threshold=threshold, off=[box for box in boxes if box])
    assert without.branches[-1].text == LABELLED_TEXT
    for answer in (result, without):
        check_branches(answer, index, frame, database)


def check_branches(result, index, frame, database):
    for branch in result.branches:
        if branch.box is None:
            expected = np.sort(result.rows[result.branch_ids == branch.id]).tolist()
            assert branch.rows == tuple(expected)
            assert branch.conditions == ()
        else:
            expected = index.columns.in_boxes([branch.box]).rows.tolist()
            assert branch.rows == ()
            assert branch.conditions
        assert len(expected) == branch.n_rows
        assert frame.query(branch.to_pandas_query())["row"].tolist() == expected
        assert [row for (row,) in database.execute(branch.to_sql("columns"))] == expected
        where = branch.to_sql()
        both = database.execute(f'SELECT count(*) FROM "columns" WHERE NOT ({where})').fetchone()
        assert both == (N_ROWS - len(expected),)


def test_every_image_and_no_image_are_rules_too(index, frame, database):
    everything = branch_of(LeafBox.from_bounds({}), index)
    nothing = Branch(0, "near your examples", 0, 0, 0)
    for branch, n_rows in ((everything, N_ROWS), (nothing, 0)):
        assert len(frame.query(branch.to_pandas_query())) == n_rows
        assert len(database.execute(branch.to_sql("columns")).fetchall()) == n_rows


def test_hostile_table_names_stay_names(index):
    sql = branch_of(LeafBox.from_bounds({0: (1, 256)}), index).to_sql('x"; DROP TABLE y; --')
    assert sql.startswith('SELECT "row" FROM "x""; DROP TABLE y; --" WHERE ')


# -- the table ------------------------------------------------------------------------------------


def test_the_table_has_rows_and_float32_columns_in_the_order_of_the_model(index, table):
    names = column_names(index.model.names)
    assert table.schema == pa.schema(
        [("row", pa.int64()), *((name, pa.float32()) for name in names)]
    )
    assert table["row"].to_pylist() == list(range(N_ROWS))


def test_values_are_the_similarities_and_have_the_stored_codes(catalog, index, table):
    values, stored = values_of(table), index.columns.codes(np.arange(N_ROWS))
    assert np.array_equal(codes_of(values, index.model.edges), stored)
    similarities = catalog.embeddings.astype(np.float64) @ index.model.anchors.T.astype(np.float64)
    np.testing.assert_allclose(values, similarities.T, atol=1e-6)


def test_values_keep_their_codes_where_sums_are_rounded_otherwise(catalog, index, monkeypatch):
    exact, rng = ColumnModel.values, np.random.default_rng(3)

    def rounded_otherwise(model, embeddings):
        values = exact(model, embeddings)
        return (values + rng.uniform(-1e-3, 1e-3, values.shape)).astype(np.float32)

    monkeypatch.setattr(ColumnModel, "values", rounded_otherwise)
    values, stored = values_of(export_columns(catalog)), index.columns.codes(np.arange(N_ROWS))
    assert np.array_equal(codes_of(values, index.model.edges), stored)


def test_values_that_are_no_number_get_one_of_their_code():
    edges = np.linspace(-1, 1, 255, dtype=np.float32)[None, :]
    values = np.float32([[np.nan, np.inf, -np.inf, 0.5]])
    codes = np.uint8([[255, 3, 9, 255]])
    clipped = column_export.clipped(values, codes, edges)
    assert np.array_equal(codes_of(clipped, edges), codes)


@pytest.mark.parametrize("rows", [[7], [1_499, 0, 401, 400, 401], range(399, 1_203), []])
def test_some_rows_come_ascending_and_once(catalog, table, index, rows):
    wanted = np.unique(np.array(rows, dtype=np.int64))
    some = export_columns(catalog, rows=rows)
    assert some["row"].to_pylist() == wanted.tolist()
    assert some.schema == table.schema
    values = values_of(some)
    assert np.array_equal(codes_of(values, index.model.edges), index.columns.codes(wanted))
    np.testing.assert_allclose(values, values_of(table)[:, wanted], atol=1e-6)


def test_the_rows_of_a_result_can_be_exported(catalog, index):
    result = refine(index, labels=LabelSet([1, 2, 3], [4]))
    assert export_columns(catalog, rows=result)["row"].to_pylist() == sorted(result)


def test_rows_that_are_not_there_are_refused(catalog, tmp_path):
    with pytest.raises(QueryError, match="expected row ids from 0 to 1499, got 1500"):
        export_columns(catalog, tmp_path / "c.parquet", rows=[3, 1500])
    with pytest.raises(LabelError, match="expected integer row ids"):
        export_columns(catalog, rows=[0.5])
    assert list(tmp_path.iterdir()) == []


# -- the file -------------------------------------------------------------------------------------


def test_the_file_holds_the_table(catalog, table, tmp_path):
    path = export_columns(catalog, tmp_path / "new" / "c.parquet")
    assert path == tmp_path / "new" / "c.parquet"
    assert pq.read_table(path).equals(table)
    assert export_columns(catalog, str(path), rows=[5, 3]) == path
    assert pq.read_table(path)["row"].to_pylist() == [3, 5]
    assert export_columns(catalog, path, rows=[]) == path
    assert pq.read_table(path).schema == table.schema
    assert [each.name for each in path.parent.iterdir()] == ["c.parquet"]


def test_the_file_is_written_by_row_groups(catalog, table, tmp_path, monkeypatch):
    monkeypatch.setattr(column_export, "BLOCK_ROWS", 128)
    monkeypatch.setattr(column_export, "GROUP_ROWS", 512)
    path = export_columns(catalog, tmp_path / "c.parquet")
    metadata = pq.ParquetFile(path).metadata
    sizes = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    assert sum(sizes) == N_ROWS
    assert 2 < len(sizes) <= 5
    assert max(sizes) <= 512
    assert pq.read_table(path)["row"].equals(table["row"])


def test_a_failure_on_the_way_leaves_what_was_there(catalog, tmp_path, monkeypatch):
    path = export_columns(catalog, tmp_path / "c.parquet", rows=[1])
    exact, n_blocks = ColumnModel.values, 0

    def break_down(model, embeddings):
        nonlocal n_blocks
        n_blocks += 1
        if n_blocks == 3:
            raise OSError("the disk went away")
        return exact(model, embeddings)

    monkeypatch.setattr(ColumnModel, "values", break_down)
    with pytest.raises(OSError, match="the disk went away"):
        export_columns(catalog, path)
    assert pq.read_table(path)["row"].to_pylist() == [1]
    assert [each.name for each in tmp_path.iterdir()] == ["c.parquet"]
