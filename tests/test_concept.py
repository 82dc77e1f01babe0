"""Concepts: a file that gives back the round's answer bit for bit, and refuses everything else."""

import contextlib
import copy
import dataclasses
import json
from importlib import import_module

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipbranches_widget import catalog_writer, concept_file
from clipbranches_widget.boxes import union_mask
from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.concept import Concept
from clipbranches_widget.concept_file import exact, forest_from_dict, forest_to_dict
from clipbranches_widget.encoder import EncoderInfo
from clipbranches_widget.errors import ClipBranchesError, ConceptError, QueryError, RefineError
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.refine import DEFAULT_THRESHOLD, refine
from clipbranches_widget.search import search
from clipbranches_widget.session import Session

refine_module = import_module("clipbranches_widget.refine")
N_CLUSTERS, DIM = 40, 32
N_BASE = 1_500
NEWER = json.dumps(
    {
        "format": "clipbranches concept",
        "format_version": 2,
        "created": {"clipbranches_widget": "9.0"},
    }
).encode()


def clustered(rng, n, centres=None):
    centres = rng.normal(size=(N_CLUSTERS, DIM)) if centres is None else centres
    cluster = rng.integers(0, N_CLUSTERS, n)
    return (centres[cluster] + 0.7 * rng.normal(size=(n, DIM))).astype(np.float32), cluster


def some_labels(cluster, n_yes=8, n_no=8):
    return LabelSet(np.flatnonzero(cluster == 0)[:n_yes], np.flatnonzero(cluster != 0)[:n_no])


def hashes(numbers):
    return pa.table({"content_hash": pa.array([f"hash-{n}" for n in numbers], pa.string())})


def index_of(catalog):
    return catalog.opened("index", lambda: CatalogIndex(catalog))


def saved(concept, folder):
    concept.save(folder / "concept.json")
    return Concept.load(folder / "concept.json")


def assert_same(one, other):
    assert np.array_equal(one.rows, other.rows)
    assert one.scores.tobytes() == other.scores.tobytes()
    assert one.margins.tobytes() == other.margins.tobytes()
    assert np.array_equal(one.branch_ids, other.branch_ids)
    assert one.branches == other.branches
    assert one.labels == other.labels
    assert np.array_equal(one.pool.rows, other.pool.rows)
    assert one.pool.scores.tobytes() == other.pool.scores.tobytes()
    assert (one.n_touched, one.n_total) == (other.n_touched, other.n_total)
    assert (one.threshold, one.seed, one.query_text) == (
        other.threshold,
        other.seed,
        other.query_text,
    )


class World:
    """A catalog of one shard, its round, and catalogs with the same columns."""

    def __init__(self, folder, monkeypatch, rng):
        self._folder, self._monkeypatch, self._n = folder, monkeypatch, 0
        self.embeddings, self.cluster = clustered(rng, N_BASE + 700)
        self.base = self.build(self.embeddings[:N_BASE], items=hashes(range(N_BASE)))
        self.labels = some_labels(self.cluster[:N_BASE])
        self.query = self.embeddings[self.cluster == 0].mean(axis=0)
        self.query /= np.linalg.norm(self.query)

    def build(self, embeddings, **options):
        self._n += 1
        return from_embeddings(embeddings, self._folder / f"c{self._n}.cbcat", **options)

    def like(self, embeddings, **options):
        """Build a catalog with the column model of `base`."""
        model = index_of(self.base).model
        with self._monkeypatch.context() as patch:
            patch.setattr(catalog_writer, "default_column_model", lambda *_, **__: model)
            return self.build(embeddings, **options)

    def grown(self):
        return self.like(
            self.embeddings,
            items=hashes(range(len(self.embeddings))),
            rows_per_shard=N_BASE,
        )

    def round(self, **options):
        options = {"labels": self.labels, "query_text": "first of 40", "seed": 3} | options
        return refine(index_of(self.base), query=self.query, **options)


@pytest.fixture
def world(tmp_path, monkeypatch, rng):
    return World(tmp_path / "world", monkeypatch, rng)


