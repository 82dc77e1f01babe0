"""Measure how well rounds find what simulated users look for, beside what else they could use.

    python benchmarks/quality.py [--data demo large] [--concepts N] [--rounds 4] [--labels 20]
                                 [--noise 0 0.05] [--folder DIR] [--out benchmarks/quality.json]

Two collections with known truth (`quality_data`), users who label what a method shows them round
by round (`quality_users`), methods (`quality_methods`, `quality_branches`, `quality_ours`) with
settings chosen on other concepts (`quality_tuning`). Per collection these users:

own labels
    Every method's users label its own ranking; once for each noise.
same labels
    Every method gets the labels that our method's users gathered, without noise.
3 yes
    Three yes rows, no no row, one round.
own labels, 5 a round
    And so on, for each further number of ``--labels``.

Means and standard deviations over concepts; 95 % intervals by a paired bootstrap over concepts.
Seconds are those of a round, matrix products, trees and forests on one thread, our index on all,
on whatever else the machine does. Writes quality.json (after every concept) and quality.png beside
this file, prints tables. The run takes about 15 minutes on two cores, once the large collection is
made. For a quick look from Python, on the concepts for settings: `evaluate`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quality_report
import quality_summary
import quality_tuning
from box_measure import say
from quality_data import Collection, load
from quality_users import Behaviour, Method, User, simulate

if TYPE_CHECKING:
    import pandas as pd

    from clipbranches_widget.labels import LabelSet

HERE = Path(__file__).parent
N_THREADS = 1
OWN, SAME, THREE = "own labels", "same labels", "3 yes"
EXTRA_METHODS = ("text", "logistic", "svm", "ours")
"""Those that are also measured with other numbers of labels a round."""

Entry = dict[str, Any]


def evaluate(
    names: Sequence[str] = ("ours", "logistic"),
    data: str | Sequence[str] = ("demo", "large"),
    concepts: int = 12,
    rounds: int = 4,
    *,
    labels: int = 20,
    noise: float = 0.0,
    start: str = "search",
    same_labels: bool = False,
    part: str = "tune",
    seed: int = 0,
    folder: Path | None = None,
) -> pd.DataFrame:
    """Measure some methods quickly.

    Parameters
    ----------
    names : sequence of str
        Of `quality_tuning.NAMES`.
    data : str or sequence of str
        "demo", "large".
    concepts, rounds, labels : int
        How many concepts; rounds; labels a round.
    noise : float
        Share of wrong labels.
    start : "search" or "3 yes"
    same_labels : bool
        Give every method the labels that our method's users gather.
    part : "tune" or "test"
        Which concepts: those that settings may be chosen on, or those that measure.
    seed : int
        Of users, samples and trees; the n-th concept uses ``seed + n``.
    folder : Path, optional
        Where the large collection is kept.

    Returns
    -------
    DataFrame
        Means over concepts, a line for each collection, method and round; figures as in
        `quality_users` and `quality_ours`. ``frame.attrs["entries"]`` holds every concept's.
    """
    behaviour = Behaviour(rounds, labels, noise, start)
    entries: list[Entry] = []
    with _threads():
        for name in [data] if isinstance(data, str) else data:
            collection = load(name, folder)
            methods = quality_tuning.methods(name)
            chosen = {each: methods[each] for each in names}
            for number, _ in enumerate(getattr(collection, part)[:concepts]):
                user = _user(collection, number, behaviour, part=part, seed=seed)
                entries += _rounds(user, chosen, "quick", same_labels=same_labels)
    return quality_summary.frame(entries)


def _threads() -> Any:
    from threadpoolctl import threadpool_limits

    return threadpool_limits(N_THREADS)


def _user(
    collection: Collection, number: int, behaviour: Behaviour, *, part: str = "test", seed: int = 0
) -> User:
    return User(collection, getattr(collection, part)[number], behaviour, seed=seed + number)


def _rounds(
    user: User, methods: dict[str, Method], variant: str, *, same_labels: bool = False
) -> Iterator[Entry]:
    """Run a user with every method; with `same_labels` ours goes first and gives its labels."""
    given: list[LabelSet] | None = None
    order = list(methods.items())
    if same_labels:
        order.sort(key=lambda item: item[0] != "ours")
        if order[0][0] != "ours":
            order.insert(0, ("ours", quality_tuning.FIXED["ours"]))
    facts = {
        "data": user.collection.name,
        "variant": variant,
        "concept": user.concept.name,
        "kind": user.concept.kind,
        "n_members": len(user.concept.members),
    }
    for name, method in order:
        gathered = []
        for number, who, labels, figures in simulate(user, name, method, given):
            if who == name:
                gathered.append(labels)
            yield facts | {"method": who, "round": number} | figures
        if same_labels and name == "ours":
            given = gathered


# --- the whole run ------------------------------------------------------------------------------


class Measured:
    """What was measured so far; written after every concept.

    Parameters
    ----------
    out : Path
    facts : dict
        About the run.
    """

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        self._out, self._facts = out, facts
        self.entries: list[Entry] = []
        self.cells: list[quality_summary.Cell] = []

    def add(self, entries: Iterator[Entry]) -> None:
        """Keep the rounds of one user."""
        self.entries += entries

    def save(self, **facts: Any) -> None:
        """Write means, spreads and every concept's AP."""
        self._facts |= facts
        self.cells = quality_summary.cells(self.entries)
        quality_summary.write(self._out, self._facts, self.cells)


