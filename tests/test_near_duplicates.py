"""Near-duplicates: against brute force, over shards and graphs, and folded inside answers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from word_encoder import WordEncoder, build_catalog

import clipbranches_widget as cb
from clipbranches_widget import duplicate_search, proposed_pairs
from clipbranches_widget.duplicate_search import compare
from clipbranches_widget.errors import QueryError, RefineError
from clipbranches_widget.leader_groups import leader_groups, pair_similarities

DIM = 24


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def similarity(one, two):
    """Return the cosine of two float16 rows as float32, from exact sums of whole numbers."""
    a, b = ((row.astype(np.float64) * 2**24).astype(np.int64) for row in (one, two))
    dot, aa, bb = (int(each) for each in (a @ b, a @ a, b @ b))
    return np.float32(dot / (aa * bb) ** 0.5)


def brute_force(embeddings, limit):
    """Group row by row, as the rule says, with exact similarities."""
    leaders, groups = [], []
    for place, row in enumerate(embeddings):
        found = [(float(similarity(row, embeddings[each])), -each) for each in leaders]
        alike = [each for each in found if each[0] >= np.float32(limit)]
        if alike:
            groups.append(-max(alike)[1])
        else:
            leaders.append(place)
            groups.append(place)
    return groups


def planted(rng, n_rows, n_copies, dim=64, noise=0.02):
    """Return random rows, of which the last ones are copies: (rows, copies, what they copy)."""
    rows = rng.standard_normal((n_rows, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    places = rng.permutation(n_rows)[: 2 * n_copies]
    copies, originals = places[:n_copies], places[n_copies:]
    rows[copies] = rows[originals] + noise / np.sqrt(dim) * rng.standard_normal((n_copies, dim))
    return unit(rows), copies, originals


def build(path, embeddings, *, n_shards=1, hashes=None):
    items = None
    if hashes is not None:
        names = [f"{row}.png" for row in range(len(embeddings))]
        items = pa.table({"uri": names, "content_hash": hashes})
    each = -(-len(embeddings) // n_shards)
    return cb.from_embeddings(embeddings, path, items=items, rows_per_shard=each)


small = st.integers(1, 3).flatmap(
    lambda n_centres: st.lists(
        st.tuples(
            st.integers(0, n_centres - 1), st.lists(st.integers(-3, 3), min_size=4, max_size=4)
        ),
        min_size=1,
        max_size=40,
    )
)


@given(small, st.sampled_from([0.5, 0.8, 0.95, 1.0]))
def test_leader_groups_are_the_rule_row_by_row(drawn, limit):
    centres = np.random.default_rng(1).standard_normal((3, 4))
    rows = unit(np.array([centres[which] + np.array(off) / 6 for which, off in drawn]) + 1e-3)
    assert leader_groups(rows, limit).leaders.tolist() == brute_force(rows, limit)


@given(st.integers(0, 2**32 - 1), st.integers(2, 1300), st.sampled_from([0.3, 0.6, 0.9]))
def test_members_are_near_their_leader_and_leaders_are_apart(seed, n_rows, limit):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n_rows // 5 + 1, 6))
    rows = unit(centres[rng.integers(0, len(centres), n_rows)] + rng.normal(0, 0.3, (n_rows, 6)))
    leaders, similarities = leader_groups(rows, limit)
    places = np.arange(n_rows)
    assert np.array_equal(leaders[leaders], leaders)
    assert (leaders <= places).all()
    assert np.array_equal(similarities, pair_similarities(rows, places, leaders))
    assert (similarities >= np.float32(limit)).all()
    own = np.flatnonzero(leaders == places)
    one, two = np.triu_indices(len(own), 1)
    assert (pair_similarities(rows, own[one], own[two]) < np.float32(limit)).all()


def test_blocks_do_not_matter(monkeypatch, rng):
    rows, *_ = planted(rng, 900, 300)
    whole = leader_groups(rows, 0.96)
    monkeypatch.setattr("clipbranches_widget.leader_groups.BLOCK_ROWS", 7)
    monkeypatch.setattr("clipbranches_widget.leader_groups._LEADERS_AT_ONCE", 50)
    pieces = leader_groups(rows, 0.96)
    assert np.array_equal(whole.leaders, pieces.leaders)
    assert np.array_equal(whole.similarities, pieces.similarities)


def test_similarities_are_exact_and_symmetric(rng):
    rows = unit(rng.standard_normal((20, 100)))
    one, two = np.triu_indices(20)
    found = pair_similarities(rows, one, two)
    assert np.array_equal(found, pair_similarities(rows, two, one))
    expected = [similarity(rows[a], rows[b]) for a, b in zip(one, two, strict=True)]
    assert found.tolist() == expected


def test_five_shards_give_what_one_gives(tmp_path, rng):
    embeddings, copies, originals = planted(rng, 500, 60)
    one = cb.near_duplicates(build(tmp_path / "one.cbcat", embeddings))
    five = cb.near_duplicates(build(tmp_path / "five.cbcat", embeddings, n_shards=5))
    assert len(five.catalog.shards) == 5
    assert five.is_exact
    for name in ("rows", "representatives", "similarities"):
        assert np.array_equal(getattr(one, name), getattr(five, name))
    pairs = np.sort(np.stack((copies, originals)), axis=0)
    assert set(zip(five.representatives.tolist(), five.rows.tolist(), strict=True)) == {
        *map(tuple, pairs.T.tolist()),
        *((row, row) for row in pairs[0].tolist()),
    }
    assert sorted(five.duplicates.tolist()) == sorted(pairs[1].tolist())
    assert len(five) == 60


@pytest.mark.parametrize("n_shards", [1, 3])
def test_graphs_find_planted_copies(tmp_path, rng, n_shards):
    embeddings, copies, originals = planted(rng, 6_000, 900)
    exact, noisy = slice(0, 300), slice(300, 900)
    embeddings[copies[exact]] = embeddings[originals[exact]]
    catalog = build(tmp_path / "c.cbcat", embeddings, n_shards=n_shards)
    found = cb.near_duplicates(catalog, exact=False)
    scanned = cb.near_duplicates(catalog)
    assert (found.is_exact, scanned.is_exact) == (False, True)
    stands_for = np.arange(6_000)
    stands_for[found.rows] = found.representatives
    is_found = stands_for[copies] == stands_for[originals]
    assert is_found[exact].mean() >= 0.99
    assert is_found[noisy].mean() >= 0.99
    assert (found.similarities >= np.float32(0.96)).all()
    assert len(np.setdiff1d(found.rows, scanned.rows)) == 0


def test_many_copies_of_one_image_are_one_group_in_the_graph(tmp_path, rng):
    embeddings, *_ = planted(rng, 3_000, 0)
    crowd = rng.permutation(3_000)[:400]
    near = embeddings[crowd[0]] + 0.02 / 8 * rng.standard_normal((400, 64))
    embeddings[crowd] = unit(near)
    embeddings[crowd[200:]] = embeddings[crowd[200]]
    found = cb.near_duplicates(build(tmp_path / "c.cbcat", embeddings, n_shards=2), exact=False)
    assert np.array_equal(found.rows, np.sort(crowd))
    assert set(found.representatives.tolist()) == {int(crowd.min())}


def test_equal_content_counts_as_equal_and_empty_hashes_do_not(tmp_path, rng):
    embeddings = unit(rng.standard_normal((6, DIM)))
    hashes = ["a", "", "b", "a", "", None]
    catalog = build(tmp_path / "c.cbcat", embeddings, hashes=hashes)
    for exact in (True, False):
        found = cb.near_duplicates(catalog, exact=exact)
        assert found.rows.tolist() == [0, 3]
        assert found.similarities.tolist() == [1.0, 1.0]


def test_removed_rows_are_in_no_group(tmp_path, rng):
    embeddings, *_ = planted(rng, 200, 0)
    embeddings[100:140] = embeddings[50]
    catalog = build(tmp_path / "c.cbcat", embeddings, n_shards=2)
    catalog = cb.remove(catalog, [50, *range(101, 139)])
    for exact in (True, False):
        assert cb.near_duplicates(catalog, exact=exact).rows.tolist() == [100, 139]
    assert cb.near_duplicates(catalog, rows=[139, 50, 100]).representatives.tolist() == [139, 139]
    compacted = cb.compact(catalog)
    for exact in (True, False):
        assert cb.near_duplicates(compacted, exact=exact).rows.tolist() == [100, 139]


def test_of_given_rows_the_first_represents(tmp_path, rng):
    embeddings, *_ = planted(rng, 100, 0)
    embeddings[[20, 30, 40]] = embeddings[10]
    catalog = build(tmp_path / "c.cbcat", embeddings)
    for exact in (True, False):
        found = cb.near_duplicates(catalog, rows=[40, 5, 20, 40, 10], exact=exact)
        assert found.rows.tolist() == [40, 20, 10]
        assert found.representatives.tolist() == [40, 40, 40]
        assert found.n_compared == 4
    assert len(cb.near_duplicates(catalog, rows=[])) == 0


def test_links_are_kept_few_and_say_the_same(monkeypatch, tmp_path, rng):
    embeddings, *_ = planted(rng, 1_500, 500)
    catalog = build(tmp_path / "c.cbcat", embeddings)
    rows = np.arange(1_500)
    before = compare(catalog, rows, 0.9, exact=False)
    links = proposed_pairs._Links(5)
    monkeypatch.setattr(proposed_pairs, "_MAX_LINKS", 1)
    for pair in ((0, 1), (3, 4), (1, 0)) * 20:
        links.add(*(np.array([each]) for each in pair))
    assert links.components().tolist() == [0, 0, 1, 2, 2]
    assert links._n_pairs <= 21
    after = compare(catalog, rows, 0.9, exact=False)
    assert np.array_equal(before.leaders, after.leaders)


@pytest.mark.parametrize("wrong", [0.0, -0.5, 1.01, float("nan")])
def test_a_similarity_outside_is_refused(tmp_path, rng, wrong):
    catalog = build(tmp_path / "c.cbcat", unit(rng.standard_normal((3, DIM))))
    with pytest.raises(QueryError, match="expected a similarity above 0 and up to 1"):
        cb.near_duplicates(catalog, similarity=wrong)


def test_the_table_names_what_stands_for_each_row(tmp_path, rng):
    embeddings, *_ = planted(rng, 10, 0)
    embeddings[7] = embeddings[2]
    items = pa.table({"caption": [f"c{n}" for n in range(10)], "similarity": list(range(10))})
    catalog = cb.from_embeddings(embeddings, tmp_path / "c.cbcat", items=items)
    found = cb.near_duplicates(catalog)
    frame = found.to_pandas()
    assert frame["row"].tolist() == [2, 7]
    assert frame["representative"].tolist() == [2, 2]
    assert frame["similarity"].tolist() == [1.0, 1.0]
    assert frame["source_similarity"].tolist() == [2, 7]
    assert frame["caption"].tolist() == ["c2", "c7"]
    assert frame.columns.is_unique
    assert "2 of 10 images in 1 groups" in repr(found)


# -- inside answers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A catalog of words: within a pair of words, rows are some .9 alike."""
    return build_catalog(tmp_path_factory.mktemp("words") / "words.cbcat", 600)


