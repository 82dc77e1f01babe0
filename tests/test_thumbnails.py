import os
import threading
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from clipbranches_widget.errors import CatalogCorruptError
from clipbranches_widget.thumbnails import (
    MAX_BYTES_AT_160_PX,
    ThumbnailCache,
    ThumbnailPack,
    ThumbnailPackWriter,
    thumbnail_webp,
)


def opened(data):
    image = Image.open(BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1600, 1200), (160, 120)),
        ((1200, 1600), (120, 160)),
        ((160, 160), (160, 160)),
        ((4000, 10), (160, 1)),
        ((20, 30), (20, 30)),
        ((1, 1), (1, 1)),
    ],
)
def test_aspect_is_kept_and_nothing_enlarged(size, expected):
    image = opened(thumbnail_webp(Image.new("RGB", size, "green")))
    assert (image.format, image.size) == ("WEBP", expected)


@pytest.mark.parametrize("size", [64, 160, 320])
def test_bytes_are_bounded_even_for_noise(rng, size):
    noise = Image.fromarray(rng.integers(0, 256, (600, 600, 3), np.uint8))
    data = thumbnail_webp(noise, size)
    assert len(data) <= MAX_BYTES_AT_160_PX * size * size / 160**2
    assert size / 2 <= max(opened(data).size) <= size


def test_alpha_is_laid_over_white():
    data = thumbnail_webp(Image.new("RGBA", (50, 50), (0, 0, 0, 0)))
    assert opened(data).convert("RGB").getpixel((10, 10)) == (255, 255, 255)


def test_the_callers_image_is_not_changed():
    image = Image.new("RGB", (500, 500))
    thumbnail_webp(image)
    assert image.size == (500, 500)


def test_same_image_same_bytes(rng):
    image = Image.fromarray(rng.integers(0, 256, (99, 77, 3), np.uint8))
    assert thumbnail_webp(image) == thumbnail_webp(image)


def test_a_pack_returns_what_was_appended(tmp_path):
    rows = [b"first", b"", b"third" * 1000, b""]
    with ThumbnailPackWriter(tmp_path) as writer:
        for row in rows:
            writer.append(row)
    pack = ThumbnailPack.open(tmp_path, len(rows))
    assert len(pack) == 4
    assert [pack.get(row) for row in range(4)] == [b"first", None, b"third" * 1000, None]
    for row in (-1, 4):
        with pytest.raises(IndexError, match=f"below 4, got {row}"):
            pack.get(row)


@pytest.mark.parametrize("n_rows", [0, 3])
def test_a_pack_without_bytes_opens(tmp_path, n_rows):
    with ThumbnailPackWriter(tmp_path) as writer:
        for _ in range(n_rows):
            writer.append(b"")
    pack = ThumbnailPack.open(tmp_path, n_rows)
    assert [pack.get(row) for row in range(n_rows)] == [None] * n_rows


def test_a_pack_is_read_only_and_thread_safe(tmp_path):
    with ThumbnailPackWriter(tmp_path) as writer:
        for number in range(500):
            writer.append(str(number).encode())
    pack = ThumbnailPack.open(tmp_path, 500)
    wrong = []

    def read():
        wrong.extend(n for n in range(500) if pack.get(n) != str(n).encode())

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_unfinished_pack_does_not_open(tmp_path):
    def interrupted():
        with ThumbnailPackWriter(tmp_path) as writer:
            writer.append(b"abc")
            raise KeyboardInterrupt("stopped")

    with pytest.raises(KeyboardInterrupt, match="stopped"):
        interrupted()
    with pytest.raises(CatalogCorruptError, match=r"thumbnails cannot be read.*rebuild"):
        ThumbnailPack.open(tmp_path, 1)


def test_damaged_packs_are_named(tmp_path):
    with ThumbnailPackWriter(tmp_path) as writer:
        writer.append(b"abc")
        writer.append(b"de")
    with pytest.raises(CatalogCorruptError, match=r"expected 8 int64 offsets, got int64 \(3,\)"):
        ThumbnailPack.open(tmp_path, 7)
    data = tmp_path / "thumbnails.bin"
    data.write_bytes(b"abcd")
    with pytest.raises(CatalogCorruptError, match=r"thumbnails.bin: expected 5 bytes.*got 4"):
        ThumbnailPack.open(tmp_path, 2)
    data.write_bytes(b"abcde")
    np.save(tmp_path / "thumbnails.npy", np.array([0, 9, 5]))
    with pytest.raises(CatalogCorruptError, match=r"ascending"):
        ThumbnailPack.open(tmp_path, 2)
    (tmp_path / "thumbnails.npy").write_bytes(b"nonsense")
    with pytest.raises(CatalogCorruptError, match=r"thumbnails cannot be read"):
        ThumbnailPack.open(tmp_path, 2)


def test_the_cache_makes_once_and_survives_its_object(tmp_path):
    made = []

    def make():
        made.append(1)
        return b"picture"

    for _ in range(2):
        cache = ThumbnailCache(tmp_path)
        assert cache.get("a-160", make) == cache.get("a-160", make) == b"picture"
    assert made == [1]
    assert cache.get("../../etc/passwd", make) == b"picture"
    assert all(path.is_relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_failing_maker_leaves_nothing(tmp_path):
    def fail():
        raise ValueError("no such image")

    cache = ThumbnailCache(tmp_path)
    with pytest.raises(ValueError, match="no such image"):
        cache.get("a", fail)
    assert cache.get("a", lambda: b"later") == b"later"


def test_the_cache_stays_below_its_bound_and_keeps_what_is_used(tmp_path):
    cache = ThumbnailCache(tmp_path, max_bytes=10_000)
    for number in range(30):
        cache.get(f"{number}", lambda: b"x" * 1000)
        for path in tmp_path.rglob("*.webp"):  # file times are too coarse for a quick test
            status = path.stat()
            os.utime(path, (status.st_atime - 10, status.st_mtime - 10))
        cache.get("0", lambda: b"y" * 1000)
    n_bytes = sum(path.stat().st_size for path in tmp_path.rglob("*.webp"))
    assert 5_000 <= n_bytes <= 10_000
    assert cache.get("0", lambda: b"gone") == b"x" * 1000
    assert cache.get("1", lambda: b"gone") == b"gone"


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert ThumbnailCache(blocked / "cache").get("a", lambda: b"picture") == b"picture"


def test_the_default_folder_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ThumbnailCache().folder.name == "thumbnails"
    assert "clipbranches_widget" in ThumbnailCache().folder.parts
