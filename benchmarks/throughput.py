"""Measure how close indexing comes to the speed of the model alone.

For each model, two loops over the same images take turns: the model on tensors prepared
beforehand, and `embed_images` from JPEG files (read, hash, decode, preprocess, thumbnail, model).
``ratio`` is the second's throughput over the first's. Where both share the same cores it cannot
exceed ``bound`` = model / (model + preparation) in core time; on a GPU the cores are free to
prepare and it can reach 1.

    python benchmarks/throughput.py [--images 300] [--repeats 3] [--device cuda]

Weights are random: speed does not depend on them. Writes throughput.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import PIL
import torch
from PIL import Image
from safetensors.torch import save_file

from clipbranches_widget.embed import embed_images
from clipbranches_widget.encoder import OpenClipEncoder, bundled_encoder
from clipbranches_widget.errors import WeightsUnavailableError
from clipbranches_widget.images import load

WIDTH, HEIGHT = 1600, 1200
BATCH = 64


def write_jpegs(folder: Path, n_images: int) -> list[str]:
    """Write photograph-like JPEGs: smooth structure at several scales plus sensor noise."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(n_images):
        layers = [
            np.asarray(
                Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).resize(
                    (WIDTH, HEIGHT), Image.Resampling.BICUBIC
                ),
                np.float32,
            )
            for size in (4, 16, 64)
        ]
        pixels = 0.5 * layers[0] + 0.3 * layers[1] + 0.2 * layers[2]
        pixels += rng.normal(0, 4, pixels.shape)
        path = folder / f"{number:04d}.jpg"
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(str(path))
    return paths


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return wall seconds and core seconds of a call."""
    wall, core = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - core


def measure(encoder: OpenClipEncoder, paths: list[str], repeats: int) -> dict[str, Any]:
    """Time the model on ready tensors and the whole pipeline in turn."""
    target = max(encoder.image_size, 160)
    tensors = [encoder.preprocess(load(path, target_size=target).image) for path in paths]
    on_gpu = not encoder.device.startswith("cpu")

    def model_alone() -> None:
        for start in range(0, len(tensors), BATCH):
            encoder.encode_tensors(tensors[start : start + BATCH])

    def pipeline() -> None:
        for _ in embed_images(paths, encoder, batch_size=BATCH):
            pass

    model_alone()
    turns = [(timed(model_alone), timed(pipeline)) for _ in range(repeats)]
    model_s = statistics.median(model[0] for model, _ in turns)
    pipeline_s = statistics.median(whole[0] for _, whole in turns)
    model_core_s = statistics.median(model[1] for model, _ in turns)
    pipeline_core_s = statistics.median(whole[1] for _, whole in turns)
    n_images = len(paths)
    return {
        "model": encoder.info.model,
        "device": encoder.device,
        "n_images": n_images,
        "model_images_per_s": round(n_images / model_s, 1),
        "pipeline_images_per_s": round(n_images / pipeline_s, 1),
        "ratio": round(statistics.median(m[0] / p[0] for m, p in turns), 3),
        "bound": 1.0 if on_gpu else round(model_core_s / pipeline_core_s, 3),
        "model_core_ms_per_image": round(1e3 * model_core_s / n_images, 2),
        "pipeline_core_ms_per_image": round(1e3 * pipeline_core_s / n_images, 2),
    }


def draft_similarity(encoder: OpenClipEncoder, paths: list[str]) -> float:
    """Return the least cosine between embeddings of reduced and of whole decoding."""
    target = max(encoder.image_size, 160)
    reduced = encoder.encode_images([load(path, target_size=target).image for path in paths])
    whole = encoder.encode_images([load(path).image for path in paths])
    return float((reduced * whole).sum(axis=1).min())


def main() -> None:
    """Run both models, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_jpegs(folder, options.images)
        weights = folder / "random.safetensors"
        torch.manual_seed(0)
        save_file(open_clip.create_model("ViT-B-32").state_dict(), weights)
        encoders = [OpenClipEncoder("ViT-B-32", weights, device=options.device)]
        try:
            encoders.append(bundled_encoder(options.device))
        except WeightsUnavailableError as error:
            print(f"bundled encoder left out: {error}")
        for encoder in encoders:
            figures = measure(encoder, paths, options.repeats)
            figures["least_cosine_of_reduced_decoding"] = round(
                draft_similarity(encoder, paths[:32]), 5
            )
            print(json.dumps(figures, indent=1), flush=True)
            results.append(figures)
    record = {
        "images": f"JPEG {WIDTH} x {HEIGHT}, quality 90, random structure and noise",
        "batch_size": BATCH,
        "n_cores": os.cpu_count(),
        "load_average_at_end": round(os.getloadavg()[0], 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
            "pillow": PIL.__version__,
        },
        "results": results,
    }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
