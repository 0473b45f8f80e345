"""Corrected exports of CVAT and Label Studio are read as they were corrected, and what has no place is counted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mvision.cli.main import run
from mvision.data.formats.brush import BadBrush, decode_brush, encode_brush
from mvision.data.formats.coco import FIELDS, CocoSplit
from mvision.data.formats.layouts import find_layout
from mvision.errors import UserError
from tests.fake_model import paint, save
from tests.label_model import label, photos, read


def problems(folder: Path) -> dict[str, int]:
    part = CocoSplit(find_layout(folder).split("train", FIELDS), FIELDS)
    return {problem.kind: problem.count for problem in part.problems}


def test_a_corrected_cvat_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A box moved, a class changed, an object deleted, a mark taken away."""
    out = tmp_path / "out"
    label(monkeypatch, photos(tmp_path / "in"), out, "--format", "cvat", tasks=["detection"])
    file = out / "annotations.xml"
    text = file.read_text()
    text = text.replace('xtl="20.00" ytl="10.00"', 'xtl="25.00" ytl="12.50"').replace('label="green"', 'label="blue"')
    text = re.sub(r'<box label="blue"[^>]*xtl="5.00".*?</box>', "", text, flags=re.DOTALL)
    assert problems(out) == {"shape that is still marked for review: read as it is": 1}
    file.write_text(text.replace(">true<", ">false<"))
    found = read(out)
    assert [one["name"] for one in found["a.png"]] == ["red", "blue"]
    assert found["a.png"][0]["bbox"] == [25, 12.5, 45, 47.5]
    assert found["b.png"] == []
    assert problems(out) == {}