@pytest.mark.parametrize("threshold", [None, 0.2, 0.8])
def test_the_same_catalog_gives_the_round_back_without_training(
    world, tmp_path, monkeypatch, threshold
):
    result = world.round(threshold=threshold)
    concept = saved(Concept.of("firsts", result, query_vector=world.query), tmp_path)
    for name in ("fit_teacher", "fit_forest"):
        monkeypatch.setattr(refine_module, name, None)
    again = concept.apply(world.base)
    assert_same(again, result)
    assert again.notes == result.notes
    assert np.array_equal(again.model.sample.rows, result.model.sample.rows)
    assert np.array_equal(again.model.sample.logits, result.model.sample.logits)
    assert np.array_equal(concept.query_vector, world.query)


def test_a_sampled_catalog_gives_the_round_back(tmp_path, rng):
    embeddings, cluster = clustered(rng, 24_000)
    catalog = from_embeddings(embeddings, tmp_path / "big.cbcat", rows_per_shard=9_000)
    result = refine(index_of(catalog), labels=some_labels(cluster))
    again = saved(Concept.of("firsts", result), tmp_path).apply(catalog)
    assert_same(again, result)
    assert again.notes == result.notes
    assert any("in a random sample of 5,000" in note for note in again.notes)


def test_rules_switched_off_and_pinned_stay_so(world, tmp_path):
    first = world.round()
    boxes = [branch.box for branch in first.branches if branch.box is not None]
    other = refine(index_of(world.base), labels=some_labels(world.cluster[:N_BASE][::-1]))
    pinned = next(each.box for each in other.branches if each.box not in boxes)
    result = world.round(off=[boxes[0]], pinned=[pinned])
    assert {branch.state for branch in result.branches} == {"on", "off", "pinned"}
    again = saved(Concept.of("firsts", result), tmp_path).apply(world.base)
    assert_same(again, result)


@pytest.mark.parametrize("strategy", ["bits", "postings", "scan"])
def test_strategies_can_be_forced(world, strategy):
    result = world.round()
    again = Concept.of("firsts", result).apply(world.base, strategy=strategy)
    assert again.plan.strategy == strategy
    assert_same(again, result)


def test_an_unknown_strategy_is_refused(world):
    with pytest.raises(QueryError, match="among bits, postings, scan"):
        Concept.of("firsts", world.round()).apply(world.base, strategy="magic")


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_another_threshold_is_that_of_result_at(world, tmp_path, threshold):
    result = world.round()
    concept = saved(Concept.of("firsts", result), tmp_path)
    again = concept.apply(world.base, threshold=threshold)
    assert_same(again, result.at(threshold))
    assert again.notes == result.at(threshold).notes
    moved = Concept.of("firsts", result.at(threshold))
    assert (moved.threshold, moved.learned_threshold) == (threshold, DEFAULT_THRESHOLD)
    assert_same(moved.apply(world.base), result.at(threshold))


def test_a_threshold_outside_0_and_1_is_refused(world):
    with pytest.raises(RefineError, match=r"expected a threshold between 0 and 1, got 1\.5"):
        Concept.of("firsts", world.round()).apply(world.base, threshold=1.5)


def test_a_grown_catalog_is_answered_exactly_and_says_what_is_new(world, tmp_path):
    result = world.round()
    concept = saved(Concept.of("firsts", result), tmp_path)
    grown = world.grown()
    assert len(grown.shards) == 2
    again = concept.apply(grown)

    index, model = index_of(grown), again.model
    codes = np.concatenate([part.columns.codes for part in index.shards], axis=1)
    admitted = union_mask(model.boxes, codes)
    for k in (model.n_nearest, 100):
        admitted[index.nearest(model.teacher.direction, k)[0]] = True
    scores = model.teacher.scores(grown.embeddings.astype(np.float32))
    admitted &= scores >= np.float32(DEFAULT_THRESHOLD)
    admitted[world.labels.positive], admitted[world.labels.negative] = True, False
    assert sorted(again) == np.flatnonzero(admitted).tolist()
    margins = result.model.forest.margins(codes)
    assert np.array_equal(again.margins, margins[again.rows])

    assert (again.rows >= N_BASE).any()
    assert again.labels == world.labels
    assert again.notes[-1] == "700 images are new since 'firsts' was saved: rows from 1,500 on"
    assert again.at(0.7).notes[-1] == again.notes[-1]
    n_nearest = result.model.n_nearest
    assert n_nearest < model.n_nearest <= np.ceil(n_nearest * 2_200 / 1_500)


def test_a_concept_of_a_grown_catalog_can_be_saved_in_turn(world, tmp_path):
    grown = world.grown()
    again = Concept.of("firsts", world.round()).apply(grown)
    second = saved(Concept.of("firsts", again), tmp_path)
    assert second.catalog.n_rows == 2_200
    assert_same(second.apply(grown), again)


