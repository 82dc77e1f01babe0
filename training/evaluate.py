"""Measure the packaged encoder by plain open_clip calls, and write ``metrics.json``.

``python training/evaluate.py --node-modules node_modules`` reproduces the figures of the model
card.  Without ``--node-modules`` the held-out design is left out.  Every figure ranks all images of
a set by cosine similarity in float32.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from icon_names import base_hexcode, plain_hexcode
from image_sets import HELD_OUT, Picture, datasource_pictures, openmoji_pictures
from numpy.typing import NDArray
from towers import MODEL_NAME

HERE = Path(__file__).resolve().parent
ENCODER = HERE.parent / "clipbranches_widget" / "demo_encoder"
TOP = 10
_BATCH = 256


def load_encoder(folder: Path) -> tuple[Any, Callable[..., torch.Tensor], Any]:
    """Return (model, preprocess, tokenizer) of the packaged encoder; no network."""
    open_clip.add_model_config(folder / f"{MODEL_NAME}.json")
    model, _, preprocess = open_clip.create_model_and_transforms(
        MODEL_NAME, pretrained=str(folder / "weights.safetensors")
    )
    return model.eval(), preprocess, open_clip.get_tokenizer(MODEL_NAME)


class Searcher:
    """The encoder with one set of pictures embedded."""

    def __init__(self, folder: Path) -> None:
        self._model, self._preprocess, self._tokenizer = load_encoder(folder)

    @torch.inference_mode()
    def embed_pictures(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Return unit vectors, shape (n, 384), of the pictures as the package would show them."""
        parts = []
        for start in range(0, len(pictures), _BATCH):
            images = [self._preprocess(p.read()) for p in pictures[start : start + _BATCH]]
            parts.append(self._model.encode_image(torch.stack(images), normalize=True))
        return torch.cat(parts)

    @torch.inference_mode()
    def rank(self, queries: Sequence[str], vectors: torch.Tensor) -> NDArray[np.int64]:
        """Return the rows of the best `TOP` pictures, shape (len(queries), TOP), best first."""
        parts = []
        for start in range(0, len(queries), _BATCH):
            tokens = self._tokenizer(list(queries[start : start + _BATCH]))
            text = self._model.encode_text(tokens, normalize=True)
            parts.append((text @ vectors.T).topk(TOP).indices)
        return torch.cat(parts).numpy()

    def query_ms(self, query: str = "animal with a long neck", n: int = 50) -> float:
        """Return the median time of one text query on one thread, in milliseconds."""
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        times = []
        with torch.inference_mode():
            for _ in range(n):
                start = time.perf_counter()
                self._model.encode_text(self._tokenizer([query]), normalize=True)
                times.append(time.perf_counter() - start)
        torch.set_num_threads(n_threads)
        return 1000 * float(np.median(times))


def recall(ranked: NDArray[np.int64], accepted: Sequence[set[int]], k: int) -> float:
    """Return the share of queries with an accepted row among the first `k`."""
    hits = [bool(a & set(r[:k].tolist())) for r, a in zip(ranked, accepted, strict=True)]
    return round(float(np.mean(hits)), 4)


