"""The searches and rounds of a session, computed when asked for (layer 4, above refine, search).

A session file records what was asked, not the answers: they follow from the catalog. A round's
answer is recognised by its digest.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from clipbranches_widget.encoder import Encoder, load_encoder
from clipbranches_widget.errors import RefineError
from clipbranches_widget.open_index import index_of
from clipbranches_widget.refine import answer_again, refine
from clipbranches_widget.round_clock import Progress
from clipbranches_widget.row_filter import ColumnFilter, passing
from clipbranches_widget.search import search
from clipbranches_widget.session_events import Query, Round, Rule, Search

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from clipbranches_widget.boxes import LeafBox
    from clipbranches_widget.branch import Branch
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.column_model import ColumnModel
    from clipbranches_widget.index_protocol import Index
    from clipbranches_widget.query_plan import BoxStrategy
    from clipbranches_widget.result import Result
    from clipbranches_widget.round_model import RoundModel

Filters: TypeAlias = tuple[ColumnFilter, ...]
Asked: TypeAlias = Search | Round | tuple[Search | Round, Filters]
"""A search or round; with filters where these hold something."""

N_KEPT = 8
"""Results kept in memory; older ones are computed again when an undo needs them."""

N_MASKS = 4
"""Filters whose matching rows are kept in memory, one byte a row of the catalog."""

MAX_KEPT_ROWS = 5_000_000
"""Ranked rows of rounds kept in memory, all rounds together; 8 bytes each."""


class SessionResults:
    """Answers of one session, the latest kept. Thread-safe.

    Parameters
    ----------
    catalog
        What is searched.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._kept: OrderedDict[Asked, Result] = OrderedDict()
        self._masks: OrderedDict[Filters, NDArray[np.bool_]] = OrderedDict()
        self._rows: OrderedDict[Round, NDArray[np.int64]] = OrderedDict()
        self._lock = threading.Lock()
        self._computing = threading.Lock()

    def keep(self, asked: Asked, answer: Result) -> None:
        """Remember an answer that was just computed."""
        if isinstance(asked, Round):
            self._keep_rows(asked, answer.rows)
        with self._lock:
            self._kept[asked] = answer
            while len(self._kept) > N_KEPT:
                self._kept.popitem(last=False)

    def hits(self, asked: Search, filters: Filters = ()) -> Result:
        """Return the result of a recorded search among the rows that match filters."""
        return self._remembered(
            (asked, filters) if filters else asked,
            lambda: self.search(asked.query, asked.k, filters),
        )

    def search(self, query: Query, k: int, filters: Filters) -> Result:
        """Find the `k` nearest among the rows that match filters."""
        only = self.passing(filters) if filters else None
        return search(self._catalog, query.vector, k, only=only, query_text=query.text)

    def passing(self, filters: Filters) -> NDArray[np.bool_]:
        """Return which rows match filters and are not removed: (n,) bool, read-only."""
        with self._lock:
            if (known := self._masks.get(filters)) is not None:
                return known
        mask = passing(self._filtered(filters), filters) & self._catalog.is_present
        mask.setflags(write=False)
        with self._lock:
            self._masks[filters] = mask
            while len(self._masks) > N_MASKS:
                self._masks.popitem(last=False)
        return mask

    def _filtered(self, filters: Filters) -> pa.Table:
        """Return the columns that filters are about, of all rows."""
        names = sorted({one.column for one in filters} & {*self._catalog.item_store.schema.names})
        return self._catalog.item_store.columns(names or ["row"])

    def answer(self, asked: Round, filters: Filters = ()) -> Result:
        """Return the result of a recorded round, as far as its rows match filters.

        Where the catalog grew since, or the answer cannot be reproduced, the last of its `notes`
        says so.
        """
        whole = self._remembered(asked, lambda: self._reproduced(asked))
        if not filters:
            return whole
        return self._remembered((asked, filters), lambda: whole.filtered(self.passing(filters)))

    def rows(self, asked: Round) -> NDArray[np.int64]:
        """Return the ranked rows of a recorded round: those of `answer`, much longer remembered."""
        with self._lock:
            rows = self._rows.get(asked)
        if rows is not None:
            return rows
        with self._computing:
            answer = self._recalled(asked)
            if answer is None:
                answer = self._reproduced(asked)
        self._keep_rows(asked, answer.rows)
        return answer.rows

    def touch(self, asked: Iterable[Search | Round | None], filters: Filters = ()) -> None:
        """Count answers as just used: others are forgotten before them."""
        for each in asked:
            if each is not None:
                self._recalled(each)
                self._recalled((each, filters))

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
        off, pinned = self._boxes(asked)
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
            off=off,
            pinned=pinned,
        )
        return self._with_rules_note(result, asked)

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
        """Get the indexes ready in the background."""
        self.index.start_loading()

    @property
    def index(self) -> Index:
        """The opened indexes of the catalog, shared by all its sessions."""
        return index_of(self._catalog)

    def _remembered(self, asked: Asked, compute: Callable[[], Result]) -> Result:
        if (answer := self._recalled(asked)) is not None:
            return answer
        with self._computing:  # the second of two callers gets what the first one computed
            if (answer := self._recalled(asked)) is None:
                answer = compute()
                self.keep(asked, answer)
            return answer

    def _recalled(self, asked: Asked) -> Result | None:
        with self._lock:
            if asked in self._kept:
                self._kept.move_to_end(asked)
            return self._kept.get(asked)

    def _boxes(self, asked: Round) -> tuple[list[LeafBox], list[LeafBox]]:
        """Return the boxes of the rules that fit the catalog: switched off, and pinned."""
        rules = [rule for rule in asked.rules if _fits(rule, self.index.model)]
        off, pinned = (
            [rule.box for rule in rules if rule.state == state] for state in ("off", "pinned")
        )
        return off, pinned

    def _with_rules_note(self, result: Result, asked: Round) -> Result:
        n_unfit = sum(not _fits(rule, self.index.model) for rule in asked.rules)
        if not n_unfit:
            return result
        note = (
            f"{n_unfit} of the session's rules were made on other columns than this catalog has "
            "now, and are not applied"
        )
        return replace(result, notes=(*result.notes, note))

    def _answered_again(self, asked: Round) -> Result | None:
        """Answer with what the same round learned under other rules; None if that is forgotten."""
        if (model := self._learned(asked)) is None:
            return None
        off, pinned = self._boxes(asked)
        result = answer_again(
            self.index,
            model,
            labels=asked.labels,
            query_text="" if asked.query is None else asked.query.text,
            seed=asked.seed,
            off=off,
            pinned=pinned,
        )
        return self._with_rules_note(result, asked)

    def _learned(self, asked: Round) -> RoundModel | None:
        """Return what a kept round learned where `asked` would learn the same."""
        with self._lock:
            for kept, result in reversed(self._kept.items()):
                if isinstance(kept, Round) and _learns(kept) == _learns(asked):
                    return result.model
        return None

    def _keep_rows(self, asked: Round, rows: NDArray[np.int64]) -> None:
        with self._lock:
            self._rows[asked] = rows
            self._rows.move_to_end(asked)
            while len(self._rows) > 1 and sum(map(len, self._rows.values())) > MAX_KEPT_ROWS:
                self._rows.popitem(last=False)

    def _reproduced(self, asked: Round) -> Result:
        result = self._answered_again(asked)
        if result is None:
            result = self.refine(asked)
        note = self._changed_note(asked, result)
        return replace(result, notes=(*result.notes, note)) if note else result

    def _changed_note(self, asked: Round, result: Result) -> str:
        """Say how an answer differs from the recorded one, and why; empty where it does not."""
        is_same = asked.digest in {"", digest(result.rows)}
        n_new = len(self._catalog) - asked.catalog_rows
        images = "1 image was" if n_new == 1 else f"{n_new:,} images were"
        added = f"{images} added to the catalog since this round"
        if is_same:
            return f"{added}; none of them changes its answer." if n_new > 0 else ""
        if n_new > 0:
            why = added
        elif n_new < 0:
            why = f"the catalog had {asked.catalog_rows:,} images then, and {-n_new:,} fewer now"
        elif len(self._catalog.removed_rows):
            why = "images were removed from the catalog since, or another release computed it"
        else:
            why = "it was computed by another release of this package, XGBoost or NumPy"
        return (
            f"The recorded answer of {asked.n_rows:,} images could not be reproduced: {why}. "
            f"These {len(result):,} were computed anew from the same labels."
        )


def _learns(asked: Round) -> tuple[object, ...]:
    """Return all that decides what a round learns on a catalog."""
    return asked.labels, asked.query, asked.threshold, asked.seed


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
