"""Writing rows of a catalog out (layer 4): tables, image files, data sets of other packages.

Everything is written under a temporary name and then renamed: a file is complete or not there.
Nothing that exists is replaced unless the caller says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from clipbranches_widget.errors import Cancelled, ExportError
from clipbranches_widget.fiftyone_export import fiftyone_dataset
from clipbranches_widget.huggingface_export import Images, Missing, dataset_of
from clipbranches_widget.image_copy import CopiedImages, copy_images, make_folder
from clipbranches_widget.imagefolder import label_folders, write_imagefolder
from clipbranches_widget.integrity import identity
from clipbranches_widget.labels import LABEL_WORDS, LabelSet
from clipbranches_widget.storage import atomic_file

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from datasets import Dataset
    from numpy.typing import NDArray

    from clipbranches_widget.catalog import Catalog

Progress = Callable[[str, float], None]

LABEL_COLUMN = "label"
METADATA_KEY = b"clipbranches_widget"
"""In the metadata of an Arrow schema: JSON that names the catalog whose row ids are in it."""

# What spreadsheets take for the start of a formula, also after characters that they skip, and the
# wide forms that some of them read alike.
_FORMULA = re.compile("^[\\s\\x00]*[=+\\-@\uff1d\uff0b\uff0d\uff20]|^[\\t\\r\\n]")


class RowExport:
    """Ranked or labelled rows that can be written out."""

    __slots__ = ()

    if TYPE_CHECKING:
        catalog: Catalog
        rows: NDArray[np.int64]
        labels: LabelSet | None

    def to_arrow(self) -> pa.Table:
        """Return one line a row as an Arrow table: what `to_parquet` writes.

        The catalog's columns keep their types. The schema's metadata names the catalog, so that
        `Session.import_labels` knows whether the row ids are its own.
        """
        raise NotImplementedError

    def to_pandas(self) -> pd.DataFrame:
        """Return one line a row as a DataFrame: `to_arrow` with the types of pandas."""
        frame: pd.DataFrame = self.to_arrow().to_pandas()
        return frame

    def to_parquet(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write what `to_arrow` returns as a Parquet file; the catalog's columns keep their types.

        Parameters
        ----------
        path
            The file; its folder is made.
        overwrite
            Replace a file that is there.

        Returns
        -------
        Path
            Where the file is.

        Raises
        ------
        ExportError
            If a file is there and `overwrite` is False, or it cannot be written.
        """
        import pyarrow.parquet as pq

        with written_file(path, overwrite=overwrite) as (temporary, place):
            pq.write_table(self.to_arrow(), temporary, compression="zstd")
        return place

    def to_csv(
        self, path: str | Path, *, overwrite: bool = False, escape_formulas: bool = True
    ) -> Path:
        """Write what `to_pandas` returns as a CSV file: UTF-8, a header, as RFC 4180 has it.

        Parameters
        ----------
        path, overwrite
            As for `to_parquet`.
        escape_formulas
            Put an apostrophe before text that a spreadsheet would take for a formula: text that
            begins with ``=``, ``+``, ``-``, ``@``, a tab or a line break. Captions and file names
            can come from anyone, and a formula can send away what is in the sheet. False writes
            text as it is, for programs that only read values.

        Returns and raises as `to_parquet`.
        """
        frame = self.to_pandas()
        if escape_formulas:
            for name in frame.columns[[dtype.kind in "OUST" for dtype in frame.dtypes]]:
                frame[name] = frame[name].map(_escaped)
            frame.columns = [_escaped(name) for name in frame.columns]
        with written_file(path, overwrite=overwrite) as (temporary, place):
            # Any other line end, and the writer would not quote text that holds a return.
            frame.to_csv(temporary, index=False, encoding="utf-8", lineterminator="\r\n")
        return place

    def copy_images(
        self,
        folder: str | Path,
        *,
        link: bool = False,
        overwrite: bool = False,
        progress: Progress | None = None,
        cancel: Event | None = None,
    ) -> CopiedImages:
        """Copy the image files into a folder, or link to them: see `Result.copy_images`."""
        return copy_images(
            self.catalog,
            self.rows.tolist(),
            folder,
            link=link,
            overwrite=overwrite,
            progress=progress,
            cancel=cancel,
        )

    def to_imagefolder(
        self,
        folder: str | Path,
        *,
        labels: LabelSet | None = None,
        unlabelled: str | None = "unlabelled",
        link: bool = False,
        metadata: bool = True,
        progress: Progress | None = None,
        cancel: Event | None = None,
    ) -> CopiedImages:
        """Write the images into a folder for each label: see `Result.to_imagefolder`.

        Without `labels`, those that the rows come with.
        """
        known = self._labels(labels)
        rows = self.rows.tolist()
        return write_imagefolder(
            self.catalog,
            rows,
            label_folders(known, rows, unlabelled),
            with_labels(self._own_columns(), known),
            folder,
            metadata=metadata,
            link=link,
            progress=progress,
            cancel=cancel,
        )

    def to_huggingface(
        self,
        *,
        labels: LabelSet | None = None,
        images: Images = "paths",
        missing: Missing = "error",
        cache_dir: str | Path | None = None,
        progress: Progress | None = None,
        cancel: Event | None = None,
    ) -> Dataset:
        """Return a data set of Hugging Face's `datasets`, memory-mapped from its cache folder.

        Columns: ``image`` (Image), ``label`` (ClassLabel no and yes, null for none; where there
        are labels), and those of `to_arrow`. Needs ``pip install "clipbranches_widget[datasets]"``.

        Parameters
        ----------
        labels
            As for `to_imagefolder`.
        images
            "paths": refer to image files of this machine, and hold the bytes of all others;
            "bytes": hold the bytes of all; "thumbnails": hold the catalog's small WebP images.
        missing
            What becomes of rows whose image cannot be had: "error", or "thumbnail" to take that
            instead, and nothing (null) where there is none.
        cache_dir
            Where the data set's Arrow file lies; by default the cache folder of `datasets`.
        progress, cancel
            As for `to_imagefolder`.

        Raises
        ------
        ExportError
            If a row has no image, the file cannot be written, or an option is none of these.
        MissingPackageError
            If `datasets` is not installed.
        Cancelled
            If `cancel` was set.
        """
        return dataset_of(
            self.catalog,
            self.rows.tolist(),
            self._own_columns(),
            self._labels(labels),
            images=images,
            missing=missing,
            cache_dir=cache_dir,
            progress=progress,
            cancel=cancel,
        )

    def to_fiftyone(self, name: str | None = None, *, labels: LabelSet | None = None) -> Any:
        """Return a `fiftyone.Dataset`: a sample a row, with ``label`` and the other columns.

        Needs ``pip install fiftyone`` and the MongoDB that comes with it.

        Parameters
        ----------
        name
            Name of the data set; by default FiftyOne chooses one.
        labels
            As for `to_imagefolder`.

        Raises
        ------
        ExportError
            If the image of a row is in no file of this machine.
        MissingPackageError
            If `fiftyone` is not installed.
        """
        return fiftyone_dataset(
            self.catalog,
            self.rows.tolist(),
            self._own_columns(),
            self._labels(labels),
            name=name,
        )

    def _own_columns(self) -> pa.Table:
        """Return the columns of `to_arrow` without that of our labels."""
        return self.to_arrow()

    def _labels(self, labels: LabelSet | None) -> LabelSet | None:
        return self.labels if labels is None else labels


