"""The JSON file of a saved concept (layer 3): header, hash, and the trees and boxes in it.

::

    {"format": "clipbranches concept", "format_version": 1,
     ...                                     what `clipbranches_widget.concept` keeps
     "boxes": [{"ranges": [[column, low, high], ...], "value", "tree"}, ...],
     "forest": {"base_margin", "n_columns",
                "trees": [{"column": [...], "threshold", "left", "right", "value"}, ...]},
     "created": {"clipbranches_widget": "0.1.0", "time_utc": "..."},
     "self": "BLAKE2b of everything else"}

float32 values are written as the shortest decimal that reads back as the same float32.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.boxes import N_CODES, LeafBox
from clipbranches_widget.errors import ConceptError
from clipbranches_widget.storage import write_json
from clipbranches_widget.trees import Tree, TreeEnsemble

FORMAT = "clipbranches concept"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 256 * 2**20
MAX_TREE_DEPTH = 64

_SAVE_AGAIN = "restore it from a backup, or save the concept again from its session"
_NODE_FIELDS = ("column", "threshold", "left", "right")


def write_concept(path: Path, body: Mapping[str, Any], *, overwrite: bool) -> int:
    """Write a concept file, atomically; return its size in bytes.

    Raises
    ------
    ConceptError
        Something is at `path` and `overwrite` is False, or it cannot be written there.
    """
    if not overwrite and os.path.lexists(path):
        raise ConceptError(
            f"expected nothing at {path}, but it exists: pass overwrite=True to replace it, or "
            "choose another path"
        )
    full = {"format": FORMAT, "format_version": FORMAT_VERSION, **body}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**full, "self": _hash(full)})
        return path.stat().st_size
    except OSError as error:
        raise ConceptError(
            f"cannot write the concept to {path}: {error.strerror or error}: check the folder, "
            "the permissions and the free space, or choose another path"
        ) from error


def read_concept(path: Path) -> dict[str, Any]:
    """Read what `write_concept` wrote, header and hash checked.

    Raises
    ------
    ConceptError
        There is none, it is unreadable, something else, of another format version, or its
        content does not match its hash; the message says what to do.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _not_a_concept(path, f"a file of {path.stat().st_size:,} bytes")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConceptError(
            f"expected a concept file at {path}, found none: "
            "session.save_concept(name, path) makes one"
        ) from error
    except UnicodeDecodeError as error:
        raise _not_a_concept(path, "bytes that are no text") from error
    except OSError as error:
        raise ConceptError(
            f"cannot read the concept {path}: {error.strerror or error}: "
            "check the path and the permissions"
        ) from error
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConceptError(f"{path} is not readable JSON ({error}): {_SAVE_AGAIN}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise _not_a_concept(path, "JSON of something else")
    version, created = value.get("format_version"), value.get("created")
    if version != FORMAT_VERSION:
        by = created.get("clipbranches_widget") if isinstance(created, dict) else None
        raise ConceptError(
            f"{path}: expected concept format {FORMAT_VERSION}, got {version}, written by "
            f"clipbranches_widget {by}: upgrade (pip install --upgrade clipbranches_widget), or "
            "save the concept again from its session with this release"
        )
    if value.pop("self", None) != _hash(value):
        raise ConceptError(
            f"{path}: its content does not match its own hash, so it was edited or damaged: "
            f"{_SAVE_AGAIN}"
        )
    return value


def malformed(path: Path, error: Exception) -> ConceptError:
    """Return the error for a file whose entries are not what they should be."""
    return ConceptError(f"{path}: an entry is missing or malformed ({error!r}): {_SAVE_AGAIN}")


def exact(values: NDArray[np.float32]) -> list[float]:
    """Return float32 values as floats that print shortest and read back as the same float32.

    >>> exact(np.array([0.1], np.float32)), float(np.float32(0.1))
    ([0.1], 0.10000000149011612)
    """
    return [float(str(each)) for each in values.astype(np.float32)]


def boxes_to_list(boxes: tuple[LeafBox, ...]) -> list[dict[str, Any]]:
    """Return boxes as plain values; `boxes_from_list` reads them back."""
    return [
        {
            "ranges": [list(each) for each in box.ranges],
            "value": exact(np.array([box.value], np.float32))[0],
            "tree": box.tree,
        }
        for box in boxes
    ]


def boxes_from_list(stored: Any, n_columns: int) -> tuple[LeafBox, ...]:
    """Read boxes; raises KeyError, TypeError or ValueError on anything else."""
    boxes = []
    for each in stored:
        bounds = {int(column): (int(low), int(high)) for column, low, high in each["ranges"]}
        if len(bounds) != len(each["ranges"]) or not all(0 <= c < n_columns for c in bounds):
            raise ValueError(f"expected one range a column below {n_columns}, got {each}")
        value = float(np.float32(_finite(each["value"])))
        boxes.append(LeafBox.from_bounds(bounds, value=value, tree=int(each["tree"])))
    return tuple(boxes)


def forest_to_dict(forest: TreeEnsemble) -> dict[str, Any]:
    """Return an ensemble as plain values; `forest_from_dict` reads it back."""
    return {
        "base_margin": exact(np.array([forest.base_margin]))[0],
        "n_columns": forest.n_columns,
        "trees": [
            {
                **{name: getattr(tree, name).tolist() for name in _NODE_FIELDS},
                "value": exact(tree.value),
            }
            for tree in forest.trees
        ],
    }


def forest_from_dict(stored: Any) -> TreeEnsemble:
    """Read an ensemble; raises KeyError, TypeError or ValueError on anything else.

    Every index is checked, so that no reader of the trees can run astray.
    """
    n_columns = int(stored["n_columns"])
    if n_columns < 1:
        raise ValueError(f"expected at least one column, got {n_columns}")
    trees = tuple(_tree(each, n_columns) for each in stored["trees"])
    return TreeEnsemble(np.float32(_finite(stored["base_margin"])), trees, n_columns)


def _tree(stored: Any, n_columns: int) -> Tree:
    nodes = {name: _integers(stored[name]) for name in _NODE_FIELDS}
    value = np.array([_finite(each) for each in stored["value"]], dtype=np.float32)
    n_nodes = len(value)
    if not n_nodes or any(len(each) != n_nodes for each in nodes.values()):
        raise ValueError("expected the arrays of a tree to be equally long")
    column, threshold = nodes["column"], nodes["threshold"]
    if not ((column >= 0) & (column < n_columns)).all():
        raise ValueError(f"expected split columns below {n_columns}")
    if not ((threshold >= 0) & (threshold <= N_CODES)).all():
        raise ValueError(f"expected split thresholds from 0 to {N_CODES}")
    _check_shape(nodes["left"].tolist(), nodes["right"].tolist())
    return Tree(**nodes, value=value)


def _check_shape(left: list[int], right: list[int]) -> None:
    """Check that children follow their parent, have no other, and that no path is too long."""
    depth = {0: 0}
    for node, children in enumerate(zip(left, right, strict=True)):
        if node not in depth or children == (-1, -1):
            continue
        for child in children:
            if not node < child < len(left) or child in depth or depth[node] >= MAX_TREE_DEPTH:
                raise ValueError(f"expected a tree, got node {node} with children {children}")
            depth[child] = depth[node] + 1
    if any(left[node] != -1 or right[node] != -1 for node in range(len(left)) if node not in depth):
        raise ValueError("expected every split to be within reach of the root")


def _integers(stored: Any) -> NDArray[np.int32]:
    if not all(type(each) is int and abs(each) < 2**31 for each in stored):
        raise ValueError("expected a list of integers")
    return np.array(stored, dtype=np.int32)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or abs(number) > float(np.finfo(np.float32).max):
        raise ValueError(f"expected a finite float32, got {value}")
    return number


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _not_a_concept(path: Path, what: str) -> ConceptError:
    return ConceptError(
        f'{path} is not a concept file: expected JSON with "format": "{FORMAT}", got {what}: '
        "give the path that session.save_concept wrote"
    )


def _hash(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