def test_a_corrected_label_studio_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    label(monkeypatch, photos(tmp_path / "in"), out, "--format", "label-studio", tasks=["detection"])
    tasks = json.loads((out / "tasks.json").read_text())
    for number, task in enumerate(tasks):
        result = task["predictions"][0]["result"]
        task["annotations"] = [
            {"result": result, "was_cancelled": False, "updated_at": "2026-01-02"},
            {"result": [], "was_cancelled": True, "updated_at": "2026-01-03"},
        ]
        task["data"]["image"] = f"/data/upload/1/0123abcd-{Path(task['data']['image']).name}"
        task["id"] = number
    red, green = tasks[0]["annotations"][0]["result"]
    red["value"]["x"] += 10
    green["value"]["rectanglelabels"] = ["blue"]
    del tasks[2]["annotations"]  # not labelled
    tasks[1]["annotations"].append({"result": [green], "updated_at": "2026-01-01"})
    (out / "tasks.json").unlink()
    (out / "project-1-at-2026-01-03.json").write_text(json.dumps(tasks))
    found = read(out)
    assert list(found) == ["a.png", "empty.png"]
    assert [one["name"] for one in found["a.png"]] == ["red", "blue"]
    assert found["a.png"][0]["bbox"] == pytest.approx([20 + 12.8, 10, 50, 50], abs=0.02)
    assert found["empty.png"] == []
    assert problems(out) == {
        "task with several annotations: the last one is read": 1,
        "task without an annotation, so not labelled: left out": 1,
    }
    assert find_layout(out / "project-1-at-2026-01-03.json").splits.keys() == {"train"}


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version>
<meta><project><labels>
<label><name>person</name><type>any</type></label>
<label><name>person pose</name><type>skeleton</type>
<svg>&lt;line data-type="edge" data-node-from="1" data-node-to="2"&gt;&lt;/line&gt;</svg></label>
<label><name>head</name><type>points</type><parent>person pose</parent></label>
<label><name>foot</name><type>points</type><parent>person pose</parent></label>
</labels></project></meta>
{images}</annotations>"""
POSE = """<skeleton label="person pose" {group}>
<points label="foot" outside="0" occluded="1" points="30,60"/><points label="head" outside="{out}" points="30,20"/>
</skeleton>"""


def cvat(folder: Path, shapes: str, before: str = "") -> Path:
    save(folder / "images" / "a.png", paint((96, 128), []))
    images = f'<image id="0" name="a.png" width="128" height="96">{shapes}</image>'
    (folder / "annotations.xml").write_text(before + CVAT.format(images=images))
    return folder


BOX = '<box label="person" xtl="10" ytl="10" xbr="50" ybr="70" {}/>'


@pytest.mark.parametrize(("group", "said"), [('group_id="1"', 0), ("", 1)])
def test_a_skeleton_belongs_to_the_box_of_its_group_or_around_it(tmp_path: Path, group: str, said: int) -> None:
    around = '<box label="person" xtl="0" ytl="0" xbr="120" ybr="90"/>' if group else ""
    folder = cvat(tmp_path, around + BOX.format(group) + POSE.format(group=group, out=0))
    found = read(folder)["a.png"]
    assert found[-1]["bbox"] == [10, 10, 40, 60]
    assert found[-1]["keypoints"] == [30, 20, 2, 30, 60, 1]
    assert len(found) == 1 + bool(group)
    assert (
        problems(folder).get("skeleton without a group: it belongs to the smallest object of its class around it", 0)
        == said
    )
    categories = CocoSplit(find_layout(folder).split("train"), ("keypoints",)).own
    assert [(c.name, c.keypoints, c.skeleton) for c in categories] == [("person", ["head", "foot"], [(0, 1)])]


def test_a_skeleton_alone_gets_a_box_around_its_points(tmp_path: Path) -> None:
    (one,) = read(cvat(tmp_path, POSE.format(group="", out=1)))["a.png"]
    assert one["keypoints"] == [0, 0, 0, 30, 60, 1]
    assert one["name"] == "person"


def test_other_shapes_of_cvat(tmp_path: Path) -> None:
    shapes = [
        BOX.format('group_id="5"'),
        BOX.format('group_id="5"').replace('"10"', '"20"'),  # two boxes of a group are two objects
        BOX.format('rotation="90"'),
        '<ellipse label="person" cx="60" cy="40" rx="20" ry="10"/>',
        '<polyline label="person" points="1,2;3,4"/>',
        '<tag label="person"/>',
        '<polygon label="person" points="1,2;oops"/>',
        '<mask label="person" rle="2, 2, 2, 2, 1" left="3" top="4" width="3" height="3"/>',
        '<mask label="person" rle="2, 2" left="3" top="4" width="3" height="3"/>',
    ]
    folder = cvat(tmp_path, "".join(shapes))
    found = {tuple(np.round(one["bbox"]).tolist()): one for one in read(folder)["a.png"]}
    assert set(found) == {(10, 10, 40, 60), (20, 20, 30, 50), (0, 20, 60, 40), (40, 30, 40, 20), (3, 4, 3, 3)}
    mask = coco_mask.decode(found[3, 4, 3, 3]["segmentation"])
    assert mask[4:7, 3:6].ravel().tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 0]
    assert found[40, 30, 40, 20]["area"] == pytest.approx(np.pi * 200, rel=0.02)
    counts = problems(folder)
    assert sum(counts.values()) == 8, counts
    assert counts["mask that cannot be used: left out"] == 1


def test_subsets_of_a_cvat_project(tmp_path: Path) -> None:
    images = ""
    for subset, name in (("Train", "a.png"), ("Validation", "b.png")):
        save(tmp_path / "images" / subset / name, paint((96, 128), []))
        images += f'<image id="0" name="{name}" subset="{subset}" width="128" height="96">{BOX.format("")}</image>'
    (tmp_path / "annotations.xml").write_text(CVAT.format(images=images))
    layout = find_layout(tmp_path)
    assert list(layout.splits) == ["train", "val"]
    assert list(read(tmp_path)) == ["a.png"]
    assert list(read(tmp_path, "val")) == ["b.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotations><image", "not valid XML"),
        ("<!-- --><annotations><track id='0'></track></annotations>", "export as 'CVAT for images 1.1'"),
        ("<annotations></annotations>", "no categories"),
    ],
)
def test_broken_cvat_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "annotations.xml").write_text(text)
    with pytest.raises(UserError, match=message):
        CocoSplit(find_layout(tmp_path).split("train"))


def test_entities_are_refused(tmp_path: Path) -> None:
    folder = cvat(tmp_path, "")
    file = folder / "annotations.xml"
    file.write_text(file.read_text().replace("<version>", "<!--x--><version>", 1))
    layout = find_layout(folder)
    file.write_text('<!DOCTYPE a [<!ENTITY b "bbb">]>' + file.read_text().partition("?>")[2])
    with pytest.raises(UserError, match="document type"):
        CocoSplit(layout.split("train"))


def region(kind: str, value: dict[str, Any], identity: str = "r", **more: Any) -> dict[str, Any]:
    labels = {f"{kind}labels": ["person"]} if kind else {}
    return {
        "id": identity,
        "type": f"{kind}labels" if kind else "choices",
        "original_width": 128,
        "original_height": 96,
        "value": {**labels, **value},
        **more,
    }


def label_studio(folder: Path, *results: dict[str, Any], address: str = "s3://bucket/some/a.png") -> Path:
    save(folder / "images" / "a.png", paint((96, 128), []))
    task = {"id": 1, "data": {"photo": address}, "annotations": [{"result": list(results)}]}
    (folder / "export.json").write_text(json.dumps([task]))
    return folder


RECTANGLE = {"x": 10, "y": 20, "width": 50, "height": 25, "rotation": 0}


def test_other_shapes_of_label_studio(tmp_path: Path) -> None:
    mask = np.zeros((96, 128), bool)
    mask[10:20, 30:50] = True
    folder = label_studio(
        tmp_path,
        region("rectangle", {**RECTANGLE, "rotation": 90, "x": 50}, "turned"),
        region("ellipse", {"x": 50, "y": 50, "radiusX": 10, "radiusY": 5, "rotation": 0}, "round"),
        region("brush", {"format": "rle", "rle": encode_brush(mask)}, "brush"),
        region("brush", {"format": "rle", "rle": [1, 2]}, "broken"),
        region("polygon", {"points": [[0, 0], [10, 0], [10, 10]]}, "part"),
        region("polygon", {"points": [[20, 0], [30, 0], [30, 10]]}, "other part", parentID="part"),
        region("", {"choices": ["good"]}, "choice"),
        region("rectangle", {**RECTANGLE, "rectanglelabels": []}, "unlabelled"),
        {**region("rectangle", RECTANGLE, "two entries"), "type": "rectangle", "value": RECTANGLE},
        region("rectangle", {**RECTANGLE, "rectanglelabels": ["person", "tall"]}, "two entries"),
        region("rectangle", RECTANGLE, "view", image_rotation=90),
    )
    found = {tuple(np.round(one["bbox"], 1).tolist()): one for one in read(folder)["a.png"]}
    assert set(found) == {
        (40.0, 19.2, 24.0, 64.0),
        (51.2, 43.2, 25.6, 9.6),
        (30.0, 10.0, 20.0, 10.0),
        (0.0, 0.0, 38.4, 9.6),
        (12.8, 19.2, 64.0, 24.0),
    }
    assert len(found[0.0, 0.0, 38.4, 9.6]["segmentation"]) == 2
    np.testing.assert_array_equal(coco_mask.decode(found[30.0, 10.0, 20.0, 10.0]["segmentation"]), mask)
    counts = problems(folder)
    assert counts["region that cannot be used: left out"] == 2
    assert counts["region with several labels: the first one is read"] == 1
    assert counts["region without a label: left out"] == 1
    assert sum(count for kind, count in counts.items() if kind.startswith("result of the kind")) == 1


def test_keypoints_of_label_studio(tmp_path: Path) -> None:
    def point(name: str, x: float, y: float, **more: Any) -> dict[str, Any]:
        return region("keypoint", {"x": x, "y": y, "width": 1, "keypointlabels": [name]}, f"{name}{x}{y}", **more)

    folder = label_studio(
        tmp_path,
        region("rectangle", RECTANGLE, "one"),
        region("rectangle", {**RECTANGLE, "y": 60}, "two"),
        point("foot", 20, 40, parentID="one"),
        point("head", 20, 25, parentID="one"),
        point("foot", 20, 70),  # in the second box, not nested
        point("foot", 95, 95),  # in none
    )
    (folder / "config.xml").write_text(
        '<View><Image name="i" value="$photo"/><RectangleLabels name="b" toName="i"><Label value="dog"/><Label '
        'value="person"/></RectangleLabels><KeyPointLabels name="k" toName="i"><Label value="foot" model_index="1"/>'
        '<Label value="head" model_index="0"/></KeyPointLabels></View>'
    )
    one, two = read(folder)["a.png"]
    np.testing.assert_allclose(one["keypoints"], [25.6, 24, 2, 25.6, 38.4, 2])
    np.testing.assert_allclose(two["keypoints"], [0, 0, 0, 25.6, 67.2, 2])
    categories = CocoSplit(find_layout(folder).split("train"), ("keypoints",)).own
    assert [(c.name, c.keypoints) for c in categories] == [("dog", []), ("person", ["head", "foot"])]
    assert problems(folder) == {
        "keypoint in no region: it belongs to the smallest object of its class around it": 1,
        "keypoint in no region, and none of its class around it: left out": 1,
    }


@pytest.mark.parametrize(
    "address",
    ["/data/local-files/?d=set/images/a.png", "https://host/x/a.png?sig=1", "/data/upload/3/01234567-a.png", "a.png"],
)
def test_addresses_of_pictures(tmp_path: Path, address: str) -> None:
    folder = label_studio(tmp_path, region("rectangle", RECTANGLE), address=address)
    assert list(read(folder)) == ["a.png"]


def test_json_min_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png", paint((96, 128), []))
    entry = {"image": "a.png", "id": 1, "label": [{**RECTANGLE, "rectanglelabels": ["person"]}]}
    (tmp_path / "min.json").write_text(json.dumps([entry]))
    with pytest.raises(UserError, match="export as JSON, not as JSON-MIN"):
        CocoSplit(find_layout(tmp_path).split("train"))


def test_brush_of_values_that_are_not_repeated() -> None:
    """As an editor writes colours: red, green, blue and opacity differ."""
    values = [10, 20, 30, 0, 10, 20, 30, 255]
    bits = f"{8:032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}" + "000" + f"{7:03b}" + "".join(f"{v:08b}" for v in values)
    data = list(int(bits + "0" * (-len(bits) % 8), 2).to_bytes((len(bits) + 7) // 8, "big"))
    assert decode_brush(data, 1, 2).tolist() == [[False, True]]
    for broken in (data[:-4], [*data[:3], 9, *data[4:]], [256], []):
        with pytest.raises(BadBrush):
            decode_brush(broken, 1, 2)


def test_conversion_and_folders_called_like_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        cvat(tmp_path / "set" / split, BOX.format(""))
    assert run(["data", "convert", str(tmp_path / "set"), str(tmp_path / "plain")]) == 0
    assert sorted(p.name for p in (tmp_path / "plain" / "annotations").iterdir()) == ["train.json", "val.json"]
    assert [one["bbox"] for one in read(tmp_path / "plain", "val")["a.png"]] == [[10, 10, 40, 60]]
