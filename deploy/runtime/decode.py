"""From the bytes of an image file to RGB pixels. The only file of deploy that imports Pillow.

Four formats are allowed, whatever the file's name says, and the size is checked before a pixel is
decoded: a PNG of a few kilobytes can claim gigabytes.
"""

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploy.errors import BadInputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "MAX_SIDE",
    "decode",
    "encode_png",
    "has_pillow",
    "is_exact",
    "load_pillow",
]

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")  # taken for images in a folder

MAX_PIXELS = 50_000_000
MAX_SIDE = 65_535  # JPEG's own limit; a row of 50 million pixels would be scaled to gigabytes

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16")
_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright


def decode(data: bytes, *, name: str) -> NDArray[np.uint8]:
    """Decode an image: upright as its EXIF orientation says, transparency on white.

    Args:
        data: The file's content: PNG, JPEG, WEBP or BMP. 16-bit samples keep their upper 8 bits.
        name: The file's name, for errors.

    Returns:
        (h, w, 3) uint8 RGB.

    Raises:
        BadInputError: It is no such image, truncated, animated, too large, or Pillow is missing.
    """
    pillow = load_pillow()
    try:
        with warnings.catch_warnings():
            # Of large images, which are refused below, and of damaged EXIF, which says nothing
            # that could be applied.
            warnings.simplefilter("ignore")
            with pillow.Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_header(image, name)
                return _to_rgb(_upright(image))
    except BadInputError:
        raise
    except pillow.Image.DecompressionBombError as error:
        raise _too_large(name, str(error)) from error
    except pillow.UnidentifiedImageError as error:  # whose message is an address in memory
        raise _not_an_image(name, "another format, or damaged from the start") from error
    except Exception as error:  # on damaged bytes Pillow's decoders raise almost anything
        raise _not_an_image(name, str(error)) from error


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode (h, w, 3) uint8 RGB without loss.

    Raises:
        BadInputError: Pillow is missing.
    """
    buffer = io.BytesIO()
    load_pillow().Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def is_exact(data: bytes) -> bool:
    """Whether every decoder gives the same pixels: JPEG's and WebP's differ by a few grey levels.

    Args:
        data: An encoded image.
    """
    return data.startswith(_PNG_SIGNATURE)


def has_pillow() -> bool:
    """Whether images can be decoded here."""
    try:
        load_pillow()
    except BadInputError:
        return False
    return True


def load_pillow() -> Any:
    """The package PIL.

    Raises:
        BadInputError: It is missing.
    """
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise BadInputError(
            "images are decoded by Pillow",
            found="no Pillow here",
            remedy="pip install 'edgereg[image]'",
        ) from error
    return PIL


def _check_header(image: "Image", name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise _too_large(name, f"{width} x {height} pixels")
    # The second image of an MPO, which phones write as .jpg, is a preview and no animation.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise BadInputError(
            "an image must be a still",
            found=f"'{name}' is animated",
            remedy="save one of its frames",
        )
    if image.mode not in _MODES:
        raise BadInputError(
            "an image must be grey, palette, RGB or CMYK, of at most 16 bits",
            found=f"'{name}' has Pillow's mode {image.mode}",
            remedy="convert it to RGB",
        )


def _too_large(name: str, found: str) -> BadInputError:
    return BadInputError(
        f"an image may have {MAX_PIXELS} pixels, and {MAX_SIDE} on a side",
        found=f"'{name}': {found}",
        remedy="scale it down first",
    )


def _not_an_image(name: str, found: str) -> BadInputError:
    return BadInputError(
        "an image must be a whole PNG, JPEG, WEBP or BMP file",
        found=f"'{name}': {found}",
        remedy="check the file; convert other formats first",
    )


def _upright(image: "Image") -> "Image":
    """Turn an image as its EXIF says; an upright one is not copied, as exif_transpose would."""
    image.load()  # a PNG's EXIF may follow its pixels
    if image.getexif().get(_ORIENTATION, 1) == 1:
        return image
    turned: Image = load_pillow().ImageOps.exif_transpose(image)
    return turned


def _to_rgb(image: "Image") -> NDArray[np.uint8]:
    if image.mode == "RGB" and not image.has_transparency_data:
        return np.array(image)  # a copy: asarray's could not be written to
    if image.mode == "I;16":
        # Pillow's own conversion clips it at 255, though of 16-bit colour it keeps the upper bits.
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, np.newaxis], 3, axis=2)
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    pixels = np.asarray(image.convert("RGBA")).astype(np.uint16)
    colour, alpha = pixels[:, :, :3], pixels[:, :, 3:]
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
