"""The command line: real folders, real catalogs, a real JupyterLab server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw

import clipbranches_widget as cb
from clipbranches_widget.cli import copy_notebooks, main
from clipbranches_widget.concept import Concept

COMMAND = Path(sys.executable).with_name("clipbranches")
SERVER_START_S = 180
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "grey")

pytestmark = pytest.mark.timeout(900)  # the first to need the demo catalog builds it


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 16 drawn pictures, one file that is no image, and one text file."""
    folder = tmp_path_factory.mktemp("pictures")
    for colour in COLOURS:
        for shape in ("ellipse", "rectangle"):
            image = Image.new("RGB", (96, 96), "white")
            getattr(ImageDraw.Draw(image), shape)((16, 16, 80, 80), fill=colour)
            image.save(folder / f"{colour}-{shape}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    (folder / "notes.txt").write_text("not an image either")
    return folder


@pytest.fixture(scope="module")
def indexed(pictures, tmp_path_factory):
    """The catalog that `clipbranches index` makes of `pictures`, and what it printed."""
    target = tmp_path_factory.mktemp("catalogs") / "pictures.cbcat"
    done = run("index", pictures, target, "--demo-encoder", "--quiet", "--batch-size", "4")
    assert done.returncode == 0, done.stderr
    return target, done


def run(*arguments, **environment):
    """Run the installed command as a user does."""
    return subprocess.run(
        [str(COMMAND), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=280,
        check=False,
    )


def test_index_builds_a_catalog_and_names_what_it_left_out(indexed):
    target, done = indexed

    assert len(cb.open(target)) == 16
    assert "16 images, clipbranches-demo" in done.stdout
    skipped = [line for line in done.stderr.splitlines() if line.startswith("skipped")]
    assert len(skipped) == 1
    assert re.match(r"skipped broken\.png: .*(corrupt|not an image)", skipped[0])


def test_duplicates_are_printed_and_written(indexed, tmp_path, capsys):
    target, _ = indexed
    found = cb.near_duplicates(cb.open(target), similarity=0.5)
    assert len(found.rows)

    assert main(["duplicates", str(target), "--similarity", "0.5", "--quiet"]) == 0
    *lines, said = capsys.readouterr().out.splitlines()
    printed = [tuple(map(int, line.split("\t")[:2])) for line in lines]
    pairs = zip(found.representatives.tolist(), found.rows.tolist(), strict=True)
    assert printed == list(pairs)
    assert said == repr(found)

    table = tmp_path / "groups.csv"
    table.write_text("old")
    assert main(["duplicates", str(target), "--quiet", "--csv", str(table)]) == 0
    assert table.read_text().startswith("row,representative,similarity,path,caption")
    assert main(["duplicates", str(target), "--similarity", "2"]) == 1
    assert "expected a similarity above 0 and up to 1" in capsys.readouterr().err


def test_index_refuses_to_overwrite(indexed, pictures, capsys):
    target, _ = indexed
    before = sorted(file.stat().st_mtime_ns for file in target.rglob("*"))

    assert main(["index", str(pictures), str(target), "--demo-encoder", "--quiet"]) == 1
    assert str(target) in capsys.readouterr().err
    assert sorted(file.stat().st_mtime_ns for file in target.rglob("*")) == before


def test_index_of_an_empty_folder_is_explained_and_leaves_nothing(tmp_path, capsys):
    source, target = tmp_path / "empty", tmp_path / "empty.cbcat"
    source.mkdir()

    assert main(["index", str(source), str(target), "--demo-encoder", "--quiet"]) == 1
    assert capsys.readouterr().err.startswith("clipbranches: expected")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_index_without_network_says_what_works_offline(pictures, tmp_path):
    target = tmp_path / "photos.cbcat"
    done = run(
        *("index", pictures, target, "--quiet"), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub")
    )

    assert done.returncode == 1
    assert done.stderr.startswith("clipbranches: expected to download")
    assert "bundled" in done.stderr
    assert "Traceback" not in done.stderr
    assert not target.exists()


def test_index_names_an_unknown_model(pictures, tmp_path, capsys):
    arguments = ["index", str(pictures), str(tmp_path / "x.cbcat"), "--model", "ViT-B-23"]

    assert main([*arguments, "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "'ViT-B-23'" in error
    assert "ViT-B-32" in error


def test_info_is_json(indexed, capsys):
    target, _ = indexed

    assert main(["info", str(target)]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["n_images"] == 16
    assert info["n_skipped"] == 1
    assert info["encoder"] == "bundled"
    assert info["model"] == "clipbranches-demo"
    assert info["column_parts"] == "full"
    assert info["bytes_on_disk"] > info["column_bytes"] > 10_000


def test_columns_of_an_index_can_be_chosen_and_changed(pictures, tmp_path, capsys):
    target = str(tmp_path / "small.cbcat")
    options = ["--demo-encoder", "--quiet", "--columns", "codes"]
    assert main(["index", str(pictures), target, *options]) == 0
    sizes = {"codes": cb.open(target).info()["column_bytes"]}
    capsys.readouterr()
    for parts in ("full", "bits", "full", "codes"):
        assert main(["columns", target, "--parts", parts, "--quiet"]) == 0
        catalog = cb.open(target)
        catalog.verify()
        assert catalog.info()["column_parts"] == parts
        size = catalog.info()["column_bytes"]
        assert sizes.setdefault(parts, size) == size
        assert f"column index: {parts}, {size:,} bytes" in capsys.readouterr().out
    assert sizes["codes"] < sizes["bits"] < sizes["full"]


def test_info_verify_passes_and_then_names_a_changed_file(indexed, tmp_path, capsys):
    target = shutil.copytree(indexed[0], tmp_path / "changed.cbcat")
    assert main(["info", str(target), "--verify"]) == 0
    assert json.loads(capsys.readouterr().out)["n_images"] == 16

    file = next(target.rglob("embeddings.npy"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    assert main(["info", str(target), "--verify"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "embeddings.npy" in captured.err
    assert "build the catalog again" in captured.err


def test_search_prints_score_row_path_and_caption(indexed, capsys):
    target, _ = indexed

    assert main(["search", str(target), "a red circle", "-k", "5"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 5
    scores = [float(score) for score, *_ in lines]
    assert scores == sorted(scores, reverse=True)
    uris = cb.open(target).items["uri"].to_pylist()
    assert [uris[int(row)] for _, row, *_ in lines] == [uri for *_, uri, _ in lines]
    assert all(caption for *_, caption in lines)


def test_search_from_the_shell_equals_the_api(indexed, capsys, tmp_path):
    target, _ = indexed
    done = run("search", target, "a blue square", "-k", "16")

    assert done.returncode == 0, done.stderr
    session = cb.Session(cb.open(target), path=tmp_path / "blue.jsonl")
    hits = session.search("a blue square", k=16)
    rows = [int(line.split("\t")[1]) for line in done.stdout.splitlines()]
    assert rows == hits.rows.tolist()


@pytest.mark.parametrize(
    "command", [["info", "{}"], ["search", "{}", "a bird"], ["columns", "{}", "--parts", "full"]]
)
def test_a_missing_catalog_is_one_line_and_status_1(command, tmp_path, capsys):
    missing = tmp_path / "none.cbcat"

    assert main([part.format(missing) for part in command]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("clipbranches: expected a catalog (a folder with catalog.json)")
    assert str(missing) in captured.err


@pytest.fixture(scope="module")
def concept(tmp_path_factory):
    """A saved concept: its file, its catalog's folder and the round's answer."""
    folder = tmp_path_factory.mktemp("concepts")
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(5, 16))
    embeddings = np.repeat(centres, 60, axis=0) + 0.4 * rng.normal(size=(300, 16))
    items = pa.table(
        {
            "uri": [f"images/{row}.png" for row in range(300)],
            "caption": [f"caption, of {row}" for row in range(300)],
        }
    )
    catalog = cb.from_embeddings(embeddings, folder / "blobs.cbcat", items=items)
    session = cb.Session(catalog, folder / "session.jsonl")
    session.label(positive=range(6), negative=range(60, 66))
    result = session.refine()
    Concept.of("first blob", result).save(folder / "blob.json")
    return folder / "blob.json", folder / "blobs.cbcat", result


def test_apply_prints_score_row_path_and_caption(concept, capsys):
    file, target, result = concept

    assert main(["apply", str(file), str(target), "-k", "7"]) == 0
    captured = capsys.readouterr()
    lines = [line.split("\t") for line in captured.out.splitlines()]
    assert [int(row) for _, row, *_ in lines] == result.rows[:7].tolist()
    assert [score for score, *_ in lines] == [f"{score:.4f}" for score in result.scores[:7]]
    row = result.rows[0]
    assert lines[0][2:] == [f"images/{row}.png", f"caption, of {row}"]
    assert captured.err.splitlines() == [f"note: {note}" for note in result.notes]
    assert main(["apply", str(file), str(target)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_apply_writes_the_whole_table(concept, tmp_path, capsys, suffix):
    file, target, result = concept
    out = tmp_path / f"found.{suffix}"
    out.write_text("an older answer")

    assert main(["apply", str(file), str(target), "--out", str(out)]) == 0
    assert f"{len(result)} of 300 images" in capsys.readouterr().out
    found = pd.read_csv(out) if suffix == "csv" else pd.read_parquet(out)
    assert found["row"].tolist() == result.rows.tolist()
    assert np.array_equal(found["score"].to_numpy(np.float32), result.scores)
    assert found["caption"].tolist() == [f"caption, of {row}" for row in result]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_apply_takes_a_threshold_and_a_number_for_the_table(concept, tmp_path):
    file, target, result = concept
    out = tmp_path / "found.csv"
    arguments = ["apply", str(file), str(target), "--out", str(out), "--threshold"]

    assert main([*arguments, "0.9"]) == 0
    assert pd.read_csv(out)["row"].tolist() == result.at(0.9).rows.tolist()
    assert main([*arguments, "0.1", "-k", "3"]) == 0
    assert pd.read_csv(out)["row"].tolist() == result.at(0.1).rows[:3].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "2"], "expected a threshold between 0 and 1, got 2"),
        (["-k", "0"], "expected -k of at least 1, got 0"),
        (["--out", "found.txt"], "expected --out to end in .csv or .parquet, got found.txt"),
        (["--out", "no/such/folder/found.csv"], "cannot write no/such/folder/found.csv"),
    ],
)
def test_apply_explains_what_it_cannot_do(concept, capsys, options, message):
    file, target, _ = concept

    assert main(["apply", str(file), str(target), *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"clipbranches: {message}" in captured.err


def test_apply_refuses_a_file_that_is_no_concept(concept, capsys):
    _, target, _ = concept
    other = target / "catalog.json"

    assert main(["apply", str(other), str(target)]) == 1
    assert capsys.readouterr().err.startswith(f"clipbranches: {other} is not a concept file")


def test_an_empty_query_is_status_1(indexed, capsys):
    target, _ = indexed

    assert main(["search", str(target), "  "]) == 1
    assert "expected some words to search for" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["serach"], ["index"], ["search", "x.cbcat"], ["columns", "x.cbcat"], ["apply", "x.json"]],
)
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: clipbranches" in capsys.readouterr().err


def test_version_and_help_from_the_shell():
    assert run("--version").stdout.strip() == f"clipbranches {cb.__version__}"
    help_text = run("--help").stdout
    for command in ("demo", "index", "info", "columns", "search", "apply", "doctor"):
        assert re.search(rf"^\s+{command}\s+\w", help_text, re.MULTILINE)


def test_doctor_from_the_shell():
    done = run("doctor")

    assert done.returncode == 0, done.stderr
    for word in (cb.__version__, "jupyterlab", "torch", "clipbranches-demo"):
        assert word in done.stdout


def test_notebooks_are_copied_once_and_then_kept(tmp_path):
    folder = copy_notebooks(tmp_path / "notebooks")
    stems = ("quickstart", "programmatic", "ways-in", "ways-out", "your-own-images")
    names = {f"{stem}.ipynb" for stem in stems}
    assert {file.name for file in folder.iterdir()} == names

    (folder / "quickstart.ipynb").write_text("mine")
    (folder / "programmatic.ipynb").unlink()
    copy_notebooks(folder)
    assert (folder / "quickstart.ipynb").read_text() == "mine"
    assert {file.name for file in folder.iterdir()} == names


def test_demo_serves_the_quickstart_in_jupyterlab(tmp_path):
    cb.demo(progress=False)  # so that the time below is that of the server
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [str(COMMAND), "demo", "--no-browser", f"--port={port}", "--folder=demo"],
            cwd=tmp_path,
            env=os.environ | {name: str(tmp_path / name.lower()) for name in names},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        token = wait_for_address(server, log, port)
        base = f"http://127.0.0.1:{port}"
        page = fetch(f"{base}/lab/tree/quickstart.ipynb?token={token}")
        assert "<title>JupyterLab</title>" in page
        stored = json.loads(fetch(f"{base}/api/contents/quickstart.ipynb?token={token}"))
        code = [
            cell["source"] for cell in stored["content"]["cells"] if cell["cell_type"] == "code"
        ]
        assert any("cb.demo()" in source for source in code)
        assert any("cb.Explorer(session)" in source for source in code)
        start = urllib.request.urlopen(f"{base}/?token={token}", timeout=60).url
        assert start.partition("?")[0] == f"{base}/lab/tree/quickstart.ipynb"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)

    assert (tmp_path / "demo" / "quickstart.ipynb").is_file()
    assert "<Catalog openmoji-" in log.read_text()


def fetch(url):
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert answer.status == 200
        return answer.read().decode()


def wait_for_address(server, log, port):
    """Return the token once the server has printed its address and answers at it."""
    address = re.compile(rf"http://\S+:{port}/lab/tree/quickstart\.ipynb\?token=(\w+)")
    end = time.monotonic() + SERVER_START_S
    while time.monotonic() < end and server.poll() is None:
        found = address.search(log.read_text(errors="replace"))
        if found:
            try:
                fetch(f"http://127.0.0.1:{port}/api?token={found[1]}")
            except urllib.error.URLError:
                pass
            else:
                return found[1]
        time.sleep(0.2)
    raise AssertionError(f"no server within {SERVER_START_S} s:\n{log.read_text()[-3000:]}")


def test_text_of_catalogs_cannot_act_on_the_terminal(tmp_path, capsys):
    rng = np.random.default_rng(0)
    captions = ["red\x1b[2J", "two\nlines", "a\tb", "\u202egnp.exe"]
    items = pd.DataFrame({"uri": list("abcd"), "caption": captions})
    vectors = np.repeat(rng.standard_normal((1, 8)), 4, axis=0)
    path = cb.from_embeddings(vectors, tmp_path / "a.cbcat", items=items).path
    assert main(["duplicates", str(path), "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line.split("\t") for line in lines if line.count("\t")]
    assert [len(parts) for parts in told] == [5] * len(told)
    assert {parts[4] for parts in told} >= {"two\ufffdlines", "a\ufffdb", "\ufffdgnp.exe"}
