"""The code of the pages on ways in and out runs, block by block, on real files.

Only what a test cannot have is put in another's place: places on the internet by places in memory,
and the weights of a model by a tiny encoder.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from drawn_images import TileEncoder, build, embedding, picture, pictures

import clipbranches_widget as cb
from clipbranches_widget.session import Session

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"(?:<!-- needs (\w+) -->\n)?```python\n(.*?)```", re.DOTALL)
ELSEWHERE = {
    "s3://": "memory://",
    'cb.OpenClipEncoder("ViT-B-32", "laion2b_s34b_b79k")': "TileEncoder()",
    'datasets.load_dataset("cifar10", split="train")': 'datasets.load_from_disk("cifar10")',
    "cb.index(": "build(",
}


def blocks(name):
    """Return (package needed, code) of each block of a page."""
    return [
        (needed, code) for needed, code in BLOCK.findall((DOCS / name).read_text(encoding="utf-8"))
    ]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Work in an empty folder that is also the home, with the cache of `datasets` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return tmp_path


def write(folder, n=12):
    """Write pictures; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:02d}.png" for number in range(n)]
    for number, path in enumerate(paths):
        path.write_bytes(picture(number))
    return paths


def test_pages_have_code_and_every_block_is_found():
    for name, n_least in (("ways-in.md", 1), ("ways-out.md", 9)):
        text = (DOCS / name).read_text(encoding="utf-8")
        assert len(blocks(name)) == text.count("```python") >= n_least
        assert text.count("```") == 2 * text.count("```python")


def test_ways_in(place):
    paths = write(place / "Pictures")
    images, n = pictures(12), 12
    with webdataset.TarWriter(str(place / "train.tar")) as tar:
        for number, data in enumerate(images):
            tar.write({"__key__": f"{number:04d}", "png": data})
    memory = fsspec.filesystem("memory")
    for number in range(128):
        memory.pipe(f"/bucket/train-{number:04d}.tar", (place / "train.tar").read_bytes())
    shutil.make_archive(str(place / "photos"), "zip", place / "Pictures")
    (place / "laion").mkdir()
    table = {"URL": list(map(str, paths)), "TEXT": ["a picture"] * n}
    pq.write_table(pa.table(table), place / "laion" / "00000.parquet")
    columns = {"img": list(map(str, paths)), "label": [row % 2 for row in range(n)]}
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(place / "cifar10")
    vectors = np.stack([embedding(data) for data in images]).astype(np.float16)
    output = place / "clip_retrieval_output"
    (output / "img_emb").mkdir(parents=True)
    (output / "metadata").mkdir()
    np.save(output / "img_emb" / "img_emb_0.npy", vectors)
    frame = pd.DataFrame({"image_path": list(map(str, paths)), "caption": ["x"] * n})
    frame.to_parquet(output / "metadata" / "metadata_0.parquet")
    np.save(place / "emb_0.npy", vectors)
    pd.DataFrame({"path": list(map(str, paths))}).to_parquet(place / "items.parquet")
    names = {"cb": cb, "datasets": datasets, "pd": pd, "TileEncoder": TileEncoder, "build": build}
    names |= {"paths": list(map(str, paths)), "prices": [1.5] * n}
    for _, code in blocks("ways-in.md"):
        for text, instead in ELSEWHERE.items():
            code = code.replace(text, instead)  # noqa: PLW2901 - one after the other
        exec(compile(code, "ways-in.md", "exec"), names)
    memory.rm("/bucket", recursive=True)
    made = {path.name: cb.open(path) for path in place.glob("*.cbcat")}
    text = "".join(code for _, code in blocks("ways-in.md"))
    assert set(made) == set(re.findall(r'"([\w-]+\.cbcat)"', text))
    for name, catalog in made.items():
        assert catalog.n_present == (n * 128 if name == "train.cbcat" else n), name
    assert made["shop.cbcat"].items["price"].to_pylist() == [1.5] * n
    assert made["laion.cbcat"].caption(3) == "a picture"
    assert made["cifar.cbcat"].items["label"].to_pylist() == ["a", "b"] * 6


@pytest.fixture
def session(place):
    catalog = build(write(place / "images", 40), place / "c.cbcat")
    session = Session(catalog, place / "s.jsonl")
    session.label(positive=[0, 1, 2, 3, 4], negative=[30, 31, 32, 33])
    return session


def test_ways_out(session):
    names = {"session": session, "result": session.refine(threshold=0.05)}
    assert len(names["result"].branches) > 0
    labels = session.labels
    ran = 0
    for needed, code in blocks("ways-out.md"):
        if needed and importlib.util.find_spec(needed) is None:
            continue
        exec(compile(code, "ways-out.md", "exec"), names)
        ran += 1
    assert ran >= 9
    assert len(pd.read_csv("labels.csv")) == 9
    assert {path.name for path in Path("sorted").iterdir() if path.is_dir()} > {"yes"}
    assert session.labels == labels  # brought back by the last block, and its undo
    assert [event.action for event in session.history][-2:] == ["label", "undo"]
