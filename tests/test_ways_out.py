"""Answers and labels in the formats of other packages, read back with those packages."""

from __future__ import annotations

import json
import threading
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from drawn_images import build, picture, pictures
from PIL import Image

from clipbranches_widget.errors import Cancelled, ExportError, MissingPackageError
from clipbranches_widget.integrity import identity
from clipbranches_widget.session import Session

HOSTILE = [
    "plain.png",
    "test.png",  # a split, for `datasets`
    "val/test/train-00.png",
    "deep/a/same.png",
    "deep/b/same.png",
    "deep/c/SAME.jpg",
    "no ending",
    "=1+1.png",
    "-rf.png",
    "quote'\"s.png",
    "ü" * 100 + ".png",
    "[a-z]*.png",
    "new\nline.png",
    "__init__.png",
    "con.png",
    "a.jfif",
]
CAPTIONS = ["NA", "null", "a/b\\c", '{"json": 1}', "=1+1", "line\nbreak", 'é,"x"', "\u202eltr"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep the cache of `datasets` out of the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def catalog(tmp_path):
    """Files with names that can do harm, and columns of every kind."""
    paths = []
    for number, name in enumerate(HOSTILE):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
        paths.append(str(path))
    n = len(paths)
    table = {
        "path": paths,
        "caption": [CAPTIONS[row % len(CAPTIONS)] for row in range(n)],
        "label": [f"class {row}" for row in range(n)],
        "image": list(range(n)),
        "some_file_name": ["x.png"] * n,
        "price": pa.array([None if row % 3 else row for row in range(n)], pa.int64()),
        "day": pa.array(list(range(n)), pa.date32()),
        "tags": [["a", "b"][: row % 3] for row in range(n)],
    }
    return build(pa.table(table), tmp_path / "hostile.cbcat")


@pytest.fixture
def session(catalog, tmp_path):
    session = Session(catalog, tmp_path / "s.jsonl")
    session.label(positive=range(0, len(catalog), 2), negative=[1, 3])
    return session


@pytest.fixture
def labelled(session):
    return session.export_labels()


def words(session):
    labels = session.labels
    return {row: "yes" if labels.get(row) > 0 else "no" for row in labels.rows.tolist()}


# -- tables ----------------------------------------------------------------------------------------


def test_an_arrow_table_has_the_types_of_the_catalog_and_names_it(session, catalog):
    hits = session.search(row=0, k=5)
    table = hits.to_arrow()
    assert table.column("row").to_pylist() == hits.rows.tolist()
    assert table.schema.field("price").type == pa.int64()
    assert table.schema.field("day").type == pa.date32()
    assert table.schema.field("tags").type == pa.list_(pa.string())
    assert table.schema.field("score").type == pa.float32()
    assert table.column("label").to_pylist() == [f"class {row}" for row in hits]
    said = json.loads(table.schema.metadata[b"clipbranches_widget"])
    assert said == {"catalog": identity(catalog.manifest)}


def test_parquet_is_the_arrow_table(session, tmp_path):
    hits = session.search(row=0, k=5)
    file = hits.to_parquet(tmp_path / "a.parquet")
    read, table = pq.read_table(file), hits.to_arrow()
    assert read.schema.equals(table.schema, check_metadata=True)
    assert read.drop_columns("margin").equals(table.drop_columns("margin"))  # which is NaN
    pd.testing.assert_frame_equal(pd.read_parquet(file), hits.to_pandas(), check_dtype=False)


def test_labels_are_a_table_with_words(session, labelled, tmp_path):
    frame = labelled.to_pandas()
    assert frame.columns.tolist()[:5] == ["row", "label", "path", "caption", "width"]
    assert dict(zip(frame["row"], frame["label"], strict=True)) == words(session)
    assert frame["source_label"].tolist() == [f"class {row}" for row in labelled]
    assert len(labelled) == len(session.labels)
    assert repr(labelled) == "<LabelledRows of hostile.cbcat: 8 yes, 2 no>"
    for read, write in ((pd.read_parquet, labelled.to_parquet), (pd.read_csv, labelled.to_csv)):
        assert read(write(tmp_path / "out"))["label"].tolist() == frame["label"].tolist()
        (tmp_path / "out").unlink()
    assert len(labelled.copy_images(tmp_path / "copies").written) == len(labelled)


def test_removed_rows_are_no_longer_given_out(session, catalog, tmp_path):
    import clipbranches_widget as cb

    smaller = cb.remove(catalog, [0, 1])
    again = Session(smaller, session.path).export_labels()
    assert list(again) == [row for row in session.labels.rows.tolist() if row > 1]


def test_a_user_column_named_path_is_not_lost(tmp_path):
    columns = {"image": pictures(3), "path": ["p0", "p1", "p2"], "source_path": ["s0", "s1", "s2"]}
    pq.write_table(pa.table(columns), tmp_path / "i.parquet")
    catalog = build(str(tmp_path / "i.parquet"), tmp_path / "p.cbcat", image_column="image")
    session = Session(catalog, tmp_path / "p.jsonl")
    session.label(positive=[0], negative=[2])
    frame = session.export_labels().to_pandas()
    assert frame["path"].tolist() == [catalog.uri(0), catalog.uri(2)]
    assert frame["source_path"].tolist() == ["s0", "s2"]
    assert frame["source_source_path"].tolist() == ["p0", "p2"]


# -- image folders ---------------------------------------------------------------------------------


def test_torchvision_reads_an_image_folder(session, labelled, catalog, tmp_path):
    copied = labelled.to_imagefolder(tmp_path / "out")
    read = torchvision.datasets.ImageFolder(tmp_path / "out")
    assert read.classes == ["no", "yes"]
    assert not copied.skipped
    rows = {str(path): row for row, path in copied.written.items()}
    assert {rows[path]: read.classes[at] for path, at in read.samples} == words(session)
    for path, _ in read.samples:
        assert Path(path).read_bytes() == picture(rows[path])
    assert copied.folder == tmp_path / "out"
    assert not list(tmp_path.glob(".*"))


def test_datasets_reads_every_image_whatever_its_name(session, labelled, tmp_path):
    labelled.to_imagefolder(tmp_path / "out")
    read = datasets.load_dataset(str(tmp_path / "out"))
    assert list(read) == ["train"]
    (data,) = read.values()
    assert dict(zip(data["row"], data["label"], strict=True)) == words(session)
    frame = labelled.to_pandas().set_index("row")
    for line in data:
        assert line["caption"] == frame.loc[line["row"], "caption"]
        assert line["tags"] == list(frame.loc[line["row"], "tags"])
        assert line["source_image"] == line["row"]
        original = Image.open(BytesIO(picture(line["row"])))
        assert np.array_equal(line["image"].convert("RGB"), original.convert("RGB"))
    assert data.class_encode_column("label").features["label"].names == ["no", "yes"]


def test_labels_become_classes_without_metadata(labelled, session, tmp_path):
    labelled.to_imagefolder(tmp_path / "out", metadata=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"yes", "no"}
    files = {"train": f"{tmp_path / 'out'}/**"}
    data = datasets.load_dataset("imagefolder", data_files=files)["train"]
    assert data.features["label"].names == ["no", "yes"]
    assert sorted(data["label"]) == [0] * 2 + [1] * 8


def test_an_answer_has_a_folder_for_what_has_no_label(session, tmp_path):
    hits = session.search(row=0, k=10)
    copied = hits.to_imagefolder(tmp_path / "a", labels=session.labels, unlabelled="maybe")
    folders = {row: path.parent.name for row, path in copied.written.items()}
    assert folders == {row: words(session).get(row, "maybe") for row in hits}
    only = hits.to_imagefolder(tmp_path / "b", labels=session.labels, unlabelled=None)
    assert set(only.written) == {row for row in hits if row in words(session)}
    alone = hits.to_imagefolder(tmp_path / "c")  # a search knows no labels
    assert {path.parent.name for path in alone.written.values()} == {"unlabelled"}


def test_an_answer_by_branch(session, tmp_path):
    result = session.refine(threshold=0.001)
    copied = result.to_imagefolder(tmp_path / "out", by="branch")
    assert list(copied.written) == result.rows.tolist()
    for at, row in enumerate(result):
        name = copied.written[row].parent.name
        if row in session.labels:
            assert name == words(session)[row]
        else:
            assert name.startswith(f"R{result.branch_ids[at] + 1} ")
    with pytest.raises(ExportError, match="expected by='label' or by='branch', got 'rule'"):
        result.to_imagefolder(tmp_path / "x", by="rule")
    with pytest.raises(ExportError, match="expected the result of a round for by='branch'"):
        session.search(row=0, k=3).to_imagefolder(tmp_path / "x", by="branch")


def test_links_in_an_image_folder_lead_to_the_files(labelled, catalog, tmp_path):
    copied = labelled.to_imagefolder(tmp_path / "out", link=True)
    for row, path in copied.written.items():
        assert str(path.readlink()) == catalog.uri(row)


def test_a_folder_with_something_in_it_is_left_alone(labelled, tmp_path):
    (tmp_path / "out").mkdir()
    labelled.to_imagefolder(tmp_path / "out")  # empty: fine
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match=r"expected a new or empty folder, found files in .*out"):
        labelled.to_imagefolder(tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["yes", "No", "a/b", "", "..", "con"])
