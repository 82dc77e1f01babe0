"""Kill every kind of writing at random moments, and look at what is left.

    python benchmarks/growth_kills.py [--kills 200]

A child process works and, once all is loaded, is sent SIGKILL after a random time; until then it
is watched by opening what it writes, again and again, which must go well. Five kinds of work in
turn:

- *grow*: append 500 rows, compact; *change*: remove rows, rebuild the columns, compute the map;
  both on one catalog that lives through all of it. Then it is opened, every byte is compared with
  its checksums, and every row with the embedding it must have: what an append adds and a remove
  hides is there all or not at all, and all where the child had said so.
- *index*, *embed*: build a catalog of 48 image files, of 20,000 embeddings. It is whole, every
  byte and row, or is not there; then the next child builds it in the same place.
- *session*: search, label, refine, undo, filter and so on, each told when it is done. The file
  keeps every byte it had, holds all that was told and one event more at most; it opens, answers
  as before, and takes the next label.

Writes growth_kills.json beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

import clipbranches_widget as cb
from clipbranches_widget.encoder import bundled_encoder

DIM, N_FIRST, N_EACH, N_REMOVED = 16, 1_000, 500, 40
N_IMAGES, N_EMBEDDINGS, N_SESSION_ROWS, N_ACTIONS = 48, 20_000, 2_000, 30
LOOK_EVERY_S = 0.05
LOADED_LATE = ("pyarrow.parquet", "sklearn.cluster", "usearch.index")
MAX_ROWS, KILLS_OF_A_SESSION = 12_000, 8

Work = Callable[[Path, int], None]


def say(*words: object) -> None:
    """Tell the parent; what was told is in its pipe, whatever happens next."""
    print(*words, flush=True)


def random_rows(seed: int, n_rows: int) -> NDArray[np.float64]:
    """Return the rows that a seed stands for."""
    return np.random.default_rng(seed).standard_normal((n_rows, DIM))


def as_stored(seed: int, n_rows: int) -> NDArray[np.float16]:
    """Return them as a catalog stores them."""
    rows = random_rows(seed, n_rows)
    rows /= np.abs(rows).max(axis=1, keepdims=True)
    stored: NDArray[np.float16] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("f2")
    return stored


def grow(path: Path, seed: int) -> None:
    """Append, then compact."""
    n_rows = len(cb.open(path))
    say("append")
    cb.append_embeddings(path, random_rows(seed, N_EACH))
    say("compact")
    cb.compact(path, rows_per_shard=1_000_000 if seed % 5 == 0 else max(n_rows // 2, N_EACH))
    say("done")


def change(path: Path, seed: int) -> None:
    """Remove rows, store other parts of the column index, compute the map."""
    n_rows = len(cb.open(path))
    say("remove")
    cb.remove(path, to_remove(seed, n_rows))
    for columns in ("codes", "full"):
        say("rebuild_columns")
        cb.rebuild_columns(path, columns=columns)
    say("build_map")
    cb.build_map(path, max_points=300, seed=seed)
    say("done")


def to_remove(seed: int, n_rows: int) -> NDArray[np.int64]:
    """Return the rows that a seed removes, ascending."""
    return np.unique(np.random.default_rng(seed).integers(0, n_rows, N_REMOVED))


def index(path: Path, seed: int) -> None:
    """Embed the images beside the catalog."""
    del seed
    encoder = bundled_encoder("cpu")
    say("index")
    cb.index(path.parent / "images", path, encoder=encoder, progress=False)
    say("done")


def embed(path: Path, seed: int) -> None:
    """Build a catalog of four shards from embeddings."""
    rows = random_rows(seed, N_EMBEDDINGS)
    say("embed")
    cb.from_embeddings(rows, path, rows_per_shard=N_EMBEDDINGS // 4, with_map=False)
    say("done")


def use_session(path: Path, seed: int) -> None:
    """Act on a session, and tell each event when its call has returned."""
    catalog = cb.open(path.parent / "session.cbcat")
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as scratch:  # what loads late is loaded here
        first = cb.Session(catalog, Path(scratch) / "first.jsonl")
        first.search(row=0)
        first.label(positive=[0], negative=[1])
        first.refine()
    say("session")
    session = cb.Session(catalog, path)
    if session.query is None:
        session.search(row=0)
        say(*_last(session))

    def label() -> object:
        near, far = session.search(row=int(rng.integers(len(catalog))), k=200).rows[[1, -1]]
        say(*_last(session))
        return session.label(positive=[int(near)], negative=[int(far)])

    def rule() -> object:
        result = session.result
        branches = () if result is None else result.branches
        return session.switch_off(branches[0]) if branches else session.undo()

    actions: list[Callable[[], object]] = [
        label,
        label,
        lambda: session.unlabel(session.labels.negative[:1]),
        lambda: session.refine(seed=int(rng.integers(100))) if len(session.labels) > 1 else label(),
        rule,
        lambda: session.filter({"year": (1970, int(rng.integers(1971, 2020)))}),
        session.filter,
        session.undo,
        session.redo,
    ]
    for _ in range(N_ACTIONS):
        actions[int(rng.integers(len(actions)))]()
        say(*_last(session))
    say("done")


def _last(session: cb.Session) -> tuple[int, str]:
    event = session.history[-1]
    return event.id, event.action


WORKS: dict[str, Work] = {
    "grow": grow,
    "change": change,
    "index": index,
    "embed": embed,
    "session": use_session,
}


ORDER = ("grow", "session", "embed", "change", "session", "grow", "index", "change", "embed")
"""Twice as often what starts soon: each index loads a model first."""


class Watcher(Protocol):
    """Knows what must be there after a child ended."""

    path: Path

    def look(self) -> None:
        """Open what is there while the child works."""

    def check(self, kind: str, seed: int, said: Sequence[str]) -> None:
        """Compare what is there with what must be."""


class LivingCatalog:
    """A catalog that grows and changes; see *grow* and *change*."""

    def __init__(self, folder: Path) -> None:
        self._paths = (folder / f"living-{number}.cbcat" for number in itertools.count())
        self._start()

    def _start(self) -> None:
        self.path = next(self._paths)
        self._rows, self._removed = as_stored(10**6, N_FIRST), np.empty(0, np.int64)
        cb.from_embeddings(random_rows(10**6, N_FIRST), self.path)

    def look(self) -> None:
        """Open it, before or after an append."""
        n_new = len(cb.open(self.path)) - len(self._rows)
        assert n_new in (0, N_EACH), "an append is half there"

    def check(self, kind: str, seed: int, said: Sequence[str]) -> None:
        """Rows appended or removed are there all or not at all."""
        catalog = cb.open(self.path)
        catalog.verify()
        is_sure = len(said) > 1
        if kind == "grow":
            more = np.concatenate([self._rows, as_stored(seed, N_EACH)])
            if is_sure or len(catalog) == len(more):
                self._rows = more
        else:
            more_removed = np.union1d(self._removed, to_remove(seed, len(self._rows)))
            if is_sure or len(catalog.removed_rows) == len(more_removed):
                self._removed = more_removed
        assert np.array_equal(catalog.removed_rows, self._removed), "removed rows are half there"
        present = np.setdiff1d(np.arange(len(self._rows)), self._removed)
        assert len(catalog) == len(self._rows), "an append is half there"
        assert np.array_equal(catalog.embeddings[present], self._rows[present]), "rows were lost"
        assert catalog.items.column("row").to_pylist() == list(range(len(catalog)))
        if said[-1] == "done" and kind == "change":
            assert catalog.map is not None
            assert catalog.info()["column_parts"] == "full"
        if len(self._rows) > MAX_ROWS:
            self._start()


class NewCatalog:
    """A catalog that is built again and again in one place; see *index* and *embed*."""

    def __init__(self, path: Path, work: Work) -> None:
        self.path, self._work = path, work
        whole = path.with_name(f"whole-{path.name}")
        if work is index:
            _write_images(path.parent / "images")
            index(whole, 0)
            self._rows = cb.open(whole).embeddings

    def look(self) -> None:
        """Open it where it is there."""
        if self.path.exists():
            cb.open(self.path)

    def check(self, kind: str, seed: int, said: Sequence[str]) -> None:
        """Accept a whole catalog or none."""
        if said[-1] == "done" or self.path.exists():
            catalog = cb.open(self.path)
            catalog.verify()
            rows = as_stored(seed, N_EMBEDDINGS) if kind == "embed" else self._rows
            assert np.array_equal(catalog.embeddings, rows), "rows were lost"
            assert len(catalog.skipped) == 0
            del catalog
            shutil.rmtree(self.path)
            if said[-1] == "done":
                strays = list(self.path.parent.glob(f".{self.path.name}.building-*"))
                assert not strays, f"nobody tidied up {strays}"


def _write_images(folder: Path) -> None:
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(N_IMAGES):
        pixels = rng.integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((320, 240)).save(folder / f"{number}.jpg")


class LivingSession:
    """A session file that is used again and again; see *session*."""

    def __init__(self, folder: Path, counts: Counter[str]) -> None:
        import pyarrow as pa

        years = pa.table({"year": [1970 + number % 50 for number in range(N_SESSION_ROWS)]})
        rows = random_rows(1, N_SESSION_ROWS)
        self._catalog = cb.from_embeddings(rows, folder / "session.cbcat", items=years)
        self._paths = (folder / f"session-{number}.jsonl" for number in itertools.count())
        self._counts = counts
        self._start()

    def _start(self) -> None:
        self.path, self._known, self._bytes, self._n_checks = next(self._paths), [], b"", 0

    def look(self) -> None:
        """Read it along."""
        if self.path.exists() and self._n_checks:
            n_events = len(cb.Session(self._catalog, self.path).history)
            assert n_events >= len(self._known), "the file lost something"

    def check(self, kind: str, seed: int, said: Sequence[str]) -> None:
        """All that was told is there, in its order, and one event more at most."""
        del kind
        told = [line for line in said if line.split()[0].isdecimal()]
        told = list(dict.fromkeys(told))  # an action that changes nothing tells the last again
        told = [line for line in told if line not in self._known]
        data = self.path.read_bytes() if self.path.exists() else b""
        assert data.startswith(self._bytes), "the file lost something"
        session = cb.Session(self._catalog, self.path)
        found = [f"{event.id} {event.action}" for event in session.history]
        expected = [*self._known, *told]
        assert found[: len(expected)] == expected, "an event was lost"
        n_more = len(found) - len(expected)
        assert n_more <= (said[-1] != "done"), f"{n_more} events that nobody was told"
        self._counts["events told"] += len(told)
        self._counts["events one more"] += n_more
        self._counts["half lines cut off"] += bool(data) and not data.endswith(b"\n")
        for answer in (session.hits, session.result):
            notes = () if answer is None else answer.notes
            assert not any("could not be reproduced" in note for note in notes), notes
        row = seed % N_SESSION_ROWS
        session.unlabel([row])
        assert row in session.label(positive=[row]).positive
        self._known = [f"{event.id} {event.action}" for event in session.history]
        self._bytes = self.path.read_bytes()
        assert len(self._known) == self._bytes.count(b"\n") - 1
        self._n_checks += 1
        if self._n_checks == KILLS_OF_A_SESSION:
            self._start()


def run(kind: str, watcher: Watcher, seed: int, limit_s: float) -> tuple[list[str], float]:
    """Run the child, look on, kill it after a time; return what it said, and its seconds."""
    command = [sys.executable, __file__, "--child", kind, str(watcher.path), str(seed)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        first = child.stdout.readline()
        started = time.perf_counter()
        while child.poll() is None and (left_s := started + limit_s - time.perf_counter()) > 0:
            watcher.look()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(min(left_s, LOOK_EVERY_S))
        child.kill()
        lines = [first, *child.stdout]
    assert child.returncode in (0, -9), f"{kind} failed by itself"
    return [line.strip() for line in lines], time.perf_counter() - started


def main() -> None:
    """Kill, look, say what was seen."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--child", nargs=3, metavar=("KIND", "PATH", "SEED"))
    arguments = parser.parse_args()
    if arguments.child:
        kind, path, seed = arguments.child
        for name in LOADED_LATE:
            importlib.import_module(name)
        WORKS[kind](Path(path), int(seed))
        return
    rng = np.random.default_rng(0)
    killed: dict[str, Counter[str]] = {kind: Counter() for kind in WORKS}
    counts: Counter[str] = Counter()
    full_s: dict[str, list[float]] = {kind: [] for kind in WORKS}
    started, load = time.perf_counter(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        living = LivingCatalog(folder)
        watchers: dict[str, Watcher] = {
            "grow": living,
            "change": living,
            "index": NewCatalog(folder / "index.cbcat", index),
            "embed": NewCatalog(folder / "embed.cbcat", embed),
            "session": LivingSession(folder, counts),
        }
        kinds = itertools.cycle(ORDER)
        n_killed = 0
        for seed in itertools.count():
            if n_killed == arguments.kills:
                break
            kind = next(kinds)
            limit_s = math.inf  # the first of a kind shows how long it takes
            if full_s[kind]:
                limit_s = float(rng.uniform(0, 1.1 * statistics.median(full_s[kind][-5:])))
            said, took_s = run(kind, watchers[kind], seed, limit_s)
            is_done = said[-1] == "done"
            if is_done:
                full_s[kind].append(took_s)
                counts["calls that finished"] += 1
            else:
                n_killed += 1
                killed[kind][kind if kind == "session" else said[-1]] += 1
            watchers[kind].check(kind, seed, said)
            print(n_killed, kind, said[-1], f"{took_s:.2f} s", flush=True)
    during = dict(sum(killed.values(), Counter()))
    report = {"kills": n_killed, "killed_during": during, **counts, "problems": 0}
    report |= {"minutes": (time.perf_counter() - started) / 60, "load": load}
    file = Path(__file__).with_suffix(".json")
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
