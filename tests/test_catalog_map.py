"""The map of a catalog: the layout, the lasso, the file, and every way a map comes and goes."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import clipbranches_widget as cb
from clipbranches_widget import ingest, map_build, map_layout
from clipbranches_widget.catalog_lock import only_writer
from clipbranches_widget.catalog_map import (
    MAX_COORDINATE,
    NO_PLACE,
    CatalogMap,
    compute_map,
    points_inside,
    read_map,
    save_map,
)
from clipbranches_widget.cli import main
from clipbranches_widget.errors import (
    Cancelled,
    CatalogCorruptError,
    CatalogError,
    MissingPackageError,
    QueryError,
)
from clipbranches_widget.integrity import read_manifest
from clipbranches_widget.map_layout import estimated_seconds, layout, nearest_neighbors
from clipbranches_widget.storage import write_json


def clustered(n_rows, dim=16, n_clusters=12, seed=0):
    """Return unit rows around a few centres, and the centre of each."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n_clusters, dim))
    own = rng.integers(n_clusters, size=n_rows)
    rows = centres[own] + 0.25 * rng.standard_normal((n_rows, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), own


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A catalog of three shards without a map."""
    rows, _ = clustered(500)
    return cb.from_embeddings(
        rows, tmp_path_factory.mktemp("built") / "a.cbcat", rows_per_shard=220
    ).path


@pytest.fixture
def folder(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "a.cbcat"))


def brute_force_neighbors(rows, k):
    similar = rows @ rows.T
    np.fill_diagonal(similar, -np.inf)
    return np.argsort(-similar, axis=1, kind="stable")[:, :k]


# -- the layout ------------------------------------------------------------------------------------


def test_neighbours_are_those_of_a_scan():
    rows, _ = clustered(700)
    found, distances = nearest_neighbors(rows, 10)
    expected = brute_force_neighbors(rows, 10)
    assert np.array_equal(np.sort(found, axis=1), np.sort(expected, axis=1))
    true = np.linalg.norm(rows[:, None] - rows[found], axis=2)
    assert np.allclose(distances, true, atol=1e-3)
    assert (np.diff(distances, axis=1) >= 0).all()


def test_most_neighbours_are_found_where_not_every_row_is_compared(monkeypatch):
    monkeypatch.setattr(map_layout, "_EXACT_BELOW", 1000)
    monkeypatch.setattr(map_layout, "_CLUSTER_ROWS", 40)
    rows, _ = clustered(4000, n_clusters=60)
    found, _ = nearest_neighbors(rows, 15)
    assert all(len(set(line)) == 15 for line in found.tolist())
    assert not (found == np.arange(4000)[:, None]).any()
    expected = brute_force_neighbors(rows, 15)
    pairs = zip(found.tolist(), expected.tolist(), strict=True)
    assert np.mean([len(set(a) & set(b)) / 15 for a, b in pairs]) > 0.9


def test_neighbours_of_equal_rows_where_one_cluster_takes_them_all(monkeypatch):
    monkeypatch.setattr(map_layout, "_EXACT_BELOW", 100)
    monkeypatch.setattr(map_layout, "_CLUSTER_ROWS", 20)
    monkeypatch.setattr(map_layout, "_MAX_CANDIDATES", 64)
    rows = np.tile(np.float32([1, 0, 0]), (300, 1))
    rows[:2] = np.eye(3, dtype=np.float32)[1:]
    found, distances = nearest_neighbors(rows, 10)
    assert all(len(set(line)) == 10 for line in found.tolist())
    assert (distances[2:] < 1e-3).all()


def test_near_rows_lie_near_and_a_layout_can_be_repeated():
    rows, own = clustered(600)
    places = layout(rows)
    assert places.dtype == np.float32
    assert places.min() >= 0
    assert places.max() <= 1
    assert np.ptp(places, axis=0).max() == pytest.approx(1)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1)[:, :10]
    assert (own[nearest] == own[:, None]).mean() > 0.95
    assert np.array_equal(layout(rows), places)


@pytest.mark.parametrize("n_rows", [1, 2, 3, 10, 49, 50, 51])
def test_small_catalogs_have_a_layout(n_rows):
    places = layout(clustered(n_rows)[0])
    assert places.shape == (n_rows, 2)
    assert np.isfinite(places).all()
    assert len(np.unique(places, axis=0)) == n_rows


@pytest.mark.parametrize("n_rows", [2, 60, 200])
def test_equal_rows_lie_in_the_middle(n_rows):
    rows = np.tile(clustered(1)[0], (n_rows, 1))
    assert np.allclose(layout(rows), 0.5)


def test_many_duplicates_have_finite_places():
    rows = np.repeat(clustered(6)[0], 60, axis=0)
    places = layout(rows).reshape(6, 60, 2)
    assert np.isfinite(places).all()
    middles = places.mean(axis=1)
    apart = np.linalg.norm(middles[:, None] - middles[None], axis=2) + np.eye(6)
    assert places.std(axis=1).max() < apart.min()


def test_one_dimension_is_enough():
    assert layout(np.float32([[1.0], [-1.0], [1.0]])).shape == (3, 2)


def test_progress_goes_to_one_and_cancel_stops():
    rows, _ = clustered(400)
    told = []
    layout(rows, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)
    for n_asked in (1, 20):  # among the neighbours, among the steps
        asked = []

        def is_cancelled(asked=asked, n_asked=n_asked):
            asked.append(1)
            return len(asked) >= n_asked

        with pytest.raises(Cancelled, match="map was cancelled"):
            layout(rows, is_cancelled=is_cancelled)
        assert len(asked) == n_asked


def test_the_estimate_grows_up_to_the_largest_map():
    assert estimated_seconds(10) == 0
    assert 0 < estimated_seconds(100) < estimated_seconds(50_000) < estimated_seconds(100_000)
    assert estimated_seconds(10**7) == estimated_seconds(100_000)


# -- the lasso -------------------------------------------------------------------------------------


def is_inside(x, y, corners):
    """Return whether a point is inside, corner by corner, with plain numbers."""
    inside = False
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if (y0 <= y) != (y1 <= y) and x < x0 + (y - y0) * ((x1 - x0) / (y1 - y0)):
            inside = not inside
    return inside


@given(
    points=hnp.arrays(
        np.uint16, st.tuples(st.integers(0, 40), st.just(2)), elements=st.integers(0, 9)
    ),
    corners=st.lists(st.tuples(st.integers(-1, 10), st.integers(-1, 10)), min_size=3, max_size=12),
)
def test_points_inside_are_those_of_the_definition(points, corners):
    expected = [is_inside(int(x), int(y), corners) for x, y in points]
    found = points_inside(points, np.array(corners, dtype=np.float64))
    assert found.tolist() == expected
    rows = np.arange(len(points)) * 3
    catalog_map = CatalogMap("map-0.npy", rows, points, 1000)
    assert catalog_map.inside(corners).tolist() == rows[expected].tolist()


def test_a_lasso_around_everything_and_one_around_nothing(rng):
    points = rng.integers(0, MAX_COORDINATE, (200, 2), dtype=np.uint16)
    catalog_map = CatalogMap("map-0.npy", np.arange(200), points, 200)
    far = MAX_COORDINATE + 1
    assert catalog_map.inside([(-1, -1), (far, -1), (far, far), (-1, far)]).tolist() == list(
        range(200)
    )
    assert len(catalog_map.inside([(-9, -9), (-2, -9), (-2, -2)])) == 0


@pytest.mark.parametrize(
    ("corners", "message"),
    [
        ([(0, 0), (1, 1)], "expected three or more corners"),
        ([], "expected three or more corners"),
        ([(0, 0), (1, 1), (np.nan, 2)], "expected finite corners"),
    ],
)
def test_no_lasso(corners, message):
    catalog_map = CatalogMap("m", np.arange(2), np.zeros((2, 2), np.uint16), 2)
    with pytest.raises(QueryError, match=message):
        catalog_map.inside(corners)


def test_places_of_rows(rng):
    rows = np.array([3, 5, 8, 13])
    catalog_map = CatalogMap("m", rows, np.zeros((4, 2), np.uint16), 20)
    assert catalog_map.places_of([8, 4, 3, 19, 0]).tolist() == [2, 0]
    assert catalog_map.places_of([]).tolist() == []
    empty = CatalogMap("m", rows[:0], np.zeros((0, 2), np.uint16), 20)
    assert empty.places_of([1]).tolist() == []


# -- the file --------------------------------------------------------------------------------------


def test_a_map_comes_back_as_it_was_saved(tmp_path, rng):
    points = rng.integers(0, MAX_COORDINATE + 1, (300, 2)).astype(np.uint16)
    unplaced = rng.choice(300, 50, replace=False)
    points[unplaced] = NO_PLACE
    found = read_map(save_map(tmp_path, points), 310)
    placed = np.setdiff1d(np.arange(300), unplaced)
    assert found.rows.tolist() == placed.tolist()
    assert np.array_equal(found.points, points[placed])
    assert repr(found) == "<CatalogMap: 250 of 310 images>"
    assert found.positions.max() <= 1


def test_rows_keep_their_order_over_shards():
    rows, _ = clustered(500)
    rows = rows.astype(np.float16)
    whole = compute_map([rows])
    parts = compute_map([rows[:220], rows[220:440], rows[440:]])
    assert np.array_equal(parts, whole)
    expected = np.rint(layout(rows) * MAX_COORDINATE).astype(np.uint16)
    assert np.array_equal(whole, expected)


def test_of_many_rows_a_sample_is_placed():
    rows, _ = clustered(500)
    shards = [part.astype(np.float16) for part in np.split(rows, [220, 440])]
    points = compute_map(shards, max_points=120, seed=3)
    placed = np.flatnonzero(points[:, 0] != NO_PLACE)
    assert len(placed) == 120
    assert np.array_equal(placed, np.flatnonzero(points[:, 1] != NO_PLACE))
    assert set(np.searchsorted([220, 440], placed, side="right").tolist()) == {0, 1, 2}
    expected = layout(np.concatenate(shards)[placed], seed=3)
    assert np.array_equal(points[placed], np.rint(expected * MAX_COORDINATE).astype(np.uint16))
    assert np.array_equal(compute_map(shards, max_points=120, seed=3), points)
    assert not np.array_equal(compute_map(shards, max_points=120, seed=4), points)


# -- a catalog gets a map --------------------------------------------------------------------------


def test_every_open_catalog_sees_the_new_map(folder):
    before = cb.open(folder)
    assert before.map is None
    assert before.info()["has_map"] is False
    after = cb.build_map(folder)
    assert len(after.map) == 500
    assert after.info()["has_map"] is True
    assert np.array_equal(before.map.points, after.map.points)
    after.verify()
    first = after.map
    again = cb.build_map(after, max_points=100, seed=1)
    assert len(again.map) == len(before.map) == 100
    assert len(list(folder.glob("map-*"))) == 1
    assert len(first) == 500  # who holds the old one keeps it
    assert cb.rebuild_columns(folder, columns="codes").map.name == again.map.name


def test_the_same_map_again_is_the_same_file(folder):
    name = cb.build_map(folder).map.name
    assert cb.build_map(folder).map.name == name
    cb.open(folder).verify()


def test_a_map_of_fewer_rows_than_the_catalog_is_complete(folder):
    points = np.zeros((300, 2), np.uint16)
    file = save_map(folder, points)
    manifest = read_manifest(folder).with_map(file.name, map_build.describe_piece(file))
    write_json(folder / "catalog.json", manifest.to_dict())
    catalog = cb.open(folder)
    assert catalog.map.rows.tolist() == list(range(300))
    assert catalog.map.n_rows == 500


@pytest.mark.parametrize("damage", ["gone", "short", "changed", "header", "wrong form"])
def test_a_damaged_map_is_named_and_can_be_made_anew(folder, damage):
    name = cb.build_map(folder).map.name
    file = folder / name
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "short":
        file.write_bytes(content[:-4])
    elif damage == "wrong form":
        wrong = save_map(folder, np.zeros((501, 2), np.uint16))
        manifest = read_manifest(folder).with_map(wrong.name, map_build.describe_piece(wrong))
        write_json(folder / "catalog.json", manifest.to_dict())
    else:
        content[-1 if damage == "changed" else 1] ^= 1
        file.write_bytes(content)
    with pytest.raises(CatalogCorruptError, match=r"map-.*build_map") as refused:
        cb.open(folder)
    assert "its images" not in str(refused.value)
    repaired = cb.build_map(folder)
    assert repaired.map.name == name
    repaired.verify()


def test_another_damage_is_not_taken_for_one_of_the_map(folder):
    cb.build_map(folder)
    (folder / "shards/0001/codes.npy").unlink()
    with pytest.raises(CatalogCorruptError, match=r"codes\.npy, found none: build the catalog"):
        cb.build_map(folder)


def test_cancel_leaves_the_catalog_as_it_was(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    cancel = threading.Event()
    told = []

    def progress(stage, done, total):
        told.append((stage, done, total))
        if done > 40:
            cancel.set()

    with pytest.raises(Cancelled, match="the catalog is as before"):
        cb.build_map(folder, progress=progress, cancel=cancel)
    assert told[-1][:1] == ("map",)
    assert told[-1][1] < 60
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_kill_before_the_manifest_leaves_a_catalog_that_opens(folder, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    name = cb.build_map(folder, max_points=100).map.name
    with monkeypatch.context() as patch:
        patch.setattr(map_build, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            cb.build_map(folder)
    assert len(list(folder.glob("map-*"))) == 2
    assert cb.open(folder).map.name == name
    (folder / ".map-abc.npy.123.tmp").write_bytes(b"torn")
    cb.build_map(folder)
    assert len(list(folder.glob("*map-*"))) == 1


def test_one_change_of_a_catalog_at_a_time(folder):
    with (
        only_writer(folder),
        pytest.raises(
            CatalogError, match=r"expected no other writer on .*, got a change that runs"
        ),
    ):
        cb.build_map(folder, max_points=3)
    assert cb.open(folder).map is None


@pytest.mark.parametrize("n_rows", [1, 2, 3])
def test_tiny_catalogs(tmp_path, n_rows):
    catalog = cb.from_embeddings(clustered(n_rows)[0], tmp_path / "a", with_map=True)
    assert catalog.map.rows.tolist() == list(range(n_rows))


def test_too_few_points(folder):
    with pytest.raises(CatalogError, match="expected max_points of at least 3, got 2"):
        cb.build_map(folder, max_points=2)


# -- where a catalog is built ----------------------------------------------------------------------


def test_embeddings_get_a_map_when_asked(tmp_path, capsys):
    rows, _ = clustered(120)
    assert cb.from_embeddings(rows, tmp_path / "without").map is None
    catalog = cb.from_embeddings(rows, tmp_path / "with", with_map=True, progress=True)
    assert "map: 100%" in capsys.readouterr().err
    assert np.array_equal(catalog.map.points, cb.build_map(tmp_path / "without").map.points)


def test_images_get_a_map_unless_it_is_left_out(tmp_path):
    from PIL import Image

    (tmp_path / "in").mkdir()
    for number in range(4):
        Image.new("RGB", (40, 40), (60 * number, 90, 200)).save(tmp_path / "in" / f"{number}.png")
    encoder = cb.bundled_encoder("cpu")
    options = {"encoder": encoder, "progress": False}
    assert len(cb.index(tmp_path / "in", tmp_path / "a.cbcat", **options).map) == 4
    assert cb.index(tmp_path / "in", tmp_path / "b.cbcat", with_map=False, **options).map is None


def test_without_the_library(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    with pytest.raises(MissingPackageError, match="pip install openTSNE"):
        cb.build_map(folder)
    monkeypatch.setattr(ingest, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        catalog = cb.from_embeddings(clustered(60)[0], tmp_path / "b", with_map=True)
    assert catalog.map is None
    assert "left out the map" in caplog.text
    assert "pip install openTSNE" in caplog.text


def test_the_command_line(folder, capsys):
    assert main(["map", str(folder), "--quiet"]) == 0
    assert "<CatalogMap: 500 of 500 images>" in capsys.readouterr().out
    assert cb.open(folder).map is not None
    assert main(["map", str(folder / "nowhere")]) == 1
    assert "expected a catalog" in capsys.readouterr().err
