"""Answers as files: what is in them, what is kept, and what hostile names cannot do."""

from __future__ import annotations

import threading
import unicodedata
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipbranches_widget.errors import Cancelled, ExportError
from clipbranches_widget.image_copy import MAX_NAME_BYTES, copy_images, safe_name
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.session import Session

FORMULAS = ["=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", "\tx", "\r=1", " =1", "\uff1d1"]


def draw(path, colour="red", kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), colour).save(path, kind)
    return path


def catalog_of(folder, uris, captions=None, **columns):
    """Build a catalog with one row a uri."""
    rng = np.random.default_rng(len(uris))
    items = {"uri": [str(uri) for uri in uris], "caption": captions or [""] * len(uris), **columns}
    return from_embeddings(
        rng.normal(size=(len(uris), 8)).astype(np.float32),
        folder / "c.cbcat",
        items=pa.table(items),
    )


@pytest.fixture
def pictures(tmp_path):
    """A catalog of 60 pictures in two folders, of which one is lost and one is no image."""
    folder = tmp_path / "pictures"
    uris = [draw(folder / f"{'ab'[row % 2]}/{row:02d}.png") for row in range(60)]
    uris[7].unlink()
    uris[8].write_text("no image")
    return catalog_of(
        tmp_path,
        uris,
        [f"picture, number {row}" for row in range(60)],
        count=pa.array([None if row % 3 else row for row in range(60)], pa.int64()),
    )


@pytest.fixture
def result(pictures, tmp_path):
    """A round's answer that holds every row."""
    session = Session(pictures, tmp_path / "s.jsonl")
    session.label(positive=range(10), negative=[])
    return session.refine(threshold=0.001)


@pytest.fixture
def hits(pictures, tmp_path):
    """All rows, by a search: no branches."""
    return Session(pictures, tmp_path / "h.jsonl").search(row=3, k=60)


# -- tables ---------------------------------------------------------------------------------------


def test_parquet_holds_what_to_pandas_returns_with_its_types(result, tmp_path):
    path = result.to_parquet(tmp_path / "new" / "found.parquet")
    assert path == tmp_path / "new" / "found.parquet"
    table = pq.read_table(path)
    frame = pd.read_parquet(path)
    expected = result.to_pandas()
    assert frame.columns.tolist() == expected.columns.tolist()
    pd.testing.assert_frame_equal(frame, expected, check_dtype=False)
    assert table.schema.field("count").type == pa.int64()  # with nulls: pandas makes floats of it
    assert [file.name for file in path.parent.iterdir()] == ["found.parquet"]


def test_csv_is_utf_8_with_a_header(result, tmp_path):
    path = result.to_csv(tmp_path / "found.csv")
    text = path.read_bytes().decode("utf-8")
    assert text.startswith("row,score,margin,branch,path,caption,")
    assert text.count("\r\n") == text.count("\n") == len(result) + 1
    frame = pd.read_csv(path)
    assert frame["row"].tolist() == result.rows.tolist()
    assert frame["caption"].tolist() == [f"picture, number {row}" for row in result]
    assert np.array_equal(frame["score"].to_numpy(np.float32), result.scores)


def test_text_that_a_spreadsheet_would_run_gets_an_apostrophe(tmp_path):
    names = ["plain", "\u202etext", "a=b", "", "1-1", *FORMULAS]
    catalog = catalog_of(
        tmp_path, [""] * len(names), names, **{"=cmd": names, "price": [-1.5] * len(names)}
    )
    rows = Session(catalog, tmp_path / "s.jsonl").search(row=0, k=len(names))
    frame = pd.read_csv(rows.to_csv(tmp_path / "a.csv"), keep_default_na=False)
    captions = [names[row] for row in rows]
    for column in ("caption", "'=cmd"):
        assert frame[column].tolist() == [f"'{c}" if c in FORMULAS else c for c in captions]
    assert frame["price"].tolist() == [-1.5] * len(names)  # a number is no formula
    plain = rows.to_csv(tmp_path / "b.csv", escape_formulas=False)
    text = plain.read_bytes().decode("utf-8")
    assert ",=HYPERLINK(1)," in text
    assert "'=" not in text


@pytest.mark.parametrize("method", ["to_csv", "to_parquet", "contact_sheet"])
def test_what_is_there_is_kept_unless_told_otherwise(hits, tmp_path, method):
    write = getattr(hits[:3], method)
    path = tmp_path / "mine"
    path.write_text("mine")
    with pytest.raises(ExportError, match=r"found one: overwrite=True replaces it"):
        write(path)
    assert path.read_text() == "mine"
    assert write(path, overwrite=True) == path
    assert path.read_bytes() != b"mine"
    with pytest.raises(ExportError, match="expected the path of a file, got a folder"):
        write(tmp_path, overwrite=True)
    with pytest.raises(ExportError, match=r"expected a folder at .*mine"):
        write(path / "below.csv")


