"""Train the bundled demo encoder: ``python training/train.py`` (see README.md for what it needs).

Stages: the text tower and the image tower are trained at the same time, each on one core; then the
image tower is tuned to the text tower and the text tower to the image tower.  With a GPU the stages
run one after the other on it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from corpus import Folders, general_corpus, icon_names, training_pictures
from evaluate import evaluate, write_metrics
from icon_names import write_keywords
from image_sets import CATALOG
from pacing import Pacer
from teacher import embed_texts
from towers import build_model, export, load_towers, save_state
from train_image import FROM_TEACHER, TO_TEXT_TOWER, train_image
from train_text import student_vectors, train_text
from tune_text import tune_text

HERE = Path(__file__).resolve().parent
_TEXT_STEPS = 6000
_IMAGE_STEPS = 6000
_TUNE_STEPS = 2500
_TUNE_TEXT_STEPS = 2000
_CAPTION_SHARE = 0.25


def main() -> None:
    """Run one stage, or all."""
    options = _parse()
    folders = Folders(
        options.node_modules, options.wordnet, options.openclipart, options.work, options.phrases
    )
    torch.manual_seed(options.seed)
    if options.stage == "all":
        _all(options, folders)
    elif options.stage == "text":
        _text(options, folders)
    elif options.stage == "image":
        _image(options, folders)
    elif options.stage == "tune-image":
        _tune_image(options, folders)
    elif options.stage == "tune-text":
        _tune_text(options, folders)
    elif options.stage == "export":
        _export(options)


def _all(options: argparse.Namespace, folders: Folders) -> None:
    start = time.time()
    write_keywords(icon_names(folders), options.out / "keywords.json")
    # Fills the caches, which both stages then read.
    pictures = training_pictures(folders)
    embed_texts(pictures.table.texts, folders.work / "cache", device=_device())
    for stale in folders.work.glob("*.safetensors"):
        stale.unlink()
    _together("text", "image")
    # The text tower starts towards an image tower that still moves, and settles when it is done.
    _together("tune-image", "tune-text")
    _together("tune-text")
    minutes = (time.time() - start) / 60
    metrics = evaluate(options.out, folders.phrases, folders.node_modules)
    write_metrics({**metrics, "training_minutes": round(minutes, 1)}, options.metrics)


def _together(*stages: str) -> None:
    """Run stages as processes: at the same time on a CPU, one after the other on a GPU."""
    command = [sys.executable, __file__, *sys.argv[1:], "--stage"]
    if _device() == "cpu":
        running = [subprocess.Popen([*command, stage]) for stage in stages]
        failed = any([process.wait() != 0 for process in running])  # noqa: C419 wait for all
    else:
        failed = any(subprocess.run([*command, s], check=False).returncode for s in stages)
    if failed:
        raise SystemExit("a training stage failed: see its message above")


def _text(options: argparse.Namespace, folders: Folders) -> None:
    torch.set_num_threads(1)
    train_text(
        general_corpus(folders),
        training_pictures(folders).table.texts,
        folders.work / "cache",
        folders.work / "text.safetensors",
        pacer=Pacer(options.text_steps, options.apart_minutes * 60),
        caption_share=_CAPTION_SHARE,
        device=_device(),
        seed=options.seed,
    )


def _image(options: argparse.Namespace, folders: Folders) -> None:
    torch.set_num_threads(1)
    pictures = training_pictures(folders)
    vectors = embed_texts(pictures.table.texts, folders.work / "cache", device=_device())
    train_image(
        pictures.pixels,
        pictures.sampling,
        pictures.table,
        vectors,
        folders.work / "image.safetensors",
        stage=FROM_TEACHER,
        start=None,
        pacer=Pacer(options.image_steps, options.apart_minutes * 60),
        device=_device(),
        seed=options.seed,
    )


def _tune_image(options: argparse.Namespace, folders: Folders) -> None:
    torch.set_num_threads(1)
    model = build_model(options.seed)
    text, image = folders.work / "text.safetensors", folders.work / "image.safetensors"
    load_towers(model, text, image)
    pictures = training_pictures(folders, catalog_share=0.6, variant_weight=0.4)
    train_image(
        pictures.pixels,
        pictures.sampling,
        pictures.table,
        student_vectors(model.eval(), pictures.table.texts),
        folders.work / "tuned.safetensors",
        stage=TO_TEXT_TOWER,
        start=image,
        pacer=Pacer(options.tune_steps, options.tune_minutes * 60),
        device=_device(),
        seed=options.seed,
    )


def _tune_text(options: argparse.Namespace, folders: Folders) -> None:
    torch.set_num_threads(1)
    model = build_model(options.seed)
    load_towers(model, *_latest(folders.work))
    pictures = training_pictures(folders)
    state = tune_text(
        model,
        pictures.pixels,
        np.array([p.design == CATALOG for p in pictures.pictures]),
        pictures.table,
        general_corpus(folders),
        cache=folders.work / "cache",
        pacer=Pacer(options.tune_text_steps, options.tune_text_minutes * 60, n_warmup=50),
        device=_device(),
        seed=options.seed,
    )
    save_state(state, folders.work / "text-tuned.safetensors")
    export(state, options.out)


def _export(options: argparse.Namespace) -> None:
    """Ship the two towers as far as they are."""
    model = build_model(options.seed)
    load_towers(model, *_latest(options.work))
    export(model.state_dict(), options.out)


def _latest(work: Path) -> tuple[Path, Path]:
    """Return the text and image weights of the latest stage that has finished, or saved some."""
    text, image = work / "text-tuned.safetensors", work / "tuned.safetensors"
    return (
        text if text.exists() else work / "text.safetensors",
        image if image.exists() else work / "image.safetensors",
    )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--stage",
        default="all",
        choices=["all", "text", "image", "tune-image", "tune-text", "export"],
    )
    parser.add_argument("--node-modules", type=Path, default=Path("node_modules"))
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--openclipart", type=Path, default=Path("/usr/share/openclipart/svg"))
    parser.add_argument("--work", type=Path, default=Path("training-work"))
    parser.add_argument("--phrases", type=Path, default=HERE / "free_phrases.json")
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "clipbranches_widget" / "demo_encoder"
    )
    parser.add_argument("--metrics", type=Path, default=HERE / "metrics.json")
    parser.add_argument("--text-steps", type=int, default=_TEXT_STEPS)
    parser.add_argument("--image-steps", type=int, default=_IMAGE_STEPS)
    parser.add_argument("--tune-text-steps", type=int, default=_TUNE_TEXT_STEPS)
    parser.add_argument("--tune-text-minutes", type=float, default=10)
    parser.add_argument("--tune-steps", type=int, default=_TUNE_STEPS)
    parser.add_argument(
        "--apart-minutes", type=float, default=45, help="limit of the two single-tower stages"
    )
    parser.add_argument("--tune-minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
