"""Files that are no pictures, that want all memory or all time, and damaged ones: always a ``BadImage``."""

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvision.errors import UserError
from mvision.structures import decoding, images
from mvision.structures.decoding import LIMIT_VARIABLE, format_of
from mvision.structures.images import (
    IMAGE_SUFFIXES,
    BadImage,
    frames,
    image_size,
    picture_header,
    read_image,
    read_values,
    write_image,
)
from tests.coco_files import picture

IMAGE = picture(40, 60)
READERS = (read_image, image_size, picture_header, frames, read_values)
FORMS = {"JPEG": "jpg", "PNG": "png", "TIFF": "tif", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "PPM": "ppm"}
FORMS |= {form: suffix for form, suffix in (("JPEG2000", "jp2"), ("AVIF", "avif")) if f".{suffix}" in IMAGE_SUFFIXES}


def save(folder: Path, form: str) -> Path:
    path = folder / f"a.{FORMS[form]}"
    Image.fromarray(IMAGE).save(path, format=form)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_pillows_own_limit_does_not_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """It is 179 million pixels: an error for a JPEG of 14000 x 13000."""
    path = save(tmp_path, form)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert image_size(path) == (40, 60, False)
    assert read_image(path).shape == (40, 60, 3)
    assert read_image(path, at_least=(20, 30)).shape[0] in (20, 40)
    assert Image.MAX_IMAGE_PIXELS == 100  # others in the process may rely on it


@pytest.mark.parametrize("form", FORMS)
def test_the_size_is_limited_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    path = save(tmp_path, form)
    monkeypatch.setenv(LIMIT_VARIABLE, "7199")  # 40 * 60 * 3 = 7200
    for reader in READERS:
        with pytest.raises(BadImage, match=rf"60 x 40 pixels count as .* set .* {LIMIT_VARIABLE}=\d+") as caught:
            reader(path)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv(LIMIT_VARIABLE, str(caught.value).rpartition("=")[2])  # what the message says is enough
    assert read_image(path).shape == (40, 60, 3)


@pytest.mark.parametrize("value", ["lots", "0", "-1", "1.5", "4GB"])
def test_a_limit_that_is_no_number_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, value)
    with pytest.raises(UserError, match=rf"{LIMIT_VARIABLE}={value}: a number of bytes is needed, such as 4294967296"):
        read_image(save(tmp_path, "PNG"))


@pytest.mark.parametrize(("width", "height"), [(60000, 60000), (2**31 - 1, 2**31 - 1), (2**20, 1), (0, 40)])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM"])
def test_headers_that_claim_absurd_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, width: int, height: int
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, str(10**8))
    path = save(tmp_path, form)
    data = bytearray(path.read_bytes())
    at, size, order = {
        "JPEG": (data.find(b"\xff\xc0") + 7, 2, "big"),
        "PNG": (16, 4, "big"),
        "WEBP": (26, 2, "little"),
        "BMP": (18, 4, "little"),
        "GIF": (6, 2, "little"),
        "PPM": (0, 0, ""),
    }[form]
    if form == "PPM":
        data = bytearray(b"P6\n%d %d\n255\n" % (width, height))
    else:
        sides = (height, width) if form == "JPEG" else (width, height)
        for number, side in enumerate(sides):
            data[at + number * size : at + (number + 1) * size] = (side % 256**size).to_bytes(size, order)  # type: ignore[arg-type]
    path.write_bytes(data)
    start = time.monotonic()
    for reader in (read_image, read_values):
        try:
            reader(path)
        except BadImage:
            continue
    assert time.monotonic() - start < 2


