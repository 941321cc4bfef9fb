"""Decodes the images of records, converts them to sRGB, turns them upright and checks them.

``loading.dataset`` resizes them.

`read_header` is the only function in this repository that opens image bytes from outside (``tests/test_house.py``). By
default Pillow tries every format it knows, whatever the file's name. For EPS it starts Ghostscript, which executes the
program in the file.
"""

from __future__ import annotations

import io
import struct
import subprocess
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from deepgen.data.color_profiles import to_srgb
from deepgen.data.uris import read_uri

# Accepted formats. Pillow decodes all of them within this process. JPEG includes MPO, which some cameras write.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "TGA")
MAX_ASPECT = 8.0  # largest ratio of longer to shorter side in training
MAX_PIXELS = 100_000_000  # larger images are rejected by their header; Pillow's own limit is 179 million
# Errors that Pillow's decoders raise on damaged data. DecompressionBombError derives directly from Exception.
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
    subprocess.SubprocessError,  # no format above starts a program today; if one ever does, its failure ends no run
    zlib.error,
)
_ORIENTATION = 0x0112  # EXIF tag: the rotation or mirroring that turns the stored image upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRIP = 1 << 20  # pixels
# Bytes of memory that decoding takes for each pixel, as measured, in formats that need more than the 4 of the result.
_DECODING = {"WEBP": 16, "AVIF": 10, "JPEG2000": 20, "JPEG in several scans": 10}
_MAX_DECODING = 640_000_000  # bytes of memory for one image
# Formats that Pillow decodes in Python, by the name of the decoder: most pixels, which take about half a minute.
_IN_PYTHON = {"qoi": ("QOI", 25_000_000), "ppm": ("PPM of odd depth", 8_000_000), "ppm_plain": ("plain PPM", 8_000_000)}
_EXIF = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow stores EXIF in `Image.info`


class UnknownWhiteError(ValueError):
    """A grey image whose value for white is not known."""


def decode_image(data: bytes | str) -> np.ndarray:
    """Encoded image, or its path or URI -> uint8 [H, W, 3] sRGB, upright by EXIF; transparent parts become white.

    An embedded colour profile is applied; without one, or with a damaged one, the values count as sRGB.

    Raises ValueError if the image is unreadable.
    """
    return np.array(open_image(data), dtype=np.uint8)


def open_image(data: bytes | str) -> Image.Image:
    """Like `decode_image`, but returns a Pillow image. The header is checked before the pixels are decoded."""
    try:
        return _upright_rgb(read_header(read_uri(data) if isinstance(data, str) else data))
    except DECODE_ERRORS as error:
        raise _unreadable(error) from error


def check_pixels(data: bytes) -> None:
    """Decode an image and drop it. Raises ValueError as `open_image` does, but holds only one copy of the pixels."""
    try:
        image = read_header(data)
        _load(image)
        _upright_rgb(_rows_of(image, 0))
    except DECODE_ERRORS as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> ValueError:
    why = " ".join(str(error).split())[:400] or type(error).__name__  # a MemoryError has no message
    return ValueError(f"not a readable image ({why})")


def read_header(data: bytes) -> Image.Image:
    """An image in one of FORMATS, with only its header read. Raises one of DECODE_ERRORS."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot identify image file; allowed: {', '.join(FORMATS)}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    """The decoded image, upright, transparent parts on white. Raises one of DECODE_ERRORS, by the header if it can."""
    _load(image)
    turn, profile = _TURNS.get(_orientation(image)), image.info.get("icc_profile")
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    upright = _on_white(image, profile) if image.has_transparency_data else to_srgb(image, profile)
    return upright if turn is None else upright.transpose(turn)


def _on_white(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image with transparency, in sRGB on white."""
    alpha = image.convert("RGBA").getchannel("A")
    white = Image.new("RGB", image.size, (255, 255, 255))
    return Image.composite(to_srgb(image, profile), white, alpha)