def test_an_older_copy_of_the_catalog_uses_the_labels_it_has(world):
    grown = world.grown()
    labels = LabelSet([*world.labels.positive, 2_100], [*world.labels.negative, 2_101])
    concept = Concept.of("firsts", refine(index_of(grown), labels=labels))
    result = concept.apply(world.base)
    assert result.labels == world.labels
    assert "16 of its 18 labelled images are here" in result.notes[-1]


def test_another_catalog_knows_labelled_images_by_their_content(world, tmp_path):
    concept = saved(Concept.of("firsts", world.round()), tmp_path)
    turned = np.arange(N_BASE)[::-1]
    known = turned.copy()
    known[turned == world.labels.positive[0]] = 9_999
    other = world.like(world.embeddings[turned], items=hashes(known))
    result = concept.apply(other)
    expected = LabelSet(N_BASE - 1 - world.labels.positive[1:], N_BASE - 1 - world.labels.negative)
    assert result.labels == expected
    assert np.isin(expected.positive, result.rows).all()
    assert not np.isin(expected.negative, result.rows).any()
    assert "15 images here have the content of its 16 labelled ones" in result.notes[-1]


def test_content_that_is_labelled_both_ways_or_unknown_is_not_used(world):
    numbers = np.arange(N_BASE)
    yes, no = world.labels.positive[0], world.labels.negative[0]
    numbers[no] = numbers[yes]
    catalog = world.like(world.embeddings[:N_BASE], items=hashes(numbers))
    concept = Concept.of("firsts", refine(index_of(catalog), labels=world.labels))
    other = world.like(world.embeddings[:N_BASE][::-1], items=hashes(numbers[::-1]))
    assert len(concept.labels_in(other)) == 14
    nameless = world.like(world.embeddings[:N_BASE][::-1])
    assert len(concept.labels_in(nameless)) == 0
    result = concept.apply(nameless)
    assert "0 images here have the content" in result.notes[-1]
    assert not any("marked yes" in note or "marked no" in note for note in result.notes)


def test_other_columns_are_refused_and_the_way_out_works(world, tmp_path):
    concept = Concept.of("firsts", world.round())
    other = world.build(world.embeddings[:900], items=hashes(range(900)))
    with pytest.raises(ConceptError, match=r"session\.label\(found\.positive") as caught:
        concept.apply(other)
    message = str(caught.value)
    for part in (world.base.column_model_hash, other.column_model_hash, "'firsts'", "labels_in"):
        assert part in message
    found = concept.labels_in(other)
    session = Session(other, tmp_path / "other.jsonl")
    session.label(found.positive, found.negative)
    assert np.isin(found.positive, session.refine().rows).all()


@pytest.mark.parametrize(
    "changed", [{"kind": "open_clip"}, {"model": "ViT-L-14"}, {"weights_hash": "ab" * 16}]
)
def test_another_encoder_is_refused(world, changed):
    made = dataclasses.replace(EncoderInfo("none", "ViT-B-32", "laion", DIM, "cd" * 16), **changed)
    other = world.like(world.embeddings[:N_BASE], encoder=made)
    concept = Concept.of("firsts", world.round())
    with pytest.raises(ConceptError, match="expected a catalog made with the encoder of 'firsts'"):
        concept.apply(other)


def test_the_tag_of_the_same_weights_may_differ(world):
    infos = [EncoderInfo("open_clip", "ViT-B-32", tag, DIM, "cd" * 16) for tag in ("a", "/b.pt")]
    first, second = (world.like(world.embeddings[:N_BASE], encoder=info) for info in infos)
    result = refine(index_of(first), labels=world.labels)
    assert_same(Concept.of("firsts", result).apply(second), result)


def test_another_dimension_is_refused_with_both(world):
    other = world.build(np.eye(16, dtype=np.float32))
    with pytest.raises(ConceptError, match=r"32-d embeddings.*got.*16-d embeddings"):
        Concept.of("firsts", world.round()).apply(other)


def test_something_that_is_no_catalog_is_refused(world):
    with pytest.raises(TypeError, match="expected a Catalog, got str: open one"):
        Concept.of("firsts", world.round()).apply("pictures.cbcat")


