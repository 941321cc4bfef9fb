"""Embedded colour profiles: the same pixels as a viewer shows; a damaged or foreign one changes nothing."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from deepgen.data.images import decode_image
from tests.helpers.color_profiles import adobe_rgb, grey, press

ADOBE = adobe_rgb()
GREEN = (60, 200, 60)  # in Adobe RGB; in sRGB it is (0, 201, 37), as row 11 of the faults says


def encoded(image: Image.Image, form: str, profile: bytes | None, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, icc_profile=profile, **options)
    return stream.getvalue()


def flat(mode: str, color: object) -> Image.Image:
    return Image.new(mode, (16, 16), color)  # type: ignore[arg-type]


def pixel(data: bytes) -> tuple[int, ...]:
    found = decode_image(data)
    assert found.shape == (16, 16, 3)
    return tuple(int(value) for value in found[8, 8])


def near(found: tuple[int, ...], wanted: tuple[int, ...], levels: int = 2) -> bool:
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= levels


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
    ],
)
def test_adobe_rgb_becomes_srgb(form: str, options: dict[str, object]) -> None:
    assert near(pixel(encoded(flat("RGB", GREEN), form, ADOBE, **options)), (0, 201, 37), 3)
    assert near(pixel(encoded(flat("RGB", GREEN), form, None, **options)), GREEN, 3)


def test_srgb_stays_as_it_is_bit_for_bit() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode_image(encoded(Image.fromarray(pixels), "PNG", profile)), pixels)


def test_cmyk_is_read_by_its_profile() -> None:
    cyan = flat("CMYK", (255, 0, 0, 0))
    with_profile = pixel(encoded(cyan, "JPEG", press(), quality=100, subsampling=0))
    lab = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    wanted = lab.apply(Image.frombytes("LAB", (1, 1), bytes([round(86.7 * 2.55), 226, 226]))).getpixel((0, 0))
    assert isinstance(wanted, tuple) and near(with_profile, wanted, 4)
    assert near(pixel(encoded(cyan, "JPEG", None, quality=100)), (0, 255, 255))


def test_greys_are_read_by_their_profile() -> None:
    light = round(255 * ((64 / 255) ** 1.0 * 1.055 ** (12 / 5)) ** (5 / 12) - 255 * 0.055)  # 25 % of the light, in sRGB
    assert near(pixel(encoded(flat("L", 64), "PNG", grey(1.0))), (light,) * 3)
    assert near(pixel(encoded(flat("I;16", 64 * 257), "PNG", grey(1.0))), (light,) * 3)
    assert near(pixel(encoded(flat("LA", (64, 255)), "PNG", grey(1.0))), (light,) * 3)


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_transparent_colors_are_converted_before_they_lie_on_white(alpha: int) -> None:
    color = tuple(round(c * alpha / 255 + 255 - alpha) for c in (0, 201, 37))
    assert near(pixel(encoded(flat("RGBA", (*GREEN, alpha)), "PNG", ADOBE)), color)
    palette = flat("RGB", GREEN).quantize(2)
    assert near(pixel(encoded(palette, "PNG", ADOBE)), (0, 201, 37))


@pytest.mark.parametrize(
    ("mode", "color", "profile"),
    [
        ("RGB", GREEN, ADOBE[:100]),
        ("RGB", GREEN, ADOBE[:-40]),
        ("RGB", GREEN, b"no profile"),
        ("RGB", GREEN, ADOBE.replace(b"RGB ", b"XXXX")),
        ("RGB", GREEN, grey(1.0)),
        ("RGB", GREEN, press()),
        ("CMYK", (0, 255, 0, 0), ADOBE),
    ],
)
def test_a_damaged_or_foreign_profile_changes_nothing(mode: str, color: object, profile: bytes) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    plain = pixel(encoded(flat(mode, color), form, None))
    assert pixel(encoded(flat(mode, color), form, profile)) == plain


def test_an_image_with_a_profile_is_turned_like_any_other() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (20, 10), GREEN)
    image.paste((0, 0, 0), (0, 0, 10, 10))
    found = decode_image(encoded(image, "PNG", ADOBE, exif=exif))
    assert found.shape == (20, 10, 3)
    assert near(tuple(found[15, 5]), (0, 201, 37)) and near(tuple(found[5, 5]), (0, 0, 0))
