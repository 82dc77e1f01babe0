"""Labels out and in again: every way, on the same catalog and on one built anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from drawn_images import build, picture
from hypothesis import given
from hypothesis import strategies as st

import clipbranches_widget as cb
from clipbranches_widget.errors import LabelError, SessionFileError
from clipbranches_widget.images import content_hash
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.label_values import read_values
from clipbranches_widget.session import Session

N = 14
NAMES = [f"{number}.png" for number in range(N - 4)] + ["=a.png", "-b.png", "'c.png", "d e.png"]
YES, NO = [0, 2, 3, 10, 12], [1, 7, 11, 13]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep the cache of `datasets` out of the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    """Pictures, all different."""
    for number, name in enumerate(NAMES):
        path = tmp_path / "images" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(number))
    return tmp_path / "images"


@pytest.fixture
def catalog(folder, tmp_path):
    return build([folder / name for name in NAMES], tmp_path / "c.cbcat")


@pytest.fixture
def session(catalog, tmp_path):
    session = Session(catalog, tmp_path / "s.jsonl")
    session.label(positive=YES, negative=NO)
    return session


@pytest.fixture(params=["same", "other rows", "other places"])
def target(request, catalog, folder, tmp_path):
    """A new session on the same catalog, and on two with other row ids."""
    if request.param == "same":
        return Session(catalog, tmp_path / "t.jsonl")
    if request.param == "other rows":  # the folder itself, by name: relative paths
        return Session(build(folder, tmp_path / "rebuilt.cbcat"), tmp_path / "t.jsonl")
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    rebuilt = build([moved / name for name in reversed(NAMES)], tmp_path / "rebuilt.cbcat")
    return Session(rebuilt, tmp_path / "t.jsonl")


def by_name(session):
    """Return what a session says of each file name."""
    labels = session.labels
    return {Path(session.catalog.uri(r)).name: labels.get(r) for r in labels.rows.tolist()}


SAID = {NAMES[row]: 1 for row in YES} | {NAMES[row]: -1 for row in NO}


def jsonl(frame, path):
    frame.to_json(path, orient="records", lines=True)
    return path


WAYS = {
    "LabelledRows": lambda out, _: out,
    "pandas": lambda out, _: out.to_pandas(),
    "polars": lambda out, _: pl.from_arrow(out.to_arrow()),
    "arrow": lambda out, _: out.to_arrow(),
    "parquet": lambda out, tmp: out.to_parquet(tmp / "l.parquet"),
    "parquet of pandas": lambda out, tmp: (
        out.to_pandas().to_parquet(tmp / "l.parquet") or tmp / "l.parquet"
    ),
    "csv": lambda out, tmp: str(out.to_csv(tmp / "l.csv")),
    "plain csv": lambda out, tmp: out.to_csv(tmp / "l.csv", escape_formulas=False),
    "csv of pandas": lambda out, tmp: out.to_pandas().to_csv(tmp / "l.csv") or tmp / "l.csv",
    "jsonl": lambda out, tmp: jsonl(out.to_pandas(), tmp / "l.jsonl"),
    "feather": lambda out, tmp: (
        pa.feather.write_feather(out.to_arrow(), str(tmp / "l.feather")) or tmp / "l.feather"
    ),
    "imagefolder": lambda out, tmp: out.to_imagefolder(tmp / "f").folder,
    "bare imagefolder": lambda out, tmp: out.to_imagefolder(tmp / "f", metadata=False).folder,
    "linked imagefolder": lambda out, tmp: out.to_imagefolder(tmp / "f", link=True).folder,
    "datasets": lambda out, _: out.to_huggingface(),
    "saved datasets": lambda out, tmp: out.to_huggingface().save_to_disk(tmp / "d") or tmp / "d",
    "parquet of datasets": lambda out, tmp: (
        out.to_huggingface(images="bytes").to_parquet(tmp / "d.parquet") and tmp / "d.parquet"
    ),
    "load_dataset": lambda out, tmp: datasets.load_dataset(
        str(out.to_imagefolder(tmp / "f").folder)
    )["train"],
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_out_comes_back_in(session, target, tmp_path, way):
    done = target.import_labels(WAYS[way](session.export_labels(), tmp_path))
    assert by_name(target) == SAID
    assert sum(done.matched.values()) == len(SAID) == done.n_changed
    assert not done.unmatched
    assert target.undo() == "label 5 yes, 4 no"
    assert not len(target.labels)


def test_a_session_file_comes_back_in(session, target):
    session.unlabel([0])
    session.undo()
    session.label(negative=[5])
    session.undo()
    done = target.import_labels(session.path)
    assert by_name(target) == SAID
    assert sum(done.matched.values()) == len(SAID)


def test_a_session_file_whose_catalog_is_gone(session, catalog, folder, tmp_path):
    rebuilt = Session(build(folder, tmp_path / "rebuilt.cbcat"), tmp_path / "r.jsonl")
    moved = shutil.move(catalog.path, tmp_path / "moved.cbcat")
    with pytest.raises(LabelError, match="which may be those of another catalog: write the labels"):
        rebuilt.import_labels(session.path)
    same = Session(cb.open(moved), tmp_path / "t.jsonl")
    same.import_labels(session.path)
    assert same.labels == session.labels


def test_an_answer_with_folders_comes_back_in(session, target, tmp_path):
    everything = session.search(row=0, k=N)
    everything.to_imagefolder(tmp_path / "f", labels=session.labels)
    done = target.import_labels(tmp_path / "f")
    assert by_name(target) == SAID
    assert done.n_unlabelled == N - len(SAID)


def test_moving_files_between_folders_changes_their_labels(session, target, tmp_path):
    written = session.export_labels().to_imagefolder(tmp_path / "f").written
    moved = [written[0], written[10]]
    for path in moved:
        path.rename(tmp_path / "f" / "no" / path.name)
    written[1].unlink()
    target.import_labels(tmp_path / "f")
    expected = {**SAID, NAMES[0]: -1, NAMES[10]: -1}
    del expected[NAMES[1]]
    assert by_name(target) == expected


def test_a_tree_of_the_catalogs_own_files(tmp_path):
    for number in range(6):
        path = (
            tmp_path / "pets" / ("train" if number % 2 else "test") / ("cats", "dogs")[number // 3]
        )
        path.mkdir(parents=True, exist_ok=True)
        (path / "same.png").write_bytes(picture(0))  # all alike: only the path tells
    catalog = build(tmp_path / "pets", tmp_path / "p.cbcat")
    session = Session(catalog, tmp_path / "p.jsonl")
    with pytest.raises(LabelError, match=r"found 'test/cats', 'test/dogs', .*mapping="):
        session.import_labels(tmp_path / "pets")
    done = session.import_labels(tmp_path / "pets", mapping={"cats": "yes", "dogs": "no"})
    assert done.matched == {"row": 0, "path": len(catalog), "content_hash": 0}
    labels = {catalog.uri(row): session.labels.get(row) for row in range(len(catalog))}
    assert labels == {uri: 1 if "cats" in uri else -1 for uri in labels}


def test_the_report_says_what_was_matched_and_what_not(catalog, folder, tmp_path):
    session = Session(catalog, tmp_path / "t.jsonl")
    session.label(positive=[2], negative=[3])
    lines = [(str(folder / "0.png"), "yes"), ("images/1.png", "no"), (str(folder / "2.png"), "yes")]
    lines += [(str(folder / "3.png"), "yes"), (str(folder / "4.png"), "")]
    lines += [(f"lost/{number}.png", "no") for number in range(7)]
    pd.DataFrame(lines, columns=["path", "label"]).to_csv(tmp_path / "l.csv", index=False)
    done = session.import_labels(tmp_path / "l.csv")
    assert done.matched == {"row": 0, "path": 4, "content_hash": 0}
    assert done.n_changed == 3  # 0, 1 and 3
    assert done.n_unlabelled == 1
    assert done.unmatched == tuple(f"lost/{number}.png" for number in range(7))
    assert str(done) == (
        "4 labels matched (4 by path): 3 yes, 1 no; 3 changed; 7 not in the catalog: lost/0.png, "
        "lost/1.png, lost/2.png, lost/3.png, lost/4.png and 2 more; 1 without a label"
    )
    assert session.labels.positive.tolist() == [0, 2, 3]
    assert session.undo() == "label 2 yes, 1 no"
    assert session.labels.negative.tolist() == [3]


def test_an_image_that_is_yes_and_no_changes_nothing(session, catalog, folder):
    frame = pd.DataFrame(
        {"path": [folder / "5.png", "x", catalog.uri(5)], "label": ["yes", "yes", "no"]}
    )
    frame["path"] = frame["path"].astype(str)
    before = len(session.history)
    with pytest.raises(
        LabelError, match=r"got both for 1: .*5\.png: drop one .*nothing was changed"
    ):
        session.import_labels(frame)
    assert len(session.history) == before
    twice = frame.assign(label="yes")
    assert sum(session.import_labels(twice).matched.values()) == 2


def test_row_ids_alone_are_taken_only_where_they_are_known(session, catalog, target):
    frame = pd.DataFrame({"row": [0, 4], "label": [1, 0]})
    with pytest.raises(LabelError, match="or say by='row' if they are of this one"):
        target.import_labels(frame)
    target.import_labels(frame, by="row")
    assert target.labels.to_dict() == {"positive": [0], "negative": [4]}


def test_row_ids_of_another_catalog_are_not_believed(tmp_path):
    """Two catalogs of the same names: other pictures under the same relative paths."""
    sessions = []
    for place, numbers in (("a", range(8)), ("b", (8, 9, 3, 2, 10, 11, 12, 13))):
        for name, number in enumerate(numbers):
            path = tmp_path / place / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(picture(number))
        catalog = build(tmp_path / place, tmp_path / f"{place}.cbcat")
        sessions.append(Session(catalog, tmp_path / f"{place}.jsonl"))
    one, other = sessions
    one.label(positive=[0, 2], negative=[3, 4])
    done = other.import_labels(one.export_labels())
    assert other.labels.to_dict() == {"positive": [3], "negative": [2]}  # the same pictures
    assert done.matched == {"row": 0, "path": 0, "content_hash": 2}
    assert done.unmatched == ("0.png", "4.png")
    other.undo()
    other.import_labels(one.export_labels(), by="row")
    assert other.labels == one.labels


def test_only_one_way_of_matching(session, catalog, tmp_path):
    table = session.export_labels().to_arrow()
    target = Session(catalog, tmp_path / "t.jsonl")
    for by in ("row", "path", "content_hash"):
        done = target.import_labels(table, by=by)
        assert done.matched[by] == sum(done.matched.values()) == len(SAID)
    with pytest.raises(
        LabelError, match="expected by='row', 'path', 'content_hash' or None, got 'x'"
    ):
        target.import_labels(table, by="x")


def test_labels_of_a_catalog_of_embeddings_alone(rng, tmp_path):
    vectors = rng.normal(size=(9, 8)).astype(np.float32)
    catalog = from_embeddings(vectors, tmp_path / "e.cbcat")
    session = Session(catalog, tmp_path / "e.jsonl")
    session.label(positive=[3], negative=[5])
    again = Session(catalog, tmp_path / "f.jsonl")
    file = session.export_labels().to_parquet(tmp_path / "l.parquet")
    assert again.import_labels(file).matched["row"] == 2
    assert again.labels == session.labels
    other = from_embeddings(vectors[::-1], tmp_path / "o.cbcat")
    with pytest.raises(LabelError, match="which may be those of another catalog"):
        Session(other, tmp_path / "o.jsonl").import_labels(file)


def test_removed_rows_are_not_labelled(session, catalog, tmp_path):
    table = session.export_labels().to_arrow()
    smaller = Session(cb.remove(catalog, [0, 1]), tmp_path / "t.jsonl")
    done = smaller.import_labels(table)
    assert len(done.unmatched) == 2
    assert smaller.labels.to_dict() == {"positive": YES[1:], "negative": NO[1:]}


def test_a_file_that_names_the_same_picture_under_other_names(catalog, tmp_path):
    (tmp_path / "f" / "Yes").mkdir(parents=True)
    (tmp_path / "f" / "NO" / "deep").mkdir(parents=True)
    (tmp_path / "f" / "Yes" / "mine.png").write_bytes(picture(4))
    (tmp_path / "f" / "NO" / "deep" / "other.png").write_bytes(picture(5))
    (tmp_path / "f" / "NO" / "unknown.png").write_bytes(picture(99))
    session = Session(catalog, tmp_path / "t.jsonl")
    done = session.import_labels(tmp_path / "f")
    assert session.labels.to_dict() == {"positive": [4], "negative": [5]}
    assert done.unmatched == (str(tmp_path / "f" / "NO" / "unknown.png"),)


VALUES = {
    "words": (["yes", " NO ", ""], None),
    "numbers": ([1, 0, None], None),
    "signs": ([1.0, -1.0, float("nan")], None),
    "truth": ([True, False, None], None),
    "texts": (["1", "-1", "nan"], None),
    "long words": (["Positive", "negative", None], None),
    "classes": (["cat", "dog", "fox"], {"cat": "yes", "dog": "no", "fox": None}),
    "numbered classes": ([2, 1, 0], {2: True, 1: False, 0: None}),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_are_labels(catalog, folder, tmp_path, name):
    values, mapping = VALUES[name]
    frame = pd.DataFrame({"file_name": ["0.png", "1.png", "2.png"], "mark": values})
    path = folder / "labels.csv"
    frame.to_csv(path, index=False)
    for source in (path, jsonl(frame, folder / "labels.jsonl")):
        session = Session(catalog, tmp_path / f"{source.suffix}.jsonl")
        if mapping:
            with pytest.raises(LabelError, match=r"expected labels that are yes and no|got both 0"):
                session.import_labels(source, label_column="mark", mapping={"x": "yes"})
        done = session.import_labels(source, label_column="mark", mapping=mapping)
        assert session.labels.to_dict() == {"positive": [0], "negative": [1]}
        assert done.n_unlabelled == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["yes", "maybe", "maybe", 7], "expected labels that are .*got 'maybe', 7: say what"),
        ([1, 0, -1], "got both 0 and -1: say what they stand for"),
        (["1", "0", "-1"], "got both 0 and -1"),
        ([[1]], r"got \[1\]"),
    ],
)
def test_values_that_are_no_labels(values, message):
    with pytest.raises(LabelError, match=message):
        read_values(values)


@given(st.lists(st.sampled_from([1, -1]), min_size=1))
def test_both_ways_to_write_a_label_in_numbers(labels):
    assert read_values(labels) == read_values([label > 0 for label in labels]) == labels
    assert read_values([int(label > 0) for label in labels]) == labels
    assert read_values([str(float(label)) for label in labels]) == labels


def test_sources_that_have_no_labels(session, tmp_path):
    (tmp_path / "notes.txt").write_text("yes")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "bad.jsonl").write_text("no json")
    (tmp_path / "bad.csv").write_text("")
    header = json.loads(session.path.read_text().splitlines()[0]) | {"catalog": {}}
    (tmp_path / "cut.jsonl").write_text(json.dumps(header))
    pq.write_table(pa.table({"row": [1], "verdict": ["yes"]}), tmp_path / "other.parquet")
    for source, message in {
        tmp_path / "lost.csv": "expected a file or folder of labels at .*lost.csv, found none",
        tmp_path / "notes.txt": r"expected labels as \.csv, .*got .*notes\.txt",
        tmp_path / "empty": "expected images in folders whose names are yes and no.*no images",
        tmp_path / "bad.parquet": "expected Parquet or Arrow in .*bad.parquet",
        tmp_path / "bad.jsonl": "expected a JSON object a line in .*bad.jsonl",
        tmp_path / "bad.csv": "expected a table with a header in .*bad.csv",
        tmp_path / "other.parquet": "expected a column 'label' of labels, got 'row'",
    }.items():
        with pytest.raises(LabelError, match=message):
            session.import_labels(source)
    with pytest.raises(SessionFileError, match=r"whose first line names its catalog, at .*cut"):
        session.import_labels(tmp_path / "cut.jsonl")
    with pytest.raises(LabelError, match=r"expected a table of labels, .*got int"):
        session.import_labels(3)
    with pytest.raises(LabelError, match="expected a column that names the images"):
        session.import_labels(pd.DataFrame({"label": ["yes"], "name": ["a"]}))
    assert len(session.labels) == len(SAID)


@pytest.mark.parametrize("uris", [None, [f"/elsewhere/{row}.png" for row in range(N)]])
def test_row_ids_are_not_believed_where_the_catalog_knows_no_content(session, rng, tmp_path, uris):
    vectors = rng.normal(size=(N, 8)).astype(np.float32)
    items = None if uris is None else pd.DataFrame({"uri": uris})
    other = Session(from_embeddings(vectors, tmp_path / "e.cbcat", items=items))
    done = other.import_labels(session.export_labels().to_pandas())
    assert len(done.unmatched) == len(SAID)
    assert not len(other.labels)


def test_tables_of_two_catalogs_in_one(session, catalog, folder, tmp_path):
    other = Session(build([folder / name for name in reversed(NAMES)], tmp_path / "o.cbcat"))
    other.label(negative=[5])
    both = pa.concat_tables([s.export_labels().to_arrow() for s in (session, other)])
    third = Session(catalog, tmp_path / "t.jsonl")
    third.import_labels(both)  # its metadata names the first catalog alone
    assert by_name(third) == SAID | {NAMES[N - 6]: -1}


def test_a_path_that_may_be_two_images_is_an_error(folder, tmp_path):
    (folder / "2020").mkdir()
    (folder / "2020" / NAMES[0]).write_bytes(picture(50))
    session = Session(build(folder, tmp_path / "tree.cbcat"))
    labels = folder / "2020" / "labels.csv"
    labels.write_text(f"path,label\n{NAMES[0]},no\n", encoding="utf-8")
    with pytest.raises(LabelError, match=r"which is '0\.png' of the catalog, and '2020/0\.png'"):
        session.import_labels(labels)
    content = content_hash(picture(50))
    labels.write_text(f"path,label,content_hash\n{NAMES[0]},no,{content}\n", encoding="utf-8")
    session.import_labels(labels)
    assert [session.catalog.uri(row) for row in session.labels.negative] == [f"2020/{NAMES[0]}"]


@pytest.mark.parametrize("values", [[1.0, 0.0, None], ["1.0", "0.0", ""], [1, 0, 0]])
def test_a_mapping_of_whole_numbers_holds_for_floats(values):
    assert read_values(values, {1: "no", 0: "yes"})[:2] == [-1, 1]
    assert read_values(values, {"1.0": "no", "0": "yes"})[:2] == [-1, 1]


def test_objects_and_mixed_values_in_a_frame(catalog, folder, tmp_path):
    paths = [folder / NAMES[0], folder / NAMES[1], str(folder / NAMES[2]), None]
    frame = pd.DataFrame({"path": paths, "label": [1, "no", None, "yes"], "other": [{1}] * 4})
    session = Session(catalog, tmp_path / "t.jsonl")
    done = session.import_labels(frame)
    assert session.labels.to_dict() == {"positive": [0], "negative": [1]}
    assert (len(done.unmatched), done.n_unlabelled) == (1, 1)


@pytest.mark.parametrize(
    "text",
    [
        "path;label\r\n{0};yes\r\n{1};no\r\n",
        "path\tlabel\n{0}\tyes\n{1}\tno\n",
        "path,label\n{0},yes,\n{1},no,\n",
        "\ufeffpath,label\n{0},yes\n{1},no\n",
    ],
)
def test_what_spreadsheets_make_of_a_csv(catalog, folder, tmp_path, text):
    names = [folder / NAMES[0], folder / NAMES[1]]
    (tmp_path / "l.csv").write_text(text.format(*names), encoding="utf-8")
    session = Session(catalog, tmp_path / "t.jsonl")
    session.import_labels(tmp_path / "l.csv")
    assert session.labels.to_dict() == {"positive": [0], "negative": [1]}


def test_a_name_that_begins_with_a_tilde(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "~$a.png").write_bytes(picture(0))
    session = Session(build(tmp_path / "images", tmp_path / "c.cbcat"))
    session.import_labels(pd.DataFrame({"path": ["~$a.png"], "label": ["yes"]}))
    assert session.labels.to_dict() == {"positive": [0], "negative": []}


def test_captions_with_rare_line_ends_come_back_in(rng, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    items = pd.DataFrame({"path": [str(tmp_path / "a.png")], "caption": ["a\u2028b\x85c\x0bd"]})
    catalog = build(items, tmp_path / "c.cbcat")
    session = Session(catalog)
    session.label(positive=[0])
    out = session.export_labels().to_imagefolder(tmp_path / "f")
    again = Session(catalog)
    assert again.import_labels(out.folder).matched["row"] == 1
    assert again.import_labels(out.folder / "metadata.jsonl").matched["row"] == 1


def test_a_metadata_file_of_another_kind_is_passed_over(catalog, tmp_path):
    (tmp_path / "f" / "yes").mkdir(parents=True)
    (tmp_path / "f" / "yes" / "x.png").write_bytes(picture(3))
    (tmp_path / "f" / "metadata.jsonl").write_text('{"path": "x.png"}\n', encoding="utf-8")
    session = Session(catalog, tmp_path / "t.jsonl")
    session.import_labels(tmp_path / "f")
    assert session.labels.to_dict() == {"positive": [3], "negative": []}
