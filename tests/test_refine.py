"""A round on clustered catalogs: exact against the full scan, and defined in every corner."""

import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import pairwise

import numpy as np
import pytest

from clipbranches_widget import array_kernels, round_answer
from clipbranches_widget.boxes import union_mask
from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.errors import Cancelled, QueryError, RefineError
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.refine import MIN_NEAREST, learn, refine
from clipbranches_widget.sorted_columns import PREFIX_EDGES
from clipbranches_widget.teacher import Teacher

refine_module = import_module("clipbranches_widget.refine")
N_CLUSTERS = 40


def clustered(rng, n, dim=32):
    centres = rng.normal(size=(N_CLUSTERS, dim))
    cluster = rng.integers(0, N_CLUSTERS, n)
    return centres[cluster] + 0.7 * rng.normal(size=(n, dim)), cluster


@pytest.fixture
def build(tmp_path):
    def _build(embeddings, *, rows_per_shard=1_000_000):
        path = tmp_path / f"c{len(list(tmp_path.iterdir()))}.cbcat"
        catalog = from_embeddings(
            embeddings.astype(np.float32), path, rows_per_shard=rows_per_shard
        )
        return CatalogIndex(catalog)

    return _build


def some_labels(cluster, wanted=0, n_yes=8, n_no=8):
    return LabelSet(
        np.flatnonzero(cluster == wanted)[:n_yes], np.flatnonzero(cluster != wanted)[:n_no]
    )


def full_scan(index, model, labels):
    """The answer without any index: every embedding scored, every code compared."""
    everything = np.arange(len(index.catalog))
    embeddings = index.catalog.embeddings.astype(np.float32)
    codes = np.concatenate([part.columns.codes for part in index.shards], axis=1)
    admitted = union_mask(model.boxes, codes)
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    similarity = units.astype(np.float64) @ model.teacher.direction.astype(np.float64)
    admitted[np.lexsort((everything, -similarity))[: model.n_nearest]] = True
    scores = model.teacher.scores(embeddings)
    wanted = admitted & (scores >= np.float32(model.threshold))
    wanted[labels.positive], wanted[labels.negative] = True, False
    scores[labels.positive] = np.maximum(scores[labels.positive], np.float32(model.threshold))
    rows = np.flatnonzero(wanted)
    return rows[np.lexsort((rows, -scores[rows]))], scores


@pytest.mark.parametrize("n", [1, 2, 30, 999, 3_000])
@pytest.mark.parametrize("threshold", [None, 0.2, 0.9])
def test_the_answer_equals_the_full_scan(build, rng, n, threshold):
    embeddings, cluster = clustered(rng, n)
    index = build(embeddings)
    labels = some_labels(cluster, wanted=int(cluster[0]))
    model = learn(index, labels=labels, threshold=threshold)
    result = refine(index, labels=labels, threshold=threshold)
    rows, scores = full_scan(index, model, labels)
    assert np.array_equal(result.rows, rows)
    assert np.array_equal(result.scores, scores[rows])
    codes = np.concatenate([part.columns.codes for part in index.shards], axis=1)
    assert np.array_equal(result.margins, model.forest.margins(codes)[rows])


def test_shards_do_not_change_the_answer(build, rng):
    embeddings, cluster = clustered(rng, 2_000)
    labels = some_labels(cluster)
    whole = refine(build(embeddings), labels=labels)
    parts = build(embeddings, rows_per_shard=300)
    assert len(parts.shards) == 7
    split = refine(parts, labels=labels)
    assert np.array_equal(whole.rows, split.rows)
    assert np.array_equal(whole.scores, split.scores)
    assert np.array_equal(whole.margins, split.margins)
    assert [str(b) for b in whole.branches] == [str(b) for b in split.branches]


def test_a_sampled_catalog_is_still_exact_and_finds_the_cluster(build, rng):
    embeddings, cluster = clustered(rng, 24_000)
    index = build(embeddings)
    labels = some_labels(cluster, n_yes=15, n_no=15)
    model = learn(index, labels=labels)
    assert model.sample.is_random.sum() == 5_000
    result = refine(index, labels=labels)
    rows, _ = full_scan(index, model, labels)
    assert np.array_equal(result.rows, rows)
    truth = np.flatnonzero(cluster == 0)
    found = np.isin(result.rows, truth)
    assert found.mean() > 0.9
    assert found.sum() > 0.9 * len(truth)
    assert result.n_touched < len(index.catalog)


