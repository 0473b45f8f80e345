"""What mvision label writes, in the readers of the tools themselves; and what their exporters write, in mvision's.

These packages ask for other versions of numpy and OpenCV than mvision takes, so they are no part of its extras: install
datumaro, label-studio-sdk and fiftyone into an environment of their own to run all of these tests.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.label_model import PAINTED, label, photos, read

MASKS = ("polygon", "rle")


def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, masks: str, *tasks: str) -> Path:
    options = ["--format", form, *(["--masks", masks] if masks else [])]
    assert label(monkeypatch, photos(tmp_path / "in"), tmp_path / "out", *options, tasks=tasks) == 0
    return tmp_path / "out"


def expected_mask() -> np.ndarray:
    """Of the red rectangle."""
    mask = np.zeros((96, 128), bool)
    mask[10:35, 20:70] = mask[35:60, 20:45] = mask[55:60, 65:70] = True
    return mask


@pytest.mark.parametrize(("form", "theirs"), [("coco", "coco"), ("cvat", "cvat"), ("yolo", "yolo")])
def test_boxes_in_datumaro(form: str, theirs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datumaro = pytest.importorskip("datumaro")
    flat = {Path(name).name: rectangles for name, rectangles in PAINTED.items()}  # as its reader of YOLO needs
    monkeypatch.setattr("tests.label_model.PAINTED", flat)
    out = made(tmp_path, monkeypatch, form, "", "detection")
    if form == "yolo":  # its reader asks for a split val
        text = (out / "data.yaml").read_text()
        (out / "data.yaml").write_text(f"{text}val: images/train\n")
    data = datumaro.Dataset.import_from(str(out), theirs)
    names = [entry.name for entry in data.categories()[datumaro.AnnotationType.label]]
    found = {
        Path(item.id).name: sorted((names[a.label], *np.round(a.get_bbox(), 1).tolist()) for a in item.annotations)
        for item in data
    }
    assert found == {
        "a": [("green", 90, 60, 18, 15), ("red", 20, 10, 50, 50)],
        "b": [("blue", 5, 5, 50, 45)],
        "empty": [],
    }
    if form != "yolo":
        marks = {names[a.label]: a.attributes.get("review") for item in data for a in item.annotations}
        assert marks == {"red": False, "green": True, "blue": False}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("form", ["coco", "cvat"])
def test_masks_in_datumaro(form: str, masks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datumaro = pytest.importorskip("datumaro")
    from pycocotools import mask as coco_mask

    data = datumaro.Dataset.import_from(str(made(tmp_path, monkeypatch, form, masks, "instance-seg")), form)
    item = next(item for item in data if Path(item.id).name == "a")
    names = [entry.name for entry in data.categories()[datumaro.AnnotationType.label]]
    got = np.zeros((96, 128), bool)
    groups = set()
    for part in (a for a in item.annotations if names[a.label] == "red" and a.type.name != "bbox"):
        groups.add(part.group)
        if part.type.name == "polygon":
            got |= coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([list(part.points)], 96, 128))).astype(bool)
        else:
            got |= part.image.astype(bool)
    mask = expected_mask()
    assert (got & mask).sum() / (got | mask).sum() >= (1 if masks == "rle" else 0.98)
    assert len(groups) == 1  # the parts of one object


def test_keypoints_in_datumaro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datumaro = pytest.importorskip("datumaro")
    out = made(tmp_path, monkeypatch, "coco", "", "keypoints")
    data = datumaro.Dataset.import_from(str(out), "coco_person_keypoints")
    items = [item for item in data if Path(item.id).name == "a"]
    (points,) = (a for item in items for a in item.annotations if a.type.name == "points")
    assert points.points[:4] == pytest.approx([22, 12, 68, 12], abs=0.02)
    assert [v.value for v in points.visibility] == [2, 2, 0]


@pytest.mark.parametrize(
    ("masks", "tasks"), [("", ["detection"]), *((m, ["instance-seg", "keypoints"]) for m in MASKS), ("", ["keypoints"])]
)
def test_label_studio_takes_the_tasks(
    masks: str, tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interface = pytest.importorskip("label_studio_sdk.label_interface")
    out = made(tmp_path, monkeypatch, "label-studio", masks, *tasks)
    config = interface.LabelInterface((out / "label_config.xml").read_text())
    config.validate()
    for task in json.loads((out / "tasks.json").read_text()):
        assert task["data"].keys() >= {"image", "review"}
        for prediction in task["predictions"]:
            assert config.validate_prediction(prediction, return_errors=True) == []


def test_the_brush_in_label_studios_own_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    out = made(tmp_path, monkeypatch, "label-studio", "rle", "instance-seg")
    region = json.loads((out / "tasks.json").read_text())[0]["predictions"][0]["result"][0]
    layers = brush.decode_from_annotation(
        "brush", [{**region, "brushlabels": region["value"]["brushlabels"], "rle": region["value"]["rle"]}]
    )
    (layer,) = layers.values()
    np.testing.assert_array_equal(layer > 0, expected_mask())


def exported(out: Path, to: Path, form: str, **options: Any) -> Path:
    """Label Studio's own export of the predictions, taken as annotations."""
    converter = pytest.importorskip("label_studio_sdk.converter")
    tasks = json.loads((out / "tasks.json").read_text())
    for number, task in enumerate(tasks, start=1):
        task["id"] = number
        task["annotations"] = [{"id": number, "completed_by": 1, **task.pop("predictions")[0]}]
        task["data"]["image"] = str(Path("images") / task["data"]["image"].partition("images/")[2])
    (to.parent / "tasks.json").write_text(json.dumps(tasks))
    tool = converter.Converter(str(out / "label_config.xml"), str(out), download_resources=False)
    getattr(tool, f"convert_to_{form}")(str(to.parent / "tasks.json"), str(to), is_dir=False, **options)
    images = to / "images"
    images.mkdir(exist_ok=True)
    for picture in (out / "images").rglob("*.png"):
        (images / picture.name).write_bytes(picture.read_bytes())
    return to


