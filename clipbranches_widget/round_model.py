"""What a round learned, as one value (layer 4)."""

from __future__ import annotations

from dataclasses import dataclass

from clipbranches_widget.boxes import LeafBox
from clipbranches_widget.distil import Sample
from clipbranches_widget.teacher import Teacher
from clipbranches_widget.trees import TreeEnsemble


@dataclass(frozen=True, slots=True)
class RoundModel:
    """What one round learned.

    Attributes
    ----------
    teacher : Teacher
        Scores and ranks.
    forest : TreeEnsemble
        Imitates the teacher on the indexed columns.
    boxes : tuple of LeafBox
        The leaves of the forest that are read.
    sample : Sample
        What the forest learned from.
    n_nearest : int
        How many rows near the teacher's direction complement the boxes.
    threshold : float
        Lowest score of an answer.
    """

    teacher: Teacher
    forest: TreeEnsemble
    boxes: tuple[LeafBox, ...]
    sample: Sample
    n_nearest: int
    threshold: float
