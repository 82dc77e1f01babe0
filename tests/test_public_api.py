"""The public names are a contract: they exist, take what they promise, and work together."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

import clipbranches_widget as cb
from clipbranches_widget.audit import Audit
from clipbranches_widget.cli import main

ROOT = Path(__file__).parents[1]
POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
KEYWORD = inspect.Parameter.KEYWORD_ONLY
REQUIRED = inspect.Parameter.empty

# Callable -> its promised parameters: (name, kind, default), in order.
SIGNATURES = {
    "demo": [("path", POSITIONAL, None), ("progress", KEYWORD, True)],
    "index": [
        ("source", POSITIONAL, REQUIRED),
        ("path", POSITIONAL, REQUIRED),
        ("model", KEYWORD, "ViT-B-32"),
        ("pretrained", KEYWORD, "laion2b_s34b_b79k"),
        ("batch_size", KEYWORD, 64),
        ("device", KEYWORD, None),
        ("progress", KEYWORD, True),
        ("columns", KEYWORD, "full"),
    ],
    "from_embeddings": [
        ("embeddings", POSITIONAL, REQUIRED),
        ("path", POSITIONAL, REQUIRED),
        ("items", KEYWORD, None),
        ("encoder", KEYWORD, None),
        ("columns", KEYWORD, "full"),
    ],
    "rebuild_columns": [("path", POSITIONAL, REQUIRED), ("columns", KEYWORD, "full")],
    "open": [("path", POSITIONAL, REQUIRED)],
    "doctor": [],
    "Explorer": [("source", POSITIONAL, REQUIRED)],
    "Session": [("catalog", POSITIONAL, REQUIRED), ("path", POSITIONAL, None)],
    "Session.open": [("path", POSITIONAL, REQUIRED), ("catalog", POSITIONAL, REQUIRED)],
    "Session.search": [
        ("self", POSITIONAL, REQUIRED),
        ("text", POSITIONAL, None),
        ("image", KEYWORD, None),
        ("vector", KEYWORD, None),
        ("row", KEYWORD, None),
        ("k", KEYWORD, 60),
    ],
    "Session.label": [
        ("self", POSITIONAL, REQUIRED),
        ("positive", POSITIONAL, ()),
        ("negative", POSITIONAL, ()),
    ],
    "Session.unlabel": [("self", POSITIONAL, REQUIRED), ("rows", POSITIONAL, REQUIRED)],
    "Session.refine": [
        ("self", POSITIONAL, REQUIRED),
        ("threshold", KEYWORD, None),
        ("seed", KEYWORD, 0),
        ("strategy", KEYWORD, None),
        ("progress", KEYWORD, None),
        ("partial", KEYWORD, None),
        ("cancel", KEYWORD, None),
    ],
    "Session.undo": [("self", POSITIONAL, REQUIRED)],
    "Session.redo": [("self", POSITIONAL, REQUIRED)],
    "Catalog.info": [("self", POSITIONAL, REQUIRED)],
    "Catalog.image": [("self", POSITIONAL, REQUIRED), ("row", POSITIONAL, REQUIRED)],
    "Result.to_pandas": [("self", POSITIONAL, REQUIRED)],
}
HEAVY = (
    "PIL",
    "ipyvuetify",
    "ipywidgets",
    "numba",
    "open_clip",
    "pandas",
    "pyarrow",
    "sklearn",
    "torch",
    "usearch",
    "xgboost",
)

pytestmark = pytest.mark.timeout(900)  # the first to need the demo catalog builds it


@pytest.fixture(scope="session")
def demo_catalog():
    """The real demo catalog, from the user's cache; built there by whoever comes first."""
    return cb.demo(progress=False)


def is_animal(catalog):
    return catalog.items.to_pandas()["subgroup"].str.startswith("animal").to_numpy()


@pytest.mark.parametrize("name", SIGNATURES)
def test_each_public_callable_takes_what_it_promises(name):
    found = cb
    for part in name.split("."):
        found = getattr(found, part)
    parameters = inspect.signature(found).parameters

    promised = SIGNATURES[name]
    got = [(p.name, p.kind, p.default) for p in parameters.values()]
    assert [entry for entry in got if entry[0] in {name for name, *_ in promised}] == promised
    more = [p for p in parameters.values() if p.name not in {name for name, *_ in promised}]
    assert all(p.kind is KEYWORD and p.default is not REQUIRED for p in more)


def test_every_name_of_all_is_there_and_no_module_can_take_its_place():
    assert set(cb.__all__) >= {"Explorer", "Session", "demo", "doctor", "from_embeddings", "index"}
    assert dir(cb) == sorted([*cb.__all__, "__version__"])
    for name in cb.__all__:
        assert callable(getattr(cb, name))
        # A submodule of that name would replace the function once it is imported.
        assert importlib.util.find_spec(f"clipbranches_widget.{name}") is None


