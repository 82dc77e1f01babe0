"""Measure the Explorer in a real JupyterLab in headless Chromium, as a person uses it.

    python benchmarks/explorer.py [--rows 200000] [--cycles 200] [--memory-only]

Needs a Chromium (see the README's section on tests) and ``pip install -e ".[test]"``. On the demo
catalog, and on one of ``--rows`` rows whose embeddings are the demo's with noise and whose pictures
are the demo's: the time from running the cell to a painted page, from a click on a tag to the
changed tag, from a page turn to 60 painted pictures (thumbnails at hand and not), frames a second
while scrolling, bytes over the websocket, and the memory of browser and kernel over many searches
and rounds, first against last. Writes explorer.json and explorer.png beside this file; with
``--memory-only`` the other figures in there stay.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests" / "browser"), str(HERE.parent / "tests")]

N_CLICKS = 20
N_PAGES = 9
SCROLL_S = 2.0
QUERIES = (
    "bird",
    "red fruit",
    "animals with wings",
    "vehicle",
    "happy face",
    "flag",
    "tool",
    "food",
)

CLICK = """async (root, n) => {
    const took = [];
    for (let i = 0; i < n; i++) {
        const chip = root.querySelectorAll(".cbw-chip")[i];
        await new Promise((done) => setTimeout(done, 150));
        const start = performance.now();
        chip.click();
        while (!chip.textContent.includes("yes")) await new Promise((done) => setTimeout(done, 0));
        await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
        took.push(performance.now() - start);
    }
    return took;
}"""
TURN = """async (root, n) => {
    const took = [];
    const range = () => root.querySelector(".cbw-range").textContent;
    for (let i = 0; i < n; i++) {
        const before = range();
        const start = performance.now();
        root.querySelector("[aria-label='Next page']").click();
        while (range() === before) await new Promise((done) => setTimeout(done, 1));
        for (;;) {
            const images = [...root.querySelectorAll(".cbw-grid .cbw-picture img")];
            const lost = root.querySelector(".cbw-grid .cbw-skeleton");
            if (!lost && images.length && images.every((x) => x.complete && x.naturalWidth)) break;
            await new Promise((done) => setTimeout(done, 1));
        }
        const images = [...root.querySelectorAll(".cbw-grid .cbw-picture img")];
        await Promise.all(images.map((image) => image.decode()));
        await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
        took.push(performance.now() - start);
        await new Promise((done) => setTimeout(done, 300));
    }
    return took;
}"""
SCROLL = """async (root, seconds) => {
    const box = root.querySelector(".cbw-scroll");
    const end = performance.now() + 1000 * seconds;
    let frames = 0, down = 1, longest = 0, last = performance.now();
    const start = last;
    while (performance.now() < end) {
        box.scrollTop += 20 * down;
        if (box.scrollTop + box.clientHeight >= box.scrollHeight - 1) down = -1;
        if (box.scrollTop <= 0) down = 1;
        const now = await new Promise((done) => requestAnimationFrame(done));
        longest = Math.max(longest, now - last);
        last = now;
        frames += 1;
    }
    return [frames / ((performance.now() - start) / 1000), longest];
}"""

OPEN = """
import clipbranches_widget as cb, os, json, tempfile
catalog = cb.open({path!r})
session = cb.Session(catalog, tempfile.mkdtemp() + "/s.jsonl")
session.warm_up()
hits = session.search("bird", k=1200)
"""


def large_catalog(folder: Path, n_rows: int) -> Path:
    """Build a catalog whose rows are the demo's, many times, with noise: its path."""
    import clipbranches_widget as cb
    from clipbranches_widget.encoder import load_encoder

    demo, rng = cb.demo(), np.random.default_rng(0)
    source = np.arange(n_rows) % len(demo)
    embeddings = demo.embeddings[source].astype(np.float32)
    embeddings += rng.normal(0, 0.3 / np.sqrt(demo.dim), embeddings.shape).astype(np.float32)
    items = demo.items.select(["uri", "caption"]).take(source)
    path = folder / "large.cbcat"
    cb.from_embeddings(embeddings, path, items=items, encoder=load_encoder(demo.encoder_info))
    return path


class Frames:
    """Bytes that arrive over the page's websockets."""

    def __init__(self, page: Any) -> None:
        self.n_bytes = 0
        page.on("websocket", lambda socket: socket.on("framereceived", self._count))

    def _count(self, payload: str | bytes) -> None:
        self.n_bytes += len(payload if isinstance(payload, bytes) else payload.encode())