@pytest.fixture
def session(words, tmp_path):
    session = cb.Session(words, tmp_path / "s.jsonl", encoder=WordEncoder())
    hits = session.search("striped bird", k=200)
    session.label(positive=hits.rows[:5], negative=hits.rows[50:55])
    return session


LOW = 0.6


def check(grouped, whole, limit=LOW):
    """Check the promises of a grouped answer against exact similarities."""
    embeddings = whole.catalog.embeddings_of(whole.rows)
    place = {row: at for at, row in enumerate(whole.rows.tolist())}
    expected = brute_force(embeddings, limit)
    stands_for = {row: row for row in grouped.rows.tolist()}
    for row, others in grouped.groups.items():
        assert [place[each] for each in others.tolist()] == sorted(
            place[each] for each in others.tolist()
        )
        stands_for |= dict.fromkeys(others.tolist(), row)
    assert [place[stands_for[row]] for row in whole.rows.tolist()] == expected
    assert [place[row] for row in grouped.rows.tolist()] == sorted(set(expected))


def test_a_search_is_folded_into_its_best(session):
    hits = session.hits
    grouped = hits.grouped(LOW)
    assert 0 < len(grouped) < len(hits)
    check(grouped, hits)
    ranks = np.flatnonzero(np.isin(hits.rows, grouped.rows))
    assert np.array_equal(grouped.scores, hits.scores[ranks])
    assert grouped.notes[-1].startswith(f"200 images in {len(grouped)} groups: ")
    assert grouped.ungrouped() is hits
    assert hits.ungrouped() is hits
    again = grouped.grouped(0.9999)
    assert again.ungrouped() is hits
    assert len(again.notes) == len(hits.notes) + 1
    check(again, hits, 0.9999)