def evaluate(
    folder: Path, phrases_file: Path, node_modules: Path | None, *, list_misses: bool = False
) -> dict[str, Any]:
    """Return all figures; see MODEL_CARD.md for what each means."""
    icons = json.loads((folder / "keywords.json").read_text(encoding="utf-8"))
    searcher = Searcher(folder)
    pictures = list(openmoji_pictures())
    vectors = searcher.embed_pictures(pictures)
    known = [icons.get(p.key, {"name": "", "keywords": []}) for p in pictures]
    metrics: dict[str, Any] = {
        "catalog_images": len(pictures),
        **_by_word(searcher, vectors, [[i["name"]] for i in known], "name"),
        **_by_word(searcher, vectors, [i["keywords"] for i in known], "keyword"),
    }
    phrases = json.loads(phrases_file.read_text(encoding="utf-8"))["phrases"]
    ranked = searcher.rank([p["phrase"] for p in phrases], vectors)
    rows_of: dict[str, set[int]] = {}
    for row, picture in enumerate(pictures):
        rows_of.setdefault(base_hexcode(picture.key), set()).add(row)
    accepted = [
        set().union(*(rows_of.get(base_hexcode(h), set()) for h in p["accept"])) for p in phrases
    ]
    metrics["free_phrases"] = len(phrases)
    metrics["free_phrase_recall_at_1"] = recall(ranked, accepted, 1)
    metrics["free_phrase_recall_at_10"] = recall(ranked, accepted, TOP)
    if list_misses:
        _print_misses(phrases, ranked, accepted, [i["name"] for i in known])
    if node_modules is not None:
        metrics.update(_held_out(searcher, icons, node_modules))
    metrics["query_ms_one_thread"] = round(searcher.query_ms(), 2)
    size = sum((folder / n).stat().st_size for n in (f"{MODEL_NAME}.json", "weights.safetensors"))
    metrics["encoder_megabytes"] = round(size / 1e6, 2)
    return metrics


def write_metrics(metrics: dict[str, Any], path: Path) -> None:
    """Write the figures as JSON."""
    path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _by_word(
    searcher: Searcher, vectors: torch.Tensor, words: Sequence[Sequence[str]], label: str
) -> dict[str, Any]:
    """Search each distinct word once; any picture that carries it is right."""
    carriers: dict[str, set[int]] = {}
    for row, own in enumerate(words):
        for word in own:
            if word:
                carriers.setdefault(word, set()).add(row)
    queries, accepted = list(carriers), list(carriers.values())
    ranked = searcher.rank(queries, vectors)
    return {
        f"{label}_queries": len(queries),
        f"{label}_recall_at_1": recall(ranked, accepted, 1),
        f"{label}_recall_at_10": recall(ranked, accepted, TOP),
    }


def _held_out(
    searcher: Searcher, icons: dict[str, dict[str, Any]], node_modules: Path
) -> dict[str, Any]:
    """Search the design that training never saw, by name."""
    names = {plain_hexcode(code): icon["name"] for code, icon in icons.items()}
    pictures = [
        p for p in datasource_pictures(node_modules, HELD_OUT) if plain_hexcode(p.key) in names
    ]
    vectors = searcher.embed_pictures(pictures)
    words = [[names[plain_hexcode(p.key)]] for p in pictures]
    plain = [row for row, p in enumerate(pictures) if base_hexcode(p.key) == plain_hexcode(p.key)]
    without_tones = _by_word(
        searcher, vectors[plain], [words[r] for r in plain], "held_out_without_skin_tones_name"
    )
    return {
        "held_out_design": HELD_OUT,
        "held_out_images": len(pictures),
        **_by_word(searcher, vectors, words, "held_out_name"),
        "held_out_without_skin_tones_images": len(plain),
        **without_tones,
    }


def _print_misses(
    phrases: Sequence[dict[str, Any]],
    ranked: NDArray[np.int64],
    accepted: Sequence[set[int]],
    names: Sequence[str],
) -> None:
    for phrase, rows, right in zip(phrases, ranked, accepted, strict=True):
        if not right & set(rows.tolist()):
            print(f"missed: {phrase['phrase']!r}: {', '.join(names[r] for r in rows[:5])}")


def main() -> None:
    """Evaluate the packaged encoder from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", type=Path, default=ENCODER)
    parser.add_argument("--phrases", type=Path, default=HERE / "free_phrases.json")
    parser.add_argument("--node-modules", type=Path, help="for the held-out design")
    parser.add_argument("--write", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--misses", action="store_true", help="list the phrases that failed")
    options = parser.parse_args()
    metrics = evaluate(
        options.encoder, options.phrases, options.node_modules, list_misses=options.misses
    )
    print(json.dumps(metrics, indent=2))
    if options.write:
        write_metrics(metrics, options.write)


if __name__ == "__main__":
    main()