def measure(lab: Any, browser: Any, path: Path, name: str) -> tuple[dict[str, Any], Any]:
    """Measure one catalog in a fresh notebook; return the figures and the notebook, still open."""
    from conftest import NotebookPage

    lab.write_notebook(f"{name}.ipynb", [OPEN.format(path=str(path))])
    tab = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
    frames = Frames(tab)  # before the page opens its websockets
    notebook = NotebookPage(lab, tab, f"{name}.ipynb", name).open()
    notebook.run_all()
    page = notebook.page
    page.evaluate(
        """source => {
            const panel = window.jupyterapp.shell.currentWidget;
            const model = panel.content.model.sharedModel;
            model.insertCell(1, {cell_type: "code", source});
            panel.content.activeCellIndex = 1;
        }""",
        "explorer = cb.Explorer(session); explorer",
    )
    start = page.evaluate("performance.now()")
    page.evaluate("void window.jupyterapp.commands.execute('notebook:run-cell')")
    explorer = notebook.explorer()
    explorer.locator(".cbw-grid .cbw-picture img").nth(20).wait_for()
    first_ms = page.evaluate("performance.now()") - start
    notebook.wait_painted(explorer)
    page.wait_for_timeout(3000)

    clicks = explorer.evaluate(CLICK, N_CLICKS)
    before = frames.n_bytes
    cold = explorer.evaluate(TURN, N_PAGES)
    page.wait_for_timeout(1000)
    n_bytes = frames.n_bytes - before
    explorer.get_by_role("button", name="First page").click()
    page.wait_for_timeout(1000)
    warm = explorer.evaluate(TURN, N_PAGES)
    fps, longest = explorer.evaluate(SCROLL, SCROLL_S)
    thumbs = json.loads(
        notebook.run_cell(
            "print(json.dumps([len(catalog.thumbnail(int(r), 160)) for r in hits.rows[:600]]))"
        )
    )
    return {
        "n_rows": json.loads(notebook.run_cell("print(len(catalog))")),
        "first_page_ms": first_ms,
        "click_ms": {"median": statistics.median(clicks), "max": max(clicks)},
        "page_ms": {"cold": statistics.median(cold), "warm": statistics.median(warm)},
        "frames_per_s": fps,
        "longest_frame_ms": longest,
        "websocket_bytes_per_page": n_bytes / N_PAGES,
        "thumbnail_bytes": {"mean": statistics.mean(thumbs), "max": max(thumbs)},
    }, notebook


def memory(notebook: Any, n_cycles: int) -> list[dict[str, float]]:
    """Search and refine again and again; return the memory of browser and kernel on the way."""
    explorer, page = notebook.explorer(), notebook.page
    devtools = page.context.new_cdp_session(page)
    points = []
    for cycle in range(n_cycles + 1):
        if cycle % max(1, n_cycles // 10) == 0:
            devtools.send("HeapProfiler.collectGarbage")
            heap = devtools.send("Runtime.getHeapUsage")["usedSize"]
            rss = notebook.run_cell(
                "import gc; gc.collect()\n"
                "print([l for l in open('/proc/self/status') if 'VmRSS' in l][0].split()[1])"
            )
            points.append({"cycle": cycle, "heap_mb": heap / 1e6, "kernel_mb": int(rss) / 1e3})
        query = QUERIES[cycle % len(QUERIES)]
        field = explorer.get_by_label("Search the catalog by text")
        field.fill(query)
        field.press("Enter")
        explorer.locator(".cbw-headline", has_text=f"to \u201c{query}\u201d").wait_for()
        explorer.locator(".cbw-primary").click()
        explorer.locator(".cbw-headline", has_text="of the catalog scored").wait_for()
    return points


def picture(report: dict[str, Any]) -> None:
    """Draw the times beside their bars, and the memory over the cycles."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    names = list(report["catalogs"])
    bars = {
        "click to tag (50 ms)": (lambda c: c["click_ms"]["median"], 50),
        "page warm (300 ms)": (lambda c: c["page_ms"]["warm"], 300),
        "first page (2 s)": (lambda c: c["first_page_ms"], 2000),
    }
    for offset, name in enumerate(names):
        shares = [of(report["catalogs"][name]) / bar for of, bar in bars.values()]
        left.barh(np.arange(len(bars)) + 0.35 * offset, shares, 0.35, label=name)
    left.axvline(1, color="black", lw=1)
    left.set_yticks(np.arange(len(bars)) + 0.17, list(bars))
    left.set_xlabel("share of what we ask for (left of the line is better)")
    left.legend(frameon=False)
    cycles = [point["cycle"] for point in report["memory"]]
    for key, label in (("kernel_mb", "kernel, resident"), ("heap_mb", "browser, heap")):
        right.plot(cycles, [point[key] for point in report["memory"]], label=label)
    right.set(xlabel="searches and rounds", ylabel="MB", ylim=(0, None))
    right.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(HERE / "explorer.png", dpi=150)


def main() -> None:
    """Run everything and write the report."""
    from conftest import CHROMIUM_FLAGS, Lab
    from playwright.sync_api import sync_playwright

    import clipbranches_widget as cb

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--memory-only", action="store_true", help="measure nothing else")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        lab = Lab(Path(scratch))
        lab.wait()
        browser = playwright.chromium.launch(executable_path=arguments.browser, args=CHROMIUM_FLAGS)
        demo, notebook = measure(lab, browser, cb.demo().path, "demo")
        print(json.dumps(demo, indent=1), flush=True)
        points = memory(notebook, arguments.cycles)
        print(json.dumps([points[0], points[-1]], indent=1), flush=True)
        if arguments.memory_only:
            report = json.loads((HERE / "explorer.json").read_text(encoding="utf-8"))
        else:
            large, _ = measure(lab, browser, large_catalog(Path(scratch), arguments.rows), "large")
            print(json.dumps(large, indent=1), flush=True)
            report = {
                "machine": f"{platform.machine()}, {platform.system()}",
                "browser": browser.version,
                "catalogs": {"demo": demo, f"{arguments.rows:,} rows": large},
            }
        report["memory"] = points
        browser.close()
        lab.stop()
    (HERE / "explorer.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    picture(report)


if __name__ == "__main__":
    main()