def test_branches_count_what_they_admit_and_own_their_rows(build, rng):
    embeddings, cluster = clustered(rng, 3_000)
    index = build(embeddings)
    labels = some_labels(cluster)
    result = refine(index, labels=labels)
    codes = index.shards[0].columns.codes
    assert result.branches
    assert np.all(result.branch_ids >= 0)
    for branch in result.branches:
        members = result.rows[result.branch_ids == branch.id]
        if branch.box is None:
            continue
        inside = np.flatnonzero(branch.box.contains(codes))
        assert branch.n_rows == len(inside)
        assert branch.n_positive == np.isin(labels.positive, inside).sum()
        assert branch.n_negative == np.isin(labels.negative, inside).sum()
        assert np.isin(members, inside).all()
        assert any(name in branch.text for name in index.model.names)


def test_same_seed_same_answer_and_other_seed_another_forest(build, rng):
    embeddings, cluster = clustered(rng, 2_000)
    index, labels = build(embeddings), some_labels(cluster)
    first, again = refine(index, labels=labels, seed=3), refine(index, labels=labels, seed=3)
    assert np.array_equal(first.rows, again.rows)
    assert np.array_equal(first.scores, again.scores)
    assert np.array_equal(first.margins, again.margins)
    other = refine(index, labels=labels, seed=4)
    assert {b.text for b in other.branches} != {b.text for b in first.branches}


def test_labelled_rows_are_as_labelled_whatever_the_model_thinks(build, rng):
    embeddings, cluster = clustered(rng, 1_000)
    index = build(embeddings)
    members, others = np.flatnonzero(cluster == 0), np.flatnonzero(cluster != 0)
    labels = LabelSet([*members[:6], others[0]], [*members[6:8], *others[1:5]])
    result = refine(index, labels=labels)
    assert np.isin(labels.positive, result.rows).all()
    assert not np.isin(labels.negative, result.rows).any()


def test_everything_labelled_gives_back_the_yes_rows(build, rng):
    embeddings, cluster = clustered(rng, 60)
    labels = LabelSet(np.flatnonzero(cluster < 9), np.flatnonzero(cluster >= 9))
    result = refine(build(embeddings), labels=labels)
    assert sorted(result) == labels.positive.tolist()


def test_contradictory_twins_each_stay_as_labelled(build, rng):
    embeddings, _ = clustered(rng, 200)
    embeddings[1] = embeddings[0]
    result = refine(build(embeddings), labels=LabelSet([0], [1]))
    assert 0 in result
    assert 1 not in result


def test_all_rows_equal_is_one_group(build):
    result = refine(build(np.ones((50, 8))), labels=LabelSet([3], []))
    assert 3 in result
    assert np.isfinite(result.scores).all()


def test_only_yes_labels_work_and_the_notes_ask_for_no(build, rng):
    embeddings, cluster = clustered(rng, 2_000)
    result = refine(build(embeddings), labels=some_labels(cluster, n_yes=3, n_no=0))
    assert np.mean(cluster[result.rows] == 0) > 0.5
    assert any("no image is marked no" in note for note in result.notes)


@pytest.mark.parametrize("n", [60, 300])
def test_half_of_a_small_catalog_is_found_from_a_few_labels(build, rng, n):
    wanted = rng.random(n) < 0.5
    centres = rng.normal(size=(2, 32))
    embeddings = centres[wanted.astype(int)] + 0.9 * rng.normal(size=(n, 32))
    labels = LabelSet(np.flatnonzero(wanted)[:8], np.flatnonzero(~wanted)[:8])
    result = refine(build(embeddings), labels=labels)
    assert wanted[result.rows].mean() > 0.95
    assert len(result) > 0.6 * wanted.sum()


def test_a_misleading_query_is_turned_down_by_the_labels(build, rng):
    embeddings, cluster = clustered(rng, 3_000)
    index = build(embeddings)
    wrong = embeddings[cluster == 1].mean(axis=0).astype(np.float32)
    labels = LabelSet(np.flatnonzero(cluster == 0)[:10], np.flatnonzero(cluster == 1)[:10])
    result = refine(index, labels=labels, query=wrong / np.linalg.norm(wrong))
    assert np.mean(cluster[result.rows] == 1) < 0.05
    assert np.mean(np.isin(np.flatnonzero(cluster == 0), result.rows)) > 0.5


