"""`clipbranches export`: what a session found and knows, as files."""

from __future__ import annotations

import shutil

import pandas as pd
import pytest
from word_encoder import WordEncoder, build_catalog

from clipbranches_widget.cli import main
from clipbranches_widget.session import Session


@pytest.fixture
def session(tmp_path):
    catalog = build_catalog(tmp_path / "words.cbcat", 300, with_images=True)
    session = Session(catalog, tmp_path / "s.jsonl", encoder=WordEncoder())
    hits = session.search("striped bird")
    session.label(positive=hits[:5], negative=hits[-4:])
    return session


def test_the_answer_and_the_labels_are_written(session, tmp_path, capsys):
    result = session.refine()
    assert main(["export", str(session.path), str(tmp_path / "a.csv")]) == 0
    assert capsys.readouterr().out == f"{len(result):,} rows written to {tmp_path / 'a.csv'}\n"
    assert pd.read_csv(tmp_path / "a.csv")["row"].tolist() == result.rows.tolist()
    assert main(["export", str(session.path), str(tmp_path / "l.parquet"), "--labels"]) == 0
    frame = pd.read_parquet(tmp_path / "l.parquet")
    assert frame["label"].tolist().count("yes") == 5
    assert main(["export", str(session.path), str(tmp_path / "sorted")]) == 0
    files = {int(file.stem): file.parent.name for file in (tmp_path / "sorted").glob("*/*.png")}
    words = {1: "yes", -1: "no", 0: "unlabelled"}
    assert files == {row: words[session.labels.get(row)] for row in result if row % 10 != 9}
    assert main(["export", str(session.path), str(tmp_path / "flat"), "--to", "images"]) == 0
    assert {int(file.stem) for file in (tmp_path / "flat").iterdir()} == set(files)


def test_a_catalog_that_moved_is_named(session, tmp_path, capsys):
    moved = shutil.move(session.catalog.path, tmp_path / "moved.cbcat")
    export = ["export", str(session.path), str(tmp_path / "l.csv"), "--labels"]
    assert main(export) == 1
    assert "expected a catalog" in capsys.readouterr().err
    assert main([*export, "--catalog", str(moved)]) == 0
    assert len(pd.read_csv(tmp_path / "l.csv")) == 9
    assert main([*export, "--catalog", str(moved)]) == 1
    assert "expected no file at" in capsys.readouterr().err
    assert main([*export, "--catalog", str(moved), "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{session}", "a.csv"], "expected a session with a round, got <Session"),
        (["{session}", "f", "--labels", "--overwrite"], "expected --overwrite only without"),
        (
            ["{session}", "a.json", "--labels"],
            "expected OUT to end in .csv or .parquet, or to be a",
        ),
        (["lost.jsonl", "a.csv"], "expected a session file, whose first line names its catalog"),
    ],
)
def test_what_cannot_be_exported(session, tmp_path, capsys, arguments, message):
    paths = {"{session}": session.path, "a.csv": tmp_path / "a.csv", "f": tmp_path / "f"}
    assert main(["export", *(str(paths.get(each, each)) for each in arguments)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.csv").exists()


def test_the_case_of_the_ending_does_not_matter(session, tmp_path):
    assert main(["export", str(session.path), str(tmp_path / "L.CSV"), "--labels"]) == 0
    assert len(pd.read_csv(tmp_path / "L.CSV")) == 9
