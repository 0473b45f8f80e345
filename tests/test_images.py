"""Image files of every kind to RGB, and the one resize."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mvision.errors import UserError
from mvision.structures.images import BadImage, image_size, read_image, resize_image, write_image
from tests.coco_files import picture

IMAGE = picture()


def _save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_png_is_exact_and_rgb(tmp_path: Path) -> None:
    assert np.array_equal(read_image(_save(tmp_path / "a.png", Image.fromarray(IMAGE))), IMAGE)


def test_jpeg_has_the_pixels_that_pil_reads(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.jpg", Image.fromarray(IMAGE), quality=95)
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert np.abs(read_image(path).astype(int) - expected).max() <= 2


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _save(tmp_path / f"a.{suffix}", Image.fromarray(cv2.GaussianBlur(IMAGE, (9, 9), 3)), exif=exif)
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).astype(int)
    found = read_image(path)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 1
    height, width, turned = image_size(path)
    assert (height, width) == expected.shape[:2]
    assert turned == (orientation >= 5)
    assert read_image(path, rotate=False).shape == IMAGE.shape


def test_modes_become_rgb(tmp_path: Path) -> None:
    grey = IMAGE[..., 0]
    found = read_image(_save(tmp_path / "grey.png", Image.fromarray(grey)))
    assert np.array_equal(found, np.stack([grey] * 3, axis=-1))
    found = read_image(_save(tmp_path / "grey.jpg", Image.fromarray(grey), quality=95))
    assert found.shape == IMAGE.shape
    assert np.abs(found.astype(int) - grey[..., None]).mean() < 4

    rgba = np.dstack((IMAGE, np.zeros_like(grey)))  # the colour below full transparency stays
    assert np.array_equal(read_image(_save(tmp_path / "rgba.png", Image.fromarray(rgba))), IMAGE)

    deep = grey.astype(np.uint16) * 257
    assert np.array_equal(read_image(_save(tmp_path / "16.png", Image.fromarray(deep)))[..., 0], grey)

    palette = Image.fromarray(IMAGE).quantize(16)
    found = read_image(_save(tmp_path / "palette.png", palette))
    assert np.array_equal(found, np.asarray(palette.convert("RGB")))

    cmyk = Image.fromarray(IMAGE).convert("CMYK")
    found = read_image(_save(tmp_path / "cmyk.jpg", cmyk, quality=95))
    assert np.abs(found.astype(int) - IMAGE).mean() < 12


def _jpeg() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(200, 200)).save(stream, "JPEG")
    return stream.getvalue()


def _png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(200, 200)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "not an image"),
        (_jpeg()[:3000], "truncated"),
        (_png()[:3000], "truncated|broken"),
        (_jpeg()[:100] + b"\xff\xd9", "Truncated"),
    ],
)
def test_damaged_files_are_named_with_a_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(BadImage, match=reason) as caught:
        read_image(path)
    assert caught.value.path == str(path)
    assert caught.value.reason
    assert "\n" not in str(caught.value)


def test_opencv_4_does_not_fill_a_truncated_jpeg_with_grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda data, flags: np.full((200, 200, 3), 128, np.uint8))
    (tmp_path / "a.jpg").write_bytes(_jpeg())
    assert (read_image(tmp_path / "a.jpg") == 128).all()
    (tmp_path / "a.jpg").write_bytes(_jpeg()[:-500])
    with pytest.raises(BadImage, match="truncated"):
        read_image(tmp_path / "a.jpg")


def test_missing_file() -> None:
    with pytest.raises(BadImage, match="No such file"):
        read_image("nowhere.jpg")
    with pytest.raises(BadImage, match="No such file"):
        image_size("nowhere.jpg")


def test_jpeg_followed_by_other_data_is_read(tmp_path: Path) -> None:
    path = tmp_path / "with_video.jpg"
    path.write_bytes(_jpeg() + bytes(10_000))
    assert read_image(path).shape == (200, 200, 3)


def test_large_jpeg_is_decoded_no_larger_than_needed(tmp_path: Path) -> None:
    path = _save(tmp_path / "big.jpg", Image.fromarray(picture(400, 600)))
    assert read_image(path).shape == (400, 600, 3)
    assert read_image(path, at_least=(200, 300)).shape == (200, 300, 3)
    assert read_image(path, at_least=(201, 300)).shape == (400, 600, 3)
    assert read_image(path, at_least=(40, 60)).shape == (50, 75, 3)


def test_a_turned_jpeg_is_decoded_no_larger_than_needed(tmp_path: Path) -> None:
    """What is needed refers to the upright picture, here 600 x 400."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = _save(tmp_path / "big.jpg", Image.fromarray(picture(400, 600)), exif=exif)
    assert read_image(path, at_least=(300, 200)).shape == (300, 200, 3)
    assert read_image(path, at_least=(200, 300)).shape == (600, 400, 3)
    assert read_image(path, at_least=(200, 300), rotate=False).shape == (200, 300, 3)


def test_writing(tmp_path: Path) -> None:
    write_image(tmp_path / "new" / "a.png", IMAGE)
    assert np.array_equal(read_image(tmp_path / "new" / "a.png"), IMAGE)
    write_image(str(tmp_path / "a.JPG"), cv2.GaussianBlur(IMAGE, (9, 9), 3))
    assert np.abs(read_image(tmp_path / "a.JPG").astype(int) - cv2.GaussianBlur(IMAGE, (9, 9), 3)).mean() < 2
    with pytest.raises(UserError, match=r"a\.xyz: no picture format of that suffix"):
        write_image(tmp_path / "a.xyz", IMAGE)
    with pytest.raises(UserError, match=r"a\.jpg: a picture of 70000 x 1 cannot be encoded"):
        write_image(tmp_path / "a.jpg", np.zeros((1, 70000, 3), np.uint8))


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.png", IMAGE)
    write = Path.write_bytes

    def fail(self: Path, data: bytes) -> int:
        write(self, bytes(data)[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(UserError, match=r"a\.png: cannot be written \(No space left on device\)"):
        write_image(tmp_path / "a.png", IMAGE)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert np.array_equal(read_image(tmp_path / "a.png"), IMAGE)


@pytest.mark.parametrize("size", [(20, 20), (33, 70), (96, 128), (48, 30)])
def test_resize_gives_the_bytes_of_pil_bilinear(size: tuple[int, int]) -> None:
    expected = np.asarray(Image.fromarray(IMAGE).resize(size[::-1], Image.Resampling.BILINEAR))
    found = resize_image(IMAGE, size)
    assert found.shape == (*size, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert found.flags.c_contiguous


def test_resize_of_a_part_and_to_the_same_size() -> None:
    part = IMAGE[5:40, 7:50]
    expected = np.asarray(Image.fromarray(np.ascontiguousarray(part)).resize((20, 16), Image.Resampling.BILINEAR))
    assert np.abs(resize_image(part, (16, 20)).astype(int) - expected).max() <= 1
    assert np.array_equal(resize_image(IMAGE, IMAGE.shape[:2]), IMAGE)
