"""Prediction on tiles, from pictures in memory, files and the command line to what is on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from mvision import create_model
from mvision.errors import UserError
from mvision.inference import large_images, tiled
from mvision.inference.predict import predict_images
from mvision.inference.predict_sources import predict_sources
from mvision.inference.tiled import predict_tiled
from mvision.inference.tiles import Tiling
from mvision.structures.images import read_image
from tests.fake_model import FakeModel, paint, save, written

# Of a red, green or blue rectangle the fake model finds the box exactly where a tile has the size of its input.
TILE = (96, 128)
TILING = Tiling(TILE, 0.25)
OBJECTS = [
    (0, (100, 70, 124, 94)),  # at the corner of four tiles
    (1, (10, 10, 500, 60)),  # larger than a tile
    (2, (300, 100, 330, 330)),
    (0, (560, 300, 600, 330)),
    (1, (200, 100, 216, 116)),
]
SIZE = (350, 620)


@pytest.fixture
def model() -> FakeModel:
    return FakeModel().eval()


def found_boxes(result: Any) -> list[tuple[int, list[int]]]:
    return sorted((int(label), box.round().astype(int).tolist()) for label, box in zip(result.labels, result.boxes))


EXPECTED = sorted((label, list(box)) for label, box in OBJECTS)


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("whole", [True, False])
def test_objects_are_found_once_and_complete(model: FakeModel, whole: bool, batch_size: int | None) -> None:
    """In pictures of several tiles beside one of a single tile, which share batches."""
    scene, small = paint(SIZE, OBJECTS), paint((80, 120), [(2, (10, 10, 60, 60))])
    results = predict_tiled(model, [scene, small, scene[:, ::-1]], Tiling(TILE, 0.25, whole), 0.3, batch_size)
    assert [result.size for result in results] == [SIZE, (80, 120), SIZE]
    assert found_boxes(results[0]) == EXPECTED
    assert len(results[1]) == 1
    assert len(results[2]) == len(OBJECTS)
    assert results[0].scores.tolist() == sorted(results[0].scores.tolist(), reverse=True)
    assert max(model.batch_sizes) == (batch_size or 1)


def test_a_picture_that_is_not_larger_than_a_tile_gives_the_same_to_the_last_bit(tmp_path: Path) -> None:
    model = create_model("tiny", tasks=["detection", "instance-seg"], num_classes=3, image_size=64).eval()
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, size, np.uint8) for size in ((90, 120, 3), (64, 64, 3), (100, 100, 3))]
    plain = model.predict(images, threshold=0.0)
    for tile in (120, (100, 120)):
        for one, other in zip(plain, model.predict(images, threshold=0.0, tile=tile), strict=True):
            assert len(one) > 0
            assert np.array_equal(one.boxes, other.boxes)
            assert np.array_equal(one.scores, other.scores)
            assert one.masks is not None
            assert other.masks is not None
            assert one.masks.rles == other.masks.rles
    for image, number in zip(images, range(3)):
        Image.fromarray(image).save(tmp_path / f"{number}.jpg")
    for pictures in (True, False):  # without them a JPEG may be decoded at a part of its size
        out = [tmp_path / "plain", tmp_path / "tiles"]
        for folder, tiling in zip(out, (None, Tiling((120, 120)))):
            predict_sources(model, [tmp_path / "*.jpg"], folder, 0.0, pictures=pictures, tiling=tiling, progress=False)
        first, second = ((folder / "predictions.json").read_bytes() for folder in out)
        assert first == second


@pytest.mark.parametrize("tile", [TILE, (900, 900)])
def test_an_iterator_loses_no_picture(model: FakeModel, tile: tuple[int, int]) -> None:
    scene = paint(SIZE, OBJECTS)
    assert [len(result) > 0 for result in predict_tiled(model, (scene for _ in range(3)), Tiling(tile), 0.0)] == [
        True
    ] * 3  # type: ignore[arg-type]


def test_files_of_a_folder(model: FakeModel, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", paint(SIZE, OBJECTS))
    save(tmp_path / "in" / "b.png", paint((80, 120), [(2, (10, 10, 60, 60))]))
    (tmp_path / "in" / "c.png").write_bytes(b"broken")
    save(tmp_path / "in" / "d.png", paint(SIZE, []))
    summary = predict_sources(model, [tmp_path / "in"], tmp_path / "out", 0.3, progress=False, tiling=TILING)
    assert written(tmp_path / "out") == ["a.png", "b.png", "d.png", "predictions.json"]
    assert (summary.images, [Path(name).name for name, _ in summary.skipped]) == (3, ["c.png"])
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    boxes = [[round(value) for value in entry["bbox"]] for entry in entries if entry["file_name"] == "a.png"]
    assert sorted(boxes) == sorted([x0, y0, x1 - x0, y1 - y0] for _, (x0, y0, x1, y1) in OBJECTS)
    assert {entry["image_id"] for entry in entries} == {1, 2}
    assert read_image(tmp_path / "out" / "a.png").shape == (*SIZE, 3)


@pytest.fixture
def large_tiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TIFF that counts as large, and is never decoded whole."""
    tifffile = pytest.importorskip("tifffile")
    for module in (large_images, tiled):
        monkeypatch.setattr(module, "BIG", 10_000)
    monkeypatch.setattr(large_images, "REDUCED_SIDE", 310)
    monkeypatch.setenv("MVISION_MAX_IMAGE_BYTES", "200000")
    path = tmp_path / "in" / "large.tif"
    path.parent.mkdir()
    tifffile.imwrite(path, paint(SIZE, OBJECTS), tile=(64, 64), compression="zlib", photometric="rgb")
    return path


