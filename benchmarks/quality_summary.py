"""Summarise what `quality.py` measured: means and spreads over concepts, ratios with intervals.

An entry is one method's round for one concept: what it is about, and its figures. A cell gathers
the entries of all concepts.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from quality_ours import expected_error
from quality_tuning import LINEAR

if TYPE_CHECKING:
    import pandas as pd

Entry = dict[str, Any]
Cell = dict[str, Any]

ABOUT = ("data", "variant", "method", "round")
NOT_FIGURES = {*ABOUT, "concept", "kind", "bins"}
N_RESAMPLES = 5_000


def mean_known(values: Sequence[float]) -> float:
    """Return the mean without NaN, NaN where there is nothing else."""
    known = [value for value in values if value == value]  # noqa: PLR0124 - NaN is unlike itself
    return float(np.mean(known)) if known else float("nan")


def cells(entries: Iterable[Entry]) -> list[Cell]:
    """Gather entries by collection, users, method and round: means, spreads, every concept's AP.

    Of all concepts together, every row weighing the same: ``ece_pooled``, ``unseen_boxed_pooled``
    and the like. ``page_worse`` is the share of concepts whose first page is worse than the
    text's, ``page_worse_silently`` that where the result does not say anything about it.
    """
    groups: dict[tuple[Any, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[tuple(entry[name] for name in ABOUT)].append(entry)
    found = []
    for key, group in groups.items():
        figures = [name for name in group[0] if name not in NOT_FIGURES]
        cell: Cell = dict(zip(ABOUT, key, strict=True)) | {"n_concepts": len(group)}
        cell["n_ap"] = int(sum(np.isfinite(entry["ap"]) for entry in group))
        columns = {
            name: [float(entry.get(name, float("nan"))) for entry in group] for name in figures
        }
        cell["mean"] = {name: mean_known(values) for name, values in columns.items()}
        known = {name: [v for v in values if v == v] for name, values in columns.items()}  # noqa: PLR0124
        cell["sd"] = {name: float(np.std(values)) for name, values in known.items() if values}
        cell["mean"]["seconds_median"] = float(np.median(columns["seconds"]))
        worse = np.array(columns["page"]) < np.array(columns["text_page"]) - 1e-9
        cell["mean"]["page_worse"] = float(worse.mean())
        if "noted" in columns:
            silent = worse & (np.array(columns["noted"]) == 0)
            cell["mean"]["page_worse_silently"] = float(silent.mean())
        for which in ("unseen", "loose"):
            if f"n_{which}" not in columns:
                continue
            weights = np.array(columns[f"n_{which}"])
            for name in (f"{which}_boxed", f"{which}_found"):
                held = np.nansum(np.array(columns[name]) * weights)
                share = float(held / weights.sum()) if weights.sum() else float("nan")
                cell["mean"][f"{name}_pooled"] = share
        if "bins" in group[0]:
            table = np.sum([entry["bins"] for entry in group], axis=0)
            cell["mean"]["ece_pooled"] = expected_error(table)
            cell["bins"] = table.tolist()
        cell["concepts"] = [entry["concept"] for entry in group]
        cell["ap"] = columns["ap"]
        found.append(cell)
    return found


def _four_digits(number: str) -> float:
    return float(f"{float(number):.4g}")


def write(path: Path, facts: dict[str, Any], found: list[Cell]) -> None:
    """Write facts and cells as JSON, a line each, numbers with four significant digits."""

    def dumped(value: Any) -> str:
        text = json.dumps(value, default=float)
        exact = json.loads(text, parse_float=_four_digits, parse_constant=lambda _: None)
        return json.dumps(exact)

    concepts = {cell["data"]: cell["concepts"] for cell in found}
    slim = [{name: cell[name] for name in cell if name != "concepts"} for cell in found]
    lines = [f'"{name}": {dumped(value)}' for name, value in facts.items()]
    lines.append(f'"concepts": {dumped(concepts)}')
    lines.append('"cells": [\n' + ",\n".join(dumped(cell) for cell in slim) + "\n]")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    temporary.replace(path)


def frame(entries: Iterable[Entry]) -> pd.DataFrame:
    """Return the means as a table, a line for each collection, method and round."""
    import pandas as pd

    listed = list(entries)
    lines = [{name: cell[name] for name in ABOUT} | cell["mean"] for cell in cells(listed)]
    table = pd.DataFrame(lines).drop(columns=["variant"]).set_index(["data", "method", "round"])
    table.attrs["entries"] = listed
    return table


class Cells:
    """Looks cells up, and compares them.

    Parameters
    ----------
    found : list of dict
        From `cells`.
    """

    def __init__(self, found: list[Cell]) -> None:
        self._by_key = {tuple(cell[name] for name in ABOUT): cell for cell in found}
        self.data = list(dict.fromkeys(cell["data"] for cell in found))
        self.variants = list(dict.fromkeys(cell["variant"] for cell in found))

    def get(self, data: str, variant: str, method: str, number: int) -> Cell | None:
        """Return a cell, None where it was not measured."""
        return self._by_key.get((data, variant, method, number))

    def rounds(self, data: str, variant: str, method: str = "ours") -> list[int]:
        """Return the rounds that were measured."""
        return sorted(key[3] for key in self._by_key if key[:3] == (data, variant, method))

    def mean(self, data: str, variant: str, method: str, number: int, figure: str) -> float:
        """Return the mean of a figure over concepts, NaN where it was not measured."""
        cell = self.get(data, variant, method, number)
        return float(cell["mean"].get(figure, float("nan"))) if cell else float("nan")

    def best_linear(self, data: str, variant: str, number: int) -> str:
        """Return the linear full scan with the highest mean average precision."""
        return max(LINEAR, key=lambda name: self.mean(data, variant, name, number, "ap"))

    def ratio(
        self, data: str, variant: str, number: int, over: str
    ) -> tuple[float, float, float] | None:
        """Return mean AP of ours by that of another method, with its 95 % interval.

        Over the concepts where both have one; a paired bootstrap over concepts.
        """
        ours, other = (self.get(data, variant, each, number) for each in ("ours", over))
        if ours is None or other is None or ours["concepts"] != other["concepts"]:
            return None
        pairs: NDArray[np.float64] = np.array([ours["ap"], other["ap"]], dtype=np.float64)
        pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
        if not pairs.size:
            return None
        rng = np.random.default_rng(0)
        drawn = pairs[:, rng.integers(0, pairs.shape[1], (N_RESAMPLES, pairs.shape[1]))]
        ratios = drawn[0].sum(axis=1) / np.maximum(drawn[1].sum(axis=1), 1e-12)
        low, high = np.quantile(ratios, [0.025, 0.975])
        return float(pairs[0].sum() / max(pairs[1].sum(), 1e-12)), float(low), float(high)


def machine() -> dict[str, Any]:
    """Say where this runs, and with what."""
    packages = ("numpy", "scikit-learn", "xgboost", "usearch", "numba")
    return {
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "load_at_start": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
