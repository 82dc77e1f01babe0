"""Small pictures that are all different, an encoder that tells them apart, and what must hold."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

from clipbranches_widget.encoder import EncoderInfo
from clipbranches_widget.images import content_hash
from clipbranches_widget.ingest import index

DIM = 48


class TileEncoder:
    """A real, tiny encoder: an image is its 4 x 4 mean colours, less their mean."""

    info = EncoderInfo("open_clip", "tiles", "none", DIM, "weights-1")
    dim = DIM
    has_text = False
    image_size = 4

    def preprocess(self, image):
        small = image.convert("RGB").resize((4, 4), Image.Resampling.BOX)
        tiles = np.asarray(small, np.float32).ravel()
        return tiles - tiles.mean() + 1e-3

    def encode_tensors(self, tensors):
        rows = np.array(list(tensors), np.float32).reshape(-1, DIM)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def encode_images(self, images):
        return self.encode_tensors([self.preprocess(image) for image in images])

    def encode_text(self, texts):
        raise AssertionError(f"no text tower for {texts}")


def picture(number):
    """Return the PNG bytes of a picture of 4 x 4 random tiles; its size depends on its number."""
    tiles = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    size = (16 + number % 5, 12 + number % 3)
    buffer = BytesIO()
    Image.fromarray(tiles).resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(n):
    return [picture(number) for number in range(n)]


def embedding(data):
    return TileEncoder().encode_images([Image.open(BytesIO(data))])[0]


def build(source, path, **options):
    options = {"encoder": TileEncoder(), "progress": False, "with_map": False, **options}
    return index(source, path, **options)


def assert_holds(catalog, images, *, readable=True):
    """Check that row i of a catalog is picture i: its bytes, its embedding, its original."""
    items = catalog.items
    assert items.column("content_hash").to_pylist() == [content_hash(data) for data in images]
    for row, data in enumerate(images):
        np.testing.assert_allclose(catalog.embeddings[row], embedding(data), atol=1e-3)
        assert catalog.thumbnail(row)[8:12] == b"WEBP"
        if readable:
            with Image.open(BytesIO(data)) as original:
                assert np.array_equal(catalog.image(row), original.convert("RGB"))
    catalog.verify()