def test_a_query_without_yes_labels_stands_in(build, rng):
    embeddings, cluster = clustered(rng, 2_000)
    index = build(embeddings)
    query = embeddings[cluster == 0].mean(axis=0).astype(np.float32)
    result = refine(index, labels=LabelSet([], np.flatnonzero(cluster == 1)[:3]), query=query)
    assert len(result)
    assert np.mean(cluster[result.rows[:20]] == 0) > 0.9
    assert any("the query stood in" in note for note in result.notes)


def test_the_teacher_gets_the_images_nearest_to_the_query_but_those_labelled_no(
    build, rng, monkeypatch
):
    embeddings, cluster = clustered(rng, 1_000)
    index = build(embeddings)
    query = embeddings[cluster == 0].mean(axis=0).astype(np.float32)
    query /= np.linalg.norm(query)
    units = index.embeddings(np.arange(len(embeddings)))
    nearest = np.argsort(-(units @ query), kind="stable")
    given = {}
    fit = refine_module.fit_teacher

    def recorded(**arguments):
        given.update(arguments)
        return fit(**arguments)

    monkeypatch.setattr(refine_module, "fit_teacher", recorded)
    learn(index, labels=LabelSet(nearest[1:2], nearest[[0, 2]]), query=query)
    images = given["query_images"]
    assert np.array_equal(
        np.sort(images @ query), np.sort(units[nearest[[1, *range(3, 12)]]] @ query)
    )
    learn(index, labels=LabelSet(nearest[1:2], nearest[[0, 2]]))
    assert given["query_images"] is None


def test_nothing_to_learn_from_says_what_to_do(build, rng):
    index = build(clustered(rng, 50)[0])
    with pytest.raises(RefineError, match="mark an image yes, then refine"):
        refine(index, labels=LabelSet([], [1]))


@pytest.mark.parametrize("threshold", [0.0, 1.0, -3.0, float("nan")])
def test_thresholds_outside_0_and_1_are_refused(build, rng, threshold):
    index = build(clustered(rng, 50)[0])
    with pytest.raises(RefineError, match="expected a threshold between 0 and 1"):
        refine(index, labels=LabelSet([1], []), threshold=threshold)


def test_a_higher_threshold_returns_a_part_of_the_ranking(build, rng):
    embeddings, cluster = clustered(rng, 2_000)
    index, labels = build(embeddings), some_labels(cluster)
    loose, strict = (refine(index, labels=labels, threshold=t) for t in (0.3, 0.8))
    assert len(labels.positive) <= len(strict) < len(loose)
    assert np.all(strict.scores >= np.float32(0.8))


@pytest.mark.parametrize("stage", ["teacher", "sample", "trees", "boxes", "index", "rank"])
def test_progress_names_each_stage_and_cancel_stops_before_it(build, rng, stage):
    embeddings, cluster = clustered(rng, 300)
    index, labels = build(embeddings), some_labels(cluster)
    seen, cancel = [], threading.Event()

    def progress(name, fraction):
        seen.append((name, fraction))
        if stages.index(name) + 1 == stages.index(stage):
            cancel.set()

    stages = ["teacher", "sample", "trees", "boxes", "index", "rank"]
    if stage == "teacher":
        cancel.set()
    with pytest.raises(Cancelled, match="labels and results are as before"):
        refine(index, labels=labels, progress=progress, cancel=cancel)
    assert [name for name, _ in seen] == stages[: stages.index(stage)]
    assert all(0 <= fraction < 1 for _, fraction in seen)


def test_cancel_does_not_wait_for_the_trees(build, rng, monkeypatch):
    embeddings, cluster = clustered(rng, 300)
    index, labels = build(embeddings), some_labels(cluster)
    in_trees, gate, cancel = threading.Event(), threading.Event(), threading.Event()

    def fit_when_open(*_arguments, **_options):
        in_trees.set()
        gate.wait(60)
        raise RefineError("never seen: the round was cancelled long ago")

    monkeypatch.setattr(refine_module, "fit_forest", fit_when_open)
    canceller = threading.Thread(target=lambda: (in_trees.wait(60), cancel.set()))
    canceller.start()
    with pytest.raises(Cancelled, match="labels and results are as before"):
        refine(index, labels=labels, cancel=cancel)
    assert not gate.is_set()
    gate.set()
    canceller.join()


