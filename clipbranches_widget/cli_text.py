"""Text from catalogs on a terminal (layer 6): captions and file names may hold anything."""

from __future__ import annotations


def one_line(text: object) -> str:
    r"""Return text with a mark in place of everything that a terminal or a script would act on.

    That is line breaks, tabs, escape sequences, and marks of direction.

    >>> one_line("a\tb\x1b[31mc")
    'a�b�[31mc'
    """
    return "".join(each if each.isprintable() else "\ufffd" for each in str(text))
