"""Removed rows are nowhere, row ids stay, compact changes no answer; sessions go on."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clipbranches_widget as cb
from clipbranches_widget import shard_search
from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.catalog_map import CatalogMap
from clipbranches_widget.errors import CatalogCorruptError, CatalogError, LabelError, QueryError
from clipbranches_widget.explorer_view import Contents
from clipbranches_widget.manifest import Piece
from clipbranches_widget.removed_rows import is_among, nth_present, read_removed, save_removed
from clipbranches_widget.search import search
from clipbranches_widget.vector_index import EXACT_BELOW, exact_similarities, unit_query

DIM, N = 10, 240


def rows_of(n, seed=0):
    """Return rows around six centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(5).standard_normal((6, DIM))
    return centres[rng.integers(0, 6, n)] + 0.35 * rng.standard_normal((n, DIM))


def items(n):
    return pd.DataFrame({"uri": [f"{row}.png" for row in range(n)], "even": np.arange(n) % 2 == 0})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a catalog of one shard, whose columns the others get by growing."""
    folder = tmp_path_factory.mktemp("whole")
    return cb.from_embeddings(rows_of(N), folder / "a.cbcat", items=items(N))


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a catalog of eight shards of 30 rows."""
    made = cb.from_embeddings(rows_of(N)[:30], tmp_path / "a.cbcat", items=items(N)[:30])
    for start in range(30, N, 30):
        some = slice(start, start + 30)
        cb.append_embeddings(made.path, rows_of(N)[some], items=items(N)[some])
    return made.path


REMOVED = [0, 3, 29, 30, 31, 64, 127, 128, 239]


def round_of(catalog, path, **options):
    session = cb.Session(catalog, path)
    session.search(row=1, k=40)
    near = search(catalog, catalog.embeddings[1], 40).rows
    session.label(positive=near[:6], negative=near[-6:])
    return session, session.refine(**options)


def test_removed_rows_are_in_no_answer(folder, tmp_path):
    before = cb.open(folder)
    catalog = cb.remove(folder, REMOVED)
    assert (len(catalog), catalog.n_present) == (N, N - len(REMOVED))
    assert "231 images" in repr(catalog)
    assert catalog.info()["n_removed"] == len(REMOVED)
    assert not catalog.is_present[REMOVED].any()
    assert catalog.present_rows().tolist() == np.setdiff1d(range(N), REMOVED).tolist()
    catalog.verify()
    everything = search(catalog, np.ones(DIM), N)
    assert np.array_equal(np.sort(everything.rows), catalog.present_rows())
    session, result = round_of(catalog, tmp_path / "s.jsonl", threshold=0.05)
    assert not np.isin(REMOVED, result.rows).any()
    assert not np.isin(REMOVED, result.pool.rows).any()
    assert not np.isin(REMOVED, result.model.sample.rows).any()
    for branch in result.branches:
        if branch.box is not None:
            codes = session._results.index.columns.codes(catalog.present_rows())
            assert branch.n_rows == branch.box.contains(codes).sum()
    assert not np.isin(REMOVED, session.suggest(N).rows).any()
    audit = session.audit(N)
    assert not np.isin(REMOVED, audit.rows).any()
    assert sum(one.n_rows for one in audit.strata) + len(session.labels) == catalog.n_present
    assert session.filter({"even": True}) == 120 - sum(row % 2 == 0 for row in REMOVED)
    assert np.isin(Contents.of(session).ranked["catalog"], catalog.present_rows()).all()
    assert cb.export_columns(catalog)["row"].to_pylist() == catalog.present_rows().tolist()
    assert not np.isin(REMOVED, result.to_pandas()["row"]).any()
    assert len(search(before, np.ones(DIM), N)) == N  # what was open goes on as it was


@settings(max_examples=40)
@given(
    removed=st.sets(st.integers(0, N - 1), min_size=1, max_size=N - 1),
    k=st.integers(1, N),
    n_only=st.integers(0, N),
    scanned_below=st.sampled_from([0, EXACT_BELOW]),
)
def test_a_search_is_the_full_scan_of_the_rows_that_are_there(
    tmp_path_factory, removed, k, n_only, scanned_below
):
    folder = tmp_path_factory.mktemp("c")
    rows = rows_of(N)
    catalog = cb.from_embeddings(rows, folder / "a", rows_per_shard=90)
    catalog = cb.remove(catalog, removed)
    query = unit_query(rows_of(1, seed=k)[0], DIM)
    only = np.random.default_rng(k).permutation(N) < n_only if n_only else None
    allowed = catalog.is_present if only is None else catalog.is_present & only
    scores = exact_similarities(catalog.embeddings, query)
    expected = np.lexsort((np.arange(N), -scores))
    expected = expected[allowed[expected]][:k]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_search, "EXACT_BELOW", scanned_below)
        patch.setattr(shard_search, "_SCANNED_BELOW", scanned_below)
        found = search(catalog, query, k, only=only)
    if scanned_below:
        assert found.rows.tolist() == expected.tolist()
    assert allowed[found.rows].all()
    assert len(found) == len(expected)
    assert np.array_equal(found.scores, scores[found.rows])


