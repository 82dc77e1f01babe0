"""`clipbranches app` without a browser; tests/browser/test_elsewhere.py has the real server."""

from __future__ import annotations

import builtins
import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from word_encoder import build_catalog

from clipbranches_widget import app
from clipbranches_widget.cli import main
from clipbranches_widget.errors import MissingPackageError
from clipbranches_widget.session import Session

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return build_catalog(tmp_path_factory.mktemp("c") / "it's.cbcat", 60)


@pytest.fixture
def voila(monkeypatch):
    """Stand in for the server: keep what it would be started with."""
    started = []

    def launch_instance(argv):
        notebook = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
        started.append((notebook, argv))

    module = ModuleType("voila.app")
    module.Voila = SimpleNamespace(launch_instance=launch_instance)
    monkeypatch.setitem(sys.modules, "voila.app", module)
    return started


def test_it_serves_one_cell_on_the_session_to_this_machine_only(catalog, tmp_path, voila, capsys):
    file = tmp_path / "s.jsonl"
    options = ["--session", str(file), "--port", "9000", "--no-browser"]
    assert main(["app", str(catalog.path), *options]) == 0
    assert capsys.readouterr().out == f"session file: {file}\n"
    ((notebook, argv),) = voila
    (cell,) = notebook["cells"]
    assert (
        f"cb.Explorer(cb.Session(cb.open({str(catalog.path)!r}), {str(file)!r}))" in cell["source"]
    )
    assert f"os.chdir({str(Path.cwd())!r})" in cell["source"]
    assert notebook["metadata"]["title"] == "Image explorer: it's"
    assert {"--port=9000", "--no-browser", "--Voila.ip=127.0.0.1", "--Voila.auto_token=True"} < set(
        argv
    )
    assert not Path(argv[0]).exists()  # nothing is left behind


def test_without_a_session_all_pages_share_a_new_one(catalog, tmp_path, voila, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert main(["app", str(catalog.path)]) == 0
    ((notebook, argv),) = voila
    assert str(tmp_path) in notebook["cells"][0]["source"]
    assert "--no-browser" not in argv


def test_what_it_cannot_open_is_said_before_anything_is_served(tmp_path, voila, capsys):
    assert main(["app", str(tmp_path / "none.cbcat")]) == 1
    assert "expected a catalog" in capsys.readouterr().err
    assert voila == []


def test_without_voila_the_error_names_the_command(catalog, tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **options):
        if name.startswith("voila"):
            raise ImportError("no voila")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingPackageError, match=r'pip install "clipbranches_widget\[app\]"'):
        app.serve(Session(catalog, tmp_path / "s.jsonl"))


def test_the_extra_holds_what_the_error_promises():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert [requirement.partition(">")[0] for requirement in extras["app"]] == ["voila"]
    (shared,) = [one for one in extras["test"] if one.startswith("clipbranches_widget[")]
    assert "app" in shared
    assert any(one.startswith("notebook>=7") for one in extras["test"])
