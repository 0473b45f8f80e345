"""Pictures that are read window by window: the pixels are those of ``read_image``, whatever the TIFF is like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvision.inference import large_images
from mvision.inference.large_images import DecodedPicture, TiffPicture, open_large
from mvision.structures import decoding
from mvision.structures.images import BadImage, read_image

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")
HEIGHT, WIDTH = 213, 301
TILED = {"tile": (64, 48)}
STRIPS = {"rowsperstrip": 50}


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_images, "BIG", 1000)


def noise(*shape: int, dtype: Any = np.uint8, high: int = 256) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, high, (-(-HEIGHT // 8), -(-WIDTH // 8), *shape))
    return coarse.repeat(8, 0).repeat(8, 1)[:HEIGHT, :WIDTH].astype(dtype)


KINDS: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "strips": (noise(3), STRIPS),
    "one piece": (noise(3), {}),
    "one piece, other byte order": (noise(3, dtype=np.uint16, high=60000), {"byteorder": ">", "photometric": "rgb"}),
    "tiles": (noise(3), TILED),
    "LZW": (noise(3), {**TILED, "compression": "lzw", "predictor": True}),
    "deflate in strips": (noise(3), {**STRIPS, "compression": "zlib"}),
    "JPEG": (noise(3), {**TILED, "compression": "jpeg"}),
    "JPEG in YCbCr": (noise(3), {"tile": (64, 48), "compression": "jpeg", "photometric": "ycbcr"}),
    "planes": (noise(3).transpose(2, 0, 1), {**TILED, "photometric": "rgb", "planarconfig": "separate"}),
    "transparency": (noise(4), {**TILED, "photometric": "rgb", "extrasamples": ["unassalpha"]}),
    "grey": (noise(), TILED),
    "grey from white": (noise(), {**STRIPS, "photometric": "miniswhite"}),
    "grey of 16 bits": (noise(dtype=np.uint16, high=60000), {**TILED, "compression": "zlib"}),
    "colours of 16 bits": (noise(3, dtype=np.uint16, high=60000), {**TILED, "photometric": "rgb"}),
    "BigTIFF": (noise(3), {**TILED, "bigtiff": True}),
}


def write(path: Path, values: np.ndarray, **options: Any) -> Path:
    byteorder, bigtiff = options.pop("byteorder", "<"), options.pop("bigtiff", False)
    with tifffile.TiffWriter(path, byteorder=byteorder, bigtiff=bigtiff) as file:
        file.write(values, metadata=None, **{"photometric": "rgb" if values.ndim == 3 else "minisblack", **options})
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_parts_of_the_picture(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, options = KINDS[kind]
    path = write(tmp_path / "a.tif", values, **options)
    expected = read_image(path)
    picture = open_large(path, rows=64)
    assert isinstance(picture, TiffPicture)
    assert picture.size == (HEIGHT, WIDTH)
    tolerance = 3 if "YCbCr" in kind else 0  # two decoders of JPEG
    for top, left, bottom, right in ((0, 0, 64, 64), (10, 45, 150, 301), (149, 0, 213, 301), (60, 47, 66, 49)):
        found = picture.window(left, top, right, bottom)
        assert found.flags["C_CONTIGUOUS"]
        np.testing.assert_allclose(found.astype(int), expected[top:bottom, left:right].astype(int), atol=tolerance)
    monkeypatch.setattr(large_images, "REDUCED_SIDE", 100)
    small = picture.reduced()
    assert small.shape == (71, 100, 3)
    assert abs(small.astype(float).mean() - expected.mean()) < 1.5
    picture.release()
    assert picture.window(0, 0, 9, 9).shape == (9, 9, 3)  # it is opened again


def test_deep_values_are_scaled_and_the_guess_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(dtype=np.uint16, high=4000), **TILED)
    picture = open_large(path, 64, (0.0, 4095.0))
    assert isinstance(picture, TiffPicture)
    assert picture.notes == []
    expected = read_image(path, pixel_range=(0.0, 4095.0))
    assert np.array_equal(picture.window(0, 0, WIDTH, HEIGHT), expected)
    guessed = open_large(path, 64)
    assert guessed is not None
    assert ["more than 8 bits" in note for note in guessed.notes] == [True]


def test_only_what_a_window_needs_is_decoded_and_little_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(3), compression="zlib", **TILED)
    picture = open_large(path, rows=64)
    assert isinstance(picture, TiffPicture)
    picture.release()
    decoded: list[int] = []
    original = picture._decoded
    picture._decoded = lambda key: (decoded.append(key), original(key))[1]  # type: ignore[method-assign]
    for left in (0, 40, 80):
        picture.window(left, 0, left + 64, 64)
    assert decoded == [0, 1, 2]  # each once
    for top in range(0, HEIGHT - 64, 32):
        for left in range(0, WIDTH - 64, 32):
            picture.window(left, top, left + 64, top + 64)
            assert sum(part.size for part in picture._kept.values()) <= picture._most
    assert len(decoded) == len(set(decoded))


@pytest.mark.parametrize(
    ("options", "values", "reason"),
    [
        ({"extratags": [(274, 3, 1, 6, True)]}, noise(3), "orientation 6"),
        ({"photometric": "minisblack"}, noise(dtype=np.float32), "float32"),
        ({"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, noise(), "PALETTE"),
    ],
)
def test_others_are_decoded_whole_and_it_is_said(
    tmp_path: Path, options: dict[str, Any], values: np.ndarray, reason: str
) -> None:
    path = write(tmp_path / "a.tif", values, **options)
    picture = open_large(path, 64)
    assert isinstance(picture, DecodedPicture)
    assert reason in picture.notes[0]
    expected = read_image(path)
    assert np.array_equal(picture.window(5, 7, 100, 90), expected[7:90, 5:100])
    assert picture.size == expected.shape[:2]


def test_small_pictures_are_none_of_its_business(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_images, "BIG", decoding.BIG)
    Image.fromarray(noise(3)).save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", write(tmp_path / "a.tif", noise(3), **TILED)):
        assert open_large(path, 64) is None


def test_what_does_not_fit_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that may not be decoded whole: windows of a TIFF, and a way out for others."""
    monkeypatch.setenv("MVISION_MAX_IMAGE_BYTES", "100000")
    path = write(tmp_path / "a.tif", noise(3), **TILED)
    assert isinstance(open_large(path, 64), TiffPicture)
    Image.fromarray(noise(3)).save(tmp_path / "a.png")
    with pytest.raises(BadImage, match=r"a\.png: 301 x 213 pixels.*MVISION_MAX_IMAGE_BYTES=.*or convert it to a tiled"):
        open_large(tmp_path / "a.png", 64)
    turned = write(tmp_path / "b.tif", noise(3), extratags=[(274, 3, 1, 6, True)])
    with pytest.raises(BadImage, match="are allowed.*cannot be read in parts: it is stored turned"):
        open_large(turned, 64)
    with pytest.raises(BadImage, match="its parts are of 301 x 213 pixels"):
        large_images._windowed(write(tmp_path / "c.tif", noise(3), compression="zlib", rowsperstrip=HEIGHT), 64, None)
    monkeypatch.setattr(large_images, "find_spec", lambda name: None)
    with pytest.raises(BadImage, match="are allowed.*the package tifffile is missing: pip install"):
        open_large(path, 64)
    monkeypatch.delenv("MVISION_MAX_IMAGE_BYTES")
    whole = open_large(path, 64)
    assert isinstance(whole, DecodedPicture)
    assert "decoded whole: the package tifffile is missing: pip install" in whole.notes[0]


def test_damage_is_named_where_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(3), compression="zlib", **STRIPS)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        offset = file.pages.first.dataoffsets[3]
    data[offset : offset + 40] = bytes(40)
    path.write_bytes(data)
    picture = open_large(path, 64)
    assert picture is not None
    picture.window(0, 0, 50, 50)
    with pytest.raises(BadImage, match=r"a\.tif: cannot be decoded at row 150"):
        picture.window(0, 140, 50, 160)
    path = write(tmp_path / "b.tif", noise(3))
    path.write_bytes(path.read_bytes()[:-50_000])
    picture = open_large(path, 64)
    assert picture is not None
    with pytest.raises(BadImage, match="truncated|ends before row"):
        picture.window(0, HEIGHT - 5, 5, HEIGHT)
