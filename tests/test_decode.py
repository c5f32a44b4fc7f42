import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from deploy.errors import BadInputError
from deploy.runtime.decode import MAX_PIXELS, decode, encode_png


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def gradient(height=6, width=9):
    row = np.linspace(0, 255, width, dtype=np.uint8)
    image = np.zeros((height, width, 3), np.uint8)
    image[:, :, 0] = row
    image[:, :, 1] = np.linspace(0, 255, height, dtype=np.uint8)[:, np.newaxis]
    return image


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("format", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})]
)
def test_lossless_formats_give_the_pixels_back(format, options):
    data = encoded(Image.fromarray(gradient()), format, **options)
    pixels = decode(data, name="x")
    assert pixels.dtype == np.uint8 and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, gradient())


def test_encoding_png_loses_nothing_and_repeats():
    assert encode_png(gradient()) == encode_png(gradient())
    np.testing.assert_array_equal(decode(encode_png(gradient()), name="x"), gradient())


def test_jpeg_is_decoded_closely():
    image = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    pixels = decode(encoded(Image.fromarray(image), "JPEG", quality=95), name="x")
    assert np.abs(pixels.astype(int) - image).max() <= 3


def test_the_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    data = encoded(Image.fromarray(gradient()), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data, name="x"), np.rot90(gradient(), -1))


def test_transparency_shows_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (10, 20, 30, 0)
    pixels[1, 0] = (0, 0, 0, 51)
    decoded = decode(encoded(Image.fromarray(pixels)), name="x")
    assert decoded[0, 0].tolist() == [10, 20, 30]
    assert decoded[0, 1].tolist() == [255, 255, 255]
    assert decoded[1, 0].tolist() == [204, 204, 204]


def test_a_palette_with_a_transparent_entry_shows_white():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0])
    decoded = decode(encoded(image, transparency=1), name="x")
    assert decoded.tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_become_rgb(mode):
    image = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert(mode)
    decoded = decode(encoded(image), name="x")
    assert decoded[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_a_cmyk_jpeg_keeps_its_colours():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    decoded = decode(encoded(cmyk, "JPEG", quality=95), name="x")
    np.testing.assert_allclose(decoded[8, 8], [255, 0, 0], atol=6)


def test_16_bit_grey_keeps_its_upper_bits_and_is_not_clipped():
    levels = np.array([[0, 256, 0x7FFF, 0xFFFF]], np.uint16)
    decoded = decode(encoded(Image.fromarray(levels)), name="x")
    assert decoded[0, :, 0].tolist() == [0, 1, 127, 255]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_truncated_image_is_refused_by_name(format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    with pytest.raises(BadInputError, match=r"'cut\.img'"):
        decode(data[: len(data) // 2], name="cut.img")


@pytest.mark.parametrize(
    ("width", "height"),
    [(10_000, MAX_PIXELS // 10_000 + 1), (70_000, 1), (60_000, 60_000)],
)
def test_a_small_file_that_claims_a_huge_image_is_refused_before_decoding(width, height):
    with pytest.raises(BadInputError, match=r"'bomb\.png'.*remedy: scale it down"):
        decode(png_header(width, height), name="bomb.png")


@pytest.mark.parametrize("data", [b"", b"hello, this is text\n" * 9])
def test_a_text_file_named_png_is_refused(data):
    with pytest.raises(BadInputError, match=r"'letter\.png': another format") as caught:
        decode(data, name="letter.png")
    assert "0x" not in str(caught.value)


def test_a_format_that_is_not_allowed_is_refused():
    with pytest.raises(BadInputError, match="another format"):
        decode(encoded(Image.fromarray(gradient()), "TIFF"), name="x.png")


def test_an_animation_is_refused():
    frames = [Image.fromarray(gradient()), Image.fromarray(gradient()[::-1].copy())]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    with pytest.raises(BadInputError, match=r"must be a still; found: 'film\.webp' is animated"):
        decode(data, name="film.webp")


def test_missing_pillow_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(BadInputError, match=r"pip install 'edgereg\[image\]'"):
        decode(b"", name="x")


def _reference_decode(data):
    """Every step on every image, upright or not, RGB or not."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        if not upright.has_transparency_data:
            return np.array(upright.convert("RGB"))
        pixels = np.asarray(upright.convert("RGBA")).astype(np.uint16)
    colour, alpha = pixels[:, :, :3], pixels[:, :, 3:]
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


@pytest.mark.parametrize("orientation", [None, 0, 1, 3, 6, 8, 9])
@pytest.mark.parametrize(
    ("format", "modes"),
    [
        ("JPEG", ("RGB", "L", "CMYK")),
        ("PNG", ("RGB", "RGBA", "L", "LA", "P", "1")),
        ("WEBP", ("RGB", "RGBA")),
    ],
)
def test_steps_that_are_left_out_change_no_pixel(format, modes, orientation):
    noise = np.random.default_rng(0).integers(0, 256, (23, 37, 4), dtype=np.uint8)
    options = {}
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    for mode in modes:
        image = Image.fromarray(noise)
        image = image if mode == "RGBA" else image.convert("RGB").convert(mode)
        data = encoded(image, format, **options)
        pixels = decode(data, name="x")
        assert pixels.flags.writeable and pixels.flags.c_contiguous
        np.testing.assert_array_equal(pixels, _reference_decode(data))


def test_a_transparent_colour_of_an_rgb_png_shows_white():
    pixels = np.array([[[10, 20, 30], [40, 50, 60]]], np.uint8)
    data = encoded(Image.fromarray(pixels), transparency=(10, 20, 30))
    assert decode(data, name="x").tolist() == [[[255, 255, 255], [40, 50, 60]]]
    np.testing.assert_array_equal(decode(data, name="x"), _reference_decode(data))
