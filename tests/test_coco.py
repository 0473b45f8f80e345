"""Reading COCO files: what is refused, what is named and skipped, and what the rest becomes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mvision.data.formats.coco import CocoSplit, same_categories
from mvision.data.formats.layouts import find_layout
from mvision.data.formats.segmentation import rasterise
from mvision.errors import UserError
from tests.coco_files import CATEGORIES, PEOPLE, annotation, coco, write_set

SQUARE = [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]]
ALL = ("boxes", "masks", "keypoints")


def read(root: Path, tree: dict[str, Any], fields: tuple[str, ...] = ("boxes",), split: str = "train") -> CocoSplit:
    write_set(root, tree, split)
    return CocoSplit(find_layout(root).split(split), fields)


def kinds(split: CocoSplit) -> dict[str, int]:
    return {problem.kind.split(":")[0]: problem.count for problem in split.problems}


def test_category_ids_with_gaps_become_contiguous_labels(tmp_path: Path) -> None:
    categories = [{"id": 90, "name": "last"}, {"id": 1, "name": "first"}, {"id": 13, "name": "middle"}]
    split = read(tmp_path, coco([annotation(category_id=c) for c in (13, 90, 1)], categories))
    assert [(category.id, category.name) for category in split.categories] == [
        (1, "first"),
        (13, "middle"),
        (90, "last"),
    ]
    assert split.labels.labels.tolist() == [1, 2, 0]
    assert [entry["category_id"] for entry in split.coco_dict["annotations"]] == [13, 90, 1]


def test_boxes_in_fractions_and_by_image(tmp_path: Path) -> None:
    split = read(tmp_path, coco([annotation(2, [8, 12, 16, 24]), annotation(1), annotation(2)], images=3))
    assert split.start.tolist() == [0, 1, 3, 3]
    np.testing.assert_allclose(split.labels.boxes[1], (8 / 64, 12 / 48, 24 / 64, 36 / 48))
    assert split.labels.boxes.dtype == np.float32
    assert split.labels.areas[1] == pytest.approx(16 * 24 / (48 * 64))
    assert split.labels.outlines is None
    assert split.labels.keypoints is None


def test_skeleton_counts_from_zero(tmp_path: Path) -> None:
    split = read(tmp_path, coco([annotation(category_id=1)], PEOPLE))
    assert split.categories[0].skeleton == [(0, 1), (0, 2)]
    assert split.coco_dict["categories"][0]["skeleton"] == [[1, 2], [1, 3]]


@pytest.mark.parametrize("compressed", [False, True])
def test_run_lengths(tmp_path: Path, compressed: bool) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[5:20, 30:50] = 1
    mask[8:10, 35:40] = 0
    rle = coco_mask.encode(np.asfortranarray(mask))
    if compressed:
        segmentation: dict[str, Any] = {"size": [48, 64], "counts": rle["counts"].decode()}
    else:
        flat = mask.flatten(order="F")
        edges = np.flatnonzero(np.diff(np.concatenate(([0], flat, [0])))).tolist()
        counts = np.diff([0, *edges, len(flat)]).tolist()
        segmentation = {"size": [48, 64], "counts": counts}
    entry = annotation(segmentation=segmentation)
    del entry["bbox"]  # comes from the segmentation
    split = read(tmp_path, coco([entry]), ALL)
    assert split.coco_dict["annotations"][0]["bbox"] == [30, 5, 20, 15]
    assert split.coco_dict["annotations"][0]["area"] == mask.sum()
    assert split.labels.outlines is not None
    outline = split.labels.outlines[0]
    assert outline is not None
    drawn = rasterise(outline, np.ones(2), np.zeros(2), (0, 0, 64, 48), (48, 64))
    assert np.array_equal(drawn, mask)


def test_parts_of_a_polygon_are_united(tmp_path: Path) -> None:
    parts = [
        *SQUARE,
        [40.0, 10.0, 50.0, 10.0, 50.0, 20.0, 40.0, 20.0],
        [20.0, 20.0, 45.0, 20.0, 45.0, 25.0, 20.0, 25.0],
    ]
    split = read(tmp_path, coco([annotation(segmentation=parts)]), ALL)
    assert split.labels.outlines is not None
    outline = split.labels.outlines[0]
    assert isinstance(outline, list)
    assert len(outline) == 3
    drawn = rasterise(outline, np.ones(2), np.zeros(2), (0, 0, 64, 48), (48, 64))
    rles = coco_mask.frPyObjects(parts, 48, 64)
    assert np.array_equal(drawn, coco_mask.decode(coco_mask.merge(rles)))
    assert drawn.sum() == 400 + 100 + 15 * 5 + 10 * 5 - 10 * 5  # overlaps count once


def test_crowds_stay_for_evaluation_and_are_marked(tmp_path: Path) -> None:
    split = read(tmp_path, coco([annotation(), annotation(iscrowd=1)]))
    assert split.labels.crowd.tolist() == [False, True]
    assert [entry["iscrowd"] for entry in split.coco_dict["annotations"]] == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("images"), "no list 'images' in it"),
        (lambda t: t.update(annotations=None), "no list 'annotations' in it"),
        (lambda t: t.pop("categories"), "no list 'categories' in it"),
        (lambda t: t.update(images=[]), "no images in it"),
        (lambda t: t.update(categories=[]), "no categories"),
        (lambda t: t["annotations"][0].update(category_id=99), "annotation 1 has category_id 99; .* 3, 7"),
        (lambda t: t["annotations"].append(3), r"annotations\[1\] is no object"),
        (lambda t: t["categories"][0].pop("name"), "category 3 has no name"),
        (lambda t: t["categories"][0].pop("id"), r"categories\[0\] has no whole number as id"),
        (lambda t: t["categories"].append({"id": 3, "name": "x"}), "category id 3 occurs twice"),
        (lambda t: t["categories"].append({**t["categories"][0], "id": 90}), "categories 3 and 90 are both named"),
        (lambda t: t["images"].append({**t["images"][0], "file_name": "2"}), r"image id 1 occurs twice \(1.png, 2"),
        (lambda t: t["images"][0].pop("file_name"), "image 1 has no file_name"),
        (lambda t: t["images"][0].update(file_name="../secret.png"), r"'\.\./secret\.png' leaves the folder"),
        (lambda t: t["images"][0].update(file_name="/etc/passwd"), "'/etc/passwd' leaves the folder"),
        (lambda t: t["images"][0].update(file_name="gone.png"), r"none of its images is there: looked for gone\.png"),
    ],
)
def test_structural_mistakes_are_refused_in_one_line(tmp_path: Path, change: Any, message: str) -> None:
    tree = coco([annotation()], [dict(category) for category in CATEGORIES])
    write_set(tmp_path, tree)
    change(tree)
    write_set(tmp_path, tree, pictures=False)
    with pytest.raises(UserError, match=message) as caught:
        CocoSplit(find_layout(tmp_path).split("train"))
    assert "\n" not in str(caught.value)
    assert "train.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [,]}', r"train\.json: not valid JSON at line 1, column 13"),
        ("", "not valid JSON at line 1, column 1"),
        ("[1, 2]", "top level is a list"),
    ],
)
def test_malformed_json(tmp_path: Path, text: str, message: str) -> None:
    write_set(tmp_path, coco([annotation()]))
    (tmp_path / "annotations" / "train.json").write_text(text)
    with pytest.raises(UserError, match=message):
        CocoSplit(find_layout(tmp_path).split("train"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_text_of_other_encodings_is_read(tmp_path: Path, encoding: str) -> None:
    write_set(tmp_path, coco([annotation()]))
    file = tmp_path / "annotations" / "train.json"
    file.write_bytes(file.read_text().encode(encoding))
    assert len(CocoSplit(find_layout(tmp_path).split("train")).labels) == 1


@pytest.mark.parametrize(
    ("bbox", "kind"),
    [
        ([10, 10, 0, 5], "box without area"),
        ([10, 10, 5, -1], "box without area"),
        ([70, 10, 5, 5], "box outside the image"),
        ([float("nan"), 10, 5, 5], "bbox that is not four finite numbers"),
        ([10, 10, float("inf"), 5], "bbox that is not four finite numbers"),
        ([10, 10, 5], "bbox that is not four finite numbers"),
        (["a", 10, 5, 5], "bbox that is not four finite numbers"),
        (None, "neither bbox nor segmentation"),
    ],
)
def test_unusable_boxes_are_counted_and_skipped(tmp_path: Path, bbox: Any, kind: str) -> None:
    bad = {**annotation(), "bbox": bbox}
    split = read(tmp_path, coco([bad, annotation(), bad]))
    assert kinds(split) == {kind: 2}
    assert len(split.labels) == 1
    assert "1.png, annotation 1" in str(split.problems)
    assert [entry["id"] for entry in split.coco_dict["annotations"]] == [2]


def test_box_over_the_border_is_clipped(tmp_path: Path) -> None:
    split = read(tmp_path, coco([annotation(bbox=[-4, 10, 10, 10]), annotation(bbox=[60, 10, 4.5, 10])]))
    assert kinds(split) == {"box reaching over the image's border": 1}  # half a pixel is rounding
    np.testing.assert_allclose(split.labels.boxes[0] * (64, 48, 64, 48), (0, 10, 6, 20), atol=1e-5)
    assert split.labels.boxes.max() <= 1


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 1, 5, 5]],
        [[1, 1, 5, 5, float("nan"), 3]],
        {"size": [10, 10], "counts": [50, 10, 40]},
        {"size": [48, 64], "counts": [50, 10]},
        {"size": [48, 64], "counts": "garbage!"},
        {"size": [48, 64]},
        "text",
    ],
)
def test_unusable_segmentation_leaves_the_box(tmp_path: Path, segmentation: Any) -> None:
    split = read(tmp_path, coco([annotation(segmentation=segmentation)]), ("boxes", "masks"))
    assert kinds(split) == {"segmentation that cannot be used": 1}
    assert len(split.labels) == 1
    assert split.labels.outlines is not None
    assert split.labels.outlines[0] is None
    assert "segmentation" not in split.coco_dict["annotations"][0]


@pytest.mark.parametrize(
    "shape", [{"bbox": [0.2, 0.25, 0.5, 0.5]}, {"bbox": None, "segmentation": [[0.2, 0.25, 0.7, 0.25, 0.7, 0.75]]}]
)
def test_boxes_in_fractions_are_refused(tmp_path: Path, shape: dict[str, Any]) -> None:
    entries = [{**annotation(image), **shape} for image in (1, 2)]
    message = (
        r"train\.json: boxes in fractions .*annotation 1 of 1\.png: \[0\.2, .* on 64 x 48\); COCO wants pixels: mult"
    )
    with pytest.raises(UserError, match=message):
        read(tmp_path, coco(entries, images=2))
    assert len(read(tmp_path, coco([*entries, annotation()], images=2)).labels) == 3  # one of them proves pixels
    assert len(read(tmp_path, coco([annotation(bbox=[0, 0, 1, 1])], size=(8, 8))).labels) == 1


def test_areas_that_cannot_be_true_are_measured(tmp_path: Path) -> None:
    line = [[8.0, 8.0, 9.0, 8.0, 28.0, 24.0, 27.0, 24.0]]  # about 16 pixels
    areas: list[Any] = [1, 600, 4, 3, 355, 0, None, "x", 1e9]
    given = [annotation(area=area) for area in areas]
    thin = annotation(bbox=[0, 0, 60, 48], segmentation=line, area=17)
    entries = [*given, annotation(segmentation=SQUARE, area=900), thin]
    for fields in (("boxes",), ALL):  # the same whether masks are asked for or not
        for number, entry in enumerate(entries):
            entry["keypoints"] = [number, 0, 0]  # no twins
        split = read(tmp_path, coco(entries), fields)
        found = [entry["area"] for entry in split.coco_dict["annotations"]]
        assert found == [320, 320, 4, 320, 355, 320, 320, 320, 320, 400, 17]
        assert kinds(split)["area that the object's box cannot have"] == 5
    assert "1.png, annotation 2: area 600, bbox [8, 8, 20, 16]" in str(split.problems)


def test_boxes_that_look_like_corners_are_named(tmp_path: Path) -> None:
    corners: list[list[float]] = [[1, 4, 3, 5], [2, 8, 5, 10], [5, 20, 11, 25], [40, 30, 64.5, 48], [30, 1, 50, 9]]
    entries = [annotation(bbox=box) for box in corners]
    kind = "boxes that look like corners x0 y0 x1 y1, read as COCO's x y width height"
    split = read(tmp_path, coco(entries))
    assert kinds(split)[kind] == 1
    assert "5 boxes, 2 of them over the border, such as 1.png: [1, 4, 3, 5] on 64 x 48" in str(split.problems)
    for other in (entries[:4], [*entries, annotation(bbox=[20, 4, 10, 8])], [*entries, *entries[:3] * 2]):
        for number, entry in enumerate(other):  # no twins
            other[number] = {**entry, "keypoints": [number, 0, 0]}
        assert kind not in kinds(read(tmp_path, coco(other)))


def test_outlines_and_points_lie_where_their_box_is(tmp_path: Path) -> None:
    entries = [
        annotation(category_id=1, bbox=[40, 20, 10, 10], segmentation=[outline], keypoints=[*point, 2, *[0] * 6])
        for outline, point in (
            ([0.6, 0.4, 0.8, 0.4, 0.8, 0.6], (0.7, 0.5)),  # fractions
            ([30.0, 10.0, 39.5, 10.0, 39.5, 20.0], (36, 16)),  # beside the box, but near
            ([30.0, 10.0, 60.0, 10.0, 60.0, 50.0], (50, 30)),
            ([30.0, 10.0, 38.0, 10.0, 38.0, 20.0], (34, 25)),  # too far
        )
    ]
    split = read(tmp_path, coco(entries, PEOPLE), ALL)
    found = kinds(split)
    assert found.pop("keypoint that no object has labelled") == 2
    assert sorted(found.values()) == [2, 2]
    assert "annotation 1: from [0.6, 0.4] to [0.8, 0.6], the box from [40.0, 20.0] to [50.0, 30.0]" in str(
        split.problems
    )
    assert split.labels.outlines is not None
    assert split.labels.keypoints is not None
    assert split.labels.outlines.present.tolist() == [False, True, True, False]
    assert split.labels.keypoints[:, 0, 2].tolist() == [0, 2, 2, 0]


def test_masks_are_not_looked_at_unless_asked_for(tmp_path: Path) -> None:
    split = read(tmp_path, coco([annotation(segmentation=[[1, 1, 5, 5]])]))
    assert len(split.problems) == 0
    assert split.available == {"boxes", "masks"}


def test_keypoints(tmp_path: Path) -> None:
    points = [10, 12, 2, 20, 24, 1, 0, 0, 0]
    outside = [10, 12, 2, 100, 24, 2, 0, 0, 0]
    entries = [annotation(category_id=1, keypoints=k) for k in (points, outside, [1, 2, 3], None)]
    split = read(tmp_path, coco(entries, PEOPLE), ALL[::2])
    assert kinds(split) == {
        "keypoint outside the image": 1,
        "keypoints of the wrong number": 1,
        "keypoint that no object has labelled": 1,
    }
    found = split.labels.keypoints
    assert found is not None
    np.testing.assert_allclose(found[0], [[10 / 64, 12 / 48, 2], [20 / 64, 24 / 48, 1], [0, 0, 0]])
    assert found[1, :, 2].tolist() == [2, 0, 0]
    assert not found[2:].any()
    assert [entry["num_keypoints"] for entry in split.coco_dict["annotations"]] == [2, 1, 0, 0]


def test_keypoints_without_names_get_numbers(tmp_path: Path) -> None:
    split = read(tmp_path, coco([annotation(keypoints=[1, 1, 2, 5, 5, 2])]), ALL[::2])
    assert split.categories[0].keypoints == ["point_0", "point_1"]
    assert split.available == {"boxes", "keypoints"}


def test_size_missing_in_the_annotations_comes_from_the_file(tmp_path: Path) -> None:
    tree = coco([annotation()])
    write_set(tmp_path, tree)
    del tree["images"][0]["height"]
    write_set(tmp_path, tree, pictures=False)
    split = CocoSplit(find_layout(tmp_path).split("train"))
    assert (split.records[0].height, split.records[0].width) == (48, 64)
    assert kinds(split) == {"image without height and width in the annotations": 1}


def test_ids_written_as_text_and_backslashes(tmp_path: Path) -> None:
    tree = coco([annotation()])
    write_set(tmp_path, {**tree, "images": [{**tree["images"][0], "file_name": "sub/1.png"}]})
    tree["images"][0].update(id="1", file_name="sub\\1.png")
    tree["annotations"][0].update(image_id="1", category_id="3")
    write_set(tmp_path, tree, pictures=False)
    split = CocoSplit(find_layout(tmp_path).split("train"))
    assert split.records[0].file == "sub/1.png"
    assert split.coco_dict["annotations"][0]["image_id"] == 1


def test_annotation_ids_are_made_unique(tmp_path: Path) -> None:
    tree = coco([annotation(bbox=[8, 8, 20, side]) for side in (10, 11, 12)])
    for entry, identity in zip(tree["annotations"], (0, 4, 4)):
        entry["id"] = identity
    ids = [entry["id"] for entry in read(tmp_path, tree).coco_dict["annotations"]]
    assert len(set(ids)) == 3
    assert 0 not in ids


def test_missing_keys_are_filled_in(tmp_path: Path) -> None:
    triangle = [[10.0, 10.0, 30.0, 10.0, 10.0, 30.0]]
    entries = [annotation(category_id=1, keypoints=[10, 12, 2, 0, 0, 0, 20, 24, 1]), annotation(category_id=1)]
    entries += [annotation(category_id=1, segmentation=triangle), annotation(1, [8, 8, 20, 15], 1, area=7)]
    for entry in entries:
        del entry["iscrowd"]
    filled = read(tmp_path, coco(entries, PEOPLE), ALL).coco_dict["annotations"]
    drawn = int(coco_mask.area(coco_mask.merge(coco_mask.frPyObjects(triangle, 48, 64))))
    assert [entry["area"] for entry in filled] == [320, 320, drawn, 7]  # the box's, the mask's, the file's own
    assert {entry["iscrowd"] for entry in filled} == {0}
    assert [entry["num_keypoints"] for entry in filled] == [2, 0, 0, 0]
    assert filled[1]["keypoints"] == [0] * 9


def test_the_file_is_read_once(tmp_path: Path) -> None:
    tree = coco([annotation(segmentation=SQUARE), annotation(bbox=[8.123456789012345, 8, 20, 16])])
    split = read(tmp_path, tree, ("boxes", "masks"))
    (tmp_path / "annotations" / "train.json").unlink()
    first, second = split.coco_dict["annotations"]
    assert first["segmentation"] == SQUARE
    assert second["bbox"] == [8.123456789012345, 8, 20, 16]  # the file's numbers, where labels are rounded fractions


def test_annotations_are_kept_only_where_they_are_wanted(tmp_path: Path) -> None:
    write_set(tmp_path, coco([annotation()]))
    split = CocoSplit(find_layout(tmp_path).split("train"), keep_annotations=False)
    assert len(split.labels) == 1
    with pytest.raises(ValueError, match="without keeping its annotations"):
        _ = split.coco_dict


def test_labels_are_sorted_by_image_and_annotations_are_not(tmp_path: Path) -> None:
    entries = [annotation(2, category_id=7), annotation(1), annotation(2), annotation(1, category_id=7)]
    split = read(tmp_path, coco(entries, images=3))
    assert [split.labels.labels[split.rows(image)].tolist() for image in range(3)] == [[0, 1], [1, 0], []]
    assert [entry["image_id"] for entry in split.coco_dict["annotations"]] == [2, 1, 2, 1]


def test_coco_dict_is_what_pycocotools_expects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = coco([annotation(segmentation=SQUARE), annotation(2, category_id=7, segmentation=SQUARE)], images=2)
    split = read(tmp_path, tree, ("boxes", "masks"))
    oracle = COCO()
    oracle.dataset = split.coco_dict
    oracle.createIndex()
    assert oracle.annToMask(oracle.anns[1]).sum() == 400
    assert oracle.getAnnIds(catIds=[7]) == [2]
    assert json.loads(json.dumps(split.coco_dict)) == split.coco_dict


def test_categories_of_two_splits_have_to_agree(tmp_path: Path) -> None:
    train = read(tmp_path, coco([annotation()]))
    same_categories(train, read(tmp_path, coco([annotation()], CATEGORIES[:1]), split="val"))
    other = read(tmp_path, coco([annotation()], [{"id": 3, "name": "wolf"}]), split="val")
    with pytest.raises(UserError, match=r"val.json: none of its classes \(wolf\) is in .*train.json \(cat, dog\)"):
        same_categories(train, other)
