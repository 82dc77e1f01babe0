"""Show the figures of `quality.py`: the bars of the project, Markdown tables, a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from quality_ours import FULL_SCAN
from quality_summary import Cell, Cells, mean_known
from quality_tuning import NAMES

ALL_METHODS = (*NAMES, FULL_SCAN)
BOXED = "rows in boxes"
SECONDS = "seconds a round, median"
AT_MOST = (BOXED, SECONDS)
"""Bars that are upper limits."""

SERIES = (
    ("text", "#999999", "x", ":"),
    ("rocchio", "#56B4E9", "v", "--"),
    ("knn", "#CC79A7", "P", "--"),
    ("svm", "#E69F00", "^", "-"),
    ("logistic", "#009E73", "D", "-"),
    ("xgboost", "#D55E00", "s", "--"),
    ("forest", "#8C510A", "p", "--"),
    ("branches", "#882255", "*", "--"),
    (FULL_SCAN, "#000000", "", "-."),
    ("ours", "#0072B2", "o", "-"),
)
"""Colours told apart with any colour vision, most by Okabe and Ito; markers and dashes differ."""


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
                    met = bool(max(known) <= limit if at_most else min(known) >= limit)
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
    yield "the same, of all concepts together", list(mean("unseen_found_pooled")), 0.92
    yield "the same, of a score of .2 and more", list(mean("loose_found_pooled")), 0.92
    yield "first page by the text's", list(mean("page") / mean("text_page")), 1.0
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
        parts += _kinds(table, data)
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
            *(
                "rows scored",
                "unseen: boxes, held",
                "loose: boxes, held",
                "F1 - full scan's",
                "ECE",
            ),
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
        unseen, loose = (
            f"{_shown(mean(f'{name}_boxed_pooled'))}, {_shown(mean(f'{name}_found_pooled'))} "
            f"(n {mean(f'n_{name}'):.1f})"
            for name in ("unseen", "loose")
        )
        worse, silent = mean("page_worse"), mean("page_worse_silently")
        lines.append(
            _line(
                [
                    *(str(n), against, f"{full[0]:.3f}" if full else "-"),
                    *(f"{mean('n_boxes'):.1f}", f"{mean('boxed'):.2%}", f"{mean('touched'):.2%}"),
                    *(unseen, loose, f"{lost:+.3f}"),
                    *(_shown(mean("ece")), _shown(mean("ece_pooled"))),
                    *(_shown(mean("page")), _shown(mean("text_page"))),
                    f"{worse:.0%} ({silent:.0%})",
                ]
            )
        )
    return lines


def _kinds(table: Cells, data: str) -> list[str]:
    """Return a line for each kind of concepts: AP of the last round, with the same labels."""
    variant = "same labels"
    rounds = table.rounds(data, variant)
    last = table.get(data, variant, "ours", rounds[-1]) if rounds else None
    kinds = list(dict.fromkeys(name.split(":")[0] for name in last["concepts"])) if last else []
    if last is None or data == "large":
        return []
    shown = [name for name in ALL_METHODS if table.get(data, variant, name, rounds[-1])]
    lines = ["", f"AP {rounds[-1]} by kind of concept, same labels:", ""]
    lines += _head(["kind", "concepts", *shown])
    for kind in kinds:
        at = [n for n, name in enumerate(last["concepts"]) if name.split(":")[0] == kind]
        line = [kind, str(len(at))]
        for name in shown:
            cell = table.get(data, variant, name, rounds[-1]) or {}
            line.append(_shown(mean_known([cell["ap"][n] for n in at])))
        lines.append(_line(line))
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
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel(label)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
