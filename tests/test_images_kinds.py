"""Every format, kind of pixels and orientation becomes the right RGB; frames are counted; headers are enough."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin, features

from mvision.structures import pixels
from mvision.structures.images import (
    IMAGE_SUFFIXES,
    UNREADABLE_SUFFIXES,
    frames,
    image_size,
    picture_header,
    read_image,
    write_image,
)
from tests.coco_files import picture

IMAGE = cv2.GaussianBlur(picture(), (5, 5), 2)
GREY = IMAGE[..., 0]
ALL = np.stack([GREY] * 3, axis=-1)


def difference(path: Path, expected: np.ndarray, **options: object) -> float:
    found = read_image(path, **options)  # type: ignore[arg-type]
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert found.shape == expected.shape
    return float(np.abs(found.astype(int) - expected).mean())


@pytest.mark.parametrize(
    ("suffix", "form", "tolerance"),
    [
        *(("jfif", "JPEG", 4), ("jpe", "JPEG", 4), ("JPG", "JPEG", 4), ("mpo", "MPO", 4), ("gif", "GIF", 12)),
        *(("jp2", "JPEG2000", 1), ("j2k", "JPEG2000", 1), ("ppm", "PPM", 0), ("bmp", "BMP", 0), ("webp", "WEBP", 6)),
        *(("avif", "AVIF", 6), ("TIF", "TIFF", 0), ("png", "PNG", 0)),
    ],
)
def test_formats(tmp_path: Path, suffix: str, form: str, tolerance: float) -> None:
    if f".{suffix.lower()}" in UNREADABLE_SUFFIXES:
        pytest.skip("this Pillow has no decoder")
    path = tmp_path / f"a.{suffix}"
    assert path.suffix.lower() in IMAGE_SUFFIXES
    Image.fromarray(IMAGE).save(path, format=form, **({"quality": 95} if form in ("JPEG", "MPO") else {}))
    assert difference(path, IMAGE) <= tolerance
    assert image_size(path) == (48, 64, False)


def test_an_ending_has_a_decoder_or_is_listed_as_without() -> None:
    assert {".jfif", ".jpe", ".gif", ".ppm", ".pgm", ".pbm", ".mpo", ".png", ".tif"} <= IMAGE_SUFFIXES
    assert (".avif" in IMAGE_SUFFIXES) == bool(features.check("avif"))
    assert (".jp2" in IMAGE_SUFFIXES) == bool(features.check("jpg_2000"))
    assert {".heic", ".jxl", ".dng"} <= UNREADABLE_SUFFIXES
    assert not IMAGE_SUFFIXES & UNREADABLE_SUFFIXES


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize(
    ("name", "image", "expected", "options"),
    [
        ("one.png", Image.fromarray(GREY > 128), np.repeat((GREY > 128)[..., None] * 255, 3, 2), {}),
        ("one.tif", Image.fromarray(GREY > 128), np.repeat((GREY > 128)[..., None] * 255, 3, 2), {}),
        ("grey.pgm", Image.fromarray(GREY), ALL, {}),
        ("opacity.png", Image.fromarray(np.dstack([GREY, GREY // 2])), ALL, {}),
        ("key.png", Image.fromarray(IMAGE), IMAGE, {"transparency": (250, 10, 20)}),
        ("cmyk.tif", Image.fromarray(IMAGE).convert("CMYK"), IMAGE, {}),
        ("ycc.tif", Image.fromarray(IMAGE).convert("YCbCr"), IMAGE, {}),
        ("deep.tif", Image.fromarray(GREY.astype(np.uint16) * 257), ALL, {}),
        ("signed.tif", Image.fromarray(GREY.astype(np.int32)), ALL, {}),
        ("float.tif", Image.fromarray(GREY.astype(np.float32) * 255 / GREY.max()), ALL * (255 / GREY.max()), {}),
    ],
)
def test_kinds_of_pixels(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    image: Image.Image,
    expected: np.ndarray,
    options: dict,
    pieces: bool,
) -> None:
    if pieces:  # as pictures of many million pixels are converted
        monkeypatch.setattr(pixels, "PIECE", 5 * 64)
    image.save(tmp_path / name, **options)
    assert difference(tmp_path / name, expected) <= 2


@pytest.mark.parametrize("options", [{}, {"transparency": 3}, {"transparency": bytes(range(0, 160, 10))}])
def test_palettes(tmp_path: Path, options: dict) -> None:
    palette = Image.fromarray(IMAGE).quantize(16)
    palette.save(tmp_path / "a.png", **options)
    assert difference(tmp_path / "a.png", np.asarray(palette.convert("RGB"))) == 0


def test_lab_and_multiplied_colours(tmp_path: Path) -> None:
    lab, srgb = (ImageCms.createProfile(name) for name in ("LAB", "sRGB"))
    converted = ImageCms.applyTransform(Image.fromarray(IMAGE), ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    assert converted is not None
    converted.save(tmp_path / "lab.tif")
    assert difference(tmp_path / "lab.tif", IMAGE) <= 2
    opaque = Image.fromarray(np.dstack([IMAGE, np.full_like(GREY, 255)]))
    assert np.array_equal(np.asarray(pixels.to_rgb(opaque.convert("RGBa"))), IMAGE)


def test_byte_orders_of_tiff(tmp_path: Path) -> None:
    values = GREY.astype(np.uint16) * 16
    Image.frombytes("I;16B", (64, 48), values.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    assert (tmp_path / "big.tif").read_bytes()[:2] == b"MM"
    assert difference(tmp_path / "big.tif", ALL, pixel_range=(0.0, 4080.0)) <= 1


@pytest.mark.parametrize("opacity", [False, True])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_in_every_colour(tmp_path: Path, suffix: str, opacity: bool) -> None:
    """Pillow keeps the upper 8 of the 16 bits; of 12-bit values 4 would be left."""
    values = IMAGE.astype(np.uint16) * 16
    stored = np.dstack([values[..., ::-1], np.full_like(values[..., 0], 40000)]) if opacity else values[..., ::-1]
    path = tmp_path / f"a.{suffix}"
    cv2.imwrite(str(path), stored)
    assert picture_header(path).deep
    notes: list[str] = []
    assert difference(path, IMAGE, pixel_range=(0.0, 4080.0), notes=notes) <= 0.5
    assert notes == []
    assert difference(path, IMAGE // 16, notes=notes) == 0
    assert "scaled by the range of its type" in notes[0]


TURNS = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "packed.tif"])
def test_orientation_in_other_formats_than_jpeg(tmp_path: Path, name: str, orientation: int) -> None:
    path = tmp_path / name
    options: dict = {"lossless": True} if name == "a.webp" else {}
    if path.suffix == ".tif":
        options = {"tiffinfo": {274: orientation}, "compression": "tiff_lzw" if name == "packed.tif" else None}
    else:
        options["exif"] = Image.Exif()
        options["exif"][274] = orientation
    Image.fromarray(IMAGE).save(path, **options)
    turn = TURNS[orientation]
    image = Image.fromarray(IMAGE)
    expected = np.asarray(image if turn is None else image.transpose(Image.Transpose(turn)))
    assert difference(path, expected) == 0
    assert difference(path, IMAGE, rotate=False) == 0
    assert image_size(path) == (*expected.shape[:2], orientation >= 5)


def _chunk(kind: bytes, data: bytes) -> bytes:
    import zlib

    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


@pytest.mark.parametrize("late", [False, True])
def test_the_size_of_a_png_is_read_without_its_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Pillow decodes a PNG to look for EXIF behind its pixels. It is only done where there is something behind them."""
    path = tmp_path / "a.png"
    Image.fromarray(IMAGE).save(path)
    if late:
        exif = Image.Exif()
        exif[274] = 6
        data, end = path.read_bytes(), _chunk(b"IEND", b"")
        path.write_bytes(data.removesuffix(end) + _chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + end)
    decoded: list[int] = []
    load = PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: (decoded.append(1), load(self))[1])
    assert image_size(path) == ((64, 48, True) if late else (48, 64, False))
    assert bool(decoded) == late


