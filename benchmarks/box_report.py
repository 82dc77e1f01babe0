"""Show the figures of `boxes.py`: Markdown tables, and a log-log picture of cost against rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from box_measure import find
from box_ours import CODES_ONLY, PLANNER
from box_peers import INPLACE_ALL, NUMPY, NUMPY_BUFFERED

PLAIN_TASK = "plain"
LARGE_WARM = "ours: planner, warm, no limit"

Series = tuple[str, str, str, str]

BOX_SERIES: tuple[Series, ...] = (
    (INPLACE_ALL, "XGBoost, all rows", "#000000", "s"),
    ("vector top-k, exact scan", "vector top-k, exact scan", "#CC79A7", "P"),
    ("DuckDB, in memory", "DuckDB, in memory", "#D55E00", "D"),
    (NUMPY, "NumPy masks", "#E69F00", "^"),
    ("Polars, in memory", "Polars, in memory", "#009E73", "v"),
    (CODES_ONLY, "ours, codes only", "#56B4E9", "o"),
    (PLANNER, "ours", "#0072B2", "o"),
)
TREE_SERIES: tuple[Series, ...] = (
    ("scikit-learn random forest, all threads", "random forest (25), all rows", "#D55E00", "D"),
    (INPLACE_ALL, "XGBoost, all rows", "#000000", "s"),
    ("ours: leaves", "ours, leaves", "#E69F00", "^"),
    (PLANNER, "ours", "#0072B2", "o"),
)
"""Colours of Okabe and Ito, told apart with any colour vision; markers differ too."""

_HEAD = ("task", "system", "ms", "min ms", "rows", "rows touched", "MB read", "GB/s", "of limit")
_TAIL = ("x inplace", "equal", "peak MB (grew)")


def tables(data: dict[str, Any]) -> str:
    """Return one Markdown table a catalog."""
    parts = []
    catalogs = [*data.get("catalogs", ()), *([data["large"]] if "large" in data else ())]
    for catalog in catalogs:
        parts.append(f"\n### {catalog['rows']:,} rows x {catalog['columns']} columns\n")
        if "left_out" in catalog:
            parts.append(f"left out: {catalog['left_out']}")
            continue
        if "build" in catalog:
            built = catalog["build"]
            parts.append(
                f"Build {built['seconds']:.1f} s, {built['bytes_per_row_and_column']:.2f} bytes "
                f"per row and column, peak {built['peak_rss_mb']:.0f} MB\n"
            )
        for name, trees in catalog.get("trees", {}).items():
            parts.append(
                f"- {name}: {trees['boxes']} boxes, {trees['ranges']} ranges, "
                f"{trees['share_of_rows']:.2%} of the rows"
            )
        parts += [*_remarks(catalog), ""]
        parts += [_line(_HEAD + _TAIL), _line(["---"] * len(_HEAD + _TAIL))]
        parts += [_line(_cells(entry)) for entry in catalog["systems"]]
    parts += ["\n### Bars\n", _line(("bar", "value", "limit", "")), _line(["---"] * 4)]
    for each in data.get("bars", ()):
        told = "met" if each["met"] else "**missed**"
        parts.append(_line((each["bar"], f"{each['value']:.3g}", f"{each['limit']:g}", told)))
    return "\n".join(parts)


def _remarks(catalog: dict[str, Any]) -> Iterator[str]:
    """Say in a line each what no table row holds."""
    if "anytime" in catalog:
        first, whole = catalog["anytime"]["first_part"], catalog["anytime"]["all"]
        yield f"- first part {first['median_ms']:.2f} ms, all {whole['median_ms']:.2f} ms"
    if "concurrent" in catalog:
        found = catalog["concurrent"]
        yield (
            f"- {found['threads']} threads at once: median {found['median_ms']:.2f} ms, 95 % "
            f"{found['p95_ms']:.2f} ms, slowest thread {found['slowest_to_fastest_thread']:.2f} x "
            f"the fastest, memory + {found['peak_rss_growth_mb']:.0f} MB"
        )
    if "crossover" in catalog:
        found = catalog["crossover"]
        yield (
            f"- the planner was within {found['close']} x of the quickest strategy for "
            f"{found['planned_close_to_quickest']:.0%} of {len(found['points'])} boxes; worst "
            f"{found['worst_slowdown']:.2f} x"
        )
    for task, found in catalog.get("recall_of_teacher_positives", {}).items():
        shares = (f"{name} {value:.1%}" for name, value in found.items() if value <= 1)
        yield f"- {task}: recall of the teacher's positives: {', '.join(shares)}"
    for limit in (name for name in catalog if "limit" in name):
        found = catalog[limit]
        peak = f"peak {found['peak_rss_mb']:.0f} MB" if "peak_rss_mb" in found else None
        yield f"- {limit}: {peak or found['left_out']}"


def bars(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold the figures against the bars of the project, those whose catalogs were measured."""
    catalogs = {(each["rows"], each["columns"]): each for each in data["catalogs"]}
    found: list[dict[str, Any]] = []

    def hold(bar: str, value: float | None, limit: float, *, at_least: bool = False) -> None:
        if value is not None:
            met = value >= limit if at_least else value <= limit
            found.append({"bar": bar, "value": value, "limit": limit, "met": met})

    if (big := catalogs.get((10_000_000, 32))) and "main_task" in big:
        main = find(big["systems"], big["main_task"], PLANNER) or {}
        plain = find(big["systems"], PLAIN_TASK, PLANNER) or {}
        hold("10M x 32: distilled boxes, ms", main.get("median_ms"), 8)
        hold("10M x 32: distilled boxes, x inplace", main.get("speed_up"), 200, at_least=True)
        hold("10M x 32: plain trees, x inplace", plain.get("speed_up"), 25, at_least=True)
        peers = (
            ("Polars, in memory", 5),
            ("DuckDB, in memory", 20),
            (NUMPY, 20),
            (NUMPY_BUFFERED, 20),
        )
        for peer, limit in peers:
            entry = find(big["systems"], big["main_task"], peer)
            ratio = entry["median_ms"] / main["median_ms"] if entry and main else None
            hold(f"10M x 32: distilled boxes, x {peer}", ratio, limit, at_least=True)
    if (middle := catalogs.get((1_000_000, 32))) and "main_task" in middle:
        main = find(middle["systems"], middle["main_task"], PLANNER) or {}
        plain = find(middle["systems"], PLAIN_TASK, PLANNER) or {}
        hold("1M x 32: build, s", middle["build"]["seconds"], 6)
        size = middle["build"]["bytes_per_row_and_column"]
        hold("1M x 32: index bytes per row and column", size, 9)
        hold("1M x 32: plain trees, ms", plain.get("median_ms"), 15)
        hold("1M x 32: distilled boxes, ms", main.get("median_ms"), 2)
    large = data.get("large", {})
    name = f"{large.get('rows', 0) / 1e6:g}M x 32 from disk"
    for task, limit in (("boxes", 100), ("trees", 2000)):
        entry = find(large.get("systems", ()), task, LARGE_WARM) or {}
        hold(f"{name}: {task}, warm, ms", entry.get("median_ms"), limit)
    hold(f"{name}: peak resident, MB", large.get("no limit", {}).get("peak_rss_mb"), 6000)
    catalogs_and_large = [*data["catalogs"], large]
    differ = [
        entry
        for each in catalogs_and_large
        for entry in each.get("systems", ())
        if not entry.get("equal", True)
    ]
    hold("answers that differ", len(differ), 0)
    return found


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(entry: dict[str, Any]) -> list[str]:
    if "left_out" in entry:
        return [entry["task"], entry["system"], entry["left_out"], *[""] * 9]
    n_bytes, touched = entry["bytes_read"], entry.get("rows_touched")
    equal = {True: "yes", False: "**NO**"}.get(entry.get("equal"), "")
    known = "rss_before_mb" in entry
    return [
        entry["task"],
        entry["system"] + (f" ({entry['plan']})" if "planner" in entry["system"] else ""),
        f"{entry['median_ms']:.2f}",
        f"{entry['min_ms']:.2f}",
        f"{entry['rows_returned']:,}",
        "" if touched is None else f"{touched:,}",
        "" if n_bytes is None else f"{n_bytes / 1e6:.1f}",
        f"{entry['gb_s']:.1f}" if "gb_s" in entry else "",
        f"{entry['share_of_bandwidth']:.0%}" if "gb_s" in entry else "",
        f"{entry['speed_up']:.1f}" if "speed_up" in entry else "",
        equal,
        f"{entry['peak_rss_mb']:.0f}"
        + (f" ({entry['peak_rss_mb'] - entry['rss_before_mb']:.0f})" if known else ""),
    ]


