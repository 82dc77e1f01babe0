"""Read one image from a path, bytes, a URL, an archive, a table or an ``openmoji:`` name (layer 3).

Everything that can be wrong with an image file ends here, in one
`ImageReadError` whose message is a reason a person can act on. Whatever a file
holds, the result is one upright 8-bit RGB image:

- alpha (RGBA, LA, palette transparency) is laid over white;
- 16-bit grey is scaled by 1 / 257, so that 65535 becomes 255 (Pillow's own conversion
  clips it to white); 32-bit and float grey is stretched from its minimum to its maximum
  unless it lies within [0, 65535] or [0, 1];
- of an animation the first frame is taken; EXIF orientation is applied.

The size limit is ours, checked from the header before any pixel is decoded. Pillow's own
limit warns first and only then raises, and it is a setting of the whole process.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias
from urllib.parse import urlsplit
from urllib.request import url2pathname

from clipbranches_widget import archives, cells, remote
from clipbranches_widget.errors import ImageReadError
from clipbranches_widget.openmoji import OPENMOJI_FULL_PX, openmoji_svg, render_svg

if TYPE_CHECKING:
    from PIL.Image import Image

Encoded: TypeAlias = bytes | Callable[[], bytes] | None
"""The bytes of an image file, or what reads them when called; None to read its uri."""

MAX_PIXELS = 256_000_000
"""Largest image read by default: above any phone camera (200 megapixels), 768 MB as RGB."""

# What Pillow's plugins raise on hostile bytes. Not `Exception`: a mistake of ours (NameError) and
# Ctrl-C must surface. `Warning` is here for processes that turn warnings into errors.
_DECODER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    Warning,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """One decoded image and what the catalog records about its file.

    Attributes
    ----------
    image
        RGB, upright; smaller than the file's when it was read with `target_size`.
    width, height
        Pixels of the whole upright image, before any reduction.
    content_hash
        `content_hash` of the encoded bytes.
    """

    image: Image
    width: int
    height: int
    content_hash: str


def content_hash(data: bytes) -> str:
    """Return the 128-bit BLAKE2b hash of encoded image bytes, 32 hexadecimal digits.

    Examples
    --------
    >>> content_hash(b"")
    'cae66941d9efbd404e4d88758ea67670'
    """
    return blake2b(data, digest_size=16).hexdigest()


def read_image(
    source: str | Path | bytes | Image,
    *,
    target_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image:
    """Return `source` as one upright 8-bit RGB image.

    Parameters
    ----------
    source
        A path, encoded bytes, or a PIL image (which is converted, never changed).
    target_size
        Pixels the shorter side is needed at. A JPEG is then decoded at 1/2, 1/4 or 1/8 where the
        shorter side stays at least twice that: several times faster, and a resize down to
        `target_size` still averages over pixels. Other formats are not reduced.
    max_pixels
        Larger images are refused from their header alone.

    Raises
    ------
    ImageReadError
        The file is missing, a folder, empty, truncated, corrupt, too large or no image.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return _decode(source, "image", target_size=None, max_pixels=max_pixels)[0]
    if isinstance(source, bytes):
        return _decode_bytes(source, "image bytes", target_size, max_pixels)[0]
    return _decode_bytes(_read_file(Path(source)), str(source), target_size, max_pixels)[0]


def load(
    uri: str,
    *,
    root: Path | None = None,
    data: bytes | None = None,
    target_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    check: Callable[[str], str | None] | None = None,
) -> LoadedImage:
    """Read the image a catalog names by `uri`, with its full size and content hash.

    Parameters
    ----------
    uri
        A path (absolute, ``file://``, or relative to `root`); a URL of `remote.PROTOCOLS`; a file
        of an archive, see `archives`; a cell of a table, see `cells`; or ``openmoji:HEXCODE``.
    root
        Folder of relative paths; the current folder when None.
    data
        The encoded bytes, where they are at hand: then `uri` is only a name.
    target_size, max_pixels
        See `read_image`.
    check
        Called with the content hash before anything is decoded; returns why the image is not
        wanted, or None.

    Raises
    ------
    ImageReadError
        See `read_image`; also for a URL that does not answer, and for an image that `check` does
        not want: the message is its reason.
    MissingPackageError
        An ``openmoji:`` name without the packages of the ``demo`` extra, or a URL without the
        package for its protocol.
    """
    if uri.startswith("openmoji:"):
        data, target_size = openmoji_svg(uri.removeprefix("openmoji:")), None
    elif data is None:
        data = read_encoded(uri, root)
    hashed = content_hash(data)
    if check is not None and (refused := check(hashed)) is not None:
        raise ImageReadError(refused)
    encoded = render_svg(data, uri) if uri.startswith("openmoji:") else data
    image, width, height = _decode_bytes(encoded, uri, target_size, max_pixels)
    return LoadedImage(image, width, height, hashed)


def resolve(uri: str, root: Path | None = None) -> Image:
    """Return the full image a catalog names by `uri`; see `load`.

    A drawing has no size of its own: it is drawn larger than for the model, to be looked at.
    """
    if uri.startswith("openmoji:"):
        encoded = render_svg(openmoji_svg(uri.removeprefix("openmoji:")), uri, OPENMOJI_FULL_PX)
        return _decode_bytes(encoded, uri, None, MAX_PIXELS)[0]
    return load(uri, root=root).image


