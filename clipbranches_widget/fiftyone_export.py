"""Rows of a catalog as a data set of FiftyOne (layer 4)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from clipbranches_widget.errors import ExportError, ImageReadError, MissingPackageError
from clipbranches_widget.image_copy import image_file
from clipbranches_widget.labels import LABEL_WORDS

if TYPE_CHECKING:
    import pyarrow as pa

    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.labels import LabelSet

_RESERVED = frozenset(("id", "filepath", "tags", "metadata", "created_at", "last_modified_at"))
_BATCH_ROWS = 1000


def fiftyone_dataset(
    catalog: Catalog,
    rows: Sequence[int],
    columns: pa.Table,
    labels: LabelSet | None,
    *,
    name: str | None,
) -> Any:
    """Make a data set of FiftyOne; see `Result.to_fiftyone`."""
    fiftyone = _fiftyone()
    files = _files(catalog, rows)
    dataset = fiftyone.Dataset(name)
    dataset.add_samples(_samples(fiftyone, rows, files, columns, labels), num_samples=len(rows))
    return dataset


def _fiftyone() -> Any:
    try:
        import fiftyone
    except ImportError as error:
        raise MissingPackageError(
            "expected fiftyone, got no such package; run: pip install fiftyone"
        ) from error
    return fiftyone


def _files(catalog: Catalog, rows: Sequence[int]) -> list[str]:
    """Return the image file of each row: FiftyOne reads nothing else."""
    files = []
    for row in rows:
        try:
            file = image_file(catalog, row)
        except ImageReadError as error:
            raise ExportError(
                f"expected an image file for every row, got row {row}, which {error}: leave it out"
            ) from error
        if file is None:
            raise ExportError(
                f"expected an image file for every row, got row {row} at {catalog.uri(row)!r}: "
                "write files with to_imagefolder(folder), and load that folder with "
                "fiftyone.Dataset.from_dir(folder, "
                "dataset_type=fiftyone.types.ImageClassificationDirectoryTree)"
            )
        files.append(str(file))
    return files


def _samples(
    fiftyone: Any,
    rows: Sequence[int],
    files: Sequence[str],
    columns: pa.Table,
    labels: LabelSet | None,
) -> Iterator[Any]:
    """Yield a sample for each row: a label where there is one, and the columns as fields."""
    renamed = columns.rename_columns(_field_names(columns.column_names))
    number = 0
    for batch in renamed.to_batches(_BATCH_ROWS):
        for fields in batch.to_pylist():
            sample = fiftyone.Sample(filepath=files[number])
            for field, value in fields.items():
                if value is not None:
                    sample[field] = value
            word = LABEL_WORDS.get(0 if labels is None else labels.get(rows[number]))
            if word is not None:
                sample["label"] = fiftyone.Classification(label=word)
            yield sample
            number += 1


def _field_names(names: Sequence[str]) -> list[str]:
    """Return names that FiftyOne takes: no punctuation, none of its own, none twice."""
    renamed: list[str] = []
    for name in names:
        new = re.sub(r"\W+", "_", name).strip("_") or "column"
        while new in {"label", *_RESERVED, *renamed}:
            new = f"source_{new}"
        renamed.append(new)
    return renamed