def test_a_large_tiff_is_read_in_parts_and_drawn_reduced(model: FakeModel, large_tiff: Path, tmp_path: Path) -> None:
    summary = predict_sources(model, [large_tiff], tmp_path / "out", 0.3, progress=False, tiling=TILING)
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    boxes = sorted([round(value) for value in entry["bbox"]] for entry in entries)
    assert boxes == sorted([x0, y0, x1 - x0, y1 - y0] for _, (x0, y0, x1, y1) in OBJECTS)
    drawn = read_image(tmp_path / "out" / "large.jpg")
    assert drawn.shape == (175, 310, 3)
    assert not np.array_equal(drawn, large_images.open_large(large_tiff, 64).reduced())  # type: ignore[union-attr]
    assert any("drawn at a part of its size" in remark for remark in summary.remarks)
    (result,) = predict_tiled(model, large_tiff, TILING, 0.3)  # type: ignore[arg-type]
    assert (found_boxes(result), result.path) == (EXPECTED, str(large_tiff))
    with pytest.raises(UserError, match="are allowed"):
        predict_images(model, [large_tiff])


def test_damage_in_the_middle_of_a_large_tiff_costs_this_picture_alone(
    model: FakeModel, large_tiff: Path, tmp_path: Path
) -> None:
    import tifffile

    data = bytearray(large_tiff.read_bytes())
    with tifffile.TiffFile(large_tiff) as file:
        offset = file.pages.first.dataoffsets[20]
    data[offset : offset + 20] = bytes(20)
    large_tiff.with_name("damaged.tif").write_bytes(data)
    summary = predict_sources(model, [large_tiff.parent], tmp_path / "out", 0.3, progress=False, tiling=TILING)
    ((name, reason),) = summary.skipped
    assert name.endswith("damaged.tif")
    assert "cannot be decoded at row 128" in reason
    assert written(tmp_path / "out") == ["large.jpg", "predictions.json"]
    with pytest.raises(UserError, match=r"damaged\.tif: cannot be decoded at row"):
        predict_sources(model, [large_tiff.with_name("damaged.tif")], tmp_path / "no", progress=False, tiling=TILING)
    assert written(tmp_path / "no") == []
    with pytest.raises(UserError, match=r"damaged\.tif: cannot be decoded at row"):
        predict_tiled(model, [large_tiff.with_name("damaged.tif")], TILING)


def test_masks_of_a_whole_model_are_those_of_its_tiles(large_tiff: Path, tmp_path: Path) -> None:
    """Random weights find something everywhere; what is written is inside the picture and in its size."""
    tasks = ["instance-seg", "keypoints", "semantic-seg"]
    categories = [{"id": 4, "name": "a", "keypoints": ["p", "q"]}, {"id": 9, "name": "b"}]
    from mvision.structures import Category

    model = create_model("tiny", tasks=tasks, categories=[Category(**c) for c in categories], image_size=64).eval()  # type: ignore[arg-type]
    predict_sources(model, [large_tiff], tmp_path / "out", 0.0, progress=False, tiling=Tiling((128, 128), 0.2))
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {entry["category_id"] for entry in entries} <= {4, 9}
    regions = [entry for entry in entries if entry.get("region")]
    objects = [entry for entry in entries if not entry.get("region")]
    assert len(objects) > 50
    for entry in entries:
        assert entry["segmentation"]["size"] == list(SIZE)
    covered = sum(coco_mask.decode(entry["segmentation"]).astype(int) for entry in regions)
    assert covered.max() <= 1  # every pixel has one class
    for entry in objects[:50]:
        x, y, w, h = entry["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + w <= SIZE[1] + 0.01
        assert y + h <= SIZE[0] + 0.01


def test_tiles_share_the_threads_and_stop_with_them(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error in the model nothing is left waiting."""

    def failing(self: FakeModel, images: Any) -> Any:
        if len(self.batch_sizes) == 5:
            raise KeyboardInterrupt
        self.batch_sizes.append(len(images))
        return {"detection": {"images": images}}

    monkeypatch.setattr(FakeModel, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        predict_tiled(model, [paint(SIZE, OBJECTS)] * 5, TILING)