def test_a_round_keeps_rules_margins_and_labels(session):
    result = session.refine()
    grouped = result.grouped(LOW)
    check(grouped, result)
    ranks = np.flatnonzero(np.isin(result.rows, grouped.rows))
    for name in ("scores", "margins", "branch_ids"):
        assert np.array_equal(getattr(grouped, name), getattr(result, name)[ranks])
    assert grouped.branches == result.branches
    n_labels = len(session.labels)
    session.label(positive=grouped.rows[-1:])
    assert len(session.labels) <= n_labels + 1
    assert np.array_equal(session.refine().ungrouped().rows, session.result.rows)


def test_slices_thresholds_and_filters_of_a_grouped_answer(session):
    result = session.refine()
    grouped = result.grouped(LOW)
    few = grouped[:2]
    folded = [row for each in few.rows.tolist() for row in grouped.groups.get(each, [])]
    assert set(few.ungrouped().rows.tolist()) == {*few.rows.tolist(), *folded}
    assert few.ungrouped().rows.tolist() == [
        row for row in result.rows.tolist() if row in {*few.rows.tolist(), *folded}
    ]
    for threshold in (0.2, 0.6):
        check(grouped.at(threshold), result.at(threshold))
    passing = np.arange(len(result.catalog)) % 2 == 0
    odd = grouped.filtered(passing)
    check(odd, result.filtered(passing))
    check(odd.at(0.2), result.filtered(passing).at(0.2))
    assert result.preview([0.5]).equals(grouped.preview([0.5]))
    with pytest.raises(RefineError, match="complete round"):
        session.hits.grouped().at(0.5)


