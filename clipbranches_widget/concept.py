"""A round's model as a file (layer 4): saved once, applied to growing catalogs without training.

Row ids are for ever, so on the catalog that a concept was saved on, however grown, its labels are
those of the same rows. On another catalog with the same encoder and columns, images are known
again by their content hashes, where both catalogs have them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.concept_catalog import catalog_id, check_fits, content_hashes, rows_with
from clipbranches_widget.concept_file import (
    boxes_from_list,
    boxes_to_list,
    exact,
    forest_from_dict,
    forest_to_dict,
    malformed,
    read_concept,
    write_concept,
)
from clipbranches_widget.concept_values import checked_name, plain, share
from clipbranches_widget.conditions import RuleState
from clipbranches_widget.distil import draw_sample, random_rows
from clipbranches_widget.encoder import EncoderInfo
from clipbranches_widget.errors import ConceptError
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.open_index import index_of
from clipbranches_widget.refine import MAX_NEAREST
from clipbranches_widget.round_answer import Asked, answer, first_page
from clipbranches_widget.round_clock import RoundClock
from clipbranches_widget.round_model import RoundModel
from clipbranches_widget.round_notes import label_notes
from clipbranches_widget.session_file import CatalogId
from clipbranches_widget.teacher import Teacher

if TYPE_CHECKING:
    from clipbranches_widget.boxes import LeafBox
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.query_plan import BoxStrategy
    from clipbranches_widget.result import Result
    from clipbranches_widget.trees import TreeEnsemble


@dataclass(frozen=True, slots=True, eq=False)
class Concept:
    """What a round learned, by name: `save` it, `load` it, `apply` it to a catalog.

    Attributes
    ----------
    name : str
        For people.
    query_text : str
        What was searched for; empty for nothing.
    query_vector : (dim,) float32 or None
        Its embedding.
    labels : LabelSet
        What the round was told: row ids of `catalog`.
    content_hashes : mapping of int to str
        Content of labelled rows, where the catalog knows it.
    teacher : Teacher
        Scores and ranks.
    forest : TreeEnsemble
        Gives the margins.
    boxes : tuple of LeafBox
        The rules, in the order of `Result.branches`.
    states : tuple of str
        Of each rule: "on", "off" or "pinned"; those that are off are not read.
    n_nearest : int
        How many rows near the teacher's direction complement the boxes.
    threshold, learned_threshold : float
        Lowest score of an answer, and the one that the boxes were learned for.
    seed : int
        Of the round.
    encoder : EncoderInfo
        What made the embeddings.
    column_model_hash : str
        Names the columns that the boxes are ranges of.
    catalog : CatalogId
        Where the labels are, and how long it was.
    created : mapping of str to str
        The package's version as "clipbranches_widget", the time as "time_utc".

    Examples
    --------
    >>> concept = Concept.of("wings", session.refine())   # doctest: +SKIP
    >>> concept.save("wings.json")                        # doctest: +SKIP
    >>> Concept.load("wings.json").apply(catalog)         # doctest: +SKIP
    """

    name: str
    query_text: str
    query_vector: NDArray[np.float32] | None = field(repr=False)
    labels: LabelSet
    content_hashes: Mapping[int, str] = field(repr=False)
    teacher: Teacher = field(repr=False)
    forest: TreeEnsemble = field(repr=False)
    boxes: tuple[LeafBox, ...] = field(repr=False)
    states: tuple[RuleState, ...] = field(repr=False)
    n_nearest: int
    threshold: float
    learned_threshold: float
    seed: int
    encoder: EncoderInfo
    column_model_hash: str
    catalog: CatalogId
    created: Mapping[str, str]

    @classmethod
    def of(
        cls, name: str, result: Result, *, query_vector: NDArray[np.float32] | None = None
    ) -> Concept:
        """Name what a round learned.

        Parameters
        ----------
        name : str
            One line of at most 200 characters.
        result : Result
            Of a complete round, from `Session.refine`, `Result.at` or `apply`. Labels, query
            text and threshold are its own.
        query_vector : (dim,) float32, optional
            The query's embedding, kept for later; what it taught is in the teacher already.

        Raises
        ------
        ConceptError
            If the name is empty or too long, or the result is no complete round's.
        """
        from clipbranches_widget import __version__

        model, labels, catalog = result.model, result.labels, result.catalog
        if model is None or labels is None:
            what = "a search" if result.kind == "search" else "a round that is still running"
            raise ConceptError(
                f"expected the result of a complete round, got that of {what}: "
                "save what session.refine() returns"
            )
        rules = [branch for branch in result.branches if branch.box is not None]
        return cls(
            name=checked_name(name),
            query_text=plain(result.query_text),
            query_vector=query_vector,
            labels=labels,
            content_hashes=content_hashes(catalog, labels.rows),
            teacher=model.teacher,
            forest=model.forest,
            boxes=model.listed or model.boxes,
            states=tuple(branch.state for branch in rules),
            n_nearest=model.n_nearest,
            threshold=result.threshold,
            learned_threshold=model.threshold,
            seed=result.seed,
            encoder=catalog.encoder_info,
            column_model_hash=catalog.column_model_hash,
            catalog=catalog_id(catalog),
            created={
                "clipbranches_widget": __version__,
                "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> int:
        """Write the concept to a JSON file, atomically; return its size in bytes.

        Some 30 to 100 KB, whatever the catalog; the catalog's path is not in it.

        Raises
        ------
        ConceptError
            If something is at `path` and `overwrite` is False, or it cannot be written.
        """
        body = {
            "name": self.name,
            "query": {
                "text": self.query_text,
                "vector": None if self.query_vector is None else exact(self.query_vector),
            },
            "labels": self.labels.to_dict(),
            "content_hashes": {str(row): text for row, text in self.content_hashes.items()},
            "teacher": self.teacher.to_dict(),
            "boxes": boxes_to_list(self.boxes),
            "states": list(self.states),
            "forest": forest_to_dict(self.forest),
            "n_nearest": self.n_nearest,
            "threshold": self.threshold,
            "learned_threshold": self.learned_threshold,
            "seed": self.seed,
            "encoder": asdict(self.encoder),
            "column_model": self.column_model_hash,
            "catalog": asdict(self.catalog),
            "created": dict(self.created),
        }
        return write_concept(Path(path).expanduser().absolute(), body, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Concept:
        """Read a concept that `save` wrote.

        Raises
        ------
        ConceptError
            If there is none, or it is damaged, edited, of a newer release or something else.
        """
        file = Path(path).expanduser().absolute()
        body = read_concept(file)
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold is found out to be infinite
                concept = cls._from_body(body)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise malformed(file, error) from error
        return concept

    @classmethod
    def _from_body(cls, body: Mapping[str, Any]) -> Concept:
        forest, encoder = forest_from_dict(body["forest"]), EncoderInfo(**body["encoder"])
        teacher, vector = Teacher.from_dict(body["teacher"]), body["query"]["vector"]
        query = None if vector is None else np.array(vector, dtype=np.float32)
        for each in (teacher.direction, *([] if query is None else [query])):
            if each.shape != (encoder.dim,) or not np.isfinite(each).all():
                raise ValueError(f"expected vectors of {encoder.dim} numbers, got {each.shape}")
        boxes, states = boxes_from_list(body["boxes"], forest.n_columns), body["states"]
        if len(states) != len(boxes) or not set(states) <= set(get_args(RuleState)):
            raise ValueError(f"expected a state a box, of {get_args(RuleState)}, got {states}")
        n_nearest, seed = int(body["n_nearest"]), int(body["seed"])
        if n_nearest < 1 or seed < 0:
            raise ValueError(f"expected n_nearest >= 1 and seed >= 0, got {n_nearest} and {seed}")
        catalog = CatalogId(**body["catalog"])
        labels = LabelSet.from_dict(body["labels"])
        if catalog.n_rows < 1 or (len(labels) and labels.rows[-1] >= catalog.n_rows):
            raise ValueError(f"expected labels of rows below {catalog.n_rows}")
        return cls(
            name=checked_name(body["name"]),
            query_text=str(body["query"]["text"]),
            query_vector=query,
            labels=labels,
            content_hashes={int(row): str(text) for row, text in body["content_hashes"].items()},
            teacher=teacher,
            forest=forest,
            boxes=boxes,
            states=tuple(states),
            n_nearest=n_nearest,
            threshold=share(body["threshold"]),
            learned_threshold=share(body["learned_threshold"]),
            seed=seed,
            encoder=encoder,
            column_model_hash=str(body["column_model"]),
            catalog=catalog,
            created={str(key): str(value) for key, value in body["created"].items()},
        )

    def apply(
        self,
        catalog: Catalog,
        *,
        threshold: float | None = None,
        strategy: BoxStrategy | None = None,
    ) -> Result:
        """Answer with every image of a catalog that the concept fits, without training.

        On the catalog it was saved on, with nothing added, the answer is that of the round, bit
        for bit. On a grown one, `Result.notes` says how many rows are new, and `n_nearest` grows
        with the catalog, to at most 2,000.

        Parameters
        ----------
        catalog : Catalog
            With the same encoder and the same columns.
        threshold : float, optional
            Lowest score of an answer, in (0, 1), as `Result.at` takes it; default: the
            concept's own.
        strategy : "bits", "postings" or "scan", optional
            Force how the column index answers, as in `Session.refine`.

        Raises
        ------
        ConceptError
            If the catalog has another encoder, dimension or other columns.
        RefineError
            If `threshold` is not in (0, 1).
        QueryError
            If `strategy` is unknown, or needs a part of the column index that is not stored.
        """
        check_fits(
            catalog,
            name=self.name,
            encoder=self.encoder,
            column_model_hash=self.column_model_hash,
            n_columns=self.forest.n_columns,
            way_out=self._way_out(),
        )
        clock = RoundClock()
        index = index_of(catalog)
        found = self.labels_in(catalog)
        labels, n_ignored = index.present(found)
        off, pinned = self._boxes("off"), self._boxes("pinned")
        limit = self.learned_threshold
        asked = Asked(labels, self.query_text, limit, self.seed, off, pinned, n_ignored)
        clock.stage("sample", 0.0)
        scored = first_page(index, self.teacher, asked)
        drawn = random_rows(catalog, np.random.default_rng(self.seed))
        logit = self.teacher.logit_of(self.learned_threshold)
        model = RoundModel(
            teacher=self.teacher,
            forest=self.forest,
            boxes=self._boxes("on", "pinned"),
            sample=draw_sample(index, self.teacher, labels, drawn, logit),
            n_nearest=self._n_nearest(len(catalog)),
            threshold=self.learned_threshold,
            listed=self.boxes if off else (),
        )
        result = answer(index, model, scored, asked, clock, strategy=strategy)
        result = replace(result, notes=self._notes(result, found))
        limit = self.threshold if threshold is None else threshold
        return result if limit == self.learned_threshold else result.at(limit)

    def labels_in(self, catalog: Catalog) -> LabelSet:
        """Return the concept's labels in a catalog: by row on its own, else by image content.

        On its own catalog, whether or not that grew since, a row that is not there has no label.
        On another one, every image with the content of a labelled one takes its label; images
        whose content was labelled both yes and no take none. Works whatever the encoder.
        """
        yes, no = self.labels.positive, self.labels.negative
        if catalog_id(catalog).id == self.catalog.id:
            return LabelSet(yes[yes < len(catalog)], no[no < len(catalog)])
        hashes = [
            {self.content_hashes[row] for row in rows.tolist() if row in self.content_hashes}
            for rows in (yes, no)
        ]
        return LabelSet(
            rows_with(catalog, hashes[0] - hashes[1]), rows_with(catalog, hashes[1] - hashes[0])
        )

    def _way_out(self) -> str:
        search = f"session.search({self.query_text!r}); " if self.query_text else ""
        return (
            f"re-run the labels on this catalog: {search}found = concept.labels_in(catalog); "
            "session.label(found.positive, found.negative); session.refine()"
        )

    def _boxes(self, *states: RuleState) -> tuple[LeafBox, ...]:
        return tuple(b for b, s in zip(self.boxes, self.states, strict=True) if s in states)

    def _n_nearest(self, n_rows: int) -> int:
        grown = math.ceil(self.n_nearest * n_rows / self.catalog.n_rows)
        return max(self.n_nearest, min(grown, MAX_NEAREST))

    def _notes(self, result: Result, found: LabelSet) -> tuple[str, ...]:
        """Return the round's notes, with what is new or missing in this catalog."""
        catalog, used = result.catalog, result.labels or LabelSet()
        notes = [note for note in result.notes if note not in label_notes(used)]
        notes += label_notes(self.labels)
        n_before, n_used, n_labels = self.catalog.n_rows, len(found), len(self.labels)
        if catalog_id(catalog).id != self.catalog.id:
            notes.append(
                f"{self.name!r} was saved on another catalog, {self.catalog.name}: "
                f"{n_used:,} images here have the content of its {n_labels:,} labelled ones"
            )
        elif len(catalog) > n_before:
            notes.append(
                f"{len(catalog) - n_before:,} images are new since {self.name!r} was saved: "
                f"rows from {n_before:,} on"
            )
        elif n_used < n_labels:
            notes.append(
                f"this catalog is shorter than when {self.name!r} was saved: {n_used:,} of its "
                f"{n_labels:,} labelled images are here"
            )
        return tuple(notes)
