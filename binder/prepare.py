# ruff: noqa: INP001 - a script of the image, not a module
"""Bake the demo into an image: build its catalog, try it, open JupyterLab on the quickstart.

Run by ``postBuild`` in the repository's folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import clipbranches_widget as cb

START_PAGE = "/lab/tree/notebooks/quickstart.ipynb"
CONFIG_FILE = "jupyter_lab_config.json"


def main() -> None:
    """Do all three; stop with an error if any part of the demo does not work."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config-folder",
        type=Path,
        default=Path(sys.prefix) / "etc" / "jupyter",
        help="where JupyterLab reads its configuration (default: the environment's)",
    )
    folder = parser.parse_args().config_folder
    catalog = cb.demo(progress=False)
    print(catalog)
    print(try_out(catalog))
    print("start page set in", set_start_page(folder))


def try_out(catalog: cb.Catalog) -> cb.Result:
    """Search and refine once: nothing is missing, and what compiles on first use is compiled."""
    with tempfile.TemporaryDirectory() as folder:
        session = cb.Session(catalog, path=Path(folder) / "trial.session.jsonl")
        hits = session.search("animals with wings")
        session.label(positive=hits.rows[:3], negative=hits.rows[-3:])
        return session.refine()


def set_start_page(folder: Path) -> Path:
    """Write JupyterLab's start page into its configuration folder; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / CONFIG_FILE
    settings = json.loads(file.read_text()) if file.is_file() else {}
    settings.setdefault("LabApp", {})["default_url"] = START_PAGE
    file.write_text(json.dumps(settings, indent=2) + "\n")
    return file


if __name__ == "__main__":
    main()
