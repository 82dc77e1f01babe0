"""Stages 2 and 3: the image tower learns to meet its pictures' texts.

First in the teacher's space, then, as in locked-text tuning (Zhai et al., LiT, CVPR 2022), in the
space of the finished text tower.  The texts' vectors do not change within a stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from augment import augment
from caption_table import CaptionTable
from numpy.typing import NDArray
from pacing import Pacer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from towers import Averaged, build_model, normalise_pixels, save_state

_BATCH = 256
_N_EXTRA_TEXTS = 2048
_N_QUEUED = 2048
_MAX_LOG_SCALE = 4.6


@dataclass(frozen=True, slots=True)
class ImageStage:
    """What differs between the two stages.

    Attributes
    ----------
    learning_rate
        Peak of the schedule.
    regression_weight
        Of the cosine regression to the mean vector of a picture's texts, against the contrast.
    log_scale
        Natural logarithm of the first temperature's inverse.
    augment_strength
        1 for the full range of random changes.
    n_even_texts
        Texts drawn for each picture besides the one drawn by weight: mostly its keywords.
    """

    learning_rate: float
    regression_weight: float
    log_scale: float
    augment_strength: float
    n_even_texts: int


FROM_TEACHER = ImageStage(
    2e-3, regression_weight=5.0, log_scale=3.0, augment_strength=1.0, n_even_texts=0
)
TO_TEXT_TOWER = ImageStage(
    1.5e-3, regression_weight=2.0, log_scale=3.4, augment_strength=0.4, n_even_texts=3
)


def soft_cross_entropy(logits: Tensor, weights: Tensor) -> Tensor:
    """Cross entropy of each row against its positive weights; rows without any are left out."""
    total = weights.sum(-1)
    keep = total > 0
    wanted = weights[keep] / total[keep, None]
    return -(wanted * logits[keep].log_softmax(-1)).sum(-1).mean()


class ImageQueue:
    """The latest image vectors, as further negatives for each text."""

    def __init__(self, size: int, dim: int, device: str) -> None:
        self._vectors = torch.zeros(size, dim, device=device)
        self._rows = np.zeros(size, dtype=np.int64)
        self._n_seen = 0

    def push(self, vectors: Tensor, rows: NDArray[np.int64]) -> None:
        """Replace the oldest entries."""
        places = (self._n_seen + np.arange(len(rows))) % len(self._rows)
        self._vectors[torch.from_numpy(places).to(vectors.device)] = vectors.detach()
        self._rows[places] = rows
        self._n_seen += len(rows)

    def get(self) -> tuple[Tensor, NDArray[np.int64]]:
        """Return the filled part: vectors (n, dim) and their picture rows (n,)."""
        n = min(self._n_seen, len(self._rows))
        return self._vectors[:n], self._rows[:n]


def train_image(
    pixels: NDArray[np.uint8],
    sampling: NDArray[np.float64],
    table: CaptionTable,
    text_vectors: NDArray[np.float16],
    out: Path,
    *,
    stage: ImageStage,
    start: Path | None,
    pacer: Pacer,
    device: str,
    seed: int,
) -> None:
    """Train on pictures and their texts; write the averaged weights to `out`.

    Parameters
    ----------
    pixels
        Shape (n, 64, 64, 3).
    sampling
        How often to draw each picture, shape (n,), any positive scale.
    table
        The pictures' texts.
    text_vectors
        Unit vectors of ``table.texts``, the teacher's or the text tower's.
    start
        Weights to continue from; None for random ones.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build_model(seed)
    if start is not None:
        model.load_state_dict(load_file(start), strict=False)
    model.to(device).visual.to(memory_format=torch.channels_last)
    log_scale = nn.Parameter(torch.tensor(stage.log_scale, device=device))
    parameters = [*model.visual.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    averaged = Averaged(model.visual, decay=0.98)
    targets = torch.from_numpy(table.mean_vectors(text_vectors))
    vectors = functional.normalize(torch.from_numpy(text_vectors).float(), dim=-1)
    queue = ImageQueue(_N_QUEUED, vectors.shape[1], device)
    probabilities = sampling / sampling.sum()
    model.train()
    for step, rate in pacer:
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * rate
        rows = rng.choice(len(pixels), _BATCH, replace=False, p=probabilities)
        even = [table.sample_evenly(rows, rng) for _ in range(stage.n_even_texts)]
        own = np.unique(np.concatenate([table.sample(rows, rng), *even]))
        others = np.setdiff1d(rng.integers(0, len(vectors), _N_EXTRA_TEXTS), own)
        texts = np.concatenate([own, others])
        images = torch.from_numpy(pixels[rows]).to(device).permute(0, 3, 1, 2).float() / 255
        inputs = normalise_pixels(augment(images, generator, stage.augment_strength))
        with torch.autocast(device, torch.bfloat16):
            features = model.visual(inputs)
        image = functional.normalize(features.float(), dim=-1)
        text = vectors[texts].to(device)
        regression = 1 - (image * targets[rows].to(device)).sum(-1).mean()
        contrast = contrastive_loss(
            image, rows, text, texts, n_own=len(own), table=table, queue=queue, log_scale=log_scale
        )
        loss = contrast + stage.regression_weight * regression
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        queue.push(image, rows)
        with torch.no_grad():
            log_scale.clamp_(max=_MAX_LOG_SCALE)
        if step % 5 == 0:
            averaged.update(model.visual)
        if step % 200 == 199:
            _save(averaged, out)
            print(
                f"image: {pacer} contrast {contrast.item():.3f} regression "
                f"{regression.item():.3f} scale {log_scale.exp().item():.1f}",
                flush=True,
            )
    _save(averaged, out)


def contrastive_loss(
    image: Tensor,
    rows: NDArray[np.int64],
    text: Tensor,
    text_ids: NDArray[np.int64],
    *,
    n_own: int,
    table: CaptionTable,
    queue: ImageQueue,
    log_scale: Tensor,
) -> Tensor:
    """InfoNCE in both directions with several positives (weights of the caption table).

    Parameters
    ----------
    image, rows
        Unit vectors of the batch's pictures, shape (n, dim), and their rows in the table.
    text, text_ids
        Unit vectors of distinct texts, shape (m, dim), and their ids.
    n_own
        The first so many texts belong to the batch and look for their pictures among the batch's
        and the queue's; the others are only negatives for the pictures.
    """
    scale = log_scale.exp()
    positives = torch.from_numpy(table.positives(rows, text_ids)).to(image.device)
    to_texts = soft_cross_entropy(scale * image @ text.T, positives)
    queued, queued_rows = queue.get()
    queued_positives = torch.from_numpy(table.positives(queued_rows, text_ids[:n_own]))
    of_text = scale * text[:n_own] @ torch.cat([image, queued]).T
    of_text_positives = torch.cat([positives.T[:n_own], queued_positives.T.to(image.device)], dim=1)
    return to_texts + soft_cross_entropy(of_text, of_text_positives)


def _save(averaged: Averaged, out: Path) -> None:
    save_state({f"visual.{k}": v for k, v in averaged.state.items()}, out)
