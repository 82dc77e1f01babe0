"""The searches and rounds of a session, computed when asked for (layer 4, above refine, search).

A session file records what was asked, not the answers: they follow from the catalog. A round's
answer is recognised by its digest.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.encoder import Encoder, load_encoder
from clipbranches_widget.errors import RefineError
from clipbranches_widget.refine import refine
from clipbranches_widget.round_clock import Progress
from clipbranches_widget.search import search
from clipbranches_widget.session_events import Rule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from clipbranches_widget.branch import Branch
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.column_model import ColumnModel
    from clipbranches_widget.query_plan import BoxStrategy
    from clipbranches_widget.result import Result
    from clipbranches_widget.session_events import Round, Search

N_KEPT = 8
"""Results kept in memory; older ones are computed again when an undo needs them."""


class SessionResults:
    """Answers of one session, the latest kept. Thread-safe.

    Parameters
    ----------
    catalog
        What is searched.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._kept: OrderedDict[Search | Round, Result] = OrderedDict()
        self._lock = threading.Lock()
        self._computing = threading.Lock()

    def keep(self, asked: Search | Round, answer: Result) -> None:
        """Remember an answer that was just computed."""
        with self._lock:
            self._kept[asked] = answer
            while len(self._kept) > N_KEPT:
                self._kept.popitem(last=False)

    def hits(self, asked: Search) -> Result:
        """Return the result of a recorded search."""
        query = asked.query
        return self._remembered(
            asked,
            lambda: search(self._catalog, query.vector, asked.k, query_text=query.text),
        )

    def answer(self, asked: Round) -> Result:
        """Return the result of a recorded round.

        Where it cannot be reproduced, because the catalog grew or another release computed it,
        the last of its `notes` says so.
        """
        return self._remembered(asked, lambda: self._reproduced(asked))

    def refine(
        self,
        asked: Round,
        *,
        strategy: BoxStrategy | None = None,
        progress: Progress | None = None,
        partial: Callable[[Result], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> Result:
        """Compute a round from its labels, query, threshold, seed and rules."""
        index = self.index
        rules = [rule for rule in asked.rules if _fits(rule, index.model)]
        result = refine(
            index,
            strategy=strategy,
            partial=partial,
            labels=asked.labels,
            query=None if asked.query is None else asked.query.vector,
            query_text="" if asked.query is None else asked.query.text,
            threshold=asked.threshold,
            seed=asked.seed,
            progress=progress,
            cancel=cancel,
            off=[rule.box for rule in rules if rule.state == "off"],
            pinned=[rule.box for rule in rules if rule.state == "pinned"],
        )
        if len(rules) == len(asked.rules):
            return result
        note = (
            f"{len(asked.rules) - len(rules)} of the session's rules were made on other columns "
            "than this catalog has now, and are not applied"
        )
        return replace(result, notes=(*result.notes, note))

    def rule(self, branch: Branch) -> Rule:
        """Return the rule of a branch.

        Raises
        ------
        RefineError
            If it has no box.
        """
        if branch.box is None:
            raise RefineError(
                f"expected a branch that is a rule, got {branch.text!r}, which is made of "
                "single images: label those that are wrong no, or right yes"
            )
        return Rule.of(branch.box, branch.text, self.index.model.hash)

    def start_loading(self) -> None:
        """Open the column index and load its compiled loops in the background."""
        self.index.columns.loader.start()

    @property
    def index(self) -> CatalogIndex:
        """The opened indexes of the catalog, shared by all its sessions."""
        return self._catalog.opened("index", lambda: CatalogIndex(self._catalog))

    def _remembered(self, asked: Search | Round, compute: Callable[[], Result]) -> Result:
        if (answer := self._recalled(asked)) is not None:
            return answer
        with self._computing:  # the second of two callers gets what the first one computed
            if (answer := self._recalled(asked)) is None:
                answer = compute()
                self.keep(asked, answer)
            return answer

    def _recalled(self, asked: Search | Round) -> Result | None:
        with self._lock:
            if asked in self._kept:
                self._kept.move_to_end(asked)
            return self._kept.get(asked)

    def _reproduced(self, asked: Round) -> Result:
        result = self.refine(asked)
        if asked.digest in {"", digest(result.rows)}:
            return result
        n_rows = len(self._catalog)
        if asked.catalog_rows != n_rows:
            why = f"the catalog had {asked.catalog_rows:,} images then and has {n_rows:,} now"
        else:
            why = "it was computed by another release of this package, XGBoost or NumPy"
        note = (
            f"The recorded answer of {asked.n_rows:,} images could not be reproduced: {why}. "
            f"These {len(result):,} were computed anew from the same labels."
        )
        return replace(result, notes=(*result.notes, note))


def _fits(rule: Rule, model: ColumnModel) -> bool:
    """Return whether a rule of a session file is about the columns of the catalog."""
    columns = [column for column, _, _ in rule.box.ranges]
    return rule.columns == model.hash and max(columns, default=-1) < model.n_columns


class LazyEncoder:
    """A catalog's model, loaded once when first asked for, without holding up the catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._info = catalog.encoder_info
        self._lock = threading.Lock()
        self._loaded: Encoder | None = None

    def get(self) -> Encoder:
        """Return the model; load it (seconds, imports torch) on the first call."""
        with self._lock:
            if self._loaded is None:
                self._loaded = load_encoder(self._info)
            return self._loaded


def digest(rows: NDArray[np.int64]) -> str:
    """Return a hash of ranked row ids: 32 hex digits of BLAKE2b over little-endian int64."""
    return hashlib.blake2b(rows.astype("<i8").tobytes(), digest_size=16).hexdigest()