def local_path(uri: str, root: Path | None) -> Path:
    """Return the path a URI names; raises ImageReadError for a remote one."""
    kind = remote.scheme(uri)
    if kind == "file":
        return Path(url2pathname(urlsplit(uri).path))
    if kind:
        raise ImageReadError(
            f"{uri}: expected a file on this machine, got a remote address; download it first"
        )
    return Path(uri) if root is None else Path(root) / uri


def image_suffix(file: IO[bytes]) -> str:
    """Return the ending for the name of an image, such as ``.jpg``, from its header alone.

    Empty where Pillow does not know it for an image.
    """
    try:
        opened = _open(file)
    except _DECODER_ERRORS:
        return ""
    if opened is None:
        return ""
    return ".jpg" if opened.format == "JPEG" else f".{(opened.format or 'img').lower()}"


def read_encoded(uri: str, root: Path | None) -> bytes:
    """Return the encoded bytes that a URI names; not for ``openmoji:``, which is drawn.

    Raises
    ------
    ImageReadError
        They cannot be had; the message is the reason.
    """
    if not uri:
        raise ImageReadError("expected the path or URL of an image, got none")
    kind = remote.scheme(uri)
    if kind in archives.KINDS:
        return archives.read_member(uri)
    if kind in cells.KINDS or kind == cells.UNSAVED:
        return cells.read_cell(uri)
    if kind and kind != "file":
        return remote.read_bytes(uri)
    return _read_file(local_path(uri, root))


def _read_file(path: Path) -> bytes:
    """Return the bytes of a non-empty regular file."""
    path = path.expanduser()
    if path.is_dir():
        raise ImageReadError(f"{path}: a folder, not an image file")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageReadError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ImageReadError(f"{path}: cannot be read: {error}") from error


def _decode_bytes(
    data: bytes, name: str, target_size: int | None, max_pixels: int
) -> tuple[Image, int, int]:
    if not data:
        raise ImageReadError(f"{name}: the file is empty (zero bytes)")
    try:
        opened = _open(BytesIO(data))
    except _DECODER_ERRORS as error:
        raise ImageReadError(f"{name}: corrupt or unsupported image: {_reason(error)}") from error
    if opened is None:
        raise ImageReadError(f"{name}: not an image in a format Pillow reads")
    with opened:
        return _decode(opened, name, target_size=target_size, max_pixels=max_pixels)


def _open(file: IO[bytes]) -> Image | None:
    """Return a lazily decoded image, or None when no plugin knows the bytes of the file.

    `PIL.Image.open` without its size check: ours follows, and Pillow's would warn.
    """
    from PIL import Image

    tried: set[str] = set()
    head = file.read(16)
    for load_plugins in (Image.preinit, Image.init):
        load_plugins()
        for name in [plugin for plugin in Image.ID if plugin not in tried]:
            tried.add(name)
            factory, accepts = Image.OPEN[name]
            # A string in place of True says why the plugin cannot (a codec left out of the build).
            if accepts is not None and accepts(head) is not True:
                continue
            file.seek(0)
            try:
                return factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue  # how a plugin says "not mine after all"
    return None


def _decode(
    image: Image, name: str, *, target_size: int | None, max_pixels: int
) -> tuple[Image, int, int]:
    """Return the RGB image and the width and height of the upright original."""
    width, height = image.size
    if width * height > max_pixels:
        raise ImageReadError(
            f"{name}: too large: expected at most {max_pixels / 1e6:,.0f} megapixels, got "
            f"{width} x {height} = {width * height / 1e6:,.0f}; make it smaller or raise max_pixels"
        )
    try:
        if target_size is not None:
            image.draft(None, (2 * target_size, 2 * target_size))
        image.load()
        orientation = _orientation(image)
        upright = _upright(_to_rgb(image), orientation)
    except _DECODER_ERRORS as error:
        raise ImageReadError(f"{name}: corrupt or truncated: {_reason(error)}") from error
    if orientation >= 5:  # EXIF 5-8 turn the image by a quarter
        width, height = height, width
    return upright, width, height


def _orientation(image: Image) -> int:
    """Return the EXIF orientation, 1 (upright) where there is none or it cannot be read."""
    from PIL import ExifTags

    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:
        return 1  # broken metadata does not make the pixels unreadable
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image if orientation == 1 else image.transpose(turns[orientation])


def _to_rgb(image: Image) -> Image:
    """Return a decoded image of any mode as 8-bit RGB (a copy unless it is RGB already)."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey(image: Image) -> Image:
    """Return 16-bit, 32-bit or float grey as RGB; see the module docstring for the scale."""
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = (values - low) * (255.0 / max(high - low, 1e-300))
    return Image.fromarray(np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)).convert("RGB")


def _reason(error: BaseException) -> str:
    """Return what the decoder said, or at least the kind of its error."""
    return str(error).strip() or type(error).__name__
