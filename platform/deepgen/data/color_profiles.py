"""Converts images with an embedded colour profile (ICC) to sRGB, which is what the models were trained on.

Cameras and photo software embed profiles such as Adobe RGB, Display P3 and CMYK of a press. Read without it, (60, 200,
60) in Adobe RGB would be a paler green than the (0, 201, 37) that viewers show.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_SRGB = ImageCms.createProfile("sRGB")
_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # Pillow's modes for the colour spaces of profiles
_SAME = 2  # most levels by which two versions of sRGB differ
# What littlecms raises, through Pillow, for damaged profiles and profiles of no use for an image.
_PROFILE_ERRORS = (ImageCms.PyCMSError, OSError, TypeError, ValueError)


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image in mode RGB and sRGB, without its transparency. An image that is already so stays as it is.

    profile: its ICC profile. Without one, with a damaged one or one for other colours than the image has, the values
    count as sRGB.
    """
    found = _conversion(profile) if profile else None
    # A grey image may have a profile for RGB, but not the other way round; CMYK needs one for CMYK.
    if found is None or (found.input_mode == "CMYK") != (image.mode == "CMYK"):
        return _plain(image)
    if found.input_mode == "L" and image.mode not in ("1", "L", "LA", "La"):
        return _plain(image)
    converted = found.apply(_in_mode(image, found.input_mode))
    converted.info.pop("icc_profile", None)
    return converted


def _plain(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else _in_mode(image, "RGB")


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in ("RGBa", "La"):  # colours times alpha
        image = image.convert(image.mode.upper())
    return image if image.mode == mode else image.convert(mode)


@lru_cache(maxsize=16)
def _conversion(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """The conversion from a profile to sRGB; None if there is nothing to convert, or the profile is of no use."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES[opened.profile.xcolor_space]
        made = ImageCms.buildTransform(opened, _SRGB, mode, "RGB")
        return None if mode == "RGB" and _changes_nothing(made) else made
    except (*_PROFILE_ERRORS, LookupError):
        return None


def _changes_nothing(conversion: ImageCms.ImageCmsTransform) -> bool:
    levels = np.linspace(0, 255, 18).astype(np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
    found = np.asarray(conversion.apply(Image.fromarray(colors)))
    return int(np.abs(found.astype(int) - colors).max()) <= _SAME