def test_the_folder_of_the_unlabelled_is_a_name_of_its_own(labelled, tmp_path, name):
    with pytest.raises(ExportError, match="expected the name of a folder other than yes and no"):
        labelled.to_imagefolder(tmp_path / "out", unlabelled=name)
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_a_mounted_disk_is_refused_before_anything_is_copied(
    labelled, tmp_path, monkeypatch
):
    volume = tmp_path / "volume"
    volume.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == volume)  # mounting takes root
    with pytest.raises(ExportError, match=r"where a disk or volume is mounted: .*volume/images"):
        labelled.to_imagefolder(volume)
    assert list(tmp_path.glob(".*")) == []
    assert len(labelled.to_imagefolder(volume / "images").written) == len(labelled)


def test_a_cancelled_image_folder_leaves_nothing(labelled, tmp_path):
    cancel = threading.Event()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Cancelled, match="cancelled"):
        labelled.to_imagefolder(
            tmp_path / "out",
            progress=lambda _stage, done: done > 0.3 and cancel.set(),
            cancel=cancel,
        )
    assert sorted(tmp_path.iterdir()) == before


# -- datasets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["paths", "bytes", "thumbnails"])
def test_a_data_set_has_images_classes_and_columns(labelled, session, catalog, images):
    data = labelled.to_huggingface(images=images)
    assert isinstance(data, datasets.Dataset)
    assert isinstance(data.features["image"], datasets.Image)
    assert data.features["label"].names == ["no", "yes"]
    names = [data.features["label"].int2str(value) for value in data["label"]]
    assert dict(zip(data["row"], names, strict=True)) == words(session)
    assert data["source_label"] == [f"class {row}" for row in labelled]
    assert data["source_image"] == list(labelled)
    assert data["caption"] == labelled.to_pandas()["caption"].tolist()
    stored = data.cast_column("image", datasets.Image(decode=False))["image"]
    for row, cell, line in zip(labelled, stored, data, strict=True):
        if images == "paths":
            assert cell == {"bytes": None, "path": catalog.uri(row)}
        elif images == "bytes":
            assert cell["bytes"] == picture(row)
        else:
            assert cell["bytes"] == catalog.thumbnail(row)
        assert line["image"].size == Image.open(BytesIO(picture(row))).size


