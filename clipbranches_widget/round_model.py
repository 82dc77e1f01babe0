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
    listed : tuple of LeafBox
        `boxes` and those switched off, in the order of `Result.branches`; empty where none is
        switched off.
    """

    teacher: Teacher
    forest: TreeEnsemble
    boxes: tuple[LeafBox, ...]
    sample: Sample
    n_nearest: int
    threshold: float
    listed: tuple[LeafBox, ...] = ()

    @property
    def off(self) -> tuple[LeafBox, ...]:
        """The boxes switched off: rows that none but these hold are no candidates."""
        read = {box.ranges for box in self.boxes}
        return tuple(box for box in self.listed if box.ranges not in read)
