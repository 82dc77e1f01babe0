"""The methods of `quality.py`, and the choice of their settings.

Settings are chosen field by field: every value of a field is tried with the fields before it as
chosen, on concepts of the collection apart from those that measure (`Collection.tune`), users
labelling 20 rows a round of the method's own ranking, 2 rounds. Best is the highest mean average
precision (for `limit`, which decides what is returned: mean F1). What was chosen is kept in
``quality_settings.json`` beside this file; ``python benchmarks/quality.py --tune`` chooses anew.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from box_measure import say
from quality_branches import Branches
from quality_data import Collection
from quality_methods import Boosted, Forest, Linear, Neighbours, Rocchio, text_only
from quality_ours import ours
from quality_users import Behaviour, Method, User, simulate

SETTINGS = Path(__file__).parent / "quality_settings.json"
N_CONCEPTS, N_ROUNDS = 16, 2

FIXED: dict[str, Method] = {"text": text_only, "ours": ours}
TUNED: dict[str, Any] = {
    "rocchio": Rocchio(),
    "knn": Neighbours(),
    "logistic": Linear(),
    "svm": Linear(loss="hinge", c=1.0, limit=-0.5),
    "xgboost": Boosted(),
    "forest": Forest(),
    "branches": Branches(),
}
NAMES = ("text", "rocchio", "knn", "logistic", "svm", "xgboost", "forest", "branches", "ours")
LINEAR = ("logistic", "svm")

_LINEAR_FIELDS: dict[str, tuple[Any, ...]] = {
    "no_mass": (0.3, 1.0),
    "sample_mass": (3.0, 10.0, 30.0, 100.0, 300.0),
    "refit": (True, False),
    "query_as": ("images", "vector", "nothing"),
    "feature": (0.0, 0.1, 0.3, 1.0),
    "blend": (0.0, 0.3, 0.6),
}
FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "rocchio": {"yes": (0.5, 1.0, 2.0, 4.0), "no": (0.0, 0.25, 0.5, 1.0)},
    "knn": {"text_weight": (0.25, 0.5, 1.0), "no_weight": (0.0, 0.25, 0.5, 1.0)},
    "logistic": {
        "c": (3.0, 10.0, 50.0, 200.0),
        **_LINEAR_FIELDS,
        "limit": (-2.0, -1.5, -1.0, -0.5, 0.0),
    },
    "svm": {
        "c": (0.3, 1.0, 3.0, 10.0, 30.0),
        **_LINEAR_FIELDS,
        "limit": (-0.7, -0.5, -0.3, -0.1, 0.1, 0.3),
    },
    "xgboost": {
        "n_sample": (0, 200, 500, 2000),
        "depth": (1, 2, 3, 6),
        "n_trees": (50, 100),
        "rate": (0.1, 0.3),
    },
    "forest": {"n_sample": (200, 500, 2000), "min_leaf": (1, 3)},
    "branches": {"features": ("pca", "columns"), "n_sample": (200, 500)},
}


def stored() -> dict[str, dict[str, Any]]:
    """Return what was chosen: collection -> method -> settings."""
    if not SETTINGS.is_file():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(SETTINGS.read_text(encoding="utf-8"))
    return found


def methods(collection: str) -> dict[str, Method]:
    """Return every method by name, with the settings chosen for a collection."""
    chosen = stored().get(collection, {})
    tuned = {name: replace(base, **chosen.get(name, {})) for name, base in TUNED.items()}
    return {name: (FIXED | tuned)[name] for name in NAMES}


def score(collection: Collection, name: str, method: Method, figure: str) -> float:
    """Return the mean of a figure over the concepts for settings and the rounds."""
    behaviour = Behaviour(rounds=N_ROUNDS)
    values = [
        figures.get(figure, float("nan"))
        for number, concept in enumerate(collection.tune[:N_CONCEPTS])
        for _, who, _, figures in simulate(
            User(collection, concept, behaviour, seed=number), name, method
        )
        if who == name
    ]
    return float(np.nanmean(values))


def choose(collection: Collection, name: str) -> dict[str, Any]:
    """Return the best settings of a method on a collection."""
    best = TUNED[name]
    for field, values in FIELDS[name].items():
        figure = "f1" if field == "limit" else "ap"
        tried = {value: replace(best, **{field: value}) for value in values}
        scores = {value: score(collection, name, each, figure) for value, each in tried.items()}
        chosen = max(scores, key=lambda value: scores[value])
        best = tried[chosen]
        shown = ", ".join(f"{value}: {found:.4f}" for value, found in scores.items())
        say(f"  {collection.name} {name} {field} -> {chosen}   ({figure}: {shown})")
    settings: dict[str, Any] = asdict(best)
    return settings


def tune(collection: Collection, names: tuple[str, ...] = tuple(TUNED)) -> None:
    """Choose settings on a collection and keep them."""
    kept = stored()
    for name in names:
        kept.setdefault(collection.name, {})[name] = choose(collection, name)
        SETTINGS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