@contextmanager
def written_file(path: str | Path, *, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """Yield a temporary path to write, and where it will be once the block succeeds.

    Raises
    ------
    ExportError
        Something is there and `overwrite` is False, a folder is there, or writing fails.
    """
    place = Path(path).expanduser().absolute()
    if place.is_dir():
        raise ExportError(f"expected the path of a file, got a folder: {place}; add a file name")
    if place.exists() and not overwrite:
        raise ExportError(
            f"expected no file at {place}, found one: overwrite=True replaces it, or choose "
            "another path"
        )
    make_folder(place.parent)
    try:
        with atomic_file(place) as temporary:
            yield temporary, place
    except (ExportError, Cancelled):
        raise
    except OSError as error:
        raise ExportError(
            f"cannot write {place}: {error.strerror or error}: check the folder, the permissions "
            "and the free space, or choose another path"
        ) from error


def items_with(catalog: Catalog, rows: NDArray[np.int64], first: dict[str, pa.Array]) -> pa.Table:
    """Return the catalog's columns of `rows` behind others, and name the catalog in the metadata.

    ``uri`` becomes ``path``; a column of the user whose name is taken gets ``source_`` in front.
    """
    import pyarrow as pa

    items = catalog.lines(rows).drop_columns(["row"])
    taken = {*first, "path", *items.column_names}
    columns = dict(first)
    for name, column in zip(items.column_names, items.columns, strict=True):
        new = "path" if name == "uri" else name
        while new in columns or (new == "path" and name != "uri"):
            new = _free(new, taken)
        columns[new] = column
    said = json.dumps({"catalog": identity(catalog.manifest)})
    return pa.table(columns, metadata={METADATA_KEY: said.encode()})


def with_labels(table: pa.Table, labels: LabelSet | None) -> pa.Table:
    """Return a table with the labels of its rows as second column: yes, no, or null."""
    import pyarrow as pa

    if LABEL_COLUMN in table.column_names:
        names = table.column_names
        new = _free(LABEL_COLUMN, names)
        table = table.rename_columns([new if name == LABEL_COLUMN else name for name in names])
    words = np.full(len(table), None, dtype=object)
    if labels is not None:
        rows = table.column("row").to_numpy()
        words[np.isin(rows, labels.positive)] = LABEL_WORDS[1]
        words[np.isin(rows, labels.negative)] = LABEL_WORDS[-1]
    return table.add_column(1, LABEL_COLUMN, pa.array(words, pa.string()))


def _free(name: str, taken: set[str] | list[str]) -> str:
    while name in taken:
        name = f"source_{name}"
    return name


def without_escape(text: str) -> str:
    """Return a text of a CSV file without the apostrophe that `to_csv` put before it.

    >>> without_escape("'=1"), without_escape("'tis")
    ('=1', "'tis")
    """
    return text[1:] if text[:1] == "'" and _FORMULA.match(text[1:]) else text


def _escaped(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value
