"""Stage 1: the text tower learns to give MiniLM's vectors from CLIP's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pacing import Pacer
from teacher import embed_texts, texts_digest
from torch import Tensor, nn
from torch.nn import functional
from towers import Averaged, build_model, encode_text, tokenize

_BATCH = 512
_N_HELD_OUT = 2000
_RELATION_TEMPERATURE = 0.05
_LEARNING_RATE = 2e-3


def cached_tokens(texts: list[str], cache: Path) -> NDArray[np.uint16]:
    """Return token ids, shape (n, 32), from the cache folder or by tokenizing."""
    path = cache / f"tokens-{texts_digest(texts)}.npy"
    if not path.exists():
        np.save(path, tokenize(texts).numpy().astype(np.uint16), allow_pickle=False)
    tokens: NDArray[np.uint16] = np.load(path, allow_pickle=False)
    return tokens


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine regression plus agreement on who is similar to whom in the batch.

    Parameters
    ----------
    student, teacher
        Vectors, shape (n, 384); `teacher` has unit norm.
    """
    student = functional.normalize(student, dim=-1)
    regression = 1 - (student * teacher).sum(-1).mean()
    wanted = (teacher @ teacher.T / _RELATION_TEMPERATURE).softmax(-1)
    given = (student @ teacher.T / _RELATION_TEMPERATURE).log_softmax(-1)
    return 10 * regression + functional.kl_div(given, wanted, reduction="batchmean")


def train_text(
    general: list[str],
    captions: list[str],
    cache: Path,
    out: Path,
    *,
    pacer: Pacer,
    caption_share: float,
    device: str,
    seed: int,
) -> None:
    """Train on general texts and captions; write the averaged weights to `out`.

    `caption_share` is the part of each batch drawn from the captions.
    """
    teacher = np.concatenate([embed_texts(t, cache, device=device) for t in (general, captions)])
    tokens = np.concatenate([cached_tokens(t, cache) for t in (general, captions)])
    rng = np.random.default_rng(seed)
    held_out = rng.choice(len(general), _N_HELD_OUT, replace=False)
    model = build_model(seed)
    _initialise_embedding(model, cache, device)
    model.to(device)
    parameters = [p for n, p in model.named_parameters() if not n.startswith("visual.")]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    averaged = Averaged(model, decay=0.99)
    batches = _batches(tokens, len(general), held_out, caption_share, rng)
    for step, rate in pacer:
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * rate
        rows = next(batches)
        batch = torch.from_numpy(tokens[rows].astype(np.int64)).to(device)
        target = torch.from_numpy(teacher[rows]).to(device).float()
        with torch.autocast(device, torch.bfloat16):
            student = encode_text(model, batch)
        loss = distillation_loss(student.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 5 == 0:
            averaged.update(model)
        if step % 500 == 499:
            averaged.save(out)
            cosine = _held_out_cosine(averaged, seed, tokens[held_out], teacher[held_out])
            print(f"text: {pacer} loss {loss.item():.3f} held-out cosine {cosine:.4f}", flush=True)
    averaged.save(out)


def batches_by_length(
    rows: NDArray[np.int64], lengths: NDArray[np.int64], batch: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Yield all of `rows` once, in batches of texts of similar length, in random order."""
    rows = rng.permutation(rows)
    # Sorting by length within a large chunk keeps padding low and batches varied.
    for chunk in np.array_split(rows, max(1, len(rows) // (32 * batch))):
        ordered = chunk[np.argsort(lengths[chunk], kind="stable")]
        n_batches = len(ordered) // batch
        for index in rng.permutation(n_batches):
            yield ordered[index * batch : (index + 1) * batch]


def _batches(
    tokens: NDArray[np.uint16],
    n_general: int,
    held_out: NDArray[np.int64],
    caption_share: float,
    rng: np.random.Generator,
) -> Iterator[NDArray[np.int64]]:
    """Yield rows of general texts and captions, for ever."""
    pool = np.setdiff1d(np.arange(n_general), held_out)
    n_captions = len(tokens) - n_general
    n_drawn = int(len(pool) * caption_share / (1 - caption_share))
    lengths = tokens.argmax(axis=1)
    while True:
        rows = np.concatenate([pool, n_general + rng.integers(0, n_captions, n_drawn)])
        yield from batches_by_length(rows, lengths, _BATCH, rng)


def _initialise_embedding(model: Any, cache: Path, device: str) -> None:
    """Start each token at the teacher's vector of its letters, reduced by PCA."""
    from open_clip import SimpleTokenizer

    decoder = SimpleTokenizer().decoder
    n_tokens, width = model.token_embedding.weight.shape
    words = [decoder[i].replace("</w>", "").strip() or "." for i in range(n_tokens)]
    vectors = torch.from_numpy(embed_texts(words, cache, device=device)).float()
    vectors = vectors - vectors.mean(0)
    _, _, components = torch.linalg.svd(vectors[:20000], full_matrices=False)
    reduced = vectors @ components[:width].T
    with torch.no_grad():
        model.token_embedding.weight.copy_(0.05 * reduced / reduced.std())


@torch.inference_mode()
def student_vectors(model: Any, texts: list[str], *, batch: int = 512) -> NDArray[np.float16]:
    """Return the text tower's unit vectors of `texts`, shape (len(texts), 384), in their order."""
    tokens = tokenize(texts)
    order = tokens.argmax(dim=-1).argsort()
    vectors = np.empty((len(texts), model.text_projection.shape[1]), dtype=np.float16)
    for rows in torch.split(order, batch):
        features = encode_text(model, tokens[rows].to(model.text_projection.device))
        vectors[rows.numpy()] = functional.normalize(features, dim=-1).cpu().numpy()
    return vectors


@torch.inference_mode()
def _held_out_cosine(
    averaged: Averaged, seed: int, tokens: NDArray[np.uint16], teacher: NDArray[np.float16]
) -> float:
    model = build_model(seed).eval()
    model.load_state_dict({k: v.cpu() for k, v in averaged.state.items()})
    student = functional.normalize(
        encode_text(model, torch.from_numpy(tokens.astype(np.int64))), dim=-1
    )
    return float((student * torch.from_numpy(teacher).float()).sum(-1).mean())