def measure(collection: Collection, options: argparse.Namespace, measured: Measured) -> None:
    """Run every kind of users on a collection."""
    methods = quality_tuning.methods(collection.name)
    few = {name: methods[name] for name in EXTRA_METHODS}
    n_labels, *others = options.labels
    for number, concept in enumerate(collection.test[: options.concepts]):
        start = time.perf_counter()

        def run(
            variant: str,
            behaviour: Behaviour,
            chosen: dict[str, Method] = methods,
            *,
            same_labels: bool = False,
            number: int = number,
        ) -> None:
            user = _user(collection, number, behaviour)
            measured.add(_rounds(user, chosen, variant, same_labels=same_labels))

        for noise in options.noise:
            told = f"{OWN}, {noise:.0%} noise" if noise else OWN
            run(told, Behaviour(options.rounds, n_labels, noise))
        run(SAME, Behaviour(options.rounds, n_labels), same_labels=True)
        run(THREE, Behaviour(1, n_labels, start="3 yes"))
        for each in others:
            run(f"{OWN}, {each} a round", Behaviour(options.rounds, each), few)
        measured.save()
        seconds = time.perf_counter() - start
        say(f"{collection.name} {number + 1}: {concept.query} {seconds:.0f} s")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=["demo", "large"], default=["demo", "large"])
    parser.add_argument("--concepts", type=int, help="only the first N of each collection")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--labels",
        type=int,
        nargs="+",
        default=[20],
        help="labels a round; after the first number, further ones for a few methods",
    )
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--folder", type=Path, help="where the large collection is kept")
    parser.add_argument("--out", type=Path, default=HERE / "quality.json")
    parser.add_argument("--tune", action="store_true", help="choose the methods' settings anew")
    return parser.parse_args()


def main() -> None:
    """Measure, write, draw, print."""
    options = arguments()
    start = time.perf_counter()
    measured = Measured(
        options.out, {"command": " ".join(sys.argv[1:])} | quality_summary.machine()
    )
    with _threads():
        for name in options.data:
            collection = load(name, options.folder)
            say(f"{name}: {len(collection):,} rows, {len(collection.test)} concepts")
            if options.tune or name not in quality_tuning.stored():
                quality_tuning.tune(collection)
            measure(collection, options, measured)
    bars = quality_report.bars(measured.cells)
    minutes = (time.perf_counter() - start) / 60
    measured.save(minutes=minutes, settings=quality_tuning.stored(), bars=bars)
    print(quality_report.tables(measured.cells, bars))
    quality_report.draw(measured.cells, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