def test_only_a_complete_round_can_be_saved(world):
    with pytest.raises(ConceptError, match=r"got that of a search: save what session\.refine"):
        Concept.of("firsts", search(world.base, world.query, 5))
    seen = []
    world.round(partial=seen.append)
    with pytest.raises(ConceptError, match="got that of a round that is still running"):
        Concept.of("firsts", seen[0])


@pytest.mark.parametrize("name", ["", "  ", "two\nlines", "x" * 201, None, 7])
def test_names_are_one_short_line(world, name):
    with pytest.raises(ConceptError, match="expected a name of one line, at most 200 characters"):
        Concept.of(name, world.round())


@pytest.mark.parametrize("text", ["naïve 雪 🐦", '"}\\', "undecodable \udcff path"])
def test_texts_survive(world, tmp_path, text):
    result = dataclasses.replace(world.round(), query_text=text)
    concept = saved(Concept.of(text, result), tmp_path)
    readable = text.encode("utf-8", "replace").decode()
    assert (concept.name, concept.query_text) == (readable, readable)


def test_the_file_is_small_and_says_what_it_is_and_not_where(world, tmp_path):
    path = tmp_path / "new" / "concept.json"
    n_bytes = Concept.of("firsts", world.round(), query_vector=world.query).save(path)
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) == n_bytes == path.stat().st_size < 200_000
    stored = json.loads(text)
    assert (stored["format"], stored["format_version"]) == ("clipbranches concept", 1)
    assert stored["name"] == "firsts"
    assert stored["labels"] == world.labels.to_dict()
    assert set(stored["encoder"]) == {"kind", "model", "pretrained", "dim", "weights_hash"}
    assert str(world.base.path.parent) not in text
    assert [file.name for file in path.parent.iterdir()] == ["concept.json"]


def test_saving_refuses_to_overwrite_unless_told(world, tmp_path):
    path = tmp_path / "concept.json"
    path.write_text("mine")
    concept = Concept.of("firsts", world.round())
    with pytest.raises(ConceptError, match="pass overwrite=True to replace it"):
        concept.save(path)
    assert path.read_text() == "mine"
    concept.save(path, overwrite=True)
    assert Concept.load(path).name == "firsts"


def test_a_place_that_cannot_be_written_is_named(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConceptError, match=r"cannot write the concept to .*choose another path"):
        Concept.of("firsts", world.round()).save(tmp_path / "file" / "concept.json")


def test_a_missing_file_and_a_folder_say_what_to_do(tmp_path):
    with pytest.raises(ConceptError, match=r"found none: session\.save_concept"):
        Concept.load(tmp_path / "none.json")
    with pytest.raises(ConceptError, match="cannot read the concept"):
        Concept.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not readable JSON"),
        (b"{", "is not readable JSON"),
        (b"[" * 100_000, "is not readable JSON"),
        (b'{"n": NaN}', "NaN is no JSON number"),
        (b"\x80\x04\x95pickle", "is not a concept file.*bytes that are no text"),
        (b"[]", "is not a concept file.*JSON of something else"),
        (b'{"format": "clipbranches catalog"}', "is not a concept file"),
        (
            NEWER,
            "expected concept format 1, got 2, written by clipbranches_widget 9.0: upgrade",
        ),
        (b'{"format": "clipbranches concept", "format_version": 1}', "does not match its own"),
        (
            b'{"format": "clipbranches concept", "format_version": 1, "name": "\\ud800"}',
            "does not match its own hash, so it was edited or damaged: restore it",
        ),
    ],
)
def test_foreign_files_are_refused(tmp_path, content, message):
    path = tmp_path / "concept.json"
    path.write_bytes(content)
    with pytest.raises(ConceptError, match=message):
        Concept.load(path)


def test_every_cut_and_every_changed_byte_is_noticed(world, tmp_path, rng):
    path = tmp_path / "concept.json"
    n_bytes = Concept.of("firsts", world.round()).save(path)
    whole = path.read_bytes()
    for at in rng.integers(0, n_bytes - 2, 100):
        path.write_bytes(whole[:at])
        with pytest.raises(ConceptError, match=r"concept\.json"):
            Concept.load(path)
        if whole[at : at + 1].isalnum():
            path.write_bytes(whole[:at] + b"8" + whole[at + 1 :])
            if whole[at : at + 1] != b"8":
                with pytest.raises(ConceptError, match=r"concept\.json"):
                    Concept.load(path)


def edited(stored, *path_and_value):
    """Return a concept's JSON with one value replaced and the hash made to fit."""
    *path, value = path_and_value
    body = copy.deepcopy(stored)
    del body["self"]
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return {**body, "self": concept_file._hash(body)}