@pytest.mark.parametrize("n", [300, 24_000])
def test_the_best_page_comes_first_and_rows_are_only_added(build, rng, monkeypatch, n):
    monkeypatch.setattr(round_answer, "PARTIAL_EVERY_S", 0.0)
    monkeypatch.setattr(array_kernels, "BOX_PIECE_ROWS", (64, 64))
    embeddings, cluster = clustered(rng, n)
    index, labels = build(embeddings), some_labels(cluster)
    seen, stages = [], []

    def partial(result):
        seen.append((list(stages), result))

    def progress(stage, _fraction):
        stages.append(stage)

    final = refine(index, labels=labels, strategy="scan", progress=progress, partial=partial)
    assert final.is_complete
    assert len(seen) > 4
    assert seen[0][0] == ["teacher"]
    rows = [set(result.rows.tolist()) for _, result in seen] + [set(final.rows.tolist())]
    assert rows[0]
    assert all(before <= after for before, after in pairwise(rows))
    for _, result in seen:
        assert not result.is_complete
        assert "so far" in repr(result)
        assert len(result.to_pandas()) == len(result)
    first = seen[0][1]
    n_same = min(60, len(first))
    assert np.array_equal(first.rows[:n_same], final.rows[:n_same])
    assert np.array_equal(first.scores[:n_same], final.scores[:n_same])


def test_the_plan_is_explained_and_forcing_one_changes_nothing(build, rng):
    embeddings, cluster = clustered(rng, 3_000)
    labels = some_labels(cluster)
    index = build(embeddings)
    chosen = refine(index, labels=labels)
    lines = str(chosen.plan).splitlines()
    assert lines[0].startswith(f"{chosen.plan.strategy} (")
    assert len(lines) == 4
    for strategy in ("bits", "postings", "scan"):
        forced = refine(index, labels=labels, strategy=strategy)
        assert forced.plan.strategy == strategy
        assert_same(forced, chosen)
    with pytest.raises(QueryError, match="among bits, postings, scan"):
        refine(index, labels=labels, strategy="magic")


def assert_same(one, other):
    assert np.array_equal(one.rows, other.rows)
    assert np.array_equal(one.scores, other.scores)
    assert np.array_equal(one.margins, other.margins)
    assert np.array_equal(one.branch_ids, other.branch_ids)
    assert [str(each) for each in one.branches] == [str(each) for each in other.branches]


def test_boxes_end_where_there_are_bit_vectors(build, rng):
    embeddings, cluster = clustered(rng, 3_000)
    model = learn(build(embeddings), labels=some_labels(cluster))
    bounds = {code for box in model.boxes for _, *ends in box.ranges for code in ends}
    assert bounds <= {0, *PREFIX_EDGES, 256}


@pytest.mark.parametrize("columns", ["bits", "codes"])
def test_an_index_with_less_stored_gives_the_same_answer(tmp_path, rng, columns):
    embeddings, cluster = clustered(rng, 3_000)
    labels = some_labels(cluster)
    answers = []
    for parts in ("full", columns):
        catalog = from_embeddings(embeddings, tmp_path / f"{parts}.cbcat", columns=parts)
        answers.append(refine(CatalogIndex(catalog), labels=labels))
    assert_same(*answers)
    assert len(answers[1].plan.estimates) == (2 if columns == "bits" else 1)


def test_eight_rounds_at_once_share_one_index(build, rng):
    embeddings, cluster = clustered(rng, 24_000)
    index = build(embeddings)
    labels = [some_labels(cluster, wanted=wanted) for wanted in range(8)]
    alone = [refine(index, labels=each) for each in labels]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda each: refine(index, labels=each), labels))
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other)


def test_timings_cover_the_stages(build, rng):
    embeddings, cluster = clustered(rng, 300)
    timings = refine(build(embeddings), labels=some_labels(cluster)).timings
    stages = [seconds for name, seconds in timings.items() if name != "total"]
    assert len(stages) == 6
    assert sum(stages) <= timings["total"] + 1e-3


@pytest.mark.parametrize("score", [0.1, 0.5, 0.75, 0.999])
def test_scores_and_logits_are_inverse(score):
    teacher = Teacher(np.ones(2, np.float32), 0.5, 0.7, 1.3)
    logit = np.array([teacher.logit_of(score)], dtype=np.float32)
    assert teacher.score_of(logit)[0] == pytest.approx(score, rel=1e-5)


def test_near_rows_complement_the_boxes_within_bounds(build, rng):
    embeddings, cluster = clustered(rng, 3_000)
    model = learn(build(embeddings), labels=some_labels(cluster))
    assert model.n_nearest >= MIN_NEAREST[0]