def draw(data: dict[str, Any], path: Path) -> None:
    """Draw milliseconds against rows: a row of panels for each number of columns."""
    from matplotlib.figure import Figure

    measured = [*data["catalogs"], data.get("large", {})]
    measured = [catalog for catalog in measured if "main_task" in catalog]
    widths = sorted({catalog["columns"] for catalog in measured})
    figure = Figure(figsize=(9.5, 3.9 * len(widths)), layout="constrained")
    grid = figure.subplots(len(widths), 2, squeeze=False, sharex=True, sharey="row")
    for panels, width in zip(grid, widths, strict=True):
        catalogs = [each for each in measured if each["columns"] == width]
        share = max(each["main_share"] for each in catalogs)
        tasks = ("main_task", BOX_SERIES), ("plain_task", TREE_SERIES)
        for axes, (task, series) in zip(panels, tasks, strict=True):
            for each in series:
                _curve(axes, catalogs, task, each)
            axes.set(xscale="log", yscale="log", xlabel="rows in the catalog")
            axes.grid(which="major", color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize="small", loc="upper left")
        panels[0].set_ylabel("milliseconds, median")
        panels[0].set_title(f"Distilled boxes, at most {share:.1%} of rows; {width} columns")
        panels[1].set_title(f"Boosted trees, 50 of depth 3; {width} columns")
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(low, high * 60)  # room for the legend
    figure.savefig(path, dpi=150)


def _curve(axes: Any, catalogs: list[dict[str, Any]], task: str, series: Series) -> None:
    system, label, colour, marker = series
    if system == INPLACE_ALL and task == "main_task":
        task = "baseline_task"
    points = []
    for catalog in catalogs:
        entry = find(catalog["systems"], catalog[task], system)
        if entry is None and system == PLANNER:
            entry = find(catalog["systems"], catalog[task], LARGE_WARM)
        if entry is not None:
            points.append((catalog["rows"], entry["median_ms"]))
    if points:
        wide = 2.4 if system == PLANNER else 1.2
        axes.plot(
            *zip(*sorted(points), strict=True),
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=wide,
            label=label,
        )