@pytest.mark.parametrize("form", ["coco", "yolo"])
def test_exports_of_label_studio(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = made(tmp_path, monkeypatch, "label-studio", "", "detection")
    to = tmp_path / "export"
    monkeypatch.chdir(out)
    exported(out, to, form, **({"output_image_dir": str(to / "images")} if form == "coco" else {}))
    found = read(to)
    assert [one["name"] for one in found["a.png"]] == ["red", "green"]
    np.testing.assert_allclose(found["a.png"][0]["bbox"], [20, 10, 50, 50], atol=0.1)


@pytest.mark.parametrize("form", ["coco_instances", "yolo"])
def test_exports_of_datumaro_which_are_those_of_cvat(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datumaro = pytest.importorskip("datumaro")
    data = datumaro.Dataset.import_from(str(made(tmp_path, monkeypatch, "cvat", "", "detection")), "cvat")
    data.transform("map_subsets", mapping={"annotations": "train"})
    data.export(str(tmp_path / "export"), form, save_media=True)
    found = read(tmp_path / "export")
    assert [one["name"] for one in found["a.png"]] == ["red", "green"]
    np.testing.assert_allclose(found["a.png"][0]["bbox"], [20, 10, 50, 50], atol=0.1)


@pytest.mark.parametrize(("masks", "tasks"), [("", ["detection"]), *((m, ["instance-seg"]) for m in MASKS)])
def test_fiftyone_reads_and_writes(
    masks: str, tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its importer and exporter of COCO, without the database that a data set of FiftyOne lives in."""
    monkeypatch.setenv("FIFTYONE_DATABASE_URI", "mongodb://localhost:1")
    monkeypatch.setenv("FIFTYONE_DO_NOT_TRACK", "true")
    coco = pytest.importorskip("fiftyone.utils.coco")
    out = made(tmp_path, monkeypatch, "fiftyone", masks, *tasks)
    kind = "segmentations" if masks else "detections"
    with coco.COCODetectionDatasetImporter(dataset_dir=str(out), label_types=[kind]) as importer:
        samples = list(importer)
    by_name = {Path(path).name: (metadata, label) for path, metadata, label in samples}
    metadata, label_ = by_name["a.png"]
    red, green = label_.detections
    assert [red.label, green.label] == ["red", "green"]
    np.testing.assert_allclose(red.bounding_box, [20 / 128, 10 / 96, 50 / 128, 50 / 96], atol=1e-3)
    assert (red["review"], green["review"]) == (False, True)
    assert green.confidence == pytest.approx(0.435, abs=1e-3)
    if masks:
        assert red.mask.mean() == pytest.approx(expected_mask()[10:60, 20:70].mean(), abs=0.02)
    green.label = "blue"  # corrected
    exporter = coco.COCODetectionDatasetExporter(export_dir=str(tmp_path / "export"), classes=["red", "green", "blue"])
    with exporter:
        for path, metadata, label_ in samples:
            exporter.export_sample(path, label_, metadata=metadata)
    found = read(tmp_path / "export")
    assert [one["name"] for one in found["a.png"]] == ["red", "blue"]
    np.testing.assert_allclose(found["a.png"][0]["bbox"], [20, 10, 50, 50], atol=0.6)
    assert ("segmentation" in found["a.png"][0]) == bool(masks)


def test_a_zip_has_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is uploaded to a tool: links to files are the files."""
    out = made(tmp_path, monkeypatch, "coco", "", "detection")
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as file:
        for path in out.rglob("*"):
            file.write(path, path.relative_to(out))
    with zipfile.ZipFile(tmp_path / "out.zip") as file:
        assert file.read("images/a.png") == (tmp_path / "in" / "a.png").read_bytes()
