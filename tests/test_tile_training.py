"""Training and evaluation on tiles: which objects a tile has, what is said of the others, and the figures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvision.cli.main import main
from mvision.config import AugmentConfig, DataConfig, load_config
from mvision.config.tiles import TileConfig
from mvision.data import CocoSplit, find_layout, read_data_sources
from mvision.data.loading import tiles as tiles_module
from mvision.data.loading.dataset import Dataset, SampleKey
from mvision.data.loading.loader import build_eval_loader, build_train_loader
from mvision.data.loading.tiles import TiledDataset
from mvision.data.tools import check as checking
from mvision.engine.train import _loaders
from mvision.errors import UserError
from mvision.evaluation import Validation, evaluate, evaluate_all, make_metrics
from mvision.inference import large_images
from mvision.inference import tiles as inference_tiles
from mvision.model import Model
from tests.fake_model import CATEGORIES, FakeModel, paint
from tests.small_runs import fast_config

SIZE = (200, 300)
OBJECTS = [
    (0, (90, 86, 108, 106)),  # on the corner of four tiles of 96 x 128
    (1, (10, 10, 290, 40)),  # larger than a tile
    (2, (200, 60, 212, 80)),
]
NO_AUGMENTATION = AugmentConfig(photometric=0, zoom_out=0, crop=0, flip=0)


def write_scenes(root: Path, scenes: list[list[Any]], size: tuple[int, int] = SIZE, ending: str = "png") -> Path:
    """A COCO data set of painted scenes, with masks, the same in both splits."""
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        images, annotations = [], []
        for number, rectangles in enumerate(scenes, start=1):
            name = f"{split}_{number}.{ending}"
            Image.fromarray(paint(size, rectangles)).save(root / "images" / name)
            images.append({"id": 10 * number, "file_name": name, "height": size[0], "width": size[1]})
            for label, (x0, y0, x1, y1) in rectangles:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": 10 * number,
                        "category_id": CATEGORIES[label].id,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": (x1 - x0) * (y1 - y0),
                        "iscrowd": 0,
                        "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                    }
                )
        categories = [{"id": category.id, "name": category.name} for category in CATEGORIES]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def split(tmp_path: Path) -> CocoSplit:
    root = write_scenes(tmp_path / "data", [OBJECTS, [], OBJECTS[2:]])
    return CocoSplit(find_layout(root).split("val", {"boxes", "masks"}), ("boxes", "masks"))


def tile(**settings: Any) -> TileConfig:
    return TileConfig(**{"size": (96, 128), "overlap": 0.25, **settings})


def test_tiles_have_the_pixels_and_labels_of_their_window(split: CocoSplit) -> None:
    dataset = TiledDataset(split, tile(whole=False), reduce=False)
    whole = Dataset(split)
    assert len(dataset) == 3 * 9
    for index in range(len(dataset)):
        picture, grid, number = dataset.place(index)
        assert number is not None
        left, top, right, bottom = grid.window(number)
        image, gt = dataset.truth(index)
        assert np.array_equal(image, whole.image(split.records.index(_record(split, picture)))[top:bottom, left:right])
        for box, label, mask in zip(gt.boxes, gt.labels, gt.masks or ()):
            painted = np.zeros(SIZE, bool)
            x0, y0, x1, y1 = next(b for c, b in OBJECTS if c == label)
            painted[y0:y1, x0:x1] = True
            assert np.array_equal(mask, painted[top:bottom, left:right])
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            np.testing.assert_allclose(box, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), atol=1e-3)


def _record(split: CocoSplit, identity: int) -> Any:
    return next(record for record in split.records if record.id == identity)


def test_what_is_cut_is_kept_by_its_visible_share_and_counted(split: CocoSplit) -> None:
    """Of the object at the corner, tiles show 100, 44, 100, 44, ... per cent; that along the top covers a tenth."""
    for visible in (0.25, 0.6, 1.0):
        dataset = TiledDataset(split, tile(visible=visible, whole=False))
        counts, expected = dataset.counts, {"whole": 0, "cut": 0, "dropped": 0}
        for index in range(len(dataset)):
            picture, grid, number = dataset.place(index)
            assert number is not None
            left, top, right, bottom = grid.window(number)
            objects = {10: OBJECTS, 20: [], 30: OBJECTS[2:]}[picture]
            kept = 0
            for _, (x0, y0, x1, y1) in objects:
                inside = max(min(x1, right) - max(x0, left), 0) * max(min(y1, bottom) - max(y0, top), 0)
                share, covers = inside / ((x1 - x0) * (y1 - y0)), inside >= 0.1 * 96 * 128
                name = "whole" if share == 1 else "cut" if share >= visible or covers else "dropped"
                if inside:
                    expected[name] += 1
                    kept += name != "dropped"
            assert len(dataset.labels(index)) == kept
        assert {name: getattr(counts, name) for name in expected} == expected, visible
        assert (counts.pictures, counts.tiles, counts.objects, counts.lost) == (3, 27, 4, 0)
    assert dataset.lines("train")[0].startswith("train: 3 images are 27 tiles of 128 x 96 pixels, overlap 0.25 (")
    # Between tiles of 32 pixels that do not overlap, some objects are never whole nor cover a tenth of one.
    scenes = [[(0, (28, 28, 36, 36)), (1, (40, 40, 50, 50)), (2, (90, 0, 102, 6))]]
    root = write_scenes(split.folder.parent.parent / "narrow", scenes, (96, 128))
    narrow = TiledDataset(CocoSplit(find_layout(root).split("val", {"boxes"})), tile(size=32, overlap=0, visible=1))
    assert (narrow.counts.whole, narrow.counts.cut, narrow.counts.dropped, narrow.counts.lost) == (1, 0, 6, 2)
    assert "2 x object of which no tile shows 1" in narrow.lines("val")[-1]


def test_the_report_of_a_data_set_has_the_tiles_that_are_trained_on(split: CocoSplit) -> None:
    """All of it is counted again here, tile by tile."""
    root = split.folder.parent
    asked = {"data.root": str(root), "data.tile": {"size": (96, 128), "overlap": 0.25, "visible": 0.6, "empty": 0.5}}
    report = checking.check(load_config(overrides=asked), quick=True)
    train, val = report.splits["train"].tiles, report.splits["val"].tiles
    assert train is not None
    assert val is not None
    data = build_train_loader(split, load_config(overrides=asked).data, batch_size=1, image_size=(96, 128)).dataset
    assert isinstance(data, TiledDataset)
    every = TiledDataset(split, tile(visible=0.6, whole=False))
    labels = [every.labels(index).labels for index in range(len(every))]
    shown = np.bincount(np.concatenate(labels), minlength=3)
    assert train.classes == dict(zip(("red", "green", "blue"), shown.tolist()))
    assert (train.used, val.used) == (len(data), 3 * 10)
    assert train.counts.empty == sum(len(one) == 0 for one in labels)
    assert train.counts.left_out == 27 - len(data) > 0
    text = report.text()
    full = sum(len(one) > 0 for one in labels)
    assert f"tiles        {len(data)} of 128 x 96 pixels in an epoch, overlap 0.25\n" in text
    assert f"empty tiles  {27 - full} of 27 show no object; {27 - len(data)} are left out of an epoch" in text
    assert f"in tiles     {shown.sum()} times an object: {train.counts.whole} whole, {train.counts.cut} cut" in text
    assert f"! {train.counts.dropped} x tile that shows less of an object than data.tile.visible 0.6" in text
    assert "tiles        30 of 128 x 96 pixels in an evaluation, whole pictures included" in text
    assert text.count("by class") == 1  # an evaluation counts the objects of pictures
    alone = checking.check(load_config(overrides=asked), ["train"], quick=True).splits["train"].tiles
    assert alone == train
    (root / "annotations" / "val.json").unlink()
    held_out = checking.check(load_config(overrides={**asked, "data.val_fraction": 0.4}), quick=True).splits
    assert [(name, split.tiles.trained) for name, split in held_out.items() if split.tiles is not None] == [
        ("train", True),
        ("val", False),
    ]
    plain = checking.check(load_config(overrides={"data.root": str(root), "data.val_fraction": 0.4}), quick=True)
    assert plain.splits["train"].tiles is None


def test_a_picture_of_too_many_tiles_is_refused_by_the_report_as_by_a_training(
    split: CocoSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference_tiles, "MOST_TILES", 8)
    config = load_config(overrides={"data.root": str(split.folder.parent), "data.tile": [96, 128]})
    report = checking.check(config, quick=True)
    assert not report.usable
    assert "a picture of 300 x 200 would be 9 tiles; choose larger ones" in report.text()
    with pytest.raises(UserError, match="would be 9 tiles"):
        build_train_loader(split, config.data, batch_size=1, image_size=(96, 128))


def test_weights_of_classes_count_objects_in_tiles(tmp_path: Path) -> None:
    """A red object is in one tile of two and a green one in both; in whole pictures there would be as many."""
    scenes = [[(0, (10, 10, 40, 40)), (1, (40, 60, 150, 90))]]
    root = write_scenes(tmp_path / "data", scenes, (96, 192))
    more: dict[str, Any] = {"data__tile": {"size": 96, "overlap": 0}, "train__class_weights": "balanced"}
    config, lines = fast_config(root, **more), []
    sources = read_data_sources(config.data, ["detection"], 0, lines.append)
    config.model.categories = sources[0].train.categories
    here = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"), print=lines.append)
    _loaders(config, sources, model := Model(config.model), here, lines.append)  # type: ignore[arg-type]
    expected = "class weights of detection: red 1.5, green 0.75 (the mean over objects in the tiles is 1)"
    assert f"{expected}; 1 classes have no objects to learn from" in lines
    assert model.head("detection").class_weights.tolist() == [1.5, 0.75, 1]


def test_empty_tiles_are_trained_on_as_often_as_asked_for(split: CocoSplit) -> None:
    every = TiledDataset(split, tile(empty=100), NO_AUGMENTATION)
    full = sum(len(every.labels(index)) > 0 for index in range(len(every)))
    assert (len(every), every.counts.left_out) == (27, 0)
    half = TiledDataset(split, tile(empty=0.5), NO_AUGMENTATION, seed=1)
    assert (len(half), half.counts.left_out) == (full + round(full / 2), 27 - full - round(full / 2))
    assert "are left out: data.tile.empty 0.5" in half.lines("train")[0]
    again = TiledDataset(split, tile(empty=0.5), NO_AUGMENTATION, seed=1)
    assert [half.place(i) for i in range(len(half))] == [again.place(i) for i in range(len(half))]
    assert len(TiledDataset(split, tile(empty=0), NO_AUGMENTATION)) == full
    loader = build_train_loader(
        split, DataConfig(tile=tile(empty=0), workers=0, augment=NO_AUGMENTATION), batch_size=4, image_size=(96, 128)
    )
    batches = list(loader.epoch(0))
    assert len(batches) == full // 4
    assert all(len(target) > 0 for batch in batches for target in batch.targets)


class Finder(FakeModel):
    """Draws no conclusions from the size of what it finds."""

    def head(self, task: str) -> Any:
        head = super().head(task)
        head.kind = "objects"
        return head


def test_figures_are_of_whole_pictures(split: CocoSplit) -> None:
    """The fake model finds every box exactly where a tile has the size of its input, so that AP is 1."""
    model = Finder().eval()
    config = DataConfig(tile=tile(), workers=0)
    metrics = make_metrics(model, split)
    entries: list[Any] = []
    loader = build_eval_loader(split, config, batch_size=4, image_size=(96, 128))
    assert len(loader.dataset) == 3 * 10  # the tiles, and the whole picture
    part = Validation("val", loader, metrics, loader.tiles)
    figures = evaluate_all(model, [part], keep=lambda number, task, found: entries.extend(found))
    assert figures["detection"]["AP"] == pytest.approx(1)
    assert sorted(e["image_id"] for e in entries) == [10, 10, 10, 30]
    plain = build_eval_loader(split, DataConfig(workers=0), batch_size=4, image_size=(96, 128))
    assert evaluate(model, plain, metrics)["detection"]["AP"] < 0.9
    # Two processes share the pictures, not their tiles.
    own = [build_eval_loader(split, config, batch_size=4, image_size=(96, 128), rank=r, world_size=2) for r in (0, 1)]
    assert [len(one.batches.keys) for one in own] == [20, 10]  # type: ignore[union-attr]
    measured = {}
    for one in own:
        evaluate(model, one, metrics, tiles=one.tiles)
        measured |= {image: len(found.rows) for image, found in metrics["detection"][0].measured.items()}
    assert measured == {10: 3, 20: 0, 30: 1}


def test_a_picture_that_cannot_be_read_is_left_out(split: CocoSplit) -> None:
    (split.folder / split.records[0].file).write_bytes(b"broken")
    model = Finder().eval()
    metrics = make_metrics(model, split)
    loader = build_eval_loader(split, DataConfig(tile=tile(), workers=0), batch_size=4, image_size=(96, 128))
    evaluate(model, loader, metrics, tiles=loader.tiles)
    assert sorted(metrics["detection"][0].measured) == [20, 30]
    assert "val_1.png" in (loader.missing() or "")


def test_large_tiffs_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile = pytest.importorskip("tifffile")
    root = write_scenes(tmp_path / "data", [OBJECTS], ending="tif")
    for path in (root / "images").iterdir():
        tifffile.imwrite(path, paint(SIZE, OBJECTS), tile=(64, 64), compression="zlib", photometric="rgb")
    split = CocoSplit(find_layout(root).split("val", {"boxes"}), ("boxes",))
    expected = [TiledDataset(split, tile()).image(index) for index in range(9)]
    for module in (large_images, tiles_module):
        monkeypatch.setattr(module, "BIG", 1000)
    monkeypatch.setenv("MVISION_MAX_IMAGE_BYTES", "100000")
    dataset = TiledDataset(split, tile())
    for index, image in enumerate(expected):
        assert np.array_equal(dataset.image(index), image)
    sample = dataset[SampleKey(0, 9, (96, 128))]
    assert sample.image is not None
    assert sample.image.shape == (96, 128, 3)


def test_train_val_and_predict_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = write_scenes(tmp_path / "data", [OBJECTS, OBJECTS[:1]])
    small = ["-o", "model.image_size=64", "-o", "train.batch_size=4", "-o", "data.workers=0", "--device", "cpu"]
    train = ["train", "--task", "detection", "--data", str(root), "--epochs", "1", "--output", "run", *small]
    balanced = ["-o", "train.class_weights=balanced"]
    with pytest.raises(SystemExit) as ended:
        main([*train, "-o", "data.tile.size=96", "-o", "data.tile.visible=0.1"])
    assert ended.value.code == 2
    assert "data.tile.visible" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*train, "-o", "data.tile.size=[96,128]", "-o", "data.tile.overlap=0.25", *balanced])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "train: 2 images are " in shown
    assert "val: 2 images are 20 tiles of 128 x 96 pixels, overlap 0.25" in shown
    assert "never learned" not in shown
    assert "(the mean over objects in the tiles is 1)" in shown
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for more, said in (([], "evaluated on tiles of 128 x 96"), (["--tile", "0"], None), (["--tile", "64"], "64 x 64")):
        with pytest.raises(SystemExit) as ended:
            main(["val", "--weights", "run", "--workers", "0", "--output", "eval", "--device", "cpu", *more])
        assert not ended.value.code
        shown = capsys.readouterr().out
        assert (said or "AP") in shown
        assert ("evaluated on tiles" in shown) == (said is not None)
        if not more:
            again = json.loads((tmp_path / "eval" / "metrics.json").read_text())
            assert again == {task: pytest.approx(values, abs=1e-6) for task, values in figures.items()}
    sources = [str(root / "images" / "val_1.png"), "--weights", "run", "--output", "found", "--device", "cpu"]
    for more, said in (
        ([], "trained on tiles of 128 x 96 pixels: add --tile 96x128"),
        (["--tile", "96x128", "--batch-size", "3", "--threshold", "0"], "on tiles of 128 x 96 pixels"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["predict", *sources, *more])
        assert not ended.value.code
        assert said in capsys.readouterr().out
    for wrong, message in (
        (["--overlap", "0.2"], "--overlap: has no meaning without --tile"),
        (["--tile", "96", "--overlap", "2"], "overlap 2.0: a share"),
        (["--tile", "5"], "tile 5x5: sides of 32"),
        (["--tile", "a"], "'a' is neither N nor HxW"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["predict", *sources[:-4], "--output", "none", *wrong])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