@given(
    removed=st.sets(st.integers(0, N - 1), max_size=N - 1),
    rows_per_shard=st.sampled_from([240, 70]),
)
def test_boxes_hold_and_count_only_rows_that_are_there(tmp_path_factory, removed, rows_per_shard):
    folder = tmp_path_factory.mktemp("c")
    catalog = cb.from_embeddings(rows_of(N), folder / "a", rows_per_shard=rows_per_shard)
    _, result = round_of(catalog, folder / "s.jsonl")
    boxes = [branch.box for branch in result.branches if branch.box is not None]
    catalog = cb.remove(catalog, removed)
    index = CatalogIndex(catalog)
    present = catalog.present_rows()
    inside = [present[box.contains(index.columns.codes(present))] for box in boxes]
    for strategy in ("bits", "postings", "scan"):
        found = index.columns.in_boxes(boxes, strategy=strategy)
        assert found.counts.tolist() == [len(each) for each in inside]
        assert found.rows.tolist() == np.unique(np.concatenate(inside)).tolist()
        assert np.array_equal(index.columns.rows_in(boxes, strategy=strategy), found.rows)
    forest = result.model.forest
    margins = index.columns.margins(forest, present)
    for strategy in ("scan", "leaves"):
        above = index.columns.rows_above(forest, 0.0, strategy=strategy)
        assert above.rows.tolist() == present[margins > 0].tolist()


