"""What an answer rests on, in sentences (layer 3): its sample, its labels, its threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.boxes import union_mask

if TYPE_CHECKING:
    from clipbranches_widget.labels import LabelSet
    from clipbranches_widget.round_model import RoundModel


def round_notes(
    model: RoundModel,
    candidates: NDArray[np.int64],
    labels: LabelSet,
    *,
    n_rows: int,
    threshold: float,
) -> tuple[str, ...]:
    """Say what share of the positives the candidates hold at a threshold.

    Parameters
    ----------
    model : RoundModel
    candidates : (m,) int64
        Every row that was scored.
    labels : LabelSet
    n_rows : int
        Rows of the catalog that are not removed.
    threshold : float
        Lowest score of the answer; `RoundModel.threshold` is the one that the boxes were learned
        for.
    """
    notes = []
    sample = model.sample
    is_wanted = sample.is_random & ~np.isin(sample.rows, labels.rows)
    is_wanted &= model.teacher.score_of(sample.logits) >= np.float32(threshold)
    if model.off:
        is_off = union_mask(model.off, sample.codes) & ~union_mask(model.boxes, sample.codes)
        is_wanted &= ~is_off
        rules = "1 rule is" if len(model.off) == 1 else f"{len(model.off)} rules are"
        notes.append(f"{rules} switched off, and with them the images that no other rule holds")
    wanted = sample.rows[is_wanted]
    n_random, found = int(sample.is_random.sum()), int(np.isin(wanted, candidates).sum())
    if n_random < n_rows and len(wanted):
        notes.append(
            f"boxes and nearest rows hold {found:,} of the {len(wanted):,} rows above the "
            f"threshold in a random sample of {n_random:,}: about {found / len(wanted):.0%}"
        )
    elif found < len(wanted):
        notes.append(
            f"{len(wanted) - found:,} more rows are above the threshold, but in none of the boxes"
        )
    over_query = model.teacher.over_query
    if over_query is not None and over_query < 0:
        notes.append(
            "judged by your labels, held out, the query alone tells yes from no better than what "
            "was learned: look at the search's own ranking too, or label more"
        )
    if threshold < model.threshold:
        notes.append(
            f"the threshold {threshold:g} is below {model.threshold:g}, which the boxes were "
            f"learned for, so images may be missing: refine(threshold={threshold:g}) learns anew"
        )
    return tuple(notes)


def label_notes(labels: LabelSet) -> tuple[str, ...]:
    """Say which labels would make a better answer."""
    notes = []
    if not len(labels.positive):
        notes.append("no image is marked yes: the query stood in as the example")
    if not len(labels.negative):
        notes.append("no image is marked no: marking a few wrong ones sharpens the answer")
    return tuple(notes)


def removed_notes(n_ignored: int) -> tuple[str, ...]:
    """Say how many labels did not count."""
    if not n_ignored:
        return ()
    images = "1 labelled image was" if n_ignored == 1 else f"{n_ignored:,} labelled images were"
    return (f"{images} removed from the catalog, and left out",)