@pytest.mark.parametrize(
    "change",
    [
        ("name", ""),
        ("query", None),
        ("query", "vector", [1.0]),
        ("labels", {"positive": [1], "negative": [1]}),
        ("labels", {"positive": [N_BASE], "negative": []}),
        ("labels", {"positive": [0.5], "negative": []}),
        ("content_hashes", {"x": "y"}),
        ("teacher", {}),
        ("teacher", "direction", [0.0] * 5),
        ("boxes", 0, "ranges", [[0, 5, 5]]),
        ("boxes", 0, "ranges", [[5_000, 0, 9]]),
        ("boxes", 0, "ranges", [[0, 0, 9], [0, 1, 9]]),
        ("boxes", 0, "value", 1e300),
        ("states", []),
        ("states", 0, "maybe"),
        ("forest", "n_columns", 0),
        ("forest", "n_columns", 1),
        ("forest", "base_margin", "x"),
        ("forest", "trees", 0, "value", []),
        ("forest", "trees", 0, "column", 0, -1),
        ("forest", "trees", 0, "threshold", 0, 257),
        ("forest", "trees", 0, "left", 0, 0),
        ("forest", "trees", 0, "left", 0, 2**40),
        ("forest", "trees", 0, "right", 0, 1),
        ("n_nearest", 0),
        ("seed", -1),
        ("threshold", 0),
        ("learned_threshold", 2.0),
        ("encoder", {"kind": "none"}),
        ("encoder", "dim", "32"),
        ("catalog", {}),
        ("catalog", "n_rows", 0),
        ("created", []),
    ],
    ids=str,
)
def test_impossible_entries_are_refused_even_with_a_fitting_hash(world, tmp_path, change):
    path = tmp_path / "concept.json"
    Concept.of("firsts", world.round()).save(path)
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(edited(stored, *change)), encoding="utf-8")
    with pytest.raises(ConceptError, match=r"an entry is missing or malformed.*restore it"):
        Concept.load(path)


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_no_file_whatsoever_ends_in_another_error(small, tmp_path, data):
    """Replace any value by anything: either it loads, or a ConceptError says what to do."""
    keys, inner = [], small
    while isinstance(inner, dict | list) and inner and (not keys or data.draw(st.booleans())):
        options = sorted(inner) if isinstance(inner, dict) else range(min(len(inner), 3))
        keys.append(data.draw(st.sampled_from([key for key in options if key != "self"])))
        inner = inner[keys[-1]]
    path = tmp_path / "concept.json"
    path.write_text(json.dumps(edited(small, *keys, data.draw(junk))), encoding="utf-8")
    with contextlib.suppress(ConceptError):
        Concept.load(path)


@pytest.fixture
def small(world, tmp_path):
    Concept.of("firsts", world.round(), query_vector=world.query).save(tmp_path / "small.json")
    return json.loads((tmp_path / "small.json").read_text(encoding="utf-8"))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20))
def test_float32_values_survive_json(values):
    numbers = np.array(values, dtype=np.float32)
    read = np.array(json.loads(json.dumps(exact(numbers))), dtype=np.float32)
    assert read.tobytes() == numbers.tobytes()


def test_forests_survive_json(world, rng):
    forest = world.round().model.forest
    read = forest_from_dict(json.loads(json.dumps(forest_to_dict(forest))))
    codes = rng.integers(0, 256, (forest.n_columns, 500), dtype=np.uint8)
    assert read.margins(codes).tobytes() == forest.margins(codes).tobytes()
    assert read.leaf_boxes() == forest.leaf_boxes()


def test_a_tree_deeper_than_any_reader_can_bear_is_refused():
    n = 1_001
    left = [node + 1 if node % 2 == 0 and node < n - 1 else -1 for node in range(n)]
    right = [node + 2 if node % 2 == 0 and node < n - 1 else -1 for node in range(n)]
    tree = {"column": [0] * n, "threshold": [9] * n, "left": left, "right": right}
    with pytest.raises(ValueError, match="expected a tree"):
        forest_from_dict(
            {"n_columns": 1, "base_margin": 0, "trees": [{**tree, "value": [0.0] * n}]}
        )


def test_the_error_is_one_of_ours_and_a_value_error():
    assert issubclass(ConceptError, ClipBranchesError)
    assert issubclass(ConceptError, ValueError)
