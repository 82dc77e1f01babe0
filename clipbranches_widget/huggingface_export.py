"""Rows of a catalog as a data set of Hugging Face's `datasets` (layer 4).

Written some images at a time to an Arrow stream in the cache folder of `datasets`, which
memory-maps it: memory does not grow with the number of images.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from clipbranches_widget.errors import (
    Cancelled,
    ExportError,
    ImageReadError,
    MissingPackageError,
)
from clipbranches_widget.image_copy import image_bytes, image_file
from clipbranches_widget.storage import atomic_file

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.labels import LabelSet

Images = Literal["paths", "bytes", "thumbnails"]
Missing = Literal["error", "thumbnail"]
CLASS_NAMES = ("no", "yes")

_BATCH_ROWS = 1000
_BATCH_BYTES = 8 << 20
_N_NAMED = 5


class ImageCell(TypedDict):
    """What the Image feature of `datasets` stores for an image: one of the two, or both."""

    bytes: bytes | None
    path: str | None


def dataset_of(
    catalog: Catalog,
    rows: Sequence[int],
    columns: pa.Table,
    labels: LabelSet | None,
    *,
    images: Images,
    missing: Missing,
    cache_dir: str | Path | None,
    progress: Callable[[str, float], None] | None,
    cancel: Event | None,
) -> Dataset:
    """Make the data set; see `Result.to_huggingface`.

    Parameters
    ----------
    columns
        A line for each row, without image and label.
    labels
        Become a column of class labels, null for none; None makes no such column.
    """
    if images not in get_args(Images) or missing not in get_args(Missing):
        raise ExportError(
            "expected images='paths', 'bytes' or 'thumbnails' and missing='error' or 'thumbnail', "
            f"got {images!r} and {missing!r}"
        )
    datasets = _datasets()
    columns = columns.replace_schema_metadata().rename_columns(_free_names(columns.column_names))
    own = {"image": datasets.Image()}
    if labels is not None:
        own["label"] = datasets.ClassLabel(names=list(CLASS_NAMES))
    features = datasets.Features(
        own | dict(datasets.Features.from_arrow_schema(columns.schema).items())
    )
    cells = _cells(catalog, rows, images, missing, cancel)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser().absolute()
    place = folder / "clipbranches_widget" / f"{uuid.uuid4().hex}.arrow"
    schema = features.arrow_schema
    try:
        _write(
            place,
            schema,
            _batches(cells, rows, columns, labels, schema, progress=progress, cancel=cancel),
        )
    except (ExportError, Cancelled):
        raise
    except OSError as error:
        raise ExportError(
            f"cannot write {place}: {error.strerror or error}: check the permissions and the free "
            "space, or choose another folder with cache_dir="
        ) from error
    if progress is not None:
        progress("Done", 1.0)
    return datasets.Dataset.from_file(str(place))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            "expected Hugging Face's datasets, got no such package; "
            'run: pip install "clipbranches_widget[datasets]"'
        ) from error
    return datasets


def _free_names(names: Sequence[str]) -> list[str]:
    """Return the names of the columns, other ones for `image` and `label`."""
    renamed: list[str] = []
    for name in names:
        new = name
        while new in {"image", "label", *renamed, *(set(names) - {name})}:
            new = f"source_{new}"
        renamed.append(new)
    return renamed


def _cells(
    catalog: Catalog,
    rows: Sequence[int],
    images: Images,
    missing: Missing,
    cancel: Event | None,
) -> Iterator[ImageCell | None]:
    """Return what to store for each image; lost files are found at once, before the first."""
    files: list[Path | None] = [None] * len(rows)
    lost: dict[int, str] = {}
    if images != "thumbnails":
        for at, row in enumerate(rows):
            _stop_at(cancel)
            try:
                files[at] = image_file(catalog, row)
            except ImageReadError as error:
                lost[row] = str(error)
    if lost and missing == "error":
        raise _no_image(lost)
    return (
        _cell(catalog, row, file, images, missing) for row, file in zip(rows, files, strict=True)
    )


def _cell(
    catalog: Catalog, row: int, file: Path | None, images: Images, missing: Missing
) -> ImageCell | None:
    if file is not None and images == "paths":
        return {"bytes": None, "path": str(file)}
    try:
        if images == "thumbnails":
            return {"bytes": catalog.thumbnail(row), "path": None}
        return {"bytes": image_bytes(catalog, row), "path": None if file is None else file.name}
    except ImageReadError as error:
        if missing == "error":
            raise _no_image({row: str(error)}) from error
    try:
        return {"bytes": catalog.thumbnail(row), "path": None}
    except ImageReadError:
        return None


def _no_image(lost: dict[int, str]) -> ExportError:
    named = "; ".join(f"row {row} {reason}" for row, reason in list(lost.items())[:_N_NAMED])
    more = f"; and {len(lost) - _N_NAMED:,} more" if len(lost) > _N_NAMED else ""
    return ExportError(
        f"expected an image for every row, found none for {len(lost):,}: {named}{more}: "
        "missing='thumbnail' puts in the thumbnail of the catalog instead, or "
        "nothing where there is none either"
    )


def _batches(
    cells: Iterator[ImageCell | None],
    rows: Sequence[int],
    columns: pa.Table,
    labels: LabelSet | None,
    schema: pa.Schema,
    *,
    progress: Callable[[str, float], None] | None,
    cancel: Event | None,
) -> Iterator[pa.Table]:
    """Yield the lines of the data set, some at a time."""
    import pyarrow as pa

    def batch(first: int, gathered: list[ImageCell | None]) -> pa.Table:
        lines = columns.slice(first, len(gathered))
        own: dict[str, Any] = {"image": pa.array(gathered, schema.field("image").type)}
        if labels is not None:
            values = [labels.get(row) for row in rows[first : first + len(gathered)]]
            classes = [None if not value else int(value > 0) for value in values]
            own["label"] = pa.array(classes, schema.field("label").type)
        return pa.table(own | dict(zip(lines.column_names, lines.columns, strict=True))).cast(
            schema
        )

    gathered: list[ImageCell | None] = []
    n_bytes = first = 0
    for number, cell in enumerate(cells):
        _stop_at(cancel)
        gathered.append(cell)
        n_bytes += len((cell and cell["bytes"]) or b"")
        if len(gathered) == _BATCH_ROWS or n_bytes >= _BATCH_BYTES:
            yield batch(first, gathered)
            first, n_bytes, gathered = number + 1, 0, []
            if progress is not None:
                progress("Writing the data set", first / len(rows))
    yield batch(first, gathered)


def _stop_at(cancel: Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise Cancelled("cancelled: no data set was written")


def _write(place: Path, schema: pa.Schema, batches: Iterator[pa.Table]) -> None:
    import pyarrow as pa

    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(place) as temporary, pa.ipc.new_stream(str(temporary), schema) as writer:
        for table in batches:
            writer.write_table(table)