def test_a_failure_half_way_leaves_what_was_there(hits, tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    path.write_text("mine")

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(ExportError, match=r"cannot write .*t\.csv: No space left on device"):
        hits.to_csv(path, overwrite=True)
    assert path.read_text() == "mine"
    assert not list(tmp_path.glob(".t.csv*"))


def test_an_empty_answer_is_an_empty_table(hits, tmp_path):
    empty = hits[:0]
    assert len(pd.read_parquet(empty.to_parquet(tmp_path / "e.parquet"))) == 0
    assert len(pd.read_csv(empty.to_csv(tmp_path / "e.csv"))) == 0
    assert not empty.copy_images(tmp_path / "out").written


# -- image files ----------------------------------------------------------------------------------


def test_images_keep_their_names_and_bytes(hits, pictures, tmp_path):
    said = []
    copied = hits.copy_images(tmp_path / "out", progress=lambda *step: said.append(step))
    assert list(copied.written) == [row for row in hits if row not in (7, 8)]
    for row, path in copied.written.items():
        source = tmp_path / pictures.uri(row)
        assert path.name == source.name
        assert path.read_bytes() == source.read_bytes()
    assert copied.skipped == {7: "is gone: no such file", 8: "is not an image file"}
    assert sorted(p.name for p in copied.folder.iterdir()) == sorted(
        p.name for p in copied.written.values()
    )
    assert str(copied).startswith(f"58 images written to {tmp_path / 'out'}; 2 skipped: ")
    assert said[-1] == ("Done", 1.0)
    assert [fraction for _, fraction in said] == sorted(fraction for _, fraction in said)


def test_links_lead_to_the_files(hits, pictures, tmp_path):
    copied = hits.copy_images(tmp_path / "out", link=True)
    for row, path in copied.written.items():
        assert path.is_symlink()
        assert str(path.readlink()) == pictures.uri(row)


def test_a_folder_for_each_branch(result, tmp_path):
    copied = result.copy_images(tmp_path / "out", by="branch")
    for position, row in enumerate(result):
        if row in copied.written:
            place = copied.written[row].parent
            assert place.parent == tmp_path / "out"
            assert place.name.startswith(f"R{result.branch_ids[position] + 1} ")
    with pytest.raises(ExportError, match="expected by='flat' or by='branch', got 'rule'"):
        result.copy_images(tmp_path / "out", by="rule")


def test_a_search_has_no_branches_to_sort_by(hits, tmp_path):
    with pytest.raises(ExportError, match="expected the result of a round for by='branch'"):
        hits.copy_images(tmp_path / "out", by="branch")


def test_same_names_get_the_row_whatever_the_case(tmp_path):
    uris = [
        draw(tmp_path / "a/x.png", "red"),
        draw(tmp_path / "b/X.png", "green"),
        draw(tmp_path / "c/y.png", "blue"),
        draw(tmp_path / "d/x-row0.png", "black"),
    ]
    catalog = catalog_of(tmp_path, uris)
    for rows in ([0, 1, 2, 3], [3, 2, 1, 0]):  # names do not depend on the ranking
        folder = tmp_path / f"out{rows[0]}"
        written = copy_images(catalog, rows, folder).written
        assert {row: path.name for row, path in written.items()} == {
            0: "x-row0-row0.png",
            1: "X-row1.png",
            2: "y.png",
            3: "x-row0.png",
        }
        assert all(written[row].read_bytes() == uris[row].read_bytes() for row in rows)


def test_files_that_are_there_stay_and_a_second_call_goes_on(hits, pictures, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "05.png").write_text("mine")
    copied = hits.copy_images(out)
    reason = "has the name of a file that is there: overwrite=True replaces it"
    assert copied.skipped[5] == reason
    assert (out / "05.png").read_text() == "mine"
    again = hits.copy_images(out)
    assert not again.written
    assert again.skipped[4] == reason
    (out / "06.png").unlink()
    (out / "06.png").mkdir()
    replaced = hits.copy_images(out, overwrite=True)
    assert replaced.skipped[6] == "has the name of a folder that is there"
    assert (out / "05.png").read_bytes() == (tmp_path / pictures.uri(5)).read_bytes()


@pytest.mark.parametrize("link", [False, True])
def test_an_image_is_never_replaced_by_itself(tmp_path, link):
    uri = draw(tmp_path / "pictures" / "a.png")
    before = uri.read_bytes()
    catalog = catalog_of(tmp_path, [uri])
    copied = copy_images(catalog, [0], uri.parent, link=link, overwrite=True)
    assert copied.skipped == {0: "is there already"}
    assert not uri.is_symlink()
    assert uri.read_bytes() == before


def test_an_old_link_is_replaced_and_not_written_through(tmp_path):
    catalog = catalog_of(tmp_path, [draw(tmp_path / "a.png")])
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").symlink_to(precious)
    assert copy_images(catalog, [0], tmp_path / "out").skipped
    assert copy_images(catalog, [0], tmp_path / "out", overwrite=True).written
    assert precious.read_text() == "mine"
    assert not (tmp_path / "out" / "a.png").is_symlink()


def test_nothing_is_written_outside_the_folder(tmp_path):
    catalog = catalog_of(tmp_path, [draw(tmp_path / "a.png")])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "R1").symlink_to(tmp_path / "elsewhere")
    copied = copy_images(catalog, [0], tmp_path / "out", folders=["R1"])
    assert copied.skipped == {0: "would be outside the folder: a link leads there"}
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_a_hostile_catalog_names_is_not_copied(tmp_path):
    secret = tmp_path / "id_rsa"
    secret.write_text("-----BEGIN KEY-----")
    odd = draw(tmp_path / "images" / "..\\..\\evil\u202egnp.png")
    uris = [secret, odd, "", f"file://{draw(tmp_path / 'with space.png')}", "file:///dev/null"]
    copied = copy_images(catalog_of(tmp_path, uris), range(5), tmp_path / "out")
    assert {row: path.name for row, path in copied.written.items()} == {
        1: "evilgnp.png",
        3: "with space.png",
    }
    assert copied.skipped[0] == "is not an image file"
    assert copied.skipped[2] == "has no file: the catalog was built from embeddings alone"
    assert copied.skipped[4] == "is gone: no such file"


