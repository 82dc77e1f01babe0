"""What a session says of its answer (layer 5): how good it is, what to label next, what to keep."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from clipbranches_widget.audit import Audit, propose
from clipbranches_widget.concept import Concept
from clipbranches_widget.errors import RefineError
from clipbranches_widget.labels import as_row_ids
from clipbranches_widget.session_code import session_code
from clipbranches_widget.session_rounds import SessionRounds
from clipbranches_widget.suggest import Suggestions, suggest

if TYPE_CHECKING:
    from clipbranches_widget.result import Result

Rows = int | Iterable[int] | NDArray[Any]


class SessionAdvice(SessionRounds):
    """The part of `Session` that is about judging, improving and keeping its latest round."""

    def audit(self, n: int = 60, *, seed: int = 0) -> Audit:
        """Draw a small random sample to label, which tells how good the latest round's answer is.

        Label its rows, in their order, with `label`, then ask for
        ``audit.report(session.labels)``: precision and recall with 95 % intervals, and when to
        stop. The labels are ordinary ones: the next round learns from them, and its answer wants
        an audit of its own.

        Parameters
        ----------
        n
            How many rows, at least 1; labelled ones are never asked again.
        seed
            Of the draw.

        Raises
        ------
        RefineError
            If there is no round yet.
        QueryError
            If n < 1.
        """
        return propose(self._results.index, self._round(), self.labels, n=n, seed=seed)

    def suggest(self, n: int = 12, *, skip: Rows = (), seed: int = 0) -> Suggestions:
        """Return the unlabelled rows whose label would teach most, each with the reason.

        From the latest round: rows near its decision, unlike each other and what is labelled,
        and the best row of each rule without a label. Before the first round, hits of the latest
        search that differ; before the first search, any rows that differ.

        Parameters
        ----------
        n
            How many, at least 1.
        skip
            Rows you have seen and passed over, such as former suggestions: the next ones differ.
        seed
            Of random rows.

        Raises
        ------
        QueryError
            If n < 1, or the catalog has no such row.
        LabelError
            If `skip` holds anything but row ids.
        """
        latest = self.hits if self.result is None else self._round()
        passed = self.catalog.check_rows(as_row_ids(skip))
        return suggest(self._results.index, latest, self.labels, n, skip=passed, seed=seed)

    def save_concept(
        self, name: str, path: str | Path | None = None, *, overwrite: bool = False
    ) -> Concept:
        """Save what the latest round learned, to apply it again without labels or training.

        ``clipbranches_widget.Concept.load(path).apply(catalog)`` finds its images in the same
        catalog, also when it has grown.

        Parameters
        ----------
        name
            One line of at most 200 characters.
        path
            A JSON file to write; None only returns the concept.
        overwrite
            Replace a file that is there.

        Raises
        ------
        RefineError
            If there is no round yet.
        ConceptError
            If the name is empty or too long, or a file is there and `overwrite` is False.
        """
        result, asked = self._round(), self._state.asked
        vector = None if asked is None or asked.query is None else asked.query.vector
        concept = Concept.of(name, result, query_vector=vector)
        if path is not None:
            concept.save(Path(path).expanduser(), overwrite=overwrite)
        return concept

    def to_code(self) -> str:
        """Return the code of a cell that leads a new session to this state.

        It opens the catalog by its path, and repeats the latest search, the labels, the filters,
        the rules and the latest round, not every step on the way. A query by image is written as
        its embedding, and so is a text where `encoder` was given.
        """
        can_encode = self._encoder is None and self._catalog.encoder_info.kind != "none"
        return session_code(self._catalog, self._state, can_encode=can_encode)

    def _round(self) -> Result:
        result = self.result
        if result is None:
            raise RefineError("expected a session with a round, got one without: refine() first")
        return result if result.unfiltered is None else result.unfiltered