def _load(image: Image.Image) -> None:
    """Decode the pixels, unless the header tells that they are too many or without a known white."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} px; allowed: at most {MAX_PIXELS:,} pixels")
    kind, most = _most_pixels(image)
    if image.width * image.height > most:
        raise Image.DecompressionBombError(f"{image.width}x{image.height} px; allowed: at most {most:,} as {kind}")
    _check_white(image)
    image.load()


def _most_pixels(image: Image.Image) -> tuple[str, int]:
    """What an image whose header has been read is, and how many pixels such an image may have."""
    decoder = image.tile[0].codec_name if isinstance(image, ImageFile) and image.tile else ""
    if decoder in _IN_PYTHON:
        return _IN_PYTHON[decoder]
    if isinstance(image, TiffImageFile) and decoder == "libtiff":
        piece = _piece_of_tiff(image)
        return f"TIFF in pieces of {piece:,} bytes", (_MAX_DECODING - piece) // 4
    several = isinstance(image, JpegImageFile) and _in_several_scans(image)
    kind = "JPEG in several scans" if several else image.format or ""
    return kind, _MAX_DECODING // _DECODING.get(kind, 4)


def _piece_of_tiff(image: TiffImageFile) -> int:
    """Bytes of a strip or tile once it is unpacked, which libtiff does as a whole, however small the image is."""
    tags = image.tag_v2
    width, height = tags.get(322, image.width), tags.get(323, min(tags.get(278, image.height), image.height))
    bits = tags.get(258, (1,))  # of each colour, or once for all
    return int(width * height * max(bits) * max(len(bits), tags.get(277, 1)) // 8)


def _in_several_scans(image: JpegImageFile) -> bool:
    """Whether a JPEG does not have all its colours in one scan, like progressive ones: libjpeg then holds all of it.

    Of the files of several images (MPO), where Pillow forgets the place of the scan, this is presumed.
    """
    assert image.fp is not None  # the image is not loaded yet
    header = b"\xff\xda" + struct.pack(">HB", 6 + 2 * image.layers, image.layers)
    image.fp.seek(max(0, image.fp.tell() - len(header) - 2 * image.layers - 3))  # Pillow has read to the scan's header
    return "progressive" in image.info or image.fp.read(len(header)) != header


def _rows_of(image: Image.Image, first: int) -> Image.Image:
    """Some rows of a decoded image, about _STRIP pixels, as an image of the same kind."""
    rows = max(1, _STRIP // image.width)
    part = image.crop((0, first, image.width, min(first + rows, image.height)))
    part.format = image.format
    return part


def _check_white(image: Image.Image) -> None:
    """Raise UnknownWhiteError for grey images whose value for white is unknown: Pillow would clip them at 255."""
    grey16 = "allowed: 8 bits, or unsigned 16 bits from black to white"
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # Pillow scales PPM to 16 bits
        raise UnknownWhiteError(f"greys of mode {image.mode}, of which white is not known; {grey16}")
    if image.mode.startswith("I;16") and isinstance(image, TiffImageFile):
        bits, first_is_white = (image.tag_v2.get(258) or (1,))[0], image.tag_v2.get(262) == 0
        if bits != 16 or first_is_white:
            raise UnknownWhiteError(f"grey TIFF of {bits} bits{' with white as 0' if first_is_white else ''}; {grey16}")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Convert greys from 0..65535 to 8 bits. The grey that marks transparent pixels becomes white."""
    grey = np.asarray(image).astype(np.uint32)
    eight = ((grey + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:
        eight[grey == image.info["transparency"]] = 255
    return Image.fromarray(eight)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, from what has been read so far; 1 if absent, or for TIFF, which Pillow itself turns."""
    if image.format == "TIFF" or not any(key in image.info for key in _EXIF):
        return 1
    try:
        found = Image.Image.getexif(image).get(_ORIENTATION)  # PngImageFile overrides getexif and decodes the image
    except DECODE_ERRORS:  # damaged EXIF beside an intact image; viewers ignore it too
        return 1
    return found if found in _TURNS else 1


def header_size(data: bytes | str) -> tuple[int, int] | tuple[None, None]:
    """(width, height) in pixels of the upright image, from its header; (None, None) for a path, URI or non-image."""
    if isinstance(data, str):
        return None, None
    try:
        with read_header(data) as image:
            return (image.height, image.width) if _orientation(image) >= 5 else image.size
    except DECODE_ERRORS:
        return None, None


def usable_image(data: bytes | str, what: str) -> Image.Image:
    """Like `open_image`. Raises ValueError, naming `what`, if the image is unreadable or longer than MAX_ASPECT."""
    try:
        image = open_image(data)
    except ValueError as error:
        raise ValueError(f"{what} is {error}") from error
    sides = sorted(image.size)
    if sides[1] > MAX_ASPECT * sides[0]:
        size = f"{image.width}x{image.height} px"
        raise ValueError(f"{what} is {size}; allowed: sides in a ratio of at most {MAX_ASPECT:g}")
    return image
