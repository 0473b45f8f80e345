"""Prediction on images in memory and on sources, and what it leaves on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from pycocotools import mask as coco_mask

from mvision.errors import UserError
from mvision.inference import predict
from mvision.inference.predict import predict_images
from mvision.inference.predict_sources import predict_sources
from mvision.inference.tiled import predict_tiled
from mvision.inference.tiles import Tiling
from mvision.structures import Category, Instances
from mvision.structures.images import read_image
from tests.fake_model import FakeModel, paint, save, written

RED = (0, (30, 20, 60, 60))
BLUE = (2, (70, 40, 110, 90))


@pytest.fixture
def model() -> FakeModel:
    return FakeModel().eval()


def test_results_are_in_pixels_of_each_original(model: FakeModel, tmp_path: Path) -> None:
    """The same scene as a file, a PIL image and an array of twice the size, beside one of another kind."""
    scene = paint((96, 128), [RED, BLUE])
    double = cv2.resize(scene, (256, 192), interpolation=cv2.INTER_NEAREST)
    path = save(tmp_path / "scene.png", scene)
    results = predict_images(model, [path, Image.fromarray(scene), double, paint((50, 70), [])])
    assert [len(result) for result in results] == [2, 2, 2, 0]
    assert [result.size for result in results] == [(96, 128), (96, 128), (192, 256), (50, 70)]
    assert results[0].boxes.tolist() == [list(BLUE[1]), list(RED[1])]
    assert [results[0].names[label] for label in results[0].labels] == ["blue", "red"]
    np.testing.assert_allclose(results[2].boxes, 2 * results[0].boxes, atol=2)
    assert [result.path for result in results] == [str(path), None, None, None]


def test_threshold(model: FakeModel) -> None:
    scene = paint((96, 128), [(0, (0, 0, 10, 20)), BLUE])  # scores 0.4 and 1
    assert [len(predict_images(model, [scene], threshold=t)[0]) for t in (0.0, 0.5, 1.0)] == [2, 1, 1]
    with pytest.raises(UserError, match=r"threshold 1\.5"):
        predict_images(model, [scene], threshold=1.5)


def test_batches_keep_the_order(model: FakeModel) -> None:
    images = [paint((96, 128), [(0, (i, 0, i + 40, 50))]) for i in range(7)]
    results = predict_images(model, images, batch_size=3)
    assert model.batch_sizes == [3, 3, 1]
    assert [result.boxes[0, 0] for result in results] == list(range(7))
    model.batch_sizes.clear()
    predict_images(model, images)
    assert model.batch_sizes == [1] * 7  # on CPU
    assert predict_images(model, []) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_of_a_gpu_get_their_own_results() -> None:
    """Post-processing waits for its batch, and memory of images and outputs is not used again before that."""

    class Slow(FakeModel):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            torch.cuda._sleep(5_000_000)
            return super().forward(images).clone()

    images = [paint((96, 128), [(0, (i, 0, i + 40, 50))]) for i in range(60)]
    results = predict_images(Slow().cuda(), images, batch_size=4)
    assert [result.boxes[0, 0] for result in results] == list(range(60))


def test_one_image_without_a_list(model: FakeModel, tmp_path: Path) -> None:
    scene = paint((96, 128), [RED])
    path = save(tmp_path / "scene.png", scene)
    for image in (path, str(path), scene, Image.fromarray(scene)):
        (result,) = predict_images(model, image)  # type: ignore[arg-type]
        assert len(result) == 1


def test_other_kinds_of_images(model: FakeModel) -> None:
    scene = paint((96, 128), [RED])
    rgba = np.dstack((scene, np.full((96, 128), 255, np.uint8)))
    frozen = scene.copy()
    frozen.setflags(write=False)
    turned = Image.fromarray(np.rot90(scene))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned clockwise
    turned.info["exif"] = exif.tobytes()
    results = predict_images(model, [rgba, frozen, Image.fromarray(rgba), turned, scene[..., 0]])
    assert [len(result) for result in results] == [1, 1, 1, 1, 0]
    assert results[3].boxes.tolist() == [list(RED[1])]
    deep = Image.fromarray(scene[..., 0].astype(np.uint16) * 257)
    assert predict_images(model, [deep])[0].size == (96, 128)
    wrong: list[Any] = [
        Image.new("RGB", (0, 5)),
        Image.new("L", (5, 0)),
        np.zeros((0, 5), np.uint8),
        scene.astype(np.float32),
        scene[..., :2],
        np.zeros((0, 0, 3), np.uint8),
        torch.zeros(3, 8, 8),
    ]
    for image in wrong:
        for predicted in (predict_images, partial(predict_tiled, tiling=Tiling((64, 64)))):
            with pytest.raises(UserError):
                predicted(model, [image])


@pytest.mark.parametrize("batch_size", [0, -1, 2.5])
def test_a_batch_size_that_cannot_be_is_one_line(model: FakeModel, batch_size: Any) -> None:
    for predicted in (predict_images, partial(predict_tiled, tiling=Tiling((64, 64)))):
        with pytest.raises(UserError, match=f"batch_size {batch_size}: a whole number above 0"):
            predicted(model, [paint((96, 128), [])], batch_size=batch_size)
    assert len(predict_images(model, [paint((96, 128), [])], batch_size=np.int64(2))) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("tile", [None, (200, 200)])
def test_one_object_of_pil_is_several_images(model: FakeModel, tile: tuple[int, int] | None, tmp_path: Path) -> None:
    """A file that is not decoded yet, and the frames of an animation, which are one object that moves on."""
    save(tmp_path / "large.png", cv2.resize(paint((96, 128), [RED]), (640, 480), interpolation=cv2.INTER_NEAREST))
    frames = [Image.fromarray(paint((96, 128), [(0, (left, 20, left + 40, 60))])) for left in range(0, 80, 8)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])

    def predicted(images: Any) -> list[Any]:
        if tile is None:
            return predict_images(model, images)
        return predict_tiled(model, images, Tiling(tile))

    for _ in range(3):
        with Image.open(tmp_path / "large.png") as image:
            results = predicted([image] * 8)
            assert len({str(result.boxes.tolist()) for result in results}) == 1
            assert len(results[0]) > 0
    with Image.open(tmp_path / "a.gif") as image:
        found = predicted(ImageSequence.Iterator(image))
    assert len(found) == 10
    assert [round(float(result.boxes[:, 0].min())) for result in found] == list(range(0, 80, 8))


def test_an_unreadable_file_is_named(model: FakeModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jpg"):
        predict_images(model, [tmp_path / "gone.jpg"])


def test_the_mode_is_kept(model: FakeModel) -> None:
    model.train()
    model.part.eval()
    predict_images(model, [paint((96, 128), [RED])])
    assert model.training
    assert not model.part.training


def test_pictures_and_predictions(model: FakeModel, tmp_path: Path) -> None:
    scene = paint((96, 128), [RED, BLUE])
    for name in ("in/a.png", "in/sub/a.jpg", "in/empty.png"):
        save(tmp_path / name, scene if "empty" not in name else paint((40, 40), []))
    summary = predict_sources(model, [tmp_path / "in"], tmp_path / "out", progress=False)
    out = tmp_path / "out"
    assert written(out) == ["a.png", "empty.png", "predictions.json", "sub/a.jpg"]
    assert (summary.images, dict(summary.instances), summary.skipped) == (3, {"blue": 2, "red": 2}, [])
    drawn = read_image(out / "a.png")
    assert drawn.shape == scene.shape
    assert not np.array_equal(drawn, scene)
    assert np.array_equal(read_image(out / "empty.png"), paint((40, 40), []))
    entries = json.loads((out / "predictions.json").read_text())
    assert [e["file_name"] for e in entries] == ["a.png", "a.png", "sub/a.jpg", "sub/a.jpg"]
    assert [e["image_id"] for e in entries] == [1, 1, 3, 3]
    assert entries[1] == {
        "image_id": 1,
        "file_name": "a.png",
        "category_id": 3,
        "category_name": "red",
        "bbox": [30, 20, 30, 40],
        "score": 0.9,
    }
    assert "2 blue" in str(summary)


def test_without_pictures_nothing_is_drawn(model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.jpg"):
        save(tmp_path / "in" / name, paint((96, 128), [RED, BLUE]))
    drawn = predict_sources(model, [tmp_path / "in"], tmp_path / "drawn")
    monkeypatch.setattr(Instances, "draw", lambda *_: pytest.fail("something is drawn"))
    summary = predict_sources(model, [tmp_path / "in"], tmp_path / "out", pictures=False)
    assert written(tmp_path / "out") == ["predictions.json"]
    first, second = (tmp_path / folder / "predictions.json" for folder in ("out", "drawn"))
    assert first.read_text() == second.read_text()
    assert summary.instances == drawn.instances
    assert str(summary).splitlines()[-1] == f"predictions.json: {tmp_path / 'out'}"
    # Nothing can replace a source.
    predict_sources(model, [tmp_path / "in"], tmp_path / "in", pictures=False)
    assert written(tmp_path / "in") == ["a.png", "b.jpg", "predictions.json"]


def test_masks_and_keypoints_are_written(model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((1, 96, 128), bool)
    mask[0, 20:60, 30:60] = True
    points = np.array([[[1.234, 5, 0.5]]], np.float32)

    def postprocess(*_: object) -> list[Instances]:
        values = (np.array([[30, 20, 60, 60]], np.float32), np.ones(1, np.float32), np.array([1]))
        return [Instances(*values, (96, 128), model.categories, mask, points)]

    monkeypatch.setattr(model, "postprocess", lambda outputs, sizes, threshold, **_: postprocess())
    save(tmp_path / "a.png", paint((96, 128), []))
    predict_sources(model, [tmp_path / "a.png"], tmp_path / "out", progress=False)
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert entry["keypoints"] == [1.23, 5, 0.5]
    assert np.array_equal(coco_mask.decode(entry["segmentation"]), mask[0])


def test_regions_are_written_and_counted(model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects and semantic regions of a joint model, whose classes are others."""
    mask = np.zeros((2, 96, 128), bool)
    mask[0, :50] = mask[1, 50:] = True
    sky = [Category(id=5, name="grass"), Category(id=8, name="sky")]
    boxes = np.array([[0, 0, 128, 50.128], [0, 50, 128, 96]], np.float32)
    regions = Instances(boxes, np.array([0.7123456, 0.6]), np.array([1, 0]), (96, 128), sky, mask)

    def joint(images: torch.Tensor, sizes: list[tuple[int, int]], threshold: float, **_: Any) -> list[Instances]:
        results = FakeModel.postprocess(model, images, sizes, threshold)
        return [replace(instances, regions=regions) for instances in results]

    monkeypatch.setattr(model, "postprocess", joint)
    for name, rectangles in (("a.png", [RED, BLUE]), ("b.png", [])):
        save(tmp_path / "in" / name, paint((96, 128), rectangles))
    summary = predict_sources(model, [tmp_path / "in"], tmp_path / "out", progress=False)
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [(e["file_name"], e["category_name"], e.get("region")) for e in entries] == [
        ("a.png", "blue", None),
        ("a.png", "red", None),
        ("a.png", "sky", True),
        ("a.png", "grass", True),
        ("b.png", "sky", True),
        ("b.png", "grass", True),
    ]
    segmentation = entries[2].pop("segmentation")
    assert np.array_equal(coco_mask.decode(segmentation), mask[0])
    assert entries[2] == {
        "image_id": 1,
        "file_name": "a.png",
        "category_id": 8,
        "category_name": "sky",
        "bbox": [0, 0, 128, 50.13],
        "score": 0.71235,
        "region": True,
    }
    assert (dict(summary.instances), dict(summary.regions)) == ({"blue": 1, "red": 1}, {"sky": 2, "grass": 2})
    assert ": 1 blue, 1 red, region sky in 2, region grass in 2\n" in str(summary)


