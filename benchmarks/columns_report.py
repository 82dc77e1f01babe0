"""Show and keep the figures of `columns.py`: JSON, Markdown tables, a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from columns_models import KINDS

Entry = dict[str, Any]

SERIES = {
    "anchors": ("#0072B2", "o", "-"),
    "centroids": ("#E69F00", "^", "--"),
    "pca": ("#009E73", "D", ":"),
    "mixture": ("#CC79A7", "s", "-."),
}
"""Colours told apart with any colour vision, by Okabe and Ito; markers and dashes differ."""
DRAWN = (
    ("ap", "AP of the answer"),
    ("box_ap", "AP of the boxes alone"),
    ("boxed", "rows in boxes, share"),
    ("box_share", "answer with a rule, share"),
)


def write(path: Path, facts: Entry, models: Sequence[Entry], found: Sequence[Entry]) -> None:
    """Write everything as JSON, a line each, numbers with four significant digits."""

    def dumped(value: Any) -> str:
        text = json.dumps(value, default=float)
        short = json.loads(
            text,
            parse_float=lambda number: float(f"{float(number):.4g}"),
            parse_constant=lambda _: None,
        )
        return json.dumps(short)

    lines = [f'"{name}": {dumped(value)}' for name, value in facts.items()]
    for name, entries in (("models", models), ("cells", found)):
        lines.append(f'"{name}": [\n' + ",\n".join(dumped(entry) for entry in entries) + "\n]")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    temporary.replace(path)


def tables(models: Sequence[Entry], found: Sequence[Entry]) -> str:
    """Return a Markdown table for each collection: a line for each kind and count."""
    parts = []
    for data in dict.fromkeys(model["data"] for model in models):
        rounds = sorted({cell["round"] for cell in found if cell["data"] == data})
        shown = " / ".join(map(str, rounds))
        names = [f"AP {shown}", f"F1 {shown}", f"boxes alone: AP {shown}", f"F1 {shown}"]
        names += [f"rows in boxes {shown}", f"box recall {shown}"]
        names += [f"answer with a rule {shown}", f"boxes {shown}", "fit s", "code s", "bytes a row"]
        parts += [f"\n### {data}\n", _line(["columns", *names]), _line(["---"] * (len(names) + 1))]
        for model in (model for model in models if model["data"] == data):
            about = ("data", "kind", "asked")
            own = [cell for cell in found if all(cell[name] == model[name] for name in about)]
            own.sort(key=lambda cell: int(cell["round"]))
            line = [f"{model['kind']} {model['n_columns']}"]
            for name, form in (
                *(("ap", ".3f"), ("f1", ".3f"), ("box_ap", ".3f"), ("box_f1", ".3f")),
                *(("boxed", ".2%"), ("box_recall", ".2f")),
                *(("box_share", ".0%"), ("n_boxes", ".1f")),
            ):
                line.append(
                    " / ".join(format(cell[name], form) for cell in own).replace("nan", "-")
                )
            line += [f"{model['fit_s']:.1f}", f"{model['code_s']:.1f}"]
            parts.append(_line([*line, f"{model['bytes_per_row']:.0f}"]))
    return "\n".join(parts)


def _line(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def draw(found: Sequence[Entry], path: Path) -> None:
    """Draw the last round's figures against the number of columns, a row a collection."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(cell["data"] for cell in found))
    figure = Figure(figsize=(4 * len(DRAWN), 3.4 * len(names) + 0.4), layout="constrained")
    grid = figure.subplots(len(names), len(DRAWN), squeeze=False, sharex=True)
    last = max(cell["round"] for cell in found)
    for panels, data in zip(grid, names, strict=True):
        for axes, (name, label) in zip(panels, DRAWN, strict=True):
            for kind in KINDS:
                own = [
                    (cell["asked"], cell[name])
                    for cell in found
                    if (cell["data"], cell["kind"], cell["round"]) == (data, kind, last)
                ]
                colour, marker, dashes = SERIES[kind]
                style = {"color": colour, "marker": marker, "linestyle": dashes}
                axes.plot(*zip(*sorted(own), strict=True), label=kind, **style)
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set(title=f"{data}: {label}", xlabel="columns")
            counts = sorted({cell["asked"] for cell in found})
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False)
    figure.suptitle(f"Round {last}, means over concepts")
    figure.savefig(path, dpi=130)
