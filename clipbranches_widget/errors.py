"""The error tree (layer 0): one root, each leaf also inherits the matching builtin.

Every message says what was expected, what came, and what to do next.
"""

from __future__ import annotations


class ClipBranchesError(Exception):
    """Root of every error this package raises on purpose."""


class CatalogError(ClipBranchesError, ValueError):
    """A catalog cannot be built or used as asked."""


class CatalogNotFoundError(CatalogError, FileNotFoundError):
    """There is no catalog at the given path."""


class CatalogExistsError(CatalogError, FileExistsError):
    """Something is already at the path a new catalog was to be written to."""


class CatalogCorruptError(CatalogError):
    """The pieces of a catalog disagree; the message names the piece and the repair."""


class ImageReadError(ClipBranchesError, OSError):
    """One image cannot be decoded; the message is the reason."""


class EncoderError(ClipBranchesError, RuntimeError):
    """An encoder cannot be loaded or cannot do what was asked of it."""


class WeightsUnavailableError(EncoderError):
    """Model weights are neither on this machine nor downloadable."""


class QueryError(ClipBranchesError, ValueError):
    """A query is empty, ambiguous, or does not fit the catalog."""


class LabelError(ClipBranchesError, ValueError):
    """Labels contradict each other or name rows that do not exist."""


class RefineError(ClipBranchesError, ValueError):
    """A round cannot run on the given labels, or the model is not supported."""


class SessionFileError(ClipBranchesError, ValueError):
    """A session file is unreadable or belongs to another catalog."""


class ConceptError(ClipBranchesError, ValueError):
    """A concept file is unreadable, or does not fit the catalog it is applied to."""


class ExportError(ClipBranchesError, OSError):
    """A file cannot be written as asked, or is there already."""


class ClusterError(ClipBranchesError, RuntimeError):
    """A Dask cluster cannot be used: no workers, a closed client, other files on the workers."""


class Cancelled(ClipBranchesError, RuntimeError):  # noqa: N818 - a request honoured, not a fault
    """The caller asked a running operation to stop."""


class MissingPackageError(ClipBranchesError, ImportError):
    """An optional package is not installed; the message names the pip command."""
