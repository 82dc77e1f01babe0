"""The session log on real files: torn lines, damage, other catalogs, many processes, full disks."""

import errno
import json
import os
import subprocess
import sys

import pytest

from clipbranches_widget import file_lock
from clipbranches_widget.errors import SessionFileError
from clipbranches_widget.session_file import FORMAT, CatalogId, Position, SessionFile

CATALOG = CatalogId("abc123", "/data/cats.cbcat", 100)


@pytest.fixture
def file(tmp_path):
    return SessionFile(tmp_path / "deep" / "folder" / "session.jsonl", CATALOG, "0.1.0")


def append(file, *records):
    """Append records as a reader at the end of the file would."""
    for record in records:
        lines = file.read()
        with file.exclusive(lines[-1].end if lines else Position()) as log:
            log.append(record)


def records(file):
    return [line.record for line in file.read()]


def test_a_file_that_is_not_there_has_no_records(file):
    assert file.read() == []
    assert not file.path.exists()


def test_creating_writes_the_header_once(file):
    file.create()
    file.create()
    assert [json.loads(line) for line in file.path.read_text().splitlines()] == [
        {
            "format": FORMAT,
            "version": 1,
            "written_by": "0.1.0",
            "catalog": {"id": "abc123", "name": "/data/cats.cbcat", "n_rows": 100},
        }
    ]
    assert file.read() == []


def test_records_come_back_in_order_with_their_lines_and_places(file):
    append(file, {"id": 1, "text": "Käfer 🪲\n"}, {"id": 2})
    lines = file.read()
    assert [line.record for line in lines] == [{"id": 1, "text": "Käfer 🪲\n"}, {"id": 2}]
    assert [line.number for line in lines] == [2, 3]
    assert lines[-1].end == Position(file.path.stat().st_size, 3)
    assert file.read(lines[0].end) == lines[1:]
    assert file.read(lines[1].end) == []


def test_an_append_returns_what_a_reader_sees_and_what_others_wrote(file):
    append(file, {"id": 1}, {"id": 2})
    first = file.read()[0]
    with file.exclusive(first.end) as log:
        assert [line.record for line in log.lines] == [{"id": 2}]
        returned = [log.append({"id": 3, "pair": (1, 2)}), log.append({"id": 4})]
    assert returned == file.read()[2:]
    assert returned[0].record == {"id": 3, "pair": [1, 2]}


def test_cut_after_any_byte_exactly_the_complete_lines_are_there_and_appending_goes_on(file):
    append(file, {"id": 1}, {"id": 2, "rows": [1, 2]}, {"id": 3})
    whole = file.path.read_bytes()
    for n_bytes in range(len(whole) + 1):
        file.path.write_bytes(whole[:n_bytes])
        n_records = max(0, whole[:n_bytes].count(b"\n") - 1)
        assert [r["id"] for r in records(file)] == [1, 2, 3][:n_records]
        append(file, {"id": "next"})
        assert [r["id"] for r in records(file)] == [*[1, 2, 3][:n_records], "next"]
        assert file.path.read_bytes().endswith(b'{"id": "next"}\n')


@pytest.mark.parametrize(
    "damage", [b"{oops}", b"[1, 2]", b"", b"\xff\xfe", b"\0" * 20, b"[" * 9999]
)
def test_a_damaged_line_is_named_with_what_to_do(file, damage):
    append(file, {"id": 1}, {"id": 2}, {"id": 3})
    lines = file.path.read_bytes().splitlines()
    lines[2] = damage
    file.path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(SessionFileError, match=r"session\.jsonl, line 3 is damaged.*delete that"):
        file.read()
    with pytest.raises(SessionFileError, match="line 3 is damaged"):
        file.create()
    lines.pop(2)
    file.path.write_bytes(b"\n".join(lines) + b"\n")
    assert [r["id"] for r in records(file)] == [1, 3]


@pytest.mark.parametrize(
    "content", [b"hello", b"\x89PNG\r\n\x1a\n123", b'{"format": "other"}\n', b"[]\n", b"{}\n{}\n"]
)
def test_no_other_file_is_touched(file, content):
    file.path.parent.mkdir(parents=True)
    file.path.write_bytes(content)
    for action in (file.read, file.create):
        with pytest.raises(SessionFileError, match="is not a session file: expected a first line"):
            action()
    assert file.path.read_bytes() == content


def test_a_folder_is_no_session_file(tmp_path):
    with pytest.raises(SessionFileError, match=r"cannot open the session file .* choose another"):
        SessionFile(tmp_path, CATALOG, "0").create()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SessionFileError, match="cannot open the session file"):
        SessionFile(tmp_path / "file" / "s.jsonl", CATALOG, "0").create()


def test_another_catalog_is_refused_by_name(file):
    file.create()
    other = SessionFile(file.path, CatalogId("def", "/data/dogs.cbcat", 100), "0.1.0")
    with pytest.raises(
        SessionFileError, match=r"belongs to the catalog /data/cats\.cbcat .* got /data/dogs\.cbcat"
    ):
        other.read()


