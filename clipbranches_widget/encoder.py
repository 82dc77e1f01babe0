"""Turn text and images into unit vectors: OpenCLIP models and the bundled demo model (layer 1).

`Encoder` is what the rest of the package asks of a model; `OpenClipEncoder` is any model
open_clip can build: a pair of its registry, a local checkpoint, a folder or a hub repository, and
the small model that ships with this package.

The bundled model (`BUNDLED_MODEL`) knows small drawings such as emoji: it is a demo model for
icons, not for photographs. It makes everything work offline, nothing more.

Weights are found before open_clip is asked, in the caches of the Hugging Face hub and then at
the hub itself, because open_clip would retry for most of a minute on a machine without network.
torch and open_clip are imported when the first encoder is made, never with this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.errors import EncoderError, QueryError
from clipbranches_widget.open_clip_models import load_model, one_thread, pick_device
from clipbranches_widget.weights import (
    BUNDLED_MODEL,
    DEMO_NOTE,
    bundled_weights_hash,
    state_hash,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_TEXT_BATCH = 256


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """Which model made a catalog's embeddings; stored in its manifest.

    Attributes
    ----------
    kind
        ``"open_clip"``, ``"bundled"`` (the demo model in the package) or ``"none"`` (embeddings
        were given, no text search).
    model
        Name as open_clip knows it, ``hf-hub:`` and ``local-dir:`` names included.
    pretrained
        Tag, or absolute path of a checkpoint; empty for names that bring their own weights.
    dim
        Length of an embedding.
    weights_hash
        32 hexadecimal digits. Of the bundled model: BLAKE2b of its config and weights files, known
        without loading it. Of others: BLAKE2b of every parameter's name, shape and up to
        4096 evenly spaced values as float32, so the same weights hash the same from ``.bin``
        or ``.safetensors``, in milliseconds, whatever their size.
    """

    kind: Literal["open_clip", "bundled", "none"]
    model: str
    pretrained: str
    dim: int
    weights_hash: str

    def __str__(self) -> str:
        """Return one line for people, which says so where the model is only a demo."""
        if self.kind == "none":
            return f"no encoder ({self.dim}-d embeddings)"
        name = f"{self.model} / {self.pretrained}" if self.pretrained else self.model
        note = f": {DEMO_NOTE}" if self.kind == "bundled" else ""
        return f"{name} ({self.dim}-d){note}"


class Encoder(Protocol):
    """What search and indexing need of a model. Implementations must be thread-safe."""

    @property
    def info(self) -> EncoderInfo:
        """Identity of the model and its weights."""

    @property
    def dim(self) -> int:
        """Length of an embedding."""

    @property
    def has_text(self) -> bool:
        """Whether `encode_text` works."""

    @property
    def image_size(self) -> int:
        """Side in pixels of the model's input."""

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit vectors, shape (len(texts), dim)."""

    def encode_images(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """Return unit vectors, shape (len(images), dim)."""

    def preprocess(self, image: Image) -> Any:
        """Return the model's input for one RGB image; runs in decoder threads."""

    def encode_tensors(self, tensors: Sequence[Any]) -> NDArray[np.float32]:
        """Return unit vectors, shape (len(tensors), dim), of what `preprocess` returned."""


