"""A small encoder of words: text and captions meet in one space, without any weights."""

from __future__ import annotations

import hashlib

import numpy as np

from clipbranches_widget.encoder import EncoderInfo

DIM = 48
ADJECTIVES = ("red", "blue", "green", "small", "old", "striped")
NOUNS = ("bird", "fish", "house", "tree", "apple", "train", "drum", "cloud", "boat", "shoe")
HOSTILE = (
    '<img src=x onerror="window.cbw_hacked = true">',
    "\u202eright to left\u202c bird",
    "x" * 10_000,
    "{{ constructor.constructor('window.cbw_hacked = true')() }}",
    "",
)


class WordEncoder:
    """Text tower only: the sum of one fixed random vector a word, scaled to norm 1."""

    info = EncoderInfo(kind="none", model="words", pretrained="", dim=DIM, weights_hash="")
    dim = DIM
    has_text = True
    image_size = 1

    def encode_text(self, texts):
        return np.stack([self._encode(text) for text in texts])

    def encode_images(self, images):
        raise NotImplementedError("words only")

    def preprocess(self, image):
        raise NotImplementedError("words only")

    def encode_tensors(self, tensors):
        raise NotImplementedError("words only")

    @staticmethod
    def _encode(text):
        total = np.zeros(DIM, np.float32)
        for word in text.split() or ["nothing"]:
            seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest())
            total += np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
        return total / np.linalg.norm(total)


def captions(n_rows):
    """Return captions such as "red bird 17"; the first ones are hostile."""
    words = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    return [*HOSTILE, *(f"{words[row % len(words)]} {row}" for row in range(len(HOSTILE), n_rows))]


def build_catalog(path, n_rows=900, *, with_images=False):
    """Build a catalog of `captions`; `with_images` draws a coloured picture for most rows."""
    import pyarrow as pa

    from clipbranches_widget.ingest import from_embeddings

    said = captions(n_rows)
    vectors = WordEncoder().encode_text([text[:200] for text in said])
    noise = np.random.default_rng(7).standard_normal(vectors.shape).astype(np.float32)
    uris = _draw(path.parent / f"{path.stem}-images", n_rows) if with_images else [""] * n_rows
    items = pa.table({"uri": uris, "caption": said})
    return from_embeddings(vectors + 0.05 * noise, path, items=items)


def _draw(folder, n_rows):
    """Write a small PNG a row, but none for every tenth row: a lost image."""
    from PIL import Image

    folder.mkdir(parents=True)
    uris = [str(folder / f"{row}.png") for row in range(n_rows)]
    for row, uri in enumerate(uris):
        if row % 10 != 9:
            hue = (row * 37) % 256
            Image.new("HSV", (200, 150), (hue, 160, 220)).convert("RGB").save(uri)
    return uris
