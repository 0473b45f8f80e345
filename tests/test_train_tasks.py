"""Runs of masks and keypoints: trained, evaluated and predicted, from nothing or from a detector's weights."""

import json

import cv2
import numpy as np

from mvision.commands.predict import predict_job
from mvision.commands.train import run_config
from mvision.commands.val import validate
from mvision.config import load_config
from mvision.engine.train import train
from mvision.storage.run_folder import RunFolder
from mvision.weights import load
from tests.conftest import write_squares
from tests.small_runs import FAST, add_corners, run_in_process

MASKS = {
    **{key: value for key, value in FAST.items() if key != "model.heads.detection"},
    "model.heads.instance-seg": {
        **FAST["model.heads.detection"],
        "pixel_dim": 16,
        "mask_dim": 8,
        "mask_points": 64,
    },
}


def test_masks_are_trained_evaluated_and_predicted(squares, tmp_path, capsys):
    overrides = {**MASKS, "data.root": str(squares), "train.epochs": 2}
    config = load_config("tiny", tasks=["instance-seg"], overrides=overrides)
    run = train(config, output=tmp_path / "run", device="cpu")
    figures = json.loads((run / "metrics.json").read_text())["instance-seg"]
    assert {"AP", "AP50", "AP_small", "AR100", "AP/blue", "bbox/AP", "bbox/AP75", "bbox/AP/red"} <= set(figures)
    printed = capsys.readouterr().out
    assert "instance-seg, segm\n" in printed
    assert "instance-seg, bbox\n" in printed
    assert {"instance-seg/decoder_mask", "instance-seg/denoising_dice"} <= set(RunFolder(run).records()[0]["loss"])
    assert cv2.imread(str(run / "predictions.jpg")) is not None
    assert "instance-seg, segm" in validate(str(run), output=tmp_path / "val", device="cpu", workers=0)
    assert json.loads((tmp_path / "val" / "metrics.json").read_text())["instance-seg"] == figures

    summary = predict_job(
        tasks=["instance-seg"], weights=str(run), threshold=0, output=tmp_path / "found", device="cpu"
    )
    assert summary.images == 4
    entries = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert {tuple(entry["segmentation"]["size"]) for entry in entries} == {(64, 64)}
    assert cv2.imread(str(tmp_path / "found" / "val_0.jpg")).shape == (64, 64, 3)


def test_masks_start_from_detection(squares, tmp_path, capsys):
    detection = run_in_process(squares, tmp_path / "detection", train__epochs=1)
    options = {"data.root": str(squares), "data.workers": 0, "train.epochs": 1, "train.precision": "fp32"}
    config = run_config(tasks=["instance-seg"], init=str(detection), options=options)
    head = config.model.heads["instance-seg"]
    assert (head.num_queries, head.ffn_dim, head.dense_weight) == (10, 32, 1.0)  # the decoder is the detector's
    train(config, output=tmp_path / "masks", init=str(detection), device="cpu")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weights ")]
    assert "backbone loaded; neck loaded; head instance-seg loaded in part" in line
    assert "not mask_embed, pixels)" in line


def test_keypoints_start_from_a_detection_run(squares, tmp_path, capsys):
    """Two classes with different numbers of points, through training, evaluation, pictures and prediction."""
    add_corners(squares)
    first = run_in_process(squares, tmp_path / "first", train__epochs=1)
    options = {
        "train.epochs": 2,
        "train.warmup_steps": 2,
        "train.batch_size": 2,
        "train.val_interval": 2,
        "train.precision": "fp32",
        "data.workers": 0,
        "data.root": str(squares),
        "model.heads.keypoints.embed_dim": 16,
    }
    config = run_config(tasks=["keypoints"], init=str(first), options=options)
    assert config.model.neck.embed_dim == 32
    run = train(config, output=tmp_path / "second", init=str(first), device="cpu")
    assert "backbone loaded; neck loaded; head keypoints not loaded" in capsys.readouterr().out
    figures = json.loads((run / "metrics.json").read_text())["keypoints"]
    assert {"AP", "AP50", "AR", "AP/blue", "AP/red", "bbox/AP"} <= set(figures)
    assert {"keypoints/one2one_oks", "keypoints/one2many_class"} <= set(RunFolder(run).records()[0]["loss"])
    assert cv2.imread(str(run / "predictions.jpg")) is not None
    model = load(run)
    assert [category.sigmas for category in model.categories] == [[], [0.1] * 4]
    (found,) = model.predict(str(squares / "images" / "val_0.jpg"), threshold=0.0)
    assert found.keypoints.shape == (len(found), 4, 3)
    assert found.draw(np.zeros((*found.size, 3), np.uint8)).any()


def test_very_many_points_and_very_many_instances(tmp_path):
    """One point and 133, sixty objects in one image and none in the next: trained, evaluated and drawn."""
    root = write_squares(tmp_path / "data", images=2, objects=60, size=256)
    for file in (root / "annotations").iterdir():
        content = json.loads(file.read_text())
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] == 1]
        assert len(content["annotations"]) == 60
        for category, count in zip(content["categories"], (1, 133)):
            category["keypoints"] = [f"point {index}" for index in range(count)]
        for entry in content["annotations"]:
            x, y, side, _ = entry["bbox"]
            count = 1 if entry["category_id"] == 2 else 133
            entry["keypoints"] = [v for i in range(count) for v in (x + side * i / count, y + side / 2, 2)]
        file.write_text(json.dumps(content))
    options = {key: value for key, value in FAST.items() if key != "model.heads.detection"}
    head = {"embed_dim": 16, "pixel_dim": 16, "map_dim": 8, "num_instances": 100}
    options |= {"train.epochs": 1, "data.root": str(root), "model.image_size": 128, "model.heads.keypoints": head}
    run = train(load_config("tiny", tasks=["keypoints"], overrides=options), output=tmp_path / "run", device="cpu")
    figures = json.loads((run / "metrics.json").read_text())["keypoints"]
    assert figures["AP/blue"] >= 0
    assert figures["AP/red"] >= 0
    crowded, empty = load(run).predict([str(root / "images" / f"val_{i}.jpg") for i in (0, 1)], threshold=0.0)
    for found in (crowded, empty):
        assert found.keypoints.shape == (100, 133, 3)
        assert found.draw(np.zeros((*found.size, 3), np.uint8)).any()
    assert crowded.filter(np.arange(0)).draw(np.zeros((256, 256, 3), np.uint8)).max() == 0