def test_the_orientation_of_a_photo(model: FakeModel, tmp_path: Path) -> None:
    """A file whose EXIF data says that it is to be turned: results and picture are of the upright image."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(paint((96, 128), [RED]))))
    (tmp_path / "in").mkdir()
    turned.save(tmp_path / "in" / "a.png", exif=exif)
    predict_sources(model, [tmp_path / "in"], tmp_path / "out", progress=False)
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert entry["bbox"] == [30, 20, 30, 40]
    assert read_image(tmp_path / "out" / "a.png").shape == (96, 128, 3)
    (result,) = predict_images(model, [tmp_path / "in" / "a.png"])
    assert result.boxes.tolist() == [list(RED[1])]


def test_equal_names_do_not_collide(model: FakeModel, tmp_path: Path) -> None:
    scene = paint((96, 128), [RED])
    for name in ("one/a.jpg", "two/a.jpg", "two/A.bmp"):
        save(tmp_path / name, scene)
    sources = [tmp_path / "one", tmp_path / "two" / "a.jpg", tmp_path / "two" / "A.bmp"]
    predict_sources(model, sources, tmp_path / "out", progress=False)
    assert written(tmp_path / "out") == ["A-3.jpg", "a-2.jpg", "a.jpg", "predictions.json"]
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    files = [entry["file_name"] for entry in entries]
    assert files == [str(tmp_path / "one" / "a.jpg"), str(tmp_path / "two" / "a.jpg"), "A.bmp"]


def test_equal_names_in_subfolders_do_not_collide(model: FakeModel, tmp_path: Path) -> None:
    for name in ("one/a.jpg", "one/sub/a.jpg", "two/sub/a.jpg", "two/sub/A.png"):
        save(tmp_path / name, paint((96, 128), [RED]))
    predict_sources(model, [tmp_path / "one", tmp_path / "two"], tmp_path / "out", progress=False)
    assert written(tmp_path / "out") == ["a.jpg", "predictions.json", "sub/A.png", "sub/a-2.jpg", "sub/a.jpg"]


def test_sources_are_never_replaced(model: FakeModel, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", paint((96, 128), [RED]))
    before = path.read_bytes()
    with pytest.raises(UserError, match="would replace a source"):
        predict_sources(model, [tmp_path], tmp_path, progress=False)
    assert path.read_bytes() == before
    assert written(tmp_path) == ["a.png"]


def test_a_second_run_into_the_same_place(model: FakeModel, tmp_path: Path) -> None:
    save(tmp_path / "a.png", paint((96, 128), [RED]))
    for _ in range(2):
        summary = predict_sources(model, [tmp_path], tmp_path / "out", progress=False)
        assert summary.images == 1
    assert written(tmp_path / "out") == ["a.png", "predictions.json"]


def test_broken_files_are_skipped_and_named(model: FakeModel, tmp_path: Path) -> None:
    save(tmp_path / "in" / "b.png", paint((96, 128), [RED]))
    (tmp_path / "in" / "a.jpg").write_bytes(b"broken")
    summary = predict_sources(model, [tmp_path / "in"], tmp_path / "out", batch_size=4, progress=False)
    assert [Path(name).name for name, _ in summary.skipped] == ["a.jpg"]
    assert "a.jpg" in str(summary)
    assert written(tmp_path / "out") == ["b.png", "predictions.json"]
    (tmp_path / "in" / "b.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="none of 2 sources"):
        predict_sources(model, [tmp_path / "in"], tmp_path / "none", progress=False)
    assert written(tmp_path / "none") == []


def test_a_damaged_image_of_pil_is_one_line(tmp_path: Path) -> None:
    """It is decoded only when it is used."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:-5000])
    with Image.open(tmp_path / "a.png") as image, pytest.raises(UserError, match="an image of PIL cannot be decoded"):
        predict_images(FakeModel(), [image])


def test_a_batch_that_is_filled_up_gives_the_same_outputs() -> None:
    model, generator = FakeModel().eval(), np.random.default_rng(0)
    images = generator.integers(0, 256, (3, *model.config.image_size, 3), dtype=np.uint8)
    batch: list[Any] = [(number, image, (40, 60)) for number, image in enumerate(images)]
    batch.insert(1, ("unreadable", None, (0, 0)))
    with torch.no_grad():
        expected, found = predict._run(model, batch), predict._run(model, batch, full=5)
    assert model.batch_sizes == [3, 5]
    assert expected.keys() == found.keys()
    for task, outputs in expected.items():
        assert outputs.keys() == found[task].keys()
        for name, value in outputs.items():
            assert len(value) == 3
            assert torch.equal(found[task][name], value)
    assert predict._run(model, batch[1:2], full=5) == {}
