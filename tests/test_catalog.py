"""Opening a catalog: what it gives, and that every damage is noticed and named."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipbranches_widget import integrity
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.encoder import EncoderInfo
from clipbranches_widget.errors import (
    CatalogCorruptError,
    CatalogNotFoundError,
    EncoderError,
    ImageReadError,
    QueryError,
)
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.integrity import read_manifest
from clipbranches_widget.manifest import COLUMN_FILES, Manifest
from clipbranches_widget.shard_writer import describe_piece
from clipbranches_widget.storage import FORMAT_VERSION, fingerprint
from clipbranches_widget.vector_index import VectorIndex

N_ROWS, DIM = 23, 6
INFO = EncoderInfo("open_clip", "ViT-Tiny", "made-up", DIM, "0123456789abcdef")
SHARD_FILES = (
    "items.parquet",
    "embeddings.npy",
    "vectors.usearch",
    "codes.npy",
    "offsets.npy",
    "prefix.npy",
    "order.npy",
    "thumbnails.bin",
    "thumbnails.npy",
)
ALL_FILES = (
    "columns.json",
    "columns.npz",
    "skipped.parquet",
    *(f"shards/{shard}/{name}" for shard in ("0000", "0001", "0002") for name in SHARD_FILES),
)


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(3).standard_normal((N_ROWS, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def built(tmp_path_factory, vectors):
    """Return the folder of a catalog of three shards: 10, 10 and 3 rows."""
    folder = tmp_path_factory.mktemp("built")
    Image.new("RGB", (40, 20), "red").save(folder / "red.png")
    items = pa.table(
        {
            "path": [
                str(folder / "red.png"),
                *(f"{folder}/gone_{i}.jpg" for i in range(1, N_ROWS)),
            ],
            "caption": [f"caption {row}" for row in range(N_ROWS)],
            "price": pa.array(range(N_ROWS), pa.float32()),
        }
    )
    from_embeddings(vectors, folder / "a.cbcat", items=items, encoder=INFO, rows_per_shard=10)
    return folder / "a.cbcat"


@pytest.fixture
def copy(built, tmp_path):
    """Return a copy of the catalog folder, for damaging."""
    return Path(shutil.copytree(built, tmp_path / "copy.cbcat"))


def reseal(folder, edit=dict, before=dict):
    """Rewrite the manifest so that it describes the files as they are now, then `edit` it."""
    value = json.loads((folder / "catalog.json").read_text())
    before(value)
    groups = [(folder, value["pieces"])]
    groups += [(folder / shard["folder"], shard["pieces"]) for shard in value["shards"]]
    for place, pieces in groups:
        for name in pieces:
            piece = describe_piece(place / name)
            pieces[name] = {
                "bytes": piece.n_bytes,
                "fingerprint": piece.fingerprint,
                "checksum": piece.checksum,
            }
            if piece.shape is not None:
                pieces[name] |= {"shape": list(piece.shape), "dtype": piece.dtype}
    edit(value)
    from clipbranches_widget import manifest

    value["self"] = manifest._hash({key: item for key, item in value.items() if key != "self"})
    (folder / "catalog.json").write_text(json.dumps(value))


def test_what_a_catalog_gives(built, vectors):
    catalog = Catalog.open(built)
    assert len(catalog) == N_ROWS
    assert catalog.dim == DIM
    assert catalog.encoder_info == INFO
    assert [(s.first_row, s.n_rows) for s in catalog.shards] == [(0, 10), (10, 10), (20, 3)]
    assert repr(catalog) == "<Catalog a.cbcat: 23 images, ViT-Tiny (6-d), 3 shards>"
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert catalog.embeddings.dtype == np.float16
    np.testing.assert_allclose(catalog.embeddings, unit, atol=1e-3)
    assert not catalog.embeddings.flags.writeable
    assert not catalog.shards[1].embeddings.flags.writeable
    assert np.array_equal(catalog.shards[1].embeddings, catalog.embeddings[10:20])
    assert np.array_equal(catalog.embeddings_of([22, 0, 11]), catalog.embeddings[[22, 0, 11]])
    assert catalog.embeddings_of([]).shape == (0, DIM)
    assert len(catalog.skipped) == 0
    assert catalog.info()["n_shards"] == 3
    assert json.dumps(catalog.info())
    catalog.verify()


def test_items_are_in_row_order_and_typed(built):
    items = Catalog.open(built).items
    assert items.column_names == [
        "row",
        "uri",
        "caption",
        "width",
        "height",
        "content_hash",
        "price",
    ]
    kinds = [str(field.type) for field in items.schema]
    assert kinds == ["int64", "string", "string", "int32", "int32", "string", "float"]
    assert items.column("row").to_pylist() == list(range(N_ROWS))
    assert items.column("caption")[21].as_py() == "caption 21"
    assert Catalog.open(built).caption(21) == "caption 21"


def test_images_and_thumbnails(built, copy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    catalog = Catalog.open(built)
    assert catalog.image(0).size == (40, 20)
    thumbnail = catalog.thumbnail(0)
    assert thumbnail[8:12] == b"WEBP"
    assert catalog.thumbnail(0) == thumbnail
    with pytest.raises(ImageReadError, match=r"the image of row 5: .*gone_5\.jpg: no such file"):
        catalog.image(5)
    with pytest.raises(ImageReadError, match=r"the image of row 5: .*gone_5\.jpg"):
        catalog.thumbnail(5)
    with pytest.raises(QueryError, match="expected row ids from 0 to 22, got 23"):
        catalog.image(23)


def test_a_catalog_without_images_says_so(tmp_path, vectors):
    catalog = from_embeddings(vectors, tmp_path / "b.cbcat")
    assert catalog.caption(3) == ""
    with pytest.raises(ImageReadError, match=r"row 3 has no image.*'uri' column"):
        catalog.image(3)
    with pytest.raises(ImageReadError, match="row 3 has no image"):
        catalog.thumbnail(3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 23], "expected row ids from 0 to 22, got 23: row ids are"),
        ([-1], "got -1"),
        (range(20, 40), "got 23, 24, 25, 26, 27 and 12 more"),
        ([1.5], r"expected row ids \(integers\), got 1.5"),
        ([True], r"expected row ids \(integers\), got True"),
        ("7", r"expected row ids \(integers\), got 7"),
        ([[1]], r"expected row ids \(integers\), got 1"),
    ],
)
def test_unknown_rows_are_named(built, rows, message):
    with pytest.raises(QueryError, match=message):
        Catalog.open(built).check_rows(rows)


def test_known_rows_keep_their_order(built):
    catalog = Catalog.open(built)
    assert catalog.check_rows([3, 1, 3]).tolist() == [3, 1, 3]
    assert catalog.check_rows(np.uint8(4)).tolist() == [4]
    assert catalog.check_rows([]).dtype == np.int64


def test_opened_opens_once(built):
    catalog = Catalog.open(built)
    assert catalog.opened("piece", object) is catalog.opened("piece", object)
    assert catalog.opened("piece", object) is not Catalog.open(built).opened("piece", object)


class OtherModel:
    info = EncoderInfo("open_clip", "ViT-Tiny", "made-up", DIM, "another-hash")


def test_another_model_is_refused(built):
    with pytest.raises(EncoderError, match=r"expected the encoder of this catalog, .*ViT-Tiny"):
        Catalog.open(built).check_encoder(OtherModel())


def test_there_is_no_catalog(tmp_path):
    with pytest.raises(CatalogNotFoundError, match="found none: build one with"):
        Catalog.open(tmp_path / "none")
    with pytest.raises(CatalogNotFoundError, match="found another folder"):
        Catalog.open(tmp_path)


def test_every_file_is_in_the_manifest(built):
    manifest = Catalog.open(built).manifest
    listed = {*manifest.pieces, "catalog.json"}
    listed |= {f"{shard.folder}/{name}" for shard in manifest.shards for name in shard.pieces}
    found = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    assert found == listed == {*ALL_FILES, "catalog.json"}


DAMAGES = ("missing", "longer", "truncated", "first", "middle", "last")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in ALL_FILES
        for damage in (DAMAGES[:2] if name.endswith("thumbnails.bin") else DAMAGES)
    ],
)
def test_any_damage_to_any_file_is_noticed_on_open(copy, name, damage):
    file = copy / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "longer":
        file.write_bytes(content + b"\0")
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    else:
        position = {"first": 0, "middle": len(content) // 2, "last": len(content) - 1}[damage]
        content[position] ^= 0x10
        file.write_bytes(content)
    with pytest.raises(CatalogCorruptError, match=f"{name}.*build the catalog again"):
        Catalog.open(copy)


def test_a_flipped_byte_between_samples_is_found_by_verify(tmp_path):
    rows = np.random.default_rng(1).standard_normal((20_000, 128)).astype(np.float32)
    catalog = from_embeddings(rows, tmp_path / "big.cbcat")
    file = tmp_path / "big.cbcat/shards/0000/embeddings.npy"
    with file.open("r+b") as stream:
        stream.seek(40_000)
        stream.write(b"\x11\x22")
    Catalog.open(tmp_path / "big.cbcat")
    with pytest.raises(CatalogCorruptError, match=r"embeddings\.npy: its content changed"):
        catalog.verify()


@pytest.mark.parametrize("keep", [0, 1, 100, -2])
def test_a_truncated_manifest(copy, keep):
    file = copy / "catalog.json"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CatalogCorruptError, match=r"catalog\.json is not readable JSON"):
        Catalog.open(copy)


def test_an_edited_manifest(copy):
    file = copy / "catalog.json"
    file.write_text(file.read_text().replace("ViT-Tiny", "ViT-Huge"))
    with pytest.raises(CatalogCorruptError, match=r"catalog\.json: its content does not match"):
        Catalog.open(copy)
    file.write_text("[]")
    with pytest.raises(CatalogCorruptError, match=r'catalog\.json: expected "format"'):
        Catalog.open(copy)


def test_a_newer_format(copy):
    reseal(copy, lambda value: value.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(CatalogCorruptError, match=r"expected format version 1, got 2.*upgrade"):
        Catalog.open(copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v["shards"].pop(1), "expected shards/0002 to start at row 10"),
        (lambda v: v["shards"].pop(), "expected 23 rows over all shards, got 20"),
        (lambda v: v.update(n_rows=24), "expected 24 rows over all shards, got 23"),
        (lambda v: v["shards"][0].update(n_rows=0), "hold at least one"),
        (lambda v: v["encoder"].update(dim=7), r"embeddings\.npy: expected <f2 \(10, 7\)"),
        (lambda v: v["encoder"].pop("model"), "an entry is missing or malformed"),
        (lambda v: v.pop("shards"), "an entry is missing or malformed"),
        (lambda v: v["columns"].update(n_columns=3), r"codes\.npy: expected \|u1 \(3, 10\)"),
        (lambda v: v["columns"].update(hash="x"), r"columns\.json: expected column model x, got"),
        (lambda v: v["shards"][1]["pieces"].pop("codes.npy"), r"0001/codes\.npy in the manifest"),
        (lambda v: v["pieces"].pop("columns.npz"), r"columns\.npz in the manifest"),
        (lambda v: v["shards"][0].update(folder="../x"), "malformed"),
    ],
)
def test_a_manifest_that_disagrees_with_the_pieces(copy, edit, message):
    reseal(copy, edit)
    with pytest.raises(CatalogCorruptError, match=message):
        Catalog.open(copy)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("embeddings.npy", np.zeros((9, DIM), "<f2"), r"<f2 \(10, 6\), got <f2 \(9, 6\)"),
        ("embeddings.npy", np.zeros((10, 5), "<f2"), r"<f2 \(10, 6\), got <f2 \(10, 5\)"),
        ("embeddings.npy", np.zeros((10, DIM), "<f4"), r"<f2 \(10, 6\), got <f4 \(10, 6\)"),
        ("codes.npy", np.zeros((2, 10), "|u1"), r"\|u1 \(\d+, 10\), got \|u1 \(2, 10\)"),
        ("order.npy", np.zeros((2, 10), "<u4"), r"<u4 \(\d+, 10\), got <u4 \(2, 10\)"),
        ("prefix.npy", np.zeros((6, 31, 2), "<u8"), r"<u8 \(\d+, 31, 1\), got <u8 \(6, 31, 2\)"),
        ("prefix.npy", np.zeros((6, 31, 1), "<i8"), r"<u8 \(\d+, 31, 1\), got <i8 \(6, 31, 1\)"),
        ("offsets.npy", np.zeros((2, 257), "<i8"), r"<i8 \(\d+, 257\), got <i8 \(2, 257\)"),
        ("thumbnails.npy", np.zeros(10, "<i8"), r"<i8 \(11,\), got <i8 \(10,\)"),
    ],
)
def test_an_array_of_another_shape_or_kind(copy, name, array, message):
    np.save(copy / "shards/0000" / name, array)
    reseal(copy)
    with pytest.raises(CatalogCorruptError, match=rf"0000/{name}: expected {message}"):
        Catalog.open(copy)


@pytest.mark.parametrize(
    ("left_out", "parts"),
    [
        ((), "full"),
        (("order.npy",), "bits"),
        (("order.npy", "prefix.npy"), "codes"),
        (("prefix.npy",), "order"),  # as the first catalogs were
    ],
)
def test_parts_of_the_column_index_can_be_left_out(copy, left_out, parts):
    for name in left_out:
        for file in copy.glob(f"shards/*/{name}"):
            file.unlink()

    def forget(value):
        for shard in value["shards"]:
            for name in left_out:
                shard["pieces"].pop(name, None)

    reseal(copy, before=forget)
    catalog = Catalog.open(copy)
    catalog.verify()
    info = catalog.info()
    assert info["column_parts"] == parts
    files = [file for name in COLUMN_FILES for file in copy.glob(f"shards/*/{name}")]
    assert len(files) == 3 * (4 - len(left_out))
    assert info["column_bytes"] == sum(file.stat().st_size for file in files)
    assert info["column_bytes"] < info["bytes_on_disk"]


def test_a_catalog_whose_manifest_is_replaced_while_it_opens(copy, monkeypatch):
    """Files may go as soon as a new manifest is in place, while the old one is being checked."""
    old = read_manifest(copy)
    shards = [
        replace(shard, pieces={k: v for k, v in shard.pieces.items() if k != "order.npy"})
        for shard in old.shards
    ]
    new = replace(old, shards=tuple(shards))
    for file in copy.glob("shards/*/order.npy"):
        file.unlink()
    read = iter([old, new])
    monkeypatch.setattr("clipbranches_widget.catalog.read_manifest", lambda _: next(read))
    assert Catalog.open(copy).info()["column_parts"] == "bits"


def test_a_file_that_vanishes_while_it_is_checked(copy, monkeypatch):
    """As for a reader who comes while a writer drops old shards: the manifest is read anew."""

    def dropped(file):
        file.unlink()
        return fingerprint(file)

    monkeypatch.setattr(integrity, "fingerprint", dropped)
    with pytest.raises(CatalogCorruptError, match=r"expected a file at .*, found none"):
        Catalog.open(copy)


def test_items_of_another_length(copy):
    file = copy / "shards/0001/items.parquet"
    pq.write_table(pq.read_table(file).slice(0, 9), file)
    reseal(copy)
    with pytest.raises(CatalogCorruptError, match=r"0001/items\.parquet: expected 10 rows, got 9"):
        Catalog.open(copy)
    file.write_bytes(b"PAR1 not really")
    reseal(copy)
    with pytest.raises(CatalogCorruptError, match=r"items\.parquet is not a Parquet file"):
        Catalog.open(copy)


def test_items_without_a_column_of_a_catalog(copy):
    file = copy / "shards/0001/items.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["caption"]), file)
    reseal(copy)
    with pytest.raises(CatalogCorruptError, match=r"items\.parquet: expected columns row, uri"):
        Catalog.open(copy)


def test_a_graph_of_another_shard(copy):
    shutil.copy(copy / "shards/0002/vectors.usearch", copy / "shards/0000/vectors.usearch")
    reseal(copy)
    shard = Catalog.open(copy).shards[0]
    with pytest.raises(CatalogCorruptError, match=r"vectors\.usearch: expected 10 rows of dim 6"):
        VectorIndex.open(shard.file("vectors.usearch"), shard.embeddings)


def test_a_manifest_is_read_as_it_was_written(built):
    value = json.loads((built / "catalog.json").read_text())
    manifest = Manifest.from_dict(value, supported_version=FORMAT_VERSION)
    assert manifest.to_dict() == value
    assert manifest == Catalog.open(built).manifest


def test_a_catalog_can_be_moved_and_needs_no_writing(copy, tmp_path):
    moved = copy.rename(tmp_path / "moved here")
    for folder, _, names in os.walk(moved):
        for name in names:
            Path(folder, name).chmod(0o444)
    catalog = Catalog.open(str(moved))
    assert catalog.caption(0) == "caption 0"
    catalog.verify()


def test_nothing_in_a_catalog_is_a_pickle(built):
    for file in sorted(path for path in built.rglob("*") if path.is_file()):
        match file.suffix:
            case ".json":
                json.loads(file.read_text())
            case ".parquet":
                pq.read_table(file)
            case ".npy":
                np.load(file, allow_pickle=False)
            case ".npz":
                with np.load(file, allow_pickle=False) as arrays:
                    assert {arrays[name].dtype.kind for name in arrays} == {"f"}
            case suffix:
                assert suffix in {".bin", ".usearch"}
