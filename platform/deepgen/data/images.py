"""Images of records: decoded, turned upright and checked. Resizing and tensors are in ``loading.dataset``.

In the whole repository `read_header` alone opens bytes from elsewhere (``tests/test_house.py``). Left to itself, Pillow
tries every format it knows, whatever a file is called, and for EPS starts Ghostscript, which runs what the file says.
"""

from __future__ import annotations

import io
import struct
import subprocess
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from deepgen.data.uris import read_uri

# Formats that are accepted; Pillow decodes each of them in this process. JPEG includes MPO, which some cameras write.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "TGA")
MAX_ASPECT = 8.0  # longer by shorter side of an image that can be trained on
MAX_PIXELS = 100_000_000  # more are refused by the header; Pillow's own limit is 179 million
# What Pillow's decoders raise on damaged data. DecompressionBombError is an Exception of its own.
DECODE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,  # AVIF: "Failed to decode frame 0"
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    subprocess.SubprocessError,  # of no format above; should one come to start a program, its failure ends no run
    zlib.error,
)
_ORIENTATION = 0x0112  # of EXIF: how the stored picture is turned to stand upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow keeps it


def decode_image(data: bytes | str) -> np.ndarray:
    """Encoded image, or its path or URI -> uint8 [H, W, 3] RGB, upright by EXIF; transparent parts become white.

    Raises ValueError if it can't be read.
    """
    return np.array(open_image(data), dtype=np.uint8)


def open_image(data: bytes | str) -> Image.Image:
    """Decoded RGB image, upright, as `decode_image`. The header is judged before anything is decoded."""
    try:
        return _upright_rgb(read_header(read_uri(data) if isinstance(data, str) else data))
    except DECODE_ERRORS as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__  # a MemoryError says nothing
        raise ValueError(f"not a readable image ({why})") from error


def read_header(data: bytes) -> Image.Image:
    """Image of one of FORMATS, of which only the header has been read. Raises one of DECODE_ERRORS."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot identify image file; allowed: {', '.join(FORMATS)}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    """The image decoded, transparent parts on white. Raises one of DECODE_ERRORS, by the header where that will do."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} px; allowed: at most {MAX_PIXELS:,} pixels")
    _check_white(image)
    image.load()
    turn = _TURNS.get(_orientation(image))
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _check_white(image: Image.Image) -> None:
    """Raise ValueError for greys of which nobody says which number is white: Pillow would cut them off at 255."""
    grey16 = "allowed: 8 bits, or unsigned 16 bits from black to white"
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # a PPM's are scaled to 16 bits
        raise ValueError(f"greys of mode {image.mode}, of which white is not known; {grey16}")
    if image.mode.startswith("I;16") and isinstance(image, TiffImageFile):
        bits, first_is_white = (image.tag_v2.get(258) or (1,))[0], image.tag_v2.get(262) == 0
        if bits != 16 or first_is_white:
            raise ValueError(f"grey TIFF of {bits} bits{' with white as 0' if first_is_white else ''}; {grey16}")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Greys from 0 to 65535 in 8 bits; the one that stands for transparent becomes white."""
    grey = np.asarray(image).astype(np.uint32)
    eight = ((grey + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:
        eight[grey == image.info["transparency"]] = 255
    return Image.fromarray(eight)


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8, as far as the file has been read; 1 where it says none. A TIFF is turned by Pillow itself."""
    if image.format == "TIFF" or not any(key in image.info for key in _EXIF):
        return 1
    try:
        found = Image.Image.getexif(image).get(_ORIENTATION)  # a PngImageFile's own decodes the image
    except DECODE_ERRORS:  # a damaged note beside a sound picture, which viewers pass over too
        return 1
    return found if found in _TURNS else 1


def header_size(data: bytes | str) -> tuple[int, int] | tuple[None, None]:
    """(width, height) in pixels of the upright image, by the header; None for what lies elsewhere or is no image."""
    if isinstance(data, str):
        return None, None
    try:
        with read_header(data) as image:
            return (image.height, image.width) if _orientation(image) >= 5 else image.size
    except DECODE_ERRORS:
        return None, None


def usable_image(data: bytes | str, what: str) -> Image.Image:
    """As `open_image`. Raises ValueError, naming `what`, when it cannot be read or has an absurd shape."""
    try:
        image = open_image(data)
    except ValueError as error:
        raise ValueError(f"{what} is {error}") from error
    sides = sorted(image.size)
    if sides[1] > MAX_ASPECT * sides[0]:
        size = f"{image.width}x{image.height} px"
        raise ValueError(f"{what} is {size}; allowed: sides in a ratio of at most {MAX_ASPECT:g}")
    return image
