"""Summarise what `quality.py` measured: means and spreads, ratios with intervals, tables, picture.

An entry is one method's round for one concept: what it is about, and its figures.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from quality_ours import FULL_SCAN, expected_error
from quality_tuning import LINEAR, NAMES

if TYPE_CHECKING:
    import pandas as pd

Entry = dict[str, Any]
Cell = dict[str, Any]

ABOUT = ("data", "variant", "method", "round")
NOT_FIGURES = {*ABOUT, "concept", "kind", "bins"}
ALL_METHODS = (*NAMES, FULL_SCAN)
N_RESAMPLES = 5_000

WORSE = "first page worse than the text's, unsaid"
BOXED = "rows in boxes"
SECONDS = "seconds a round, median"
AT_MOST = (WORSE, BOXED, SECONDS)
"""Bars that are upper limits."""

SERIES = (
    ("text", "#999999", "x", ":"),
    ("rocchio", "#56B4E9", "v", "--"),
    ("knn", "#CC79A7", "P", "--"),
    ("svm", "#E69F00", "^", "-"),
    ("logistic", "#009E73", "D", "-"),
    ("xgboost", "#D55E00", "s", "--"),
    ("forest", "#8C510A", "p", "--"),
    ("branches", "#F0E442", "*", "--"),
    (FULL_SCAN, "#000000", "", "-."),
    ("ours", "#0072B2", "o", "-"),
)
"""Colours of Okabe and Ito, told apart with any colour vision; markers and dashes differ too."""


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if value == value]  # noqa: PLR0124 - NaN is unlike itself
    return float(np.mean(known)) if known else float("nan")


def cells(entries: Iterable[Entry]) -> list[Cell]:
    """Gather entries by collection, users, method and round: means, spreads, every concept's AP.

    ``ece_pooled`` is the calibration error of all concepts' bins together.
    """
    groups: dict[tuple[Any, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[tuple(entry[name] for name in ABOUT)].append(entry)
    found = []
    for key, group in groups.items():
        figures = [name for name in group[0] if name not in NOT_FIGURES]
        cell: Cell = dict(zip(ABOUT, key, strict=True)) | {"n_concepts": len(group)}
        columns = {
            name: [float(entry.get(name, float("nan"))) for entry in group] for name in figures
        }
        cell["mean"] = {name: _mean(values) for name, values in columns.items()}
        known = {name: [v for v in values if v == v] for name, values in columns.items()}  # noqa: PLR0124
        cell["sd"] = {name: float(np.std(values)) for name, values in known.items() if values}
        cell["mean"]["seconds_median"] = float(np.median(columns["seconds"]))
        worse = np.array(columns["page"]) < np.array(columns["text_page"]) - 1e-9
        cell["mean"]["page_worse"] = float(worse.mean())
        if "noted" in columns:
            silent = worse & (np.array(columns["noted"]) == 0)
            cell["mean"]["page_worse_silently"] = float(silent.mean())
        if "bins" in group[0]:
            table = np.sum([entry["bins"] for entry in group], axis=0)
            cell["mean"]["ece_pooled"] = expected_error(table)
            cell["bins"] = table.tolist()
        cell["concepts"] = [entry["concept"] for entry in group]
        cell["ap"] = columns["ap"]
        found.append(cell)
    return found


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


# --- bars ---------------------------------------------------------------------------------------


def bars(found: list[Cell]) -> list[dict[str, Any]]:
    """Hold the figures against the bars of the project: each with its value in every round."""
    table = Cells(found)
    held: list[dict[str, Any]] = []
    for data in table.data:
        for variant in table.variants:
            for bar, values, limit in _values(table, data, variant):
                known = [value for value in values if value == value]  # noqa: PLR0124
                if known:
                    at_most = bar in AT_MOST
                    met = max(known) <= limit if at_most else min(known) >= limit
                    name = f"{data}, {variant}: {bar}"
                    held.append({"bar": name, "values": known, "limit": limit, "met": met})
    return held


def _values(table: Cells, data: str, variant: str) -> Iterator[tuple[str, list[float], float]]:
    """Yield (bar, value of every round, limit)."""
    rounds = table.rounds(data, variant)

    def mean(figure: str, method: str = "ours") -> NDArray[np.float64]:
        return np.array([table.mean(data, variant, method, n, figure) for n in rounds])

    def ratios(over: str) -> list[float]:
        found = [
            table.ratio(data, variant, n, over or table.best_linear(data, variant, n))
            for n in rounds
        ]
        return [each[0] if each else float("nan") for each in found]

    if variant != "3 yes":
        yield "AP by the best linear full scan", ratios(""), 0.98
        yield "AP by XGBoost on labels alone", ratios("xgboost"), 1.7
    yield "AP by text only", ratios("text"), 1.0
    yield "AP by Rocchio", ratios("rocchio"), 1.0
    yield "F1 - the teacher's by full scan", list(mean("f1") - mean("f1", FULL_SCAN)), -0.01
    yield "unseen positives of the teacher that are held", list(mean("unseen_found")), 0.92
    yield WORSE, list(mean("page_worse_silently")), 0.0
    if data == "large":
        yield BOXED, list(mean("boxed")), 0.02
        yield SECONDS, list(mean("seconds_median")), 0.3


# --- tables -------------------------------------------------------------------------------------


def _line(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), _line(["---"] * len(names))]


def _shown(value: float, form: str = ".3f") -> str:
    return format(value, form).replace("0.", ".", 1) if value == value else "-"  # noqa: PLR0124


def tables(found: list[Cell], held: list[dict[str, Any]]) -> str:
    """Return Markdown: every collection and kind of users, and the bars."""
    table = Cells(found)
    parts = []
    for data in table.data:
        for variant in table.variants:
            if rounds := table.rounds(data, variant):
                first = table.get(data, variant, "ours", rounds[0]) or {}
                parts.append(f"\n### {data}, {variant}: {first['n_concepts']} concepts\n")
                parts += _methods(table, data, variant, rounds)
                parts += ["", *_ours(table, data, variant, rounds)]
    parts += ["\n### Bars\n", *_head(["bar", "round by round", "limit", ""])]
    for each in held:
        values = " / ".join(f"{value:.3g}" for value in each["values"])
        told = "met" if each["met"] else "**missed**"
        parts.append(_line([each["bar"], values, f"{each['limit']:g}", told]))
    parts.append("\nElsewhere: a round at 10M rows (boxes.py), the audit's interval (the tests).")
    return "\n".join(parts)


def _methods(table: Cells, data: str, variant: str, rounds: list[int]) -> list[str]:
    """Return a line a method: AP of every round, then the last round's figures."""
    last = rounds[-1]
    names = ["method", *(f"AP {n}" for n in rounds), "AP all", "recall@R", "precision", "recall"]
    names += ["F1 first", "F1 last", "page", "s"]
    lines = _head(names)
    for method in ALL_METHODS:
        if table.get(data, variant, method, last) is None:
            continue
        line = [method]
        for n in rounds:
            cell = table.get(data, variant, method, n) or {}
            spread = _shown(cell["sd"].get("ap", float("nan")), ".2f")
            line.append(f"{_shown(cell['mean']['ap'])} ± {spread}")
        figures = ("ap_all", "recall_at_r", "precision", "recall")
        line += [_shown(table.mean(data, variant, method, last, each)) for each in figures]
        line += [_shown(table.mean(data, variant, method, n, "f1")) for n in (rounds[0], last)]
        line.append(_shown(table.mean(data, variant, method, last, "page")))
        seconds = table.mean(data, variant, method, last, "seconds_median")
        lines.append(_line([*line, _shown(seconds)]))
    return lines