def test_damaged_exif_is_no_reason_to_lose_a_picture(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png"):
        Image.fromarray(IMAGE).save(tmp_path / name, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
        assert difference(tmp_path / name, IMAGE) < 5
        assert image_size(tmp_path / name) == (48, 64, False)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif", "a.mpo", "a.avif"])
def test_frames_are_counted_and_the_first_one_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix not in IMAGE_SUFFIXES:
        pytest.skip("this Pillow has no decoder")
    form = {".tif": "TIFF"}.get(path.suffix, path.suffix[1:].upper())
    first, *others = (Image.fromarray(part) for part in (IMAGE, 255 - IMAGE, IMAGE[::-1].copy()))
    first.save(path, format=form)
    assert frames(path) == 1
    assert not picture_header(path).several
    first.save(path, format=form, save_all=True, append_images=others)
    assert frames(path) == 3
    assert picture_header(path).several
    notes: list[str] = []
    assert difference(path, IMAGE, notes=notes) < 12
    assert notes == ["picture with several frames or pages: the first one is used"]


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".tif", ".webp", ".bmp"])
def test_writing_with_other_endings(tmp_path: Path, suffix: str) -> None:
    write_image(tmp_path / f"a{suffix}", IMAGE)
    assert difference(tmp_path / f"a{suffix}", IMAGE) < 4
