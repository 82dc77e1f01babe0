"""Stage 4: the text tower settles on the finished image tower's vectors of the pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from caption_table import CaptionTable
from numpy.typing import NDArray
from pacing import Pacer
from teacher import embed_texts
from torch import Tensor, nn
from torch.nn import functional
from towers import Averaged, encode_text, normalise_pixels
from train_image import soft_cross_entropy
from train_text import batches_by_length, cached_tokens, distillation_loss

_BATCH = 384
_N_GENERAL = 256
_N_OTHER_PICTURES = 2048
_LEARNING_RATE = 5e-4
_LOG_SCALE = math.log(40)
_DISTILLATION_WEIGHT = 2.0


@torch.no_grad()
def picture_vectors(model: Any, pixels: NDArray[np.uint8], *, batch: int = 256) -> Tensor:
    """Return unit vectors, shape (n, 384), of pictures of shape (n, 64, 64, 3)."""
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(pixels), batch):
        images = torch.from_numpy(pixels[start : start + batch]).to(device).permute(0, 3, 1, 2)
        parts.append(model.encode_image(normalise_pixels(images.float() / 255), normalize=True))
    return torch.cat(parts)


def tune_text(
    model: Any,
    pixels: NDArray[np.uint8],
    in_catalog: NDArray[np.bool_],
    table: CaptionTable,
    general: list[str],
    *,
    cache: Path,
    pacer: Pacer,
    device: str,
    seed: int,
) -> dict[str, Tensor]:
    """Return the averaged weights of `model` after tuning its text tower.

    Each text looks for its pictures among the whole catalog and a sample of the other designs;
    general texts keep their vectors near the teacher's.

    Parameters
    ----------
    pixels, in_catalog
        All training pictures, shape (n, 64, 64, 3), and which are the catalog's, shape (n,).
    """
    rng = np.random.default_rng(seed)
    model.to(device).eval()
    images = picture_vectors(model, pixels)
    catalog, others = np.flatnonzero(in_catalog), np.flatnonzero(~in_catalog)
    general_tokens = cached_tokens(general, cache)
    general_vectors = embed_texts(general, cache, device=device)
    caption_tokens = cached_tokens(table.texts, cache)
    caption_batches = _forever(table.text_ids(catalog), caption_tokens, _BATCH, rng)
    general_batches = _forever(np.arange(len(general)), general_tokens, _N_GENERAL, rng)
    parameters = [p for n, p in model.named_parameters() if not n.startswith("visual.")]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    averaged = Averaged(model, decay=0.98)
    scale = math.exp(_LOG_SCALE)
    for step, rate in pacer:
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * rate
        text_ids, general_rows = next(caption_batches), next(general_batches)
        rows = np.concatenate([catalog, rng.choice(others, _N_OTHER_PICTURES, replace=False)])
        text = functional.normalize(_features(model, caption_tokens[text_ids], device), dim=-1)
        positives = torch.from_numpy(table.positives(rows, text_ids)).to(device)
        contrast = soft_cross_entropy(
            scale * text @ images[torch.from_numpy(rows).to(device)].T, positives.T
        )
        student = _features(model, general_tokens[general_rows], device)
        wanted = torch.from_numpy(general_vectors[general_rows]).float().to(device)
        distillation = distillation_loss(student, wanted)
        loss = contrast + _DISTILLATION_WEIGHT * distillation
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 5 == 0:
            averaged.update(model)
        if step % 100 == 99:
            print(
                f"text tuning: {pacer} contrast {contrast.item():.3f} "
                f"distillation {distillation.item():.3f}",
                flush=True,
            )
    return averaged.state


def _features(model: Any, tokens: NDArray[np.uint16], device: str) -> Tensor:
    with torch.autocast(device, torch.bfloat16):
        features = encode_text(model, torch.from_numpy(tokens.astype(np.int64)).to(device))
    return features.float()


def _forever(
    rows: NDArray[np.int64], tokens: NDArray[np.uint16], batch: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    lengths = tokens.argmax(axis=1)
    while True:
        yield from batches_by_length(rows, lengths, batch, rng)