def _ours(table: Cells, data: str, variant: str, rounds: list[int]) -> list[str]:
    """Return a line for each round of ours."""
    lines = _head(
        [
            *("round", "AP by best linear (95 %)", "AP by full scan", "boxes", "rows in boxes"),
            *("rows scored", "unseen in boxes", "unseen found", "F1 - full scan's", "ECE"),
            *("ECE pooled", "page", "text's page", "page worse (unsaid)"),
        ]
    )
    for n in rounds:

        def mean(figure: str, n: int = n) -> float:
            return table.mean(data, variant, "ours", n, figure)

        linear = table.best_linear(data, variant, n)
        ratio = table.ratio(data, variant, n, linear)
        against = "-"
        if ratio:
            against = f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f}, {linear})"
        full = table.ratio(data, variant, n, FULL_SCAN)
        lost = mean("f1") - table.mean(data, variant, FULL_SCAN, n, "f1")
        worse, silent = mean("page_worse"), mean("page_worse_silently")
        lines.append(
            _line(
                [
                    *(str(n), against, f"{full[0]:.3f}" if full else "-"),
                    *(f"{mean('n_boxes'):.1f}", f"{mean('boxed'):.2%}", f"{mean('touched'):.2%}"),
                    *(_shown(mean("unseen_boxed")), _shown(mean("unseen_found")), f"{lost:+.3f}"),
                    *(_shown(mean("ece")), _shown(mean("ece_pooled"))),
                    *(_shown(mean("page")), _shown(mean("text_page"))),
                    f"{worse:.0%} ({silent:.0%})",
                ]
            )
        )
    return lines


# --- picture ------------------------------------------------------------------------------------


def draw(found: list[Cell], path: Path) -> None:
    """Draw AP against rounds: a column of panels for each collection."""
    from matplotlib.figure import Figure

    table = Cells(found)
    wanted = (
        ("same labels", "ap", "AP, labelled rows left out", "same labels for all"),
        ("own labels", "ap_all", "AP over everything", "each labels its own ranking"),
    )
    figure = Figure(figsize=(5 * len(table.data) + 1.6, 7.6), layout="constrained")
    grid = figure.subplots(2, len(table.data), squeeze=False, sharex=True)
    for panels, (variant, name, label, told) in zip(grid, wanted, strict=True):
        for axes, data in zip(panels, table.data, strict=True):
            rounds = table.rounds(data, variant)
            for method, colour, marker, dashes in SERIES:
                values = [table.mean(data, variant, method, n, name) for n in rounds]
                wide = 2.6 if method == "ours" else 1.3
                style = {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 6}
                axes.plot(rounds, values, linewidth=wide, label=method, **style)
            axes.set(xlabel="round", xticks=rounds, title=f"{data}: {told}")
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel(label)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
