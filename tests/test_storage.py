"""Atomic writes, memory maps and fingerprints."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipbranches_widget.errors import CatalogCorruptError, CatalogExistsError
from clipbranches_widget.storage import (
    ArrayAppender,
    array_header,
    atomic_file,
    checksum,
    fingerprint,
    open_array,
    read_json,
    remove_stale_stages,
    save_array,
    staged_folder,
    write_json,
)

HOLD_A_STAGE = """
import sys, time
from pathlib import Path
from clipbranches_widget.storage import staged_folder
with staged_folder(Path(sys.argv[1])) as stage:
    (stage / "half.bin").write_bytes(b"half")
    print("staged", flush=True)
    time.sleep(60)
"""


def names(folder):
    """Return the names in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def other_builder(tmp_path):
    """Start another process that is building ``tmp_path / "target"``."""
    command = [sys.executable, "-c", HOLD_A_STAGE, str(tmp_path / "target")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "staged\n"
        yield process
        process.kill()


def test_atomic_file_replaces_in_one_step(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_atomic_file_keeps_the_old_content_after_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(FileNotFoundError, match="nowhere"), atomic_file(path) as temporary:
        temporary.write_bytes(b"half" + (tmp_path / "nowhere").read_bytes())
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_staged_folder_appears_complete(tmp_path):
    target = tmp_path / "new" / "target"
    with staged_folder(target) as stage:
        (stage / "sub").mkdir()
        (stage / "sub" / "a").write_text("a")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "a"
    assert names(target.parent) == ["target"]


def test_staged_folder_leaves_nothing_after_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), staged_folder(tmp_path / "a") as stage:
        (stage / "half").rename(tmp_path / "nowhere" / str((stage / "half").write_text("half")))
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_staged_folder_refuses_an_existing_target(tmp_path, kind):
    target = tmp_path / "target"
    {
        "file": target.touch,
        "folder": target.mkdir,
        "dangling link": lambda: target.symlink_to("nowhere"),
    }[kind]()
    with (
        pytest.raises(CatalogExistsError, match=r"target, but it exists.*another path"),
        staged_folder(target),
    ):
        raise AssertionError("not reached")


def test_staged_folder_refuses_a_target_that_appears_meanwhile(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(CatalogExistsError, match="it exists"), staged_folder(target):
        target.mkdir()
    assert names(tmp_path) == ["target"]
    assert names(target) == []


def test_a_killed_build_leaves_nothing_at_the_target_and_the_next_one_cleans_up(
    tmp_path, other_builder
):
    other_builder.send_signal(signal.SIGKILL)
    other_builder.wait()
    assert not (tmp_path / "target").exists()
    assert len(names(tmp_path)) == 2
    with staged_folder(tmp_path / "target") as stage:
        (stage / "a").touch()
    assert names(tmp_path) == ["target"]


def test_a_running_build_is_left_alone(tmp_path, other_builder):
    assert remove_stale_stages(tmp_path / "target") == []
    assert len(names(tmp_path)) == 2


def test_stages_of_another_target_are_left_alone(tmp_path, other_builder):
    other_builder.kill()
    other_builder.wait()
    assert remove_stale_stages(tmp_path / "targe") == []
    assert remove_stale_stages(tmp_path / "[t]arget") == []
    assert len(remove_stale_stages(tmp_path / "target")) == 1


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "a.json", {"name": "Übung", "n": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"name": "Übung", "n": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert names(tmp_path) == ["a.json"]


def test_read_json_names_the_file(tmp_path):
    with pytest.raises(CatalogCorruptError, match=r"a\.json, found none: build"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'{"a": \xff')
    with pytest.raises(CatalogCorruptError, match=r"a\.json is not readable JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps([1])[:-1])
    with pytest.raises(CatalogCorruptError, match=r"a\.json is not readable JSON"):
        read_json(tmp_path / "a.json")


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(["uint8", "float16", "int64"]),
)
def test_arrays_round_trip(tmp_path_factory, shape, dtype):
    path = tmp_path_factory.mktemp("arrays") / "a.npy"
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    save_array(path, array)
    mapped = open_array(path, dtype=dtype, shape=shape)
    assert np.array_equal(mapped, array)
    assert not mapped.flags.writeable
    assert array_header(path) == (shape, np.dtype(dtype))


def test_open_array_says_what_is_wrong(tmp_path, rng):
    path = tmp_path / "a.npy"
    save_array(path, rng.random((4, 3)))
    assert open_array(path, shape=(None, 3)).shape == (4, 3)
    with pytest.raises(CatalogCorruptError, match="expected dtype float32, got float64"):
        open_array(path, dtype=np.float32)
    with pytest.raises(CatalogCorruptError, match=r"expected shape \(5, 3\), got \(4, 3\)"):
        open_array(path, shape=(5, 3))
    with pytest.raises(CatalogCorruptError, match=r"b\.npy, found none"):
        open_array(tmp_path / "b.npy")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CatalogCorruptError, match=r"expected 224 bytes.*got 223"):
        open_array(path)
    path.write_bytes(b"not an array")
    with pytest.raises(CatalogCorruptError, match=r"is not a \.npy array"):
        open_array(path)


def test_objects_are_never_pickled(tmp_path):
    objects = np.array([{"a": 1}], dtype=object)
    with pytest.raises(ValueError, match="allow_pickle"):
        save_array(tmp_path / "a.npy", objects)
    np.save(tmp_path / "b.npy", objects, allow_pickle=True)
    with pytest.raises(CatalogCorruptError, match=r"b\.npy"):
        open_array(tmp_path / "b.npy")


@given(sizes=st.lists(st.integers(0, 7), max_size=6))
def test_appended_blocks_equal_one_array(tmp_path_factory, sizes):
    path = tmp_path_factory.mktemp("appended") / "a.npy"
    blocks = [np.full((size, 3), number, dtype=np.float32) for number, size in enumerate(sizes)]
    appender = ArrayAppender(path, dtype=np.float16, row_shape=(3,))
    for block in blocks:
        appender.append(block)
    appender.close()
    appender.close()
    expected = np.concatenate([np.empty((0, 3)), *blocks]).astype(np.float16)
    assert np.array_equal(open_array(path, dtype=np.float16, shape=expected.shape), expected)


def test_append_refuses_other_rows(tmp_path):
    appender = ArrayAppender(tmp_path / "a.npy", dtype=np.float16, row_shape=(3,))
    with pytest.raises(ValueError, match=r"expected rows of shape \(3,\), got \(4,\)"):
        appender.append(np.zeros((2, 4)))
    appender.close()


@pytest.mark.parametrize("n_bytes", [0, 1, 2**22, 2**22 + 1, 2**23])
def test_hashes_see_the_first_and_the_last_byte(tmp_path, n_bytes, rng):
    path = tmp_path / "a"
    content = bytearray(rng.bytes(n_bytes))
    path.write_bytes(content)
    before = fingerprint(path), checksum(path)
    assert before == (fingerprint(path), checksum(path))
    for position in {0, n_bytes - 1} if n_bytes else ():
        content[position] ^= 1
        path.write_bytes(content)
        assert fingerprint(path) != before[0]
        assert checksum(path) != before[1]
        content[position] ^= 1
    path.write_bytes(content + b"+")
    assert fingerprint(path) != before[0]
    assert checksum(path) != before[1]


def test_checksum_sees_every_byte(tmp_path, rng):
    path = tmp_path / "a"
    content = bytearray(rng.bytes(2**23))
    path.write_bytes(content)
    before = checksum(path)
    content[2**22 + 12345] ^= 1
    path.write_bytes(content)
    assert checksum(path) != before