def test_a_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="clipbranches_widget' has no attribute 'serach'"):
        cb.serach  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    script = (
        "import json, sys; before = set(sys.modules); import clipbranches_widget; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    imported = json.loads(done.stdout)

    assert "clipbranches_widget" in imported
    assert [name for name in imported if name.partition(".")[0] in HEAVY] == []


def test_doctor_reports_versions_encoder_and_device_as_text():
    report = str(cb.doctor())

    assert cb.__version__ in report
    for word in ("python", "jupyterlab", "torch", "usearch", "clipbranches-demo"):
        assert word in report


class TestDemoCatalog:
    """The main job on the real demo catalog, without a widget."""

    def test_it_is_all_of_openmoji_with_its_licence(self, demo_catalog):
        assert len(demo_catalog) == len(demo_catalog.items) == len(demo_catalog.embeddings) >= 4000
        assert isinstance(demo_catalog.items, pa.Table)
        assert {"caption", "group", "subgroup", "keywords", "hexcode"} <= set(
            demo_catalog.items.column_names
        )
        assert demo_catalog.embeddings.dtype == np.float16
        with pytest.raises(ValueError, match="read-only"):
            demo_catalog.embeddings[0, 0] = 1
        info = demo_catalog.info()
        assert info["n_images"] == len(demo_catalog)
        assert info["encoder"] == "bundled"
        for said in ("OpenMoji", "CC BY-SA 4.0", "icons"):
            assert said in info["about"]

    def test_an_image_is_drawn_as_its_caption_says(self, demo_catalog):
        captions = demo_catalog.items["caption"].to_pylist()
        image = demo_catalog.image(captions.index("red square"))

        assert isinstance(image, Image.Image)
        assert image.mode == "RGB"
        assert min(image.size) >= 128
        red, green, blue = image.getpixel((image.width // 2, image.height // 2))
        assert red > 150 > green
        assert blue < 150

    def test_opening_by_path_gives_the_same_catalog(self, demo_catalog):
        again = cb.open(demo_catalog.path)

        assert again.info() == demo_catalog.info()
        assert np.array_equal(again.embeddings, demo_catalog.embeddings)

    def test_animals_with_wings_are_mostly_animals(self, demo_catalog, tmp_path):
        session = cb.Session(demo_catalog, path=tmp_path / "wings.jsonl")
        hits = session.search("animals with wings")

        assert len(hits) == 60
        assert hits.query_text == "animals with wings"
        assert (np.diff(hits.scores) <= 0).all()
        assert is_animal(demo_catalog)[hits.rows[:10]].sum() >= 6

    def test_the_whole_job_and_again_from_the_file(self, demo_catalog, tmp_path):
        truth = is_animal(demo_catalog)
        session = cb.Session(demo_catalog, path=tmp_path / "wings.jsonl")
        ranking = session.search("animals with wings", k=len(demo_catalog)).rows
        assert np.array_equal(np.sort(ranking), np.arange(len(demo_catalog)))
        yes, no = ranking[truth[ranking]][:5], ranking[~truth[ranking]][:5]
        session.label(positive=yes, negative=no)
        result = session.refine(threshold=0.3, seed=3)

        assert set(yes.tolist()) <= set(result)
        assert not set(no.tolist()) & set(result)
        assert result.rows.dtype == np.int64
        assert len(np.unique(result.rows)) == len(result)
        assert (np.diff(result.scores) <= 0).all()
        assert result.scores.min() >= np.float32(0.3)
        assert result.scores.max() <= 1
        assert 0 < result.n_touched <= result.n_total == len(demo_catalog)
        assert result.timings["total"] > 0
        # Complete, and mostly right: ten labels turn a ranking into a set of animals.
        assert len(result) > 20
        assert truth[result.rows].mean() > 0.5
        for branch_id, row in zip(result.branch_ids.tolist(), result, strict=True):
            box = result.branches[branch_id].box
            assert box is not None or result.branches[branch_id].n_rows > 0, row

        frame = result.to_pandas()
        assert isinstance(frame, pd.DataFrame)
        assert frame["row"].tolist() == result.rows.tolist()
        assert frame["score"].tolist() == result.scores.tolist()
        assert frame["margin"].tolist() == result.margins.tolist()
        captions = demo_catalog.items["caption"].to_pylist()
        assert frame["caption"].tolist() == [captions[row] for row in result]
        assert set(frame["branch"]) <= {branch.text for branch in result.branches}
        assert frame["branch"].str.len().min() > 0
        assert frame["path"].str.startswith("openmoji:").all()
        assert result[:20].rows.tolist() == result.rows[:20].tolist()

        reopened = cb.Session.open(session.path, cb.open(demo_catalog.path))
        assert reopened.labels == session.labels
        assert reopened.query_text == "animals with wings"
        assert reopened.result.rows.tolist() == result.rows.tolist()
        assert reopened.result.scores.tolist() == result.scores.tolist()
        assert [str(branch) for branch in reopened.result.branches] == [
            str(branch) for branch in result.branches
        ]
        assert not reopened.is_stale

        reopened.undo()
        reopened.undo()
        assert reopened.result is None
        assert len(reopened.labels) == 0
        reopened.redo()
        assert reopened.labels.positive.tolist() == sorted(yes.tolist())
        assert len(session.history) == 6

    def test_an_image_of_the_catalog_finds_itself_and_a_row_is_more_like_this(
        self, demo_catalog, tmp_path
    ):
        captions = demo_catalog.items["caption"].to_pylist()
        eagle = captions.index("eagle")
        session = cb.Session(demo_catalog, path=tmp_path / "eagle.jsonl")

        assert session.search(image=demo_catalog.image(eagle), k=3).rows[0] == eagle
        like = session.search(row=eagle, k=10)
        assert like.rows[0] == eagle
        assert is_animal(demo_catalog)[like.rows].sum() >= 5
        vector = demo_catalog.embeddings[eagle].astype(np.float32)
        assert session.search(vector=vector, k=10).rows.tolist() == like.rows.tolist()

    def test_an_explorer_shares_the_session(self, demo_catalog, tmp_path):
        session = cb.Session(demo_catalog, path=tmp_path / "shared.jsonl")
        explorer = cb.Explorer(session)
        try:
            assert explorer.session is session
        finally:
            explorer.close()


class TestReadme:
    """What the README promises a newcomer is what the package has and what is checked."""

    TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
    OWNERS = MappingProxyType(
        {
            "cb": cb,
            "session": cb.Session,
            "catalog": cb.Catalog,
            "result": cb.Result,
            "branch": cb.Branch,
            "audit": Audit,
            "Concept": cb.Concept,
            "concept": cb.Concept,
        }
    )

    def blocks(self, language):
        return re.findall(rf"```{language}\n(.*?)```", self.TEXT, re.DOTALL)

    def test_its_two_commands_and_ci_agree(self):
        demo, test = (block.strip() for block in self.blocks("bash"))

        assert demo == 'pip install -e ".[demo]" && clipbranches demo'
        assert test == 'pip install -e ".[test]" && pytest'
        ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
        assert re.search(rf"^ *{re.escape(test)}$", ci, re.MULTILINE)
        assert "set -euo pipefail" in ci
        assert os.access(ROOT / ".ci" / "run", os.X_OK)

    def test_every_name_of_its_api_block_exists(self):
        (code,) = self.blocks("python")
        owners = self.OWNERS
        fields = {field.name for field in dataclasses.fields(cb.Result)}
        used = {
            (node.value.id, node.attr)
            for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }

        assert {name for owner, name in used if owner == "cb"} >= {"demo", "index", "Session"}
        for owner, name in used - {("hits", "rows")}:
            assert hasattr(owners[owner], name) or (owner == "result" and name in fields), name

    def test_its_calls_bind_to_the_real_signatures(self):
        (code,) = self.blocks("python")
        owners = self.OWNERS
        checked = set()
        for node in ast.walk(ast.parse(code)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            value, name = node.func.value, node.func.attr
            owner = value.id if isinstance(value, ast.Name) else value.attr
            me = [] if owner in {"cb", "Concept"} else [None]
            keywords = {keyword.arg: None for keyword in node.keywords}
            function = getattr(owners[owner], name)
            inspect.signature(function).bind(*me, *node.args, **keywords)
            checked.add(name)
        assert {"search", "label", "refine", "from_embeddings", "to_pandas"} <= checked

    def test_its_links_within_the_repository_lead_somewhere(self):
        targets = re.findall(r"\]\((?!https://)([^)]+)\)", self.TEXT)
        assert len(targets) >= 6
        for target in targets:
            assert (ROOT / target).exists(), target

    def test_its_commands_are_those_of_the_command_line(self, capsys):
        rows = re.findall(r"^\| `clipbranches (\w+)(.*?)` \|", self.TEXT, re.MULTILINE)
        assert [name for name, _ in rows] == [
            "demo",
            "index",
            "columns",
            "info",
            "search",
            "apply",
            "export",
            "duplicates",
            "append",
            "remove",
            "compact",
            "map",
            "app",
            "doctor",
        ]
        for name, options in rows:
            with pytest.raises(SystemExit, match="0"):
                main([name, "--help"])
            shown = capsys.readouterr().out
            for option in re.findall(r"--?[a-z][a-z-]*", options):
                assert option in shown
