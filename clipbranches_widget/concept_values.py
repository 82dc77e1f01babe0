"""Checked values of a concept: its name, its texts and its thresholds (layer 3)."""

from __future__ import annotations

from typing import Any

from clipbranches_widget.errors import ConceptError

MAX_NAME_LENGTH = 200


def checked_name(name: str) -> str:
    """Return the name of a concept; raises ConceptError for anything but one short line."""
    is_name = isinstance(name, str) and name.strip() and "\n" not in name
    if not is_name or len(name) > MAX_NAME_LENGTH:
        raise ConceptError(
            f"expected a name of one line, at most {MAX_NAME_LENGTH} characters, got {name!r:.100}"
        )
    return plain(name)


def plain(text: str) -> str:
    """Replace what UTF-8 cannot hold, as in paths of undecodable bytes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def share(value: Any) -> float:
    """Return a threshold as a float; raises ValueError outside of (0, 1)."""
    number = float(value)
    if not 0.0 < number < 1.0:
        raise ValueError(f"expected a threshold between 0 and 1, got {value}")
    return number
