"""Labels of a session out to other programs, and back in (layer 5, above `session_search`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipbranches_widget.label_files import read_labels
from clipbranches_widget.label_import import By, ImportedLabels, matched_labels
from clipbranches_widget.labelled_rows import LabelledRows
from clipbranches_widget.session_search import SessionSearch

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    import pyarrow as pa

    from clipbranches_widget.labels import LabelSet
    from clipbranches_widget.session_log import Decision
    from clipbranches_widget.session_state import SessionState


class SessionLabels(SessionSearch):
    """The part of `Session` that hands labels out and takes them in."""

    def export_labels(self) -> LabelledRows:
        """Return the labelled rows, with every way out that a Result has.

        Rows that were removed from the catalog are left out.

        Examples
        --------
        ::

            session.export_labels().to_pandas()  # row, label (yes or no), path, caption, ...
            session.export_labels().to_csv("labels.csv")
            session.export_labels().to_imagefolder("labelled")  # yes/ and no/
        """
        return LabelledRows.of(self.catalog, self.labels)

    def import_labels(
        self,
        source: str | Path | pd.DataFrame | pa.Table | LabelledRows | Any,
        *,
        label_column: str | None = None,
        mapping: Mapping[Any, Any] | None = None,
        by: By | None = None,
    ) -> ImportedLabels:
        """Take labels from a file, a table or a folder of images, as one action.

        Each image is looked for by its row id, where the file is of this catalog or the path or
        content in the line is that of the row; else by its path or URL; else by its content. Rows
        that have another label take the new one, other labels stay. One `undo` takes all back.

        Parameters
        ----------
        source
            A DataFrame, an Arrow table or a Hugging Face data set; a file .csv, .tsv, .parquet,
            .arrow, .feather or .jsonl; a folder with images in folders ``yes`` and ``no``; or
            another session's file. A table has a column of labels, and one or more of ``row``,
            ``path`` (or ``uri``, ``file_name``, ``filepath``) and ``content_hash``.
        label_column
            Column of the labels; default ``label``.
        mapping
            What other labels, or names of folders, stand for: ``{"cat": "yes", "dog": "no",
            "unsure": None}``. Without it: yes and no, positive and negative, true and false, 1 and
            0, 1 and -1, without regard to case; empty is no label.
        by
            "row", "path" or "content_hash": look for images by this alone; "row" trusts the ids.

        Returns
        -------
        ImportedLabels
            What was matched, how, and what was not; print it.

        Raises
        ------
        LabelError
            If the source has no labels, values are not known, or an image is both yes and no:
            nothing is changed then.
        SessionFileError
            If a session's file is damaged.

        Examples
        --------
        ::

            print(session.import_labels("labels.csv"))
            session.import_labels("pets", mapping={"cats": "yes", "dogs": "no"})
        """
        said = read_labels(source, label_column=label_column, mapping=mapping)
        found = matched_labels(self.catalog, said, by)
        n_changed = 0

        def decide(state: SessionState) -> Decision | None:
            nonlocal n_changed
            decision = label_decision(state, found.labels)
            n_changed = 0 if decision is None else sum(map(len, decision[1].values()))
            return decision

        self._log.commit(decide)
        return replace(found, n_changed=n_changed)


def label_decision(state: SessionState, added: LabelSet) -> Decision | None:
    """Return the event that gives rows their labels; None where all have them already."""
    old = state.labels
    changed_to = {
        "positive": np.setdiff1d(added.positive, old.positive).tolist(),
        "negative": np.setdiff1d(added.negative, old.negative).tolist(),
    }
    return ("label", changed_to) if any(changed_to.values()) else None