def test_a_decoder_is_chosen_by_the_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would start Ghostscript for an EPS, whatever its name is."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.jpg").write_bytes(drawing)
    for reader in READERS:
        with pytest.raises(BadImage, match="not an image that can be read, but PostScript"):
            reader(tmp_path / "a.jpg")
    for form, suffix in (("ICO", "ico"), ("TGA", "tga"), ("PCX", "pcx"), ("SGI", "sgi"), ("IM", "im")):
        Image.fromarray(IMAGE).save(tmp_path / f"a.{suffix}", format=form)
        (tmp_path / f"a.{suffix}").rename(tmp_path / "a.png")
        with pytest.raises(BadImage, match="not an image that can be read"):
            read_image(tmp_path / "a.png")
    save(tmp_path, "PNG").rename(tmp_path / "b.jpg")
    assert np.array_equal(read_image(tmp_path / "b.jpg"), IMAGE)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS.*git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "HEIC.*convert it"),
        (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ", "what macOS keeps"),
        (b"root:x:0:0:root:/root:/bin/bash\n", "not an image that can be read"),
    ],
)
def test_what_a_file_is_instead(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    for reader in READERS:
        with pytest.raises(BadImage, match=reason) as caught:
            reader(tmp_path / "a.jpg")
        assert "root" not in caught.value.reason  # nothing of its content


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    for reader in READERS:
        with pytest.raises(BadImage, match="not a regular file"):
            reader(tmp_path / "pipe.png")
        with pytest.raises(BadImage, match="a folder, not a file"):
            reader(tmp_path)
        with pytest.raises(BadImage, match="null"):
            reader("a\0b.png")


def test_a_jpeg_of_many_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    for mode, passes in (("RGB", 10), ("CMYK", "[0-9]+")):  # the second one is decoded by Pillow
        Image.fromarray(IMAGE).convert(mode).save(path, progressive=True)
        monkeypatch.setattr(images, "MAX_SCANS", 5)
        monkeypatch.setattr(images, "MOST_WORK", 10**6)
        assert read_image(path).shape == (40, 60, 3)
        monkeypatch.setattr(images, "MOST_WORK", 10**4)
        with pytest.raises(BadImage, match=f"a progressive JPEG of {passes} passes"):
            read_image(path)
        monkeypatch.setattr(images, "MAX_SCANS", 100)
        assert read_image(path).shape == (40, 60, 3)


def test_headers_that_take_long_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.ppm").write_bytes(b"P6\n#" + b"x" * 3_000_000 + b"\n1 1\n255\nabc")
    (tmp_path / "b.ppm").write_bytes(b"P6 # a comment\n#another\n1 1\n255\nabc")
    for reader in READERS:
        with pytest.raises(BadImage, match="no size in the first 65536 bytes"):
            reader(tmp_path / "a.ppm")
    assert read_image(tmp_path / "b.ppm").tolist() == [[[97, 98, 99]]]
    path = save(tmp_path, "WEBP")
    with path.open("r+b") as file:
        file.truncate(3 << 30)  # no byte of it is on the disk
    for reader in READERS:
        with pytest.raises(BadImage, match=r"a WebP file of 3\.2 GB, and 1\.1 GB are allowed"):
            reader(path)
    path = save(tmp_path, "TIFF")
    Image.fromarray(IMAGE).save(path, save_all=True, append_images=[Image.fromarray(IMAGE)] * 4)
    assert frames(path) == 5
    monkeypatch.setattr(images, "MOST_PAGES", 3)
    assert frames(path) == 3


def test_big_pictures_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "BIG", 1000)
    inside, most = [0], [0]
    convert = images.to_array

    def slow(image: Image.Image, pixel_range: object) -> np.ndarray:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        inside[0] -= 1
        return convert(image)

    monkeypatch.setattr(images, "to_array", slow)
    path = save(tmp_path, "PNG")
    threads = [threading.Thread(target=read_image, args=(path,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_errors_of_any_kind_become_bad_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, "PNG")
    for error in (KeyError("x"), MemoryError(), OverflowError(), RecursionError(), AssertionError(), EOFError()):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
        with pytest.raises(BadImage) as caught:
            read_image(path)
        assert caught.value.reason
        assert ("not enough memory" in caught.value.reason) == isinstance(error, MemoryError)


def test_damaged_files_of_every_format(tmp_path: Path) -> None:
    """A few of the many thousands that were tried."""
    rng = random.Random(0)
    files = [(form, save(tmp_path, form).read_bytes()) for form in FORMS]
    reasons: list[str] = []
    for number in range(300):
        form, data = files[number % len(files)]
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 4, 16])):
            damaged[rng.randrange(min(len(damaged), rng.choice([60, 10**6])))] = rng.choice(
                [0, 255, rng.randrange(256)]
            )
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        path = tmp_path / f"damaged.{FORMS[form]}"
        path.write_bytes(damaged)
        for reader in READERS:
            try:
                reader(path)
            except BadImage as error:
                reasons.append(error.reason)
    assert 100 < len(reasons) < 300 * len(READERS)
    assert all(reason and "\n" not in reason for reason in reasons)


def test_no_warnings_of_pillow_reach_the_user(tmp_path: Path) -> None:
    """They name lines of Pillow's source. In another process, because pytest shows all warnings."""
    Image.fromarray(IMAGE).save(tmp_path / "exif.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\xff")
    Image.fromarray(IMAGE).quantize(9).save(tmp_path / "palette.png", transparency=bytes(range(0, 90, 10)))
    data = bytearray(save(tmp_path, "TIFF").read_bytes())
    (tmp_path / "cut.tif").write_bytes(data[:-20])
    code = (
        "import sys; from mvision.structures.images import *\n"
        "for path in sys.argv[1:]:\n"
        "    for reader in (image_size, read_image):\n"
        "        try: reader(path)\n"
        "        except BadImage: pass\n"
    )
    files = [str(tmp_path / name) for name in ("exif.jpg", "palette.png", "cut.tif")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_formats_are_told_by_their_first_bytes(tmp_path: Path) -> None:
    names = {"WEBP": "WebP", "JPEG2000": "JPEG 2000"}
    for form in FORMS:
        assert format_of(save(tmp_path, form).read_bytes()[: decoding.START]) == names.get(form, form)
    for data in (b"", b"P", b"P7\n", b"BA", b"\xff\xd8", b"RIFF\0\0\0\0WAVE"):
        assert format_of(data) is None


@pytest.mark.parametrize(("name", "side"), [("a.webp", 16384), ("a.jpg", 65501), ("a.jfif", 65501)])
def test_formats_with_a_largest_side(tmp_path: Path, name: str, side: int) -> None:
    with pytest.raises(UserError, match=rf"picture of {side} x 1 cannot be encoded: .* a side; use \.png"):
        write_image(tmp_path / name, np.zeros((1, side, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []
    write_image(tmp_path / "a.png", np.zeros((1, side, 3), np.uint8))