class OpenClipEncoder:
    """A CLIP model built and loaded by open_clip.

    Parameters
    ----------
    model
        A name of ``open_clip.list_models()``, ``"hf-hub:org/repo"``, ``"local-dir:folder"``, or
        `BUNDLED_MODEL`.
    pretrained
        A tag of that model (see ``open_clip.list_pretrained()``) or the path of a local checkpoint
        (``.safetensors``, ``.pt``, ``.bin``). None for names that bring their own weights.
    device
        ``"cuda"``, ``"cuda:1"``, ``"mps"`` or ``"cpu"``; None takes the first there is.
    cache_dir
        Folder of the Hugging Face cache; None for the usual one.

    Notes
    -----
    Computes in float32 and inference mode, the bundled model on one thread; torch's settings are
    after every call what they were before. Text is encoded as given, without a prompt template;
    what is longer than the model's context (77 tokens for most, 32 for the bundled one) is cut by
    its tokenizer.

    Raises
    ------
    EncoderError
        Unknown model, tag or device, or a checkpoint of another model.
    WeightsUnavailableError
        The weights are neither on this machine nor downloadable. Fails within seconds.
    """

    has_text = True

    def __init__(
        self,
        model: str,
        pretrained: str | Path | None,
        *,
        device: str | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self._name = model
        self._device = pick_device(device)
        weights = None if pretrained is None else str(pretrained)
        self._loaded = load_model(model, weights, self._device, cache_dir)
        bundled = model == BUNDLED_MODEL
        self._info = EncoderInfo(
            kind="bundled" if bundled else "open_clip",
            model=model,
            pretrained=self._loaded.pretrained,
            dim=len(self.encode_text(["a"])[0]),
            weights_hash=bundled_weights_hash() if bundled else state_hash(self._loaded.net),
        )

    def __repr__(self) -> str:
        return f"<OpenClipEncoder {self._info}, on {self._device}>"

    @property
    def info(self) -> EncoderInfo:
        """Identity of the model and its weights."""
        return self._info

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self._info.dim

    @property
    def image_size(self) -> int:
        """Side in pixels of the model's input."""
        return self._loaded.image_size

    @property
    def device(self) -> str:
        """Device the model runs on."""
        return str(self._device)

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit vectors of texts, encoded as given.

        Parameters
        ----------
        texts
            Any number of non-empty texts; over-long ones are cut (see the class).

        Returns
        -------
        ndarray of float32, shape (len(texts), dim)

        Raises
        ------
        QueryError
            A text is empty or only blanks, or one string was given in place of several.
        """
        import torch

        if isinstance(texts, str):
            raise QueryError(f"expected a list of texts, got the string {texts!r}; pass [text]")
        if any(not text.strip() for text in texts):
            raise QueryError("expected a text to encode, got an empty one; type what to look for")
        batches = []
        with self._few_threads(), torch.inference_mode():
            for start in range(0, len(texts), _TEXT_BATCH):
                tokens = self._loaded.tokenizer(list(texts[start : start + _TEXT_BATCH]))
                batches.append(
                    self._loaded.net.encode_text(tokens.to(self._device), normalize=True)
                )
        return self._unit(batches)

    def encode_images(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """Return unit vectors of PIL images, shape (len(images), dim) float32.

        All images go through the model at once: pass batches, or use `embed.embed_images`.
        """
        return self.encode_tensors([self.preprocess(image) for image in images])

    def preprocess(self, image: Image) -> Any:
        """Return the model's input tensor, (3, size, size) uint8, of one image.

        A strip longer than 16 times its width is first cut to its middle: most models look at the
        middle square only, and resizing the whole strip would take gigabytes.
        """
        import torch

        width, height = image.size
        longest = 16 * min(width, height)
        if max(width, height) > longest:
            left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
            image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
        for step in self._loaded.image_steps:
            image = step(image)
        return torch.from_numpy(np.array(image).transpose(2, 0, 1))

    def encode_tensors(self, tensors: Sequence[Any]) -> NDArray[np.float32]:
        """Return unit vectors of what `preprocess` returned, shape (len(tensors), dim) float32.

        Raises
        ------
        EncoderError
            The device ran out of memory.
        """
        import torch

        if not tensors:
            return self._unit([])
        try:
            with self._few_threads(), torch.inference_mode():
                pixels = torch.stack(list(tensors)).to(self._device)
                batch = pixels.float().sub_(self._loaded.mean).div_(self._loaded.std)
                return self._unit([self._loaded.net.encode_image(batch, normalize=True)])
        except torch.OutOfMemoryError as error:
            raise EncoderError(
                f"expected room for {len(tensors)} images on {self._device}, got: {error}; "
                "use a smaller batch_size"
            ) from error

    def _few_threads(self) -> AbstractContextManager[None]:
        small = self._name == BUNDLED_MODEL and self._device.type == "cpu"
        return one_thread() if small else nullcontext()

    def _unit(self, batches: list[Any]) -> NDArray[np.float32]:
        """Return tensors as one finite float32 array of unit rows."""
        if not batches:
            return np.empty((0, self.dim), np.float32)
        rows = np.concatenate([batch.float().cpu().numpy() for batch in batches])
        if not np.isfinite(rows).all():
            raise EncoderError(
                f"expected finite embeddings, got NaN or infinity from {self._name}; "
                "the weights are damaged or do not fit the model"
            )
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def bundled_encoder(device: str | None = None) -> OpenClipEncoder:
    """Load the model in this package: a demo model for icons, not for photographs.

    Takes about a second once open_clip is imported. Nothing is kept: the caller caches.

    Raises
    ------
    WeightsUnavailableError
        The package was installed without its weights file.
    """
    return OpenClipEncoder(BUNDLED_MODEL, None, device=device)


def load_encoder(info: EncoderInfo, *, device: str | None = None) -> OpenClipEncoder:
    """Return the encoder a catalog was built with.

    Raises
    ------
    EncoderError
        The catalog has none, or the weights found now are not those it was built with.
    WeightsUnavailableError
        See `OpenClipEncoder`.
    """
    if info.kind == "none":
        raise EncoderError(
            "expected a catalog with an encoder, got one made from embeddings alone; "
            "search by row or vector, or pass encoder= to from_embeddings"
        )
    if info.kind == "bundled" and bundled_weights_hash() != info.weights_hash:
        raise EncoderError(
            f"expected the bundled encoder with weights {info.weights_hash[:8]}, got "
            f"{bundled_weights_hash()[:8]}: this catalog was built by another version of "
            "clipbranches_widget; build it again (demo() builds a new demo catalog)"
        )
    encoder = OpenClipEncoder(info.model, info.pretrained or None, device=device)
    if encoder.info != info:
        raise EncoderError(
            f"expected weights {info.weights_hash[:8]} ({info.dim}-d) for {info}, got "
            f"{encoder.info.weights_hash[:8]} ({encoder.dim}-d): the weights changed since the "
            "catalog was built; restore the old file, or index the images again"
        )
    return encoder