@pytest.mark.parametrize("rows_per_shard", [240, 90, 30])
def test_a_grown_catalog_answers_as_one_built_at_once(folder, tmp_path, rows_per_shard):
    """The same columns, 8, 3 or 1 shards: what is equal is all but the plan and the times."""
    _, grown = round_of(cb.open(folder), tmp_path / "grown.jsonl")
    compacted = cb.compact(folder, rows_per_shard=rows_per_shard)
    assert len(compacted.shards) == -(-N // rows_per_shard)
    compacted.verify()
    assert np.array_equal(compacted.embeddings, grown.catalog.embeddings)
    assert compacted.items.equals(grown.catalog.items)
    _, other = round_of(compacted, tmp_path / "other.jsonl")
    for name in ("rows", "scores", "margins", "branch_ids"):
        assert np.array_equal(getattr(other, name), getattr(grown, name))
    assert other.branches == grown.branches
    assert other.notes == grown.notes


def test_compact_erases_what_was_removed(folder, tmp_path):
    session, _ = round_of(cb.open(folder), tmp_path / "s.jsonl")
    catalog = cb.remove(folder, REMOVED)
    _, before = round_of(catalog, tmp_path / "a.jsonl")
    assert catalog.embeddings[REMOVED].any(axis=1).all()
    del catalog
    catalog = cb.compact(folder)
    catalog.verify()
    assert not catalog.embeddings[REMOVED].any()
    assert catalog.removed_rows.tolist() == REMOVED
    _, after = round_of(catalog, tmp_path / "b.jsonl")
    assert np.array_equal(after.rows, before.rows)
    assert cb.Session.open(session.path, catalog).labels == session.labels
    manifest = (folder / "catalog.json").read_bytes()
    cb.compact(folder)  # nothing to do
    assert (folder / "catalog.json").read_bytes() == manifest
    with pytest.raises(QueryError, match="direction"):
        search(catalog, catalog.embeddings[REMOVED[0]], 3)
    assert len(cb.append_embeddings(folder, rows_of(5)).catalog) == N + 5


def test_a_shard_of_removed_rows_only(folder):
    catalog = cb.remove(folder, range(30, 60))
    del catalog
    catalog = cb.compact(folder, rows_per_shard=30)
    catalog.verify()
    assert len(search(catalog, np.ones(DIM), N)) == N - 30


def test_an_open_catalog_keeps_its_files_until_it_is_gone(folder):
    reader = cb.open(folder)
    cb.compact(folder)
    assert len(search(reader, np.ones(DIM), 5)) == 5  # opens its indexes only now
    assert reader.items.num_rows == N
    del reader
    cb.remove(folder, 1)
    assert [path.name for path in (folder / "shards").iterdir()] == ["0008"]


def test_labels_on_removed_rows_are_ignored_with_a_note(folder, tmp_path):
    session, _ = round_of(cb.open(folder), tmp_path / "s.jsonl")
    yes = session.labels.positive[:2]
    catalog = cb.remove(folder, yes)
    resumed = cb.Session.open(session.path, catalog)
    assert resumed.labels == session.labels
    result = resumed.refine()
    assert not np.isin(yes, result.rows).any()
    assert len(result.labels) == len(session.labels) - 2
    assert "2 labelled images were removed from the catalog, and left out" in result.notes
    assert not np.isin(yes, Contents.of(resumed).ranked["yes"]).any()
    old = resumed.round(1)
    assert "images were removed from the catalog since" in old.notes[-1]


def test_sessions_and_concepts_say_what_is_new(folder, tmp_path):
    session, _ = round_of(cb.open(folder), tmp_path / "s.jsonl")
    concept = session.save_concept("near one")
    catalog = cb.append_embeddings(folder, rows_of(N)[:1]).catalog
    assert (
        "1 image was added to the catalog since"
        in cb.Session(catalog, session.path).result.notes[-1]
    )
    catalog = cb.append_embeddings(folder, rows_of(1300, seed=3)).catalog
    resumed = cb.Session.open(session.path, catalog)
    assert "1,301 images were added to the catalog since this round" in resumed.result.notes[-1]
    assert len(resumed.search(row=1, k=2000)) == N + 1301
    found = concept.apply(catalog)
    assert f"1,301 images are new since 'near one' was saved: rows from {N} on" in found.notes
    assert found.rows.max() >= N
    catalog = cb.remove(catalog, found.rows[:3])
    again = concept.apply(catalog)
    assert not np.isin(found.rows[:3], again.rows).any()
    assert concept.labels_in(catalog) == concept.labels


def test_the_map_has_no_place_for_new_and_removed_rows(tmp_path):
    folder = cb.from_embeddings(rows_of(60), tmp_path / "a", with_map=True).path
    reader = cb.open(folder)
    catalog = cb.append_embeddings(folder, rows_of(20)).catalog
    assert catalog.map.rows.tolist() == list(range(60))
    catalog = cb.remove(folder, [5, 70])
    assert catalog.map.rows.tolist() == [row for row in range(60) if row != 5]
    assert catalog.map.name != reader.map.name
    catalog = cb.build_map(folder)
    assert catalog.map.rows.tolist() == [row for row in range(80) if row not in {5, 70}]
    assert reader.map.rows.max() < 60


def test_what_cannot_be_removed(whole):
    with pytest.raises(CatalogError, match="expected to leave at least one row, got all 240"):
        cb.remove(whole, range(N))
    with pytest.raises(QueryError, match="expected row ids from 0 to 239"):
        cb.remove(whole, [N])
    with pytest.raises(LabelError, match="expected integer row ids"):
        cb.remove(whole, "1")
    with pytest.raises(CatalogError, match="expected rows_per_shard >= 1"):
        cb.compact(whole, rows_per_shard=0)
    assert cb.remove(whole, []).n_present == N


def test_a_damaged_list_of_removed_rows_is_found(folder, tmp_path):
    catalog = cb.remove(folder, REMOVED)
    file = folder / catalog.manifest.removed_file
    good = file.read_bytes()
    file.write_bytes(good[:-1] + b"\x09")
    with pytest.raises(CatalogCorruptError, match="removed-"):
        cb.open(folder)
    bad = save_removed(tmp_path, np.array([4, 4]))
    with pytest.raises(CatalogCorruptError, match="expected ascending row ids below 9"):
        read_removed(bad, 9)
    piece = Piece(1, "", "", (3, 3), "<i8")
    assert catalog.manifest.with_removed("removed-a.npy", piece).removed_file == "removed-a.npy"


@given(removed=st.sets(st.integers(0, 30), max_size=31))
def test_places_among_the_rows_that_are_there(removed):
    gone = np.array(sorted(removed), dtype=np.int64)
    present = np.setdiff1d(np.arange(31), gone)
    assert nth_present(np.arange(len(present)), gone).tolist() == present.tolist()
    assert is_among(np.arange(31), gone).tolist() == [row in removed for row in range(31)]
    places = CatalogMap("m", np.arange(31), np.zeros((31, 2), np.uint16), 31)
    assert places.without(gone).rows.tolist() == present.tolist()


@pytest.mark.parametrize("is_clustered", [False, True])
def test_many_shards_are_asked_for_their_share(tmp_path, rng, monkeypatch, is_clustered):
    """The graphs find nearly what a scan finds, also where one shard holds all of the answer."""
    monkeypatch.setattr(shard_search, "EXACT_BELOW", 0)
    monkeypatch.setattr(shard_search, "_SCANNED_BELOW", 0)
    rows = rng.standard_normal((6000, DIM))
    if is_clustered:
        rows[2000:2300] = rows[2000] + 0.4 * rng.standard_normal((300, DIM))
    catalog = cb.from_embeddings(rows, tmp_path / "a", rows_per_shard=1000)
    query = unit_query(rows[2000], DIM)
    best = np.argsort(-exact_similarities(catalog.embeddings, query), kind="stable")[:60]
    found = search(catalog, query, 60)
    assert "approximate" in found.notes[0]
    assert len(np.intersect1d(found.rows, best)) >= 54