def test_only_the_first_rows_are_grouped_where_asked(session):
    hits = session.hits
    grouped = hits.grouped(LOW, first=50)
    check(grouped[: len(grouped) - 150], hits[:50])
    assert grouped.rows[-150:].tolist() == hits.rows[50:].tolist()
    assert "only the best 50 images were grouped" in grouped.notes[-1]
    assert grouped[:10].ungrouped().rows[:10].tolist()[0] == hits.rows[0]
    with pytest.raises(QueryError, match="expected first >= 1"):
        hits.grouped(first=0)


def test_tables_count_the_folded_rows(session, tmp_path):
    grouped = session.hits.grouped(LOW)
    frame = grouped.to_pandas()
    n_folded = [len(grouped.groups.get(row, ())) for row in grouped.rows.tolist()]
    assert frame["near_duplicates"].tolist() == n_folded
    assert sum(n_folded) + len(grouped) == 200
    assert "near_duplicates" not in session.hits.to_pandas()
    table = pq.read_table(grouped.to_parquet(tmp_path / "g.parquet"))
    assert table.column("near_duplicates").to_pylist() == n_folded


def test_an_answer_without_near_duplicates_stays_as_it_is(session):
    few = session.hits[:3].grouped(1.0)
    assert few.rows.tolist() == session.hits.rows[:3].tolist()
    assert len(few.groups) == 0
    nothing = session.hits[:0].grouped()
    assert len(nothing) == 0
    assert nothing.ungrouped().rows.tolist() == []


def test_a_large_answer_is_grouped_by_the_index(session, monkeypatch):
    exact = session.hits.grouped(LOW)
    monkeypatch.setattr(duplicate_search, "EXACT_BELOW", 100)
    proposed = session.hits.grouped(LOW)
    assert not proposed.groups.is_exact
    assert "the vector index proposed them" in proposed.notes[-1]
    assert len(proposed) >= len(exact)
    assert (proposed.groups.similarities >= np.float32(LOW)).all()
