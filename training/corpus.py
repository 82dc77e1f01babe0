"""Everything training reads, put together: pictures, their captions and the general texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from caption_table import CaptionTable
from captions import Captioner
from icon_names import IconName, read_icon_names
from image_sets import (
    CATALOG,
    ICONIFY_SETS,
    Picture,
    datasource_pictures,
    iconify_pictures,
    load_pictures,
    openclipart_pictures,
    openmoji_pictures,
)
from numpy.typing import NDArray
from text_corpus import general_texts, without_phrases

_OPENCLIPART_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Folders:
    """Where the installed packages and the work files are."""

    node_modules: Path
    wordnet: Path
    openclipart: Path
    work: Path
    phrases: Path


@dataclass(frozen=True, slots=True)
class TrainingPictures:
    """Pictures with texts.

    Attributes
    ----------
    pixels
        Shape (n, 64, 64, 3).
    pictures
        Where each came from, length n.
    sampling
        How often to draw each, shape (n,), sums to 1.
    table
        Their texts.
    """

    pixels: NDArray[np.uint8]
    pictures: list[Picture]
    sampling: NDArray[np.float64]
    table: CaptionTable


def icon_names(folders: Folders) -> dict[str, IconName]:
    """Return the catalog's names and keywords."""
    return read_icon_names(folders.node_modules)


def training_pictures(
    folders: Folders, *, catalog_share: float = 0.4, variant_weight: float = 0.6
) -> TrainingPictures:
    """Read every training design; `image_sets.HELD_OUT` is not among them.

    Parameters
    ----------
    catalog_share
        Part of the drawn pictures that comes from the catalog's design.
    variant_weight
        How often to draw a skin-tone variant, relative to other pictures of its design: variants
        are more than half of the catalog, and look alike.
    """
    captioner = Captioner(icon_names(folders), folders.wordnet)
    sets = {
        CATALOG: openmoji_pictures(),
        "google": datasource_pictures(folders.node_modules, "google"),
        **{name: iconify_pictures(folders.node_modules, name) for name in ICONIFY_SETS},
        "openclipart": openclipart_pictures(folders.openclipart),
    }
    all_pixels, pictures, captions = [], [], []
    for design, found in sets.items():
        pixels, kept = load_pictures(list(found), folders.work / "cache", design)
        texts = [captioner.captions(p) for p in kept]
        known = [row for row, t in enumerate(texts) if t is not None]
        all_pixels.append(pixels[known])
        pictures += [kept[row] for row in known]
        captions += [t for t in texts if t is not None]
    sampling = _sampling(pictures, [c.name for c in captions], catalog_share, variant_weight)
    return TrainingPictures(np.concatenate(all_pixels), pictures, sampling, CaptionTable(captions))


def general_corpus(folders: Folders) -> list[str]:
    """Return WordNet's texts, none of which is a phrase of the evaluation list."""
    return without_phrases(general_texts(folders.wordnet), folders.phrases)


def _sampling(
    pictures: list[Picture], names: list[str], catalog_share: float, variant_weight: float
) -> NDArray[np.float64]:
    designs = np.array([p.design for p in pictures])
    weights = np.array([variant_weight if "skin tone" in n else 1.0 for n in names])
    shares = {CATALOG: catalog_share, "openclipart": _OPENCLIPART_SHARE}
    others = ~np.isin(designs, list(shares))
    for design, share in shares.items():
        weights[designs == design] *= share / weights[designs == design].sum()
    weights[others] *= (1 - sum(shares.values())) / weights[others].sum()
    return weights