def test_a_file_of_an_archive_is_written_as_it_is_there(tmp_path):
    source = draw(tmp_path / "a.jpg", kind="JPEG")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(source, "2024/inside.jpg")
        archive.writestr("notes.jpg", "no image")
    uris = [f"zip://{name}::{tmp_path / 'photos.zip'}" for name in ("2024/inside.jpg", "notes.jpg")]
    catalog = catalog_of(tmp_path, uris)
    copied = copy_images(catalog, [0, 1], tmp_path / "out")
    assert copied.written == {0: tmp_path / "out" / "inside.jpg"}, copied
    assert copied.written[0].read_bytes() == source.read_bytes()
    assert copied.skipped == {1: "is not an image"}
    linked = copy_images(catalog, [0], tmp_path / "links", link=True)
    assert linked.skipped == {0: "has no file to link to: copy it instead"}


def test_drawings_of_the_demo_are_written_as_png(tmp_path):
    copied = copy_images(catalog_of(tmp_path, ["openmoji:1F426"]), [0], tmp_path / "out")
    assert copied.written[0].name == "1F426.png"
    with Image.open(copied.written[0]) as image:
        assert image.format == "PNG"


def test_it_stops_when_cancelled_and_keeps_what_was_written(hits, tmp_path):
    cancel = threading.Event()

    def progress(_stage, fraction):
        if fraction >= 0.5:
            cancel.set()

    with pytest.raises(Cancelled, match=r"cancelled: \d+ of 60 images are in .*out"):
        hits.copy_images(tmp_path / "out", progress=progress, cancel=cancel)
    files = list((tmp_path / "out").iterdir())
    assert 20 < len(files) < 40
    assert all(file.suffix == ".png" for file in files)  # nothing half written


def test_a_folder_that_cannot_be_made_is_an_error(hits, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ExportError, match=r"expected a folder at .*out, or a place for one"):
        hits.copy_images(tmp_path / "out")


@given(st.text(max_size=300))
def test_every_name_becomes_one_that_is_safe(name):
    safe = safe_name(name)
    assert safe
    assert safe not in {".", ".."}
    assert not set(safe) & set('<>:"/\\|?*')
    assert len(safe.encode()) <= MAX_NAME_BYTES + len(".png")
    assert safe == safe.strip(". ")
    assert not any(unicodedata.category(char).startswith("C") for char in safe)
    assert safe_name(safe) == safe


def test_a_long_name_keeps_its_ending():
    assert safe_name("\u00e9" * 300 + ".jpeg").endswith("\u00e9.jpeg")
    assert len(safe_name("\u00e9" * 300 + ".jpeg").encode()) <= MAX_NAME_BYTES
    assert safe_name("nul.png") == "_nul.png"
    rule = "R2 arrow from 0.300 and like bird, swan below 0.812 and like elephant, gorilla"
    assert safe_name(rule) == rule
    assert safe_name(rule * 3) == (rule * 3)[:MAX_NAME_BYTES].rstrip()