def test_an_answer_as_a_data_set(session):
    session.label(positive=[], negative=[5])
    result = session.refine(threshold=0.001)
    data = result.to_huggingface()
    expected = [{1: 1, 0: None, -1: 0}[result.labels.get(row)] for row in result]
    assert data["label"] == expected
    assert np.array_equal(np.array(data["score"], np.float32), result.scores)
    assert data["branch"] == [result.branch_text(at) for at in range(len(result))]
    assert "source_label" in data.column_names
    hits = session.search(row=0, k=3).to_huggingface()
    assert hits["row"] == session.hits.rows.tolist()
    assert "label" not in hits.column_names


def test_images_that_are_in_no_file_come_as_bytes(tmp_path):
    images = pictures(12)
    pq.write_table(pa.table({"image": images, "caption": ["x"] * 12}), tmp_path / "i.parquet")
    catalog = build(str(tmp_path / "i.parquet"), tmp_path / "c.cbcat")
    hits = Session(catalog, tmp_path / "s.jsonl").search(row=3, k=12)
    cells = hits.to_huggingface().cast_column("image", datasets.Image(decode=False))["image"]
    assert [cell["bytes"] for cell in cells] == [images[row] for row in hits]


def test_a_lost_image_is_an_error_or_a_thumbnail(labelled, catalog):
    Path(catalog.uri(2)).unlink()
    Path(catalog.uri(4)).write_text("no image")
    message = "found none for 2: row 2 is gone: no such file; row 4 is not an image file"
    for images in ("paths", "bytes"):
        with pytest.raises(ExportError, match=message):
            labelled.to_huggingface(images=images)
    data = labelled.to_huggingface(missing="thumbnail")
    assert data[list(labelled).index(2)]["image"].size == (18, 14)


