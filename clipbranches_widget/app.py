"""The Explorer as a web app without cells, served by Voila (layer 6; an optional package)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipbranches_widget.errors import MissingPackageError

if TYPE_CHECKING:
    from clipbranches_widget.session import Session

NOTEBOOK = "explorer.ipynb"

_CELL = """\
import os

import clipbranches_widget as cb

os.chdir({folder!r})
cb.Explorer(cb.Session(cb.open({catalog!r}), {session!r}))
"""


def serve(session: Session, *, port: int = 8866, open_browser: bool = True) -> None:
    """Serve the Explorer of a session until interrupted.

    Only this machine can reach it, by an address with a token in it, which Voila prints. Every
    page that is opened has a kernel of its own; all act on the one session file.

    Parameters
    ----------
    session
        What the app shows.
    port
        First port to try.
    open_browser
        Open the page; else only print its address.

    Raises
    ------
    MissingPackageError
        Voila is not installed.
    """
    try:
        from voila.app import Voila
    except ImportError as error:
        raise MissingPackageError(
            "expected the package voila for the app, got none; run: "
            'pip install "clipbranches_widget[app]"'
        ) from error
    with tempfile.TemporaryDirectory(prefix="clipbranches-app-") as folder:
        notebook = write_notebook(session, Path(folder) / NOTEBOOK)
        options = [
            str(notebook),
            f"--port={port}",
            "--Voila.ip=127.0.0.1",
            "--Voila.auto_token=True",
            "--VoilaConfiguration.show_tracebacks=True",
        ]
        if not open_browser:
            options.append("--no-browser")
        Voila.launch_instance(argv=options)


def write_notebook(session: Session, path: Path) -> Path:
    """Write the notebook that Voila shows: one cell with the Explorer of a session."""
    source = _CELL.format(
        folder=str(Path.cwd()), catalog=str(session.catalog.path), session=str(session.path)
    )
    cell: dict[str, Any] = {
        "id": "explorer",
        "cell_type": "code",
        "execution_count": None,
        "metadata": {},
        "outputs": [],
        "source": source,
    }
    notebook = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {
            "title": f"Image explorer: {session.catalog.path.stem}",
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        },
        "cells": [cell],
    }
    path.write_text(json.dumps(notebook, indent=1), encoding="utf-8")
    return path