def test_a_catalog_may_grow_and_move_but_not_shrink(file):
    append(file, {"id": 1})
    grown = SessionFile(file.path, CatalogId("abc123", "/elsewhere", 101), "0.2.0")
    assert records(grown) == [{"id": 1}]
    with pytest.raises(SessionFileError, match=r"100 rows, id abc123\), got .*99 rows"):
        SessionFile(file.path, CatalogId("abc123", "/data/cats.cbcat", 99), "0").read()


@pytest.mark.parametrize("version", [2, "1", None])
def test_a_newer_format_asks_for_an_upgrade(file, version):
    file.create()
    header = json.loads(file.path.read_text()) | {"version": version, "written_by": "9.9"}
    file.path.write_text(json.dumps(header) + "\n")
    with pytest.raises(SessionFileError, match=r"up to 1, got .*clipbranches_widget 9\.9: upgrade"):
        file.read()


@pytest.mark.parametrize("catalog", [None, "x", {}, {"id": "abc123", "name": "", "n_rows": "many"}])
def test_a_header_without_a_catalog_is_an_error(file, catalog):
    file.create()
    header = json.loads(file.path.read_text()) | {"catalog": catalog}
    file.path.write_text(json.dumps(header) + "\n")
    with pytest.raises(SessionFileError, match="line 1: the header names no catalog"):
        file.read()


def test_a_file_that_is_gone_is_not_begun_anew(file):
    append(file, {"id": 1})
    position = file.read()[-1].end
    file.path.unlink()
    assert file.read(position) == []
    with (
        pytest.raises(SessionFileError, match="it is gone: put it back, or keep the labels"),
        file.exclusive(position),
    ):
        pass
    assert not file.path.exists()


def test_a_file_that_became_shorter_is_an_error(file):
    append(file, {"id": 1}, {"id": 2})
    position = file.read()[-1].end
    file.path.write_bytes(file.path.read_bytes()[:-20])
    with pytest.raises(SessionFileError, match="shorter than when it was last read"):
        file.read(position)


def test_an_error_while_holding_the_file_frees_it_and_writes_nothing(file):
    append(file, {"id": 1})
    before = file.path.read_bytes()
    with pytest.raises(ZeroDivisionError, match="by zero"), file.exclusive(Position()):
        _ = 1 / 0
    assert file.path.read_bytes() == before
    append(file, {"id": 2})
    assert len(file.read()) == 2


def run(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


COUNT_UP = """
import sys
from pathlib import Path
from clipbranches_widget.session_file import CatalogId, Position, SessionFile
file = SessionFile(Path(sys.argv[1]), CatalogId("abc123", "/data/cats.cbcat", 100), "0.1.0")
position, last = Position(), 0
for _ in range(40):
    with file.exclusive(position) as log:
        for line in log.lines:
            last = line.record["id"]
        line = log.append({"id": last + 1, "by": sys.argv[2]})
        last, position = line.record["id"], line.end
"""


def test_processes_that_read_and_append_at_once_lose_nothing(file):
    children = [run(COUNT_UP, file.path, name) for name in "abcd"]
    assert [child.wait(60) for child in children] == [0] * 4
    for child in children:
        child.stdout.close()
    found = records(file)
    assert [record["id"] for record in found] == list(range(1, 161))
    assert sorted(record["by"] for record in found) == sorted("abcd" * 40)


FILL_DISK = """
import resource, sys
from pathlib import Path
from clipbranches_widget.errors import SessionFileError
from clipbranches_widget.session_file import CatalogId, Position, SessionFile
file = SessionFile(Path(sys.argv[1]), CatalogId("abc123", "/data/cats.cbcat", 100), "0.1.0")
position = file.read()[-1].end
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (position.offset + 50, limits[1]))
with file.exclusive(position) as log:
    try:
        log.append({"id": 2, "rows": list(range(1000))})
    except SessionFileError as error:
        print(error)
    log.append({"id": 3})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes")
def test_a_full_disk_leaves_the_file_as_it_was(file):
    append(file, {"id": 1})
    child = run(FILL_DISK, file.path)
    said, _ = child.communicate(timeout=60)
    assert "cannot write the session file" in said
    assert "the free space" in said
    assert [r["id"] for r in records(file)] == [1, 3]


def test_a_line_that_may_not_be_on_the_disk_is_taken_back(file, monkeypatch):
    append(file, {"id": 1})
    before = file.path.read_bytes()

    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(SessionFileError, match="cannot write the session file"):
        append(file, {"id": 2})
    assert file.path.read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="flock is POSIX")
def test_without_locks_one_kernel_can_still_work(file, monkeypatch):
    def no_locks(stream, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(file_lock.fcntl, "flock", no_locks)
    with pytest.warns(RuntimeWarning, match="has no locks: use the file from one process"):
        append(file, {"id": 1})
    with pytest.warns(RuntimeWarning, match="has no locks"):
        assert records(file) == [{"id": 1}]


@pytest.mark.skipif(sys.platform == "win32", reason="flock is POSIX")
def test_a_lock_that_fails_is_an_error(file, monkeypatch):
    def broken(stream, kind):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(file_lock.fcntl, "flock", broken)
    with pytest.raises(
        SessionFileError, match=r"cannot open the session file .*Input/output error"
    ):
        append(file, {"id": 1})