def test_an_image_without_a_thumbnail_is_null(tmp_path):
    from word_encoder import build_catalog

    catalog = build_catalog(tmp_path / "w.cbcat", 20, with_images=True)
    session = Session(catalog, tmp_path / "s.jsonl")
    session.label(positive=[8, 9], negative=[])
    assert session.export_labels().to_huggingface(missing="thumbnail")["image"][1] is None
    with pytest.raises(ExportError, match="found none for 1: row 9"):
        session.export_labels().to_huggingface(images="thumbnails")


def test_many_images_are_written_some_at_a_time(tmp_path, monkeypatch):
    from clipbranches_widget import huggingface_export

    monkeypatch.setattr(huggingface_export, "_BATCH_BYTES", 3000)
    catalog = build(_files(tmp_path, 60), tmp_path / "c.cbcat")
    hits = Session(catalog, tmp_path / "s.jsonl").search(row=0, k=60)
    data = hits.to_huggingface(images="bytes", cache_dir=tmp_path / "mine")
    (file,) = (tmp_path / "mine").rglob("*.arrow")
    assert [Path(each["filename"]) for each in data.cache_files] == [file]
    with pa.ipc.open_stream(str(file)) as stream:
        sizes = [len(batch) for batch in stream]
    assert sum(sizes) == 60
    assert max(sizes) < 30
    assert data["row"] == hits.rows.tolist()


def test_a_cancelled_data_set_leaves_no_file(labelled, tmp_path):
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled, match="cancelled: no data set was written"):
        labelled.to_huggingface(cache_dir=tmp_path / "mine", cancel=cancel)
    assert not [path for path in (tmp_path / "mine").rglob("*") if path.is_file()]


def test_options_of_a_data_set_are_checked(labelled, tmp_path):
    with pytest.raises(ExportError, match="expected images='paths', 'bytes' or 'thumbnails'"):
        labelled.to_huggingface(images="files")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="or choose another folder with cache_dir="):
        labelled.to_huggingface(cache_dir=tmp_path / "file")


def _files(folder, n):
    paths = []
    for number, data in enumerate(pictures(n)):
        path = folder / "many" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        paths.append(path)
    return paths


# -- FiftyOne --------------------------------------------------------------------------------------


def test_without_fiftyone_the_error_says_how_to_install_it(labelled, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fiftyone", None)
    with pytest.raises(MissingPackageError, match="run: pip install fiftyone"):
        labelled.to_fiftyone()


def test_fiftyone_has_a_sample_for_each_row(labelled, session, catalog):
    fiftyone = pytest.importorskip("fiftyone", reason="fiftyone is not installed")
    try:
        dataset = labelled.to_fiftyone("clipbranches-test")
    except fiftyone.core.config.FiftyOneConfigError as error:
        pytest.skip(f"FiftyOne's database does not start: {error}")
    try:
        read = dict(zip(dataset.values("row"), dataset.values("label.label"), strict=True))
        assert read == words(session)
        assert dataset.values("filepath") == [catalog.uri(row) for row in labelled]
    finally:
        dataset.delete()
